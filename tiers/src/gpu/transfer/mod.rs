//! Blocks on their way between an engine's paged GPU memory, slots in HBM and slots in pinned DRAM.
//!
//! Owns the words for such an order and for its end, and a device while it has one. What is decided is plain (`cut`, `progress`, `queue`, `room`, `steps`); the calls are in `shell`, and what is measured is in `crossover`.
//! Invariants:
//! - an item has moved only if every part of it that came from pinned memory has the checksum that was expected, as a kernel found it and the processor compared (law 1);
//! - an order ends once, when nothing of it can touch pages or slots any more, whatever has failed (law 2), or says that nobody knows (`Miss::Gone`);
//! - nothing but `reap`, and `new` while it measures, waits for the device; nothing waits for longer than it was told;
//! - what is under way is bounded, and all of it that waits is in turns.
//!
//! Leaves to others: whose slots and pages they are, until the end (whoever orders: slots stay leased and pinned, pages are not used); what lies where in HBM (`media::hbm`); a
//! device that neither goes on nor fails (whoever waits for the end).

mod check;
mod crossover;
mod cut;
mod progress;
mod queue;
mod room;
mod shell;
mod steps;
#[cfg(test)]
mod tests;

use super::paged::Pages;
use super::{Address, GpuError};
use crate::checksum::BadPart;
use crate::mapping::Mapping;
use kvd_proto::Error;
use kvd_proto::limits::{CHAIN_BLOCKS_MAX, SLOT_BYTES_MAX};
use std::ops::Range;
use std::sync::Arc;

pub use shell::Transfers;

/// Orders under way, with those whose end nobody has heard of yet. At the limit: `submit` hands one more back.
pub const ORDERS_MAX: usize = 1024;
/// Items of one order, each a block: a whole chain. At the limit: the order ends at once, unmoved.
pub const ITEMS_MAX: usize = CHAIN_BLOCKS_MAX;

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Slots to pages.
    Load,
    /// Pages to slots.
    Store,
}

/// A slot in pinned memory.
#[derive(Debug, Clone)]
pub struct HostSlot {
    /// Its segment. It is pinned where it is not yet, which takes long; whoever orders pins beforehand, and unpins when no order is under way.
    pub mapping: Arc<Mapping>,
    /// First byte, a multiple of 4096.
    pub offset: usize,
}

/// One block.
#[derive(Debug, Clone)]
pub struct Item {
    /// Load: where its bytes are; none, if they are in `kept`. Store: where they are to be.
    pub host: Option<HostSlot>,
    /// A slot in HBM. Load: where the bytes are, or, with `host`, where they are to be, too. Store: as `host`.
    pub kept: Option<Address>,
    /// Row r of the block is in page `[r] >> 32`, at row `[r] as u32` of it; or `NO_PAGE`: not loaded, stored as zeros.
    pub rows: Vec<u64>,
    /// Loads: what `pages.parts(layers)` must have, in order. Needed with `host`.
    pub checksums: Option<Vec<u32>>,
}

/// A number in the engine's memory that its stream may wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fence {
    /// Of 32 bits, within memory that the engine has handed over (whoever orders has checked that).
    pub address: Address,
    /// Written when the last byte of a load is in its page, with nothing said of checksums; with `limits::FENCE_FAILED` set if the load has failed, which may come after the value without it.
    /// If the device fails, it may stay unwritten: after an end with errors, whoever ordered lets the engine go on.
    pub value: u32,
}

/// Blocks to move.
#[derive(Debug, Clone)]
pub struct Order {
    /// The caller's name for it.
    pub token: u64,
    /// Orders of one line and way are begun one after the other (a request's layer ranges, say); lines take turns.
    pub line: u64,
    /// Which way.
    pub direction: Direction,
    /// The engine's memory.
    pub pages: Arc<Pages>,
    /// Whole layer ranges, counted in the memory.
    pub layers: Range<u32>,
    /// What moves.
    pub items: Vec<Item>,
    /// Whether the end is to say the checksums of all parts of items for which none are expected.
    pub checksums_wanted: bool,
    /// Loads only.
    pub fence: Option<Fence>,
}

/// Why an item has not moved. What it was to be moved to, pages or slots, `kept` included, holds anything then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Miss {
    /// Its bytes are not those that were stored; the part is counted in `pages.parts(layers)`.
    #[error(transparent)]
    Checksum(#[from] BadPart),
    /// `stop` came before its turn.
    #[error("stopped before its turn")]
    Stopped,
    /// The device has failed, and was put right.
    #[error(transparent)]
    Device(#[from] GpuError),
    /// The device is gone. What was on its way when it went may still be, as far as anybody can tell, until the `Transfers` are dropped: what it would touch is quarantined until then.
    #[error("{0}; its slots and pages are safe to use again when the device has been given up")]
    Gone(GpuError),
    /// It cannot be done; nothing was touched.
    #[error(transparent)]
    Invalid(#[from] Error),
}

/// The end of an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// The order's.
    pub token: u64,
    /// Item by item, what has moved: with the checksums of `pages.parts(layers)` where they were wanted, else with none.
    pub items: Vec<Result<Vec<u32>, Miss>>,
    /// From acceptance to the end, in microseconds.
    pub elapsed_us: u64,
}

/// What `reap` tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// A store touches its pages no more; its slots are still being written. At most once, before the end; an end says it, too.
    PagesFree {
        /// The order's.
        token: u64,
    },
    /// Nothing of the order touches anything any more, unless it says `Miss::Gone`.
    Ended(Ended),
}

/// What is taken of the device, and how it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Of HBM, for what is on its way: at most half of it for either direction, so that neither waits for the other, unless one run needs more.
    pub staging_bytes: u64,
    /// What goes at once, but for a single run that is longer. Small: more calls; large: an order waits longer for its turn, and for its first byte to be verified.
    pub chunk_bytes: u64,
    /// Slots that there will be at most: the staging area takes one whole. Orders of larger ones are refused.
    pub slot_bytes_max: u32,
    /// Pages of which longer runs are as a slot has them are copied by batches, others by kernels; none: measured.
    pub crossover_bytes: Option<u64>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            staging_bytes: 64 << 20,
            chunk_bytes: 16 << 20,
            slot_bytes_max: SLOT_BYTES_MAX,
            crossover_bytes: None,
        }
    }
}

impl Options {
    /// What is wrong with them.
    fn check(&self) -> Result<(), String> {
        let Self { staging_bytes, chunk_bytes, slot_bytes_max, .. } = *self;
        if staging_bytes < u64::from(slot_bytes_max) {
            return Err(format!(
                "a staging area of {staging_bytes} bytes takes no slot of {slot_bytes_max}: give it as much, or say that no slot will be that large"
            ));
        }
        if chunk_bytes == 0 || chunk_bytes > staging_bytes / 2 {
            return Err(format!(
                "chunks of {chunk_bytes} bytes in a staging area of {staging_bytes}: give at least twice as much, so that one travels while another is verified"
            ));
        }
        Ok(())
    }
}
