//! For tests: a child under ptrace that makes any system call and runs any list.
//!
//! The child is `sleep`, so nothing is inherited from the test process but descriptors and limits. It is
//! killed when the test ends. All requests must come from the thread that made it.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use libc::user_regs_struct;

use crate::{
    sys::{pid::HostPid, ptrace, wait, wait::Status},
    tracee::{Area, List, Memory, Op, Placed, RemoteAddr, RemoteMemory, TraceError},
};

/// Where the area for lists is mapped in the child: far from everything else.
const AREA_AT: u64 = 0x1000_0000_0000;
const AREA_LEN: usize = 1 << 20;

/// Waits until a child that is or will be `sleep` sleeps: its program is there, and all its memory.
pub(crate) fn until_asleep(pid: HostPid) {
    let sleeps = [libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_restart_syscall];
    let asleep = || {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let call = read("syscall");
        read("comm").trim() == "sleep" && sleeps.iter().any(|nr| call.starts_with(&format!("{nr} ")))
    };
    while !asleep() {
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[derive(Debug)]
pub(crate) struct Target {
    child: Child,
    mem: File,
    /// Address of a `syscall` instruction.
    syscall: u64,
    /// Its registers when it was stopped, inside its sleep.
    pub(crate) regs: user_regs_struct,
    pub(crate) area: Area,
}

impl Target {
    /// A new child, stopped.
    pub(crate) fn new() -> Self {
        // Without randomisation, so that addresses of one child mean the same in another.
        let child = Command::new("setarch")
            .args(["x86_64", "-R", "sleep", "1000"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let pid = HostPid::new(child.id().cast_signed());
        until_asleep(pid);
        let options = ptrace::O_TRACESYSGOOD | ptrace::O_EXITKILL | ptrace::O_SUSPEND_SECCOMP;
        ptrace::seize(pid, options).unwrap();
        ptrace::interrupt(pid).unwrap();
        assert_eq!(wait::wait(pid).unwrap(), Status::Stopped(libc::SIGTRAP, ptrace::EVENT_STOP));
        let regs = ptrace::get_regs(pid).unwrap();
        let mem = File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).unwrap();
        let memory = Memory::File(Arc::new(RemoteMemory::open(pid).unwrap()));
        let area = Area::with_code(RemoteAddr(AREA_AT), AREA_LEN, memory);
        let target = Self { child, mem, syscall: regs.rip - 2, regs, area };
        let mut insn = [0u8; 2];
        target.read(target.syscall, &mut insn);
        assert_eq!(insn, [0x0f, 0x05]);
        let prot = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
        let at = target.call(libc::SYS_mmap, &[AREA_AT, AREA_LEN as u64, prot, flags, u64::MAX, 0]);
        assert_eq!(at.cast_unsigned(), AREA_AT);
        target
    }

    pub(crate) fn pid(&self) -> HostPid {
        HostPid::new(self.child.id().cast_signed())
    }

    pub(crate) fn read(&self, at: u64, bytes: &mut [u8]) {
        self.mem.read_exact_at(bytes, at).unwrap();
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.mem.write_all_at(bytes, at).unwrap();
    }

    /// Below this nothing lives that the child still needs.
    pub(crate) fn scratch(&self) -> u64 {
        (self.regs.rsp - 65536) & !63
    }

    pub(crate) fn xstate(&self) -> Vec<u8> {
        let mut area = vec![0; 16 << 10];
        let len = ptrace::get_regset(self.pid(), ptrace::NT_X86_XSTATE, &mut area).unwrap();
        area.truncate(len);
        area
    }

    /// To the next stop at a system call, which must be the next thing that happens.
    fn step(&self) {
        ptrace::syscall(self.pid(), 0).unwrap();
        assert_eq!(wait::wait(self.pid()).unwrap(), Status::Stopped(libc::SIGTRAP | 0x80, 0));
    }

    /// Enters a system call with `regs` as they are but for the instruction pointer, and stops behind it.
    pub(crate) fn enter(&self, mut regs: user_regs_struct) -> user_regs_struct {
        regs.rip = self.syscall;
        regs.orig_rax = u64::MAX;
        ptrace::set_regs(self.pid(), &regs).unwrap();
        self.step();
        self.step();
        ptrace::get_regs(self.pid()).unwrap()
    }

    /// What a system call returns in the child, errors negative.
    pub(crate) fn call(&self, nr: i64, args: &[u64]) -> i64 {
        let arg = |n: usize| args.get(n).copied().unwrap_or(0);
        let regs = user_regs_struct {
            rax: nr.cast_unsigned(),
            rdi: arg(0),
            rsi: arg(1),
            rdx: arg(2),
            r10: arg(3),
            r8: arg(4),
            r9: arg(5),
            ..self.regs
        };
        self.enter(regs).rax.cast_signed()
    }

    /// Runs `list` in the child to its end.
    pub(crate) fn run(&mut self, list: &List) -> Result<Placed, TraceError> {
        let mut list = list.clone();
        list.op(Op::Trap);
        let mut end = List::new("end");
        end.op(Op::Trap);
        let placed = self.area.place(&list)?;
        let end = self.area.place(&end)?;
        let slot = self.area.slot()?;
        self.area.arm(slot, placed.start, end.start)?;
        self.area.flush()?;
        let regs = user_regs_struct {
            rip: self.area.runner().0,
            rbx: placed.start.0,
            rbp: slot.0,
            orig_rax: u64::MAX,
            ..self.regs
        };
        ptrace::set_regs(self.pid(), &regs).unwrap();
        ptrace::cont(self.pid(), 0).unwrap();
        assert_eq!(wait::wait(self.pid()).unwrap(), Status::Stopped(libc::SIGTRAP, 0));
        match self.area.failure(slot, &[&placed])? {
            Some(failure) => Err(failure.error),
            None => Ok(placed),
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = wait::wait(self.pid());
    }
}
