//! Images of another machine: what this one does not have is refused by name, before anything is made.
//!
//! There is one machine only, so its images are changed into what another would have written.

use std::{fs, path::Path, process::Command};

use crate::damage::{name, snapshot};
use crate::reaper::End;
use crate::site::Site;

/// A change of an image, and what the refusal says; nothing when the tree is restored all the same.
struct Change {
    /// Its name begins so.
    image: &'static str,
    /// In the JSON of `crtool image decode`.
    from: &'static str,
    to: &'static str,
    says: Option<&'static str>,
}

const fn refused(image: &'static str, from: &'static str, to: &'static str, says: &'static str) -> Change {
    Change { image, from, to, says: Some(says) }
}

const fn restored(image: &'static str, from: &'static str, to: &'static str) -> Change {
    Change { image, from, to, says: None }
}

const DUMPABLE: &str = "\"dumpable\": 1";

/// Memory protection keys, for a processor without.
const KEYS: &[Change] = &[
    refused("mm-", DUMPABLE, "\"dumpable\": 1, \"pkeys\": 37", "memory protection keys (2, 5) of task"),
    restored("mm-", DUMPABLE, "\"dumpable\": 1, \"pkeys\": 1"),
];

/// The same for one that has them: there are sixteen.
const NO_KEYS: &[Change] =
    &[refused("mm-", DUMPABLE, "\"dumpable\": 1, \"pkeys\": 65536", "map of protection keys")];

pub fn protection_keys(site: &mut Site) -> Result<(), String> {
    let smaps = fs::read_to_string("/proc/self/smaps").map_err(|e| e.to_string())?;
    all(site, if smaps.contains("ProtectionKey:") { NO_KEYS } else { KEYS })
}

fn all(site: &mut Site, changes: &[Change]) -> Result<(), String> {
    let (images, files) = snapshot(site)?;
    for Change { image, from, to, says } in changes {
        let file =
            files.iter().find(|file| name(file).starts_with(image)).ok_or_else(|| format!("no {image}"))?;
        let right = fs::read(file).map_err(|e| e.to_string())?;
        let json = site.dir.join("changed.json");
        convert("decode", file, &json)?;
        let text = fs::read_to_string(&json).map_err(|e| e.to_string())?;
        if !text.contains(from) {
            return Err(format!("{from} is not in {image}: {}", text.chars().take(300).collect::<String>()));
        }
        fs::write(&json, text.replacen(from, to, 1)).map_err(|e| e.to_string())?;
        convert("encode", &json, file)?;
        let run = site.run(&["restore", "-d"], &images)?;
        match says {
            Some(says) => {
                run.failed_cleanly()?;
                if !run.said.contains(says) {
                    return Err(format!("{to}: the reason is not said: {}", run.said));
                }
                site.nothing_left()?;
            }
            None if run.end == End::Exited(0) => site.clear()?,
            None => return Err(format!("{to}: {}", run.said)),
        }
        fs::write(file, right).map_err(|e| e.to_string())?;
    }
    site.restore(&images)?;
    site.finish()
}

/// `crtool image decode` or `encode`.
fn convert(how: &str, from: &Path, to: &Path) -> Result<(), String> {
    let _ = fs::remove_file(to);
    let mut command = Command::new(env!("CARGO_BIN_EXE_crtool"));
    // The reaper takes the status; what counts is the file.
    match command.args(["image", how, "-i"]).arg(from).arg("-o").arg(to).output() {
        Ok(output) if !output.stderr.is_empty() => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        _ if to.exists() => Ok(()),
        _ => Err(format!("crtool image {how} made nothing")),
    }
}
