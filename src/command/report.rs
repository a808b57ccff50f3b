//! What a command tells its caller besides its exit status: `--status-fd` and `--display-stats`.

use std::{
    fmt::Display,
    fs::File,
    io::{self, Write as _},
    os::fd::RawFd,
};

use anyhow::Context as _;

use crate::sys;

/// Writes the one zero byte and closes the descriptor.
pub(crate) fn ready(fd: Option<RawFd>) -> anyhow::Result<()> {
    let Some(fd) = fd else { return Ok(()) };
    sys::fd::dup(fd)
        .map_err(io::Error::from)
        .and_then(|fd| File::from(fd).write_all(&[0]))
        .and_then(|()| Ok(sys::fd::give_up(fd)?))
        .with_context(|| format!("write to status descriptor {fd}"))
}

/// Prints statistics; a closed standard output is no failure.
pub(crate) fn display(stats: &dyn Display) {
    let _ = write!(io::stdout(), "{stats}");
}
