//! Bounds, numbers and pieces of described memory.

use super::*;
use kvd_proto::layout::DataType;

const BASE: Address = 0x10_0000;

/// 4 layers of 4 heads of 8 bf16 numbers, blocks of 16 tokens, cut into 2 layer ranges and 2 head ranges.
fn layout() -> Layout {
    Layout::full(4, 4, 8, DataType::Bf16, (2, 2), 16).unwrap()
}

fn all(pages: u32, page_rows: u32) -> Slice {
    Slice { group: 0, first_layer: 0, layers: 4, first_head: 0, heads: 4, pages, page_rows }
}

/// Tensors `[pages, tokens, heads, dim]` of K and V, one behind the other, layer after layer.
fn token_first(slice: Slice) -> (Vec<Vector>, Range<Address>) {
    let (heads, rows) = (i64::from(slice.heads), i64::from(slice.page_rows));
    let tensor = u64::from(slice.pages) * (rows * heads * 16) as u64;
    let vector = |at: u64| Vector {
        base: BASE + at * tensor,
        page_stride: rows * heads * 16,
        head_stride: 16,
        token_stride: heads * 16,
    };
    let count = u64::from(slice.layers) * 2;
    ((0..count).map(vector).collect(), BASE..BASE + count * tensor)
}

/// One tensor `[pages, heads, layers, 2, tokens, dim]`.
fn head_first(slice: Slice) -> (Vec<Vector>, Range<Address>) {
    let cell = i64::from(slice.page_rows) * 16;
    let head = cell * 2 * i64::from(slice.layers);
    let page = head * i64::from(slice.heads);
    let vector = |at: u64| Vector {
        base: BASE + at * cell as u64,
        page_stride: page,
        head_stride: head,
        token_stride: 16,
    };
    let count = u64::from(slice.layers) * 2;
    ((0..count).map(vector).collect(), BASE..BASE + u64::from(slice.pages) * page as u64)
}

fn made(slice: Slice, (vectors, range): (Vec<Vector>, Range<Address>)) -> Pages {
    Pages::new(&layout(), slice, vectors, &[0x1000..0x2000, range]).unwrap()
}

fn refused(slice: Slice, vectors: Vec<Vector>, range: Range<Address>) -> String {
    Pages::new(&layout(), slice, vectors, std::slice::from_ref(&range)).unwrap_err().to_string()
}

#[test]
fn what_is_contiguous_on_both_sides_is_a_piece() {
    assert_eq!(made(all(9, 16), token_first(all(9, 16))).piece_bytes(), 16, "a row");
    let one_head = Slice { heads: 2, ..all(9, 16) };
    assert_eq!(made(one_head, token_first(one_head)).piece_bytes(), 16);
    assert_eq!(
        made(all(9, 16), head_first(all(9, 16))).piece_bytes(),
        16 * 16 * 2 * 2,
        "K, V and the layers of a part"
    );
    assert_eq!(made(all(9, 32), head_first(all(9, 32))).piece_bytes(), 16 * 16, "V is 32 tokens behind");
    assert_eq!(made(all(9, 4), head_first(all(9, 4))).piece_bytes(), 4 * 16, "a page's tokens");
    assert_eq!(made(all(9, 1), head_first(all(9, 1))).piece_bytes(), 16, "pages of a token");
}

#[test]
fn whole_memory_up_to_its_last_byte_and_none_beyond() {
    let slice = all(9, 16);
    let (vectors, range) = token_first(slice);
    assert!(Pages::new(&layout(), slice, vectors.clone(), std::slice::from_ref(&range)).is_ok());
    let short = refused(slice, vectors.clone(), range.start..range.end - 1);
    assert!(short.starts_with("vectors[7]: its rows reach"), "{short}");
    let late = refused(slice, vectors.clone(), range.start + 1..range.end);
    assert!(late.starts_with("vectors[0]: its rows reach"), "{late}");
    let middle = range.start + 3000;
    let halves = [range.start..middle, middle..range.end];
    let torn = Pages::new(&layout(), slice, vectors.clone(), &halves).unwrap_err().to_string();
    assert!(torn.starts_with("vectors[0]"), "two ranges are two allocations: {torn}");
    let mut backwards = vectors.clone();
    backwards[0].page_stride = -backwards[0].page_stride;
    let text = refused(slice, backwards.clone(), range.clone());
    assert!(text.starts_with("vectors[0]"), "{text}");
    backwards[0].base += 8 * vectors[0].page_stride as u64;
    assert!(
        Pages::new(&layout(), slice, backwards, std::slice::from_ref(&range)).is_ok(),
        "the same pages, counted from the end"
    );
}

#[test]
fn no_copy_goes_from_one_allocation_into_the_next() {
    let layout = Layout::full(4, 1, 8, DataType::Bf16, (2, 1), 16).unwrap();
    let slice = Slice { heads: 1, ..all(1, 16) };
    let vector = |at: u64| Vector { base: BASE + at * 256, token_stride: 16, ..Vector::default() };
    let rows: Vec<u64> = (0..16).collect();
    let runs = |ranges: &[Range<Address>]| {
        let pages = Pages::new(&layout, slice, (0..8).map(vector).collect(), ranges).unwrap();
        let mut pieces = Vec::new();
        pages.pieces(&(0..4), &rows, 1 << 40, &mut pieces);
        pieces.iter().map(|piece| piece.to - BASE..piece.to - BASE + piece.bytes).collect::<Vec<_>>()
    };
    let (middle, end) = (BASE + 256, BASE + 2048);
    assert_eq!(runs(&[0x1000..0x2000, BASE..end]), [0..1024, 1024..2048]);
    assert_eq!(runs(&[BASE..middle, middle..end]), [0..256, 256..1024, 1024..2048]);
}

#[test]
fn numbers_that_overflow_are_refused() {
    let slice = all(PAGES_MAX, 16);
    let wide =
        Vector { base: u64::MAX - 5, page_stride: i64::MAX, head_stride: i64::MIN, token_stride: i64::MAX };
    let text = refused(slice, vec![wide; 8], 0..u64::MAX);
    assert!(text.starts_with("vectors[0]: its rows reach"), "{text}");
    let none = refused(slice, vec![Vector::default(); 8], 0..u64::MAX);
    assert!(none.starts_with("vectors[0].base: address 0"), "{none}");
}

#[test]
fn rows_that_share_bytes_are_refused() {
    let slice = all(9, 16);
    let (vectors, range) = token_first(slice);
    for (name, vector) in [
        ("token_stride", Vector { token_stride: 15, ..vectors[0] }),
        ("head_stride", Vector { head_stride: 0, ..vectors[0] }),
        ("page_stride", Vector { page_stride: 1000, ..vectors[0] }),
    ] {
        let mut bad = vectors.clone();
        bad[0] = vector;
        let text = refused(slice, bad, range.clone());
        assert!(text.starts_with(&format!("vectors[0].{name}")), "{name}: {text}");
    }
}

#[test]
fn each_bad_number_is_named() {
    let slice = all(9, 16);
    let (vectors, range) = token_first(slice);
    for (field, slice) in [
        ("group", Slice { group: 1, ..slice }),
        ("layers", Slice { layers: 0, ..slice }),
        ("layers", Slice { first_layer: 2, ..slice }),
        ("first_layer", Slice { first_layer: 1, layers: 3, ..slice }),
        ("layers", Slice { layers: 3, ..slice }),
        ("heads", Slice { first_head: u32::MAX, ..slice }),
        ("first_head", Slice { first_head: 1, heads: 3, ..slice }),
        ("vectors", Slice { layers: 2, ..slice }),
        ("pages", Slice { pages: 0, ..slice }),
        ("pages", Slice { pages: PAGES_MAX + 1, ..slice }),
        ("page_rows", Slice { page_rows: 0, ..slice }),
        ("page_rows", Slice { page_rows: PAGE_ROWS_MAX + 1, ..slice }),
    ] {
        let text = refused(slice, vectors.clone(), range.clone());
        assert!(text.starts_with(&format!("{field}: ")), "{field}: {text}");
    }
    for ranges in [vec![], vec![range; RANGES_MAX + 1]] {
        let error = Pages::new(&layout(), slice, vectors.clone(), &ranges).unwrap_err();
        assert_eq!(error.field, "ranges");
    }
    let odd = Layout::full(4, 4, 9, DataType::F4E2m1, (2, 2), 16).unwrap();
    let text = Pages::new(&odd, slice, Vec::new(), &[]).unwrap_err().to_string();
    assert!(text.starts_with("head_size: 9 numbers of 4 bits"), "{text}");
}

#[test]
fn the_widest_unit_divides_all_that_is_walked() {
    let slice = all(9, 16);
    let (vectors, range) = token_first(slice);
    let unit = |change: fn(&mut Vector), slice: Slice| {
        let mut vectors = vectors.clone();
        change(&mut vectors[5]);
        let more = range.start..range.end + (1 << 20);
        Pages::new(&layout(), slice, vectors, std::slice::from_ref(&more)).unwrap().unit_bytes()
    };
    assert_eq!(unit(|_| (), slice), 16);
    assert_eq!(unit(|vector| vector.base += 8, slice), 8);
    assert_eq!(unit(|vector| vector.page_stride += 4, slice), 4);
    assert_eq!(unit(|vector| vector.base += 1, slice), 1);
    let one_page = Slice { pages: 1, ..slice };
    assert_eq!(unit(|vector| vector.page_stride += 4, one_page), 16, "nobody walks from the only page");
}

#[test]
fn a_slice_knows_its_parts() {
    let lower = Slice { first_layer: 2, layers: 2, first_head: 2, heads: 2, ..all(9, 16) };
    let pages = made(lower, token_first(lower));
    assert_eq!(pages.parts(0..2).collect::<Vec<_>>(), [3]);
    assert_eq!(pages.span(0..2), 3 * 4096..4 * 4096);
    assert!(!pages.is_whole() && pages.is_padded());
    let right = Slice { first_head: 2, heads: 2, ..all(9, 16) };
    let pages = made(right, token_first(right));
    assert_eq!(pages.parts(0..4).collect::<Vec<_>>(), [1, 3]);
    assert_eq!(pages.span(0..4), 4096..4 * 4096);
    assert_eq!(pages.span(2..4), 3 * 4096..4 * 4096);
    assert_eq!((pages.stripe_bytes(), pages.slot_bytes()), (4096, 4 * 4096));
    let whole = made(all(9, 16), token_first(all(9, 16)));
    assert_eq!(whole.parts(2..4).collect::<Vec<_>>(), [2, 3]);
    assert_eq!(whole.span(0..4), 0..4 * 4096);
    assert_eq!(whole.stripes(&(2..4)), Ok(1..2));
    for layers in [0..1, 1..4, 2..2, 2..6] {
        let text = whole.stripes(&layers).unwrap_err().to_string();
        assert!(text.starts_with("layers: "), "{text}");
    }
}

#[test]
fn rows_that_are_not_there_are_refused() {
    let pages = made(all(9, 16), token_first(all(9, 16)));
    let mut rows: Vec<u64> = (0..16).map(|row| 8 << 32 | row).collect();
    assert_eq!(pages.check_rows(&rows), Ok(()));
    rows[3] = NO_PAGE;
    assert_eq!(pages.check_rows(&rows), Ok(()));
    for bad in [9 << 32, 8 << 32 | 16, NO_PAGE - 1, u64::from(u32::MAX)] {
        rows[3] = bad;
        let text = pages.check_rows(&rows).unwrap_err().to_string();
        assert!(text.starts_with("rows[3]: page "), "{text}");
    }
    assert!(pages.check_rows(&rows[..15]).is_err());
}

/// Where each row lies on both sides, straight from `FORMAT.md` and the formula of `Vector`.
fn expected(pages: &Pages, layers: Range<u32>, rows: &[u64], slot: Address) -> Vec<(u64, u64)> {
    let mut expected = Vec::new();
    for layer in layers {
        for head in 0..pages.slice.heads {
            for vector in 0..2 {
                let (l, h) = (pages.slice.first_layer + layer, pages.slice.first_head + head);
                let part = (l / 2 * 2 + h / 2) * 4096;
                let cell = ((h % 2 * 2 + l % 2) * 2 + vector) * 16 * 16;
                let at = &pages.vectors[(layer * 2 + vector) as usize];
                for (row, place) in rows.iter().enumerate().filter(|(_, place)| **place != NO_PAGE) {
                    let from = slot + u64::from(part + cell) + row as u64 * 16;
                    let offset = (place >> 32) as i64 * at.page_stride
                        + i64::from(head) * at.head_stride
                        + i64::from(*place as u32) * at.token_stride;
                    expected.push((from, at.base.wrapping_add_signed(offset)));
                }
            }
        }
    }
    expected.sort_unstable();
    expected
}

#[test]
fn pieces_are_the_rows_and_as_long_as_they_can_be() {
    let right = Slice { first_head: 2, heads: 2, ..all(9, 16) };
    let lower = Slice { first_layer: 2, layers: 2, ..all(9, 16) };
    let rows: Vec<u64> = (0..16).map(|row| if row == 5 { NO_PAGE } else { 3 << 32 | row }).collect();
    let whole: Vec<u64> = (0..16).map(|row| 3 << 32 | row).collect();
    for slice in [all(9, 16), right, lower] {
        for described in [token_first(slice), head_first(slice)] {
            let pages = made(slice, described);
            for layers in [0..2, 0..slice.layers] {
                for rows in [&rows, &whole] {
                    let mut pieces = vec![Piece { from: 1, to: 1, bytes: 1 }];
                    pages.pieces(&layers, rows, 1 << 40, &mut pieces);
                    let mut found = Vec::new();
                    for piece in &pieces[1..] {
                        assert!(piece.bytes.is_multiple_of(16));
                        found.extend(
                            (0..piece.bytes / 16).map(|at| (piece.from + at * 16, piece.to + at * 16)),
                        );
                    }
                    found.sort_unstable();
                    assert_eq!(found, expected(&pages, layers.clone(), rows, 1 << 40));
                    let least = pieces[1..].iter().map(|piece| piece.bytes).min().unwrap();
                    assert!(rows.contains(&NO_PAGE) || least >= pages.piece_bytes(), "{least}");
                }
            }
        }
    }
}
