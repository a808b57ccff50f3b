//! Command line: words to settings, settings to a command, its end to an exit status.

mod argv;
mod config;
mod help;
mod known;
mod opts;
mod remotely;
mod settings;

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    io::{self, Write as _},
    os::fd::{IntoRawFd as _, RawFd},
    panic,
    path::Path,
    process::ExitCode,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use anyhow::{Context as _, bail};
use clap::CommandFactory;
use settings::{Plan, Task};

use crate::{
    command, deadline,
    exit::{self, Exit},
    log,
    settings::DumpSettings,
    sys,
};

/// Of the binary: says when memory is out.
pub use crate::sys::own::Allocator;

/// The stack that is enough for anything here, and the one with which it is not worth to begin.
const STACK: u64 = 8 << 20;
const LEAST_STACK: u64 = 1 << 20;

/// Entry point of the binary.
pub fn main() -> ExitCode {
    let start = Instant::now();
    // Without them the process would end by a signal where it should say why it fails; it works all the same.
    let _ = sys::own::survive();
    // Who needs more than there may be says so.
    let _ = sys::own::raise_open_files();
    if let Ok(stack @ ..LEAST_STACK) = sys::own::at_least(libc::RLIMIT_STACK, STACK) {
        log::failure(&format!(
            "the limit of the stack (ulimit -s) is {} KiB, and crtool needs {}",
            stack >> 10,
            LEAST_STACK >> 10
        ));
        return Exit::Failure.into();
    }
    let mut words: Vec<OsString> = env::args_os().collect();
    let name = if words.is_empty() { OsString::new() } else { words.remove(0) };
    // A link called `crit` is CRIU's image tool.
    if Path::new(&name).file_name() == Some(OsStr::new("crit")) {
        words.insert(0, "image".into());
    }
    caught(|| run(words, start)).into()
}

/// Turns a panic into one line and a status.
fn caught(run: impl FnOnce() -> Exit + panic::UnwindSafe) -> Exit {
    static LAST: Mutex<Option<String>> = Mutex::new(None);
    panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let text = text.unwrap_or("panic");
        let text = match info.location() {
            Some(at) => format!("{text} ({at})"),
            None => text.to_owned(),
        };
        // The first panic is the cause of any later one.
        LAST.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(text);
    }));
    panic::catch_unwind(run).unwrap_or_else(|_| {
        let text = LAST.lock().unwrap_or_else(PoisonError::into_inner).take();
        let text = text.unwrap_or_else(|| "panic".to_owned());
        log::failure(&format!("internal error, please report: {text}"));
        Exit::Internal
    })
}

fn run(words: Vec<OsString>, start: Instant) -> Exit {
    match plan_and_do(words, start) {
        Ok(exit) => exit,
        Err(error) => {
            log::failure(&format!("{error:#}"));
            exit::of(&error)
        }
    }
}

/// This process may do that, and the descriptors that the caller speaks of are open; seen before we open anything, which could take
/// their numbers.
fn may_do(task: &Task) -> anyhow::Result<()> {
    let open = |name: &str, fd: RawFd| match fs::symlink_metadata(format!("/proc/self/fd/{fd}")) {
        Ok(_) => Ok(()),
        Err(_) => bail!("option --{name}: descriptor {fd} is not open"),
    };
    let direct = |settings: &DumpSettings| settings.remote.as_ref()?.direct.as_ref()?.ps_socket;
    let (status_fd, ps_socket) = match task {
        Task::Dump(settings, report) => (report.status_fd, direct(settings)),
        Task::Restore(_, report) => (report.status_fd, None),
        Task::Migrate(settings, report) => (report.status_fd, direct(&settings.dump)),
        Task::Cache(settings) => (settings.daemon.status_fd, settings.net.ps_socket),
        Task::Proxy(settings) => (settings.daemon.status_fd, settings.net.ps_socket),
        _ => (None, None),
    };
    if let Some(fd) = status_fd {
        open("status-fd", fd)?;
    }
    if let Some(fd) = ps_socket {
        open("ps-socket", fd)?;
    }
    if let Task::Restore(settings, _) = task {
        if settings.detached && settings.exec_cmd.is_none() && std::process::id() == 1 {
            bail!(
                "restore with --restore-detached as the first process of a pid namespace, whose end is that of all \
                 others: leave the option out"
            );
        }
        settings.inherit_fds.iter().try_for_each(|inherited| open("inherit-fd", inherited.fd))?;
    }
    Ok(())
}

fn plan_and_do(words: Vec<OsString>, start: Instant) -> anyhow::Result<Exit> {
    let Plan { task, log, limit, close, warnings } = settings::plan(words)?;
    match task {
        Task::Help(of) => {
            // A reader that has seen enough is no failure.
            let _ = match of {
                Some(known::Command::ImageCache) => write!(io::stdout(), "{}", help::IMAGE_CACHE),
                Some(known::Command::ImageProxy) => write!(io::stdout(), "{}", help::IMAGE_PROXY),
                Some(known::Command::Migrate) => write!(io::stdout(), "{}", help::MIGRATE),
                _ => write!(io::stdout(), "{}", opts::Opts::command().render_help()),
            };
            return Ok(Exit::Success);
        }
        Task::Version => {
            let _ = writeln!(io::stdout(), "Version: {}", env!("CARGO_PKG_VERSION"));
            return Ok(Exit::Success);
        }
        _ => {}
    }
    for fd in close {
        // As with CRIU, a descriptor that is not open is no mistake.
        let _ = nix::unistd::close(fd);
        if (0..=2).contains(&fd) {
            // Or the next file we open would be our standard input or output. The lowest free number is taken.
            let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
            let _ = null.into_raw_fd();
        }
    }
    may_do(&task)?;
    deadline::within(limit, move || log::start(&log, start)).context("the log")??;
    tracing::info!("Version: {}", env!("CARGO_PKG_VERSION"));
    if let Ok(uname) = nix::sys::utsname::uname() {
        tracing::info!(
            "Running on {} {} {} {} {}",
            uname.nodename().display(),
            uname.sysname().display(),
            uname.release().display(),
            uname.version().display(),
            uname.machine().display(),
        );
    }
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    match task {
        Task::Dump(settings, report) => command::dump::run(&settings, report),
        Task::Restore(settings, report) => command::restore::run(&settings, report),
        Task::Check(settings) => command::check::run(&settings),
        Task::Image(words) => command::image::run(&words).map(|()| Exit::Success),
        Task::Demo => command::demo::run().map(|()| Exit::Success),
        Task::Cache(settings) => command::image_cache::run(&settings),
        Task::AskCache(request, work_dir) => command::image_cache::ask(&request, &work_dir),
        Task::Proxy(settings) => command::image_proxy::run(&settings),
        Task::ProxyStatus(work_dir) => command::image_proxy::status(&work_dir),
        Task::Migrate(settings, report) => command::migrate::run(&settings, report),
        Task::AskMigrate(request, remote) => command::migrate::ask(&request, &remote),
        Task::Help(_) | Task::Version => Ok(Exit::Success),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_status() {
        assert_eq!(caught(|| panic!("on purpose")), Exit::Internal);
        assert_eq!(caught(|| Exit::Success), Exit::Success);
        let _ = panic::take_hook();
    }
}
