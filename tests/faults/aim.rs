//! When to hit a run of the tool.

use std::time::Duration;

/// The span of time in which a run of the tool is to be hit. It follows the speed of the machine: after each run it is
/// told how it went.
#[derive(Debug, Clone, Copy)]
pub struct Aim {
    from: Duration,
    to: Duration,
}

impl Aim {
    /// Anywhere in runs that take `usual`.
    pub fn within(usual: Duration) -> Self {
        Self { from: Duration::ZERO, to: usual + usual / 10 }
    }

    /// A moment of it, by what draws a random number below a limit.
    pub fn moment(&self, random: impl FnOnce(u64) -> u64) -> Duration {
        let span = self.to.saturating_sub(self.from);
        self.from + Duration::from_micros(random(u64::try_from(span.as_micros()).unwrap_or(u64::MAX)))
    }

    /// The second half of the span, and half of it beyond its end.
    pub fn later(self) -> Self {
        let span = self.to.saturating_sub(self.from);
        Self { from: self.from + span / 2, to: self.to + span / 2 }
    }

    /// The run was over already, after `took`.
    pub fn too_late(&mut self, took: Duration) {
        self.to = took;
        self.from = self.from.min(took / 2);
    }

    /// The run had not begun with what was to be hit.
    pub fn too_early(&mut self, moment: Duration) {
        self.from = moment / 2;
        self.to = self.to.max(moment * 2);
    }

    /// A hit. Somewhat further out there may be others.
    pub fn hit(&mut self) {
        self.from -= self.from / 8;
        self.to += self.to / 8;
    }
}
