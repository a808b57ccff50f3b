//! How single fields are shown with `--pretty`: the written table, and both directions.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::OnceLock;

use serde_json::Value;

use super::text;

/// How a field is shown.
#[derive(Debug, Clone, Copy)]
pub(super) enum Show {
    /// `0x1f`; in a message: all numbers in it.
    Hex,
    /// `major:minor` of the kernel's own device number.
    Dev,
    /// `major:minor` of a device number as programs see it.
    OldDev,
    /// `A | B | 0x40`.
    Flags(&'static [(&'static str, u64)]),
    /// A name where the value has one.
    Names(&'static [(&'static str, u64)]),
    /// List of words in network order: one for IPv4, four for IPv6.
    Ip,
}

/// Open flags, from the kernel's `asm-generic/fcntl.h`.
const OPEN_FLAGS: &[(&str, u64)] = &[
    ("O_WRONLY", 0x1),
    ("O_RDWR", 0x2),
    ("O_CREAT", 0x40),
    ("O_EXCL", 0x80),
    ("O_NOCTTY", 0x100),
    ("O_TRUNC", 0x200),
    ("O_APPEND", 0x400),
    ("O_NONBLOCK", 0x800),
    ("O_DSYNC", 0x1000),
    ("FASYNC", 0x2000),
    ("O_DIRECT", 0x4000),
    ("O_LARGEFILE", 0x8000),
    ("O_DIRECTORY", 0x10000),
    ("O_NOFOLLOW", 0x20000),
    ("O_NOATIME", 0x40000),
    ("O_CLOEXEC", 0x80000),
];
const PROT_FLAGS: &[(&str, u64)] = &[("PROT_READ", 0x1), ("PROT_WRITE", 0x2), ("PROT_EXEC", 0x4)];
const MAP_FLAGS: &[(&str, u64)] =
    &[("MAP_SHARED", 0x1), ("MAP_PRIVATE", 0x2), ("MAP_ANON", 0x20), ("MAP_GROWSDOWN", 0x100)];
const VMA_STATUS: &[(&str, u64)] = &[
    ("VMA_AREA_REGULAR", 0x1),
    ("VMA_AREA_STACK", 0x2),
    ("VMA_AREA_VSYSCALL", 0x4),
    ("VMA_AREA_VDSO", 0x8),
    ("VMA_AREA_HEAP", 0x20),
    ("VMA_FILE_PRIVATE", 0x40),
    ("VMA_FILE_SHARED", 0x80),
    ("VMA_ANON_SHARED", 0x100),
    ("VMA_ANON_PRIVATE", 0x200),
    ("VMA_AREA_SYSVIPC", 0x400),
    ("VMA_AREA_SOCKET", 0x800),
    ("VMA_AREA_VVAR", 0x1000),
    ("VMA_AREA_AIORING", 0x2000),
    ("VMA_UNSUPP", 0x8000_0000),
];
const SEALS: &[(&str, u64)] = &[
    ("F_SEAL_SEAL", 0x1),
    ("F_SEAL_SHRINK", 0x2),
    ("F_SEAL_GROW", 0x4),
    ("F_SEAL_WRITE", 0x8),
    ("F_SEAL_FUTURE_WRITE", 0x10),
];
const PAGEMAP_FLAGS: &[(&str, u64)] = &[("PE_PARENT", 0x1), ("PE_LAZY", 0x2), ("PE_PRESENT", 0x4)];
const TASK_STATES: &[(&str, u64)] = &[("Alive", 1), ("Zombie", 3), ("Stopped", 6)];
const SK_FAMILIES: &[(&str, u64)] =
    &[("UNIX", 1), ("INET", 2), ("INET6", 10), ("NETLINK", 16), ("PACKET", 17)];
const SK_TYPES: &[(&str, u64)] = &[("STREAM", 1), ("DGRAM", 2), ("RAW", 3), ("SEQPACKET", 5), ("PACKET", 10)];
const SK_PROTOCOLS: &[(&str, u64)] = &[("IP", 0), ("TCP", 6), ("UDP", 17), ("UDPLITE", 136)];
const SK_STATES: &[(&str, u64)] = &[
    ("ESTABLISHED", 1),
    ("SYN_SENT", 2),
    ("SYN_RECV", 3),
    ("FIN_WAIT1", 4),
    ("FIN_WAIT2", 5),
    ("TIME_WAIT", 6),
    ("CLOSE", 7),
    ("CLOSE_WAIT", 8),
    ("LAST_ACK", 9),
    ("LISTEN", 10),
];

/// The fields shown in a way of their own: message, fields, how.
static FIELDS: &[(&str, &[&str], Show)] = &[
    ("bpfmap_file_entry", &["flags"], Show::Flags(OPEN_FLAGS)),
    ("user_x86_cet_entry", &["cet", "ssp"], Show::Hex),
    ("thread_info_x86", &["clear_tid_addr", "gpregs"], Show::Hex),
    ("task_core_entry", &["task_state"], Show::Names(TASK_STATES)),
    ("task_core_entry", &["blk_sigset", "blk_sigset_extended", "membarrier_registration_mask"], Show::Hex),
    ("irmap_cache_entry", &["dev"], Show::OldDev),
    ("inotify_wd_entry", &["mask", "ignored_mask"], Show::Hex),
    ("inotify_wd_entry", &["s_dev"], Show::Dev),
    ("inotify_file_entry", &["flags"], Show::Hex),
    ("fanotify_mark_entry", &["mflags", "mask", "ignored_mask"], Show::Hex),
    ("fanotify_mark_entry", &["s_dev"], Show::Dev),
    ("fanotify_file_entry", &["flags", "faflags", "evflags"], Show::Hex),
    ("ghost_file_entry", &["dev"], Show::Dev),
    ("ghost_file_entry", &["rdev"], Show::OldDev),
    ("memfd_file_entry", &["flags"], Show::Flags(OPEN_FLAGS)),
    ("memfd_inode_entry", &["seals"], Show::Flags(SEALS)),
    (
        "mm_entry",
        &[
            "mm_start_code",
            "mm_end_code",
            "mm_start_data",
            "mm_end_data",
            "mm_start_stack",
            "mm_start_brk",
            "mm_brk",
            "mm_arg_start",
            "mm_arg_end",
            "mm_env_start",
            "mm_env_end",
        ],
        Show::Hex,
    ),
    ("mnt_entry", &["root_dev"], Show::Dev),
    ("mnt_entry", &["flags", "sb_flags"], Show::Hex),
    ("net_device_entry", &["flags"], Show::Hex),
    ("packet_sock_entry", &["flags"], Show::Hex),
    ("pagemap_entry", &["vaddr"], Show::Hex),
    ("pagemap_entry", &["flags"], Show::Flags(PAGEMAP_FLAGS)),
    ("pipe_entry", &["flags"], Show::Hex),
    ("reg_file_entry", &["flags"], Show::Flags(OPEN_FLAGS)),
    ("sa_entry", &["sigaction", "flags", "restorer", "mask", "mask_extended"], Show::Hex),
    ("signalfd_entry", &["flags", "sigmask"], Show::Hex),
    ("sit_entry", &["local", "remote", "rd_prefix", "relay_prefix"], Show::Ip),
    ("inet_sk_entry", &["family"], Show::Names(SK_FAMILIES)),
    ("inet_sk_entry", &["type"], Show::Names(SK_TYPES)),
    ("inet_sk_entry", &["proto"], Show::Names(SK_PROTOCOLS)),
    ("inet_sk_entry", &["state"], Show::Names(SK_STATES)),
    ("inet_sk_entry", &["flags"], Show::Hex),
    ("inet_sk_entry", &["src_addr", "dst_addr"], Show::Ip),
    ("netlink_sk_entry", &["flags"], Show::Hex),
    ("unix_sk_entry", &["type"], Show::Names(SK_TYPES)),
    ("unix_sk_entry", &["state"], Show::Names(SK_STATES)),
    ("unix_sk_entry", &["flags", "uflags"], Show::Hex),
    ("tcp_stream_entry", &["opt_mask"], Show::Hex),
    ("timerfd_entry", &["flags", "settime_flags"], Show::Hex),
    ("tty_file_entry", &["flags"], Show::Hex),
    ("tun_link_entry", &["flags"], Show::Hex),
    ("vma_entry", &["start", "end", "madv", "fdflags"], Show::Hex),
    ("vma_entry", &["prot"], Show::Flags(PROT_FLAGS)),
    ("vma_entry", &["flags"], Show::Flags(MAP_FLAGS)),
    ("vma_entry", &["status"], Show::Flags(VMA_STATUS)),
];

/// The way of the field called `full_name` (`images.vma_entry.start`), if it has one.
pub(super) fn way(full_name: &str) -> Option<Show> {
    static WAYS: OnceLock<HashMap<String, Show>> = OnceLock::new();
    let ways = WAYS.get_or_init(|| {
        let rows = FIELDS.iter().flat_map(|(message, fields, show)| {
            fields.iter().map(move |field| (format!("images.{message}.{field}"), *show))
        });
        rows.collect()
    });
    ways.get(full_name).copied()
}

impl Show {
    /// An unsigned number as it is shown.
    pub(super) fn number(self, number: u64) -> Value {
        match self {
            Show::Hex => Value::from(format!("{number:#x}")),
            Show::Dev => Value::from(format!("{}:{}", number >> 20, number & 0xf_ffff)),
            Show::OldDev => {
                let (major, minor) = (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xf_ff00);
                Value::from(format!("{major}:{minor}"))
            }
            Show::Flags(names) => Value::from(flags(names, number)),
            Show::Names(names) => match names.iter().find(|(_, value)| *value == number) {
                Some((name, _)) => Value::from(*name),
                None => Value::from(number),
            },
            Show::Ip => Value::from(number),
        }
    }

    /// The number that is shown as `text`.
    pub(super) fn parse(self, text: &str) -> Option<u64> {
        match self {
            Show::Hex | Show::Ip => parse_number(text),
            Show::Dev => {
                let (major, minor) = device(text)?;
                (minor <= 0xf_ffff).then_some(major << 20 | minor)
            }
            Show::OldDev => {
                let (major, minor) = device(text)?;
                (major <= 0xfff && minor <= 0xf_ffff)
                    .then_some(major << 8 | minor & 0xff | (minor & 0xf_ff00) << 12)
            }
            Show::Flags(names) => {
                let mut bits = 0;
                for part in text.split('|').map(str::trim).filter(|part| !part.is_empty()) {
                    bits |= named(names, part)?;
                }
                Some(bits)
            }
            Show::Names(names) => named(names, text.trim()),
        }
    }
}

fn flags(names: &[(&str, u64)], bits: u64) -> String {
    let mut rest = bits;
    let mut parts = Vec::new();
    for (name, bit) in names {
        if bits & bit != 0 {
            parts.push((*name).to_owned());
            rest &= !bit;
        }
    }
    if rest != 0 {
        parts.push(format!("{rest:#x}"));
    }
    parts.join(" | ")
}

fn named(names: &[(&str, u64)], text: &str) -> Option<u64> {
    match names.iter().find(|(name, _)| *name == text) {
        Some((_, value)) => Some(*value),
        None => parse_number(text),
    }
}

/// A number in decimal or, after `0x`, in hexadecimal.
pub(super) fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn device(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    let (major, minor): (u64, u64) = (major.parse().ok()?, minor.parse().ok()?);
    (major <= 0xffff_ffff).then_some((major, minor))
}

/// The address in the words of a list, where there is one.
pub(super) fn address(words: &[u32]) -> Option<String> {
    match words {
        [word] => Some(Ipv4Addr::from(word.to_le_bytes()).to_string()),
        [_, _, _, _] => {
            let mut bytes = [0; 16];
            for (to, from) in bytes.iter_mut().zip(words.iter().flat_map(|word| word.to_le_bytes())) {
                *to = from;
            }
            Some(text::ipv6(Ipv6Addr::from(bytes)))
        }
        _ => None,
    }
}

/// The words of an address.
pub(super) fn address_words(text: &str) -> Option<Vec<u32>> {
    let words = |bytes: &[u8]| {
        let (words, _) = bytes.as_chunks::<4>();
        words.iter().map(|word| u32::from_le_bytes(*word)).collect()
    };
    Some(match text.parse().ok()? {
        IpAddr::V4(address) => words(&address.octets()),
        IpAddr::V6(address) => words(&address.octets()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::descriptors;

    #[test]
    fn the_fields_exist() {
        for (message, fields, _) in FIELDS {
            let descriptor = descriptors::message(message).expect(message);
            for field in *fields {
                assert!(descriptor.get_field_by_name(field).is_some(), "{message}.{field}");
            }
        }
    }

    #[test]
    fn shown_numbers_come_back() {
        let flags = [OPEN_FLAGS, PROT_FLAGS, MAP_FLAGS, VMA_STATUS, SEALS, PAGEMAP_FLAGS];
        let names = [TASK_STATES, SK_FAMILIES, SK_TYPES, SK_PROTOCOLS, SK_STATES];
        let ways = [Show::Hex, Show::Dev, Show::OldDev].into_iter();
        let ways = ways.chain(flags.map(Show::Flags)).chain(names.map(Show::Names));
        for way in ways {
            for number in (0..32).map(|bit| 1u64 << bit).chain(0..300).chain([0xffff_ffff, 0x1234_5678]) {
                let shown = way.number(number);
                let back = shown.as_u64().or_else(|| way.parse(shown.as_str()?));
                assert_eq!(back, Some(number), "{shown} ({way:?})");
            }
        }
        assert_eq!(Show::OldDev.number(0x0502), "5:2");
        assert_eq!(Show::Dev.number(0xfe0_0001), "254:1");
        assert_eq!(Show::Flags(OPEN_FLAGS).number(0x40_2001), "O_WRONLY | FASYNC | 0x400000");
        assert_eq!(Show::Flags(OPEN_FLAGS).parse("O_RDWR|0x4"), Some(6));
        assert_eq!(Show::Flags(OPEN_FLAGS).parse("O_NOPE"), None);
    }

    #[test]
    fn addresses() {
        assert_eq!(address(&[0x0100_007f]).unwrap(), "127.0.0.1");
        assert_eq!(address(&[0, 0, 0xffff_0000, 0x0100_007f]).unwrap(), "::ffff:7f00:1");
        assert_eq!(address_words("::ffff:7f00:1").unwrap(), [0, 0, 0xffff_0000, 0x0100_007f]);
        assert_eq!(address(&[1, 2]), None);
    }
}
