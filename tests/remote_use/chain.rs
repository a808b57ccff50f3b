//! Snapshots that build on others in the cache. No dump of ours makes them so far, so the images of a whole one are
//! divided, and brought to the cache by a source that is played here.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    time::Duration,
};

use crtool::remote::{
    crc, pb,
    wire::{self, HEADER, Header, Kind, MAGIC, MAX_DATA, Sum},
};

use crate::{
    program::Memory,
    site::{Daemon, Site, list, wait_for},
    split::{self, older},
};

const NONE: &[&str] = &[];
const GENERATIONS: usize = 5;

/// A connection to a cache, as a dump or a proxy has it.
pub struct Source {
    pub stream: TcpStream,
    pub streams: u32,
}

impl Source {
    pub fn connect(cache: &Daemon) -> Self {
        let mut stream = TcpStream::connect(("127.0.0.1", cache.port())).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let hello = pb::Hello { version: wire::VERSION, timeout_ms: 60_000, ..pb::Hello::default() };
        stream.write_all(&MAGIC).unwrap();
        stream.write_all(&wire::frame(Kind::Hello, 0, 0, &hello)).unwrap();
        let mut magic = [0; MAGIC.len()];
        stream.read_exact(&mut magic).unwrap();
        assert_eq!(magic, MAGIC);
        let mut source = Self { stream, streams: 0 };
        assert_eq!(source.hear().0.kind, Kind::Hello);
        source
    }

    pub fn hear(&mut self) -> (Header, Vec<u8>) {
        loop {
            let mut header = [0; HEADER];
            self.stream.read_exact(&mut header).unwrap();
            let header = Header::decode(&header).unwrap();
            let mut payload = vec![0; header.len as usize];
            self.stream.read_exact(&mut payload).unwrap();
            match header.kind {
                Kind::Ping => self.stream.write_all(&wire::bare(Kind::Pong, 0, 0, 0)).unwrap(),
                // What became of an earlier one.
                _ if header.stream != self.streams || header.kind == Kind::Room => {}
                _ => return (header, payload),
            }
        }
    }

    pub fn say<M: prost::Message>(&mut self, kind: Kind, image: u32, message: &M) {
        self.stream.write_all(&wire::frame(kind, self.streams, image, message)).unwrap();
    }

    /// Brings all images of `dir` as the snapshot `name`, up to the cache's word that it has them.
    pub fn bring(&mut self, dir: &Path, name: &str, parent: &str, survives: bool) -> Result<(), pb::Failed> {
        self.streams += 1;
        let begin = pb::SnapshotBegin {
            name: name.to_owned(),
            parent: parent.to_owned(),
            pid: 1,
            comm: "counter".to_owned(),
            source_survives: survives,
            ..pb::SnapshotBegin::default()
        };
        self.say(Kind::SnapshotBegin, 0, &begin);
        let mut commit = pb::Commit::default();
        let mut files: Vec<PathBuf> =
            fs::read_dir(dir).unwrap().flatten().map(|entry| entry.path()).collect();
        files.retain(|path| path.extension().is_some_and(|end| end == "img"));
        for (number, path) in (1..).zip(files) {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            self.say(Kind::ImageBegin, number, &pb::ImageBegin { name, expected_bytes: 0 });
            let mut sum = Sum::default();
            for part in fs::read(&path).unwrap().chunks(MAX_DATA as usize) {
                let (len, crc) = (part.len() as u32, crc::of(part));
                sum.push(len, crc);
                let header = Header::data(self.streams, number, len, crc);
                self.stream.write_all(&[&header.encode(), part].concat()).unwrap();
            }
            let end = pb::ImageEnd { size: sum.size, crc32c: sum.crc };
            self.say(Kind::ImageEnd, number, &end);
            commit.images.push(pb::commit::Image { image: number, size: sum.size, crc32c: sum.crc });
        }
        self.say(Kind::Commit, 0, &commit);
        let (header, payload) = self.hear();
        match header.kind {
            Kind::Prepared => Ok(()),
            Kind::Failed => Err(wire::message(&header, &payload).unwrap()),
            other => panic!("{other:?}"),
        }
    }

    fn confirm(&mut self, survives: bool) {
        self.say(Kind::Confirm, 0, &pb::Confirm { survives });
    }

    /// A whole chain: the oldest first, as `g4`, `g3` and so on; the child as `child`.
    pub fn bring_all(&mut self, images: &Path, site: &Site) {
        for generation in (1..GENERATIONS).rev() {
            let parent = if generation == GENERATIONS - 1 { String::new() } else { name(generation + 1) };
            self.bring(&older(images, generation), &name(generation), &parent, true).unwrap();
            self.confirm(true);
        }
        self.bring(images, "child", &name(1), false).unwrap();
        self.confirm(false);
        is(site, "child", "READY");
    }
}

fn name(generation: usize) -> String {
    format!("g{generation}")
}

/// Waits until the snapshot is in this state.
fn is(site: &Site, name: &str, state: &str) {
    wait_for(&format!("{name} does not become {state}"), || {
        let all = list(site);
        let line = all.lines().find(|line| line.split_whitespace().next() == Some(name))?;
        line.contains(state).then_some(())
    });
}

/// A tree that was dumped into a directory, and the chain that was made of it.
pub fn divided() -> (Site, PathBuf) {
    let mut site = Site::new(Memory::Noise);
    let images = site.work("images");
    let words = ["dump", "-t", &site.pid.to_string(), "-D", images.to_str().unwrap()];
    Site::run(&mut site.crtool("src", &words)).succeeded();
    site.reap();
    let divided = split::split(&images, GENERATIONS, 0xc4a1).unwrap();
    // Each is a dump of its own.
    for generation in 1..GENERATIONS {
        fs::copy(images.join("inventory.img"), older(&images, generation).join("inventory.img")).unwrap();
    }
    assert!(divided.pages.iter().all(|pages| *pages > 50) && divided.stale > 1000, "{divided:?}");
    (site, images)
}

fn restore(site: &Site, more: &[&str]) -> crate::site::Ended {
    Site::run(&mut site.crtool("dst", &[&["restore", "--remote", "-d", "--timeout", "20"], more].concat()))
}

/// All pages are found, wherever they are; the parents go when the tree runs.
pub fn restored() {
    let (mut site, images) = divided();
    let cache = site.cache(NONE);
    let mut source = Source::connect(&cache);
    source.bring_all(&images, &site);
    restore(&site, &["-D", "child"]).succeeded();
    site.counts();
    site.end();
    assert_eq!(list(&site).lines().count(), 1, "{}", list(&site));
    assert_eq!(cache.errors(), Vec::<String>::new());
}

/// What a restore frees as it reads is never a parent's: another child has all of it still. Nor can a parent be dropped, or
/// be replaced, as long as it has children.
pub fn parents_stay() {
    let (mut site, images) = divided();
    // A file that the tree has open has to be as it was.
    let count = fs::read(site.path().join("count")).unwrap();
    let cache = site.cache(NONE);
    let mut source = Source::connect(&cache);
    source.bring_all(&images, &site);
    source.bring(&images, "other", &name(1), false).unwrap();
    source.confirm(false);
    is(&site, "other", "READY");

    restore(&site, &["-D", "child", "--free-as-read"]).succeeded();
    site.counts();
    site.end();
    for generation in 1..GENERATIONS {
        for more in [NONE, &["--force"]] {
            let name = name(generation);
            let words = [&["image-cache", "drop", name.as_str()], more].concat();
            let error = Site::run(&mut site.crtool("dst", &words)).failed();
            assert!(error.contains("is needed by snapshots that build on it"), "{error}");
        }
    }
    // A newer one of that name takes the name, not the images.
    source.bring(&older(&images, 1), &name(1), &name(2), true).unwrap();
    source.confirm(true);
    wait_for("the parent is not replaced", || cache.log().contains("replaced by a newer").then_some(()));

    for file in ["stop", "end"] {
        fs::remove_file(site.path().join(file)).unwrap();
    }
    fs::write(site.path().join("count"), count).unwrap();
    restore(&site, &["-D", "other", "--free-as-read"]).succeeded();
    site.counts();
    site.end();
    is(&site, &name(1), "READY");
    let words = ["image-cache", "drop", &name(1)];
    Site::run(&mut site.crtool("dst", &words)).succeeded();
    assert_eq!(cache.errors(), Vec::<String>::new());
}

/// A parent that is not there, or not there yet; and one that lacks pages.
pub fn no_parent() {
    let (mut site, images) = divided();
    let cache = site.cache(NONE);
    let mut source = Source::connect(&cache);
    let failed = source.bring(&images, "child", "nobody", false).unwrap_err();
    assert_eq!(failed.code(), pb::FailCode::FailParent, "{failed:?}");
    assert!(failed.text.contains("its parent nobody is not in the cache"), "{failed:?}");
    // Complete, but its source has not said the last word.
    let mut slow = Source::connect(&cache);
    slow.bring(&older(&images, 4), &name(4), "", true).unwrap();
    let failed = source.bring(&older(&images, 3), &name(3), &name(4), true).unwrap_err();
    assert_eq!(failed.code(), pb::FailCode::FailParent, "{failed:?}");
    slow.confirm(true);
    is(&site, &name(4), "READY");

    // Generations are left out: pages are where nobody looks for them.
    source.bring(&images, "alone", "", false).unwrap();
    source.confirm(false);
    source.bring(&images, "child", &name(4), false).unwrap();
    source.confirm(false);
    is(&site, "child", "READY");
    for (name, wanted) in [
        ("alone", "are in a parent snapshot, but remote:alone has no parent"),
        ("child", "remote:child/parent/pagemap-"),
    ] {
        // Refused as often as it is tried; what there is stays.
        for _ in 0..2 {
            let error = restore(&site, &["-D", name]).failed();
            assert!(error.contains(wanted) && error.contains("the chain of snapshots is damaged"), "{error}");
            is(&site, name, "READY");
        }
    }
    assert!(crate::site::has_ended(site.pid));
    // The tree is not lost: its chain, whole, is brought again.
    let mut again = Source::connect(&cache);
    for name in ["child", "alone", &name(4)] {
        let _ = Site::run(&mut site.crtool("dst", &["image-cache", "drop", "--force", name]));
    }
    again.bring_all(&images, &site);
    restore(&site, &["-D", "child"]).succeeded();
    site.counts();
    site.end();
}
