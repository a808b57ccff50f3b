//! What a command is asked to do, checked and as plain data.
//!
//! The command line builds these in `cli::settings`; any other front (a library user, an RPC
//! server, a test) builds them with `DumpSettings::new` and sets fields. Nothing below the command
//! line ever sees an option. Paths may be relative to the current directory unless a field says
//! otherwise.

use std::{
    ffi::OsString,
    fmt,
    os::fd::RawFd,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::unistd::Pid;

use crate::action::ActionScripts;

/// Largest deleted file that travels inside the images when `--ghost-limit` is not given.
pub const DEFAULT_GHOST_LIMIT: u64 = 1 << 20;

/// Time to freeze and collect a tree, and longest standstill of a restore, when `--timeout` is not given.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Writing images may stand still for so long when `--timeout` is not given: disks are slow at times.
pub const DEFAULT_STANDSTILL: Duration = Duration::from_secs(60);

/// Longest silence on the way of images when `--timeout` is not given.
pub const DEFAULT_REMOTE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a restore waits for its snapshot to begin to arrive when `--timeout` is not given.
pub const DEFAULT_WAIT_SNAPSHOT: Duration = Duration::from_secs(600);

/// What becomes of the tree after a dump that succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Leave {
    /// Killed, after the images are safe.
    #[default]
    Killed,
    /// Goes on running.
    Running,
    /// Stopped by a group stop, until somebody sends SIGCONT.
    Stopped,
}

/// How a file that is open or mapped is compared with the one found at restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FileValidation {
    /// Size only.
    FileSize,
    /// Build id of ELF files, else a size.
    #[default]
    BuildId,
}

/// Which properties of the CPU are written to, or checked against, `cpuinfo.img`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuCap {
    /// Floating point and extended state.
    pub fpu: bool,
    /// Everything must be the same.
    pub cpu: bool,
    /// The instructions in use must be there.
    pub ins: bool,
}

impl CpuCap {
    /// Nothing is written, nothing is checked.
    pub const NONE: Self = Self { fpu: false, cpu: false, ins: false };
    /// Everything.
    pub const ALL: Self = Self { fpu: true, cpu: true, ins: true };
}

/// A resource that is not saved but named: `--external kind[id]:value`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct External {
    /// `kind[id]`, as written: `file[2a:1234]`, `tty[8800:1c]`.
    pub key: Vec<u8>,
    /// What follows the colon.
    pub value: Option<Vec<u8>>,
}

/// As it was written.
impl fmt::Display for External {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.key))?;
        match &self.value {
            Some(value) => write!(f, ":{}", String::from_utf8_lossy(value)),
            None => Ok(()),
        }
    }
}

/// A descriptor of the caller that stands for a file in the images: `--inherit-fd fd[N]:key`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InheritFd {
    /// `tty[rdev:dev]`, `pipe[inode]`, `file[mnt_id:inode]` or a path without its leading slash.
    pub key: Vec<u8>,
    /// Our number for it.
    pub fd: RawFd,
}

/// Whether files and directories of others than root and the caller are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OwnerCheck {
    /// They are refused.
    #[default]
    On,
    /// Whoever may write to them is trusted.
    Off,
}

/// What dump and restore have in common.
#[derive(Debug, Clone)]
pub struct CommonSettings {
    /// Where the images are.
    pub images_dir: PathBuf,
    /// Where logs, pid files and statistics go; action scripts run here.
    pub work_dir: PathBuf,
    /// Session, process group and terminal come from outside the tree.
    pub shell_job: bool,
    /// File locks are saved and taken again.
    pub file_locks: bool,
    /// Unlinked files with names elsewhere may be linked back into the file system.
    pub link_remap: bool,
    /// A device node may be opened by another name than the one it had.
    pub evasive_devices: bool,
    /// How files are recognised.
    pub file_validation: FileValidation,
    /// What of the CPU is recorded or checked; `None` if nobody asked for either.
    pub cpu_cap: Option<CpuCap>,
    /// Resources that are not ours.
    pub externals: Vec<External>,
    /// Programs to run at certain points.
    pub action_scripts: ActionScripts,
    /// Of images, their directory, and the files that are written in the work dir.
    pub owner_check: OwnerCheck,
}

impl CommonSettings {
    fn new(images_dir: &Path) -> Self {
        Self {
            images_dir: images_dir.to_owned(),
            work_dir: images_dir.to_owned(),
            shell_job: false,
            file_locks: false,
            link_remap: false,
            evasive_devices: false,
            file_validation: FileValidation::default(),
            cpu_cap: None,
            externals: Vec::new(),
            action_scripts: ActionScripts::default(),
            owner_check: OwnerCheck::default(),
        }
    }
}

/// Certificates of one side; both sides prove who they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsSettings {
    /// Who may have signed the other side's certificate.
    pub cacert: PathBuf,
    /// Certificates that are no longer good.
    pub cacrl: Option<PathBuf>,
    /// Our certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The other side's certificate need not carry its name.
    pub no_cn_verify: bool,
    /// Whom the other side's certificate may name; anybody if empty.
    pub allow: Vec<String>,
}

/// The other end of a connection, or where to listen for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetSettings {
    /// Name or number of the host; for a cache what to bind to, everything if `None`.
    pub address: Option<String>,
    /// TCP port.
    pub port: u16,
    /// A connection that exists already, used in place of a new one.
    pub ps_socket: Option<RawFd>,
    /// Encryption and proof of who is who.
    pub tls: Option<TlsSettings>,
    /// Longest silence, and longest wait for the other side to be there.
    pub timeout: Duration,
}

/// How a daemon starts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DaemonSettings {
    /// Goes into the background once its sockets listen.
    pub detach: bool,
    /// Gets its pid.
    pub pidfile: Option<PathBuf>,
    /// Gets one zero byte and is closed when its sockets listen.
    pub status_fd: Option<RawFd>,
    /// Of `pidfile`.
    pub owner_check: OwnerCheck,
}

/// The restores that an image-cache starts.
#[derive(Debug, Clone)]
pub struct StartedRestores {
    /// Their options, as they were given.
    pub words: Vec<OsString>,
    /// What these mean.
    pub settings: RestoreSettings,
}

/// One image-cache.
#[derive(Debug, Clone)]
pub struct CacheSettings {
    /// Where sources come from.
    pub net: NetSettings,
    /// Where its socket is.
    pub work_dir: PathBuf,
    /// Most bytes of images it holds; no limit if `None`.
    pub max_memory: Option<u64>,
    /// Where complete snapshots are written when it is told to end, and come from when it starts.
    pub spill: Option<PathBuf>,
    /// Starts such a restore for whatever `migrate` sends.
    pub restore: Option<StartedRestores>,
    /// Most of those that one source may have; a part of the former if `None`.
    pub max_per_source: Option<u64>,
    /// So many snapshots arrive at once; the trees of others run on until it is their turn.
    pub at_once: usize,
    /// How it starts.
    pub daemon: DaemonSettings,
}

/// One image-proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxySettings {
    /// The cache.
    pub net: NetSettings,
    /// Where its socket is.
    pub work_dir: PathBuf,
    /// Dumps compress what they send (LZ4).
    pub compress: bool,
    /// How it starts.
    pub daemon: DaemonSettings,
}

/// One tree that is to go on on another host.
#[derive(Debug, Clone)]
pub struct MigrateSettings {
    /// How it is dumped; [`DumpSettings::remote`] says where to.
    pub dump: DumpSettings,
    /// Longest time from the freeze until the restored tree is complete; no limit if `None`.
    pub max_pause: Option<Duration>,
    /// What is going on is said as lines of JSON.
    pub json: bool,
}

/// What an operator does about hand-overs whose end was not known when their `migrate` died or lost its destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MigrateRequest {
    /// Say which there are.
    List,
    /// Ask the destination, and do what follows; all of them if `None`.
    Settle(Option<u64>),
    /// It does not run at the destination: let it go on here.
    Thaw(u64),
    /// It runs at the destination: end it here.
    Kill(u64),
}

/// What an operator asks a running image-cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheRequest {
    /// Which snapshots it holds.
    List,
    /// That, those it held, and how it is.
    Status,
    /// Free a snapshot.
    Drop {
        /// Which.
        name: String,
        /// Also if nobody else has its tree.
        force: bool,
    },
    /// Put a copy of a snapshot into a directory.
    Save {
        /// Which.
        name: String,
        /// Where to.
        dir: PathBuf,
        /// It is not kept in the cache.
        drop: bool,
        /// Of the directory.
        check: OwnerCheck,
    },
    /// Bring the images of a directory into the cache.
    Load {
        /// As what.
        name: String,
        /// Where from.
        dir: PathBuf,
        /// Of the directory and its images.
        check: OwnerCheck,
    },
    /// The source of a snapshot in doubt is known to be gone: it may be restored.
    Release {
        /// Which.
        name: String,
    },
}

/// Images go to, or come from, a cache in memory and no directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteSettings {
    /// Name of the snapshot.
    pub snapshot: String,
    /// Dump: straight to the cache; through the proxy of the work dir if `None`.
    pub direct: Option<NetSettings>,
    /// Where the sockets of proxy and cache are.
    pub work_dir: PathBuf,
    /// Dump without a proxy: compress what is sent (LZ4).
    pub compress: bool,
    /// Longest silence of a daemon, and longest wait for it to be there.
    pub timeout: Duration,
    /// Restore: the snapshot of this id and no other; 0 for any of the name.
    pub snapshot_id: u64,
    /// Restore: how long to wait for the snapshot to begin to arrive.
    pub wait_snapshot: Duration,
    /// Dump: how long to wait for the tree to run at the destination; not at all if `None`.
    pub wait_restored: Option<Duration>,
    /// Restore: the cache frees bytes as they are read. If the restore then fails, the snapshot is lost.
    pub free_as_read: bool,
}

/// One dump of one tree.
#[derive(Debug, Clone)]
pub struct DumpSettings {
    /// Shared with restore.
    pub common: CommonSettings,
    /// Root of the tree.
    pub pid: Pid,
    /// What becomes of it.
    pub leave: Leave,
    /// Longest time to collect the tree; `None` for no limit.
    pub timeout: Option<Duration>,
    /// Longest time in which nothing moves while images are written; `None` for no limit.
    pub standstill: Option<Duration>,
    /// Largest deleted file to carry, in bytes.
    pub ghost_limit: u64,
    /// The extents of sparse deleted files are asked for by FIEMAP, many in one call, and by SEEK_DATA only where
    /// a file system has none of that.
    pub ghost_fiemap: bool,
    /// The names of watched files (inotify) are looked for at once, also where a file handle would do.
    pub force_irmap: bool,
    /// Directories below which names of watched files are looked for, besides the usual ones.
    pub irmap_scan_paths: Vec<PathBuf>,
    /// Into a cache instead of a directory.
    pub remote: Option<RemoteSettings>,
    /// The images are on disk, not only in the page cache, before the tree is killed, or before the command that lets
    /// it go on says that they are complete.
    pub sync: bool,
}

impl DumpSettings {
    /// A dump with every option at its default.
    pub fn new(pid: Pid, images_dir: &Path) -> Self {
        Self {
            common: CommonSettings::new(images_dir),
            pid,
            leave: Leave::default(),
            timeout: Some(DEFAULT_TIMEOUT),
            standstill: Some(DEFAULT_STANDSTILL),
            ghost_limit: DEFAULT_GHOST_LIMIT,
            ghost_fiemap: true,
            force_irmap: false,
            irmap_scan_paths: Vec::new(),
            remote: None,
            sync: true,
        }
    }
}

/// One restore of one tree.
#[derive(Debug, Clone)]
pub struct RestoreSettings {
    /// Shared with dump.
    pub common: CommonSettings,
    /// The tree does not stay our child: its root goes to init or the nearest subreaper.
    pub detached: bool,
    /// The root becomes a child of our parent (only with `detached`).
    pub sibling: bool,
    /// The tree is left stopped.
    pub leave_stopped: bool,
    /// File modes need not be the ones that were dumped.
    pub skip_file_rwx_check: bool,
    /// Symbolic links that are found on the way to a file of the tree are followed whoever has made them.
    pub allow_symlinks: bool,
    /// The tree reads CLOCK_MONOTONIC and CLOCK_BOOTTIME as this machine has them: no time namespace is made.
    pub host_clocks: bool,
    /// Descriptors of ours that replace files of the images.
    pub inherit_fds: Vec<InheritFd>,
    /// Written before the tree runs; relative to the work dir.
    pub pidfile: Option<PathBuf>,
    /// Program and arguments that replace us, as parent of the tree, after success.
    pub exec_cmd: Option<Vec<OsString>>,
    /// Longest time in which nothing moves; `None` for no limit.
    pub timeout: Option<Duration>,
    /// From a cache instead of a directory.
    pub remote: Option<RemoteSettings>,
}

impl RestoreSettings {
    /// A restore with every option at its default.
    pub fn new(images_dir: &Path) -> Self {
        Self {
            common: CommonSettings::new(images_dir),
            detached: false,
            sibling: false,
            leave_stopped: false,
            skip_file_rwx_check: false,
            allow_symlinks: false,
            host_clocks: false,
            inherit_fds: Vec::new(),
            pidfile: None,
            exec_cmd: None,
            timeout: Some(DEFAULT_TIMEOUT),
            remote: None,
        }
    }
}

/// Which kernel features to look at.
#[derive(Debug, Clone)]
pub enum CheckSettings {
    /// What is essential, and what was asked for beyond it.
    Kernel {
        /// Needed by some trees only.
        extra: bool,
        /// New or in development.
        experimental: bool,
    },
    /// These features only.
    Features(Vec<String>),
    /// The names of all features.
    List,
    /// Everything in a tree that would stop a dump.
    Tree(Box<DumpSettings>),
}

/// Where messages go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogSettings {
    /// Relative to the work dir; `-` is standard output; none is standard error.
    pub file: Option<PathBuf>,
    /// What `file` is relative to.
    pub work_dir: PathBuf,
    /// 0 nothing, 1 errors, 2 warnings, 3 information and times, 4 everything.
    pub level: u8,
    /// Messages that concern one task go to `FILE.PID`.
    pub per_pid: bool,
    /// Of `file`.
    pub owner_check: OwnerCheck,
}

/// What the caller of a command hears, apart from messages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReportSettings {
    /// Print what was counted.
    pub display_stats: bool,
    /// Gets one zero byte and is closed when the command has done its work.
    pub status_fd: Option<RawFd>,
}
