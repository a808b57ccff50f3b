//! What prost does not check in an encoded message.
//!
//! prost reads an absent `required` field as its default, so an empty core image would come
//! out as a task full of zeros; and a few bytes of a crafted image can stand for a hundred
//! times as much memory. This walks the encoded bytes once, before anything is decoded, by a table
//! that `build.rs` makes: to make it from descriptors at run time took 6 ms of every restore.

use prost::bytes::Buf;
use prost::encoding::{WireType, decode_key, decode_varint};

/// Nesting deeper than this is left to the decoder, which refuses it (prost's limit).
const MAX_DEPTH: usize = 100;

/// Most values (numbers, texts, messages) in one entry. A mapping has ten, so this is enough
/// for 800,000 mappings, twelve times the kernel's default limit; as JSON they take 1 GiB.
pub const VALUES_LIMIT: u64 = 8 << 20;

/// What the walk over an encoded message saw.
#[derive(Debug, Default)]
pub struct Survey {
    /// The first required field found to be absent.
    pub missing: Option<Missing>,
    /// Number of values, at least.
    pub values: u64,
    /// A field of an encoding that none of our messages has: damage.
    pub group: bool,
}

/// A required field that an encoded message lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// Message the field belongs to.
    pub message: &'static str,
    /// The field.
    pub field: &'static str,
}

/// What is to be known of a message type.
#[derive(Debug)]
struct Type {
    full_name: &'static str,
    name: &'static str,
    /// Names of its required fields, 64 at most.
    required: &'static [&'static str],
    /// By field number.
    fields: &'static [Field],
    /// Fields that are not CRIU's, by number less [`EXTENSIONS`].
    extensions: &'static [Field],
}

/// Number of the first field that is not CRIU's but ours. They carry state for which CRIU's messages have no place; CRIU
/// skips them, as protobuf readers do with numbers they do not know.
const EXTENSIONS: usize = 15_000;

impl Type {
    fn field(&self, number: u32) -> Field {
        let number = usize::try_from(number).unwrap_or(usize::MAX);
        let field = match number.checked_sub(EXTENSIONS) {
            Some(number) => self.extensions.get(number),
            None => self.fields.get(number),
        };
        field.copied().unwrap_or(NO_FIELD)
    }
}

#[derive(Debug, Clone, Copy)]
struct Field {
    /// Its place among the required ones.
    required: Option<u8>,
    /// Its type, a message.
    nested: Option<usize>,
    /// Many numbers may lie in one run of bytes.
    packable: bool,
}

const NO_FIELD: Field = Field { required: None, nested: None, packable: false };

include!(concat!(env!("OUT_DIR"), "/wire_types.rs"));

/// What is known of one message type.
#[derive(Debug, Clone, Copy)]
pub struct Table(usize);

/// Finds the table of a message type (`images.core_entry`).
pub fn table(full_name: &str) -> Option<Table> {
    TYPES.binary_search_by_key(&full_name, |t| t.full_name).ok().map(Table)
}

/// Walks over `bytes`, an encoded message of this type. Bytes that are no valid protobuf are left to the decoder,
/// which refuses them.
pub fn survey(table: Option<Table>, bytes: &[u8]) -> Survey {
    let mut survey = Survey::default();
    if let Some(Table(index)) = table {
        walk(index, bytes, 0, &mut survey);
    }
    survey
}

fn walk(index: usize, mut bytes: &[u8], depth: usize, survey: &mut Survey) {
    let Some(t) = TYPES.get(index).filter(|_| depth <= MAX_DEPTH) else { return };
    let mut seen = 0u64;
    while bytes.has_remaining() {
        let Ok((number, wire)) = decode_key(&mut bytes) else { return };
        let field = t.field(number);
        if let Some(bit) = field.required {
            seen |= 1 << bit;
        }
        survey.values += 1;
        let skip = match wire {
            WireType::Varint => decode_varint(&mut bytes).map(|_| 0),
            WireType::ThirtyTwoBit => Ok(4),
            WireType::SixtyFourBit => Ok(8),
            WireType::LengthDelimited => decode_varint(&mut bytes),
            WireType::StartGroup | WireType::EndGroup => {
                survey.group = true;
                return;
            }
        };
        let Some(skip) = skip.ok().and_then(|len| usize::try_from(len).ok()) else { return };
        let Some((value, rest)) = bytes.split_at_checked(skip) else { return };
        bytes = rest;
        if wire == WireType::LengthDelimited {
            if field.packable {
                // One byte each at least.
                survey.values += value.len() as u64;
            }
            if let Some(nested) = field.nested {
                walk(nested, value, depth + 1, survey);
            }
        }
    }
    if survey.missing.is_none()
        && let Some(field) = t.required.get(seen.trailing_ones() as usize)
    {
        survey.missing = Some(Missing { message: t.name, field });
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::image::pb;

    #[test]
    fn every_message_is_in_the_table() {
        let all: Vec<_> = crate::image::descriptors::pool().all_messages().collect();
        let images: Vec<_> = all.iter().filter(|m| m.package_name() == "images").collect();
        assert_eq!(images.len(), TYPES.len());
        for message in images {
            let found = TYPES.binary_search_by_key(&message.full_name(), |t| t.full_name).unwrap();
            let required =
                message.fields().filter(|f| f.cardinality() == prost_reflect::Cardinality::Required);
            assert_eq!(required.count(), TYPES[found].required.len(), "{}", message.full_name());
        }
    }

    #[test]
    fn an_empty_core_is_no_core() {
        let missing = survey(table("images.core_entry"), &[]).missing.unwrap();
        assert_eq!((missing.message, missing.field), ("core_entry", "mtype"));
    }

    #[test]
    fn nested_messages_are_looked_at() {
        let whole = pb::MmEntry { vmas: vec![pb::VmaEntry::default()], ..Default::default() };
        let bytes = whole.encode_to_vec();
        assert_eq!(survey(table("images.mm_entry"), &bytes).missing, None);
        // The same with an empty vma (field 14, no bytes) at the end.
        let broken = [bytes, vec![14 << 3 | 2, 0]].concat();
        assert_eq!(survey(table("images.mm_entry"), &broken).missing.unwrap().message, "vma_entry");
    }

    #[test]
    fn nothing_hides_behind_a_group() {
        // Field 99: a group that begins and ends.
        let bytes = [0x9b, 0x06, 0x9c, 0x06];
        assert!(survey(table("images.core_entry"), &bytes).group);
    }

    #[test]
    fn packed_numbers_are_counted() {
        let packed = [vec![13 << 3 | 2, 100], vec![0; 100]].concat();
        assert!(survey(table("images.mm_entry"), &packed).values >= 100);
        let text = [vec![6 << 3 | 2, 100], vec![b'a'; 100]].concat();
        assert_eq!(survey(table("images.reg_file_entry"), &text).values, 1);
    }

    #[test]
    fn twenty_thousand_mappings_take_a_moment() {
        let mm = pb::MmEntry { vmas: vec![pb::VmaEntry::default(); 20_000], ..Default::default() };
        let bytes = mm.encode_to_vec();
        assert_eq!(survey(table("images.mm_entry"), &bytes).missing, None);
        // The time of this thread, whatever else the machine has to do.
        let now = || nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
        let start = now();
        assert_eq!(survey(table("images.mm_entry"), &bytes).missing, None);
        let took = now() - start;
        // A few ms without optimisation.
        assert!(took.tv_sec() == 0, "{took}");
    }
}
