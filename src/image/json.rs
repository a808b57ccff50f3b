//! Images as JSON, the same that `crit` shows, and back.
//!
//! `decode` and `encode` are each other's inverse for every image, also for what this
//! version does not know: unknown fields are kept in `"unknown_fields"`, text that is not
//! UTF-8 is written as a Python bytes literal. What follows a message is its `"extra"`.

mod extra;
mod message;
mod present;
pub(super) mod text;
mod write;

use std::io::Read;
use std::path::{Path, PathBuf};

use prost::Message;
use prost_reflect::{DynamicMessage, MessageDescriptor, ReflectMessage};
use serde_json::{Map, Value};

use super::error::ImageError;
use super::framing::{EntryReader, magic_bytes};
use super::names::{Extra, Family, ImageKind};
use super::{descriptors, framing, wire};

pub use write::write;

/// How an image is shown.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// Addresses, flags and the like as people read them.
    pub pretty: bool,
    /// The bytes that follow messages; else only their number.
    pub payload: bool,
}

/// JSON that is no image.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// No image of that name.
    #[error("unknown magic {0:?}")]
    Magic(String),
    /// A member is absent or of another type.
    #[error("{at} is not {want}")]
    Not {
        /// Where: `entries[3].reg.pos`.
        at: String,
        /// What should be there.
        want: &'static str,
    },
    /// A member that the message has not.
    #[error("{at}: {message} has no such field")]
    NoField {
        /// Where.
        at: String,
        /// The message.
        message: String,
    },
    /// A field that must be there is not.
    #[error("entries[{entry}]: {message}.{field} is missing")]
    Missing {
        /// Number of the entry, from 0.
        entry: usize,
        /// Message the field belongs to.
        message: &'static str,
        /// The field.
        field: &'static str,
    },
    /// The bytes that follow a message are not as many as it says.
    #[error("entries[{entry}].extra has {got} bytes, not {want} as the entry says")]
    ExtraLength {
        /// Number of the entry, from 0.
        entry: usize,
        /// What the message says.
        want: u64,
        /// What is there.
        got: u64,
    },
    /// More than an entry can hold.
    #[error("entries[{entry}] is larger than 4 GiB")]
    TooLarge {
        /// Number of the entry, from 0.
        entry: usize,
    },
}

fn not(at: impl Into<String>, want: &'static str) -> JsonError {
    JsonError::Not { at: at.into(), want }
}

/// Reads an image of `len` bytes from `from` into JSON; `path` is for the errors.
pub fn decode(from: impl Read, len: u64, path: &Path, style: Style) -> Result<Value, ImageError> {
    let mut reader = EntryReader::new(from, len, path);
    let kind = reader.read_magic()?;
    let mut entries = Vec::new();
    let mut chunks = false;
    while let Some(descriptor) = descriptor_at(kind, reader.entries_read(), chunks) {
        let Some(message) = next(&mut reader, descriptor)? else {
            break;
        };
        let mut shown = message::show(&message, style);
        if kind.extra() != Extra::None {
            chunks |= extra::read(&mut reader, kind.extra(), &message, style, &mut shown)?;
        }
        entries.push(Value::Object(shown));
    }
    let mut image = Map::new();
    image.insert("magic".into(), kind.magic_name().into());
    image.insert("entries".into(), Value::Array(entries));
    Ok(Value::Object(image))
}

/// Counts the entries of an image: its kind, and how many follow the head if it has one.
pub fn info(from: impl Read, len: u64, path: &Path) -> Result<Value, ImageError> {
    let shown = decode(from, len, path, Style { pretty: false, payload: false })?;
    let magic = shown.get("magic").cloned().unwrap_or_default();
    let kind = magic.as_str().and_then(ImageKind::by_magic_name);
    let entries = shown.get("entries").and_then(Value::as_array).map_or(0, Vec::len);
    let heads = usize::from(kind.is_some_and(|kind| kind.head_message().is_some()));
    let mut info = Map::new();
    info.insert("magic".into(), magic);
    info.insert("count".into(), entries.saturating_sub(heads).into());
    Ok(Value::Object(info))
}

/// The bytes of the image that `json` shows.
pub fn encode(json: &Value) -> Result<Vec<u8>, JsonError> {
    let magic = json.get("magic").and_then(Value::as_str).ok_or_else(|| not("magic", "a name"))?;
    let kind = ImageKind::by_magic_name(magic).filter(|kind| kind.family() != Family::Raw);
    let kind = kind.ok_or_else(|| JsonError::Magic(magic.to_owned()))?;
    let entries = json.get("entries").and_then(Value::as_array);
    let entries = entries.ok_or_else(|| not("entries", "a list"))?;

    let mut bytes = magic_bytes(kind);
    let mut chunks = false;
    for (number, entry) in entries.iter().enumerate() {
        let at = format!("entries[{number}]");
        let Some(descriptor) = descriptor_at(kind, number, chunks) else {
            break;
        };
        let members = entry.as_object().ok_or_else(|| not(&at, "an object"))?;
        let skip = (kind.extra() != Extra::None).then_some(extra::MEMBER);
        let message = message::parse(&descriptor, members, &at, skip)?;
        put(&mut bytes, &message, number)?;
        if kind.extra() != Extra::None {
            let shown = members.get(extra::MEMBER);
            chunks |= extra::write(&mut bytes, kind.extra(), &message, shown, number)?;
        }
    }
    Ok(bytes)
}

/// The message of entry `number`; `chunks` says that the entries before began a ghost file
/// in chunks.
fn descriptor_at(kind: ImageKind, number: usize, chunks: bool) -> Option<MessageDescriptor> {
    let name = if chunks { Some("ghost_chunk_entry") } else { kind.message_at(number) };
    descriptors::message(name?)
}

/// The next entry, whatever fields it lacks.
fn next<R: Read>(
    reader: &mut EntryReader<R>,
    descriptor: MessageDescriptor,
) -> Result<Option<DynamicMessage>, ImageError> {
    let (path, entry) = (reader.path().to_owned(), reader.entries_read());
    let Some(bytes) = reader.next_bytes()? else {
        return Ok(None);
    };
    decoded(descriptor, bytes, path, entry).map(Some)
}

fn decoded(
    descriptor: MessageDescriptor,
    bytes: &[u8],
    path: PathBuf,
    entry: usize,
) -> Result<DynamicMessage, ImageError> {
    // What is missing is shown as missing here.
    framing::survey(wire::table(descriptor.full_name()), bytes, &path, entry)?;
    let message = descriptor.name().to_owned();
    DynamicMessage::decode(descriptor, bytes).map_err(|source| ImageError::Decode {
        path,
        entry,
        message,
        source,
    })
}

/// Appends `message` as an entry, if all its required fields are there.
fn put(bytes: &mut Vec<u8>, message: &DynamicMessage, entry: usize) -> Result<(), JsonError> {
    let encoded = message.encode_to_vec();
    if let Some(wire::Missing { message, field }) =
        wire::survey(wire::table(message.descriptor().full_name()), &encoded).missing
    {
        return Err(JsonError::Missing { entry, message, field });
    }
    let size = u32::try_from(encoded.len()).map_err(|_| JsonError::TooLarge { entry })?;
    bytes.extend(size.to_le_bytes());
    bytes.extend(encoded);
    Ok(())
}
