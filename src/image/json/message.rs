//! One message as a JSON object, and back.

use prost::bytes::Bytes;
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};
use prost_reflect::{
    DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, ReflectMessage, UnknownField, Value as Field,
};
use serde_json::{Map, Value};

use super::present::{self, Show};
use super::{JsonError, Style, not, text};
use crate::image::descriptors;

/// Member that keeps the fields that this version does not know.
const UNKNOWN: &str = "unknown_fields";
/// Binary in CRIU's format, but shown as quoted text.
const UNIX_NAME: &str = "images.unix_sk_entry.name";

const PAGEMAP_ENTRY: &str = "images.pagemap_entry";
const PAGES: &str = "nr_pages";
const OLD_PAGES: &str = "compat_nr_pages";

/// The members of `message`, in the order of the field numbers.
pub(super) fn show(message: &DynamicMessage, style: Style) -> Map<String, Value> {
    show_in(message, style, None)
}

/// `outer` is the way of the field that `message` is in.
fn show_in(message: &DynamicMessage, style: Style, outer: Option<Show>) -> Map<String, Value> {
    let mut members = Map::new();
    for (field, value) in message.fields() {
        let way = if style.pretty { present::way(field.full_name()).or(outer) } else { None };
        members.insert(field.name().to_owned(), show_field(&field, value, style, way));
    }
    if message.descriptor().full_name() == PAGEMAP_ENTRY {
        rename_pages(&mut members);
    }
    let unknown: Vec<Value> = message.unknown_fields().map(show_unknown).collect();
    if !unknown.is_empty() {
        members.insert(UNKNOWN.to_owned(), Value::Array(unknown));
    }
    members
}

/// `nr_pages` was a number of 32 bits once; it is `compat_nr_pages` since there is a wider
/// one. Where only the older is there it keeps the name that everybody knows.
fn rename_pages(members: &mut Map<String, Value>) {
    let old = std::mem::take(members);
    let wide = old.contains_key(PAGES);
    for (name, value) in old {
        match name.as_str() {
            OLD_PAGES if !wide => members.insert(PAGES.to_owned(), value),
            _ => members.insert(name, value),
        };
    }
}

/// The field that member `name` of a pagemap entry stands for, see [`rename_pages`].
fn pages_field<'n>(members: &Map<String, Value>, name: &'n str, value: &Value) -> &'n str {
    let narrow = value.as_u64().is_some_and(|pages| u32::try_from(pages).is_ok());
    if name == PAGES && narrow && !members.contains_key(OLD_PAGES) { OLD_PAGES } else { name }
}

fn show_field(field: &FieldDescriptor, value: &Field, style: Style, way: Option<Show>) -> Value {
    match value {
        Field::List(list) => {
            if let Some(Show::Ip) = way {
                let words: Option<Vec<u32>> = list.iter().map(Field::as_u32).collect();
                if let Some(address) = words.and_then(|words| present::address(&words)) {
                    return Value::Array(vec![address.into()]);
                }
            }
            list.iter().map(|one| show_field(field, one, style, way)).collect()
        }
        Field::Message(message) => Value::Object(show_in(message, style, way)),
        Field::EnumNumber(number) => {
            let name = match field.kind() {
                Kind::Enum(names) => names.get_value(*number).map(|value| value.name().to_owned()),
                _ => None,
            };
            name.map_or_else(|| Value::from(*number), Value::from)
        }
        Field::Bytes(bytes) if field.full_name() == UNIX_NAME => text::quoted(bytes).into(),
        Field::Bytes(bytes) if descriptors::is_text(field) => text::lossless(bytes).into(),
        Field::Bytes(bytes) => text::base64(bytes).into(),
        Field::U32(number) => show_number(u64::from(*number), way),
        Field::U64(number) => show_number(*number, way),
        Field::I32(number) => Value::from(*number),
        Field::I64(number) => Value::from(*number),
        Field::Bool(value) => Value::from(*value),
        Field::F32(number) => Value::from(*number),
        Field::F64(number) => Value::from(*number),
        Field::String(text) => Value::from(text.as_str()),
        // No message has maps.
        Field::Map(_) => Value::Null,
    }
}

fn show_number(number: u64, way: Option<Show>) -> Value {
    way.map_or_else(|| Value::from(number), |way| way.number(number))
}

/// `{"field": 99, "varint": 5}`, or with `fixed32`, `fixed64`, `bytes` or, for what has no
/// simpler form, `raw` (key and value as they were).
fn show_unknown(field: &UnknownField) -> Value {
    let mut encoded = Vec::new();
    field.encode(&mut encoded);
    let mut rest = encoded.as_slice();
    let (name, value) = match (decode_key(&mut rest), field.wire_type()) {
        (Ok(_), WireType::Varint) => ("varint", decode_varint(&mut rest).ok().map(Value::from)),
        (Ok(_), WireType::SixtyFourBit) => {
            ("fixed64", rest.try_into().ok().map(u64::from_le_bytes).map(Value::from))
        }
        (Ok(_), WireType::ThirtyTwoBit) => {
            ("fixed32", rest.try_into().ok().map(u32::from_le_bytes).map(Value::from))
        }
        (Ok(_), WireType::LengthDelimited) => {
            ("bytes", decode_varint(&mut rest).ok().map(|_| text::base64(rest).into()))
        }
        _ => ("raw", None),
    };
    let (name, value) = match value {
        Some(value) => (name, value),
        None => ("raw", text::base64(&encoded).into()),
    };
    let mut members = Map::new();
    members.insert("field".to_owned(), field.number().into());
    members.insert(name.to_owned(), value);
    Value::Object(members)
}

/// The message that `members` show, without looking at the member `skip`. `at` says where.
pub(super) fn parse(
    descriptor: &MessageDescriptor,
    members: &Map<String, Value>,
    at: &str,
    skip: Option<&str>,
) -> Result<DynamicMessage, JsonError> {
    let mut message = DynamicMessage::new(descriptor.clone());
    for (name, value) in members {
        if Some(name.as_str()) == skip {
            continue;
        }
        let at = format!("{at}.{name}");
        if name == UNKNOWN {
            parse_unknown(&mut message, value, &at)?;
            continue;
        }
        let name =
            if descriptor.full_name() == PAGEMAP_ENTRY { pages_field(members, name, value) } else { name };
        let field = descriptor
            .get_field_by_name(name)
            .ok_or_else(|| JsonError::NoField { at: at.clone(), message: descriptor.name().to_owned() })?;
        let parsed =
            if field.is_list() { parse_list(&field, value, &at)? } else { parse_one(&field, value, &at)? };
        message.try_set_field(&field, parsed).map_err(|_| not(at, "a value of this field"))?;
    }
    Ok(message)
}

fn parse_list(field: &FieldDescriptor, value: &Value, at: &str) -> Result<Field, JsonError> {
    let list = value.as_array().ok_or_else(|| not(at, "a list"))?;
    if let (Some(Show::Ip), [Value::String(text)]) = (present::way(field.full_name()), list.as_slice())
        && let Some(words) = present::address_words(text)
    {
        return Ok(Field::List(words.into_iter().map(Field::U32).collect()));
    }
    let members =
        list.iter().enumerate().map(|(number, one)| parse_one(field, one, &format!("{at}[{number}]")));
    Ok(Field::List(members.collect::<Result<_, _>>()?))
}

fn parse_one(field: &FieldDescriptor, value: &Value, at: &str) -> Result<Field, JsonError> {
    let unsigned = || {
        let from_text = |text: &str| match present::way(field.full_name()) {
            Some(way) => way.parse(text),
            None => present::parse_number(text),
        };
        let number = value.as_u64().or_else(|| from_text(value.as_str()?));
        number.ok_or_else(|| not(at, "a number or one of its names"))
    };
    let signed = || {
        let number = value.as_i64().or_else(|| value.as_str()?.parse().ok());
        number.ok_or_else(|| not(at, "a whole number"))
    };
    let string = || value.as_str().ok_or_else(|| not(at, "text"));
    Ok(match field.kind() {
        Kind::Message(descriptor) => {
            let members = value.as_object().ok_or_else(|| not(at, "an object"))?;
            Field::Message(parse(&descriptor, members, at, None)?)
        }
        Kind::Enum(names) => {
            let named = value.as_str().and_then(|name| names.get_value_by_name(name));
            let number = match named {
                Some(value) => Some(value.number()),
                None => value.as_i64().and_then(|number| i32::try_from(number).ok()),
            };
            Field::EnumNumber(number.ok_or_else(|| not(at, "a value of the enumeration"))?)
        }
        Kind::Uint32 | Kind::Fixed32 => {
            Field::U32(u32::try_from(unsigned()?).map_err(|_| not(at, "a number of 32 bits"))?)
        }
        Kind::Uint64 | Kind::Fixed64 => Field::U64(unsigned()?),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => {
            Field::I32(i32::try_from(signed()?).map_err(|_| not(at, "a number of 32 bits"))?)
        }
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Field::I64(signed()?),
        Kind::Bool => Field::Bool(value.as_bool().ok_or_else(|| not(at, "true or false"))?),
        Kind::Bytes if field.full_name() == UNIX_NAME => bytes(text::from_quoted(string()?)),
        Kind::Bytes if descriptors::is_text(field) => bytes(text::from_lossless(string()?)),
        Kind::Bytes => bytes(text::from_base64(string()?).ok_or_else(|| not(at, "base64"))?),
        Kind::String => Field::String(string()?.to_owned()),
        Kind::Float | Kind::Double => return Err(not(at, "a field that can be read")),
    })
}

fn bytes(bytes: Vec<u8>) -> Field {
    Field::Bytes(Bytes::from(bytes))
}

fn parse_unknown(message: &mut DynamicMessage, value: &Value, at: &str) -> Result<(), JsonError> {
    let want = || not(at, "a list of unknown fields");
    for field in value.as_array().ok_or_else(want)? {
        let number = field.get("field").and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
        let number = number.filter(|n| (1..1 << 29).contains(n)).ok_or_else(want)?;
        let of = |name| field.get(name);
        let base64 = |value: &Value| value.as_str().and_then(text::from_base64);
        let mut encoded = Vec::new();
        if let Some(raw) = of("raw") {
            encoded = base64(raw).ok_or_else(want)?;
        } else if let Some(varint) = of("varint") {
            encode_key(number, WireType::Varint, &mut encoded);
            encode_varint(varint.as_u64().ok_or_else(want)?, &mut encoded);
        } else if let Some(fixed) = of("fixed64") {
            encode_key(number, WireType::SixtyFourBit, &mut encoded);
            encoded.extend(fixed.as_u64().ok_or_else(want)?.to_le_bytes());
        } else if let Some(fixed) = of("fixed32") {
            encode_key(number, WireType::ThirtyTwoBit, &mut encoded);
            let fixed = fixed.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(want)?;
            encoded.extend(fixed.to_le_bytes());
        } else {
            let content = of("bytes").and_then(base64).ok_or_else(want)?;
            encode_key(number, WireType::LengthDelimited, &mut encoded);
            encode_varint(content.len() as u64, &mut encoded);
            encoded.extend(content);
        }
        // Merged as bytes: a field known by now becomes that field.
        prost::Message::merge(message, encoded.as_slice()).map_err(|_| want())?;
    }
    Ok(())
}
