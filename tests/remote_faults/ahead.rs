//! A restore that has begun before the dump makes its processes while the images arrive. Whoever dies then, the tree is on one
//! side, and nothing is left of what was made.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use crate::{
    cases::slow,
    kills::{kill_daemon, receiving_on},
    reaper::End,
    site::{CACHE, LIMIT, PROXY, Site, Tool, Way},
    tree,
};

/// Who dies while the pages arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Restore(Signal),
    Dump,
    Proxy,
    Cache,
    Nobody,
}

/// Waits until the root is on its way to host `to`, seen while images still come.
fn is_made(site: &Site, name: &str, tools: [&Tool; 2]) -> Result<(), String> {
    let to = site.at.other();
    let begin = Instant::now();
    while tree::with_pid(site.init(to), &site.root()).is_none() {
        if let Some(ended) = tools.iter().find_map(|tool| tool.end_within(Duration::ZERO)) {
            return Err(format!("nothing was made before the end: {ended:?}"));
        }
        if begin.elapsed() > LIMIT {
            return Err("nothing is made".into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    receiving_on(site, to, name).then_some(()).ok_or_else(|| "it was made only when all had come".into())
}

fn nothing_is_left(site: &Site) -> Result<(), String> {
    let to = site.at.other();
    let begin = Instant::now();
    while let Some(pid) = tree::with_pid(site.init(to), &site.root()) {
        if begin.elapsed() > LIMIT {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            return Err(format!("what was made is still there: {status}"));
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Everybody in turn, each at several moments.
pub fn anyone(site: &mut Site) -> Result<(), String> {
    site.start_tree(8)?;
    // More than a second for all of it.
    slow(site, site.at, "64mbit")?;
    let restores = [Victim::Restore(Signal::SIGKILL), Victim::Restore(Signal::SIGTERM)];
    let others = [Victim::Dump, Victim::Proxy, Victim::Cache, Victim::Nobody];
    for (number, victim) in restores.into_iter().chain(others).enumerate() {
        let name = format!("ahead {number}");
        one(site, victim, &name).map_err(|e| format!("{victim:?}: {e}"))?;
    }
    Ok(())
}

fn one(site: &mut Site, victim: Victim, name: &str) -> Result<(), String> {
    site.daemons(Way::Proxied)?;
    let (from, to) = (site.at, site.at.other());
    let mut words = Site::restore_words(name).to_vec();
    let script = site.work(to).join("script").display().to_string();
    let done = site.work(to).join("scripts");
    if victim == Victim::Nobody {
        // By another process: what a child of ours had open for a moment could not be run (ETXTBSY).
        let line = "echo $CRTOOLS_SCRIPT_ACTION >> scripts";
        site.shell(to, &format!("printf '#!/bin/sh\n{line}\n' > {script}; chmod 755 {script}"))?;
        words.extend(["--action-script", &script]);
    }
    let restore = site.begin(to, &words)?;
    let dump = site.begin_dump(Way::Proxied, name)?;
    is_made(site, name, [&restore, &dump])?;
    thread::sleep(Duration::from_millis(site.random(300)));
    match victim {
        Victim::Restore(signal) => {
            restore.signal(signal);
            let ended = restore.end()?;
            if ended.end != End::Killed(libc::SIGKILL) {
                ended.failed("interrupted by SIGTERM")?;
            }
            nothing_is_left(site)?;
            dump.end()?.succeeded()?;
            site.begin_restore(name)?.end()?.succeeded()?;
            site.arrived()?;
            slow(site, site.at, "64mbit")
        }
        Victim::Nobody => {
            // A script may rely on what the dump does up to its end.
            if done.exists() && receiving_on(site, to, name) {
                return Err("a script has run before all images were there".into());
            }
            dump.end()?.succeeded()?;
            restore.end()?.succeeded()?;
            let read = |path| fs::read_to_string(path).map_err(|e| e.to_string());
            let ran = read(done.clone())?;
            if ran.lines().ne(["pre-restore", "post-restore", "pre-resume", "network-unlock", "post-resume"])
            {
                return Err(format!("scripts ran for {ran}"));
            }
            if read(site.work(to).join("restore.log"))?.contains("is given up") {
                return Err("what was made early was given up".into());
            }
            site.shell(to, &format!("rm {script} {}", done.display()))?;
            site.arrived()
        }
        Victim::Dump => {
            dump.signal(Signal::SIGKILL);
            dump.end()?;
            nothing_is_left(site)?;
            site.works()?;
            // It waits for the next one.
            site.begin_dump(Way::Proxied, name)?.end()?.succeeded()?;
            restore.end()?.succeeded()?;
            site.arrived()?;
            slow(site, site.at, "64mbit")
        }
        Victim::Proxy | Victim::Cache => {
            let (host, daemon) = if victim == Victim::Proxy { (from, PROXY) } else { (to, CACHE) };
            kill_daemon(site.pid_of(host, daemon));
            dump.end()?.failed("")?;
            nothing_is_left(site)?;
            if victim == Victim::Proxy {
                restore.signal(Signal::SIGTERM);
            }
            restore.end()?.failed("")?;
            site.gone(host, daemon)?;
            nothing_is_left(site)?;
            site.works()
        }
    }
}
