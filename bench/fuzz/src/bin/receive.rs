//! The asker's end of a data connection: a peer that answers with whatever it likes, in pieces as the network cuts them.
#![no_main]

use fuzz::material::Material;
use fuzz::seal;
use kvd_client::transport::{Batch, Destination, Done, Fate, Miss, Outcome, Piece};
use kvd_proto::data::{HEADER_BYTES, Hello};
use libfuzzer_sys::fuzz_target;
use receive::{Awaited, Receiver, Step};
use rustix::fd::OwnedFd;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The client's own file, which is private to its crate; compiled here between the names that it uses.
#[path = "../../../../client/src/transport/receive.rs"]
#[expect(dead_code, reason = "deadlines are the link's, which is not here")]
mod receive;

/// A pipe holds more than an input.
const INPUT_BYTES_MAX: usize = 32 << 10;

fuzz_target!(|bytes: &[u8]| {
    let mut material = Material(&bytes[..bytes.len().min(INPUT_BYTES_MAX)]);
    let mut awaited: VecDeque<Awaited<()>> = (0..material.below(4)).map(|_| batch(&mut material)).collect();
    let mut receiver = Receiver::new();
    if !material.one_in(4) {
        run(&mut receiver, &Hello::ours().encode(), &mut awaited);
    }
    while !material.is_empty() {
        let mut message = material.piece().to_vec();
        if message.len() > HEADER_BYTES && !material.one_in(4) {
            seal::data_message(&mut message);
        }
        message.extend_from_slice(material.piece());
        if !run(&mut receiver, &message, &mut awaited) {
            break;
        }
    }
    for mut batch in awaited {
        batch.end(Some(Miss::Disconnected)).into_iter().for_each(receive::Ended::tell);
    }
});

/// Some pieces wanted; whatever becomes of them, each destination comes back with its size.
fn batch(material: &mut Material) -> Awaited<()> {
    let bytes: Vec<u32> = (0..=material.below(5)).map(|_| 1 + u32::from(material.byte()) * 4).collect();
    let piece = |bytes| Piece { segment: 0, slot: 0, generation: 0, part: None, offset: 0, bytes };
    let pieces = bytes.iter().map(|&bytes| (piece(bytes), Destination::private(bytes as usize)));
    let deadline = Instant::now() + Duration::from_mins(1);
    let batch = Batch { lease: 1, pieces: pieces.collect(), deadline };
    let id = u64::from(material.byte() % 4);
    let done: Done = Box::new(move |outcome: Outcome| {
        assert_eq!(outcome.pieces.len(), bytes.len());
        for ((destination, fate), bytes) in outcome.pieces.iter().zip(&bytes) {
            assert_eq!(destination.len(), *bytes as usize);
            assert!(*fate != Fate::Gone || destination.as_slice().iter().all(|byte| *byte == 0));
        }
    });
    Awaited::new(id, batch, done, ())
}

/// Says these bytes and hears what the receiver makes of them; `false`: the connection has ended.
fn run(receiver: &mut Receiver, said: &[u8], awaited: &mut VecDeque<Awaited<()>>) -> bool {
    let (hears, says): (OwnedFd, OwnedFd) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).expect("a pipe");
    let said = rustix::io::write(&says, said).unwrap_or(0);
    let mut steps = 0;
    loop {
        steps += 1;
        assert!(steps <= 2 * said + 16, "{steps} steps for {said} bytes");
        match receiver.step(&hears, awaited) {
            Ok(Step::Idle) => return true,
            Ok(Step::Answered(miss)) => {
                let mut batch = awaited.pop_front().expect("somebody asked");
                batch.end(miss).into_iter().for_each(receive::Ended::tell);
            }
            Ok(Step::Moved(_) | Step::Greeted) => {}
            Err(_) => return false,
        }
    }
}
