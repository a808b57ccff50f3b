//! What the demo shows: one line a step, and on a terminal a counter that moves.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::Duration,
};

/// Standard output.
#[derive(Debug)]
pub(super) struct Screen {
    terminal: bool,
    /// The current line holds a counter.
    moving: bool,
}

impl Screen {
    pub(super) fn new() -> Self {
        Self { terminal: io::stdout().is_terminal(), moving: false }
    }

    /// A step that is done. A reader that has gone away is no failure.
    pub(super) fn say(&mut self, step: &str, text: &str) {
        self.clear();
        let _ = if self.terminal {
            writeln!(io::stdout(), "  \x1b[1;32m{step:<8}\x1b[0m {text}")
        } else {
            writeln!(io::stdout(), "  {step:<8} {text}")
        };
    }

    /// A step that goes on; only a terminal shows it.
    pub(super) fn watch(&mut self, step: &str, count: u64) {
        if self.terminal {
            let mut out = io::stdout();
            let _ = write!(out, "\r  \x1b[1;33m{step:<8}\x1b[0m {count}\x1b[K");
            let _ = out.flush();
            self.moving = true;
        }
    }

    /// Takes the moving counter away.
    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.moving) {
            let mut out = io::stdout();
            let _ = write!(out, "\r\x1b[K");
            let _ = out.flush();
        }
    }
}

/// `12.3 ms`
pub(super) fn millis(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

/// `12.3 MiB`
pub(super) fn mebibytes(bytes: u64) -> String {
    let tenths = bytes * 10 / (1 << 20);
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(millis(Duration::from_micros(12_345)), "12.3 ms");
        assert_eq!(mebibytes(64 << 20), "64.0 MiB");
        assert_eq!(mebibytes((1 << 20) + (1 << 19)), "1.5 MiB");
    }
}
