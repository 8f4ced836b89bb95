//! `bench s3`: objects written and read through the S3 tier beside bare SDK calls for the same bytes.
//!
//! Owns the command. Ours and raw take turns on the same server with the same number of requests under way: ours packs, names,
//! checksums and verifies; raw moves bytes. The server, where none is named, is s3s-fs in this process, on a thread of its own.
//! Invariants: both sides write new objects each time, in parts of the same size, and read the same ranges; nothing of a run stays in the bucket.

mod http;
#[path = "../../../tiers/tests/s3/proxy.rs"]
#[allow(dead_code)] // its counts are for tests
pub(crate) mod proxy;
mod raw;
#[path = "../../../tiers/tests/s3/server.rs"]
#[allow(dead_code)] // tests look into its folder
pub(crate) mod server;
mod work;

use crate::failure::Failure;
use crate::report::{Case, Output, Pairs, Reporter, parse_bytes};
use crate::usage::Usage;
use http::Http;
use kvd_tiers::s3::{Bucket, BucketConfig};
use proxy::{Proxy, Weather};
use raw::Raw;
use server::{BUCKET, KEYS, Server};
use std::sync::Arc;
use std::time::{Duration, Instant};
use work::Work;

/// How long one side's turn may take.
const TURN_WAIT: Duration = Duration::from_mins(5);

/// Writes and reads of packed objects through kvd's S3 tier, as a share of what bare SDK calls reach on the same server.
///
/// Ours packs blocks into objects, uploads them in parts under names made of their checksums, and reads them back into memory,
/// each part verified; the bare side uploads and reads the same bytes in the same parts and ranges with the same number of
/// requests under way, and verifies nothing. `ratio` is the median over pairs: 1 means the tier costs nothing. `read_http`
/// has ours beside hyper alone, with addresses that were signed before; only where the endpoint is plain HTTP.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// An S3 endpoint to measure on; by default a server in this process, with its objects in the system's temporary folder.
    #[arg(long, requires = "bucket")]
    endpoint: Option<String>,
    /// The bucket, for --endpoint. Credentials come from where AWS's tools look for them.
    #[arg(long)]
    bucket: Option<String>,
    /// Region that requests are signed for.
    #[arg(long, default_value = "us-east-1")]
    region: String,
    /// Bytes of one block, a slot of an object.
    #[arg(long, default_value = "2MiB", value_parser = parse_bytes)]
    block_bytes: u64,
    /// Payload bytes of one object.
    #[arg(long, default_value = "32MiB", value_parser = parse_bytes)]
    object_bytes: u64,
    /// Objects written, then read, in one turn.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=64))]
    objects: u64,
    /// Requests under way.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=256))]
    requests: u64,
    /// How often ours and raw take turns.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pairs: u64,
    /// Milliseconds that the server in this process is made to be away.
    #[arg(long, default_value_t = 0, conflicts_with = "endpoint")]
    delay_ms: u64,
    /// Table or JSON lines.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let place = Place::of(&args).await?;
    let mut reporter = Reporter::new(args.output);
    reporter.note(&format!("{}, {} requests under way", place.what, args.requests))?;
    let bucket = Arc::new(Bucket::open(place.config.clone()).await?);
    let raw = Raw::open(&place.config).await?;
    let mut work = Work::new(&args, bucket)?;
    let http = place.config.endpoint.starts_with("http://").then(Http::new);
    for case in measure(&args, &mut work, &raw, http.as_ref()).await? {
        reporter.case(&case)?;
    }
    Ok(())
}

async fn measure(args: &Args, work: &mut Work, raw: &Raw, http: Option<&Http>) -> Result<Vec<Case>, Failure> {
    let bytes = args.objects * args.object_bytes;
    let new = || Pairs { call_bytes: bytes, ..Pairs::default() };
    let (mut writes, mut reads, mut roofs) = (new(), new(), new());
    for pair in 0..=args.pairs {
        let mut turn = (new(), new(), new());
        let blocks = work.pack();
        // Who goes first pays for what deleting left behind, so they take turns at that too.
        let content = work.content().clone();
        let bare = timed(raw.write(&content, args.objects, args.requests));
        let (ours, theirs) = in_turn(pair, timed(work.write(blocks)), bare).await?;
        keep(&mut turn.0, &ours, &theirs);
        let (objects, keys) = (ours.0, theirs.0);
        let bare = timed(raw.read(&keys, args.object_bytes, args.requests));
        let (ours, theirs) = in_turn(pair, timed(work.read(&objects)), bare).await?;
        keep(&mut turn.1, &ours, &theirs);
        if let Some(http) = http {
            let signed = raw.signed(&keys, args.object_bytes).await?;
            keep(&mut turn.2, &ours, &timed(http.read(signed, args.requests)).await?);
        }
        work.delete(&objects).await?;
        raw.delete().await?;
        if pair > 0 {
            // the first warms up connections
            append(&mut writes, turn.0);
            append(&mut reads, turn.1);
            append(&mut roofs, turn.2);
        }
    }
    let case = |pairs: Pairs, what| pairs.case("s3", what, args.block_bytes, args.requests);
    let mut cases = vec![case(writes, "write"), case(reads, "read")];
    cases.extend(http.map(|_| case(roofs, "read_http")));
    Ok(cases)
}

/// A result, microseconds, CPU seconds.
type Timed<T> = (T, f64, f64);

async fn timed<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<Timed<T>, Failure> {
    let (start, cpu_s) = (Instant::now(), Usage::own_cpu_s());
    let done = tokio::time::timeout(TURN_WAIT, work).await;
    let done = done.map_err(|_| format!("one turn took more than {} s", TURN_WAIT.as_secs()))??;
    Ok((done, start.elapsed().as_secs_f64() * 1e6, Usage::own_cpu_s() - cpu_s))
}

/// One after the other, the second first in every other pair.
async fn in_turn<A, B>(
    pair: u64,
    one: impl Future<Output = Result<A, Failure>>,
    two: impl Future<Output = Result<B, Failure>>,
) -> Result<(A, B), Failure> {
    if pair.is_multiple_of(2) {
        let one = one.await?;
        Ok((one, two.await?))
    } else {
        let two = two.await?;
        Ok((one.await?, two))
    }
}

fn keep<A, B>(pairs: &mut Pairs, ours: &Timed<A>, raw: &Timed<B>) {
    pairs.ours_us.push(ours.1);
    pairs.raw_us.push(raw.1);
    *pairs.ours_cpu_s.get_or_insert_default() += ours.2;
    *pairs.raw_cpu_s.get_or_insert_default() += raw.2;
}

fn append(all: &mut Pairs, turn: Pairs) {
    all.ours_us.extend(turn.ours_us);
    all.raw_us.extend(turn.raw_us);
    *all.ours_cpu_s.get_or_insert_default() += turn.ours_cpu_s.unwrap_or_default();
    *all.raw_cpu_s.get_or_insert_default() += turn.raw_cpu_s.unwrap_or_default();
}

/// Where it is measured.
struct Place {
    config: BucketConfig,
    what: String,
    _server: Option<Server>,
    _proxy: Option<Proxy>,
}

impl Place {
    async fn of(args: &Args) -> Result<Self, Failure> {
        let config = BucketConfig {
            region: args.region.clone(),
            path_style: true,
            prefix: "kvd-bench".to_owned(),
            requests_max: args.requests as usize,
            timeout_ms: 30_000,
            ..BucketConfig::default()
        };
        if let (Some(endpoint), Some(bucket)) = (&args.endpoint, &args.bucket) {
            let config = BucketConfig { endpoint: endpoint.clone(), bucket: bucket.clone(), ..config };
            return Ok(Self { config, what: endpoint.clone(), _server: None, _proxy: None });
        }
        let server = Server::start()?;
        let keys = Some((KEYS.0.to_owned(), KEYS.1.to_owned()));
        let config = BucketConfig { endpoint: server.endpoint(), bucket: BUCKET.to_owned(), keys, ..config };
        if args.delay_ms == 0 {
            return Ok(Self {
                config,
                what: "s3s-fs in this process".to_owned(),
                _server: Some(server),
                _proxy: None,
            });
        }
        let proxy = Proxy::start(server.address(), 0).await?;
        proxy.set(Weather { delay: Duration::from_millis(args.delay_ms), ..Weather::default() });
        let what = format!("s3s-fs in this process, {} ms away", args.delay_ms);
        let config = BucketConfig { endpoint: proxy.endpoint(), ..config };
        Ok(Self { config, what, _server: Some(server), _proxy: Some(proxy) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[tokio::test]
    async fn measures_both_ways_and_leaves_nothing() {
        let line =
            ["bench", "--block-bytes", "64KiB", "--object-bytes", "256KiB", "--objects", "2", "--pairs", "2"];
        let args = Line::parse_from(line).args;
        let place = Place::of(&args).await.unwrap();
        let bucket = Arc::new(Bucket::open(place.config.clone()).await.unwrap());
        let raw = Raw::open(&place.config).await.unwrap();
        let mut work = Work::new(&args, Arc::clone(&bucket)).unwrap();
        let cases = measure(&args, &mut work, &raw, Some(&Http::new())).await.unwrap();
        assert_eq!(cases.iter().map(|case| case.what).collect::<Vec<_>>(), ["write", "read", "read_http"]);
        assert!(cases.iter().all(|case| case.ratio.unwrap() > 0.0 && case.gbps.unwrap() > 0.0));
        let deadline = tokio::time::Instant::now() + TURN_WAIT;
        assert!(bucket.list("", "", 10, deadline).await.unwrap().is_empty());
    }
}
