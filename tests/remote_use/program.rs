//! The process that is migrated. It counts into a file; told to end it looks at all its memory and says in another
//! file whether it is what it was.

use std::{
    env, fs,
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::Path,
    process::{Command, ExitCode, Stdio},
    thread,
    time::Duration,
};

/// Its directory.
const DIR: &str = "REMOTE_USE_TARGET";
/// What is in its memory.
const KIND: &str = "REMOTE_USE_KIND";

/// How much memory it has.
pub const BYTES: usize = 4 << 20;

/// What is in its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// Lines that are much alike.
    Text,
    /// Nothing that could be told in fewer bytes.
    Noise,
}

impl Memory {
    fn word(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Noise => "noise",
        }
    }

    fn bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(BYTES + 64);
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for number in 0u64.. {
            match self {
                Self::Text => writeln!(bytes, "this is line {number} of a long text").expect("room"),
                Self::Noise => {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    bytes.extend_from_slice(&state.to_le_bytes());
                }
            }
            if bytes.len() >= BYTES {
                break;
            }
        }
        bytes
    }
}

/// Starts it as a command whose files are in `dir`.
pub fn command(dir: &Path, memory: Memory) -> Command {
    let mut command = Command::new(env::current_exe().expect("own path"));
    command.env(DIR, dir).env(KIND, memory.word()).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Runs it, if this process is it.
pub fn main() -> Option<ExitCode> {
    let dir = env::var_os(DIR)?;
    let memory = if env::var(KIND).as_deref() == Ok("noise") { Memory::Noise } else { Memory::Text };
    run(Path::new(&dir), memory);
    Some(ExitCode::SUCCESS)
}

fn run(dir: &Path, memory: Memory) {
    // What whoever runs the tests has left open.
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")
        .map(|entries| entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
        .unwrap_or_default();
    for fd in open.into_iter().filter(|&fd| fd > 2) {
        let _ = nix::unistd::close(fd);
    }
    nix::unistd::setsid().expect("new session");
    let held = memory.bytes();
    let count = fs::File::create(dir.join("count")).expect("a file to count into");
    for number in 1u64.. {
        // As long as ever: who is restored a second time finds its file with the size it had.
        count.write_all_at(format!("{number:020}").as_bytes(), 0).expect("count");
        if dir.join("stop").exists() {
            break;
        }
        thread::sleep(Duration::from_millis(2));
    }
    let verdict = if held == memory.bytes() { "well" } else { "its memory is not what it was" };
    fs::write(dir.join("end"), verdict).expect("say how it ends");
}
