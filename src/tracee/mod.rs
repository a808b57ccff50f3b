//! Another process, typed: what it takes to stop a task, to run system calls in its name, to read
//! and write its memory, and to put everything back.
//!
//! What libcompel is for CRIU, as a library: [`Seized`] and [`Stopped`] hold a thread, [`Injection`] maps a small area
//! into its process and runs [`List`]s of system calls in its threads, [`RemoteMemory`] reads and writes. Each puts
//! everything back when it is left or dropped; and if the caller is killed in the middle, the process heals itself and
//! goes on.
//! Needs what ptrace(2) asks for.
//!
//! Which directory is another process in, and what does it think its pid is?
//!
//! ```
//! use crtool::tracee::{GadgetCache, HostPid, Injection, List, Seized, Thread, Want};
//! # if !nix::unistd::geteuid().is_root() { return Ok(()); }
//! # let mut child = std::process::Command::new("sleep").arg("60").current_dir("/usr").spawn()?;
//! let pid = HostPid::new(i32::try_from(child.id())?);
//! # while !std::fs::read_to_string(format!("/proc/{pid}/comm"))?.starts_with("sleep") {
//! #     std::thread::yield_now();
//! # }
//!
//! // Running -> seized -> stopped. A thread that is dropped goes on as it was.
//! let patient = || Ok(());
//! let seized = Seized::seize(pid, &patient)?;
//! let thread = Thread::new(seized.settle(&patient)?)?;
//!
//! // Stopped -> injected: a list is data, built before anything runs.
//! let mut list = List::new("example");
//! let own = list.call("getpid", libc::SYS_getpid, &[], Want::Ok);
//! let path = list.space(4096);
//! let len = list.call("getcwd", libc::SYS_getcwd, &[path.into(), 4096u64.into()], Want::Ok);
//! let mut injection = Injection::enter(pid, &thread, &[&thread], 1 << 16, &mut GadgetCache::default(), &patient)?;
//! let ran = injection.run(&[(&thread, list)])?;
//! let results = injection.results(&ran[0])?;
//! assert_eq!(results.value(own)?, i64::from(pid.get()));
//! let len = usize::try_from(results.value(len)?)?;
//! assert_eq!(results.data(path, len)?, b"/usr\0");
//!
//! // Back to where it was: nothing of ours is left in it.
//! injection.leave()?;
//! thread.stopped.detach()?;
//! # child.kill()?;
//! # child.wait()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod addr;
mod area;
mod decision;
mod gadget;
mod inject;
mod kill_guard;
pub mod list;
mod memory;
pub(crate) mod procfs;
pub(crate) mod room;
pub(crate) mod rseq;
pub(crate) mod silent;
mod stop;
pub(crate) mod vdso;

pub use addr::RemoteAddr;
pub use area::{Area, Failure, Placed, Results};
pub(crate) use area::{CODE_LEN, KnownNames, Memory, code_page};
pub(crate) use decision::{Decision, Stage};
pub use gadget::GadgetCache;
use gadget::Gadgets;
pub use inject::{Injection, Thread};
pub(crate) use inject::{read_maps, read_status};
pub(crate) use kill_guard::KillGuard;
pub use list::{Arg, CallId, Data, List, Op, Want};
pub use memory::RemoteMemory;
pub(crate) use stop::tracer_of;
pub use stop::{Seized, Stop, Stopped, TraceError};

pub use crate::sys::pid::HostPid;
