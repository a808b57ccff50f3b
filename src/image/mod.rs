//! Image files: names, magics, framing, storage.

pub mod copy;
pub mod descriptors;
pub mod error;
pub mod explore;
pub mod extras;
pub mod framing;
pub mod json;
pub mod names;
pub mod store;
pub mod wire;

pub use error::ImageError;
#[cfg(any(test, feature = "internals"))]
pub use extras::HasExtra;
pub use names::ImageKind;
pub(crate) use store::BEFORE_PAGES;
pub use store::{
    Arrival, DirStore, DirSync, ImageFile, ImageReader, ImageSink, ImageWriter, MemStore, Outcome, PagesSink,
    PagesStream, Part, Store, TypedStore,
};

/// Image messages, generated from `proto/images`. Text fields are `Vec<u8>`: see `build.rs`.
#[allow(missing_debug_implementations, unreachable_pub, dead_code, clippy::all)] // all of the format
pub mod pb {
    include!(concat!(env!("OUT_DIR"), "/images.rs"));
}
