//! An image that is read: a file from its beginning to its end, or a part of one.
//!
//! The images of a directory are a file each. Those of a cache lie side by side in one file per snapshot, because a
//! descriptor each would be more than a process may have.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

/// An image open for reading, with a position of its own.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    start: u64,
    len: u64,
    at: u64,
}

impl ImageFile {
    /// All of `file`.
    pub fn whole(file: File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        Ok(Self::part(file, 0, len))
    }

    /// `len` bytes of `file` from `start` on.
    pub fn part(file: File, start: u64, len: u64) -> Self {
        Self { file, start, len, at: 0 }
    }

    /// The file in which it lies.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The same, to keep.
    pub fn into_file(self) -> File {
        self.file
    }

    /// Where in the file it begins.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Bytes of the image.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has none.
    #[cfg_attr(not(any(test, feature = "internals")), expect(dead_code))]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Reads what comes next from `at` on.
    pub fn seek(&mut self, at: u64) {
        self.at = at;
    }

    /// Fills `into` from `at` of the image; the position stays.
    pub fn read_exact_at(&self, into: &mut [u8], at: u64) -> io::Result<()> {
        if at.checked_add(into.len() as u64).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.file.read_exact_at(into, self.start + at)
    }
}

impl Read for ImageFile {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.len.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let most = left.min(into.len());
        let count = self.file.read_at(into.get_mut(..most).unwrap_or_default(), self.start + self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_part_ends_where_the_next_one_begins() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"before image after").unwrap();
        let mut image = ImageFile::part(file, 7, 5);
        let mut text = String::new();
        image.read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), image.len()), ("image", 5));
        let mut end = [0; 2];
        image.read_exact_at(&mut end, 3).unwrap();
        assert_eq!(&end, b"ge");
        assert!(image.read_exact_at(&mut end, 4).is_err());
        image.seek(4);
        assert_eq!(image.read(&mut end).unwrap(), 1);
    }
}
