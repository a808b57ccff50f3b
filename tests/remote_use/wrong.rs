//! What somebody types who does not know better: one line that helps, at once, and nothing has happened.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    process::{Command, Stdio},
    time::Duration,
};

use crate::{
    program::Memory,
    site::{Ended, Site},
};

const NONE: &[&str] = &[];
/// Far less than the time for which a cache is waited for.
const SOON: Duration = Duration::from_secs(5);

#[track_caller]
fn refused(ended: &Ended, wanted: &str) {
    let error = ended.failed();
    assert!(error.contains(wanted), "{error}");
    assert!(ended.took < SOON, "{:?}", ended.took);
}

/// Pids that stand for no tree. There is no cache, and none is waited for.
pub fn pids() {
    let mut site = Site::new(Memory::Text);
    let mut child = Command::new("true").spawn().unwrap();
    let dead = child.id().to_string();
    child.wait().unwrap();
    let own = std::process::id().to_string();
    let mut all =
        vec![(dead.as_str(), format!("no process has pid {dead}")), (own.as_str(), "ancestors".to_owned())];
    if fs::read_to_string("/proc/2/comm").is_ok_and(|comm| comm.trim() == "kthreadd") {
        all.push(("2", "task 2 is a thread of the kernel".to_owned()));
    }
    for (pid, wanted) in all {
        for more in [NONE, &["--address", "127.0.0.1", "--port", "1"]] {
            let words = [&["dump", "--remote", "-t", pid], more].concat();
            refused(&Site::run(&mut site.crtool("src", &words)), &wanted);
        }
        refused(&Site::run(&mut site.crtool("src", &["dump", "-t", pid])), &wanted);
    }
    site.end();
}

/// Addresses that are none.
pub fn addresses() {
    let mut site = Site::new(Memory::Text);
    for address in ["127.0.0.1:9996", "http://127.0.0.1"] {
        for words in [
            site.dump_words(&["--address", address]),
            vec!["image-proxy".into(), "--address".into(), address.into()],
        ] {
            let ended = Site::run(&mut site.crtool("src", &words));
            refused(&ended, &format!("address {address}: it does not resolve: "));
            refused(&ended, "it is a host alone, --port takes the port");
        }
    }
    site.counts();
    site.end();
}

/// A user who may not.
pub fn no_root() {
    let mut site = Site::new(Memory::Text);
    let cache = site.cache(NONE);
    // Where it was built others may have no business. By another process: ETXTBSY.
    let (dir, program) = (tempfile::tempdir().unwrap(), "crtool");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::chown(dir.path(), Some(65534), Some(65534)).unwrap();
    let program = dir.path().join(program);
    assert!(Command::new("cp").arg(env!("CARGO_BIN_EXE_crtool")).arg(&program).status().unwrap().success());
    let port = cache.port().to_string();
    let pid = site.pid.to_string();
    for words in [
        &["dump", "-t", &pid][..],
        &["dump", "-t", &pid, "--remote", "--address", "127.0.0.1", "--port", &port],
    ] {
        let mut command = Command::new(&program);
        command.args(words).arg("--no-default-config").current_dir(dir.path()).uid(65534).gid(65534);
        refused(&Site::run(&mut command), "this takes root, and crtool was run by user 65534");
        site.counts();
    }
    site.end();
}

/// A log that takes nothing is worth a line, and stops nothing.
pub fn full_log() {
    let mut site = Site::new(Memory::Text);
    let cache = site.cache(NONE);
    let port = cache.port().to_string();
    let words = ["--address", "127.0.0.1", "--port", &port, "-v4", "-o", "/dev/full"];
    let ended = Site::run(&mut site.dump(&words)).succeeded();
    let lines: Vec<&str> = ended.said.lines().collect();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("log file /dev/full: No space left on device"), "{lines:?}");
    site.restore_and_end();
}

/// A work dir that takes nothing: the tree goes on, and nothing stands there that later commands would stumble over.
pub fn full_journal() {
    let mut site = Site::new(Memory::Text);
    let words = ["image-cache", "--address", "127.0.0.1", "--port", "0", "--restore"];
    let inner = site.crtool("dst", &words);
    let mut command = Command::new("unshare");
    command.args(["-pf", "--mount-proc", "--kill-child"]).arg(inner.get_program()).args(inner.get_args());
    let cache = site.daemon("dst", command.stdin(Stdio::null()));
    let to = format!("127.0.0.1:{}", cache.port());
    let inner = site.crtool("src", &["migrate", "-t", &site.pid.to_string(), "--to", &to]);
    let script = "mount -t tmpfs -o size=64k,mode=700 none \"$0\" && head -c 1M /dev/zero >\"$0\"/fill 2>/dev/null\n\
                  \"$@\"; code=$?; echo \"left: $(ls \"$0\")\" >&2; umount -l \"$0\"; exit $code";
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(site.work("src"));
    command.arg(inner.get_program()).args(inner.get_args()).stdin(Stdio::null());
    let ended = Site::run(&mut command);
    let error = ended.failed();
    for part in ["journal of the hand-over", "/src/migrate-", "No space left on device"] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(ended.said.lines().last(), Some("left: fill"));
    site.counts();
    // One of a crtool that was killed while it wrote it keeps no others from their end.
    let odd = site.work("src").join("migrate-000000000000000a.journal");
    fs::write(&odd, "").unwrap();
    let said = Site::run(&mut site.crtool("src", &["migrate", "settle"])).failed();
    assert!(said.contains("000a.journal is no journal") && said.contains("can be removed"), "{said}");
    site.end();
}

/// Ctrl-C when all has come and nobody restores it: the cache hears that the tree runs on, and that is known.
pub fn interrupted_before_it_is_restored() {
    let mut site = Site::new(Memory::Text);
    let cache = site.cache(NONE);
    let to = format!("127.0.0.1:{}", cache.port());
    let words = ["migrate", "-t", &site.pid.to_string(), "--to", &to, "--max-pause", "100"];
    let child = site.crtool("src", &words).stderr(Stdio::piped()).spawn().unwrap();
    cache.says("is complete: ");
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("interrupted by SIGINT"), "{said}");
    cache.says("the dump failed and the tree runs on");
    site.counts();
    site.end();
}
