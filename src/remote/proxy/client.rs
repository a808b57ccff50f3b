//! A process of this host at the proxy's socket.
//!
//! Packets that it does not read are kept, and it is not listened to before they are gone: one that never reads
//! costs no more than what one request can bring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use crate::remote::Failure;
use crate::remote::local::{self, MAX_PACKET, Packet};
use crate::remote::name::shorten;
use crate::remote::pb::{self, local_reply::What};
use crate::sys;

/// Snapshots in one packet of a list. Their texts are shortened so that they fit.
const LISTED: usize = 24;
/// Longest text of a snapshot in a list, in bytes. Names and hosts are limited where they come in.
const LISTED_TEXT: usize = 1000;

/// One of them.
#[derive(Debug)]
pub(super) struct Client {
    socket: OwnedFd,
    pub(super) pid: i32,
    /// Held so that its end can be seen. None if it had ended before.
    pidfd: Option<OwnedFd>,
    out: VecDeque<(pb::LocalReply, Vec<OwnedFd>)>,
    /// The snapshot that it dumps.
    pub(super) snapshot: Option<u64>,
    /// The snapshot it waits for, and until when.
    pub(super) waits: Option<(u64, Option<Instant>)>,
    /// Until when it must have asked for something.
    pub(super) ask_by: Option<Instant>,
    /// What its socket is watched for.
    pub(super) watched_for_room: bool,
}

impl Client {
    /// Has just connected. The socket does not block.
    pub(super) fn new(socket: OwnedFd, ask_by: Instant) -> io::Result<Self> {
        let pid = getsockopt(&socket, PeerCredentials)?.pid();
        // Without SO_PEERPIDFD the number must do; it is the peer's as long as that lives.
        let pidfd = sys::pidfd::of_peer(socket.as_fd()).or_else(|_| sys::pidfd::open(pid, 0)).ok();
        Ok(Self {
            socket,
            pid,
            pidfd,
            out: VecDeque::new(),
            snapshot: None,
            waits: None,
            ask_by: Some(ask_by),
            watched_for_room: false,
        })
    }

    /// For watching.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The process.
    pub(super) fn process(&self) -> Option<OwnedFd> {
        self.pidfd.as_ref().and_then(|pidfd| pidfd.try_clone().ok())
    }

    /// Whether it neither dumps nor waits for anything: it can ask again if it is sent away.
    pub(super) fn is_idle(&self) -> bool {
        self.snapshot.is_none() && self.waits.is_none() && self.out.is_empty()
    }

    /// Whether packets wait for room.
    pub(super) fn is_behind(&self) -> bool {
        !self.out.is_empty()
    }

    /// The next request. `None` at the end; `WouldBlock` when there is none, or when it has to read first.
    pub(super) fn receive(&mut self) -> io::Result<Option<Packet<pb::LocalRequest>>> {
        if self.is_behind() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        match local::receive(self.fd()) {
            // The peer closed and had not read all; what it had sent before still comes.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => local::receive(self.fd()),
            other => other,
        }
    }

    /// Sends it, now or when there is room. A peer that is gone shows when it is read from.
    pub(super) fn reply(&mut self, what: What) {
        self.reply_with(what, Vec::new());
    }

    /// Says that nothing comes of what it wanted.
    pub(super) fn refuse(&mut self, failure: &Failure) {
        self.reply(What::Failed(failure.clone().into()));
    }

    /// The same as [`Self::reply`] with descriptors, at most [`local::MAX_FDS`].
    pub(super) fn reply_with(&mut self, what: What, fds: Vec<OwnedFd>) {
        self.out.push_back((pb::LocalReply { what: Some(what) }, fds));
        self.flush();
    }

    /// Sends what waits, as far as there is room.
    pub(super) fn flush(&mut self) {
        while let Some((reply, fds)) = self.out.front() {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            match local::send(self.fd(), reply, &fds) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Ok(()) => drop(self.out.pop_front()),
                Err(_) => self.out.clear(),
            }
        }
    }

    /// A list, in as many packets as it takes.
    pub(super) fn reply_list(&mut self, infos: Vec<pb::SnapshotInfo>, daemon: &str) {
        let mut parts: Vec<Vec<_>> = infos.chunks(LISTED).map(<[_]>::to_vec).collect();
        if parts.is_empty() {
            parts.push(Vec::new());
        }
        let last = parts.len() - 1;
        for (number, mut snapshots) in parts.into_iter().enumerate() {
            for info in &mut snapshots {
                shorten(&mut info.text, LISTED_TEXT);
            }
            let daemon = daemon.to_owned();
            self.reply(What::Snapshots(pb::Snapshots {
                snapshots,
                daemon,
                more: number < last,
                closing: false,
            }));
        }
    }
}

// Name, parent, host, comm and text, and some numbers.
const _: () = assert!(LISTED * (1024 + 1024 + 256 + 256 + LISTED_TEXT + 200) < MAX_PACKET);
