//! Which pages of a task are content, from PAGEMAP_SCAN (Linux 6.7), else from /proc/PID/pagemap.
//!
//! One walk goes over the whole address space, not one per area: with thousands of areas the calls
//! would cost more than the walk. Nothing is touched; untouched memory costs nothing.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use crate::pages::pagemap::{LAZY, PRESENT};
use crate::pages::{PAGE, PagesError, Run};
use crate::sys::Errno;
use crate::sys::pagemap::{PageRegion, Query, category, scan};
use crate::{pages::copy::Span, sys::pid::HostPid};

/// What of an area's pages is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The task's own pages.
    Own { zero_is_absent: bool, lazy: bool, unreadable: bool },
    /// All pages: the vdso.
    All,
    /// Only where its guard pages are.
    Guards,
}

/// An area to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) wanted: Wanted,
}

/// Runs in one answer of the kernel.
const ANSWER: usize = 2048;
/// Entries of /proc/PID/pagemap read at once.
const PAGEMAP_ENTRIES: usize = 8192;

/// A stretch of pages that the kernel told of.
#[derive(Debug, Clone, Copy)]
struct Found {
    start: u64,
    end: u64,
    guard: bool,
}

/// Spans of content in address order. Guard regions met on the way are collected.
#[derive(Debug)]
pub(super) struct Scan<'a> {
    pid: HostPid,
    pagemap: File,
    way: Way,
    targets: &'a [Target],
    /// First target that has not been passed.
    target: usize,
    /// From here on pages are unknown.
    at: u64,
    end: u64,
    answer: Vec<PageRegion>,
    found: std::collections::VecDeque<Found>,
    guards: &'a mut Vec<Range<u64>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// PAGEMAP_SCAN that knows guard pages (Linux 6.15).
    ScanGuards,
    /// PAGEMAP_SCAN.
    Scan,
    /// One word for each page.
    Words,
}

impl<'a> Scan<'a> {
    /// Over `targets`, which are sorted and do not overlap, of the living thread `pid`.
    pub(super) fn new(
        pid: HostPid,
        targets: &'a [Target],
        guards: &'a mut Vec<Range<u64>>,
    ) -> Result<Self, PagesError> {
        let failed = |source| PagesError::Scan { pid, addr: 0, source };
        Ok(Self {
            pid,
            pagemap: File::open(format!("/proc/{pid}/pagemap")).map_err(failed)?,
            way: Way::ScanGuards,
            targets,
            target: 0,
            at: targets.first().map_or(0, |target| target.start),
            end: targets.last().map_or(0, |target| target.end),
            answer: vec![PageRegion { start: 0, end: 0, categories: 0 }; ANSWER],
            found: std::collections::VecDeque::new(),
            guards,
        })
    }

    #[cfg(test)]
    pub(super) fn by_words(mut self) -> Self {
        self.way = Way::Words;
        self
    }

    /// Asks for more pages; false at the end.
    fn ask(&mut self) -> Result<bool, PagesError> {
        while self.at < self.end && self.found.is_empty() {
            let known = match self.way {
                Way::ScanGuards | Way::Scan => self.ask_scan(),
                Way::Words => self.ask_words(),
            };
            match known {
                Ok(until) => self.at = until,
                Err(Errno::EINTR) => {}
                Err(Errno::EINVAL) if self.way == Way::ScanGuards => self.way = Way::Scan,
                Err(Errno::ENOTTY | Errno::EINVAL) if self.way == Way::Scan => self.way = Way::Words,
                Err(e) => {
                    return Err(PagesError::Scan {
                        pid: self.pid,
                        addr: self.at,
                        source: io::Error::from(e),
                    });
                }
            }
        }
        Ok(!self.found.is_empty())
    }

    fn ask_scan(&mut self) -> Result<u64, Errno> {
        // The task's own pages: not of a file, not the zero page.
        let not = category::FILE | category::PFNZERO;
        let query = Query {
            inverted: not,
            all: not,
            any: category::PRESENT | category::SWAPPED,
            report: if self.way == Way::ScanGuards {
                category::GUARD
            } else {
                category::PRESENT | category::SWAPPED
            },
        };
        let (n, until) = scan(self.pagemap.as_fd(), self.at, self.end, query, &mut self.answer)?;
        self.found.extend(self.answer.iter().take(n).map(|region| Found {
            start: region.start,
            end: region.end,
            guard: region.categories & category::GUARD != 0,
        }));
        // Linux 6.18: the address where the walk ended is stale when the last of several rounds
        // inside the kernel did not fill its buffer. Room left says that all was seen; without,
        // the last run found is a lower bound.
        match self.answer.get(..n).and_then(<[_]>::last) {
            Some(last) if n == self.answer.len() => Ok(until.max(last.end)),
            _ => Ok(self.end),
        }
    }

    fn ask_words(&mut self) -> Result<u64, Errno> {
        const PRESENT: u64 = 1 << 63;
        const SWAPPED: u64 = 1 << 62;
        const FILE: u64 = 1 << 61;
        /// Linux 6.15.
        const GUARD: u64 = 1 << 58;
        // Only areas have words worth reading.
        let Some(target) = self.targets.iter().skip(self.target).find(|target| target.end > self.at) else {
            return Ok(self.end);
        };
        let start = self.at.max(target.start);
        let pages = ((target.end - start) / PAGE).min(PAGEMAP_ENTRIES as u64);
        let mut bytes = vec![0; usize::try_from(pages * 8).map_err(|_| Errno::EOVERFLOW)?];
        let failed = |e: io::Error| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
        self.pagemap.read_exact_at(&mut bytes, start / PAGE * 8).map_err(failed)?;
        let (words, _) = bytes.as_chunks::<8>();
        for (address, word) in (start..).step_by(PAGE as usize).zip(words) {
            let word = u64::from_ne_bytes(*word);
            // The zero page cannot be told here; its zeros are found when it is read.
            if word & (PRESENT | SWAPPED) == 0 || word & FILE != 0 {
                continue;
            }
            let guard = word & GUARD != 0;
            match self.found.back_mut() {
                Some(last) if last.end == address && last.guard == guard => last.end += PAGE,
                _ => self.found.push_back(Found { start: address, end: address + PAGE, guard }),
            }
        }
        Ok(start + pages * PAGE)
    }

    fn span(&mut self) -> Result<Option<Span>, PagesError> {
        loop {
            let Some(target) = self.targets.get(self.target).copied() else { return Ok(None) };
            if target.wanted == Wanted::All {
                self.target += 1;
                let pages = (target.end - target.start) / PAGE;
                let run = Run { start: target.start, pages, flags: PRESENT };
                return Ok(Some(Span { run, zero_is_absent: false, unreadable: false }));
            }
            if self.found.is_empty() && !self.ask()? {
                // No pages are left; whole areas may be.
                self.target += 1;
                continue;
            }
            let Some(found) = self.found.front_mut() else { continue };
            if found.start >= target.end {
                self.target += 1;
                continue;
            }
            let start = found.start.max(target.start);
            let end = found.end.min(target.end);
            let guard = found.guard;
            // What lies before the target belongs to no area of ours.
            if found.end <= target.end {
                self.found.pop_front();
            } else {
                found.start = target.end;
            }
            if start >= end {
                continue;
            }
            if guard {
                match self.guards.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => self.guards.push(start..end),
                }
                continue;
            }
            if let Wanted::Own { zero_is_absent, lazy, unreadable } = target.wanted {
                let flags = if lazy { PRESENT | LAZY } else { PRESENT };
                let run = Run { start, pages: (end - start) / PAGE, flags };
                return Ok(Some(Span { run, zero_is_absent, unreadable }));
            }
        }
    }
}

impl Iterator for Scan<'_> {
    type Item = Result<Span, PagesError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.span().transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Wanted = Wanted::Own { zero_is_absent: true, lazy: true, unreadable: false };

    /// Fresh private memory of so many pages, and the address of its first whole page.
    fn fresh(pages: usize) -> (Vec<u8>, u64) {
        let memory = vec![0u8; (pages + 1) * PAGE as usize];
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE);
        (memory, start)
    }

    fn touch(memory: &mut [u8], start: u64, page: u64) {
        let at = start - memory.as_ptr() as u64 + page * PAGE;
        memory[usize::try_from(at).unwrap()] = 1;
    }

    fn spans(targets: &[Target], words: bool) -> Vec<(u64, u64, u32)> {
        let mut guards = Vec::new();
        let mut scan = Scan::new(HostPid::own(), targets, &mut guards).unwrap();
        if words {
            scan = scan.by_words();
        }
        let mut spans: Vec<Run> = Vec::new();
        for span in scan {
            let run = span.unwrap().run;
            if !spans.last_mut().is_some_and(|last| last.join(&run)) {
                spans.push(run);
            }
        }
        spans.iter().map(|run| (run.start, run.pages, run.flags)).collect()
    }

    #[test]
    fn both_ways_find_the_touched_pages_of_each_area() {
        // 40,000 pages: more than one block of words, and more runs than one answer has.
        let (mut memory, start) = fresh(40_000);
        let touched = |page: u64| page < 30_000 && page.is_multiple_of(3) || (35_000..35_010).contains(&page);
        (0..40_000).filter(|page| touched(*page)).for_each(|page| touch(&mut memory, start, page));
        let area = |from: u64, to: u64, wanted| Target {
            start: start + from * PAGE,
            end: start + to * PAGE,
            wanted,
        };
        let targets = [
            area(0, 10_000, OWN),
            area(10_000, 20_000, Wanted::Guards),
            area(20_000, 20_002, Wanted::All),
            area(20_002, 35_005, OWN),
            area(35_005, 40_000, Wanted::Own { zero_is_absent: true, lazy: false, unreadable: false }),
        ];
        let mut want = Vec::new();
        let mut add = |page: u64, flags| {
            let run = Run { start: start + page * PAGE, pages: 1, flags };
            if !want.last_mut().is_some_and(|last: &mut Run| last.join(&run)) {
                want.push(run);
            }
        };
        (0..10_000).filter(|page| touched(*page)).for_each(|page| add(page, PRESENT | LAZY));
        (20_000..20_002).for_each(|page| add(page, PRESENT));
        (20_002..35_005).filter(|page| touched(*page)).for_each(|page| add(page, PRESENT | LAZY));
        (35_005..40_000).filter(|page| touched(*page)).for_each(|page| add(page, PRESENT));
        let want: Vec<_> = want.iter().map(|run| (run.start, run.pages, run.flags)).collect();
        assert_eq!(spans(&targets, true), want);
        assert_eq!(spans(&targets, false), want, "PAGEMAP_SCAN (Linux 6.7)");
    }

    #[test]
    fn no_areas() {
        assert!(spans(&[], false).is_empty() && spans(&[], true).is_empty());
    }

    #[test]
    fn an_area_taken_whole_at_the_end() {
        let (_memory, start) = fresh(4);
        let targets = [Target { start, end: start + 2 * PAGE, wanted: Wanted::All }];
        assert_eq!(spans(&targets, false), [(start, 2, PRESENT)]);
    }
}
