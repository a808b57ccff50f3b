//! `--tls-cacrl`: who has lost the right to come in is told so, and nothing happens to the tree.

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
