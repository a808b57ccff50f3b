//! The runner: position-independent code that executes a list of system calls.
//!
//! It is copied into memory of the process that is to run it and entered with rbx = address of the first [`Entry`] and
//! rbp = address of the [`Slot`] of the executing thread. It uses no stack and no memory but the list and the slot.
//! Offsets and numbers of the assembly come from the types below, so the two cannot differ.

use std::{
    arch::global_asm,
    mem::{offset_of, size_of},
};

use super::pod::Pod;

/// One step as the runner sees it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Entry {
    /// Number of a system call, or one of [`op`].
    pub op: i64,
    /// Its arguments.
    pub args: [u64; 6],
    /// Of [`flag`].
    pub flags: u64,
    /// With [`flag::EQUAL`]: the only result that is no failure.
    pub expect: u64,
    /// With [`flag::CLONE`]: the slot of the child.
    pub child_slot: u64,
    /// What the call returned, a negative error number on failure.
    pub result: u64,
}
// SAFETY: integers only, without padding.
unsafe impl Pod for Entry {}

/// What a thread that executes lists reads and leaves to be read.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Slot {
    /// 0, or [`FAILED`] after a failed call.
    pub status: u64,
    /// Address of the entry that failed.
    pub failed: u64,
    /// Address of the entry to go on with after a failure.
    pub on_fail: u64,
    /// Address of the first entry of a child that is made with this slot.
    pub start: u64,
    /// Address of the entry where [`op::NEXT`] goes on.
    pub next: u64,
    /// A word for the list: what ends an injection sets it to 1.
    pub done: u64,
}
// SAFETY: integers only, without padding.
unsafe impl Pod for Slot {}

/// [`Slot::status`] after a failed call.
pub const FAILED: u64 = 1;

/// Steps that are no system calls.
pub mod op {
    /// Go on at the entry at argument 0.
    pub const JUMP: i64 = -1;
    /// rt_sigreturn with argument 0 as stack pointer.
    pub const SIGRETURN: i64 = -2;
    /// Sleep until the 32-bit word at argument 0 is 0 (the kernel clears it at the end of a thread).
    pub const WAIT_ZERO: i64 = -3;
    /// int3.
    pub const TRAP: i64 = -4;
    /// SIGSTOP to the thread itself (tkill(2)), again and again until its tracer sets it to [`super::next_entry_offset`].
    pub const STOP: i64 = -9;
    /// Copy the 64-bit word at argument 0 to argument 1.
    pub const COPY: i64 = -5;
    /// Store argument 1 in the 64-bit word at argument 0.
    pub const STORE: i64 = -6;
    /// Go on at the slot's `next`.
    pub const NEXT: i64 = -7;
    /// Use an AMX tile, so that the kernel makes room for tiles in what it keeps of the thread: their registers cannot be set before.
    pub const TILES: i64 = -8;
}

/// How the result of a call is judged.
pub mod flag {
    /// An error is a failure.
    pub const OK: u64 = 1;
    /// Anything but [`super::Entry::expect`] is a failure.
    pub const EQUAL: u64 = 2;
    /// EINTR is tried again.
    pub const RETRY: u64 = 4;
    /// The child of this call goes on with its own slot.
    pub const CLONE: u64 = 8;
}

global_asm!(
    ".pushsection .rodata.crtool_runner, \"a\", @progbits",
    ".balign 16",
    ".globl crtool_runner_start",
    "crtool_runner_start:",
    "10:",
    "mov rax, [rbx + {op}]",
    "test rax, rax",
    "js 30f",
    "mov rdi, [rbx + {args}]",
    "mov rsi, [rbx + {args} + 8]",
    "mov rdx, [rbx + {args} + 16]",
    "mov r10, [rbx + {args} + 24]",
    "mov r8, [rbx + {args} + 32]",
    "mov r9, [rbx + {args} + 40]",
    "syscall",
    // The child of a clone goes its own way.
    "test byte ptr [rbx + {flags}], {CLONE}",
    "jz 11f",
    "test rax, rax",
    "jnz 11f",
    "mov rbp, [rbx + {child_slot}]",
    "mov rbx, [rbp + {start}]",
    "jmp 10b",
    "11:",
    "mov [rbx + {result}], rax",
    "mov ecx, [rbx + {flags}]",
    "test cl, {RETRY}",
    "jz 12f",
    "cmp rax, -{EINTR}",
    "je 10b",
    "12:",
    "test cl, {OK}",
    "jz 13f",
    "cmp rax, -4095",
    "jae 20f",
    "13:",
    "test cl, {EQUAL}",
    "jz 14f",
    "cmp rax, [rbx + {expect}]",
    "jne 20f",
    "14:",
    ".globl crtool_runner_next",
    "crtool_runner_next:",
    "add rbx, {SIZE}",
    "jmp 10b",
    // Failure: say where, go on with the slot's list for that.
    "20:",
    "mov [rbp + {failed}], rbx",
    "mov qword ptr [rbp + {status}], {FAILED}",
    "mov rbx, [rbp + {on_fail}]",
    "jmp 10b",
    // Operations.
    "30:",
    "cmp rax, {JUMP}",
    "jne 31f",
    "mov rbx, [rbx + {args}]",
    "jmp 10b",
    "31:",
    "cmp rax, {SIGRETURN}",
    "jne 32f",
    "311:",
    "mov rsp, [rbx + {args}]",
    "mov eax, {SYS_RT_SIGRETURN}",
    "syscall",
    "jmp 311b",
    "32:",
    "cmp rax, {WAIT_ZERO}",
    "jne 33f",
    "321:",
    "mov rdi, [rbx + {args}]",
    "mov edx, [rdi]",
    "test edx, edx",
    "jz 14b",
    "mov eax, {SYS_FUTEX}",
    "xor esi, esi",
    "xor r10d, r10d",
    "syscall",
    "jmp 321b",
    "33:",
    "cmp rax, {TRAP}",
    "jne 34f",
    "int3",
    ".globl crtool_runner_trapped",
    "crtool_runner_trapped:",
    "jmp 14b",
    "34:",
    "cmp rax, {COPY}",
    "jne 35f",
    "mov rdi, [rbx + {args}]",
    "mov rax, [rdi]",
    "mov rdi, [rbx + {args} + 8]",
    "mov [rdi], rax",
    "jmp 14b",
    "35:",
    "cmp rax, {STORE}",
    "jne 36f",
    "mov rdi, [rbx + {args}]",
    "mov rax, [rbx + {args} + 8]",
    "mov [rdi], rax",
    "jmp 14b",
    "36:",
    "cmp rax, {NEXT}",
    "jne 37f",
    "mov rbx, [rbp + {next}]",
    "jmp 10b",
    "37:",
    "cmp rax, {STOP}",
    "jne 40f",
    "371:",
    "mov eax, {SYS_GETTID}",
    "syscall",
    "mov edi, eax",
    "mov esi, {SIGSTOP}",
    "mov eax, {SYS_TKILL}",
    "syscall",
    ".globl crtool_runner_stopped",
    "crtool_runner_stopped:",
    "jmp 371b",
    // ldtilecfg [39], tilezero tmm0, tilerelease; not every assembler knows them.
    "40:",
    ".byte 0xc4, 0xe2, 0x78, 0x49, 0x05",
    ".long 39f - 38f",
    "38:",
    ".byte 0xc4, 0xe2, 0x7b, 0x49, 0xc0",
    ".byte 0xc4, 0xe2, 0x78, 0x49, 0xc0",
    "jmp 14b",
    // A tile of one row of four bytes: palette, start row, 14 reserved; bytes of 16 rows, rows of 16 tiles.
    "39:",
    ".byte 1, 0",
    ".zero 14",
    ".short 4",
    ".zero 30",
    ".byte 1",
    ".zero 15",
    // A bare system call instruction, for calls whose return must be caught from outside.
    ".globl crtool_runner_syscall",
    "crtool_runner_syscall:",
    "syscall",
    "int3",
    ".globl crtool_runner_end",
    "crtool_runner_end:",
    ".popsection",
    op = const offset_of!(Entry, op),
    args = const offset_of!(Entry, args),
    flags = const offset_of!(Entry, flags),
    expect = const offset_of!(Entry, expect),
    child_slot = const offset_of!(Entry, child_slot),
    result = const offset_of!(Entry, result),
    SIZE = const size_of::<Entry>(),
    status = const offset_of!(Slot, status),
    failed = const offset_of!(Slot, failed),
    on_fail = const offset_of!(Slot, on_fail),
    start = const offset_of!(Slot, start),
    next = const offset_of!(Slot, next),
    OK = const flag::OK,
    EQUAL = const flag::EQUAL,
    RETRY = const flag::RETRY,
    CLONE = const flag::CLONE,
    FAILED = const FAILED,
    JUMP = const op::JUMP,
    SIGRETURN = const op::SIGRETURN,
    WAIT_ZERO = const op::WAIT_ZERO,
    TRAP = const op::TRAP,
    COPY = const op::COPY,
    STORE = const op::STORE,
    NEXT = const op::NEXT,
    STOP = const op::STOP,
    EINTR = const libc::EINTR,
    SYS_RT_SIGRETURN = const libc::SYS_rt_sigreturn,
    SYS_FUTEX = const libc::SYS_futex,
    SYS_GETTID = const libc::SYS_gettid,
    SYS_TKILL = const libc::SYS_tkill,
    SIGSTOP = const libc::SIGSTOP,
);

unsafe extern "C" {
    static crtool_runner_start: u8;
    static crtool_runner_next: u8;
    static crtool_runner_trapped: u8;
    static crtool_runner_stopped: u8;
    static crtool_runner_syscall: u8;
    static crtool_runner_end: u8;
}

/// The runner's code.
pub fn code() -> &'static [u8] {
    let start = &raw const crtool_runner_start;
    let end = &raw const crtool_runner_end;
    // SAFETY: both symbols delimit one read-only object defined above.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
}

fn offset(place: *const u8) -> u64 {
    (place as usize - &raw const crtool_runner_start as usize) as u64
}

/// Offset in [`code`] of a `syscall` instruction that belongs to no list.
pub fn bare_syscall_offset() -> u64 {
    offset(&raw const crtool_runner_syscall)
}

/// Offset in [`code`] of what goes on to the next entry of a list.
pub fn next_entry_offset() -> u64 {
    offset(&raw const crtool_runner_next)
}

/// Offset in [`code`] of where a thread is that has executed [`op::TRAP`].
pub fn behind_trap_offset() -> u64 {
    offset(&raw const crtool_runner_trapped)
}

/// Offset in [`code`] of where a thread is that has sent itself the signal of [`op::STOP`].
pub fn behind_stop_offset() -> u64 {
    offset(&raw const crtool_runner_stopped)
}
