//! Reaping: the worker is the tree's init, so every orphan ends here, at once.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Exited(i32),
    Killed(i32),
}

/// Collects every child as soon as it dies.
#[derive(Debug, Clone)]
pub struct Reaper {
    dead: Arc<(Mutex<HashMap<i32, Ended>>, Condvar)>,
}

impl Reaper {
    pub fn start() -> Reaper {
        let reaper = Reaper { dead: Arc::default() };
        let own = reaper.clone();
        std::thread::spawn(move || {
            loop {
                match crate::sys::wait_any() {
                    Some((pid, status)) => own.note(pid, status),
                    None => std::thread::sleep(Duration::from_micros(500)),
                }
            }
        });
        reaper
    }

    fn note(&self, pid: i32, status: i32) {
        let ended = if libc::WIFSIGNALED(status) {
            Ended::Killed(libc::WTERMSIG(status))
        } else {
            Ended::Exited(libc::WEXITSTATUS(status))
        };
        let (dead, changed) = &*self.dead;
        dead.lock().expect("reaper lock").insert(pid, ended);
        changed.notify_all();
    }

    /// Drops what is known of `pid`: another process will have that id.
    pub fn forget(&self, pid: i32) {
        self.dead.0.lock().expect("reaper lock").remove(&pid);
    }

    /// Takes the end of `pid`, waiting for it at most `limit`.
    pub fn wait(&self, pid: i32, limit: Duration) -> Option<Ended> {
        let until = Instant::now() + limit;
        let (dead, changed) = &*self.dead;
        let mut dead = dead.lock().expect("reaper lock");
        loop {
            if let Some(ended) = dead.remove(&pid) {
                return Some(ended);
            }
            let left = until.checked_duration_since(Instant::now())?;
            dead = changed.wait_timeout(dead, left).expect("reaper lock").0;
        }
    }
}
