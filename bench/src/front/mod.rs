//! `bench front`: what the router adds to a request, against asking the engine directly.
//!
//! Owns the command: the same prompts both ways in turn, arriving as they like. Invariants: a pair is one prompt, asked both ways within the
//! same moment, and who goes first alternates; both count from the request's first byte to the answer's. An answer that is not whole fails the run.
//! Leaves to others: the processes (`fleet`), texts and arrivals (`text`), what the router says of itself (`scrape`).

mod text;

use crate::demo::load::{self, Http};
use crate::demo::{self, BLOCK_TOKENS, DRAM_BYTES};
use crate::failure::Failure;
use crate::fleet::{Fleet, MODEL, Plan};
use crate::folder;
use crate::report::{Output, Reporter, median, percentile};
use crate::scrape;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use kvd_router::openai::{self, Endpoint};
use kvd_router::tokens::Tokenizer;
use serde::Serialize;
use serde_json::json;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Small: what is measured is not moving them.
const BLOCK_BYTES: u32 = 4096;
/// Of the engine: more than all prompts of a run together may need.
const HBM_BLOCKS: u32 = 200_000;
/// Of one answer. At the limit: the run fails.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// Tokens of an answer.
const ANSWER_TOKENS: u32 = 2;
/// Words by which it is found how many tokens one has.
const SAMPLE_WORDS: usize = 5000;
/// Pairs that are not counted: connections are made, words become known.
const WARM_UP: u64 = 20;
/// Of one run. At the limit: `--rate` and `--seconds` are refused.
const PAIRS_MAX: u64 = 1_000_000;
const STAGES: [&str; 4] = ["tokenise", "locate", "place", "reserve"];

/// What the router adds: the same prompts through it and directly to the engine, in turn, as streamed completions.
///
/// One kvd, one simulated engine that computes in no time and keeps its blocks there, and the router. Pairs arrive at random
/// (Poisson) whatever became of those before; each prompt is asked both ways, who goes first alternates. The first numbers are the
/// differences within the pairs, until the first byte and until the last; then the distributions of both ways. Tokenising is shown
/// apart: measured alone in this process, and under load as the router says. This command needs a processor too: `late` is how far it fell behind its own arrivals.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Length of the prompts.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(10..=100_000))]
    prompt_tokens: u32,
    /// Pairs a second.
    #[arg(long, default_value_t = 100.0)]
    rate: f64,
    /// How long pairs arrive.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Another seed, other prompts and arrivals.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where everybody keeps their files, which are removed afterwards; by default the system's temporary folder.
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Table or JSON.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// One answer's times.
#[derive(Debug, Clone, Copy)]
struct Took {
    first_ms: f64,
    whole_ms: f64,
}

#[derive(Debug, Clone, Copy)]
struct Pair {
    number: u64,
    direct: Took,
    through: Took,
    late_ms: f64,
}

/// A distribution, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
struct Spread {
    p50: f64,
    p99: f64,
    max: f64,
}

/// Both ways, and the difference within each pair.
#[derive(Debug, Clone, Copy, Serialize)]
struct Compared {
    added_ms: Spread,
    direct_ms: Spread,
    through_ms: Spread,
}

/// One of the router's stages under this load.
#[derive(Debug, Clone, Serialize)]
struct Stage {
    stage: &'static str,
    mean_ms: Option<f64>,
    /// The upper edge of the bucket that the 99th of a hundred is in.
    p99_at_most_ms: Option<f64>,
}

#[derive(Debug, Clone, Serialize)]
struct Summary {
    bench: &'static str,
    prompt_tokens: u32,
    rate: f64,
    pairs: usize,
    first_byte: Compared,
    last_byte: Compared,
    /// Alone, in this process.
    tokenise_alone_ms: Spread,
    stages: Vec<Stage>,
    late_ms: Spread,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let pairs = args.pairs()?;
    let reporter = Reporter::new(args.output);
    let folder = folder::temporary(args.folder.as_deref())?;
    let fleet = Fleet::start(&plan(), folder.path())?;
    let client = load::http();
    demo::found(&fleet, &client, 1).await?;
    let tokenizer = Tokenizer::open(&folder.path().join("tokenizer"))?;
    let words = words(&tokenizer, args.prompt_tokens)?;
    let tokenise_alone_ms = tokenise_alone(&tokenizer, args.seed, pairs, words)?;
    let measured = measure(&fleet, &client, &args, pairs, words).await?;
    let metrics = load::get(&client, &format!("{}/metrics", fleet.router.address)).await?;
    let summary = Summary {
        bench: "front",
        prompt_tokens: args.prompt_tokens,
        rate: args.rate,
        pairs: measured.len(),
        first_byte: Compared::of(&measured, |took| took.first_ms),
        last_byte: Compared::of(&measured, |took| took.whole_ms),
        tokenise_alone_ms,
        stages: STAGES.map(|stage| Stage::of(&metrics, stage)).to_vec(),
        late_ms: Spread::of(measured.iter().map(|pair| pair.late_ms).collect()),
    };
    Ok(reporter.object(&summary, &summary.lines())?)
}

impl Args {
    fn pairs(&self) -> Result<u64, Failure> {
        let pairs = self.rate * self.seconds as f64;
        if (1.0..=PAIRS_MAX as f64).contains(&pairs) {
            return Ok(pairs as u64);
        }
        Err(format!(
            "--rate {} for --seconds {}: give 1 to {PAIRS_MAX} pairs in all",
            self.rate, self.seconds
        )
        .into())
    }
}

fn plan() -> Plan {
    Plan {
        nodes: 1,
        dram_bytes: DRAM_BYTES,
        nvme_bytes: 0,
        engines: 1,
        engine_args: vec![
            "--time-scale=10000".to_owned(),
            format!("--hbm-blocks={HBM_BLOCKS}"),
            format!("--block-tokens={BLOCK_TOKENS}"),
            format!("--block-bytes={BLOCK_BYTES}"),
            "--requests-max=4096".to_owned(),
        ],
        caches: true,
        placement: "cost",
        block_bytes: BLOCK_BYTES,
        planner: None,
        etcd: None,
        ttl_ms: None,
    }
}

fn body(prompt: &str) -> String {
    json!({"model": MODEL, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "stream": true}).to_string()
}

fn count(tokenizer: &Tokenizer, prompt: &str) -> Result<usize, Failure> {
    let request = openai::Request::parse(Endpoint::Completions, body(prompt).as_bytes());
    let tokens = request.and_then(|request| tokenizer.tokens(&request));
    Ok(tokens.map_err(|refusal| refusal.message)?.len())
}

/// How many words have about so many tokens.
fn words(tokenizer: &Tokenizer, tokens: u32) -> Result<usize, Failure> {
    let sample = count(tokenizer, &text::prompt(0, 0, SAMPLE_WORDS))?;
    Ok((tokens as usize * SAMPLE_WORDS).div_ceil(sample))
}

fn tokenise_alone(tokenizer: &Tokenizer, seed: u64, pairs: u64, words: usize) -> Result<Spread, Failure> {
    let mut took_ms = Vec::new();
    for number in 0..pairs.min(500) {
        // not the prompts of the run
        let prompt = text::prompt(!seed, number, words);
        let start = Instant::now();
        count(tokenizer, &prompt)?;
        took_ms.push(ms(start));
    }
    Ok(Spread::of(took_ms))
}

fn ms(from: Instant) -> f64 {
    from.elapsed().as_secs_f64() * 1e3
}

/// All pairs, each when it arrives.
async fn measure(
    fleet: &Fleet,
    client: &Http,
    args: &Args,
    pairs: u64,
    words: usize,
) -> Result<Vec<Pair>, Failure> {
    let ways = [&fleet.engines[0].address, &fleet.router.address]
        .map(|address| format!("{address}{}", Endpoint::Completions.path()));
    let (mut tasks, mut measured) = (JoinSet::new(), Vec::new());
    let mut due = tokio::time::Instant::now();
    for number in 0..pairs + WARM_UP {
        due += Duration::from_secs_f64(text::gap_s(args.seed, number, args.rate));
        let body = Bytes::from(body(&text::prompt(args.seed, number, words)));
        tokio::time::sleep_until(due).await;
        tasks.spawn_local(pair(client.clone(), ways.clone(), number, body, due.into_std()));
        while let Some(ended) = tasks.try_join_next() {
            measured.push(ended??);
        }
    }
    while let Some(ended) = tasks.join_next().await {
        measured.push(ended??);
    }
    measured.retain(|pair| pair.number >= WARM_UP);
    Ok(measured)
}

async fn pair(
    client: Http,
    ways: [String; 2],
    number: u64,
    body: Bytes,
    due: Instant,
) -> Result<Pair, Failure> {
    let late_ms = ms(due);
    let [direct, through] = &ways;
    let (direct, through) = if number.is_multiple_of(2) {
        let direct = ask(&client, direct, body.clone()).await?;
        (direct, ask(&client, through, body).await?)
    } else {
        let through = ask(&client, through, body.clone()).await?;
        (ask(&client, direct, body).await?, through)
    };
    Ok(Pair { number, direct, through, late_ms })
}

async fn ask(client: &Http, url: &str, body: Bytes) -> Result<Took, Failure> {
    tokio::time::timeout(ANSWER_MAX, answered(client, url, body))
        .await
        .map_err(|_| format!("{url}: no end in {ANSWER_MAX:?}"))?
}

async fn answered(client: &Http, url: &str, body: Bytes) -> Result<Took, Failure> {
    let request = Request::builder().method(Method::POST).uri(url);
    let request = request.header("content-type", "application/json").body(Full::new(body))?;
    let start = Instant::now();
    let answer = client.request(request).await?;
    let (status, mut rest) = (answer.status(), answer.into_body());
    let (mut first_ms, mut all) = (None, Vec::new());
    while let Some(frame) = rest.frame().await {
        if let Ok(bytes) = frame?.into_data() {
            first_ms.get_or_insert_with(|| ms(start));
            all.extend_from_slice(&bytes);
        }
    }
    let is_whole = status == StatusCode::OK && all.trim_ascii_end().ends_with(b"[DONE]");
    match first_ms {
        Some(first_ms) if is_whole => Ok(Took { first_ms, whole_ms: ms(start) }),
        _ => Err(format!("{url}: {status}, said {}", String::from_utf8_lossy(&all)).into()),
    }
}

impl Spread {
    fn of(values: Vec<f64>) -> Self {
        Self {
            p50: median(values.clone()),
            p99: percentile(values.clone(), 0.99),
            max: percentile(values, 1.0),
        }
    }

    fn line(self) -> String {
        let Self { p50, p99, max } = self;
        format!("p50 {p50:8.3} ms   p99 {p99:8.3} ms   max {max:8.3} ms")
    }
}

impl Compared {
    fn of(pairs: &[Pair], what: fn(&Took) -> f64) -> Self {
        let of = |each: &dyn Fn(&Pair) -> f64| Spread::of(pairs.iter().map(each).collect());
        Self {
            added_ms: of(&|pair| what(&pair.through) - what(&pair.direct)),
            direct_ms: of(&|pair| what(&pair.direct)),
            through_ms: of(&|pair| what(&pair.through)),
        }
    }

    /// Of the distributions, not within pairs.
    fn apart_line(&self) -> String {
        let (through, direct) = (&self.through_ms, &self.direct_ms);
        format!("p50 {:8.3} ms   p99 {:8.3} ms", through.p50 - direct.p50, through.p99 - direct.p99)
    }
}

impl Stage {
    fn of(metrics: &str, stage: &'static str) -> Self {
        let (name, label) = ("kvd_router_stage_seconds", format!("stage=\"{stage}\""));
        let ms = |seconds: f64| seconds * 1e3;
        Self {
            stage,
            mean_ms: scrape::mean(metrics, name, &label).map(ms),
            p99_at_most_ms: scrape::at_most(metrics, name, &label, 0.99).map(ms),
        }
    }

    fn line(&self) -> String {
        let number = |ms: Option<f64>| ms.map_or("-".to_owned(), |ms| format!("{ms:.3} ms"));
        format!("mean {}, p99 at most {}", number(self.mean_ms), number(self.p99_at_most_ms))
    }
}

impl Summary {
    fn lines(&self) -> Vec<(&str, String)> {
        let (first, last) = (&self.first_byte, &self.last_byte);
        let mut lines = vec![
            ("pairs", format!("{} of {} tokens, {} a second", self.pairs, self.prompt_tokens, self.rate)),
            ("first byte: added, within pairs", first.added_ms.line()),
            ("  through less direct", first.apart_line()),
            ("  directly", first.direct_ms.line()),
            ("  through the router", first.through_ms.line()),
            ("last byte: added, within pairs", last.added_ms.line()),
            ("  through less direct", last.apart_line()),
            ("tokenising alone", self.tokenise_alone_ms.line()),
        ];
        lines.extend(self.stages.iter().map(|stage| (stage.stage, stage.line())));
        lines.push(("late", self.late_ms.line()));
        lines
    }
}
