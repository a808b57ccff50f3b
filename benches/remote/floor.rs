//! The floor: a program that reads memory of a running task, sends it over loopback TCP and writes it into a memfd on
//! the other side, and nothing else. No list of pages, no checksum, nobody frozen.
//!
//! A sender and a receiver, processes of one thread each, get the two ends of a connection as their stdin. The receiver
//! has three forms, which are measured as three ways; the best one is the floor.

use std::{
    env,
    fs::File,
    io::{self, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    os::unix::fs::FileExt as _,
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::{Pid, pipe};

use crate::sys;
use crate::target::{self, Target};
use crate::tool::{Reaper, Run};

/// Which side this process is, and of what.
pub const ROLE: &str = "BENCH_FLOOR";
/// Bytes moved at once.
const PIECE: usize = 256 << 10;
/// A run that takes longer than this is stuck.
const LIMIT: Duration = Duration::from_secs(120);

/// How the receiver gets what arrived into its memfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// recv(2) into a buffer, pwrite(2).
    Write,
    /// recv(2) into a shared mapping.
    Map,
    /// splice(2) into a pipe and out of it.
    Splice,
}

/// Moves the memory of `target`; what sender and receiver cost. The time ends when the sender has the
/// acknowledgement that all of it is in the memfd.
pub fn run(form: Form, target: &Target, reaper: &Reaper) -> Result<(Run, Run), String> {
    let failed = |e: io::Error| format!("floor: {e}");
    let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(failed)?;
    let near = TcpStream::connect(listener.local_addr().map_err(failed)?).map_err(failed)?;
    let (far, _) = listener.accept().map_err(failed)?;
    near.set_nodelay(true).map_err(failed)?;
    let start = |role: String, socket: TcpStream| {
        let begin = Instant::now();
        let child = Command::new(env::current_exe()?)
            .env(ROLE, role)
            .stdin(Stdio::from(OwnedFd::from(socket)))
            .spawn()?;
        Ok((begin, child.id().cast_signed()))
    };
    let (began_receiver, receiver) = start(format!("{form:?} {}", target.bytes), far).map_err(failed)?;
    // It gets to its first recv.
    thread::sleep(Duration::from_millis(50));
    let role = format!("Send {} {} {}", target.at, target.start, target.bytes);
    let (began_sender, sender) = start(role, near).map_err(failed)?;
    let end = |what: &str, begin: Instant, pid: i32| match reaper.wait(pid, LIMIT) {
        Some((ended, at)) if ended.status == 0 => {
            Ok(Run { wall: at - begin, peak_kib: ended.peak_kib, cpu: ended.cpu })
        }
        ended => Err(format!("floor: the {what} failed: {ended:?}")),
    };
    let sent = end("sender", began_sender, sender)?;
    Ok((sent, end("receiver", began_receiver, receiver)?))
}

pub fn main(role: &str) -> ExitCode {
    let words: Vec<&str> = role.split(' ').collect();
    let number = |at: usize| words[at].parse::<u64>().expect("a number");
    let mut socket = File::from(io::stdin().as_fd().try_clone_to_owned().expect("stdin"));
    let done = match words[0] {
        "Send" => send(&mut socket, number(1), number(2), number(3)),
        "Write" => receive(&mut socket, number(1), by_writing),
        "Map" => receive(&mut socket, number(1), by_mapping),
        "Splice" => receive(&mut socket, number(1), by_splicing),
        _ => panic!("no role {role}"),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("floor, {}: {error}", words[0]);
            ExitCode::FAILURE
        }
    }
}

fn send(socket: &mut File, pid: u64, start: u64, bytes: u64) -> io::Result<()> {
    let pid = Pid::from_raw(pid.try_into().map_err(io::Error::other)?);
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while at < bytes {
        let now = usize::try_from(bytes - at).map_or(PIECE, |left| left.min(PIECE));
        let from = RemoteIoVec { base: usize::try_from(start + at).map_err(io::Error::other)?, len: now };
        let got = process_vm_readv(pid, &mut [io::IoSliceMut::new(&mut buffer[..now])], &[from])?;
        socket.write_all(&buffer[..got])?;
        at += got as u64;
    }
    // The acknowledgement.
    socket.read_exact(&mut [0])
}

fn receive(
    socket: &mut File,
    bytes: u64,
    all: impl FnOnce(&mut File, &File, u64) -> io::Result<()>,
) -> io::Result<()> {
    let memfd = File::from(memfd_create("floor", MFdFlags::MFD_CLOEXEC)?);
    all(socket, &memfd, bytes)?;
    socket.write_all(&[1])?;
    // Nobody waits for this any more.
    let mut content = target::content();
    let mut buffer = vec![0; PIECE];
    for at in (0..bytes).step_by(PIECE) {
        memfd.read_exact_at(&mut buffer, at)?;
        let words = buffer.chunks_exact(8).map(|w| u64::from_ne_bytes(w.try_into().unwrap_or_default()));
        if !words.eq(content.by_ref().take(PIECE / 8)) {
            return Err(io::Error::other(format!("what came is not what was sent, near {at}")));
        }
    }
    Ok(())
}

fn by_writing(socket: &mut File, memfd: &File, bytes: u64) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while at < bytes {
        // Whole pieces: half a page would have to be filled with zeros first.
        let now = usize::try_from(bytes - at).map_or(PIECE, |left| left.min(PIECE));
        socket.read_exact(&mut buffer[..now])?;
        memfd.write_all_at(&buffer[..now], at)?;
        at += now as u64;
    }
    Ok(())
}

fn by_mapping(socket: &mut File, memfd: &File, bytes: u64) -> io::Result<()> {
    memfd.set_len(bytes)?;
    let mapped = sys::map_shared(memfd, usize::try_from(bytes).map_err(io::Error::other)?)?;
    for piece in mapped.chunks_mut(PIECE) {
        socket.read_exact(piece)?;
    }
    Ok(())
}

fn by_splicing(socket: &mut File, memfd: &File, bytes: u64) -> io::Result<()> {
    memfd.set_len(bytes)?;
    let (out, into) = pipe()?;
    fcntl(&into, FcntlArg::F_SETPIPE_SZ(1 << 20))?;
    let (mut at, end) = (0_i64, i64::try_from(bytes).map_err(io::Error::other)?);
    while at < end {
        let mut held = sys::splice(socket.as_raw_fd(), into.as_raw_fd(), None, PIECE)?;
        if held == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        while held > 0 {
            held -= sys::splice(out.as_raw_fd(), memfd.as_raw_fd(), Some(&mut at), held)?;
        }
    }
    Ok(())
}
