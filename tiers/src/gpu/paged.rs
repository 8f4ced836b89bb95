//! One group's slice of an engine's paged memory on a device, as plain numbers: what a kernel may be told to touch.
//!
//! Owns the bounds of everything that is launched or copied for an engine. Invariants: every byte of every row, of all pages, heads and vectors, lies in one of the ranges that
//! the engine handed over, and no two rows of a vector share one; a slice is whole parts (proto/FORMAT.md, section 3); no number overflows; a row table that passed `check_rows`
//! names rows that there are.
//! Leaves to others: who may use the memory when, whether the ranges are the engine's (whoever opens its handles), what moves (`transfer`).

use super::{Address, Cells, Piece, Vector, work::NO_PAGE};
use kvd_proto::{Error, Group, GroupKind, Layout};
use std::ops::Range;

/// Vectors of a memory, all layers: 32 bytes each travel with every launch. At the limit: the memory is refused.
pub const VECTORS_MAX: usize = 2048;
/// Pages of a memory: what engines' tables of `i32` can name. At the limit: the memory is refused.
pub const PAGES_MAX: u32 = i32::MAX as u32;
/// Rows of one page. At the limit: the memory is refused.
pub const PAGE_ROWS_MAX: u32 = 65_536;
/// Ranges of addresses that one engine hands over for one memory. At the limit: the memory is refused.
pub const RANGES_MAX: usize = 4096;
const _: () = assert!(RANGES_MAX <= u16::MAX as usize);
/// The widest that a kernel copies at once.
const UNIT_BYTES_MAX: u64 = 16;

/// Which slice of a group a memory has, and how it is cut into pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// Group of the layout.
    pub group: usize,
    /// The first layer, counted in the group.
    pub first_layer: u32,
    /// How many.
    pub layers: u32,
    /// The first head, counted in the group.
    pub first_head: u32,
    /// How many.
    pub heads: u32,
    /// Pages there are.
    pub pages: u32,
    /// Tokens of a page; 1 for states.
    pub page_rows: u32,
}

/// See the file's head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pages {
    slice: Slice,
    vectors: Vec<Vector>,
    /// In which of the ranges each vector is: no copy goes from one allocation into the next.
    homes: Vec<u16>,
    rows: u32,
    row_bytes: u64,
    vectors_per_layer: u32,
    part_layers: u32,
    part_heads: u32,
    head_ranges: u32,
    part_bytes: u32,
    part_stride: u32,
    slot_bytes: u32,
    unit_bytes: u64,
}

impl Pages {
    /// `vectors`: those of the first layer, those of the second, and so on. `ranges`: what the engine handed over, on this device.
    pub fn new(
        layout: &Layout,
        slice: Slice,
        vectors: Vec<Vector>,
        ranges: &[Range<Address>],
    ) -> Result<Self, Error> {
        let Some(group) = layout.groups().get(slice.group) else {
            let what = format!("{} of {} groups", slice.group, layout.groups().len());
            return Err(Error::invalid("group", what, "count groups from 0, in the layout's order"));
        };
        let of = |first: u32, count: u32| first..first.saturating_add(count);
        let (layers, heads) = (of(slice.first_layer, slice.layers), of(slice.first_head, slice.heads));
        let cut = kvd_proto::Slice::new(group, layers, heads)?;
        let (state, part) = (group.kind == GroupKind::State, layout.part(slice.group, 0));
        let mut made = Self {
            slice,
            vectors,
            homes: Vec::new(),
            rows: if state { 1 } else { layout.block_tokens() },
            row_bytes: row_bytes(group)?,
            vectors_per_layer: if state { 1 } else { group.vectors },
            part_layers: cut.part_layers,
            part_heads: cut.part_heads,
            head_ranges: cut.head_ranges,
            part_bytes: part.bytes,
            part_stride: layout.part_stride(slice.group),
            slot_bytes: layout.slot_bytes(slice.group),
            unit_bytes: 1,
        };
        made.check_counts(state, ranges.len())?;
        let vectors = 0..made.vectors.len();
        made.homes = vectors.map(|at| made.check_vector(at, ranges)).collect::<Result<_, _>>()?;
        made.forget_lone_strides();
        made.unit_bytes = made.widest_unit();
        Ok(made)
    }

    fn check_counts(&self, state: bool, ranges: usize) -> Result<(), Error> {
        let Slice { layers, pages, page_rows, .. } = self.slice;
        let expected = layers as usize * self.vectors_per_layer as usize;
        if self.vectors.len() != expected || expected > VECTORS_MAX {
            let what =
                format!("{} for {layers} layers of {} vectors", self.vectors.len(), self.vectors_per_layer);
            let fix =
                format!("give every vector of every layer, layer after layer, at most {VECTORS_MAX} of them");
            return Err(Error::invalid("vectors", what, fix));
        }
        let page_rows_max = if state { 1 } else { PAGE_ROWS_MAX };
        for (field, value, most) in [("pages", pages, PAGES_MAX), ("page_rows", page_rows, page_rows_max)] {
            if value == 0 || value > most {
                let fix = format!("give 1 to {most}: how many the engine has");
                return Err(Error::invalid(field, format!("{value}"), fix));
            }
        }
        if ranges == 0 || ranges > RANGES_MAX {
            let fix = format!("hand over the memory that the pages are in, as 1 to {RANGES_MAX} allocations");
            return Err(Error::invalid("ranges", format!("{ranges} ranges of addresses"), fix));
        }
        Ok(())
    }

    /// All that the vector's formula can give is within one range, which is told, and no two rows share a byte.
    fn check_vector(&self, at: usize, ranges: &[Range<Address>]) -> Result<u16, Error> {
        let vector = &self.vectors[at];
        if vector.base == 0 {
            let fix = "give the address of page 0, on this device";
            return Err(Error::invalid(format!("vectors[{at}].base"), "address 0", fix));
        }
        let axes = self.axes(vector);
        let start = i128::from(vector.base);
        let (mut from, mut to) = (start, start + i128::from(self.row_bytes));
        for (_, count, stride) in axes {
            let last = i128::from(stride) * i128::from(count - 1);
            from += last.min(0);
            to += last.max(0);
        }
        let holds = |range: &Range<Address>| i128::from(range.start) <= from && to <= i128::from(range.end);
        let Some(home) = ranges.iter().position(holds) else {
            let what = format!(
                "its rows reach from {from:#x} to {to:#x}, which is in none of the {} ranges handed over",
                ranges.len()
            );
            let fix = "give base and strides in bytes, the number of pages there are, and the whole allocation that they are in";
            return Err(Error::invalid(format!("vectors[{at}]"), what, fix));
        };
        check_apart(axes, self.row_bytes).map_err(|(name, what)| {
            let fix = "give byte strides of memory in which no two rows overlap";
            Error::invalid(format!("vectors[{at}].{name}"), what, fix)
        })?;
        Ok(home as u16)
    }

    /// Name, count and bytes from one to the next.
    fn axes(&self, vector: &Vector) -> [(&'static str, u32, i64); 3] {
        [
            ("token_stride", self.slice.page_rows, vector.token_stride),
            ("head_stride", self.slice.heads, vector.head_stride),
            ("page_stride", self.slice.pages, vector.page_stride),
        ]
    }

    /// A stride from the only one to the next is never walked, and need not divide by anything.
    fn forget_lone_strides(&mut self) {
        let Slice { heads, pages, page_rows, .. } = self.slice;
        for vector in &mut self.vectors {
            let strides = [
                (page_rows, &mut vector.token_stride),
                (heads, &mut vector.head_stride),
                (pages, &mut vector.page_stride),
            ];
            strides.into_iter().filter(|(count, _)| *count == 1).for_each(|(_, stride)| *stride = 0);
        }
    }

    fn widest_unit(&self) -> u64 {
        let strides = |vector: &Vector| {
            let strides = [vector.token_stride, vector.head_stride, vector.page_stride];
            strides.iter().fold(vector.base, |all, stride| all | stride.unsigned_abs())
        };
        let all = self.vectors.iter().fold(self.row_bytes, |all, vector| all | strides(vector));
        UNIT_BYTES_MAX.min(1 << all.trailing_zeros().min(63))
    }

    /// Which slice it is.
    pub fn slice(&self) -> Slice {
        self.slice
    }

    /// Rows of a block in each cell: entries of a row table.
    pub fn rows(&self) -> u32 {
        self.rows
    }

    /// Where each vector lies, layer after layer, as a launch wants them.
    pub fn vectors(&self) -> &[Vector] {
        &self.vectors
    }

    /// Bytes of a part and of the zeros behind it.
    pub fn part_stride(&self) -> u32 {
        self.part_stride
    }

    /// Bytes of a slot, of which a slice is a share.
    pub fn slot_bytes(&self) -> u32 {
        self.slot_bytes
    }

    /// Bytes that a kernel copies at once.
    pub fn unit_bytes(&self) -> u64 {
        self.unit_bytes
    }

    /// Whether parts end with zeros.
    pub fn is_padded(&self) -> bool {
        self.part_bytes != self.part_stride
    }

    /// Parts of the slice in one layer range: one run of a slot, a **stripe**.
    pub fn stripe_parts(&self) -> u32 {
        self.slice.heads / self.part_heads
    }

    /// Bytes of a stripe.
    pub fn stripe_bytes(&self) -> u32 {
        self.stripe_parts() * self.part_stride
    }

    /// Whether one stripe ends where the next begins: the slice has all heads.
    pub fn is_whole(&self) -> bool {
        self.stripe_parts() == self.head_ranges
    }

    /// The layer ranges of these layers, counted in the slice; refused unless they are whole and there is one.
    pub fn stripes(&self, layers: &Range<u32>) -> Result<Range<u32>, Error> {
        let each = self.part_layers;
        let whole = layers.start.is_multiple_of(each) && layers.end.is_multiple_of(each);
        if layers.is_empty() || layers.end > self.slice.layers || !whole {
            let what = format!("{layers:?} of {} layers, in ranges of {each}", self.slice.layers);
            return Err(Error::invalid("layers", what, "give whole layer ranges, counted in the memory"));
        }
        Ok(layers.start / each..layers.end / each)
    }

    /// The layers of these stripes.
    pub fn layers_of(&self, stripes: &Range<u32>) -> Range<u32> {
        stripes.start * self.part_layers..stripes.end * self.part_layers
    }

    /// Where a stripe begins in a slot.
    pub fn stripe_offset(&self, stripe: u32) -> u32 {
        self.first_part(stripe) * self.part_stride
    }

    fn first_part(&self, stripe: u32) -> u32 {
        let layer_range = self.slice.first_layer / self.part_layers + stripe;
        layer_range * self.head_ranges + self.slice.first_head / self.part_heads
    }

    /// Bytes of a slot from the slice's first part in these layers to the end of its last; those of other slices between them are counted, too.
    pub fn span(&self, layers: Range<u32>) -> Range<u32> {
        let stripes = self.stripes(&layers).expect("whole layer ranges");
        self.stripe_offset(stripes.start)..self.stripe_offset(stripes.end - 1) + self.stripe_bytes()
    }

    /// The slice's parts in these layers, in the order of a slot.
    pub fn parts(&self, layers: Range<u32>) -> impl Iterator<Item = u16> + '_ {
        let stripes = self.stripes(&layers).expect("whole layer ranges");
        stripes.flat_map(|stripe| {
            let first = self.first_part(stripe);
            (first..first + self.stripe_parts()).map(|part| part as u16)
        })
    }

    /// Whether a row table is one of this memory, so that nothing beyond its pages is touched.
    pub fn check_rows(&self, rows: &[u64]) -> Result<(), Error> {
        if rows.len() != self.rows as usize {
            let what = format!("{} entries for blocks of {} rows", rows.len(), self.rows);
            return Err(Error::invalid("rows", what, "give an entry for every row of the block"));
        }
        let Slice { pages, page_rows, .. } = self.slice;
        let is_there = |row: &u64| *row == NO_PAGE || (page_of(*row) < pages && row_of(*row) < page_rows);
        let Some(at) = rows.iter().position(|row| !is_there(row)) else { return Ok(()) };
        let (page, row) = (page_of(rows[at]), row_of(rows[at]));
        let what = format!("page {page}, row {row} of {pages} pages of {page_rows}");
        let fix = "give pages of the memory that was registered";
        Err(Error::invalid(format!("rows[{at}]"), what, fix))
    }

    /// The arguments of a launch over these layers; the tables' addresses are the device's.
    pub fn cells(&self, layers: &Range<u32>, blocks: u64, tables: CellTables) -> Cells {
        assert!(!layers.is_empty() && layers.end <= self.slice.layers, "{layers:?} of {:?}", self.slice);
        Cells {
            slots: tables.slots,
            row_table: tables.rows,
            vectors: tables.vectors,
            blocks,
            rows: u64::from(self.rows),
            row_bytes: self.row_bytes,
            vectors_per_layer: u64::from(self.vectors_per_layer),
            first_layer: u64::from(layers.start),
            layers: u64::from(layers.end - layers.start),
            heads: u64::from(self.slice.heads),
            slice_first_layer: u64::from(self.slice.first_layer),
            slice_first_head: u64::from(self.slice.first_head),
            part_layers: u64::from(self.part_layers),
            part_heads: u64::from(self.part_heads),
            head_ranges: u64::from(self.head_ranges),
            part_bytes: u64::from(self.part_bytes),
            part_stride: u64::from(self.part_stride),
            unit_bytes: self.unit_bytes,
        }
    }

    /// The shortest run, of a block that begins with a page or divides one, that is contiguous in the pages and in the slot: what a batched copy would have to be worth.
    pub fn piece_bytes(&self) -> u64 {
        let Slice { page_rows, .. } = self.slice;
        let rows_touch = self.vectors.iter().all(|vector| vector.token_stride as u64 == self.row_bytes);
        let rows = if page_rows > 1 && rows_touch { common_divisor(self.rows, page_rows) } else { 1 };
        let mut bytes = u64::from(rows) * self.row_bytes;
        if rows != self.rows {
            return bytes;
        }
        let (each, part) = (self.vectors_per_layer as usize, self.part_layers as usize);
        if !self.vectors.chunks(each).all(|layer| are_steps(layer.iter(), bytes)) {
            return bytes;
        }
        bytes *= u64::from(self.vectors_per_layer);
        if !self.vectors.chunks(each * part).all(|part| are_steps(part.iter().step_by(each), bytes)) {
            return bytes;
        }
        bytes *= u64::from(self.part_layers);
        let heads_touch = self.vectors.iter().all(|vector| vector.head_stride as u64 == bytes);
        if self.part_heads > 1 && heads_touch { bytes * u64::from(self.part_heads) } else { bytes }
    }

    /// The copies from a block's slot to its pages, in these layers; runs that go on in both are one. The rows passed `check_rows`.
    pub fn pieces(&self, layers: &Range<u32>, rows: &[u64], slot: Address, pieces: &mut Vec<Piece>) {
        let spans = self.row_spans(rows);
        let cell_bytes = u64::from(self.rows) * self.row_bytes;
        let (part_layers, part_heads) = (self.part_layers, self.part_heads);
        let (mut home, mut first) = (None, pieces.len());
        for stripe in layers.start / part_layers..layers.end / part_layers {
            let mut cell = slot.wrapping_add(u64::from(self.stripe_offset(stripe)));
            for head in 0..self.slice.heads {
                if head > 0 && head.is_multiple_of(part_heads) {
                    cell += u64::from(self.part_stride - self.part_bytes);
                }
                let layers = stripe * part_layers..(stripe + 1) * part_layers;
                let vectors = layers.start * self.vectors_per_layer..layers.end * self.vectors_per_layer;
                for at in vectors.start as usize..vectors.end as usize {
                    let vector = &self.vectors[at];
                    if home.replace(self.homes[at]) != Some(self.homes[at]) {
                        first = pieces.len();
                    }
                    for span in &spans {
                        let from = cell + u64::from(span.row) * self.row_bytes;
                        let bytes = u64::from(span.rows) * self.row_bytes;
                        push(pieces, first, Piece { from, to: address(vector, head, span), bytes });
                    }
                    cell += cell_bytes;
                }
            }
        }
    }

    /// Rows of a block that lie one behind the other.
    fn row_spans(&self, rows: &[u64]) -> Vec<RowSpan> {
        let touch = self.vectors.iter().all(|vector| vector.token_stride as u64 == self.row_bytes);
        let mut spans: Vec<RowSpan> = Vec::new();
        for (row, place) in rows.iter().enumerate().filter(|(_, place)| **place != NO_PAGE) {
            let (row, page, page_row) = (row as u32, page_of(*place), row_of(*place));
            let goes_on = |last: &&mut RowSpan| {
                let next = (last.row + last.rows, last.page, last.page_row + last.rows);
                touch && next == (row, page, page_row)
            };
            match spans.last_mut().filter(goes_on) {
                Some(last) => last.rows += 1,
                None => spans.push(RowSpan { row, page, page_row, rows: 1 }),
            }
        }
        spans
    }
}

/// Where the tables of a launch lie on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CellTables {
    /// Of slots.
    pub slots: Address,
    /// Of rows.
    pub rows: Address,
    /// Of all vectors of the memory.
    pub vectors: Address,
}

fn page_of(place: u64) -> u32 {
    (place >> 32) as u32
}

fn row_of(place: u64) -> u32 {
    place as u32
}

/// Rows of one page that follow each other in the block and in the page.
struct RowSpan {
    row: u32,
    page: u32,
    page_row: u32,
    rows: u32,
}

fn address(vector: &Vector, head: u32, span: &RowSpan) -> Address {
    let offset = i64::from(span.page)
        .wrapping_mul(vector.page_stride)
        .wrapping_add(i64::from(head).wrapping_mul(vector.head_stride))
        .wrapping_add(i64::from(span.page_row).wrapping_mul(vector.token_stride));
    vector.base.wrapping_add_signed(offset)
}

/// One more piece, or a longer one of those from `first` on.
fn push(pieces: &mut Vec<Piece>, first: usize, next: Piece) {
    let last = pieces[first..].last_mut();
    match last.filter(|last| last.from + last.bytes == next.from && last.to + last.bytes == next.to) {
        Some(last) => last.bytes += next.bytes,
        None => pieces.push(next),
    }
}

/// Whether each lies `bytes` behind the one before, in every page, head and row.
fn are_steps<'a>(vectors: impl Iterator<Item = &'a Vector> + Clone, bytes: u64) -> bool {
    vectors.clone().zip(vectors.skip(1)).all(|(before, next)| {
        next.base.checked_sub(before.base) == Some(bytes)
            && Vector { base: 0, ..*before } == Vector { base: 0, ..*next }
    })
}

fn common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

/// Bytes of one row of a cell.
fn row_bytes(group: &Group) -> Result<u64, Error> {
    if group.kind == GroupKind::State {
        return Ok(u64::from(group.state_bytes));
    }
    let bits = u64::from(group.head_size) * group.element.bits();
    if !bits.is_multiple_of(8) {
        let what =
            format!("{} numbers of {} bits are not whole bytes", group.head_size, group.element.bits());
        return Err(Error::invalid("head_size", what, "store such vectors by whole slots"));
    }
    Ok(bits / 8)
}

/// From the innermost out, each stride clears all that it steps over; else which does not, and how.
fn check_apart(axes: [(&'static str, u32, i64); 3], row_bytes: u64) -> Result<(), (&'static str, String)> {
    let mut axes = axes;
    axes.sort_by_key(|(_, _, stride)| stride.unsigned_abs());
    let mut extent = u128::from(row_bytes);
    for (name, count, stride) in axes.into_iter().filter(|(_, count, _)| *count > 1) {
        let step = u128::from(stride.unsigned_abs());
        if step < extent {
            return Err((name, format!("{stride} bytes, and it steps over {extent}")));
        }
        extent += step * u128::from(count - 1);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
