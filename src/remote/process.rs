//! A process, written down so that another crtool finds it again or learns that it is gone.
//!
//! A pid counts in one pid namespace, and somebody else may get it; a start time counts from the boot, as the time namespace of
//! whoever reads it has it. So all of that is written down with it. Whether the process is there is said only where that is
//! certain: not by who looks at other processes, at another clock, or through a /proc that shows only some.

use std::{fs, io, os::unix::fs::MetadataExt as _, path::Path};

use serde_json::{Value, json};

use crate::{
    proc::{
        ParseError,
        stat::{self, Stat, State},
        status,
    },
    sys::pid::HostPid,
};

/// PROC_PID_INIT_INO: the pid namespace in which every process of the machine is.
const FIRST_PIDS: u64 = 0xeffffffc;

/// A process, named for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its pid.
    pub pid: i32,
    /// Its start time in ticks since boot.
    start: u64,
    /// The boot, if the kernel tells.
    boot: Option<String>,
    /// The pid namespace in which that pid counts.
    pids: u64,
    /// The time namespace in which that start time does.
    clocks: u64,
}

/// Where a process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Here.
    Here {
        /// What it is called in our own pid namespace.
        pid: HostPid,
        /// How many pid namespaces below ours the one is in which it was written down.
        level: usize,
    },
    /// It has ended.
    Gone,
    /// That cannot be known here, and why.
    Unknown(String),
}

fn parsed<T>(parsed: Result<T, ParseError>) -> io::Result<T> {
    parsed.map_err(|error| io::Error::other(error.to_string()))
}

/// Inode of a namespace of a process; 0 for a kind that this kernel does not have.
fn namespace(process: &str, kind: &str) -> io::Result<u64> {
    match fs::metadata(format!("/proc/{process}/ns/{kind}")) {
        Ok(found) => Ok(found.ino()),
        Err(error) if error.kind() == io::ErrorKind::NotFound && kind != "pid" => Ok(0),
        Err(error) => Err(error),
    }
}

/// Identity of this boot. Container managers mount a file of their own over it, which tells their containers apart and no boots.
fn boot() -> Option<String> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let device = |path: &str| fs::metadata(path).map(|found| found.dev());
    let genuine = device(PATH).ok()? == device("/proc").ok()?;
    let id = fs::read_to_string(PATH).ok()?;
    genuine.then(|| id.trim().to_owned())
}

/// Nobody has this pid.
fn is_none(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

impl Process {
    /// One that is there.
    pub fn now(pid: i32) -> io::Result<Self> {
        let start = parsed(stat::parse(&fs::read(format!("/proc/{pid}/stat"))?))?.starttime;
        Ok(Self {
            pid,
            start,
            boot: boot(),
            pids: namespace("self", "pid")?,
            clocks: namespace("self", "time")?,
        })
    }

    /// Another one that was written down where this one was.
    pub fn beside(&self, pid: i32, start: u64) -> Self {
        Self { pid, start, ..self.clone() }
    }

    /// Whether this is it, and it lives: the end of a process counts also if nobody has taken it yet.
    fn is(&self, stat: &Stat) -> bool {
        let dead = matches!(stat.state, State::Zombie | State::Dead) && stat.num_threads <= 1;
        stat.starttime == self.start && !dead
    }

    /// Looks for it.
    pub fn find(&self) -> Found {
        self.look().unwrap_or_else(|error| Found::Unknown(format!("/proc: {error}")))
    }

    fn look(&self) -> io::Result<Found> {
        if self.boot.is_some() && boot().is_some_and(|now| Some(now) != self.boot) {
            return Ok(Found::Gone);
        }
        let unknown = |why: String| Ok(Found::Unknown(why));
        if fs::read_link("/proc/self")?.to_str() != Some(&std::process::id().to_string()) {
            return unknown("/proc is that of another pid namespace than ours".to_owned());
        }
        if namespace("self", "time")? != self.clocks {
            return unknown("its start time was read in another time namespace than ours".to_owned());
        }
        let own = namespace("self", "pid")?;
        if own == self.pids {
            let text = match fs::read(format!("/proc/{}/stat", self.pid)) {
                Err(error) if is_none(&error) => return Ok(Found::Gone),
                text => text?,
            };
            return Ok(if self.is(&parsed(stat::parse(&text))?) {
                Found::Here { pid: HostPid::new(self.pid), level: 0 }
            } else {
                Found::Gone
            });
        }
        // Inodes are given again. Then the namespace of this number is another one, and the old one gone with all in it.
        let mut hidden = own != FIRST_PIDS;
        let mut inside = false;
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().filter(|name| name.parse::<i32>().is_ok()) else { continue };
            let pids = match namespace(pid, "pid") {
                Err(error) if is_none(&error) => continue,
                Err(_) => {
                    hidden = true;
                    continue;
                }
                Ok(pids) => pids,
            };
            if pids != self.pids {
                continue;
            }
            inside = true;
            let dir = Path::new("/proc").join(pid);
            let (Ok(about), Ok(stat)) = (fs::read(dir.join("status")), fs::read(dir.join("stat"))) else {
                continue;
            };
            let (about, stat) = (parsed(status::parse(&about))?, parsed(stat::parse(&stat))?);
            if about.nstgid.last() == Some(&self.pid) && self.is(&stat) {
                let level = about.nstgid.len().saturating_sub(1);
                return Ok(Found::Here { pid: about.tgid, level });
            }
        }
        if inside || !hidden {
            return Ok(Found::Gone);
        }
        unknown(format!(
            "its pid {} counts in the pid namespace pid:[{}], of which no process is seen here",
            self.pid, self.pids
        ))
    }

    /// As text.
    pub(super) fn to_json(&self) -> Value {
        json!({ "pid": self.pid, "start": self.start, "boot": self.boot, "pids": self.pids, "clocks": self.clocks })
    }

    /// The other way.
    pub(super) fn from_json(value: &Value) -> Option<Self> {
        let number = |name: &str| value.get(name)?.as_u64();
        Some(Self {
            pid: value.get("pid")?.as_i64()?.try_into().ok()?,
            start: number("start")?,
            boot: value.get("boot")?.as_str().map(str::to_owned),
            pids: number("pids")?,
            clocks: number("clocks")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn found_gone_or_unknown() {
        let own = Process::now(std::process::id().cast_signed()).unwrap();
        assert_eq!(own.find(), Found::Here { pid: HostPid::own(), level: 0 });
        assert_eq!(Process::from_json(&own.to_json()), Some(own.clone()));
        let gone = |process: &Process| assert_eq!(process.find(), Found::Gone, "{process:?}");
        gone(&Process { start: own.start + 1, ..own.clone() });
        gone(&Process { pid: i32::MAX, ..own.clone() });
        if own.boot.is_some() {
            gone(&Process { boot: Some("another".to_owned()), ..own.clone() });
        }
        // A boot that nobody can tell is no evidence.
        assert!(matches!(Process { boot: None, ..own.clone() }.find(), Found::Here { .. }));
        let clocks = Process { clocks: own.clocks + 1, ..own.clone() }.find();
        assert!(matches!(&clocks, Found::Unknown(why) if why.contains("time namespace")), "{clocks:?}");
        if own.pids != FIRST_PIDS {
            let pids = Process { pids: 1, ..own }.find();
            assert!(matches!(&pids, Found::Unknown(why) if why.contains("pid:[1]")), "{pids:?}");
        }
    }

    #[test]
    fn dead_and_not_reaped_is_gone() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = Process::now(child.id().cast_signed()).unwrap();
        assert!(matches!(process.find(), Found::Here { .. }));
        child.kill().unwrap();
        while process.find() != Found::Gone {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(Path::new("/proc").join(child.id().to_string()).exists());
        child.wait().unwrap();
    }

    #[test]
    fn in_a_pid_namespace_below() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let mut child =
            Command::new("unshare").args(["-pf", "--kill-child", "sleep", "1000"]).spawn().unwrap();
        let inside = loop {
            let outer = child.id();
            let children =
                fs::read_to_string(format!("/proc/{outer}/task/{outer}/children")).unwrap_or_default();
            let pid = children.trim().parse::<i32>().ok();
            if let Some(pid) =
                pid.filter(|pid| fs::read(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm == b"sleep\n"))
            {
                break pid;
            }
            assert!(child.try_wait().unwrap().is_none());
            std::thread::sleep(std::time::Duration::from_millis(2));
        };
        let here = Process::now(inside).unwrap();
        let there = Process { pid: 1, pids: namespace(&inside.to_string(), "pid").unwrap(), ..here.clone() };
        let found = [there.find(), Process { pid: 2, ..there.clone() }.find()];
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, [Found::Here { pid: HostPid::new(inside), level: 1 }, Found::Gone]);
    }
}
