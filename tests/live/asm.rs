//! Register contents that only assembler can hold still: each routine fills registers, spins in
//! user space until a word becomes non-zero, and stores what it finds.
#![allow(unsafe_code)]

use std::arch::global_asm;

global_asm!(
    r#"
    .globl live_spin_gprs
    # rdi = flag, rsi = out[15]: rax rbx rcx rdx rdi rbp r8..r15 flags
live_spin_gprs:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    push rsi
    # CF PF AF ZF SF DF OF set, none of which the loop touches
    pushfq
    or qword ptr [rsp], 0xcd5
    mov rax, 0x1122334455667701
    mov rbx, 0x1122334455667702
    mov rdx, 0x1122334455667704
    mov rsi, 0x1122334455667705
    mov rbp, 0x1122334455667706
    mov r8,  0x1122334455667708
    mov r9,  0x1122334455667709
    mov r10, 0x112233445566770a
    mov r11, 0x112233445566770b
    mov r12, 0x112233445566770c
    mov r13, 0x112233445566770d
    mov r14, 0x112233445566770e
    mov r15, 0x112233445566770f
    popfq
2:
    mov rcx, [rdi]
    jrcxz 2b
    pushfq
    cld
    # [rsp] = flags, [rsp+8] = out
    xchg rax, [rsp + 8]
    mov [rax + 8], rbx
    mov [rax + 16], rcx
    mov [rax + 24], rdx
    mov [rax + 32], rsi
    mov [rax + 40], rbp
    mov [rax + 48], r8
    mov [rax + 56], r9
    mov [rax + 64], r10
    mov [rax + 72], r11
    mov [rax + 80], r12
    mov [rax + 88], r13
    mov [rax + 96], r14
    mov [rax + 104], r15
    pop rbx
    mov [rax + 112], rbx
    pop rbx
    mov [rax], rbx
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

    .globl live_spin_zmm
    # rdi = flag, rsi = zmm in, rdx = zmm out, rcx = k in, r8 = k out
live_spin_zmm:
    .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    vmovdqu64 zmm\n, [rsi + 64*\n]
    .endr
    .irp n,0,1,2,3,4,5,6,7
    kmovq k\n, [rcx + 8*\n]
    .endr
2:
    mov rax, [rdi]
    test rax, rax
    jz 2b
    .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    vmovdqu64 [rdx + 64*\n], zmm\n
    .endr
    .irp n,0,1,2,3,4,5,6,7
    kmovq [r8 + 8*\n], k\n
    .endr
    vzeroupper
    ret

    .globl live_spin_ymm
    # rdi = flag, rsi = ymm in, rdx = ymm out
live_spin_ymm:
    .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    vmovdqu ymm\n, [rsi + 32*\n]
    .endr
2:
    mov rax, [rdi]
    test rax, rax
    jz 2b
    .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    vmovdqu [rdx + 32*\n], ymm\n
    .endr
    vzeroupper
    ret

    .globl live_spin_xmm
    # rdi = flag, rsi = xmm in, rdx = xmm out
live_spin_xmm:
    .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    movdqu xmm\n, [rsi + 16*\n]
    .endr
2:
    mov rax, [rdi]
    test rax, rax
    jz 2b
    .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    movdqu [rdx + 16*\n], xmm\n
    .endr
    ret

    .globl live_spin_tiles
    # rdi = flag, rsi = configuration of 64 bytes, rdx = tiles in[8][1024], rcx = tiles out[8][1024], r8 = configuration out
live_spin_tiles:
    # ldtilecfg [rsi]
    .byte 0xc4, 0xe2, 0x78, 0x49, 0x06
    mov eax, 64
    # tileloadd tmmN, [rdx + rax]; add rdx, 1024
    .irp n,0,1,2,3,4,5,6,7
    .byte 0xc4, 0xe2, 0x7b, 0x4b, 0x04 + 8*\n, 0x02
    add rdx, 1024
    .endr
2:
    mov r9, [rdi]
    test r9, r9
    jz 2b
    # tilestored [rcx + rax], tmmN; add rcx, 1024
    .irp n,0,1,2,3,4,5,6,7
    .byte 0xc4, 0xe2, 0x7a, 0x4b, 0x04 + 8*\n, 0x01
    add rcx, 1024
    .endr
    # sttilecfg [r8]
    .byte 0xc4, 0xc2, 0x79, 0x49, 0x00
    # tilerelease
    .byte 0xc4, 0xe2, 0x78, 0x49, 0xc0
    ret

    .globl live_spin_x87
    # rdi = flag, rsi = doubles in[8], rdx = doubles out[8], rcx = u32 out[2]: mxcsr, control word
live_spin_x87:
    push 0x5fa0
    stmxcsr [rsp + 4]
    ldmxcsr [rsp]
    fninit
    push 0x0c7f
    fldcw [rsp]
    .irp n,0,1,2,3,4,5,6,7
    fld qword ptr [rsi + 8*\n]
    .endr
2:
    mov rax, [rdi]
    test rax, rax
    jz 2b
    .irp n,7,6,5,4,3,2,1,0
    fstp qword ptr [rdx + 8*\n]
    .endr
    stmxcsr [rcx]
    mov dword ptr [rcx + 4], 0
    fnstcw [rcx + 4]
    fninit
    pop rax
    ldmxcsr [rsp + 4]
    pop rax
    ret
"#
);

type Spin5 = extern "C" fn(*const u64, *const u8, *mut u8, *const u64, *mut u64);

// SAFETY: the routines above keep to the C calling convention.
unsafe extern "C" {
    safe fn live_spin_gprs(flag: *const u64, out: *mut u64);
    safe fn live_spin_zmm(flag: *const u64, from: *const u8, to: *mut u8, k: *const u64, k_to: *mut u64);
    safe fn live_spin_ymm(flag: *const u64, from: *const u8, to: *mut u8);
    safe fn live_spin_xmm(flag: *const u64, from: *const u8, to: *mut u8);
    safe fn live_spin_tiles(flag: *const u64, cfg: *const u8, from: *const u8, to: *mut u8, cfg_to: *mut u8);
    safe fn live_spin_x87(flag: *const u64, from: *const f64, to: *mut f64, words: *mut u32);
}

/// The general registers after spinning: rax rbx rcx rdx rsi rbp r8-r15, then the flags.
pub fn spin_gprs(flag: &std::sync::atomic::AtomicU64) -> [u64; 15] {
    let mut out = [0; 15];
    live_spin_gprs(flag.as_ptr(), out.as_mut_ptr());
    out
}

/// What `spin_gprs` must give, flags apart; rcx holds the flag word.
pub fn expected_gprs(flag: u64) -> [u64; 14] {
    let base = 0x1122_3344_5566_7700_u64;
    [
        base + 1,
        base + 2,
        flag,
        base + 4,
        base + 5,
        base + 6,
        base + 8,
        base + 9,
        base + 10,
        base + 11,
        base + 12,
        base + 13,
        base + 14,
        base + 15,
    ]
}

/// CF PF AF ZF SF DF OF.
pub const STATUS_FLAGS: u64 = 0xcd5;

/// The widest vector registers of this machine, spun with `bytes` in them.
pub fn spin_vectors(
    flag: &std::sync::atomic::AtomicU64,
    width: usize,
    bytes: &[u8],
    masks: &[u64; 8],
) -> (Vec<u8>, [u64; 8]) {
    let mut out = vec![0_u8; bytes.len()];
    let mut masks_out = *masks;
    match width {
        64 => {
            assert!(bytes.len() >= 32 * 64);
            masks_out = [0; 8];
            let spin: Spin5 = live_spin_zmm;
            spin(flag.as_ptr(), bytes.as_ptr(), out.as_mut_ptr(), masks.as_ptr(), masks_out.as_mut_ptr());
        }
        32 => {
            assert!(bytes.len() >= 16 * 32);
            live_spin_ymm(flag.as_ptr(), bytes.as_ptr(), out.as_mut_ptr());
        }
        _ => {
            assert!(bytes.len() >= 16 * 16);
            live_spin_xmm(flag.as_ptr(), bytes.as_ptr(), out.as_mut_ptr());
        }
    }
    (out, masks_out)
}

/// The eight AMX tiles and their configuration after spinning; the process has the permission.
pub fn spin_tiles(
    flag: &std::sync::atomic::AtomicU64,
    bytes: &[u8; 8192],
    config: &[u8; 64],
) -> (Vec<u8>, [u8; 64]) {
    let (mut out, mut config_out) = (vec![0; 8192], [0; 64]);
    live_spin_tiles(
        flag.as_ptr(),
        config.as_ptr(),
        bytes.as_ptr(),
        out.as_mut_ptr(),
        config_out.as_mut_ptr(),
    );
    (out, config_out)
}

/// The x87 stack, mxcsr and control word after spinning.
pub fn spin_x87(flag: &std::sync::atomic::AtomicU64, values: &[f64; 8]) -> ([f64; 8], [u32; 2]) {
    let mut out = [0.0; 8];
    let mut words = [0; 2];
    live_spin_x87(flag.as_ptr(), values.as_ptr(), out.as_mut_ptr(), words.as_mut_ptr());
    (out, words)
}

/// mxcsr and x87 control word that `spin_x87` sets: other rounding, a sticky flag.
pub const X87_WORDS: [u32; 2] = [0x5fa0, 0x0c7f];

/// The pkru register; the caller knows that the processor has it.
pub fn read_pkru() -> u32 {
    let value: u32;
    // SAFETY: RDPKRU only reads a register; ecx must be 0.
    unsafe { std::arch::asm!("rdpkru", out("eax") value, in("ecx") 0, out("edx") _) };
    value
}

pub fn write_pkru(value: u32) {
    // SAFETY: the caller denies access only to keys that no memory of the target carries.
    unsafe { std::arch::asm!("wrpkru", in("eax") value, in("ecx") 0, in("edx") 0) };
}

/// The address that `offset` from the thread pointer has.
pub fn thread_pointer() -> u64 {
    let value: u64;
    // SAFETY: on x86-64 the word at fs:0 is the thread pointer itself.
    unsafe { std::arch::asm!("mov {}, fs:0", out(reg) value, options(readonly, nostack)) };
    value
}

/// A word addressed through gs.
pub fn read_gs(offset: u64) -> u64 {
    let value: u64;
    // SAFETY: the caller has pointed the gs base at memory of its own.
    unsafe {
        std::arch::asm!("mov {0}, gs:[{1}]", out(reg) value, in(reg) offset, options(readonly, nostack))
    };
    value
}

/// glibc's rseq area, as an offset from the thread pointer; `None` where it registers none.
pub fn rseq_offset() -> Option<i64> {
    // SAFETY: dlsym is given static strings; the symbols are plain words of glibc 2.35 and later.
    let (offset, size) = unsafe {
        let offset = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()).cast::<isize>();
        let size = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr()).cast::<u32>();
        if offset.is_null() || size.is_null() {
            return None;
        }
        (*offset, *size)
    };
    (size > 0).then_some(offset as i64)
}
