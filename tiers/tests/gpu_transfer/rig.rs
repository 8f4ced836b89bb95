//! Transfers on a device, memory to look at, and a model of what has to come of it: straight from proto/FORMAT.md, section 3, a byte at a time.

use kvd_proto::Layout;
use kvd_tiers::gpu::paged::{Pages, Slice};
use kvd_tiers::gpu::transfer::{Direction, Ended, HostSlot, Item, Options, Order, Outcome, Transfers};
use kvd_tiers::gpu::work::NO_PAGE;
use kvd_tiers::gpu::{Address, Device, Piece, Stream, Vector, Way};
use kvd_tiers::mapping::Mapping;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A test that waits for longer has failed.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);
const BOUNCE_BYTES: usize = 1 << 20;
/// Random bytes come again after so many, which nothing else is a multiple of.
const TILE_BYTES: usize = (1 << 20) + 7;

/// Numbers that are the same in every run.
#[derive(Debug, Clone)]
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb) >> 16
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    pub(crate) fn yes(&mut self, of_ten: u64) -> bool {
        self.below(10) < of_ten
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        let few = count.min(TILE_BYTES);
        let tile: Vec<u8> = (0..few.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(few).collect();
        let mut all = tile.repeat(count.div_ceil(few.max(1)));
        all.truncate(count);
        all
    }

    pub(crate) fn shuffle<T>(&mut self, all: &mut [T]) {
        for at in (1..all.len()).rev() {
            all.swap(at, self.below(at as u64 + 1) as usize);
        }
    }
}

/// See the file's head.
pub(crate) struct Rig {
    pub(crate) transfers: Transfers,
    stream: Stream,
    bounce: Arc<Mapping>,
    bounce_at: Address,
}

/// A staging area as small as can be, so that everything waits for room.
pub(crate) fn small() -> Options {
    Options {
        staging_bytes: 1 << 20,
        chunk_bytes: 64 << 10,
        slot_bytes_max: 1 << 20,
        crossover_bytes: Some(u64::MAX),
    }
}

impl Rig {
    pub(crate) fn new(device: Box<dyn Device>, options: Options) -> Self {
        let mut transfers = Transfers::new(device, options).unwrap();
        let bounce = Arc::new(Mapping::anonymous(BOUNCE_BYTES).unwrap());
        let device = transfers.device_mut();
        let (stream, bounce_at) = (device.stream().unwrap(), device.pin(&bounce).unwrap());
        Self { transfers, stream, bounce, bounce_at }
    }

    fn finish(&mut self) {
        let device = self.transfers.device_mut();
        let mark = device.record(self.stream).unwrap();
        loop {
            if let Some(result) = device.reached(mark) {
                return result.unwrap();
            }
            device.wait(PATIENCE);
        }
    }

    /// Device memory with these bytes.
    pub(crate) fn allocate(&mut self, bytes: &[u8]) -> Address {
        let at = self.transfers.device_mut().allocate(bytes.len() as u64).unwrap();
        self.put(at, bytes);
        at
    }

    pub(crate) fn put(&mut self, at: Address, bytes: &[u8]) {
        for (index, chunk) in bytes.chunks(BOUNCE_BYTES).enumerate() {
            self.bounce.copy_in(0, chunk);
            let to = at + (index * BOUNCE_BYTES) as u64;
            let piece = Piece { from: self.bounce_at, to, bytes: chunk.len() as u64 };
            self.transfers.device_mut().copy(self.stream, Way::In, &[piece]).unwrap();
            self.finish();
        }
    }

    pub(crate) fn get(&mut self, at: Address, bytes: usize) -> Vec<u8> {
        let mut all = vec![0; bytes];
        for (index, chunk) in all.chunks_mut(BOUNCE_BYTES).enumerate() {
            let from = at + (index * BOUNCE_BYTES) as u64;
            let piece = Piece { from, to: self.bounce_at, bytes: chunk.len() as u64 };
            self.transfers.device_mut().copy(self.stream, Way::Out, &[piece]).unwrap();
            self.finish();
            self.bounce.copy_out(0, chunk);
        }
        all
    }

    /// Pinned memory of this rig's device.
    pub(crate) fn pinned(&mut self, bytes: &[u8]) -> Arc<Mapping> {
        let mapping = Arc::new(Mapping::anonymous(bytes.len()).unwrap());
        mapping.copy_in(0, bytes);
        self.transfers.device_mut().pin(&mapping).unwrap();
        mapping
    }

    /// What is told until so many orders have ended.
    pub(crate) fn outcomes(&mut self, ends: usize) -> Vec<Outcome> {
        let (mut told, deadline) = (Vec::new(), Instant::now() + PATIENCE);
        while told.iter().filter(|outcome| matches!(outcome, Outcome::Ended(_))).count() < ends {
            assert!(Instant::now() < deadline, "{ends} ends expected, told {told:?}");
            self.transfers.reap(Some(Duration::from_secs(1)), &mut told);
        }
        told
    }

    pub(crate) fn ends(&mut self, count: usize) -> Vec<Ended> {
        let ended = |outcome| if let Outcome::Ended(ended) = outcome { Some(ended) } else { None };
        let mut ends: Vec<_> = self.outcomes(count).into_iter().filter_map(ended).collect();
        ends.sort_by_key(|ended| ended.token);
        ends
    }

    /// Orders that nothing is wrong with.
    pub(crate) fn run(&mut self, orders: Vec<Order>) -> Vec<Ended> {
        let count = orders.len();
        orders.into_iter().for_each(|order| self.transfers.submit(order).unwrap());
        let ends = self.ends(count);
        assert_eq!(self.transfers.in_flight(), 0);
        for ended in &ends {
            assert!(ended.items.iter().all(Result::is_ok), "{ended:?}");
        }
        ends
    }
}

/// A group's numbers, as section 3 of the format has them.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    pub(crate) layout: Layout,
    pub(crate) vectors: u32,
    pub(crate) rows: u32,
    pub(crate) row_bytes: usize,
}

impl Model {
    pub(crate) fn slot_bytes(&self) -> usize {
        self.layout.slot_bytes(0) as usize
    }

    pub(crate) fn stride(&self) -> usize {
        self.layout.part_stride(0) as usize
    }

    /// Where a row begins in a slot; layer and head counted in the group.
    fn place(&self, layer: u32, head: u32, vector: u32, row: u32) -> usize {
        let group = &self.layout.groups()[0];
        let (part_layers, part_heads) = (group.layers / group.layer_ranges, group.heads / group.head_ranges);
        let part = layer / part_layers * group.head_ranges + head / part_heads;
        let cell = (head % part_heads * part_layers + layer % part_layers) * self.vectors + vector;
        part as usize * self.stride() + (cell * self.rows + row) as usize * self.row_bytes
    }

    /// CRC-32 of some parts of a slot.
    pub(crate) fn sums(&self, slot: &[u8], parts: impl Iterator<Item = u16>) -> Vec<u32> {
        parts.map(|part| crc32fast::hash(&slot[part as usize * self.stride()..][..self.stride()])).collect()
    }
}

/// An engine's memory on the device, and what is known to be in it.
pub(crate) struct Memory {
    pub(crate) pages: Arc<Pages>,
    pub(crate) base: Address,
    pub(crate) shadow: Vec<u8>,
}

/// Before the first row and behind the last.
const GUARD_BYTES: usize = 256;

impl Memory {
    /// Axes in any order, with or without gaps.
    pub(crate) fn new(rig: &mut Rig, dice: &mut Dice, model: &Model, slice: Slice, compact: bool) -> Self {
        let counts = [slice.page_rows, model.vectors, slice.heads, slice.layers, slice.pages];
        let mut order = [0, 1, 2, 3, 4];
        if !compact {
            dice.shuffle(&mut order);
        }
        let (mut strides, mut extent) = ([0; 5], model.row_bytes as u64);
        for axis in order {
            let gap = if compact || dice.yes(7) { 0 } else { dice.one(&[1, 4, 16, 48]) };
            strides[axis] = extent + gap;
            extent += strides[axis] * u64::from(counts[axis] - 1);
        }
        let shadow = dice.bytes(extent as usize + 2 * GUARD_BYTES);
        let base = rig.allocate(&shadow);
        let vector = |layer: u64, vector: u64| Vector {
            base: base + GUARD_BYTES as u64 + layer * strides[3] + vector * strides[1],
            page_stride: strides[4] as i64,
            head_stride: strides[2] as i64,
            token_stride: strides[0] as i64,
        };
        let vectors = (0..u64::from(slice.layers))
            .flat_map(|layer| (0..u64::from(model.vectors)).map(move |at| vector(layer, at)));
        let range = base + GUARD_BYTES as u64..base + GUARD_BYTES as u64 + extent;
        let pages =
            Pages::new(&model.layout, slice, vectors.collect(), std::slice::from_ref(&range)).unwrap();
        Self { pages: Arc::new(pages), base, shadow }
    }

    /// For each row of a block in these layers: where it is in the slot, and where in `shadow`.
    fn rows<'a>(
        &'a self,
        model: &'a Model,
        layers: Range<u32>,
        rows: &'a [u64],
    ) -> impl Iterator<Item = (usize, Option<usize>)> + 'a {
        let slice = self.pages.slice();
        let cells = layers.flat_map(move |layer| {
            (0..slice.heads).flat_map(move |head| (0..model.vectors).map(move |at| (layer, head, at)))
        });
        cells.flat_map(move |(layer, head, at)| {
            rows.iter().enumerate().map(move |(row, place)| {
                let slot = model.place(slice.first_layer + layer, slice.first_head + head, at, row as u32);
                let vector = self.pages.vectors()[(layer * model.vectors + at) as usize];
                let offset = (place >> 32) as i64 * vector.page_stride
                    + i64::from(head) * vector.head_stride
                    + i64::from(*place as u32) * vector.token_stride;
                let paged = (vector.base - self.base) as i64 + offset;
                (slot, (*place != NO_PAGE).then_some(paged as usize))
            })
        })
    }

    /// What a store of these layers makes of a slot: parts are written whole.
    pub(crate) fn store(&self, model: &Model, layers: Range<u32>, rows: &[u64], slot: &mut [u8]) {
        for part in self.pages.parts(layers.clone()) {
            slot[part as usize * model.stride()..][..model.stride()].fill(0);
        }
        for (at, paged) in self.rows(model, layers, rows) {
            if let Some(paged) = paged {
                slot[at..at + model.row_bytes].copy_from_slice(&self.shadow[paged..paged + model.row_bytes]);
            }
        }
    }

    /// What a load makes of the pages.
    pub(crate) fn load(&mut self, model: &Model, layers: Range<u32>, rows: &[u64], slot: &[u8]) {
        let moves: Vec<_> = self.rows(model, layers, rows).collect();
        for (at, paged) in moves {
            if let Some(paged) = paged {
                self.shadow[paged..paged + model.row_bytes].copy_from_slice(&slot[at..at + model.row_bytes]);
            }
        }
    }

    /// Every byte of the memory, and around it, is what it should be.
    pub(crate) fn check(&self, rig: &mut Rig, why: &str) {
        let found = rig.get(self.base, self.shadow.len());
        let differs = found.iter().zip(&self.shadow).position(|(found, expected)| found != expected);
        assert_eq!(differs, None, "{why}: the first byte of {} that differs", found.len());
    }

    /// An order of all its layers.
    pub(crate) fn order(&self, token: u64, direction: Direction, items: Vec<Item>) -> Order {
        Order {
            token,
            line: token,
            direction,
            pages: self.pages.clone(),
            layers: 0..self.pages.slice().layers,
            items,
            checksums_wanted: direction == Direction::Store,
            fence: None,
        }
    }
}

/// A slot in pinned memory.
pub(crate) fn host(mapping: &Arc<Mapping>, offset: usize) -> HostSlot {
    HostSlot { mapping: mapping.clone(), offset }
}
