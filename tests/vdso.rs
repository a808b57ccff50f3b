//! A snapshot from a kernel with another vdso: made here by changing a byte of the dumped one.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use crtool::{
    image::{DirStore, ImageKind, Store, TypedStore, pb},
    mem::vma,
    pages::pagemap::PagemapReader,
};

const CLOCK: &str = "
import os, time
os.setsid()
os.closerange(3, 1000)
while True:
    print(time.time(), flush=True)
    time.sleep(0.02)
";

fn crtool(images: &Path, arguments: &[&str]) {
    let run =
        Command::new(env!("CARGO_BIN_EXE_crtool")).args(arguments).arg("-D").arg(images).output().unwrap();
    assert!(run.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&run.stderr));
}

/// Flips the last byte of the vdso, which is no code, in the images.
fn change_vdso(images: &Path, pid: u64) {
    let store = DirStore::open(images).unwrap();
    let mm: pb::MmEntry = store.need_one(ImageKind::Mm, pid).unwrap();
    let vdso = mm.vmas.iter().find(|v| v.status & vma::VDSO != 0).unwrap();
    let pagemap = PagemapReader::open(&store, ImageKind::Pagemap, pid).unwrap().unwrap();
    let path = store.path_of(&ImageKind::Pages.file_name(u64::from(pagemap.pages_id())));
    let mut bytes = fs::read(&path).unwrap();
    let runs = pagemap.runs(bytes.len() as u64).unwrap();
    let last = vdso.end - 1;
    let run =
        runs.iter().find(|r| r.run.start <= last && last < r.run.end()).expect("the vdso is in the image");
    let at = usize::try_from(run.offset + (last - run.run.start)).unwrap();
    bytes[at] ^= 0x55;
    fs::write(&path, bytes).unwrap();
}

fn last_line(out: &Path) -> (usize, f64) {
    let text = fs::read_to_string(out).unwrap();
    let complete = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
    (complete.lines().count(), complete.lines().last().and_then(|l| l.parse().ok()).unwrap_or(0.0))
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(90);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        sleep(Duration::from_millis(10));
    }
}

/// Ends the restored program, whatever becomes of the test.
struct Ends(u32);
impl Drop for Ends {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-9", &self.0.to_string()]).status();
    }
}

#[test]
fn old_entry_points_work() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (out, images) = (dir.path().join("out"), dir.path().join("images"));
    fs::create_dir(&images).unwrap();
    let to = fs::File::create(&out).unwrap();
    let mut child = Command::new("python3")
        .args(["-c", CLOCK])
        .stdin(Stdio::null())
        .stdout(to.try_clone().unwrap())
        .stderr(to)
        .spawn()
        .unwrap();
    let pid = child.id();
    let _end = Ends(pid);
    wait_for("the clock starts", || last_line(&out).0 > 3);
    // As its parent we reap it, as soon as it is dead.
    std::thread::scope(|scope| {
        scope.spawn(|| child.wait().unwrap());
        crtool(&images, &["dump", "-t", &pid.to_string()]);
    });
    change_vdso(&images, u64::from(pid));
    let (lines, _) = last_line(&out);
    crtool(&images, &["restore", "-d"]);
    wait_for("the clock goes on", || last_line(&out).0 > lines + 5);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    let shown = last_line(&out).1;
    assert!((now - shown).abs() < 60.0, "it shows {shown}, it is {now}");
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    assert_eq!(maps.matches("[vdso]").count(), 1, "{maps}");
}
