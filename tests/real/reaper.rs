//! Children that end, collected at once: a tree that was killed is only gone when somebody has waited for it.

use std::{
    collections::HashMap,
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::wait::{WaitStatus, waitpid},
    unistd::Pid,
};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Exited(i32),
    Killed(i32),
}

/// Collects every child as soon as it ends; orphans come to us, for we are init.
#[derive(Debug, Clone)]
pub struct Reaper {
    ended: Arc<(Mutex<HashMap<i32, End>>, Condvar)>,
}

impl Reaper {
    pub fn start() -> Self {
        let ended: Arc<(Mutex<HashMap<i32, End>>, Condvar)> = Arc::default();
        let own = ended.clone();
        thread::spawn(move || {
            loop {
                let (pid, end) = match waitpid(None::<Pid>, None) {
                    Ok(WaitStatus::Exited(pid, status)) => (pid, End::Exited(status)),
                    Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, End::Killed(signal as i32)),
                    Ok(_) => continue,
                    // No child at all.
                    Err(_) => {
                        thread::sleep(Duration::from_micros(200));
                        continue;
                    }
                };
                own.0.lock().expect("reaper lock").insert(pid.as_raw(), end);
                own.1.notify_all();
            }
        });
        Self { ended }
    }

    /// Takes the end of `pid`, waiting for it at most `limit`.
    pub fn wait(&self, pid: i32, limit: Duration) -> Option<End> {
        let until = Instant::now() + limit;
        let mut ended = self.ended.0.lock().expect("reaper lock");
        loop {
            if let Some(end) = ended.remove(&pid) {
                return Some(end);
            }
            let left = until.checked_duration_since(Instant::now())?;
            ended = self.ended.1.wait_timeout(ended, left).expect("reaper lock").0;
        }
    }
}
