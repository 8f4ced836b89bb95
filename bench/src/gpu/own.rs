//! Blocks between pages and slots within this process: `transfer::Transfers` beside the plain copy of as many bytes.
//!
//! Owns the slots, in pinned memory and in HBM, and the pages. Invariants: before a kind of pages is measured, all its blocks went in and out of them once and every byte was looked at, so that
//! what is measured is known to work; ours and the plain copy take turns on the same device.
//! Leaves to others: other processes (`node`), the bars (`lines`).

use super::lines::{Lines, More, What};
use super::pages::{BLOCK_BYTES, KINDS, Kind, rows};
use super::rig::{self, PATIENCE, Plain};
use super::turns::{Took, Turns, took};
use crate::content;
use crate::failure::Failure;
use kvd_tiers::checksum::part_checksums;
use kvd_tiers::gpu::paged::Pages;
use kvd_tiers::gpu::transfer::{Direction, Ended, HostSlot, Item, Options, Order, Outcome, Transfers};
use kvd_tiers::gpu::{Address, Checksums, Device, Piece, Way, Work};
use kvd_tiers::mapping::Mapping;
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What is measured of every kind of pages and number of blocks, in this order: a load leaves in the pages what a store is to find there, a store in HBM's slots what a load of them is.
const CASES: [What; 6] =
    [What::Load, What::Store, What::StoreSummed, What::KeptStore, What::KeptLoad, What::KeptLoadVerified];

/// How many cases there are.
pub(super) fn cases(blocks: &[u32]) -> u32 {
    (KINDS.len() * CASES.len() * blocks.len()) as u32 + 1
}

/// Where a block's slot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Pinned,
    Kept,
}

/// See the file's head.
pub(super) struct Own {
    transfers: Transfers,
    plain: Plain,
    slots: Arc<Mapping>,
    kept: Address,
    memory: Address,
    blocks: u32,
    each: Duration,
}

/// One kind of pages, in use.
struct Kinded {
    kind: Kind,
    pages: Arc<Pages>,
    rows: Vec<Vec<u64>>,
    /// Of every block's parts.
    sums: Vec<Vec<u32>>,
}

impl Own {
    /// Of at most so many blocks; a case may take `each`.
    pub(super) fn new(device: Box<dyn Device>, blocks: u32, each: Duration) -> Result<Self, Failure> {
        let bytes = u64::from(blocks) * BLOCK_BYTES;
        let mut transfers = Transfers::new(device, Options::default())?;
        let device = transfers.device_mut();
        let plain = Plain::new(device, bytes)?;
        let (slots, _) = rig::pinned(device, bytes)?;
        let (kept, memory) = (device.allocate(bytes)?, device.allocate(bytes)?);
        let own = Self { transfers, plain, slots, kept, memory, blocks, each };
        own.fill();
        Ok(own)
    }

    fn fill(&self) {
        let mut block = vec![0; BLOCK_BYTES as usize];
        for name in 0..self.blocks {
            content::fill(name.into(), &mut block);
            self.slots.copy_in(name as usize * BLOCK_BYTES as usize, &block);
        }
    }

    /// All of it.
    pub(super) fn measure(&mut self, blocks: &[u32], lines: &mut Lines) -> Result<(), Failure> {
        let crossover = self.transfers.crossover_bytes();
        let text = match crossover {
            u64::MAX => "kernels move pieces of any length: batched copies were never as fast".to_owned(),
            bytes => format!("batched copies move pieces from {bytes} bytes on, kernels shorter ones"),
        };
        lines.fact(
            "crossover",
            &json!({ "crossover_bytes": (crossover < u64::MAX).then_some(crossover) }),
            &text,
        );
        self.checksums(lines)?;
        for kind in KINDS {
            let kinded = self.kinded(kind)?;
            self.prove(&kinded)?;
            for &blocks in blocks {
                for what in CASES {
                    self.case(&kinded, what, blocks, lines)?;
                }
            }
        }
        Ok(())
    }

    /// Gives everything back, so that what is measured next has the device to itself.
    pub(super) fn end(mut self) {
        let device = self.transfers.device_mut();
        self.plain.end(device);
        device.unpin(&self.slots);
        device.free(self.kept);
        device.free(self.memory);
    }

    fn kinded(&self, kind: Kind) -> Result<Kinded, Failure> {
        let pages = kind.pages(self.memory, self.blocks)?;
        let stride = pages.part_stride() as usize;
        let of_block = |block: u32| {
            let at = block as usize * BLOCK_BYTES as usize;
            part_checksums(&self.slots, at, stride, BLOCK_BYTES as usize / stride)
        };
        let sums = (0..self.blocks).map(of_block).collect();
        Ok(Kinded { kind, pages, rows: rows(self.blocks), sums })
    }

    fn order(&self, kinded: &Kinded, what: What, blocks: u32) -> Order {
        let (direction, at) = match what {
            What::Load => (Direction::Load, At::Pinned),
            What::Store | What::StoreSummed => (Direction::Store, At::Pinned),
            What::KeptLoad | What::KeptLoadVerified => (Direction::Load, At::Kept),
            What::KeptStore => (Direction::Store, At::Kept),
            What::NodeLoad | What::NodeStore | What::Checksum => {
                unreachable!("{what:?} is measured elsewhere")
            }
        };
        let verified = matches!(what, What::Load | What::KeptLoadVerified);
        let item = |block: u32| {
            let offset = u64::from(block) * BLOCK_BYTES;
            Item {
                host: (at == At::Pinned)
                    .then(|| HostSlot { mapping: self.slots.clone(), offset: offset as usize }),
                kept: (at == At::Kept).then_some(self.kept + offset),
                rows: kinded.rows[block as usize].clone(),
                checksums: verified.then(|| kinded.sums[block as usize].clone()),
            }
        };
        Order {
            token: 0,
            line: 0,
            direction,
            pages: kinded.pages.clone(),
            layers: 0..kinded.pages.slice().layers,
            items: (0..blocks).map(item).collect(),
            checksums_wanted: what == What::StoreSummed,
            fence: None,
        }
    }

    /// To the order's end, which must be a good one.
    fn run(&mut self, order: Order) -> Result<(Ended, Took), Failure> {
        let (ended, took) = took(|| {
            self.transfers.submit(order).map_err(|_| "an order was refused while none was under way")?;
            let (mut outcomes, start) = (Vec::new(), Instant::now());
            loop {
                self.transfers.reap(Some(PATIENCE), &mut outcomes);
                let ended = outcomes.drain(..).find_map(|outcome| match outcome {
                    Outcome::Ended(ended) => Some(ended),
                    Outcome::PagesFree { .. } => None,
                });
                match ended {
                    Some(ended) => return Ok::<_, Failure>(ended),
                    None if start.elapsed() > PATIENCE => return Err("a transfer does not end".into()),
                    None => {}
                }
            }
        })?;
        match ended.items.iter().enumerate().find_map(|(at, item)| Some((at, item.as_ref().err()?))) {
            Some((at, miss)) => Err(format!("block {at} has not moved: {miss}").into()),
            None => Ok((ended, took)),
        }
    }

    /// In, verified by the kernel; the slots zeroed; out, with checksums; every byte looked at. Then the same through slots in HBM.
    fn prove(&mut self, kinded: &Kinded) -> Result<(), Failure> {
        let zeros = vec![0; BLOCK_BYTES as usize];
        for [into, out] in [[What::Load, What::StoreSummed], [What::KeptLoadVerified, What::Store]] {
            if into == What::KeptLoadVerified {
                self.run(self.order(kinded, What::KeptStore, self.blocks))?;
                // what the pages have must come from the slots in HBM
                self.wipe()?;
            }
            self.run(self.order(kinded, into, self.blocks))?;
            (0..self.blocks as usize).for_each(|at| self.slots.copy_in(at * BLOCK_BYTES as usize, &zeros));
            let (ended, _) = self.run(self.order(kinded, out, self.blocks))?;
            let told = ended.items.into_iter().map(|item| item.expect("all of them moved"));
            if out == What::StoreSummed && !told.eq(kinded.sums.iter().cloned()) {
                return Err(format!(
                    "{}: a store tells other checksums than the blocks have",
                    kinded.kind.name()
                )
                .into());
            }
            self.look(kinded.kind)?;
        }
        Ok(())
    }

    fn wipe(&mut self) -> Result<(), Failure> {
        let (stream, bytes) = (self.plain.stream(), u64::from(self.blocks) * BLOCK_BYTES);
        let device = self.transfers.device_mut();
        device.clear(stream, self.memory, bytes)?;
        rig::finish(device, stream)
    }

    fn look(&self, kind: Kind) -> Result<(), Failure> {
        let mut block = vec![0; BLOCK_BYTES as usize];
        let wrong = (0..self.blocks).filter(|name| {
            self.slots.copy_out(*name as usize * BLOCK_BYTES as usize, &mut block);
            !content::is((*name).into(), &block)
        });
        match wrong.count() {
            0 => Ok(()),
            wrong => {
                Err(format!("{}: {wrong} of {} blocks came back wrong", kind.name(), self.blocks).into())
            }
        }
    }

    fn case(&mut self, kinded: &Kinded, what: What, blocks: u32, lines: &mut Lines) -> Result<(), Failure> {
        let way = match what {
            What::Load => Way::In,
            What::Store | What::StoreSummed => Way::Out,
            _ => Way::Within,
        };
        let bytes = u64::from(blocks) * BLOCK_BYTES;
        let order = self.order(kinded, what, blocks);
        let mut turns = Turns::new(bytes, self.each);
        while turns.goes_on() {
            let (_, ours) = self.run(order.clone())?;
            let raw = self.plain.copy(self.transfers.device_mut(), way, bytes)?;
            turns.take(ours, raw);
        }
        let more = More { piece_bytes: kinded.pages.piece_bytes(), ..More::default() };
        lines.case(what, kinded.kind, blocks, &turns.end(), &more);
        Ok(())
    }

    /// The checksum kernel alone, over all slots in HBM in parts of the usual size, beside a device copy of them.
    fn checksums(&mut self, lines: &mut Lines) -> Result<(), Failure> {
        const PART_BYTES: u64 = 64 << 10;
        let (kept, bytes, stream) = (self.kept, u64::from(self.blocks) * BLOCK_BYTES, self.plain.stream());
        let count = bytes / PART_BYTES;
        let table: Vec<u8> = (0..count).flat_map(|part| (kept + part * PART_BYTES).to_le_bytes()).collect();
        let device = self.transfers.device_mut();
        let (pinned, pinned_at) = rig::pinned(device, (table.len() as u64).next_multiple_of(4096))?;
        pinned.copy_in(0, &table);
        let runs = device.allocate(count * 12)?;
        device.copy(stream, Way::In, &[Piece { from: pinned_at, to: runs, bytes: count * 8 }])?;
        rig::finish(device, stream)?;
        let work = Work::Checksum(Checksums { runs, results: runs + count * 8, count, bytes: PART_BYTES });
        let mut turns = Turns::new(bytes, self.each);
        while turns.goes_on() {
            let device = self.transfers.device_mut();
            let ((), ours) = took(|| {
                device.launch(stream, &work)?;
                rig::finish(device, stream)
            })?;
            let raw = self.plain.copy(device, Way::Within, bytes)?;
            turns.take(ours, raw);
        }
        let device = self.transfers.device_mut();
        device.unpin(&pinned);
        device.free(runs);
        let more = More { piece_bytes: PART_BYTES, ..More::default() };
        lines.case(What::Checksum, Kind::Whole, self.blocks, &turns.end(), &more);
        Ok(())
    }
}
