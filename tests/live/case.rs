//! What a case is: a target, and what is expected of its dump and restore.

use std::path::Path;

use crate::gate::Gate;

/// How the trial must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Dump and restore succeed and the target finds everything as it was.
    Restored,
    /// The dump fails, says these texts (parted by `|`), and the target runs on untouched.
    Refused(&'static str),
    /// The dump succeeds, the restore fails, says this text, and leaves nothing behind.
    RestoreRefused(&'static str),
}

/// Something the harness does to the case's working directory or tree.
pub type Hook = fn(&Site);

/// What a hook sees: the directory the target runs in, and the target's pid.
#[derive(Debug)]
pub struct Site<'a> {
    pub dir: &'a Path,
    pub root: i32,
}

/// Where CLOCK_MONOTONIC and CLOCK_BOOTTIME stand, in seconds, for whoever is started so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clocks {
    pub monotonic: i64,
    pub boottime: i64,
}

/// One row of the suite.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub name: &'static str,
    pub target: fn(&Gate),
    /// Options for dump and restore.
    pub flags: &'static [&'static str],
    pub expect: Expect,
    /// Why CRIU itself cannot do it (no interop, no oracle).
    pub peer_fails: Option<&'static str>,
    /// The tree changes all the time: its picture before and after is not compared.
    pub changing: bool,
    /// Parts of the picture that may differ (key contains this text).
    pub may_differ: &'static [&'static str],
    /// Parts of the picture that CRIU does not bring back as they were.
    pub peer_loses: &'static [&'static str],
    pub fifty: bool,
    /// Also goes through dumps and restores that are stopped, killed, interrupted.
    pub disturbed: bool,
    pub only_plain: bool,
    /// The images of a `dump -R` cannot be restored as they were once the original has gone on.
    pub not_running: bool,
    /// The target's session and terminal are the harness's, not its own.
    pub on_terminal: bool,
    /// The target is started in a time namespace of its own, its clocks so.
    pub source_clocks: Option<Clocks>,
    /// So are the tools: a host with another uptime.
    pub host_clocks: Option<Clocks>,
    /// The tool that dumps may not make this call.
    pub dump_denied: Option<i64>,
    /// Runs while the dump is under way.
    pub while_dumping: Option<Hook>,
    /// Runs between a dump that killed the tree and the restore.
    pub between: Option<Hook>,
}

impl Case {
    pub const fn new(name: &'static str, target: fn(&Gate)) -> Case {
        Case {
            name,
            target,
            flags: &[],
            expect: Expect::Restored,
            peer_fails: None,
            changing: false,
            may_differ: &[],
            peer_loses: &[],
            fifty: false,
            disturbed: false,
            only_plain: false,
            not_running: false,
            on_terminal: false,
            source_clocks: None,
            host_clocks: None,
            dump_denied: None,
            while_dumping: None,
            between: None,
        }
    }

    pub const fn flags(self, flags: &'static [&'static str]) -> Case {
        Case { flags, ..self }
    }

    pub const fn refused(self, text: &'static str) -> Case {
        Case { expect: Expect::Refused(text), ..self }
    }

    pub const fn restore_refused(self, text: &'static str) -> Case {
        Case { expect: Expect::RestoreRefused(text), ..self }
    }

    pub const fn peer_fails(self, reason: &'static str) -> Case {
        Case { peer_fails: Some(reason), ..self }
    }

    pub const fn changing(self) -> Case {
        Case { changing: true, ..self }
    }

    pub const fn may_differ(self, may_differ: &'static [&'static str]) -> Case {
        Case { may_differ, ..self }
    }

    pub const fn peer_loses(self, peer_loses: &'static [&'static str]) -> Case {
        Case { peer_loses, ..self }
    }

    pub const fn fifty(self) -> Case {
        Case { fifty: true, ..self }
    }

    pub const fn disturbed(self) -> Case {
        Case { disturbed: true, ..self }
    }

    pub const fn only_plain(self) -> Case {
        Case { only_plain: true, ..self }
    }

    pub const fn not_running(self) -> Case {
        Case { not_running: true, ..self }
    }

    pub const fn on_terminal(self) -> Case {
        Case { on_terminal: true, ..self }
    }

    pub const fn source_clocks(self, clocks: Clocks) -> Case {
        Case { source_clocks: Some(clocks), ..self }
    }

    pub const fn host_clocks(self, clocks: Clocks) -> Case {
        Case { host_clocks: Some(clocks), ..self }
    }

    pub const fn dump_denied(self, number: i64) -> Case {
        Case { dump_denied: Some(number), ..self }
    }

    pub const fn while_dumping(self, hook: Hook) -> Case {
        Case { while_dumping: Some(hook), ..self }
    }

    pub const fn between(self, hook: Hook) -> Case {
        Case { between: Some(hook), ..self }
    }
}
