//! Two hosts on one machine: network namespaces of their own, joined by a cable.
//!
//! The namespaces have no names and no processes of their own: they go when the last process in them and
//! [`Hosts`] are gone, so trials side by side do not see each other and leave nothing.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns, unshare};

/// One of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    Left,
    Right,
}

impl Host {
    pub fn other(self) -> Host {
        match self {
            Host::Left => Host::Right,
            Host::Right => Host::Left,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Host::Left => "left",
            Host::Right => "right",
        }
    }

    /// What the other one calls it.
    pub fn ipv4(self) -> &'static str {
        match self {
            Host::Left => "10.77.0.1",
            Host::Right => "10.77.0.2",
        }
    }

    pub fn ipv6(self) -> &'static str {
        match self {
            Host::Left => "fd77::1",
            Host::Right => "fd77::2",
        }
    }
}

/// Both, and the namespace that we came from.
#[derive(Debug)]
pub struct Hosts {
    left: File,
    right: File,
    home: File,
}

fn current() -> Result<File, String> {
    let path = "/proc/thread-self/ns/net";
    File::open(path).map_err(|e| format!("open {path}: {e}"))
}

impl Hosts {
    /// Makes both and the cable. Starts children and waits for them: to be called before anyone else reaps.
    pub fn join() -> Result<Hosts, String> {
        let home = current()?;
        let fresh = || {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|e| format!("a new network namespace: {e}"))?;
            current()
        };
        let hosts = Hosts { left: fresh()?, right: fresh()?, home };
        let right = format!("/proc/{}/fd/{}", std::process::id(), hosts.right.as_raw_fd());
        hosts.enter(Host::Left)?;
        ip(&format!("link add eth0 type veth peer name eth0 netns {right}\n{}", addresses(Host::Left)))?;
        hosts.enter(Host::Right)?;
        ip(&addresses(Host::Right))?;
        hosts.leave()?;
        Ok(hosts)
    }

    /// The calling thread, and what it starts from now on, is on that host.
    pub fn enter(&self, host: Host) -> Result<(), String> {
        let namespace = match host {
            Host::Left => &self.left,
            Host::Right => &self.right,
        };
        setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|e| format!("enter host {}: {e}", host.name()))
    }

    /// The calling thread is back where it came from.
    pub fn leave(&self) -> Result<(), String> {
        setns(&self.home, CloneFlags::CLONE_NEWNET).map_err(|e| format!("leave the host: {e}"))
    }
}

fn addresses(host: Host) -> String {
    // Without `nodad` an IPv6 address cannot be used for its first second.
    format!(
        "link set lo up\naddr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\nlink set eth0 up\n",
        host.ipv4(),
        host.ipv6()
    )
}

/// Runs lines of ip(8) in the network namespace of the calling thread.
fn ip(lines: &str) -> Result<(), String> {
    let mut command = Command::new("ip");
    command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| format!("start ip (package iproute2): {e}"))?;
    let input = child.stdin.take();
    input.map_or(Ok(()), |mut i| i.write_all(lines.as_bytes())).map_err(|e| format!("write to ip: {e}"))?;
    let output = child.wait_with_output().map_err(|e| format!("wait for ip: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)))
}
