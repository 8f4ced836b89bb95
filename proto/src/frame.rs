//! Frames of the session socket: `FORMAT.md` section 5. Eight bytes, then one `kvd.v1` message.
//!
//! Invariant: a header is accepted only with the right magic, zero flags, a length and a descriptor count in limits;
//! anything else ends the connection, because the next boundary is unknown.

use crate::error::{Code, Error};
use crate::limits::{FRAME_BYTES_MAX, FRAME_FDS_MAX};

/// Bytes before every message.
pub const HEADER_BYTES: usize = 8;
const MAGIC: [u8; 2] = *b"kv";

/// What the eight bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// Bytes of the message that follows.
    pub body_bytes: u32,
    /// Descriptors that came with this frame's first byte.
    pub fds: u8,
}

impl FrameHeader {
    /// As it travels: length u32 LE, magic, descriptor count, flags (zero).
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        assert!(self.body_bytes as usize <= FRAME_BYTES_MAX && usize::from(self.fds) <= FRAME_FDS_MAX);
        let [a, b, c, d] = self.body_bytes.to_le_bytes();
        [a, b, c, d, MAGIC[0], MAGIC[1], self.fds, 0]
    }

    /// Refuses anything that is not a header of this version.
    pub fn decode(bytes: [u8; HEADER_BYTES]) -> Result<Self, Error> {
        let [a, b, c, d, m0, m1, fds, flags] = bytes;
        let body_bytes = u32::from_le_bytes([a, b, c, d]);
        if [m0, m1] != MAGIC || flags != 0 {
            return Err(Error::new(
                Code::Frame,
                "frame",
                format!("{bytes:02x?} is not a kvd frame header"),
                "speak the session protocol on this socket, gRPC on the other",
            ));
        }
        if body_bytes as usize > FRAME_BYTES_MAX || usize::from(fds) > FRAME_FDS_MAX {
            return Err(Error::new(
                Code::Frame,
                "frame",
                format!("a frame of {body_bytes} bytes and {fds} descriptors"),
                format!("send at most {FRAME_BYTES_MAX} bytes and {FRAME_FDS_MAX} descriptors"),
            ));
        }
        Ok(Self { body_bytes, fds })
    }
}

/// Appends one framed message to `out`. The message must fit `FRAME_BYTES_MAX`: senders bound what they put in.
pub fn push<M: prost::Message>(out: &mut Vec<u8>, message: &M, fds: u8) {
    let header = FrameHeader { body_bytes: message.encoded_len() as u32, fds };
    out.extend_from_slice(&header.encode());
    message.encode(out).expect("a Vec grows");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refuses_other_protocols_and_oversize() {
        assert_eq!(FrameHeader::decode(*b"PRI * HT").unwrap_err().code, Code::Frame);
        assert_eq!(FrameHeader::decode(*b"\xff\xff\xff\x7fkv\0\0").unwrap_err().code, Code::Frame);
        assert_eq!(FrameHeader::decode(*b"\x01\0\0\0kv\xff\0").unwrap_err().code, Code::Frame);
    }

    proptest! {
        #[test]
        fn round_trip(body_bytes in 0..=FRAME_BYTES_MAX as u32, fds in 0..=FRAME_FDS_MAX as u8) {
            let header = FrameHeader { body_bytes, fds };
            prop_assert_eq!(FrameHeader::decode(header.encode()).unwrap(), header);
        }
        #[test]
        fn never_panics(bytes in any::<[u8; HEADER_BYTES]>()) {
            let _ = FrameHeader::decode(bytes);
        }
    }
}
