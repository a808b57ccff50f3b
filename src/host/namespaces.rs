//! Probes about namespaces.

use std::fs;

use super::{
    Trouble, call,
    child::{Child, Made, Script},
    expect,
};

/// A child that asks for a new namespace is in another one than we.
fn unshared(flag: i32, name: &str) -> Result<(), Trouble> {
    let mut script = call("pipe", Script::new())?;
    let done = script.call(libc::SYS_unshare, &[flag.into()]);
    let child = call("fork", script.start())?;
    call("unshare", child.result(done))?;
    let link = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).map_err(Trouble::Proc);
    expect(link("self")? != link(&child.pid().to_string())?, "the namespace is the old one")
}

pub(super) fn user() -> Result<(), Trouble> {
    unshared(libc::CLONE_NEWUSER, "user")
}

pub(super) fn cgroup() -> Result<(), Trouble> {
    unshared(libc::CLONE_NEWCGROUP, "cgroup")
}

pub(super) fn time() -> Result<(), Trouble> {
    unshared(libc::CLONE_NEWTIME, "time_for_children")
}

/// A child in its own network namespace that makes a TUN device; gives it and the descriptor's call.
fn tun_child(then: impl FnOnce(&mut Script, Made) -> Made) -> Result<(Child, Made), Trouble> {
    const TUNSETIFF: u32 = 0x4004_54ca;
    const IFF_TUN: u16 = 1;
    const IFF_NO_PI: u16 = 0x1000;
    let mut script = call("pipe", Script::new())?;
    let apart = script.call(libc::SYS_unshare, &[libc::CLONE_NEWNET.into()]);
    let path = script.data(b"/dev/net/tun\0");
    let fd =
        script.call(libc::SYS_openat, &[libc::AT_FDCWD.into(), path.into(), libc::O_RDWR.into(), 0.into()]);
    // struct ifreq: 16 bytes of name, then the flags.
    let mut request = [0u8; 40];
    if let Some(flags) = request.get_mut(16..18) {
        flags.copy_from_slice(&(IFF_TUN | IFF_NO_PI).to_ne_bytes());
    }
    let request = script.data(&request);
    let made = script.call(libc::SYS_ioctl, &[fd.into(), TUNSETIFF.into(), request.into()]);
    let last = then(&mut script, fd);
    let child = call("fork", script.start())?;
    call("unshare", child.result(apart))?;
    call("open of /dev/net/tun", child.result(fd))?;
    call("TUNSETIFF", child.result(made))?;
    Ok((child, last))
}

/// A TUN device can be made.
pub(super) fn tun() -> Result<(), Trouble> {
    let (child, _) = tun_child(|_, fd| fd)?;
    let devices = child.proc("net/dev").map_err(Trouble::Proc)?;
    let found = devices.windows(5).any(|text| text == b"tun0:");
    expect(found, "the device does not appear")
}

/// Linux 5.13: its network namespace can be told.
pub(super) fn tun_ns() -> Result<(), Trouble> {
    const TUNGETDEVNETNS: u32 = 0x54e3;
    let (child, ns) =
        tun_child(|script, fd| script.call(libc::SYS_ioctl, &[fd.into(), TUNGETDEVNETNS.into(), 0.into()]))?;
    let ns = call("TUNGETDEVNETNS", child.result(ns))?;
    let link = |file: &str| fs::read_link(format!("/proc/{}/{file}", child.pid())).map_err(Trouble::Proc);
    expect(link(&format!("fd/{ns}"))? == link("ns/net")?, "it is another namespace")
}
