//! `kvctl trace record`: what was asked of a node, and is, as a file that `kvctl policy simulate` and `bench policy` read.
//!
//! Invariants: a file is only ever added to what this call made; what is missing from it is said. Leaves to others: what a line means (the node; tiers/FORMAT.md).

use crate::node::Node;
use crate::show::Show;
use crate::text::{Span, count, size};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use kvd_proto::Error;
use kvd_proto::wire;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long after the end of a recording its last requests may come.
const LATE_MAX: Duration = Duration::from_mins(2);

#[derive(Debug, Args)]
pub(crate) struct TraceArgs {
    #[command(subcommand)]
    command: TraceCommand,
}

#[derive(Debug, Subcommand)]
enum TraceCommand {
    /// Digests of the blocks that were asked for, by request: no prompts
    Record(RecordArgs),
}

#[derive(Debug, Args)]
struct RecordArgs {
    /// Where to: a new file
    file: PathBuf,
    /// From now on, for so long: 30s, 10m, 2h; at most 1d
    #[arg(long = "for", value_name = "TIME", required_unless_present = "last")]
    lasts: Option<Span>,
    /// And what was asked for in so long before, as far as the node still has it
    #[arg(long, value_name = "TIME")]
    last: Option<Span>,
}

/// What came of it.
pub(crate) struct Recorded {
    file: PathBuf,
    requests: u64,
    lost_requests: u64,
    bytes: u64,
}

impl TraceArgs {
    pub(crate) async fn record(&self, node: &mut Node) -> Result<Recorded, Error> {
        let TraceCommand::Record(args) = &self.command;
        args.record(node).await
    }
}

impl RecordArgs {
    async fn record(&self, node: &mut Node) -> Result<Recorded, Error> {
        let refused = |error: std::io::Error| refused(&self.file, &error);
        let seconds = |span: Option<Span>| span.map_or(0, |span| span.0);
        let (for_s, last_s) = (seconds(self.lasts), seconds(self.last));
        let mut lines = node.record(wire::RecordTraceRequest { for_s, last_s }).await?; // or no file is left behind
        let mut out = BufWriter::new(File::create_new(&self.file).map_err(refused)?);
        let mut recorded = Recorded { file: self.file.clone(), requests: 0, lost_requests: 0, bytes: 0 };
        let (bar, began) = (bar(for_s), Instant::now());
        let ends = began + Duration::from_secs(for_s.into()) + LATE_MAX;
        loop {
            let left = ends.saturating_duration_since(Instant::now());
            let Ok(more) = tokio::time::timeout(left, lines.message()).await else {
                return Err(Error::invalid(
                    "--for",
                    "the node does not end the recording",
                    "see `kvctl status`",
                ));
            };
            let Some(more) = more? else { break };
            out.write_all(&more.lines).map_err(refused)?;
            recorded.requests += more.requests;
            recorded.lost_requests += more.lost_requests;
            recorded.bytes += more.lines.len() as u64;
            bar.set_message(format!("{} requests", count(recorded.requests)));
            bar.set_position(began.elapsed().as_secs().min(for_s.into()));
        }
        bar.finish_and_clear();
        out.flush().map_err(refused)?;
        Ok(recorded)
    }
}

/// Seconds done, on a terminal only.
fn bar(seconds: u32) -> ProgressBar {
    let style =
        ProgressStyle::with_template("{bar:40} {pos}/{len} s, {msg}").expect("a template without mistakes");
    ProgressBar::new(seconds.into()).with_style(style)
}

fn refused(path: &Path, error: &std::io::Error) -> Error {
    let fix = "give a file that does not exist yet, in a folder that can be written";
    Error::invalid("file", format!("{}: {error}", path.display()), fix)
}

impl Show for Recorded {
    fn table(&self) -> String {
        let lost = match self.lost_requests {
            0 => String::new(),
            lost => format!("; {} more were lost, as this did not keep up", count(lost)),
        };
        let file = self.file.display();
        format!("{file}: {} requests, {}{lost}\n", count(self.requests), size(self.bytes))
    }

    fn objects(&self) -> Vec<Value> {
        let file = self.file.display().to_string();
        vec![json!({
            "file": file, "requests": self.requests, "lost_requests": self.lost_requests, "bytes": self.bytes,
        })]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Alone {
        #[command(flatten)]
        trace: TraceArgs,
    }

    #[test]
    fn a_recording_has_a_beginning_or_an_end() {
        let parse = |line: &str| Alone::try_parse_from(line.split(' ')).map(|alone| alone.trace.command);
        let TraceCommand::Record(args) = parse("trace record t.jsonl --for 10m --last 1h").unwrap();
        assert_eq!((args.lasts, args.last), (Some(Span(600)), Some(Span(3600))));
        assert!(parse("trace record t.jsonl --last 30s").is_ok());
        for (line, says) in [
            ("trace record t.jsonl", "--for"),
            ("trace record --for 1m", "FILE"),
            ("trace record t --for 5ms", "second"),
        ] {
            assert!(parse(line).unwrap_err().to_string().contains(says), "{line}");
        }
    }

    #[test]
    fn what_was_lost_is_said() {
        let mut recorded = Recorded { file: "t.jsonl".into(), requests: 1200, lost_requests: 0, bytes: 4096 };
        assert_eq!(recorded.table(), "t.jsonl: 1,200 requests, 4 KiB\n");
        recorded.lost_requests = 7;
        assert!(recorded.table().contains("7 more were lost"));
    }
}
