//! Processes of the same user as a task that is being restored.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::{
        fd::AsRawFd as _,
        unix::{ffi::OsStrExt as _, fs::FileExt as _},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    site::{NOBODY, Site, Verdict, clear, differences, fail, field, lives, numbers, others, rights},
    sys::{self, Intruder, Rights},
};

/// Restores in which a signal should come at the right moment; a few do.
const TRIES: usize = 25;

/// A SIGTRAP of a neighbour is not the end of what a task does to become what it was: it would keep all rights.
pub fn traps(site: &mut Site) -> Verdict {
    let mut tree = site.play("mixed", "0")?;
    let pids = others();
    let before = rights(&pids);
    site.dumped(&mut tree)?;
    let mut sent = 0;
    for number in 0..TRIES {
        let over = Arc::new(AtomicBool::new(false));
        let (done, targets) = (Arc::clone(&over), pids.clone());
        let hits = std::thread::spawn(move || {
            sys::become_user(NOBODY, false);
            let mut hits = 0;
            while !done.load(Ordering::Relaxed) {
                for &pid in &targets {
                    if sys!(SYS_kill, pid, libc::SIGTRAP).is_ok() {
                        hits += 1;
                        // More would only hold the task up.
                        std::thread::sleep(std::time::Duration::from_millis(1));
                    }
                }
            }
            hits
        });
        let run = site.run(&["restore", "-d"]);
        let now = rights(&pids);
        over.store(true, Ordering::Relaxed);
        sent += hits.join().unwrap_or(0);
        run.ended_well()?;
        if run.status == 0 {
            let differ = differences(&before, &now);
            if !differ.is_empty() && pids.iter().all(|pid| lives(*pid)) {
                return fail(format!(
                    "restore {number}: a signal of a neighbour has changed what a task may do:\n{differ}"
                ));
            }
        }
        clear(&[]);
    }
    if sent == 0 { fail("no signal came in time") } else { Ok(()) }
}

/// Signals of a task to itself come without saying from whom, when its user has no room for that. Others of the user take it.
pub fn no_queue(site: &mut Site) -> Verdict {
    let mut tree = site.play("no-queue", "")?;
    let pids = others();
    let before = rights(&pids);
    site.dumped(&mut tree)?;
    site.run(&["restore", "-d", "--timeout", "20"]).succeeded("restore")?;
    let differ = differences(&before, &rights(&pids));
    if differ.is_empty() { Ok(()) } else { fail(differ) }
}

pub fn user(site: &mut Site) -> Verdict {
    beside(site, "mixed", "40", Rights::User(NOBODY), 0)
}

pub fn bare_root(site: &mut Site) -> Verdict {
    beside(site, "bare", "6", Rights::BareRoot, NOBODY)
}

/// At each step of a restore a neighbour writes to all memory that it can reach where code is executed that is nobody's
/// file, and fetches all descriptors that it can get. The code would make a directory where only `owner` may, or somebody
/// with all rights.
fn beside(site: &Site, role: &str, threads: &str, who: Rights, owner: u32) -> Verdict {
    let mut tree = site.play(role, threads)?;
    let pids = others();
    let before = rights(&pids);
    let theirs: BTreeSet<PathBuf> = pids.iter().flat_map(|pid| links(*pid)).collect();
    site.dumped(&mut tree)?;
    let private = site.path("private");
    fs::create_dir(&private).map_err(|e| e.to_string())?;
    std::os::unix::fs::chown(&private, Some(owner), Some(owner)).map_err(|e| e.to_string())?;
    fs::set_permissions(&private, std::os::unix::fs::PermissionsExt::from_mode(0o700))
        .map_err(|e| e.to_string())?;
    let mark = private.join("mark");
    let page = Arc::new(page_that_makes(&mark));
    let intruder = Intruder::new(who);
    let (mut written, mut stolen) = (BTreeSet::new(), BTreeSet::new());
    let own = std::process::id().cast_signed();
    let over = Arc::new(AtomicBool::new(false));
    let run = std::thread::scope(|scope| {
        // Some of what tasks do is between two steps.
        let (hasty, done, leaders, text) =
            (Intruder::new(who), Arc::clone(&over), pids.clone(), Arc::clone(&page));
        scope.spawn(move || {
            hasty.run(move || {
                while !done.load(Ordering::Relaxed) {
                    leaders.iter().for_each(|pid| drop(overwrite_of(*pid, *pid, &text)));
                }
            });
        });
        let run = site.step(&["restore", "-d"], |crtool, _| {
            let there: Vec<i32> = others().into_iter().filter(|pid| *pid != crtool).collect();
            let page = Arc::clone(&page);
            let (wrote, got) = intruder.run(move || (overwrite(&there, &page), steal(&there)));
            written.extend(wrote);
            stolen.extend(got.into_iter().filter(|link| !theirs.contains(link)));
            false
        });
        over.store(true, Ordering::Relaxed);
        run
    });
    run.ended_well()?;
    let left = others();
    clear(&[own]);
    if mark.exists() {
        return fail(format!(
            "a neighbour made a task do what it may not do itself, by memory of {written:?}"
        ));
    }
    if !stolen.is_empty() {
        return fail(format!("a neighbour has got descriptors of crtool: {stolen:?}"));
    }
    if run.status != 0 && !left.is_empty() {
        return fail(format!("the restore failed, and left {left:?}: {}", run.said));
    }
    // Nobody does anything: now it must succeed.
    site.run(&["restore", "-d"]).succeeded("restore")?;
    let differ = differences(&before, &rights(&pids));
    if differ.is_empty() { Ok(()) } else { fail(format!("after the restore:\n{differ}")) }
}

/// Where the descriptors of a process lead.
fn links(pid: i32) -> Vec<PathBuf> {
    let dir = format!("/proc/{pid}/fd");
    numbers(&dir).iter().filter_map(|fd| fs::read_link(format!("{dir}/{fd}")).ok()).collect()
}

/// Code for the whole of a page, which makes a directory wherever it is entered, and waits.
fn page_that_makes(path: &Path) -> Vec<u8> {
    let mut code = vec![
        0x48, 0x8d, 0x3d, 0x16, 0x00, 0x00, 0x00, // lea rdi, [rip + 22]
        0xbe, 0xed, 0x01, 0x00, 0x00, // mov esi, 0755
        0xb8, 0x53, 0x00, 0x00, 0x00, // mov eax, mkdir
        0x0f, 0x05, // syscall
        0xb8, 0x22, 0x00, 0x00, 0x00, // mov eax, pause
        0x0f, 0x05, // syscall
        0xeb, 0xf7, // jmp to the mov before
        0x90,
    ];
    code.extend_from_slice(path.as_os_str().as_bytes());
    code.push(0);
    let mut page = vec![0x90; 4096 - code.len()];
    page.extend_from_slice(&code);
    page
}

/// Writes `page` over executable memory that is of no file; says whose.
fn overwrite(pids: &[i32], page: &[u8]) -> Vec<String> {
    let threads = |pid: i32| numbers(&format!("/proc/{pid}/task")).into_iter().map(move |tid| (pid, tid));
    pids.iter().flat_map(|pid| threads(*pid)).flat_map(|(pid, tid)| overwrite_of(pid, tid, page)).collect()
}

/// The same for one thread.
fn overwrite_of(pid: i32, tid: i32, page: &[u8]) -> Vec<String> {
    let mut written = Vec::new();
    let Ok(memory) = File::options().read(true).write(true).open(format!("/proc/{pid}/task/{tid}/mem"))
    else {
        return written;
    };
    let maps = fs::read_to_string(format!("/proc/{pid}/task/{tid}/maps")).unwrap_or_default();
    for line in maps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let name = words.get(5).copied().unwrap_or_default();
        let code = words.get(1).is_some_and(|prot| prot.contains('x'));
        if !code || name.starts_with('[') || name.starts_with('/') && !name.starts_with("/memfd:") {
            continue;
        }
        let at = words.first().and_then(|range| u64::from_str_radix(range.split('-').next()?, 16).ok());
        if at.is_some_and(|at| memory.write_all_at(page, at).is_ok()) {
            written.push(format!("thread {tid} of {pid} (uid {}) {line}", field(pid, tid, "Uid")));
        }
    }
    written
}

/// Fetches descriptors; says where they lead.
fn steal(pids: &[i32]) -> Vec<PathBuf> {
    let mut got = Vec::new();
    for &pid in pids {
        for number in (0..40).chain(256..260) {
            let Ok(fd) = sys::descriptor_of(pid, number) else { continue };
            got.extend(fs::read_link(format!("/proc/thread-self/fd/{}", fd.as_raw_fd())));
        }
    }
    got
}
