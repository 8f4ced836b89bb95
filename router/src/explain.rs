//! Why a request would run where: every candidate's numbers, for programs and for people.
//!
//! Invariants: looks, and changes nothing; times in microseconds, as they were compared. Leaves to others: the numbers themselves.

use crate::door::Placed;
use crate::place::Prediction;
use comfy_table::{CellAlignment, Table, presets};
use kvd_proto::wire::{NodeLocation, WorkerRole};
use serde_json::{Map, Value, json};
use std::fmt::Write as _;

/// The first so many are names, the others numbers.
const TEXT_COLUMNS: usize = 2;
/// Columns for people: a field of a candidate, and its title.
const COLUMNS: &[(&str, &str)] = &[
    ("worker", "worker"),
    ("role", "role"),
    ("cached_tokens", "cached"),
    ("queue_us", "queue us"),
    ("fetch_us", "fetch us"),
    ("prefill_us", "prefill us"),
    ("first_token_us", "first token us"),
    ("others_us", "others us"),
    ("total_us", "total us"),
    ("running_requests", "running"),
    ("waiting_tokens", "waiting tokens"),
    ("reserved_requests", "reserved"),
];

/// All that a placement came from and came to.
pub fn json(model: &str, placed: &Placed) -> Value {
    let took: Map<String, Value> = placed
        .took
        .iter()
        .map(|(stage, took)| (format!("{stage}_us"), micros(took.as_secs_f64() * 1e6)))
        .collect();
    let label = |place: usize| placed.workers[place].label();
    let tries = placed.choices.tries.iter();
    let tries = tries
        .map(|choice| json!({"prefill": label(choice.prefill.candidate), "decode": label(choice.decode)}));
    let located = placed.located.values().flatten();
    json!({
        "model": model,
        "prompt_tokens": placed.prompt_tokens,
        "output_tokens_expected": placed.output_tokens,
        "took": took,
        "trouble": placed.trouble.as_ref().map(ToString::to_string),
        "located": located.map(node).collect::<Vec<_>>(),
        "candidates": placed.choices.predictions.iter().map(|prediction| candidate(placed, prediction)).collect::<Vec<_>>(),
        "tries": tries.collect::<Vec<_>>(),
    })
}

/// Whole microseconds: what is behind the point is noise.
fn micros(us: f64) -> Value {
    (us.round().max(0.0) as u64).into()
}

fn node(node: &NodeLocation) -> Value {
    let runs = node.runs.iter().map(|run| {
        json!({"tier": run.tier().as_str_name(), "blocks": run.blocks, "fetch_us": micros(run.fetch_us)})
    });
    json!({"node": node.node_name, "address": node.address, "blocks": node.blocks, "runs": runs.collect::<Vec<_>>()})
}

fn candidate(placed: &Placed, prediction: &Prediction) -> Value {
    let worker = &placed.workers[prediction.candidate];
    let load = worker.load();
    json!({
        "worker": worker.label(),
        "address": worker.registration().address,
        "role": match worker.registration().role() {
            WorkerRole::Prefill => "prefill",
            WorkerRole::Decode => "decode",
            WorkerRole::Both | WorkerRole::Unspecified => "both",
        },
        "cached_tokens": prediction.cached_tokens,
        "queue_us": micros(prediction.queue_us),
        "fetch_us": micros(prediction.fetch_us),
        "prefill_us": micros(prediction.prefill_us),
        "first_token_us": micros(prediction.first_token_us),
        "others_us": micros(prediction.others_us),
        "total_us": micros(prediction.total_us()),
        "running_requests": load.running_requests,
        "waiting_tokens": load.waiting_tokens,
        "reserved_requests": worker.status.reserved_requests,
    })
}

/// What `json` says, as a table and a few lines.
pub fn text(explained: &Value) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(COLUMNS.iter().map(|(_, title)| *title));
    for (at, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        column.set_cell_alignment(if at < TEXT_COLUMNS { CellAlignment::Left } else { CellAlignment::Right });
    }
    for candidate in explained["candidates"].as_array().into_iter().flatten() {
        table.add_row(COLUMNS.iter().map(|(field, _)| plain(&candidate[*field])));
    }
    let first = &explained["tries"][0];
    let choice = match (plain(&first["prefill"]), plain(&first["decode"])) {
        (prefill, decode) if prefill == decode => decode,
        (prefill, decode) => format!("prefilled by {prefill}, decoded by {decode}"),
    };
    let took = &explained["took"];
    let mut out: String =
        table.lines().flat_map(|line| [line.trim_end().to_owned(), "\n".to_owned()]).collect();
    writeln!(
        out,
        "\n{} prompt tokens; tokenise {} us, locate {} us, place {} us\nchosen: {choice}",
        explained["prompt_tokens"], took["tokenise_us"], took["locate_us"], took["place_us"]
    )
    .expect("a String grows");
    if let Some(trouble) = explained["trouble"].as_str() {
        writeln!(out, "without what kvd knows: {trouble}").expect("a String grows");
    }
    out
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
