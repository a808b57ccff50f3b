//! Room in address spaces: where an area for lists can lie.
//!
//! A restore has its lists at one address in all tasks of a tree, because a child begins with a copy of its maker's; so it
//! must be free in all of them. A dump asks for the same room before it ends anything.

/// End of what user space can map with 4-level page tables.
pub(crate) const TASK_SIZE: u64 = 0x7fff_ffff_f000;
/// Nothing is mapped below by us, because vm.mmap_min_addr may be as high.
const LOWEST: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// Most bytes of an area of a restore, if there is room: only what is used is mapped.
const MOST: u64 = 1 << 30;
/// Below the area, for the vdso of this kernel beside an old one.
pub(crate) const VDSO_ROOM: u64 = 1 << 20;
/// Mappings that an area takes.
pub(crate) const AREA_MAPPINGS: usize = 2;

/// Where `len` bytes are free in all of `used` (any order): in the middle of the widest gap, so that heap and stacks can
/// grow on both sides. `None` when there is none.
pub(crate) fn free(mut used: Vec<(u64, u64)>, len: u64) -> Option<u64> {
    used.retain(|(start, _)| *start < TASK_SIZE);
    used.push((TASK_SIZE, u64::MAX));
    used.sort_unstable();
    let mut widest: Option<(u64, u64)> = None;
    let mut end = LOWEST;
    for (start, stop) in used {
        if start > end && widest.is_none_or(|(low, high)| start - end > high - low) {
            widest = Some((end, start));
        }
        end = end.max(stop);
    }
    let (low, high) = widest.filter(|(low, high)| high - low >= len.saturating_add(2 * PAGE))?;
    Some((low + (high - low - len) / 2) & !(PAGE - 1))
}

/// What lists of a restore are about: how long they get depends on it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Need {
    /// Most mappings of one address space.
    pub(crate) mappings: u64,
    /// Most pages that one address space may have in pieces.
    pub(crate) pages: u64,
    /// Most threads of one address space.
    pub(crate) threads: u64,
}

impl Need {
    /// Bytes of an area that are enough, descriptors included.
    fn bytes(self) -> u64 {
        let lists = self.mappings * 1024 + self.pages * 20 + self.threads * (16 << 10);
        (lists + (8 << 20)).next_multiple_of(PAGE).min(MOST)
    }
}

/// Where the area of a restore lies, and the room below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Begin of the room for a vdso.
    pub(crate) room: u64,
    /// Begin of the area.
    pub(crate) at: u64,
    /// Most bytes that it may have.
    pub(crate) len: u64,
}

/// What the tasks of a tree use. Areas lie side by side mostly, and are one range then: trees have very many.
#[derive(Debug, Default)]
pub(crate) struct Used(Vec<(u64, u64)>);

impl Used {
    /// Adds the areas of a task.
    pub(crate) fn add(&mut self, areas: impl IntoIterator<Item = (u64, u64)>) {
        for (start, end) in areas {
            match self.0.last_mut() {
                Some((_, last)) if *last == start => *last = end.max(start),
                _ => self.0.push((start, end)),
            }
        }
    }

    pub(crate) fn ranges(&self) -> &[(u64, u64)] {
        &self.0
    }
}

/// Place for the area of a restore, free in all of `used`, as long as can be. `Err` with the bytes that are needed.
pub(crate) fn place(used: &[(u64, u64)], need: Need) -> Result<Place, u64> {
    let least = need.bytes();
    let mut len = MOST;
    loop {
        if let Some(room) = free(used.to_vec(), VDSO_ROOM + len) {
            return Ok(Place { room, at: room + VDSO_ROOM, len });
        }
        if len == least {
            return Err(VDSO_ROOM + least);
        }
        len = (len / 4).max(least);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widest_gap() {
        let at = free(vec![(0x40_0000, 0x50_0000), (0x7000_0000_0000, 0x7fff_0000_0000)], 1 << 30).unwrap();
        assert!(at > 0x50_0000 && at + (1 << 30) < 0x7000_0000_0000);
        assert_eq!(free(vec![(0, TASK_SIZE)], PAGE), None);
    }

    #[test]
    fn areas_side_by_side_are_one_range() {
        let mut used = Used::default();
        used.add([(0x1000, 0x2000), (0x2000, 0x3000), (0x5000, 0x6000)]);
        used.add([(0x1000, 0x4000)]);
        assert_eq!(used.ranges(), [(0x1000, 0x3000), (0x5000, 0x6000), (0x1000, 0x4000)]);
    }

    #[test]
    fn as_long_as_can_be() {
        let all_but = |hole: u64| [(0, 1 << 40), ((1 << 40) + hole, TASK_SIZE)];
        let need = Need { mappings: 1000, pages: 1000, threads: 10 };
        let wide = place(&all_but(1 << 40), need).unwrap();
        assert_eq!((wide.at - wide.room, wide.len), (VDSO_ROOM, MOST));
        let narrow = place(&all_but(40 << 20), need).unwrap();
        assert!(narrow.len >= need.bytes() && narrow.at + narrow.len <= (1 << 40) + (40 << 20), "{narrow:?}");
        assert_eq!(place(&all_but(8 << 20), need), Err(VDSO_ROOM + need.bytes()));
    }
}
