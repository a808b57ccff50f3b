//! Bytes and messages that are needed again later, kept small until then.
//!
//! A tree may have thousands of processes, of each of which some kilobytes are known: messages of its images, lists of system
//! calls for it. They are needed when its turn comes, and consist of zeros and repetitions mostly. Encoded and compressed,
//! a message takes a tenth of the memory, a list a fourth. It costs 2 to 10 us to have one back.
//!
//! What is kept here comes from crtool itself, decoded and checked, not from an image.

use std::{borrow::Cow, marker::PhantomData};

use prost::Message;

/// Compressed bytes.
#[derive(Debug, Clone)]
pub(crate) struct Packed {
    /// As they are, if they get no shorter.
    bytes: Box<[u8]>,
    /// How many they are without the zeros at the end, which are not kept.
    used: usize,
    len: usize,
}

impl Packed {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let mut this = Self::without_zeros(bytes);
        this.compress();
        this
    }

    /// Not compressed, but without the zeros at the end.
    pub(crate) fn without_zeros(bytes: &[u8]) -> Self {
        let zeros = bytes.iter().rev().take_while(|byte| **byte == 0).count();
        let used = bytes.get(..bytes.len() - zeros).unwrap_or_default();
        Self { bytes: used.into(), used: used.len(), len: bytes.len() }
    }

    pub(crate) fn compress(&mut self) {
        if self.bytes.len() == self.used {
            let block = lz4_flex::block::compress(&self.bytes);
            if block.len() < self.used {
                // A copy, because a block has been given room for the worst case.
                self.bytes = block[..].into();
            }
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        let used = bytes.get_mut(..self.used).unwrap_or_default();
        if self.bytes.len() == self.used {
            used.copy_from_slice(&self.bytes);
        } else {
            let len = lz4_flex::block::decompress_into(&self.bytes, used);
            assert_eq!(len.ok(), Some(self.used), "a block that was compressed here");
        }
        bytes
    }
}

/// In what form messages are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    AsIs,
    Packed,
}

impl Form {
    /// Those of a tree of so many threads, of all its processes together.
    pub(crate) fn of_tree(threads: usize) -> Self {
        if threads > MANY { Self::Packed } else { Self::AsIs }
    }
}

/// What is known of so many threads, or of fewer, is kept as it is: that takes some megabytes at most, and less time.
const MANY: usize = 700;

/// A message that waits.
pub(crate) enum Kept<M> {
    AsIs(M),
    /// Encoded.
    Packed(Packed, PhantomData<fn() -> M>),
}

impl<M: Message + Default + Clone> Kept<M> {
    pub(crate) fn new(message: M, form: Form) -> Self {
        match form {
            Form::AsIs => Self::AsIs(message),
            Form::Packed => Self::Packed(Packed::new(&message.encode_to_vec()), PhantomData),
        }
    }

    pub(crate) fn message(&self) -> Cow<'_, M> {
        match self {
            Self::AsIs(message) => Cow::Borrowed(message),
            Self::Packed(packed, _) => Cow::Owned(decoded(packed)),
        }
    }

    pub(crate) fn into_message(self) -> M {
        match self {
            Self::AsIs(message) => message,
            Self::Packed(packed, _) => decoded(&packed),
        }
    }
}

fn decoded<M: Message + Default>(packed: &Packed) -> M {
    M::decode(&packed.bytes()[..]).expect("a message that was encoded here")
}

impl<M> std::fmt::Debug for Kept<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Kept").field(&std::any::type_name::<M>()).finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::image::pb;

    proptest! {
        #[test]
        fn what_comes_back_is_what_was_kept(bytes: Vec<u8>, zeros in 0usize..10_000) {
            let mut whole = bytes.clone();
            whole.resize(bytes.len() + zeros, 0);
            whole.extend_from_slice(&bytes);
            whole.resize(whole.len() + zeros, 0);
            let packed = Packed::new(&whole);
            prop_assert!(packed.bytes.len() <= whole.len());
            prop_assert_eq!(packed.bytes(), whole);
        }
    }

    #[test]
    fn what_repeats_gets_shorter() {
        assert!(Packed::new(&[7; 4096]).bytes.len() < 100);
        assert!(Packed::new(&[0; 4096]).bytes.is_empty());
        assert!(Packed::new(&[]).bytes().is_empty());
    }

    #[test]
    fn a_message_comes_back_as_it_was() {
        let sigactions = vec![pb::SaEntry { mask: u64::MAX, ..Default::default() }; 64];
        let tc = pb::TaskCoreEntry { sigactions, blk_sigset_extended: Some(0), ..Default::default() };
        let core = pb::CoreEntry { tc: Some(Box::new(tc)), mtype: 1, ..Default::default() };
        for form in [Form::of_tree(1), Form::of_tree(100_000)] {
            for core in [&core, &pb::CoreEntry::default()] {
                let kept = Kept::new(core.clone(), form);
                assert_eq!(kept.message().as_ref(), core);
                assert_eq!(&kept.into_message(), core);
            }
        }
    }
}
