//! Whether the other side of a connection lives, for whoever makes connections: the proxy, and a dump without one.
//!
//! A Ping goes out every third of the time-out, also while much else does. The other side lives if anything comes from it, or
//! if it takes what lies in the socket. When neither has happened for the whole time-out, it is taken for dead, so that a
//! cut is noticed within the time-out. This module sends and reads nothing.

use std::time::{Duration, Instant};

/// A silence is believed when it is still there after this: this process may have been stopped, and what came in
/// the meantime is read first.
const DOUBT: Duration = Duration::from_millis(200);

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// Nothing now.
    Fine,
    /// It is time for a Ping; see [`Keepalive::pinged`].
    Ping,
    /// The other side is silent.
    Dead,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Keepalive {
    timeout: Duration,
    every: Duration,
    /// When there was a sign of life.
    alive: Instant,
    /// Since when it has been silent too long.
    suspect: Option<Instant>,
    pinged: Instant,
    pings: u64,
    pongs: u64,
    /// Taken by the socket, and not yet by the other side, when last looked at.
    progress: (u64, u32),
}

impl Keepalive {
    /// From now on.
    pub(super) fn new(timeout: Duration, now: Instant) -> Self {
        Self {
            timeout,
            every: timeout / 3,
            alive: now,
            suspect: None,
            pinged: now,
            pings: 0,
            pongs: 0,
            progress: (0, 0),
        }
    }

    /// The other side gives us up after so many milliseconds.
    pub(super) fn heed(&mut self, timeout_ms: u32) {
        self.every = self.timeout.min(Duration::from_millis(timeout_ms.max(300).into())) / 3;
    }

    /// Something came.
    pub(super) fn heard(&mut self, now: Instant) {
        self.alive = now;
    }

    /// A Ping goes out.
    pub(super) fn pinged(&mut self, now: Instant) {
        self.pings += 1;
        self.pinged = now;
    }

    /// A Pong came; `false` if there was no Ping for it.
    pub(super) fn pong(&mut self) -> bool {
        let expected = self.pongs < self.pings;
        self.pongs += u64::from(expected);
        expected
    }

    /// How many there were.
    pub(super) fn pings(&self) -> u64 {
        self.pings
    }

    /// How many Pings have been answered.
    pub(super) fn pongs(&self) -> u64 {
        self.pongs
    }

    /// Whether all have been.
    pub(super) fn is_answered(&self) -> bool {
        self.pongs == self.pings
    }

    /// Looks at the time. `progress`: what the socket has taken in all, and what of it the other side has not; `waits`: something
    /// is expected of it besides Pongs.
    pub(super) fn look(&mut self, now: Instant, progress: (u64, u32), waits: bool) -> Look {
        if progress != self.progress {
            self.progress = progress;
            self.alive = now;
        }
        if !waits && self.is_answered() {
            self.suspect = None;
            let due = now.saturating_duration_since(self.pinged) >= self.every;
            return if due { Look::Ping } else { Look::Fine };
        }
        if now.saturating_duration_since(self.alive) < self.timeout {
            self.suspect = None;
            return Look::Fine;
        }
        let suspect = *self.suspect.get_or_insert(now);
        if now.saturating_duration_since(suspect) < DOUBT { Look::Fine } else { Look::Dead }
    }

    /// When to look again at the latest.
    pub(super) fn next(&self, now: Instant, waits: bool) -> Instant {
        if !waits && self.is_answered() {
            return self.pinged + self.every;
        }
        // Progress of the socket is seen only by looking, so it is looked at well before the end.
        now + if self.suspect.is_some() { DOUBT / 2 } else { self.timeout / 4 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// When a cut after `cut` is noticed, of a peer that answers at once until then.
    fn noticed(cut: Duration, busy: bool) -> Duration {
        let begun = Instant::now();
        let mut keepalive = Keepalive::new(10 * SECOND, begun);
        let mut now = begun;
        loop {
            now += SECOND / 10;
            let lives = now < begun + cut;
            let sent = (now.min(begun + cut) - begun).as_millis() as u64;
            match keepalive.look(now, if busy { (sent, 0) } else { (0, 0) }, busy) {
                Look::Fine => {}
                Look::Ping => {
                    keepalive.pinged(now);
                    if lives {
                        keepalive.heard(now);
                        assert!(keepalive.pong());
                    }
                }
                Look::Dead => return now - begun - cut,
            }
        }
    }

    #[test]
    fn a_cut_is_noticed_within_the_time_out() {
        for tenths in 10..200 {
            for busy in [false, true] {
                let took = noticed(SECOND * tenths / 10, busy);
                let least = if busy { 10 * SECOND } else { 6 * SECOND };
                assert!((least..=SECOND * 105 / 10).contains(&took), "{tenths} {busy} {took:?}");
            }
        }
    }

    #[test]
    fn who_was_stopped_reads_first() {
        let begun = Instant::now();
        let mut keepalive = Keepalive::new(SECOND, begun);
        keepalive.pinged(begun);
        let late = begun + 100 * SECOND;
        assert_eq!(keepalive.look(late, (0, 0), false), Look::Fine);
        keepalive.heard(late);
        assert!(keepalive.pong() && !keepalive.pong());
        assert_eq!(keepalive.look(late, (0, 0), false), Look::Ping);
    }
}
