//! Command lines as CRIU reads them, before the typed parser sees them.
//!
//! CRIU uses getopt with permutation: options stand before or after the command, a letter takes its
//! value attached or from the next word, `-v` has an optional value that must be attached, long names
//! may be abbreviated, `--no-NAME` takes a switch back, and the last word on a subject counts. This module
//! walks the words by those rules and gives one plain list; `canonical` turns it into words that leave
//! the typed parser no choice: `--name=value ... -- COMMAND REST`.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
    sync::Arc,
};

use super::known::{self, Command, Found, Known, NotFound, Value};

/// Where an option was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// By the caller.
    Words,
    /// In a configuration file, at a line.
    File(Arc<PathBuf>, usize),
}

impl fmt::Display for Origin {
    /// Empty, or the place with a colon, to stand before a message.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Words => Ok(()),
            Self::File(path, line) => write!(f, "{}:{line}: ", path.display()),
        }
    }
}

/// One option as given.
#[derive(Debug, Clone)]
pub(crate) struct Given {
    /// Which.
    pub(crate) known: &'static Known,
    /// With `--no-` before it.
    pub(crate) negated: bool,
    /// Its value, if any.
    pub(crate) value: Option<OsString>,
    /// Where.
    pub(crate) origin: Origin,
}

/// A command line taken apart.
#[derive(Debug, Default)]
pub(crate) struct Line {
    /// Options, in order.
    pub(crate) options: Vec<Given>,
    /// The command and what follows it; for `image` everything that follows it, options too.
    pub(crate) words: Vec<OsString>,
}

/// A mistake in the command line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub(crate) enum ArgvError {
    #[error("{origin}unknown option {name}{}", near.as_ref().map_or_else(String::new, |near| format!("; did you mean {near}?")))]
    Unknown { origin: Origin, name: String, near: Option<String> },
    #[error("{origin}option --{name} is ambiguous: {}", possible.join(", "))]
    Ambiguous { origin: Origin, name: String, possible: Vec<String> },
    #[error("{origin}option {name} needs a value")]
    NoValue { origin: Origin, name: String },
    #[error("{origin}option --{name} takes no value")]
    NeedlessValue { origin: Origin, name: String },
}

/// Takes the words after the program's name apart.
pub(crate) fn walk(words: impl IntoIterator<Item = OsString>) -> Result<Line, ArgvError> {
    let mut line = Line::default();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let bytes = word.as_bytes();
        if bytes == b"--" {
            line.words.extend(words.by_ref());
        } else if let Some(long) = bytes.strip_prefix(b"--") {
            let given = long_option(long, Origin::Words, &mut words)?;
            line.options.push(given);
        } else if let [b'-', letters @ ..] = bytes
            && !letters.is_empty()
        {
            letters_of(letters, &mut line.options, &mut words)?;
        } else {
            let verbatim = line.words.is_empty() && bytes == Command::Image.name().as_bytes();
            line.words.push(word);
            if verbatim {
                line.words.extend(words.by_ref());
            }
        }
    }
    Ok(line)
}

/// Reads `name`, `name=value`, with the value from `rest` where it is required and not attached.
pub(crate) fn long_option(
    text: &[u8],
    origin: Origin,
    rest: &mut dyn Iterator<Item = OsString>,
) -> Result<Given, ArgvError> {
    let (name, attached) = match text.iter().position(|&byte| byte == b'=') {
        Some(at) => {
            let (name, value) = text.split_at(at);
            (name, value.get(1..).map(|value| OsStr::from_bytes(value).to_owned()))
        }
        None => (text, None),
    };
    let name = String::from_utf8_lossy(name).into_owned();
    let Found { known, negated } = match known::find_long(&name) {
        Ok(found) => found,
        Err(NotFound::Unknown) => {
            let commands = Command::ALL.map(Command::name);
            let near = match commands.iter().find(|command| **command == name) {
                Some(command) => Some(format!("the command {command}")),
                None => known::nearest(&name, known::all().map(|known| known.long))
                    .map(|near| format!("--{near}")),
            };
            return Err(ArgvError::Unknown { origin, name: format!("--{name}"), near });
        }
        Err(NotFound::Ambiguous(names)) => {
            let possible = names.iter().map(|name| format!("--{name}")).collect();
            return Err(ArgvError::Ambiguous { origin, name, possible });
        }
    };
    let value = match (known.value, attached) {
        (Value::None, Some(_)) => {
            let name = if negated { format!("no-{}", known.long) } else { known.long.to_owned() };
            return Err(ArgvError::NeedlessValue { origin, name });
        }
        (Value::Required, None) => match rest.next() {
            Some(next) => Some(next),
            None => {
                return Err(ArgvError::NoValue { origin, name: format!("--{}", known.long) });
            }
        },
        (_, attached) => attached,
    };
    Ok(Given { known, negated, value, origin })
}

/// Reads one word of letters: `-vv`, `-t5`, `-dSt`.
fn letters_of(
    letters: &[u8],
    options: &mut Vec<Given>,
    rest: &mut dyn Iterator<Item = OsString>,
) -> Result<(), ArgvError> {
    let mut letters = letters;
    while let [letter, after @ ..] = letters {
        let origin = Origin::Words;
        let Some(known) = known::find_short(*letter) else {
            let name = format!("-{}", char::from(*letter).escape_default());
            return Err(ArgvError::Unknown { origin, name, near: None });
        };
        let attached = (!after.is_empty()).then(|| OsString::from_vec(after.to_vec()));
        let value = match (known.value, attached) {
            (Value::None, _) => {
                options.push(Given { known, negated: false, value: None, origin });
                letters = after;
                continue;
            }
            (Value::Required, None) => match rest.next() {
                Some(next) => Some(next),
                None => {
                    let name = format!("-{}", char::from(*letter));
                    return Err(ArgvError::NoValue { origin, name });
                }
            },
            (_, attached) => attached,
        };
        // `-vv` is the letter v with the value "v"; `verbosity` below counts it.
        options.push(Given { known, negated: false, value, origin });
        break;
    }
    Ok(())
}

/// How much is logged when nobody says.
pub(crate) const DEFAULT_VERBOSITY: u8 = 2;
/// More than this makes no difference.
pub(crate) const MAX_VERBOSITY: u8 = 4;

/// Adds up all `-v`, `-vv`, `-v4`, `--verbosity`.
///
/// A value that is no number means the default level: callers have been seen writing `-verbosity=0`, which getopt
/// reads as `-v` with the value `erbosity=0`.
pub(crate) fn verbosity(options: &[Given]) -> u8 {
    let mut level = DEFAULT_VERBOSITY;
    for given in options.iter().filter(|given| given.known.long == "verbosity") {
        level = match given.value.as_ref().map(|value| value.as_bytes()) {
            None => level.saturating_add(1),
            Some(more) if more.first() == Some(&b'v') => {
                level.saturating_add(u8::try_from(more.len().saturating_add(1)).unwrap_or(u8::MAX))
            }
            Some(number) => std::str::from_utf8(number)
                .ok()
                .and_then(|text| text.parse::<u32>().ok())
                .map_or(DEFAULT_VERBOSITY, |n| u8::try_from(n).unwrap_or(u8::MAX)),
        };
    }
    level.min(MAX_VERBOSITY)
}

/// The options that count in the end: a switch taken back is gone, unless it is on by default.
pub(crate) fn settle(options: Vec<Given>) -> Vec<Given> {
    let mut settled: Vec<Given> = Vec::with_capacity(options.len());
    for given in options {
        if given.known.value == Value::None {
            settled.retain(|other| other.known.canonical() != given.known.canonical());
        }
        if !given.negated || given.known.on_by_default {
            settled.push(given);
        }
    }
    settled
}

/// Words for the typed parser.
pub(crate) fn canonical(options: &[Given], words: &[OsString]) -> Vec<OsString> {
    let mut out = Vec::with_capacity(options.len() + words.len() + 2);
    for given in options {
        if matches!(given.known.long, "verbosity") {
            continue;
        }
        let mut word = OsString::from(if given.negated { "--no-" } else { "--" });
        word.push(given.known.canonical());
        if let Some(value) = &given.value {
            word.push("=");
            word.push(value);
        }
        out.push(word);
    }
    out.push(format!("--verbosity={}", verbosity(options)).into());
    out.push("--".into());
    out.extend(words.iter().cloned());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split_whitespace().map(OsString::from).collect()
    }

    fn rewritten(text: &str) -> String {
        match walk(words(text)) {
            Ok(line) => {
                let settled = settle(line.options);
                canonical(&settled, &line.words)
                    .iter()
                    .map(|word| word.to_string_lossy().into_owned())
                    .collect::<Vec<_>>()
                    .join(" ")
            }
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn spellings() {
        for (given, wanted) in [
            ("dump -t 5", "--tree=5 --verbosity=2 -- dump"),
            ("-t5 dump", "--tree=5 --verbosity=2 -- dump"),
            ("--tree 5 dump -R", "--tree=5 --leave-running --verbosity=2 -- dump"),
            ("dump --tree=5 --shell-j", "--tree=5 --shell-job --verbosity=2 -- dump"),
            ("-v dump", "--verbosity=3 -- dump"),
            ("dump -vv", "--verbosity=4 -- dump"),
            ("dump -vvvv", "--verbosity=4 -- dump"),
            ("dump -v4", "--verbosity=4 -- dump"),
            ("dump -v0", "--verbosity=0 -- dump"),
            ("dump --verbosity=1", "--verbosity=1 -- dump"),
            ("dump --verbosity", "--verbosity=3 -- dump"),
            ("dump -verbosity=0", "--verbosity=2 -- dump"),
            ("dump -v4 -v1", "--verbosity=1 -- dump"),
            ("dump -v1 -v", "--verbosity=2 -- dump"),
            ("dump -jRt 7", "--shell-job --leave-running --tree=7 --verbosity=2 -- dump"),
            ("dump -j -j --no-shell-job", "--verbosity=2 -- dump"),
            ("dump --no-shell-job -j", "--shell-job --verbosity=2 -- dump"),
            ("dump --ghost-fiemap", "--ghost-fiemap --verbosity=2 -- dump"),
            ("dump --no-ghost-fiemap", "--no-ghost-fiemap --verbosity=2 -- dump"),
            ("dump --no-ghost-fiemap --ghost-fiemap", "--ghost-fiemap --verbosity=2 -- dump"),
            ("restore --daemon", "--restore-detached --verbosity=2 -- restore"),
            ("restore -d --no-daemon", "--verbosity=2 -- restore"),
            ("restore --cpu-cap none", "--cpu-cap --verbosity=2 -- restore none"),
            ("restore --cpu-cap=none", "--cpu-cap=none --verbosity=2 -- restore"),
            ("restore --exec-cmd -- ls -l", "--exec-cmd --verbosity=2 -- restore ls -l"),
            ("-v image show -v f", "--verbosity=3 -- image show -v f"),
            ("dump -t", "option -t needs a value"),
            ("dump --tree", "option --tree needs a value"),
            ("dump -q", "unknown option -q"),
            ("dump --bogus=1", "unknown option --bogus"),
            ("dump --shell-job=1", "option --shell-job takes no value"),
            ("dump --no-shell-job=1", "option --no-shell-job takes no value"),
            ("dump --ver", "option --ver is ambiguous: --version, --verbosity"),
            ("dump -", "--verbosity=2 -- dump -"),
        ] {
            assert_eq!(rewritten(given), wanted, "{given}");
        }
    }
}
