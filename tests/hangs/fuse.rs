//! A file system that can fall silent: FUSE, with one directory and one file in it, `f`, which is the program `sleep`.
//!
//! Nothing is cached, so whoever looks at it asks this process. Stopped by SIGSTOP, it does not answer.

use std::{
    ffi::CString,
    fs::{self, File, OpenOptions},
    io::{Read as _, Write as _},
    os::{fd::AsRawFd as _, unix::ffi::OsStrExt as _},
    path::Path,
    process::ExitCode,
};

use crate::sys;

const FILE: u64 = 2;

/// Mounts at `dir` and serves until the mount is gone.
pub fn main(dir: &Path) -> ExitCode {
    match serve(dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("fuse: {text}");
            ExitCode::FAILURE
        }
    }
}

/// Whether the kernel has FUSE.
pub fn available() -> bool {
    OpenOptions::new().read(true).write(true).open("/dev/fuse").is_ok()
}

/// Mounts at `dir`; what has to be served then.
pub fn begin(dir: &Path) -> Result<File, String> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let device = device.map_err(|e| format!("open of /dev/fuse: {e}"))?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    let options = CString::new(options).expect("no NUL");
    let dir = CString::new(dir.as_os_str().as_bytes()).expect("no NUL");
    sys::mount(c"fuse", &dir, &options).map_err(|e| format!("mount: {e}"))?;
    Ok(device)
}

fn serve(dir: &Path) -> Result<(), String> {
    let device = begin(dir)?;
    answer(device)
}

/// Answers until the end of the mount.
pub fn answer(mut device: File) -> Result<(), String> {
    let content = fs::read("/bin/sleep").map_err(|e| format!("read of /bin/sleep: {e}"))?;
    let mut request = vec![0u8; 1 << 18];
    loop {
        let len = match device.read(&mut request) {
            Ok(len) => len,
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::ENOENT | libc::EAGAIN)) => continue,
            Err(_) => return Ok(()),
        };
        let request = &request[..len];
        if let Some((error, body)) = reply(request, &content) {
            let unique = word(request, 8);
            let mut out = Vec::new();
            out.extend_from_slice(&u32::try_from(16 + body.len()).expect("short").to_ne_bytes());
            out.extend_from_slice(&(-error).to_ne_bytes());
            out.extend_from_slice(&unique.to_ne_bytes());
            out.extend_from_slice(&body);
            // A request that was interrupted wants no answer.
            let _ = device.write(&out);
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn half(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// `struct fuse_attr`.
fn attr(node: u64, size: usize) -> Vec<u8> {
    let (mode, nlink) = if node == FILE { (libc::S_IFREG | 0o755, 1) } else { (libc::S_IFDIR | 0o755, 2) };
    let size = if node == FILE { size as u64 } else { 0 };
    let mut out = Vec::new();
    for value in [node, size, size.div_ceil(512), 0, 0, 0] {
        out.extend_from_slice(&value.to_ne_bytes());
    }
    for value in [0u32, 0, 0, mode, nlink, 0, 0, 0, 4096, 0] {
        out.extend_from_slice(&value.to_ne_bytes());
    }
    out
}

/// Errno (0 for none) and body of the answer; `None` when none is wanted.
fn reply(request: &[u8], content: &[u8]) -> Option<(i32, Vec<u8>)> {
    let (opcode, node) = (half(request, 4), word(request, 16));
    let body = &request[40..];
    let words = |values: &[u64]| values.iter().flat_map(|v| v.to_ne_bytes()).collect::<Vec<u8>>();
    Some(match opcode {
        // LOOKUP: node, generation, no time for which it may be believed, attributes.
        1 => match body.split(|b| *b == 0).next() {
            Some(b"f") => (0, [words(&[FILE, 0, 0, 0, 0]), attr(FILE, content.len())].concat()),
            _ => (libc::ENOENT, Vec::new()),
        },
        // FORGET, BATCH_FORGET, INTERRUPT
        2 | 42 | 36 => return None,
        // GETATTR
        3 => (0, [words(&[0, 0]), attr(node, content.len())].concat()),
        // OPEN, OPENDIR
        14 | 27 => (0, words(&[0, 0])),
        // READ
        15 => {
            let (offset, size) = (word(body, 8) as usize, half(body, 16) as usize);
            let from = offset.min(content.len());
            (0, content[from..(from + size).min(content.len())].to_vec())
        }
        // STATFS
        17 => (0, vec![0; 80]),
        // RELEASE, RELEASEDIR, FLUSH
        18 | 29 | 25 => (0, Vec::new()),
        // INIT: the version, and what it takes to read.
        26 => {
            let mut out = Vec::new();
            for value in [7u32, 31, 1 << 17, 0, 0, 1 << 16, 1 << 16] {
                out.extend_from_slice(&value.to_ne_bytes());
            }
            out.resize(64, 0);
            (0, out)
        }
        _ => (libc::ENOSYS, Vec::new()),
    })
}
