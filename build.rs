//! Compiles `proto/` without `protoc`: protox parses, prost-build generates.
//!
//! Text fields of the image messages become `Vec<u8>` in the generated Rust: CRIU writes
//! path names and comm as they are, and neither need be UTF-8. The untouched descriptors
//! are kept beside the code, for the JSON of `crtool image`. What `image::wire` has to know of the
//! image messages becomes a table: a restore must not spend its time on building one.

use std::{collections::BTreeMap, env, error::Error, fmt::Write, fs, path::PathBuf};

use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FileDescriptorSet};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let mut images: Vec<PathBuf> =
        fs::read_dir("proto/images")?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    images.sort();
    let set = protox::compile(&images, ["proto"])?;
    fs::write(out.join("images.fds"), set.encode_to_vec())?;
    fs::write(out.join("wire_types.rs"), wire_types(&set)?)?;

    let mut typed = set;
    for file in &mut typed.file {
        for message in &mut file.message_type {
            for field in &mut message.field {
                if field.r#type == Some(Type::String as i32) {
                    field.r#type = Some(Type::Bytes as i32);
                }
            }
        }
    }
    let mut config = prost_build::Config::new();
    // Each entry has one of them, and there may be many thousands of entries in memory.
    for member in members(&typed, "file_entry") {
        config.boxed(format!(".images.file_entry.{member}"));
    }
    config
        .enable_type_names()
        .boxed(".images.core_entry.thread_info")
        .boxed(".images.core_entry.tc")
        .boxed(".images.core_entry.thread_core")
        .compile_fds(typed)?;

    let rpc = protox::compile(["proto/rpc.proto"], ["proto"])?;
    prost_build::Config::new().compile_fds(rpc)?;

    let remote = protox::compile(["proto/remote.proto"], ["proto"])?;
    prost_build::Config::new().compile_fds(remote)?;
    Ok(())
}

/// Names of the fields of the message `name` that are messages themselves.
fn members(set: &FileDescriptorSet, name: &str) -> Vec<String> {
    let messages =
        set.file.iter().flat_map(|file| &file.message_type).filter(|message| message.name() == name);
    let fields = messages.flat_map(|message| &message.field);
    fields.filter(|field| field.r#type() == Type::Message).map(|field| field.name().to_owned()).collect()
}

/// All image messages, by their full names.
fn messages(set: &FileDescriptorSet) -> BTreeMap<String, &DescriptorProto> {
    fn add<'a>(scope: &str, message: &'a DescriptorProto, all: &mut BTreeMap<String, &'a DescriptorProto>) {
        let name = format!("{scope}.{}", message.name());
        for nested in &message.nested_type {
            add(&name, nested, all);
        }
        all.insert(name, message);
    }
    let mut all = BTreeMap::new();
    for file in set.file.iter().filter(|file| file.package() == "images") {
        for message in &file.message_type {
            add("images", message, &mut all);
        }
    }
    all
}

/// Number of the first field that is not CRIU's but ours: see `image::wire`.
const EXTENSIONS: usize = 15_000;

/// `static TYPES: [Type; _]` of `image::wire`, sorted by full name.
fn wire_types(set: &FileDescriptorSet) -> Result<String, Box<dyn Error>> {
    let all = messages(set);
    let index = |name: &str| all.keys().position(|key| name.strip_prefix('.') == Some(key));
    let mut text = format!("static TYPES: [Type; {}] = [\n", all.len());
    for (full_name, message) in &all {
        let mut required: Vec<&str> = Vec::new();
        let mut fields: Vec<String> = Vec::new();
        let mut extensions: Vec<String> = Vec::new();
        for field in &message.field {
            let number = usize::try_from(field.number())?;
            let (fields, number) = match number.checked_sub(EXTENSIONS) {
                Some(number) => (&mut extensions, number),
                None => (&mut fields, number),
            };
            if fields.len() <= number {
                fields.resize(number + 1, "NO_FIELD".to_owned());
            }
            let bit = (field.label() == Label::Required).then_some(required.len());
            if bit.is_some() {
                required.push(field.name());
            }
            let (nested, packable) = match field.r#type() {
                Type::Message => (index(field.type_name()), false),
                Type::Bytes | Type::String => (None, false),
                Type::Group => return Err(format!("{full_name}.{}: a group", field.name()).into()),
                _ => (None, field.label() == Label::Repeated),
            };
            fields[number] =
                format!("Field {{ required: {bit:?}, nested: {nested:?}, packable: {packable} }}");
        }
        if required.len() > 64 {
            return Err(format!("more than 64 required fields in {full_name}").into());
        }
        let name = message.name();
        let (fields, extensions) = (fields.join(", "), extensions.join(", "));
        writeln!(
            text,
            "Type {{ full_name: {full_name:?}, name: {name:?}, required: &{required:?}, fields: &[{fields}], \
             extensions: &[{extensions}] }},"
        )?;
    }
    text.push_str("];\n");
    Ok(text)
}
