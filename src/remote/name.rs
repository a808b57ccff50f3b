//! Which names snapshots and images may have.
//!
//! A snapshot's name is a key and never a path: any text that can be shown in one line will do, also the path
//! of a directory that exists nowhere. An image's name is a file name of CRIU's format.

use super::{Failure, pb::FailCode};

/// Longest name of a snapshot, in bytes.
pub const MAX_SNAPSHOT: usize = 1024;
/// Longest name of an image, in bytes.
pub const MAX_IMAGE: usize = 255;

/// Checks the name of a snapshot.
pub fn check_snapshot(name: &str) -> Result<(), Failure> {
    let why = if name.is_empty() {
        "it is empty"
    } else if name.len() > MAX_SNAPSHOT {
        "it is longer than 1024 bytes"
    } else if name.chars().any(char::is_control) {
        "it has control characters"
    } else {
        return Ok(());
    };
    Err(Failure::new(FailCode::FailName, format!("snapshot name {}: {why}", shown(name))))
}

/// Checks the name of an image: letters, digits, `.`, `_` and `-`, no dot in front.
pub fn check_image(name: &str) -> Result<(), Failure> {
    let why = if name.is_empty() {
        "it is empty"
    } else if name.len() > MAX_IMAGE {
        "it is longer than 255 bytes"
    } else if name.starts_with('.') || name.contains("..") {
        "it could lead elsewhere"
    } else if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        "only letters, digits, '.', '_' and '-' are allowed"
    } else {
        return Ok(());
    };
    Err(Failure::new(FailCode::FailName, format!("image name {}: {why}", shown(name))))
}

/// A hostile name, fit for one line.
fn shown(name: &str) -> String {
    let mut text: String = name.chars().take(64).flat_map(char::escape_default).collect();
    if name.chars().count() > 64 {
        text.push_str("...");
    }
    format!("\"{text}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_snapshots_are_text() {
        for good in ["a", "default", "/var/lib/x/1", "mit Leerzeichen", "日本", "..", &"x".repeat(1024)] {
            assert_eq!(check_snapshot(good), Ok(()), "{good}");
        }
        for bad in ["", "a\nb", "a\0b", "\x1b[2J", &"x".repeat(1025)] {
            assert!(check_snapshot(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_of_images_are_file_names() {
        for good in ["inventory.img", "pages-1.img", "core-12.img", "a", &"x".repeat(255)] {
            assert_eq!(check_image(good), Ok(()), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "../x", ".x", "a..b", "a b", "ä", "a\0", &"x".repeat(256)] {
            assert!(check_image(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_refusal_is_one_short_line() {
        let error = check_image(&"\n/".repeat(5000)).unwrap_err();
        assert!(error.text.len() < 300 && !error.text.contains('\n'), "{error}");
    }
}
