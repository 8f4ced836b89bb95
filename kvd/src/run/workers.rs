//! Threads that read and touch DRAM for the node: one computes part checksums, one populates new segments.
//!
//! Invariants: each order gives one input; the queues are bounded by slots and segments. They end with their sender.

use super::dram::DramSegment;
use super::inbox::{Inbox, Input};
use crate::node::event::{Event, MoveError};
use kvd_proto::slot_header::{FLAG_CHECKSUMMED, SlotHeader};
use kvd_tiers::segment::{SegmentId, SlotRef};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

/// Slots told in one input: 128 MiB of the largest usual blocks.
const TOLD_TOGETHER_MAX: usize = 64;
/// Populated at a time, so that a stop is noticed and progress seen.
const POPULATE_BYTES: usize = 16 << 20;

/// A slot to be read whole.
pub(super) enum Reading {
    /// For its checksums.
    Checksum(Checksumming),
    /// To see whether its bytes have those that its table says.
    Verify { token: u64, segment: Arc<DramSegment>, slot: SlotRef },
}

/// A published slot whose part checksums are wanted, and then has them.
pub(crate) struct Checksumming {
    pub(super) segment: Arc<DramSegment>,
    pub(super) slot: SlotRef,
    pub(super) generation: u32,
    pub(super) header: Box<SlotHeader>,
    pub(super) elapsed_us: u64,
}

/// Takes what one round of the node ordered, tells in shares: a wake-up for each slot would cost more than its checksum.
pub(super) fn checksummer(inbox: Inbox) -> Sender<Vec<Reading>> {
    let (sender, orders) = channel::<Vec<Reading>>();
    spawn("kvd-checksum", move || {
        for mut order in orders {
            while !order.is_empty() {
                let share = order.drain(..order.len().min(TOLD_TOGETHER_MAX));
                let (mut checksummed, mut told) = (Vec::new(), Vec::new());
                for reading in share {
                    match reading {
                        Reading::Checksum(mut one) => {
                            one.compute();
                            checksummed.push(one);
                        }
                        Reading::Verify { token, segment, slot } => told.push(verify(token, &segment, slot)),
                    }
                }
                if !checksummed.is_empty() {
                    told.push(Input::Checksummed(checksummed));
                }
                inbox.push_all(&mut told);
            }
        }
    });
    sender
}

fn verify(token: u64, segment: &DramSegment, slot: SlotRef) -> Input {
    let started = Instant::now();
    let header = segment.table().read(slot.slot);
    let whole = header.is_some_and(|(_, header)| segment.verify(slot.slot, &header.part_checksums).is_ok());
    let result = if whole { Ok(()) } else { Err(MoveError::Checksum) };
    let elapsed_us = started.elapsed().as_micros() as u64;
    Input::Moved { token, result, elapsed_us, checksums: Vec::new() }
}

impl Checksumming {
    fn compute(&mut self) {
        let started = Instant::now();
        self.header.part_checksums = self.segment.checksums(self.slot.slot);
        self.header.flags |= FLAG_CHECKSUMMED;
        self.elapsed_us = started.elapsed().as_micros() as u64;
    }
}

pub(super) fn populator(inbox: Inbox) -> Sender<(SegmentId, Arc<DramSegment>)> {
    let (sender, orders) = channel();
    spawn("kvd-populate", move || populate(&orders, &inbox));
    sender
}

fn populate(orders: &Receiver<(SegmentId, Arc<DramSegment>)>, inbox: &Inbox) {
    for (segment, memory) in orders {
        let bytes = memory.payload.len();
        for start in (0..bytes).step_by(POPULATE_BYTES) {
            let end = (start + POPULATE_BYTES).min(bytes);
            if memory.payload.populate(start..end).is_err() {
                break; // memory is short: the first touch decides
            }
            inbox.push(Input::Event(Event::Populated { segment, bytes: (end - start) as u64 }));
        }
    }
}

pub(super) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> std::thread::JoinHandle<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).expect("the system gives us a thread")
}
