//! A program whose own code, which crtool has to use before it has any of its own in it, is not what it was when crtool
//! looked.
//!
//! The code is in a file of the program's user, named like a C library. It is changed, by somebody else, when crtool is about
//! to use it: then it maps a file of root's, which the program may only read, where crtool wants its memory, or elsewhere.

use std::{
    fs::{self, File},
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
    path::Path,
    process::ExitCode,
};

use crate::{
    site::{NOBODY, Run, Site, Verdict, clear, dir, fail, lives, ready, until, word},
    sys::{self, Intruder, Rights},
};

/// Where the program has its code, and what is there.
const CODE: usize = 0x1000_0000;
const PARKED: usize = 0x10;
const CALL: usize = 0x100;
const OTHER: usize = 0x110;
/// The program's descriptor of the file of root's.
const VICTIM: i32 = 9;
/// `jmp` from [`CALL`] to [`OTHER`].
const DETOUR: [u8; 2] = [0xeb, 0x0e];

/// What the code does instead.
#[derive(Debug, Clone, Copy)]
pub enum Instead {
    /// Maps the file of root's where memory is wanted.
    There,
    /// Maps it elsewhere, and says where.
    Elsewhere,
    /// Makes no system call at all.
    Nothing,
    /// Makes a directory.
    Directory,
}

impl Instead {
    fn code(self) -> Vec<u8> {
        // mov edx, PROT_READ; mov r10d, MAP_SHARED; mov r8d, VICTIM; xor r9d, r9d
        let map = [0xba, 1, 0, 0, 0, 0x41, 0xba, 1, 0, 0, 0, 0x41, 0xb8, 9, 0, 0, 0, 0x45, 0x31, 0xc9];
        let call = [0x0f, 0x05, 0xeb, 0xfe]; // syscall; jmp to itself
        match self {
            Self::There => [&map[..], &call].concat(),
            // xor edi, edi
            Self::Elsewhere => [&map[..], &[0x31, 0xff], &call].concat(),
            Self::Nothing => vec![0xeb, 0xfe],
            // mov rdi, r12; mov esi, 0755; mov eax, mkdir
            Self::Directory => {
                [&[0x4c, 0x89, 0xe7, 0xbe, 0xed, 1, 0, 0, 0xb8, 0x53, 0, 0, 0], &call[..]].concat()
            }
        }
    }
}

/// A page of code for the program.
pub fn page(instead: Instead) -> Vec<u8> {
    let mut page = vec![0x90; 4096];
    let mut put = |at: usize, code: &[u8]| page[at..at + code.len()].copy_from_slice(code);
    put(PARKED, &[0xb8, 0x22, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7]); // mov eax, pause; syscall; jmp to the mov
    put(CALL, &[0x0f, 0x05, 0xc3]);
    put(OTHER, &instead.code());
    page
}

/// The program: its word says whether its code is mapped `shared`, `private`, or `together` with a process outside of its tree.
pub fn main() -> ExitCode {
    let dir = dir();
    nix::unistd::setsid().expect("setsid");
    let victim = File::open(dir.join("victim")).expect("victim");
    sys!(SYS_dup2, victim.as_raw_fd(), VICTIM).expect("dup2");
    drop(victim);
    sys::become_user(NOBODY, true);
    assert!(File::options().write(true).open(dir.join("victim")).is_err(), "the victim is no victim");
    if word() == "together" && dir.join("sandbox").exists() {
        sys::forbid_mkdir();
    }
    park(&dir)
}

/// Maps the code, and waits in it.
fn park(dir: &Path) -> ! {
    let code = File::open(dir.join("evil/libc-evil")).expect("code");
    let mark = format!("{}\0", dir.join("evil/mark").display()).leak();
    let flags = if word() == "shared" { libc::MAP_SHARED } else { libc::MAP_PRIVATE } | libc::MAP_FIXED;
    let prot = libc::PROT_READ | libc::PROT_EXEC | if word() == "together" { libc::PROT_WRITE } else { 0 };
    sys::map(CODE, 4096, prot, flags, code.as_raw_fd());
    drop(code);
    if word() == "together" {
        GO.set(format!("{}\0", dir.join("go").display())).expect("once");
        // Our parent's child: no part of our tree.
        assert!(sys::clone_sharing_memory(libc::CLONE_PARENT, change) > 0, "clone");
    }
    sys::without_vdso();
    ready();
    sys::pause_at(CODE + PARKED, [mark.as_ptr() as u64, 0, 0, 0])
}

static GO: std::sync::OnceLock<String> = std::sync::OnceLock::new();

/// Changes the code that we share, when it is time; by plain system calls, because all else is shared too.
fn change() {
    let go = GO.get().expect("a path").as_ptr();
    let nap = libc::timespec { tv_sec: 0, tv_nsec: 200_000 };
    while sys!(SYS_access, go, 0).is_err() {
        let _ = sys!(SYS_nanosleep, &raw const nap, 0);
    }
    sys::poke(CODE + CALL, &DETOUR);
    sys::rest()
}

pub fn shared_there(site: &mut Site) -> Verdict {
    overwritten(site, "shared", Instead::There)
}

pub fn shared_elsewhere(site: &mut Site) -> Verdict {
    overwritten(site, "shared", Instead::Elsewhere)
}

pub fn private_there(site: &mut Site) -> Verdict {
    overwritten(site, "private", Instead::There)
}

pub fn private_elsewhere(site: &mut Site) -> Verdict {
    overwritten(site, "private", Instead::Elsewhere)
}

pub fn together_there(site: &mut Site) -> Verdict {
    overwritten(site, "together", Instead::There)
}

pub fn together_elsewhere(site: &mut Site) -> Verdict {
    overwritten(site, "together", Instead::Elsewhere)
}

/// Nothing of root's file is changed, whatever the dump says.
fn overwritten(site: &Site, how: &str, instead: Instead) -> Verdict {
    let text = "root:x:0:0:root:/root:/bin/bash\n".repeat(3000);
    let run = attack(site, how, instead, &text)?;
    run.ended_well()?;
    let now = fs::read_to_string(site.path("victim")).unwrap_or_default();
    if now == text { Ok(()) } else { fail("a program that was dumped has changed a file of root") }
}

/// Code that never makes the call: the dump ends in time.
pub fn endless(site: &mut Site) -> Verdict {
    let begin = std::time::Instant::now();
    let run = attack(site, "private", Instead::Nothing, "")?;
    run.ended_well()?;
    if begin.elapsed() > std::time::Duration::from_secs(30) {
        return fail("the dump did not end in time");
    }
    Ok(())
}

/// A program in a sandbox, which a dump suspends, does not leave it by code that somebody else in the sandbox changes.
pub fn sandbox(site: &mut Site) -> Verdict {
    fs::write(site.path("sandbox"), "").map_err(|e| e.to_string())?;
    let run = attack(site, "together", Instead::Directory, "")?;
    run.ended_well()?;
    if site.path("evil/mark").exists() {
        return fail("a program in a sandbox made a system call that it may not make");
    }
    Ok(())
}

fn attack(site: &Site, how: &str, instead: Instead, victim: &str) -> Result<Run, crate::site::Trouble> {
    let evil = site.of_nobody("evil");
    fs::write(evil.join("libc-evil"), page(instead)).map_err(|e| e.to_string())?;
    std::os::unix::fs::chown(evil.join("libc-evil"), Some(NOBODY), Some(NOBODY))
        .map_err(|e| e.to_string())?;
    fs::write(site.path("victim"), victim).map_err(|e| e.to_string())?;
    let target = site.play("gadget", how)?;
    let pid = target.pid;
    let memory = File::open(format!("/proc/{pid}/mem")).map_err(|e| e.to_string())?;
    let intruder = Intruder::new(Rights::User(NOBODY));
    let (go, file, how) = (site.path("go"), evil.join("libc-evil"), how.to_owned());
    let mut changed = Ok(());
    let timeout = if matches!(instead, Instead::Nothing) { "2" } else { "600" };
    let run = site.step(&["dump", "-R", "-t", &pid.to_string(), "--timeout", timeout], |_, call| {
        let uses =
            call.enters && call.number == libc::SYS_ptrace && call.args[0] == u64::from(libc::PTRACE_SYSCALL);
        if !uses {
            return false;
        }
        if how == "together" {
            fs::write(&go, "").expect("go");
        } else {
            let file = file.clone();
            intruder.run(move || {
                let file = File::options().write(true).open(file).expect("own file");
                file.write_all_at(&DETOUR, CALL as u64).expect("write");
            });
        }
        changed = until("the code is changed", || {
            let mut bytes = [0; 2];
            memory.read_exact_at(&mut bytes, (CODE + CALL) as u64).is_ok() && bytes == DETOUR
        });
        true
    });
    changed?;
    if !memory.read_at(&mut [0], (CODE + CALL) as u64).is_ok_and(|n| n == 1)
        || !go_or(&site.path("evil/libc-evil"), &site.path("go"))
    {
        return fail(format!("crtool did not use the code of the program: {}", run.said));
    }
    // It was used by crtool alone, and goes on.
    if !lives(pid) {
        return fail(format!("the program did not survive: {}", run.said));
    }
    drop(target);
    clear(&[]);
    Ok(run)
}

/// Whether the code was changed: in its file, or in memory by who shares it.
fn go_or(file: &Path, go: &Path) -> bool {
    go.exists() || fs::read(file).is_ok_and(|page| page[CALL..CALL + 2] == DETOUR)
}
