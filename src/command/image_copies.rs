//! `crtool image-cache save` and `load`: a snapshot of the cache as an images directory, and back.
//!
//! What is in both may be restored once only, and nothing can see to that: whoever saves or loads is told so.

use std::{
    fs::{self, DirBuilder},
    os::unix::fs::DirBuilderExt as _,
    path::Path,
    sync::Arc,
};

use anyhow::{Context as _, bail};

use crate::{
    image::{
        DirStore, DirSync, ImageKind, Store, TypedStore,
        copy::{copy_images, is_image},
        pb as images,
    },
    remote::{
        client::{RemoteDump, RemoteSnapshot},
        pb,
    },
    settings::OwnerCheck,
};

/// Where the parent of a saved snapshot is, in its directory.
const PARENT: &str = "parent-images";

/// Puts a copy of a snapshot into `dir`, which has no images yet.
pub(super) fn save(
    work_dir: &Path,
    name: &str,
    dir: &Path,
    drop: bool,
    check: OwnerCheck,
) -> anyhow::Result<()> {
    let snapshot = RemoteSnapshot::take_to_save(work_dir, name)?;
    let made = make_dir(dir)?;
    let saved = save_all(&snapshot, dir, check).and_then(|store| {
        let place = fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
        // The snapshot may not be what it was: then the copy is none of it.
        snapshot.saved(&place.to_string_lossy(), drop).inspect_err(|_| {
            if let Err(error) = store.withdraw() {
                tracing::error!("{:#}", anyhow::Error::from(error));
            }
        })?;
        Ok(())
    });
    if saved.is_err() {
        let _ = fs::remove_dir_all(dir.join(PARENT));
        if made {
            let _ = fs::remove_dir_all(dir);
        }
    } else if !drop {
        tracing::warn!(
            "snapshot {name} is in {} and in the cache: restore only one of them, and drop the other",
            dir.display()
        );
    }
    saved.with_context(|| format!("save of snapshot {name} in {}", dir.display()))
}

/// Makes `dir` where its parent is; whether it was not there.
fn make_dir(dir: &Path) -> anyhow::Result<bool> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(e).with_context(|| format!("make directory {}", dir.display())),
    }
}

fn save_all(from: &dyn Store, dir: &Path, check: OwnerCheck) -> anyhow::Result<DirStore> {
    if let Some(old) = DirStore::look(dir)?.names()?.into_iter().find(|name| is_image(name)) {
        bail!("there are images in {} already ({old}); choose another directory (-D)", dir.display());
    }
    let parent = from.parent()?;
    if let Some(parent) = &parent {
        let place = dir.join(PARENT);
        make_dir(&place)?;
        save_all(&**parent, &place, check)?;
    }
    let into = DirStore::for_dump_checked(dir, check, DirSync::BeforeCommit)?;
    copy_images(from, &into)?;
    if parent.is_some() {
        into.link_parent(Path::new(PARENT))?;
    }
    into.commit()?;
    Ok(into)
}

/// Brings the images in `dir` into the cache as a snapshot that can be restored.
pub(super) fn load(work_dir: &Path, name: &str, dir: &Path, check: OwnerCheck) -> anyhow::Result<()> {
    let place = fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    let mut chain: Vec<Arc<dyn Store>> = vec![Arc::new(DirStore::open_checked(dir, check)?)];
    while let Some(parent) = chain.last().map(|child| child.parent()).transpose()?.flatten() {
        chain.push(parent);
    }
    let mut parent = String::new();
    for (generation, store) in chain.iter().enumerate().rev() {
        let name = if generation == 0 { name.to_owned() } else { format!("{name} (parent {generation})") };
        load_one(work_dir, &name, &parent, &**store, &place, generation > 0)
            .with_context(|| format!("load of {} as snapshot {name}", store.path_of("").display()))?;
        parent = name;
    }
    tracing::warn!(
        "the images are in {} and in the cache as {name}: restore only one of them",
        dir.display()
    );
    Ok(())
}

fn load_one(
    work_dir: &Path,
    name: &str,
    parent: &str,
    from: &dyn Store,
    place: &Path,
    survives: bool,
) -> anyhow::Result<()> {
    let root =
        from.read_all::<images::PstreeEntry>(ImageKind::Pstree, None)?.first().map_or(0, |root| root.pid);
    let core = from.read_one::<images::CoreEntry>(ImageKind::Core, u64::from(root))?;
    let comm = core.and_then(|core| core.tc).map(|tc| String::from_utf8_lossy(&tc.comm).into_owned());
    let mut expected_bytes = 0;
    for image in from.names()?.iter().filter(|name| is_image(name)) {
        expected_bytes += from.open_raw(image)?.map_or(0, |image| image.len());
    }
    let begin = pb::SnapshotBegin {
        name: name.to_owned(),
        parent: parent.to_owned(),
        pid: i32::try_from(root).unwrap_or(0),
        comm: comm.unwrap_or_default(),
        source_survives: survives,
        expected_bytes,
        ..pb::SnapshotBegin::default()
    };
    let into = RemoteDump::load(work_dir, begin, &place.to_string_lossy())?;
    copy_images(from, &into)
        .and_then(|_| into.commit())
        .and_then(|()| into.confirm(survives))
        .inspect_err(|error| into.give_up(&format!("load failed: {error:#}")))?;
    Ok(())
}
