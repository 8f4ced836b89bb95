//! One datagram between daemon and keeper: a message and the descriptors beside it.
//!
//! Invariant: a datagram that came without all of its bytes or descriptors is an error, never half a message.

use kvd_proto::wire::KeptThing;
use prost::Message;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;

/// Bytes of a message. At the limit: it is not sent, and what it was about is not kept.
pub(super) const PACKET_BYTES_MAX: usize = 64 << 10;
/// Descriptors of one thing: a table and its slots.
pub(super) const FDS_MAX: usize = 2;

/// Something kept.
pub(crate) struct Thing {
    /// What it is called.
    pub(crate) key: String,
    /// What is said of it.
    pub(crate) value: Vec<u8>,
    /// What is held for it.
    pub(crate) fds: Vec<OwnedFd>,
}

impl Thing {
    pub(super) fn new(kept: KeptThing, fds: Vec<OwnedFd>) -> Self {
        Self { key: kept.key, value: kept.value.into(), fds }
    }
}

pub(super) fn send(
    socket: impl AsFd,
    message: &impl Message,
    fds: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> io::Result<()> {
    let bytes = message.encode_to_vec();
    if bytes.len() > PACKET_BYTES_MAX || fds.len() > FDS_MAX {
        let what = format!("{} bytes and {} descriptors in one message", bytes.len(), fds.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "there is room for {FDS_MAX}");
    }
    sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, flags | SendFlags::NOSIGNAL)?;
    Ok(())
}

/// `None`: the other side is gone.
pub(super) fn receive<M: Message + Default>(socket: impl AsFd) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; PACKET_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let received = recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = message {
            fds.extend(more);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    let broken = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(broken("a message came without all of its bytes or descriptors".to_owned()));
    }
    let message = M::decode(&bytes[..received.bytes]).map_err(|error| broken(error.to_string()))?;
    Ok(Some((message, fds)))
}
