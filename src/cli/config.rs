//! Configuration files: one option per line, spelled as on the command line without its dashes.
//!
//! ```text
//! # comment
//! shell-job
//! work-dir "/home/user/my \"work\" directory"   # comment
//! no-restore-sibling
//! verbosity 4
//! ```
//!
//! They are read before the command line, which therefore has the last word: first the
//! machine's, then the user's, then the one that the environment names, then the ones given with
//! `--config`. Our own names come first; a file of CRIU is read where ours does not exist.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    io::{self, Read as _},
    iter,
    os::{
        fd::AsFd as _,
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::ownership::{self, Names, OwnershipError};

use super::{
    argv::{ArgvError, Given, Origin, long_option},
    known::{self, Value},
};

/// A configuration file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub(crate) enum ConfigError {
    #[error("read of configuration file {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Option(#[from] ArgvError),
    #[error("{origin}more words than one option and its value")]
    Surplus { origin: Origin },
    #[error("{origin}the quote is not closed")]
    Quote { origin: Origin },
}

/// Options of the default files that exist.
///
/// One that may not be read (HOME is often another user's under sudo) is worth a warning, no more.
pub(crate) fn defaults(warnings: &mut Vec<String>) -> Result<Vec<Given>, ConfigError> {
    let mut options = Vec::new();
    let home = env::var_os("HOME").map(PathBuf::from);
    let machine = ["/etc/crtool/default.conf", "/etc/criu/default.conf"].map(PathBuf::from);
    options.extend(first_of(&machine, warnings)?);
    if let Some(home) = home {
        let user = [home.join(".crtool/default.conf"), home.join(".criu/default.conf")];
        options.extend(first_of(&user, warnings)?);
    }
    for name in ["CRTOOL_CONFIG_FILE", "CRIU_CONFIG_FILE"] {
        if let Some(path) = env::var_os(name).filter(|path| !path.is_empty()) {
            options.extend(file(Path::new(&path))?);
            break;
        }
    }
    Ok(options)
}

/// Options of the first of these files that exists.
fn first_of(paths: &[PathBuf], warnings: &mut Vec<String>) -> Result<Vec<Given>, ConfigError> {
    for path in paths {
        match read_own(path, warnings) {
            Ok(Some(bytes)) => return parse(path, &bytes),
            Ok(None) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                warnings.push(format!("configuration file {}: {error}", path.display()));
            }
            Err(source) => return Err(ConfigError::Read { path: path.clone(), source }),
        }
    }
    Ok(Vec::new())
}

/// Reads a file, unless it is somebody else's or others may write to it: under sudo HOME can be another user's.
fn read_own(path: &Path, warnings: &mut Vec<String>) -> io::Result<Option<Vec<u8>>> {
    let mut file = fs::File::open(path)?;
    if let Err(OwnershipError::Stranger { owner, mode, .. }) =
        ownership::check_file(file.as_fd(), "configuration file", path, Names::Ours)
    {
        warnings.push(format!(
            "configuration file {} is not read: it is owned by uid {owner} and has mode {mode:04o}; only root or the \
             caller may be able to write to it",
            path.display()
        ));
        return Ok(None);
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// Options of one file that must exist.
pub(crate) fn file(path: &Path) -> Result<Vec<Given>, ConfigError> {
    let bytes = fs::read(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse(path, &bytes)
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<Given>, ConfigError> {
    let path = Arc::new(path.to_owned());
    let mut options = Vec::new();
    for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        let origin = Origin::File(Arc::clone(&path), index + 1);
        let words = split(line).map_err(|()| ConfigError::Quote { origin: origin.clone() })?;
        let mut words = words.into_iter();
        let Some(first) = words.next() else { continue };
        // A line is one option, so a value belongs to it even where it would have to be attached.
        let name = known::find_long(&first.to_string_lossy());
        let optional = name.is_ok_and(|found| found.known.value == Value::Optional);
        let given = if optional && let Some(value) = words.next() {
            let joined = [first.as_bytes(), b"=", value.as_bytes()].concat();
            long_option(&joined, origin.clone(), &mut iter::empty())?
        } else {
            long_option(first.as_bytes(), origin.clone(), &mut words)?
        };
        if words.next().is_some() {
            return Err(ConfigError::Surplus { origin });
        }
        options.push(given);
    }
    Ok(options)
}

/// Words of a line, without comment and quotes.
fn split(line: &[u8]) -> Result<Vec<OsString>, ()> {
    let mut words: Vec<OsString> = Vec::new();
    let mut word: Option<Vec<u8>> = None;
    let mut bytes = line.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => {
                let word = word.get_or_insert_default();
                loop {
                    match bytes.next() {
                        None => return Err(()),
                        Some(b'"') => break,
                        Some(b'\\') if bytes.peek() == Some(&b'"') => word.extend(bytes.next()),
                        Some(byte) => word.push(byte),
                    }
                }
            }
            b'#' => break,
            byte if byte.is_ascii_whitespace() => {
                words.extend(word.take().map(OsString::from_vec));
            }
            byte => word.get_or_insert_default().push(byte),
        }
    }
    words.extend(word.map(OsString::from_vec));
    Ok(words)
}

/// The values of `--config`, in order.
pub(crate) fn named(options: &[Given]) -> impl Iterator<Item = &OsStr> {
    options.iter().filter(|given| given.known.long == "config").filter_map(|given| given.value.as_deref())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8]) -> String {
        match parse(Path::new("f"), text) {
            Ok(options) => options
                .iter()
                .map(|given| {
                    let no = if given.negated { "no-" } else { "" };
                    let value = given.value.as_ref().map_or(String::new(), |value| format!("={value:?}"));
                    format!("{no}{}{value}", given.known.long)
                })
                .collect::<Vec<_>>()
                .join(" "),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn lines() {
        assert_eq!(read(b"shell-job\n\n  # x\nno-restore-sibling # y\n"), "shell-job no-restore-sibling");
        assert_eq!(read(br#"work-dir "/a b/\"c\" \d" # z"#), r#"work-dir="/a b/\"c\" \\d""#);
        assert_eq!(read(b"verbosity 4\nverbosity=1\nverbosity"), r#"verbosity="4" verbosity="1" verbosity"#);
        assert_eq!(read(b"cpu-cap none"), r#"cpu-cap="none""#);
        assert_eq!(read(b"log-file=x\r"), r#"log-file="x""#);
    }

    #[test]
    fn mistakes() {
        assert_eq!(read(b"shell-job\ndump\n"), "f:2: unknown option --dump; did you mean the command dump?");
        assert_eq!(read(b"--shell-job"), "f:1: unknown option ----shell-job; did you mean --shell-job?");
        assert_eq!(read(b"tree"), "f:1: option --tree needs a value");
        assert_eq!(read(b"work-dir a b"), "f:1: more words than one option and its value");
        assert_eq!(read(b"work-dir \"a b"), "f:1: the quote is not closed");
        assert_eq!(read(b"\xff\xfe"), "f:1: unknown option --\u{fffd}\u{fffd}");
    }
}
