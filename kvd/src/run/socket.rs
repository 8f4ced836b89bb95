//! The node's side of one session socket: frames in, frames and descriptors out, never waiting.
//!
//! Invariants: a frame that is not one ends the connection; a peer that does not read is cut off at a stated backlog;
//! descriptors leave with the first byte of their frame.

use kvd_proto::frame::{self, FrameHeader, HEADER_BYTES};
use kvd_proto::wire::{ClientFrame, NodeFrame};
use kvd_proto::{Code, Error};
use prost::Message as _;
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::collections::VecDeque;
use std::io::{self, IoSlice, Read as _};
use std::mem::MaybeUninit;

/// Unsent bytes of one peer. At the limit: it is not reading, the connection ends.
const OUTBOX_BYTES_MAX: usize = 16 << 20;
/// Read from one socket in one wake-up, so that no peer keeps the node from the others.
const READ_BYTES: usize = 256 << 10;

pub(super) struct Socket {
    pub(super) stream: mio::net::UnixStream,
    inbox: Vec<u8>,
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
    pub(super) fn new(stream: mio::net::UnixStream) -> Self {
        Self {
            stream,
            inbox: Vec::new(),
            outbox: VecDeque::new(),
            outbox_bytes: 0,
            ended: false,
            closing: false,
        }
    }

    /// Reads what is there, up to the round's share, and appends whole frames.
    pub(super) fn read(&mut self, buffer: &mut [u8], frames: &mut Vec<ClientFrame>) -> Result<Left, Error> {
        assert!(buffer.len() <= READ_BYTES);
        let mut left = Left::More;
        let mut taken = 0;
        while taken < READ_BYTES {
            match self.stream.read(buffer) {
                Ok(0) => left = Left::Ended,
                Ok(bytes) => {
                    taken += bytes;
                    self.inbox.extend_from_slice(&buffer[..bytes]);
                    if bytes == buffer.len() || self.ended {
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

    fn parse(&mut self, frames: &mut Vec<ClientFrame>) -> Result<(), Error> {
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
            frames.push(frame);
            consumed += HEADER_BYTES + body.len();
        }
        self.inbox.drain(..consumed);
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
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(kvd_proto::limits::FRAME_FDS_MAX))];
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
