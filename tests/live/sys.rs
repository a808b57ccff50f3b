//! Raw calls for targets and worker: the only unsafe code of the live suite, with assembler cases
//! in `cases/cpu.rs`. These fronts serve tests: they trust their callers with addresses.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::case::Clocks;

/// An errno.
pub type Errno = i32;

/// Any system call by number.
pub fn call(number: i64, args: &[usize]) -> Result<usize, Errno> {
    let arg = |n: usize| args.get(n).copied().unwrap_or(0);
    // SAFETY: a test target passes addresses of its own live objects; a wrong one gives EFAULT or
    // breaks the target, which fails its case.
    let result = unsafe { libc::syscall(number, arg(0), arg(1), arg(2), arg(3), arg(4), arg(5)) };
    if result == -1 {
        return Err(errno());
    }
    Ok(result.cast_unsigned() as usize)
}

/// `sys!(SYS_name, args...)`: a system call with arguments of any integer or pointer type.
macro_rules! sys {
    ($name:ident $(, $arg:expr)* $(,)?) => {
        $crate::sys::call(libc::$name, &[$($arg as usize),*])
    };
}

pub fn errno() -> Errno {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

pub fn mkdir(path: &CStr) {
    // A mark that is there already is as good.
    let _ = sys!(SYS_mkdir, path.as_ptr(), 0o777);
}

pub fn rmdir(path: &CStr) {
    let _ = sys!(SYS_rmdir, path.as_ptr());
}

pub fn exists(path: &CStr) -> bool {
    sys!(SYS_access, path.as_ptr(), 0).is_ok()
}

pub fn chmod(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
}

pub fn nap(time: Duration) {
    let spec = timespec(time);
    let _ = sys!(SYS_nanosleep, &raw const spec, 0);
}

pub fn timespec(time: Duration) -> libc::timespec {
    libc::timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: i64::from(time.subsec_nanos()) }
}

pub fn getpid() -> i32 {
    std::process::id().cast_signed()
}

pub fn gettid() -> i32 {
    sys!(SYS_gettid).map_or(-1, int)
}

/// A call's result as the int it is.
pub fn int(value: usize) -> i32 {
    i32::try_from(value).unwrap_or(-1)
}

pub fn setsid() {
    let _ = sys!(SYS_setsid);
}

pub fn close_from(first: u32) {
    let _ = sys!(SYS_close_range, first, u32::MAX, 0);
}

pub fn kill(pid: i32, signal: i32) {
    let _ = sys!(SYS_kill, pid, signal);
}

pub fn tgkill(pid: i32, tid: i32, signal: i32) {
    sys!(SYS_tgkill, pid, tid, signal).expect("tgkill");
}

pub fn exit_now(status: i32) -> ! {
    // SAFETY: _exit ends the process; nothing of it is used afterwards.
    unsafe { libc::_exit(status) }
}

/// Forks; the child runs `body` and exits with what it returns.
pub fn fork(body: impl FnOnce() -> i32) -> i32 {
    // SAFETY: targets that fork do so while their other threads hold no locks that the child needs.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: errno {}", errno());
    if pid == 0 {
        exit_now(body());
    }
    pid
}

/// A child made with clone(2) and a stack of its own, sharing what `flags` say.
pub fn clone_child(flags: i32, body: fn(usize) -> i32, arg: usize) -> i32 {
    extern "C" fn start(boxed: *mut libc::c_void) -> i32 {
        // SAFETY: `boxed` is the pair leaked below, alive until the process ends.
        let (body, arg) = unsafe { *boxed.cast::<(fn(usize) -> i32, usize)>() };
        body(arg)
    }
    let size = 256 << 10;
    let stack = Box::leak(vec![0_u8; size].into_boxed_slice()).as_mut_ptr();
    let boxed = Box::into_raw(Box::new((body, arg)));
    // SAFETY: the stack and the pair are leaked, so they outlive the child; 16-byte aligned below.
    let pid = unsafe {
        let top = stack.add(size & !15).map_addr(|a| a & !15);
        libc::clone(start, top.cast(), flags, boxed.cast())
    };
    assert!(pid > 0, "clone: errno {}", errno());
    pid
}

/// waitpid: the child and its raw wait status.
pub fn waitpid(pid: i32, options: i32) -> Result<(i32, i32), Errno> {
    let mut status = 0_i32;
    let got = sys!(SYS_wait4, pid, &raw mut status, options, 0)?;
    Ok((int(got), status))
}

/// Reaps any child; `None` if there is none.
pub fn wait_any() -> Option<(i32, i32)> {
    waitpid(-1, 0x4000_0000 /* __WALL */).ok()
}

/// A new terminal: its master, and the path of its slave.
pub fn open_terminal() -> (i32, std::path::PathBuf) {
    let master = open(c"/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC).expect("open /dev/ptmx");
    let (unlock, mut number) = (0_i32, 0_i32);
    sys!(SYS_ioctl, master, libc::TIOCSPTLCK, &raw const unlock).expect("TIOCSPTLCK");
    sys!(SYS_ioctl, master, libc::TIOCGPTN, &raw mut number).expect("TIOCGPTN");
    (master, format!("/dev/pts/{number}").into())
}

pub fn die_with_parent() {
    let _ = sys!(SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL);
}

pub fn become_subreaper() {
    let _ = sys!(SYS_prctl, libc::PR_SET_CHILD_SUBREAPER, 1);
}

/// The next child is init of a new pid namespace; mounts are ours alone.
pub fn new_pid_and_mount_namespace() -> Result<(), Errno> {
    sys!(SYS_unshare, libc::CLONE_NEWPID | libc::CLONE_NEWNS).map(drop)
}

/// As init of a pid namespace: a /proc that shows it, and no mount that leaks out.
pub fn private_proc() {
    let none = c"none".as_ptr();
    sys!(SYS_mount, none, c"/".as_ptr(), 0, libc::MS_REC | libc::MS_PRIVATE, 0).expect("private mounts");
    sys!(SYS_mount, c"proc".as_ptr(), c"/proc".as_ptr(), c"proc".as_ptr(), 0, 0).expect("mount /proc");
    // What a case puts there goes with us.
    let _ = sys!(SYS_mount, c"tmpfs".as_ptr(), c"/dev/shm".as_ptr(), c"tmpfs".as_ptr(), 0, 0);
    // Terminals of our own: their numbers must be free when they are restored. (Without it, too.)
    let data = c"newinstance,ptmxmode=0666,mode=0620".as_ptr();
    let _ = sys!(SYS_mount, c"devpts".as_ptr(), c"/dev/pts".as_ptr(), c"devpts".as_ptr(), 0, data);
}

/// A clock, now.
pub fn clock(id: i32) -> Duration {
    let mut now = timespec(Duration::ZERO);
    sys!(SYS_clock_gettime, id, &raw mut now).expect("clock_gettime");
    Duration::new(now.tv_sec.cast_unsigned(), u32::try_from(now.tv_nsec).expect("nanoseconds"))
}

/// Lets `command` start in a time namespace of its own, with these clocks.
pub fn in_time_namespace(command: &mut Command, clocks: Clocks) -> Result<(), String> {
    let text =
        std::fs::read_to_string("/proc/self/timens_offsets").map_err(|e| format!("our offsets: {e}"))?;
    let mut line = String::new();
    for (own, id, want) in
        [(0, libc::CLOCK_MONOTONIC, clocks.monotonic), (1, libc::CLOCK_BOOTTIME, clocks.boottime)]
    {
        let own = text.lines().nth(own).unwrap_or_default();
        let own: i64 = own.split_whitespace().nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        let offset = want - clock(id).as_secs().cast_signed() + own;
        line += &format!("{id} {offset} 0\n");
    }
    let enter = move || {
        let failed = |errno: Errno| std::io::Error::from_raw_os_error(errno);
        sys!(SYS_unshare, 0x80 /* CLONE_NEWTIME */).map_err(failed)?;
        let fd = open(c"/proc/self/timens_offsets", libc::O_WRONLY | libc::O_CLOEXEC).map_err(failed)?;
        write(fd, line.as_bytes()).map_err(failed)?;
        let next = c"/proc/self/ns/time_for_children";
        let fd = open(next, libc::O_RDONLY | libc::O_CLOEXEC).map_err(failed)?;
        sys!(SYS_setns, fd, 0x80).map_err(failed)?;
        Ok(())
    };
    // SAFETY: the child makes plain system calls with memory that is there already.
    unsafe { command.pre_exec(enter) };
    Ok(())
}

/// One instruction of classic BPF.
pub type Instruction = [u16; 4];

pub fn instruction(code: u16, jump_true: u8, jump_false: u8, value: u32) -> Instruction {
    let jumps = u16::from(jump_true) | u16::from(jump_false) << 8;
    [code, jumps, value as u16, (value >> 16) as u16]
}

/// Everything is allowed but `number`, which fails with `errno`.
pub fn deny(number: i64, errno: i32) -> Vec<Instruction> {
    vec![
        instruction(0x20, 0, 0, 0),
        instruction(0x15, 0, 1, number as u32),
        instruction(0x06, 0, 0, 0x0005_0000 | errno as u32),
        instruction(0x06, 0, 0, 0x7fff_0000),
    ]
}

/// Puts the calling thread under a seccomp filter.
pub fn install(filter: &[Instruction], flags: usize) -> Result<usize, Errno> {
    sys!(SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).expect("PR_SET_NO_NEW_PRIVS");
    let program = (filter.len(), filter.as_ptr());
    sys!(SYS_seccomp, 1, flags, &raw const program)
}

/// Lets `command` start under a seccomp filter by which call `number` fails.
pub fn without_call(command: &mut Command, number: i64) {
    let filter = deny(number, libc::EPERM);
    let enter = move || install(&filter, 0).map(drop).map_err(std::io::Error::from_raw_os_error);
    // SAFETY: the child makes plain system calls with memory that is there already.
    unsafe { command.pre_exec(enter) };
}

/// Field `number` of /proc/PID/stat, as proc(5) counts them.
pub fn stat_field(pid: i32, number: usize) -> String {
    stat_number(&std::fs::read(format!("/proc/{pid}/stat")).unwrap_or_default(), number)
}

/// Field `number` of a stat line; the name in brackets may hold anything.
pub fn stat_number(line: &[u8], number: usize) -> String {
    let Some(end) = line.iter().rposition(|&b| b == b')') else {
        return String::new();
    };
    let rest = String::from_utf8_lossy(line.get(end + 1..).unwrap_or_default()).into_owned();
    rest.split_whitespace().nth(number.wrapping_sub(3)).unwrap_or_default().to_owned()
}

/// A mapping that a target made; not undone, not moved.
#[derive(Debug, Clone, Copy)]
pub struct Mapped {
    pub addr: usize,
    pub len: usize,
}

/// mmap at an address the kernel picks, or at `addr` if that is not 0.
pub fn mmap(addr: usize, len: usize, access: i32, flags: i32, fd: i32, offset: i64) -> Result<Mapped, Errno> {
    let flags = if addr == 0 { flags } else { flags | libc::MAP_FIXED };
    let addr = sys!(SYS_mmap, addr, len, access, flags, fd, offset)?;
    Ok(Mapped { addr, len })
}

/// Private anonymous memory, readable and writable.
pub fn anon(len: usize) -> Mapped {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    mmap(0, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0).expect("mmap anonymous memory")
}

/// Anonymous memory shared with children forked later.
pub fn shared(len: usize) -> Mapped {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    mmap(0, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0).expect("mmap shared memory")
}

impl Mapped {
    /// A part of the mapping as an address for a raw call.
    pub fn at(&self, offset: usize) -> usize {
        assert!(offset < self.len, "offset {offset:#x} beyond {:#x}", self.len);
        self.addr + offset
    }

    pub fn get<T: Copy>(&self, offset: usize) -> T {
        assert!(offset + size_of::<T>() <= self.len, "read beyond the mapping");
        peek(self.addr + offset)
    }

    pub fn set<T: Copy>(&self, offset: usize, value: T) {
        assert!(offset + size_of::<T>() <= self.len, "write beyond the mapping");
        poke(self.addr + offset, value);
    }

    /// Fills every 8 bytes with a value made from the offset and `seed`.
    pub fn fill(&self, seed: u64) {
        for offset in (0..self.len - 7).step_by(8) {
            self.set(offset, pattern(seed, offset));
        }
    }

    /// Checks what `fill` wrote.
    #[track_caller]
    pub fn check(&self, seed: u64) {
        for offset in (0..self.len - 7).step_by(8) {
            let (got, want): (u64, u64) = (self.get(offset), pattern(seed, offset));
            assert_eq!(got, want, "content at offset {offset:#x}, seed {seed}");
        }
    }

    /// Checks that all of it is zero.
    #[track_caller]
    pub fn check_zero(&self) {
        for offset in (0..self.len - 7).step_by(8) {
            assert_eq!(self.get::<u64>(offset), 0, "content at offset {offset:#x}");
        }
    }
}

pub fn pattern(seed: u64, offset: usize) -> u64 {
    (offset as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17) ^ seed
}

/// Reads memory by address, really.
pub fn peek<T: Copy>(addr: usize) -> T {
    // SAFETY: the target passes an address that it mapped itself; a fault ends the case.
    unsafe { std::ptr::with_exposed_provenance::<T>(addr).read_volatile() }
}

/// Writes memory by address, really.
pub fn poke<T: Copy>(addr: usize, value: T) {
    // SAFETY: as for `peek`.
    unsafe { std::ptr::with_exposed_provenance_mut::<T>(addr).write_volatile(value) }
}

/// A word in memory as an atomic, for tasks that share it.
pub fn atomic(addr: usize) -> &'static std::sync::atomic::AtomicU64 {
    // SAFETY: the target maps `addr` (8-byte aligned) for its whole life.
    unsafe { std::sync::atomic::AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(addr)) }
}

/// An object by its address, for children that have a copy of their parent's memory.
pub fn borrow<T>(addr: usize) -> &'static T {
    // SAFETY: the caller passes the address of a `T` that lives as long as the process.
    unsafe { &*std::ptr::with_exposed_provenance::<T>(addr) }
}

/// A zeroed kernel struct, for calls that fill it.
pub fn zeroed<T: Copy>() -> T {
    // SAFETY: used for plain kernel structs of integers and arrays only.
    unsafe { std::mem::zeroed() }
}

pub fn pipe(flags: i32) -> (i32, i32) {
    let mut fds = [0_i32; 2];
    sys!(SYS_pipe2, fds.as_mut_ptr(), flags).expect("pipe2");
    (fds[0], fds[1])
}

/// Waits until something can be read, without reading it.
pub fn until_readable(fd: i32) {
    let mut item = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    assert_eq!(sys!(SYS_poll, &raw mut item, 1, -1_i32), Ok(1), "poll of descriptor {fd}");
}

pub fn write(fd: i32, bytes: &[u8]) -> Result<usize, Errno> {
    sys!(SYS_write, fd, bytes.as_ptr(), bytes.len())
}

/// Reads at most `len` bytes.
pub fn read(fd: i32, len: usize) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0_u8; len];
    let got = sys!(SYS_read, fd, bytes.as_mut_ptr(), len)?;
    bytes.truncate(got);
    Ok(bytes)
}

pub fn close(fd: i32) {
    sys!(SYS_close, fd).expect("close");
}

pub fn open(path: &CStr, flags: i32) -> Result<i32, Errno> {
    sys!(SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags, 0o644).map(int)
}

pub fn lseek(fd: i32, offset: i64, whence: i32) -> Result<usize, Errno> {
    sys!(SYS_lseek, fd, offset, whence)
}

pub fn fcntl(fd: i32, command: i32, arg: usize) -> Result<i32, Errno> {
    sys!(SYS_fcntl, fd, command, arg).map(int)
}

pub fn prctl(option: i32, a: usize, b: usize) -> Result<i32, Errno> {
    sys!(SYS_prctl, option, a, b, 0, 0).map(int)
}

/// Default actions for what a shell or a job runner may have set to be ignored: that is inherited.
pub fn default_signals() {
    for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP, libc::SIGTERM] {
        // SAFETY: no handler is installed, and no other thread runs yet.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Installs a signal handler by the kernel's own struct, flags and mask as given.
pub fn handle(signal: i32, handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void), flags: i32) {
    let mut action: libc::sigaction = zeroed();
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = flags | libc::SA_SIGINFO;
    // SAFETY: `action` is a valid struct and the handlers of the cases only touch atomics.
    let result = unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
    assert_eq!(result, 0, "sigaction {signal}: errno {}", errno());
}

/// A signal set of the kernel as bits: signal n is bit n-1.
pub fn mask_of(signals: &[i32]) -> u64 {
    signals.iter().fold(0, |mask, s| mask | 1 << (s - 1))
}

/// Sets this thread's signal mask; gives the old one.
pub fn sigprocmask(how: i32, mask: u64) -> u64 {
    let mut old = 0_u64;
    sys!(SYS_rt_sigprocmask, how, &raw const mask, &raw mut old, 8).expect("rt_sigprocmask");
    old
}

/// This thread's signal mask.
pub fn current_mask() -> u64 {
    let mut old = 0_u64;
    sys!(SYS_rt_sigprocmask, libc::SIG_BLOCK, 0, &raw mut old, 8).expect("rt_sigprocmask");
    old
}

/// Ends this thread alone, also if it is the leader.
pub fn thread_exit() -> ! {
    let _ = sys!(SYS_exit, 0);
    unreachable!("exit(2) came back")
}

/// Calls a routine that the target wrote into memory itself.
pub fn run_code(addr: usize) -> u32 {
    let code = std::ptr::with_exposed_provenance::<()>(addr);
    // SAFETY: the target has put `mov eax, imm32; ret` there and made it executable.
    unsafe {
        let code: extern "C" fn() -> u32 = std::mem::transmute(code);
        code()
    }
}
