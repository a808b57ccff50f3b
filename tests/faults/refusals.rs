//! Dumps that cannot be finished: the tree is exactly as before, and no images are left to be restored.

use std::{fs, path::Path, process::Command, thread, time::Duration};

use nix::sys::signal::Signal;

use crate::aim::Aim;
use crate::reaper::End;
use crate::site::Site;

pub fn sigint(site: &mut Site) -> Result<(), String> {
    interrupted(site, Signal::SIGINT)
}

pub fn sigterm(site: &mut Site) -> Result<(), String> {
    interrupted(site, Signal::SIGTERM)
}

/// Interrupted so often, with at most so many attempts each.
const WANTED: usize = 20;
const PATIENCE: usize = 20;

fn interrupted(site: &mut Site, signal: Signal) -> Result<(), String> {
    let wanted = Site::times(WANTED);
    let mut aim = Aim::within(site.durations()?.0);
    let before = site.picture()?;
    let mut cut = 0;
    for number in 0..wanted * PATIENCE {
        if cut == wanted {
            break;
        }
        let images = site.fresh("images")?;
        let moment = site.moment(&aim);
        let tool = site.begin_dump(&["-R"], &images)?;
        thread::sleep(moment);
        tool.signal(signal);
        let run = tool.end()?;
        let when = format!("dump {number}, {signal} after {moment:?} of {aim:?} ({:?})", run.end);
        if run.end == End::Killed(signal as i32) {
            // Before crtool holds signals back it has touched nothing, and just dies of them.
            aim.too_early(moment);
            no_images(&images).map_err(|text| format!("{when}: {text}"))?;
        } else if run.end == End::Exited(1) {
            aim.hit();
            cut += 1;
            run.failed_cleanly()
                .and_then(|()| no_images(&images))
                .map_err(|text| format!("{when}: {text}"))?;
        } else {
            run.succeeded(&when)?;
            aim.too_late(run.took);
        }
        site.works().and_then(|()| site.same(&before)).map_err(|text| format!("{when}: {text}"))?;
    }
    if cut < wanted {
        return Err(format!("only {cut} dumps were interrupted: the moments are badly chosen"));
    }
    site.finish()
}

/// Nothing that a restore could take, and nothing else that takes up space.
fn no_images(images: &Path) -> Result<(), String> {
    let entries = fs::read_dir(images).map_err(|e| e.to_string())?.flatten();
    let names: Vec<String> = entries.map(|e| e.file_name().display().to_string()).collect();
    let left: Vec<&String> = names.iter().filter(|name| name.ends_with(".img")).collect();
    if left.is_empty() { Ok(()) } else { Err(format!("images are left: {left:?}")) }
}

/// crtool itself is held up while it collects: when it goes on, its time is over.
pub fn timeout(site: &mut Site) -> Result<(), String> {
    let before = site.picture()?;
    let wanted = Site::times(3);
    let mut cut = 0;
    for number in 0..wanted * PATIENCE {
        if cut == wanted {
            break;
        }
        let images = site.fresh("images")?;
        let tool = site.begin_dump(&["-R", "--timeout", "1"], &images)?;
        let mut when = format!("dump {number}");
        if site.until_traced(&tool) {
            tool.signal(Signal::SIGSTOP);
            thread::sleep(Duration::from_millis(1200));
            tool.signal(Signal::SIGCONT);
            when += ", stopped for a while";
        }
        let run = tool.end()?;
        let when = format!("{when} ({:?})", run.end);
        if run.end == End::Exited(1) {
            cut += 1;
            run.failed_cleanly()
                .and_then(|()| no_images(&images))
                .map_err(|text| format!("{when}: {text}"))?;
            if !run.said.contains("time") {
                return Err(format!("{when}: the reason is not said: {}", run.said));
            }
        } else if run.end == End::Killed(libc::SIGKILL) {
            // By its own timer, since it got no processor for most of a second: then it can say nothing, but the tree runs on.
            no_images(&images).map_err(|text| format!("{when}: {text}"))?;
        } else {
            // All was collected by then.
            run.succeeded(&when)?;
        }
        site.works().and_then(|()| site.same(&before)).map_err(|text| format!("{when}: {text}"))?;
    }
    if cut < wanted { Err(format!("only {cut} dumps ran out of time")) } else { site.finish() }
}

/// A task that cannot be stopped, as its vfork waits: all others run on.
pub fn stuck(site: &mut Site) -> Result<(), String> {
    let before = site.picture()?;
    let images = site.fresh("images")?;
    let run = site.dump(&["--timeout", "5"], &images)?;
    run.failed_cleanly()?;
    if !run.said.contains("vfork") {
        return Err(format!("the reason is not said: {}", run.said));
    }
    no_images(&images)?;
    site.works()?;
    site.same(&before)?;
    site.clear()
}

pub fn full_disk(site: &mut Site) -> Result<(), String> {
    let before = site.picture()?;
    for kib in [0, 4, 16, 64, 256, 1024] {
        let images = site.fresh("full")?;
        // 0 would mean no limit.
        let size = format!("size={kib}k,nr_inodes={}", if kib == 0 { 1 } else { 1000 });
        mount(&images, if kib == 0 { "size=4k,nr_inodes=1" } else { &size })?;
        let run = site.dump(&[], &images)?;
        let checked = run.failed_cleanly().and_then(|()| no_images(&images));
        unmount(&images)?;
        checked.map_err(|text| format!("{kib} KiB: {text}"))?;
        site.works()?;
        site.same(&before).map_err(|text| format!("{kib} KiB: {text}"))?;
    }
    // At once again, where there is room.
    let images = site.fresh("images")?;
    site.dump_and_kill(&images)?;
    site.restore(&images)?;
    site.finish()
}

pub fn read_only(site: &mut Site) -> Result<(), String> {
    let before = site.picture()?;
    let images = site.fresh("sealed")?;
    mount(&images, "ro")?;
    let run = site.dump(&[], &images)?;
    unmount(&images)?;
    run.failed_cleanly()?;
    if !run.said.contains("Read-only file system") {
        return Err(format!("the reason is not said: {}", run.said));
    }
    site.works()?;
    site.same(&before)?;
    let run = site.dump(&[], &site.dir.join("nowhere"))?;
    run.failed_cleanly()?;
    site.works()?;
    site.same(&before)?;
    site.finish()
}

/// In the trial's own mount namespace.
pub fn mount(at: &Path, options: &str) -> Result<(), String> {
    done(Command::new("mount").args(["-t", "tmpfs", "-o", options, "faults"]).arg(at))
}

pub fn unmount(at: &Path) -> Result<(), String> {
    done(Command::new("umount").arg(at))
}

fn done(command: &mut Command) -> Result<(), String> {
    // The reaper takes the status; what counts is what it says.
    let child = command.output();
    match child {
        Ok(output) if !output.stderr.is_empty() => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        _ => Ok(()),
    }
}

/// crtool itself is short of something: it works, or it says in one line what is missing and all is as before.
pub fn limits(site: &mut Site) -> Result<(), String> {
    let before = site.picture()?;
    let pid = site.pid.to_string();
    let dump = ["dump", "-R", "-t", pid.as_str()];
    // What it says, or nothing where it works.
    for (limits, wanted) in [
        ("--fsize=20000:", "the size of files (ulimit -f)"),
        ("--fsize=2000:", "the size of files (ulimit -f)"),
        ("--nofile=8", "Too many open files"),
        ("--stack=65536", "the limit of the stack (ulimit -s) is 64 KiB, and crtool needs 1024"),
        (&format!("--as={}", least_space(site)? + (1 << 20)), "memory"),
        ("--data=2500000", "memory"),
        ("--stack=1048576:", ""),
        ("--nproc=1:", ""),
        ("--memlock=0:", ""),
        ("--core=0:", ""),
        ("--sigpending=0:", ""),
        ("--msgqueue=0:", ""),
        ("--rss=1:", ""),
        ("--rttime=1:", ""),
    ] {
        let images = site.fresh("images")?;
        let run = site.run_limited(limits, &dump, &images)?;
        let lines: Vec<&str> = run.said.lines().filter(|line| !line.contains("Warn ")).collect();
        let checked = match run.end {
            End::Exited(0) if lines.is_empty() => Ok(()),
            // How much memory it takes is not the same for all builds; that it says so, is.
            _ if wanted.is_empty() => Err(format!("{:?}: {}", run.end, run.said)),
            End::Exited(1) if lines.len() == 1 && run.said.contains(wanted) => no_images(&images),
            // Nor can a restore be promised that has no more than the dump.
            End::Exited(1)
                if lines.iter().skip(1).all(|line| line.contains("RLIMIT_")) && lines.len() > 1 =>
            {
                no_images(&images)
            }
            _ => Err(format!("not one line with {wanted:?}: {:?}: {}", run.end, run.said)),
        };
        checked.and_then(|()| site.works()).map_err(|text| format!("{limits}: {text}"))?;
    }
    let group = Path::new("/sys/fs/cgroup/pids").join(format!("crtool-faults-{}", std::process::id()));
    if fs::create_dir(&group).is_ok() {
        let grouped = tasks(site, &group, &dump);
        let _ = fs::remove_dir(&group);
        grouped?;
    }
    site.same(&before)?;
    site.finish()
}

/// The least address space in which the program can be loaded: how much that is, depends on how it was built.
fn least_space(site: &mut Site) -> Result<u64, String> {
    let images = site.fresh("images")?;
    for mib in 4..4096u64 {
        if site.run_limited(&format!("--as={}", mib << 20), &["--version"], &images)?.end == End::Exited(0) {
            return Ok(mib << 20);
        }
    }
    Err("the program cannot be loaded into 4 GiB".into())
}

/// No more tasks may be made than the tool itself, or one or two more.
fn tasks(site: &Site, group: &Path, dump: &[&str]) -> Result<(), String> {
    for most in ["1", "2", "3"] {
        fs::write(group.join("pids.max"), most).map_err(|e| e.to_string())?;
        let images = site.fresh("images")?;
        site.run_grouped(group, dump, &images)?.succeeded(&format!("dump with pids.max {most}"))?;
        let run = site.run_grouped(group, &["restore", "-d"], &images)?;
        run.failed_cleanly()?;
    }
    Ok(())
}

/// Dump and restore, again and again: nothing piles up.
pub fn fifty_rounds(site: &mut Site) -> Result<(), String> {
    let before = site.picture()?;
    for round in 1..=50 {
        let images = site.fresh("images")?;
        site.dump_and_kill(&images).map_err(|text| format!("round {round}: {text}"))?;
        site.restore(&images).map_err(|text| format!("round {round}: {text}"))?;
    }
    site.same(&before)?;
    site.finish()
}
