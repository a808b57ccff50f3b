//! Every option of criu(8), by name: which take a value, which have a `--no-` form, which work here.
//!
//! The table, not the parser, decides what may be abbreviated to what, so that an abbreviation means
//! the same here as it does to CRIU. Callers of CRIU pass the same options to every command, so an option that
//! changes nothing is accepted, with a warning that says so. An option that CRIU has and we have not is a row too:
//! it is refused where ignoring it would change what is saved or restored, and where nothing here depends on it, the
//! warning says why.

use clap::ValueEnum;

/// What the user wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Command {
    /// Save a process tree and, unless told otherwise, kill it
    Dump,
    /// Continue a saved process tree
    Restore,
    /// Say what this machine can do, or what would stop a dump
    Check,
    /// Look into image files: decode, encode, show, info, x
    Image,
    /// Dump and restore a small workload, to see it work
    Demo,
    /// Keep snapshots in memory until they are restored here; see crtool image-cache --help
    ImageCache,
    /// Bring the snapshots of dump --remote to a cache; see crtool image-proxy --help
    ImageProxy,
    /// Let a process tree go on on another host; see crtool migrate --help
    Migrate,
}

impl Command {
    /// All of them.
    pub(crate) const ALL: [Self; 8] = [
        Self::Dump,
        Self::Restore,
        Self::Check,
        Self::Image,
        Self::Demo,
        Self::ImageCache,
        Self::ImageProxy,
        Self::Migrate,
    ];

    /// Does it run until it is told to end?
    pub(crate) fn is_daemon(self) -> bool {
        matches!(self, Self::ImageCache | Self::ImageProxy)
    }

    /// Has it a help of its own?
    pub(crate) fn has_help(self) -> bool {
        self.is_daemon() || self == Self::Migrate
    }

    /// As typed.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Dump => "dump",
            Self::Restore => "restore",
            Self::Check => "check",
            Self::Image => "image",
            Self::Demo => "demo",
            Self::ImageCache => "image-cache",
            Self::ImageProxy => "image-proxy",
            Self::Migrate => "migrate",
        }
    }
}

/// Commands that are known by name and do not work yet.
pub(crate) static COMMANDS_TO_COME: &[&str] =
    &["pre-dump", "page-server", "lazy-pages", "service", "swrk", "dedup", "cpuinfo", "exec", "show"];

/// Does an option take a value?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Value {
    /// Never.
    None,
    /// Always, attached or as the next word.
    Required,
    /// Only if attached: `--name=value`, `-nvalue`.
    Optional,
}

/// What we do about an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Another name of the option given here (CRIU has synonyms), which says for which commands.
    Works(&'static str),
    /// It changes something for these commands, and nothing for the others.
    For(&'static [Command]),
    /// It decides what is run in the end: with a command other than these it is refused.
    Only(&'static [Command]),
    /// CRIU has it and we do not yet: refused for these commands, because without it they would do something else
    /// than what was asked for. Nothing depends on it for the others.
    ToCome(&'static [Command], &'static str),
    /// CRIU has it, and nothing here depends on it: why.
    Moot(&'static str),
    /// CRIU refuses or deprecates it in favour of something else.
    Gone(&'static str),
}

/// One option.
#[derive(Debug)]
pub(crate) struct Known {
    /// Without dashes.
    pub(crate) long: &'static str,
    /// Its letter.
    pub(crate) short: Option<u8>,
    /// Takes a value?
    pub(crate) value: Value,
    /// Is there `--no-LONG`?
    pub(crate) negatable: bool,
    /// Is it on unless `--no-LONG` says otherwise?
    pub(crate) on_by_default: bool,
    /// What we do about it.
    pub(crate) standing: Standing,
}

use Command::{Check, Dump, ImageCache, ImageProxy, Migrate, Restore};
use Standing::{For, Gone, Moot, Only, ToCome, Works};

/// A switch with a `--no-` form.
const fn switch(long: &'static str, standing: Standing) -> Known {
    Known { long, short: None, value: Value::None, negatable: true, on_by_default: false, standing }
}

/// A switch without one.
const fn plain(long: &'static str, standing: Standing) -> Known {
    Known { long, short: None, value: Value::None, negatable: false, on_by_default: false, standing }
}

/// An option with a value.
const fn value(long: &'static str, standing: Standing) -> Known {
    Known { long, short: None, value: Value::Required, negatable: false, on_by_default: false, standing }
}

/// An option whose value may be left out.
const fn optional(long: &'static str, standing: Standing) -> Known {
    Known { long, short: None, value: Value::Optional, negatable: false, on_by_default: false, standing }
}

impl Known {
    const fn or(mut self, short: u8) -> Self {
        self.short = Some(short);
        self
    }

    const fn on_by_default(mut self) -> Self {
        self.on_by_default = true;
        self
    }

    /// The name under which the parser knows it.
    pub(crate) fn canonical(&self) -> &'static str {
        match self.standing {
            Works(name) => name,
            _ => self.long,
        }
    }
}

const ALL: Standing = For(&Command::ALL);
const BOTH: Standing = For(&[Dump, Restore, Migrate]);
/// `check -t` judges a tree by the options with which it would be dumped.
const TREE: Standing = For(&[Dump, Restore, Check, Migrate]);
/// What runs until it ends, and what tells that it is ready.
const RUNS: Standing = For(&[Dump, Restore, ImageCache, ImageProxy]);
/// What says how a tree is collected.
const COLLECTED: Standing = For(&[Dump, Check, Migrate]);
/// What `check` looks at.
const CHECK: Standing = For(&[Check]);

const NO_SOCKETS: Standing = Moot("sockets are not saved yet, and a tree that has some is refused");
const NO_NETNS: Standing =
    Moot("network namespaces are not saved yet, and a tree in another one than crtool's is refused");
const NO_MNTNS: Standing =
    Moot("mount namespaces are not saved yet, and a tree in another one than crtool's is refused");
const NO_CGROUPS: Standing = Moot("control groups are left alone");
const WHOLE: Standing = Moot("every dump is a whole one");

/// Who speaks to another host.
const NET: Standing = For(&[Dump, ImageCache, ImageProxy, Migrate]);

/// In CRIU's order.
pub(crate) static OPTIONS: &[Known] = &[
    value("tree", COLLECTED).or(b't'),
    plain("leave-stopped", For(&[Dump, Restore])).or(b's'),
    plain("leave-running", For(&[Dump])).or(b'R'),
    switch("restore-detached", For(&[Restore, ImageCache, ImageProxy])).or(b'd'),
    switch("restore-sibling", For(&[Restore])).or(b'S'),
    switch("daemon", Works("restore-detached")),
    value("images-dir", For(&[Dump, Restore, Migrate, ImageCache])).or(b'D'),
    value("work-dir", ALL).or(b'W'),
    value("log-file", ALL).or(b'o'),
    value("join-ns", ToCome(&[Restore], "the tree would be restored into crtool's own namespace")).or(b'J'),
    value("root", NO_MNTNS).or(b'r'),
    optional("ext-unix-sk", NO_SOCKETS).or(b'x'),
    plain("help", ALL).or(b'h'),
    switch("tcp-established", NO_SOCKETS),
    value("close", ALL),
    switch("log-pid", ALL),
    plain("version", ALL).or(b'V'),
    switch("evasive-devices", TREE),
    value("pidfile", RUNS),
    value("veth-pair", NO_NETNS),
    value("action-script", BOTH),
    switch("link-remap", TREE),
    switch("shell-job", TREE).or(b'j'),
    switch("file-locks", TREE).or(b'l'),
    switch("page-server", ToCome(&[Dump], "the pages would stay in the images directory")),
    value("address", NET),
    value("port", NET),
    value("prev-images-dir", WHOLE),
    plain("ms", Gone("see --extra, --experimental and --all of crtool check")),
    switch("track-mem", WHOLE),
    switch("auto-dedup", Moot("the pages stay in the images that have them")),
    value("libdir", Moot("there are no plugins, and a tree that has devices of theirs is refused")).or(b'L'),
    optional("cpu-cap", BOTH),
    switch("force-irmap", COLLECTED),
    value("ext-mount-map", NO_MNTNS).or(b'M'),
    plain("exec-cmd", Only(&[Restore])),
    optional("manage-cgroups", BOTH),
    value("cgroup-root", NO_CGROUPS),
    value("inherit-fd", For(&[Restore])),
    value("feature", CHECK),
    value("skip-mnt", NO_MNTNS),
    value("enable-fs", NO_MNTNS),
    switch("enable-external-sharing", NO_MNTNS),
    switch("enable-external-masters", NO_MNTNS),
    value("freeze-cgroup", Moot("each task of the tree is stopped by itself")),
    value("ghost-limit", COLLECTED),
    value("irmap-scan-path", COLLECTED),
    value("lsm-profile", ToCome(&[Restore], "the tree would run without that profile")),
    value("timeout", For(&[Dump, Restore, Check, ImageCache, ImageProxy, Migrate])),
    value("external", TREE),
    value("empty-ns", NO_NETNS),
    plain(
        "lazy-pages",
        ToCome(&[Dump], "nobody would ask for pages, and all of them would be in the images"),
    ),
    switch("extra", CHECK),
    switch("experimental", CHECK),
    plain("all", CHECK),
    value("cgroup-props", NO_CGROUPS),
    value("cgroup-props-file", NO_CGROUPS),
    value("cgroup-dump-controller", NO_CGROUPS),
    switch("skip-in-flight", NO_SOCKETS),
    switch("deprecated", ALL),
    switch("display-stats", BOTH),
    switch("weak-sysctls", Moot("settings of namespaces are not saved yet")),
    value("status-fd", RUNS),
    switch("tcp-close", NO_SOCKETS),
    optional("verbosity", ALL).or(b'v'),
    value("ps-socket", NET),
    switch("stream", ToCome(&[Dump, Restore], "the images would not go through the streamer")),
    value("config", ALL),
    plain("no-default-config", ALL),
    value("tls-cacert", NET),
    value("tls-cacrl", NET),
    value("tls-cert", NET),
    value("tls-key", NET),
    switch("tls", NET),
    plain("tls-no-cn-verify", NET),
    value("cgroup-yard", NO_CGROUPS),
    value("pre-dump-mode", For(&[])),
    value("file-validation", BOTH),
    switch("skip-file-rwx-check", For(&[Restore])),
    value("lsm-mount-context", NO_MNTNS),
    value("network-lock", NO_SOCKETS),
    switch("mntns-compat-mode", NO_MNTNS),
    switch("unprivileged", Moot("what is not permitted is refused by name")),
    switch("allow-uprobes", Moot("a tree that has such an area is refused")),
    switch("ghost-fiemap", COLLECTED).on_by_default(),
];

/// What CRIU has not. They come after its own, so that an abbreviation means what it means there.
pub(crate) static OWN_OPTIONS: &[Known] = &[
    switch("remote", For(&[Dump, Restore])),
    value("to", For(&[Migrate])),
    value("max-pause", For(&[Migrate])),
    plain("json", For(&[Migrate])),
    plain("restore", For(&[ImageCache])),
    value("compress", NET),
    optional("wait-restored", For(&[Dump])),
    switch("free-as-read", For(&[Restore])),
    value("max-memory", For(&[ImageCache])),
    value("max-per-source", For(&[ImageCache])),
    value("tls-allow", NET),
    value("spill", For(&[ImageCache])),
    value("at-once", For(&[ImageCache])),
    plain("force", For(&[ImageCache])),
    value("snapshot-id", For(&[Restore])),
    plain("drop", For(&[ImageCache])),
    switch("allow-symlinks", For(&[Restore])),
    switch("host-clocks", For(&[Restore])),
    switch("owner-check", ALL).on_by_default(),
    switch("sync", For(&[Dump])).on_by_default(),
];

/// Every option there is.
pub(crate) fn all() -> impl Iterator<Item = &'static Known> {
    OPTIONS.iter().chain(OWN_OPTIONS)
}

/// An option found by name, and whether it was negated.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Found {
    /// The row.
    pub(crate) known: &'static Known,
    /// `--no-` before it.
    pub(crate) negated: bool,
}

/// Why a name is no option.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotFound {
    /// No option begins like this.
    Unknown,
    /// Several do.
    Ambiguous(Vec<String>),
}

/// Finds a long option by its name or an unambiguous beginning of it.
pub(crate) fn find_long(name: &str) -> Result<Found, NotFound> {
    if let Some(known) = OWN_OPTIONS.iter().find(|known| known.long == name) {
        return Ok(Found { known, negated: false });
    }
    match find_in(OPTIONS, name) {
        Err(NotFound::Unknown) => find_in(OWN_OPTIONS, name),
        other => other,
    }
}

fn find_in(options: &'static [Known], name: &str) -> Result<Found, NotFound> {
    let mut near: Vec<(String, Found)> = Vec::new();
    for known in options {
        let negations: &[bool] = if known.negatable { &[false, true] } else { &[false] };
        for &negated in negations {
            let full = if negated { format!("no-{}", known.long) } else { known.long.to_owned() };
            let found = Found { known, negated };
            if full == name {
                return Ok(found);
            }
            if !name.is_empty() && full.starts_with(name) {
                near.push((full, found));
            }
        }
    }
    match near.as_slice() {
        [] => Err(NotFound::Unknown),
        [(_, first), rest @ ..] => {
            // Synonyms do not make a name ambiguous.
            let same = |other: &Found| {
                other.known.canonical() == first.known.canonical()
                    && other.negated == first.negated
                    && other.known.value == first.known.value
            };
            if rest.iter().all(|(_, other)| same(other)) {
                Ok(*first)
            } else {
                Err(NotFound::Ambiguous(near.into_iter().map(|(name, _)| name).collect()))
            }
        }
    }
}

/// The name that a word may have been meant to be, if it is near enough to just one.
pub(crate) fn nearest<'n>(word: &str, names: impl Iterator<Item = &'n str>) -> Option<String> {
    let far = |name: &str| distance(word.as_bytes(), name.as_bytes());
    let mut near: Vec<(usize, &str)> = names.map(|name| (far(name), name)).collect();
    near.sort_unstable();
    let most = if word.len() < 5 { 1 } else { 2 };
    match near.as_slice() {
        [(first, name), rest @ ..] if *first <= most && rest.first().is_none_or(|(next, _)| next > first) => {
            Some((*name).to_owned())
        }
        _ => None,
    }
}

/// How many letters have to be changed, put in, left out or swapped with the next.
fn distance(one: &[u8], other: &[u8]) -> usize {
    // A word this long is no slip of the finger.
    if one.len().abs_diff(other.len()) > 2 {
        return usize::MAX;
    }
    let mut before: Vec<usize> = Vec::new();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (i, a) in one.iter().enumerate() {
        let mut next = vec![i + 1];
        for (j, b) in other.iter().enumerate() {
            let at = |row: &[usize], j: usize| row.get(j).copied().unwrap_or(usize::MAX / 2);
            let changed = at(&row, j) + usize::from(a != b);
            let mut least = changed.min(at(&row, j + 1) + 1).min(at(&next, j) + 1);
            let swapped = i > 0 && j > 0 && one.get(i - 1) == Some(b) && other.get(j - 1) == Some(a);
            if swapped {
                least = least.min(at(&before, j - 1) + 1);
            }
            next.push(least);
        }
        before = std::mem::replace(&mut row, next);
    }
    row.last().copied().unwrap_or(usize::MAX)
}

/// Finds an option by its letter.
pub(crate) fn find_short(letter: u8) -> Option<&'static Known> {
    OPTIONS.iter().find(|known| known.short == Some(letter))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> String {
        match find_long(text) {
            Ok(found) if found.negated => format!("no-{}", found.known.long),
            Ok(found) => found.known.long.to_owned(),
            Err(NotFound::Unknown) => "unknown".to_owned(),
            Err(NotFound::Ambiguous(names)) => names.join("|"),
        }
    }

    #[test]
    fn abbreviations() {
        assert_eq!(name("tree"), "tree");
        assert_eq!(name("tr"), "tree|track-mem");
        assert_eq!(name("sh"), "shell-job");
        assert_eq!(name("tls"), "tls");
        assert_eq!(name("tls-n"), "tls-no-cn-verify");
        assert_eq!(name("no-sh"), "no-shell-job");
        assert_eq!(name("al"), "all|allow-uprobes");
        assert_eq!(name("no-d"), "no-daemon|no-deprecated|no-display-stats|no-default-config");
        assert_eq!(name("no-default"), "no-default-config");
        assert_eq!(name("ver"), "version|verbosity");
        assert_eq!(name("no-leave-running"), "unknown");
        assert_eq!(name("bogus"), "unknown");
        assert_eq!(name("remo"), "remote");
        assert_eq!(name("no-remote"), "no-remote");
        assert_eq!(name("force"), "force");
        assert_eq!(name("forc"), "force-irmap");
        assert_eq!(name("fre"), "freeze-cgroup");
        assert_eq!(name("free-"), "free-as-read");
        assert_eq!(name(""), "unknown");
    }

    #[test]
    fn slips() {
        let commands = || Command::ALL.into_iter().map(Command::name);
        for (word, wanted) in [
            ("dmup", Some("dump")),
            ("restor", Some("restore")),
            ("chekc", Some("check")),
            ("image-cahce", Some("image-cache")),
            ("dmp", Some("dump")),
            ("d", None),
            ("", None),
            ("frobnicate", None),
        ] {
            assert_eq!(nearest(word, commands()).as_deref(), wanted, "{word}");
        }
        assert_eq!(distance(b"abc", b"abc"), 0);
        assert_eq!(distance(b"abc", b"acb"), 1);
        assert_eq!(distance(b"", b"ab"), 2);
    }

    #[test]
    fn letters() {
        for (letter, long) in
            [(b't', "tree"), (b'D', "images-dir"), (b'v', "verbosity"), (b'x', "ext-unix-sk")]
        {
            assert_eq!(find_short(letter).map(|known| known.long), Some(long));
        }
        assert!(find_short(b'q').is_none());
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = all().map(|known| known.long).collect();
        let mut letters: Vec<_> = all().filter_map(|known| known.short).collect();
        names.sort_unstable();
        letters.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
        assert!(letters.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
