//! The raw calls of these tests.
#![allow(unsafe_code)]

use std::{
    ffi::CStr,
    fs,
    os::{fd::RawFd, unix::process::CommandExt as _},
    process::Command,
};

/// What the caller's shell left open is not for the trial.
pub fn close_inherited() {
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")
        .map(|entries| entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
        .unwrap_or_default();
    for fd in open.into_iter().filter(|&fd| fd > 2) {
        let _ = nix::unistd::close(fd);
    }
}

/// Forks; the child runs `body` and ends. From a thread that is the only one, or with a body that takes no locks.
pub fn fork(body: impl FnOnce()) -> i32 {
    // SAFETY: see above.
    match unsafe { libc::fork() } {
        0 => {
            body();
            // SAFETY: no destructors of the parent's are wanted.
            unsafe { libc::_exit(0) }
        }
        pid => pid,
    }
}

/// Forks a child that ends at once, and waits for it; `vfork` as vfork does.
pub fn fork_and_wait(vfork: bool) {
    let flags = libc::SIGCHLD | if vfork { libc::CLONE_VFORK } else { 0 };
    // SAFETY: without CLONE_VM the child has its own memory; it makes one system call.
    unsafe {
        let pid = libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0);
        if pid == 0 {
            libc::syscall(libc::SYS_exit_group, 0);
        }
        while libc::waitpid(pid as i32, std::ptr::null_mut(), 0) < 0 {}
    }
}

/// Forks a child that forks one in turn, which outlives it for a moment, and waits for the first.
pub fn orphan() {
    // SAFETY: the children make system calls only.
    unsafe {
        let pid = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0);
        if pid == 0 {
            if libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) == 0 {
                let nap = libc::timespec { tv_sec: 0, tv_nsec: 300_000 };
                libc::syscall(libc::SYS_nanosleep, &raw const nap, 0);
            }
            libc::syscall(libc::SYS_exit_group, 0);
        }
        while libc::waitpid(pid as i32, std::ptr::null_mut(), 0) < 0 {}
        // Its child may be ours by now.
        while libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 {}
    }
}

/// The program that is started ends when the calling thread does.
pub fn dies_with_us(command: &mut Command) -> &mut Command {
    let parent = std::process::id();
    // SAFETY: two system calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if libc::getppid().cast_unsigned() == parent {
                Ok(())
            } else {
                Err(std::io::ErrorKind::Other.into())
            }
        })
    }
}

/// Orphans below come to us.
pub fn become_subreaper() {
    // SAFETY: no pointers.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
}

/// Mounts a file system of this type.
pub fn mount(kind: &CStr, dir: &CStr, options: &CStr) -> std::io::Result<()> {
    // SAFETY: texts that end with NUL.
    let result =
        unsafe { libc::mount(c"hangs".as_ptr(), dir.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast()) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Maps the first page of a file, privately and for reading, and reads it.
pub fn map(fd: RawFd) {
    // SAFETY: a new mapping of one page, which stays.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_PRIVATE, fd, 0);
        assert!(at != libc::MAP_FAILED, "mmap");
        let _ = std::ptr::read_volatile(at.cast::<u8>());
    }
}
