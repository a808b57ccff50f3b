//! Whether this host has what an offered tree needs, as its restore would find out when the tree stands still already.
//!
//! What is compared is compared by the code of the restore: files of `files`, the processor of `cpuinfo`. What the kernel lets
//! the restores do that the cache starts is tried by the probes of `host`, once; whether their scripts are there is looked at each time. What is certain
//! to fail refuses the offer. What may be otherwise by the time of the restore is told to the source and refuses nothing: pids
//! that somebody has, files that a script of the source may bring, and whatever a cache sees that could not restore
//! itself, since it may see other files than those who can.
//!
//! A file system that does not answer must not keep the cache waiting. Each offer is looked at by a thread of its own, which is
//! given up after a while. Nothing is opened but as a path, and a source learns of a file no more than a restore would say.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use prost::Message as _;

use super::super::{FEATURE_FILTERS, name, namespace_of_pids, pb};
use crate::image::pb as images;
use crate::ns::time::{self, Clocks};
use crate::proc::status;
use crate::settings::{CpuCap, RestoreSettings};
use crate::{
    action, cpuinfo, files,
    host::{self, Feature},
    restore,
};

/// Threads at once; those that hang are among them.
const MOST: usize = 16;
/// Most files and most pids that are looked at for one offer.
const MOST_OF_ONE: usize = 4096;
/// Longest list of what is lacking, in bytes, and longest entry of it.
const LIST: usize = 800;
const ENTRY: usize = 300;
/// Number of the capability CAP_SYS_ADMIN.
const CAP_SYS_ADMIN: u32 = 21;
/// What the kernel must let any restore do, as `crtool check --feature` names it ...
const ALWAYS: [&str; 4] = ["clone3_set_tid", "ptrace_seize", "mm_map", "can_map_vdso"];
/// ... and what one does that gives a tree its own clocks. A source may name [`FEATURE_FILTERS`] besides.
const CLOCKS: &str = "timens";

/// An offer whose needs are to be looked at.
#[derive(Debug)]
pub(super) struct ToLook {
    /// Its number in the cache.
    pub(super) id: u64,
    pub(super) needs: pb::Needs,
    /// It is restored as it comes, by the cache itself.
    pub(super) restored: bool,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Looked {
    /// A restore would fail: why.
    Lacks(String),
    /// It can be restored, as far as is known; what it lacks now.
    May(Vec<String>),
}

/// All that are being looked at.
#[derive(Debug)]
pub(super) struct Looks {
    wake: Arc<EventFd>,
    tell: Sender<(u64, Looked)>,
    told: Receiver<(u64, Looked)>,
    /// Until when each is waited for.
    waiting: BTreeMap<u64, Instant>,
    /// One more for each thread that works.
    threads: Arc<()>,
    patience: Duration,
    /// The restores that the cache starts, or one as good as any.
    restores: Arc<Restores>,
}

/// What is known of a restore here before there is anything to restore.
#[derive(Debug)]
struct Restores {
    settings: RestoreSettings,
    /// Files are found as by a restore here.
    certain: bool,
    /// What the kernel does not let them do, and why.
    missing: BTreeMap<&'static str, String>,
}

impl Looks {
    /// For a cache that waits for a file system so long.
    pub(super) fn new(patience: Duration) -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let (tell, told) = mpsc::channel();
        Ok(Self {
            wake: Arc::new(wake),
            tell,
            told,
            waiting: BTreeMap::new(),
            threads: Arc::default(),
            patience,
            restores: Arc::new(Restores {
                settings: RestoreSettings::new(Path::new(".")),
                certain: may_restore(),
                missing: BTreeMap::new(),
            }),
        })
    }

    /// The restores that this cache starts are these. What the kernel lets them do is tried here, which takes a few milliseconds:
    /// by children of this process, which has no second thread yet.
    pub(super) fn of_restores(&mut self, settings: &RestoreSettings) {
        let clocks = (!settings.host_clocks).then_some(CLOCKS);
        let mut missing = BTreeMap::new();
        for name in ALWAYS.into_iter().chain(clocks).chain([FEATURE_FILTERS]) {
            if let Some(Feature::Probe(probe)) = host::feature(name)
                && let Err(trouble) = probe.ask()
            {
                missing.insert(name, format!("{:#}", anyhow::Error::from(trouble)));
            }
        }
        // What replaces files of the tree is not looked for.
        let certain =
            may_restore() && settings.common.externals.is_empty() && settings.inherit_fds.is_empty();
        self.restores = Arc::new(Restores { settings: settings.clone(), certain, missing });
    }

    /// Readable when something was found.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Begins to look.
    pub(super) fn start(&mut self, look: ToLook, now: Instant) {
        let ToLook { id, needs, restored } = look;
        let restores = self.restores.clone();
        self.begin(id, now, move || look_at(&needs, restored, &restores));
    }

    fn begin(&mut self, id: u64, now: Instant, look: impl FnOnce() -> Looked + Send + 'static) {
        let (tell, wake) = (self.tell.clone(), self.wake.clone());
        self.waiting.insert(id, now + self.patience);
        let unseen = |why: &str| Looked::May(vec![format!("what the tree needs was not looked at: {why}")]);
        if Arc::strong_count(&self.threads) > MOST {
            let _ = self.tell.send((id, unseen("file systems of the destination do not answer")));
            let _ = self.wake.write(1);
            return;
        }
        let count = self.threads.clone();
        let work = move || {
            let _ = tell.send((id, look()));
            drop(count);
            let _ = wake.write(1);
        };
        if let Err(e) = std::thread::Builder::new().name("needs".to_owned()).spawn(work) {
            let _ = self.tell.send((id, unseen(&e.to_string())));
            let _ = self.wake.write(1);
        }
    }

    /// What was found since, and what is not waited for any longer.
    pub(super) fn take(&mut self, now: Instant) -> Vec<(u64, Looked)> {
        let _ = self.wake.read();
        let mut all: Vec<_> = self.told.try_iter().collect();
        all.retain(|(id, _)| self.waiting.remove(id).is_some());
        let late: Vec<u64> =
            self.waiting.iter().filter(|(_, until)| now >= **until).map(|(id, _)| *id).collect();
        let patience = self.patience.as_secs_f32();
        all.extend(late.into_iter().map(|id| {
            self.waiting.remove(&id);
            let text = format!(
                "a file system of the destination has not answered for {patience} s when it was asked for a file that the \
                 tree has open"
            );
            (id, Looked::Lacks(text))
        }));
        all
    }

    /// When the first is not waited for any longer.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.waiting.values().min().copied()
    }
}

/// Whether this process could restore a tree. One that runs without the capabilities for it runs shut off, and its view of the
/// files is no proof.
fn may_restore() -> bool {
    let own = std::fs::read("/proc/self/status").ok().and_then(|text| status::parse(&text).ok());
    own.is_some_and(|own| own.cap_eff >> CAP_SYS_ADMIN & 1 == 1)
}

/// Looks at everything.
fn look_at(needs: &pb::Needs, restored: bool, restores: &Restores) -> Looked {
    let (mut lacks, mut may) = (List::default(), List::default());
    if let Err(error) = processor(needs) {
        let asked = needs.cpu_caps != 0;
        if asked { &mut lacks } else { &mut may }.push(error);
    }
    let taken = pids(needs, restored);
    let into = if restored { &mut lacks } else { &mut may };
    taken.into_iter().for_each(|text| into.push(text));
    if restored {
        restores.lacking(needs).for_each(|text| lacks.push(text));
    }
    for file in needs.files.iter().take(MOST_OF_ONE) {
        // What cannot be understood is for the restore to refuse.
        let Ok(entry) = images::RegFileEntry::decode(&file.entry[..]) else { continue };
        if let Err(error) = files::would_find_file(&restores.settings, &entry) {
            let into = if restores.certain && !file.may_come { &mut lacks } else { &mut may };
            into.push(format!("{:#}", anyhow::Error::from(error)));
        }
    }
    // Not a list that looks whole and is not.
    for (more, what) in [(needs.more_files, "files"), (needs.more_pids, "pids")] {
        if more > 0 {
            may.push(format!(
                "{more} more {what} of the tree did not fit into its offer and were not looked at"
            ));
        }
    }
    match lacks.all.is_empty() {
        true => Looked::May(may.done()),
        false => {
            Looked::Lacks(format!("the destination lacks what the tree needs: {}", lacks.done().join("; ")))
        }
    }
}

impl Restores {
    /// What the kernel does not let them do that this tree needs, and what they would run and is not there.
    fn lacking(&self, needs: &pb::Needs) -> impl Iterator<Item = String> {
        let clock = Duration::from_nanos;
        let clocks = Clocks { monotonic: clock(needs.monotonic), boottime: clock(needs.boottime) };
        let used = move |name: &str| match name {
            FEATURE_FILTERS => needs.features.iter().any(|feature| feature == name),
            // The clocks of this host will do if they are ahead.
            CLOCKS => time::host_clocks_suffice(clocks).is_err(),
            _ => true,
        };
        let features = self.missing.iter().filter(move |(name, _)| used(name));
        let features = features.map(|(name, why)| format!("{name} (see crtool check): {why}"));
        let scripts = action::not_there(&self.settings.common.action_scripts);
        features.chain(scripts.into_iter().map(|error| format!("{:#}", anyhow::Error::from(error))))
    }
}

/// The processor, as far as the user wants it compared; otherwise what programs may use that this one has not.
fn processor(needs: &pb::Needs) -> Result<(), String> {
    let Some(entry) = images::CpuinfoEntry::decode(&needs.cpu[..]).ok().filter(|_| !needs.cpu.is_empty())
    else {
        return Ok(());
    };
    let bit = |bit: u32| needs.cpu_caps & bit != 0;
    let asked = CpuCap { fpu: bit(1), ins: bit(2), cpu: bit(4) };
    let caps = if asked == CpuCap::NONE { CpuCap { fpu: true, ins: true, cpu: false } } else { asked };
    cpuinfo::compare_with_own(&entry, caps).map_err(|e| e.to_string())
}

/// Pids that somebody has.
fn pids(needs: &pb::Needs, restored: bool) -> Vec<String> {
    if needs.pids_of == namespace_of_pids() {
        let text = "source and destination share their pids, which are those of the tree itself as long as that runs: \
                    image-cache --restore must run in another pid namespace";
        return if restored && !needs.pids.is_empty() { vec![text.to_owned()] } else { Vec::new() };
    }
    needs.pids.iter().take(MOST_OF_ONE).filter_map(|pid| restore::pid_is_taken(*pid)).collect()
}

/// What is lacking, no longer than what can be told.
#[derive(Debug, Default)]
struct List {
    all: Vec<String>,
    len: usize,
    more: usize,
}

impl List {
    fn push(&mut self, text: String) {
        let text = name::one_line(&text, ENTRY);
        if self.len + text.len() > LIST {
            self.more += 1;
        } else {
            self.len += text.len();
            self.all.push(text);
        }
    }

    fn done(mut self) -> Vec<String> {
        if self.more > 0 {
            self.all.push(format!("and {} more", self.more));
        }
        self.all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_that_does_not_answer_holds_up_nobody() {
        let patience = Duration::from_secs(5);
        let mut looks = Looks::new(patience).unwrap();
        let (answer, hangs) = mpsc::channel::<()>();
        let hangs = Arc::new(std::sync::Mutex::new(hangs));
        let now = Instant::now();
        for id in 0..MOST as u64 {
            let hangs = hangs.clone();
            looks.begin(id, now, move || {
                let _ = hangs.lock().unwrap().recv();
                Looked::May(Vec::new())
            });
        }
        assert_eq!(looks.take(now), []);
        assert_eq!(looks.deadline(), Some(now + patience));
        // There are no more threads for it.
        looks.begin(100, now, || unreachable!());
        let all = looks.take(now);
        let [(100, Looked::May(lacks))] = &all[..] else { panic!("{all:?}") };
        assert!(lacks[0].contains("do not answer"), "{lacks:?}");
        let all = looks.take(now + patience);
        assert_eq!(all.len(), MOST);
        let late = |found: &Looked| matches!(found, Looked::Lacks(text) if text.contains("has not answered for 5 s"));
        assert!(all.iter().all(|(_, found)| late(found)), "{all:?}");
        // What they say after that is too late.
        drop(answer);
        let until = Instant::now() + Duration::from_secs(60);
        while Arc::strong_count(&looks.threads) > 1 {
            assert!(Instant::now() < until);
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!((looks.take(now), looks.deadline()), (Vec::new(), None));
    }

    #[test]
    fn a_list_that_was_cut_says_so() {
        let told = |more_files, more_pids| {
            let looks = Looks::new(Duration::from_secs(1)).unwrap();
            look_at(&pb::Needs { more_files, more_pids, ..pb::Needs::default() }, false, &looks.restores)
        };
        assert_eq!(told(0, 0), Looked::May(Vec::new()));
        let line =
            |text: &str| format!("{text} of the tree did not fit into its offer and were not looked at");
        assert_eq!(told(7, 0), Looked::May(vec![line("7 more files")]));
        assert_eq!(told(1, 2), Looked::May(vec![line("1 more files"), line("2 more pids")]));
    }

    #[test]
    fn what_the_restores_here_cannot_do() {
        let mut settings = RestoreSettings::new(Path::new("."));
        settings.common.action_scripts.scripts =
            ["true", "/bin/true", "no-such-program", "/no/such/script", "/bin"].map(Into::into).to_vec();
        let mut looks = Looks::new(Duration::from_secs(1)).unwrap();
        looks.of_restores(&settings);
        let mut restores = Restores { settings, certain: true, missing: BTreeMap::new() };
        restores.missing.extend([(FEATURE_FILTERS, "a".to_owned()), (CLOCKS, "b".to_owned())]);
        let lacking = |features: &[&str]| {
            let features = features.iter().map(|&name| name.to_owned()).collect();
            restores.lacking(&pb::Needs { features, ..pb::Needs::default() }).collect::<Vec<_>>()
        };
        let [here, there, directory] = &lacking(&["unheard of"])[..] else { panic!("{:?}", lacking(&[])) };
        assert!(here.starts_with("start of action script no-such-program: "), "{here}");
        assert!(there.starts_with("start of action script /no/such/script: "), "{there}");
        assert!(directory.starts_with("start of action script /bin: "), "{directory}");
        assert_eq!(lacking(&[FEATURE_FILTERS]).len(), 4);
        let ahead = pb::Needs { monotonic: u64::MAX, ..pb::Needs::default() };
        let all: Vec<String> = restores.lacking(&ahead).collect();
        assert!(all.len() == 4 && all.contains(&"timens (see crtool check): b".to_owned()), "{all:?}");
        // Nobody says so of what is restored by others.
        assert_eq!(look_at(&pb::Needs::default(), false, &restores), Looked::May(Vec::new()));
        assert!(matches!(look_at(&pb::Needs::default(), true, &restores), Looked::Lacks(_)));
    }
}
