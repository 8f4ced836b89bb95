//! One model, one engine and its blocks in pinned memory: what tests that look at something else start from.

use crate::rig::{Dice, Memory, Model, Rig, host};
use kvd_proto::Layout;
use kvd_proto::layout::DataType;
use kvd_tiers::gpu::paged::Slice;
use kvd_tiers::gpu::transfer::{Direction, Item, Order};
use kvd_tiers::mapping::Mapping;
use std::sync::Arc;

/// Tokens of a block, and of a page.
const ROWS: u32 = 16;

/// Blocks 0.. in slots one behind the other, and pages 0.. for as many.
pub(crate) struct House {
    pub(crate) model: Model,
    pub(crate) memory: Memory,
    pub(crate) slots: Arc<Mapping>,
    /// What the slots hold.
    pub(crate) shadow: Vec<u8>,
    pub(crate) blocks: usize,
}

impl House {
    /// Blocks of 8 parts of 8 KiB.
    pub(crate) fn new(rig: &mut Rig, blocks: usize) -> Self {
        let layout = Layout::full(4, 4, 64, DataType::Bf16, (4, 2), ROWS).unwrap();
        Self::of(rig, layout, blocks)
    }

    pub(crate) fn of(rig: &mut Rig, layout: Layout, blocks: usize) -> Self {
        let mut dice = Dice(blocks as u64);
        let group = layout.groups()[0].clone();
        let row_bytes = (u64::from(group.head_size) * group.element.bits() / 8) as usize;
        let rows = layout.block_tokens();
        let model = Model { layout, vectors: group.vectors, rows, row_bytes };
        let slice = Slice {
            group: 0,
            first_layer: 0,
            layers: group.layers,
            first_head: 0,
            heads: group.heads,
            pages: blocks as u32,
            page_rows: rows,
        };
        let memory = Memory::new(rig, &mut dice, &model, slice, true);
        let shadow = dice.bytes(blocks * model.slot_bytes());
        Self { slots: rig.pinned(&shadow), model, memory, shadow, blocks }
    }

    pub(crate) fn rows(&self, block: usize) -> Vec<u64> {
        (0..u64::from(self.model.rows)).map(|row| (block as u64) << 32 | row).collect()
    }

    pub(crate) fn slot(&self, block: usize) -> &[u8] {
        &self.shadow[block * self.model.slot_bytes()..][..self.model.slot_bytes()]
    }

    pub(crate) fn item(&self, block: usize, direction: Direction) -> Item {
        let parts = self.memory.pages.parts(0..self.memory.pages.slice().layers);
        let checksums = self.model.sums(self.slot(block), parts);
        Item {
            host: Some(host(&self.slots, block * self.model.slot_bytes())),
            kept: None,
            rows: self.rows(block),
            checksums: (direction == Direction::Load).then_some(checksums),
        }
    }

    /// An order of these blocks, each between its page and its slot.
    pub(crate) fn order(&self, token: u64, direction: Direction, blocks: std::ops::Range<usize>) -> Order {
        let items = blocks.map(|block| self.item(block, direction)).collect();
        self.memory.order(token, direction, items)
    }

    /// A block was loaded: its page is to hold its slot's rows.
    pub(crate) fn loaded(&mut self, block: usize) {
        let (rows, slot) = (self.rows(block), self.slot(block).to_vec());
        let layers = 0..self.memory.pages.slice().layers;
        self.memory.load(&self.model, layers, &rows, &slot);
    }

    /// A block was stored: its slot is to hold its page's.
    pub(crate) fn stored(&mut self, block: usize) {
        let (rows, layers) = (self.rows(block), 0..self.memory.pages.slice().layers);
        let at = block * self.model.slot_bytes();
        let slot = &mut self.shadow[at..at + self.model.slot_bytes()];
        self.memory.store(&self.model, layers, &rows, slot);
    }

    /// What pages and slots hold is taken as it is: after something has gone wrong in the middle.
    pub(crate) fn look(&mut self, rig: &mut Rig) {
        self.slots.copy_out(0, &mut self.shadow);
        self.memory.shadow = rig.get(self.memory.base, self.memory.shadow.len());
    }

    pub(crate) fn check(&self, rig: &mut Rig, why: &str) {
        self.memory.check(rig, why);
        let mut found = vec![0; self.shadow.len()];
        self.slots.copy_out(0, &mut found);
        assert!(found == self.shadow, "{why}: slots");
    }

    /// Whether a block's page holds its slot's rows.
    pub(crate) fn agrees(&self, block: usize) -> bool {
        let mut slot = vec![0; self.model.slot_bytes()];
        self.memory.store(&self.model, 0..self.memory.pages.slice().layers, &self.rows(block), &mut slot);
        slot == self.slot(block)
    }
}
