//! Any bytes as an image: `cargo fuzz run image` (see README.md).
//!
//! Reading must neither panic nor take much memory, and what can be encoded again must come
//! out as an image that shows the same.

#![no_main]

use std::path::Path;

use crtool::image::framing::EntryReader;
use crtool::image::json::{self, Style};
use crtool::image::{ImageKind, pb};
use libfuzzer_sys::fuzz_target;

/// Every entry as `M`, the way dump and restore read it.
fn typed<M: prost::Message + prost::Name + Default>(image: &[u8], kind: ImageKind) {
    let mut reader = EntryReader::new(image, image.len() as u64, Path::new("fuzz"));
    if reader.expect_magic(kind).is_ok() {
        while let Ok(Some(_)) = reader.next_entry::<M>() {}
    }
}

fuzz_target!(|image: &[u8]| {
    let mut reader = EntryReader::new(image, image.len() as u64, Path::new("fuzz"));
    let Ok(kind) = reader.read_magic() else { return };
    match kind {
        ImageKind::Inventory => typed::<pb::InventoryEntry>(image, kind),
        ImageKind::Core => typed::<pb::CoreEntry>(image, kind),
        ImageKind::Mm => typed::<pb::MmEntry>(image, kind),
        ImageKind::Files => typed::<pb::FileEntry>(image, kind),
        ImageKind::Pstree => typed::<pb::PstreeEntry>(image, kind),
        ImageKind::Fdinfo => typed::<pb::FdinfoEntry>(image, kind),
        ImageKind::Cgroup => typed::<pb::CgroupEntry>(image, kind),
        _ => {}
    }
    for pretty in [false, true] {
        let show = |image: &[u8]| {
            let style = Style { pretty, payload: true };
            json::decode(image, image.len() as u64, Path::new("fuzz"), style)
        };
        let Ok(shown) = show(image) else { continue };
        let Ok(encoded) = json::encode(&shown) else { continue };
        let again = show(&encoded).expect("what was encoded here is an image");
        assert_eq!(shown, again);
    }
});
