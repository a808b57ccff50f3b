//! Calls on descriptors that std and nix lack.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use super::{Result, ret_int};

/// A duplicate numbered `at_least` or above, close-on-exec.
pub fn dup_above(fd: BorrowedFd<'_>, at_least: i32) -> Result<OwnedFd> {
    // SAFETY: no pointers; the new descriptor is ours alone.
    unsafe {
        let fd = ret_int(libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, at_least))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Takes ownership of a descriptor that was handed to this process by number.
/// EBADF when it is not open.
pub fn adopt(fd: i32) -> Result<OwnedFd> {
    // SAFETY: no pointers.
    ret_int(unsafe { libc::fcntl(fd, libc::F_GETFD) })?;
    // SAFETY: it is open, and the caller says that it was given to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Closes a descriptor that was handed to this process by number. Standard input, output and error lead to /dev/null
/// from then on, or what is opened next would take their place. EBADF when it is not open.
pub fn give_up(fd: i32) -> Result<()> {
    let given = adopt(fd)?;
    if (0..=2).contains(&fd) {
        // SAFETY: a string that ends in 0.
        let null = ret_int(unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) })?;
        // SAFETY: it was just opened, and is ours alone.
        let null = unsafe { OwnedFd::from_raw_fd(null) };
        // SAFETY: no pointers; what `fd` stood for was given to us.
        ret_int(unsafe { libc::dup2(null.as_raw_fd(), fd) })?;
        // The number is not ours any more.
        let _ = given.into_raw_fd();
    }
    Ok(())
}

/// Closes what was open when this program was executed, but for standard input, output and error. What it has opened
/// itself is close-on-exec, which no descriptor is that outlives execve(2).
pub fn close_inherited() -> Result<()> {
    let entries = std::fs::read_dir("/proc/self/fd").map_err(|_| super::Errno::ENOENT)?;
    let open: Vec<i32> = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        // SAFETY: no pointers. The descriptor of the list itself is closed by now: an error, and nothing to be done.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } == 0 {
            // SAFETY: nobody here knows it.
            unsafe { libc::close(fd) };
        }
    }
    Ok(())
}

/// Closes all, many at once where their numbers follow each other.
pub(crate) fn close_all(fds: Vec<OwnedFd>) {
    let mut numbers: Vec<i32> = fds.into_iter().map(IntoRawFd::into_raw_fd).collect();
    numbers.sort_unstable();
    for run in numbers.chunk_by(|one, next| one + 1 == *next) {
        if let (Some(first), Some(last)) = (run.first(), run.last()) {
            // SAFETY: no pointers; the numbers were ours alone until now.
            unsafe { libc::syscall(libc::SYS_close_range, *first, *last, 0) };
        }
    }
}

/// A close-on-exec duplicate of a descriptor that is named by number only. EBADF when it is not open.
pub fn dup(fd: i32) -> Result<OwnedFd> {
    // SAFETY: no pointers; the new descriptor is ours alone.
    unsafe {
        let fd = ret_int(libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// SO_DOMAIN: the address family of a socket.
pub fn socket_domain(fd: BorrowedFd<'_>) -> Result<i32> {
    let (mut family, mut len) = (0i32, size_of::<i32>() as libc::socklen_t);
    let at = (&raw mut family).cast();
    // SAFETY: `family` is a live int and `len` says so.
    ret_int(unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN, at, &raw mut len)
    })?;
    Ok(family)
}

/// SIOCOUTQ: bytes in a socket that the other side has not taken.
pub fn unsent(fd: BorrowedFd<'_>) -> Result<u32> {
    let mut bytes: i32 = 0;
    // SAFETY: the kernel writes one int.
    ret_int(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) })?;
    Ok(bytes.cast_unsigned())
}

/// TCP_NOTSENT_LOWAT: the socket takes more only while so few bytes in it have not been sent.
pub fn limit_unsent(fd: BorrowedFd<'_>, bytes: i32) -> Result<()> {
    let (at, len) = ((&raw const bytes).cast(), size_of::<i32>() as libc::socklen_t);
    // SAFETY: the kernel reads one int.
    ret_int(unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, at, len)
    })?;
    Ok(())
}

/// All of a file of /proc. These have no length, and most of them less than a page: std would ask for the length, and begin
/// with 32 bytes.
pub fn read_proc(path: &str) -> std::io::Result<Vec<u8>> {
    use std::io::{ErrorKind, Read};
    let mut file = std::fs::File::open(path)?;
    let mut bytes = vec![0; 4096];
    let mut len = 0;
    loop {
        match file.read(bytes.get_mut(len..).unwrap_or_default()) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        if len == bytes.len() {
            bytes.resize(2 * len, 0);
        }
    }
    bytes.truncate(len);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write, pipe},
        os::fd::AsFd,
    };

    use super::*;

    #[test]
    fn only_what_is_given_is_closed() {
        let (mut ended, end) = pipe().unwrap();
        let (mut other, kept) = pipe().unwrap();
        // With a gap in the numbers, in which somebody else's descriptor is.
        let copy = |fd: BorrowedFd<'_>| dup_above(fd, 900).unwrap();
        let mut fds: Vec<OwnedFd> = (0..4).map(|_| copy(end.as_fd())).collect();
        let kept = [copy(kept.as_fd()), kept.into()];
        fds.extend((0..4).map(|_| copy(end.as_fd())));
        fds.push(end.into());
        fds.reverse();
        close_all(fds);
        assert_eq!(ended.read(&mut [0]).unwrap(), 0, "nobody can write any more");
        for fd in kept {
            std::fs::File::from(fd).write_all(b"x").unwrap();
        }
        assert_eq!(other.read(&mut [0; 4]).unwrap(), 2);
        close_all(Vec::new());
    }
}
