//! /proc/PID/fdinfo/FD: what the kernel tells about one open file.
//!
//! Four lines that every file has, then lock lines, then those of its kind. Several kinds of file print lines of their own,
//! so which of the optional parts mean something follows from the descriptor's link text, not from here. Beware the
//! bases, which differ from line to line: `eventfd-count` is hexadecimal, `tfd` decimal, `wd` hexadecimal.

use super::ParseError;

mod fsnotify;

use super::locks::Lock;
use super::scan::{Scan, lines};
use fsnotify::Fanotify;
pub use fsnotify::{FanotifyGroup, FanotifyMark, InotifyWatch};

const FILE: &str = "fdinfo";

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Fdinfo {
    pub pos: i64,
    /// O_* of the file description, and O_CLOEXEC of this descriptor.
    pub flags: u32,
    /// Linux 3.15. Names a mount of /proc/PID/mountinfo, or one of the kernel's own that is not there.
    pub mnt_id: Option<i32>,
    /// Linux 5.14.
    pub ino: Option<u64>,
    /// Locks held through this file description.
    pub locks: Vec<Lock>,
    pub eventfd: Option<Eventfd>,
    /// signalfd: signal N is bit N - 1.
    pub sigmask: Option<u64>,
    /// epoll: the files it watches.
    pub tfds: Vec<EpollTarget>,
    pub inotify: Vec<InotifyWatch>,
    pub fanotify: Option<FanotifyGroup>,
    pub fanotify_marks: Vec<FanotifyMark>,
    pub timerfd: Option<Timerfd>,
    pub pidfd: Option<Pidfd>,
    /// A pty master: the number of its slave in devpts.
    pub tty_index: Option<u32>,
    /// Every line not named above, as it is; see [`other_value`](Fdinfo::other_value).
    pub other: Vec<Vec<u8>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Eventfd {
    pub count: u64,
    /// Linux 5.2.
    pub id: Option<i32>,
    /// Linux 6.5; older kernels do not tell.
    pub semaphore: Option<bool>,
}

/// One item of an epoll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpollTarget {
    /// The number used at EPOLL_CTL_ADD, which by now may be closed or another file.
    pub tfd: i32,
    pub events: u32,
    pub data: u64,
    /// The watched file's. Linux 4.13, as are the next two.
    pub pos: Option<i64>,
    pub ino: Option<u64>,
    /// In the kernel's own encoding, see [`kernel_dev`].
    pub sdev: Option<u32>,
}

/// Times are (seconds, nanoseconds).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timerfd {
    pub clockid: i32,
    /// Expirations not yet read.
    pub ticks: u64,
    /// TFD_TIMER_* of the last timerfd_settime.
    pub settime_flags: u32,
    /// What is left, also for an absolute timer; (0, 0) when not armed.
    pub it_value: (u64, u64),
    pub it_interval: (u64, u64),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pidfd {
    /// -1 when the task was reaped, 0 when it is not visible in the pid namespace of this /proc.
    pub pid: i32,
    /// From the namespace of this /proc inwards; empty when `pid` is not positive.
    pub nspid: Vec<i32>,
}

impl Fdinfo {
    /// The text behind `key:` of a line that has no field of its own.
    #[cfg(test)]
    pub fn other_value(&self, key: &str) -> Option<&[u8]> {
        self.other.iter().find_map(|line| {
            let mut s = Scan::new(line);
            s.text(key.as_bytes())?;
            s.text(b":")?;
            s.blanks();
            Some(s.rest())
        })
    }

    /// Takes one of the lines behind the head. `None` if its key is known and its value is not as the kernel writes it.
    fn take(&mut self, line: &[u8]) -> Option<()> {
        let mut s = Scan::new(line);
        // Two keys end in a blank, not in a colon.
        if s.text(b"inotify wd:").is_some() {
            self.inotify.push(fsnotify::inotify(s)?);
            return Some(());
        }
        if s.text(b"fanotify ").is_some() {
            match fsnotify::fanotify(s)? {
                Fanotify::Group(group) => self.fanotify = Some(group),
                Fanotify::Mark(mark) => self.fanotify_marks.push(mark),
            }
            return Some(());
        }
        let key = s.until(b':').unwrap_or(line);
        s.blanks();
        match key {
            b"lock" => self.locks.push(Lock::from_line(s.rest())?),
            b"eventfd-count" => {
                self.eventfd = Some(Eventfd { count: last(s, Scan::hex)?, id: None, semaphore: None })
            }
            b"eventfd-id" => self.eventfd.as_mut()?.id = Some(last(s, Scan::signed_as)?),
            b"eventfd-semaphore" => self.eventfd.as_mut()?.semaphore = Some(last(s, Scan::dec)? != 0),
            b"sigmask" => self.sigmask = Some(last(s, Scan::hex)?),
            b"tfd" => self.tfds.push(epoll_target(s)?),
            b"clockid" => {
                let clockid = last(s, Scan::signed_as)?;
                self.timerfd = Some(Timerfd {
                    clockid,
                    ticks: 0,
                    settime_flags: 0,
                    it_value: (0, 0),
                    it_interval: (0, 0),
                });
            }
            b"ticks" => self.timerfd.as_mut()?.ticks = last(s, Scan::dec)?,
            b"settime flags" => self.timerfd.as_mut()?.settime_flags = last(s, Scan::oct_as)?,
            b"it_value" => self.timerfd.as_mut()?.it_value = last(s, time)?,
            b"it_interval" => self.timerfd.as_mut()?.it_interval = last(s, time)?,
            b"Pid" => self.pidfd = Some(Pidfd { pid: last(s, Scan::signed_as)?, nspid: Vec::new() }),
            b"NSpid" => {
                let nspid = &mut self.pidfd.as_mut()?.nspid;
                while !s.is_empty() {
                    nspid.push(s.signed_as()?);
                    s.blanks();
                }
            }
            b"tty-index" => self.tty_index = Some(last(s, Scan::dec_as)?),
            _ => self.other.push(line.to_vec()),
        }
        Some(())
    }
}

/// Reads one value that must be all that is left of the line.
fn last<'a, T>(mut s: Scan<'a>, read: impl FnOnce(&mut Scan<'a>) -> Option<T>) -> Option<T> {
    let value = read(&mut s)?;
    s.end()?;
    Some(value)
}

/// `(1, 500)`
fn time(s: &mut Scan<'_>) -> Option<(u64, u64)> {
    s.text(b"(")?;
    let seconds = s.dec()?;
    s.text(b", ")?;
    let nanoseconds = s.dec()?;
    s.text(b")")?;
    Some((seconds, nanoseconds))
}

fn epoll_target(mut s: Scan<'_>) -> Option<EpollTarget> {
    let tfd = s.signed_as()?;
    s.text(b" events:")?;
    s.blanks();
    let events = s.hex_as()?;
    s.text(b" data:")?;
    s.blanks();
    let data = s.hex()?;
    s.blanks();
    let mut target = EpollTarget { tfd, events, data, pos: None, ino: None, sdev: None };
    if !s.is_empty() {
        s.text(b"pos:")?;
        target.pos = Some(s.signed()?);
        s.text(b" ino:")?;
        target.ino = Some(s.hex()?);
        s.text(b" sdev:")?;
        target.sdev = Some(s.hex_as()?);
        s.end()?;
    }
    Some(target)
}

/// Major and minor of an `sdev`: the kernel's inner encoding with 20 bits of minor, not that of stat(2).
pub fn kernel_dev(sdev: u32) -> (u32, u32) {
    (sdev >> 20, sdev & 0xf_ffff)
}

/// Reads fdinfo of any kind of file.
pub fn parse(bytes: &[u8]) -> Result<Fdinfo, ParseError> {
    let mut info = Fdinfo::default();
    let mut all = lines(bytes).peekable();
    let mut head = |key: &'static str| {
        let (number, line) = *all.peek()?;
        let mut s = Scan::new(line);
        s.text(key.as_bytes())?;
        s.text(b":")?;
        s.blanks();
        all.next();
        Some((number, s))
    };
    // The head comes first, so nothing that a kind prints below can replace it.
    let (number, s) = head("pos").ok_or(ParseError::new(FILE, 1, "pos"))?;
    info.pos = last(s, Scan::signed).ok_or(ParseError::new(FILE, number, "pos"))?;
    let (number, s) = head("flags").ok_or(ParseError::new(FILE, 2, "flags"))?;
    info.flags = last(s, Scan::oct_as).ok_or(ParseError::new(FILE, number, "flags"))?;
    if let Some((number, s)) = head("mnt_id") {
        info.mnt_id = Some(last(s, Scan::signed_as).ok_or(ParseError::new(FILE, number, "mnt_id"))?);
    }
    if let Some((number, s)) = head("ino") {
        info.ino = Some(last(s, Scan::dec).ok_or(ParseError::new(FILE, number, "ino"))?);
    }
    for (number, line) in all {
        info.take(line).ok_or(ParseError::new(FILE, number, "malformed line"))?;
    }
    Ok(info)
}

#[cfg(test)]
mod tests {
    use super::super::locks::{LockKind, LockType};
    use super::*;
    use proptest::prelude::*;

    const HEAD: &str = "pos:\t9223372036854775807\nflags:\t02100002\nmnt_id:\t17\nino:\t1038\n";

    pub(super) fn with(body: &str) -> Fdinfo {
        parse(format!("{HEAD}{body}").as_bytes()).unwrap()
    }

    #[test]
    fn head() {
        let info = with("");
        assert_eq!(
            (info.pos, info.flags, info.mnt_id, info.ino),
            (i64::MAX, 0o2_100_002, Some(17), Some(1038))
        );
        let old = parse(b"pos:\t-1\nflags:\t0100000\n").unwrap();
        assert_eq!((old.pos, old.mnt_id, old.ino), (-1, None, None));
        let error = |text: &[u8]| parse(text).map_err(|e| (e.line, e.what)).unwrap_err();
        assert_eq!(error(b""), (1, "pos"));
        assert_eq!(error(b"pos:\t0\nmnt_id:\t1\n"), (2, "flags"));
        assert_eq!(error(b"pos:\t0\nflags:\t08\n"), (2, "flags"));
        assert_eq!(error(b"pos:\t0\nflags:\t0\nmnt_id:\tx\n"), (3, "mnt_id"));
    }

    #[test]
    fn eventfd_counts_in_hexadecimal() {
        let info = with("eventfd-count:               1f\neventfd-id: 1\neventfd-semaphore: 1\n");
        assert_eq!(info.eventfd, Some(Eventfd { count: 31, id: Some(1), semaphore: Some(true) }));
        let old = with("eventfd-count: fffffffffffffffe\n");
        assert_eq!(old.eventfd, Some(Eventfd { count: u64::MAX - 1, id: None, semaphore: None }));
    }

    #[test]
    fn signalfd() {
        assert_eq!(with("sigmask:\t0000000000000200\n").sigmask, Some(0x200));
    }

    #[test]
    fn epoll() {
        let info = with(
            "tfd:        4 events:       19 data:                4  pos:0 ino:5ebd sdev:f\n\
             tfd:       10 events: 8000001c data: ffffffffffffffff \n",
        );
        let new =
            EpollTarget { tfd: 4, events: 0x19, data: 4, pos: Some(0), ino: Some(0x5ebd), sdev: Some(0xf) };
        let old =
            EpollTarget { tfd: 10, events: 0x8000_001c, data: u64::MAX, pos: None, ino: None, sdev: None };
        assert_eq!(info.tfds, [new, old]);
        assert_eq!(kernel_dev(0xfe0_0003), (0xfe, 3));
    }

    #[test]
    fn timerfd() {
        let info = with(
            "clockid: 1\nticks: 3\nsettime flags: 01\nit_value: (9, 999963020)\nit_interval: (1, 500)\n",
        );
        let want = Timerfd {
            clockid: 1,
            ticks: 3,
            settime_flags: 1,
            it_value: (9, 999_963_020),
            it_interval: (1, 500),
        };
        assert_eq!(info.timerfd, Some(want));
    }

    #[test]
    fn pidfd() {
        assert_eq!(
            with("Pid:\t5848\nNSpid:\t5848\t12\n").pidfd,
            Some(Pidfd { pid: 5848, nspid: vec![5848, 12] })
        );
        assert_eq!(with("Pid:\t-1\n").pidfd, Some(Pidfd { pid: -1, nspid: vec![] }));
        assert_eq!(with("Pid:\t0\nNSpid:\t0\n").pidfd, Some(Pidfd { pid: 0, nspid: vec![0] }));
    }

    #[test]
    fn locks() {
        let info = with(
            "lock:\t1: FLOCK  ADVISORY  WRITE 5848 fe:00:10010839 0 EOF\nlock:\t2: POSIX  ADVISORY  READ  5848 fe:00:10010839 5 14\n",
        );
        let got: Vec<_> = info.locks.iter().map(|l| (l.kind, l.typ, l.start, l.end)).collect();
        assert_eq!(
            got,
            [(LockKind::Flock, LockType::Write, 0, None), (LockKind::Posix, LockType::Read, 5, Some(14))]
        );
    }

    #[test]
    fn the_rest_is_kept() {
        let info = with("tty-index:\t3\nmap_type:\t2\npending:\t0\nAPI:\taa:0:1ff\nno colon\n\n");
        assert_eq!(info.tty_index, Some(3));
        assert_eq!(info.other.len(), 5);
        assert_eq!(info.other_value("map_type"), Some(&b"2"[..]));
        assert_eq!(info.other_value("API"), Some(&b"aa:0:1ff"[..]));
        assert_eq!(info.other_value("AP"), None);
    }

    #[test]
    fn malformed_lines_are_named() {
        for bad in [
            "eventfd-count: x\n",
            "eventfd-id: 1\n",
            "ticks: 1\n",
            "NSpid:\t1\n",
            "clockid: 1\nit_value: (1 2)\n",
            "sigmask:\t10000000000000000\n",
            "tfd: 4 events: 19\n",
            "tfd: 4 events: 19 data: 4  pos:0 ino:1\n",
            "lock:\tx\n",
            "inotify wd:x\n",
            "inotify wd:1 ino:2 sdev:15 mask:fff ignored_mask:0 fhandle-bytes:2 fhandle-type:1 f_handle:a7\n",
            "inotify wd:1 ino:2 sdev:15 mask:fff ignored_mask:0 fhandle-bytes:1 fhandle-type:1 f_handle:a7c\n",
            "inotify wd:1 ino:2 sdev:15 mask:fff ignored_mask:0 fhandle-bytes:1 fhandle-type:1 f_handle:ag\n",
            "fanotify what:1\n",
            "fanotify mnt_id:1b mflags:0 mask:2 ignored_mask:0 fhandle-bytes:1 fhandle-type:1 f_handle:a7\n",
        ] {
            let error = parse(format!("{HEAD}{bad}").as_bytes()).unwrap_err();
            let line = 4 + bad.matches('\n').count();
            assert_eq!(error, ParseError { file: "fdinfo", line, what: "malformed line" }, "{bad}");
        }
    }

    #[test]
    fn own_descriptors() {
        use std::os::fd::AsRawFd;
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, b"12345").unwrap();
        file.lock().unwrap();
        let info = parse(&std::fs::read(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).unwrap()).unwrap();
        assert_eq!(info.pos, 5);
        assert_eq!(
            info.locks.iter().map(|l| (l.kind, l.typ)).collect::<Vec<_>>(),
            [(LockKind::Flock, LockType::Write)]
        );
        assert!(info.other.is_empty(), "{info:?}");
        let eventfd = nix::sys::eventfd::EventFd::from_value(300).unwrap();
        let fd = std::os::fd::AsFd::as_fd(&eventfd).as_raw_fd();
        let info = parse(&std::fs::read(format!("/proc/self/fdinfo/{fd}")).unwrap()).unwrap();
        assert_eq!(info.eventfd.map(|e| e.count), Some(300));
    }

    #[test]
    fn own_epoll_timerfd_and_signalfd() {
        use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
        use nix::sys::signal::{SigSet, Signal};
        use nix::sys::time::TimeSpec;
        use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
        use std::os::fd::{AsFd, AsRawFd};
        let read = |fd: i32| parse(&std::fs::read(format!("/proc/self/fdinfo/{fd}")).unwrap()).unwrap();

        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty()).unwrap();
        let expiration = Expiration::IntervalDelayed(TimeSpec::new(1000, 0), TimeSpec::new(7, 9));
        timer.set(expiration, TimerSetTimeFlags::empty()).unwrap();
        let number = timer.as_fd().as_raw_fd();
        let got = read(number).timerfd.unwrap();
        assert_eq!((got.clockid, got.it_interval), (libc::CLOCK_MONOTONIC, (7, 9)));
        assert!((900..1000).contains(&got.it_value.0), "{got:?}");

        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, 0xdead_beef)).unwrap();
        let info = read(epoll.0.as_raw_fd());
        assert_eq!(info.flags & 0o2_000_000, 0o2_000_000);
        let [target] = info.tfds[..] else { panic!("{info:?}") };
        assert_eq!((target.tfd, target.data), (number, 0xdead_beef));
        assert_eq!(target.ino, read(number).ino);

        let mut signals = SigSet::empty();
        signals.add(Signal::SIGUSR1);
        let signalfd = nix::sys::signalfd::SignalFd::new(&signals).unwrap();
        assert_eq!(read(signalfd.as_fd().as_raw_fd()).sigmask, Some(1 << (libc::SIGUSR1 - 1)));
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
            let _ = parse(&[HEAD.as_bytes(), &bytes].concat());
        }

        #[test]
        fn never_panics_on_known_keys(
            key in "(lock:\t|tfd: |inotify wd:|fanotify (ino|mnt_id|sdev|flags):|it_value: |NSpid:\t|clockid: )",
            rest in "[ 0-9a-f:(), a-z_-]{0,120}",
        ) {
            let _ = parse(format!("{HEAD}clockid: 1\nPid:\t1\n{key}{rest}\n").as_bytes());
        }
    }
}
