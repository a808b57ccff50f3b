//! The runner: position-independent code that executes a list of system calls.
//!
//! It is copied into a shared mapping and entered with rbx = first [`Entry`](crate::tracee::list)
//! and rbp = the slot of the executing thread. It uses no stack and no memory but the list and the slot.
//! Layouts (offsets in bytes) are asserted here and in `tracee/list.rs`:
//! entry: 0 op, 8..56 arguments, 56 flags, 64 expected, 72 child's slot, 80 result; 88 bytes.
//! slot: 0 status, 8 failed entry, 16 entry to go on with after a failure, 24 first entry, 32 next list.
//! Operations: >= 0 system call number, -1 jump to argument 0, -2 sigreturn with the frame at argument 0,
//! -3 wait while `*(u32 *)arg0 < arg1`, -4 trap, -5 copy the word at arg0 to arg1,
//! -6 store arg1 at `*(u32 *)arg0` and wake its waiters, -7 go on at the slot's next list.

use std::{
    arch::global_asm,
    mem::{offset_of, size_of},
};

use super::pod::Pod;

/// One step as the runner sees it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Entry {
    pub op: i64,
    pub args: [u64; 6],
    pub flags: u64,
    pub expect: u64,
    pub child_slot: u64,
    pub result: u64,
}
const _: () = assert!(size_of::<Entry>() == 88);
const _: () = assert!(offset_of!(Entry, result) == 80);
// SAFETY: integers only, without padding.
unsafe impl Pod for Entry {}

global_asm!(
    ".pushsection .rodata.crtool_runner, \"a\", @progbits",
    ".balign 16",
    ".globl crtool_runner_start",
    "crtool_runner_start:",
    "10:",
    "mov rax, [rbx]",
    "test rax, rax",
    "js 30f",
    "mov rdi, [rbx + 8]",
    "mov rsi, [rbx + 16]",
    "mov rdx, [rbx + 24]",
    "mov r10, [rbx + 32]",
    "mov r8, [rbx + 40]",
    "mov r9, [rbx + 48]",
    "syscall",
    // The child of a clone goes its own way.
    "test byte ptr [rbx + 56], 8",
    "jz 11f",
    "test rax, rax",
    "jnz 11f",
    "mov rbp, [rbx + 72]",
    "mov rbx, [rbp + 24]",
    "jmp 10b",
    "11:",
    "mov [rbx + 80], rax",
    "mov ecx, [rbx + 56]",
    "test cl, 4",
    "jz 12f",
    "cmp rax, -4",
    "je 10b",
    "12:",
    "test cl, 1",
    "jz 13f",
    "cmp rax, -4095",
    "jae 20f",
    "13:",
    "test cl, 2",
    "jz 14f",
    "cmp rax, [rbx + 64]",
    "jne 20f",
    "14:",
    "add rbx, 88",
    "jmp 10b",
    // Failure: say where, go on with the slot's list for that.
    "20:",
    "mov [rbp + 8], rbx",
    "mov qword ptr [rbp], 1",
    "mov rbx, [rbp + 16]",
    "jmp 10b",
    // Operations.
    "30:",
    "cmp rax, -1",
    "jne 31f",
    "mov rbx, [rbx + 8]",
    "jmp 10b",
    "31:",
    "cmp rax, -2",
    "jne 32f",
    "311:",
    "mov rsp, [rbx + 8]",
    "mov eax, 15",
    "syscall",
    "jmp 311b",
    "32:",
    "cmp rax, -3",
    "jne 33f",
    "321:",
    "mov rdi, [rbx + 8]",
    "mov edx, [rdi]",
    "cmp edx, [rbx + 16]",
    "jae 14b",
    "mov eax, 202",
    "xor esi, esi",
    "xor r10d, r10d",
    "syscall",
    "jmp 321b",
    "33:",
    "cmp rax, -4",
    "jne 34f",
    "int3",
    "jmp 14b",
    "34:",
    "cmp rax, -5",
    "jne 35f",
    "mov rdi, [rbx + 8]",
    "mov rax, [rdi]",
    "mov rdi, [rbx + 16]",
    "mov [rdi], rax",
    "jmp 14b",
    "35:",
    "cmp rax, -6",
    "jne 36f",
    "mov rdi, [rbx + 8]",
    "mov eax, [rbx + 16]",
    "mov [rdi], eax",
    "mov eax, 202",
    "mov esi, 1",
    "mov edx, 0x7fffffff",
    "syscall",
    "jmp 14b",
    "36:",
    "mov rbx, [rbp + 32]",
    "jmp 10b",
    // A bare system call instruction, for calls whose return must be caught from outside.
    ".globl crtool_runner_syscall",
    "crtool_runner_syscall:",
    "syscall",
    "int3",
    ".globl crtool_runner_end",
    "crtool_runner_end:",
    ".popsection",
);

unsafe extern "C" {
    static crtool_runner_start: u8;
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

/// Offset in [`code`] of a `syscall` instruction that belongs to no list.
pub fn bare_syscall_offset() -> u64 {
    (&raw const crtool_runner_syscall as usize - &raw const crtool_runner_start as usize) as u64
}
