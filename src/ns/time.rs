//! Time namespaces: what a tree reads from CLOCK_MONOTONIC and CLOCK_BOOTTIME goes on where it was frozen.
//!
//! A time namespace adds an offset of its own to each of the two clocks. Programs keep deadlines as absolute times of these
//! clocks, so a tree is always restored into a new time namespace whose offsets make the clocks go on from the values they
//! had when the tree was frozen, however long ago that was, on whatever machine and however long that one is up.
//!
//! Saved: both clocks as the tree reads them (`timens-0.img` for a tree in the time namespace of crtool, else `timens-ID.img`
//! with the id in its `ids-PID.img`). All threads of a tree must be in one time namespace, and none may have another one
//! prepared for its children (unshare without exec), because images have a place for one pair of clocks only.
//!
//! CLOCK_REALTIME and CLOCK_TAI are the same in all time namespaces: they go on with the world. `/proc/PID/stat` shows a start
//! time that the kernel sets when a task is made and that cannot be changed: a restored task seems to have been started when it
//! was restored.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};

use super::threads::{self, Namespaces};
use crate::{
    finding::Finding,
    host::child::{Child, Script},
    image::{ImageError, ImageKind, Store, TypedStore, pb},
    proc::{ParseError, timens},
    sys::{Errno, pid::HostPid},
    tracee::{List, Want},
};

/// Nanoseconds in a second.
const SECOND: i64 = 1_000_000_000;
/// No clock of a namespace may be further than this when it is made (KTIME_SEC_MAX / 2 of the kernel).
const FURTHEST: Duration = Duration::from_secs(i64::MAX.cast_unsigned() / 1_000_000_000 / 2);

/// What can go wrong with clocks.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TimeError {
    #[error("{path}")]
    Proc {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Parse(#[from] ParseError),
    #[error("read of the clocks")]
    Clock(#[source] Errno),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("{file}: {what}")]
    Entry { file: String, what: String },
    #[error("{what} (time namespaces need CAP_SYS_ADMIN, CAP_SYS_TIME and a kernel with CONFIG_TIME_NS)")]
    Make {
        what: &'static str,
        #[source]
        source: Errno,
    },
    #[error(
        "crtool has a time namespace prepared for its children, so the clocks of this one cannot be told; run it \
         inside of it"
    )]
    Prepared,
    #[error(
        "the clocks of the tree would go back ({clock} stood at {frozen:?} when it was frozen and is {now:?} here), and it \
         would stand still until they are there again; --host-clocks restores it all the same"
    )]
    Back { clock: &'static str, frozen: Duration, now: Duration },
}

type Result<T> = std::result::Result<T, TimeError>;

/// Both clocks at one moment, or in a [`Shift`] how far they are apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Clocks {
    pub(crate) monotonic: Duration,
    pub(crate) boottime: Duration,
}

impl Clocks {
    /// As crtool reads them, both at one moment as nearly as can be: a thread that loses its processor between the two
    /// readings would change how far they are apart, so the closest of some readings is taken.
    pub(crate) fn now() -> Result<Self> {
        /// Readings that are so close are good enough; one of each clock takes some 30 ns.
        const CLOSE: Duration = Duration::from_micros(5);
        const READINGS: usize = 16;
        let read = |id| clock_gettime(id).map(Duration::from).map_err(TimeError::Clock);
        let reading = || -> Result<(Duration, Self)> {
            let before = read(ClockId::CLOCK_MONOTONIC)?;
            let boottime = read(ClockId::CLOCK_BOOTTIME)?;
            let monotonic = read(ClockId::CLOCK_MONOTONIC)?;
            Ok((monotonic.saturating_sub(before), Self { monotonic, boottime }))
        };
        let (mut took, mut clocks) = reading()?;
        for _ in 1..READINGS {
            if took < CLOSE {
                break;
            }
            let again = reading()?;
            if again.0 < took {
                (took, clocks) = again;
            }
        }
        Ok(clocks)
    }

    /// The clocks `shift` later; a clock does not go below zero.
    fn shifted(self, shift: Shift) -> Self {
        Self {
            monotonic: moved(self.monotonic, shift.monotonic),
            boottime: moved(self.boottime, shift.boottime),
        }
    }

    /// What must be added to `from` to get this.
    fn since(self, from: Self) -> Shift {
        Shift {
            monotonic: nanoseconds(self.monotonic) - nanoseconds(from.monotonic),
            boottime: nanoseconds(self.boottime) - nanoseconds(from.boottime),
        }
    }
}

fn nanoseconds(time: Duration) -> i128 {
    i128::try_from(time.as_nanos()).unwrap_or(i128::MAX)
}

fn moved(time: Duration, by: i128) -> Duration {
    from_nanoseconds(u128::try_from(nanoseconds(time) + by).unwrap_or(0))
}

/// A time of so many nanoseconds, or the longest there is.
pub(crate) fn from_nanoseconds(ns: u128) -> Duration {
    let second = u128::from(SECOND.unsigned_abs());
    let rest = u32::try_from(ns % second).unwrap_or(0);
    u64::try_from(ns / second).map_or(Duration::MAX, |seconds| Duration::new(seconds, rest))
}

/// Nanoseconds between two pairs of clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shift {
    monotonic: i128,
    boottime: i128,
}

impl Shift {
    const NONE: Self = Self { monotonic: 0, boottime: 0 };

    fn minus(self, other: Self) -> Self {
        Self { monotonic: self.monotonic - other.monotonic, boottime: self.boottime - other.boottime }
    }

    fn plus(self, other: Self) -> Self {
        Self { monotonic: self.monotonic + other.monotonic, boottime: self.boottime + other.boottime }
    }

    /// As `/proc/PID/timens_offsets` takes it: the nanoseconds are never negative.
    fn text(self) -> String {
        let line = |name, ns: i128| {
            let second = i128::from(SECOND);
            format!("{name} {} {}\n", ns.div_euclid(second), ns.rem_euclid(second))
        };
        line("monotonic", self.monotonic) + &line("boottime", self.boottime)
    }
}

/// The offsets of the namespace that the children of a task get.
fn offsets_of(task: &str) -> Result<Shift> {
    let path = format!("/proc/{task}/timens_offsets");
    let text = match fs::read(&path) {
        Ok(text) => text,
        // A kernel without time namespaces.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Shift::NONE),
        Err(source) => return Err(TimeError::Proc { path, source }),
    };
    let offsets = timens::parse(&text)?;
    let ns = |(seconds, ns): (i64, u32)| i128::from(seconds) * i128::from(SECOND) + i128::from(ns);
    Ok(Shift { monotonic: ns(offsets.monotonic), boottime: ns(offsets.boottime) })
}

/// The offsets of crtool's own namespace.
fn own_offsets() -> Result<Shift> {
    let [own, next] = ["time", "time_for_children"].map(|name| namespace("self", name));
    if own != next {
        return Err(TimeError::Prepared);
    }
    offsets_of("self")
}

impl Clocks {
    /// As a thread reads them, when those of crtool are these.
    fn of(self, tid: HostPid) -> Result<Self> {
        Ok(self.shifted(offsets_of(&tid.to_string())?.minus(own_offsets()?)))
    }
}

/// The clocks of the host when those of crtool are `own`.
pub(crate) fn of_host(own: Clocks) -> Result<Clocks> {
    Ok(own.shifted(Shift::NONE.minus(own_offsets()?)))
}

/// Which namespace a task has; `None` where the kernel has none, or the task is gone.
fn namespace(task: &str, name: &str) -> Option<u64> {
    let link = fs::read_link(format!("/proc/{task}/ns/{name}")).ok()?;
    threads::number_in(link.as_os_str().as_bytes())
}

/// The time namespace of a tree that is dumped.
#[derive(Debug, Default)]
pub(crate) struct TimeDump {
    /// The namespace of the tree, and the first thread that was seen in it: the leader of its process may be dead, and then
    /// only its threads have offsets in /proc.
    tree: Option<(u64, HostPid)>,
    /// Whether a task has been said to be in another one.
    several: bool,
}

impl TimeDump {
    /// Looks at one thread. What images have no place for goes to `findings`.
    pub(crate) fn thread(
        &mut self,
        pid: HostPid,
        tid: HostPid,
        namespaces: &Namespaces,
        findings: &mut Vec<Finding>,
    ) {
        // There is none on a kernel without time namespaces.
        let Some(own) = namespaces.time else { return };
        let mut finding = |reason: String, hint: &str| {
            let what =
                if pid == tid { "time namespace".into() } else { format!("thread {tid}: time namespace") };
            findings.push(Finding { pid, what, reason, hint: hint.into() });
        };
        if namespaces.time_for_children.is_some_and(|next| next != own) {
            let reason = "another one is prepared for its children, for which images have no place";
            finding(reason.into(), "dump it once it has executed the program that is to run there");
            return;
        }
        match self.tree {
            None => self.tree = Some((own, tid)),
            Some((tree, _)) if tree == own => {}
            // One is enough: all tasks below this one are in it too.
            Some(_) if self.several => {}
            Some((_, first)) => {
                self.several = true;
                let reason = format!(
                    "it is another one than that of task {first}; images have a place for one time namespace"
                );
                finding(reason, "");
            }
        }
    }

    /// The clocks as crtool, and as the tree reads them. To be called when all timers of the tree have been read: one that has
    /// expired by then must not have done so before its time.
    pub(crate) fn clocks(&self) -> Result<(Clocks, Clocks)> {
        let now = Clocks::now()?;
        let Some((tree, tid)) = self.tree else { return Ok((now, now)) };
        if namespace("self", "time") == Some(tree) {
            return Ok((now, now));
        }
        // No thread has another one prepared, so these are those of its own.
        Ok((now, now.of(tid)?))
    }
}

/// The clocks as a process reads them that has no other namespace prepared for its children.
pub(crate) fn of_process(pid: HostPid) -> Result<Clocks> {
    Clocks::now()?.of(pid)
}

/// The image of the clocks. `tree` and `own` are ids of time namespaces as `ids-PID.img` and `inventory.img` have them.
fn image_id(tree: Option<u32>, own: Option<u32>) -> u64 {
    if tree == own { 0 } else { u64::from(tree.unwrap_or(0)) }
}

/// Writes the image of the clocks.
pub(crate) fn write(
    store: &dyn Store,
    tree: &pb::TaskKobjIdsEntry,
    own: &pb::TaskKobjIdsEntry,
    clocks: Clocks,
) -> Result<()> {
    let time = |d: Duration| pb::Timespec { tv_sec: d.as_secs(), tv_nsec: d.subsec_nanos().into() };
    let entry = pb::TimensEntry { monotonic: time(clocks.monotonic), boottime: time(clocks.boottime) };
    Ok(store.write_one(ImageKind::Timens, image_id(tree.time_ns_id, own.time_ns_id), &entry)?)
}

/// Reads the clocks of the tree that `tree`, the ids of its root, belong to; `None` if the dump did not save them.
pub(crate) fn read(
    store: &dyn Store,
    tree: &pb::TaskKobjIdsEntry,
    own: Option<&pb::TaskKobjIdsEntry>,
) -> Result<Option<Clocks>> {
    let id = image_id(tree.time_ns_id, own.and_then(|own| own.time_ns_id));
    let Some(entry) = store.read_one::<pb::TimensEntry>(ImageKind::Timens, id)? else { return Ok(None) };
    let time = |time: pb::Timespec, name| {
        let wrong = || TimeError::Entry {
            file: ImageKind::Timens.file_name(id),
            what: format!("{name}: {} s {} ns is no time of this clock", time.tv_sec, time.tv_nsec),
        };
        let ns = u32::try_from(time.tv_nsec).ok().filter(|ns| i64::from(*ns) < SECOND).ok_or_else(wrong)?;
        Some(Duration::from_secs(time.tv_sec) + Duration::from_nanos(ns.into()))
            .filter(|time| *time < FURTHEST)
            .ok_or_else(wrong)
    };
    Ok(Some(Clocks {
        monotonic: time(entry.monotonic, "monotonic")?,
        boottime: time(entry.boottime, "boottime")?,
    }))
}

/// A time namespace for a tree to be restored into. Nobody is in it yet.
#[derive(Debug)]
pub(crate) struct TimeNamespace {
    namespace: OwnedFd,
    /// Where its offsets are written, once, before anybody enters it.
    offsets: File,
    started: Option<Running>,
    /// The namespace is prepared for its children. A child makes it, so that crtool itself, and what it starts, keep their clocks.
    _maker: Child,
}

impl TimeNamespace {
    /// Makes a namespace whose clocks are not set yet.
    pub(crate) fn make() -> Result<Self> {
        let trouble = |what| move |source| TimeError::Make { what, source };
        let mut script = Script::new().map_err(trouble("start of a child"))?;
        let unshared = script.call(libc::SYS_unshare, &[libc::CLONE_NEWTIME.into()]);
        let maker = script.start().map_err(trouble("start of a child"))?;
        maker.result(unshared).map_err(trouble("unshare(CLONE_NEWTIME)"))?;
        let open = |file: &str, write: bool| {
            let path = format!("/proc/{}/{file}", maker.pid());
            let opened = File::options().read(!write).write(write).open(&path);
            opened.map_err(|source| TimeError::Proc { path, source })
        };
        let namespace = open("ns/time_for_children", false)?.into();
        let offsets = open("timens_offsets", true)?;
        Ok(Self { namespace, offsets, started: None, _maker: maker })
    }

    /// Lets its clocks go on from `clocks`, from now on.
    pub(crate) fn start(&mut self, clocks: Clocks) -> Result<()> {
        let own = own_offsets()?;
        let now = Clocks::now()?;
        let text = clocks.since(now).plus(own).text();
        tracing::debug!("time namespace: {}", text.trim_end().replace('\n', ", "));
        self.offsets.write_all(text.as_bytes()).map_err(|error| TimeError::Make {
            what: "setting of the clocks of a time namespace",
            source: Errno::from_raw(error.raw_os_error().unwrap_or(0)),
        })?;
        self.started = Some(Running { start: clocks, then: now });
        Ok(())
    }

    /// Its clocks; `None` before they go.
    pub(crate) fn clocks(&self) -> Option<Running> {
        self.started
    }

    /// Adds the calls by which a task with one thread, whose memory nobody shares, enters it. They need the privileges of
    /// crtool, and its /proc.
    pub(crate) fn plan_entry(&self, list: &mut List) {
        let path = format!("/proc/{}/fd/{}", std::process::id(), self.namespace.as_raw_fd());
        let path = list.cstr(path.as_bytes());
        let flags = libc::O_RDONLY | libc::O_CLOEXEC;
        let at = libc::AT_FDCWD.into();
        let name = "open of the time namespace";
        let fd = list.call(name, libc::SYS_openat, &[at, path.into(), flags.into()], Want::Ok);
        let args = [fd.into(), libc::CLONE_NEWTIME.into()];
        list.call("setns(CLONE_NEWTIME)", libc::SYS_setns, &args, Want::Zero);
        list.call("close", libc::SYS_close, &[fd.into()], Want::Zero);
    }
}

/// The clocks of a time namespace in which they go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Running {
    /// Where they went on.
    start: Clocks,
    /// Where those of crtool were at the same moment.
    then: Clocks,
}

impl Running {
    /// Where clock `id` went on, in a tree that was frozen there; `None` for a clock that no namespace changes.
    pub(crate) fn start(&self, id: i32) -> Option<Duration> {
        match id {
            libc::CLOCK_MONOTONIC => Some(self.start.monotonic),
            libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => Some(self.start.boottime),
            _ => None,
        }
    }

    /// How long they have been going on.
    pub(crate) fn elapsed(&self) -> std::result::Result<Duration, Errno> {
        let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
        Ok(now.saturating_sub(self.then.monotonic))
    }
}

/// Judges a restore without a time namespace: fails if a clock of this machine is behind that of the tree.
pub(crate) fn host_clocks_suffice(frozen: Clocks) -> Result<()> {
    let now = Clocks::now()?;
    for (clock, frozen, now) in [
        ("CLOCK_MONOTONIC", frozen.monotonic, now.monotonic),
        ("CLOCK_BOOTTIME", frozen.boottime, now.boottime),
    ] {
        if now < frozen {
            return Err(TimeError::Back { clock, frozen, now });
        }
    }
    Ok(())
}
