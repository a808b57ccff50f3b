//! What follows the messages of some kinds, as the member `"extra"`.

use std::io::Read;

use prost_reflect::DynamicMessage;
use serde_json::{Map, Value};

use super::{JsonError, Style, decoded, message, not, put, text};
use crate::image::descriptors;
use crate::image::error::ImageError;
use crate::image::framing::EntryReader;
use crate::image::names::Extra;

/// Name of the member.
pub(super) const MEMBER: &str = "extra";

/// A SysV message queue's messages are padded to this, semaphore values too.
const IPC_ALIGN: u64 = 8;
/// A SysV segment's content is padded to this.
const SHM_ALIGN: u64 = 4;

/// A number in `message`, 0 if it is not there.
fn number(message: &DynamicMessage, field: &str) -> u64 {
    let value = message.get_field_by_name(field);
    let value = value.and_then(|value| value.as_u64().or_else(|| value.as_u32().map(u64::from)));
    value.unwrap_or(0)
}

fn flag(message: &DynamicMessage, field: &str) -> bool {
    message.get_field_by_name(field).and_then(|value| value.as_bool()).unwrap_or(false)
}

/// Rounded up, `u64::MAX` where that is not possible (no image is so large).
fn padded(len: u64, align: u64) -> u64 {
    len.checked_next_multiple_of(align).unwrap_or(u64::MAX)
}

/// Length of the bytes that follow `message` without padding, and with it, for the extras
/// that are one run of bytes.
fn run(extra: Extra, message: &DynamicMessage) -> (u64, u64) {
    let plain = |len| (len, len);
    match extra {
        Extra::PipeData => plain(number(message, "bytes")),
        Extra::SkPacket => plain(number(message, "length")),
        Extra::BpfMap => plain(number(message, "keys_bytes") + number(message, "values_bytes")),
        Extra::TcpStream => plain(number(message, "inq_len") + number(message, "outq_len")),
        Extra::IpcShm if flag(message, "in_pagemaps") => plain(0),
        Extra::IpcShm => {
            let size = number(message, "size");
            (size, padded(size, SHM_ALIGN))
        }
        Extra::IpcSem => {
            let size = 2 * number(message, "nsems");
            (size, padded(size, IPC_ALIGN))
        }
        Extra::None | Extra::GhostFile | Extra::IpcMsg => plain(0),
    }
}

/// Reads what follows `message` into `shown`. Says whether chunks of a ghost file follow as
/// entries of their own.
pub(super) fn read<R: Read>(
    reader: &mut EntryReader<R>,
    extra: Extra,
    message: &DynamicMessage,
    style: Style,
    shown: &mut Map<String, Value>,
) -> Result<bool, ImageError> {
    let value = match extra {
        Extra::None => return Ok(false),
        Extra::GhostFile => {
            let chunk = message.has_field_by_name("len");
            let chunks = chunk || flag(message, "chunks");
            if chunk || !chunks {
                let len = if chunk { number(message, "len") } else { reader.left() };
                if style.payload {
                    let bytes = reader.extra(len)?;
                    shown.insert(MEMBER.to_owned(), text::base64(&bytes).into());
                } else {
                    reader.skip(len)?;
                }
            }
            return Ok(chunks);
        }
        Extra::IpcMsg => read_messages(reader, message, style)?,
        _ => {
            let (len, padded) = run(extra, message);
            if !style.payload {
                reader.skip(padded)?;
                omitted(if extra == Extra::IpcShm { number(message, "size") } else { len })
            } else {
                let mut bytes = reader.extra(padded)?;
                bytes.truncate(usize::try_from(len).unwrap_or(usize::MAX));
                match extra {
                    Extra::TcpStream => queues(&bytes, number(message, "inq_len")),
                    Extra::IpcSem => {
                        let (values, _) = bytes.as_chunks::<2>();
                        values.iter().map(|value| u16::from_le_bytes(*value)).collect()
                    }
                    _ => text::base64(&bytes).into(),
                }
            }
        }
    };
    shown.insert(MEMBER.to_owned(), value);
    Ok(false)
}

fn omitted(len: u64) -> Value {
    Value::from(format!("... <{len}B>"))
}

fn queues(bytes: &[u8], inq_len: u64) -> Value {
    let inq_len = usize::try_from(inq_len).unwrap_or(usize::MAX).min(bytes.len());
    let (inq, outq) = bytes.split_at(inq_len);
    let mut members = Map::new();
    members.insert("inq".to_owned(), text::base64(inq).into());
    members.insert("outq".to_owned(), text::base64(outq).into());
    Value::Object(members)
}

/// The messages of a SysV queue: a list of head, content, head, content.
fn read_messages<R: Read>(
    reader: &mut EntryReader<R>,
    message: &DynamicMessage,
    style: Style,
) -> Result<Value, ImageError> {
    let Some(descriptor) = descriptors::message("ipc_msg") else {
        return Ok(Value::Null);
    };
    let mut list = Vec::new();
    let mut total = 0;
    for _ in 0..number(message, "qnum") {
        let (path, entry) = (reader.path().to_owned(), reader.entries_read());
        let bytes = reader.inner_bytes()?;
        let head_len = bytes.len() as u64;
        let head = decoded(descriptor.clone(), bytes, path, entry.saturating_sub(1))?;
        let len = number(&head, "msize");
        total += head_len + len;
        if style.payload {
            let mut bytes = reader.extra(padded(len, IPC_ALIGN))?;
            bytes.truncate(usize::try_from(len).unwrap_or(usize::MAX));
            list.push(Value::Object(message::show(&head, style)));
            list.push(text::base64(&bytes).into());
        } else {
            reader.skip(padded(len, IPC_ALIGN))?;
        }
    }
    Ok(if style.payload { Value::Array(list) } else { omitted(total) })
}

/// Appends what follows `message` as `shown` has it. Says whether chunks of a ghost file
/// follow as entries of their own.
pub(super) fn write(
    out: &mut Vec<u8>,
    extra: Extra,
    message: &DynamicMessage,
    shown: Option<&Value>,
    entry: usize,
) -> Result<bool, JsonError> {
    let at = || format!("entries[{entry}].{MEMBER}");
    let base64 = |shown: Option<&Value>| {
        let text = shown.and_then(Value::as_str);
        text.and_then(text::from_base64).ok_or_else(|| not(at(), "base64"))
    };
    let (want, want_padded) = run(extra, message);
    let bytes = match extra {
        Extra::None => return Ok(false),
        Extra::GhostFile => {
            let chunk = message.has_field_by_name("len");
            let chunks = chunk || flag(message, "chunks");
            if chunk || !chunks {
                let bytes = base64(shown)?;
                if chunk {
                    check_length(entry, number(message, "len"), bytes.len())?;
                }
                out.extend(bytes);
            }
            return Ok(chunks);
        }
        Extra::IpcMsg => {
            write_messages(out, message, shown, entry)?;
            return Ok(false);
        }
        Extra::TcpStream => {
            let queue = |name| base64(shown.and_then(|shown| shown.get(name)));
            let (inq, outq) = (queue("inq")?, queue("outq")?);
            check_length(entry, number(message, "inq_len"), inq.len())?;
            [inq, outq].concat()
        }
        Extra::IpcSem => {
            let values = shown.and_then(Value::as_array).ok_or_else(|| not(at(), "a list"))?;
            let mut bytes = Vec::new();
            for value in values {
                let value = value.as_u64().and_then(|value| u16::try_from(value).ok());
                bytes.extend(value.ok_or_else(|| not(at(), "a list of 16-bit numbers"))?.to_le_bytes());
            }
            bytes
        }
        _ => base64(shown)?,
    };
    check_length(entry, want, bytes.len())?;
    out.extend(bytes);
    let padding = usize::try_from(want_padded - want).map_err(|_| JsonError::TooLarge { entry })?;
    out.resize(out.len() + padding, 0);
    Ok(false)
}

fn check_length(entry: usize, want: u64, got: usize) -> Result<(), JsonError> {
    let got = got as u64;
    if want == got { Ok(()) } else { Err(JsonError::ExtraLength { entry, want, got }) }
}

fn write_messages(
    out: &mut Vec<u8>,
    message: &DynamicMessage,
    shown: Option<&Value>,
    entry: usize,
) -> Result<(), JsonError> {
    let at = format!("entries[{entry}].{MEMBER}");
    let list = shown.and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let (pairs, rest) = list.as_chunks::<2>();
    if !rest.is_empty() || pairs.len() as u64 != number(message, "qnum") {
        return Err(not(at, "a head and a content for each of the qnum messages"));
    }
    let descriptor = descriptors::message("ipc_msg").ok_or_else(|| not(&at, "known"))?;
    for [head, content] in pairs {
        let members = head.as_object().ok_or_else(|| not(&at, "a list of heads and contents"))?;
        let head = message::parse(&descriptor, members, &at, None)?;
        let content = content.as_str().and_then(text::from_base64).ok_or_else(|| not(&at, "base64"))?;
        check_length(entry, number(&head, "msize"), content.len())?;
        put(out, &head, entry)?;
        let end = out.len() + content.len().next_multiple_of(8);
        out.extend(content);
        out.resize(end, 0);
    }
    Ok(())
}
