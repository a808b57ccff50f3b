//! The options that work, typed. What the words mean is settled before (`argv`), what the options mean for a
//! command after (`settings`).

use std::{
    ffi::{OsStr, OsString},
    os::{fd::RawFd, unix::ffi::OsStrExt},
    path::PathBuf,
};

use clap::{
    Parser,
    builder::{NonEmptyStringValueParser, OsStringValueParser, TypedValueParser},
};
use nix::unistd::Pid;

use super::known::Command;
use crate::settings::{CpuCap, External, FileValidation, InheritFd, OwnerCheck};

const EXAMPLES: &str = "\
Examples:
  crtool dump -t 1234 -D images             save the tree of process 1234, then kill it
  crtool dump -t 1234 -D images -R -j       save a job of this shell, let it run on
  crtool restore -d -D images               continue it
  crtool check                              what this machine can do
  crtool check -t 1234                      what would stop a dump of 1234
  crtool image show images/pstree.img       look into an image

  dst# crtool image-cache -d --restore -W /run/crtool -o cache.log
  src# crtool migrate -t 1234 --to DST -W /run/crtool      let it go on on DST

  dst# crtool image-cache -d -W /run/crtool -o cache.log
  src# crtool image-proxy -d -W /run/crtool -o proxy.log --address DST
  src# crtool dump -t 1234 --remote -W /run/crtool         bring it to DST, in memory
  dst# crtool restore -d --remote -W /run/crtool           continue it there

Most switches can be taken back with --no-NAME. Names may be abbreviated. Every option of criu(8) is known
by its name; one that is not listed here is refused as not supported yet, or has no effect, with a warning.";

/// Checkpoint and restore Linux process trees.
#[derive(Debug, Parser)]
#[command(
    name = "crtool",
    disable_version_flag = true,
    disable_help_flag = true,
    args_override_self = true,
    after_help = EXAMPLES
)]
pub(crate) struct Opts {
    /// What to do
    #[arg(value_enum)]
    pub(crate) command: Command,
    /// Words after the command: a program for --exec-cmd, the arguments of image
    #[arg(value_name = "WORDS", hide = true)]
    pub(crate) words: Vec<OsString>,

    /// Root of the process tree
    #[arg(short, long, value_name = "PID", value_parser = pid, help_heading = "Dump and restore")]
    pub(crate) tree: Option<Pid>,
    /// Directory of the images [default: the current one]; with --remote any name for the snapshot
    #[arg(short = 'D', long, value_name = "DIR", help_heading = "Dump and restore")]
    pub(crate) images_dir: Option<PathBuf>,
    /// Leave the tree running after the dump
    #[arg(short = 'R', long, overrides_with = "leave_stopped", help_heading = "Dump and restore")]
    pub(crate) leave_running: bool,
    /// Leave the tree stopped after dump or restore
    #[arg(short = 's', long, overrides_with = "leave_running", help_heading = "Dump and restore")]
    pub(crate) leave_stopped: bool,
    /// Return when the restored tree runs; it does not stay a child. A daemon: go into the background
    #[arg(short = 'd', long, help_heading = "Dump and restore")]
    pub(crate) restore_detached: bool,
    /// Make the restored root a child of the caller (with -d)
    #[arg(short = 'S', long, help_heading = "Dump and restore")]
    pub(crate) restore_sibling: bool,
    /// Let the restored tree read the clocks of this machine, not go on from where it was frozen
    #[arg(long, help_heading = "Dump and restore")]
    pub(crate) host_clocks: bool,
    /// Write the pid of the restored root, or of the daemon, to this file
    #[arg(long, value_name = "FILE", help_heading = "Dump and restore")]
    pub(crate) pidfile: Option<PathBuf>,
    /// After the restore become the program given after `--`, as parent of the tree
    #[arg(long, help_heading = "Dump and restore")]
    pub(crate) exec_cmd: bool,
    /// Write a zero byte to this descriptor and close it on success, or when the daemon listens
    #[arg(long, value_name = "FD", value_parser = fd, help_heading = "Dump and restore")]
    pub(crate) status_fd: Option<RawFd>,
    /// Run this program at certain steps; CRTOOLS_SCRIPT_ACTION says which
    #[arg(long, value_name = "FILE", help_heading = "Dump and restore")]
    pub(crate) action_script: Vec<PathBuf>,
    /// Longest time to freeze and collect a tree, in seconds [default: 10], and then in which nothing moves while its pages
    /// are written [default: 60]; restore: longest time in which nothing moves [default: 10]; 0 for no limit. With --remote also the longest silence of a daemon or another host; restore: the longest wait for
    /// the snapshot [default: 600]
    #[arg(long, value_name = "SECONDS", value_parser = seconds, help_heading = "Dump and restore")]
    pub(crate) timeout: Option<u32>,
    /// CPU properties to write or to check: cpu, fpu, ins, all, none, comma separated, ^ takes one away
    #[arg(long, value_name = "CAPS", num_args = 0..=1, require_equals = true, default_missing_value = "all",
          value_parser = cpu_cap, help_heading = "Dump and restore")]
    pub(crate) cpu_cap: Option<CpuCap>,
    /// Only `ignore` for now: control groups are left alone
    #[arg(long, value_name = "MODE", num_args = 0..=1, require_equals = true, default_missing_value = "soft",
          help_heading = "Dump and restore")]
    pub(crate) manage_cgroups: Option<String>,

    /// The images go to, or come from, an image-cache in memory; no directory is used
    #[arg(long, help_heading = "Migration")]
    pub(crate) remote: bool,
    /// migrate: where the tree is to go on, an image-cache --restore [default: where image-proxy leads to]
    #[arg(long, value_name = "HOST[:PORT]", help_heading = "Migration")]
    pub(crate) to: Option<String>,
    /// migrate: let the tree go on here if the restored one is not complete so long after the freeze, in seconds
    #[arg(long, value_name = "SECONDS", value_parser = fraction, help_heading = "Migration")]
    pub(crate) max_pause: Option<f64>,
    /// migrate: say what is going on in lines of JSON
    #[arg(long, help_heading = "Migration")]
    pub(crate) json: bool,
    /// image-cache: restore what migrate sends; options of that restore may follow after `--`
    #[arg(long, help_heading = "Migration")]
    pub(crate) restore: bool,
    /// The host of the cache; a dump then needs no image-proxy. image-cache: where to listen [default: everywhere]
    #[arg(long, value_name = "HOST", help_heading = "Migration")]
    pub(crate) address: Option<String>,
    /// TCP port of the cache [default: 9996]
    #[arg(long, value_name = "PORT", value_parser = port, help_heading = "Migration")]
    pub(crate) port: Option<u16>,
    /// Use this connected socket instead of making a connection
    #[arg(long, value_name = "FD", value_parser = fd, help_heading = "Migration")]
    pub(crate) ps_socket: Option<RawFd>,
    /// Compress what is sent, where it pays: lz4 or none [default: none]
    #[arg(long, value_name = "METHOD", value_parser = compress, help_heading = "Migration")]
    pub(crate) compress: Option<Compress>,
    /// Dump: wait until the tree runs at the destination [default: 600 seconds]
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "600",
          value_parser = seconds, help_heading = "Migration")]
    pub(crate) wait_restored: Option<u32>,
    /// Restore: free memory of the cache while reading; if the restore fails then, the snapshot is lost
    #[arg(long, help_heading = "Migration")]
    pub(crate) free_as_read: bool,
    /// Restore: the snapshot with this id and no other, without waiting; image-cache --restore says it
    #[arg(long, value_name = "ID", value_parser = snapshot_id, help_heading = "Migration")]
    pub(crate) snapshot_id: Option<u64>,
    /// image-cache: most memory for images, with K, M or G [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Migration")]
    pub(crate) max_memory: Option<u64>,
    /// image-cache: what is complete is written there when it is told to end, for the next one
    #[arg(long, value_name = "DIR", help_heading = "Migration")]
    pub(crate) spill: Option<PathBuf>,
    /// image-cache: most of that for one source [default: three quarters]
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Migration")]
    pub(crate) max_per_source: Option<u64>,
    /// image-cache: so many snapshots arrive at once, others wait while their trees run [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Migration")]
    pub(crate) at_once: Option<u32>,
    /// image-cache drop: also a snapshot that is the only one to have its tree
    #[arg(long, help_heading = "Migration")]
    pub(crate) force: bool,
    /// image-cache save: the cache does not keep the snapshot
    #[arg(long, help_heading = "Migration")]
    pub(crate) drop: bool,
    /// Encrypt; both sides prove who they are with certificates
    #[arg(long, help_heading = "Migration")]
    pub(crate) tls: bool,
    /// Who may have signed the other side's certificate [default: /etc/pki/CA/cacert.pem]
    #[arg(long, value_name = "FILE", help_heading = "Migration")]
    pub(crate) tls_cacert: Option<PathBuf>,
    /// Certificates that are no longer good [default: /etc/pki/CA/cacrl.pem, if it is there]
    #[arg(long, value_name = "FILE", help_heading = "Migration")]
    pub(crate) tls_cacrl: Option<PathBuf>,
    /// Our certificate [default: /etc/pki/criu/cert.pem]
    #[arg(long, value_name = "FILE", help_heading = "Migration")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Its key [default: /etc/pki/criu/private/key.pem]
    #[arg(long, value_name = "FILE", help_heading = "Migration")]
    pub(crate) tls_key: Option<PathBuf>,
    /// The certificate of the cache need not carry the name in --address
    #[arg(long, help_heading = "Migration")]
    pub(crate) tls_no_cn_verify: bool,
    /// The other side's certificate names SUBJECT: its CN, a DNS name in it, or the whole subject as in lists; repeatable
    #[arg(long, value_name = "SUBJECT", value_parser = NonEmptyStringValueParser::new(), help_heading = "Migration")]
    pub(crate) tls_allow: Vec<String>,

    /// The tree is a job of a shell: take session, group and terminal from the caller
    #[arg(short = 'j', long, help_heading = "Resources")]
    pub(crate) shell_job: bool,
    /// Save and take file locks
    #[arg(short = 'l', long, help_heading = "Resources")]
    pub(crate) file_locks: bool,
    /// Allow unlinked files to be linked back
    #[arg(long, help_heading = "Resources")]
    pub(crate) link_remap: bool,
    /// Largest deleted file to carry, with K, M or G [default: 1M]
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Resources")]
    pub(crate) ghost_limit: Option<u64>,
    /// Look for the extents of sparse deleted files with SEEK_DATA only, not with FIEMAP
    #[arg(long, help_heading = "Resources")]
    pub(crate) no_ghost_fiemap: bool,
    /// FIEMAP is used unless --no-ghost-fiemap says otherwise
    #[arg(long, hide = true)]
    pub(crate) ghost_fiemap: bool,
    /// Look for the names of watched files (inotify) also where a file handle would do
    #[arg(long, help_heading = "Resources")]
    pub(crate) force_irmap: bool,
    /// Also look for names of watched files below this directory
    #[arg(long, value_name = "DIR", help_heading = "Resources")]
    pub(crate) irmap_scan_path: Vec<PathBuf>,
    /// Allow another name for a device that cannot be opened by its own
    #[arg(long, help_heading = "Resources")]
    pub(crate) evasive_devices: bool,
    /// How files are recognised at restore: filesize or buildid [default: buildid]
    #[arg(long, value_name = "METHOD", value_parser = file_validation, help_heading = "Resources")]
    pub(crate) file_validation: Option<FileValidation>,
    /// Do not compare file modes and owners at restore
    #[arg(long, help_heading = "Resources")]
    pub(crate) skip_file_rwx_check: bool,
    /// Follow symbolic links on the way to files of the tree, whoever has made them
    #[arg(long, help_heading = "Resources")]
    pub(crate) allow_symlinks: bool,
    /// A resource that is not saved: file[mnt_id:inode], tty[rdev:dev], pipe[inode]
    #[arg(long, value_name = "RES", value_parser = OsStringValueParser::new().try_map(|text| external(&text)),
          help_heading = "Resources")]
    pub(crate) external: Vec<External>,
    /// fd[N]:KEY, our descriptor N stands for the file KEY of the images
    #[arg(long, value_name = "FD", value_parser = OsStringValueParser::new().try_map(|text| inherit_fd(&text)),
          help_heading = "Resources")]
    pub(crate) inherit_fd: Vec<InheritFd>,

    /// Also check what only some trees need
    #[arg(long, help_heading = "Check")]
    pub(crate) extra: bool,
    /// Also check what is new
    #[arg(long, help_heading = "Check")]
    pub(crate) experimental: bool,
    /// Check everything
    #[arg(long, help_heading = "Check")]
    pub(crate) all: bool,
    /// Check this feature only; `list` names them all
    #[arg(long, value_name = "NAME", help_heading = "Check")]
    pub(crate) feature: Vec<String>,

    /// Directory for logs, pid files, statistics and sockets [default: the images directory; with --remote
    /// and for daemons the current one]
    #[arg(short = 'W', long, value_name = "DIR", help_heading = "Messages")]
    pub(crate) work_dir: Option<PathBuf>,
    /// Write messages to this file, relative to the work directory; - is stdout
    #[arg(short = 'o', long, value_name = "FILE", help_heading = "Messages")]
    pub(crate) log_file: Option<PathBuf>,
    /// Messages about a task go to FILE.PID
    #[arg(long, help_heading = "Messages")]
    pub(crate) log_pid: bool,
    /// More messages: -v, -vv; or -v0 none, -v1 errors, -v2 warnings, -v3 information, -v4 all
    #[arg(short = 'v', long, value_name = "LEVEL", num_args = 0..=1, require_equals = true,
          default_value_t = super::argv::DEFAULT_VERBOSITY, help_heading = "Messages", hide_default_value = true)]
    pub(crate) verbosity: u8,
    /// Print what was counted
    #[arg(long, help_heading = "Messages")]
    pub(crate) display_stats: bool,

    /// Take images, directories and log files also of others than root and the caller, or that others may write to
    #[arg(long, help_heading = "Other")]
    pub(crate) no_owner_check: bool,
    /// On unless --no-owner-check says otherwise
    #[arg(long, hide = true)]
    pub(crate) owner_check: bool,
    /// Dump: do not wait until the images are on disk
    #[arg(long, help_heading = "Other")]
    pub(crate) no_sync: bool,
    /// On unless --no-sync says otherwise
    #[arg(long, hide = true)]
    pub(crate) sync: bool,
    /// Read options from this file, one a line without dashes
    #[arg(long, value_name = "FILE", help_heading = "Other")]
    pub(crate) config: Vec<PathBuf>,
    /// Do not read the default configuration files
    #[arg(long, help_heading = "Other")]
    pub(crate) no_default_config: bool,
    /// Close this descriptor first
    #[arg(long, value_name = "FD", value_parser = fd, help_heading = "Other")]
    pub(crate) close: Vec<RawFd>,
    /// Allow deprecated options
    #[arg(long, hide = true)]
    pub(crate) deprecated: bool,
    /// Print this
    #[arg(short = 'h', long, help_heading = "Other")]
    pub(crate) help: bool,
    /// Print the version
    #[arg(short = 'V', long, help_heading = "Other")]
    pub(crate) version: bool,
}

impl Opts {
    /// Whether files of others are taken.
    pub(crate) fn owner_check(&self) -> OwnerCheck {
        if self.no_owner_check { OwnerCheck::Off } else { OwnerCheck::On }
    }
}

/// How to compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compress {
    /// Not.
    None,
    /// LZ4 blocks.
    Lz4,
}

/// A value that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Wanted(&'static str);

fn seconds(text: &str) -> Result<u32, Wanted> {
    text.parse().map_err(|_| Wanted("a time is a whole number of seconds"))
}

fn snapshot_id(text: &str) -> Result<u64, Wanted> {
    crate::remote::journal::parse_id(text).ok_or(Wanted("an id is 16 hexadecimal digits"))
}

fn fraction(text: &str) -> Result<f64, Wanted> {
    match text.parse() {
        Ok(seconds) if seconds > 0.0 && seconds < 1e9 => Ok(seconds),
        _ => Err(Wanted("a time is a number of seconds above zero, like 2 or 0.5")),
    }
}

fn pid(text: &str) -> Result<Pid, Wanted> {
    match text.parse() {
        Ok(pid) if pid > 0 => Ok(Pid::from_raw(pid)),
        _ => Err(Wanted("a pid is a number above zero")),
    }
}

fn fd(text: &str) -> Result<RawFd, Wanted> {
    match text.parse() {
        Ok(fd) if fd >= 0 => Ok(fd),
        _ => Err(Wanted("a descriptor is a number, not below zero")),
    }
}

fn port(text: &str) -> Result<u16, Wanted> {
    text.parse().map_err(|_| Wanted("a port is a number, at most 65535"))
}

fn compress(text: &str) -> Result<Compress, Wanted> {
    match text {
        "lz4" => Ok(Compress::Lz4),
        "none" => Ok(Compress::None),
        _ => Err(Wanted("the method is lz4 or none")),
    }
}

fn size(text: &str) -> Result<u64, Wanted> {
    const WANTED: Wanted = Wanted("a size is a number, with K, M or G after it or nothing");
    let (digits, shift) = match text.strip_suffix(['K', 'k']) {
        Some(digits) => (digits, 10),
        None => match text.strip_suffix(['M', 'm']) {
            Some(digits) => (digits, 20),
            None => match text.strip_suffix(['G', 'g']) {
                Some(digits) => (digits, 30),
                None => (text, 0),
            },
        },
    };
    let number: u64 = digits.parse().map_err(|_| WANTED)?;
    number.checked_mul(1 << shift).ok_or(WANTED)
}

fn cpu_cap(text: &str) -> Result<CpuCap, Wanted> {
    let mut caps = CpuCap::NONE;
    if text.starts_with('^') {
        caps = CpuCap::ALL;
    }
    for word in text.split(',') {
        let (name, set) = match word.strip_prefix('^') {
            Some(name) => (name, false),
            None => (word, true),
        };
        match name {
            "cpu" => caps.cpu = set,
            "fpu" => caps.fpu = set,
            "ins" => caps.ins = set,
            "all" => caps = if set { CpuCap::ALL } else { CpuCap::NONE },
            "none" => caps = if set { CpuCap::NONE } else { CpuCap::ALL },
            _ => {
                return Err(Wanted("CPU capabilities are cpu, fpu, ins, all, none, comma separated"));
            }
        }
    }
    Ok(caps)
}

fn file_validation(text: &str) -> Result<FileValidation, Wanted> {
    match text {
        "filesize" => Ok(FileValidation::FileSize),
        "buildid" => Ok(FileValidation::BuildId),
        _ => Err(Wanted("the method is filesize or buildid")),
    }
}

/// `kind[id]` or `kind[id]:value`.
fn external(text: &OsStr) -> Result<External, Wanted> {
    const WANTED: Wanted = Wanted("an external resource is written kind[id] or kind[id]:value");
    let bytes = text.as_bytes();
    let open = bytes.iter().position(|&byte| byte == b'[').ok_or(WANTED)?;
    let close = bytes.iter().rposition(|&byte| byte == b']').ok_or(WANTED)?;
    if open == 0 || close < open {
        return Err(WANTED);
    }
    let (key, rest) = bytes.split_at(close + 1);
    match rest {
        [] => Ok(External { key: key.to_vec(), value: None }),
        [b':', value @ ..] => Ok(External { key: key.to_vec(), value: Some(value.to_vec()) }),
        _ => Err(WANTED),
    }
}

/// `fd[N]:key`.
fn inherit_fd(text: &OsStr) -> Result<InheritFd, Wanted> {
    const WANTED: Wanted = Wanted("an inherited descriptor is written fd[N]:key");
    let rest = text.as_bytes().strip_prefix(b"fd[").ok_or(WANTED)?;
    let close = rest.iter().position(|&byte| byte == b']').ok_or(WANTED)?;
    let (number, rest) = rest.split_at(close);
    let fd = std::str::from_utf8(number).ok().and_then(|number| fd(number).ok()).ok_or(WANTED)?;
    match rest.strip_prefix(b"]:") {
        Some(key) if !key.is_empty() => Ok(InheritFd { key: key.to_vec(), fd }),
        _ => Err(WANTED),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::CommandFactory;

    use super::*;
    use crate::cli::known::{self, Standing, Value};

    #[test]
    fn table_and_parser_agree() {
        Opts::command().debug_assert();
        let wanted: BTreeSet<_> = known::all()
            .filter(|known| match known.standing {
                Standing::ToCome(..) | Standing::Moot(_) | Standing::Gone(_) => false,
                Standing::For(commands) | Standing::Only(commands) => !commands.is_empty(),
                Standing::Works(_) => true,
            })
            .flat_map(|known| {
                let takes = known.value != Value::None;
                let negation = known.on_by_default.then(|| (format!("no-{}", known.long), takes));
                std::iter::once((known.canonical().to_owned(), takes)).chain(negation)
            })
            .collect();
        let parsed: BTreeSet<_> = Opts::command()
            .get_arguments()
            .filter_map(|arg| {
                let takes = arg.get_action().takes_values();
                arg.get_long().map(|long| (long.to_owned(), takes))
            })
            .collect();
        assert_eq!(parsed, wanted);
        for arg in Opts::command().get_arguments() {
            let Some(long) = arg.get_long() else { continue };
            let known = known::find_long(long).unwrap().known;
            let short = arg.get_short().map(|letter| u8::try_from(letter).unwrap());
            assert_eq!(known.short, short, "{long}");
        }
    }

    #[test]
    fn sizes() {
        for (text, wanted) in [("0", 0), ("7", 7), ("1K", 1024), ("2m", 2 << 20), ("3G", 3 << 30)] {
            assert_eq!(size(text), Ok(wanted));
        }
        for text in ["", "K", "1KB", "-1", "1.5M", "99999999999G", "0x10"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn cpu_caps() {
        let caps = |cpu, fpu, ins| Ok(CpuCap { cpu, fpu, ins });
        assert_eq!(cpu_cap("cpu"), caps(true, false, false));
        assert_eq!(cpu_cap("cpu,ins"), caps(true, false, true));
        assert_eq!(cpu_cap("all,^fpu"), caps(true, false, true));
        assert_eq!(cpu_cap("^fpu"), caps(true, false, true));
        assert_eq!(cpu_cap("none"), Ok(CpuCap::NONE));
        assert!(cpu_cap("").is_err());
        assert!(cpu_cap("sse").is_err());
    }

    #[test]
    fn resources() {
        let ext = |text: &str| external(OsStr::new(text)).map(|ext| (ext.key, ext.value));
        assert_eq!(ext("tty[8800:1c]"), Ok((b"tty[8800:1c]".to_vec(), None)));
        assert_eq!(ext("mnt[/a]:b"), Ok((b"mnt[/a]".to_vec(), Some(b"b".to_vec()))));
        for text in ["", "x", "[1]", "tty[1", "tty]1[", "tty[1]x"] {
            assert!(ext(text).is_err(), "{text}");
        }
        let fd = |text: &str| inherit_fd(OsStr::new(text)).map(|fd| (fd.fd, fd.key));
        assert_eq!(fd("fd[3]:pipe[77]"), Ok((3, b"pipe[77]".to_vec())));
        for text in ["", "fd[]:x", "fd[-1]:x", "fd[3]", "fd[3]:", "3:x", "fd[3:x", "fd[99999999999]:x"] {
            assert!(fd(text).is_err(), "{text}");
        }
    }
}
