//! The node's side of one session socket: frames in, frames and descriptors out, never waiting.
//!
//! Invariants: a frame that is not one ends the connection, and so does a descriptor that no frame announces; a peer that does not read is
//! cut off at a stated backlog; descriptors leave with the first byte of their frame.

use super::chunks::{Chunks, HeldChunk, Share};
use kvd_proto::frame::{self, FrameHeader, HEADER_BYTES};
use kvd_proto::limits::FRAME_FDS_MAX;
use kvd_proto::wire::{ClientFrame, GiveChunksRequest, NodeFrame};
use kvd_proto::{Code, Error};
use prost::Message as _;
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::sync::Arc;

/// Unsent bytes of one peer. At the limit: it is not reading, the connection ends.
const OUTBOX_BYTES_MAX: usize = 16 << 20;
/// Read from one socket in one wake-up, so that no peer keeps the node from the others.
const READ_BYTES: usize = 256 << 10;

pub(super) struct Socket {
    pub(super) stream: mio::net::UnixStream,
    inbox: Vec<u8>,
    /// As they came; `None`: one too many, which was closed.
    descriptors: VecDeque<Option<HeldChunk>>,
    share: Arc<Share>,
    /// For the next memory that it has opened.
    given: Chunks,
    outbox: VecDeque<Chunk>,
    outbox_bytes: usize,
    /// The peer writes no more: what is read ends.
    pub(super) ended: bool,
    /// To be dropped when everything is sent.
    pub(super) closing: bool,
}

#[derive(Default)]
struct Chunk {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

/// A frame, and the descriptors that came with it.
pub(super) struct Received {
    pub(super) frame: ClientFrame,
    pub(super) beside: Vec<Option<HeldChunk>>,
}

/// What reading left.
pub(super) enum Left {
    /// Nothing to read now.
    Nothing,
    /// More, for the next round.
    More,
    /// The peer is gone.
    Ended,
}

impl Socket {
    pub(super) fn new(stream: mio::net::UnixStream, share: Arc<Share>) -> Self {
        Self {
            stream,
            inbox: Vec::new(),
            descriptors: VecDeque::new(),
            share,
            given: Chunks::default(),
            outbox: VecDeque::new(),
            outbox_bytes: 0,
            ended: false,
            closing: false,
        }
    }

    /// Reads what is there, up to the round's share, and appends whole frames.
    pub(super) fn read(&mut self, buffer: &mut [u8], frames: &mut Vec<Received>) -> Result<Left, Error> {
        assert!(buffer.len() <= READ_BYTES);
        let mut left = Left::More;
        let mut taken = 0;
        while taken < READ_BYTES {
            match self.receive(buffer) {
                Ok((0, _)) => left = Left::Ended,
                Ok((bytes, descriptors)) => {
                    taken += bytes;
                    self.inbox.extend_from_slice(&buffer[..bytes]);
                    // behind descriptors a receive ends, whatever else is there
                    if bytes == buffer.len() || descriptors || self.ended {
                        continue;
                    }
                    left = Left::Nothing; // a short read: the next byte, or the end, wakes us
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => left = Left::Nothing,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => left = Left::Ended,
            }
            break;
        }
        self.parse(frames)?;
        Ok(left)
    }

    /// How many bytes, and whether descriptors came beside them.
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<(usize, bool)> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FRAME_FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = recvmsg(&self.stream, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
        let mut came = received.flags.contains(ReturnFlags::CTRUNC);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                came = true;
                let share = &self.share;
                self.descriptors.extend(descriptors.map(|descriptor| share.hold(descriptor)));
            }
        }
        Ok((received.bytes, came))
    }

    /// What a frame gives for the next memory to be opened; how many there are then. An error: none are.
    pub(super) fn give(
        &mut self,
        request: GiveChunksRequest,
        beside: Vec<Option<HeldChunk>>,
    ) -> Result<usize, Error> {
        self.given.add(&self.share, request, beside)
    }

    /// All that was given.
    pub(super) fn take_given(&mut self) -> Chunks {
        std::mem::take(&mut self.given)
    }

    /// Nothing more is heard: closes what came, and after its last frame the connection.
    pub(super) fn shut(&mut self) {
        self.closing = true;
        self.descriptors.clear();
        self.take_given();
    }

    fn parse(&mut self, frames: &mut Vec<Received>) -> Result<(), Error> {
        let mut consumed = 0;
        while let Some((head, rest)) = self.inbox[consumed..].split_first_chunk::<HEADER_BYTES>() {
            let header = FrameHeader::decode(*head)?;
            let Some(body) = rest.get(..header.body_bytes as usize) else { break };
            let frame = ClientFrame::decode(body).map_err(|error| {
                Error::new(
                    Code::Frame,
                    "frame",
                    error.to_string(),
                    "check that client and node versions agree",
                )
            })?;
            let announced = usize::from(header.fds);
            if announced > self.descriptors.len() {
                let what = format!("{announced} descriptors are announced, {} came", self.descriptors.len());
                return Err(Error::new(
                    Code::Frame,
                    "frame",
                    what,
                    "raise the node's open files limit (LimitNOFILE)",
                ));
            }
            let beside = self.descriptors.drain(..announced).collect();
            frames.push(Received { frame, beside });
            consumed += HEADER_BYTES + body.len();
        }
        self.inbox.drain(..consumed);
        let most = if self.inbox.is_empty() { 0 } else { FRAME_FDS_MAX };
        if self.descriptors.len() > most {
            let what = format!("{} descriptors came that no frame announces", self.descriptors.len());
            let fix = "say in a frame's header how many come beside its first byte";
            return Err(Error::new(Code::Frame, "frame", what, fix));
        }
        Ok(())
    }

    /// Queues a frame; `flush` sends it. `false`: the peer does not read, the connection must end.
    pub(super) fn push(&mut self, frame: &NodeFrame, fds: Vec<OwnedFd>) -> bool {
        if self.outbox.is_empty() || !fds.is_empty() {
            self.outbox.push_back(Chunk::default());
        }
        let chunk = self.outbox.back_mut().expect("one was pushed if there was none");
        let before = chunk.bytes.len();
        frame::push(&mut chunk.bytes, frame, fds.len() as u8);
        if !fds.is_empty() {
            chunk.fds = fds;
        }
        self.outbox_bytes += chunk.bytes.len() - before;
        self.outbox_bytes <= OUTBOX_BYTES_MAX
    }

    /// Sends what the socket takes. `Ok(true)`: all of it.
    pub(super) fn flush(&mut self) -> io::Result<bool> {
        while let Some(chunk) = self.outbox.front_mut() {
            match chunk.send(&self.stream) {
                Ok(bytes) => {
                    chunk.sent += bytes;
                    self.outbox_bytes -= bytes;
                    if chunk.sent == chunk.bytes.len() {
                        self.outbox.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

impl Chunk {
    /// Descriptors go with the first byte; the kernel has its own copies after that.
    fn send(&mut self, stream: &mio::net::UnixStream) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FRAME_FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        if self.sent == 0 && !fds.is_empty() {
            let fits = control.push(SendAncillaryMessage::ScmRights(&fds));
            assert!(fits, "{} descriptors in one frame", fds.len());
        }
        let bytes = [IoSlice::new(&self.bytes[self.sent..])];
        let sent = sendmsg(stream, &bytes, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
        drop(fds);
        self.fds.clear();
        Ok(sent)
    }
}
