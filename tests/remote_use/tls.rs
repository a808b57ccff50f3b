//! `--tls-cacrl`, `--tls-allow`: who may not come in, or not any more, is told so, and nothing happens to the tree.

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    certificates::Ca,
    program::Memory,
    site::{Daemon, Site, has_ended, wait_for},
};

const SOURCE: u64 = 1;
const CACHE: u64 = 2;

/// Both ways of a dump to a cache that will not have it, or that it will not have: each says why in one line.
fn refused(source: &dyn Fn(&Ca) -> Vec<String>, cache: &dyn Fn(&Ca) -> Vec<String>, here: &str, there: &str) {
    let mut site = Site::new(Memory::Text);
    let ca = Ca::new(site.path());
    let mut daemon = site.cache(&cache(&ca));
    let port = daemon.port();
    let direct = ["--address", "127.0.0.1", "--port", &port.to_string()].map(str::to_owned);
    let ended = Site::run(&mut site.dump(&[direct.to_vec(), source(&ca)].concat()));
    let line = ended.failed();
    assert!(line.contains(here) && line.contains(&format!("127.0.0.1:{port}")), "{line}");
    assert!(ended.took < Duration::from_secs(8), "{:?}", ended.took);
    site.counts();
    let line = daemon.says(there);
    assert!(line.contains("127.0.0.1"), "{line}");

    let mut proxy = site.proxy(port, &source(&ca));
    let ended = Site::run(&mut site.dump::<&str>(&[]));
    let line = ended.failed();
    assert!(line.contains(here) && line.contains(&format!("127.0.0.1:{port}")), "{line}");
    assert!(ended.took < Duration::from_secs(8), "{:?}", ended.took);
    proxy.says(here);
    site.counts();
    let held = site.crtool("dst", &["image-cache", "list"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&held.stdout).lines().count(), 1);
    site.end();
    let ends = |daemon: &mut Daemon| assert_eq!(daemon.stop(), Some(0), "{}", daemon.log());
    ends(&mut proxy);
    ends(&mut daemon);
}

pub fn revoked_source() {
    refused(
        &|ca| ca.member(SOURCE),
        &|ca| [ca.member(CACHE), ca.list(&[SOURCE], 2100).to_vec()].concat(),
        "the other side refused our certificate (--tls-cert): it is revoked",
        "TLS: its certificate is revoked (--tls-cacrl)",
    );
}

pub fn revoked_cache() {
    refused(
        &|ca| [ca.member(SOURCE), ca.list(&[CACHE], 2100).to_vec()].concat(),
        &|ca| ca.member(CACHE),
        "TLS: its certificate is revoked (--tls-cacrl)",
        "the other side refused our certificate (--tls-cert): it is revoked",
    );
}

fn allow(subject: &str) -> Vec<String> {
    vec!["--tls-allow".to_owned(), subject.to_owned()]
}

pub fn source_not_named() {
    refused(
        &|ca| ca.member(SOURCE),
        &|ca| [ca.member(CACHE), allow("member"), allow("CN=member 2,O=Example")].concat(),
        "the other side refused our certificate (--tls-cert): whom it names may not enter (--tls-allow there)",
        "TLS: its certificate is refused: it is that of CN=member 1,O=Example, whom --tls-allow does not name",
    );
}

pub fn cache_not_named() {
    refused(
        &|ca| [ca.member(SOURCE), allow("member 1")].concat(),
        &|ca| ca.member(CACHE),
        "TLS: its certificate is refused: it is that of CN=member 2,O=Example, whom --tls-allow does not name",
        "the other side refused our certificate (--tls-cert): whom it names may not enter (--tls-allow there)",
    );
}

pub fn certificate_of_a_server_only() {
    refused(
        &|ca| ca.member_for(SOURCE, &[rcgen::ExtendedKeyUsagePurpose::ServerAuth]),
        &|ca| ca.member(CACHE),
        "the other side refused our certificate (--tls-cert): it is not for this side of a connection",
        "TLS: its certificate is not for this side of a connection (extendedKeyUsage)",
    );
}

/// Both sides name the other, which is known by its certificate from then on.
pub fn both_named() {
    let mut site = Site::new(Memory::Text);
    let ca = Ca::new(site.path());
    let cache = site.cache(&[ca.member(CACHE), allow("member 1"), allow("other")].concat());
    let port = cache.port();
    let proxy = site.proxy(port, &[ca.member(SOURCE), allow("CN=member 2,O=Example")].concat());
    Site::run(&mut site.dump::<&str>(&[])).succeeded();
    proxy.says("it is CN=member 2,O=Example");
    cache.says("it is CN=member 1,O=Example");
    let held = site.crtool("dst", &["image-cache", "list"]).output().unwrap();
    let held = String::from_utf8_lossy(&held.stdout).into_owned();
    let lines: Vec<&str> = held.lines().collect();
    assert!(lines[0].ends_with("  FROM") && lines[1].ends_with("  \"CN=member 1,O=Example\""), "{held}");
    site.restore_and_end();
}

/// A name belongs to whom the certificate names, not to an address.
pub fn names_have_owners() {
    const OTHER: u64 = 3;
    let mut site = Site::new(Memory::Text);
    let ca = Ca::new(site.path());
    let cache = site.cache(&ca.member(CACHE));
    let port = cache.port().to_string();
    let dump = |member: u64, more: &[&str]| {
        let way = ["-D", "web", "--address", "127.0.0.1", "--port", &port].into_iter();
        let words: Vec<String> = way.chain(more.iter().copied()).map(str::to_owned).collect();
        Site::run(&mut site.dump(&[words, ca.member(member)].concat()))
    };
    dump(SOURCE, &["-R"]).succeeded();
    let line = dump(OTHER, &["-R"]).failed();
    let wanted = "the cache has a snapshot web of CN=member 1,O=Example, and only that source can replace it";
    assert!(line.contains(wanted), "{line}");
    dump(SOURCE, &["-R"]).succeeded();
    site.counts();
    site.end();
}

pub fn expired_list() {
    let ours = "TLS: the revocation list (--tls-cacrl) has expired";
    let theirs = "the other side refused our certificate (--tls-cert): it is not signed by the CA there, or";
    refused(
        &|ca| ca.member(SOURCE),
        &|ca| [ca.member(CACHE), ca.list(&[99], 2020).to_vec()].concat(),
        theirs,
        ours,
    );
    refused(
        &|ca| [ca.member(SOURCE), ca.list(&[99], 2020).to_vec()].concat(),
        &|ca| ca.member(CACHE),
        ours,
        theirs,
    );
}

/// A list is in nobody's way who is not on it.
pub fn list_of_others() {
    let mut site = Site::new(Memory::Text);
    let ca = Ca::new(site.path());
    let list = ca.list(&[99], 2100).to_vec();
    let cache = site.cache(&[ca.member(CACHE), list.clone()].concat());
    let port = cache.port().to_string();
    let direct = ["--address", "127.0.0.1", "--port", &port].map(str::to_owned).to_vec();
    Site::run(&mut site.dump(&[direct, ca.member(SOURCE), list].concat())).succeeded();
    site.restore_and_end();
}

/// A cache that restores, where a script holds up what is about to run.
fn held_up(site: &Site, ca: &Ca) -> Daemon {
    let script = site.path().join("hold").display().to_string();
    let dir = site.path().display();
    let made = format!(
        "cat > {script} <<'END'; chmod 755 {script}\n#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = network-unlock ] || exit 0\n\
         touch {dir}/begun\nwhile ! [ -e {dir}/go ]; do sleep 0.02; done\nEND"
    );
    assert!(Command::new("sh").args(["-c", &made]).status().unwrap().success());
    let words = ["image-cache", "--address", "127.0.0.1", "--port", "0", "--restore", "--timeout", "5"];
    let words = words.map(str::to_owned).into_iter().chain(ca.member(CACHE));
    let inner = site.crtool("dst", &words.collect::<Vec<_>>());
    let mut command = Command::new("unshare");
    // Far from the pids of the tree, which are low where the harness is alone. What is for the restores comes last.
    let pids = if site.pid < 10_000 { 20_000 } else { 100 };
    let last = format!("echo {pids} > /proc/sys/kernel/ns_last_pid; exec \"$@\" -- --action-script {script}");
    command.args(["-pf", "--mount-proc", "--kill-child", "sh", "-c", &last, "sh"]);
    command.arg(inner.get_program()).args(inner.get_args()).stdin(Stdio::null());
    site.daemon("dst", &mut command)
}

/// A migrate that has said Go, and is killed. It is given files by names that mean others elsewhere.
fn killed(site: &Site, ca: &Ca, port: u16) -> Vec<String> {
    let _ = fs::remove_file(site.path().join("begun"));
    let prefix = format!("{}/", site.path().display());
    let tls =
        ca.member(SOURCE).into_iter().map(|word| word.strip_prefix(&prefix).unwrap_or(&word).to_owned());
    let to = format!("127.0.0.1:{port}");
    let words = ["migrate", "-t", &site.pid.to_string(), "--to", &to, "--action-script", "./lock"];
    let words: Vec<String> = words.map(str::to_owned).into_iter().chain(tls).collect();
    let script = site.work("src").join("lock");
    let text = "#!/bin/sh\necho $CRTOOLS_SCRIPT_ACTION >> locks";
    let made = format!("printf '{text}' > {0} && chmod 755 {0}", script.display());
    assert!(Command::new("sh").args(["-c", &made]).status().unwrap().success());
    let mut child: Child = site.crtool("src", &words).current_dir(site.path()).spawn().unwrap();
    wait_for("it does not get there", || {
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        site.path().join("begun").exists().then_some(())
    });
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL).unwrap();
    child.wait().unwrap();
    fs::read_to_string(site.work("src").join("locks")).unwrap().lines().map(str::to_owned).collect()
}

/// What is not settled is, with nothing but the work dir.
pub fn settled_by_its_journal() {
    let site = Site::new(Memory::Text);
    let ca = Ca::new(site.path());
    let cache = held_up(&site, &ca);
    assert!(killed(&site, &ca, cache.port()).ends_with(&["network-lock".to_owned(), "post-dump".to_owned()]));
    // Its destination is gone for good.
    drop(cache);
    let list = || {
        let output = site.crtool("src", &["migrate", "list"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let id = list().split(' ').next().unwrap().to_owned();
    let ended = Site::run(&mut site.crtool("src", &["migrate", "thaw", &id, "--timeout", "1"])).succeeded();
    assert!(ended.said.contains("the destination has not taken it back"), "{}", ended.said);
    site.counts();
    let locks = fs::read_to_string(site.work("src").join("locks")).unwrap();
    assert!(locks.ends_with("network-unlock\n") && list().is_empty(), "{locks}");

    let cache = held_up(&site, &ca);
    killed(&site, &ca, cache.port());
    fs::write(site.path().join("go"), "").unwrap();
    let mut settle = site.crtool("src", &["migrate", "settle"]);
    let output = settle.current_dir("/").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("runs at the destination, and is ended here"),
        "{output:?}"
    );
    wait_for("it is not ended here", || has_ended(site.pid).then_some(()));
    site.counts();
    fs::write(site.path().join("stop"), "").unwrap();
    wait_for("it does not end", || {
        fs::read_to_string(site.path().join("end")).ok().filter(|said| said == "well")
    });
}
