//! `--tls-cacrl`, `--tls-allow`: who may not come in, or not any more, is told so, and nothing happens to the tree.

use std::time::Duration;

use crate::{
    certificates::Ca,
    program::Memory,
    site::{Daemon, Site},
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
