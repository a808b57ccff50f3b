//! Trees whose files lie on mounts of any kind: dump refuses, or the restore on this host succeeds and everybody has the same
//! files on the same mounts as before. Nothing else of what is mounted, and no file, has changed.
//!
//! A tree makes its own surroundings, by calls that look random, from a seed: mounts of file systems and of directories and
//! files of others, new flags of mounts and of file systems, mounts over mounts, mounts that are taken away while files on
//! them are open, modes, names that go and come; and between all that it opens, maps, locks and watches files, changes its
//! directories, and makes children that go on in the same way. Each tree can be made again:
//! - `MOUNTS_SEED` (1 if not given) is the first seed, `MOUNTS_COUNT` (30) says how many there are,
//! - `ATTACKS_KEEP=1` prints the counts, and why dumps were refused.

use std::{
    collections::BTreeMap,
    env,
    ffi::CString,
    fmt::Write as _,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use crate::{
    hostile::{Numbers, wanted},
    site::{self, NOBODY, Site, Verdict, clear, fail, numbers, others, ready, state, until, word},
    sys,
};

/// Calls that one process makes, at most.
const CALLS: usize = 30;
/// Mounts of the namespace, about, from which on no more are made.
const MOST_MOUNTS: usize = 120;
/// Processes of a tree, at most.
const MOST_TASKS: usize = 4;

/// A process of the tree, before it rests.
struct Maker {
    random: Numbers,
    dir: PathBuf,
    dirs: Vec<PathBuf>,
    files: Vec<PathBuf>,
    mounts: Vec<PathBuf>,
    tasks: usize,
    /// Numbers for new names.
    next: u64,
    /// Both ends of the pipe that the root closes when all mounts are there.
    all_there: [i32; 2],
}

/// Whether a child waits for what the root is going to say, or has ended: by a file system that was full when it wrote memory.
fn waits(pid: i32) -> bool {
    if matches!(state(pid), 'Z' | '-') {
        return true;
    }
    let read = format!("{} ", libc::SYS_read);
    fs::read_to_string(format!("/proc/{pid}/syscall")).is_ok_and(|call| call.starts_with(&read))
}

fn text(path: &Path) -> CString {
    CString::new(path.as_os_str().as_encoded_bytes()).expect("a path")
}

impl Maker {
    fn dir(&mut self) -> PathBuf {
        self.random.one_of(&self.dirs).clone()
    }

    fn file(&mut self) -> PathBuf {
        self.random.one_of(&self.files).clone()
    }

    fn any(&mut self) -> PathBuf {
        if self.random.below(2) == 0 { self.dir() } else { self.file() }
    }

    fn one(&mut self, all: &[i32]) -> i32 {
        *self.random.one_of(all)
    }

    fn new_name(&mut self, what: &str) -> PathBuf {
        self.next += 1;
        let name = format!("{what}{}-{}", self.next, std::process::id());
        self.dir().join(name)
    }

    fn say(what: &str, paths: &[&Path], result: Result<usize, i32>) {
        let paths: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
        println!("{} {what} {}: {result:?}", std::process::id(), paths.join(" "));
    }

    fn mount(&mut self, what: &str, source: &Path, at: &Path, kind: &str, flags: u64, data: &str) -> bool {
        let (from, to, kind, data) = (text(source), text(at), text(Path::new(kind)), text(Path::new(data)));
        let made = sys!(SYS_mount, from.as_ptr(), to.as_ptr(), kind.as_ptr(), flags, data.as_ptr());
        Self::say(&format!("{what} {flags:#x} {}", data.to_string_lossy()), &[source, at], made);
        made.is_ok()
    }

    fn new_mount(&mut self) {
        // Mounts of mounts, each in all that share with another, become very many.
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        if mounts.lines().count() > MOST_MOUNTS {
            return;
        }
        let none = Path::new("odd");
        let (at, which) = (self.dir(), self.random.below(10));
        match which {
            0..4 => {
                let flags = self.one(&[0, 0, 0, 8, 2, 14, 1024]).unsigned_abs().into();
                let data = ["mode=755", "mode=755", "mode=700,uid=65534", "mode=0", "mode=1777", "size=64k"];
                let data = *self.random.one_of(&data);
                if self.mount("tmpfs", none, &at, "tmpfs", flags, data) {
                    self.fill(&at);
                    self.mounts.push(at);
                }
            }
            4..6 => {
                let from = self.dir();
                let flags = libc::MS_BIND | if self.random.below(2) == 0 { libc::MS_REC } else { 0 };
                if self.mount("bind", &from, &at, "", flags, "") {
                    self.mounts.push(at);
                }
            }
            6..8 => {
                let (from, to) = (self.file(), self.file());
                if self.mount("bind", &from, &to, "", libc::MS_BIND, "") {
                    self.mounts.push(to);
                }
            }
            8 => {
                let (lower, upper) = (self.dir(), self.dir());
                let (up, work) = (upper.join("up"), upper.join("work"));
                let _ = fs::create_dir(&up).and_then(|()| fs::create_dir(&work));
                let data = format!(
                    "lowerdir={},upperdir={},workdir={}",
                    lower.display(),
                    up.display(),
                    work.display()
                );
                if self.mount("overlay", none, &at, "overlay", 0, &data) {
                    self.mounts.push(at);
                }
            }
            _ => {
                let from = self.some_mount();
                if self.mount("move", &from, &at, "", libc::MS_MOVE, "") {
                    self.mounts.push(at);
                }
            }
        }
    }

    fn some_mount(&mut self) -> PathBuf {
        if self.mounts.is_empty() { self.dir.clone() } else { self.random.one_of(&self.mounts).clone() }
    }

    fn change_mount(&mut self) {
        let (at, none) = (self.some_mount(), Path::new(""));
        match self.random.below(9) {
            0..4 => {
                let flags =
                    [libc::MS_RDONLY, libc::MS_RDONLY, libc::MS_NOEXEC, libc::MS_NOSUID | libc::MS_NODEV, 0];
                let flags = *self.random.one_of(&flags);
                self.mount("remount", none, &at, "", libc::MS_REMOUNT | libc::MS_BIND | flags, "");
            }
            4 => {
                // The file system itself, where it is one of the trial.
                let own = statfs(&at).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC);
                if own {
                    let flags = *self.random.one_of(&[libc::MS_RDONLY, libc::MS_RDONLY, 0]);
                    self.mount("change", none, &at, "", libc::MS_REMOUNT | flags, "");
                }
            }
            5 | 6 => {
                let flags = [libc::MNT_DETACH, libc::MNT_DETACH, 0];
                let flags = self.one(&flags);
                // What all lies on stays.
                if at != self.dir {
                    let gone = sys!(SYS_umount2, text(&at).as_ptr(), flags);
                    Self::say("unmount", &[&at], gone);
                }
            }
            _ => {
                let how = [libc::MS_SHARED, libc::MS_PRIVATE, libc::MS_SLAVE, libc::MS_UNBINDABLE];
                let how = *self.random.one_of(&how);
                self.mount("propagation", none, &at, "", how, "");
            }
        }
    }

    /// Some files and directories.
    fn fill(&mut self, at: &Path) {
        for name in ["f", "g"] {
            let path = at.join(name);
            if fs::write(&path, vec![name.as_bytes()[0]; 5000]).is_ok() {
                self.files.push(path);
            }
        }
        for name in ["a", "b", "b/c"] {
            let path = at.join(name);
            if fs::create_dir(&path).is_ok() {
                self.dirs.push(path);
            }
        }
    }

    fn names(&mut self) {
        let (path, other) = (self.any(), self.new_name("n"));
        match self.random.below(8) {
            0 | 1 => {
                let mode = self.one(&[0, 0o111, 0o700, 0o755, 0o311, 0o444, 0o4755, 0o1777]);
                let done = sys!(SYS_chmod, text(&path).as_ptr(), mode);
                Self::say(&format!("chmod {mode:o}"), &[&path], done);
            }
            2 => {
                let done = sys!(SYS_chown, text(&path).as_ptr(), NOBODY, NOBODY);
                Self::say("chown", &[&path], done);
            }
            3 => {
                let done = sys!(SYS_rename, text(&path).as_ptr(), text(&other).as_ptr());
                Self::say("rename", &[&path, &other], done);
                if done.is_ok() && other.is_dir() {
                    self.dirs.push(other);
                } else if done.is_ok() {
                    self.files.push(other);
                }
            }
            4 => {
                let file = self.file();
                let done = sys!(SYS_unlink, text(&file).as_ptr());
                Self::say("unlink", &[&file], done);
            }
            5 => {
                let done = sys!(SYS_rmdir, text(&path).as_ptr());
                Self::say("rmdir", &[&path], done);
            }
            6 => {
                let file = self.file();
                let done = sys!(SYS_link, text(&file).as_ptr(), text(&other).as_ptr());
                Self::say("link", &[&file, &other], done);
                self.files.push(other);
            }
            _ => {
                let done = fs::create_dir(&other);
                Self::say("mkdir", &[&other], done.map(|()| 0).map_err(|e| e.raw_os_error().unwrap_or(0)));
                self.dirs.push(other);
            }
        }
    }

    fn open(&mut self) {
        let path = self.any();
        let flags = [
            libc::O_RDONLY,
            libc::O_RDWR,
            libc::O_RDWR,
            libc::O_WRONLY | libc::O_APPEND,
            libc::O_PATH,
            libc::O_PATH | libc::O_NOFOLLOW,
            libc::O_RDONLY | libc::O_NOFOLLOW,
            libc::O_RDWR | libc::O_TMPFILE,
            libc::O_RDONLY | libc::O_DIRECTORY,
        ];
        let flags = self.one(&flags);
        let fd = sys!(SYS_openat, libc::AT_FDCWD, text(&path).as_ptr(), flags, 0o600);
        Self::say(&format!("open {flags:#o}"), &[&path], fd);
        let Ok(fd) = fd else { return };
        match self.random.below(6) {
            0 => drop(sys!(SYS_lseek, fd, self.random.below(6000), libc::SEEK_SET)),
            1 => Self::say("flock", &[&path], sys!(SYS_flock, fd, libc::LOCK_EX | libc::LOCK_NB)),
            2 | 3 => {
                let shared = self.random.below(2) == 0;
                let prot = self.one(&[1, 1, 3, 5]);
                let how = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
                let at = sys!(SYS_mmap, 0, 8192, prot, how, fd, 0);
                Self::say(&format!("map {prot} {shared}"), &[&path], at);
                if let (Ok(at), 3) = (at, prot) {
                    sys::poke(at, b"changed");
                }
                if self.random.below(2) == 0 {
                    let _ = sys!(SYS_close, fd);
                }
            }
            _ => {}
        }
    }

    fn go(&mut self) {
        let path = self.any();
        match self.random.below(8) {
            0..7 => {
                let done = sys!(SYS_chdir, text(&path).as_ptr());
                Self::say("chdir", &[&path], done);
            }
            _ => {
                let queue = sys!(SYS_inotify_init1, 0).unwrap_or(0);
                let watch = sys!(SYS_inotify_add_watch, queue, text(&path).as_ptr(), libc::IN_DELETE);
                Self::say("watch", &[&path], watch);
            }
        }
    }

    /// Gives up most of what has no name any more, since a dump refuses that.
    fn tidy(&mut self) {
        let mut named = |link: &Path, object: &Path| {
            let (found, object) = (fs::symlink_metadata(link), fs::metadata(object));
            let same = found
                .ok()
                .zip(object.ok())
                .is_some_and(|(found, object)| (found.dev(), found.ino()) == (object.dev(), object.ino()));
            // Of deleted files most can be saved.
            let deleted = link.to_string_lossy().ends_with(" (deleted)");
            same || self.random.below(if deleted { 3 } else { 16 }) == 0
        };
        for fd in numbers("/proc/self/fd").into_iter().filter(|&fd| fd > 2) {
            let path = PathBuf::from(format!("/proc/self/fd/{fd}"));
            let link = fs::read_link(&path).unwrap_or_default();
            if link.is_absolute() && !named(&link, &path) {
                let _ = sys!(SYS_close, fd);
            }
        }
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        for line in maps.lines().filter(|line| line.contains(&*self.dir.to_string_lossy())) {
            let range = line.split(' ').next().unwrap_or_default();
            let link = Path::new(line.find('/').map_or("", |at| &line[at..]));
            let object = Path::new("/proc/self/map_files").join(range);
            let ends = range
                .split_once('-')
                .map(|(a, b)| (usize::from_str_radix(a, 16), usize::from_str_radix(b, 16)));
            if let (Some((Ok(start), Ok(end))), false) = (ends, named(link, &object)) {
                let _ = sys!(SYS_munmap, start, end - start);
            }
        }
        let here = Path::new("/proc/self/cwd");
        if !named(&fs::read_link(here).unwrap_or_default(), here) {
            let _ = sys!(SYS_chdir, c"/".as_ptr());
        }
    }

    /// Makes its calls, then its last ones, and rests. A child first, so that no other call comes in between.
    fn work(mut self, root: bool) -> ! {
        let [until_all, go] = self.all_there;
        if !root {
            let _ = sys!(SYS_close, go);
        }
        for _ in 0..CALLS / 3 + self.random.below(CALLS * 2 / 3) {
            match self.random.below(20) {
                0..4 => self.new_mount(),
                4..7 => self.change_mount(),
                7..9 => self.names(),
                9..16 => self.open(),
                16..18 => self.go(),
                _ if self.tasks > 1 => {
                    self.tasks -= 1;
                    let tasks = self.random.below(self.tasks);
                    self.tasks -= tasks;
                    let seed = self.random.next();
                    let child = sys::fork(|| {
                        Maker {
                            random: Numbers::new(seed, 0),
                            dir: self.dir.clone(),
                            dirs: self.dirs.clone(),
                            files: self.files.clone(),
                            mounts: self.mounts.clone(),
                            tasks,
                            next: self.next + 1000,
                            all_there: self.all_there,
                        }
                        .work(false)
                    });
                    // Nothing is random but the calls.
                    let _ = until("the child waits", || waits(child));
                }
                _ => {}
            }
        }
        if root {
            let _ = sys!(SYS_close, go);
        } else {
            let _ = sys!(SYS_read, until_all, (&raw mut self.next), 1);
        }
        let _ = sys!(SYS_close, until_all);
        self.tidy();
        if self.random.below(6) == 0 {
            let root = self.dir();
            let done = sys!(SYS_chroot, text(&root).as_ptr());
            Self::say("chroot", &[&root], done);
        }
        if self.random.below(4) == 0 {
            sys::become_user(NOBODY, true);
        }
        sys::rest()
    }
}

/// Makes its surroundings in the directory that the word names, from the seed behind it.
pub fn tree() -> ExitCode {
    nix::unistd::setsid().expect("setsid");
    let word = word();
    let (seed, dir) = word.split_once(' ').expect("seed and directory");
    let dir = PathBuf::from(dir);
    let seed: u64 = seed.parse().expect("a seed");
    let mut all_there = [0; 2];
    sys!(SYS_pipe2, all_there.as_mut_ptr(), 0).expect("pipe");
    let mut maker = Maker {
        random: Numbers::new(seed, 77),
        dir: dir.clone(),
        dirs: vec![dir.clone()],
        files: Vec::new(),
        mounts: Vec::new(),
        tasks: MOST_TASKS,
        next: 0,
        all_there,
    };
    maker.fill(&dir);
    // The harness waits for this word and then for rest.
    ready();
    maker.work(true)
}

/// A path; of a deleted file only that it is one, because its name may have been taken, or be that of another mount, and a file that
/// never had a name shows the number of its inode.
fn plain(path: &str) -> String {
    if path.ends_with(" (deleted)") { "(deleted)".to_owned() } else { path.to_owned() }
}

/// What can be seen of the tree: directories, programs, descriptors, mappings.
fn picture() -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for pid in others() {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let link =
            |name: &Path| plain(&fs::read_link(dir.join(name)).unwrap_or_default().display().to_string());
        for name in ["cwd", "root", "exe"] {
            all.insert(format!("{pid} {name}"), link(Path::new(name)));
        }
        for fd in numbers(&format!("/proc/{pid}/fd")) {
            let name = PathBuf::from(format!("fd/{fd}"));
            let stat = fs::metadata(dir.join(&name));
            let stat = stat.map(|stat| (stat.dev(), format!("{:o}", stat.mode()), stat.size()));
            let info = fs::read_to_string(dir.join(format!("fdinfo/{fd}"))).unwrap_or_default();
            // The same file may be there on another mount; inodes of deleted files are new ones, locks are listed with them.
            let value = |name: &str| {
                let line = info.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap_or_default().trim().to_owned()
            };
            let link = link(&name);
            // Only opening by name gives O_NOFOLLOW.
            let lost = if link == "(deleted)" { libc::O_NOFOLLOW } else { 0 };
            let flags = i32::from_str_radix(&value("flags:"), 8).unwrap_or(0) & !lost;
            let link = format!("{link} {} {flags:#o}", value("pos:"));
            all.insert(format!("{pid} fd {fd}"), format!("{link} {:?}", stat.ok()));
        }
        let maps = fs::read_to_string(dir.join("maps")).unwrap_or_default();
        for line in maps.lines().filter(|line| line.contains(" /")) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let path = plain(line.find('/').map_or("", |at| &line[at..]));
            all.insert(format!("{pid} map {}", words[0]), format!("{} {} {path}", words[1], words[2]));
        }
    }
    all
}

/// What is mounted, and every file there.
fn world(dir: &Path) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in mounts.lines().filter(|line| line.contains(&*dir.to_string_lossy())) {
        all.insert(format!("mount {line}"), String::new());
    }
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        // Mounts of a directory below itself have no end.
        if all.len() > 1000 || dir.components().count() > 20 {
            break;
        }
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Ok(meta) = fs::symlink_metadata(entry.path()) else { continue };
            if meta.is_dir() {
                todo.push(entry.path());
            }
            let said = format!("{:o} {} {} {}", meta.mode(), meta.uid(), meta.ino(), meta.nlink());
            all.insert(entry.path().display().to_string(), said);
        }
    }
    all
}

/// Takes away all mounts at `dir`, and with them those below.
fn unmount(dir: &Path) -> Verdict {
    for _ in 0..100 {
        if sys!(SYS_umount2, text(dir).as_ptr(), libc::MNT_DETACH).is_err() {
            break;
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if mounts.contains(&*dir.to_string_lossy()) { fail("mounts stay") } else { Ok(()) }
}

/// Trees on mounts of any kind.
pub fn any(site: &mut Site) -> Verdict {
    let (seed, count) = (wanted("MOUNTS_SEED", 1), wanted("MOUNTS_COUNT", 30));
    let (mut restored, mut wrong, mut found) = (0, String::new(), 0);
    let mut reasons: BTreeMap<String, u64> = BTreeMap::new();
    let dir = site.path("odd");
    fs::create_dir(&dir).map_err(|e| e.to_string())?;
    let base = |dir: &Path| {
        let (name, kind, data) = (c"odd", c"tmpfs", c"mode=755,size=16m");
        sys!(SYS_mount, name.as_ptr(), text(dir).as_ptr(), kind.as_ptr(), 0, data.as_ptr())
    };
    for seed in seed..seed.saturating_add(count) {
        let begun = Instant::now();
        base(&dir).map_err(|errno| format!("tmpfs: error {errno}"))?;
        site.fresh_images();
        let mut random = Numbers::new(seed, 5);
        let mut words = vec!["--file-locks"];
        if random.below(2) == 0 {
            words.push("--link-remap");
        }
        let mut tree = site.play("mounts", &format!("{seed} {}", dir.display()))?;
        until("the tree rests", site::all_rest)?;
        let before = picture();
        let around = world(&dir);
        let pid = tree.pid.to_string();
        let run = site.run(&[&["dump", "-t", &pid], &words[..]].concat());
        run.ended_well()?;
        let mut faults = String::new();
        let refused = run.status != 0;
        if refused {
            for line in run.said.lines() {
                *reasons.entry(kind_of(line)).or_default() += 1;
            }
        } else {
            tree.until_ended()?;
            let run = site.run(&[&["restore", "-d"], &words[..]].concat());
            if run.status == 0 {
                restored += 1;
            } else {
                clear(&[]);
                faults = format!("dumped, but not restored: {}", run.said);
            }
        }
        if faults.is_empty() {
            until("the tree rests", site::all_rest)?;
            faults += &site::differences(&before, &picture());
            faults += &site::differences(&around, &world(&dir));
        }
        if !faults.is_empty() {
            found += 1;
            let said = site.said_by("mounts");
            let _ = writeln!(wrong, "MOUNTS_SEED={seed} {words:?}, refused {refused}:\n{faults}");
            if env::var_os("ATTACKS_KEEP").is_some() {
                let _ = writeln!(wrong, "{said}");
            }
        }
        clear(&[]);
        drop(tree);
        until("the tree is gone", || others().into_iter().all(|pid| state(pid) == '-'))?;
        unmount(&dir)?;
        if begun.elapsed() > Duration::from_secs(5) {
            println!("MOUNTS_SEED={seed} takes {:?}", begun.elapsed());
        }
        if found >= 10 {
            break;
        }
    }
    println!("{restored} of {count} trees restored");
    for (reason, times) in reasons {
        println!("{times:5} {reason}");
    }
    if !wrong.is_empty() {
        return fail(wrong);
    }
    if restored * 5 < count { fail("hardly a tree can be dumped") } else { Ok(()) }
}

/// A reason without what differs from tree to tree.
fn kind_of(line: &str) -> String {
    let line: String = line.chars().map(|c| if c.is_ascii_digit() { '#' } else { c }).collect();
    line.chars().skip(line.find(": ").map_or(0, |at| at + 2)).take(230).collect()
}
