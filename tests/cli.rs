//! The command line from outside: every spelling of CRIU's, every option by name, every mistake one line.
//!
//! The tables say what is wanted; nothing here dumps or restores anything (the pid is one that cannot exist).

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, Output},
};

/// Above any `pid_max`.
const NOBODY: &str = "2000000000";

fn crtool(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_crtool"))
        .args(args)
        .current_dir(dir)
        .env("HOME", dir)
        .env_remove("CRTOOL_CONFIG_FILE")
        .env_remove("CRIU_CONFIG_FILE")
        .output()
        .expect("crtool starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn temp() -> tempfile::TempDir {
    tempfile::tempdir().expect("temporary directory")
}

/// `dump -t NOBODY` with more words: says that the process is not there, and nothing about options.
fn accepted(dir: &Path, words: &str) {
    let mut args: Vec<&str> = words.split_whitespace().collect();
    if !args.iter().any(|word| matches!(*word, "dump" | "restore" | "check")) {
        args.extend(["dump", "-t", NOBODY]);
    }
    let out = crtool(dir, &args);
    let err = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{words}: {err}");
    assert!(!err.contains("option") && !err.contains("word"), "{words}: {err}");
}

/// Exit status 1 and one line with `wanted` in it on standard error, nothing on standard output.
fn refused(dir: &Path, args: &[&str], wanted: &str) {
    let out = crtool(dir, args);
    let err = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{args:?}: {err}");
    assert_eq!(out.status.signal(), None, "{args:?}");
    assert!(err.starts_with("Error (crtool): ") && err.contains(wanted), "{args:?}: {err}");
    assert_eq!(err.lines().count(), 1, "{args:?}: {err}");
    assert!(out.stdout.is_empty(), "{args:?}");
}

#[test]
fn spellings() {
    let dir = temp();
    let dump = format!("dump -t {NOBODY}");
    for words in [
        "dump -t2000000000",
        "-t 2000000000 dump",
        "dump --tree 2000000000",
        "--tree=2000000000 dump",
        "dump --tre=2000000000",
        "-v",
        "-vv",
        "-vvvv",
        "-v4",
        "-v0",
        "-v -v",
        "--verbosity",
        "--verbosity=4",
        "-verbosity=0",
        "--verb=3",
        "-j",
        "--shell-job",
        "--shell-job --shell-job",
        "--no-shell-job",
        "--sh",
        "--no-sh",
        "-R",
        "-s",
        "-R -s",
        "-jRl",
        "-l --no-file-locks",
        "--link-remap --no-link-remap",
        "--evasive-devices",
        "--display-stats --no-display-stats",
        "--ghost-limit 0",
        "--ghost-limit=10M",
        "--ghost-limit 2k",
        "--timeout 5",
        "--timeout=0",
        "--cpu-cap",
        "--cpu-cap=none",
        "--cpu-cap=cpu,^ins",
        "--file-validation filesize",
        "--file-validation=buildid",
        "--external file[1:2]",
        "--external tty[8800:1c] --external tty[8801:1c]",
        "--manage-cgroups=ignore",
        "--action-script /bin/true",
        "--pidfile p",
        "--status-fd 1",
        "--close 77",
        "--log-pid",
        "--no-default-config",
        "--deprecated",
        "-D . -W . -o log",
        "-D. -W. -olog",
        "--images-dir=. --work-dir=. --log-file=log",
        "--no-tcp-established --no-tls --no-stream",
    ] {
        accepted(dir.path(), words);
        if !words.contains("2000000000") {
            accepted(dir.path(), &format!("{dump} {words}"));
        }
    }
    for words in [
        "restore -d",
        "restore -d -S",
        "-S --daemon restore",
        "restore --restore-detached --restore-sibling",
        "restore --restore-d --restore-s",
        "restore -d --no-restore-detached",
        "restore --inherit-fd fd[0]:pipe[5]",
        "restore --skip-file-rwx-check",
        "restore --exec-cmd -- /bin/true -x",
        "restore --exec-cmd /bin/true",
        "restore -s --pidfile=p --status-fd=1 -j -l --link-remap",
    ] {
        accepted(dir.path(), words);
    }
}

#[test]
fn mistakes() {
    let dir = temp();
    let rows: &[(&[&str], &str)] = &[
        (&[], "no command"),
        (&["-v4"], "no command"),
        (&["bogus"], "unknown command bogus; see crtool --help"),
        (&["dmup", "-t", "1"], "unknown command dmup; did you mean dump?; see"),
        (&["--dump"], "unknown option --dump; did you mean the command dump?"),
        (&["dump", "--image-dir", "x"], "unknown option --image-dir; did you mean --images-dir?"),
        (&["dump", "1"], "unexpected word \"1\"; did you mean --tree 1?"),
        (
            &["dump", "-t", "1", "--manage-cgroups=bogus"],
            "the mode is one of none, props, soft, full, strict, ignore",
        ),
        (&["image", "x", ".", "foo"], "'foo' for '<WHAT>' [possible values: ps, fds, mems, rss]"),
        (&["image", "show", "."], "read .: Is a directory"),
        (&["dump"], "needs --tree PID"),
        (&["dump", "-t"], "option -t needs a value"),
        (&["dump", "--tree"], "option --tree needs a value"),
        (&["dump", "-t", "x"], "a pid is a number above zero"),
        (&["dump", "-t", "0"], "a pid is a number above zero"),
        (&["dump", "-t", "-5"], "a pid is a number above zero"),
        (&["dump", "-t", "99999999999"], "a pid is a number above zero"),
        (&["dump", "-t", ""], "a pid is a number above zero"),
        (&["dump", "-t", "1", "dump"], "unexpected word"),
        (&["dump", "-t", "1", "-v", "4"], "unexpected word"),
        (&["dump", "-t", "1", "-"], "unexpected word"),
        (&["dump", "--bogus"], "unknown option --bogus"),
        (&["dump", "--bogus=1"], "unknown option --bogus"),
        (&["dump", "-Q"], "unknown option -Q"),
        (&["dump", "-jQ"], "unknown option -Q"),
        (&["dump", "--ver"], "option --ver is ambiguous: --version, --verbosity"),
        (&["dump", "--no-leave-running"], "unknown option --no-leave-running"),
        (&["dump", "--no-lazy-pages"], "unknown option --no-lazy-pages"),
        (&["dump", "--shell-job=1"], "option --shell-job takes no value"),
        (&["dump", "--no-shell-job=1"], "option --no-shell-job takes no value"),
        (&["dump", "-t", "1", "--ghost-limit", "10Q"], "a size is"),
        (&["dump", "-t", "1", "--ghost-limit", "-1"], "a size is"),
        (&["dump", "-t", "1", "--ghost-limit", "99999999999G"], "a size is"),
        (&["dump", "-t", "1", "--timeout", "soon"], "--timeout"),
        (&["dump", "-t", "1", "--timeout=-1"], "--timeout"),
        (&["dump", "-t", "1", "--cpu-cap=foo"], "CPU capabilities are"),
        (&["dump", "-t", "1", "--file-validation", "foo"], "the method is"),
        (&["dump", "-t", "1", "--external", "x"], "an external resource is"),
        (&["dump", "-t", "1", "--external", "mtn[/x]:x"], "--external: \"mtn[/x]:x\": no kind of resource"),
        (&["dump", "-t", "1", "--manage-cgroups"], "--manage-cgroups=soft is not supported yet"),
        (&["dump", "-t", "1", "--manage-cgroups=full"], "--manage-cgroups=full is not supported yet"),
        (&["dump", "-t", "1", "--exec-cmd"], "--exec-cmd cannot be used with dump"),
        (&["dump", "-t", "1", "--close", "x"], "a descriptor is"),
        (&["dump", "-t", "1", "--status-fd=-1"], "a descriptor is"),
        (&["dump", "-t", "1", "-D", "/nonexistent"], "images directory /nonexistent"),
        (&["dump", "-t", "1", "-D", "/dev/null"], "images directory /dev/null"),
        (&["dump", "-t", "1", "-W", "/nonexistent"], "work directory /nonexistent"),
        (&["dump", "-t", "1", "-o", "/nonexistent/log"], "log file /nonexistent/log"),
        (&["restore", "-S"], "--restore-sibling only makes sense with --restore-detached"),
        (&["restore", "-d", "-S", "--no-daemon"], "only makes sense with"),
        (&["restore", "--exec-cmd"], "needs a program"),
        (&["restore", "--exec-cmd", "--"], "needs a program"),
        (&["restore", "--inherit-fd", "3"], "an inherited descriptor is"),
        (&["restore", "--", "x"], "unexpected word"),
        (&["dump", "-t", "1", "--status-fd", "77"], "option --status-fd: descriptor 77 is not open"),
        (&["restore", "--inherit-fd", "fd[77]:x"], "option --inherit-fd: descriptor 77 is not open"),
        (&["check", "--ms"], "--ms is deprecated"),
        (&["check", "--feature", "nope"], "unknown feature nope"),
    ];
    for (args, wanted) in rows {
        refused(dir.path(), args, wanted);
    }
}

/// Names, values and letters as CRIU 4.2 has them; here they are accepted or refused by name.
#[test]
fn every_option_is_known() {
    const NONE: &str = "";
    let rows: &[(&str, &str, bool)] = &[
        // name, value, accepted by dump
        ("tree", NOBODY, true),
        ("leave-stopped", NONE, true),
        ("leave-running", NONE, true),
        ("restore-detached", NONE, true),
        ("no-restore-detached", NONE, true),
        ("restore-sibling", NONE, true),
        ("no-restore-sibling", NONE, true),
        ("daemon", NONE, true),
        ("no-daemon", NONE, true),
        ("images-dir", ".", true),
        ("work-dir", ".", true),
        ("log-file", "log", true),
        ("join-ns", "net:1", true),
        ("root", "/", true),
        ("ext-unix-sk", NONE, true),
        ("ext-unix-sk", "5", true),
        ("tcp-established", NONE, true),
        ("no-tcp-established", NONE, true),
        ("close", "77", true),
        ("log-pid", NONE, true),
        ("no-log-pid", NONE, true),
        ("evasive-devices", NONE, true),
        ("no-evasive-devices", NONE, true),
        ("pidfile", "p", true),
        ("veth-pair", "a=b", true),
        ("action-script", "/bin/true", true),
        ("link-remap", NONE, true),
        ("no-link-remap", NONE, true),
        ("shell-job", NONE, true),
        ("no-shell-job", NONE, true),
        ("file-locks", NONE, true),
        ("no-file-locks", NONE, true),
        ("page-server", NONE, false),
        ("no-page-server", NONE, true),
        ("prev-images-dir", "..", true),
        ("track-mem", NONE, true),
        ("no-track-mem", NONE, true),
        ("auto-dedup", NONE, true),
        ("no-auto-dedup", NONE, true),
        ("libdir", "/", true),
        ("cpu-cap", NONE, true),
        ("cpu-cap", "all", true),
        ("force-irmap", NONE, true),
        ("no-force-irmap", NONE, true),
        ("ext-mount-map", "a:b", true),
        ("manage-cgroups", "ignore", true),
        ("manage-cgroups", "soft", false),
        ("cgroup-root", "/", true),
        ("inherit-fd", "fd[0]:x", true),
        ("skip-mnt", "/", true),
        ("enable-fs", "all", true),
        ("enable-external-sharing", NONE, true),
        ("no-enable-external-sharing", NONE, true),
        ("enable-external-masters", NONE, true),
        ("no-enable-external-masters", NONE, true),
        ("freeze-cgroup", "/", true),
        ("ghost-limit", "1M", true),
        ("irmap-scan-path", "/", true),
        ("lsm-profile", "a:b", true),
        ("timeout", "1", true),
        ("external", "file[1:2]", true),
        ("empty-ns", "net", true),
        ("lazy-pages", NONE, false),
        ("cgroup-props", "x", true),
        ("cgroup-props-file", "x", true),
        ("cgroup-dump-controller", "x", true),
        ("skip-in-flight", NONE, true),
        ("no-skip-in-flight", NONE, true),
        ("deprecated", NONE, true),
        ("no-deprecated", NONE, true),
        ("display-stats", NONE, true),
        ("no-display-stats", NONE, true),
        ("weak-sysctls", NONE, true),
        ("no-weak-sysctls", NONE, true),
        ("status-fd", "1", true),
        ("tcp-close", NONE, true),
        ("no-tcp-close", NONE, true),
        ("verbosity", NONE, true),
        ("verbosity", "2", true),
        ("stream", NONE, false),
        ("no-stream", NONE, true),
        ("config", "/dev/null", true),
        ("no-default-config", NONE, true),
        ("no-tls", NONE, true),
        ("cgroup-yard", "x", true),
        ("pre-dump-mode", "read", true),
        ("file-validation", "filesize", true),
        ("skip-file-rwx-check", NONE, true),
        ("no-skip-file-rwx-check", NONE, true),
        ("lsm-mount-context", "x", true),
        ("network-lock", "nftables", true),
        ("mntns-compat-mode", NONE, true),
        ("no-mntns-compat-mode", NONE, true),
        ("unprivileged", NONE, true),
        ("no-unprivileged", NONE, true),
        ("ghost-fiemap", NONE, true),
        ("no-ghost-fiemap", NONE, true),
        ("allow-uprobes", NONE, true),
        ("no-allow-uprobes", NONE, true),
    ];
    let dir = temp();
    for &(name, value, works) in rows {
        let option = if value.is_empty() { format!("--{name}") } else { format!("--{name}={value}") };
        let args = ["dump", "-t", NOBODY, &option];
        if works {
            let out = crtool(dir.path(), &args);
            let err = text(&out.stderr);
            assert_eq!(out.status.code(), Some(1), "{option}: {err}");
            // What matters to restore only is allowed here, and said to have no effect.
            let bad = ["unknown", "ambiguous", "not supported yet", "needs", "takes no"];
            let option_line = err
                .lines()
                .find(|line| line.contains("option") && bad.iter().any(|word| line.contains(word)));
            assert_eq!(option_line, None, "{option}");
        } else {
            refused(dir.path(), &args, " is not supported yet");
            refused(dir.path(), &args, &format!("option --{name}"));
        }
    }
    // A page server they could be for is to come.
    for option in [
        "--address=::1",
        "--port=1",
        "--ps-socket=5",
        "--tls",
        "--tls-cacert=x",
        "--tls-cacrl=x",
        "--tls-cert=x",
        "--tls-key=x",
        "--tls-no-cn-verify",
    ] {
        refused(dir.path(), &["dump", "-t", NOBODY, option], "only makes sense with --remote");
    }
    for (letters, name) in [
        ("-Jnet:1", "join-ns"),
        ("-r/", "root"),
        ("-x", "ext-unix-sk"),
        ("-L/", "libdir"),
        ("-Ma:b", "ext-mount-map"),
    ] {
        let err = text(&crtool(dir.path(), &["dump", "-t", NOBODY, letters]).stderr);
        assert!(
            err.contains("Warn  (src/cli/mod.rs") && err.contains(&format!("option --{name} has no effect")),
            "{err}"
        );
    }
}

#[test]
fn commands_to_come() {
    let dir = temp();
    for command in ["pre-dump", "page-server", "lazy-pages", "service", "swrk", "dedup", "cpuinfo", "exec"] {
        refused(dir.path(), &[command, "x"], &format!("command {command} is not supported yet"));
    }
}

#[test]
fn version_and_help() {
    let dir = temp();
    for args in [&["--version"][..], &["-V"], &["dump", "-V"], &["-V", "--no-default-config"]] {
        let out = crtool(dir.path(), args);
        assert_eq!(out.status.code(), Some(0));
        assert_eq!(text(&out.stdout), format!("Version: {}\n", env!("CARGO_PKG_VERSION")));
        assert!(out.stderr.is_empty());
    }
    for args in [&["--help"][..], &["-h"], &["restore", "--help"], &["help"], &["help", "dump"]] {
        let out = crtool(dir.path(), args);
        assert_eq!(out.status.code(), Some(0));
        let help = text(&out.stdout);
        for word in ["dump", "restore", "--tree", "--ghost-limit", "--inherit-fd"] {
            assert!(help.contains(word), "{word}");
        }
    }
}

/// A current directory that is gone is no trouble to whom does not need one.
#[test]
fn nowhere() {
    let dir = temp();
    let script = format!(
        "mkdir gone && cd gone && rmdir ../gone && for words in 'check --feature kcmp' 'image show {0}/none.img'; do \
         {1} $words; echo $?; done; {1} dump -t {NOBODY}; echo $?",
        dir.path().display(),
        env!("CARGO_BIN_EXE_crtool")
    );
    let out = Command::new("sh").args(["-c", &script]).current_dir(dir.path()).output().expect("sh starts");
    let err = text(&out.stderr);
    assert_eq!(text(&out.stdout), "kcmp is supported\n0\n1\n1\n", "{err}");
    assert!(
        err.contains("none.img: No such file") && err.contains("images directory .: No such file"),
        "{err}"
    );
}

/// A thread is none of the processes that can be dumped, and is told whose it is.
#[test]
fn a_thread_is_no_tree() {
    let dir = temp();
    let (send, hear) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        send.send(nix::unistd::gettid()).expect("send");
        let _ = ended.recv();
    });
    let tid = hear.recv().expect("tid").to_string();
    let wanted = format!("{tid} is a thread of process {}", std::process::id());
    refused(dir.path(), &["dump", "-t", &tid], &wanted);
    refused(dir.path(), &["check", "-t", &tid], &wanted);
    drop(end);
    thread.join().expect("thread");
}

/// A reader that goes away kills nobody.
#[test]
fn closed_output() {
    let dir = temp();
    for args in ["--help", "check --all", "check --feature list", "--version"] {
        let script = format!("{{ {} {args}; echo $? >status; }} | exec <&-", env!("CARGO_BIN_EXE_crtool"));
        Command::new("sh").args(["-c", &script]).current_dir(dir.path()).output().expect("sh starts");
        let status = fs::read_to_string(dir.path().join("status")).expect("status");
        let status: i32 = status.trim().parse().expect("number");
        assert!(status < 2, "{args}: {status}");
        let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
        let out = Command::new(env!("CARGO_BIN_EXE_crtool"))
            .args(args.split(' '))
            .stdout(full)
            .output()
            .expect("crtool starts");
        assert_eq!(out.status.signal(), None, "{args}");
        assert!(!text(&out.stderr).contains("internal error"), "{args}");
    }
}

#[test]
fn log_file() {
    let dir = temp();
    fs::create_dir(dir.path().join("images")).expect("images");
    fs::create_dir(dir.path().join("work")).expect("work");
    let fail = |more: &[&str]| {
        let mut args = vec!["dump", "-t", NOBODY, "-D", "images"];
        args.extend(more);
        let out = crtool(dir.path(), &args);
        assert_eq!(out.status.code(), Some(1));
        text(&out.stderr)
    };
    // Relative to the images directory, or to the work directory where there is one.
    let err = fail(&["-o", "dump.log"]);
    let log = fs::read_to_string(dir.path().join("images/dump.log")).expect("log");
    assert_eq!(err.lines().count(), 1, "{err}");
    assert!(err.starts_with("Error (crtool): "), "{err}");
    assert!(log.lines().any(|line| line.starts_with("Error (")), "{log}");
    fail(&["-W", "work", "--log-file=w.log", "-v4"]);
    let log = fs::read_to_string(dir.path().join("work/w.log")).expect("log");
    for line in log.lines() {
        let stamp = line.get(..12).unwrap_or_default();
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        assert!(
            stamp.starts_with('(')
                && digits(&stamp[1..3])
                && &stamp[3..4] == "."
                && digits(&stamp[4..10])
                && stamp.ends_with(") "),
            "{line}"
        );
    }
    assert!(log.contains("Version: ") && log.contains(" Error ("), "{log}");
    // A closed standard output does not make the log take its place.
    let out = crtool(dir.path(), &["check", "--close", "1", "-o", "closed.log"]);
    assert_eq!(out.stdout, b"");
    let log = fs::read_to_string(dir.path().join("closed.log")).expect("log");
    assert!(!log.contains("ptrace_seize"), "{log}");
    // Silence, and all of it on standard output.
    assert_eq!(fail(&["-v0"]), "");
    let out = crtool(dir.path(), &["dump", "-t", NOBODY, "-o", "-"]);
    assert!(text(&out.stdout).contains("Error ("));
    // Nobody else may read it.
    use std::os::unix::fs::PermissionsExt as _;
    let mode = fs::metadata(dir.path().join("work/w.log")).expect("log").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn configuration_files() {
    let dir = temp();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().expect("parent")).expect("directory");
        fs::write(path, text).expect("write");
    };
    let run = |args: &[&str], env: &[(&str, &str)]| {
        let mut all = vec!["dump", "-t", NOBODY];
        all.extend(args);
        let out = Command::new(env!("CARGO_BIN_EXE_crtool"))
            .args(all)
            .current_dir(dir.path())
            .env("HOME", dir.path())
            .env_remove("CRTOOL_CONFIG_FILE")
            .env_remove("CRIU_CONFIG_FILE")
            .envs(env.iter().copied())
            .output()
            .expect("crtool starts");
        text(&out.stderr)
    };
    // CRIU's file counts where ours is not there, and not where it is.
    write(".criu/default.conf", "stream # like a container engine\n");
    let err = run(&[], &[]);
    assert!(err.contains(".criu/default.conf:1: option --stream is not supported yet"), "{err}");
    assert!(!run(&["--no-stream"], &[]).contains("option"), "the command line has the last word");
    assert!(!run(&["--no-default-config"], &[]).contains("option"));
    // What it says about dump does not stop a check.
    assert_eq!(crtool(dir.path(), &["check", "--feature", "kcmp"]).status.code(), Some(0));
    write(".crtool/default.conf", "shell-job\n");
    assert!(!run(&[], &[]).contains("option"));
    // Later files win, then the command line.
    write("env.conf", "log-file env.log\n");
    write("named.conf", "log-file \"named file.log\"\nverbosity 0\n");
    let env = [("CRTOOL_CONFIG_FILE", "env.conf"), ("CRIU_CONFIG_FILE", "/nonexistent")];
    run(&[], &env);
    assert!(dir.path().join("env.log").exists());
    assert_eq!(run(&["--config", "named.conf"], &env), "");
    assert!(dir.path().join("named file.log").exists());
    run(&["--config", "named.conf", "-o", "last.log"], &env);
    assert!(dir.path().join("last.log").exists());
    // Mistakes name their place.
    write("bad.conf", "shell-job\nghost-limit ten\n");
    let err = run(&["--config=bad.conf"], &[]);
    assert!(err.contains("bad.conf:2: option --ghost-limit"), "{err}");
    write("bad.conf", "dump\n");
    assert!(run(&["--config=bad.conf"], &[]).contains("bad.conf:1: unknown option --dump"));
    // A default file of somebody else is no reason to stop. (Root may read everything.)
    let out = Command::new(env!("CARGO_BIN_EXE_crtool"))
        .args(["dump", "-t", NOBODY])
        .env("HOME", "/dev/null")
        .output()
        .expect("crtool starts");
    assert!(!text(&out.stderr).contains("configuration"), "{}", text(&out.stderr));
    // A file that was asked for and is not there is worth a word, as with CRIU no more.
    let err = run(&["--config", "/nonexistent"], &[]);
    assert!(err.contains("Warn ") && err.contains("/nonexistent does not exist"), "{err}");
}

/// Callers of CRIU pass one set of options to all commands: what changes nothing is said and stops nothing.
#[test]
fn no_effect_is_said() {
    let dir = temp();
    for (words, option) in [
        ("restore -R -d", "leave-running has no effect on restore"),
        ("restore -t 5", "tree has no effect on restore"),
        ("restore --ghost-limit 1M", "ghost-limit has no effect on restore"),
        ("restore --force-irmap", "force-irmap has no effect on restore"),
        ("restore --irmap-scan-path /", "irmap-scan-path has no effect on restore"),
        ("restore --no-ghost-fiemap", "ghost-fiemap has no effect on restore"),
        ("restore --page-server", "page-server has no effect on restore"),
        ("restore --lazy-pages", "lazy-pages has no effect on restore"),
        ("restore --auto-dedup", "auto-dedup has no effect: "),
        ("restore --prev-images-dir x", "prev-images-dir has no effect: "),
        ("restore --wait-restored", "wait-restored has no effect on restore"),
        ("restore --tcp-established", "tcp-established has no effect: "),
        ("restore --external veth[eth0]:veth1", "external veth[eth0]:veth1 has no effect: "),
        ("dump --pre-dump-mode read", "pre-dump-mode has no effect on dump"),
        ("dump --pre-dump-mode=splice", "pre-dump-mode has no effect on dump"),
        ("dump -d", "restore-detached has no effect on dump"),
        ("dump --all", "all has no effect on dump"),
        ("dump --feature tun", "feature has no effect on dump"),
        ("dump --free-as-read", "free-as-read has no effect on dump"),
        ("dump --max-memory 1G", "max-memory has no effect on dump"),
        ("dump --skip-file-rwx-check", "skip-file-rwx-check has no effect on dump"),
        ("dump --join-ns net:1", "join-ns has no effect on dump"),
        ("dump --lsm-profile a:b", "lsm-profile has no effect on dump"),
        ("dump --root /", "root has no effect: "),
        ("dump --external net[1]:x", "external net[1]:x has no effect: "),
        ("dump --external mnt[]:ms", "external mnt[]:ms has no effect: "),
        ("dump --allow-uprobes", "allow-uprobes has no effect: "),
        ("dump --freeze-cgroup /x", "freeze-cgroup has no effect: "),
    ] {
        let mut args: Vec<&str> = words.split(' ').collect();
        if args[0] == "dump" {
            args.extend(["-t", NOBODY]);
        }
        let out = crtool(dir.path(), &args);
        let err = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{words}: {err}");
        let mut lines = err.lines();
        let (first, last) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        assert!(
            first.starts_with("Warn  (") && first.contains(&format!("): option --{option}")),
            "{words}: {err}"
        );
        // The command itself goes on, to where there is no such process and no image.
        let end = if args[0] == "dump" { "no process has pid" } else { "inventory.img" };
        assert!(last.starts_with("Error (") && last.contains(end), "{words}: {err}");
    }
    // A check of a machine does not care how trees are saved.
    for option in ["--tcp-established", "--manage-cgroups", "--stream", "--lazy-pages", "-R", "-d"] {
        let out = crtool(dir.path(), &["check", "--feature", "kcmp", option]);
        assert_eq!(
            (out.status.code(), text(&out.stdout).as_str()),
            (Some(0), "kcmp is supported\n"),
            "{option}"
        );
        assert!(text(&out.stderr).contains("has no effect"), "{option}");
    }
    // What would do something else than it says is refused, with the reason.
    for (words, wanted) in [
        (
            "restore --join-ns net:1",
            "not supported yet: without it the tree would be restored into crtool's own",
        ),
        ("restore --lsm-profile apparmor:x", "not supported yet: without it the tree would run without"),
        ("restore --stream", "not supported yet: without it the images"),
        ("dump -t 5 --page-server", "not supported yet: without it the pages"),
        ("dump -t 5 --lazy-pages", "not supported yet: without it "),
        ("dump -t 5 --exec-cmd", "cannot be used with dump"),
    ] {
        refused(dir.path(), &words.split(' ').collect::<Vec<_>>(), wanted);
    }
}

#[test]
fn check() {
    let dir = temp();
    let out = crtool(dir.path(), &["check"]);
    let last = text(&out.stdout).lines().next_back().map(str::to_owned);
    match out.status.code() {
        Some(0) => assert_eq!(last.as_deref(), Some("Looks good.")),
        Some(1) => assert_eq!(last.as_deref(), Some("Does not look good.")),
        other => panic!("{other:?}"),
    }
    let list = text(&crtool(dir.path(), &["check", "--feature", "list"]).stdout);
    // CRIU 4.2's names.
    for name in "mnt_id mem_dirty_track aio_remap timerfd tun tun_ns userns fdinfo_lock seccomp_suspend \
        seccomp_filters loginuid cgroupns autofs tcp_half_closed compat_cr uffd uffd-noncoop can_map_vdso sk_ns \
        sk_unix_file net_diag_raw nsid link_nsid kcmp_epoll timens external_net_ns clone3_set_tid newifindex \
        nftables has_ipt_legacy pidfd_store ns_pid apparmor_stacking network_lock_nftables sockopt_buf_lock \
        memfd_hugetlb move_mount_set_group openat2 get_rseq_conf ipv6_freebind pagemap_scan overlayfs_maps \
        timer_cr_ids breakpoints pagemap_scan_guard_pages madv_guards"
        .split_whitespace()
    {
        assert!(list.lines().any(|line| line == name), "{name}");
    }
    for name in list.lines() {
        let out = crtool(dir.path(), &["check", "--feature", name]);
        let wanted = match out.status.code() {
            Some(0) => format!("{name} is supported\n"),
            _ => format!("{name} is not supported\n"),
        };
        assert_eq!(text(&out.stdout), wanted);
    }
}

/// Words and bytes nobody would type end in a status, never in a signal.
#[test]
fn hostile_words() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};
    let dir = temp();
    let long = "x".repeat(100_000);
    let rows: &[&[&[u8]]] = &[
        &[b"\xff\xfe"],
        &[b"dump", b"-t", b"\xff"],
        &[b"dump", b"--\xff=1"],
        &[b"dump", b"-\xff"],
        &[b"dump", b"--="],
        &[b"dump", b"--=x"],
        &[b"dump", b"-t", b"1\n2"],
        &[b"dump", b"--external", b"[\xff]"],
        &[b"restore", b"--inherit-fd", b"fd[1]:\xff", b"-D", b"\xff"],
        &[b"dump", b"-D", long.as_bytes()],
        &[long.as_bytes()],
        &[b""],
        &[b"--", b"--"],
    ];
    for args in rows {
        let out = Command::new(env!("CARGO_BIN_EXE_crtool"))
            .args(args.iter().map(|arg| OsStr::from_bytes(arg)))
            .current_dir(dir.path())
            .output()
            .expect("crtool starts");
        assert_eq!(out.status.code(), Some(1), "{args:?}");
        let err = text(&out.stderr);
        assert_eq!(err.lines().count(), 1, "{err}");
        assert!(!err.contains("internal error"), "{err}");
    }
}

/// As ssh does with its files: nothing is believed, or written over, that somebody else may have put there.
#[test]
fn nothing_of_strangers() {
    use std::os::unix::fs::{chown, lchown, symlink};
    const STRANGER: u32 = 12_345;
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    let base = temp();
    let dir = base.path();
    let theirs = dir.join("theirs");
    fs::create_dir(&theirs).expect("directory");
    fs::create_dir(dir.join("own")).expect("directory");
    fs::write(dir.join("victim"), "safe").expect("write");
    for (name, target) in [("images", "../own"), ("log", "../victim"), ("new", "../made")] {
        symlink(target, theirs.join(name)).expect("link");
        lchown(theirs.join(name), Some(STRANGER), None).expect("chown");
    }
    fs::hard_link(dir.join("victim"), theirs.join("hard")).expect("link");
    chown(&theirs, Some(STRANGER), None).expect("chown");
    fn dump<'a>(more: &[&'a str]) -> Vec<&'a str> {
        [&["dump", "-t", NOBODY], more].concat()
    }
    let owned = "is owned by uid 12345 and has mode 0";
    for (more, what) in [
        (&["-D", "theirs"][..], "images directory"),
        (&["-D", "theirs/images"], "symbolic link"),
        (&["-D", "own", "-o", "../theirs/log"], "symbolic link"),
        (&["-D", "own", "-o", "../theirs/new"], "symbolic link"),
        (&["-D", "own", "-W", "theirs/images", "-o", "x"], "symbolic link"),
    ] {
        refused(dir, &dump(more), owned);
        refused(dir, &dump(more), what);
        refused(dir, &dump(more), "must be owned by root or by the caller (--no-owner-check takes it");
        let out = crtool(dir, &[&dump(more)[..], &["--no-owner-check"]].concat());
        assert!(text(&out.stderr).contains("no process has pid"), "{more:?}: {}", text(&out.stderr));
        fs::write(dir.join("victim"), "safe").expect("write");
    }
    refused(dir, &["restore", "-D", "theirs"], owned);
    refused(dir, &dump(&["-D", "own", "-o", "../theirs/hard"]), "more names than this one");
    assert_eq!(fs::read(dir.join("victim")).expect("read"), b"safe");
    // To look at images does no harm.
    let out = crtool(dir, &["image", "x", "theirs", "ps"]);
    assert!(text(&out.stderr).contains("pstree.img") && !text(&out.stderr).contains("owned"), "{out:?}");
    // A configuration file of somebody else says nothing to root.
    fs::create_dir(dir.join(".crtool")).expect("directory");
    fs::write(dir.join(".crtool/default.conf"), "bogus\n").expect("write");
    refused(dir, &dump(&["-D", "own"]), "unknown option --bogus");
    chown(dir.join(".crtool/default.conf"), Some(STRANGER), None).expect("chown");
    let err = text(&crtool(dir, &dump(&["-D", "own"])).stderr);
    assert!(
        err.contains("Warn ") && err.contains("default.conf is not read: ") && err.contains(owned),
        "{err}"
    );
}

/// A link called `crit` is `crtool image`, one called `criu` is `crtool`.
#[test]
fn other_names() {
    let dir = temp();
    let named = |name: &str, args: &[&str]| {
        let path = dir.path().join(name);
        if !path.exists() {
            std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_crtool"), &path).expect("link");
        }
        Command::new(path).args(args).current_dir(dir.path()).output().expect("it starts")
    };
    let image = crtool(dir.path(), &["image", "show", "none.img"]);
    let crit = named("crit", &["show", "none.img"]);
    assert_eq!(crit.status.code(), image.status.code());
    assert_eq!(text(&crit.stderr), text(&image.stderr));
    assert!(text(&crit.stderr).contains("none.img"), "{}", text(&crit.stderr));
    assert!(text(&named("criu", &["--version"]).stdout).starts_with("Version: "));
}
