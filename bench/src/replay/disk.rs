//! A replay's disk, which is full, slow or gone for a while in the middle of it, and what the node said of that.
//!
//! Invariants: the trouble begins when half of the requests have been served; what the node says of its tier is read from the node, between two requests.

use super::fault::{Fault, Turn};
use super::law::{Source, Suffered};
use crate::daemon::Daemon;
use crate::disk::{Ailment, HEAL_WAIT_MAX, Node, say};
use crate::engine::cache::Served;
use crate::engine::fetch::NVME_BYTES_PER_US;
use crate::failure::Failure;
use crate::report::{Output, Reporter};
use serde::Serialize;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// How often the node is asked while its disk is ill, or not yet well again.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What there is to be.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct DiskArgs {
    /// After half of the trace the disk is full (takes no writes), slow (a second late), gone (EIO on everything), or throttled to a twentieth of what is
    /// charged for NVMe.
    #[arg(long)]
    disk: Option<Bad>,
    /// For so many seconds.
    #[arg(long, default_value_t = 15, requires = "disk", value_parser = clap::value_parser!(u64).range(1..=3600))]
    disk_s: u64,
}

impl DiskArgs {
    /// Whether it is to suffer.
    pub(super) fn given(&self) -> bool {
        self.disk.is_some()
    }
}

/// How a disk can be.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Bad {
    Full,
    Slow,
    Gone,
    Throttled,
}

/// The disk, if it is to suffer.
pub(super) struct Disk {
    case: Option<Case>,
}

struct Case {
    ailment: Ailment,
    said: PathBuf,
    node: Option<Node>,
    fault: Fault,
    looked: Option<Instant>,
    healed: Option<Duration>,
    trouble: String,
    in_metrics: bool,
    during: Hits,
    outside: Hits,
}

#[derive(Debug, Clone, Copy, Default)]
struct Hits {
    requests: u64,
    hits: u64,
    blocks: u64,
}

/// What came of it.
#[derive(Debug, Clone, Serialize)]
struct Summary {
    bench: &'static str,
    disk: String,
    seconds: u64,
    began_at_request: usize,
    requests_during: u64,
    hit_ratio_during: f64,
    hit_ratio_outside: f64,
    trouble: String,
    in_metrics: bool,
    healed_s: f64,
    still_in_metrics: bool,
}

impl Disk {
    /// Well, at first; `folder`: where it hears how it is; `scale`: real bytes for one here.
    pub(super) fn new(args: &DiskArgs, folder: &Path, scale: f64) -> Result<Self, Failure> {
        let ailment = match args.disk {
            None => return Ok(Self { case: None }),
            Some(Bad::Full) => Ailment::Full,
            Some(Bad::Slow) => Ailment::Slow,
            Some(Bad::Gone) => Ailment::Gone,
            Some(Bad::Throttled) => Ailment::Throttled(NVME_BYTES_PER_US / 20.0 / scale),
        };
        let said = folder.join("ailment");
        say(&said, Ailment::Nothing)?;
        let case = Case {
            ailment,
            said,
            node: None,
            fault: Fault::of(Duration::from_secs(args.disk_s)),
            looked: None,
            healed: None,
            trouble: String::new(),
            in_metrics: false,
            during: Hits::default(),
            outside: Hits::default(),
        };
        Ok(Self { case: Some(case) })
    }

    /// What the daemon must be told.
    pub(super) fn tell(&self, command: &mut Command) {
        if let Some(case) = &self.case {
            command.arg("--ailment").arg(&case.said);
        }
    }

    /// The daemon to ask.
    pub(super) async fn watch(&mut self, daemon: &Daemon, metrics: SocketAddr) -> Result<(), Failure> {
        if let Some(case) = &mut self.case {
            case.node = Some(Node::dial(daemon, metrics).await?);
        }
        Ok(())
    }

    /// Before each request.
    pub(super) async fn passes(&mut self, number: usize, requests: usize) -> Result<(), Failure> {
        let Some(case) = &mut self.case else { return Ok(()) };
        match case.fault.passes(number, requests) {
            Turn::Begins => say(&case.said, case.ailment),
            Turn::Ends => say(&case.said, Ailment::Nothing),
            Turn::Nothing if case.fault.began().is_some() && case.healed.is_none() => case.look().await,
            Turn::Nothing => Ok(()),
        }
    }

    /// After each request.
    pub(super) fn saw(&mut self, served: &Served) {
        let Some(case) = &mut self.case else { return };
        let hits = if case.fault.is_on() { &mut case.during } else { &mut case.outside };
        hits.requests += 1;
        hits.hits += served.hits();
        hits.blocks += served.hits() + served.misses;
    }

    /// What it suffered, if anything.
    pub(super) fn suffered(&self) -> Option<Suffered> {
        let case = self.case.as_ref()?;
        let what = format!("disk {}", case.ailment);
        Some(Suffered { fault: case.fault, source: Source::Nvme, what })
    }

    /// After the last request; waits until the node says that all is well.
    pub(super) async fn report(mut self, output: Output) -> Result<(), Failure> {
        let Some(case) = &mut self.case else { return Ok(()) };
        if case.fault.ended().is_none() {
            return Err(format!("the trace ended before the disk was {} for --disk-s", case.ailment).into());
        }
        while case.healed.is_none() {
            tokio::time::sleep(LOOK_EVERY).await;
            case.look().await?;
        }
        let summary = case.summary().await?;
        Ok(Reporter::new(output).object(&summary, &summary.lines())?)
    }
}

impl Case {
    /// Asks the node, unless it was asked just now.
    async fn look(&mut self) -> Result<(), Failure> {
        if self.looked.is_some_and(|at| at.elapsed() < LOOK_EVERY) {
            return Ok(());
        }
        let Some(node) = &self.node else { return Ok(()) };
        self.looked = Some(Instant::now());
        let now = node.trouble().await?;
        if self.trouble.is_empty() && !now.is_empty() {
            (self.trouble, self.in_metrics) = (now, node.degraded().await?);
            return Ok(());
        }
        let Some(ended) = self.fault.ended() else { return Ok(()) };
        if now.is_empty() {
            self.healed = Some(ended.at.elapsed());
        } else if ended.at.elapsed() > HEAL_WAIT_MAX {
            return Err(format!("the disk is well again for {HEAL_WAIT_MAX:?}, the node says: {now}").into());
        }
        Ok(())
    }

    async fn summary(&self) -> Result<Summary, Failure> {
        let still_in_metrics = match &self.node {
            Some(node) => node.degraded().await?,
            None => false,
        };
        let ratio = |hits: Hits| hits.hits as f64 / hits.blocks.max(1) as f64;
        Ok(Summary {
            bench: "replay_disk",
            disk: self.ailment.to_string(),
            seconds: self.fault.lasts().as_secs(),
            began_at_request: self.fault.began().map_or(0, |began| began.request),
            requests_during: self.during.requests,
            hit_ratio_during: ratio(self.during),
            hit_ratio_outside: ratio(self.outside),
            trouble: self.trouble.clone(),
            in_metrics: self.in_metrics,
            healed_s: self.healed.unwrap_or_default().as_secs_f64(),
            still_in_metrics,
        })
    }
}

impl Summary {
    /// For people.
    fn lines(&self) -> Vec<(&'static str, String)> {
        let metric = |said: bool| if said { "the metric says so" } else { "the metric does not say so" };
        vec![
            ("disk", format!("{} for {} s from request {}", self.disk, self.seconds, self.began_at_request)),
            (
                "hits",
                format!(
                    "{:.3} in the {} requests meanwhile, {:.3} in all others",
                    self.hit_ratio_during, self.requests_during, self.hit_ratio_outside
                ),
            ),
            ("kvctl tiers", format!("{:?}; {}", self.trouble, metric(self.in_metrics))),
            ("well again", format!("after {:.2} s; {}", self.healed_s, metric(self.still_in_metrics))),
        ]
    }
}
