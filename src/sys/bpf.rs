//! bpf(2): a program that the kernel runs over a task, and what it writes.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, fstat};
use nix::sys::statfs::{SYSFS_MAGIC, fstatfs};

use super::mapping::Mapping;
use super::pid::HostPid;
use super::{Errno, Result, ret};

const PROG_LOAD: i64 = 5;
const LINK_CREATE: i64 = 28;
const ITER_CREATE: i64 = 33;
const PROG_TYPE_TRACING: u32 = 26;
const TRACE_ITER: u32 = 28;

/// Where the kernel describes its types.
pub const TYPES: &str = "/sys/kernel/btf/vmlinux";

/// The kernel's description of its types, mapped (Linux 6.16), because it has megabytes and read(2) gives a page at a time.
#[derive(Debug)]
pub struct MappedTypes(Mapping);

impl MappedTypes {
    /// Maps it. ENODEV where it cannot be mapped, EINVAL if something else is in its place.
    pub fn open() -> Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let file = nix::fcntl::open(TYPES, flags, Mode::empty())?;
        if fstatfs(&file)?.filesystem_type() != SYSFS_MAGIC {
            return Err(Errno::EINVAL);
        }
        let len = usize::try_from(fstat(&file)?.st_size).map_err(|_| Errno::EINVAL)?;
        Mapping::private_of(file.as_fd(), len).map(Self)
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: a mapping that lives as long as this, of memory of the kernel that neither changes nor gets shorter while
        // the kernel runs; `open` has looked that it is the kernel's.
        unsafe { std::slice::from_raw_parts(self.0.addr() as *const u8, self.0.len()) }
    }
}

/// One instruction, `struct bpf_insn`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Insn {
    /// Operation.
    pub code: u8,
    /// Source register in the high four bits, destination in the low ones.
    pub registers: u8,
    /// Offset of a jump or of memory.
    pub offset: i16,
    /// Immediate value.
    pub value: i32,
}

/// `union bpf_attr` of BPF_PROG_LOAD, as long as what is used of it (Linux 5.6).
#[repr(C)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log: [u32; 4],
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
}
const _: () = assert!(size_of::<Load>() == 112);

#[repr(C)]
struct LinkCreate {
    prog_fd: i32,
    target_fd: i32,
    attach_type: u32,
    flags: u32,
    iter_info: u64,
    iter_info_len: u32,
    reserved: u32,
}

#[repr(C)]
struct IterCreate {
    link_fd: i32,
    flags: u32,
}

/// `union bpf_iter_link_info` for tasks (Linux 6.1).
#[repr(C)]
struct OneTask {
    tid: u32,
    pid: u32,
    pid_fd: u32,
    reserved: u32,
}

fn bpf<T>(command: i64, attr: &T) -> Result<OwnedFd> {
    let size = size_of::<T>();
    // SAFETY: `attr` is a struct of the command and of that size; what it points to outlives the call in both callers.
    let fd = ret(unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size) })?;
    super::fd::adopt(i32::try_from(fd).unwrap_or(-1))
}

/// Loads a program that runs once for each task: `iterator` is the number of `bpf_iter_task` among the kernel's types.
pub fn load_task_iterator(iterator: u32, program: &[Insn]) -> Result<OwnedFd> {
    bpf(
        PROG_LOAD,
        &Load {
            prog_type: PROG_TYPE_TRACING,
            insn_cnt: u32::try_from(program.len()).unwrap_or(u32::MAX),
            insns: program.as_ptr().addr() as u64,
            license: c"GPL".as_ptr().addr() as u64,
            log: [0; 4],
            kern_version: 0,
            prog_flags: 0,
            prog_name: *b"crtool\0\0\0\0\0\0\0\0\0\0",
            prog_ifindex: 0,
            expected_attach_type: TRACE_ITER,
            prog_btf_fd: 0,
            func_info_rec_size: 0,
            func_info: 0,
            func_info_cnt: 0,
            line_info_rec_size: 0,
            line_info: 0,
            line_info_cnt: 0,
            attach_btf_id: iterator,
        },
    )
}

/// Runs such a program over the thread `tid`: gives a file with what it wrote.
pub fn iterate_task(program: BorrowedFd<'_>, tid: HostPid) -> Result<OwnedFd> {
    let task = OneTask { tid: tid.bits(), pid: 0, pid_fd: 0, reserved: 0 };
    let link = bpf(
        LINK_CREATE,
        &LinkCreate {
            prog_fd: program.as_raw_fd(),
            target_fd: 0,
            attach_type: TRACE_ITER,
            flags: 0,
            iter_info: std::ptr::from_ref(&task).addr() as u64,
            iter_info_len: u32::try_from(size_of::<OneTask>()).unwrap_or(0),
            reserved: 0,
        },
    )?;
    bpf(ITER_CREATE, &IterCreate { link_fd: link.as_raw_fd(), flags: 0 })
}
