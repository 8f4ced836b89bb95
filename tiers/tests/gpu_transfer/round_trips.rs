//! Whatever the model, the engine's pages and its degrees: what was stored is what is loaded, and no other byte is touched.

use crate::devices;
use crate::rig::{Dice, Memory, Model, Rig, host, small};
use kvd_proto::Layout;
use kvd_proto::layout::{DataType, Element, Group, GroupKind};
use kvd_tiers::gpu::Address;
use kvd_tiers::gpu::paged::Slice;
use kvd_tiers::gpu::transfer::{Direction, Item, Options, Order};
use kvd_tiers::gpu::work::NO_PAGE;
use kvd_tiers::mapping::Mapping;
use std::ops::Range;
use std::sync::Arc;

const CASES: u64 = 150;
/// Between slots.
const GAP_BYTES: usize = 4096;

fn model(dice: &mut Dice) -> Model {
    let kind =
        dice.one(&[GroupKind::Full, GroupKind::Full, GroupKind::Window, GroupKind::State, GroupKind::Latent]);
    let latent = kind == GroupKind::Latent;
    let (layer_ranges, head_ranges) =
        (dice.one(&[1, 2, 3, 4]), if latent { 1 } else { dice.one(&[1, 2, 4]) });
    let block_tokens = dice.one(&[1, 4, 16, 24]);
    let state = kind == GroupKind::State;
    let group = Group {
        kind,
        window_tokens: if kind == GroupKind::Window { 128 } else { 0 },
        layers: layer_ranges * dice.one(&[1, 2, 3]),
        heads: if latent { 1 } else { head_ranges * dice.one(&[1, 2]) },
        head_size: dice.one(&[1, 3, 8, 32, 72]),
        vectors: if latent { 1 } else { 2 },
        element: Element::plain(dice.one(&[DataType::Bf16, DataType::F8E4m3, DataType::F32])),
        layer_ranges,
        head_ranges,
        state_bytes: if state { dice.one(&[1, 64, 1000, 4096]) } else { 0 },
    };
    let row_bytes = if state {
        group.state_bytes as usize
    } else {
        (u64::from(group.head_size) * group.element.bits() / 8) as usize
    };
    Model {
        vectors: if state { 1 } else { group.vectors },
        rows: if state { 1 } else { block_tokens },
        row_bytes,
        layout: Layout::new(vec![group], block_tokens).unwrap(),
    }
}

/// A group cut over so many ranks: layers first, then heads.
fn slices(dice: &mut Dice, model: &Model, blocks: u32) -> Vec<Slice> {
    let group = &model.layout.groups()[0];
    let divisors =
        |whole: u32| [1, 2, 4].into_iter().filter(|by| whole.is_multiple_of(*by)).collect::<Vec<_>>();
    let (stages, degree) = (dice.one(&divisors(group.layer_ranges)), dice.one(&divisors(group.head_ranges)));
    let page_rows = match model.rows {
        1 => {
            if group.kind == GroupKind::State {
                1
            } else {
                dice.one(&[1, 4])
            }
        }
        rows => dice.one(&[1, rows / 4, rows / 2, rows, rows * 2]),
    };
    let pages = (blocks * model.rows).div_ceil(page_rows) + 3;
    let (layers, heads) = (group.layers / stages, group.heads / degree);
    let slice = |at: u32| Slice {
        group: 0,
        first_layer: at / degree * layers,
        layers,
        first_head: at % degree * heads,
        heads,
        pages,
        page_rows,
    };
    (0..stages * degree).map(slice).collect()
}

/// Row tables of all blocks: pages in any order, some rows without, and a tail.
fn tables(dice: &mut Dice, model: &Model, slice: &Slice, blocks: u32) -> Vec<Vec<u64>> {
    let mut order: Vec<u64> = (0..u64::from(slice.pages)).collect();
    dice.shuffle(&mut order);
    let holes = dice.yes(3);
    let tail = dice.below(u64::from(model.rows));
    let mut row = |block: u32, row: u32| {
        let token = block * model.rows + row;
        let cut_off = block + 1 == blocks && model.rows > 1 && u64::from(row) > tail;
        let lost = cut_off || holes && dice.yes(2);
        let page = order[(token / slice.page_rows) as usize];
        if lost { NO_PAGE } else { page << 32 | u64::from(token % slice.page_rows) }
    };
    (0..blocks).map(|block| (0..model.rows).map(|at| row(block, at)).collect()).collect()
}

/// Where blocks are kept: pinned memory and HBM, and what is known to be in both.
struct Slots {
    pinned: Arc<Mapping>,
    pinned_shadow: Vec<u8>,
    hbm: Address,
    hbm_shadow: Vec<u8>,
    slot_bytes: usize,
}

impl Slots {
    fn new(rig: &mut Rig, dice: &mut Dice, model: &Model, blocks: u32) -> Self {
        let slot_bytes = model.slot_bytes();
        let bytes = blocks as usize * (slot_bytes + GAP_BYTES) + GAP_BYTES;
        let (pinned_shadow, hbm_shadow) = (dice.bytes(bytes), dice.bytes(bytes));
        let pinned = rig.pinned(&pinned_shadow);
        Self { pinned, hbm: rig.allocate(&hbm_shadow), pinned_shadow, hbm_shadow, slot_bytes }
    }

    fn range(&self, block: usize) -> Range<usize> {
        let start = block * (self.slot_bytes + GAP_BYTES) + GAP_BYTES;
        start..start + self.slot_bytes
    }

    fn item(&self, block: usize, way: Way, rows: Vec<u64>) -> Item {
        let at = self.range(block).start;
        let host = (way != Way::Hbm).then(|| host(&self.pinned, at));
        let kept = (way != Way::Pinned).then_some(self.hbm + at as u64);
        Item { host, kept, rows, checksums: None }
    }

    fn check(&self, rig: &mut Rig, why: &str) {
        let mut found = vec![0; self.pinned_shadow.len()];
        self.pinned.copy_out(0, &mut found);
        assert!(found == self.pinned_shadow, "{why}: pinned slots");
        assert!(rig.get(self.hbm, self.hbm_shadow.len()) == self.hbm_shadow, "{why}: slots in HBM");
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Pinned,
    Hbm,
    Both,
}

/// All at once, or stripe by stripe.
fn shares(dice: &mut Dice, memory: &Memory, model: &Model) -> Vec<Range<u32>> {
    let group = &model.layout.groups()[0];
    let (layers, each) = (memory.pages.slice().layers, group.layers / group.layer_ranges);
    if dice.yes(5) {
        return std::iter::once(0..layers).collect();
    }
    (0..layers / each).map(|at| at * each..(at + 1) * each).collect()
}

fn trip(rig: &mut Rig, seed: u64) {
    let mut dice = Dice(seed);
    let (model, blocks) = (model(&mut dice), 1 + dice.below(5) as u32);
    let mut slots = Slots::new(rig, &mut dice, &model, blocks);
    let way = dice.one(&[Way::Pinned, Way::Hbm, Way::Both]);
    let mut orders = Vec::new();
    let mut sums = Vec::new();
    let mut memories = Vec::new();
    let slices_of = slices(&mut dice, &model, blocks);
    let tables_of = tables(&mut dice, &model, &slices_of[0], blocks);
    for slice in slices_of {
        let compact = dice.yes(3);
        let memory = Memory::new(rig, &mut dice, &model, slice, compact);
        for layers in shares(&mut dice, &memory, &model) {
            let items = tables_of.iter().enumerate().map(|(at, rows)| slots.item(at, way, rows.clone()));
            let order = memory.order(orders.len() as u64, Direction::Store, items.collect());
            orders.push(Order { layers: layers.clone(), ..order });
            sums.push(Vec::new());
            for (block, rows) in tables_of.iter().enumerate() {
                let range = slots.range(block);
                let shadows = [(Way::Hbm, &mut slots.pinned_shadow), (Way::Pinned, &mut slots.hbm_shadow)];
                for (without, shadow) in shadows.into_iter().filter(|(without, _)| *without != way) {
                    let slot = &mut shadow[range.clone()];
                    memory.store(&model, layers.clone(), rows, slot);
                    if without == Way::Hbm || way == Way::Hbm {
                        let found = model.sums(slot, memory.pages.parts(layers.clone()));
                        sums.last_mut().unwrap().push(found);
                    }
                }
            }
        }
        memories.push(memory);
    }
    let ends = rig.run(orders);
    for (ended, expected) in ends.into_iter().zip(sums) {
        let found: Vec<_> = ended.items.into_iter().map(Result::unwrap).collect();
        assert_eq!(found, expected, "checksums of order {}", ended.token);
    }
    memories.iter().for_each(|memory| memory.check(rig, "a store reads"));
    slots.check(rig, "a store");
    for memory in memories {
        rig.transfers.device_mut().free(memory.base);
    }
    back(rig, &mut dice, &model, &mut slots, way);
    rig.transfers.device_mut().unpin(&slots.pinned);
    rig.transfers.device_mut().free(slots.hbm);
}

/// Into other pages, of other slices.
fn back(rig: &mut Rig, dice: &mut Dice, model: &Model, slots: &mut Slots, stored: Way) {
    let blocks = (slots.pinned_shadow.len() / (slots.slot_bytes + GAP_BYTES)) as u32;
    let way = match stored {
        Way::Both => dice.one(&[Way::Pinned, Way::Hbm, Way::Both]),
        Way::Pinned => dice.one(&[Way::Pinned, Way::Both]),
        Way::Hbm => Way::Hbm,
    };
    let (mut orders, mut memories) = (Vec::new(), Vec::new());
    for slice in slices(dice, model, blocks) {
        let compact = dice.yes(3);
        let mut memory = Memory::new(rig, dice, model, slice, compact);
        let tables = tables(dice, model, &slice, blocks);
        for layers in shares(dice, &memory, model) {
            let mut items = Vec::new();
            for (block, rows) in tables.iter().enumerate() {
                let range = slots.range(block);
                let from = if way == Way::Hbm { &slots.hbm_shadow } else { &slots.pinned_shadow };
                let slot = from[range.clone()].to_vec();
                let checksums = Some(model.sums(&slot, memory.pages.parts(layers.clone())));
                let checksums = checksums.filter(|_| way != Way::Hbm || dice.yes(5));
                items.push(Item { checksums, ..slots.item(block, way, rows.clone()) });
                memory.load(model, layers.clone(), rows, &slot);
                if way == Way::Both {
                    for part in memory.pages.parts(layers.clone()) {
                        let part = part as usize * model.stride()..(part as usize + 1) * model.stride();
                        slots.hbm_shadow[range.clone()][part.clone()].copy_from_slice(&slot[part]);
                    }
                }
            }
            let order = memory.order(orders.len() as u64, Direction::Load, items);
            orders.push(Order { layers, ..order });
        }
        memories.push(memory);
    }
    rig.run(orders);
    memories.iter().for_each(|memory| memory.check(rig, "a load"));
    slots.check(rig, "a load reads");
    for memory in memories {
        rig.transfers.device_mut().free(memory.base);
    }
}

#[test]
fn what_was_stored_is_what_is_loaded_and_nothing_else_is_touched() {
    devices::each_kind(|open| {
        let mut rig = Rig::new(open(), small());
        for seed in 0..CASES {
            println!("seed {seed}");
            trip(&mut rig, seed);
        }
    });
}

/// Half of them by kernels, half by batched copies.
#[test]
#[ignore = "slow: minutes on the stand-in"]
fn ten_thousand_shapes_strides_and_tables() {
    devices::each_kind(|open| {
        for (crossover_bytes, seeds) in [(None, 10_000..15_000), (Some(0), 15_000..20_000)] {
            let mut rig = Rig::new(open(), Options { crossover_bytes, ..small() });
            seeds.for_each(|seed| trip(&mut rig, seed));
        }
    });
}

#[test]
fn batched_copies_do_what_kernels_do() {
    devices::each_kind(|open| {
        let mut rig = Rig::new(open(), Options { crossover_bytes: Some(0), ..small() });
        for seed in 0..CASES {
            println!("seed {seed}");
            trip(&mut rig, seed);
        }
    });
}

#[test]
fn chunks_of_one_part_do_it_too() {
    devices::each_kind(|open| {
        let mut rig = Rig::new(open(), Options { chunk_bytes: 4096, ..small() });
        for seed in 0..CASES / 3 {
            println!("seed {seed}");
            trip(&mut rig, 1000 + seed);
        }
    });
}
