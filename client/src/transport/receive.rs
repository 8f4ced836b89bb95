//! The asker's end of a data connection: answers come in and land where their batches said.
//!
//! Owns the batches that were sent and the place in the stream. Invariants: bytes go from the socket into a destination without a
//! stop between; what is not exactly the next answer ends the connection; a batch that has ended gets no more bytes, what still
//! comes for it goes into a sink. Leaves to others: when a batch ends early, and connections (link).

use super::{Batch, Destination, Done, Fate, Miss, Outcome};
use kvd_proto::data::{Answer, HEADER_BYTES, Header, Hello, Kind, PieceAnswer};
use rustix::fd::AsFd;
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::time::Instant;

/// Destinations of one `readv`; the kernel takes 1024.
const SLICES_MAX: usize = 64;
/// What comes for a batch that has ended is thrown away in pieces of this.
const SINK_BYTES: usize = 256 << 10;

/// A batch on its way.
pub(super) struct Awaited<R> {
    pub(super) id: u64,
    /// What was asked for, which the answer must repeat.
    piece_bytes: Vec<u32>,
    live: Option<Live>,
    /// Given back when nothing of the answer is still to come.
    _room: R,
}

struct Live {
    pieces: Vec<(Destination, Fate)>,
    deadline: Instant,
    done: Done,
}

/// How a batch ended, not yet told.
pub(super) struct Ended {
    done: Done,
    outcome: Outcome,
}

impl Ended {
    /// Without locks held, and the batch's room given back: `done` may start another.
    pub(super) fn tell(self) {
        (self.done)(self.outcome);
    }
}

impl<R> Awaited<R> {
    pub(super) fn new(id: u64, batch: Batch, done: Done, room: R) -> Self {
        let piece_bytes = batch.pieces.iter().map(|(piece, _)| piece.bytes).collect();
        let pieces = batch.pieces.into_iter().map(|(_, destination)| (destination, Fate::Missed)).collect();
        Self { id, piece_bytes, live: Some(Live { pieces, deadline: batch.deadline, done }), _room: room }
    }

    /// When it is given up; `None` if it has ended.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.live.as_ref().map(|live| live.deadline)
    }

    /// Takes the destinations away for good. `None` if it had ended.
    pub(super) fn end(&mut self, miss: Option<Miss>) -> Option<Ended> {
        let Live { pieces, done, .. } = self.live.take()?;
        Some(Ended { done, outcome: Outcome { pieces, miss } })
    }

    /// Takes an answer's word for each piece, if it is one to what was asked.
    fn accept(&mut self, pieces: &[PieceAnswer]) -> Result<(), Miss> {
        let as_asked = |(answer, asked): (&PieceAnswer, &u32)| match answer {
            PieceAnswer::Whole(bytes) => bytes == asked,
            PieceAnswer::Gone => true,
        };
        if pieces.len() != self.piece_bytes.len() || !pieces.iter().zip(&self.piece_bytes).all(as_asked) {
            return Err(Miss::Garbage);
        }
        for (fate, answer) in self.live.iter_mut().flat_map(|live| &mut live.pieces).zip(pieces) {
            if *answer == PieceAnswer::Gone {
                fate.1 = Fate::Gone;
            }
        }
        Ok(())
    }
}

/// What one step brought.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing has come.
    Idle,
    /// Something has.
    Moved(usize),
    /// The peer's hello.
    Greeted,
    /// The first batch is answered: take it off, and end it so.
    Answered(Option<Miss>),
}

enum Stage {
    Header,
    Body(Header),
    Payload { pieces: Vec<PieceAnswer>, next: usize, offset: usize },
}

/// The place in the stream.
pub(super) struct Receiver {
    stage: Stage,
    greeted: bool,
    head: [u8; HEADER_BYTES],
    body: Vec<u8>,
    /// Of head or body, whichever is being read.
    filled: usize,
    sink: Vec<u8>,
}

impl Receiver {
    /// Of a new connection.
    pub(super) fn new() -> Self {
        Self {
            stage: Stage::Header,
            greeted: false,
            head: [0; HEADER_BYTES],
            body: Vec::new(),
            filled: 0,
            sink: Vec::new(),
        }
    }

    /// Reads once. An error ends the connection.
    pub(super) fn step<R>(
        &mut self,
        socket: impl AsFd,
        awaited: &mut VecDeque<Awaited<R>>,
    ) -> Result<Step, Miss> {
        match &self.stage {
            Stage::Header => self.header(socket, awaited),
            Stage::Body(header) => {
                let header = *header;
                self.body(socket, header, awaited)
            }
            Stage::Payload { .. } => self.payload(socket, awaited),
        }
    }

    fn header<R>(&mut self, socket: impl AsFd, awaited: &VecDeque<Awaited<R>>) -> Result<Step, Miss> {
        let Some(bytes) = receive(socket, &mut [IoSliceMut::new(&mut self.head[self.filled..])])? else {
            return Ok(Step::Idle);
        };
        self.filled += bytes;
        if self.filled == HEADER_BYTES {
            let header = Header::decode(&self.head).map_err(|_| Miss::Garbage)?;
            let expected = if self.greeted { Kind::Answer } else { Kind::Hello };
            let asked = awaited.front().map(|first| first.id);
            if header.kind != expected || (self.greeted && asked != Some(header.request_id)) {
                return Err(Miss::Garbage);
            }
            self.body.clear();
            self.body.resize(header.body_bytes as usize, 0);
            (self.filled, self.stage) = (0, Stage::Body(header));
        }
        Ok(Step::Moved(bytes))
    }

    fn body<R>(
        &mut self,
        socket: impl AsFd,
        header: Header,
        awaited: &mut VecDeque<Awaited<R>>,
    ) -> Result<Step, Miss> {
        let mut bytes = 0;
        if self.filled < self.body.len() {
            match receive(socket, &mut [IoSliceMut::new(&mut self.body[self.filled..])])? {
                Some(more) => bytes = more,
                None => return Ok(Step::Idle),
            }
        }
        self.filled += bytes;
        if self.filled < self.body.len() {
            return Ok(Step::Moved(bytes));
        }
        (self.filled, self.stage) = (0, Stage::Header);
        if !self.greeted {
            Hello::decode(&header, &self.body).map_err(|_| Miss::Garbage)?;
            self.greeted = true;
            return Ok(Step::Greeted);
        }
        match Answer::decode(&header, &self.body).map_err(|_| Miss::Garbage)? {
            Answer::Refused { code, .. } => Ok(Step::Answered(Some(Miss::Refused(code)))),
            Answer::Pieces(pieces) => {
                awaited.front_mut().ok_or(Miss::Garbage)?.accept(&pieces)?;
                self.stage = Stage::Payload { pieces, next: 0, offset: 0 };
                Ok(self.settled().unwrap_or(Step::Moved(bytes)))
            }
        }
    }

    fn payload<R>(&mut self, socket: impl AsFd, awaited: &mut VecDeque<Awaited<R>>) -> Result<Step, Miss> {
        let Stage::Payload { pieces, next, offset } = &mut self.stage else { unreachable!("in a payload") };
        let live = awaited.front_mut().expect("a payload belongs to the first batch").live.as_mut();
        let received = match live {
            Some(live) => land(socket, pieces, *next, *offset, &mut live.pieces)?,
            None => {
                self.sink.resize(SINK_BYTES, 0);
                let left = left_bytes(pieces, *next, *offset).min(SINK_BYTES);
                receive(socket, &mut [IoSliceMut::new(&mut self.sink[..left])])?
            }
        };
        let Some(received) = received else { return Ok(Step::Idle) };
        *offset += received;
        let mut live = awaited.front_mut().and_then(|first| first.live.as_mut());
        while let Some(PieceAnswer::Whole(bytes)) = pieces.get(*next)
            && *offset >= *bytes as usize
        {
            *offset -= *bytes as usize;
            if let Some(live) = &mut live {
                live.pieces[*next].1 = Fate::Whole;
            }
            *next = following(pieces, *next + 1);
        }
        Ok(self.settled().unwrap_or(Step::Moved(received)))
    }

    /// Skips pieces without bytes; at the end, says what the answer came to and is ready for the next.
    fn settled(&mut self) -> Option<Step> {
        let Stage::Payload { pieces, next, .. } = &mut self.stage else { return None };
        *next = following(pieces, *next);
        if *next < pieces.len() {
            return None;
        }
        self.stage = Stage::Header;
        Some(Step::Answered(None))
    }
}

/// The first piece from `from` on that has bytes.
fn following(pieces: &[PieceAnswer], from: usize) -> usize {
    let gone = pieces[from..].iter().take_while(|piece| **piece == PieceAnswer::Gone);
    from + gone.count()
}

fn left_bytes(pieces: &[PieceAnswer], next: usize, offset: usize) -> usize {
    let bytes = |piece: &PieceAnswer| match piece {
        PieceAnswer::Whole(bytes) => *bytes as usize,
        PieceAnswer::Gone => 0,
    };
    pieces[next..].iter().map(bytes).sum::<usize>() - offset
}

/// Reads into the destinations from `offset` of piece `next` on, as far as the socket has bytes.
fn land(
    socket: impl AsFd,
    pieces: &[PieceAnswer],
    next: usize,
    offset: usize,
    destinations: &mut [(Destination, Fate)],
) -> Result<Option<usize>, Miss> {
    let wanted = pieces.iter().zip(destinations).skip(next);
    let whole = wanted.filter(|(piece, _)| **piece != PieceAnswer::Gone).take(SLICES_MAX);
    let mut slices: Vec<IoSliceMut<'_>> =
        whole.map(|(_, (destination, _))| IoSliceMut::new(destination.as_mut_slice())).collect();
    let mut rest = &mut slices[..];
    IoSliceMut::advance_slices(&mut rest, offset);
    receive(socket, rest)
}

/// `None`: nothing has come yet.
fn receive(socket: impl AsFd, into: &mut [IoSliceMut<'_>]) -> Result<Option<usize>, Miss> {
    match rustix::io::readv(socket, into) {
        Ok(0) => Err(Miss::Disconnected),
        Ok(bytes) => Ok(Some(bytes)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        Err(_) => Err(Miss::Disconnected),
    }
}
