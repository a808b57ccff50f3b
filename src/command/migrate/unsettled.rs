//! What an operator does about trees whose `migrate` is gone before it knew where they run.

use std::{
    io::{self, Write as _},
    panic,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use anyhow::{Context as _, anyhow, bail};
use nix::unistd::Pid;

use super::{back, resume};
use crate::{
    action::{self, Action},
    dump,
    exit::Exit,
    interrupt,
    proc::stat::State,
    remote::{
        Failure,
        client::{self, Fate},
        journal::{self, Departure, Open, Way, Word},
        pb::{self, FailCode, resume::Verdict},
        process::Found,
    },
    settings::{MigrateRequest, NetSettings, RemoteSettings},
    sys::{Errno, pid::HostPid, task},
    tracee::procfs,
};

/// So many are asked about at once: one whose destination is dead takes as long as it is waited for.
const AT_ONCE: usize = 64;

/// Does what an operator wants about earlier migrations of this work dir.
pub fn ask(request: &MigrateRequest, remote: &RemoteSettings) -> anyhow::Result<Exit> {
    interrupt::watch().context("hold back of signals")?;
    let work_dir = &remote.work_dir;
    match request {
        MigrateRequest::List => list(work_dir),
        MigrateRequest::Settle(only) => settle(*only, remote),
        MigrateRequest::Thaw(id) => decide(*id, Word::Thaw, remote),
        MigrateRequest::Kill(id) => decide(*id, Word::Kill, remote),
    }
}

/// Does the same for each of `all`, for many at a time.
fn each<T: Sync, R: Send>(all: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let some = || {
        let taken = std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)));
        taken.map_while(|at| Some((at, work(all.get(at)?)))).collect::<Vec<_>>()
    };
    let mut done: Vec<(usize, R)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..all.len().min(AT_ONCE)).map(|_| scope.spawn(some)).collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap_or_else(|e| panic::resume_unwind(e)))
            .collect()
    });
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}

fn all(work_dir: &Path) -> anyhow::Result<(Vec<Departure>, Vec<io::Error>)> {
    Departure::all(work_dir).with_context(|| format!("work dir {}", work_dir.display()))
}

fn list(work_dir: &Path) -> anyhow::Result<Exit> {
    let (all, broken) = all(work_dir)?;
    let line = |departure: &Departure| {
        let state = match (departure.take_over(work_dir), departure.root.find()) {
            (Ok(None), _) => "asked by the crtool that migrates it".to_owned(),
            (_, Found::Gone) => "not there any more".to_owned(),
            (_, Found::Unknown(why)) => format!("not known here: {why}"),
            (_, Found::Here { pid, .. }) if is_stopped(pid) => "stopped; crtool migrate settle".to_owned(),
            (_, Found::Here { .. }) => "runs here; crtool migrate settle".to_owned(),
        };
        let to = match &departure.way {
            Way::Proxy => "image-proxy",
            Way::Given => "a given connection",
            Way::Direct { address, .. } => address,
        };
        let (id, root) = (journal::shown(departure.id), departure.root.pid);
        format!("{id}  pid {root}  {}  to {to}: {state}\n", departure.name)
    };
    let _ = io::stdout().write_all(each(&all, line).concat().as_bytes());
    for error in broken {
        tracing::warn!("{error}");
    }
    Ok(Exit::Success)
}

/// Whether the whole tree is stopped.
fn is_stopped(root: HostPid) -> bool {
    procfs::walk(root).into_iter().all(|pid| {
        procfs::stat(pid).is_ok_and(|stat| matches!(stat.state, State::Stopped | State::Zombie | State::Dead))
    })
}

/// The root of the tree and how many pid namespaces below ours it was frozen; `None` if it has ended.
fn root_of(departure: &Departure, work_dir: &Path) -> anyhow::Result<Option<(HostPid, usize)>> {
    match departure.root.find() {
        Found::Here { pid, level } => Ok(Some((pid, level))),
        Found::Gone => Ok(None),
        Found::Unknown(why) => bail!(
            "whether its tree is there is not known: {why}; do this where it was migrated from; if that is gone with all \
             that ran in it, remove {}",
            Departure::path(work_dir, departure.id).display()
        ),
    }
}

fn settle(only: Option<u64>, remote: &RemoteSettings) -> anyhow::Result<Exit> {
    let work_dir = &remote.work_dir;
    let (all, broken) = match only {
        Some(id) => (vec![known(work_dir, id)?], Vec::new()),
        None => all(work_dir)?,
    };
    let mut open: Vec<String> = broken.iter().map(ToString::to_string).collect();
    let heard = each(&all, |departure| hear(departure, remote));
    for (departure, heard) in all.iter().zip(heard) {
        let id = journal::shown(departure.id);
        match heard.and_then(|(open, departure, next)| follow(&departure, work_dir, open, next)) {
            Ok(text) => {
                let _ = writeln!(io::stdout(), "{id}: {text}");
            }
            Err(error) => open.push(format!("{id}: {error:#}")),
        }
    }
    if open.is_empty() { Ok(Exit::Success) } else { bail!(open.join("; ")) }
}

fn known(work_dir: &Path, id: u64) -> anyhow::Result<Departure> {
    Departure::read(work_dir, id)
        .with_context(|| format!("no open migration {} in {}", journal::shown(id), work_dir.display()))
}

/// How the destination of a departure is asked: as it was reached, unless the command line says otherwise.
fn way(departure: &Departure, remote: &RemoteSettings) -> Result<RemoteSettings, Failure> {
    let mut remote = remote.clone();
    match &departure.way {
        _ if remote.direct.is_some() => {}
        Way::Proxy => {}
        Way::Given => {
            let text =
                "it went over a connection that was given (--ps-socket); --to says where its image-cache is";
            return Err(Failure::new(FailCode::FailLost, text));
        }
        Way::Direct { address, port, tls } => {
            let (address, tls, timeout) = (Some(address.clone()), tls.clone(), remote.timeout);
            remote.direct = Some(NetSettings { address, port: *port, ps_socket: None, tls, timeout });
        }
    }
    Ok(remote)
}

/// Tells the destination that the tree goes on here; `false` if it is too late for that.
fn take_back(departure: &Departure, remote: &RemoteSettings) -> Result<bool, Failure> {
    match client::take_back(&way(departure, remote)?, resume(departure, back())) {
        // Nobody was told to let it run there, so it never did.
        Err(failure) if !departure.going && failure.code == FailCode::FailNotFound => Ok(true),
        told => told,
    }
}

/// Asks whether it runs at the destination.
fn ask_there(departure: &Departure, remote: &RemoteSettings) -> anyhow::Result<Fate> {
    let unknown = "whether it runs at the destination is not known";
    let way = way(departure, remote).context(unknown)?;
    client::ask(&way, resume(departure, Verdict::Go(pb::Go {})), way.timeout).context(unknown)
}

/// Takes the journal over, and reads it again: whoever had it may have gone on with the hand-over, or ended it, meanwhile.
fn take_over(departure: &Departure, work_dir: &Path) -> anyhow::Result<Option<(Open, Departure)>> {
    let Some(open) = departure.take_over(work_dir).context("journal of the hand-over")? else {
        return Ok(None);
    };
    Ok(Some((open, known(work_dir, departure.id)?)))
}

/// What follows from what was heard.
enum Next {
    /// What is left of the tree ends here.
    Kill(&'static str),
    /// It goes on here, and whether the destination has heard that.
    GoOn(Result<bool, Failure>, &'static str),
}

/// Asks the destination, if that has to be asked. Takes as long as it takes to know that nobody answers. What follows is for the
/// journal as it is now.
fn hear(departure: &Departure, remote: &RemoteSettings) -> anyhow::Result<(Open, Departure, Next)> {
    let Some((open, departure)) = take_over(departure, &remote.work_dir)? else {
        bail!("the crtool that migrates it lives, and asks by itself");
    };
    let next = next_of(&departure, remote)?;
    Ok((open, departure, next))
}

fn next_of(departure: &Departure, remote: &RemoteSettings) -> anyhow::Result<Next> {
    let root = root_of(departure, &remote.work_dir)?;
    let gone = format!("its root, process {}, is not there any more", departure.root.pid);
    if !departure.going {
        if root.is_none() {
            bail!("it was not handed over, and {gone}; crtool migrate kill ends the rest");
        }
        // Nobody was told to let it run there: what of it is stopped goes on.
        let told = take_back(departure, remote);
        return Ok(Next::GoOn(told, "it was not handed over, and runs here"));
    }
    Ok(match (ask_there(departure, remote)?, root) {
        // Whoever migrated it may have died when all was done but this.
        (Fate::Runs(_), None) => Next::Kill("it runs at the destination, and is gone here"),
        (Fate::Runs(_), Some(_)) => Next::Kill("it runs at the destination, and is ended here"),
        (Fate::Fell(why), None) => bail!(
            "{gone}, and it does not run at the destination: {why}; if a snapshot {} is in doubt there, image-cache release \
             lets it be restored",
            departure.name
        ),
        (Fate::Fell(_), Some(_)) => {
            let told = take_back(departure, remote);
            Next::GoOn(told, "it does not run at the destination, and goes on here")
        }
    })
}

fn follow(departure: &Departure, work_dir: &Path, open: Open, next: Next) -> anyhow::Result<&'static str> {
    let text = match next {
        Next::Kill(text) => {
            let root = root_of(departure, work_dir)?.map(|(root, _)| root);
            kill(root.map_or_else(Vec::new, procfs::walk))?;
            kill(members(departure).collect())?;
            text
        }
        Next::GoOn(told, text) => {
            let Some((root, level)) = root_of(departure, work_dir)? else {
                bail!(
                    "its root, process {}, is not there any more: nothing can go on here",
                    departure.root.pid
                );
            };
            match told {
                Ok(true) => {}
                Ok(false) => bail!(
                    "it runs at the destination, or is about to, and does not go on here: crtool migrate settle"
                ),
                Err(failure) => tracing::warn!(
                    "the destination has not taken it back: {failure}; a snapshot {} there is to be dropped",
                    departure.name
                ),
            }
            let whole = procfs::walk(root);
            dump::go_on_again(root, &departure.before, level)?;
            for left in members(departure).filter(|pid| !whole.contains(pid)) {
                dump::go_on_again(left, &departure.before, level)?;
            }
            let root = Some(Pid::from_raw(root.get()));
            if let Err(error) = action::run(&departure.scripts, Action::NetworkUnlock, root) {
                tracing::error!("{:#}", anyhow!(error));
            }
            text
        }
    };
    open.close();
    Ok(text)
}

/// All members that live, also those that are not below the root any more because their parents have died since.
fn members(departure: &Departure) -> impl Iterator<Item = HostPid> {
    departure.before.members.iter().filter_map(|member| {
        match departure.root.beside(member.pid, member.start).find() {
            Found::Here { pid, .. } => Some(pid),
            Found::Gone | Found::Unknown(_) => None,
        }
    })
}

fn kill(pids: Vec<HostPid>) -> anyhow::Result<()> {
    // A parent that is killed cannot make any children.
    for pid in pids {
        match task::kill(pid, libc::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(e) => return Err(anyhow!(e).context(format!("kill of task {pid}"))),
        }
    }
    Ok(())
}

/// The operator wants a tree of ours to end: not the last of its kind, as far as the destination can say.
fn may_end(departure: &Departure, remote: &RemoteSettings) -> anyhow::Result<()> {
    let id = journal::shown(departure.id);
    if !departure.going {
        bail!("it was not handed over, and is nowhere else: crtool migrate thaw {id} lets it go on here");
    }
    match ask_there(departure, remote) {
        Ok(Fate::Runs(_)) => {}
        Ok(Fate::Fell(why)) => bail!(
            "it does not run at the destination, and is not ended here: {why}; crtool migrate settle {id} lets it go on here"
        ),
        Err(error) => tracing::warn!("{error:#}; it is ended here because you say so"),
    }
    Ok(())
}

/// The operator knows what the destination does not say.
fn decide(id: u64, word: Word, remote: &RemoteSettings) -> anyhow::Result<Exit> {
    let work_dir = &remote.work_dir;
    let departure = known(work_dir, id)?;
    let text = match take_over(&departure, work_dir)? {
        None => {
            word.say(work_dir, id).context("word for the crtool that migrates it")?;
            "said to the crtool that migrates it"
        }
        Some((open, departure)) => {
            let next = match word {
                Word::Kill => {
                    if root_of(&departure, work_dir)?.is_some() {
                        may_end(&departure, remote)?;
                    }
                    Next::Kill("ended here")
                }
                // Where it is looked for first: to tell the destination of a tree that is not there would be a lie.
                Word::Thaw if root_of(&departure, work_dir)?.is_some() => {
                    Next::GoOn(take_back(&departure, remote), "goes on here")
                }
                Word::Thaw => Next::GoOn(Ok(true), "goes on here"),
            };
            follow(&departure, work_dir, open, next)?
        }
    };
    let _ = writeln!(io::stdout(), "{}: {text}", journal::shown(id));
    Ok(Exit::Success)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn many_are_asked_at_once() {
        let begun = Instant::now();
        let all: Vec<usize> = (0..100).collect();
        let doubled = each(&all, |number| {
            thread::sleep(Duration::from_millis(200));
            number * 2
        });
        assert_eq!(doubled, all.iter().map(|number| number * 2).collect::<Vec<_>>());
        assert!(begun.elapsed() < Duration::from_secs(10));
        assert!(each(&[] as &[usize], |number| *number).is_empty());
    }
}
