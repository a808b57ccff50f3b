//! A list of system calls, as data.
//!
//! A [`List`] is built without knowing where it will lie: arguments may be plain values, addresses of
//! data that travels with the list ([`Data`]), or results of earlier calls. `Area::place`
//! gives it addresses. The runner (`sys/runner.rs`) executes it; nothing here touches a target.
//!
//! ```
//! use crtool::tracee::{List, Want};
//! let mut list = List::new("example");
//! let name = list.bytes(b"/dev/null\0");
//! let fd = list.call("open", libc::SYS_open, &[name.into(), (libc::O_RDONLY as u64).into()], Want::Ok);
//! list.call("close", libc::SYS_close, &[fd.into()], Want::Zero);
//! assert_eq!(list.len(), 3); // open, hand the result on, close
//! ```

use std::{
    borrow::Cow,
    mem::{offset_of, size_of},
    sync::Arc,
};

use super::RemoteAddr;
use crate::sys::{
    clone::CloneArgs,
    pid::NsPid,
    pod::{self, Pod},
    runner::{Entry, flag, op},
};

/// What a call must return for the list to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Anything; the result is stored and read later.
    Any,
    /// No error.
    Ok,
    /// 0.
    Zero,
    /// Exactly this.
    Equal(u64),
    /// No error; EINTR is tried again.
    OkRetry,
}

/// Data that lies behind the list: an offset until the list is placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Data(pub(super) u64);

impl Data {
    /// `bytes` further on within the same piece of data.
    #[must_use]
    pub fn at(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

/// One step of a list, to read its result later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallId(pub(super) usize);

/// An argument of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arg {
    /// A value.
    Val(u64),
    /// The address of data of this list.
    Data(Data),
    /// What an earlier call of this list returned.
    Result(CallId),
    /// The word that is at this place when the list gets here: what an earlier call has written there.
    Word(Data),
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self::Val(value)
    }
}
impl From<u32> for Arg {
    fn from(value: u32) -> Self {
        Self::Val(u64::from(value))
    }
}
impl From<i32> for Arg {
    /// Sign-extended, as a C caller would pass it.
    fn from(value: i32) -> Self {
        Self::Val(i64::from(value).cast_unsigned())
    }
}
impl From<NsPid> for Arg {
    /// A target takes ids of its own pid namespace. Those of crtool's it does not know.
    fn from(pid: NsPid) -> Self {
        pid.get().into()
    }
}
impl From<i64> for Arg {
    fn from(value: i64) -> Self {
        Self::Val(value.cast_unsigned())
    }
}
impl From<usize> for Arg {
    fn from(value: usize) -> Self {
        Self::Val(value as u64)
    }
}
impl From<RemoteAddr> for Arg {
    fn from(addr: RemoteAddr) -> Self {
        Self::Val(addr.0)
    }
}
impl From<Data> for Arg {
    fn from(data: Data) -> Self {
        Self::Data(data)
    }
}
impl From<CallId> for Arg {
    fn from(call: CallId) -> Self {
        Self::Result(call)
    }
}

/// Steps that are no system calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Go on at this entry.
    Jump(RemoteAddr),
    /// rt_sigreturn with this address as stack pointer; never returns.
    Sigreturn(RemoteAddr),
    /// Sleep until the 32-bit word is 0, as the kernel makes the word given to a clone with CLONE_CHILD_CLEARTID.
    WaitZero(RemoteAddr),
    /// int3: stops a traced task, kills one that is not. The kernel makes SIGTRAP unblocked, and not ignored, for it.
    Trap,
    /// A SIGSTOP of the thread to itself: stops a traced task for its tracer and changes nothing in it.
    Stop,
    /// Store the value in the 64-bit word.
    Store(RemoteAddr, u64),
    /// Go on with the slot's `next` list.
    Next,
    /// Use an AMX tile, for which the process must have the permission, so that registers of tiles can be set from outside.
    Tiles,
}

/// Offset of an argument in its entry.
const fn arg_offset(index: usize) -> usize {
    offset_of!(Entry, args) + index * size_of::<u64>()
}

/// What an argument is counted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Base {
    /// The first entry.
    List,
    /// The first byte of data.
    Data,
}

/// An argument that becomes an address when the list gets its place.
#[derive(Debug, Clone, Copy)]
struct Moved {
    entry: usize,
    arg: usize,
    base: Base,
}

/// A list being built.
#[derive(Debug, Clone)]
pub struct List {
    pub(super) label: Cow<'static, str>,
    /// As they will lie in the target, but for what moves.
    pub(super) entries: Vec<Entry>,
    /// Whoever places a list shares them.
    pub(super) names: Arc<Names>,
    moved: Vec<Moved>,
    pub(super) blob: Vec<u8>,
    /// Words in the blob that hold addresses of other data: (where, what).
    pub(super) pointers: Vec<(u64, u64)>,
    pub(super) clones: Vec<ChosenId>,
}

/// What the entries of a list are called. Lists have tens of thousands of entries, most of them of the same names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Names {
    /// Each with the first entry that has it, if the one before has another.
    runs: Vec<(usize, Cow<'static, str>)>,
}

impl Names {
    fn push(&mut self, entry: usize, name: Cow<'static, str>) {
        if self.runs.last().is_none_or(|(_, last)| *last != name) {
            self.runs.push((entry, name));
        }
    }

    pub(super) fn of(&self, entry: usize) -> &str {
        let behind = self.runs.partition_point(|(first, _)| *first <= entry);
        behind.checked_sub(1).and_then(|at| self.runs.get(at)).map_or("", |(_, name)| name)
    }
}

/// A clone3 of a list that asks for an id.
#[derive(Debug, Clone, Copy)]
pub(super) struct ChosenId {
    /// Index of its entry.
    pub(super) entry: usize,
    /// The id in the innermost pid namespace.
    pub(super) tid: NsPid,
    /// Where the id lies in the list's data.
    pub(super) set_tid: u64,
}

impl List {
    /// An empty list; `label` names it in errors.
    pub fn new(label: impl Into<Cow<'static, str>>) -> Self {
        Self {
            label: label.into(),
            entries: Vec::new(),
            names: Arc::default(),
            moved: Vec::new(),
            blob: Vec::new(),
            pointers: Vec::new(),
            clones: Vec::new(),
        }
    }

    /// Number of steps so far.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no steps.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adds data, 16-byte aligned.
    pub fn bytes(&mut self, bytes: &[u8]) -> Data {
        self.blob.resize(self.blob.len().next_multiple_of(16), 0);
        let at = self.blob.len() as u64;
        self.blob.extend_from_slice(bytes);
        Data(at)
    }

    /// Adds a NUL-terminated string.
    pub fn cstr(&mut self, text: &[u8]) -> Data {
        let data = self.bytes(text);
        self.blob.push(0);
        data
    }

    /// Adds a struct.
    pub fn value<T: Pod>(&mut self, value: &T) -> Data {
        self.bytes(pod::bytes_of(value))
    }

    /// Adds `len` zero bytes, to be filled by a call.
    pub fn space(&mut self, len: usize) -> Data {
        self.blob.resize(self.blob.len().next_multiple_of(16), 0);
        let at = self.blob.len();
        self.blob.resize(at + len, 0);
        Data(at as u64)
    }

    /// Makes the word at `at` hold the address of `to`.
    pub fn pointer(&mut self, at: Data, to: Data) {
        self.pointers.push((at.0, to.0));
    }

    fn push(
        &mut self,
        name: Cow<'static, str>,
        op: i64,
        args: [Arg; 6],
        flags: u64,
        expect: u64,
        child_slot: u64,
    ) {
        let mut values = [0; 6];
        for (index, arg) in args.into_iter().enumerate() {
            let base = match arg {
                // A result is copied: from the entry of its call, to an argument in the list.
                Arg::Result(_) if op == op::COPY => Some(Base::List),
                Arg::Val(_) if op == op::COPY && index == 1 => Some(Base::List),
                Arg::Data(_) => Some(Base::Data),
                Arg::Val(_) | Arg::Result(_) | Arg::Word(_) => None,
            };
            values[index] = match arg {
                Arg::Val(value) => value,
                Arg::Data(data) => data.0,
                Arg::Result(call) if op == op::COPY => {
                    (call.0 * size_of::<Entry>() + offset_of!(Entry, result)) as u64
                }
                // Overwritten by the copy step before it.
                Arg::Result(_) | Arg::Word(_) => 0,
            };
            self.moved.extend(base.map(|base| Moved { entry: self.entries.len(), arg: index, base }));
        }
        Arc::make_mut(&mut self.names).push(self.entries.len(), name);
        self.entries.push(Entry { op, args: values, flags, expect, child_slot, result: 0 });
    }

    /// Adds a system call; missing arguments are 0. `name` is for errors and logs and may name the object too.
    pub fn call(
        &mut self,
        name: impl Into<Cow<'static, str>>,
        nr: libc::c_long,
        args: &[Arg],
        want: Want,
    ) -> CallId {
        let mut full = [Arg::Val(0); 6];
        for (to, from) in full.iter_mut().zip(args) {
            *to = *from;
        }
        self.hand_on_results(&full);
        let (flags, expect) = match want {
            Want::Any => (0, 0),
            Want::Ok => (flag::OK, 0),
            Want::Zero => (flag::EQUAL, 0),
            Want::Equal(value) => (flag::EQUAL, value),
            Want::OkRetry => (flag::OK | flag::RETRY, 0),
        };
        self.push(name.into(), nr, full, flags, expect, 0);
        CallId(self.entries.len() - 1)
    }

    /// Before a call that uses results, or what others have written, come steps that copy them into its arguments.
    fn hand_on_results(&mut self, args: &[Arg; 6]) {
        let copies = args.iter().filter(|a| matches!(a, Arg::Result(_) | Arg::Word(_))).count();
        let target = self.entries.len() + copies;
        for (index, arg) in args.iter().enumerate() {
            let from = match arg {
                Arg::Result(_) => Some(*arg),
                Arg::Word(at) => Some(Arg::Data(*at)),
                Arg::Val(_) | Arg::Data(_) => None,
            };
            if let Some(from) = from {
                let args = [
                    from,
                    Arg::Val((target * size_of::<Entry>() + arg_offset(index)) as u64),
                    Arg::Val(0),
                    Arg::Val(0),
                    Arg::Val(0),
                    Arg::Val(0),
                ];
                self.push("hand on a result".into(), op::COPY, args, 0, 0, 0);
            }
        }
    }

    /// Adds a clone3: the child goes on at the `start` of the slot at `child_slot`. `want` is the
    /// child's expected id, `args` its `struct clone_args`.
    pub(crate) fn clone3(
        &mut self,
        name: impl Into<Cow<'static, str>>,
        args: &CloneArgs,
        set_tid: &[NsPid],
        child_slot: RemoteAddr,
    ) -> CallId {
        let tids: Vec<u8> = set_tid.iter().flat_map(|t| t.get().to_ne_bytes()).collect();
        let tids = self.bytes(&tids);
        let mut args = *args;
        args.set_tid_size = set_tid.len() as u64;
        let at = self.value(&args);
        if !set_tid.is_empty() {
            self.pointer(at.at(offset_of!(CloneArgs, set_tid) as u64), tids);
        }
        let zero = Arg::Val(0);
        let full = [Arg::Data(at), size_of::<CloneArgs>().into(), zero, zero, zero, zero];
        self.push(name.into(), libc::SYS_clone3, full, flag::OK | flag::CLONE, 0, child_slot.0);
        let entry = self.entries.len() - 1;
        if let Some(tid) = set_tid.first() {
            self.clones.push(ChosenId { entry, tid: *tid, set_tid: tids.0 });
        }
        CallId(entry)
    }

    /// Adds a step that is no system call.
    pub fn op(&mut self, step: Op) {
        let (name, code, a, b) = match step {
            Op::Jump(to) => ("jump", op::JUMP, to.0, 0),
            Op::Sigreturn(frame) => ("sigreturn", op::SIGRETURN, frame.0, 0),
            Op::WaitZero(word) => ("wait for the end of a thread", op::WAIT_ZERO, word.0, 0),
            Op::Trap => ("trap", op::TRAP, 0, 0),
            Op::Stop => ("stop", op::STOP, 0, 0),
            Op::Store(word, value) => ("store", op::STORE, word.0, value),
            Op::Next => ("next list", op::NEXT, 0, 0),
            Op::Tiles => ("use of a tile", op::TILES, 0, 0),
        };
        let zero = Arg::Val(0);
        self.push(name.into(), code, [Arg::Val(a), Arg::Val(b), zero, zero, zero, zero], 0, 0, 0);
    }

    /// The list as text, one step a line, for `-v4`.
    pub fn describe(&self) -> String {
        use std::fmt::Write;
        let mut text = String::new();
        let mut moved = self.moved.iter().peekable();
        for (index, entry) in self.entries.iter().enumerate() {
            let name = self.names.of(index);
            let _ = write!(text, "{} {index}: {name} op {} (", self.label, entry.op);
            for (arg, value) in entry.args.iter().enumerate() {
                let base = match moved.next_if(|moved| (moved.entry, moved.arg) == (index, arg)) {
                    Some(Moved { base: Base::List, .. }) => "list+",
                    Some(Moved { base: Base::Data, .. }) => "data+",
                    None => "",
                };
                let _ = write!(text, "{}{base}{value:#x}", if arg == 0 { "" } else { ", " });
            }
            text.push_str(")\n");
        }
        text
    }

    /// The words of entries that are addresses when the entries lie at `at` and the data at `blob`: where they are,
    /// counted from the first entry, and what they say.
    pub(super) fn addresses(
        &self,
        at: RemoteAddr,
        blob: RemoteAddr,
    ) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.moved.iter().filter_map(move |moved| {
            let value = self.entries.get(moved.entry)?.args.get(moved.arg)?;
            let word = moved.entry * size_of::<Entry>() + arg_offset(moved.arg);
            let base = match moved.base {
                Base::List => at,
                Base::Data => blob,
            };
            Some((word as u64, base.0 + value))
        })
    }
}
