//! Kinds of file that cannot be saved: what they are, why, and what the user can do.
//!
//! What neither a kind nor a row here owns is refused too, by its link text.

use super::FdView;

const CLOSE: &str = "let the program close it before the dump";
const LATER: &str = "sockets are not supported yet; close the connections, or stop the server for the dump";

/// `f_type` of the file system of POSIX message queues (ipc/mqueue.c).
const MQUEUE_MAGIC: i64 = 0x1980_0202;

fn on_file_system(fd: &FdView<'_>, magic: i64) -> bool {
    // Queues are regular files without a place: nothing else needs the look.
    fd.stat.kind() == libc::S_IFREG
        && fd.link.iter().filter(|b| **b == b'/').count() == 1
        && fd
            .file()
            .ok()
            .and_then(|f| nix::sys::statfs::fstatfs(f).ok())
            .is_some_and(|s| s.filesystem_type().0 == magic)
}

/// The object behind shared memory that has no file, opened as one.
fn is_shared_memory(fd: &FdView<'_>) -> bool {
    let names: [&[u8]; 3] = [b"/dev/zero (deleted)", b"/anon_hugepage (deleted)", b"/SYSV"];
    names.iter().any(|name| fd.link.starts_with(name))
        && fd.stat.kind() == libc::S_IFREG
        && super::memfd::kernel_mounts().iter().any(|(dev, _)| *dev == fd.stat.dev)
}

/// How a refused kind is recognised.
#[derive(Debug)]
pub(super) enum Sign {
    /// The link text is `anon_inode:` and this.
    AnonInode(&'static str),
    /// By looking.
    Look(fn(&FdView<'_>) -> bool),
}

/// A kind of file that cannot be saved.
#[derive(Debug)]
pub(super) struct Refusal {
    /// What it is.
    pub(super) name: &'static str,
    /// Recognises it.
    sign: Sign,
    /// Why not.
    pub(super) reason: &'static str,
    /// What the user can do.
    pub(super) hint: &'static str,
}

impl Refusal {
    /// Whether the descriptor is of this kind.
    pub(super) fn owns(&self, fd: &FdView<'_>) -> bool {
        match self.sign {
            Sign::AnonInode(name) => fd.is_anon_inode(name),
            Sign::Look(owns) => owns(fd),
        }
    }
}

/// Asked before all kinds, in order: some look like files with a path.
pub(super) static FIRST: &[Refusal] = &[
    Refusal {
        name: "UNIX socket",
        sign: Sign::Look(|fd| family(fd) == Some(libc::AF_UNIX)),
        reason: "not supported yet",
        hint: LATER,
    },
    Refusal {
        name: "INET socket",
        sign: Sign::Look(|fd| matches!(family(fd), Some(libc::AF_INET | libc::AF_INET6))),
        reason: "not supported yet",
        hint: LATER,
    },
    Refusal {
        name: "netlink socket",
        sign: Sign::Look(|fd| family(fd) == Some(libc::AF_NETLINK)),
        reason: "not supported yet",
        hint: LATER,
    },
    Refusal {
        name: "packet socket",
        sign: Sign::Look(|fd| family(fd) == Some(libc::AF_PACKET)),
        reason: "not supported yet",
        hint: LATER,
    },
    Refusal {
        name: "shared memory",
        sign: Sign::Look(is_shared_memory),
        reason: "a descriptor of anonymous or System V shared memory (through /proc/PID/map_files) cannot be made again",
        hint: CLOSE,
    },
    Refusal {
        name: "POSIX message queue (mqueue)",
        sign: Sign::Look(|fd| on_file_system(fd, MQUEUE_MAGIC)),
        reason: "not supported yet: its messages cannot be read without being taken",
        hint: CLOSE,
    },
    Refusal {
        name: "vsock socket",
        sign: Sign::Look(|fd| family(fd) == Some(libc::AF_VSOCK)),
        reason: "its peer is another virtual machine, which does not know of a restore",
        hint: CLOSE,
    },
    Refusal {
        name: "AF_ALG socket",
        sign: Sign::Look(|fd| family(fd) == Some(libc::AF_ALG)),
        reason: "the kernel does not tell keys and state of its ciphers",
        hint: CLOSE,
    },
    Refusal {
        name: "socket",
        sign: Sign::Look(|fd| fd.stat.kind() == libc::S_IFSOCK && !path_only(fd)),
        reason: "sockets of this family cannot be saved",
        hint: CLOSE,
    },
    anon(
        "io_uring",
        "[io_uring]",
        "its rings and requests in flight cannot be read",
        "use another I/O backend",
    ),
    anon(
        "io_uring",
        "[io_uring_sqpoll]",
        "its rings and requests in flight cannot be read",
        "use another I/O backend",
    ),
    anon("fanotify", "[fanotify]", "its marks and waiting permissions cannot be made again", CLOSE),
    anon(
        "userfaultfd",
        "[userfaultfd]",
        "its registered areas and waiting faults cannot be made again",
        CLOSE,
    ),
    anon(
        "perf event",
        "[perf_event]",
        "counters and their buffers cannot be made again",
        "stop measuring this process",
    ),
    anon("bpf map", "bpf-map", "not supported", CLOSE),
    anon("bpf program", "bpf-prog", "the kernel does not tell its source", CLOSE),
    anon("bpf link", "bpf_link", "the kernel does not tell its source", CLOSE),
    anon("bpf link", "bpf-link", "the kernel does not tell its source", CLOSE),
    anon("bpf token", "bpf-token", "not supported", CLOSE),
    anon("BTF", "btf", "not supported", CLOSE),
    anon("seccomp listener", "seccomp notify", "waiting requests cannot be made again", CLOSE),
    anon("landlock rule set", "[landlock-ruleset]", "the kernel does not tell its rules", CLOSE),
    anon("mount context", "[fscontext]", "a mount that is being configured cannot be saved", CLOSE),
    anon(
        "kvm",
        "kvm-vm",
        "the state of virtual machines cannot be saved",
        "use the virtual machine monitor's own snapshot",
    ),
    Refusal {
        name: "kvm",
        sign: Sign::Look(|fd| fd.link.starts_with(b"anon_inode:kvm-")),
        reason: "the state of virtual machines cannot be saved",
        hint: "use the virtual machine monitor's own snapshot",
    },
    Refusal {
        name: "kvm",
        sign: Sign::Look(|fd| {
            !path_only(fd) && fd.link.starts_with(b"/dev/kvm") && fd.stat.kind() == libc::S_IFCHR
        }),
        reason: "the state of virtual machines cannot be saved",
        hint: "use the virtual machine monitor's own snapshot",
    },
    Refusal {
        name: "dma-buf",
        sign: Sign::Look(|fd| fd.link.starts_with(b"/dmabuf:") || fd.link.starts_with(b"anon_inode:dmabuf")),
        reason: "memory of a device cannot be saved",
        hint: CLOSE,
    },
    Refusal {
        name: "secret memory",
        sign: Sign::Look(|fd| fd.link.starts_with(b"/secretmem")),
        reason: "nobody but the process can read it, by design",
        hint: CLOSE,
    },
    Refusal {
        name: "namespace",
        sign: Sign::Look(is_namespace),
        reason: "descriptors of namespaces are not supported yet",
        hint: CLOSE,
    },
    Refusal {
        name: "other file system",
        sign: Sign::Look(|fd| fd.link.starts_with(b"(unreachable)")),
        reason: "it cannot be reached from our root directory",
        hint: "run crtool where the path is visible",
    },
    Refusal {
        name: "SysV shared memory",
        sign: Sign::Look(|fd| fd.link.starts_with(b"/SYSV")),
        reason: "not supported yet",
        hint: "",
    },
];

/// Asked when no kind owns the descriptor.
pub(super) static LAST: &[Refusal] = &[
    Refusal {
        name: "block device",
        sign: Sign::Look(|fd| fd.stat.kind() == libc::S_IFBLK),
        reason: "who else writes to it is not known",
        hint: CLOSE,
    },
    Refusal {
        name: "tun device",
        sign: Sign::Look(|fd| is_device(fd, 10, 200)),
        reason: "network devices are not supported",
        hint: CLOSE,
    },
    Refusal {
        name: "fuse device",
        sign: Sign::Look(|fd| is_device(fd, 10, 229)),
        reason: "a mounted file system depends on this process",
        hint: "unmount it",
    },
    Refusal {
        name: "character device",
        sign: Sign::Look(|fd| fd.stat.kind() == libc::S_IFCHR),
        reason: "its driver may keep state that cannot be read",
        hint: CLOSE,
    },
    Refusal {
        name: "anonymous inode",
        sign: Sign::Look(|fd| fd.link.starts_with(b"anon_inode:")),
        reason: "a kind of kernel object that is not known here",
        hint: CLOSE,
    },
];

const fn anon(name: &'static str, link: &'static str, reason: &'static str, hint: &'static str) -> Refusal {
    Refusal { name, sign: Sign::AnonInode(link), reason, hint }
}

fn path_only(fd: &FdView<'_>) -> bool {
    fd.flags() & libc::O_PATH.cast_unsigned() != 0
}

fn is_device(fd: &FdView<'_>, major: u32, minor: u32) -> bool {
    fd.stat.kind() == libc::S_IFCHR
        && (libc::major(fd.stat.rdev), libc::minor(fd.stat.rdev)) == (major, minor)
}

/// `net:[4026531840]` and the like.
fn is_namespace(fd: &FdView<'_>) -> bool {
    crate::proc::ns::parse(fd.link).is_ok() && fd.stat.kind() == libc::S_IFREG
}

/// The address family of a socket.
fn family(fd: &FdView<'_>) -> Option<i32> {
    if fd.stat.kind() != libc::S_IFSOCK || path_only(fd) {
        return None;
    }
    crate::sys::fd::socket_domain(fd.file().ok()?).ok()
}
