//! A directory has one complete snapshot whatever happens to those who write it, and nothing of strangers.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, lchown, symlink};
use std::path::Path;

use super::*;

/// What becomes of a process at a change that it is about to make to a directory.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// It goes on.
    None,
    /// It is killed after so many more: none of those that follow is made.
    Killed(usize),
    /// After so many more one fails.
    Error(usize),
}

thread_local! {
    static FAULT: Cell<Fault> = const { Cell::new(Fault::None) };
}

pub(super) fn next() -> Result<(), Errno> {
    let (now, result) = match FAULT.get() {
        Fault::None => (Fault::None, Ok(())),
        Fault::Killed(0) => (Fault::Killed(0), Err(Errno::EINTR)),
        Fault::Error(0) => (Fault::None, Err(Errno::ENOSPC)),
        Fault::Killed(n) => (Fault::Killed(n - 1), Ok(())),
        Fault::Error(n) => (Fault::Error(n - 1), Ok(())),
    };
    FAULT.set(now);
    result
}

const OLD: &[&str] =
    &["core-1.img", "core-2.img", "core-3.img", "inventory.img", "pages-1.img", "tty-info.img"];
const NEW: &[&str] = &["core-1.img", "core-7.img", "inventory.img", "pages-1.img", "pages-2.img"];

/// A dump with images that all have the same content; what became of it.
fn dump(dir: &Path, names: &[&str], content: &str) -> Result<(), ImageError> {
    let store = DirStore::for_dump(dir)?;
    for name in names {
        store.create_raw(name)?.write_all(content.as_bytes()).unwrap();
    }
    store.link_parent(&Path::new("..").join(content))?;
    store.commit()?;
    store.finish()
}

/// A directory of images, and beside it those of the parents.
#[derive(Debug)]
struct Place(tempfile::TempDir, PathBuf);

impl Place {
    fn path(&self) -> &Path {
        &self.1
    }
}

/// A directory with a snapshot and files of the user.
fn with_old() -> Place {
    let base = tempfile::tempdir().unwrap();
    let images = base.path().join("images");
    let dir = Place(base, images);
    for name in ["images", "old", "new"] {
        fs::create_dir(dir.0.path().join(name)).unwrap();
    }
    fs::write(dir.path().join("notes"), "mine").unwrap();
    fs::write(dir.path().join("other.img"), "mine").unwrap();
    fs::write(dir.path().join("stats-dump"), "mine").unwrap();
    dump(dir.path(), OLD, "old").unwrap();
    dir
}

/// Every file below a directory, with its content or target.
fn picture(dir: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.insert(format!("{name}/"), String::new());
            found.extend(
                picture(&entry.path()).into_iter().map(|(inner, text)| (format!("{name}/{inner}"), text)),
            );
        } else if kind.is_symlink() {
            found.insert(name, format!("-> {}", fs::read_link(entry.path()).unwrap().display()));
        } else {
            found.insert(name, fs::read_to_string(entry.path()).unwrap());
        }
    }
    found
}

/// The content of the images that a restore would see, which must all be of one snapshot and all of it.
fn restorable(dir: &Path) -> String {
    let store = DirStore::open(dir).unwrap();
    let mut contents = BTreeMap::new();
    for name in store.names().unwrap() {
        if name.ends_with(".img") && name != "other.img" {
            let mut text = String::new();
            store.open_raw(&name).unwrap().unwrap().read_to_string(&mut text).unwrap();
            contents.insert(name, text);
        }
    }
    let content = contents.get(INVENTORY).expect("an inventory").clone();
    let wanted = if content == "old" { OLD } else { NEW };
    assert_eq!(contents.keys().map(String::as_str).collect::<Vec<_>>(), wanted);
    assert!(contents.values().all(|text| *text == content), "a mixture: {contents:?}");
    let parent = store.parent().unwrap().expect("a parent").identity();
    let meta = fs::metadata(dir.parent().unwrap().join(&content)).unwrap();
    assert_eq!(parent, Some((meta.dev(), meta.ino())));
    content
}

#[test]
fn nothing_is_touched_before_commit() {
    let dir = with_old();
    let before = picture(dir.path());
    fs::hard_link(dir.path().join("core-1.img"), dir.path().join("kept")).unwrap();
    let store = DirStore::for_dump(dir.path()).unwrap();
    for name in NEW {
        store.create_raw(name).unwrap().write_all(b"new").unwrap();
        assert_eq!(restorable(dir.path()), "old");
    }
    drop(store);
    fs::remove_file(dir.path().join("kept")).unwrap();
    assert_eq!(picture(dir.path()), before);
}

#[test]
fn a_commit_leaves_one_snapshot_and_what_is_no_image() {
    let dir = with_old();
    dump(dir.path(), NEW, "new").unwrap();
    assert_eq!(restorable(dir.path()), "new");
    let names: Vec<String> = picture(dir.path()).into_keys().collect();
    let mut wanted = [NEW, &["notes", "other.img", "parent", "stats-dump"]].concat();
    wanted.sort_unstable();
    assert_eq!(names, wanted);
}

#[test]
fn killed_at_each_change_of_a_commit_and_of_what_clears_up() {
    let (mut olds, mut news) = (0, 0);
    for n in 0.. {
        let dir = with_old();
        FAULT.set(Fault::Killed(n));
        let dumped = dump(dir.path(), NEW, "new");
        let survived = FAULT.get() != Fault::Killed(0);
        FAULT.set(Fault::None);
        let found = restorable(dir.path());
        assert!(dumped.is_err() || found == "new", "change {n}");
        *(if found == "old" { &mut olds } else { &mut news }) += 1;
        let left = picture(dir.path());
        for m in 0.. {
            FAULT.set(Fault::Killed(m));
            let begun = DirStore::for_dump(dir.path());
            let cleared = begun.is_ok();
            drop(begun);
            FAULT.set(Fault::None);
            assert_eq!(restorable(dir.path()), found, "changes {n} and {m}: {left:?}");
            if cleared {
                break;
            }
        }
        drop(DirStore::for_dump(dir.path()).unwrap());
        assert!(picture(dir.path()).keys().all(|name| !name.starts_with('.')), "{:?}", picture(dir.path()));
        if survived {
            break;
        }
    }
    assert!(olds > 10 && news > 5, "{olds} {news}");
}

#[test]
fn a_change_that_fails_leaves_the_old_snapshot() {
    let (mut failed, mut done) = (0, 0);
    for n in 0.. {
        let dir = with_old();
        let before = picture(dir.path());
        FAULT.set(Fault::Error(n));
        let dumped = dump(dir.path(), NEW, "new");
        let survived = FAULT.get() != Fault::None;
        FAULT.set(Fault::None);
        if dumped.is_err() {
            failed += 1;
            assert_eq!(restorable(dir.path()), "old", "change {n}");
            let mut after = picture(dir.path());
            // What could not be removed is removed by the next one.
            after.retain(|name, _| !name.starts_with(".crtool-new/"));
            assert_eq!(after, before, "change {n}");
        } else {
            done += 1;
            assert_eq!(restorable(dir.path()), "new", "change {n}");
        }
        if survived {
            break;
        }
    }
    assert!(failed > 10 && done > 2, "{failed} {done}");
}

#[test]
fn what_is_withdrawn_gives_the_place_back() {
    let dir = with_old();
    let before = picture(dir.path());
    let store = DirStore::for_dump(dir.path()).unwrap();
    for name in NEW {
        store.create_raw(name).unwrap().write_all(b"new").unwrap();
    }
    store.link_parent(Path::new("../new")).unwrap();
    store.commit().unwrap();
    assert_eq!(restorable(dir.path()), "new");
    store.withdraw().unwrap();
    assert_eq!(restorable(dir.path()), "old");
    drop(store);
    assert_eq!(picture(dir.path()), before);
}

fn is_busy<T: Debug>(result: Result<T, ImageError>, wanted: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, ImageError::Busy { .. }) && error.to_string().contains(wanted), "{error}");
}

#[test]
fn one_dump_at_a_time() {
    let dir = with_old();
    let first = DirStore::for_dump(dir.path()).unwrap();
    first.create_raw("core-1.img").unwrap();
    let own = format!("another dump writes into it (pid {})", std::process::id());
    is_busy(DirStore::for_dump(dir.path()), &own);
    assert!(dir.path().join(".crtool-new/core-1.img").exists(), "the first one's images");
    drop(first);
    dump(dir.path(), NEW, "new").unwrap();
}

#[test]
fn a_snapshot_that_is_read_stays() {
    let dir = with_old();
    // One that has begun before the restore does not replace what it reads; one that comes after it does not begin.
    let early = DirStore::for_dump(dir.path()).unwrap();
    for name in NEW {
        early.create_raw(name).unwrap().write_all(b"new").unwrap();
    }
    let reader = DirStore::open(dir.path()).unwrap();
    let second = DirStore::open(dir.path()).unwrap();
    is_busy(early.commit(), "the snapshot in it is being restored, or has just been dumped (pid ");
    drop(early);
    drop(second);
    is_busy(DirStore::for_dump(dir.path()), "the snapshot in it is being restored");
    assert!(reader.open_raw("core-3.img").unwrap().is_some());
    drop(reader);
    dump(dir.path(), NEW, "new").unwrap();
    assert_eq!(restorable(dir.path()), "new");
}

#[test]
fn a_restore_does_not_begin_in_the_middle() {
    let dir = tempfile::tempdir().unwrap();
    let store = DirStore::for_dump(dir.path()).unwrap();
    store.create_raw(INVENTORY).unwrap();
    is_busy(DirStore::open(dir.path()), "a dump into it is under way");
    store.commit().unwrap();
    assert!(
        !dir.path().join(".crtool-new").exists(),
        "others may take the directory away as soon as all is there"
    );
    drop(DirStore::open(dir.path()).unwrap());
    is_busy(DirStore::for_dump(dir.path()), "has just been dumped");
    store.withdraw().unwrap();
    drop(store);
    assert!(DirStore::open(dir.path()).unwrap().open_raw(INVENTORY).unwrap().is_none());
}

/// Restores while dumps take turns: each sees one whole snapshot.
#[test]
fn readers_and_writers_at_once() {
    let dir = with_old();
    let path = dir.path();
    let reads = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2)
            .map(|n| {
                scope.spawn(move || {
                    for round in 0..60 {
                        let names = if (round + n) % 2 == 0 { NEW } else { OLD };
                        let content = if names == NEW { "new" } else { "old" };
                        match dump(path, names, content) {
                            Ok(()) | Err(ImageError::Busy { .. }) => {}
                            Err(error) => panic!("{error:?}"),
                        }
                    }
                })
            })
            .collect();
        while writers.iter().any(|writer| !writer.is_finished()) {
            match DirStore::open(path) {
                Ok(_) => {
                    restorable_or_busy(path);
                    reads.fetch_add(1, Ordering::Relaxed);
                }
                Err(ImageError::Busy { .. }) => {}
                Err(error) => panic!("{error:?}"),
            }
        }
    });
    assert!(reads.into_inner() > 10);
    restorable(path);
}

fn restorable_or_busy(dir: &Path) {
    if !matches!(DirStore::open(dir), Err(ImageError::Busy { .. })) {
        // Not even a reader that has to wait for another is refused for ever.
        let _ = std::panic::catch_unwind(|| restorable(dir)).map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
            assert!(text.contains("Busy"), "{text}");
        });
    }
}

#[test]
fn a_directory_by_the_name_of_an_image_is_in_the_way() {
    let dir = with_old();
    fs::remove_file(dir.path().join("core-3.img")).unwrap();
    fs::create_dir(dir.path().join("core-3.img")).unwrap();
    let before = picture(dir.path());
    let error = dump(dir.path(), NEW, "new").unwrap_err();
    assert!(error.to_string().ends_with("/core-3.img"), "{error}");
    assert_eq!(picture(dir.path()), before);
}

#[test]
fn a_dump_writes_through_no_link() {
    let dir = tempfile::tempdir().unwrap();
    let victim = dir.path().join("victim");
    fs::write(&victim, "safe").unwrap();
    let images = dir.path().join("images");
    fs::create_dir(&images).unwrap();
    fs::create_dir(dir.path().join("new")).unwrap();
    for name in ["core-1.img", "pages-1.img", "inventory.img"] {
        symlink(&victim, images.join(name)).unwrap();
    }
    fs::hard_link(&victim, images.join("core-7.img")).unwrap();
    symlink("/nonexistent/made", images.join("pages-2.img")).unwrap();
    dump(&images, NEW, "new").unwrap();
    assert_eq!(restorable(&images), "new");
    assert_eq!(fs::read_to_string(&victim).unwrap(), "safe");
    assert_eq!(fs::metadata(&victim).unwrap().nlink(), 1);
    // A directory of ours is not taken from somebody who has made a link of its name.
    for name in [".crtool-new", ".crtool-leaving", ".crtool-previous", ".crtool-trash"] {
        symlink(dir.path(), images.join(name)).unwrap();
        assert!(dump(&images, NEW, "new").is_err(), "{name}");
        fs::remove_file(images.join(name)).unwrap();
    }
    assert!(victim.exists());
}

/// Somebody else than root.
const STRANGER: u32 = 12_345;

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: needs root");
    }
    root
}

/// What is said of it when a restore, or a dump, meets this.
fn refusals(dir: &Path) -> [Option<String>; 2] {
    let read = || {
        let store = DirStore::open(dir)?;
        for name in store.names()?.iter().filter(|name| name.ends_with(".img")) {
            store.open_raw(name)?;
        }
        store.parent().map(drop)
    };
    [read().err(), DirStore::for_dump(dir).err()].map(|error| error.map(|error| error.to_string()))
}

#[test]
fn nothing_of_strangers() {
    if !is_root() {
        return;
    }
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let own = |path: &Path, uid| lchown(path, Some(uid), None).unwrap();
    let base = tempfile::tempdir().unwrap();
    mode(base.path(), 0o755);
    let dir = base.path().join("images");
    fs::create_dir(&dir).unwrap();
    fs::create_dir(base.path().join("old")).unwrap();
    dump(&dir, OLD, "old").unwrap();
    let core = dir.join("core-2.img");
    assert_eq!(refusals(&dir), [None, None]);

    type Step<'a> = Box<dyn Fn() + 'a>;
    let images = dir.display();
    let core_path = core.display();
    // What is done, what restore says, what dump says, and how it is put right.
    let rows: Vec<(Step<'_>, Option<String>, Option<String>, Step<'_>)> = vec![
        (
            Box::new(|| own(&dir, STRANGER)),
            Some(format!(
                "images directory {images} is owned by uid 12345 and has mode 0755: it must be owned by root"
            )),
            Some(format!("images directory {images} is owned by uid 12345")),
            Box::new(|| own(&dir, 0)),
        ),
        (
            Box::new(|| mode(&dir, 0o775)),
            Some(format!(
                "images directory {images} is owned by uid 0 and has mode 0775: nobody but its owner"
            )),
            Some("mode 0775".into()),
            Box::new(|| mode(&dir, 0o755)),
        ),
        (
            Box::new(|| mode(&dir, 0o757)),
            Some("mode 0757".into()),
            Some("mode 0757".into()),
            Box::new(|| mode(&dir, 0o755)),
        ),
        (Box::new(|| mode(&dir, 0o1777)), None, None, Box::new(|| mode(&dir, 0o755))),
        (
            Box::new(|| own(&core, STRANGER)),
            Some(format!(
                "image {core_path} is owned by uid 12345 and has mode 0600: it must be owned by root"
            )),
            None,
            Box::new(|| own(&core, 0)),
        ),
        (
            Box::new(|| mode(&core, 0o660)),
            Some(format!("image {core_path} is owned by uid 0 and has mode 0660")),
            None,
            Box::new(|| mode(&core, 0o644)),
        ),
        (
            Box::new(|| {
                mode(&dir, 0o1777);
                fs::hard_link(&core, base.path().join("second")).unwrap();
            }),
            Some(format!("image {core_path} is owned by uid 0 and has mode 0644: it has more names")),
            None,
            Box::new(|| {
                mode(&dir, 0o755);
                fs::remove_file(base.path().join("second")).unwrap();
            }),
        ),
        (
            Box::new(|| {
                fs::rename(&core, dir.join("moved")).unwrap();
                symlink("moved", &core).unwrap();
            }),
            Some(format!("open {core_path}")),
            None,
            Box::new(|| fs::rename(dir.join("moved"), &core).unwrap()),
        ),
        (
            Box::new(|| own(&base.path().join("old"), STRANGER)),
            Some("images/parent is owned by uid 12345".into()),
            None,
            Box::new(|| own(&base.path().join("old"), 0)),
        ),
        (
            Box::new(|| {
                fs::create_dir(dir.join(".crtool-new")).unwrap();
                own(&dir.join(".crtool-new"), STRANGER);
            }),
            None,
            Some(".crtool-new is owned by uid 12345".into()),
            Box::new(|| drop(fs::remove_dir(dir.join(".crtool-new")))),
        ),
    ];
    for (number, (do_it, read, write, undo)) in rows.iter().enumerate() {
        do_it();
        let said = refusals(&dir);
        for (said, wanted) in said.iter().zip([read, write]) {
            match (said, wanted) {
                (None, None) => {}
                (Some(said), Some(wanted)) if said.contains(wanted.as_str()) => {}
                other => panic!("row {number}: {other:?}"),
            }
        }
        let (read, write) = (
            DirStore::open_checked(&dir, OwnerCheck::Off).map(|store| {
                let names = store.names().unwrap();
                for name in names.iter().filter(|name| name.ends_with(".img")) {
                    assert!(store.open_raw(name).unwrap().is_some());
                }
                store.parent().unwrap();
            }),
            DirStore::for_dump_checked(&dir, OwnerCheck::Off, Sync::Never),
        );
        assert!(read.is_ok() && write.is_ok(), "row {number}: {read:?} {write:?}");
        drop(write);
        undo();
    }
    assert_eq!(refusals(&dir), [None, None]);
}

#[test]
fn a_path_that_strangers_have_led_elsewhere() {
    if !is_root() {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let theirs = base.path().join("theirs");
    let images = base.path().join("images");
    fs::create_dir(&theirs).unwrap();
    fs::create_dir_all(images.join("deeper")).unwrap();
    symlink(&images, theirs.join("absolute")).unwrap();
    symlink("../images/./deeper/..", theirs.join("relative")).unwrap();
    symlink("relative", theirs.join("twice")).unwrap();
    for name in ["absolute", "relative", "twice", "absolute/deeper", "relative/deeper/../deeper"] {
        let path = theirs.join(name);
        drop(DirStore::for_dump(&path).unwrap_or_else(|error| panic!("{name}: {error:?}")));
    }
    for link in ["absolute", "relative"] {
        lchown(theirs.join(link), Some(STRANGER), None).unwrap();
    }
    for name in ["absolute", "relative", "twice", "absolute/deeper", "relative/deeper/../deeper"] {
        let path = theirs.join(name);
        let error = DirStore::for_dump(&path).unwrap_err().to_string();
        assert!(
            error.starts_with("symbolic link /") && error.contains("owned by uid 12345"),
            "{name}: {error}"
        );
        drop(DirStore::for_dump_checked(&path, OwnerCheck::Off, Sync::Never).unwrap());
    }
    // Links of /proc lead to what is open.
    let open = File::open(&images).unwrap();
    use std::os::fd::AsRawFd as _;
    let path = format!("/proc/self/fd/{}", open.as_raw_fd());
    drop(DirStore::for_dump(Path::new(&path)).unwrap());
    drop(DirStore::for_dump(&Path::new(&path).join("deeper")).unwrap());
    symlink("loop", base.path().join("loop")).unwrap();
    assert!(DirStore::open(&base.path().join("loop")).is_err());
    assert!(DirStore::open(&base.path().join("images/deeper/none")).is_err());
    assert!(DirStore::open(Path::new("/dev/null")).is_err());
}
