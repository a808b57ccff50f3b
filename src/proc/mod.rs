//! Parsers of /proc: bytes in, structs out.
//!
//! Nothing here opens a file, so every parser is tested on byte strings. The kernel writes these files, but the tasks
//! choose much of what stands in them: a path may hold a newline, `comm` may hold `) S 1 (`, nothing has to be UTF-8. So
//! all text is `Vec<u8>`, numbers are checked for overflow, and what does not fit is a [`ParseError`], never a
//! panic and never a zero. A line that a kernel version does not write is an `Option`; a line whose absence would
//! lose state is an error.

pub mod auxv;
pub mod btf;
pub mod cgroup;
pub mod children;
pub mod fdinfo;
pub mod limits;
pub mod locks;
pub mod maps;
pub mod mountinfo;
pub mod ns;
pub mod number;
mod scan;
pub mod smaps;
pub mod stat;
pub mod status;
pub mod sysvipc;
pub mod timens;
pub mod timers;

/// A file of /proc that does not look as the kernel writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("/proc {file} line {line}: {what}")]
pub struct ParseError {
    /// The kernel's name of the file, such as `maps`.
    pub file: &'static str,
    /// Counted from 1; 0 when it concerns the file as a whole.
    pub line: usize,
    /// What was expected.
    pub what: &'static str,
}

impl ParseError {
    fn new(file: &'static str, line: usize, what: &'static str) -> ParseError {
        ParseError { file, line, what }
    }

    fn whole(file: &'static str, what: &'static str) -> ParseError {
        ParseError::new(file, 0, what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_thread_with_a_hostile_name() {
        let name = ") R 1\n(\\n";
        let read = || {
            let stat = stat::parse(&fs::read("/proc/thread-self/stat").unwrap()).unwrap();
            let status = status::parse(&fs::read("/proc/thread-self/status").unwrap()).unwrap();
            (stat, status)
        };
        let (stat, status) =
            std::thread::Builder::new().name(name.into()).spawn(read).unwrap().join().unwrap();
        assert_eq!((&stat.comm[..], &status.name[..]), (name.as_bytes(), name.as_bytes()));
        assert_eq!((stat.pid, stat.ppid.get()), (status.pid, status.ppid));
        assert_eq!(stat.state, stat::State::Running);
    }

    /// Reads one file of each task with its parser. Who ends in between is passed over; its file may be empty.
    fn every_task<T>(file: &str, parse: impl Fn(&[u8]) -> Result<T, ParseError>) -> usize {
        let mut read = 0;
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            if entry.file_name().as_encoded_bytes().first().is_some_and(u8::is_ascii_digit)
                && let Ok(bytes) = fs::read(entry.path().join(file))
                && !bytes.is_empty()
            {
                if let Err(error) = parse(&bytes) {
                    panic!("{}: {error}: {}", entry.path().display(), bytes.escape_ascii());
                }
                read += 1;
            }
        }
        read
    }

    #[test]
    fn all_tasks_of_this_machine() {
        assert!(every_task("stat", stat::parse) > 0);
        assert!(every_task("status", status::parse) > 0);
        assert!(every_task("maps", maps::parse) > 0);
        assert!(every_task("smaps", smaps::parse) > 0);
        assert!(every_task("limits", limits::parse) > 0);
        assert!(every_task("cgroup", cgroup::parse) > 0);
        assert!(every_task("mountinfo", mountinfo::parse) > 0);
        assert!(every_task("auxv", auxv::parse) > 0);
        assert!(every_task("fdinfo/0", fdinfo::parse) > 0);
        assert!(locks::parse(&fs::read("/proc/locks").unwrap()).is_ok());
    }
}
