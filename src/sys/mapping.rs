//! Memory of ours that is shared with others: mmap(2) with an owner.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use super::event::seals;
use super::{Errno, Result, ret, ret_int};

/// A mapping that is unmapped when dropped. Others may write to it at any time, so it is only
/// read and written by copying, but for [`Slot`].
#[derive(Debug)]
pub struct Mapping {
    addr: usize,
    len: usize,
    /// What lies before this offset has become code.
    code: AtomicUsize,
}

/// What a mapping may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read only.
    Read,
    /// Read and write.
    ReadWrite,
}

impl Access {
    fn prot(self) -> i32 {
        match self {
            Self::Read => libc::PROT_READ,
            Self::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        }
    }
}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset`, shared. With `at`, at exactly that address, which
    /// must be free (EEXIST otherwise).
    pub fn shared(
        fd: BorrowedFd<'_>,
        offset: i64,
        len: usize,
        access: Access,
        at: Option<usize>,
    ) -> Result<Self> {
        let fixed = if at.is_some() { libc::MAP_FIXED_NOREPLACE } else { 0 };
        let flags = libc::MAP_SHARED | fixed;
        // SAFETY: a new mapping; with MAP_FIXED_NOREPLACE nothing that exists is replaced.
        let addr = unsafe {
            libc::mmap(at.unwrap_or(0) as *mut _, len, access.prot(), flags, fd.as_raw_fd(), offset)
        };
        if addr == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self { addr: addr as usize, len, code: AtomicUsize::new(0) })
    }

    /// Maps `len` bytes of private anonymous memory, readable and writable, of which no memory is reserved before it is
    /// used. With `at`, at exactly that address, which must be free (EEXIST otherwise).
    pub fn private(len: usize, at: Option<usize>) -> Result<Self> {
        let fixed = if at.is_some() { libc::MAP_FIXED_NOREPLACE } else { 0 };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | fixed;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping; with MAP_FIXED_NOREPLACE nothing that exists is replaced.
        let addr = unsafe { libc::mmap(at.unwrap_or(0) as *mut _, len, prot, flags, -1, 0) };
        if addr == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self { addr: addr as usize, len, code: AtomicUsize::new(0) })
    }

    /// Maps the first `len` bytes of `fd`, private and read only: of some files of the kernel there is no other mapping.
    pub(super) fn private_of(fd: BorrowedFd<'_>, len: usize) -> Result<Self> {
        let (prot, flags) = (libc::PROT_READ, libc::MAP_PRIVATE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let addr = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd.as_raw_fd(), 0) };
        if addr == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self { addr: addr as usize, len, code: AtomicUsize::new(0) })
    }

    /// Makes the first `len` bytes, whole pages, code: they can be read and executed, and not be written any more.
    /// ERANGE when there are too few.
    pub fn protect_code(&self, len: usize) -> Result<()> {
        self.check(0, len)?;
        self.code.store(len, Ordering::Relaxed);
        // SAFETY: in range of a live mapping, which nobody holds references into.
        ret_int(unsafe { libc::mprotect(self.addr as *mut _, len, libc::PROT_READ | libc::PROT_EXEC) })?;
        Ok(())
    }

    /// Where it is in our address space.
    pub fn addr(&self) -> usize {
        self.addr
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    #[allow(dead_code)] // beside `len`
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn check(&self, offset: usize, len: usize) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(Errno::ERANGE),
        }
    }

    /// Copies `bytes` to `offset`. ERANGE when they do not fit, EACCES where code is.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        self.check(offset, bytes.len())?;
        if offset < self.code.load(Ordering::Relaxed) {
            return Err(Errno::EACCES);
        }
        // SAFETY: in range of a live mapping; the other side tolerates bytes changing under it.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), (self.addr + offset) as *mut u8, bytes.len());
        }
        Ok(())
    }

    /// Copies from `offset` into `bytes`. ERANGE when there are too few.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        self.check(offset, bytes.len())?;
        // SAFETY: in range of a live mapping.
        unsafe {
            std::ptr::copy_nonoverlapping((self.addr + offset) as *const u8, bytes.as_mut_ptr(), bytes.len());
        }
        Ok(())
    }
}

/// send(2) on a stream socket, MSG_NOSIGNAL: `head`, and `len` bytes of `mapping` from `offset` behind it; how many
/// went. ERANGE when there are too few. Only the kernel reads the mapping, so it may change meanwhile.
pub fn send(
    socket: BorrowedFd<'_>,
    head: &[u8],
    mapping: &Mapping,
    offset: usize,
    len: usize,
) -> Result<usize> {
    mapping.check(offset, len)?;
    let mut parts = [
        libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() },
        libc::iovec { iov_base: (mapping.addr + offset) as *mut _, iov_len: len },
    ];
    // SAFETY: a struct of numbers and pointers, for which zero is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len();
    // SAFETY: both parts are live memory, which the kernel only reads.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    ret(sent as libc::c_long).map(|sent| sent.unsigned_abs() as usize)
}

/// A part of a shared mapping that has one owner in this process. Whoever else has the memory is trusted to write
/// nothing into it.
#[derive(Debug)]
pub struct Slot {
    mapping: Arc<Mapping>,
    offset: usize,
    len: usize,
}

impl Slot {
    /// Maps a memfd of `count` slots of `len` bytes. EINVAL if it is not as long, or can still get shorter.
    pub fn map(memory: OwnedFd, count: usize, len: usize) -> Result<Vec<Self>> {
        let whole = count.checked_mul(len).ok_or(Errno::EOVERFLOW)?;
        let sealed = seals(memory.as_fd()).unwrap_or(0) & libc::F_SEAL_SHRINK.cast_unsigned() != 0;
        if !sealed || usize::try_from(nix::sys::stat::fstat(&memory)?.st_size) != Ok(whole) {
            return Err(Errno::EINVAL);
        }
        let mapping = Arc::new(Mapping::shared(memory.as_fd(), 0, whole, Access::ReadWrite, None)?);
        Ok((0..count).map(|slot| Self { mapping: mapping.clone(), offset: slot * len, len }).collect())
    }

    /// Where in the mapping it begins, in bytes.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: in range of a mapping that lives as long as this; nobody writes: slots do not overlap, each exists
        // once, and the other process only reads.
        unsafe { std::slice::from_raw_parts((self.mapping.addr + self.offset) as *const u8, self.len) }
    }

    /// Its bytes, for writing.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and what the other process reads meanwhile is its own affair.
        unsafe { std::slice::from_raw_parts_mut((self.mapping.addr + self.offset) as *mut u8, self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing borrows from it: reads and writes copy, and slots keep it alive.
        unsafe { libc::munmap(self.addr as *mut _, self.len) };
    }
}

/// memfd_create(name, CLOEXEC) of `len` bytes.
pub fn memfd(name: &std::ffi::CStr, len: u64) -> Result<OwnedFd> {
    // SAFETY: `name` is a C string; the new descriptor is ours alone.
    let fd = unsafe {
        let fd = ret_int(libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC))?;
        OwnedFd::from_raw_fd(fd)
    };
    let len = i64::try_from(len).map_err(|_| Errno::EFBIG)?;
    // SAFETY: no pointers.
    ret_int(unsafe { libc::ftruncate(fd.as_raw_fd(), len) })?;
    Ok(fd)
}

/// Private anonymous memory, writable; unmapped when dropped.
#[derive(Debug)]
pub struct AnonPrivate(Mapping);

impl AnonPrivate {
    /// Maps `len` bytes.
    pub fn new(len: usize) -> Result<Self> {
        let (flags, prot) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let addr = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
        if addr == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self(Mapping { addr: addr as usize, len, code: AtomicUsize::new(0) }))
    }

    /// Where it is.
    pub fn addr(&self) -> usize {
        self.0.addr
    }

    /// Copies from `offset` into `bytes`. ERANGE when there are too few.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        self.0.read(offset, bytes)
    }
}

/// Anonymous shared memory (named `/dev/zero (deleted)` by the kernel), mapped without access so
/// that it can be opened through /proc/self/map_files; unmapped when dropped.
#[derive(Debug)]
pub struct AnonShared(Mapping);

impl AnonShared {
    /// Maps `len` bytes; `huge` may hold MAP_HUGETLB with a size.
    pub fn new(len: usize, huge: i32) -> Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | huge;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let addr = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
        if addr == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self(Mapping { addr: addr as usize, len, code: AtomicUsize::new(0) }))
    }

    /// Where it is mapped.
    pub fn addr(&self) -> usize {
        self.0.addr()
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it has no bytes.
    #[allow(dead_code)] // beside `len`
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
