//! What is decided, without a device: whose turn it is, where bytes are staged, which calls a lot is made of.

mod plans;
mod turns;

use super::progress::Admitted;
use super::{Direction, Fence, Item, Miss, Order};
use crate::gpu::paged::{Pages, Slice};
use crate::gpu::{Address, Vector};
use kvd_proto::Layout;
use kvd_proto::layout::DataType;
use std::sync::Arc;

/// Pages of an engine: one of `degree` ranks. Slots have 4 x 4 parts of 4 KiB.
fn pages(degree: u32) -> Arc<Pages> {
    let layout = Layout::full(4, 4, 64, DataType::Bf16, (4, 4), 16).unwrap();
    let heads = 4 / degree;
    let slice =
        Slice { group: 0, first_layer: 0, layers: 4, first_head: 4 - heads, heads, pages: 8, page_rows: 16 };
    let tensor = 8 * 16 * u64::from(heads) * 128;
    let vector = |at: u64| Vector {
        base: (1 << 40) + at * tensor,
        page_stride: 16 * i64::from(heads) * 128,
        head_stride: 128,
        token_stride: i64::from(heads) * 128,
    };
    let range = 1 << 40..(1 << 40) + 8 * tensor;
    let pages = Pages::new(&layout, slice, (0..8).map(vector).collect(), std::slice::from_ref(&range));
    Arc::new(pages.unwrap())
}

/// Where the first item of an order is in pinned memory; the next one is a megabyte further.
const PINNED: Address = 1 << 50;
/// The same in HBM.
const KEPT: Address = 1 << 48;

#[derive(Debug, Clone, Copy)]
struct Wish {
    token: u64,
    line: u64,
    direction: Direction,
    items: u64,
    degree: u32,
    pinned: bool,
    kept: bool,
}

impl Wish {
    fn load(token: u64, items: u64) -> Self {
        let direction = Direction::Load;
        Self { token, line: token, direction, items, degree: 1, pinned: true, kept: false }
    }

    fn store(token: u64, items: u64) -> Self {
        Self { direction: Direction::Store, ..Self::load(token, items) }
    }

    fn admitted(self, fence: Option<Fence>) -> Admitted {
        let pages = pages(self.degree);
        let parts = pages.parts(0..4).count() as u32;
        let load = self.direction == Direction::Load;
        let item = |at: u64| Item {
            host: None,
            kept: self.kept.then_some(KEPT + (at << 20)),
            rows: (0..16).map(|row| (at % 8) << 32 | row).collect(),
            checksums: (load && self.pinned).then(|| (0..parts).collect()),
        };
        let hosts = (0..self.items).map(|at| Ok(self.pinned.then_some(PINNED + (at << 20))));
        let order = Order {
            token: self.token,
            line: self.line,
            direction: self.direction,
            layers: 0..4,
            items: (0..self.items).map(item).collect(),
            checksums_wanted: !load,
            fence,
            pages,
        };
        Admitted { order, hosts: hosts.collect::<Vec<Result<_, Miss>>>(), kernels: true }
    }
}

/// Numbers that are the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        crate::media::fault::splitmix64(&mut self.0) % bound
    }
}
