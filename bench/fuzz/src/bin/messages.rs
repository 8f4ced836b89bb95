//! Everything generated from `kvd/v1/*.proto`, and the envelope of the session socket. The first byte says which message it is.
#![no_main]

use fuzz::budget::bounded;
use fuzz::material::Material;
use kvd_proto::frame::{FrameHeader, HEADER_BYTES};
use kvd_proto::{Error, wire};
use libfuzzer_sys::fuzz_target;
use prost::Message;

/// An empty submessage takes two bytes on the wire and up to 400 in memory, and a list that doubles has three halves of that.
const TIMES: usize = 1024;

fuzz_target!(|bytes: &[u8]| {
    let mut material = Material(bytes);
    match material.below(14) {
        0 => frame(material.0),
        1 => check::<wire::ClientFrame>(material.0),
        2 => check::<wire::NodeFrame>(material.0),
        3 => check::<wire::FollowReply>(material.0),
        4 => check::<wire::LocateReply>(material.0),
        5 => check::<wire::ListNodesReply>(material.0),
        6 => check::<wire::PeerLeaseRequest>(material.0),
        7 => check::<wire::PeerLeaseReply>(material.0),
        8 => check::<wire::WorkerReport>(material.0),
        9 => check::<wire::ListWorkersReply>(material.0),
        10 => check::<wire::WriteChunk>(material.0),
        11 => check::<wire::PurgeRequest>(material.0),
        12 => check::<wire::StatusReply>(material.0),
        _ => details(material.0),
    }
});

/// Twice encoded is the same: also where numbers are not equal to themselves.
fn check<M: Message + Default>(bytes: &[u8]) {
    let Ok(message) = bounded(bytes.len(), TIMES, || M::decode(bytes)) else { return };
    let once = message.encode_to_vec();
    let again = M::decode(&once[..]).expect("what was just written reads back");
    assert_eq!(again.encode_to_vec(), once);
}

fn frame(bytes: &[u8]) {
    let Some((head, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return };
    let Ok(header) = FrameHeader::decode(*head) else { return };
    assert_eq!(header.encode(), *head);
    if let Some(body) = rest.get(..header.body_bytes as usize) {
        check::<wire::ClientFrame>(body);
        check::<wire::NodeFrame>(body);
    }
}

/// What a gRPC server says went wrong, in words of its own or in ours.
fn details(bytes: &[u8]) {
    let status = tonic::Status::with_details(tonic::Code::Internal, "broken", bytes.to_vec().into());
    let error = Error::from(status);
    assert_eq!(Error::from(tonic::Status::from(error.clone())), error);
}
