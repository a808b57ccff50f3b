//! What the kernel keeps of a thread and shows nowhere, read by a BPF program of ours (Linux 6.1, CAP_BPF and CAP_PERFMON, BTF).
//!
//! Until when an interrupted call waits. The program only copies; where to find things is in the kernel's own description of
//! its types. Where all this cannot be had, a dump does without it. Only threads are asked for that crtool has stopped by ptrace,
//! whose numbers cannot be given to others, and nothing stays loaded: program and link live as long as their descriptors.

use std::{
    fs::{self, File},
    io::Read as _,
    os::fd::{AsFd as _, OwnedFd},
};

use crate::{
    proc::{ParseError, btf::Btf},
    sys::{
        Errno,
        bpf::{self, Insn, MappedTypes, TYPES},
        pid::HostPid,
        pod,
    },
};

/// Longest restart block that is read.
const LONGEST_BLOCK: u32 = 128;

/// Why nothing can be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PeekError {
    #[error("{TYPES}: {0}")]
    Types(std::io::Error),
    #[error(transparent)]
    Parse(#[from] ParseError),
    #[error("load of a BPF program: {0}")]
    Load(Errno),
    #[error("run of a BPF program over thread {0}: {1}")]
    Run(HostPid, Errno),
    #[error("a BPF program wrote {0} bytes")]
    Length(usize),
}

/// Where a call that left a restart block is to go on. Which part means anything depends on the call; the others are what
/// the same bytes would mean for other calls.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct RestartBlock {
    pub(crate) nanosleep: Nanosleep,
    pub(crate) futex: Futex,
    pub(crate) poll: Poll,
}

/// Of nanosleep and clock_nanosleep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Nanosleep {
    /// The clock that ends it.
    pub(crate) clock: i32,
    /// Address of what is left.
    pub(crate) rest: u64,
    /// When it ends, in nanoseconds of the host's clock.
    pub(crate) until: u64,
}

/// Of futex.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Futex {
    /// Address of the word.
    pub(crate) word: u64,
    pub(crate) value: u32,
    pub(crate) bitset: u32,
    /// When it ends, in nanoseconds of CLOCK_MONOTONIC of the host.
    pub(crate) until: u64,
}

/// Of poll.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Poll {
    /// Address of the descriptors.
    pub(crate) fds: u64,
    pub(crate) count: u32,
    /// 1 if it has a timeout, 0 if not; of other calls, anything.
    pub(crate) has_timeout: u8,
    /// When it ends, in seconds and nanoseconds of CLOCK_MONOTONIC of the host.
    pub(crate) until: (u64, u64),
}

/// Offsets within a restart block.
#[derive(Debug, Clone, Copy)]
struct Block {
    len: usize,
    /// clockid, rmtp, expires
    nanosleep: [usize; 3],
    /// uaddr, val, bitset, time
    futex: [usize; 4],
    /// ufds, nfds, has_timeout, seconds, nanoseconds
    poll: [usize; 5],
}

/// The program.
#[derive(Debug)]
pub(crate) struct TaskPeek {
    block: Block,
    restart_block: OwnedFd,
}

const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const R7: u8 = 7;
const R8: u8 = 8;
/// The end of the stack.
const FP: u8 = 10;
const PROBE_READ_KERNEL: i32 = 113;
const SEQ_WRITE: i32 = 127;

/// A program in the making.
#[derive(Debug, Default)]
struct Program(Vec<Insn>);

impl Program {
    fn add(&mut self, code: u8, dst: u8, src: u8, offset: i16, value: i32) {
        self.0.push(Insn { code, registers: src << 4 | dst, offset, value });
    }
    /// dst = *(u64 *)(src + offset)
    fn load(&mut self, dst: u8, src: u8, offset: i16) {
        self.add(0x79, dst, src, offset, 0);
    }
    fn copy(&mut self, dst: u8, src: u8) {
        self.add(0xbf, dst, src, 0, 0);
    }
    fn set(&mut self, dst: u8, value: i32) {
        self.add(0xb7, dst, 0, 0, value);
    }
    fn add_to(&mut self, dst: u8, value: i32) {
        self.add(0x07, dst, 0, 0, value);
    }
    fn end(&mut self) {
        self.set(R0, 0);
        self.add(0x95, 0, 0, 0, 0);
    }

    /// R7 becomes the task, R8 the file to write to. For the end of all tasks nothing is to be done.
    fn begin(&mut self) {
        self.load(R7, R1, 8);
        self.load(R8, R1, 0);
        // if r7 != 0 goto behind the end
        self.add(0x55, R7, 0, 2, 0);
        self.end();
        self.load(R8, R8, 0);
    }

    /// Copies `len` bytes of kernel memory at `src + offset` to the stack. What cannot be read becomes zero.
    fn read(&mut self, to: i32, len: i32, src: u8, offset: i32) {
        self.copy(R3, src);
        self.add_to(R3, offset);
        self.copy(R1, FP);
        self.add_to(R1, to);
        self.set(R2, len);
        self.add(0x85, 0, 0, 0, PROBE_READ_KERNEL);
    }

    /// Writes `len` bytes of the stack out.
    fn write(&mut self, from: i32, len: i32) {
        self.copy(R1, R8);
        self.copy(R2, FP);
        self.add_to(R2, from);
        self.set(R3, len);
        self.add(0x85, 0, 0, 0, SEQ_WRITE);
    }

    fn open(&self, iterator: u32) -> Result<OwnedFd, PeekError> {
        bpf::load_task_iterator(iterator, &self.0).map_err(PeekError::Load)
    }
}

fn signed(offset: u32) -> i32 {
    // The structs of a kernel have some thousand bytes.
    i32::try_from(offset).unwrap_or(i32::MAX)
}

fn index(offset: u32) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

impl TaskPeek {
    /// Reads what the kernel says of its types, and loads the program.
    pub(crate) fn open() -> Result<Self, PeekError> {
        match MappedTypes::open() {
            Ok(types) => Self::load(types.bytes()),
            Err(_) => Self::load(&fs::read(TYPES).map_err(PeekError::Types)?),
        }
    }

    fn load(types: &[u8]) -> Result<Self, PeekError> {
        let btf = Btf::parse(types, &["bpf_iter_task", "bpf_iter_aux_info", "task_struct"])?;
        let iterator = btf.function("bpf_iter_task")?;
        // A kernel without it (before Linux 6.1) does not let an iterator be of one task.
        btf.path(btf.structure("bpf_iter_aux_info")?, &["task", "pid"])?;
        let task = btf.structure("task_struct")?;
        let at = btf.member(task, "restart_block")?;
        let len = btf.len_of(at.r#type)?.min(LONGEST_BLOCK);
        let within = |names: &[&str]| btf.path(at.r#type, names).map(|member| index(member.offset));
        let [nanosleep, futex, poll] =
            ["nanosleep", "futex", "poll"].map(|part| move |name: &str| within(&[part, name]));
        let (sec, nsec) = match poll("tv_sec") {
            Ok(sec) => (sec, poll("tv_nsec")?),
            // Linux 6.19.
            Err(_) => (within(&["poll", "end_time", "tv_sec"])?, within(&["poll", "end_time", "tv_nsec"])?),
        };
        let block = Block {
            len: index(len),
            nanosleep: [nanosleep("clockid")?, nanosleep("rmtp")?, nanosleep("expires")?],
            futex: [futex("uaddr")?, futex("val")?, futex("bitset")?, futex("time")?],
            poll: [poll("ufds")?, poll("nfds")?, poll("has_timeout")?, sec, nsec],
        };
        let mut program = Program::default();
        program.begin();
        program.read(-signed(len), signed(len), R7, signed(at.offset));
        program.write(-signed(len), signed(len));
        program.end();
        let restart_block = program.open(iterator)?;
        Ok(Self { block, restart_block })
    }

    fn run(program: &OwnedFd, tid: HostPid) -> Result<Vec<u8>, PeekError> {
        let file = bpf::iterate_task(program.as_fd(), tid).map_err(|e| PeekError::Run(tid, e))?;
        let mut bytes = Vec::new();
        File::from(file).read_to_end(&mut bytes).map_err(|error| {
            PeekError::Run(tid, Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
        })?;
        Ok(bytes)
    }

    /// The restart block of a thread that is stopped.
    pub(crate) fn restart_block(&self, tid: HostPid) -> Result<RestartBlock, PeekError> {
        let bytes = Self::run(&self.restart_block, tid)?;
        if bytes.len() != self.block.len {
            return Err(PeekError::Length(bytes.len()));
        }
        let short = || PeekError::Length(bytes.len());
        let part = |at: usize, len: usize| bytes.get(at..at.saturating_add(len));
        let long = |at| part(at, 8).and_then(pod::from_bytes::<u64>).ok_or_else(short);
        let word = |at| part(at, 4).and_then(pod::from_bytes::<u32>).ok_or_else(short);
        let [clock, rest, until] = self.block.nanosleep;
        let nanosleep =
            Nanosleep { clock: word(clock)?.cast_signed(), rest: long(rest)?, until: long(until)? };
        let [at, value, bitset, until] = self.block.futex;
        let futex =
            Futex { word: long(at)?, value: word(value)?, bitset: word(bitset)?, until: long(until)? };
        let [fds, count, has_timeout, sec, nsec] = self.block.poll;
        let poll = Poll {
            fds: long(fds)?,
            count: word(count)?,
            has_timeout: part(has_timeout, 1).and_then(pod::from_bytes::<u8>).ok_or_else(short)?,
            until: (long(sec)?, long(nsec)?),
        };
        Ok(RestartBlock { nanosleep, futex, poll })
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Duration};

    use super::*;
    use crate::{arch::target::until_asleep, sys::ptrace};

    fn peek() -> Option<TaskPeek> {
        TaskPeek::open().inspect_err(|error| println!("skipped: {error}")).ok()
    }

    #[test]
    fn restart_block_of_a_sleeper() {
        let Some(peek) = peek() else { return };
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = HostPid::new(child.id().cast_signed());
        until_asleep(pid);
        ptrace::seize(pid, 0).unwrap();
        ptrace::interrupt(pid).unwrap();
        crate::sys::wait::wait(pid).unwrap();
        let block = peek.restart_block(pid).unwrap();
        let now = Duration::from(nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        let Nanosleep { clock, until, .. } = block.nanosleep;
        let offset = crate::proc::timens::parse(&fs::read("/proc/self/timens_offsets").unwrap()).unwrap();
        let left = Duration::from_nanos(until).as_secs_f64() - now.as_secs_f64() + offset.monotonic.0 as f64;
        assert!(clock == libc::CLOCK_MONOTONIC && (900.0..1001.0).contains(&left), "{block:?} {left}");
        assert!(peek.restart_block(pid).is_err(), "it is gone");
    }
}
