//! The programs: what they need, how they are started, and what is to become of them.
//!
//! A program runs in an empty directory of its own, makes the file `mid` when it is in the middle of its work, waits with
//! the rest for the file `end`, and writes `result`, which must be the same each time it runs.

use std::{path::Path, process::Command};

/// What the dump of a program has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// It goes through.
    Survives,
    /// It is refused with this text, and the program goes on undisturbed.
    Refused(&'static str),
}

/// One program.
#[derive(Debug)]
pub struct Program {
    pub name: &'static str,
    /// Found in PATH, each of them.
    needs: &'static [&'static str],
    /// Exits with 0 if the rest of what is needed is there too.
    probe: Option<&'static str>,
    /// Files that lie in its directory: name and text.
    pub files: &'static [(&'static str, &'static str)],
    /// Run before, not dumped.
    pub setup: &'static str,
    /// Run under dump and restore: a line for `sh -c 'exec ...'`.
    pub line: &'static str,
    /// Options of dump and restore.
    pub flags: &'static [&'static str],
    pub expect: Expect,
}

const PLAIN: Program = Program {
    name: "",
    needs: &[],
    probe: None,
    files: &[],
    setup: "true",
    line: "",
    flags: &[],
    expect: Expect::Survives,
};

pub static PROGRAMS: &[Program] = &[
    Program {
        name: "python_threads",
        needs: &["python3"],
        files: &[("main.py", include_str!("programs/threads.py"))],
        line: "python3 main.py",
        ..PLAIN
    },
    Program {
        name: "python_subprocess",
        needs: &["python3"],
        files: &[("main.py", include_str!("programs/subprocess.py"))],
        line: "python3 main.py",
        ..PLAIN
    },
    Program {
        name: "python_asyncio_timers",
        needs: &["python3"],
        files: &[("main.py", include_str!("programs/asyncio.py"))],
        line: "python3 main.py pipeless",
        ..PLAIN
    },
    Program {
        // Its event loop wakes itself through a pair of UNIX sockets.
        name: "python_asyncio_default_loop",
        needs: &["python3"],
        files: &[("main.py", include_str!("programs/asyncio.py"))],
        line: "python3 main.py default",
        expect: Expect::Refused("UNIX socket"),
        ..PLAIN
    },
    Program {
        name: "python_numpy",
        needs: &["python3"],
        probe: Some("python3 -c 'import numpy'"),
        files: &[("main.py", include_str!("programs/numpy.py"))],
        line: "python3 main.py",
        ..PLAIN
    },
    Program {
        name: "python_sqlite_transaction",
        needs: &["python3"],
        probe: Some("python3 -c 'import sqlite3'"),
        files: &[("main.py", include_str!("programs/sqlite.py"))],
        line: "python3 main.py",
        flags: &["--file-locks"],
        ..PLAIN
    },
    Program {
        name: "bash_pipeline",
        needs: &["bash", "awk", "sha256sum"],
        files: &[("main.sh", include_str!("programs/pipeline.sh"))],
        line: "bash main.sh",
        ..PLAIN
    },
    Program {
        name: "perl_fork_and_alarm",
        needs: &["perl"],
        files: &[("main.pl", include_str!("programs/fork.pl"))],
        line: "perl main.pl",
        ..PLAIN
    },
    Program {
        name: "tar_gzip_cat",
        needs: &["bash", "tar", "gzip", "sha256sum", "perl"],
        files: &[("main.sh", include_str!("programs/archive.sh"))],
        // 48 MiB that compress badly.
        setup: "mkdir data; perl -e 'srand 7; for $f (1..24) { open F, qq(>data/$f); print F pack q(L*), map { \
                int rand 2**31 } 1..262144; print F qq(text $f\\n) x 100000 }'",
        line: "bash main.sh",
        ..PLAIN
    },
    Program {
        name: "make_j2",
        needs: &["make", "cc"],
        files: &[
            ("Makefile", include_str!("programs/Makefile")),
            ("part.c", include_str!("programs/part.c")),
        ],
        line: "make -j2 -s result",
        ..PLAIN
    },
    Program {
        name: "java",
        needs: &["java", "javac"],
        files: &[("Main.java", include_str!("programs/Main.java"))],
        setup: "javac Main.java",
        // Not its file in /tmp/hsperfdata_USER: any other Java that starts removes those of pids it does not see.
        line: "java -XX:+PerfDisableSharedMem -Xmx64m Main plain",
        ..PLAIN
    },
    Program {
        name: "java_with_channels",
        needs: &["java", "javac"],
        files: &[("Main.java", include_str!("programs/Main.java"))],
        setup: "javac Main.java",
        line: "java -XX:+PerfDisableSharedMem -Xmx64m Main channels",
        expect: Expect::Refused("UNIX socket"),
        ..PLAIN
    },
    Program {
        name: "node",
        needs: &["node"],
        files: &[("main.js", include_str!("programs/main.js"))],
        line: "node main.js",
        ..PLAIN
    },
];

impl Program {
    /// Why it cannot run here.
    pub fn is_there(&self) -> Result<(), String> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        for need in self.needs.iter().chain(&["unshare", "setsid"]) {
            if !std::env::split_paths(&path).any(|dir| dir.join(need).is_file()) {
                return Err(format!("no {need}"));
            }
        }
        match self.probe {
            Some(probe) => {
                let output = Command::new("sh").args(["-c", probe]).current_dir(Path::new("/")).output();
                match output {
                    Ok(output) if output.status.success() => Ok(()),
                    _ => Err(format!("fails here: {probe}")),
                }
            }
            None => Ok(()),
        }
    }
}
