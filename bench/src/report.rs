//! Results as people and programs read them: a table, or one JSON object a line.
//!
//! Owns the field names, which are stable, and the statistics: medians over interleaved pairs, nearest-rank percentiles.
//! Invariant: a number that was not measured is `null` or a dash, never 0.

use serde::Serialize;
use std::io::{self, Write};

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Output {
    /// A table for people.
    #[default]
    Table,
    /// One JSON object a line.
    Json,
}

/// One measured case.
#[derive(Debug, Clone, Serialize, Default)]
pub(crate) struct Case {
    /// The benchmark.
    pub(crate) bench: &'static str,
    /// What was done.
    #[serde(rename = "case")]
    pub(crate) what: &'static str,
    /// Bytes of one block.
    pub(crate) block_bytes: u64,
    /// Blocks a call; for `nvme`, transfers under way.
    pub(crate) batch: u64,
    /// Median time of a call, in microseconds.
    pub(crate) p50_us: Option<f64>,
    /// 99th percentile of a call, in microseconds.
    pub(crate) p99_us: Option<f64>,
    /// Bytes over the median time, in 1e9 bytes a second.
    pub(crate) gbps: Option<f64>,
    /// The same for the raw loop of the same run.
    pub(crate) roof_gbps: Option<f64>,
    /// Median over pairs of ours to raw, as speed: 1 is the physical limit.
    pub(crate) ratio: Option<f64>,
    /// CPU seconds of all processes for 1e9 bytes.
    pub(crate) cpu_s_per_gb: Option<f64>,
    /// The same for the raw loop.
    pub(crate) roof_cpu_s_per_gb: Option<f64>,
    /// Median over pairs of how much longer ours took than the raw loop, in microseconds.
    pub(crate) beyond_roof_us: Option<f64>,
    /// Calls a second.
    pub(crate) per_s: Option<f64>,
    /// Resident bytes for one block.
    pub(crate) rss_bytes_per_block: Option<f64>,
}

/// Calls of ours and of the raw loop, taken in turn.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pairs {
    /// Bytes moved by one call.
    pub(crate) call_bytes: u64,
    /// Microseconds of ours, call by call.
    pub(crate) ours_us: Vec<f64>,
    /// Microseconds of the raw loop, call by call.
    pub(crate) raw_us: Vec<f64>,
    /// CPU seconds of all calls of ours, where it could be read.
    pub(crate) ours_cpu_s: Option<f64>,
    /// CPU seconds of all raw calls, where it could be read.
    pub(crate) raw_cpu_s: Option<f64>,
}

impl Pairs {
    /// The case these pairs show.
    pub(crate) fn case(&self, bench: &'static str, what: &'static str, block_bytes: u64, batch: u64) -> Case {
        assert_eq!(self.ours_us.len(), self.raw_us.len(), "ours and raw in turn");
        let pairs = || self.ours_us.iter().zip(&self.raw_us);
        let gbps = |us: &[f64]| Some(self.call_bytes as f64 / median(us.to_vec()) / 1e3);
        let moved_gb = self.call_bytes as f64 * self.ours_us.len() as f64 / 1e9;
        Case {
            bench,
            what,
            block_bytes,
            batch,
            p50_us: Some(median(self.ours_us.clone())),
            p99_us: Some(percentile(self.ours_us.clone(), 0.99)),
            gbps: gbps(&self.ours_us),
            roof_gbps: gbps(&self.raw_us),
            ratio: Some(median(pairs().map(|(ours, raw)| raw / ours).collect())),
            cpu_s_per_gb: self.ours_cpu_s.map(|cpu_s| cpu_s / moved_gb),
            roof_cpu_s_per_gb: self.raw_cpu_s.map(|cpu_s| cpu_s / moved_gb),
            beyond_roof_us: Some(median(pairs().map(|(ours, raw)| ours - raw).collect())),
            ..Case::default()
        }
    }
}

/// The middle value.
pub(crate) fn median(values: Vec<f64>) -> f64 {
    percentile(values, 0.5)
}

/// The nearest-rank percentile.
pub(crate) fn percentile(mut values: Vec<f64>, share: f64) -> f64 {
    assert!(!values.is_empty(), "a percentile of something");
    values.sort_by(f64::total_cmp);
    let rank = (share * values.len() as f64).ceil() as usize;
    values[rank.clamp(1, values.len()) - 1]
}

/// Prints cases as they come: JSON at once, a table's row at once under a head printed first.
pub(crate) struct Reporter {
    output: Output,
    rows: u64,
}

const HEAD: [&str; 12] = [
    "case",
    "block",
    "batch",
    "p50 us",
    "p99 us",
    "GB/s",
    "roof GB/s",
    "ratio",
    "CPU s/GB",
    "roof CPU",
    "beyond us",
    "per s",
];

impl Reporter {
    /// Nothing printed yet.
    pub(crate) fn new(output: Output) -> Self {
        Self { output, rows: 0 }
    }

    /// Prints one case.
    pub(crate) fn case(&mut self, case: &Case) -> io::Result<()> {
        match self.output {
            Output::Json => print_json(case),
            Output::Table => {
                if self.rows == 0 {
                    print_row(&HEAD.map(str::to_owned))?;
                }
                self.rows += 1;
                print_row(&cells(case))
            }
        }
    }

    /// A sentence for people; nothing for programs.
    pub(crate) fn note(&self, text: &str) -> io::Result<()> {
        match self.output {
            Output::Json => Ok(()),
            Output::Table => writeln!(io::stdout(), "{text}"),
        }
    }

    /// A whole object for programs, name and value lines for people.
    pub(crate) fn object(&self, object: &impl Serialize, lines: &[(&str, String)]) -> io::Result<()> {
        match self.output {
            Output::Json => print_json(object),
            Output::Table => {
                let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
                lines.iter().try_for_each(|(name, value)| writeln!(io::stdout(), "{name:width$}  {value}"))
            }
        }
    }
}

fn print_json(object: &impl Serialize) -> io::Result<()> {
    writeln!(io::stdout(), "{}", serde_json::to_string(object)?)
}

fn print_row(cells: &[String; 12]) -> io::Result<()> {
    let [name, rest @ ..] = cells;
    let mut out = io::stdout().lock();
    write!(out, "{name:<14}")?;
    rest.iter().try_for_each(|cell| write!(out, "{cell:>10}"))?;
    writeln!(out)
}

fn cells(case: &Case) -> [String; 12] {
    let number =
        |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));
    [
        case.what.to_owned(),
        bytes_text(case.block_bytes),
        case.batch.to_string(),
        number(case.p50_us, 1),
        number(case.p99_us, 1),
        number(case.gbps, 2),
        number(case.roof_gbps, 2),
        number(case.ratio, 2),
        number(case.cpu_s_per_gb, 3),
        number(case.roof_cpu_s_per_gb, 3),
        number(case.beyond_roof_us, 1),
        number(case.per_s, 0),
    ]
}

/// A size with the largest binary unit that leaves it whole.
pub(crate) fn bytes_text(bytes: u64) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    let whole = units.iter().find(|(unit, _)| bytes >= *unit && bytes.is_multiple_of(*unit));
    whole.map_or(format!("{bytes} B"), |(unit, name)| format!("{} {name}", bytes / unit))
}

/// Reads "64KiB", "512 MiB", "8GiB" or a plain number of bytes.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic() || letter == ' ');
    let unit = match text[digits.len()..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1_u64,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        other => return Err(format!("unit {other}; give B, KiB, MiB or GiB")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{digits:?} is not a whole number"))?;
    number.checked_mul(unit).filter(|&bytes| bytes > 0).ok_or_else(|| format!("{text} is out of range"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_print() {
        for (text, bytes) in [("64KiB", 65_536), ("512 MiB", 512 << 20), ("8gib", 8 << 30), ("100", 100)] {
            assert_eq!(parse_bytes(text), Ok(bytes));
        }
        for text in ["", "KiB", "-1", "0", "5 TiBs", "99999999999GiB", "1.5GiB"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
        assert_eq!((bytes_text(65_536), bytes_text(100)), ("64 KiB".to_owned(), "100 B".to_owned()));
    }

    #[test]
    fn percentiles_are_nearest_rank() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert!((percentile(values.clone(), 0.99) - 99.0).abs() < 1e-9);
        assert!((median(values) - 50.0).abs() < 1e-9);
        assert!((percentile(vec![7.0], 0.99) - 7.0).abs() < 1e-9);
    }

    #[test]
    fn a_ratio_is_the_median_of_pairs_not_of_medians() {
        let pairs = Pairs {
            call_bytes: 1000,
            ours_us: vec![2.0, 10.0, 4.0],
            raw_us: vec![1.0, 9.0, 1.0],
            ours_cpu_s: Some(3e-6),
            raw_cpu_s: None,
        };
        let case = pairs.case("t", "t", 1000, 1);
        assert!((case.ratio.unwrap() - 0.5).abs() < 1e-9);
        assert!((case.gbps.unwrap() - 0.25).abs() < 1e-9);
        assert!((case.cpu_s_per_gb.unwrap() - 1.0).abs() < 1e-9);
        assert_eq!(case.roof_cpu_s_per_gb, None);
    }

    #[test]
    fn the_json_field_names_are_stable() {
        let json = serde_json::to_value(Case::default()).unwrap();
        for field in [
            "bench",
            "case",
            "block_bytes",
            "batch",
            "p50_us",
            "p99_us",
            "gbps",
            "roof_gbps",
            "ratio",
            "cpu_s_per_gb",
        ] {
            assert!(json.get(field).is_some(), "{field}");
        }
    }
}
