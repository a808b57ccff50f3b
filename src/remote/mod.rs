//! Live migration: images go from a dump to a restore on another host, through memory only.
//!
//! ```text
//!  dump --remote ──pipe──▶ image-proxy ──TCP──▶ image-cache ──memfd──▶ restore --remote
//!  dump --remote --address ─────────────TCP──▶ image-cache
//! ```
//!
//! - [`handover`]: who owns the tree when, as one table.
//! - [`cache`]: the daemon at the destination.
//! - [`journal`]: what of a hand-over outlives its processes.
//! - [`wire`]: frames and messages, the same on the pipe and on the connection.
//! - [`local`]: packets between the commands of one host and its daemons, with descriptors.
//! - [`process`]: a process of which something is written down.
//! - [`session`]: a source's side of one connection, without the connection.
//! - [`poll`]: waiting for many descriptors at once.
//! - `witness`: what became of a tree whose dump or restore is gone.
//!
//! The rules: end of stream is never success; a snapshot can be restored only after the source has said that
//! the tree is gone there; whoever dies, the tree runs on one side at most, and its images are kept while it
//! runs on none.

pub mod cache;
pub mod client;
pub mod crc;
pub mod daemon;
pub mod front;
pub mod handover;
pub mod journal;
mod last_words;
pub mod local;
pub mod name;
pub mod net;
pub mod notify;
pub mod poll;
pub mod process;
pub mod proxy;
pub mod ring;
pub mod session;
pub mod wire;
mod witness;

/// Messages of `proto/remote.proto`.
#[allow(missing_docs, clippy::doc_markdown, clippy::large_enum_variant, clippy::enum_variant_names)]
pub mod pb {
    include!(concat!(env!("OUT_DIR"), "/remote.rs"));
}

/// TCP port of the cache when `--port` is not given, as CRIU's.
pub const DEFAULT_PORT: u16 = 9996;
/// UNIX socket of the proxy, in the work dir.
pub const PROXY_SOCKET: &str = "img-proxy.sock";
/// UNIX socket of the cache, in the work dir.
pub const CACHE_SOCKET: &str = "img-cache.sock";
/// Snapshot name when `-D` is not given.
pub const DEFAULT_SNAPSHOT: &str = "default";

/// What the restore of a tree with seccomp filters uses, as `crtool check --feature` and offers name it.
const FEATURE_FILTERS: &str = "seccomp_filters";

/// The name of this host, for lists and messages.
pub fn host() -> String {
    nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned()
}

/// Tells the pid namespace of this process from all others, of other hosts too; empty if that cannot be known.
fn namespace_of_pids() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let own = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    if boot.is_empty() { String::new() } else { format!("{} {}", boot.trim_end(), own.display()) }
}

/// Draws the identity of a snapshot or a journal; never 0.
fn draw() -> u64 {
    use std::io::Read as _;
    let mut bytes = [0; 8];
    let drawn = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    drawn.map_or(0, |()| u64::from_ne_bytes(bytes)).max(1)
}

/// A refusal or failure as it travels: a code for programs, a line for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Failure {
    /// What kind.
    pub code: pb::FailCode,
    /// What, which object, why, what to do.
    pub text: String,
}

impl Failure {
    /// A failure with this line.
    pub fn new(code: pb::FailCode, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}

impl From<pb::Failed> for Failure {
    fn from(failed: pb::Failed) -> Self {
        Self { code: failed.code(), text: failed.text }
    }
}

impl From<Failure> for pb::Failed {
    fn from(failure: Failure) -> Self {
        Self { code: failure.code.into(), text: failure.text }
    }
}
