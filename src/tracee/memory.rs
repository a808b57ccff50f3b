//! The memory of a target through /proc/PID/mem: reads and writes whatever the protection.

use std::{fs::File, os::unix::fs::FileExt};

use super::{RemoteAddr, TraceError};
use crate::sys::pid::HostPid;

/// An open /proc/PID/mem.
#[derive(Debug)]
pub struct RemoteMemory {
    pid: HostPid,
    file: File,
}

impl RemoteMemory {
    /// Opens the memory of the process that thread `tid` belongs to.
    pub fn open(tid: HostPid) -> Result<Self, TraceError> {
        let path = format!("/proc/{tid}/mem");
        match File::options().read(true).write(true).open(&path) {
            Ok(file) => Ok(Self { pid: tid, file }),
            Err(source) => Err(TraceError::Proc { path, source }),
        }
    }

    fn error(&self, what: &'static str, error: &std::io::Error) -> TraceError {
        let source = nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        TraceError::Inject { what, pid: self.pid, source }
    }

    /// Reads exactly `buf.len()` bytes.
    pub fn read(&self, at: RemoteAddr, buf: &mut [u8]) -> Result<(), TraceError> {
        self.file.read_exact_at(buf, at.0).map_err(|e| self.error("read of memory", &e))
    }

    /// Reads up to `buf.len()` bytes; short at the first page that is not there.
    pub fn read_some(&self, at: RemoteAddr, buf: &mut [u8]) -> usize {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], at.0 + done as u64) {
                Ok(0) | Err(_) => break,
                Ok(n) => done += n,
            }
        }
        done
    }

    /// Writes all of `bytes`.
    pub fn write(&self, at: RemoteAddr, bytes: &[u8]) -> Result<(), TraceError> {
        self.file.write_all_at(bytes, at.0).map_err(|e| self.error("write of memory", &e))
    }
}
