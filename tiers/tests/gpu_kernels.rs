//! The kernels without a GPU: `kernels/kvd.cu` compiled as C and run thread by thread, against references written from `gpu::work`'s documentation.
//!
//! Owns: that the kernels' structs and constants are those of Rust, that gather, scatter and checksum do what `work` says and touch nothing else, and that the PTX that
//! ships was made of this source. Invariants: a case is its seed; every buffer is compared whole, with the guards around it.
//! Leaves to others: what only a GPU can show (`gpu.rs`).

use kvd_tiers::gpu::cuda::kernels;
use kvd_tiers::gpu::work::NO_PAGE;
use kvd_tiers::gpu::{Cells, Checksums, Vector};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

const SOURCE: &str = include_str!("../src/gpu/kernels/kvd.cu");

/// The kernels as functions: for each thread of `blocks` blocks, first to last or last to first.
const SHIM: &str = r"
static void cells(const struct Cells *work, u32 blocks, u32 backwards, u32 gather) {
    const u32 threads = blocks * KVD_CELLS_THREADS;
    for (u32 at = 0; at < threads; at += 1) {
        kvd_cells_by_unit(work, backwards ? threads - 1 - at : at, threads, gather);
    }
}
void shim_gather(const struct Cells *work, u32 blocks, u32 backwards) { cells(work, blocks, backwards, 1); }
void shim_scatter(const struct Cells *work, u32 blocks, u32 backwards) { cells(work, blocks, backwards, 0); }
void shim_checksum(const struct Checksums *work, u32 blocks, u32 backwards) {
    static struct Scratch scratch;
    for (u32 at = 0; at < blocks; at += 1) {
        memset(&scratch, 0xa5, sizeof scratch);
        kvd_checksum_block(work, backwards ? blocks - 1 - at : at, blocks, &scratch);
    }
}
u64 shim_bytes(u32 which) {
    return which == 0 ? sizeof(struct Cells) : which == 1 ? sizeof(struct Vector) : sizeof(struct Checksums);
}
";

type RunCells = unsafe extern "C" fn(*const Cells, u32, u32);
type RunChecksums = unsafe extern "C" fn(*const Checksums, u32, u32);

/// The compiled shim; loaded once and kept.
struct Compiled {
    gather: RunCells,
    scatter: RunCells,
    checksum: RunChecksums,
    bytes: unsafe extern "C" fn(u32) -> u64,
}

fn compiled() -> &'static Compiled {
    static COMPILED: OnceLock<Compiled> = OnceLock::new();
    COMPILED.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let (source, object) = (folder.join("kvd_shim.c"), folder.join("kvd_shim.so"));
        std::fs::write(&source, format!("{SOURCE}\n{SHIM}")).unwrap();
        let flags = ["-x", "c", "-std=gnu11", "-O1", "-shared", "-fPIC"];
        let checks = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"];
        let output = Command::new("cc").args(flags).args(checks).arg("-o").arg(&object).arg(&source).output();
        let output = output.expect("a C compiler named cc: the build needs one, too");
        assert!(output.status.success(), "cc: {}", String::from_utf8_lossy(&output.stderr));
        load(&object)
    })
}

fn load(object: &Path) -> Compiled {
    // SAFETY: the object is the one just compiled; it has no initialisers.
    let library = Box::leak(Box::new(unsafe { libloading::Library::new(object) }.unwrap()));
    // SAFETY: the shim above defines each function with this signature; the library is never closed.
    unsafe {
        Compiled {
            gather: *library.get(b"shim_gather").unwrap(),
            scatter: *library.get(b"shim_scatter").unwrap(),
            checksum: *library.get(b"shim_checksum").unwrap(),
            bytes: *library.get(b"shim_bytes").unwrap(),
        }
    }
}

/// Numbers from a seed (splitmix64).
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Within both ends.
    fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.next() % (most - least + 1)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.between(1, n) == 1
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.between(0, of.len() as u64 - 1) as usize]
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.between(0, at as u64) as usize);
        }
    }
}

/// Bytes on both sides of what a case uses.
const GUARD_BYTES: u64 = 256;

/// Memory at a known alignment, with guards, filled with noise.
struct Buffer {
    words: Vec<u128>,
    /// Where the case's bytes begin, after guard and misalignment.
    start: u64,
}

impl Buffer {
    /// Its first byte is a multiple of `unit`, and of no more than that.
    fn new(draw: &mut Draw, bytes: u64, unit: u64) -> Self {
        let start = GUARD_BYTES + unit % 16;
        let words = (start + bytes + GUARD_BYTES).div_ceil(16);
        let words = (0..words).map(|_| (u128::from(draw.next()) << 64) | u128::from(draw.next())).collect();
        Self { words, start }
    }

    fn address(&self) -> u64 {
        self.words.as_ptr() as u64 + self.start
    }

    fn all(&self) -> Vec<u8> {
        let bytes = size_of_val(self.words.as_slice());
        // SAFETY: the words' own bytes, which only a kernel of the shim writes, and none runs now.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast::<u8>(), bytes) }.to_vec()
    }
}

/// Page memory, slots and tables of one case, and what the work is.
struct Case {
    work: Cells,
    pages: Buffer,
    slots: Buffer,
    vectors: Vec<Vector>,
    row_table: Vec<u64>,
    slot_table: Vec<u64>,
    /// For the message.
    seed: u64,
}

/// What is drawn before anything is laid out.
struct Shape {
    unit: u64,
    rows: u64,
    row_bytes: u64,
    vectors: u64,
    memory_layers: u64,
    heads: u64,
    blocks: u64,
    /// Rows of a page, and pages.
    page_rows: u64,
    pages: u64,
}

impl Shape {
    fn draw(draw: &mut Draw) -> Self {
        let unit = draw.pick(&[16, 16, 16, 8, 4, 2, 1]);
        let state = draw.one_in(8);
        let rows = if state { 1 } else { draw.pick(&[1, 2, 3, 5, 8, 16, 16, 32]) };
        let row_units =
            if state { draw.between(1, 1500) } else { draw.pick(&[1, 2, 3, 7, 8, 16, 16, 31, 32, 33, 72]) };
        let blocks = draw.between(1, 4);
        let page_rows = draw.pick(&[1, 2, 3, 8, 16, 32]);
        Self {
            unit,
            rows,
            row_bytes: row_units * unit,
            vectors: draw.between(1, 2),
            memory_layers: draw.between(1, 4),
            heads: draw.between(1, 5),
            blocks,
            page_rows,
            pages: (blocks * rows).div_ceil(page_rows) + draw.between(0, 3),
        }
    }
}

/// Where pages' vectors lie: strides of a nest of page, K/V, token and head in any order, each a little apart; layers one after the other or interleaved by page.
fn lay_out_pages(draw: &mut Draw, shape: &Shape) -> (Vec<(u64, Vector)>, u64) {
    let apart = |draw: &mut Draw| if draw.one_in(3) { shape.unit * draw.between(1, 5) } else { 0 };
    // innermost first: 0 token, 1 head, 2 K/V, 3 page, 4 layer
    let mut order = draw.pick(&[
        [1, 0, 2, 3, 4],
        [0, 1, 2, 3, 4],
        [1, 0, 3, 2, 4],
        [0, 1, 3, 2, 4],
        [1, 0, 2, 4, 3],
        [0, 2, 1, 3, 4],
    ]);
    if draw.one_in(6) {
        draw.shuffle(&mut order);
    }
    let counts = [shape.page_rows, shape.heads, shape.vectors, shape.pages, shape.memory_layers];
    let (mut strides, mut bytes) = ([0; 5], shape.row_bytes);
    for dimension in order {
        strides[dimension] = bytes + apart(draw);
        bytes = strides[dimension] * counts[dimension];
    }
    let [token, head, vector, page, layer] = strides;
    let vectors = (0..shape.memory_layers * shape.vectors).map(|at| {
        let base = at / shape.vectors * layer + at % shape.vectors * vector;
        let stride = |bytes: u64| i64::try_from(bytes).unwrap();
        (
            base,
            Vector {
                base: 0,
                page_stride: stride(page),
                head_stride: stride(head),
                token_stride: stride(token),
            },
        )
    });
    (vectors.collect(), bytes)
}

/// The group around the memory's slice: layers and heads before it and after it, cut into parts.
fn cut_into_parts(draw: &mut Draw, shape: &Shape) -> (Cells, u64) {
    let mut cut = |within: u64, most: u64| {
        let first = draw.between(0, 3);
        let of_part = draw.between(1, most);
        let ranges = (first + within).div_ceil(of_part) + draw.between(0, 1);
        (first, of_part, ranges)
    };
    let (slice_first_layer, part_layers, layer_ranges) = cut(shape.memory_layers, 4);
    let (slice_first_head, part_heads, head_ranges) = cut(shape.heads, 4);
    let first_layer = draw.between(0, shape.memory_layers - 1);
    let part_bytes = part_layers * part_heads * shape.vectors * shape.rows * shape.row_bytes;
    let work = Cells {
        blocks: shape.blocks,
        rows: shape.rows,
        row_bytes: shape.row_bytes,
        vectors_per_layer: shape.vectors,
        first_layer,
        layers: draw.between(1, shape.memory_layers - first_layer),
        heads: shape.heads,
        slice_first_layer,
        slice_first_head,
        part_layers,
        part_heads,
        head_ranges,
        part_bytes,
        part_stride: part_bytes.next_multiple_of(draw.pick(&[4096, 4096, 512, shape.unit])),
        unit_bytes: shape.unit,
        ..Cells::default()
    };
    (work, layer_ranges * head_ranges * work.part_stride)
}

impl Case {
    fn draw(seed: u64) -> Self {
        let draw = &mut Draw(seed);
        let shape = Shape::draw(draw);
        let (vectors, page_bytes) = lay_out_pages(draw, &shape);
        let (work, slot_bytes) = cut_into_parts(draw, &shape);
        let slot_stride = slot_bytes + shape.unit * draw.between(0, 3);
        let pages = Buffer::new(draw, page_bytes, shape.unit);
        let slots = Buffer::new(draw, slot_stride * (shape.blocks + 1), shape.unit);
        let based = |(at, vector)| Vector { base: pages.address() + at, ..vector };
        let vectors: Vec<Vector> = vectors.into_iter().map(based).collect();
        let mut slot_table: Vec<u64> =
            (0..=shape.blocks).map(|at| slots.address() + at * slot_stride).collect();
        draw.shuffle(&mut slot_table);
        let mut row_table: Vec<u64> = (0..shape.pages * shape.page_rows)
            .map(|at| ((at / shape.page_rows) << 32) | (at % shape.page_rows))
            .collect();
        if draw.one_in(2) {
            draw.shuffle(&mut row_table);
        }
        row_table.truncate((shape.blocks * shape.rows) as usize);
        let missing = draw.pick(&[0, 0, 1, shape.rows / 2, shape.rows]);
        let tail = row_table.len() - missing as usize;
        row_table[tail..].fill(NO_PAGE);
        if draw.one_in(4) {
            row_table.iter_mut().for_each(|place| {
                if draw.one_in(3) {
                    *place = NO_PAGE;
                }
            });
        }
        let mut case = Self { work, pages, slots, vectors, row_table, slot_table, seed };
        case.work.slots = case.slot_table.as_ptr() as u64;
        case.work.row_table = case.row_table.as_ptr() as u64;
        case.work.vectors = case.vectors.as_ptr() as u64;
        case
    }

    /// Each row that is copied: (its place in the pages' memory, or none; its place in the slots' memory), as `Cells` defines them.
    fn rows(&self) -> Vec<(Option<u64>, u64)> {
        let w = &self.work;
        let mut found = Vec::new();
        for block in 0..w.blocks {
            for (l, h, v, r) in places(w) {
                let (group_layer, group_head) = (w.slice_first_layer + l, w.slice_first_head + h);
                let part = group_layer / w.part_layers * w.head_ranges + group_head / w.part_heads;
                let cell = (group_head % w.part_heads * w.part_layers + group_layer % w.part_layers)
                    * w.vectors_per_layer
                    + v;
                let in_slot = part * w.part_stride + cell * w.rows * w.row_bytes + r * w.row_bytes;
                let slot = self.slot_table[block as usize] + in_slot - self.slots.words.as_ptr() as u64;
                let vector = &self.vectors[(l * w.vectors_per_layer + v) as usize];
                let place = self.row_table[(block * w.rows + r) as usize];
                let page = (place != NO_PAGE).then(|| {
                    let strides = (place >> 32) * vector.page_stride as u64
                        + h * vector.head_stride as u64
                        + (place & 0xffff_ffff) * vector.token_stride as u64;
                    vector.base + strides - self.pages.words.as_ptr() as u64
                });
                found.push((page, slot));
            }
        }
        found
    }

    /// Ranges of the slots' memory that a gather sets to zero behind the parts whose last cell it writes.
    fn ends(&self) -> Vec<std::ops::Range<usize>> {
        let w = &self.work;
        let mut found = Vec::new();
        for block in 0..w.blocks {
            for (l, h, v, _) in places(w).filter(|(.., r)| *r == 0) {
                let (group_layer, group_head) = (w.slice_first_layer + l, w.slice_first_head + h);
                let last = group_layer % w.part_layers == w.part_layers - 1
                    && group_head % w.part_heads == w.part_heads - 1
                    && v == w.vectors_per_layer - 1;
                if last {
                    let part = group_layer / w.part_layers * w.head_ranges + group_head / w.part_heads;
                    let at = self.slot_table[block as usize] - self.slots.words.as_ptr() as u64
                        + part * w.part_stride;
                    found.push((at + w.part_bytes) as usize..(at + w.part_stride) as usize);
                }
            }
        }
        found
    }
}

/// Layer, head, vector and row of every row that is copied of a block.
fn places(w: &Cells) -> impl Iterator<Item = (u64, u64, u64, u64)> + use<> {
    let (layers, heads, vectors, rows) =
        (w.first_layer..w.first_layer + w.layers, w.heads, w.vectors_per_layer, w.rows);
    layers.flat_map(move |l| {
        (0..heads).flat_map(move |h| (0..vectors).flat_map(move |v| (0..rows).map(move |r| (l, h, v, r))))
    })
}

fn gather_case(seed: u64) {
    let case = Case::draw(seed);
    let (pages, mut slots) = (case.pages.all(), case.slots.all());
    let bytes = case.work.row_bytes as usize;
    for (page, slot) in case.rows() {
        let row = &mut slots[slot as usize..][..bytes];
        match page {
            Some(page) => row.copy_from_slice(&pages[page as usize..][..bytes]),
            None => row.fill(0),
        }
    }
    case.ends().into_iter().for_each(|range| slots[range].fill(0));
    let blocks = 1 + (seed % 3) as u32;
    // SAFETY: the work's tables and memory are the case's own and hold what `Cells` says; what is written lies in buffers of the case.
    unsafe { (compiled().gather)(&raw const case.work, blocks, (seed >> 3) as u32 & 1) };
    assert!(case.slots.all() == slots, "gather, seed {seed}: {:?}", case.work);
    assert!(case.pages.all() == pages, "gather wrote to pages, seed {}", case.seed);
}

fn scatter_case(seed: u64) {
    let case = Case::draw(seed);
    let (mut pages, slots) = (case.pages.all(), case.slots.all());
    let bytes = case.work.row_bytes as usize;
    for (page, slot) in case.rows() {
        if let Some(page) = page {
            pages[page as usize..][..bytes].copy_from_slice(&slots[slot as usize..][..bytes]);
        }
    }
    let blocks = 1 + (seed % 3) as u32;
    // SAFETY: as in `gather_case`.
    unsafe { (compiled().scatter)(&raw const case.work, blocks, (seed >> 3) as u32 & 1) };
    assert!(case.pages.all() == pages, "scatter, seed {seed}: {:?}", case.work);
    assert!(case.slots.all() == slots, "scatter wrote to slots, seed {}", case.seed);
}

fn checksum_case(seed: u64) {
    let draw = &mut Draw(seed);
    let segment = kernels::SEGMENT_BYTES;
    let bytes = match draw.between(0, 9) {
        0 => 65_536,
        1 => segment - 16 + 16 * draw.between(0, 2),
        2 => segment * draw.between(1, 3) + 16 * draw.between(0, 9000),
        _ => 16 * draw.between(1, 700),
    };
    let count = draw.between(1, 5);
    let memory = Buffer::new(draw, bytes * count, 16);
    let before = memory.all();
    let mut runs: Vec<u64> = (0..count).map(|at| memory.address() + at * bytes).collect();
    draw.shuffle(&mut runs);
    let expected: Vec<u32> = runs
        .iter()
        .map(|run| {
            crc32fast::hash(&before[(run - memory.words.as_ptr() as u64) as usize..][..bytes as usize])
        })
        .collect();
    // Cut runs are added to what is there; whole ones are written.
    let initial = if bytes > segment { 0 } else { 0x5eed_5eed };
    let mut results = vec![initial; count as usize + 2];
    let work =
        Checksums { runs: runs.as_ptr() as u64, results: results[1..].as_mut_ptr() as u64, count, bytes };
    // SAFETY: the runs are read, `count` results are written, all in memory of this case.
    unsafe { (compiled().checksum)(&raw const work, draw.between(1, 7) as u32, draw.between(0, 1) as u32) };
    assert_eq!(results[1..=count as usize], expected, "seed {seed}: {count} runs of {bytes} bytes");
    assert_eq!(
        (results[0], results[count as usize + 1]),
        (initial, initial),
        "beside the results, seed {seed}"
    );
    assert!(memory.all() == before, "checksum wrote to a run, seed {seed}");
}

#[test]
fn gather_writes_what_the_documentation_says() {
    (0..200).for_each(gather_case);
}

#[test]
fn scatter_writes_what_the_documentation_says() {
    (1_000..1_200).for_each(scatter_case);
}

#[test]
fn checksums_are_those_of_crc32fast() {
    (2_000..2_200).for_each(checksum_case);
}

#[test]
#[ignore = "slow: ten thousand cases of each kernel"]
fn ten_thousand_cases_of_each_kernel() {
    for seed in 10_000..20_000 {
        gather_case(seed);
        scatter_case(seed + 10_000);
        checksum_case(seed + 20_000);
    }
}

/// Fields of a struct in C or Rust: what stands before `;` or `:` on the lines of its body.
fn fields(text: &str, opening: &str, name: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let (_, body) = text.split_once(opening).unwrap_or_else(|| panic!("no {opening}"));
    let (body, _) = body.split_once("\n}").expect("the struct's end");
    body.lines().filter_map(|line| name(line.trim())).collect()
}

#[test]
fn both_languages_have_the_same_structs() {
    let rust = include_str!("../src/gpu/work.rs");
    for (name, bytes, which) in [
        ("Cells", size_of::<Cells>(), 0),
        ("Vector", size_of::<Vector>(), 1),
        ("Checksums", size_of::<Checksums>(), 2),
    ] {
        let in_c = fields(SOURCE, &format!("\nstruct {name} {{"), |line| {
            let (kind, field) = line.strip_suffix(';')?.split_once(' ')?;
            let kind = match kind {
                "u64" => "u64",
                "i64" => "i64",
                other => panic!("{name} has a field of type {other}"),
            };
            Some(format!("{field}: {kind}"))
        });
        let in_rust = fields(rust, &format!("\npub struct {name} {{"), |line| {
            let field = line.strip_prefix("pub ")?.strip_suffix(',')?;
            Some(field.replace("Address", "u64"))
        });
        assert_eq!(in_c, in_rust, "{name}");
        assert!(
            !in_c.is_empty() && in_c.len() * 8 == bytes,
            "{name}: {} fields in {bytes} bytes",
            in_c.len()
        );
        // SAFETY: takes a number, gives a number.
        assert_eq!(unsafe { (compiled().bytes)(which) }, bytes as u64, "{name}");
    }
}

#[test]
fn both_languages_have_the_same_constants() {
    let number = |name: &str| -> u64 {
        let line = SOURCE.lines().find_map(|line| line.strip_prefix(&format!("#define {name} ")));
        line.unwrap_or_else(|| panic!("no {name}"))
            .trim()
            .parse()
            .unwrap_or_else(|_| panic!("{name}: {line:?}"))
    };
    assert_eq!(number("KVD_CELLS_THREADS"), u64::from(kernels::CELLS_THREADS));
    assert_eq!(number("KVD_CELLS_BLOCKS_PER_SM"), u64::from(kernels::CELLS_BLOCKS_PER_SM));
    assert_eq!(number("KVD_LANES") * number("KVD_BATCH"), kernels::CHUNK_UNITS);
    assert_eq!(number("KVD_CHECKSUM_THREADS"), u64::from(kernels::CHECKSUM_THREADS));
    assert_eq!(number("KVD_CHECKSUM_BLOCKS_PER_SM"), u64::from(kernels::CHECKSUM_BLOCKS_PER_SM));
    assert_eq!(number("KVD_SEGMENT_BYTES"), kernels::SEGMENT_BYTES);
}

#[test]
fn the_ptx_is_made_of_this_source() {
    let line = |start: &str| {
        let found = kernels::PTX.lines().find_map(|line| line.strip_prefix(start));
        found.unwrap_or_else(|| panic!("the PTX has no line that begins with {start:?}")).trim()
    };
    let source = format!("{:08x}, {} bytes", crc32fast::hash(SOURCE.as_bytes()), SOURCE.len());
    assert_eq!(line("// kvd.cu: CRC-32 "), source, "kvd.cu has changed: run tiers/src/gpu/kernels/build.sh");
    assert_eq!(line(".version "), "8.0", "drivers of CUDA 12.0 load no newer one");
    assert_eq!(line(".target "), "sm_70", "GPUs from 7.0 on");
    assert_eq!(line(".address_size "), "64");
    let entries: Vec<&str> = kernels::PTX
        .lines()
        .filter_map(|line| line.strip_prefix(".visible .entry ")?.strip_suffix('('))
        .collect();
    let mut expected = [kernels::GATHER, kernels::SCATTER, kernels::CHECKSUM];
    expected.sort_unstable();
    let mut entries = entries;
    entries.sort_unstable();
    assert_eq!(entries, expected);
    let parameters = [size_of::<Cells>(), size_of::<Cells>(), size_of::<Checksums>()];
    for (entry, bytes) in [kernels::GATHER, kernels::SCATTER, kernels::CHECKSUM].into_iter().zip(parameters) {
        let parameter = format!(".param .align 8 .b8 {entry}_param_0[{bytes}]");
        assert!(kernels::PTX.contains(&parameter), "{parameter}");
    }
    assert!(!kernels::PTX.contains(".local"), "a kernel has memory of its own in HBM");
}
