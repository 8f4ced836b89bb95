//! `bench peer`: reads of KV blocks from another node over TCP, beside a plain stream of as many bytes in the same run.
//!
//! Owns the command. Two cases: the transport alone, both of its ends threads of this process as those of the raw stream are, in the same
//! memory, larger than any cache; and two daemons, from a match on one to the last block that only the other had, leased, read, verified
//! and published. Ours and raw take turns; CPU seconds are those of both ends.

mod daemons;

use crate::failure::Failure;
use crate::report::{Case, Output, Pairs, Reporter, parse_bytes};
use crate::roofline::{COLD_BYTES, us_since};
use crate::usage::Usage;
use daemons::Daemons;
use kvd_client::transport::serve::{ServeOptions, Server, Source};
use kvd_client::transport::tcp::{CONNECTIONS_MAX, PeerOptions, PeerPool};
use kvd_client::transport::{Batch, Destination, Held, Outcome, Piece, Transport};
use kvd_proto::limits::BATCH_BYTES_MAX;
use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// One call moves this share of the span, in batches.
const CALLS_OF_A_SPAN: usize = 2;
/// Pairs before the ones that count.
const PAIRS_WARM: usize = 2;
/// How long a batch may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Reads KV blocks over loopback TCP from another node, as a share of one plain TCP stream.
///
/// One call reads half of a span of 1 GiB in batches, `in-flight` of them at a time, into another span; the raw half of a pair
/// streams as many bytes between two such spans over one connection, block by block, asking for nothing. `ratio` is the median over
/// pairs of ours and raw, taken in turn: 1 is the plain stream. `fetch` is two daemons and matches of a batch each, every part verified;
/// `read_tcp` the transport alone.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Bytes of one block.
    #[arg(long, default_value = "2MiB", value_parser = parse_bytes)]
    block_bytes: u64,
    /// Blocks of one batch.
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Batches under way.
    #[arg(long, default_value_t = 4)]
    in_flight: usize,
    /// Connections to the peer.
    #[arg(long, default_value_t = PeerOptions::default().connections)]
    connections: usize,
    /// Pairs measured.
    #[arg(long, default_value_t = 24)]
    pairs: usize,
    /// Table or JSON lines.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let args = &args;
    let batch_bytes = args.block_bytes.saturating_mul(args.batch as u64);
    if batch_bytes == 0 || batch_bytes > BATCH_BYTES_MAX || args.pairs == 0 || args.in_flight == 0 {
        return Err(
            "--block-bytes x --batch must be within 256 MiB; --pairs and --in-flight at least 1".into()
        );
    }
    if !(1..=CONNECTIONS_MAX).contains(&args.connections) {
        return Err(format!("--connections must be 1 to {CONNECTIONS_MAX}").into());
    }
    let mut bench = Bench::open(args, COLD_BYTES)?;
    let mut reporter = Reporter::new(args.output);
    let chains = bench.batches() * CALLS_OF_A_SPAN;
    let mut daemons = Daemons::start(args.block_bytes, args.batch, chains).await?;
    reporter.case(&bench.measure_daemons(&mut daemons).await?)?;
    drop(daemons);
    let case = bench.measure()?;
    Ok(reporter.case(&case)?)
}

/// The span that is read from; slot n is its block n.
struct Blocks {
    bytes: Arc<Vec<u8>>,
    block_bytes: usize,
}

impl Blocks {
    fn block(&self, slot: usize) -> &[u8] {
        &self.bytes[slot * self.block_bytes..(slot + 1) * self.block_bytes]
    }

    fn count(&self) -> usize {
        self.bytes.len() / self.block_bytes
    }
}

impl Source for Blocks {
    fn admit(&self, _lease: u64) -> Result<(), kvd_proto::Error> {
        Ok(())
    }

    fn piece(&self, _lease: u64, piece: &Piece) -> Option<Held> {
        let start = piece.slot as usize * self.block_bytes;
        let there = (piece.slot as usize) < self.count() && piece.bytes as usize == self.block_bytes;
        there.then(|| Held::shared(Arc::clone(&self.bytes), start..start + self.block_bytes))
    }
}

/// Destinations of one batch, and the slot that the first was filled from.
struct Landing {
    first: usize,
    blocks: Vec<Destination>,
}

struct Bench {
    args: Args,
    from: Arc<Blocks>,
    /// The span that is written to; the one filled last is at the back.
    to: VecDeque<Landing>,
    next_slot: usize,
    pool: PeerPool,
    raw: Raw,
    _server: Server,
}

impl Bench {
    fn open(args: &Args, span_bytes: usize) -> Result<Self, Failure> {
        let block_bytes = args.block_bytes as usize;
        let bytes: Vec<u8> = (0..span_bytes).map(|at| (at.wrapping_mul(2_654_435_761) >> 20) as u8).collect();
        let from = Arc::new(Blocks { bytes: Arc::new(bytes), block_bytes });
        let batches = span_bytes / (block_bytes * args.batch);
        let blocks = || (0..args.batch).map(|_| Destination::private(block_bytes)).collect();
        let to = (0..batches.max(args.in_flight)).map(|_| Landing { first: 0, blocks: blocks() }).collect();
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let server = Server::start(listener, Arc::clone(&from) as Arc<dyn Source>, ServeOptions::default())?;
        let options = PeerOptions {
            connections: args.connections,
            batches_max: args.in_flight,
            ..PeerOptions::default()
        };
        let pool = PeerPool::connect(server.address(), options)?;
        let raw = Raw::open(Arc::clone(&from))?;
        Ok(Self { args: args.clone(), from, to, next_slot: 0, pool, raw, _server: server })
    }

    fn pairs(&self) -> Pairs {
        Pairs {
            call_bytes: (self.batches() * self.args.batch) as u64 * self.args.block_bytes,
            ours_cpu_s: Some(0.0),
            raw_cpu_s: Some(0.0),
            ..Pairs::default()
        }
    }

    async fn measure_daemons(&mut self, daemons: &mut Daemons) -> Result<Case, Failure> {
        let mut pairs = self.pairs();
        for pair in 0..PAIRS_WARM + self.args.pairs {
            let before = (daemons.cpu_s(), Usage::own_cpu_s());
            let ours_us = daemons.call_us(self.batches(), self.args.in_flight).await?;
            let between = (daemons.cpu_s(), Usage::own_cpu_s());
            let raw_us = self.raw_us()?;
            let after_s = Usage::own_cpu_s();
            if pair >= PAIRS_WARM {
                pairs.ours_us.push(ours_us);
                pairs.raw_us.push(raw_us);
                let used_s = between.0.zip(before.0).map(|(between, before)| between - before);
                let used_s = used_s.map(|used_s| used_s + between.1 - before.1);
                pairs.ours_cpu_s = pairs.ours_cpu_s.zip(used_s).map(|(sum, used_s)| sum + used_s);
                pairs.raw_cpu_s = pairs.raw_cpu_s.map(|sum| sum + after_s - between.1);
            }
        }
        Ok(pairs.case("peer", "fetch", self.args.block_bytes, self.args.batch as u64))
    }

    fn measure(&mut self) -> Result<Case, Failure> {
        let mut pairs = self.pairs();
        for pair in 0..PAIRS_WARM + self.args.pairs {
            let before = Usage::own_cpu_s();
            let ours_us = self.ours_us()?;
            let between = Usage::own_cpu_s();
            let raw_us = self.raw_us()?;
            let after = Usage::own_cpu_s();
            if pair >= PAIRS_WARM {
                pairs.ours_us.push(ours_us);
                pairs.raw_us.push(raw_us);
                pairs.ours_cpu_s = pairs.ours_cpu_s.map(|sum| sum + between - before);
                pairs.raw_cpu_s = pairs.raw_cpu_s.map(|sum| sum + after - between);
            }
        }
        Ok(pairs.case("peer", "read_tcp", self.args.block_bytes, self.args.batch as u64))
    }

    fn batches(&self) -> usize {
        (self.from.bytes.len() / CALLS_OF_A_SPAN / (self.args.block_bytes as usize * self.args.batch)).max(1)
    }

    fn ours_us(&mut self) -> Result<f64, Failure> {
        let start = Instant::now();
        let (tell, told) = channel();
        for batch in 0..self.batches() {
            if batch >= self.args.in_flight {
                self.finish(&told)?;
            }
            self.start(&tell);
        }
        for _ in 0..self.batches().min(self.args.in_flight) {
            self.finish(&told)?;
        }
        let us = us_since(start);
        self.check()?;
        Ok(us)
    }

    fn start(&mut self, tell: &Sender<(usize, Outcome)>) {
        let first = self.next_slot;
        let piece = |slot: usize| Piece {
            segment: 0,
            slot: (slot % self.from.count()) as u32,
            generation: 0,
            part: None,
            offset: 0,
            bytes: self.args.block_bytes as u32,
        };
        let to = self.to.pop_front().expect("destinations for as many as are in flight");
        let pieces = to.blocks.into_iter().zip(first..).map(|(to, slot)| (piece(slot), to)).collect();
        let batch = Batch { lease: 1, pieces, deadline: Instant::now() + PATIENCE };
        let tell = tell.clone();
        self.pool.read(batch, Box::new(move |outcome| drop(tell.send((first, outcome)))));
        self.next_slot = (first + self.args.batch) % self.from.count();
    }

    fn finish(&mut self, told: &Receiver<(usize, Outcome)>) -> Result<(), Failure> {
        let (first, outcome) = told.recv()?;
        if outcome.whole() != self.args.batch {
            let (whole, miss) = (outcome.whole(), outcome.miss);
            return Err(format!("{whole} of {} blocks came: {miss:?}", self.args.batch).into());
        }
        let blocks = outcome.pieces.into_iter().map(|(destination, _)| destination).collect();
        self.to.push_back(Landing { first, blocks });
        Ok(())
    }

    /// That the batch that ended last has the bytes it asked for.
    fn check(&self) -> Result<(), Failure> {
        let Landing { first, blocks } = self.to.back().expect("batches came");
        let mut pairs = blocks.iter().zip(*first..);
        let same = |(seen, slot): (&Destination, usize)| {
            seen.as_slice() == self.from.block(slot % self.from.count())
        };
        if pairs.all(same) { Ok(()) } else { Err("wrong bytes came".into()) }
    }

    fn raw_us(&mut self) -> Result<f64, Failure> {
        let start = Instant::now();
        let first = self.next_slot;
        let blocks = self.batches() * self.args.batch;
        self.raw.orders.send((first, blocks))?;
        for _ in 0..self.batches() {
            let mut to = self.to.pop_front().expect("destinations");
            for block in &mut to.blocks {
                self.raw.stream.read_exact(block.as_mut_slice())?;
            }
            self.to.push_back(to);
        }
        self.next_slot = (first + blocks) % self.from.count();
        Ok(us_since(start))
    }
}

/// One plain stream: a thread that writes blocks as ordered.
struct Raw {
    stream: TcpStream,
    orders: Sender<(usize, usize)>,
}

impl Raw {
    fn open(from: Arc<Blocks>) -> Result<Self, Failure> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        let (mut sender, _) = listener.accept()?;
        let (orders, ordered) = channel::<(usize, usize)>();
        let send = move || {
            for (first, blocks) in ordered {
                for slot in first..first + blocks {
                    if sender.write_all(from.block(slot % from.count())).is_err() {
                        return; // the reader is gone, and says why
                    }
                }
            }
        };
        std::thread::Builder::new().name("raw".to_owned()).spawn(send)?;
        Ok(Self { stream, orders })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_moves_its_bytes_and_wrong_ones_are_noticed() {
        let args = Args {
            block_bytes: 64 << 10,
            batch: 32,
            in_flight: 4,
            connections: 2,
            pairs: 1,
            output: Output::Json,
        };
        let mut bench = Bench::open(&args, 32 << 20).unwrap();
        assert!(bench.ours_us().unwrap() > 0.0 && bench.raw_us().unwrap() > 0.0);
        assert!(bench.ours_us().unwrap() > 0.0, "and again, in the memory that raw used");
        bench.to.back_mut().unwrap().blocks[31].as_mut_slice()[5] ^= 1;
        assert!(bench.check().is_err());
    }
}
