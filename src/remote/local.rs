//! Packets between the commands of one host and its daemons: one message each, with descriptors beside it.
//!
//! The socket is SOCK_SEQPACKET, so that a packet is a message and nothing can be cut in the middle. Bytes of
//! images do not come this way: a dump gets the end of a pipe, a restore gets memfds.

pub mod door;

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use prost::Message;

/// Longest packet, in bytes.
pub const MAX_PACKET: usize = 128 << 10;
/// Most descriptors beside one.
pub const MAX_FDS: usize = 4;
/// SCM_MAX_FD of the kernel: with room for all, none that came can be lost sight of.
const ROOM_FDS: usize = 253;

/// Sends one packet. EAGAIN on a full non-blocking socket; nothing is sent then.
pub fn send<M: Message>(socket: BorrowedFd<'_>, message: &M, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = message.encode_to_vec();
    if bytes.len() > MAX_PACKET {
        return Err(Errno::EMSGSIZE.into());
    }
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    loop {
        match sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// A packet that came.
#[derive(Debug)]
pub struct Packet<M> {
    /// What it says.
    pub message: M,
    /// What came with it, at most [`MAX_FDS`].
    pub fds: Vec<OwnedFd>,
}

/// Receives one packet, or `None` at the end. EAGAIN on an empty non-blocking socket; EBADMSG for what is no
/// message, is too long, or comes with too many descriptors.
pub fn receive<M: Message + Default>(socket: BorrowedFd<'_>) -> io::Result<Option<Packet<M>>> {
    let mut bytes = vec![0; MAX_PACKET + 1];
    let mut space = nix::cmsg_space!([RawFd; ROOM_FDS]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let (len, fds, cut) = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Ok(got) => {
                let mut fds = Vec::new();
                for control in got.cmsgs().map_err(io::Error::from)? {
                    if let ControlMessageOwned::ScmRights(raw) = control {
                        for fd in raw {
                            fds.push(crate::sys::fd::adopt(fd)?);
                        }
                    }
                }
                break (got.bytes, fds, got.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC));
            }
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    };
    if len == 0 && fds.is_empty() {
        return Ok(None);
    }
    let message = M::decode(bytes.get(..len).unwrap_or_default());
    match message {
        Ok(message) if !cut && len <= MAX_PACKET && fds.len() <= MAX_FDS => Ok(Some(Packet { message, fds })),
        _ => Err(Errno::EBADMSG.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;
    use crate::remote::pb;

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
    }

    #[test]
    fn messages_and_descriptors_come_over() {
        let (a, b) = pair();
        let null = File::open("/dev/null").unwrap();
        let info = pb::ImageInfo { name: "x".to_owned(), size: 7, complete: true, offset: 0 };
        send(a.as_fd(), &info, &[null.as_fd()]).unwrap();
        send(a.as_fd(), &info, &[]).unwrap();
        let first = receive::<pb::ImageInfo>(b.as_fd()).unwrap().unwrap();
        assert_eq!((first.message, first.fds.len()), (info.clone(), 1));
        let second = receive::<pb::ImageInfo>(b.as_fd()).unwrap().unwrap();
        assert_eq!((second.message, second.fds.len()), (info, 0));
        let empty = receive::<pb::ImageInfo>(b.as_fd()).unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        drop(a);
        assert!(receive::<pb::ImageInfo>(b.as_fd()).unwrap().is_none());
    }

    #[test]
    fn what_is_no_message_is_refused_and_leaks_nothing() {
        let (a, b) = pair();
        nix::unistd::write(&a, &[0xff; 20]).unwrap();
        let refused = receive::<pb::ImageInfo>(b.as_fd()).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EBADMSG));
        let null = File::open("/dev/null").unwrap();
        let many = [null.as_fd(); MAX_FDS + 1];
        send(a.as_fd(), &pb::ImageInfo::default(), &many).unwrap();
        assert!(receive::<pb::ImageInfo>(b.as_fd()).is_err());
        let info = pb::ImageInfo { name: "y".repeat(MAX_PACKET), ..Default::default() };
        assert_eq!(send(a.as_fd(), &info, &[]).unwrap_err().raw_os_error(), Some(libc::EMSGSIZE));
    }
}
