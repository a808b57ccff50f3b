//! The one room with `unsafe`: thin, safe fronts over raw system calls.
//!
//! A front takes borrowed descriptors and typed values, returns owned ones or an [`Errno`],
//! and has no policy and no logging. What a call is for is decided by its callers.
#![allow(unsafe_code)]

pub mod bpf;
pub mod clone;
pub mod cpuid;
pub mod event;
pub mod eventfd;
pub mod fd;
pub mod fork;
pub mod fown;
pub mod handle;

pub mod inode;
pub mod kcmp;
pub mod lease;
pub mod mapping;
pub mod own;
pub mod pagemap;
pub mod passing;
pub mod pid;
pub mod pidfd;
pub mod pipe;
pub mod pkey;
pub mod pod;
pub mod prctl;
pub mod probe;
pub mod process_vm;
pub mod ptrace;
pub mod rseq;
pub mod runner;
pub mod sched;
pub mod sem;
pub mod task;
pub mod ticker;
pub mod timer;
pub mod tmpfs;
pub mod tty;
pub mod userfault;
pub mod wait;
pub mod xattr;

pub use nix::errno::Errno;

/// Result of a raw call.
pub type Result<T> = std::result::Result<T, Errno>;

/// Turns libc's -1 convention into a result.
fn ret(value: libc::c_long) -> Result<libc::c_long> {
    if value == -1 { Err(Errno::last()) } else { Ok(value) }
}

/// As [`ret`], for calls that return an `int`.
fn ret_int(value: libc::c_int) -> Result<libc::c_int> {
    if value == -1 { Err(Errno::last()) } else { Ok(value) }
}
