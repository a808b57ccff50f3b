//! What holds for every store, and what a directory leaves behind.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::image::pb;

fn pipe_data(pipe_id: u32, bytes: u32) -> pb::PipeDataEntry {
    pb::PipeDataEntry { pipe_id, bytes, ..Default::default() }
}

fn round_trip(write: &dyn Store, read: impl Fn() -> Box<dyn Store>) {
    let tree = [
        pb::PstreeEntry { pid: 7, threads: vec![7, 8], ..Default::default() },
        pb::PstreeEntry { pid: 9, ppid: 7, threads: vec![9], ..Default::default() },
    ];
    write.write_all(ImageKind::Pstree, None, &tree).unwrap();
    write.write_one(ImageKind::Ids, 7, &pb::TaskKobjIdsEntry { vm_id: 1, ..Default::default() }).unwrap();
    let mut pipes = write.create(ImageKind::PipesData, None).unwrap();
    for (id, content) in [(1, &b"abc"[..]), (2, b""), (3, b"defgh")] {
        pipes.entry(&pipe_data(id, content.len() as u32)).unwrap();
        pipes.extra(content).unwrap();
    }
    pipes.finish().unwrap();
    write.create_raw("pages-1.img").unwrap().write_all(&[5; 4096]).unwrap();
    write
        .write_one(ImageKind::Inventory, None, &pb::InventoryEntry { img_version: 2, ..Default::default() })
        .unwrap();
    write.commit().unwrap();

    let read = read();
    assert_eq!(read.read_all::<pb::PstreeEntry>(ImageKind::Pstree, None).unwrap(), tree);
    assert_eq!(read.need_one::<pb::TaskKobjIdsEntry>(ImageKind::Ids, 7).unwrap().vm_id, 1);
    let pipes = read.read_all_with_extra::<pb::PipeDataEntry>(ImageKind::PipesData, None).unwrap();
    let contents: Vec<&[u8]> = pipes.iter().map(|(_, content)| &content[..]).collect();
    assert_eq!(contents, [&b"abc"[..], b"", b"defgh"]);
    assert!(read.open(ImageKind::Mm, 7).unwrap().is_none());
    assert!(matches!(read.need_one::<pb::MmEntry>(ImageKind::Mm, 7), Err(ImageError::Absent { .. })));
    assert!(matches!(
        read.read_one::<pb::PstreeEntry>(ImageKind::Pstree, None),
        Err(ImageError::MoreThanOne { .. })
    ));
    let (mut rest, left) = read.open(ImageKind::Pstree, None).unwrap().unwrap().into_payload();
    let mut bytes = Vec::new();
    rest.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, left);
    assert_eq!(
        read.names().unwrap(),
        ["ids-7.img", "inventory.img", "pages-1.img", "pipes-data.img", "pstree.img"]
    );
}

#[test]
fn memory_gives_back_what_was_written() {
    let store = MemStore::new();
    let other = store.clone();
    round_trip(&store, || Box::new(other.clone()));
}

#[test]
fn a_directory_gives_back_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let store = DirStore::for_dump(dir.path()).unwrap();
    round_trip(&store, || Box::new(DirStore::open(dir.path()).unwrap()));
    drop(store);
    for entry in fs::read_dir(dir.path()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
    }
    assert!(dir.path().join("inventory.img").exists());
}

#[test]
fn what_is_withdrawn_cannot_be_restored() {
    let dir = tempfile::tempdir().unwrap();
    let store = DirStore::for_dump(dir.path()).unwrap();
    let memory = MemStore::new();
    for store in [&store as &dyn Store, &memory] {
        store.write_one(ImageKind::Pstree, None, &pb::PstreeEntry::default()).unwrap();
        store.write_one(ImageKind::Inventory, None, &pb::InventoryEntry::default()).unwrap();
        store.commit().unwrap();
        assert!(store.exists(ImageKind::Inventory, None).unwrap());
        store.withdraw().unwrap();
        assert!(!store.exists(ImageKind::Inventory, None).unwrap());
    }
    drop(store);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn an_image_not_written_to_its_end_prevents_commit() {
    let dir = tempfile::tempdir().unwrap();
    let store = DirStore::for_dump(dir.path()).unwrap();
    store.write_one(ImageKind::Inventory, None, &pb::InventoryEntry::default()).unwrap();
    drop(store.create(ImageKind::Pstree, None).unwrap());
    assert!(matches!(store.commit(), Err(ImageError::Unfinished { .. })));
    drop(store);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_full_disk_is_named() {
    // /dev/full stands for it: every write says ENOSPC.
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let path = Path::new("images/pstree.img");
    let mut entries = EntryWriter::new(BufWriter::new(full), ImageKind::Pstree, path).unwrap();
    entries.entry(&pb::PstreeEntry::default()).unwrap();
    let error = entries.flush().unwrap_err();
    assert_eq!(error.to_string(), "write images/pstree.img");
    assert!(matches!(error, ImageError::Io { source, .. } if source.raw_os_error() == Some(libc::ENOSPC)));
}

#[test]
fn names_do_not_leave_the_store() {
    let store = MemStore::new();
    let long = "x".repeat(256);
    for name in ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\0b", &long] {
        assert!(matches!(store.create_raw(name), Err(ImageError::Name { .. })), "{name:?}");
    }
}

#[test]
fn what_is_no_regular_file_is_no_image() {
    let dir = tempfile::tempdir().unwrap();
    nix::unistd::mkfifo(&dir.path().join("pstree.img"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let store = DirStore::open(dir.path()).unwrap();
    let error = store.read_all::<pb::PstreeEntry>(ImageKind::Pstree, None).unwrap_err();
    assert!(matches!(error, ImageError::Io { .. }), "{error:?}");
}
