//! Settings of live migration: which of its options go together, what is meant where nothing is said.

use std::{
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    argv::Origin,
    opts::{Compress, Opts},
    settings::{Task, Typed, UsageError},
};
use crate::{
    remote::{self, journal, name::check_snapshot},
    settings::{
        CacheRequest, CacheSettings, DEFAULT_REMOTE_TIMEOUT, DEFAULT_WAIT_SNAPSHOT, DaemonSettings,
        MigrateRequest, NetSettings, ProxySettings, RemoteSettings, StartedRestores, TlsSettings,
    },
};

/// Where CRIU has its certificates.
const CACERT: &str = "/etc/pki/CA/cacert.pem";
const CACRL: &str = "/etc/pki/CA/cacrl.pem";
const CERT: &str = "/etc/pki/criu/cert.pem";
const KEY: &str = "/etc/pki/criu/private/key.pem";

/// For ever, as far as clocks can count.
const NO_LIMIT: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// What says how TLS is done.
const TLS_DETAILS: [&str; 6] =
    ["tls-cacert", "tls-cacrl", "tls-cert", "tls-key", "tls-no-cn-verify", "tls-allow"];
/// What says how the cache is reached, beside --address and --ps-socket.
const CONNECTION: [&str; 8] =
    ["port", "tls", "tls-cacert", "tls-cacrl", "tls-cert", "tls-key", "tls-no-cn-verify", "tls-allow"];

/// Of a dump: into a cache, if that is wanted.
pub(super) fn dump(
    opts: &Opts,
    typed: Typed<'_>,
    work_dir: &Path,
) -> Result<Option<RemoteSettings>, UsageError> {
    if !opts.remote {
        typed.needless(&["address", "ps-socket", "compress", "wait-restored"], "--remote")?;
        typed.needless(&CONNECTION, "--remote")?;
        return Ok(None);
    }
    let direct = opts.address.is_some() || opts.ps_socket.is_some();
    if !direct {
        let with = "--address or --ps-socket; without them the dump goes through image-proxy, which takes this option";
        typed.needless(&CONNECTION, with)?;
        typed.needless(&["compress"], with)?;
    }
    let mut settings = both(opts, work_dir)?;
    settings.direct = if direct { Some(net(opts, typed, "dump --remote")?) } else { None };
    settings.wait_restored = opts.wait_restored.map(limit);
    Ok(Some(settings))
}

/// Of a migration: to which host.
pub(super) fn migrate(opts: &Opts, typed: Typed<'_>, work_dir: &Path) -> Result<RemoteSettings, UsageError> {
    for name in ["address", "port"] {
        if typed.first(&[name]).is_some() {
            return Err(UsageError::Other(format!("option --{name}: migrate has --to HOST[:PORT]")));
        }
    }
    let direct = opts.to.is_some() || opts.ps_socket.is_some();
    if !direct {
        let with =
            "--to or --ps-socket; without them the tree goes through image-proxy, which takes this option";
        typed.needless(&CONNECTION, with)?;
        typed.needless(&["compress"], with)?;
    }
    let mut settings = both(opts, work_dir)?;
    if let (Some(pid), None) = (opts.tree, &opts.images_dir) {
        // Several may be on their way at once.
        settings.snapshot = format!("{}-{pid}", crate::remote::host().replace(char::is_control, ""));
    }
    if direct {
        let mut net = net(opts, typed, "migrate")?;
        if let Some(to) = &opts.to {
            let (address, port) = host_and_port(to).ok_or_else(|| {
                let (name, value) = ("to".to_owned(), to.clone());
                let wanted =
                    "where to go is HOST or HOST:PORT, an IPv6 address with a port [ADDRESS]:PORT".to_owned();
                UsageError::Value { origin: Origin::Words, name, value, wanted }
            })?;
            net.address = Some(address);
            net.port = port.unwrap_or(remote::DEFAULT_PORT);
        }
        settings.direct = Some(net);
    }
    Ok(settings)
}

/// `HOST`, `HOST:PORT`, `[ADDRESS]:PORT`; an IPv6 address without a port needs no brackets.
fn host_and_port(to: &str) -> Option<(String, Option<u16>)> {
    let port = |text: &str| text.parse().ok().filter(|port| *port != 0);
    if let Some(rest) = to.strip_prefix('[') {
        let (address, rest) = rest.split_once(']')?;
        let port = if rest.is_empty() { None } else { Some(port(rest.strip_prefix(':')?)?) };
        return (!address.is_empty()).then(|| (address.to_owned(), port));
    }
    match to.split_once(':') {
        Some((host, rest)) if !rest.contains(':') => {
            let port = port(rest)?;
            (!host.is_empty()).then(|| (host.to_owned(), Some(port)))
        }
        _ => (!to.is_empty()).then(|| (to.to_owned(), None)),
    }
}

/// What an operator asks about migrations.
pub(super) fn migrate_request(opts: &Opts) -> Result<Option<MigrateRequest>, UsageError> {
    let [word, rest @ ..] = opts.words.as_slice() else { return Ok(None) };
    let known = ["list", "settle", "thaw", "kill"];
    let Some(what) = known.into_iter().find(|known| word == known) else {
        return Err(surplus(word, "migrate list, settle, thaw and kill"));
    };
    let id = |word: &OsString| {
        word.to_str().and_then(journal::parse_id).ok_or_else(|| {
            UsageError::Other(format!("{what}: {word:?} is no id of a migration; migrate list shows them"))
        })
    };
    Ok(Some(match (what, rest) {
        ("list", []) => MigrateRequest::List,
        ("settle", []) => MigrateRequest::Settle(None),
        ("settle", [word]) => MigrateRequest::Settle(Some(id(word)?)),
        ("thaw", [word]) => MigrateRequest::Thaw(id(word)?),
        ("kill", [word]) => MigrateRequest::Kill(id(word)?),
        ("thaw" | "kill", []) => {
            return Err(UsageError::Needs(
                "migrate thaw or kill",
                "the id of a migration; migrate list shows them",
            ));
        }
        (_, [.., surplus]) => return Err(UsageError::Surplus { word: surplus.clone(), near: None }),
        _ => return Ok(None),
    }))
}

/// Of a restore: from the cache of this host, if that is wanted.
pub(super) fn restore(
    opts: &Opts,
    typed: Typed<'_>,
    work_dir: &Path,
) -> Result<Option<RemoteSettings>, UsageError> {
    if !opts.remote {
        typed.needless(&["free-as-read", "snapshot-id"], "--remote")?;
        return Ok(None);
    }
    let mut settings = both(opts, work_dir)?;
    settings.wait_snapshot = opts.timeout.map_or(DEFAULT_WAIT_SNAPSHOT, limit);
    settings.free_as_read = opts.free_as_read;
    Ok(Some(settings))
}

fn both(opts: &Opts, work_dir: &Path) -> Result<RemoteSettings, UsageError> {
    let snapshot = match &opts.images_dir {
        Some(name) => snapshot("-D", name.as_os_str())?,
        None => remote::DEFAULT_SNAPSHOT.to_owned(),
    };
    Ok(RemoteSettings {
        snapshot,
        direct: None,
        work_dir: work_dir.to_owned(),
        compress: opts.compress == Some(Compress::Lz4),
        timeout: patience(opts),
        snapshot_id: opts.snapshot_id.unwrap_or(0),
        wait_snapshot: DEFAULT_WAIT_SNAPSHOT,
        wait_restored: None,
        free_as_read: false,
    })
}

/// Seconds to wait; 0 is no limit.
fn limit(seconds: u32) -> Duration {
    if seconds == 0 { NO_LIMIT } else { Duration::from_secs(u64::from(seconds)) }
}

/// Longest silence. There is no way to have none: nothing would ever notice that the other side is gone.
fn patience(opts: &Opts) -> Duration {
    match opts.timeout {
        None | Some(0) => DEFAULT_REMOTE_TIMEOUT,
        Some(seconds) => Duration::from_secs(u64::from(seconds)),
    }
}

fn snapshot(option: &'static str, name: &OsStr) -> Result<String, UsageError> {
    let Some(name) = name.to_str() else {
        return Err(UsageError::Other(format!("{option}: the name of a snapshot is text in UTF-8")));
    };
    check_snapshot(name).map_err(|failure| UsageError::Other(format!("{option}: {failure}")))?;
    Ok(name.to_owned())
}

fn net(opts: &Opts, typed: Typed<'_>, command: &'static str) -> Result<NetSettings, UsageError> {
    if let (Some(_), Some(name)) = (opts.ps_socket, typed.first(&["port"])) {
        return Err(UsageError::NotWith(name, "ps-socket"));
    }
    if !opts.tls {
        typed.needless(&TLS_DETAILS, "--tls")?;
    }
    if opts.address.as_deref() == Some("") {
        return Err(UsageError::Needs(command, "a host after --address"));
    }
    let is_cache = command == "image-cache";
    // With a connection that is there already the address is only a name to look for in the certificate.
    let is_name = opts.tls && !is_cache;
    if opts.ps_socket.is_some() && !is_name && typed.first(&["address"]).is_some() {
        return Err(UsageError::NotWith("address", "ps-socket"));
    }
    if opts.ps_socket.is_some() && is_name && !opts.tls_no_cn_verify && opts.address.is_none() {
        let what =
            "--address (the name in the certificate of the cache) or --tls-no-cn-verify, with --ps-socket";
        return Err(UsageError::Needs(command, what));
    }
    let port = opts.port.unwrap_or(remote::DEFAULT_PORT);
    if port == 0 && !is_cache {
        let (name, value, wanted) =
            ("port".to_owned(), "0".to_owned(), "nobody listens at port 0".to_owned());
        return Err(UsageError::Value { origin: Origin::Words, name, value, wanted });
    }
    let file = |given: &Option<PathBuf>, default: &str| given.clone().unwrap_or_else(|| default.into());
    let tls = opts.tls.then(|| TlsSettings {
        cacert: file(&opts.tls_cacert, CACERT),
        cacrl: opts.tls_cacrl.clone().or_else(|| Path::new(CACRL).exists().then(|| CACRL.into())),
        cert: file(&opts.tls_cert, CERT),
        key: file(&opts.tls_key, KEY),
        no_cn_verify: opts.tls_no_cn_verify,
        allow: opts.tls_allow.clone(),
    });
    Ok(NetSettings {
        address: opts.address.clone(),
        port,
        ps_socket: opts.ps_socket,
        tls,
        timeout: patience(opts),
    })
}

fn daemon(opts: &Opts) -> DaemonSettings {
    DaemonSettings {
        detach: opts.restore_detached,
        pidfile: opts.pidfile.clone(),
        status_fd: opts.status_fd,
        owner_check: opts.owner_check(),
    }
}

/// `crtool image-cache`, or a question to one.
pub(super) fn cache(opts: Opts, typed: Typed<'_>, work_dir: PathBuf) -> Result<Task, UsageError> {
    if !opts.restore
        && let Some(request) = request(&opts)?
    {
        let own =
            ["address", "ps-socket", "max-memory", "max-per-source", "at-once", "spill", "restore-detached"];
        typed.needless(&own, "image-cache itself")?;
        typed.needless(&CONNECTION, "image-cache itself")?;
        return Ok(Task::AskCache(request, work_dir));
    }
    typed.needless(&["force"], "image-cache drop")?;
    typed.needless(&["drop"], "image-cache save")?;
    typed.needless(&["images-dir"], "image-cache save and load")?;
    typed.needless(&["compress"], "image-proxy and dump --remote --address")?;
    if opts.max_memory == Some(0) || opts.max_per_source == Some(0) {
        return Err(UsageError::Needs(
            "image-cache",
            "more than 0 bytes with --max-memory and --max-per-source",
        ));
    }
    let net = net(&opts, typed, "image-cache")?;
    let daemon = daemon(&opts);
    let (max_memory, max_per_source) = (opts.max_memory, opts.max_per_source);
    let restore = opts.restore.then(|| restores(opts.words, &work_dir)).transpose()?;
    let spill = opts.spill.clone();
    let at_once = usize::try_from(opts.at_once.unwrap_or(1)).unwrap_or(usize::MAX);
    let settings =
        CacheSettings { net, work_dir, max_memory, max_per_source, spill, restore, at_once, daemon };
    Ok(Task::Cache(Box::new(settings)))
}

/// What the options of the restores mean that a cache starts. One that is wrong is known before the first tree comes.
fn restores(words: Vec<OsString>, work_dir: &Path) -> Result<StartedRestores, UsageError> {
    let first = ["restore", "--remote", "-d", "-W"].map(OsString::from);
    let line = first.into_iter().chain([work_dir.into()]).chain(words.iter().cloned()).collect();
    let plan = super::settings::plan(line).map_err(|error| UsageError::OfRestores(Box::new(error)))?;
    match plan.task {
        Task::Restore(settings, _) => Ok(StartedRestores { words, settings: *settings }),
        _ => Err(UsageError::Needs("image-cache --restore", "options of a restore after `--`")),
    }
}

fn request(opts: &Opts) -> Result<Option<CacheRequest>, UsageError> {
    let [word, rest @ ..] = opts.words.as_slice() else { return Ok(None) };
    let known = ["list", "status", "drop", "release", "save", "load"];
    let Some(what) = known.into_iter().find(|known| word == known) else {
        return Err(surplus(word, "image-cache list, status, drop, release, save and load"));
    };
    let named = !matches!(what, "list" | "status");
    let name = match rest {
        [] if !named => String::new(),
        [name] if named => snapshot(what, name)?,
        [] => {
            let command = match what {
                "drop" => "image-cache drop",
                "save" => "image-cache save",
                "load" => "image-cache load",
                _ => "image-cache release",
            };
            return Err(UsageError::Needs(command, "the name of a snapshot"));
        }
        [_, second, ..] if named => return Err(UsageError::Surplus { word: second.clone(), near: None }),
        [first, ..] => return Err(UsageError::Surplus { word: first.clone(), near: None }),
    };
    if opts.force && what != "drop" {
        return Err(UsageError::OnlyWith("force", "image-cache drop"));
    }
    let check = opts.owner_check();
    let copies = matches!(what, "save" | "load");
    let dir = match &opts.images_dir {
        Some(_) if !copies => return Err(UsageError::OnlyWith("images-dir", "image-cache save and load")),
        None if what == "save" => {
            return Err(UsageError::Needs("image-cache save", "-D DIR, where the images are to be"));
        }
        None if what == "load" => {
            return Err(UsageError::Needs("image-cache load", "-D DIR, where the images are"));
        }
        dir => dir.clone().unwrap_or_default(),
    };
    if opts.drop && what != "save" {
        return Err(UsageError::OnlyWith("drop", "image-cache save"));
    }
    Ok(Some(match what {
        "save" => CacheRequest::Save { name, dir, drop: opts.drop, check },
        "load" => CacheRequest::Load { name, dir, check },
        "list" => CacheRequest::List,
        "status" => CacheRequest::Status,
        "drop" => CacheRequest::Drop { name, force: opts.force },
        _ => CacheRequest::Release { name },
    }))
}

fn surplus(word: &OsString, known: &str) -> UsageError {
    UsageError::Other(format!("unexpected word {word:?}; there are {known}"))
}

/// `crtool image-proxy`, or a question to one.
pub(super) fn proxy(opts: Opts, typed: Typed<'_>, work_dir: PathBuf) -> Result<Task, UsageError> {
    match opts.words.as_slice() {
        [] => {}
        [word] if word == "status" => {
            typed
                .needless(&["address", "ps-socket", "compress", "restore-detached"], "image-proxy itself")?;
            typed.needless(&CONNECTION, "image-proxy itself")?;
            return Ok(Task::ProxyStatus(work_dir));
        }
        [word, second, ..] if word == "status" => {
            return Err(UsageError::Surplus { word: second.clone(), near: None });
        }
        [word, ..] => return Err(surplus(word, "image-proxy and image-proxy status")),
    }
    let net = net(&opts, typed, "image-proxy")?;
    let compress = opts.compress == Some(Compress::Lz4);
    let daemon = daemon(&opts);
    Ok(Task::Proxy(Box::new(ProxySettings { net, work_dir, compress, daemon })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::settings::plan;

    fn task(text: &str) -> Result<Task, String> {
        let words = text.split_whitespace().chain(["--no-default-config"]).map(OsString::from).collect();
        plan(words).map(|plan| plan.task).map_err(|error| error.to_string())
    }

    fn dumped(text: &str) -> Option<RemoteSettings> {
        match task(&format!("dump -t 5 {text}")) {
            Ok(Task::Dump(settings, _)) => settings.remote,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn a_dump_through_the_proxy() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(dumped(""), None);
        let remote = dumped("--remote").unwrap();
        assert_eq!((remote.snapshot.as_str(), &remote.work_dir), ("default", &here));
        assert_eq!((remote.direct, remote.compress, remote.wait_restored), (None, false, None));
        assert_eq!(remote.timeout, DEFAULT_REMOTE_TIMEOUT);
        // No directory of that name is looked for.
        let remote = dumped("--remote -D /no/such/dir -W /tmp --timeout 3 --wait-restored").unwrap();
        assert_eq!(
            (remote.snapshot.as_str(), remote.work_dir.as_path()),
            ("/no/such/dir", Path::new("/tmp"))
        );
        assert_eq!(remote.timeout, Duration::from_secs(3));
        assert_eq!(remote.wait_restored, Some(Duration::from_secs(600)));
        assert_eq!(dumped("--remote --wait-restored=5").unwrap().wait_restored, Some(Duration::from_secs(5)));
        assert_eq!(dumped("--remote --wait-restored=0").unwrap().wait_restored, Some(NO_LIMIT));
        assert_eq!(dumped("--remote --no-remote"), None);
    }

    #[test]
    fn a_dump_straight_to_the_cache() {
        let remote = dumped("--remote --address ::1 --port 7 --compress lz4").unwrap();
        assert!(remote.compress);
        let net = remote.direct.unwrap();
        assert_eq!((net.address.as_deref(), net.port, net.tls), (Some("::1"), 7, None));
        let allowed = "--remote --address a --tls --tls-allow CN=b,O=c --tls-allow d";
        let tls = dumped(allowed).unwrap().direct.unwrap().tls.unwrap();
        assert_eq!(tls.allow, ["CN=b,O=c", "d"]);
        let net = dumped("--remote --address a --tls --tls-key k").unwrap().direct.unwrap();
        let tls = net.tls.unwrap();
        assert_eq!((tls.key.as_path(), tls.cert.as_path()), (Path::new("k"), Path::new(CERT)));
        assert_eq!((tls.cacert.as_path(), tls.no_cn_verify), (Path::new(CACERT), false));
        assert_eq!(net.port, 9996);
        assert_eq!(dumped("--remote --ps-socket 3").unwrap().direct.unwrap().ps_socket, Some(3));
    }

    #[test]
    fn a_restore() {
        let restored = |text: &str| match task(&format!("restore {text}")) {
            Ok(Task::Restore(settings, _)) => settings.remote,
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(restored(""), None);
        let remote = restored("--remote").unwrap();
        assert_eq!((remote.wait_snapshot, remote.free_as_read), (DEFAULT_WAIT_SNAPSHOT, false));
        let remote = restored("--remote -D x --timeout 7 --free-as-read").unwrap();
        assert_eq!((remote.snapshot.as_str(), remote.free_as_read), ("x", true));
        assert_eq!(remote.wait_snapshot, Duration::from_secs(7));
    }

    #[test]
    fn daemons() {
        let Ok(Task::Cache(cache)) = task("image-cache -d --port 0 --max-memory 2G --pidfile p -W /tmp")
        else {
            panic!("no cache")
        };
        assert_eq!((cache.net.port, cache.max_memory), (0, Some(2 << 30)));
        assert_eq!(cache.work_dir, Path::new("/tmp"));
        assert_eq!((cache.daemon.detach, cache.daemon.pidfile), (true, Some("p".into())));
        let Ok(Task::Proxy(proxy)) = task("--daemon image-proxy --address h --compress lz4 --status-fd 5")
        else {
            panic!("no proxy")
        };
        assert!(proxy.compress && proxy.daemon.detach);
        assert_eq!((proxy.net.address.as_deref(), proxy.daemon.status_fd), (Some("h"), Some(5)));
        let asked = |text: &str| match task(text) {
            Ok(Task::AskCache(request, _)) => request,
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(asked("image-cache list"), CacheRequest::List);
        assert_eq!(asked("image-cache status"), CacheRequest::Status);
        let name = || "a/b".to_owned();
        assert_eq!(asked("image-cache drop a/b"), CacheRequest::Drop { name: name(), force: false });
        assert_eq!(asked("image-cache drop a/b --force"), CacheRequest::Drop { name: name(), force: true });
        assert_eq!(asked("image-cache release a/b"), CacheRequest::Release { name: name() });
        assert!(
            matches!(task("image-proxy status -W /"), Ok(Task::ProxyStatus(dir)) if dir == Path::new("/"))
        );
    }

    #[test]
    fn daemons_say_more_unless_told() {
        let level = |text: &str| {
            let words = text.split_whitespace().chain(["--no-default-config"]).map(OsString::from).collect();
            plan(words).unwrap().log.level
        };
        assert_eq!(level("image-cache"), 3);
        assert_eq!(level("image-cache -v1"), 1);
        assert_eq!(level("image-cache list"), 2);
        assert_eq!(level("image-cache --restore -- --action-script a"), 3);
        assert_eq!(level("dump -t 5"), 2);
    }

    #[test]
    fn what_does_not_go_together() {
        for (text, wanted) in [
            ("dump -t 5 --address h", "option --address only makes sense with --remote"),
            ("dump -t 5 --tls", "option --tls only makes sense with --remote"),
            ("dump -t 5 --wait-restored", "option --wait-restored only makes sense with --remote"),
            ("dump -t 5 --remote --port 7", "option --port only makes sense with --address or --ps-socket"),
            ("dump -t 5 --remote --compress lz4", "without them the dump goes through image-proxy"),
            ("dump -t 5 --remote --address h --compress gzip", "\"gzip\": the method is lz4 or none"),
            ("dump -t 5 --remote --address h --port 0", "nobody listens at port 0"),
            ("dump -t 5 --remote --address h --port 65536", "a port is a number, at most 65535"),
            ("dump -t 5 --remote --address h --tls-key k", "option --tls-key only makes sense with --tls"),
            (
                "dump -t 5 --remote --address h --ps-socket 3",
                "--address cannot be used together with --ps-socket",
            ),
            ("dump -t 5 --remote --ps-socket 3 --port 5", "--port cannot be used together with --ps-socket"),
            ("image-cache --tls-allow a", "option --tls-allow only makes sense with --tls"),
            ("image-cache list --tls-allow a", "option --tls-allow only makes sense with image-cache itself"),
            ("dump -t 5 --remote --tls-allow a", "option --tls-allow only makes sense with --address or"),
            ("dump -t 5 --remote --ps-socket 3 --tls", "needs --address (the name in the certificate"),
            ("dump -t 5 --remote --address=", "needs a host after --address"),
            ("dump -t 5 --remote -D a\u{7}b", "-D: snapshot name \"a\\u{7}b\": it has control characters"),
            ("restore --free-as-read", "option --free-as-read only makes sense with --remote"),
            ("image-proxy list", "unexpected word \"list\"; there are image-proxy and image-proxy status"),
            ("image-proxy status x", "unexpected word \"x\""),
            ("image-proxy status --address h", "option --address only makes sense with image-proxy itself"),
            (
                "image-cache lst",
                "unexpected word \"lst\"; there are image-cache list, status, drop, release, save and load",
            ),
            ("image-cache list x", "unexpected word \"x\""),
            ("image-cache drop", "command image-cache drop needs the name of a snapshot"),
            ("image-cache drop a b", "unexpected word \"b\""),
            ("image-cache release", "command image-cache release needs the name of a snapshot"),
            ("image-cache save", "command image-cache save needs the name of a snapshot"),
            ("image-cache save a", "command image-cache save needs -D DIR, where the images are to be"),
            ("image-cache load a", "command image-cache load needs -D DIR, where the images are"),
            (
                "image-cache drop a -D d",
                "option --images-dir only makes sense with image-cache save and load",
            ),
            ("image-cache load a -D d --drop", "option --drop only makes sense with image-cache save"),
            ("image-cache release a --force", "option --force only makes sense with image-cache drop"),
            ("image-cache --force", "option --force only makes sense with image-cache drop"),
            ("image-cache --max-memory 0", "needs more than 0 bytes with --max-memory"),
            ("dump -t 5 --remote --timeout 5s", "\"5s\": a time is a whole number of seconds"),
            ("dump -t 5 --remote --wait-restored=x", "\"x\": a time is a whole number of seconds"),
            ("dump -t 5 --remote --images-dir=", "option --images-dir: \"\": it is empty"),
            ("image-cache --max-memory 1.5G", "a size is a number"),
            ("image-cache -W /no/such", "work directory /no/such"),
            ("image-cache --ps-socket 3 --address h", "--address cannot be used together with --ps-socket"),
            ("image-cache list --port 5", "option --port only makes sense with image-cache itself"),
        ] {
            match task(text) {
                Err(error) => assert!(error.contains(wanted) && !error.contains('\n'), "{text}: {error}"),
                Ok(task) => panic!("{text}: {task:?}"),
            }
        }
        // A name may be there for the certificate.
        assert!(dumped("--remote --ps-socket 3 --tls --address h").is_some());
        assert!(dumped("--remote --ps-socket 3 --tls --tls-no-cn-verify").is_some());
    }
}
