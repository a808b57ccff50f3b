//! Images that somebody without privileges has made, or may change: they decide what a restored task may do.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown, symlink},
};

use crate::site::{NOBODY, Site, Verdict, clear, fail, others};

/// Whatever of a snapshot somebody else owns or may write, it is refused, and no task is made; with `--no-owner-check` it is
/// taken.
pub fn of_somebody_else(site: &mut Site) -> Verdict {
    let mut tree = site.play("bare", "1")?;
    site.dumped(&mut tree)?;
    let images = site.path("images");
    let inventory = images.join("inventory.img");
    let kept = site.path("kept.img");
    let own = |path: &std::path::Path, uid: u32| chown(path, Some(uid), Some(uid)).map_err(|e| e.to_string());
    let mode = |path: &std::path::Path, mode: u32| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|e| e.to_string())
    };
    let refused = |what: &str| {
        site.run(&["restore", "-d"]).refused("--no-owner-check").and_then(|()| {
            if others().is_empty() { Ok(()) } else { fail(format!("{what}: refused, but tasks are left")) }
        })
    };
    own(&images, NOBODY)?;
    refused("their directory")?;
    own(&images, 0)?;
    mode(&images, 0o777)?;
    refused("a directory that all may write")?;
    mode(&images, 0o755)?;
    own(&inventory, NOBODY)?;
    refused("their image")?;
    own(&inventory, 0)?;
    mode(&inventory, 0o666)?;
    refused("an image that all may write")?;
    mode(&inventory, 0o600)?;
    // A link of theirs, to an image of ours.
    fs::rename(&inventory, &kept).map_err(|e| e.to_string())?;
    symlink(&kept, &inventory).map_err(|e| e.to_string())?;
    std::os::unix::fs::lchown(&inventory, Some(NOBODY), Some(NOBODY)).map_err(|e| e.to_string())?;
    refused("their link")?;
    fs::remove_file(&inventory).map_err(|e| e.to_string())?;
    fs::rename(&kept, &inventory).map_err(|e| e.to_string())?;
    own(&images, NOBODY)?;
    site.run(&["restore", "-d", "--no-owner-check"]).succeeded("restore with --no-owner-check")?;
    clear(&[]);
    own(&images, 0)?;
    site.run(&["restore", "-d"]).succeeded("restore of what is ours again")
}
