//! Compiles `proto/` without `protoc`: protox parses, prost-build generates.
//!
//! Text fields of the image messages become `Vec<u8>` in the generated Rust: CRIU writes
//! path names and comm as they are, and neither need be UTF-8. The untouched descriptors
//! are kept beside the code, for the JSON of `crtool image`.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;
use prost_types::field_descriptor_proto::Type;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let mut images: Vec<PathBuf> =
        fs::read_dir("proto/images")?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    images.sort();
    let set = protox::compile(&images, ["proto"])?;
    fs::write(out.join("images.fds"), set.encode_to_vec())?;

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
    prost_build::Config::new()
        .enable_type_names()
        .boxed(".images.file_entry.isk")
        .boxed(".images.file_entry.usk")
        .boxed(".images.file_entry.psk")
        .boxed(".images.file_entry.tty")
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
