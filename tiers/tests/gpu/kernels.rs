//! The kernels of every device beside a reference that walks a slot as `proto/FORMAT.md` orders it, with no arithmetic of `work.rs` in it.
//!
//! Invariant of each comparison: whole memories are compared, so that a byte beside the right place is seen.

use crate::rig::{PATIENCE, Rig, on_each, pattern};
use kvd_tiers::gpu::work::NO_PAGE;
use kvd_tiers::gpu::{Address, Cells, Checksums, Vector, Work};
use kvd_tiers::media::fault::splitmix64;
use std::time::Instant;

/// Pages that an engine has.
const PAGES: u64 = 11;
const BLOCKS: u64 = 5;
/// What the engine's memory begins and ends with, so that a write before its first page is seen.
const MARGIN: u64 = 512;

/// A group, the engine's share of it, and how its pages lie.
#[derive(Debug, Clone, Copy)]
struct Shape {
    part_layers: u64,
    part_heads: u64,
    layer_ranges: u64,
    head_ranges: u64,
    vectors: u64,
    rows: u64,
    row_bytes: u64,
    unit: u64,
    /// Layers and heads that this engine has, counted in the group.
    layers: (u64, u64),
    heads: (u64, u64),
    page_rows: u64,
    order: Order,
}

/// How a page lies.
#[derive(Debug, Clone, Copy)]
enum Order {
    /// Token, head; K and V in halves of the memory.
    TokenHead,
    /// Head, token; K and V side by side in each page.
    HeadToken,
    /// As the first, with pages counted from the end of the memory.
    Backwards,
}

impl Shape {
    fn draw(draws: &mut u64) -> Self {
        let mut pick = |choices: &[u64]| choices[(splitmix64(draws) % choices.len() as u64) as usize];
        let unit = pick(&[1, 2, 4, 8, 16]);
        let (part_layers, part_heads) = (pick(&[1, 2, 3]), pick(&[1, 2]));
        let (layer_ranges, head_ranges) = (pick(&[1, 2]), pick(&[1, 2, 3]));
        let (layers, heads) = (part_layers * layer_ranges, part_heads * head_ranges);
        let (first_layer, first_head) = (pick(&[0, layers / 2]), pick(&[0, heads / 2]));
        let orders = [Order::TokenHead, Order::HeadToken, Order::Backwards];
        Self {
            part_layers,
            part_heads,
            layer_ranges,
            head_ranges,
            vectors: pick(&[1, 2]),
            rows: pick(&[1, 4, 16]),
            row_bytes: unit * pick(&[1, 3, 16]),
            unit,
            layers: (first_layer, layers - first_layer),
            heads: (first_head, heads - first_head),
            page_rows: pick(&[1, 4, 16, 32]),
            order: orders[pick(&[0, 1, 2]) as usize],
        }
    }

    fn part_bytes(&self) -> u64 {
        self.part_layers * self.part_heads * self.vectors * self.rows * self.row_bytes
    }

    fn part_stride(&self) -> u64 {
        self.part_bytes().next_multiple_of(4096)
    }

    fn slot_bytes(&self) -> u64 {
        self.part_stride() * self.layer_ranges * self.head_ranges
    }

    fn page_bytes(&self) -> u64 {
        self.page_rows * self.heads.1 * self.row_bytes
    }

    /// Of one layer, all its vectors.
    fn layer_bytes(&self) -> u64 {
        PAGES * self.page_bytes() * self.vectors
    }

    fn memory_bytes(&self) -> u64 {
        self.layers.1 * self.layer_bytes() + 2 * MARGIN
    }

    /// Where a row lies in the engine's memory, layer and head counted there: what an engine's tensor says.
    fn in_pages(&self, layer: u64, vector: u64, page: u64, head: u64, page_row: u64) -> u64 {
        let (heads, row, page_bytes) = (self.heads.1, self.row_bytes, self.page_bytes());
        let half = vector * PAGES * page_bytes;
        let in_layer = match self.order {
            Order::TokenHead => half + page * page_bytes + (page_row * heads + head) * row,
            Order::Backwards => half + (PAGES - 1 - page) * page_bytes + (page_row * heads + head) * row,
            Order::HeadToken => {
                (page * self.vectors + vector) * page_bytes + (head * self.page_rows + page_row) * row
            }
        };
        MARGIN + layer * self.layer_bytes() + in_layer
    }

    /// The same as strides.
    fn vector(&self, memory: Address, layer: u64, vector: u64) -> Vector {
        let at = |page, head, row| self.in_pages(layer, vector, page, head, row) as i64;
        let (row, zero) = (self.row_bytes as i64, at(0, 0, 0));
        let (head_stride, token_stride) = match self.order {
            Order::HeadToken => (self.page_rows as i64 * row, row),
            _ => (row, self.heads.1 as i64 * row),
        };
        let page_stride = at(1, 0, 0) - zero;
        Vector { base: memory + zero as u64, page_stride, head_stride, token_stride }
    }
}

/// Blocks, their pages, and both sides' bytes.
struct Case {
    shape: Shape,
    /// By block and row: page and row of the page.
    places: Vec<Option<(u64, u64)>>,
    memory: Vec<u8>,
    slots: Vec<u8>,
}

/// What some of an engine's layers have to do with the slots.
struct Walk {
    /// Every row: where in the slots, and where in the memory if it has a page.
    rows: Vec<(usize, Option<usize>)>,
    /// Behind the parts whose last row is among them.
    gaps: Vec<(usize, usize)>,
}

impl Case {
    fn draw(seed: u64) -> Self {
        let mut draws = seed;
        let shape = Shape::draw(&mut draws);
        let count = shape.page_rows * PAGES;
        let mut free: Vec<u64> = (0..count).collect();
        let mut places = Vec::new();
        for _ in 0..BLOCKS * shape.rows {
            let drawn = splitmix64(&mut draws);
            let absent = free.is_empty() || drawn.is_multiple_of(5);
            let place = (!absent).then(|| free.swap_remove((drawn >> 8) as usize % free.len()));
            places.push(place.map(|row| (row / shape.page_rows, row % shape.page_rows)));
        }
        let memory = pattern(seed, shape.memory_bytes() as usize);
        let slots = pattern(seed + 1, (shape.slot_bytes() * BLOCKS) as usize);
        Self { shape, places, memory, slots }
    }

    fn walk(&self, layers: std::ops::Range<u64>) -> Walk {
        let shape = &self.shape;
        let (mut rows, mut gaps) = (Vec::new(), Vec::new());
        let mut at = 0;
        for block in 0..BLOCKS {
            for part in 0..shape.layer_ranges * shape.head_ranges {
                let part_start = at;
                let (layer_range, head_range) = (part / shape.head_ranges, part % shape.head_ranges);
                let mut last_is_ours = false;
                for head in head_range * shape.part_heads..(head_range + 1) * shape.part_heads {
                    for layer in layer_range * shape.part_layers..(layer_range + 1) * shape.part_layers {
                        let ours = layer.checked_sub(shape.layers.0).zip(head.checked_sub(shape.heads.0));
                        let ours = ours.filter(|(layer, _)| layers.contains(layer));
                        for vector in 0..shape.vectors {
                            for row in 0..shape.rows {
                                if let Some((layer, head)) = ours {
                                    let place = self.places[(block * shape.rows + row) as usize];
                                    let paged = place.map(|(page, page_row)| {
                                        shape.in_pages(layer, vector, page, head, page_row) as usize
                                    });
                                    rows.push((at, paged));
                                }
                                at += shape.row_bytes as usize;
                            }
                        }
                        last_is_ours = ours.is_some();
                    }
                }
                let end = part_start + shape.part_stride() as usize;
                if last_is_ours {
                    gaps.push((at, end));
                }
                at = end;
            }
        }
        Walk { rows, gaps }
    }

    fn gathered(&self, layers: std::ops::Range<u64>) -> Vec<u8> {
        let (mut slots, bytes) = (self.slots.clone(), self.shape.row_bytes as usize);
        let Walk { rows, gaps } = self.walk(layers);
        for (at, paged) in rows {
            match paged {
                Some(from) => slots[at..at + bytes].copy_from_slice(&self.memory[from..from + bytes]),
                None => slots[at..at + bytes].fill(0),
            }
        }
        for (from, to) in gaps {
            slots[from..to].fill(0);
        }
        slots
    }

    fn scattered(&self, layers: std::ops::Range<u64>) -> Vec<u8> {
        let (mut memory, bytes) = (self.memory.clone(), self.shape.row_bytes as usize);
        for (at, paged) in self.walk(layers).rows {
            if let Some(to) = paged {
                memory[to..to + bytes].copy_from_slice(&self.slots[at..at + bytes]);
            }
        }
        memory
    }
}

/// A case in a device's memory.
struct Placed {
    memory: Address,
    slots: Address,
    cells: Cells,
}

fn table(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

impl Placed {
    fn new(rig: &mut Rig, case: &Case) -> Self {
        let shape = &case.shape;
        let (memory, slots) = (rig.filled(&case.memory), rig.filled(&case.slots));
        let place = |place: &Option<(u64, u64)>| place.map_or(NO_PAGE, |(page, row)| page << 32 | row);
        let slot_table = table((0..BLOCKS).map(|block| slots + block * shape.slot_bytes()));
        let vectors = (0..shape.layers.1).flat_map(|layer| (0..shape.vectors).map(move |v| (layer, v)));
        let vectors = vectors.map(|(layer, vector)| shape.vector(memory, layer, vector)).flat_map(|v| {
            [
                v.base,
                v.page_stride.cast_unsigned(),
                v.head_stride.cast_unsigned(),
                v.token_stride.cast_unsigned(),
            ]
        });
        let cells = Cells {
            // one table in the device's memory, the others in the host's: kernels reach both
            slots: rig.filled(&slot_table),
            row_table: rig.host(&table(case.places.iter().map(place))).at,
            vectors: rig.host(&table(vectors)).at,
            blocks: BLOCKS,
            rows: shape.rows,
            row_bytes: shape.row_bytes,
            vectors_per_layer: shape.vectors,
            first_layer: 0,
            layers: shape.layers.1,
            heads: shape.heads.1,
            slice_first_layer: shape.layers.0,
            slice_first_head: shape.heads.0,
            part_layers: shape.part_layers,
            part_heads: shape.part_heads,
            head_ranges: shape.head_ranges,
            part_bytes: shape.part_bytes(),
            part_stride: shape.part_stride(),
            unit_bytes: shape.unit,
        };
        Self { memory, slots, cells }
    }
}

const SEEDS: std::ops::Range<u64> = 0..60;

#[test]
fn a_gather_is_the_reference_s() {
    on_each(|rig| {
        for seed in SEEDS {
            let case = Case::draw(seed * 1000);
            let placed = Placed::new(rig, &case);
            rig.device.launch(rig.stream, &Work::Gather(placed.cells)).unwrap();
            rig.finish(rig.stream).unwrap_or_else(|error| panic!("seed {seed}: {error}: {:?}", case.shape));
            let expected = case.gathered(0..case.shape.layers.1);
            assert!(rig.get(placed.slots, expected.len()) == expected, "seed {seed}: {:?}", case.shape);
            assert!(rig.get(placed.memory, case.memory.len()) == case.memory, "seed {seed}: pages changed");
        }
    });
}

#[test]
fn a_scatter_is_the_reference_s() {
    on_each(|rig| {
        for seed in SEEDS {
            let case = Case::draw(seed * 1000 + 500);
            let placed = Placed::new(rig, &case);
            rig.device.launch(rig.stream, &Work::Scatter(placed.cells)).unwrap();
            rig.finish(rig.stream).unwrap_or_else(|error| panic!("seed {seed}: {error}: {:?}", case.shape));
            let expected = case.scattered(0..case.shape.layers.1);
            assert!(rig.get(placed.memory, expected.len()) == expected, "seed {seed}: {:?}", case.shape);
            assert!(rig.get(placed.slots, case.slots.len()) == case.slots, "seed {seed}: slots changed");
        }
    });
}

/// As a load does it: the engine starts on the first layers while the last are under way.
#[test]
fn layers_one_by_one_are_all_layers() {
    on_each(|rig| {
        let cases = (0..40).map(|seed| Case::draw(seed * 77 + 3)).filter(|case| case.shape.layers.1 > 1);
        for case in cases {
            let placed = Placed::new(rig, &case);
            let layers = case.shape.layers.1;
            let step = |first_layer, layers| Cells { first_layer, layers, ..placed.cells };
            rig.device.launch(rig.stream, &Work::Gather(step(1, layers - 1))).unwrap();
            rig.finish(rig.stream).unwrap();
            assert!(rig.get(placed.slots, case.slots.len()) == case.gathered(1..layers), "{:?}", case.shape);
            rig.device.launch(rig.stream, &Work::Gather(step(0, 1))).unwrap();
            rig.device.launch(rig.stream, &Work::Gather(step(0, 0))).unwrap();
            rig.finish(rig.stream).unwrap();
            assert!(rig.get(placed.slots, case.slots.len()) == case.gathered(0..layers), "{:?}", case.shape);
        }
    });
}

#[test]
fn checksums_are_crc32fast_s() {
    on_each(|rig| {
        let bytes = pattern(31, 1 << 20);
        let memory = rig.filled(&bytes);
        for (run_bytes, count) in
            [(16, 300), (48, 7), (4096, 33), (65_536, 9), (66_000, 5), (1 << 20, 1), (64, 0)]
        {
            let starts: Vec<usize> =
                (0..count).map(|at| at * 7 * 16 * 11 % (bytes.len() - run_bytes + 16) / 16 * 16).collect();
            let runs = rig.host(&table(starts.iter().map(|start| memory + *start as u64)));
            let results = rig.host(&vec![0xEE; count * 4 + 8]);
            let work = Work::Checksum(Checksums {
                runs: runs.at,
                results: results.at,
                count: count as u64,
                bytes: run_bytes as u64,
            });
            rig.device.launch(rig.stream, &work).unwrap();
            rig.finish(rig.stream).unwrap();
            let expected = starts.iter().map(|start| crc32fast::hash(&bytes[*start..*start + run_bytes]));
            let mut expected: Vec<u8> = expected.flat_map(u32::to_le_bytes).collect();
            expected.extend([0xEE; 8]);
            assert!(results.bytes(0, count * 4 + 8) == expected, "{count} runs of {run_bytes} bytes");
        }
    });
}

#[test]
fn a_kernel_of_no_blocks_does_nothing() {
    on_each(|rig| {
        let started = Instant::now();
        let case = Case::draw(5);
        let placed = Placed::new(rig, &case);
        let none = Cells { blocks: 0, ..placed.cells };
        for work in [Work::Gather(none), Work::Scatter(none)] {
            rig.device.launch(rig.stream, &work).unwrap();
            rig.finish(rig.stream).unwrap();
        }
        assert!(rig.get(placed.slots, case.slots.len()) == case.slots);
        assert!(started.elapsed() < PATIENCE);
    });
}
