//! `crtool image`: looks into image files, with the words and the output of `crit`.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Cursor, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use clap::{Parser, ValueEnum};
use serde_json::Value;

use crate::image::explore::{self, What};
use crate::image::framing::EntryReader;
use crate::image::json::{self, Style};
use crate::image::{DirStore, ImageError};

/// Look into image files
#[derive(Debug, Parser)]
#[command(name = "crtool image", bin_name = "crtool image", disable_version_flag = true)]
enum Command {
    /// Convert an image to JSON
    Decode {
        /// Many lines with indents, and some numbers in the form people read
        #[arg(long)]
        pretty: bool,
        /// Image to be decoded [default: standard input]
        #[arg(short, long = "in", value_name = "IN")]
        input: Option<PathBuf>,
        /// Where to put the JSON [default: standard output]
        #[arg(short, long = "out", value_name = "OUT")]
        output: Option<PathBuf>,
    },
    /// Convert JSON to an image
    Encode {
        /// JSON to be encoded [default: standard input]
        #[arg(short, long = "in", value_name = "IN")]
        input: Option<PathBuf>,
        /// Where to put the image [default: standard output]
        #[arg(short, long = "out", value_name = "OUT")]
        output: Option<PathBuf>,
    },
    /// Show an image as people read it
    Show {
        /// Leave out the bytes that follow messages
        #[arg(long)]
        nopl: bool,
        /// Image
        #[arg(value_name = "IN")]
        input: PathBuf,
    },
    /// Say what image a file is and how many entries it has
    Info {
        /// Image
        #[arg(value_name = "IN")]
        input: PathBuf,
    },
    /// Explore a directory of images
    X {
        /// Directory
        dir: PathBuf,
        /// What to show: tasks, open files, mappings, pages
        what: Explored,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Explored {
    Ps,
    Fds,
    Mems,
    Rss,
}

/// Runs the words that follow `image` on the command line.
pub fn run(words: &[OsString]) -> anyhow::Result<()> {
    let words = std::iter::once(OsStr::new("crtool image")).chain(words.iter().map(OsString::as_os_str));
    let command = match Command::try_parse_from(words) {
        Ok(command) => command,
        Err(error) if !error.use_stderr() => return quiet_pipe(write!(io::stdout(), "{}", error.render())),
        Err(error) => return Err(usage(&error)),
    };
    match command {
        Command::Decode { pretty, input, output } => {
            let image = decode(input.as_deref(), Style { pretty, payload: true })?;
            put_json(output.as_deref(), &image, pretty)
        }
        Command::Show { nopl, input } => {
            let image = decode(Some(&input), Style { pretty: true, payload: !nopl })?;
            put_json(None, &image, true)
        }
        Command::Info { input } => {
            let (from, len, path) = open(Some(&input))?;
            put_json(None, &json::info(from, len, &path)?, true)
        }
        Command::Encode { input, output } => encode(input.as_deref(), output.as_deref()),
        Command::X { dir, what } => {
            let what = match what {
                Explored::Ps => What::Tasks,
                Explored::Fds => What::Files,
                Explored::Mems => What::Mappings,
                Explored::Rss => What::Pages,
            };
            let text = explore::explore(&DirStore::look(&dir)?, what)?;
            put(None, |to| to.write_all(text.as_bytes()))
        }
    }
}

/// What is wrong with the words, in one line.
fn usage(error: &clap::Error) -> anyhow::Error {
    let text = error.to_string();
    let what = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
    let missing: Vec<&str> =
        text.lines().skip(1).take_while(|line| line.starts_with("  ")).map(str::trim).collect();
    let what = what.strip_prefix("error: ").unwrap_or(what);
    if what.starts_with("Look into") {
        return anyhow!("say what to do: decode, encode, show, info or x");
    }
    anyhow!("{}", [what, &missing.join(" ")].join(" ").trim())
}

fn decode(input: Option<&Path>, style: Style) -> anyhow::Result<Value> {
    let (from, len, path) = open(input)?;
    Ok(json::decode(from, len, &path, style)?)
}

/// The bytes of an image, their number, and its name for messages.
fn open(input: Option<&Path>) -> anyhow::Result<(Box<dyn Read>, u64, PathBuf)> {
    let path = input.unwrap_or(Path::new("standard input")).to_owned();
    let failed = |action| {
        let path = path.clone();
        move |source| ImageError::Io { action, path, source }
    };
    let mut from: Box<dyn Read> = match input {
        None => Box::new(io::stdin().lock()),
        Some(input) => {
            let file = File::open(input).map_err(failed("open"))?;
            let metadata = file.metadata().map_err(failed("open"))?;
            if metadata.is_file() {
                return Ok((Box::new(BufReader::new(file)), metadata.len(), path));
            }
            Box::new(file)
        }
    };
    // A stream: its length is known at its end, but look first whether it is an image at all.
    let mut bytes = Vec::new();
    from.by_ref().take(8).read_to_end(&mut bytes).map_err(failed("read"))?;
    EntryReader::new(bytes.as_slice(), bytes.len() as u64, &path).read_magic()?;
    from.read_to_end(&mut bytes).map_err(failed("read"))?;
    let len = bytes.len() as u64;
    Ok((Box::new(Cursor::new(bytes)), len, path))
}

fn encode(input: Option<&Path>, output: Option<&Path>) -> anyhow::Result<()> {
    let name = input.unwrap_or(Path::new("standard input")).display().to_string();
    let json: Value = match input {
        None => serde_json::from_reader(BufReader::new(io::stdin().lock())),
        Some(input) => {
            let file = File::open(input).with_context(|| format!("open {name}"))?;
            serde_json::from_reader(BufReader::new(file))
        }
    }
    .with_context(|| format!("read JSON from {name}"))?;
    let image = json::encode(&json).with_context(|| format!("encode {name}"))?;
    put(output, |to| to.write_all(&image))
}

fn put_json(output: Option<&Path>, json: &Value, pretty: bool) -> anyhow::Result<()> {
    put(output, |mut to| {
        json::write(&mut to, json, pretty)?;
        // As `crit` does: a newline for a terminal or a pipe, none in a file.
        if output.is_none() { to.write_all(b"\n") } else { Ok(()) }
    })
}

/// Lets `write` fill the file `output`, or standard output. A reader that has gone away is
/// no failure.
fn put(output: Option<&Path>, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> anyhow::Result<()> {
    let Some(path) = output else {
        let mut to = BufWriter::new(io::stdout().lock());
        return quiet_pipe(write(&mut to).and_then(|()| to.flush()));
    };
    let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    let mut to = BufWriter::new(file);
    write(&mut to).and_then(|()| to.flush()).with_context(|| format!("write {}", path.display()))
}

fn quiet_pipe(written: io::Result<()>) -> anyhow::Result<()> {
    match written {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.context("write to standard output"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(words: &[&str]) -> String {
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        format!("{:#}", run(&words).unwrap_err())
    }

    #[test]
    fn mistakes_take_one_line() {
        for words in [
            &[][..],
            &["nothing"],
            &["show"],
            &["decode", "--nopl"],
            &["x", ".", "nothing"],
            &["show", "/nonexistent"],
            &["info", "/dev/zero"],
            &["encode", "-i", "/dev/null"],
            &["x", "/nonexistent", "ps"],
            &["decode", "-i", "/proc/self/exe"],
        ] {
            let error = error(words);
            assert!(!error.is_empty() && !error.contains('\n'), "{words:?}: {error}");
        }
        assert!(error(&["show", "/nonexistent"]).starts_with("open /nonexistent: No such file"));
    }
}
