//! Paged memory against a reference that indexes every byte by itself: any order of pages, heads, tokens, vectors and numbers, any slice, any page table.

mod tensor;

use kvd_client::{LayerMemory, PagedMemory, PagedShape, VectorMemory};
use kvd_proto::layout::{DataType, Element, Group, GroupKind};
use kvd_proto::{Code, Layout};
use proptest::prelude::*;
use tensor::{Numbers, Style, Tensor};

/// One rank's pages, and the same described to the client.
struct Rank {
    shape: PagedShape,
    tensors: Vec<Tensor>,
    paged: PagedMemory,
}

impl Rank {
    fn new(layout: &Layout, shape: PagedShape, layers: u32, style: &Style) -> Self {
        let group = &layout.groups()[0];
        let tokens = if group.kind == GroupKind::State { 1 } else { shape.page_tokens };
        let counts = [shape.pages, shape.heads, tokens, vectors(group)];
        let mut tensors: Vec<_> = (0..layers).map(|_| Tensor::new(counts, numbers(group), style)).collect();
        let memory = tensors.iter_mut().map(Tensor::layer_memory).collect();
        // SAFETY: the tensors have these counts and strides, live as long, and are touched by one thread.
        let paged = unsafe { PagedMemory::new(layout, shape, memory).unwrap() };
        Self { shape, tensors, paged }
    }

    /// Every byte that these tokens have in the pages: (tensor, place, value).
    fn bytes_of(
        &self,
        group: &Group,
        tokens: std::ops::Range<u32>,
        table: &[i32],
    ) -> Vec<(usize, usize, u8)> {
        let mut found = Vec::new();
        for token in tokens {
            let Ok(page) = u32::try_from(table[(token / self.shape.page_tokens) as usize]) else { continue };
            let in_page = if group.kind == GroupKind::State { 0 } else { token % self.shape.page_tokens };
            for (layer, tensor) in self.tensors.iter().enumerate() {
                for (head, vector) in
                    (0..self.shape.heads).flat_map(|head| (0..vectors(group)).map(move |v| (head, v)))
                {
                    let index = [page, head, in_page, vector];
                    let cell =
                        [self.shape.first_layer + layer as u32, self.shape.first_head + head, vector, token];
                    found.extend(
                        (0..row_bytes(group)).map(|byte| (layer, tensor.at(index, byte), value(cell, byte))),
                    );
                }
            }
        }
        found
    }

    fn fill(&mut self, group: &Group, tokens: std::ops::Range<u32>, table: &[i32]) {
        for (layer, at, byte) in self.bytes_of(group, tokens, table) {
            self.tensors[layer].bytes[at] = byte;
        }
    }

    fn contents(&self) -> Vec<Vec<u8>> {
        self.tensors.iter().map(|tensor| tensor.bytes.clone()).collect()
    }
}

fn vectors(group: &Group) -> u32 {
    if group.kind == GroupKind::State { 1 } else { group.vectors }
}

fn row_bytes(group: &Group) -> usize {
    match group.kind {
        GroupKind::State => group.state_bytes as usize,
        _ => (u64::from(group.head_size) * group.element.bits() / 8) as usize,
    }
}

fn numbers(group: &Group) -> Numbers {
    let (row_bytes, bits) = (row_bytes(group), group.element.bits() as usize);
    if group.kind == GroupKind::State || bits < 8 {
        return Numbers { count: 1, bytes: row_bytes, may_be_apart: false };
    }
    Numbers { count: row_bytes * 8 / bits, bytes: bits / 8, may_be_apart: true }
}

/// What the model computed: one byte of a vector, by layer, head, vector and token.
fn value(cell: [u32; 4], byte: usize) -> u8 {
    let mixed = cell
        .iter()
        .fold(byte as u32 + 1, |mixed, word| (mixed ^ word).wrapping_mul(0x9E37_79B1).rotate_left(13));
    (mixed >> 24) as u8
}

/// The slot of a block as FORMAT.md says it: parts by layer range and head range; in a part head, layer, vector, token.
fn canonical(layout: &Layout, block: u32, tokens: u32) -> Vec<u8> {
    let group = &layout.groups()[0];
    let first = block * layout.block_tokens();
    let (layers, heads) = (group.layers / group.layer_ranges, group.heads / group.head_ranges);
    let state = [tokens - 1];
    let all: Vec<u32> = (0..layout.block_tokens()).collect();
    let in_block: &[u32] = if group.kind == GroupKind::State { &state } else { &all };
    let mut slot = Vec::new();
    for part in layout.parts(0) {
        let (layer0, head0) = (
            u32::from(part.index) / group.head_ranges * layers,
            u32::from(part.index) % group.head_ranges * heads,
        );
        slot.resize(part.offset as usize, 0);
        for head in head0..head0 + heads {
            for layer in layer0..layer0 + layers {
                for (vector, token) in (0..vectors(group)).flat_map(|v| in_block.iter().map(move |t| (v, *t)))
                {
                    let row = |byte| {
                        if token < tokens { value([layer, head, vector, first + token], byte) } else { 0 }
                    };
                    slot.extend((0..row_bytes(group)).map(row));
                }
            }
        }
    }
    slot.resize(layout.slot_bytes(0) as usize, 0);
    slot
}

/// Choices drawn by proptest.
#[derive(Debug, Clone)]
struct Picks {
    drawn: Vec<u32>,
    at: usize,
}

impl Picks {
    fn below(&mut self, count: u32) -> u32 {
        self.at += 1;
        self.drawn[(self.at - 1) % self.drawn.len()] % count
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u32) as usize]
    }

    fn shuffled(&mut self, axes: &[usize]) -> Vec<usize> {
        let mut left = axes.to_vec();
        axes.iter().map(|_| left.swap_remove(self.below(left.len() as u32) as usize)).collect()
    }

    fn divisor(&mut self, of: u32) -> u32 {
        let divisors: Vec<u32> = (1..=of).filter(|at| of.is_multiple_of(*at)).collect();
        self.of(&divisors)
    }

    /// The pages of a request, in no order; some of them negative.
    fn table(&mut self, entries: u32, pages: u32, with_negatives: bool) -> Vec<i32> {
        let mut free: Vec<i32> = (0..pages as i32).collect();
        let in_order = self.below(3) == 0;
        let mut next = || {
            let at = if in_order { 0 } else { self.below(free.len() as u32) as usize };
            let page = free.remove(at);
            if with_negatives && self.below(4) == 0 { -1 } else { page }
        };
        (0..entries).map(|_| next()).collect()
    }
}

fn picks() -> impl Strategy<Value = Picks> {
    proptest::collection::vec(any::<u32>(), 128).prop_map(|drawn| Picks { drawn, at: 0 })
}

fn any_layout(pick: &mut Picks) -> Layout {
    let kind =
        pick.of(&[GroupKind::Full, GroupKind::Window, GroupKind::Latent, GroupKind::Draft, GroupKind::State]);
    let (layers, heads) =
        (1 + pick.below(4), if kind == GroupKind::Latent { 1 } else { pick.of(&[1, 2, 3, 4]) });
    let dtype = pick.of(&[DataType::Bf16, DataType::I8, DataType::F4E2m1, DataType::F32]);
    let group = Group {
        kind,
        window_tokens: u32::from(kind == GroupKind::Window) * 5,
        layers,
        heads,
        head_size: pick.of(&[2, 6, 16, 18, 32, 64, 128]),
        vectors: if kind == GroupKind::Latent { 1 } else { pick.of(&[2, 2, 3]) },
        element: Element::plain(dtype),
        layer_ranges: pick.divisor(layers),
        head_ranges: pick.divisor(heads),
        state_bytes: u32::from(kind == GroupKind::State) * pick.of(&[1, 64, 300]),
    };
    Layout::new(vec![group], pick.of(&[1, 2, 4, 6, 8, 16, 24])).unwrap()
}

fn any_page_tokens(pick: &mut Picks, block_tokens: u32) -> u32 {
    if pick.below(2) == 0 { pick.divisor(block_tokens) } else { block_tokens * (1 + pick.below(3)) }
}

/// A slice of whole parts: all of it, or one of `degree` along heads and `stages` along layers.
fn slice(
    layout: &Layout,
    page_tokens: u32,
    pages: u32,
    rank: (u32, u32),
    degrees: (u32, u32),
) -> (PagedShape, u32) {
    let group = &layout.groups()[0];
    let (layers, heads) = (group.layers / degrees.0, group.heads / degrees.1);
    let shape = PagedShape {
        group: 0,
        first_layer: rank.0 * layers,
        first_head: rank.1 * heads,
        heads,
        page_tokens,
        pages,
    };
    (shape, layers)
}

fn gather_all(rank: &Rank, layout: &Layout, block: u32, tokens: u32, slot: &mut [u8], table: &[i32]) {
    let stride = layout.part_stride(0) as usize;
    for part in rank.paged.parts() {
        let at = layout.part(0, part).offset as usize;
        rank.paged.gather(block, part, tokens, &mut slot[at..at + stride], table).unwrap();
    }
}

fn scatter_all(rank: &Rank, layout: &Layout, block: u32, tokens: u32, slot: &[u8], table: &[i32]) {
    for part in rank.paged.parts() {
        let at = layout.part(0, part).offset as usize;
        rank.paged.scatter(block, part, tokens, &slot[at..], table).unwrap();
    }
}

fn ranks(layout: &Layout, page_tokens: u32, pages: u32, degrees: (u32, u32), style: &Style) -> Vec<Rank> {
    let of = |rank| {
        let (shape, layers) = slice(layout, page_tokens, pages, rank, degrees);
        Rank::new(layout, shape, layers, style)
    };
    (0..degrees.0).flat_map(|stage| (0..degrees.1).map(move |head| (stage, head))).map(of).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn stores_every_byte_where_the_format_has_it(mut pick in picks()) {
        let layout = any_layout(&mut pick);
        let group = &layout.groups()[0];
        let degrees = (pick.divisor(group.layer_ranges), pick.divisor(group.head_ranges));
        let page_tokens = any_page_tokens(&mut pick, layout.block_tokens());
        let (block, style) = (pick.below(3), Style::any(&mut pick));
        let tokens = if pick.below(3) == 0 { 1 + pick.below(layout.block_tokens()) } else { layout.block_tokens() };
        let entries = ((block + 1) * layout.block_tokens()).div_ceil(page_tokens);
        let table = pick.table(entries, entries + 2, false);

        let mut slot = vec![0x55; layout.slot_bytes(0) as usize]; // an earlier block's
        let first = block * layout.block_tokens();
        for mut rank in ranks(&layout, page_tokens, entries + 2, degrees, &style) {
            let owned = if group.kind == GroupKind::State { first + tokens - 1..first + tokens } else { first..first + tokens };
            rank.fill(group, owned, &table);
            let before = rank.contents();
            gather_all(&rank, &layout, block, tokens, &mut slot, &table);
            prop_assert_eq!(before, rank.contents(), "a store writes no page");
        }
        prop_assert!(slot == canonical(&layout, block, tokens), "{:?} {:?}", layout, style);
    }

    #[test]
    fn loads_the_wanted_tokens_and_touches_nothing_else(mut pick in picks()) {
        let layout = any_layout(&mut pick);
        let group = &layout.groups()[0];
        let degrees = (pick.divisor(group.layer_ranges), pick.divisor(group.head_ranges));
        let page_tokens = any_page_tokens(&mut pick, layout.block_tokens());
        let (block, style) = (pick.below(3), Style::any(&mut pick));
        let tokens = if pick.below(3) == 0 { 1 + pick.below(layout.block_tokens()) } else { layout.block_tokens() };
        let entries = ((block + 1) * layout.block_tokens()).div_ceil(page_tokens);
        let table = pick.table(entries, entries + 2, true);

        let slot = canonical(&layout, block, tokens);
        let first = block * layout.block_tokens();
        for rank in ranks(&layout, page_tokens, entries + 2, degrees, &style) {
            let wanted = if group.kind == GroupKind::State { first + tokens - 1..first + tokens } else { first..first + tokens };
            let mut expected = rank.contents();
            for (layer, at, byte) in rank.bytes_of(group, wanted, &table) {
                expected[layer][at] = byte;
            }
            scatter_all(&rank, &layout, block, tokens, &slot, &table);
            prop_assert!(expected == rank.contents(), "{:?} {:?} {:?} {:?}", layout, rank.shape, style, table);
        }
    }
}

/// Stored by one degree, loaded by another, page by page, and stored again: the same slot.
fn travels(layout: &Layout, from: (u32, u32), to: (u32, u32), styles: [&Style; 2], page_tokens: [u32; 2]) {
    let group = &layout.groups()[0];
    let (blocks, tokens) = (3, layout.block_tokens());
    let entries = |page_tokens: u32| (blocks * tokens).div_ceil(page_tokens);
    let table = |page_tokens: u32| (0..entries(page_tokens) as i32).rev().collect::<Vec<_>>();
    let tables = page_tokens.map(table);
    let mut stored = ranks(layout, page_tokens[0], entries(page_tokens[0]), from, styles[0]);
    let loaded = ranks(layout, page_tokens[1], entries(page_tokens[1]), to, styles[1]);
    stored.iter_mut().for_each(|rank| rank.fill(group, 0..blocks * tokens, &tables[0]));
    for block in 0..blocks {
        let (mut slot, mut back) =
            (vec![0x55; layout.slot_bytes(0) as usize], vec![0x66; layout.slot_bytes(0) as usize]);
        stored.iter().for_each(|rank| gather_all(rank, layout, block, tokens, &mut slot, &tables[0]));
        loaded.iter().for_each(|rank| scatter_all(rank, layout, block, tokens, &slot, &tables[1]));
        loaded.iter().for_each(|rank| gather_all(rank, layout, block, tokens, &mut back, &tables[1]));
        assert!(
            slot == canonical(layout, block, tokens) && slot == back,
            "block {block}: {from:?} to {to:?}"
        );
    }
    for rank in &loaded {
        for (layer, at, byte) in rank.bytes_of(group, 0..blocks * tokens, &tables[1]) {
            assert_eq!(rank.tensors[layer].bytes[at], byte, "layer {layer} at {at}");
        }
    }
}

#[test]
fn one_rank_stores_and_two_and_four_load() {
    let layout = Layout::full(4, 8, 32, DataType::Bf16, (2, 8), 16).unwrap();
    for (to, style) in [
        ((1, 2), &Style::nhd()),
        ((1, 4), &Style::hnd()),
        ((1, 8), &Style::packed()),
        ((2, 4), &Style::nhd()),
    ] {
        travels(&layout, (1, 1), to, [&Style::packed(), style], [16, 16]);
        travels(&layout, to, (1, 1), [style, &Style::hnd()], [8, 32]);
    }
}

#[test]
fn stages_of_a_pipeline_and_windows_are_slices_too() {
    let full = Layout::full(8, 2, 16, DataType::Bf16, (4, 2), 8).unwrap();
    let window = Group { kind: GroupKind::Window, window_tokens: 100, ..full.groups()[0].clone() };
    for layout in [full, Layout::new(vec![window], 8).unwrap()] {
        travels(&layout, (1, 1), (4, 1), [&Style::nhd(), &Style::packed()], [8, 4]);
        travels(&layout, (2, 1), (4, 2), [&Style::hnd(), &Style::nhd()], [16, 8]);
    }
}

#[test]
fn pages_of_32_and_64_tokens_share_blocks_wherever_their_numbers_lie() {
    for dtype in [DataType::I8, DataType::Bf16, DataType::F32] {
        let layout = Layout::full(2, 4, 64, dtype, (1, 2), 32).unwrap();
        let engines = [Style::keys_transposed(), Style::transposed(), Style::nhd()];
        for from in &engines {
            for to in &engines {
                travels(&layout, (1, 1), (1, 2), [from, to], [32, 64]);
                travels(&layout, (1, 2), (1, 1), [from, to], [64, 16]);
            }
        }
    }
}

fn refused(layout: &Layout, shape: PagedShape, layers: usize, layer: &LayerMemory) -> kvd_proto::Error {
    // SAFETY: refused, and so never accessed.
    let error = unsafe { PagedMemory::new(layout, shape, vec![layer.clone(); layers]) }.expect_err("refused");
    assert_eq!(error.code, Code::Invalid);
    error
}

fn vector(address: usize, token_stride: isize, element_stride: Option<isize>) -> VectorMemory {
    VectorMemory { base: std::ptr::without_provenance_mut(address), token_stride, element_stride }
}

fn even([page_stride, head_stride, token_stride, vector_stride]: [isize; 4]) -> LayerMemory {
    let vectors = vector(64, token_stride, None).every(vector_stride, 2);
    LayerMemory { page_stride, head_stride, vectors }
}

#[test]
fn a_slice_that_cuts_parts_is_refused_and_says_where() {
    let layout = Layout::full(8, 8, 16, DataType::Bf16, (4, 2), 16).unwrap();
    let good = PagedShape { group: 0, first_layer: 0, first_head: 0, heads: 8, page_tokens: 16, pages: 4 };
    let strides = &even([8192, 1024, 64, 32]);
    let slices = [
        ("group", PagedShape { group: 1, ..good }, 8),
        ("first_head", PagedShape { first_head: 2, heads: 4, ..good }, 8),
        ("heads", PagedShape { heads: 3, ..good }, 8),
        ("heads", PagedShape { heads: 9, ..good }, 8),
        ("heads", PagedShape { first_head: u32::MAX, ..good }, 8),
        ("first_layer", PagedShape { first_layer: 1, ..good }, 2),
        ("layers", good, 3),
        ("layers", good, 0),
        ("page_tokens", PagedShape { page_tokens: 12, ..good }, 8),
        ("page_tokens", PagedShape { page_tokens: 0, ..good }, 8),
        ("pages", PagedShape { pages: 0, ..good }, 8),
    ];
    for (field, shape, layers) in slices {
        assert_eq!(refused(&layout, shape, layers, strides).field, field);
    }
    let error = refused(&layout, PagedShape { first_head: 2, heads: 4, ..good }, 8, strides);
    assert!(error.to_string().contains("edge at 2, and parts have 4 each"), "{error}");
}

#[test]
fn strides_that_let_vectors_overlap_are_refused() {
    let layout = Layout::full(1, 8, 16, DataType::Bf16, (1, 2), 16).unwrap();
    let shape = PagedShape { group: 0, first_layer: 0, first_head: 0, heads: 8, page_tokens: 16, pages: 4 };
    let overlapping = [
        ("page_stride", [0, 1024, 64, 32]),
        ("page_stride", [8191, 1024, 64, 32]),
        ("head_stride", [8192, -1023, 64, 32]),
        ("token_stride", [8192, 1024, 63, 32]),
        ("vector_stride", [8192, 1024, 64, 31]),
        ("span", [isize::MAX, 1024, 64, 32]),
    ];
    for (name, strides) in overlapping {
        let error = refused(&layout, shape, 1, &even(strides));
        assert!(error.field == "layers[0]" && error.message.contains(name), "{error}");
    }
}

/// Pages of 16 tokens, heads of 16 numbers of 2 bytes: K and V have 512 bytes each in a head.
#[test]
fn vectors_that_lie_differently_may_not_overlap_either() {
    let layout = Layout::full(1, 8, 16, DataType::Bf16, (1, 2), 16).unwrap();
    let shape = PagedShape { group: 0, first_layer: 0, first_head: 0, heads: 8, page_tokens: 16, pages: 4 };
    let layer =
        |page_stride, head_stride, k, v| LayerMemory { page_stride, head_stride, vectors: vec![k, v] };
    let (k, v) = (vector(4096, 2, Some(32)), vector(4096 + 512, 32, Some(2)));
    let fits = |layer| {
        // SAFETY: never accessed.
        unsafe { PagedMemory::new(&layout, shape, vec![layer]) }.is_ok()
    };
    assert!(fits(layer(8192, 1024, k, v)), "V behind K in each head");
    assert!(fits(layer(8192, 512, k, vector(4096 + 4096, 32, None))), "in each page");
    assert!(fits(layer(4096, 512, k, vector(1 << 20, 32, None))), "in another tensor");
    let backwards = vector(4096 + 512 - 32, 2, Some(-32));
    assert!(fits(layer(-8192, 1024, backwards, v)));

    let overlapping = [
        ("element_stride", layer(8192, 1024, vector(4096, 2, Some(31)), v)),
        ("token_stride", layer(8192, 1024, vector(4096, 1, Some(32)), v)),
        ("element_stride", layer(8192, 1024, vector(4096, 32, Some(1)), v)),
        ("vectors 0 and 1", layer(8192, 1024, k, vector(4096 + 511, 32, None))),
        ("vectors 0 and 1", layer(8192, 1024, backwards, vector(4096 + 511, 32, None))),
        ("vectors 0 and 1", layer(8192, 1023, k, v)),
        ("vectors 0 and 1", layer(8191, 1024, k, v)),
        ("vectors 0 and 1", layer(8192, 512, k, v)),
        ("vectors 0 and 1", layer(4096, 512, k, vector(4096 + 3 * 4096, 32, None))),
        ("address 0", layer(8192, 1024, vector(0, 2, Some(32)), v)),
        (
            "1 vectors, and the group has 2",
            LayerMemory { page_stride: 8192, head_stride: 1024, vectors: vec![k] },
        ),
    ];
    for (name, layer) in overlapping {
        let error = refused(&layout, shape, 1, &layer);
        assert!(error.field == "layers[0]" && error.message.contains(name), "{name}: {error}");
    }
}

#[test]
fn what_has_no_whole_numbers_cannot_have_them_apart() {
    let halves = Layout::full(1, 1, 32, DataType::F4E2m1, (1, 1), 16).unwrap();
    let state = Group { kind: GroupKind::State, state_bytes: 16, ..halves.groups()[0].clone() };
    let shape = PagedShape { group: 0, first_layer: 0, first_head: 0, heads: 1, page_tokens: 16, pages: 4 };
    for (layout, vectors) in [(&halves, 2), (&Layout::new(vec![state], 16).unwrap(), 1)] {
        let vectors = vector(64, 1, Some(16)).every(256, vectors);
        let error = refused(layout, shape, 1, &LayerMemory { page_stride: 512, head_stride: 512, vectors });
        assert!(error.field == "layers[0]" && error.message.contains("element_stride"), "{error}");
    }
}

#[test]
fn nothing_moves_for_a_table_that_is_wrong() {
    let layout = Layout::full(2, 2, 8, DataType::Bf16, (1, 2), 4).unwrap();
    let shape = PagedShape { group: 0, first_layer: 0, first_head: 0, heads: 1, page_tokens: 2, pages: 4 };
    let rank = Rank::new(&layout, shape, 2, &Style::hnd());
    let mut bytes = vec![7; 4096];
    let before = rank.contents();
    let field = |block, part, tokens, bytes: &[u8], table: &[i32]| {
        rank.paged.scatter(block, part, tokens, bytes, table).unwrap_err().field
    };
    assert_eq!(field(0, 0, 4, &bytes, &[0, 4]), "table", "a page that there is not");
    assert_eq!(field(0, 0, 4, &bytes, &[0]), "table", "too short");
    assert_eq!(field(u32::MAX, 0, 4, &bytes, &[0]), "table", "far too short");
    assert_eq!(field(0, 1, 4, &bytes, &[0, 1]), "part", "the other rank's");
    assert_eq!(field(0, 900, 4, &bytes, &[0, 1]), "part", "nobody's");
    assert_eq!(field(0, 0, 5, &bytes, &[0, 1]), "tokens");
    assert_eq!(field(0, 0, 0, &bytes, &[0, 1]), "tokens");
    assert_eq!(field(0, 0, 4, &bytes[..255], &[0, 1]), "bytes");
    assert_eq!(rank.contents(), before);

    let error = rank.paged.gather(0, 0, 4, &mut bytes, &[0, -1]).unwrap_err();
    assert!(error.message.contains("2 tokens of block 0"), "{error}");
    assert!(rank.paged.gather(0, 0, 4, &mut bytes[..4000], &[0, 1]).is_err());
    assert_eq!(bytes, [7; 4096], "nothing was written");
}

#[test]
fn vectors_of_half_bytes_are_refused() {
    let layout = Layout::full(1, 1, 3, DataType::F4E2m1, (1, 1), 16).unwrap();
    let shape = PagedShape { group: 0, first_layer: 0, first_head: 0, heads: 1, page_tokens: 16, pages: 4 };
    assert_eq!(refused(&layout, shape, 1, &even([64, 64, 4, 2])).field, "head_size");
}
