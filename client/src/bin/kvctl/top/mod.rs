//! `kvctl top`: the whole cluster, again and again.
//!
//! Owns the loop. `fleet` looks at the nodes, `rates` compares two looks, `view` shows them. Invariants: a node that is away
//! ends nothing; Ctrl-C and a closed pipe are a quiet end; the screen is cleared only where there is one.

mod fleet;
mod rates;
mod view;

use crate::node::Node;
use crate::text::Interval;
use crate::{Output, print, shown};
use clap::Args;
use fleet::{Fleet, View};
use kvd_proto::Error;
use std::io::IsTerminal as _;
use std::time::Duration;
use tokio::time::MissedTickBehavior;

/// To the upper left corner, and everything after it gone.
const CLEAR: &str = "\x1b[H\x1b[2J";

#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// From one look to the next: 500ms, 2s, 1m
    #[arg(long, default_value = "1s")]
    interval: Interval,
    /// Show one interval and end
    #[arg(long)]
    once: bool,
}

/// Shows the cluster of `node` until interrupted.
pub(crate) async fn run(node: Node, args: &TopArgs, output: Output) -> Result<(), Error> {
    tokio::select! {
        ended = refresh(node, args, output) => ended,
        interrupted = tokio::signal::ctrl_c() => {
            interrupted.map_err(|error| Error::invalid("signals", error.to_string(), "free some descriptors"))
        }
    }
}

async fn refresh(node: Node, args: &TopArgs, output: Output) -> Result<(), Error> {
    let mut fleet = Fleet::of(node).await?;
    let mut interval = tokio::time::interval(Duration::from_millis(args.interval.0.into()));
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval.tick().await;
    let first = fleet.look().await;
    // one look has no rates: with only one to show, it is the second
    let mut goes_on = args.once || print(&screen(&first, output))?;
    while goes_on {
        interval.tick().await;
        goes_on = print(&screen(&fleet.look().await, output))? && !args.once;
    }
    Ok(())
}

fn screen(view: &View, output: Output) -> String {
    let text = shown(view, output);
    match output {
        Output::Json => text,
        Output::Table if std::io::stdout().is_terminal() => format!("{CLEAR}{text}"),
        Output::Table => text + "\n",
    }
}
