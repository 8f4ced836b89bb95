//! A simulation for a person: nodes of other sizes and policies serve what was asked for of late, or a trace that was sent.
//!
//! Owns the request's check, and the thread that simulates. Invariants: one simulation at a time, at the lowest priority, which ends with its reader; a trace is bounded in
//! bytes, the combinations in number. Leaves to others: what a simulated node does (`kvd_tiers::lab::node`).

use super::{Lab, SIMULATION, last_in_line};
use crate::run::workers::spawn;
use bytes::Bytes;
use kvd_proto::cost::PrefillProfile;
use kvd_proto::wire::{self, simulate_reply, simulate_request};
use kvd_proto::{Code, Error};
use kvd_tiers::eviction;
use kvd_tiers::lab::costs::Costs;
use kvd_tiers::lab::media::Source;
use kvd_tiers::lab::node::{self, Shape};
use kvd_tiers::lab::recorder::Kind;
use kvd_tiers::lab::trace::{BLOCK_BYTES_MAX, BLOCK_TOKENS_MAX, LINE_BYTES_MAX, Row};
use kvd_tiers::lab::workload::Workload;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;

/// Of a trace that is sent. At the limit: refused.
const TRACE_BYTES_MAX: usize = 128 << 20;
/// Policies, times sizes of DRAM and NVMe, times buckets. At the limit: refused.
const CELLS_MAX: usize = 1024;
/// Blocks of one tier, some hundreds of bytes of memory each. At the limit: refused.
const TIER_BLOCKS_MAX: u64 = 20_000_000;
const REPLIES_MAX: usize = 16;

type Replies = mpsc::Receiver<Result<wire::SimulateReply, Status>>;

/// Hears what is to be simulated, and begins. What is refused is the stream's first word.
pub(in super::super) async fn simulate(
    lab: &Lab,
    mut asked: impl Stream<Item = Result<wire::SimulateRequest, Status>> + Unpin,
) -> Result<Replies, Status> {
    let first = asked.next().await.transpose()?.and_then(|first| first.what);
    let Some(simulate_request::What::Options(options)) = first else {
        return Err(Error::invalid("options", "not given", "send them first").into());
    };
    let busy = Busy::take(&lab.simulating)?;
    let (trace, past) = if options.trace {
        // where nothing is recorded, a trace says all itself
        (Some(receive(&mut asked).await?), lab.kinds().await.unwrap_or_default())
    } else {
        (None, lab.past(options.last_s).await?)
    };
    let (assumed, (replies, told)) = (lab.assumed, mpsc::channel(REPLIES_MAX));
    // all that takes time: others are served meanwhile
    spawn(SIMULATION, move || {
        last_in_line();
        let result = rows_of(trace, past.rows, &options)
            .and_then(|rows| Plan::new(options, rows, &past.kinds, assumed))
            .and_then(|plan| plan.run(&replies));
        drop(busy);
        if let Err(error) = result {
            let _ = replies.blocking_send(Err(error.into()));
        }
    });
    Ok(told)
}

/// One at a time.
struct Busy(Arc<AtomicBool>);

impl Busy {
    fn take(flag: &Arc<AtomicBool>) -> Result<Self, Error> {
        if flag.swap(true, Ordering::AcqRel) {
            let message = "another simulation is under way";
            return Err(Error::new(Code::Unavailable, "", message, "wait for its end"));
        }
        Ok(Self(Arc::clone(flag)))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

async fn receive(
    asked: &mut (impl Stream<Item = Result<wire::SimulateRequest, Status>> + Unpin),
) -> Result<Vec<Bytes>, Status> {
    let (mut chunks, mut bytes) = (Vec::new(), 0);
    while let Some(more) = asked.next().await.transpose()? {
        let Some(simulate_request::What::TraceLines(lines)) = more.what else { continue };
        bytes += lines.len();
        if bytes > TRACE_BYTES_MAX {
            let message = format!("more than {TRACE_BYTES_MAX} bytes");
            return Err(Error::invalid("trace_lines", message, "send a part of the trace").into());
        }
        chunks.push(lines);
    }
    Ok(chunks)
}

/// Of the trace, if there is one.
fn rows_of(
    trace: Option<Vec<Bytes>>,
    past: Vec<Row>,
    options: &wire::SimulateOptions,
) -> Result<Vec<Row>, Error> {
    let Some(chunks) = trace else { return Ok(past) };
    let refused = |error: String| Error::invalid("trace_lines", error, "send a trace's lines");
    let block_tokens = if options.block_tokens > 0 { options.block_tokens } else { 512 };
    let (mut rows, mut last_ms) = (Vec::new(), 0);
    for chunk in chunks {
        let text = std::str::from_utf8(&chunk).map_err(|error| refused(error.to_string()))?;
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            let row = if line.len() > LINE_BYTES_MAX {
                Err("longer than any".to_owned())
            } else {
                Row::parse(line)
            };
            let row = row.and_then(|row| row.check(block_tokens, last_ms).map(|()| row));
            let row = row.map_err(|error| refused(format!("request {}: {error}", rows.len() + 1)))?;
            last_ms = row.timestamp;
            rows.push(row);
        }
    }
    Ok(rows)
}

/// What is simulated.
struct Plan {
    options: wire::SimulateOptions,
    workload: Workload,
    shape: Shape,
    head: wire::SimulateHead,
}

/// Blocks that are simulated together: a tenant's, of a size.
type Of = (String, u64, u64);

impl Plan {
    /// `assumed`: where nobody has asked for anything here.
    fn new(
        options: wire::SimulateOptions,
        rows: Vec<Row>,
        kinds: &[(Kind, Shape)],
        assumed: (PrefillProfile, Shape),
    ) -> Result<Self, Error> {
        let options = checked(options)?;
        let is = |kind: &Kind, of: &Of| {
            (&kind.tenant, kind.block_bytes, kind.costs.block_tokens) == (&of.0, of.1, of.2)
        };
        let all = rows.len();
        let (of, rows) = most_asked_for(rows, &options, kinds)?;
        // another trace's blocks cost what blocks here do, token by token
        let here = kinds.iter().find(|(kind, _)| is(kind, &of)).or(kinds.first());
        let (prefill, shape) = here.map_or(assumed, |(kind, shape)| (kind.costs.prefill, *shape));
        let (tenant, block_bytes, block_tokens) = of;
        let costs = Costs { prefill, block_tokens };
        let workload = Workload::new("trace".to_owned(), &rows, costs).map_err(|error| {
            Error::invalid("trace_lines", error, "send a trace whose ids name whole prefixes")
        })?;
        let last_ms = rows.last().map_or(0, |row| row.timestamp);
        let ms = last_ms - rows.first().map_or(0, |row| row.timestamp);
        let computed = node::run(&workload, "no-cache", shape)?;
        let mut plan = Self {
            workload,
            shape: Shape { block_bytes, queues: true, ..shape },
            head: wire::SimulateHead {
                requests: rows.len() as u64,
                other_requests: (all - rows.len()) as u64,
                seconds: ms as f64 / 1e3,
                block_bytes,
                block_tokens,
                tenant,
                asked_blocks: computed.asked_blocks,
                computed_us: computed.computed_us,
                hit_blocks: rows.iter().filter_map(|row| row.hit_blocks).sum(),
                ..wire::SimulateHead::default()
            },
            options,
        };
        plan.head.blocks = plan.workload.blocks() as u64;
        plan.head.cells = plan.cells().len() as u64;
        plan.check_sizes()?;
        Ok(plan)
    }

    fn check_sizes(&self) -> Result<(), Error> {
        let block_bytes = self.head.block_bytes;
        let bytes_max = TIER_BLOCKS_MAX.saturating_mul(block_bytes);
        let sizes = |field, sizes: &[u64], min: u64| {
            let bad = sizes.iter().find(|bytes| **bytes > bytes_max || **bytes < min);
            bad.map_or(Ok(()), |bytes| {
                let fix = format!("give {min} to {bytes_max}, as blocks have {block_bytes} bytes");
                Err(Error::invalid(field, format!("{bytes} bytes"), fix))
            })
        };
        sizes("dram_bytes", &self.options.dram_bytes, block_bytes)?;
        sizes("nvme_bytes", &self.options.nvme_bytes, 0)
    }

    /// By policy, then DRAM, then NVMe, then bucket.
    fn cells(&self) -> Vec<(&str, u64, u64, bool)> {
        let wire::SimulateOptions { policies, dram_bytes, nvme_bytes, s3, .. } = &self.options;
        let own = [self.shape.s3];
        let buckets = if s3.is_empty() { &own[..] } else { s3 };
        let mut cells = Vec::new();
        for policy in policies {
            for &dram_bytes in dram_bytes {
                for &nvme_bytes in nvme_bytes {
                    cells.extend(buckets.iter().map(|&s3| (policy.as_str(), dram_bytes, nvme_bytes, s3)));
                }
            }
        }
        cells
    }

    fn run(&self, replies: &mpsc::Sender<Result<wire::SimulateReply, Status>>) -> Result<(), Error> {
        let tell = |what| replies.blocking_send(Ok(wire::SimulateReply { what: Some(what) })).is_ok();
        let mut listens = tell(simulate_reply::What::Head(self.head.clone()));
        for (policy, dram_bytes, nvme_bytes, s3) in self.cells() {
            if !listens {
                return Ok(());
            }
            let cell = self.cell(policy, dram_bytes, nvme_bytes, s3)?;
            listens = tell(simulate_reply::What::Cell(cell));
        }
        Ok(())
    }

    fn cell(
        &self,
        policy: &str,
        dram_bytes: u64,
        nvme_bytes: u64,
        s3: bool,
    ) -> Result<wire::SimulateCell, Error> {
        let block_bytes = self.head.block_bytes;
        let shape = Shape {
            dram_blocks: (dram_bytes / block_bytes) as usize,
            nvme_blocks: (nvme_bytes / block_bytes) as usize,
            s3,
            ..self.shape
        };
        let outcome = node::run(&self.workload, policy, shape)?;
        let [dram, nvme, bucket] =
            [Source::Dram, Source::Nvme, Source::S3].map(|source| outcome.hits(source));
        Ok(wire::SimulateCell {
            policy: policy.to_owned(),
            dram_bytes,
            nvme_bytes,
            s3,
            hit_blocks_dram: dram,
            hit_blocks_nvme: nvme,
            hit_blocks_s3: bucket,
            found_us: outcome.found_us,
            waited_us: outcome.waited_us,
            nvme_write_bytes: outcome.nvme_written_blocks * block_bytes,
            nvme_read_bytes: nvme * block_bytes,
            s3_read_bytes: bucket * block_bytes,
            decision_ns: outcome.deciding.as_nanos() as f64 / outcome.decided_blocks.max(1) as f64,
        })
    }
}

fn checked(mut options: wire::SimulateOptions) -> Result<wire::SimulateOptions, Error> {
    if options.policies.is_empty() {
        options.policies = eviction::NAMES.map(str::to_owned).into();
    }
    for policy in options.policies.iter().filter(|policy| !node::NAMES.contains(&policy.as_str())) {
        eviction::by_name(policy).map_err(|error| {
            let fix = format!("{}, {}", error.fix, node::NAMES.join(", "));
            Error::invalid("policies", error.message, fix)
        })?;
    }
    for (field, sizes) in [("dram_bytes", &options.dram_bytes), ("nvme_bytes", &options.nvme_bytes)] {
        if sizes.is_empty() {
            return Err(Error::invalid(field, "no size", "give one, or several"));
        }
    }
    if options.block_tokens > BLOCK_TOKENS_MAX || options.block_bytes > BLOCK_BYTES_MAX {
        let message = format!("{} bytes of {} tokens", options.block_bytes, options.block_tokens);
        let fix = format!("give at most {BLOCK_BYTES_MAX} of {BLOCK_TOKENS_MAX}");
        return Err(Error::invalid("block_bytes", message, fix));
    }
    let sizes = options.dram_bytes.len().saturating_mul(options.nvme_bytes.len());
    let cells = options.policies.len().saturating_mul(sizes).saturating_mul(options.s3.len().max(1));
    if cells > CELLS_MAX {
        let message = format!("{cells} combinations");
        return Err(Error::invalid("policies", message, format!("ask for at most {CELLS_MAX}")));
    }
    Ok(options)
}

/// Those of the tenant that was named, or of the blocks that were asked for most.
fn most_asked_for(
    rows: Vec<Row>,
    options: &wire::SimulateOptions,
    kinds: &[(Kind, Shape)],
) -> Result<(Of, Vec<Row>), Error> {
    let first = kinds.first().map(|(kind, _)| kind);
    let assumed_tokens = if options.block_tokens > 0 { options.block_tokens } else { 512 };
    let assumed_bytes = match (options.block_bytes, first) {
        (0, Some(kind)) => kind.block_bytes * assumed_tokens / kind.costs.block_tokens.max(1),
        (given, _) => given,
    };
    if assumed_bytes == 0 && rows.iter().any(|row| row.block_bytes.is_none()) {
        let message = "neither the trace nor what was asked for here says it";
        return Err(Error::invalid("block_bytes", message, "give the bytes of a block"));
    }
    let of = |row: &Row| {
        let (tenant, bytes, tokens) = (row.tenant.as_deref(), row.block_bytes, row.block_tokens);
        let bytes = bytes.unwrap_or(assumed_bytes).max(1);
        (tenant.unwrap_or("default").to_owned(), bytes, tokens.unwrap_or(assumed_tokens))
    };
    let mut blocks = HashMap::<Of, u64>::new();
    for row in &rows {
        *blocks.entry(of(row)).or_default() += row.hash_ids.len() as u64;
    }
    let named = |of: &Of| options.tenant.is_empty() || of.0 == options.tenant;
    let most =
        blocks.into_iter().filter(|(of, _)| named(of)).max_by_key(|(of, blocks)| (*blocks, of.clone()));
    let Some((most, _)) = most else {
        let message = if options.tenant.is_empty() { "no requests" } else { "no requests of this tenant" };
        let fix = "wait until there are some, or give a trace";
        return Err(Error::new(Code::Unavailable, "tenant", message, fix));
    };
    let rows = rows.into_iter().filter(|row| of(row) == most).collect();
    Ok((most, rows))
}
