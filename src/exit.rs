//! Exit status of the program.
//!
//! | status | meaning |
//! |---|---|
//! | 0 | complete success |
//! | 1 | failure, or a mistake in the command line: nothing is changed, every task is as it was |
//! | 2 | the work itself is done (images complete, tree killed; or tree restored and running), but a later step failed: the message says which |
//! | 70 | a bug in crtool: it caught its own panic; what it had frozen goes on |
//! | other | `restore` without `-d`: the status of the restored root, or 128 + the signal that ended it |
//!
//! `restore` without `-d` answers 128 + 2 or 128 + 15 too if it was itself interrupted while it waited; the
//! restored tree then runs on. No answer is ever a death by signal.

use std::process::ExitCode;

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Everything asked for is done.
    Success,
    /// Nothing is changed.
    Failure,
    /// Done, but for a last step.
    Incomplete,
    /// Our own bug.
    Internal,
    /// As the restored root ended.
    Tree(u8),
}

impl Exit {
    /// The number.
    pub fn status(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failure => 1,
            Self::Incomplete => 2,
            Self::Internal => 70,
            Self::Tree(status) => status,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.status())
    }
}

/// Marks an error that came after the point of no return.
///
/// Put it at the root of the chain: `return Err(anyhow!(cause).context(Incomplete("...")))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Incomplete(
    /// What is done nevertheless.
    pub &'static str,
);

/// The status for an error.
pub fn of(error: &anyhow::Error) -> Exit {
    if error.downcast_ref::<Incomplete>().is_some() { Exit::Incomplete } else { Exit::Failure }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes() {
        let plain = anyhow::anyhow!("cause").context("step");
        assert_eq!(of(&plain), Exit::Failure);
        let late = anyhow::anyhow!("cause").context(Incomplete("tree restored")).context("restore");
        assert_eq!(of(&late), Exit::Incomplete);
        assert_eq!(format!("{late:#}"), "restore: tree restored: cause");
        assert_eq!(Exit::Tree(137).status(), 137);
    }
}
