//! The session socket: frames as a client writes them, cut and decoded as the node's side does it, up to the answers.
//!
//! Only the eight bytes before each message are mended: magic and flags are right, a length beyond the input is cut.
#![no_main]

use fuzz::material::Material;
use fuzz::node::Shell;
use fuzz::node::requests;
use kvd_proto::frame::{FrameHeader, HEADER_BYTES};
use kvd_proto::wire::{ClientFrame, client_frame::Body as Ask};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

fuzz_target!(|bytes: &[u8]| {
    let mut material = Material(bytes);
    let mut shell = Shell::new(requests::config(&mut Material(&[0])));
    let mut member = None;
    while let Some(frame) = frame(&mut material) {
        member = answer(&mut shell, member, frame);
        while shell.end_opening(true) || shell.end_checksum(1) || shell.end_move(0, Ok(()), 1) {}
        if let Some(ticket) = shell.sought().first() {
            shell.offer(*ticket, None);
        }
    }
    shell.end();
});

/// The next frame, where it decodes.
fn frame(material: &mut Material) -> Option<ClientFrame> {
    if material.is_empty() {
        return None;
    }
    let mut head: [u8; HEADER_BYTES] = material.array();
    head[2..].copy_from_slice(&[0, 0, b'k', b'v', 0, 0]);
    let header = FrameHeader::decode(head).expect("it was mended");
    ClientFrame::decode(material.take(header.body_bytes as usize)).ok()
}

/// As the reactor does: the first message that opens a session is the connection's own.
fn answer(shell: &mut Shell, member: Option<u64>, frame: ClientFrame) -> Option<u64> {
    let request_id = frame.request_id;
    match (frame.body?, member) {
        (Ask::OpenSession(request), None) => Some(shell.open(1, true, request)),
        (body, member) => {
            let of = member.unwrap_or(u64::MAX);
            shell.expect(of, request_id);
            shell.tell([requests::event(of, request_id, body)]);
            shell.pass_us(100_000);
            member
        }
    }
}
