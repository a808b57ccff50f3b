//! Images of every kind with all fields set, the same ones at every run.

use crtool::image::names::Extra;
use crtool::image::{ImageKind, descriptors, framing};
use prost::Message;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, Value};

/// Numbers from a seed (xorshift).
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Small and large numbers, and their borders.
    fn number(&mut self) -> u64 {
        match self.below(6) {
            0 => 0,
            1 => 1 + self.next() % 20,
            2 => self.next() % 0x1_0000,
            3 => u64::from(u32::MAX),
            4 => u64::MAX,
            _ => self.next(),
        }
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }

    fn text(&mut self) -> &'static str {
        const TEXTS: [&str; 7] = [
            "",
            "a",
            "/tmp/with blank",
            "/\"quoted\" \\ and\nmore\t\u{1}",
            "/é/\u{2028}\u{1F600}",
            "b'x",
            "\u{7f}",
        ];
        TEXTS[self.below(TEXTS.len())]
    }
}

/// An image of `kind` with this many entries (a head not counted).
pub(crate) fn image(kind: ImageKind, seed: u64, entries: usize) -> Vec<u8> {
    let mut numbers = Numbers::new(seed);
    let mut bytes = framing::magic_bytes(kind);
    let name = kind.message().expect("an image with entries");
    if let Some(head) = kind.head_message() {
        put(&mut bytes, &message(&mut numbers, &descriptor(head), 0));
    }
    // These have one entry, and what follows it may take the rest of the file.
    let single = matches!(kind.extra(), Extra::GhostFile | Extra::TcpStream);
    let entries = if single { 1 } else { entries };
    for _ in 0..entries {
        let mut entry = message(&mut numbers, &descriptor(name), 0);
        if name == "pagemap_entry" {
            // The same number twice, as CRIU writes it.
            let pages = numbers.next() % 1000;
            set(&mut entry, "compat_nr_pages", pages);
            set(&mut entry, "nr_pages", pages);
        }
        let extra = extra(&mut numbers, kind.extra(), &mut entry);
        put(&mut bytes, &entry);
        bytes.extend(extra);
    }
    bytes
}

fn descriptor(name: &str) -> MessageDescriptor {
    descriptors::message(name).expect("a message of ours")
}

fn put(bytes: &mut Vec<u8>, message: &DynamicMessage) {
    let encoded = message.encode_to_vec();
    bytes.extend(u32::try_from(encoded.len()).unwrap().to_le_bytes());
    bytes.extend(encoded);
}

fn message(numbers: &mut Numbers, descriptor: &MessageDescriptor, depth: usize) -> DynamicMessage {
    let mut message = DynamicMessage::new(descriptor.clone());
    for field in descriptor.fields() {
        let inner = matches!(field.kind(), Kind::Message(_));
        if !field.is_required() && ((inner && depth > 4) || numbers.below(5) == 0) {
            continue;
        }
        let value = if field.is_list() {
            let words = [1, 4][numbers.below(2)];
            let len = if is_address(&field) { words } else { numbers.below(4) };
            Value::List((0..len).map(|_| one(numbers, &field, depth)).collect())
        } else {
            one(numbers, &field, depth)
        };
        message.set_field(&field, value);
    }
    message
}

/// Addresses have one word or four; anything else stops crit.
fn is_address(field: &FieldDescriptor) -> bool {
    matches!(field.name(), "src_addr" | "dst_addr" | "local" | "remote" | "rd_prefix" | "relay_prefix")
}

fn one(numbers: &mut Numbers, field: &FieldDescriptor, depth: usize) -> Value {
    match field.kind() {
        Kind::Message(inner) => Value::Message(message(numbers, &inner, depth + 1)),
        Kind::Enum(names) => {
            let values: Vec<i32> = names.values().map(|value| value.number()).collect();
            Value::EnumNumber(values[numbers.below(values.len())])
        }
        Kind::Bool => Value::Bool(numbers.below(2) == 0),
        Kind::Uint32 | Kind::Fixed32 => Value::U32(numbers.number() as u32),
        Kind::Uint64 | Kind::Fixed64 => Value::U64(numbers.number()),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(numbers.number() as i32),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(numbers.number() as i64),
        Kind::Bytes if descriptors::is_text(field) => Value::Bytes(numbers.text().as_bytes().into()),
        Kind::Bytes => {
            let len = numbers.below(200);
            Value::Bytes(numbers.bytes(len).into())
        }
        kind => panic!("no field has kind {kind:?}"),
    }
}

fn set(message: &mut DynamicMessage, field: &str, value: u64) {
    let field = message.descriptor_field(field);
    let value = match field.kind() {
        Kind::Uint32 => Value::U32(u32::try_from(value).unwrap()),
        _ => Value::U64(value),
    };
    message.set_field(&field, value);
}

trait FieldByName {
    fn descriptor_field(&self, name: &str) -> FieldDescriptor;
}

impl FieldByName for DynamicMessage {
    fn descriptor_field(&self, name: &str) -> FieldDescriptor {
        prost_reflect::ReflectMessage::descriptor(self).get_field_by_name(name).expect(name)
    }
}

/// Makes the bytes after `entry`, and lets it say how many they are.
fn extra(numbers: &mut Numbers, extra: Extra, entry: &mut DynamicMessage) -> Vec<u8> {
    let len = numbers.below(150);
    let mut bytes = numbers.bytes(len);
    let pad = |bytes: &mut Vec<u8>, align: usize| bytes.resize(bytes.len().next_multiple_of(align), 0);
    match extra {
        Extra::None => return Vec::new(),
        Extra::PipeData => set(entry, "bytes", len as u64),
        Extra::SkPacket => set(entry, "length", len as u64),
        Extra::TcpStream => {
            set(entry, "inq_len", len as u64 / 3);
            set(entry, "outq_len", (len - len / 3) as u64);
        }
        Extra::BpfMap => {
            set(entry, "keys_bytes", len as u64 / 3);
            set(entry, "values_bytes", (len - len / 3) as u64);
        }
        Extra::IpcShm => {
            let in_pagemaps = entry.descriptor_field("in_pagemaps");
            entry.clear_field(&in_pagemaps);
            set(entry, "size", len as u64);
            pad(&mut bytes, 4);
        }
        Extra::IpcSem => {
            set(entry, "nsems", len as u64 / 2);
            bytes.truncate(len / 2 * 2);
            pad(&mut bytes, 8);
        }
        Extra::IpcMsg => {
            let qnum = numbers.below(4);
            set(entry, "qnum", qnum as u64);
            bytes.clear();
            for _ in 0..qnum {
                let mut head = message(numbers, &descriptor("ipc_msg"), 0);
                let len = numbers.below(40);
                set(&mut head, "msize", len as u64);
                put(&mut bytes, &head);
                let mut content = numbers.bytes(len);
                pad(&mut content, 8);
                bytes.extend(content);
            }
        }
        Extra::GhostFile => {
            let in_chunks = numbers.below(2) == 0;
            let chunks = entry.descriptor_field("chunks");
            entry.set_field(&chunks, Value::Bool(in_chunks));
            if in_chunks {
                let mut chunks = Vec::new();
                for part in bytes.chunks(50) {
                    let mut chunk = message(numbers, &descriptor("ghost_chunk_entry"), 0);
                    set(&mut chunk, "len", part.len() as u64);
                    put(&mut chunks, &chunk);
                    chunks.extend(part);
                }
                return chunks;
            }
        }
    }
    bytes
}
