//! A service manager as a daemon knows it: what it is told, and descriptors that it keeps from one start to the next.

use std::{
    collections::BTreeMap,
    io::IoSliceMut,
    os::fd::{AsRawFd as _, OwnedFd, RawFd},
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
    thread,
};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::site::wait_for;

#[derive(Default)]
struct Told {
    lines: Vec<String>,
    store: BTreeMap<String, Vec<OwnedFd>>,
}

pub struct Manager {
    socket: PathBuf,
    told: Arc<Mutex<Told>>,
}

impl Manager {
    pub fn start(dir: &Path) -> Self {
        let socket = dir.join("notify");
        let listener = UnixDatagram::bind(&socket).unwrap();
        let told: Arc<Mutex<Told>> = Arc::default();
        let heard = told.clone();
        thread::spawn(move || {
            while let Some((text, fds)) = receive(&listener) {
                heard.lock().unwrap().take(&text, fds);
            }
        });
        Self { socket, told }
    }

    /// The command as a service that it starts, with what it has kept; up to `most` descriptors.
    pub fn service(&self, command: &Command, most: usize) -> Command {
        let mut told = self.told.lock().unwrap();
        let kept: Vec<(String, OwnedFd)> = std::mem::take(&mut told.store)
            .into_iter()
            .flat_map(|(name, fds)| fds.into_iter().map(move |fd| (name.clone(), fd)))
            .collect();
        let names: Vec<&str> = kept.iter().map(|(name, _)| name.as_str()).collect();
        let mut service = Command::new("bash");
        service.env("NOTIFY_SOCKET", &self.socket).env("FDSTORE", most.to_string());
        let mut script = "export LISTEN_PID=$$; exec \"$@\"".to_owned();
        if !kept.is_empty() {
            service.env("LISTEN_FDS", kept.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        }
        for (number, (_, fd)) in (3..).zip(&kept) {
            // Opened anew by the shell, which has no other way to them.
            let ours = format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
            script += &format!(" {number}<>{ours}");
        }
        service.args(["-c", &script, "bash"]).arg(command.get_program()).args(command.get_args());
        service.stdin(std::process::Stdio::null());
        // They stay with the service from now on, and with the manager until it says otherwise.
        for (name, fd) in kept {
            told.store.entry(name).or_default().push(fd);
        }
        service
    }

    /// Waits until so many descriptors are kept under each name.
    pub fn keeps(&self, wanted: &[usize]) {
        wait_for("what is kept", || {
            let kept: Vec<usize> = self.told.lock().unwrap().store.values().map(Vec::len).collect();
            (kept == wanted).then_some(())
        });
    }

    /// Waits until it is told this.
    pub fn hears(&self, line: &str) {
        wait_for(line, || {
            self.told.lock().unwrap().lines.iter().any(|told| told.starts_with(line)).then_some(())
        });
    }
}

impl Told {
    fn take(&mut self, text: &str, fds: Vec<OwnedFd>) {
        let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        match (value("FDNAME"), value("FDSTORE"), value("FDSTOREREMOVE")) {
            (Some(name), Some("1"), _) => self.store.entry(name.to_owned()).or_default().extend(fds),
            (Some(name), _, Some("1")) => drop(self.store.remove(name)),
            // Among them the barrier, whose descriptor is closed here.
            _ => drop(fds),
        }
        self.lines.extend(text.lines().map(str::to_owned));
    }
}

fn receive(socket: &UnixDatagram) -> Option<(String, Vec<OwnedFd>)> {
    let mut bytes = [0; 4096];
    let mut space = nix::cmsg_space!([RawFd; 8]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let got = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags).ok()?;
    let mut fds = Vec::new();
    for control in got.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            for fd in raw {
                let path = format!("/proc/self/fd/{fd}");
                // A pipe is of no use, but for the end of it that is closed here.
                let file = std::fs::File::options().read(true).write(true).open(path);
                fds.extend(file.map(OwnedFd::from));
                let _ = nix::unistd::close(fd);
            }
        }
    }
    let len = got.bytes;
    Some((String::from_utf8_lossy(bytes.get(..len)?).into_owned(), fds))
}
