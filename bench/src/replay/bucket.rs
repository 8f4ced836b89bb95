//! The bucket of a replay: an S3 server beside it, a proxy with bad days and a link with slow ones before that, and what came of it.
//!
//! Invariants: requests and bytes are the daemon's own counts, and the useful bytes those that the engine read; errors last the whole run; a hang, or a
//! slow link, begins when half of the requests have been served.

use super::fault::{Fault as Trouble, Turn};
use super::law::{Source, Suffered};
use crate::daemon::free_address;
use crate::demo::load::{get, http};
use crate::engine::cache::Served;
use crate::engine::fetch::S3_BYTES_PER_US;
use crate::failure::Failure;
use crate::link::Link;
use crate::report::{Output, Reporter};
use crate::s3::proxy::{Fault, Proxy, Weather};
use crate::s3::server::{BUCKET, Server};
use crate::scrape::counted;
use serde::Serialize;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// How long the end of the run waits for what is on its way to the bucket.
const UPLOADS_WAIT: Duration = Duration::from_mins(1);
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Faults that are as likely as each other.
const FAULTS: [Fault; 6] =
    [Fault::Busy, Fault::ResetBefore, Fault::ResetInBody, Fault::Truncate, Fault::Flip, Fault::WrongEtag];

/// What there is to be.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct BucketArgs {
    /// The daemon has a bucket, too: on a server in this process, or on --s3-endpoint.
    #[arg(long)]
    s3: bool,
    /// An S3 server, "http://host:port". Credentials come from where AWS's tools look for them.
    #[arg(long, requires_all = ["s3", "s3_bucket"])]
    s3_endpoint: Option<String>,
    /// The bucket there, which must be empty.
    #[arg(long)]
    s3_bucket: Option<String>,
    /// Of 1000 requests to the bucket, so many fail: refused as too many, reset, cut short, or answered with a wrong bit or name.
    #[arg(long, default_value_t = 0, requires = "s3", value_parser = clap::value_parser!(u32).range(0..=1000))]
    s3_errors: u32,
    /// After half of the trace the bucket does not answer for so many seconds.
    #[arg(long, default_value_t = 0, requires = "s3")]
    s3_hang_s: u64,
    /// After half of the trace the link to the bucket is slower by so much than what is charged for S3, both ways.
    #[arg(long, requires = "s3", conflicts_with = "s3_hang_s", value_parser = super::slower)]
    s3_slow: Option<f64>,
    /// For so many seconds.
    #[arg(long, default_value_t = 15, requires = "s3_slow", value_parser = clap::value_parser!(u64).range(1..=3600))]
    s3_slow_s: u64,
}

impl BucketArgs {
    /// Whether there is to be one.
    pub(super) fn given(&self) -> bool {
        self.s3
    }

    fn trouble(&self) -> Option<Trouble> {
        let seconds = if self.s3_slow.is_some() { self.s3_slow_s } else { self.s3_hang_s };
        (seconds > 0).then(|| Trouble::of(Duration::from_secs(seconds)))
    }
}

/// The bucket, if there is one.
pub(super) struct Bucket {
    args: BucketArgs,
    there: Option<There>,
    trouble: Option<Trouble>,
    scale: f64,
    block_bytes: u64,
    useful_bytes: u64,
    stored: u64,
}

struct There {
    _server: Option<Server>,
    proxy: Proxy,
    link: Link,
    bucket: String,
    keys_file: Option<PathBuf>,
}

/// What the bucket came to.
#[derive(Debug, Clone, Serialize)]
struct Summary {
    bench: &'static str,
    server: String,
    errors_per_mille: u32,
    hang_s: u64,
    slow: Option<f64>,
    stored_blocks: u64,
    uploaded_blocks: f64,
    skipped_blocks: f64,
    put_requests: f64,
    put_requests_per_uploaded_block: f64,
    get_requests: f64,
    received_bytes: f64,
    useful_bytes: u64,
    received_per_useful_byte: f64,
    retries: f64,
    failed_blocks: f64,
    checksum_errors: f64,
}

impl Bucket {
    /// In good weather, or with errors; `block_bytes`: of every block; `scale`: real bytes for one here.
    pub(super) async fn start(args: &BucketArgs, block_bytes: u64, scale: f64) -> Result<Self, Failure> {
        let there = if args.s3 { Some(There::start(args).await?) } else { None };
        let this = Self {
            args: args.clone(),
            there,
            trouble: args.trouble(),
            scale,
            block_bytes,
            useful_bytes: 0,
            stored: 0,
        };
        this.weather(false);
        Ok(this)
    }

    fn slow_bytes_per_us(&self) -> Option<f64> {
        self.args.s3_slow.map(|slower| S3_BYTES_PER_US / self.scale / slower)
    }

    fn weather(&self, ill: bool) {
        let Some(there) = &self.there else { return };
        let each = self.args.s3_errors / FAULTS.len() as u32;
        let first = self.args.s3_errors - each * (FAULTS.len() as u32 - 1);
        let errors =
            FAULTS.iter().enumerate().map(|(at, fault)| (*fault, if at == 0 { first } else { each }));
        let slow = self.slow_bytes_per_us();
        there.link.set(slow.filter(|_| ill));
        let per_mille = if ill && slow.is_none() { vec![(Fault::Hang, 1000)] } else { errors.collect() };
        there.proxy.set(Weather {
            per_mille,
            hang: Duration::from_secs(self.args.s3_hang_s),
            ..Weather::default()
        });
    }

    /// What the daemon must be told.
    pub(super) fn tell(&self, command: &mut Command) {
        let Some(there) = &self.there else { return };
        command.arg(format!("--s3-endpoint=http://{}", there.link.address()));
        command.arg(format!("--s3-bucket={}", there.bucket));
        if let Some(keys) = &there.keys_file {
            command.arg("--s3-keys-file").arg(keys);
        }
    }

    /// Before each request.
    pub(super) fn passes(&mut self, number: usize, requests: usize) {
        let Some(trouble) = &mut self.trouble else { return };
        match trouble.passes(number, requests) {
            Turn::Begins => self.weather(true),
            Turn::Ends => self.weather(false),
            Turn::Nothing => {}
        }
    }

    /// What it suffered in the middle of the run, if anything.
    pub(super) fn suffered(&self) -> Option<Suffered> {
        let what = match self.slow_bytes_per_us() {
            Some(rate) => format!("bucket throttled to {rate:.3} bytes/us"),
            None => "bucket hangs".to_owned(),
        };
        Some(Suffered { fault: self.trouble?, source: Source::S3, what })
    }

    /// After each request.
    pub(super) fn saw(&mut self, served: &Served) {
        self.useful_bytes += served.fetched.s3_bytes;
        self.stored += served.stored;
    }

    /// When what is on its way has come, or a minute is over.
    pub(super) async fn report(self, metrics: SocketAddr, output: Output) -> Result<(), Failure> {
        if self.there.is_none() {
            return Ok(());
        }
        let url = format!("http://{metrics}/metrics");
        let (client, start) = (http(), Instant::now());
        let mut text = get(&client, &url).await?;
        let done = |text: &str| (written(text), counted(text, "kvd_s3_put_requests_total", ""));
        loop {
            tokio::time::sleep(LOOK_EVERY * 4).await;
            let now = get(&client, &url).await?;
            let quiet = done(&now) == done(&text);
            text = now;
            if quiet || start.elapsed() > UPLOADS_WAIT {
                break;
            }
        }
        let summary = self.summary(&text);
        Reporter::new(output).object(&summary, &summary.lines())?;
        Ok(())
    }

    fn summary(&self, text: &str) -> Summary {
        let count = |name: &str| counted(text, name, "");
        let uploaded_blocks = written(text) / self.block_bytes as f64;
        let (put_requests, received_bytes) =
            (count("kvd_s3_put_requests_total"), count("kvd_s3_received_bytes_total"));
        Summary {
            bench: "replay_s3",
            server: self.args.s3_endpoint.clone().unwrap_or_else(|| "s3s-fs in this process".to_owned()),
            errors_per_mille: self.args.s3_errors,
            hang_s: self.args.s3_hang_s,
            slow: self.args.s3_slow,
            stored_blocks: self.stored,
            uploaded_blocks,
            skipped_blocks: count("kvd_s3_skipped_blocks_total"),
            put_requests,
            put_requests_per_uploaded_block: put_requests / uploaded_blocks.max(1.0),
            get_requests: count("kvd_s3_get_requests_total"),
            received_bytes,
            useful_bytes: self.useful_bytes,
            received_per_useful_byte: received_bytes / (self.useful_bytes as f64).max(1.0),
            retries: count("kvd_s3_retries_total"),
            failed_blocks: count("kvd_s3_errors_total"),
            checksum_errors: count("kvd_checksum_errors_total"),
        }
    }
}

/// Bytes of blocks that were uploaded.
fn written(text: &str) -> f64 {
    counted(text, "kvd_s3_written_bytes_total", "")
}

impl There {
    async fn start(args: &BucketArgs) -> Result<Self, Failure> {
        if let (Some(endpoint), Some(bucket)) = (&args.s3_endpoint, &args.s3_bucket) {
            let address = endpoint.trim_start_matches("http://");
            let address =
                tokio::net::lookup_host(address).await?.next().ok_or("--s3-endpoint has no address")?;
            let proxy = Proxy::start(address, 1).await?;
            let link = link_to(&proxy)?;
            return Ok(Self { _server: None, proxy, link, bucket: bucket.clone(), keys_file: None });
        }
        let server = Server::start()?;
        let proxy = Proxy::start(server.address(), 1).await?;
        let (bucket, keys_file) = (BUCKET.to_owned(), Some(server.keys_file()?));
        let link = link_to(&proxy)?;
        Ok(Self { _server: Some(server), proxy, link, bucket, keys_file })
    }
}

fn link_to(proxy: &Proxy) -> Result<Link, Failure> {
    let to = proxy.endpoint();
    Link::start(free_address()?, to.trim_start_matches("http://").parse()?)
}

impl Summary {
    /// For people.
    fn lines(&self) -> Vec<(&'static str, String)> {
        vec![
            (
                "bucket",
                format!(
                    "{}, {} of 1000 requests fail, hangs for {} s",
                    self.server, self.errors_per_mille, self.hang_s
                ),
            ),
            (
                "uploaded",
                format!(
                    "{:.0} of {} stored blocks; {:.0} left memory before",
                    self.uploaded_blocks, self.stored_blocks, self.skipped_blocks
                ),
            ),
            (
                "writes",
                format!(
                    "{:.0} requests, {:.4} a block",
                    self.put_requests, self.put_requests_per_uploaded_block
                ),
            ),
            (
                "reads",
                format!(
                    "{:.0} requests, {:.3} bytes for one of use",
                    self.get_requests, self.received_per_useful_byte
                ),
            ),
            (
                "trouble",
                format!("{:.0} retries, {:.0} blocks that did not come", self.retries, self.failed_blocks),
            ),
        ]
    }
}
