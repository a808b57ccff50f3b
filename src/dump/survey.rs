//! What would stop a dump of a tree, found while the tree runs.
//!
//! Everything that can be seen from outside is looked at the way a dump looks at it: the same tables of kinds, the
//! same judgement of areas. What only a stopped task can tell (its timers, its signal stack) is not. The tree is
//! neither stopped nor changed; tasks and descriptors that come or go meanwhile are passed over.

use std::{
    collections::HashSet,
    fs,
    os::{fd::AsFd, unix::fs::MetadataExt},
};

use anyhow::{Context, Result, bail};

use super::tree::{children_of, tids};
use crate::{
    files::FilesDump,
    finding::Finding,
    image::MemStore,
    mem::{self, MappedFile, SharedMemory, VmaFiles},
    proc::{stat, status},
    settings::DumpSettings,
    sys::{
        kcmp::{Kind, kcmp},
        pidfd,
    },
};

/// How often a task is looked at anew when it changed under our eyes.
const TRIES: usize = 3;

/// The kinds of namespace that a task of the tree must share with us.
const NAMESPACES: [&str; 8] = ["pid", "net", "ipc", "uts", "time", "mnt", "user", "cgroup"];

/// Names everything in the tree of `settings.pid` that would stop a dump with these settings.
pub fn check_tree(settings: &DumpSettings) -> Result<Vec<Finding>> {
    let root = settings.pid.as_raw();
    let Ok(stat) = fs::read(format!("/proc/{root}/stat")) else { bail!("no process has pid {root}") };
    let stat = stat::parse(&stat)?;
    let mut survey = Survey { settings, findings: Vec::new() };
    if stat.session != root && !settings.common.shell_job {
        survey.finding(
            root,
            "session",
            format!("the root task is no session leader: its session {} is outside the tree", stat.session),
            "use --shell-job, or start the program with setsid",
        );
    }
    let tree = walk(root);
    if tree.contains(&std::process::id().cast_signed()) {
        survey.finding(root, "tree", "crtool itself is part of it".into(), "run crtool from somewhere else");
    }
    for &pid in &tree {
        survey.task(pid)?;
    }
    survey.shared_memory(&tree);
    survey.objects(&tree)?;
    let mut findings = survey.findings;
    let mut seen = HashSet::new();
    findings.retain(|finding| seen.insert(finding.to_string()));
    Ok(findings)
}

/// All tasks of a tree, parents before children; those that are there now.
fn walk(root: i32) -> Vec<i32> {
    let mut all = vec![root];
    let mut seen = HashSet::from([root]);
    let mut next = 0;
    while let Some(&pid) = all.get(next) {
        all.extend(children_of(pid).into_iter().filter(|&child| seen.insert(child)));
        next += 1;
    }
    all
}

/// A thread by which the files of a process can be reached; `None` for one that is gone or dead.
fn agent(pid: i32) -> Option<i32> {
    tids(pid).into_iter().find(|tid| {
        let stat = fs::read(format!("/proc/{tid}/stat")).ok();
        stat.and_then(|bytes| stat::parse(&bytes).ok())
            .is_some_and(|stat| !matches!(stat.state, stat::State::Zombie | stat::State::Dead))
    })
}

struct Survey<'s> {
    settings: &'s DumpSettings,
    findings: Vec<Finding>,
}

/// Mapped files are judged as open files are.
struct Mapped<'f, 's>(&'f mut FilesDump<'s>, &'f mut Vec<Finding>);

impl VmaFiles for Mapped<'_, '_> {
    fn mapped_file(
        &mut self,
        mapped: MappedFile<'_>,
    ) -> Result<u32, Box<dyn std::error::Error + Send + Sync>> {
        let writable = mapped.flags & libc::O_ACCMODE == libc::O_RDWR;
        let id = self.0.file_for(mapped.pid, mapped.path, mapped.file.as_fd(), writable, self.1)?;
        Ok(id.unwrap_or(0))
    }
}

impl Survey<'_> {
    fn finding(&mut self, pid: i32, what: &str, reason: String, hint: &str) {
        self.findings.push(Finding { pid, what: what.into(), reason, hint: hint.into() });
    }

    /// What its status and its namespaces say.
    fn task(&mut self, pid: i32) -> Result<()> {
        let Some(agent) = agent(pid) else { return Ok(()) };
        let Ok(text) = fs::read(format!("/proc/{agent}/status")) else { return Ok(()) };
        let status = status::parse(&text)?;
        if status.kthread == Some(true) {
            self.finding(pid, "task", "it is a thread of the kernel".into(), "");
        }
        if status.tracer_pid != 0 {
            let tracer = format!("it is traced by task {}", status.tracer_pid);
            self.finding(pid, "task", tracer, "end the debugger");
        }
        for name in NAMESPACES {
            let inode = |task: &str| {
                fs::metadata(format!("/proc/{task}/ns/{name}")).map(|meta| (meta.dev(), meta.ino())).ok()
            };
            let (Some(ours), Some(theirs)) = (inode("self"), inode(&agent.to_string())) else { continue };
            if ours != theirs {
                self.finding(
                    pid,
                    &format!("{name} namespace"),
                    "it is another one than crtool's; namespaces are not supported yet".into(),
                    "run crtool inside them (nsenter)",
                );
            }
        }
        Ok(())
    }

    /// Processes that share an address space without being threads of one another.
    fn shared_memory(&mut self, tree: &[i32]) {
        let mut spaces: Vec<i32> = Vec::new();
        for &pid in tree.iter().filter(|&&pid| agent(pid).is_some()) {
            let place = spaces.binary_search_by(|other| {
                kcmp(*other, pid, Kind::Vm, 0, 0).unwrap_or(std::cmp::Ordering::Less)
            });
            match place {
                Ok(at) => {
                    let other = spaces.get(at).copied().unwrap_or_default();
                    let reason = format!("shared with task {other} (CLONE_VM without CLONE_THREAD)");
                    self.finding(pid, "address space", reason, "");
                }
                Err(at) => spaces.insert(at, pid),
            }
        }
    }

    /// What the tree has open and mapped.
    fn objects(&mut self, tree: &[i32]) -> Result<()> {
        // Linking a file back would change the file system: what it would solve is left out below.
        let mut settings = self.settings.clone();
        let link_remap = std::mem::replace(&mut settings.common.link_remap, false);
        let store = MemStore::new();
        let mut files = FilesDump::of_running(&store, &settings);
        let mut found = Vec::new();
        for (&pid, id) in tree.iter().zip(2..) {
            let mut last = Ok(());
            for _ in 0..TRIES {
                let Some(agent) = agent(pid) else { break };
                let mut seen = Vec::new();
                last = look(&mut files, pid, agent, id, &mut seen);
                if last.is_ok() {
                    found.append(&mut seen);
                    break;
                }
            }
            if let Err(error) = last
                && agent(pid).is_some()
            {
                return Err(error).with_context(|| format!("look at task {pid}"));
            }
        }
        if let Err(error) = files.finish(&mut found) {
            // Descriptors were closed since: no reason against a dump.
            tracing::info!("{:#}", anyhow::Error::from(error));
        }
        found.retain(|finding| !(link_remap && finding.hint.contains("--link-remap")));
        self.findings.append(&mut found);
        Ok(())
    }
}

/// Looks at descriptors, directories, program and areas of a task.
fn look(files: &mut FilesDump<'_>, pid: i32, agent: i32, id: u32, found: &mut Vec<Finding>) -> Result<()> {
    let flags = if agent == pid { 0 } else { pidfd::PIDFD_THREAD };
    let fd = pidfd::open(agent, flags).context("pidfd_open")?;
    files.table(agent, id, fd.as_fd(), found).context("descriptors")?;
    files.fs(agent, found).context("directories")?;
    let exe = files.link_of_task(agent, "exe", found).context("program")?;
    let task = mem::Task {
        pid,
        tid: agent,
        brk: 0,
        dumpable: 1,
        thp_disabled: false,
        exe_file_id: exe.unwrap_or(0),
        ours: Vec::new(),
        inside: mem::Inside::default(),
    };
    let mut in_files = Vec::new();
    let mut mapped = Mapped(files, &mut in_files);
    mem::collect(&task, &mut mapped, &SharedMemory::new(), found).context("address space")?;
    found.append(&mut in_files);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, process::Command};

    use nix::unistd::Pid;

    use super::*;
    use crate::arch::target::until_asleep;

    fn survey(child: &std::process::Child, shell_job: bool) -> Vec<Finding> {
        let pid = Pid::from_raw(child.id().cast_signed());
        let mut settings = DumpSettings::new(pid, std::path::Path::new("."));
        settings.common.shell_job = shell_job;
        check_tree(&settings).unwrap()
    }

    #[test]
    fn names_what_is_in_the_way() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut child = Command::new("setsid")
            .args(["sleep", "1000"])
            .stdin(std::os::fd::OwnedFd::from(theirs))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        until_asleep(child.id().cast_signed());
        let findings = survey(&child, false);
        let before = fs::read(format!("/proc/{}/status", child.id())).unwrap();
        let _ = child.kill();
        let _ = child.wait();
        drop(ours);
        // The harness may have left it more descriptors than the one that counts.
        let socket = findings.iter().filter(|finding| finding.what.starts_with("fd 0 (socket:[")).count();
        assert_eq!(socket, 1, "{findings:?}");
        assert!(!findings.iter().any(|finding| finding.what == "session"), "{findings:?}");
        assert!(String::from_utf8(before).unwrap().contains("State:\tS"), "it was left running");
    }

    #[test]
    fn a_job_of_ours_needs_shell_job() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        until_asleep(child.id().cast_signed());
        let [without, with] = [false, true].map(|shell_job| survey(&child, shell_job));
        let _ = child.kill();
        let _ = child.wait();
        let session = |findings: &[Finding]| findings.iter().any(|finding| finding.what == "session");
        assert!(session(&without) && !session(&with), "{without:?} {with:?}");
    }

    #[test]
    fn nobody() {
        let settings = DumpSettings::new(Pid::from_raw(2_000_000_000), std::path::Path::new("."));
        assert!(check_tree(&settings).unwrap_err().to_string().contains("no process has pid 2000000000"));
    }
}
