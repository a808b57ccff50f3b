//! ioctl_tty(2): terminals and pseudoterminals.

use std::os::fd::{AsRawFd, BorrowedFd};

use super::{Result, pod::Pod, ret_int};

/// The kernel's `struct termios2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Termios {
    /// Input modes.
    pub iflag: u32,
    /// Output modes.
    pub oflag: u32,
    /// Control modes.
    pub cflag: u32,
    /// Local modes.
    pub lflag: u32,
    /// Line discipline.
    pub line: u8,
    /// Control characters.
    pub cc: [u8; 19],
    /// Input speed.
    pub ispeed: u32,
    /// Output speed.
    pub ospeed: u32,
}
const _: () = assert!(size_of::<Termios>() == 44);

/// The kernel's `struct winsize`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Winsize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
    /// Width in pixels.
    pub xpixel: u16,
    /// Height in pixels.
    pub ypixel: u16,
}

// SAFETY: integers and arrays of them only.
unsafe impl Pod for Termios {}
// SAFETY: integers only.
unsafe impl Pod for Winsize {}

fn get<T: Pod>(fd: BorrowedFd<'_>, request: libc::c_ulong, value: &mut T) -> Result<()> {
    // SAFETY: callers below pair each request with the type it writes; any bytes are a value of it.
    ret_int(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(value)) })?;
    Ok(())
}

fn set<T: Pod>(fd: BorrowedFd<'_>, request: libc::c_ulong, value: &T) -> Result<()> {
    // SAFETY: callers below pair each request with the type it reads.
    ret_int(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_ref(value)) })?;
    Ok(())
}

fn get_int(fd: BorrowedFd<'_>, request: libc::c_ulong) -> Result<i32> {
    let mut value = 0i32;
    get(fd, request, &mut value)?;
    Ok(value)
}

/// TCGETS2.
pub fn termios(fd: BorrowedFd<'_>) -> Result<Termios> {
    let mut value = Termios::default();
    get(fd, 0x802c_542a, &mut value)?;
    Ok(value)
}

/// TCSETS2: at once, nothing is drained or flushed.
pub fn set_termios(fd: BorrowedFd<'_>, value: &Termios) -> Result<()> {
    set(fd, 0x402c_542b, value)
}

/// TIOCGLCKTRMIOS: which bits may not be changed. The call knows no speeds.
pub fn locked_termios(fd: BorrowedFd<'_>) -> Result<Termios> {
    let mut value = Termios::default();
    // `struct termios` is the first 36 bytes of `struct termios2`.
    get(fd, 0x5456, &mut value)?;
    Ok(value)
}

/// TIOCSLCKTRMIOS (CAP_SYS_ADMIN).
pub fn set_locked_termios(fd: BorrowedFd<'_>, value: &Termios) -> Result<()> {
    set(fd, 0x5457, value)
}

/// TIOCGWINSZ.
pub fn winsize(fd: BorrowedFd<'_>) -> Result<Winsize> {
    let mut value = Winsize::default();
    get(fd, libc::TIOCGWINSZ, &mut value)?;
    Ok(value)
}

/// TIOCSWINSZ: a change sends SIGWINCH to the foreground group.
pub fn set_winsize(fd: BorrowedFd<'_>, value: &Winsize) -> Result<()> {
    set(fd, libc::TIOCSWINSZ, value)
}

/// TIOCGPTN: the number of the slave in devpts; masters only.
pub fn pty_index(fd: BorrowedFd<'_>) -> Result<u32> {
    let mut value = 0u32;
    get(fd, 0x8004_5430, &mut value)?;
    Ok(value)
}

/// TIOCGPTLCK: whether the slave cannot be opened yet; masters only.
pub fn pty_locked(fd: BorrowedFd<'_>) -> Result<bool> {
    get_int(fd, 0x8004_5439).map(|v| v != 0)
}

/// TIOCSPTLCK.
pub fn set_pty_locked(fd: BorrowedFd<'_>, locked: bool) -> Result<()> {
    set(fd, 0x4004_5431, &i32::from(locked))
}

/// TIOCGPTPEER: opens the slave of a master, by no path; close-on-exec. O_CLOEXEC in `flags` would stay in those of the
/// description, unlike with open(2).
pub fn open_peer(fd: BorrowedFd<'_>, flags: i32) -> Result<std::os::fd::OwnedFd> {
    // SAFETY: no pointers.
    let peer = ret_int(unsafe { libc::ioctl(fd.as_raw_fd(), 0x5441, flags) })?;
    // SAFETY: no pointers.
    ret_int(unsafe { libc::fcntl(peer, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    super::fd::adopt(peer)
}

/// TIOCGEXCL: exclusive mode.
pub fn exclusive(fd: BorrowedFd<'_>) -> Result<bool> {
    get_int(fd, 0x8004_5440).map(|v| v != 0)
}

/// TIOCEXCL or TIOCNXCL.
pub fn set_exclusive(fd: BorrowedFd<'_>, on: bool) -> Result<()> {
    let request = if on { libc::TIOCEXCL } else { libc::TIOCNXCL };
    // SAFETY: no pointers.
    ret_int(unsafe { libc::ioctl(fd.as_raw_fd(), request) })?;
    Ok(())
}

/// TIOCGPKT: packet mode; masters only.
pub fn packet_mode(fd: BorrowedFd<'_>) -> Result<bool> {
    get_int(fd, 0x8004_5438).map(|v| v != 0)
}

/// TIOCPKT.
pub fn set_packet_mode(fd: BorrowedFd<'_>, on: bool) -> Result<()> {
    set(fd, libc::TIOCPKT, &i32::from(on))
}

/// TIOCGSID on a master: the session of its slave. ENOTTY when there is none.
pub fn session(fd: BorrowedFd<'_>) -> Result<i32> {
    get_int(fd, libc::TIOCGSID)
}

/// TIOCGPGRP: the foreground group; of its slave on a master.
pub fn foreground(fd: BorrowedFd<'_>) -> Result<i32> {
    get_int(fd, libc::TIOCGPGRP)
}

/// TIOCSPGRP.
pub fn set_foreground(fd: BorrowedFd<'_>, group: i32) -> Result<()> {
    set(fd, libc::TIOCSPGRP, &group)
}

/// TIOCGDEV: the device number of the terminal itself, also for a descriptor of /dev/tty (`makedev` encoding).
pub fn device(fd: BorrowedFd<'_>) -> Result<u64> {
    let mut value = 0u32;
    get(fd, 0x8004_5432, &mut value)?;
    Ok(libc::makedev(value >> 8 & 0xfff, value & 0xff | value >> 12 & 0xf_ff00))
}

/// TIOCNOTTY is not declared by libc for every target.
const TIOCNOTTY: libc::c_ulong = 0x5422;

struct Controlling {
    slave: i32,
    flags: i32,
    result: std::result::Result<i32, i32>,
}

extern "C" fn open_as_leader(arg: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `open_controlling` passes its own live struct and does not run until this returns.
    let job = unsafe { &mut *arg.cast::<Controlling>() };
    // SAFETY: plain system calls with a terminated string; no memory is handed over.
    job.result = unsafe {
        if libc::setsid() == -1 || libc::ioctl(job.slave, libc::TIOCSCTTY, 0) == -1 {
            Err(super::Errno::last_raw())
        } else {
            let fd = libc::open(c"/dev/tty".as_ptr(), job.flags);
            if fd == -1 { Err(super::Errno::last_raw()) } else { Ok(fd) }
        }
    };
    // Given back before the end, which would hang it up for all. The SIGHUP that this sends comes to us alone, and may
    // be our end.
    // SAFETY: no pointers.
    unsafe { libc::ioctl(job.slave, TIOCNOTTY) };
    0
}

/// Opens /dev/tty such that it stands for the terminal `slave`, which is nobody's controlling terminal and is not
/// afterwards: a child that shares our descriptors takes it, opens, gives it back.
pub fn open_controlling(slave: BorrowedFd<'_>, flags: i32) -> Result<std::os::fd::OwnedFd> {
    let mut stack = vec![0u128; 1 << 12];
    let mut job = Controlling { slave: slave.as_raw_fd(), flags, result: Err(libc::EIO) };
    let how = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES | libc::SIGCHLD;
    // SAFETY: with CLONE_VFORK this thread waits until the child, which runs on a stack of its own, has ended.
    let pid = unsafe {
        let top = stack.as_mut_ptr_range().end;
        super::ret_int(libc::clone(open_as_leader, top.cast(), how, (&raw mut job).cast()))?
    };
    // SAFETY: no status is asked for.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    match job.result {
        Ok(fd) => super::fd::adopt(fd),
        Err(errno) => Err(super::Errno::from_raw(errno)),
    }
}
