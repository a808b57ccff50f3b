//! The daemons of live migration as processes: how they start, who may speak to them, how they end.

use std::fs;
use std::io::Read as _;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};

const PATIENCE: Duration = Duration::from_secs(120);

fn crtool(dir: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_crtool"));
    command.args(words).args(["--no-default-config", "-W"]).arg(dir).stdin(Stdio::null());
    command
}

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Ended: gone, or a zombie that nobody has reaped yet.
fn has_ended(pid: i32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')),
        Err(_) => true,
    }
}

/// A daemon that was started with -d; it is told to end when this is dropped.
struct Daemon {
    pid: i32,
    dir: PathBuf,
}

impl Daemon {
    fn start(dir: &Path, words: &[&str]) -> Self {
        let words: Vec<&str> = words.iter().copied().chain(["-d", "--pidfile", "pid", "-o", "log"]).collect();
        let output = crtool(dir, &words).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
        // The caller hears of it when all is there.
        let pid = fs::read_to_string(dir.join("pid")).unwrap().parse().unwrap();
        Self { pid, dir: dir.to_owned() }
    }

    fn cache(dir: &Path, words: &[&str]) -> Self {
        let all: Vec<&str> =
            ["image-cache", "--address", "127.0.0.1", "--port", "0"].iter().chain(words).copied().collect();
        Self::start(dir, &all)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap()
    }

    /// The port it listens on.
    fn port(&self) -> u16 {
        let log = self.log();
        let rest = log.split("listening on 127.0.0.1:").nth(1).unwrap_or_else(|| panic!("{log}"));
        rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
    }

    fn end(&self) {
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGTERM);
        wait_for("the daemon did not end", || has_ended(self.pid).then_some(()));
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if !has_ended(self.pid) {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The one line in which a command says why it failed.
fn failure(command: &mut Command) -> String {
    let output: Output = command.output().unwrap();
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{command:?}: {error}");
    let lines: Vec<&str> = error.lines().filter(|line| line.contains("Error (")).collect();
    assert_eq!(lines.len(), 1, "{command:?}: {error}");
    lines[0].to_owned()
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("img-cache.sock")
}

#[test]
fn a_daemon_is_there_when_its_caller_returns_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::cache(dir.path(), &[]);
    let meta = fs::symlink_metadata(socket(dir.path())).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o7777, 0o600);
    assert!(TcpStream::connect(("127.0.0.1", daemon.port())).is_ok());
    assert_eq!(fs::read_link(format!("/proc/{}/cwd", daemon.pid)).unwrap(), Path::new("/"));
    for fd in 0..3 {
        let open = fs::read_link(format!("/proc/{}/fd/{fd}", daemon.pid)).unwrap();
        assert_eq!(open, Path::new("/dev/null"));
    }
    let listed = crtool(dir.path(), &["image-cache", "list"]).output().unwrap();
    assert!(listed.status.success(), "{}", text(&listed.stderr));
    assert!(text(&listed.stdout).starts_with("NAME"), "{}", text(&listed.stdout));
    let status = crtool(dir.path(), &["image-cache", "status"]).output().unwrap();
    assert!(
        text(&status.stdout).contains(&format!("127.0.0.1:{}", daemon.port())),
        "{}",
        text(&status.stdout)
    );
    daemon.end();
    assert!(!socket(dir.path()).exists());
    assert!(!dir.path().join("pid").exists());
    assert!(failure(&mut crtool(dir.path(), &["image-cache", "list"])).contains("is image-cache running"));
}

#[test]
fn the_status_descriptor_and_signals() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let dir = tempfile::tempdir().unwrap();
        // Standard output, as no other process of these tests inherits it.
        let words = ["image-cache", "--address", "::1", "--port", "0", "--status-fd", "1"];
        let mut command = crtool(dir.path(), &words);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut told = Vec::new();
        child.stdout.take().unwrap().read_to_end(&mut told).unwrap();
        assert_eq!(told, [0]);
        assert!(socket(dir.path()).exists());
        kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0), "{signal}");
        assert!(!socket(dir.path()).exists());
    }
}

#[test]
fn a_second_daemon_says_what_is_in_its_way() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let daemon = Daemon::cache(dir.path(), &[]);
    let port = daemon.port().to_string();
    for detached in [&[][..], &["-d"]] {
        let words = [&["image-cache", "--address", "127.0.0.1", "--port", "0"], detached].concat();
        let error = failure(&mut crtool(dir.path(), &words));
        assert!(error.contains(&format!("another image-cache (pid {}) uses it", daemon.pid)), "{error}");
        let words = [&["image-cache", "--address", "127.0.0.1", "--port", &port], detached].concat();
        let error = failure(&mut crtool(other.path(), &words));
        assert!(error.contains(&format!("127.0.0.1:{port}: Address already in use")), "{error}");
        assert!(!socket(other.path()).exists());
    }
    // The first one has not suffered.
    assert!(crtool(dir.path(), &["image-cache", "list"]).output().unwrap().status.success());
    daemon.end();
}

#[test]
fn a_socket_left_by_a_killed_daemon_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::cache(dir.path(), &[]);
    kill(Pid::from_raw(daemon.pid), Signal::SIGKILL).unwrap();
    wait_for("the daemon did not die", || has_ended(daemon.pid).then_some(()));
    assert!(socket(dir.path()).exists());
    let daemon = Daemon::cache(dir.path(), &[]);
    assert!(crtool(dir.path(), &["image-cache", "list"]).output().unwrap().status.success());
    daemon.end();
}

#[test]
fn what_cannot_be_had_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let cache = |words: &[&str]| {
        let all = [&["image-cache", "--address", "127.0.0.1", "--port", "0"], words].concat();
        failure(&mut crtool(dir.path(), &all))
    };
    for detached in [&[][..], &["-d"]] {
        let with = |words: &[&'static str]| cache(&[words, detached].concat());
        let error = with(&["-o", "/no/such/log"]);
        assert!(error.contains("/no/such/log: No such file or directory"), "{error}");
        let error = with(&["--pidfile", "/no/such/pid"]);
        assert!(error.contains("/no/such/pid: No such file or directory"), "{error}");
        let error = with(&["--status-fd", "99"]);
        assert!(error.contains("descriptor 99 is not open"), "{error}");
        let error = with(&["--tls", "--tls-cacert", "/no/ca.pem"]);
        assert!(error.contains("option --tls-cacert: /no/ca.pem: No such file or directory"), "{error}");
        assert!(!socket(dir.path()).exists());
        let all = [&["image-cache", "--address", "no host.invalid"][..], detached].concat();
        let error = failure(&mut crtool(dir.path(), &all));
        assert!(error.contains("address no host.invalid: it does not resolve"), "{error}");
        let all = [&["image-proxy", "--address", "no host.invalid"][..], detached].concat();
        let error = failure(&mut crtool(dir.path(), &all));
        assert!(error.contains("address no host.invalid: it does not resolve"), "{error}");
        let all = [&["image-proxy", "--address", "127.0.0.1"][..], detached].concat();
        let error = failure(&mut crtool(Path::new("/proc/self"), &all));
        assert!(error.contains("work dir /proc/self: "), "{error}");
    }
    let error = failure(&mut crtool(dir.path(), &["image-cache", "--ps-socket", "0"]));
    assert!(error.contains("--ps-socket: it is no socket"), "{error}");
}

/// Runs the command that follows such that fsopen(2) kills, as under the system call filter of a service that does not
/// list it.
const WITHOUT_FSOPEN: &str = r#"
import ctypes, os, struct, sys
step = lambda code, jt, jf, k: struct.pack("HBBI", code, jt, jf, k)
code = ctypes.create_string_buffer(
    step(0x20, 0, 0, 0) + step(0x15, 0, 1, 430) + step(0x06, 0, 0, 0x80000000) + step(0x06, 0, 0, 0x7fff0000))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(code)))
prctl = ctypes.CDLL(None, use_errno=True).prctl
number = ctypes.c_ulong
assert prctl(38, number(1), number(0), number(0), number(0)) == 0, ctypes.get_errno()
assert prctl(22, number(2), program) == 0, ctypes.get_errno()
os.execv(sys.argv[1], sys.argv[1:])
"#;

#[test]
fn what_its_filter_kills_for_is_called_before_it_is_ready() {
    if !Uid::effective().is_root() || Command::new("python3").arg("-V").output().is_err() {
        eprintln!("skipped: it takes python3, and root: without CAP_SYS_ADMIN no tmpfs is asked for");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let words = ["image-cache", "--address", "127.0.0.1", "--port", "0", "-d", "-o", "log"];
    let plain = crtool(dir.path(), &words);
    let mut filtered = Command::new("python3");
    filtered.args(["-c", WITHOUT_FSOPEN]).arg(plain.get_program()).args(plain.get_args());
    let error = failure(filtered.stdin(Stdio::null()));
    assert!(error.contains("the daemon was killed by SIGSYS before it was ready"), "{error}");
    assert!(!socket(dir.path()).exists());
}

#[test]
fn other_users_are_sent_away() {
    if !Uid::effective().is_root() {
        eprintln!("skipped: to be another user takes root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // Where it was built others may have no business.
    let program = dir.path().join("crtool");
    // By another process: a copy that a child of ours had open for a moment could not be run (ETXTBSY).
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_crtool")).arg(&program).status().unwrap();
    assert!(copied.success());
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let daemon = Daemon::cache(dir.path(), &[]);
    let nobody = || {
        let mut command = Command::new(&program);
        command.args(["image-cache", "list", "--no-default-config", "-W"]).arg(dir.path());
        command.current_dir("/").uid(65534).gid(65534);
        failure(&mut command)
    };
    let error = nobody();
    assert!(error.contains("Permission denied; it is for the user who started it"), "{error}");
    // The mode is not the only thing in the way.
    fs::set_permissions(socket(dir.path()), fs::Permissions::from_mode(0o666)).unwrap();
    let error = nobody();
    assert!(error.contains("this daemon is for uid 0 and for root"), "{error}");
    assert!(daemon.log().contains("uid 65534"), "{}", daemon.log());
    daemon.end();
}

/// Listens at the sockets in the arguments for everybody, and says so; what anybody says to it goes to standard output.
const STRANGER: &str = r#"
import os, select, socket, sys
doors = []
for path in sys.argv[1:]:
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    door.bind(path)
    os.chmod(path, 0o777)
    door.listen(8)
    doors.append(door)
print("there", flush=True)
while True:
    for door in select.select(doors, [], [])[0]:
        print("told", door.accept()[0].recv(100), flush=True)
"#;

/// In a directory in which everybody can make files.
#[test]
fn a_stranger_in_the_place_of_a_daemon_is_told_nothing() {
    use std::io::{BufRead as _, BufReader};
    if !Uid::effective().is_root() || Command::new("python3").arg("-V").output().is_err() {
        eprintln!("skipped: it takes python3, and root to be another user");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    let doors = ["img-proxy.sock", "img-cache.sock"].map(|name| dir.path().join(name));
    let mut stranger = Command::new("python3");
    stranger.args(["-c", STRANGER]).args(&doors).current_dir("/").uid(65534).gid(65534);
    let mut stranger = stranger.stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(stranger.stdout.take().unwrap()).lines();
    assert_eq!(said.next().unwrap().unwrap(), "there");
    let mut tree = Command::new("setsid").args(["sleep", "1000"]).stdin(Stdio::null()).spawn().unwrap();
    let pid = tree.id().to_string();
    // Also with the file made root's, as a stranger may have a link made.
    for owner in [None, Some(0)] {
        for path in &doors {
            std::os::unix::fs::chown(path, owner, None).unwrap();
        }
        let ask: [&[&str]; 6] = [
            &["dump", "-t", &pid, "--remote", "--timeout", "1"],
            &["restore", "--remote", "--timeout", "1"],
            &["image-cache", "list"],
            &["image-cache", "drop", "a", "--force"],
            &["image-cache", "release", "a"],
            &["image-proxy", "status"],
        ];
        for words in ask {
            let error = failure(&mut crtool(dir.path(), words));
            assert!(error.contains("belongs to uid 65534, neither to root nor to uid 0"), "{error}");
        }
    }
    assert!(tree.try_wait().unwrap().is_none());
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    // Connections that end without a word are read as empty.
    let told: Vec<String> = said.map(Result::unwrap).filter(|line| line != "told b''").collect();
    assert!(told.is_empty(), "{told:?}");
    tree.kill().unwrap();
    tree.wait().unwrap();
}

#[test]
fn a_daemon_in_the_background_holds_nothing_of_its_caller() {
    let dir = tempfile::tempdir().unwrap();
    let held = dir.path().join("held");
    let daemon = [env!("CARGO_BIN_EXE_crtool"), "image-proxy", "-d", "--pidfile", "pid", "-o", "log", "-W"];
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec 9>\"$0\" && exec \"$@\""]).arg(&held).args(daemon).arg(dir.path());
    assert!(shell.status().unwrap().success());
    let pid = fs::read_to_string(dir.path().join("pid")).unwrap();
    let open = || fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let names: Vec<PathBuf> = open().filter_map(|fd| fs::read_link(fd.path()).ok()).collect();
    kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGTERM).unwrap();
    assert!(names.contains(&dir.path().join("log")) && !names.contains(&held), "{names:?}");
}

/// The name of the cache's host is not known yet, or nobody has said one.
#[test]
fn a_proxy_starts_before_its_network() {
    let dir = tempfile::tempdir().unwrap();
    for (words, target) in [
        (&["image-proxy", "--address", "no-such-host.invalid"][..], "no-such-host.invalid:9996"),
        (&["image-proxy", "--port", "9"], "localhost:9"),
    ] {
        let daemon = Daemon::start(dir.path(), words);
        let status = crtool(dir.path(), &["image-proxy", "status"]).output().unwrap();
        assert!(text(&status.stdout).contains(target), "{}", text(&status.stdout));
        daemon.end();
    }
}

#[test]
fn listening_without_tls_is_worth_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::cache(dir.path(), &[]);
    assert!(!daemon.log().contains("without --tls"), "{}", daemon.log());
    daemon.end();
    let daemon = Daemon::start(dir.path(), &["image-cache", "--port", "0"]);
    assert!(daemon.log().contains("without --tls"), "{}", daemon.log());
    daemon.end();
}

#[test]
fn a_proxy_needs_no_cache_to_start() {
    let dir = tempfile::tempdir().unwrap();
    // Bound and not listening: nobody is there, and nobody else can be.
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = held.local_addr().unwrap().port().to_string();
    drop(held);
    let words = ["image-proxy", "--address", "127.0.0.1", "--port", &port, "--timeout", "1"];
    let daemon = Daemon::start(dir.path(), &words);
    let status = crtool(dir.path(), &["image-proxy", "status"]).output().unwrap();
    assert!(status.status.success(), "{}", text(&status.stderr));
    assert!(text(&status.stdout).contains(&format!("127.0.0.1:{port}")), "{}", text(&status.stdout));
    daemon.end();
    assert!(!dir.path().join("img-proxy.sock").exists());
}

/// A CA, and a certificate for 127.0.0.1 that it signed: `NAME-ca.pem`, `NAME.pem`, `NAME.key`.
fn certify(dir: &Path, name: &str, year: i32) {
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let ca = rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap();
    fs::write(dir.join(format!("{name}-ca.pem")), ca.pem()).unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    params.not_before = rcgen::date_time_ymd(2000, 1, 1);
    params.not_after = rcgen::date_time_ymd(year, 1, 1);
    let key = rcgen::KeyPair::generate().unwrap();
    fs::write(dir.join(format!("{name}.pem")), params.signed_by(&key, &ca).unwrap().pem()).unwrap();
    fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
}

/// The options for a certificate of [`certify`] and a CA of it.
fn tls(dir: &Path, name: &str, ca: &str) -> Vec<String> {
    let path = |file: String| dir.join(file).display().to_string();
    let mut words = vec!["--tls".to_owned()];
    for (option, file) in [
        ("--tls-cacert", format!("{ca}-ca.pem")),
        ("--tls-cert", format!("{name}.pem")),
        ("--tls-key", format!("{name}.key")),
    ] {
        words.extend([option.to_owned(), path(file)]);
    }
    words
}

/// A process to dump, with nothing of ours in it.
struct Sleeper(std::process::Child);

impl Sleeper {
    fn start() -> Self {
        let mut command = Command::new("setsid");
        // Without what whoever runs the tests has left open.
        let script = r#"for fd in /proc/$$/fd/*; do n=${fd##*/}; [ "$n" -gt 2 ] && eval "exec $n>&-"; done
            exec sleep 100000"#;
        command.args(["bash", "-c", script]).current_dir("/");
        let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        let comm = format!("/proc/{}/comm", child.id());
        wait_for("no sleep", || (fs::read_to_string(&comm).ok()?.trim() == "sleep").then_some(()));
        Self(child)
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn dumps_go_to_a_cache_with_tls_if_each_trusts_the_other() {
    if !Uid::effective().is_root() {
        eprintln!("skipped: to dump takes root");
        return;
    }
    let certs = tempfile::tempdir().unwrap();
    for (name, year) in [("good", 2100), ("other", 2100), ("old", 2010)] {
        certify(certs.path(), name, year);
    }
    let dir = tempfile::tempdir().unwrap();
    let words = tls(certs.path(), "good", "good");
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let cache = Daemon::cache(dir.path(), &words);
    let port = cache.port().to_string();
    let sleeper = Sleeper::start();
    let pid = sleeper.pid();
    let dump = |name: &str, tls: &[String]| {
        let words =
            ["dump", "-t", &pid, "-R", "--remote", "-D", name, "--address", "127.0.0.1", "--port", &port];
        let mut command = crtool(dir.path(), &words);
        command.args(tls);
        command
    };
    let list = || text(&crtool(dir.path(), &["image-cache", "list"]).output().unwrap().stdout);
    for (name, ca, wanted) in [
        ("other", "other", "TLS: its certificate is not signed by the CA in --tls-cacert"),
        ("other", "good", "TLS"),
        ("old", "good", "TLS"),
    ] {
        let error = failure(&mut dump("refused", &tls(certs.path(), name, ca)));
        assert!(error.contains(wanted) || error.contains("Connection reset"), "{name} {ca}: {error}");
        assert!(!list().contains("refused"), "{}", list());
    }
    let error = failure(&mut dump("refused", &[]));
    assert!(error.contains("wants TLS; --tls gives it"), "{error}");
    assert!(!list().contains("refused"), "{}", list());
    let output = dump("direct", &tls(certs.path(), "good", "good")).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let is_ready = |name: &str| list().lines().any(|line| line.starts_with(name) && line.contains("READY"));
    wait_for("direct is not ready", || is_ready("direct").then_some(()));

    let proxy_dir = tempfile::tempdir().unwrap();
    let words = ["image-proxy", "--address", "127.0.0.1", "--port", &port].map(str::to_owned).to_vec();
    let words = [words, tls(certs.path(), "good", "good")].concat();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let proxy = Daemon::start(proxy_dir.path(), &words);
    let words = ["dump", "-t", &pid, "-R", "--remote", "-D", "proxied"];
    let output = crtool(proxy_dir.path(), &words).output().unwrap();
    assert!(output.status.success(), "{}\n{}", text(&output.stderr), proxy.log());
    wait_for("proxied is not ready", || is_ready("proxied").then_some(()));
    proxy.end();
    cache.end();

    // The other way round: TLS to who has none.
    let cache = Daemon::cache(dir.path(), &[]);
    let port = cache.port().to_string();
    let words = ["dump", "-t", &pid, "-R", "--remote", "--address", "127.0.0.1", "--port", &port];
    let mut command = crtool(dir.path(), &words);
    let error = failure(command.args(tls(certs.path(), "good", "good")));
    assert!(error.contains("is --tls given there?"), "{error}");
    wait_for("the log of the cache", || cache.log().contains("it speaks TLS").then_some(()));
    cache.end();
}

#[test]
fn help_explains_the_daemons() {
    let dir = tempfile::tempdir().unwrap();
    for (words, wanted) in [
        (["image-cache", "--help"], ["--max-memory", "IN_DOUBT", "release", "--tls-cacrl"]),
        (["-h", "image-proxy"], ["--address", "--compress lz4", "--timeout", "status"]),
    ] {
        let help = crtool(dir.path(), &words).output().unwrap();
        assert!(help.status.success());
        let help = text(&help.stdout);
        assert!(wanted.iter().all(|word| help.contains(word)), "{help}");
        assert!(help.lines().all(|line| line.len() <= 120), "{help}");
    }
}
