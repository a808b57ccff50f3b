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

/// Characters that change how what stands around them is shown, or are not to be seen: control characters, those that
/// change the direction of text, and those without a width.
pub fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}'
        )
}

/// What somebody else says, as one line of at most `most` bytes.
pub fn one_line(text: &str, most: usize) -> String {
    let spaced = text.chars().map(|c| if c == '\n' { ' ' } else { c });
    let mut line: String = spaced.filter(|c| !is_hidden(*c)).collect();
    shorten(&mut line, most);
    line
}

/// Cuts a line for people to at most `most` bytes, behind a word if there is one near, and shows that it was cut.
pub fn shorten(text: &mut String, most: usize) {
    const CUT: &str = "...";
    if text.len() <= most {
        return;
    }
    let mut end = most.saturating_sub(CUT.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let in_word = !text.get(end..).is_some_and(|rest| rest.starts_with(char::is_whitespace));
    text.truncate(end);
    if let Some(word) = text.rfind(char::is_whitespace).filter(|word| in_word && *word > end / 2) {
        text.truncate(word);
    }
    if most >= CUT.len() {
        text.push_str(CUT);
    }
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
    fn what_others_say_is_one_line() {
        assert_eq!(one_line("why\nError: \x1b[31mno\u{202e}\r", 100), "why Error: [31mno");
        assert_eq!(one_line(&"x\n".repeat(1000), 10).len(), 10);
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
    fn lines_are_cut_behind_words() {
        let cut = |text: &str, most| {
            let mut text = text.to_owned();
            shorten(&mut text, most);
            text
        };
        assert_eq!(cut("all of it", 9), "all of it");
        assert_eq!(cut("a reason that is long", 16), "a reason that...");
        assert_eq!(cut(&"x".repeat(20), 10), "xxxxxxx...");
        assert_eq!(cut(&"ä".repeat(20), 10), "äää...");
        assert_eq!(cut("xxxx", 2), "");
        for c in ['\u{202e}', '\u{200b}', '\u{feff}', '\n', '\u{2066}'] {
            assert!(is_hidden(c));
        }
        assert!("aä日 -/".chars().all(|c| !is_hidden(c)));
    }

    #[test]
    fn a_refusal_is_one_short_line() {
        let error = check_image(&"\n/".repeat(5000)).unwrap_err();
        assert!(error.text.len() < 300 && !error.text.contains('\n'), "{error}");
    }
}
