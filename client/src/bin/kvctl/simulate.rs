//! `kvctl policy simulate`: what nodes of other sizes and policies would have made of what was asked for, or of a trace: a table, a plot, a drawing.
//!
//! Owns the choice of sizes, the sending of a trace, and what is shown. Leaves to others: the simulation (the node), the curves (`curve`).

use crate::curve::{Curves, Line};
use crate::node::{Node, SIMULATION_WAIT};
use crate::show::Show;
use crate::table::columns;
use crate::text::{Size, Span, count, duration_ms, percent, size};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use kvd_proto::wire::{self, Tier, simulate_reply, simulate_request};
use kvd_proto::{Code, Error};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};

/// Of a trace, sent together, but for the last line.
const CHUNK_BYTES: usize = 1 << 20;
/// Of one line. At the limit: the file is refused.
const LINE_BYTES_MAX: usize = 2 << 20;
/// Sizes of a tier, in quarters of what it has, where none are given.
const QUARTERS: [u64; 5] = [1, 2, 4, 8, 16];

#[derive(Debug, Args)]
pub(crate) struct SimulateArgs {
    /// lru, s3fifo, class-ttl, worth; lru-write-through, worth-writes-all, no-cache [default: the first four]
    #[arg(long = "policy", value_name = "NAME", value_delimiter = ',')]
    policies: Vec<String>,
    /// Sizes of DRAM: 64GiB,128GiB [default: a quarter of what it has, to four times that]
    #[arg(long, value_name = "SIZE", value_delimiter = ',')]
    dram: Vec<Size>,
    /// Sizes of NVMe; 0 for none [default: what it has]
    #[arg(long, value_name = "SIZE", value_delimiter = ',')]
    nvme: Vec<Size>,
    /// With a bucket that keeps everything, without, or both
    #[arg(long, value_enum, default_value = "as-it-is")]
    s3: Bucket,
    /// Of what was asked for in so long: 10m, 2h [default: all that the node still has]
    #[arg(long, value_name = "TIME", conflicts_with = "trace")]
    last: Option<Span>,
    /// Of a trace instead: a file of `kvctl trace record`, or Mooncake's JSONL
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Whose requests [default: of whom most blocks were asked for]
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
    /// Bytes of a block of a trace that does not say it [default: as much a token as here]
    #[arg(long, value_name = "SIZE", requires = "trace")]
    block_bytes: Option<Size>,
    /// Tokens of one
    #[arg(long, value_name = "N", requires = "trace", default_value_t = 512)]
    block_tokens: u64,
    /// Draw the curves into a file, too
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Bucket {
    AsItIs,
    With,
    Without,
    Both,
}

/// What was simulated.
pub(crate) struct Simulated {
    head: wire::SimulateHead,
    cells: Vec<wire::SimulateCell>,
    drawn: Option<PathBuf>,
}

impl SimulateArgs {
    pub(crate) async fn ask(&self, node: &mut Node) -> Result<Simulated, Error> {
        let tiers = node.tiers().await?;
        let bytes = |tier: Tier| {
            let of = tiers.tiers.iter().find(|status| status.tier() == tier);
            of.map_or(0, |status| status.capacity_bytes)
        };
        let options = self.options(bytes(Tier::Dram), bytes(Tier::Nvme));
        let lines = self.trace.as_deref().map(Lines::open).transpose()?;
        let failed = lines.as_ref().map(|lines| lines.failed.clone());
        let first = wire::SimulateRequest { what: Some(simulate_request::What::Options(options)) };
        let asked = std::iter::once(first).chain(lines.into_iter().flatten());
        let replies = node.simulate(tokio_stream::iter(asked)).await;
        if let Some(error) = failed.and_then(|failed| failed.lock().ok()?.take()) {
            return Err(error); // the node heard an end that was none
        }
        let mut simulated = receive(replies?).await?;
        if let Some(path) = &self.svg {
            simulated.draw(path)?;
        }
        Ok(simulated)
    }

    fn options(&self, dram_bytes: u64, nvme_bytes: u64) -> wire::SimulateOptions {
        let given = |sizes: &[Size]| sizes.iter().map(|size| size.0).collect::<Vec<_>>();
        let or = |sizes: Vec<u64>, here: Vec<u64>| if sizes.is_empty() { here } else { sizes };
        let quarters = QUARTERS.map(|quarters| dram_bytes / 4 * quarters).to_vec();
        let dram = if self.nvme.len() > 1 { vec![dram_bytes] } else { quarters };
        wire::SimulateOptions {
            policies: self.policies.clone(),
            dram_bytes: or(given(&self.dram), dram),
            nvme_bytes: or(given(&self.nvme), vec![nvme_bytes]),
            s3: match self.s3 {
                Bucket::AsItIs => vec![],
                Bucket::With => vec![true],
                Bucket::Without => vec![false],
                Bucket::Both => vec![false, true],
            },
            last_s: self.last.map_or(0, |last| last.0),
            trace: self.trace.is_some(),
            tenant: self.tenant.clone().unwrap_or_default(),
            block_bytes: self.block_bytes.map_or(0, |size| size.0),
            block_tokens: self.block_tokens,
        }
    }
}

async fn receive(mut replies: tonic::Streaming<wire::SimulateReply>) -> Result<Simulated, Error> {
    let (mut head, mut cells) = (None, Vec::new());
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} simulated, {eta} left");
    let bar = ProgressBar::new(0).with_style(style.expect("a template without mistakes"));
    loop {
        let Ok(reply) = tokio::time::timeout(SIMULATION_WAIT, replies.message()).await else {
            let message = format!("nothing was simulated within {SIMULATION_WAIT:?}");
            return Err(Error::new(Code::Unavailable, "", message, "simulate fewer requests, with --last"));
        };
        match reply?.and_then(|reply| reply.what) {
            Some(simulate_reply::What::Head(first)) => {
                bar.set_length(first.cells);
                head = Some(first);
            }
            Some(simulate_reply::What::Cell(cell)) => {
                cells.push(cell);
                bar.inc(1);
            }
            None => break,
        }
    }
    bar.finish_and_clear();
    let cut = || Error::new(Code::Unavailable, "", "the node stopped before the end", "try again");
    let head = head.filter(|head| cells.len() as u64 == head.cells).ok_or_else(cut)?;
    Ok(Simulated { head, cells, drawn: None })
}

/// A trace in messages of whole lines. What goes wrong ends it, and is left for whoever sent it.
struct Lines {
    path: PathBuf,
    file: BufReader<File>,
    failed: std::sync::Arc<std::sync::Mutex<Option<Error>>>,
}

impl Lines {
    fn open(path: &Path) -> Result<Self, Error> {
        let mut file = BufReader::new(File::open(path).map_err(|error| refused(path, &error.to_string()))?);
        let magic = file.fill_buf().map_err(|error| refused(path, &error.to_string()))?;
        if magic.starts_with(&[0x1f, 0x8b]) {
            return Err(refused(path, "it is gzipped: gunzip it first"));
        }
        Ok(Self { path: path.to_owned(), file, failed: std::sync::Arc::default() })
    }

    fn chunk(&mut self) -> Result<Vec<u8>, Error> {
        let mut chunk = Vec::new();
        while chunk.len() < CHUNK_BYTES {
            let before = chunk.len();
            let line = self.file.by_ref().take(LINE_BYTES_MAX as u64).read_until(b'\n', &mut chunk);
            let bytes = line.map_err(|error| refused(&self.path, &error.to_string()))?;
            if bytes == LINE_BYTES_MAX && chunk.last() != Some(&b'\n') {
                return Err(refused(&self.path, &format!("a line of more than {LINE_BYTES_MAX} bytes")));
            }
            if chunk.len() == before {
                break;
            }
        }
        Ok(chunk)
    }
}

impl Iterator for Lines {
    type Item = wire::SimulateRequest;

    fn next(&mut self) -> Option<wire::SimulateRequest> {
        match self.chunk() {
            Ok(chunk) if chunk.is_empty() => None,
            Ok(chunk) => {
                let what = Some(simulate_request::What::TraceLines(chunk.into()));
                Some(wire::SimulateRequest { what })
            }
            Err(error) => {
                if let Ok(mut failed) = self.failed.lock() {
                    *failed = Some(error);
                }
                None
            }
        }
    }
}

fn refused(path: &Path, error: &str) -> Error {
    let fix = "give a file of `kvctl trace record`, or Mooncake's JSONL";
    Error::invalid("--trace", format!("{}: {error}", path.display()), fix)
}

impl Simulated {
    /// Over the tier of which there are several sizes, DRAM first; none if there are not.
    fn curves(&self) -> Option<Curves> {
        type Axis = fn(&wire::SimulateCell) -> u64;
        let axes: [(&'static str, Axis); 2] =
            [("DRAM", |cell| cell.dram_bytes), ("NVMe", |cell| cell.nvme_bytes)];
        let differ = |axis: Axis| {
            let first = self.cells.first().map(axis);
            self.cells.iter().any(|cell| Some(axis(cell)) != first)
        };
        let (tier, axis) = axes.into_iter().find(|(_, axis)| differ(*axis))?;
        let [dram, nvme] = axes.map(|(_, axis)| differ(axis));
        let s3 = self.cells.iter().any(|cell| cell.s3) && self.cells.iter().any(|cell| !cell.s3);
        let name = |cell: &wire::SimulateCell| {
            let beside =
                if dram && nvme { format!(", {} NVMe", size(cell.nvme_bytes)) } else { String::new() };
            let bucket = if s3 && cell.s3 { ", S3" } else { "" };
            format!("{}{beside}{bucket}", cell.policy)
        };
        let mut lines: Vec<Line> = Vec::new();
        for cell in self.cells.iter().filter(|cell| axis(cell) > 0) {
            let (name, point) = (name(cell), (axis(cell), cell.waited_us / 1e6));
            match lines.iter_mut().find(|line| line.name == name) {
                Some(line) => line.points.push(point),
                None => lines.push(Line { name, points: vec![point] }),
            }
        }
        lines.iter_mut().for_each(|line| line.points.sort_by_key(|point| point.0));
        let title = format!(
            "{} requests of {} in {}, blocks of {}: what they wait for",
            count(self.head.requests),
            self.head.tenant,
            duration_ms((self.head.seconds * 1e3) as u64),
            size(self.head.block_bytes),
        );
        Some(Curves { title, tier, ceiling_s: self.head.computed_us / 1e6, lines })
    }

    fn draw(&mut self, path: &Path) -> Result<(), Error> {
        let refused = |error: String| {
            Error::invalid("--svg", error, "give a file that can be written, and several sizes of a tier")
        };
        let curves =
            self.curves().ok_or_else(|| refused("there is one size of each tier only".to_owned()))?;
        let drawn = curves.svg().map_err(refused)?;
        std::fs::write(path, drawn).map_err(|error| refused(format!("{}: {error}", path.display())))?;
        self.drawn = Some(path.to_owned());
        Ok(())
    }
}

impl Show for Simulated {
    fn table(&self) -> String {
        let head = &self.head;
        let s = |us: f64| format!("{:.1}", us / 1e6);
        let row = |cell: &wire::SimulateCell| {
            let hits = cell.hit_blocks_dram + cell.hit_blocks_nvme + cell.hit_blocks_s3;
            let saved_us = head.computed_us - cell.waited_us;
            vec![
                cell.policy.clone(),
                size(cell.dram_bytes),
                size(cell.nvme_bytes),
                if cell.s3 { "all" } else { "none" }.to_owned(),
                percent(hits, head.asked_blocks),
                s(cell.waited_us),
                s(saved_us),
                percent(saved_us.max(0.0) as u64, head.computed_us as u64),
                size(cell.nvme_write_bytes),
                size(cell.nvme_read_bytes),
                size(cell.s3_read_bytes),
            ]
        };
        let header = [
            "POLICY",
            "DRAM",
            "NVME",
            "S3",
            "HITS",
            "WAIT s",
            "SAVED s",
            "OF ALL",
            "NVME WRITES",
            "NVME READS",
            "S3 READS",
        ];
        let mut shown = vec![format!(
            "{} requests of {}, {} blocks of {}, {} of them different; computing all takes {:.1} s\n",
            count(head.requests),
            head.tenant,
            count(head.asked_blocks),
            size(head.block_bytes),
            count(head.blocks),
            head.computed_us / 1e6,
        )];
        if head.hit_blocks > 0 {
            let share = percent(head.hit_blocks, head.asked_blocks);
            shown.push(format!("as it was: {share} of the blocks came from this node's tiers\n"));
        }
        if head.other_requests > 0 {
            let others = count(head.other_requests);
            shown.push(format!("{others} requests of other tenants or block sizes are left out\n"));
        }
        shown.push(columns(&header, &header[4..], self.cells.iter().map(row).collect()));
        shown.extend(self.curves().map(|curves| format!("\n{}", curves.text())));
        shown.extend(self.drawn.as_ref().map(|drawn| format!("drawn into {}\n", drawn.display())));
        shown.concat()
    }

    fn objects(&self) -> Vec<Value> {
        let head = &self.head;
        let cell = |cell: &wire::SimulateCell| {
            let hits = cell.hit_blocks_dram + cell.hit_blocks_nvme + cell.hit_blocks_s3;
            json!({
                "policy": cell.policy, "dram_bytes": cell.dram_bytes, "nvme_bytes": cell.nvme_bytes, "s3": cell.s3,
                "requests": head.requests, "asked_blocks": head.asked_blocks, "block_bytes": head.block_bytes, "tenant": head.tenant,
                "block_hit_ratio": hits as f64 / head.asked_blocks.max(1) as f64,
                "hit_blocks_dram": cell.hit_blocks_dram, "hit_blocks_nvme": cell.hit_blocks_nvme, "hit_blocks_s3": cell.hit_blocks_s3,
                "saved_prefill_s": cell.found_us / 1e6, "prefill_and_fetch_s": cell.waited_us / 1e6,
                "saved_s": (head.computed_us - cell.waited_us) / 1e6, "computed_s": head.computed_us / 1e6,
                "nvme_write_bytes": cell.nvme_write_bytes, "nvme_read_bytes": cell.nvme_read_bytes, "s3_read_bytes": cell.s3_read_bytes,
                "decision_ns": cell.decision_ns,
            })
        };
        self.cells.iter().map(cell).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::io::Write as _;

    #[derive(Debug, Parser)]
    struct Alone {
        #[command(flatten)]
        simulate: SimulateArgs,
    }

    fn args(line: &str) -> Result<SimulateArgs, String> {
        let words = line.split(' ').filter(|word| !word.is_empty());
        let alone = Alone::try_parse_from(std::iter::once("simulate").chain(words));
        alone.map(|alone| alone.simulate).map_err(|error| error.to_string())
    }

    #[test]
    fn sizes_are_what_is_there_unless_they_are_given() {
        let options = |line| args(line).unwrap().options(400, 1000);
        let plain = options("");
        assert_eq!((plain.dram_bytes, plain.nvme_bytes), (vec![100, 200, 400, 800, 1600], vec![1000]));
        assert!(plain.s3.is_empty() && plain.policies.is_empty() && !plain.trace && plain.last_s == 0);
        let nvme = options("--nvme 0,1GiB --s3 both --last 2h --policy lru,worth");
        assert_eq!((nvme.dram_bytes, nvme.nvme_bytes), (vec![400], vec![0, 1 << 30]));
        assert_eq!((nvme.s3, nvme.last_s, nvme.policies.len()), (vec![false, true], 7200, 2));
        for (line, says) in [
            ("--dram 5x", "write a whole number and a unit"),
            ("--last 1h --trace t", "cannot be used"),
            ("--block-bytes 1MiB", "--trace"),
            ("--s3 perhaps", "as-it-is"),
        ] {
            let error = args(line).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn a_trace_is_sent_in_whole_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.jsonl");
        let mut file = File::create(&path).unwrap();
        let line = "x".repeat(600_000) + "\n";
        (0..5).for_each(|_| file.write_all(line.as_bytes()).unwrap());
        let sent: Vec<usize> = Lines::open(&path)
            .unwrap()
            .map(|request| match request.what {
                Some(simulate_request::What::TraceLines(lines)) => lines.len(),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(sent, [1_200_002, 1_200_002, 600_001]);
        file.write_all("y".repeat(LINE_BYTES_MAX + 1).as_bytes()).unwrap();
        let mut lines = Lines::open(&path).unwrap();
        assert_eq!(lines.by_ref().count(), 2, "it ends before the line");
        assert!(lines.failed.lock().unwrap().take().unwrap().to_string().contains("t.jsonl: a line of more"));
        std::fs::write(&path, [0x1f, 0x8b, 8]).unwrap();
        assert!(Lines::open(&path).err().unwrap().to_string().contains("gunzip"));
    }

    #[test]
    fn curves_are_over_the_tier_that_differs() {
        let cell = |policy: &str, gib: u64, waited_s: f64| wire::SimulateCell {
            policy: policy.to_owned(),
            dram_bytes: gib << 30,
            nvme_bytes: 1 << 40,
            waited_us: waited_s * 1e6,
            hit_blocks_dram: 50,
            ..wire::SimulateCell::default()
        };
        let head = wire::SimulateHead {
            cells: 4,
            requests: 10,
            asked_blocks: 200,
            computed_us: 100e6,
            hit_blocks: 100,
            ..wire::SimulateHead::default()
        };
        let cells =
            vec![cell("lru", 2, 70.0), cell("lru", 1, 90.0), cell("worth", 1, 80.0), cell("worth", 2, 60.0)];
        let mut all = Simulated { head, cells, drawn: None };
        let curves = all.curves().unwrap();
        assert_eq!((curves.tier, curves.lines.len()), ("DRAM", 2));
        assert_eq!(curves.lines[0].points, [(1 << 30, 90.0), (2 << 30, 70.0)]);
        let shown = all.table();
        for part in ["as it was: 50.0 %", "25.0 %", "40.0 %", "o worth"] {
            assert!(shown.contains(part), "{part:?} in\n{shown}");
        }
        assert_eq!(all.objects()[3]["saved_s"], 40.0);
        let folder = tempfile::tempdir().unwrap();
        all.draw(&folder.path().join("c.svg")).unwrap();
        assert!(all.table().contains("drawn into"));
        all.cells.truncate(1);
        assert!(all.curves().is_none());
        assert!(all.draw(Path::new("c.svg")).unwrap_err().to_string().contains("one size"));
    }
}
