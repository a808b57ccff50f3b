//! Descriptors of the image messages, as written in `proto/images`.
//!
//! Names of files and tasks are declared as text in CRIU's format but are bytes in truth, so
//! here, as in the generated Rust, text fields are `bytes`; which ones they were is kept.

use std::collections::HashSet;
use std::sync::OnceLock;

use prost_reflect::prost_types::FileDescriptorSet;
use prost_reflect::prost_types::field_descriptor_proto::Type;
use prost_reflect::{DescriptorPool, FieldDescriptor, MessageDescriptor, prost::Message};

struct Descriptors {
    pool: DescriptorPool,
    text: HashSet<String>,
}

fn descriptors() -> &'static Descriptors {
    static DESCRIPTORS: OnceLock<Descriptors> = OnceLock::new();
    DESCRIPTORS.get_or_init(|| {
        let bytes: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/images.fds"));
        let mut set = FileDescriptorSet::decode(bytes).expect("descriptors of our own build");
        let mut text = HashSet::new();
        for file in &mut set.file {
            let package = file.package.clone().unwrap_or_default();
            for message in &mut file.message_type {
                let message_name = message.name().to_owned();
                for field in &mut message.field {
                    if field.r#type() == Type::String {
                        field.set_type(Type::Bytes);
                        text.insert(format!("{package}.{message_name}.{}", field.name()));
                    }
                }
            }
        }
        let pool = DescriptorPool::from_file_descriptor_set(set).expect("descriptors of our own build");
        Descriptors { pool, text }
    })
}

/// All image messages.
pub fn pool() -> &'static DescriptorPool {
    &descriptors().pool
}

/// The message called `name` in package `images`, as the table of kinds has it.
pub fn message(name: &str) -> Option<MessageDescriptor> {
    pool().get_message_by_name(&format!("images.{name}"))
}

/// Whether `field` is text in CRIU's format.
pub fn is_text(field: &FieldDescriptor) -> bool {
    descriptors().text.contains(field.full_name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageKind;

    #[test]
    fn every_kind_has_its_message() {
        for kind in ImageKind::ALL {
            for name in kind.head_message().iter().chain(&kind.message()) {
                assert!(message(name).is_some(), "{kind}: {name}");
            }
        }
    }

    #[test]
    fn names_are_text_and_bytes_are_not() {
        let field =
            |message_name: &str, name: &str| message(message_name).unwrap().get_field_by_name(name).unwrap();
        assert!(is_text(&field("reg_file_entry", "name")));
        assert!(!is_text(&field("unix_sk_entry", "name")));
        assert!(!is_text(&field("reg_file_entry", "size")));
    }
}
