//! Telling what was found: rows as a table or as JSON on stdout, progress on stderr.
//!
//! Invariants: a row is told when it is known, and none is kept; a reader that has seen enough is no error; progress shows
//! only where stderr is a terminal.

use super::Output;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::io::Write as _;

/// One thing found. As JSON its fields as they are, `kind` first.
pub(super) trait Row: Serialize {
    /// What stands above rows of its kind, once; empty: nothing.
    const HEADER: &'static str = "";
    /// As a line for people.
    fn line(&self) -> String;
}

pub(super) struct Report {
    output: Output,
    /// Headers that stand above rows already.
    headers: Vec<&'static str>,
    progress: ProgressBar,
}

impl Report {
    pub(super) fn new(output: Output) -> Self {
        Self { output, headers: Vec::new(), progress: ProgressBar::hidden() }
    }

    /// From now on there are `steps` of `what`; an earlier count is over.
    pub(super) fn expect(&mut self, steps: u64, what: &str) {
        let template = format!("{{bar:40}} {{pos}}/{{len}} {what}, {{eta}} left");
        let style = ProgressStyle::with_template(&template).expect("a template without mistakes");
        self.progress.finish_and_clear();
        self.progress = ProgressBar::new(steps).with_style(style);
    }

    pub(super) fn step(&self) {
        self.progress.inc(1);
    }

    pub(super) fn row<R: Row>(&mut self, row: &R) {
        let text = match self.output {
            Output::Json => serde_json::to_string(row).expect("rows are texts and numbers") + "\n",
            Output::Table => self.header::<R>() + &row.line() + "\n",
        };
        // a reader that has seen enough is no error
        self.progress.suspend(|| drop(std::io::stdout().write_all(text.as_bytes())));
    }

    /// What goes above the first row of a kind.
    fn header<R: Row>(&mut self) -> String {
        if R::HEADER.is_empty() || self.headers.contains(&R::HEADER) {
            return String::new();
        }
        self.headers.push(R::HEADER);
        format!("{}\n", R::HEADER)
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        self.progress.finish_and_clear();
    }
}
