//! The raw calls of the attacks.
#![allow(unsafe_code)]

use std::{
    fs,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::mpsc,
    thread,
};

/// A system call; an error as its number.
pub fn call(number: i64, args: &[usize]) -> Result<usize, i32> {
    let arg = |n: usize| args.get(n).copied().unwrap_or(0);
    // SAFETY: callers pass addresses of their own live objects, or of memory that they mapped; a wrong one is EFAULT.
    let result = unsafe { libc::syscall(number, arg(0), arg(1), arg(2), arg(3), arg(4), arg(5)) };
    if result == -1 {
        return Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0));
    }
    Ok(result.cast_unsigned() as usize)
}

/// `sys!(SYS_name, args...)`: a system call with arguments of any integer or pointer type.
macro_rules! sys {
    ($name:ident $(, $arg:expr)* $(,)?) => {
        $crate::sys::call(libc::$name, &[$($arg as usize),*])
    };
}

/// What the caller's shell left open is not for the trial.
pub fn close_inherited() {
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")
        .map(|entries| entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
        .unwrap_or_default();
    for fd in open.into_iter().filter(|&fd| fd > 2) {
        let _ = nix::unistd::close(fd);
    }
}

/// Forks; the child runs `body` and ends with what it returns. From a process with one thread.
pub fn fork(body: impl FnOnce() -> i32) -> i32 {
    // SAFETY: no other thread holds a lock that the child needs.
    match unsafe { libc::fork() } {
        0 => {
            let status = body();
            // SAFETY: no destructors of the parent's are wanted.
            unsafe { libc::_exit(status) }
        }
        pid => pid,
    }
}

/// clone(2) without a stack of its own: the child goes on as a fork does, with what `flags` say in common. Not with CLONE_VM.
pub fn clone_like_fork(flags: i32, body: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child has its own memory, so this is a fork.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if pid == 0 {
        let status = body();
        // SAFETY: no destructors of the parent's are wanted.
        unsafe { libc::_exit(status) }
    }
    i32::try_from(pid).unwrap_or(-1)
}

/// A child that shares our memory, on a stack of its own.
pub fn clone_sharing_memory(flags: i32, body: fn()) -> i32 {
    extern "C" fn start(body: *mut libc::c_void) -> i32 {
        // SAFETY: it is the function that was passed below.
        let body: fn() = unsafe { std::mem::transmute(body) };
        body();
        0
    }
    let stack = Box::leak(vec![0u8; 256 << 10].into_boxed_slice());
    let top = stack.as_mut_ptr().wrapping_add(stack.len() & !15).map_addr(|at| at & !15);
    // SAFETY: the stack is never freed; the child makes system calls and touches plain memory.
    unsafe { libc::clone(start, top.cast(), flags | libc::CLONE_VM, body as *mut libc::c_void) }
}

/// The calling thread alone becomes somebody without privileges. Others may look into its process only if `open`.
pub fn become_user(uid: u32, open: bool) {
    sys!(SYS_setgroups, 0, 0).expect("setgroups");
    sys!(SYS_setresgid, uid, uid, uid).expect("setresgid");
    sys!(SYS_setresuid, uid, uid, uid).expect("setresuid");
    // As after an execve, which resets what the change of ids did.
    sys!(SYS_prctl, libc::PR_SET_DUMPABLE, usize::from(open), 0, 0, 0).expect("PR_SET_DUMPABLE");
}

/// What execve could give the calling thread becomes nothing.
pub fn drop_capabilities_at_exec() {
    for cap in 0..64usize {
        let _ = sys!(SYS_prctl, libc::PR_CAPBSET_DROP, cap, 0, 0, 0);
    }
}

/// Gives up all capabilities of the calling thread, which stays root by name; also what it could get back by execve.
pub fn drop_capabilities() {
    drop_capabilities_at_exec();
    let header = [0x2008_0522u32, 0];
    let none = [0u32; 6];
    sys!(SYS_capset, header.as_ptr(), none.as_ptr()).expect("capset");
}

/// A thread with the rights of an attacker, for whoever has all of them.
#[derive(Debug)]
pub struct Intruder {
    jobs: mpsc::Sender<Box<dyn FnOnce() + Send>>,
}

/// Who an intruder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rights {
    /// Another user.
    User(u32),
    /// Root without capabilities.
    BareRoot,
}

impl Intruder {
    pub fn new(rights: Rights) -> Self {
        let (jobs, todo) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        thread::spawn(move || {
            match rights {
                Rights::User(uid) => become_user(uid, false),
                Rights::BareRoot => drop_capabilities(),
            }
            todo.iter().for_each(|job| job());
        });
        Self { jobs }
    }

    /// Does something with the intruder's rights.
    pub fn run<R: Send + 'static>(&self, job: impl FnOnce() -> R + Send + 'static) -> R {
        let (tell, told) = mpsc::channel();
        let job = move || drop(tell.send(job()));
        self.jobs.send(Box::new(job)).expect("the intruder is there");
        told.recv().expect("the intruder answers")
    }
}

/// A copy of another process's descriptor.
pub fn descriptor_of(pid: i32, number: i32) -> Result<OwnedFd, i32> {
    // SAFETY: both calls give new descriptors.
    let own = |fd: usize| unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap_or(-1)) };
    let process = own(sys!(SYS_pidfd_open, pid, 0)?);
    Ok(own(sys!(SYS_pidfd_getfd, process.as_raw_fd(), number, 0)?))
}

/// Private or shared memory, of a file or not, at `at`.
pub fn map(at: usize, len: usize, prot: i32, flags: i32, fd: i32) -> usize {
    sys!(SYS_mmap, at, len, prot, flags, fd, 0).expect("mmap")
}

/// Writes to memory of our own by address.
pub fn poke(at: usize, bytes: &[u8]) {
    // SAFETY: the caller has mapped it, writable.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), std::ptr::with_exposed_provenance_mut(at), bytes.len());
    }
}

/// Waits in pause(2) for ever, by code at `at`, with these words in r12 to r15.
pub fn pause_at(at: usize, words: [u64; 4]) -> ! {
    // SAFETY: the code at `at` makes system calls in a loop, and does not return.
    unsafe {
        std::arch::asm!("jmp {}", in(reg) at, in("r12") words[0], in("r13") words[1], in("r14") words[2],
            in("r15") words[3], options(noreturn));
    }
}

pub fn ignore(signal: i32) {
    // SAFETY: no handler.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// Takes away the kernel's code that every program has. Nothing that asks for the time works any more.
pub fn without_vdso() {
    let maps = fs::read_to_string("/proc/self/maps").expect("maps");
    let Some(line) = maps.lines().find(|line| line.ends_with("[vdso]")) else { return };
    let range = line.split(' ').next().and_then(|range| range.split_once('-')).expect("range");
    let [start, end] = [range.0, range.1].map(|at| usize::from_str_radix(at, 16).expect("address"));
    sys!(SYS_munmap, start, end - start).expect("munmap");
}

/// A seccomp filter under which mkdir(2) fails.
pub fn forbid_mkdir() {
    let insn = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(0),
        jt,
        jf,
        k,
    };
    let filter = [
        insn(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        insn(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, 83),
        insn(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | 1),
        insn(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_ptr().cast_mut() };
    sys!(SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).expect("PR_SET_NO_NEW_PRIVS");
    sys!(SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program).expect("seccomp");
}

/// Orphans below come to us.
pub fn become_subreaper() {
    sys!(SYS_prctl, libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0).expect("PR_SET_CHILD_SUBREAPER");
}

/// Sleeps for ever.
pub fn rest() -> ! {
    loop {
        let _ = sys!(SYS_pause);
    }
}
