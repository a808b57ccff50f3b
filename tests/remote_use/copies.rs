//! Snapshots of the cache as images directories, and back.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    chain,
    program::Memory,
    site::{Daemon, Site, has_ended, list, operator, wait_for},
};

const NONE: &[&str] = &[];

/// Dumps straight to the cache.
fn dump(site: &mut Site, cache: &Daemon) {
    let port = cache.port().to_string();
    Site::run(&mut site.dump(&["--address", "127.0.0.1", "--port", &port])).succeeded();
    site.reap();
}

fn restore_from(site: &Site, dir: &Path) {
    let words = ["restore", "-d", "-D", dir.to_str().unwrap()];
    Site::run(&mut site.crtool("dst", &words)).succeeded();
    site.counts();
}

/// What was saved is restored without the cache.
pub fn saved() {
    let mut site = Site::new(Memory::Noise);
    let cache = site.cache(NONE);
    dump(&mut site, &cache);
    let dir = site.path().join("saved");
    let at = dir.to_str().unwrap().to_owned();
    let ended = operator(&site, &["save", "default", "-D", &at]).succeeded();
    assert!(ended.said.contains("restore only one of them"), "{}", ended.said);
    for entry in fs::read_dir(&dir).unwrap().flatten() {
        let meta = entry.metadata().unwrap();
        assert_eq!((meta.permissions().mode() & 0o7777, meta.uid()), (0o600, 0), "{:?}", entry.path());
        assert!(entry.path().extension().is_some_and(|end| end == "img"), "{:?}", entry.path());
    }
    assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o7777, 0o700);
    let listed = list(&site);
    assert!(
        listed.contains("READY") && listed.contains(&format!("saved in {at}: restore only one")),
        "{listed}"
    );
    // Nothing is overwritten, nor left behind.
    let refused = operator(&site, &["save", "default", "-D", &at]).failed();
    assert!(
        refused.contains("there are images in") && refused.contains("another directory (-D)"),
        "{refused}"
    );
    let refused =
        operator(&site, &["save", "none", "-D", site.path().join("new").to_str().unwrap()]).failed();
    assert!(refused.contains("no snapshot none has come"), "{refused}");
    assert!(!site.path().join("new").exists());
    // There is a copy, so that it may go.
    operator(&site, &["drop", "default"]).succeeded();
    restore_from(&site, &dir);
    site.end();
}

/// The cache is left by what was saved, and gets it back.
pub fn saved_dropped_and_loaded() {
    let mut site = Site::new(Memory::Noise);
    let cache = site.cache(NONE);
    dump(&mut site, &cache);
    let dir = site.work("saved");
    let at = dir.to_str().unwrap().to_owned();
    operator(&site, &["save", "default", "-D", &at, "--drop"]).succeeded();
    assert_eq!(list(&site).lines().count(), 1);
    let ended = operator(&site, &["load", "default", "-D", &at]).succeeded();
    assert!(ended.said.contains("restore only one of them"), "{}", ended.said);
    let listed = list(&site);
    assert!(listed.contains("READY") && listed.contains(&format!("saved in {at}")), "{listed}");
    assert!(listed.contains(&format!("{}(", site.pid)), "{listed}");
    let refused = operator(&site, &["load", "default", "-D", &at]).failed();
    assert!(refused.contains("the cache has a snapshot default"), "{refused}");
    let refused = operator(&site, &["load", "empty", "-D", site.work("empty").to_str().unwrap()]).failed();
    assert!(refused.contains("inventory.img"), "{refused}");
    site.restore_and_end();
}

/// A source that vanished before its last word: the images can be put where they are safe.
pub fn saved_in_doubt() {
    let mut site = Site::new(Memory::Text);
    let images = site.work("images");
    let words = ["dump", "-t", &site.pid.to_string(), "-D", images.to_str().unwrap()];
    Site::run(&mut site.crtool("src", &words)).succeeded();
    site.reap();
    let cache = site.cache(NONE);
    let mut source = chain::Source::connect(&cache);
    source.bring(&images, "doubt", "", false).unwrap();
    let refused = operator(&site, &["save", "doubt", "-D", site.work("early").to_str().unwrap()]).failed();
    assert!(refused.contains("snapshot doubt cannot be saved: complete, not yet confirmed"), "{refused}");
    drop(source);
    cache.says("is in doubt");
    let dir = site.path().join("saved");
    operator(&site, &["save", "doubt", "-D", dir.to_str().unwrap()]).succeeded();
    let listed = list(&site);
    assert!(listed.contains("IN_DOUBT") && listed.contains("saved in "), "{listed}");
    restore_from(&site, &dir);
    site.end();
}

/// A snapshot and those it builds on, from the cache into a directory, back, and from there into a process.
pub fn saved_and_loaded_with_parents() {
    let (mut site, images) = chain::divided();
    let cache = site.cache(NONE);
    let mut source = chain::Source::connect(&cache);
    source.bring_all(&images, &site);
    let dir = site.path().join("saved");
    operator(&site, &["save", "child", "-D", dir.to_str().unwrap()]).succeeded();
    operator(&site, &["load", "again", "-D", dir.to_str().unwrap()]).succeeded();
    let listed = list(&site);
    assert!(listed.contains("on top of again (parent 1)"), "{listed}");
    let words = ["restore", "--remote", "-d", "--timeout", "20", "-D", "again"];
    Site::run(&mut site.crtool("dst", &words)).succeeded();
    site.counts();
    // Once more, without the cache.
    kill(Pid::from_raw(site.pid), Signal::SIGKILL).unwrap();
    wait_for("the tree does not die", || has_ended(site.pid).then_some(()));
    drop(cache);
    restore_from(&site, &dir);
    site.end();
}
