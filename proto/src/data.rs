//! Messages of a data connection, which moves bytes between two nodes: `FORMAT.md` section 7.
//!
//! A message is a header of forty bytes, a short body, and, in an answer, the payload. Owns header and bodies; the payload goes from
//! memory to memory and is never seen here.
//! Invariants: every bit of header and body is covered by a checksum; what is decoded is within the limits below; a decoder
//! never panics. Anything that does not decode ends the connection, because the next boundary is unknown.
//! Leaves to others: what a lease is, whether a slot still holds what was asked for, checksums of the payload (part checksums).

use crate::block_id::BlockId;
use crate::error::{Code, Error};
use crate::limits::{BATCH_BYTES_MAX, PIECES_MAX, REFUSAL_BYTES_MAX};
use crate::space::Fingerprint;

/// Bytes before every body.
pub const HEADER_BYTES: usize = 40;
/// Version of header and bodies: a peer without it is refused, a higher minor is read as ours.
pub const MAJOR: u16 = 1;
/// See [`MAJOR`].
pub const MINOR: u16 = 0;

const MAGIC: [u8; 4] = *b"KVDD";
const HELLO_BYTES: usize = 8;
const READ_BYTES: usize = 16;
const PIECE_BYTES: usize = 24;
const ANSWER_BYTES: usize = 8;
const ANSWER_PIECE_BYTES: usize = 8;
/// On the wire, `part` of a piece that counts its offset from the start of the slot.
const WHOLE_SLOT: u16 = u16::MAX;

const _: () = assert!(crate::limits::PARTS_MAX < WHOLE_SLOT as usize, "no part has that index");

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The first message of either side.
    Hello,
    /// Pieces wanted.
    Read,
    /// What became of them, and their bytes.
    Answer,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Hello, Self::Read, Self::Answer];

    fn number(self) -> u16 {
        match self {
            Self::Hello => 1,
            Self::Read => 2,
            Self::Answer => 3,
        }
    }

    /// The longest body of this kind, room for fields of later minors included.
    fn body_bytes_max(self) -> usize {
        match self {
            Self::Hello => 4096,
            Self::Read => READ_BYTES + PIECES_MAX * PIECE_BYTES + 4096,
            Self::Answer => ANSWER_BYTES + PIECES_MAX * ANSWER_PIECE_BYTES + 4096,
        }
    }
}

/// What the forty bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the message is.
    pub kind: Kind,
    /// The sender's minor.
    pub minor: u16,
    /// Bytes of the body that follows.
    pub body_bytes: u32,
    /// CRC-32 of the body.
    pub body_checksum: u32,
    /// The asker's choice, repeated in the answer; 0 in a hello.
    pub request_id: u64,
    /// Bytes of the payload after the body; 0 but in an answer.
    pub payload_bytes: u64,
}

impl Header {
    /// As it travels.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&MAJOR.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.minor.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.kind.number().to_le_bytes());
        bytes[16..20].copy_from_slice(&self.body_bytes.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.body_checksum.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.request_id.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.payload_bytes.to_le_bytes());
        let checksum = crc32fast::hash(&bytes[8..]);
        bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Refuses anything that is not a header of this major, or announces more than the limits.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Error> {
        if bytes[..4] != MAGIC || u32_at(bytes, 4) != crc32fast::hash(&bytes[8..]) {
            return Err(broken(format!("{:02x?} is no header of a data connection", &bytes[..8])));
        }
        if u16_at(bytes, 8) != MAJOR {
            return Err(version(u16_at(bytes, 8)));
        }
        let number = u16_at(bytes, 12);
        let kind = Kind::ALL.into_iter().find(|kind| kind.number() == number);
        let header = Self {
            kind: kind.ok_or_else(|| broken(format!("a message of kind {number}")))?,
            minor: u16_at(bytes, 10),
            body_bytes: u32_at(bytes, 16),
            body_checksum: u32_at(bytes, 20),
            request_id: u64_at(bytes, 24),
            payload_bytes: u64_at(bytes, 32),
        };
        header.check()
    }

    fn check(self) -> Result<Self, Error> {
        let payload_bytes_max = if self.kind == Kind::Answer { BATCH_BYTES_MAX } else { 0 };
        if self.body_bytes as usize > self.kind.body_bytes_max() || self.payload_bytes > payload_bytes_max {
            return Err(broken(format!(
                "{:?} with {} bytes of body and {} of payload",
                self.kind, self.body_bytes, self.payload_bytes
            )));
        }
        Ok(self)
    }

    /// The body, if it is the one this header came with.
    fn checked<'a>(&self, kind: Kind, body: &'a [u8]) -> Result<&'a [u8], Error> {
        if self.kind != kind || body.len() != self.body_bytes as usize {
            return Err(broken(format!("{:?} with {} bytes where {kind:?} belongs", self.kind, body.len())));
        }
        if crc32fast::hash(body) != self.body_checksum {
            return Err(broken(format!("the checksum of a body of {} bytes differs", body.len())));
        }
        Ok(body)
    }

    /// `bytes` is how long the body must be; a later minor may add to it.
    fn fits(&self, body: &[u8], bytes: usize) -> Result<(), Error> {
        let longer = body.len() > bytes && self.minor > MINOR;
        if body.len() == bytes || longer {
            Ok(())
        } else {
            Err(broken(format!("a body of {} bytes", body.len())))
        }
    }
}

/// Who is there: the majors a side speaks, and what it can beyond them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// The lowest major it speaks.
    pub major_min: u16,
    /// The highest.
    pub major_max: u16,
    /// One bit a feature; none exists yet.
    pub features: u32,
}

impl Hello {
    /// This version's.
    pub fn ours() -> Self {
        Self { major_min: MAJOR, major_max: MAJOR, features: 0 }
    }

    /// A whole message.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(HELLO_BYTES);
        body.extend_from_slice(&self.major_min.to_le_bytes());
        body.extend_from_slice(&self.major_max.to_le_bytes());
        body.extend_from_slice(&self.features.to_le_bytes());
        message(Kind::Hello, 0, 0, &body)
    }

    /// Refuses a peer that does not speak our major.
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, Error> {
        let body = header.checked(Kind::Hello, body)?;
        header.fits(body, HELLO_BYTES)?;
        let hello =
            Self { major_min: u16_at(body, 0), major_max: u16_at(body, 2), features: u32_at(body, 4) };
        if (hello.major_min..=hello.major_max).contains(&MAJOR) {
            Ok(hello)
        } else {
            Err(version(hello.major_max))
        }
    }
}

/// A run of bytes in a slot of the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The segment.
    pub segment: u32,
    /// The slot in it.
    pub slot: u32,
    /// The slot's generation when it was leased.
    pub generation: u32,
    /// The part that `offset` counts from; `None`: from the start of the slot.
    pub part: Option<u16>,
    /// Where the run begins.
    pub offset: u32,
    /// Its length, 1 at least.
    pub bytes: u32,
}

impl Piece {
    fn push(&self, out: &mut Vec<u8>) {
        for number in [self.segment, self.slot, self.generation] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.part.unwrap_or(WHOLE_SLOT).to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(&self.bytes.to_le_bytes());
    }

    fn read(bytes: &[u8]) -> Self {
        let part = u16_at(bytes, 12);
        Self {
            segment: u32_at(bytes, 0),
            slot: u32_at(bytes, 4),
            generation: u32_at(bytes, 8),
            part: (part != WHOLE_SLOT).then_some(part),
            offset: u32_at(bytes, 16),
            bytes: u32_at(bytes, 20),
        }
    }
}

/// Pieces wanted under one lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// The owner's name of the lease under which they are read.
    pub lease: u64,
    /// In the order in which they are answered.
    pub pieces: Vec<Piece>,
}

impl Read {
    /// Whether the batch is within the limits, and no piece is empty or beyond any slot.
    pub fn check(pieces: impl ExactSizeIterator<Item = Piece>) -> Result<(), Error> {
        let count = pieces.len();
        let (mut sum, mut odd) = (0_u64, None);
        for piece in pieces.take(PIECES_MAX) {
            let end = u64::from(piece.offset) + u64::from(piece.bytes);
            if piece.bytes == 0 || end > u64::from(crate::limits::SLOT_BYTES_MAX) {
                odd = Some(piece);
            }
            sum += u64::from(piece.bytes);
        }
        if let Some(piece) = odd {
            return Err(broken(format!("a piece of {} bytes at {}", piece.bytes, piece.offset)));
        }
        if count == 0 || count > PIECES_MAX || sum > BATCH_BYTES_MAX {
            return Err(broken(format!("a batch of {count} pieces with {sum} bytes")));
        }
        Ok(())
    }

    /// A whole message. The batch was checked.
    pub fn encode(request_id: u64, lease: u64, pieces: impl ExactSizeIterator<Item = Piece>) -> Vec<u8> {
        let count = pieces.len();
        assert!(count <= PIECES_MAX, "{count} pieces");
        let mut body = Vec::with_capacity(READ_BYTES + count * PIECE_BYTES);
        body.extend_from_slice(&lease.to_le_bytes());
        body.extend_from_slice(&(count as u32).to_le_bytes());
        body.extend_from_slice(&[0; 4]);
        pieces.for_each(|piece| piece.push(&mut body));
        message(Kind::Read, request_id, 0, &body)
    }

    /// The request, if it is within the limits.
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, Error> {
        let body = header.checked(Kind::Read, body)?;
        if body.len() < READ_BYTES {
            return Err(broken(format!("a body of {} bytes", body.len())));
        }
        let count = u32_at(body, 8) as usize;
        if count > PIECES_MAX {
            return Err(broken(format!("a batch of {count} pieces")));
        }
        header.fits(body, READ_BYTES + count * PIECE_BYTES)?;
        let pieces: Vec<Piece> =
            body[READ_BYTES..].chunks_exact(PIECE_BYTES).take(count).map(Piece::read).collect();
        Self::check(pieces.iter().copied())?;
        Ok(Self { lease: u64_at(body, 0), pieces })
    }
}

/// What became of one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PieceAnswer {
    /// So many bytes of the payload are its.
    Whole(u32),
    /// The peer has it no longer, or never had it: a miss.
    Gone,
}

/// What became of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Piece by piece; the payload holds the whole ones back to back.
    Pieces(Vec<PieceAnswer>),
    /// Nothing of it is answered.
    Refused {
        /// What a program acts on.
        code: Code,
        /// What a person reads.
        text: String,
    },
}

impl Answer {
    /// Header and body; the payload follows.
    pub fn encode(&self, request_id: u64) -> Vec<u8> {
        match self {
            Self::Pieces(pieces) => encode_pieces(request_id, pieces),
            Self::Refused { code, text } => {
                assert!(*code != Code::Unspecified, "0 on the wire is an answer with pieces");
                let text = &text.as_bytes()[..text.floor_char_boundary(REFUSAL_BYTES_MAX)];
                let mut body = (i32::from(*code) as u32).to_le_bytes().to_vec();
                body.extend_from_slice(&(text.len() as u32).to_le_bytes());
                body.extend_from_slice(text);
                message(Kind::Answer, request_id, 0, &body)
            }
        }
    }

    /// The answer, if its payload is as long as its pieces.
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, Error> {
        let body = header.checked(Kind::Answer, body)?;
        if body.len() < ANSWER_BYTES {
            return Err(broken(format!("a body of {} bytes", body.len())));
        }
        let (status, count) = (u32_at(body, 0), u32_at(body, 4) as usize);
        let rest = &body[ANSWER_BYTES..];
        if status != 0 {
            return decode_refusal(header, status, count, rest);
        }
        if count > PIECES_MAX {
            return Err(broken(format!("an answer of {count} pieces")));
        }
        header.fits(rest, count * ANSWER_PIECE_BYTES)?;
        let pieces: Result<Vec<PieceAnswer>, Error> =
            rest.chunks_exact(ANSWER_PIECE_BYTES).take(count).map(decode_piece).collect();
        let pieces = pieces?;
        if payload_bytes(&pieces) != header.payload_bytes {
            return Err(broken(format!("{} bytes of payload for other pieces", header.payload_bytes)));
        }
        Ok(Self::Pieces(pieces))
    }
}

fn encode_pieces(request_id: u64, pieces: &[PieceAnswer]) -> Vec<u8> {
    assert!(pieces.len() <= PIECES_MAX && payload_bytes(pieces) <= BATCH_BYTES_MAX);
    let mut body = Vec::with_capacity(ANSWER_BYTES + pieces.len() * ANSWER_PIECE_BYTES);
    body.extend_from_slice(&[0; 4]);
    body.extend_from_slice(&(pieces.len() as u32).to_le_bytes());
    for piece in pieces {
        let (status, bytes) = match piece {
            PieceAnswer::Whole(bytes) => (0_u32, *bytes),
            PieceAnswer::Gone => (1, 0),
        };
        body.extend_from_slice(&status.to_le_bytes());
        body.extend_from_slice(&bytes.to_le_bytes());
    }
    message(Kind::Answer, request_id, payload_bytes(pieces), &body)
}

/// A status this version does not know is a miss too, as long as no bytes come with it.
fn decode_piece(bytes: &[u8]) -> Result<PieceAnswer, Error> {
    match (u32_at(bytes, 0), u32_at(bytes, 4)) {
        (0, bytes) if bytes > 0 => Ok(PieceAnswer::Whole(bytes)),
        (status, 0) if status > 0 => Ok(PieceAnswer::Gone),
        (status, bytes) => Err(broken(format!("a piece of {bytes} bytes with status {status}"))),
    }
}

fn decode_refusal(header: &Header, status: u32, bytes: usize, rest: &[u8]) -> Result<Answer, Error> {
    if bytes > REFUSAL_BYTES_MAX || header.payload_bytes != 0 {
        return Err(broken(format!("a refusal of {bytes} bytes, {} of payload", header.payload_bytes)));
    }
    header.fits(rest, bytes)?;
    let code = Code::try_from(status.cast_signed()).unwrap_or(Code::Internal);
    Ok(Answer::Refused { code, text: String::from_utf8_lossy(&rest[..bytes]).into_owned() })
}

/// Ties part checksums to the block that they are of, as its owner tells them (`PeerBlock.told_checksum`). Whoever asked computes it from
/// the block that it wants: another block's bytes with that block's checksums are right for each other and wrong for it.
pub fn told_checksum(
    fingerprint: &Fingerprint,
    id: &BlockId,
    group: u16,
    part_checksums: impl IntoIterator<Item = u32>,
) -> u32 {
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(&fingerprint.0);
    checksum.update(&id.0);
    checksum.update(&group.to_le_bytes());
    part_checksums.into_iter().for_each(|part| checksum.update(&part.to_le_bytes()));
    checksum.finalize()
}

fn payload_bytes(pieces: &[PieceAnswer]) -> u64 {
    let bytes = |piece: &PieceAnswer| match piece {
        PieceAnswer::Whole(bytes) => u64::from(*bytes),
        PieceAnswer::Gone => 0,
    };
    pieces.iter().map(bytes).sum()
}

fn message(kind: Kind, request_id: u64, payload_bytes: u64, body: &[u8]) -> Vec<u8> {
    assert!(body.len() <= kind.body_bytes_max(), "{} bytes of {kind:?}", body.len());
    let body_bytes = body.len() as u32;
    let body_checksum = crc32fast::hash(body);
    let header = Header { kind, minor: MINOR, body_bytes, body_checksum, request_id, payload_bytes };
    [&header.encode()[..], body].concat()
}

fn broken(what: String) -> Error {
    Error::new(Code::Frame, "data", what, "check what listens at the peer's data address, and its version")
}

fn version(major: u16) -> Error {
    let what = format!("the peer speaks version {major}, this node {MAJOR}");
    Error::new(Code::UnsupportedVersion, "data", what, "run versions of kvd that share a major")
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Header and body of one whole message.
    fn taken(message: &[u8]) -> Result<(Header, &[u8]), Error> {
        let (header, body) = message.split_at(HEADER_BYTES);
        Ok((Header::decode(header.try_into().unwrap())?, body))
    }

    fn piece() -> impl Strategy<Value = Piece> {
        let part = proptest::option::of(0..256_u16);
        (any::<[u32; 3]>(), part, 0..1_u32 << 20, 1..65_536_u32).prop_map(
            |([segment, slot, generation], part, offset, bytes)| Piece {
                segment,
                slot,
                generation,
                part,
                offset,
                bytes,
            },
        )
    }

    fn piece_answer() -> impl Strategy<Value = PieceAnswer> {
        prop_oneof![Just(PieceAnswer::Gone), (1..65_536_u32).prop_map(PieceAnswer::Whole)]
    }

    fn decode_any(message: &[u8]) -> Result<(), Error> {
        let (header, body) = taken(message)?;
        match header.kind {
            Kind::Hello => Hello::decode(&header, body).map(drop),
            Kind::Read => Read::decode(&header, body).map(drop),
            Kind::Answer => Answer::decode(&header, body).map(drop),
        }
    }

    #[test]
    fn refuses_what_is_beyond_the_limits() {
        let piece = Piece { segment: 0, slot: 0, generation: 0, part: None, offset: 0, bytes: 64 << 20 };
        let of = |pieces: Vec<Piece>| Read::check(pieces.into_iter());
        assert!(of(vec![piece; 4]).is_ok() && of(vec![piece; 5]).is_err() && of(vec![]).is_err());
        assert!(of(vec![Piece { offset: 1, ..piece }]).is_err(), "beyond any slot");
        assert!(of(vec![Piece { bytes: 1, ..piece }; PIECES_MAX + 1]).is_err());
        assert!(of(vec![Piece { bytes: 0, ..piece }]).is_err());
        let header = Header {
            kind: Kind::Answer,
            minor: 0,
            body_bytes: 8,
            body_checksum: 0,
            request_id: 1,
            payload_bytes: BATCH_BYTES_MAX + 1,
        };
        assert!(Header::decode(&header.encode()).is_err());
        let asks = Header { kind: Kind::Read, payload_bytes: 1, ..header };
        assert!(Header::decode(&asks.encode()).is_err(), "only answers have a payload");
    }

    #[test]
    fn a_peer_of_another_major_is_refused_and_a_higher_minor_read_as_ours() {
        let other = Hello { major_min: 2, major_max: 3, features: 0 }.encode();
        let (header, body) = taken(&other).unwrap();
        assert_eq!(Hello::decode(&header, body).unwrap_err().code, Code::UnsupportedVersion);

        let ours = Hello::ours().encode();
        let longer = [&ours[HEADER_BYTES..], b"more"].concat();
        let header = Header { body_bytes: 12, body_checksum: crc32fast::hash(&longer), ..header };
        assert!(Hello::decode(&header, &longer).is_err(), "nothing more in our own minor");
        assert_eq!(Hello::decode(&Header { minor: 7, ..header }, &longer), Ok(Hello::ours()));
    }

    #[test]
    fn what_is_told_of_a_block_holds_for_no_other() {
        let told = |space: u8, id: u8, group, parts: [u32; 2]| {
            told_checksum(&Fingerprint([space; 32]), &BlockId([id; 16]), group, parts)
        };
        let bytes = [&[1; 32][..], &[2; 16], &[3, 0], &[4, 0, 0, 0, 5, 0, 0, 0]].concat();
        assert_eq!(told(1, 2, 3, [4, 5]), crc32fast::hash(&bytes));
        for other in
            [told(2, 2, 3, [4, 5]), told(1, 3, 3, [4, 5]), told(1, 2, 2, [4, 5]), told(1, 2, 3, [5, 4])]
        {
            assert_ne!(other, told(1, 2, 3, [4, 5]));
        }
    }

    #[test]
    fn a_long_refusal_is_cut_between_letters() {
        let refused = Answer::Refused { code: Code::UnknownLease, text: "é".repeat(REFUSAL_BYTES_MAX) };
        let message = refused.encode(9);
        let (header, body) = taken(&message).unwrap();
        match Answer::decode(&header, body).unwrap() {
            Answer::Refused { code: Code::UnknownLease, text } => assert_eq!(text.len(), REFUSAL_BYTES_MAX),
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn reads_round_trip(id: u64, lease: u64, pieces in proptest::collection::vec(piece(), 1..20)) {
            let message = Read::encode(id, lease, pieces.iter().copied());
            let (header, body) = taken(&message).unwrap();
            prop_assert_eq!(header.request_id, id);
            prop_assert_eq!(Read::decode(&header, body).unwrap(), Read { lease, pieces });
        }

        #[test]
        fn answers_round_trip(id: u64, pieces in proptest::collection::vec(piece_answer(), 0..20)) {
            let message = Answer::Pieces(pieces.clone()).encode(id);
            let (header, body) = taken(&message).unwrap();
            prop_assert_eq!(header.payload_bytes, payload_bytes(&pieces));
            prop_assert_eq!(Answer::decode(&header, body).unwrap(), Answer::Pieces(pieces));
        }

        #[test]
        fn a_flipped_bit_is_an_error(pieces in proptest::collection::vec(piece(), 1..5), bit: usize) {
            let mut message = Read::encode(1, 2, pieces.iter().copied());
            let bit = bit % (message.len() * 8);
            message[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decode_any(&message).is_err());
        }

        #[test]
        fn never_panics(
            kind in 1..4_u16, minor in 0..3_u16, request_id: u64, payload_bytes: u64,
            body in proptest::collection::vec(any::<u8>(), 0..80),
        ) {
            // with right checksums, so that the fields are looked at
            let kind = Kind::ALL[usize::from(kind - 1)];
            let body_checksum = crc32fast::hash(&body);
            let body_bytes = body.len() as u32;
            let header = Header { kind, minor, body_bytes, body_checksum, request_id, payload_bytes };
            let _ = decode_any(&[&header.encode()[..], &body].concat());
        }
    }
}
