//! Threads that read and touch DRAM for the node: one computes part checksums, one populates new segments.
//!
//! Invariants: each order gives one input; the queues are bounded by slots and segments. They end with their sender.

use super::dram::DramSegment;
use super::inbox::{Inbox, Input};
use crate::node::event::Event;
use kvd_tiers::segment::{SegmentId, SlotRef};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

/// Populated at a time, so that a stop is noticed and progress seen.
const POPULATE_BYTES: usize = 16 << 20;

/// A slot to checksum.
pub(super) struct ChecksumOrder {
    pub(super) segment: Arc<DramSegment>,
    pub(super) slot: SlotRef,
    pub(super) generation: u32,
}

pub(super) fn checksummer(inbox: Inbox) -> Sender<ChecksumOrder> {
    let (sender, orders) = channel::<ChecksumOrder>();
    spawn("kvd-checksum", move || {
        for order in orders {
            let started = Instant::now();
            let checksums = order.segment.checksums(order.slot.slot);
            inbox.push(Input::Checksummed {
                slot: order.slot,
                generation: order.generation,
                checksums,
                elapsed_us: started.elapsed().as_micros() as u64,
            });
        }
    });
    sender
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
