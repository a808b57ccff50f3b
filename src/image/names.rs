//! The written table of image kinds: magic, file name, message, what follows each message.
//!
//! One row per kind of CRIU's format. `%u` in a name stands for a pid, an object id or a
//! namespace id in decimal, `%x` for an id in hexadecimal.

use std::fmt;

/// How an image file begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// No magic and no entries: the bytes are the content.
    Raw,
    /// Only the kind's own magic: the inventory.
    Inventory,
    /// `IMG_COMMON`, then the kind's magic.
    Common,
    /// `IMG_SERVICE`, then the kind's magic.
    Service,
}

/// What lies in the file after the message of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extra {
    /// Nothing: the next entry follows.
    None,
    /// The content of a pipe: `pipe_data_entry.bytes` bytes.
    PipeData,
    /// One packet of a socket queue: `sk_packet_entry.length` bytes.
    SkPacket,
    /// Receive queue, then send queue of a TCP connection.
    TcpStream,
    /// Keys, then values of a BPF map.
    BpfMap,
    /// The content of a deleted file, whole or in chunks.
    GhostFile,
    /// A SysV shared memory segment (older images).
    IpcShm,
    /// The messages of a SysV queue.
    IpcMsg,
    /// The values of a SysV semaphore set.
    IpcSem,
}

/// One row of the table.
#[derive(Debug)]
struct Row {
    kind: ImageKind,
    magic_name: &'static str,
    magic: u32,
    pattern: &'static str,
    head: Option<&'static str>,
    message: Option<&'static str>,
    family: Family,
    extra: Extra,
}

macro_rules! image_kinds {
    ($($kind:ident $name:literal $magic:literal $pattern:literal
       $family:ident [$($message:literal)*] $extra:ident;)*) => {
        /// A kind of image file.
        #[allow(missing_docs)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum ImageKind { $($kind),* }

        static ROWS: &[Row] = &[$(Row {
            kind: ImageKind::$kind,
            magic_name: $name,
            magic: $magic,
            pattern: $pattern,
            head: head(&[$($message),*]),
            message: entry(&[$($message),*]),
            family: Family::$family,
            extra: Extra::$extra,
        }),*];

        impl ImageKind {
            /// Every kind, in the order of the table.
            #[cfg(any(test, feature = "internals"))]
            pub const ALL: &'static [ImageKind] = &[$(ImageKind::$kind),*];
        }
    };
}

/// The first of two messages: the one that opens the image.
const fn head(messages: &[&'static str]) -> Option<&'static str> {
    if messages.len() == 2 { Some(messages[0]) } else { None }
}

/// The last message of the list: the one of all other entries.
const fn entry(messages: &[&'static str]) -> Option<&'static str> {
    match messages {
        [] => None,
        [only] => Some(only),
        [_, rest, ..] => Some(rest),
    }
}

// Where two kinds share a magic, the first one answers `ImageKind::by_magic`.
image_kinds! {
    Inventory "INVENTORY" 0x58313116 "inventory.img" Inventory ["inventory_entry"] None;
    Fdinfo "FDINFO" 0x56213732 "fdinfo-%u.img" Common ["fdinfo_entry"] None;
    Pagemap "PAGEMAP" 0x56084025 "pagemap-%u.img" Common ["pagemap_head" "pagemap_entry"] None;
    ShmemPagemap "SHMEM_PAGEMAP" 0x56084025 "pagemap-shmem-%u.img" Common ["pagemap_head" "pagemap_entry"] None;
    RegFiles "REG_FILES" 0x50363636 "reg-files.img" Common ["reg_file_entry"] None;
    ExtFiles "EXT_FILES" 0x59255641 "ext-files.img" Common ["ext_file_entry"] None;
    NsFiles "NS_FILES" 0x61394011 "ns-files.img" Common ["ns_file_entry"] None;
    EventfdFile "EVENTFD_FILE" 0x44523722 "eventfd.img" Common ["eventfd_file_entry"] None;
    EventpollFile "EVENTPOLL_FILE" 0x45023858 "eventpoll.img" Common ["eventpoll_file_entry"] None;
    EventpollTfd "EVENTPOLL_TFD" 0x44433746 "eventpoll-tfd.img" Common ["eventpoll_tfd_entry"] None;
    Signalfd "SIGNALFD" 0x57323820 "signalfd.img" Common ["signalfd_entry"] None;
    InotifyFile "INOTIFY_FILE" 0x48424431 "inotify.img" Common ["inotify_file_entry"] None;
    InotifyWd "INOTIFY_WD" 0x54562009 "inotify-wd.img" Common ["inotify_wd_entry"] None;
    FanotifyFile "FANOTIFY_FILE" 0x55096122 "fanotify.img" Common ["fanotify_file_entry"] None;
    FanotifyMark "FANOTIFY_MARK" 0x56506035 "fanotify-mark.img" Common ["fanotify_mark_entry"] None;
    Core "CORE" 0x55053847 "core-%u.img" Common ["core_entry"] None;
    Ids "IDS" 0x54432030 "ids-%u.img" Common ["task_kobj_ids_entry"] None;
    Mm "MM" 0x57492820 "mm-%u.img" Common ["mm_entry"] None;
    Vmas "VMAS" 0x54123737 "vmas-%u.img" Common ["vma_entry"] None;
    Pipes "PIPES" 0x56513555 "pipes.img" Common ["pipe_entry"] None;
    PipesData "PIPES_DATA" 0x56453709 "pipes-data.img" Common ["pipe_data_entry"] PipeData;
    Fifo "FIFO" 0x58364939 "fifo.img" Common ["fifo_entry"] None;
    FifoData "FIFO_DATA" 0x59333054 "fifo-data.img" Common ["pipe_data_entry"] PipeData;
    Pstree "PSTREE" 0x50273030 "pstree.img" Common ["pstree_entry"] None;
    Sigact "SIGACT" 0x55344201 "sigacts-%u.img" Common ["sa_entry"] None;
    Unixsk "UNIXSK" 0x54373943 "unixsk.img" Common ["unix_sk_entry"] None;
    Inetsk "INETSK" 0x56443851 "inetsk.img" Common ["inet_sk_entry"] None;
    Packetsk "PACKETSK" 0x60454618 "packetsk.img" Common ["packet_sock_entry"] None;
    NetlinkSk "NETLINK_SK" 0x58005614 "netlinksk.img" Common ["netlink_sk_entry"] None;
    SkQueues "SK_QUEUES" 0x56264026 "sk-queues.img" Common ["sk_packet_entry"] SkPacket;
    Itimers "ITIMERS" 0x57464056 "itimers-%u.img" Common ["itimer_entry"] None;
    PosixTimers "POSIX_TIMERS" 0x52603957 "posix-timers-%u.img" Common ["posix_timer_entry"] None;
    Creds "CREDS" 0x54023547 "creds-%u.img" Common ["creds_entry"] None;
    Utsns "UTSNS" 0x54473203 "utsns-%u.img" Common ["utsns_entry"] None;
    IpcVar "IPC_VAR" 0x53115007 "ipcns-var-%u.img" Common ["ipc_var_entry"] None;
    IpcnsShm "IPCNS_SHM" 0x46283044 "ipcns-shm-%u.img" Common ["ipc_shm_entry"] IpcShm;
    IpcnsMsg "IPCNS_MSG" 0x55453737 "ipcns-msg-%u.img" Common ["ipc_msg_entry"] IpcMsg;
    IpcnsSem "IPCNS_SEM" 0x59573019 "ipcns-sem-%u.img" Common ["ipc_sem_entry"] IpcSem;
    Fs "FS" 0x51403912 "fs-%u.img" Common ["fs_entry"] None;
    RemapFpath "REMAP_FPATH" 0x59133954 "remap-fpath.img" Common ["remap_file_path_entry"] None;
    GhostFile "GHOST_FILE" 0x52583605 "ghost-file-%x.img" Common ["ghost_file_entry"] GhostFile;
    MemfdInode "MEMFD_INODE" 0x48453499 "memfd.img" Common ["memfd_inode_entry"] None;
    TcpStream "TCP_STREAM" 0x51465506 "tcp-stream-%x.img" Common ["tcp_stream_entry"] TcpStream;
    Mnts "MNTS" 0x55563928 "mountpoints-%u.img" Common ["mnt_entry"] None;
    Netdev "NETDEV" 0x57373951 "netdev-%u.img" Common ["net_device_entry"] None;
    Netns "NETNS" 0x55933752 "netns-%u.img" Common ["netns_entry"] None;
    Ifaddr "IFADDR" 0x0 "ifaddr-%u.img" Raw [] None;
    Route "ROUTE" 0x0 "route-%u.img" Raw [] None;
    Route6 "ROUTE6" 0x0 "route6-%u.img" Raw [] None;
    Rule "RULE" 0x0 "rule-%u.img" Raw [] None;
    Iptables "IPTABLES" 0x0 "iptables-%u.img" Raw [] None;
    Ip6tables "IP6TABLES" 0x0 "ip6tables-%u.img" Raw [] None;
    Nftables "NFTABLES" 0x0 "nftables-%u.img" Raw [] None;
    TmpfsImg "TMPFS_IMG" 0x0 "tmpfs-%u.tar.gz.img" Raw [] None;
    TmpfsDev "TMPFS_DEV" 0x0 "tmpfs-dev-%u.tar.gz.img" Raw [] None;
    Autofs "AUTOFS" 0x49353943 "autofs-%u.img" Common ["autofs_entry"] None;
    BinfmtMiscOld "BINFMT_MISC_OLD" 0x67343323 "binfmt-misc-%u.img" Common ["binfmt_misc_entry"] None;
    BinfmtMisc "BINFMT_MISC" 0x67343323 "binfmt-misc.img" Common ["binfmt_misc_entry"] None;
    TtyFiles "TTY_FILES" 0x59433025 "tty.img" Common ["tty_file_entry"] None;
    TtyInfo "TTY_INFO" 0x59453036 "tty-info.img" Common ["tty_info_entry"] None;
    TtyData "TTY_DATA" 0x59413026 "tty-data.img" Common ["tty_data_entry"] None;
    FileLocks "FILE_LOCKS" 0x54323616 "filelocks.img" Common ["file_lock_entry"] None;
    Rlimit "RLIMIT" 0x57113925 "rlimit-%u.img" Common ["rlimit_entry"] None;
    Pages "PAGES" 0x0 "pages-%u.img" Raw [] None;
    ShmPagesOld "SHM_PAGES_OLD" 0x56084025 "pages-shmem-%u.img" Raw [] None;
    Signal "SIGNAL" 0x59255647 "signal-s-%u.img" Common ["siginfo_entry"] None;
    Psignal "PSIGNAL" 0x59255647 "signal-p-%u.img" Common ["siginfo_entry"] None;
    Tunfile "TUNFILE" 0x57143751 "tunfile.img" Common ["tunfile_entry"] None;
    Cgroup "CGROUP" 0x59383330 "cgroup.img" Common ["cgroup_entry"] None;
    Timerfd "TIMERFD" 0x50493712 "timerfd.img" Common ["timerfd_entry"] None;
    Cpuinfo "CPUINFO" 0x61404013 "cpuinfo.img" Common ["cpuinfo_entry"] None;
    Seccomp "SECCOMP" 0x64413049 "seccomp.img" Common ["seccomp_entry"] None;
    Userns "USERNS" 0x55474906 "userns-%u.img" Common ["userns_entry"] None;
    NetnfCt "NETNF_CT" 0x0 "netns-ct-%u.img" Raw [] None;
    NetnfExp "NETNF_EXP" 0x0 "netns-exp-%u.img" Raw [] None;
    Files "FILES" 0x56303138 "files.img" Common ["file_entry"] None;
    Timens "TIMENS" 0x43114433 "timens-%u.img" Common ["timens_entry"] None;
    Pidns "PIDNS" 0x61157326 "pidns-%u.img" Common ["pidns_entry"] None;
    BpfmapFile "BPFMAP_FILE" 0x57506142 "bpfmap-file.img" Common ["bpfmap_file_entry"] None;
    BpfmapData "BPFMAP_DATA" 0x64324033 "bpfmap-data.img" Common ["bpfmap_data_entry"] BpfMap;
    Apparmor "APPARMOR" 0x59423047 "apparmor.img" Common ["apparmor_entry"] None;
    Pidfd "PIDFD" 0x54435556 "pidfd.img" Common ["pidfd_entry"] None;
    StatsDump "STATS" 0x57093306 "stats-dump" Service ["stats_entry"] None;
    StatsRestore "STATS" 0x57093306 "stats-restore" Service ["stats_entry"] None;
    IrmapCache "IRMAP_CACHE" 0x57004059 "irmap-cache" Service ["irmap_cache_entry"] None;
}

impl ImageKind {
    #[allow(clippy::indexing_slicing)] // ROWS has one row per variant, in order (tested below)
    fn row(self) -> &'static Row {
        &ROWS[self as usize]
    }

    /// The kind's name in CRIU's table of magics, as `crit` prints it.
    pub fn magic_name(self) -> &'static str {
        self.row().magic_name
    }

    /// The kind's 32-bit magic, 0 for raw images.
    pub fn magic(self) -> u32 {
        self.row().magic
    }

    /// How the file begins.
    pub fn family(self) -> Family {
        self.row().family
    }

    /// What follows each message.
    pub fn extra(self) -> Extra {
        self.row().extra
    }

    /// Full protobuf name of the first entry's message, where it differs from the others'.
    pub fn head_message(self) -> Option<&'static str> {
        self.row().head
    }

    /// Protobuf name of the entries' message (in package `images`); none for raw images.
    #[cfg(any(test, feature = "internals"))]
    pub fn message(self) -> Option<&'static str> {
        self.row().message
    }

    /// Name of the message of entry number `index`.
    pub fn message_at(self, index: usize) -> Option<&'static str> {
        match self.row().head {
            Some(head) if index == 0 => Some(head),
            _ => self.row().message,
        }
    }

    /// Whether there are many files of this kind, told apart by an id.
    pub fn has_id(self) -> bool {
        self.row().pattern.contains('%')
    }

    /// The file's name. `id` is given exactly for the kinds that have one ([`Self::has_id`]).
    pub fn file_name(self, id: impl Into<Option<u64>>) -> String {
        let id = id.into();
        debug_assert_eq!(id.is_some(), self.has_id(), "id of {self:?}");
        let id = id.unwrap_or_default();
        let pattern = self.row().pattern;
        match pattern.split_once('%') {
            Some((before, after)) => match after.strip_prefix('x') {
                Some(after) => format!("{before}{id:x}{after}"),
                None => format!("{before}{id}{}", after.trim_start_matches('u')),
            },
            None => pattern.to_owned(),
        }
    }

    /// The kind and id of the file called `name` (without directory), if it is an image.
    pub fn by_file_name(name: &str) -> Option<(ImageKind, Option<u64>)> {
        ROWS.iter().find_map(|row| {
            let Some((before, after)) = row.pattern.split_once('%') else {
                return (row.pattern == name).then_some((row.kind, None));
            };
            let (radix, after) = match after.strip_prefix('x') {
                Some(after) => (16, after),
                None => (10, after.strip_prefix('u')?),
            };
            let id = name.strip_prefix(before)?.strip_suffix(after)?;
            if !id.chars().all(|c| c.is_digit(radix)) {
                return None;
            }
            let id = u64::from_str_radix(id, radix).ok()?;
            Some((row.kind, Some(id)))
        })
    }

    /// The first kind with this magic (0 is no magic).
    pub fn by_magic(magic: u32) -> Option<ImageKind> {
        ROWS.iter().find(|row| row.family != Family::Raw && row.magic == magic).map(|row| row.kind)
    }

    /// The first kind with this name in CRIU's table of magics.
    pub fn by_magic_name(name: &str) -> Option<ImageKind> {
        ROWS.iter().find(|row| row.magic_name == name).map(|row| row.kind)
    }
}

impl fmt::Display for ImageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.magic_name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_lie_in_the_order_of_the_variants() {
        for (kind, row) in ImageKind::ALL.iter().zip(ROWS) {
            assert_eq!(*kind, row.kind);
            assert_eq!(kind.row().magic_name, row.magic_name);
        }
    }

    #[test]
    fn names_lead_back_to_their_kind() {
        for kind in ImageKind::ALL {
            let id = kind.has_id().then_some(4711);
            assert_eq!(ImageKind::by_file_name(&kind.file_name(id)), Some((*kind, id)));
        }
        assert_eq!(ImageKind::GhostFile.file_name(0x1f), "ghost-file-1f.img");
        assert_eq!(ImageKind::Core.file_name(12), "core-12.img");
        for other in [
            "core-.img",
            "core-x.img",
            "core-+1.img",
            "core-99999999999999999999.img",
            "descriptors.json",
            "",
        ] {
            assert_eq!(ImageKind::by_file_name(other), None, "{other}");
        }
    }
}
