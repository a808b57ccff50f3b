//! The ways in which each case is sent through dump and restore.

use crate::case::{Case, Expect};
use crate::tool::{self, Tool};

/// One way of running a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Dump kills the tree, restore brings it back.
    Plain,
    /// `dump -R`: the original goes on and passes, then the images are restored and pass too.
    Running,
    /// Dump and restore, and once more from what was restored.
    Twice,
    /// Fifty rounds of the same tree.
    Fifty,
    /// `dump -s`: everything as it was, but stopped.
    Stopped,
    /// crtool is killed with SIGKILL at many moments of dumps and restores.
    Killed,
    /// Dumps and restores end by SIGTERM and SIGINT at many moments.
    Terminated,
    /// From host to host through proxy and cache, and back.
    Remote,
    /// From host to host, the dump speaking to the cache itself, and back.
    Direct,
    /// There through proxy and cache, back directly, both with TLS.
    RemoteTls,
    /// The peer CRIU restores what crtool dumped.
    CriuRestores,
    /// crtool restores what the peer CRIU dumped.
    FromCriu,
    /// What was dumped is made a chain of snapshots before it is restored.
    Chain,
    /// The same, and the peer CRIU restores it: the chains are such as CRIU understands.
    CriuChain,
}

pub const ALL: &[Mode] = &[
    Mode::Plain,
    Mode::Running,
    Mode::Twice,
    Mode::Fifty,
    Mode::Stopped,
    Mode::Killed,
    Mode::Terminated,
    Mode::Remote,
    Mode::Direct,
    Mode::RemoteTls,
    Mode::CriuRestores,
    Mode::FromCriu,
    Mode::Chain,
    Mode::CriuChain,
];

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Mode::Plain => "plain",
            Mode::Running => "running",
            Mode::Twice => "twice",
            Mode::Fifty => "fifty",
            Mode::Stopped => "stopped",
            Mode::Killed => "killed",
            Mode::Terminated => "terminated",
            Mode::Remote => "remote",
            Mode::Direct => "direct",
            Mode::RemoteTls => "remote-tls",
            Mode::CriuRestores => "criu-restores",
            Mode::FromCriu => "from-criu",
            Mode::Chain => "chain",
            Mode::CriuChain => "criu-chain",
        }
    }

    pub fn named(name: &str) -> Option<Mode> {
        ALL.iter().copied().find(|m| m.name() == name)
    }

    pub fn interop(self) -> bool {
        matches!(self, Mode::CriuRestores | Mode::FromCriu | Mode::CriuChain)
    }

    /// Whether images become a chain.
    pub fn chain(self) -> bool {
        matches!(self, Mode::Chain | Mode::CriuChain)
    }

    /// Whether images go from host to host and never touch a disk.
    pub fn remote(self) -> bool {
        matches!(self, Mode::Remote | Mode::Direct | Mode::RemoteTls)
    }

    /// Whether this mode says anything about the case.
    pub fn suits(self, case: &Case) -> bool {
        let survives = case.expect == Expect::Restored;
        match self {
            Mode::Plain => true,
            Mode::Running => survives && !case.only_plain && !case.not_running,
            Mode::Twice => survives && !case.only_plain,
            Mode::Fifty => survives && case.fifty,
            Mode::Stopped => survives && case.disturbed,
            Mode::Killed | Mode::Terminated => survives && case.disturbed && !tool::main_tool().is_peer(),
            // What only this host stands in the way of is no reason for a refusal when another one is to restore.
            Mode::Remote | Mode::Direct | Mode::RemoteTls => {
                let of_host = case.only_plain && matches!(case.expect, Expect::Refused(_));
                !of_host && !tool::main_tool().is_peer()
            }
            Mode::Chain => survives && !tool::main_tool().is_peer(),
            // CRIU reads a huge page at once: no chain of its own parts one.
            Mode::CriuChain if matches!(case.name, "huge_pages_private" | "private_of_memfd_huge") => false,
            Mode::CriuRestores | Mode::FromCriu | Mode::CriuChain => {
                survives && !case.only_plain && !tool::main_tool().is_peer()
            }
        }
    }

    pub fn dumper(self) -> Tool {
        match self {
            Mode::FromCriu => tool::peer().unwrap_or_else(tool::main_tool),
            _ => tool::main_tool(),
        }
    }

    pub fn restorer(self) -> Tool {
        match self {
            Mode::CriuRestores | Mode::CriuChain => tool::peer().unwrap_or_else(tool::main_tool),
            _ => tool::main_tool(),
        }
    }

    pub fn rounds(self, case: &Case) -> usize {
        match self {
            _ if case.only_plain => 1,
            Mode::Twice | Mode::Remote | Mode::Direct | Mode::RemoteTls => 2,
            Mode::Fifty => 50,
            _ => 1,
        }
    }
}
