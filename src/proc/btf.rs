//! BTF, the kernel's own description of its types (/sys/kernel/btf/vmlinux): where the members of its structs are.
//!
//! A header, then all types one after another, numbered from 1, then strings, each of which is there once. Only what is asked
//! for is looked at: structs and their members, functions by name. There are more than 100,000 types, so they are gone through
//! once, for all names that are wanted, and without a look at the strings.

use super::ParseError;

const FILE: &str = "btf/vmlinux";
const MAGIC: u16 = 0xeb9f;

/// Kinds of types.
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC: u32 = 12;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
    pub(super) const LAST: u32 = 19;
}

/// Length of the part that all types have.
const TYPE_LEN: usize = 12;
/// How deep structs without names may be nested.
const DEPTH: u32 = 8;

/// One type in so many has its place noted; from there on to another it is a short walk.
const STRIDE: u32 = 128;

/// All types of a kernel.
#[derive(Debug)]
pub struct Btf<'b> {
    types: &'b [u8],
    strings: &'b [u8],
    /// Where each type begins in `types` whose number, less one, is a multiple of [`STRIDE`].
    places: Vec<usize>,
    /// Kinds, names and numbers of the types that have one of the wanted names.
    named: Vec<(u32, u32, u32)>,
}

/// A member of a struct.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Bytes from the beginning of the struct.
    pub offset: u32,
    /// Its type.
    pub r#type: u32,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)
}

fn index(value: u32) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// The first words of a type.
#[derive(Debug, Clone, Copy)]
struct Head {
    name: u32,
    kind: u32,
    /// Number of members.
    count: u32,
    /// The offsets of members hold the sizes of bit fields too.
    with_bits: bool,
    /// Of the type, or the number of the type that this one is made of.
    size_or_type: u32,
}

impl Head {
    fn read(types: &[u8], at: usize) -> Option<Self> {
        let info = word(types, at.checked_add(4)?)?;
        Some(Self {
            name: word(types, at)?,
            kind: info >> 24 & 0x1f,
            count: info & 0xffff,
            with_bits: info >> 31 == 1,
            size_or_type: word(types, at.checked_add(8)?)?,
        })
    }

    /// Bytes that follow it and belong to it.
    fn more(self) -> Option<usize> {
        let count = index(self.count);
        Some(match self.kind {
            kind::INT | kind::VAR | kind::DECL_TAG => 4,
            kind::ARRAY => 12,
            kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * count,
            kind::ENUM | kind::FUNC_PROTO => 8 * count,
            1..=kind::LAST => 0,
            _ => return None,
        })
    }
}

/// Where a string begins. One that is the end of another is not looked for.
fn string(strings: &[u8], wanted: &str) -> Option<u32> {
    let text = [b"\0", wanted.as_bytes(), b"\0"].concat();
    let at = memchr::memmem::find(strings, &text)?;
    u32::try_from(at).ok()?.checked_add(1)
}

impl<'b> Btf<'b> {
    /// Finds where everything begins, and the types that have one of `names`.
    pub fn parse(bytes: &'b [u8], names: &[&str]) -> Result<Self, ParseError> {
        let parts = || {
            let magic = bytes.get(..2)?.try_into().ok().map(u16::from_le_bytes)?;
            let header = index(word(bytes, 4)?);
            let part = |at: usize| {
                let start = header.checked_add(index(word(bytes, at)?))?;
                bytes.get(start..start.checked_add(index(word(bytes, at + 4)?))?)
            };
            (magic == MAGIC).then_some((part(8)?, part(16)?))
        };
        let (types, strings) = parts().ok_or(ParseError::whole(FILE, "a header of BTF"))?;
        let wanted: Vec<u32> = names.iter().filter_map(|name| string(strings, name)).collect();
        let (mut places, mut named) = (Vec::new(), Vec::new());
        let (mut at, mut number) = (0, 0);
        while at < types.len() {
            if number % STRIDE == 0 {
                places.push(at);
            }
            number += 1;
            let head = Head::read(types, at).and_then(|head| Some((head, head.more()?)));
            let (head, more) = head.ok_or(ParseError::whole(FILE, "a type"))?;
            if wanted.contains(&head.name) {
                named.push((head.kind, head.name, number));
            }
            at += TYPE_LEN + more;
        }
        Ok(Self { types, strings, places, named })
    }

    fn head(&self, number: u32) -> Option<(Head, usize)> {
        let before = number.checked_sub(1)?;
        let mut at = *self.places.get(index(before / STRIDE))?;
        for _ in 0..before % STRIDE {
            at += TYPE_LEN + Head::read(self.types, at)?.more()?;
        }
        Some((Head::read(self.types, at)?, at + TYPE_LEN))
    }

    fn is_named(&self, name: u32, wanted: &str) -> bool {
        let rest = self.strings.get(index(name)..).and_then(|rest| rest.strip_prefix(wanted.as_bytes()));
        rest.is_some_and(|rest| rest.first() == Some(&0))
    }

    fn find(&self, kind: u32, name: &str) -> Option<u32> {
        let found = self.named.iter().find(|(its_kind, at, _)| *its_kind == kind && self.is_named(*at, name));
        found.map(|(.., number)| *number)
    }

    /// The number of a struct that was wanted.
    pub fn structure(&self, name: &str) -> Result<u32, ParseError> {
        self.find(kind::STRUCT, name).ok_or(ParseError::whole(FILE, "a struct"))
    }

    /// The number of a function that was wanted.
    pub fn function(&self, name: &str) -> Result<u32, ParseError> {
        self.find(kind::FUNC, name).ok_or(ParseError::whole(FILE, "a function"))
    }

    /// A member of a struct or union, also one of a struct without a name within it.
    pub fn member(&self, of: u32, name: &str) -> Result<Member, ParseError> {
        self.search(of, name, DEPTH).ok_or(ParseError::whole(FILE, "a member of a struct"))
    }

    /// The member of a member of a member.
    pub fn path(&self, of: u32, names: &[&str]) -> Result<Member, ParseError> {
        let mut at = Member { offset: 0, r#type: of };
        for name in names {
            let next = self.member(at.r#type, name)?;
            let offset = at.offset.checked_add(next.offset);
            at = Member { offset: offset.ok_or(ParseError::whole(FILE, "an offset"))?, ..next };
        }
        Ok(at)
    }

    fn search(&self, of: u32, name: &str, depth: u32) -> Option<Member> {
        let (head, members) = self.plain(of)?;
        if !matches!(head.kind, kind::STRUCT | kind::UNION) {
            return None;
        }
        let mut unnamed = None;
        for number in 0..index(head.count) {
            let at = members + number * TYPE_LEN;
            let (its_name, r#type) = (word(self.types, at)?, word(self.types, at + 4)?);
            let bits = word(self.types, at + 8)?;
            let offset = if head.with_bits { bits & 0x00ff_ffff } else { bits } / 8;
            if self.is_named(its_name, name) {
                return Some(Member { offset, r#type });
            }
            if unnamed.is_none() && depth > 0 && self.is_named(its_name, "") {
                let within = self.search(r#type, name, depth - 1);
                unnamed = within.and_then(|m| Some(Member { offset: m.offset.checked_add(offset)?, ..m }));
            }
        }
        unnamed
    }

    /// A type without const and the like.
    fn plain(&self, mut number: u32) -> Option<(Head, usize)> {
        for _ in 0..DEPTH {
            let (head, more) = self.head(number)?;
            let wraps = [kind::TYPEDEF, kind::VOLATILE, kind::CONST, kind::RESTRICT, kind::TYPE_TAG];
            if !wraps.contains(&head.kind) {
                return Some((head, more));
            }
            number = head.size_or_type;
        }
        None
    }

    /// The length of a struct or union in bytes.
    pub fn len_of(&self, number: u32) -> Result<u32, ParseError> {
        let (head, _) = self.plain(number).ok_or(ParseError::whole(FILE, "a type"))?;
        Ok(head.size_or_type)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STRINGS: &[u8] = b"\0task\0block\0fn\0time\0expires\0iter\0";

    /// A struct `task` with a member `block` behind 4 bytes, of a const struct with `fn` and a union without a name, in which
    /// is a struct `time` with `expires`; and a function `iter`.
    fn sample() -> Vec<u8> {
        let name = |text: &str| {
            let text = format!("\0{text}\0");
            let at = STRINGS.windows(text.len()).position(|part| part == text.as_bytes());
            u32::try_from(at.unwrap() + 1).unwrap()
        };
        let mut types: Vec<u32> = Vec::new();
        let struct_of = |name, kind: u32, size, members: &[(u32, u32, u32)]| {
            let mut words = vec![name, kind << 24 | u32::try_from(members.len()).unwrap(), size];
            words.extend(members.iter().flat_map(|(name, r#type, bits)| [*name, *r#type, *bits]));
            words
        };
        // 1: an int, with its extra word.
        types.extend([0, kind::INT << 24, 8, 64]);
        types.extend(struct_of(0, kind::STRUCT, 16, &[(name("expires"), 1, 64)])); // 2
        types.extend(struct_of(0, kind::UNION, 16, &[(name("time"), 2, 0)])); // 3
        types.extend(struct_of(name("block"), kind::STRUCT, 32, &[(name("fn"), 1, 0), (0, 3, 128)])); // 4
        types.extend([0, kind::CONST << 24, 4]); // 5
        types.extend(struct_of(name("task"), kind::STRUCT, 40, &[(name("block"), 5, 32)])); // 6
        types.extend([name("iter"), kind::FUNC << 24, 1]); // 7
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_le_bytes()).collect();
        let lens = [0, types.len(), types.len(), STRINGS.len()].map(|len| u32::try_from(len).unwrap());
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        bytes.extend(std::iter::once(24u32).chain(lens).flat_map(u32::to_le_bytes));
        bytes.extend(types);
        bytes.extend(STRINGS);
        bytes
    }

    #[test]
    fn members() {
        let bytes = sample();
        let btf = Btf::parse(&bytes, &["task", "iter", "ite", "iters"]).unwrap();
        let task = btf.structure("task").unwrap();
        assert_eq!((task, btf.function("iter")), (6, Ok(7)));
        assert_eq!(btf.member(task, "block").map(|m| m.offset), Ok(4));
        assert_eq!(btf.path(task, &["block", "time", "expires"]).map(|m| m.offset), Ok(4 + 16 + 8));
        assert_eq!(btf.len_of(5), Ok(32));
        assert!(btf.member(task, "expires").is_err() && btf.structure("iter").is_err());
        assert!(btf.function("ite").is_err() && btf.function("iters").is_err() && btf.len_of(99).is_err());
    }

    #[test]
    fn of_this_kernel() {
        let Ok(bytes) = std::fs::read("/sys/kernel/btf/vmlinux") else { return };
        let btf = Btf::parse(&bytes, &["task_struct", "bpf_iter_task"]).unwrap();
        let task = btf.structure("task_struct").unwrap();
        assert!(btf.path(task, &["restart_block", "nanosleep", "expires"]).is_ok());
        assert!(btf.function("bpf_iter_task").is_ok());
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = Btf::parse(&bytes, &["task"]);
        }

        #[test]
        fn never_panics_when_damaged(at in 0usize..200, byte: u8, cut in 0usize..400) {
            let mut bytes = sample();
            if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
            bytes.truncate(cut);
            if let Ok(btf) = Btf::parse(&bytes, &["task", "iter"]) {
                for number in 0..9 {
                    let _ = (btf.member(number, "expires"), btf.len_of(number));
                }
                let _ = (btf.structure("task"), btf.function("iter"));
            }
        }
    }
}
