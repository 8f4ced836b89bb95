//! `bench local`: puts and gets between two processes through shared memory, beside memcpy in the same run.
//!
//! Owns the command. The client is this process, the daemon another. Ours and a plain copy of the same bytes from and to
//! the same spans take turns, on one thread. CPU seconds of ours are this process's during its calls plus all the daemon
//! used meanwhile, work it put off included.

use crate::daemon::{self, Daemon};
use crate::failure::Failure;
use crate::folder;
use crate::report::{Case, Output, Pairs, Reporter, bytes_text, median, parse_bytes, percentile};
use crate::roofline::{COLD_BYTES, Span, copy_us, page_reads_us, us_since};
use crate::usage::Usage;
use kvd::config::Eviction;
use kvd_client::{ConnectOptions, Match, Read, Session, SpaceHandle};
use kvd_proto::layout::DataType;
use kvd_proto::{BlockId, Chain, IdScheme, Layout, Space, block_id};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Block sizes measured, in parts of 64 KiB.
const BLOCK_BYTES: [usize; 4] = [64 << 10, 512 << 10, 2 << 20, 4 << 20];
/// Blocks a call.
const BATCHES: [usize; 3] = [1, 32, 256];
/// Blocks of the chain whose match is measured.
const MATCH_BLOCKS: usize = 256;
/// Blocks a call of the cold figures.
const COLD_BLOCKS: usize = 32;
/// How often a session's first mapping is measured.
const COLD_SESSIONS: usize = 10;
/// Bytes that each side of a case moves, within the pairs below.
const CASE_BYTES: usize = 2 << 30;
/// Pairs at least, or a median says little.
const PAIRS_MIN: usize = 12;
/// Pairs at most.
const PAIRS_MAX: usize = 400;
/// Pairs before the ones that count.
const PAIRS_WARM: usize = 2;
/// How long a put waits for slots.
const RESERVE_WAIT: Duration = Duration::from_secs(5);

/// Puts and gets of KV blocks between this process and a daemon of its own, as a share of memcpy.
///
/// For 64 KiB to 4 MiB blocks, 1 to 256 a call: `put` (reserve, fill, commit), `get_copy` (match, copy out verified,
/// release), `get_in_place` (match, then one word read in every 4 KiB page; "beyond us" is what it takes beyond such
/// page reads alone), `match` (a chain of 256 resident blocks). `ratio` is the median over pairs of ours and a plain
/// copy between cold spans of 1 GiB, taken in turn: 1 is memcpy. The cold figures have nothing to be compared with:
/// `cold_put` is the first put after the daemon started, `cold_map` a new session's first look at 32 resident blocks.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// The daemon's DRAM tier; needs 4 GiB at least, as the 1 GiB it reads must fit the 30 % that S3-FIFO gives to new blocks.
    #[arg(long, default_value = "4GiB", value_parser = parse_bytes)]
    dram: u64,
    /// Which copies go first. Blocks are stored here that nobody asked for, and read for the first time when a tier of them has come: what a policy that learns
    /// holds back.
    #[arg(long, value_parser = daemon::eviction, default_value = "s3fifo")]
    eviction: Eviction,
    /// Only this block size.
    #[arg(long, value_parser = parse_bytes)]
    block_bytes: Option<u64>,
    /// Where the daemon keeps its files, which are removed afterwards; by default the system's temporary folder. Give
    /// one on the disk you mean where that is in memory.
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Table or JSON lines.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    if args.dram < (COLD_BYTES + COLD_BYTES / 2) as u64 {
        return Err("--dram must hold the cold span of 1 GiB and half as much again".into());
    }
    let mut reporter = Reporter::new(args.output);
    let mut spans = (Span::resident(COLD_BYTES), Span::resident(COLD_BYTES));
    let wanted = |bytes: &usize| args.block_bytes.is_none_or(|only| only == *bytes as u64);
    for block_bytes in BLOCK_BYTES.into_iter().filter(wanted) {
        let folder = folder::temporary(args.folder.as_deref())?;
        let daemon = Daemon::start_as(folder.path(), args.dram, 0, |command| {
            command.arg(format!("--eviction={}", args.eviction.name()));
        })?;
        let mut bench = Bench::open(daemon, block_bytes, spans).await?;
        reporter.case(&bench.cold_put().await?)?;
        bench.fill_memory(args.dram).await?;
        for batch in BATCHES {
            reporter.case(&bench.puts(batch).await?)?;
            bench.keep(batch).await?;
            reporter.case(&bench.gets(batch).await?)?;
            reporter.case(&bench.gets_in_place(batch).await?)?;
        }
        reporter.case(&bench.matches().await?)?;
        reporter.case(&bench.cold_maps().await?)?;
        spans = (bench.from, bench.to);
    }
    Ok(())
}

struct Bench {
    daemon: Daemon,
    space: SpaceHandle,
    meaning: Space,
    block_bytes: usize,
    from: Span,
    to: Span,
    names: u64,
    calls: u64,
    kept: Vec<Chain>,
    turn: usize,
}

impl Bench {
    async fn open(daemon: Daemon, block_bytes: usize, (from, to): (Span, Span)) -> Result<Self, Failure> {
        let meaning = space(block_bytes)?;
        let space = Session::open(ConnectOptions::new(daemon.socket())).await?.space(&meaning).await?;
        Ok(Self {
            daemon,
            space,
            meaning,
            block_bytes,
            from,
            to,
            names: 0,
            calls: 0,
            kept: Vec::new(),
            turn: 0,
        })
    }

    /// A chain of blocks nobody has.
    fn new_chain(&mut self, blocks: usize) -> Result<Chain, Failure> {
        let names = self.names..self.names + blocks as u64;
        self.names = names.end;
        let id = |name: u64| block_id::named(&self.space.fingerprint(), &name.to_le_bytes());
        Ok(Chain::from_ids("chain", names.map(id).collect::<Result<Vec<BlockId>, _>>()?)?)
    }

    async fn put_us(&mut self, chain: &Chain) -> Result<f64, Failure> {
        let start = Instant::now();
        let root = block_id::root(&self.space.fingerprint(), b"", b"")?;
        let key = self.request_key();
        let fill = self.space.reserve(&key, root, 0, chain, RESERVE_WAIT).await?;
        let granted = fill.granted();
        for &block in &granted {
            fill.write(block, 0, self.from.next(self.block_bytes));
        }
        fill.commit().await?;
        let us = us_since(start);
        expect_blocks("stored", granted.len(), chain)?;
        Ok(us)
    }

    async fn get_us(&mut self, chain: &Chain) -> Result<f64, Failure> {
        let start = Instant::now();
        let matched = self.matched(chain).await?;
        for block in 0..matched.blocks() {
            let whole = matched.read(block, 0, self.to.next(self.block_bytes));
            if whole != Read::Whole {
                return Err(format!("block {block}: {whole:?}").into());
            }
        }
        matched.release().await?;
        Ok(us_since(start))
    }

    /// The lease is given back after the time is taken.
    async fn get_in_place_us(&mut self, chain: &Chain) -> Result<f64, Failure> {
        let start = Instant::now();
        let matched = self.matched(chain).await?;
        read_pages(&matched)?;
        let us = us_since(start);
        matched.release().await?;
        Ok(us)
    }

    async fn matched(&mut self, chain: &Chain) -> Result<Match, Failure> {
        let key = self.request_key();
        let matched = self.space.match_prefix(&key, chain, 0).await?;
        expect_blocks("matched", matched.blocks() as usize, chain)?;
        Ok(matched)
    }

    /// A key never used before: each call is a request of its own.
    fn request_key(&mut self) -> [u8; 8] {
        self.calls += 1;
        self.calls.to_le_bytes()
    }

    /// Every slot used once, so that nothing measured later pays for first touches.
    async fn fill_memory(&mut self, dram_bytes: u64) -> Result<(), Failure> {
        let call_blocks = (COLD_BLOCKS << 20) / self.block_bytes;
        for _ in 0..=dram_bytes as usize / (call_blocks * self.block_bytes) {
            let chain = self.new_chain(call_blocks)?;
            self.put_us(&chain).await?;
        }
        Ok(())
    }

    /// Stores as many chains as make a cold span, for gets.
    async fn keep(&mut self, batch: usize) -> Result<(), Failure> {
        self.kept.clear();
        for _ in 0..(COLD_BYTES / (batch * self.block_bytes)).max(1) {
            let chain = self.new_chain(batch)?;
            self.put_us(&chain).await?;
            self.kept.push(chain);
        }
        Ok(())
    }

    fn next_kept(&mut self) -> Chain {
        self.turn += 1;
        self.kept[self.turn % self.kept.len()].clone()
    }

    async fn puts(&mut self, batch: usize) -> Result<Case, Failure> {
        let mut pairs = self.pairs(batch);
        for pair in 0..self.rounds(batch) {
            let chain = self.new_chain(batch)?;
            let before = Usage::own_cpu_s();
            let ours_us = self.put_us(&chain).await?;
            self.raw(&mut pairs, pair, before, ours_us, copy_us, batch);
        }
        Ok(self.case(pairs, "put", batch))
    }

    async fn gets(&mut self, batch: usize) -> Result<Case, Failure> {
        let mut pairs = self.pairs(batch);
        for pair in 0..self.rounds(batch) {
            let chain = self.next_kept();
            let before = Usage::own_cpu_s();
            let ours_us = self.get_us(&chain).await?;
            self.raw(&mut pairs, pair, before, ours_us, copy_us, batch);
        }
        Ok(self.case(pairs, "get_copy", batch))
    }

    async fn gets_in_place(&mut self, batch: usize) -> Result<Case, Failure> {
        let mut pairs = self.pairs(batch);
        let reads_us =
            |from: &mut Span, _: &mut Span, bytes: usize, blocks: usize| page_reads_us(from, bytes * blocks);
        for pair in 0..self.rounds(batch) {
            let chain = self.next_kept();
            let before = Usage::own_cpu_s();
            let ours_us = self.get_in_place_us(&chain).await?;
            self.raw(&mut pairs, pair, before, ours_us, reads_us, batch);
        }
        Ok(self.case(pairs, "get_in_place", batch))
    }

    fn pairs(&self, batch: usize) -> Pairs {
        // the daemon's share of our CPU time is what it used from here to `case`
        let daemon_cpu_s = self.daemon.usage().cpu_s().map(|cpu_s| -cpu_s);
        Pairs {
            call_bytes: (batch * self.block_bytes) as u64,
            ours_cpu_s: daemon_cpu_s,
            raw_cpu_s: Some(0.0),
            ..Pairs::default()
        }
    }

    fn rounds(&self, batch: usize) -> usize {
        PAIRS_WARM + (CASE_BYTES / (batch * self.block_bytes)).clamp(PAIRS_MIN, PAIRS_MAX)
    }

    /// The raw half of a pair, and both halves' books.
    fn raw(
        &mut self,
        pairs: &mut Pairs,
        pair: usize,
        before: f64,
        ours_us: f64,
        raw_us: impl Fn(&mut Span, &mut Span, usize, usize) -> f64,
        batch: usize,
    ) {
        let between = Usage::own_cpu_s();
        let raw_us = raw_us(&mut self.from, &mut self.to, self.block_bytes, batch);
        let after = Usage::own_cpu_s();
        if pair < PAIRS_WARM {
            if pair + 1 == PAIRS_WARM {
                pairs.ours_cpu_s = self.daemon.usage().cpu_s().map(|cpu_s| -cpu_s);
            }
            return;
        }
        pairs.ours_us.push(ours_us);
        pairs.raw_us.push(raw_us);
        pairs.ours_cpu_s = pairs.ours_cpu_s.map(|sum| sum + between - before);
        pairs.raw_cpu_s = pairs.raw_cpu_s.map(|sum| sum + after - between);
    }

    fn case(&self, mut pairs: Pairs, name: &'static str, batch: usize) -> Case {
        let daemon_cpu_s = self.daemon.usage().cpu_s();
        pairs.ours_cpu_s = pairs.ours_cpu_s.zip(daemon_cpu_s).map(|(sum, daemon)| sum + daemon);
        pairs.case("local", name, self.block_bytes as u64, batch as u64)
    }

    async fn cold_put(&mut self) -> Result<Case, Failure> {
        let chain = self.new_chain(COLD_BLOCKS)?;
        let us = vec![self.put_us(&chain).await?];
        Ok(self.alone(us, "cold_put", COLD_BLOCKS))
    }

    async fn cold_maps(&mut self) -> Result<Case, Failure> {
        let chain = self.new_chain(COLD_BLOCKS)?;
        self.put_us(&chain).await?;
        let mut each_us = Vec::new();
        for _ in 0..COLD_SESSIONS {
            let start = Instant::now();
            let session = Session::open(ConnectOptions::new(self.daemon.socket())).await?;
            let space = session.space(&self.meaning).await?;
            let matched = space.match_prefix(b"cold", &chain, 0).await?;
            expect_blocks("matched", matched.blocks() as usize, &chain)?;
            read_pages(&matched)?;
            each_us.push(us_since(start));
            matched.release().await?;
        }
        Ok(self.alone(each_us, "cold_map", COLD_BLOCKS))
    }

    async fn matches(&mut self) -> Result<Case, Failure> {
        self.keep(MATCH_BLOCKS).await?;
        let mut each_us = Vec::new();
        for _ in 0..PAIRS_MAX {
            let chain = self.next_kept();
            let start = Instant::now();
            let matched = self.matched(&chain).await?;
            each_us.push(us_since(start));
            matched.release().await?;
        }
        let per_s = 1e6 / median(each_us.clone());
        let case = self.alone(each_us, "match", MATCH_BLOCKS);
        Ok(Case { gbps: None, per_s: Some(per_s), ..case })
    }

    /// A case without a raw loop beside it.
    fn alone(&self, each_us: Vec<f64>, what: &'static str, blocks: usize) -> Case {
        let p50_us = median(each_us.clone());
        Case {
            bench: "local",
            what,
            block_bytes: self.block_bytes as u64,
            batch: blocks as u64,
            p50_us: Some(p50_us),
            p99_us: Some(percentile(each_us, 0.99)),
            gbps: Some((blocks * self.block_bytes) as f64 / p50_us / 1e3),
            ..Case::default()
        }
    }
}

/// Blocks of `bytes` as so many layers with 8 heads of 128 bf16 numbers, 16 tokens, one part of 64 KiB a layer: 2 MiB is
/// Llama-3-8B's.
fn space(bytes: usize) -> Result<Space, Failure> {
    let layers = (bytes / (64 << 10)) as u32;
    Ok(Space {
        tenant: "default".to_owned(),
        model: format!("local-{}", bytes_text(bytes as u64)),
        revision: b"bench".to_vec(),
        epoch: 0,
        layout: Layout::full(layers, 8, 128, DataType::Bf16, (layers, 1), 16)?,
        id_scheme: IdScheme::Named,
    })
}

fn read_pages(matched: &Match) -> Result<(), Failure> {
    let mut sum = 0_u64;
    for block in 0..matched.blocks() {
        let view = matched.view(block, 0).ok_or_else(|| format!("block {block} cannot be seen"))?;
        for page in (0..view.len()).step_by(4096) {
            sum = sum.wrapping_add(view.word(page));
        }
        if !view.still_valid() {
            return Err(format!("block {block} was given away while it was leased").into());
        }
    }
    std::hint::black_box(sum);
    Ok(())
}

fn expect_blocks(what: &str, blocks: usize, chain: &Chain) -> Result<(), Failure> {
    if blocks == chain.ids().len() {
        return Ok(());
    }
    Err(format!("only {blocks} of {} blocks were {what}; is --dram large enough?", chain.ids().len()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_is_made_of_parts_of_64_kib() {
        for bytes in BLOCK_BYTES {
            let layout = space(bytes).unwrap().layout;
            assert_eq!(layout.slot_bytes(0) as usize, bytes);
            assert!(layout.parts(0).all(|part| part.bytes == 64 << 10));
        }
    }
}
