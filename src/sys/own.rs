//! What would end this process without a word (signals for which nobody asked, memory that cannot be had), and its limits.
//!
//! A handler, not SIG_IGN, because handlers do not outlive an exec: programs that we start have the signal as they
//! know it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use super::{Result, ret_int};

/// Exit status when memory cannot be had.
static STATUS: AtomicI32 = AtomicI32::new(1);
/// Exit status when std aborts (a panic in a panic, a stack that is full), after it has said why.
const ABORTED: i32 = 70;

/// The system's allocator; where it has nothing more to give, the process says so and exits. Std would abort, and an
/// end by a signal is no answer to the caller.
#[derive(Debug, Clone, Copy)]
pub struct Allocator;

// SAFETY: every block comes from `System` and goes back to it, with the layout it was made for.
unsafe impl GlobalAlloc for Allocator {
    /// # Safety
    /// As the trait says.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps to the conditions of `System`, which are the trait's.
        had(unsafe { System.alloc(layout) }, layout.size())
    }

    /// # Safety
    /// As the trait says.
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: `block` came from `System` with this layout.
        unsafe { System.dealloc(block, layout) }
    }

    /// # Safety
    /// As the trait says.
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps to the conditions of `System`, which are the trait's.
        had(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    /// # Safety
    /// As the trait says.
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: `block` came from `System` with this layout.
        had(unsafe { System.realloc(block, layout, size) }, size)
    }
}

fn had(block: *mut u8, size: usize) -> *mut u8 {
    if block.is_null() {
        out_of_memory(size);
    }
    block
}

/// One line, made without memory.
#[cold]
fn out_of_memory(size: usize) -> ! {
    let mut digits = [0u8; 20];
    let mut at = digits.len();
    let mut rest = size;
    while at > 0 && (rest > 0 || at == digits.len()) {
        at -= 1;
        if let Some(digit) = digits.get_mut(at) {
            *digit = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        }
        rest /= 10;
    }
    say(b"Error (crtool): out of memory: there are no ");
    say(digits.get(at..).unwrap_or_default());
    say(b" bytes more, by the system or by a limit (ulimit -v, ulimit -d)\n");
    exit(STATUS.load(Ordering::Relaxed))
}

fn say(text: &[u8]) {
    // SAFETY: `text` is live for the call.
    let _ = unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
}

fn exit(status: i32) -> ! {
    // SAFETY: ends the process. What it traces goes on, or dies with it where that was asked for.
    unsafe { libc::_exit(status) }
}

/// From here on the process exits with `status` when memory cannot be had.
pub fn set_out_of_memory_status(status: u8) {
    STATUS.store(status.into(), Ordering::Relaxed);
}

extern "C" fn nothing(_: i32) {}

extern "C" fn aborted(_: i32) {
    say(b"Error (crtool): internal error, please report the lines above\n");
    exit(ABORTED)
}

fn handle(signal: i32, handler: extern "C" fn(i32), flags: i32) -> Result<()> {
    // SAFETY: all zeros is a valid sigaction; both handlers only do what is allowed in one.
    unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = handler as *const () as usize;
        new.sa_flags = flags;
        ret_int(libc::sigaction(signal, &raw const new, ptr::null_mut())).map(drop)
    }
}

/// A file that may not grow (RLIMIT_FSIZE) is an error of the call, EFBIG, and not the end by SIGXFSZ; an abort is an
/// exit status.
pub fn survive() -> Result<()> {
    handle(libc::SIGXFSZ, nothing, libc::SA_RESTART)?;
    // On the stack that std has for overflows of the stack.
    handle(libc::SIGABRT, aborted, libc::SA_ONSTACK)
}

/// Raises our own soft limit of `resource` to `wanted` or as near to it as the hard limit allows; what it is then.
pub fn at_least(resource: u32, wanted: u64) -> Result<u64> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is live for both calls.
    unsafe {
        ret_int(libc::getrlimit64(resource, &raw mut limit))?;
        if limit.rlim_cur < wanted && limit.rlim_cur < limit.rlim_max {
            limit.rlim_cur = wanted.min(limit.rlim_max);
            ret_int(libc::setrlimit64(resource, &raw const limit))?;
        }
    }
    Ok(limit.rlim_cur)
}

/// What the soft limit of open files was before [`raise_open_files`].
static OPEN_FILES: OnceLock<u64> = OnceLock::new();

/// Raises the soft limit of open files to the hard one: a process of a large tree takes a descriptor, as does each of its
/// files. The soft limit is for programs that use select(2).
pub fn raise_open_files() -> Result<u64> {
    let first = at_least(libc::RLIMIT_NOFILE, 0)?;
    OPEN_FILES.get_or_init(|| first);
    let most = at_least(libc::RLIMIT_NOFILE, u64::MAX)?;
    make_room_for_descriptors(most);
    Ok(most)
}

/// Room for so many descriptors is made in advance.
const ROOM_FOR_DESCRIPTORS: u64 = 16_384;

/// Makes the descriptor table large while one thread has it: each time a table grows that several threads share, the kernel
/// waits for an RCU grace period (about ten milliseconds), and it grows by doubling.
fn make_room_for_descriptors(most: u64) {
    let last = i32::try_from(ROOM_FOR_DESCRIPTORS.min(most).saturating_sub(1)).unwrap_or(0);
    // SAFETY: both descriptors are numbers; the second one is ours alone.
    unsafe {
        // Any that is open will do; where none is, there is no need.
        for fd in 0..3 {
            let high = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, last);
            if high >= 0 {
                libc::close(high);
                break;
            }
        }
    }
}

/// Starts `command` with the limit of open files that this process was started with: it may be such a program.
pub fn with_first_limits(command: &mut Command) -> &mut Command {
    let Some(&first) = OPEN_FILES.get() else { return command };
    // SAFETY: between fork and exec it makes system calls only.
    unsafe {
        command.pre_exec(move || {
            let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
            ret_int(libc::getrlimit64(libc::RLIMIT_NOFILE, &raw mut limit))?;
            limit.rlim_cur = first.min(limit.rlim_max);
            ret_int(libc::setrlimit64(libc::RLIMIT_NOFILE, &raw const limit))?;
            Ok(())
        })
    }
}
