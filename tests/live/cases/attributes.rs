//! Attributes of threads, processes, address spaces and areas: what can be set is set, and what can be read is the same
//! after the restore.
//!
//! Each row of the tables sets one attribute to a value from a random number and tells it as text. A case of its own takes each; and
//! `random_attributes` gives random values of all of them to a process with threads and a child. Its seed is in every message;
//! `LIVE_SEED` in the environment of the harness takes another one.

use std::sync::Mutex;

use crate::case::Case;
use crate::cases::memory::{EXEC, MIB, PAGE, READ, WRITE, part, protect};
use crate::gate::{Gate, fork, join};
use crate::sys::{self, Mapped};

const PEER: &str = "has no place for it";

const fn case(name: &'static str, target: fn(&Gate)) -> Case {
    Case::new(name, target).peer_fails(PEER)
}

pub const CASES: &[Case] = &[
    case("attribute_io_priority", |gate| of_thread(gate, "io priority")),
    case("attribute_timer_slack", |gate| of_thread(gate, "timer slack")),
    case("attribute_time_stamp_counter", |gate| of_thread(gate, "time stamp counter")),
    case("attribute_cpuid", |gate| of_thread(gate, "cpuid")),
    case("attribute_machine_check", |gate| of_thread(gate, "machine check")),
    case("attribute_io_flusher", |gate| of_thread(gate, "io flusher")),
    case("attribute_speculation", |gate| of_thread(gate, "speculation")),
    case("attribute_affinity", |gate| of_thread(gate, "affinity")),
    case("attribute_memory_policy", |gate| of_thread(gate, "memory policy")),
    case("attribute_scheduling", |gate| of_thread(gate, "scheduling")),
    case("attribute_idle_policy", idle_policy),
    case("attribute_personality", |gate| of_thread(gate, "personality")),
    case("attribute_secure_bits", |gate| of_thread(gate, "secure bits")),
    case("attribute_coredump_filter", |gate| of_process(gate, "coredump filter")),
    case("attribute_autogroup", autogroup),
    case("attribute_memory_merge", |gate| of_process(gate, "memory merge")),
    case("attribute_huge_pages", |gate| of_process(gate, "huge pages")),
    case("attribute_lock_future", |gate| of_process(gate, "lock future")),
    case("attribute_write_xor_execute", |gate| of_process(gate, "write xor execute")),
    case("attribute_descriptor_table", |gate| of_process(gate, "descriptor table")),
    case("attribute_tile_permission", |gate| of_process(gate, "tile permission")),
    case("attribute_timer_ids", |gate| of_process(gate, "timer ids")),
    case("attribute_area_policy", |gate| of_area(gate, "policy")),
    case("attribute_area_name", |gate| of_area(gate, "name")),
    case("random_attributes", random_attributes),
];

/// Random numbers from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[usize::try_from(self.below(all.len() as u64)).expect("small")]
    }
}

/// One attribute of the calling thread or its process.
struct Attribute {
    name: &'static str,
    /// Sets it to some value; an error where it cannot be set here.
    set: fn(&mut Random) -> Result<(), sys::Errno>,
    /// What it is, as text.
    get: fn() -> String,
}

fn prctl_text(option: i32) -> String {
    format!("{:?}", sys::prctl(option, 0, 0))
}

/// A prctl that stores an int.
fn prctl_int(option: i32) -> String {
    let mut value = -1_i32;
    format!("{:?} {value}", sys!(SYS_prctl, option, &raw mut value, 0, 0, 0))
}

fn status(name: &str) -> String {
    let text = std::fs::read(format!("/proc/self/task/{}/status", sys::gettid())).expect("status");
    let text = String::from_utf8_lossy(&text).into_owned();
    text.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned()
}

fn proc(file: &str) -> String {
    std::fs::read_to_string(format!("/proc/self/{file}")).unwrap_or_else(|e| e.kind().to_string())
}

fn write_proc(file: &str, text: &str) -> Result<(), sys::Errno> {
    std::fs::write(format!("/proc/self/{file}"), text).map_err(|e| e.raw_os_error().unwrap_or(0))
}

#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
    clamps: [u32; 2],
}

const SCHED_DEADLINE: u32 = 6;

fn scheduling() -> SchedAttr {
    let mut attr = SchedAttr::default();
    sys!(SYS_sched_getattr, 0, &raw mut attr, size_of::<SchedAttr>(), 0).expect("sched_getattr");
    attr
}

fn set_scheduling(random: &mut Random) -> Result<(), sys::Errno> {
    let mut attr = SchedAttr { size: 48, ..SchedAttr::default() };
    // SCHED_FLAG_RESET_ON_FORK
    attr.flags = random.below(2);
    // Not SCHED_IDLE: such a thread may not be heard of for minutes on a busy machine.
    attr.policy = random.of(&[0, 0, 1, 2, 3, SCHED_DEADLINE]);
    match attr.policy {
        1 | 2 => attr.priority = 1 + u32::try_from(random.below(50)).expect("small"),
        SCHED_DEADLINE => {
            attr.runtime = 20_000_000 + random.below(1_000_000);
            attr.deadline = 100_000_000 + random.below(1_000_000);
            attr.period = 200_000_000 + random.below(1_000_000);
            attr.flags |= random.below(2) << 1;
        }
        _ => {
            attr.nice = i32::try_from(random.below(10)).expect("small") - 5;
            // A time slice of its own; Linux 6.12.
            attr.runtime = random.of(&[0, 300_000 + random.0 % 50_000_000]);
        }
    }
    match sys!(SYS_sched_setattr, 0, &raw const attr, 0) {
        // No room for one more deadline, or not all processors.
        Err(libc::EBUSY | libc::EPERM) if attr.policy == SCHED_DEADLINE => Ok(()),
        other => other.map(drop),
    }
}

fn memory_policy(addr: usize, flags: usize) -> String {
    let (mut mode, mut nodes) = (-1_i32, [0_u64; 16]);
    let got = sys!(SYS_get_mempolicy, &raw mut mode, nodes.as_mut_ptr(), 1024, addr, flags);
    format!("{got:?} {mode:#x} {nodes:x?}")
}

/// A mode with flags, and nodes.
fn some_policy(random: &mut Random) -> (usize, u64) {
    let mode = random.of(&[1, 2, 3, 5]);
    let flags = random.of(&[0, 1 << 14, 1 << 15]);
    // MPOL_LOCAL has neither.
    if random.below(8) == 0 { (4, 0) } else { (mode | flags, 1) }
}

fn set_mask(random: &mut Random) -> Result<(), sys::Errno> {
    let mut all = [0_u64; 16];
    sys!(SYS_sched_getaffinity, 0, 128, all.as_mut_ptr())?;
    let cpus: Vec<usize> = (0..1024).filter(|cpu| all[cpu / 64] >> (cpu % 64) & 1 == 1).collect();
    if cpus.len() < 2 {
        return Err(libc::ENOSYS);
    }
    let mut some = [0_u64; 16];
    let one = random.of(&cpus);
    some[one / 64] |= 1 << (one % 64);
    sys!(SYS_sched_setaffinity, 0, 128, some.as_ptr()).map(drop)
}

const THREAD: &[Attribute] = &[
    Attribute { name: "affinity", set: set_mask, get: || status("Cpus_allowed:") },
    Attribute { name: "scheduling", set: set_scheduling, get: || format!("{:?}", scheduling()) },
    Attribute {
        name: "io priority",
        set: |random| {
            let value = random.of(&[1, 2, 3]) << 13 | random.below(8);
            sys!(SYS_ioprio_set, 1, 0, value).map(drop)
        },
        get: || format!("{:?}", sys!(SYS_ioprio_get, 1, 0)),
    },
    Attribute {
        name: "timer slack",
        set: |random| {
            sys!(SYS_prctl, libc::PR_SET_TIMERSLACK, 1 + random.below(1_000_000), 0, 0, 0).map(drop)
        },
        get: || prctl_text(libc::PR_GET_TIMERSLACK),
    },
    Attribute {
        name: "time stamp counter",
        set: |_| sys!(SYS_prctl, 26, 2, 0, 0, 0).map(drop),
        get: || prctl_int(25),
    },
    Attribute {
        name: "cpuid",
        set: |_| sys!(SYS_arch_prctl, 0x1012, 0).map(drop),
        get: || format!("{:?}", sys!(SYS_arch_prctl, 0x1011, 0)),
    },
    Attribute {
        name: "machine check",
        set: |random| sys!(SYS_prctl, 33, 1, random.below(2), 0, 0).map(drop),
        get: || prctl_text(34),
    },
    Attribute {
        name: "io flusher",
        set: |_| sys!(SYS_prctl, 57, 1, 0, 0, 0).map(drop),
        get: || prctl_text(58),
    },
    Attribute {
        name: "speculation",
        set: |random| {
            let which = random.below(3);
            let state = random.of(&[4, 8, 16]);
            let tried = (0..3)
                .map(|n| (which + n) % 3)
                .find(|which| sys!(SYS_prctl, 53, *which, state, 0, 0).is_ok());
            tried.map(drop).ok_or(libc::ENOSYS)
        },
        get: || [0, 1, 2].map(|which| format!("{:?}", sys!(SYS_prctl, 52, which, 0, 0, 0))).join(" "),
    },
    Attribute {
        name: "memory policy",
        set: |random| {
            let (mode, nodes) = some_policy(random);
            sys!(SYS_set_mempolicy, mode, if nodes == 0 { 0 } else { (&raw const nodes).addr() }, 64)
                .map(drop)
        },
        get: || memory_policy(0, 0),
    },
    Attribute {
        name: "personality",
        // ADDR_NO_RANDOMIZE, WHOLE_SECONDS, STICKY_TIMEOUTS, ADDR_COMPAT_LAYOUT
        set: |random| {
            let value = random.of(&[0x4_0000, 0x200_0000, 0x400_0000, 0x20_0000]);
            sys!(SYS_personality, value).map(drop)
        },
        get: || format!("{:x?}", sys!(SYS_personality, u32::MAX)),
    },
    Attribute {
        name: "secure bits",
        // SECBIT_NOROOT, SECBIT_KEEP_CAPS, SECBIT_NO_CAP_AMBIENT_RAISE and their locks
        set: |random| {
            let value = random.of(&[0x01, 0x03, 0x10, 0x40, 0xc0, 0x41]);
            sys!(SYS_prctl, 28, value, 0, 0, 0).map(drop)
        },
        get: || prctl_text(27),
    },
];

/// `struct user_desc`
fn descriptor(index: u32) -> [u32; 4] {
    // seg_32bit, data, limit in pages, useable or not present, by the index.
    [index, 0x1000 * (index + 3), 0xf_ff00 + index, 1 | 1 << 4 | (index % 2) << 5 | (index / 2 % 2) << 6]
}

const PROCESS: &[Attribute] = &[
    Attribute {
        name: "coredump filter",
        set: |random| write_proc("coredump_filter", &format!("{:#x}", random.below(0x200))),
        get: || proc("coredump_filter"),
    },
    Attribute {
        name: "oom score",
        set: |random| write_proc("oom_score_adj", &format!("{}", random.below(500))),
        get: || proc("oom_score_adj"),
    },
    Attribute {
        name: "autogroup",
        // Little: with much, a busy machine lets the session wait for seconds.
        set: |random| write_proc("autogroup", &format!("{}", random.of(&[-5, -2, 1, 3, 5]))),
        // The number is that of the session's.
        get: || proc("autogroup").split_once(" nice ").map(|(_, nice)| nice.to_owned()).unwrap_or_default(),
    },
    Attribute {
        name: "memory merge",
        set: |_| sys!(SYS_prctl, 67, 1, 0, 0, 0).map(drop),
        get: || prctl_text(68),
    },
    Attribute {
        name: "huge pages",
        set: |random| {
            // PR_THP_DISABLE_EXCEPT_ADVISED; Linux 6.18.
            let flags = random.of(&[0, 2]);
            let set = |flags: i32| sys!(SYS_prctl, 41, 1, flags, 0, 0).map(drop);
            set(flags).or_else(|_| set(0))
        },
        get: || prctl_text(42),
    },
    Attribute {
        name: "lock future",
        set: |random| {
            // MCL_ONFAULT
            sys!(SYS_mlockall, libc::MCL_FUTURE | random.of(&[0, 4])).map(drop)
        },
        get: || {
            let map = || sys::mmap(0, 4 * PAGE, READ | WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
            let Ok(memory) = map() else { return "no memory".to_owned() };
            let rest = flags_of(memory.addr);
            sys!(SYS_munmap, memory.addr, memory.len).expect("munmap");
            rest.split(' ').filter(|flag| matches!(*flag, "lo" | "lf")).collect()
        },
    },
    Attribute {
        name: "write xor execute",
        // PR_MDWE_REFUSE_EXEC_GAIN, PR_MDWE_NO_INHERIT
        set: |random| sys!(SYS_prctl, 65, random.of(&[1, 3]), 0, 0, 0).map(drop),
        get: || {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let both = sys::mmap(0, PAGE, READ | WRITE | EXEC, flags, -1, 0).map(|memory| {
                sys!(SYS_munmap, memory.addr, memory.len).expect("munmap");
            });
            format!("{} {both:?}", prctl_text(66))
        },
    },
    Attribute {
        name: "descriptor table",
        set: |random| {
            let first = random.below(5);
            [0, 1, 2, 40, 8190].iter().try_for_each(|n| {
                let desc = descriptor(u32::try_from(n + first % 2).expect("small"));
                sys!(SYS_modify_ldt, 0x11, desc.as_ptr(), 16).map(drop)
            })
        },
        get: || {
            let mut table = vec![0_u8; 65_536];
            let got = sys!(SYS_modify_ldt, 0, table.as_mut_ptr(), table.len()).map(|got| got & 0xffff_ffff);
            let used = table.chunks(8).enumerate().filter(|(_, entry)| **entry != [0; 8]);
            format!("{got:?} {:x?}", used.collect::<Vec<_>>())
        },
    },
    Attribute {
        name: "tile permission",
        set: |random| {
            // ARCH_REQ_XCOMP_PERM, ARCH_REQ_XCOMP_GUEST_PERM
            let request = |which: u64| sys!(SYS_arch_prctl, which, 18).map(drop);
            match random.below(3) {
                0 => request(0x1023),
                1 => request(0x1025),
                _ => request(0x1023).and_then(|()| request(0x1025)),
            }
        },
        get: || {
            let masks = [0x1022, 0x1024].map(|which| {
                let mut mask = 0_u64;
                let got = sys!(SYS_arch_prctl, which, &raw mut mask);
                format!("{got:?} {mask:x}")
            });
            masks.join(" ")
        },
    },
    Attribute {
        name: "timer ids",
        set: |_| sys!(SYS_prctl, 77, 1, 0, 0, 0).map(drop),
        get: || format!("{:?}", sys!(SYS_prctl, 77, 2, 0, 0, 0)),
    },
    Attribute {
        name: "subreaper",
        set: |_| sys!(SYS_prctl, libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0).map(drop),
        get: || prctl_int(libc::PR_GET_CHILD_SUBREAPER),
    },
    Attribute {
        name: "umask",
        set: |random| sys!(SYS_umask, random.below(0o1000)).map(drop),
        get: || status("Umask:"),
    },
    Attribute {
        name: "limits",
        set: |random| {
            // RLIMIT_FSIZE, RLIMIT_CORE, RLIMIT_NPROC: soft limits.
            let which = random.of(&[1, 4, 6]);
            let mut limit = [0_u64; 2];
            sys!(SYS_prlimit64, 0, which, 0, limit.as_mut_ptr())?;
            limit[0] = limit[1].min(1 << 30 | random.below(1 << 20));
            sys!(SYS_prlimit64, 0, which, limit.as_ptr(), 0).map(drop)
        },
        get: || proc("limits"),
    },
];

/// VmFlags of the area that begins at `addr`.
fn flags_of(addr: usize) -> String {
    let text = proc("smaps");
    let head = format!("{addr:x}-");
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&head));
    lines.find_map(|line| line.strip_prefix("VmFlags: ")).unwrap_or("no area").to_owned()
}

/// One attribute of an area.
struct OfArea {
    name: &'static str,
    set: fn(Mapped, &mut Random) -> Result<(), sys::Errno>,
}

const AREA: &[OfArea] = &[
    OfArea {
        name: "policy",
        set: |area, random| {
            let (mode, nodes) = some_policy(random);
            let nodes = if nodes == 0 { 0 } else { (&raw const nodes).addr() };
            sys!(SYS_mbind, area.addr, area.len, mode, nodes, 64, 0).map(drop)
        },
    },
    OfArea {
        name: "name",
        set: |area, random| {
            let name = std::ffi::CString::new(format!("area {:x} /!~", random.next())).expect("name");
            sys!(SYS_prctl, 0x5356_4d41, 0, area.addr, area.len, name.as_ptr()).map(drop)
        },
    },
    OfArea {
        name: "advice",
        set: |area, random| {
            let all = [
                libc::MADV_RANDOM,
                libc::MADV_SEQUENTIAL,
                libc::MADV_DONTFORK,
                libc::MADV_DONTDUMP,
                libc::MADV_MERGEABLE,
                libc::MADV_HUGEPAGE,
                libc::MADV_NOHUGEPAGE,
                libc::MADV_WIPEONFORK,
            ];
            sys!(SYS_madvise, area.addr, area.len, random.of(&all)).map(drop)
        },
    },
    OfArea {
        name: "lock",
        set: |area, random| sys!(SYS_mlock2, area.addr, area.len, random.below(2)).map(drop),
    },
    OfArea {
        name: "protection",
        set: |area, random| {
            let access = random.of(&[READ, READ | WRITE, READ | EXEC, libc::PROT_NONE]);
            sys!(SYS_mprotect, area.addr, area.len, access).map(drop)
        },
    },
    OfArea {
        name: "key",
        set: |area, random| {
            static KEYS: Mutex<Vec<usize>> = Mutex::new(Vec::new());
            let mut keys = KEYS.lock().expect("keys");
            if keys.len() < 3 {
                keys.push(sys!(SYS_pkey_alloc, 0, 0)?);
            }
            sys!(SYS_pkey_mprotect, area.addr, area.len, READ | WRITE, random.of(&keys)).map(drop)
        },
    },
];

const MPOL_F_ADDR: usize = 2;

/// What is known of an area: its line in smaps, flags, key and policy.
fn area_text(area: Mapped) -> String {
    let text = proc("smaps");
    let head = format!("{:x}-", area.addr);
    let lines = text.lines().skip_while(|line| !line.starts_with(&head));
    // Address, access and offset; the object of shared memory is another one.
    let line = lines.clone().next().unwrap_or_default();
    let mut told = vec![line.split_whitespace().take(3).collect::<Vec<_>>().join(" ")];
    for name in ["ProtectionKey:", "VmFlags:"] {
        let line = lines.clone().find(|line| line.starts_with(name)).unwrap_or_default();
        // What was written since, and what is accounted, follow from how it came about.
        told.push(
            line.split_whitespace().filter(|word| !["sd", "ac"].contains(word)).collect::<Vec<_>>().join(" "),
        );
    }
    told.push(memory_policy(area.addr, MPOL_F_ADDR));
    told.join(" | ")
}

fn attribute(all: &'static [Attribute], name: &str) -> &'static Attribute {
    all.iter().find(|attribute| attribute.name == name).expect("an attribute of the table")
}

/// The kernel keeps a nice value for SCHED_IDLE that shows only as the priority in /proc/PID/stat.
fn idle_policy(gate: &Gate) {
    let attr = SchedAttr { size: 48, policy: 5, nice: 7, ..SchedAttr::default() };
    sys!(SYS_sched_setattr, 0, &raw const attr, 0).expect("sched_setattr");
    let priority = || (sys::stat_field(sys::getpid(), 18), sys::stat_field(sys::getpid(), 19));
    let before = (priority(), format!("{:?}", scheduling()));
    gate.ready();
    assert_eq!((priority(), format!("{:?}", scheduling())), before);
}

/// Sets one attribute, in this thread and another one, and looks at it afterwards.
fn of_thread(gate: &Gate, name: &'static str) {
    let attribute = attribute(THREAD, name);
    let usual = (attribute.get)();
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || {
        let set = (attribute.set)(&mut Random(7));
        let before = (attribute.get)();
        control.mark("set");
        control.wait();
        assert_eq!((attribute.get)(), before, "{name} of a thread");
        set.map(|()| before)
    });
    let set = (attribute.set)(&mut Random(1));
    let before = (attribute.get)();
    gate.await_mark("set");
    if let Err(errno) = set {
        gate.skip(&format!("{name} cannot be set here: errno {errno}"));
    }
    assert_ne!(before, usual, "{name} was not set");
    gate.ready();
    assert_eq!((attribute.get)(), before, "{name}");
    let other = thread.join().expect("thread").expect("set in a thread");
    assert_ne!(other, usual, "{name} was not set in a thread");
}

/// Sets one attribute of a process, of which a child has another value.
fn of_process(gate: &Gate, name: &'static str) {
    let attribute = attribute(PROCESS, name);
    let usual = (attribute.get)();
    let check = |who: &'static str| {
        let before = (attribute.get)();
        move || assert_eq!((attribute.get)(), before, "{name} of the {who}")
    };
    // Some can be set once only, and a child inherits: one before, one after, one that has it set itself.
    let mut children = Vec::new();
    for (n, who) in ["child without", "child", "heir"].into_iter().enumerate() {
        if who == "heir"
            && let Err(errno) = (attribute.set)(&mut Random(1))
        {
            gate.skip(&format!("{name} cannot be set here: errno {errno}"));
        }
        children.push(fork(|| {
            if n == 1 {
                let _ = (attribute.set)(&mut Random(99));
            }
            let check = check(who);
            gate.mark(who);
            gate.wait();
            check();
        }));
        gate.await_mark(who);
    }
    assert_ne!((attribute.get)(), usual, "{name} was not set");
    let check = check("parent");
    gate.ready();
    check();
    children.into_iter().for_each(join);
}

/// It belongs to a session: another one has another value.
fn autogroup(gate: &Gate) {
    let attribute = attribute(PROCESS, "autogroup");
    if proc("autogroup").is_empty() {
        gate.skip("this kernel has no autogroups");
    }
    let leader = |seed: u64, name: &'static str| {
        let child = fork(|| {
            sys::setsid();
            (attribute.set)(&mut Random(seed)).expect("autogroup");
            let before = (attribute.get)();
            gate.mark(name);
            gate.wait();
            assert_eq!((attribute.get)(), before, "autogroup of a session");
        });
        gate.await_mark(name);
        child
    };
    let usual = (attribute.get)();
    let children = [leader(3, "one"), leader(4, "two")];
    let (own, heir) = (fork(|| gate.wait()), usual.clone());
    gate.ready();
    assert_eq!((attribute.get)(), heir, "autogroup of the parent");
    children.into_iter().chain([own]).for_each(join);
}

fn of_area(gate: &Gate, name: &'static str) {
    let attribute = AREA.iter().find(|attribute| attribute.name == name).expect("an attribute of the table");
    let mut random = Random(1);
    let areas = some_areas();
    let usual: Vec<String> = areas.iter().map(|area| area_text(*area)).collect();
    for area in &areas {
        if let Err(errno) = (attribute.set)(*area, &mut random) {
            gate.skip(&format!("{name} of an area cannot be set here: errno {errno}"));
        }
    }
    let child = fork(|| {
        let _ = (attribute.set)(areas[0], &mut Random(5));
        let before: Vec<String> = areas.iter().map(|area| area_text(*area)).collect();
        gate.mark("child");
        gate.wait();
        for (area, before) in areas.iter().zip(&before) {
            assert_eq!(&area_text(*area), before, "{name} of an area of the child");
        }
    });
    gate.await_mark("child");
    let before: Vec<String> = areas.iter().map(|area| area_text(*area)).collect();
    assert!(before.iter().zip(&usual).any(|(now, then)| now != then), "{name} was not set");
    gate.ready();
    for (area, before) in areas.iter().zip(&before) {
        assert_eq!(&area_text(*area), before, "{name} of an area");
    }
    join(child);
}

/// Areas with and without content, private and shared, with room between them.
fn some_areas() -> Vec<Mapped> {
    // Flagged so that it is one with none of them, whatever their protection.
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let room = sys::mmap(0, 64 * MIB, libc::PROT_NONE, flags, -1, 0).expect("mmap");
    let map = |n: usize, flags: i32| {
        let at = room.addr + n * 4 * MIB;
        let area = sys::mmap(at, 64 * PAGE, READ | WRITE, flags | libc::MAP_ANONYMOUS, -1, 0).expect("mmap");
        if n.is_multiple_of(2) {
            area.fill(n as u64);
        }
        area
    };
    let mut areas: Vec<Mapped> = (0..8).map(|n| map(n, libc::MAP_PRIVATE)).collect();
    areas.extend((8..12).map(|n| map(n, libc::MAP_SHARED)));
    areas
}

/// Everything that has been set, and how it was told then.
struct Told {
    seed: u64,
    who: &'static str,
    attributes: Vec<(&'static Attribute, String)>,
}

impl Told {
    /// Sets some of `all` and remembers all.
    fn set(
        seed: u64,
        who: &'static str,
        all: &'static [Attribute],
        random: &mut Random,
        but: &[&str],
    ) -> Told {
        let tried: Vec<bool> = all
            .iter()
            .map(|attribute| {
                let chosen = random.below(4) != 0 && !but.contains(&attribute.name);
                chosen && (attribute.set)(random).is_ok()
            })
            .collect();
        drop(tried);
        Told { seed, who, attributes: all.iter().map(|attribute| (attribute, (attribute.get)())).collect() }
    }

    fn check(&self) {
        for (attribute, before) in &self.attributes {
            let now = (attribute.get)();
            assert_eq!(&now, before, "{} of {}, seed {}", attribute.name, self.who, self.seed);
        }
    }
}

fn seed(gate: &Gate) -> u64 {
    let given = std::env::var("LIVE_SEED").ok().and_then(|seed| seed.parse().ok());
    given.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("time");
        gate.token()
            .bytes()
            .fold(u64::from(now.subsec_nanos()), |seed, byte| seed.wrapping_mul(31) + u64::from(byte))
    })
}

/// A process, three threads and a child, all with random values of everything.
fn random_attributes(gate: &Gate) {
    let seed = seed(gate);
    gate.note(&format!("seed {seed}"));
    let mut random = Random(seed);
    let areas = some_areas();
    for area in &areas {
        for attribute in AREA {
            if random.below(3) == 0 {
                let _ = (attribute.set)(part(*area, 0, area.len), &mut random);
            }
        }
    }
    // Before what a child inherits and cannot change.
    let of_child = random.next();
    let child = fork(|| {
        let mut random = Random(of_child);
        // Of its own, with an autogroup.
        sys::setsid();
        let of_process = Told::set(seed, "the child", PROCESS, &mut random, &[]);
        let of_thread = Told::set(seed, "the child's thread", THREAD, &mut random, &[]);
        gate.mark("child");
        gate.wait();
        of_process.check();
        of_thread.check();
    });
    gate.await_mark("child");
    let of_process = Told::set(seed, "the process", PROCESS, &mut random, &[]);
    let threads: Vec<_> = ["one", "two", "three"]
        .into_iter()
        .map(|name| {
            let control = gate.clone_for_thread();
            let of_thread = random.next();
            std::thread::spawn(move || {
                let told = Told::set(seed, "a thread", THREAD, &mut Random(of_thread), &[]);
                control.mark(name);
                control.wait();
                told.check();
            })
        })
        .collect();
    for name in ["one", "two", "three"] {
        gate.await_mark(name);
    }
    // Deadlines forbid forks; nothing is forked any more.
    let of_thread = Told::set(seed, "the main thread", THREAD, &mut random, &[]);
    let of_areas: Vec<String> = areas.iter().map(|area| area_text(*area)).collect();
    gate.ready();
    of_process.check();
    of_thread.check();
    for (n, (area, before)) in areas.iter().zip(&of_areas).enumerate() {
        assert_eq!(&area_text(*area), before, "area {n}, seed {seed}");
    }
    for thread in threads {
        thread.join().expect("thread");
    }
    for (n, area) in areas.iter().enumerate().filter(|(n, _)| n.is_multiple_of(2)) {
        protect(*area, READ);
        area.check(n as u64);
    }
    join(child);
}
