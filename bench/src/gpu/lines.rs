//! What `bench gpu` prints: a line for each case, with the device and the bar that it is held against.
//!
//! Owns the bars and the field names, which are stable. Invariants: every line names device and driver; a bar is met or not only where a GPU was measured: lines of the
//! stand-in have none that is met, and a note that says why; the last line counts them.
//! Leaves to others: the numbers.

use super::pages::{BLOCK_BYTES, Kind};
use crate::failure::Failure;
use crate::report::{Output, Pairs, bytes_text};
use kvd_tiers::gpu::DeviceInfo;
use serde_json::{Value, json};

/// Fewer blocks are a matter of latency, and no bar is set for them.
const BAR_BLOCKS_MIN: u32 = 32;
const STAND_IN: &str = "a stand-in in ordinary memory: this says nothing about a GPU";

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// Pinned slots to pages, verified by the kernel: there is no other way.
    Load,
    /// Pages to pinned slots.
    Store,
    /// With the checksums of all parts told.
    StoreSummed,
    /// Slots in HBM to pages; they were verified when they came there.
    KeptLoad,
    KeptLoadVerified,
    /// Pages to slots in HBM.
    KeptStore,
    /// Through a daemon, which is another process.
    NodeLoad,
    NodeStore,
    /// Checksums of slots in HBM, and nothing else.
    Checksum,
}

impl What {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Store => "store",
            Self::StoreSummed => "store_summed",
            Self::KeptLoad => "kept_load",
            Self::KeptLoadVerified => "kept_load_verified",
            Self::KeptStore => "kept_store",
            Self::NodeLoad => "node_load",
            Self::NodeStore => "node_store",
            Self::Checksum => "checksum",
        }
    }

    /// The share of the plain copy's speed that it must have. What kvd does in no path of its own is shown without.
    fn bar(self, kind: Kind, blocks: u32) -> Option<f64> {
        let bar = match (self, kind) {
            (Self::StoreSummed | Self::KeptLoadVerified | Self::Checksum, _) => return None,
            (Self::KeptLoad | Self::KeptStore, _) => 0.85,
            (_, Kind::Whole) => 0.90,
            _ => 0.80,
        };
        (blocks >= BAR_BLOCKS_MIN).then_some(bar)
    }
}

/// Beside the pairs.
#[derive(Debug, Clone, Default)]
pub(super) struct More {
    pub(super) piece_bytes: u64,
    /// Median with the request before it: a match, or a reservation.
    pub(super) with_request_us: Option<f64>,
    pub(super) daemon_cpu_s_per_gb: Option<f64>,
}

/// See the file's head.
pub(super) struct Lines {
    output: Output,
    info: DeviceInfo,
    rows: u64,
    bars: u32,
    missed: Vec<String>,
    /// What could not be measured at all.
    broken: Vec<String>,
}

const HEAD: [&str; 11] =
    ["case", "pages", "piece", "blocks", "p50 us", "GB/s", "copy GB/s", "ratio", "bar", "met", "CPU s/GB"];

impl Lines {
    pub(super) fn new(output: Output, info: &DeviceInfo) -> Self {
        Self { output, info: info.clone(), rows: 0, bars: 0, missed: Vec::new(), broken: Vec::new() }
    }

    /// The first line.
    pub(super) fn device(&self) {
        let DeviceInfo { name, driver, memory_bytes, batched_copies, dma_buf, pci_bus_id, .. } = &self.info;
        let text = format!("{name}, {driver}, {} of HBM", bytes_text(*memory_bytes));
        let fields = json!({ "memory_bytes": memory_bytes, "batched_copies": batched_copies, "dma_buf": dma_buf, "pci_bus_id": pci_bus_id });
        self.fact("device", &fields, &text);
        if self.info.software {
            self.people(STAND_IN);
        }
    }

    /// A measured case.
    pub(super) fn case(&mut self, what: What, kind: Kind, blocks: u32, pairs: &Pairs, more: &More) {
        let case = pairs.case("gpu", what.name(), BLOCK_BYTES, blocks.into());
        let bar = what.bar(kind, blocks);
        let name = format!("{} {} {blocks}", what.name(), kind.name());
        let met = self.held(&name, bar.zip(case.ratio).map(|(bar, ratio)| ratio >= bar));
        let number =
            |value: Option<f64>, digits| value.map_or("-".into(), |value| format!("{value:.digits$}"));
        self.row([
            what.name().to_owned(),
            kind.name().to_owned(),
            bytes_text(more.piece_bytes),
            blocks.to_string(),
            number(case.p50_us, 1),
            number(case.gbps, 2),
            number(case.roof_gbps, 2),
            number(case.ratio, 3),
            number(bar, 2),
            met.map_or("-", |met| if met { "yes" } else { "NO" }).to_owned(),
            number(case.cpu_s_per_gb, 4),
        ]);
        let mut object = serde_json::to_value(&case).expect("a case is an object");
        object["pages"] = kind.name().into();
        object["piece_bytes"] = more.piece_bytes.into();
        object["pairs"] = pairs.ours_us.len().into();
        object["bar"] = json!(bar);
        object["met"] = json!(met);
        object["with_request_us"] = json!(more.with_request_us);
        object["daemon_cpu_s_per_gb"] = json!(more.daemon_cpu_s_per_gb);
        self.programs(object);
    }

    /// Something else that is held against a bar.
    pub(super) fn judged(&mut self, case: &'static str, fields: &Value, met: bool, text: &str) {
        let met = self.held(case, Some(met));
        let mut fields = fields.clone();
        fields["met"] = json!(met);
        let verdict = match met {
            Some(true) => "; as it has to be",
            Some(false) => "; THAT IS NOT AS IT HAS TO BE",
            None => "",
        };
        self.fact(case, &fields, &format!("{text}{verdict}"));
    }

    /// Something without one.
    pub(super) fn fact(&self, case: &'static str, fields: &Value, text: &str) {
        let mut object = json!({ "bench": "gpu", "case": case });
        for (name, value) in fields.as_object().expect("fields have names") {
            object[name] = value.clone();
        }
        self.programs(object);
        self.people(&format!("{case}: {text}"));
    }

    /// What this machine has not.
    pub(super) fn skipped(&self, case: &'static str, why: &str) {
        self.fact(case, &json!({ "skipped": format!("SKIPPED: {why}") }), &format!("SKIPPED: {why}"));
    }

    /// What should have been measured: the others still are, and the command fails in the end.
    pub(super) fn broken(&mut self, case: &'static str, why: &Failure) {
        self.broken.push(format!("{case}: {why}"));
        self.fact(case, &json!({ "error": why.to_string() }), &format!("FAILED: {why}"));
    }

    /// The last line.
    pub(super) fn end(self) -> Result<(), Failure> {
        let (bars, missed) = (self.bars, self.missed.len());
        let text = match (bars, missed) {
            (0, _) => "no bar applies".to_owned(),
            (_, 0) => format!("all {bars} met"),
            _ => format!("{missed} of {bars} missed: {}", self.missed.join(", ")),
        };
        self.fact("bars", &json!({ "bars": bars, "missed": self.missed, "broken": self.broken }), &text);
        if self.broken.is_empty() { Ok(()) } else { Err(self.broken.join("; ").into()) }
    }

    /// Whether it counts, and as what.
    fn held(&mut self, name: &str, met: Option<bool>) -> Option<bool> {
        let met = met.filter(|_| !self.info.software)?;
        self.bars += 1;
        if !met {
            self.missed.push(name.to_owned());
        }
        Some(met)
    }

    fn programs(&self, mut object: Value) {
        if self.output != Output::Json {
            return;
        }
        object["device"] = self.info.name.as_str().into();
        object["driver"] = self.info.driver.as_str().into();
        object["software"] = self.info.software.into();
        if self.info.software {
            object["note"] = STAND_IN.into();
        }
        println!("{object}");
    }

    fn people(&self, text: &str) {
        if self.output == Output::Table {
            println!("{text}");
        }
    }

    fn row(&mut self, cells: [String; 11]) {
        if self.rows == 0 {
            self.people(&line(&HEAD.map(str::to_owned)));
        }
        self.rows += 1;
        self.people(&line(&cells));
    }
}

fn line(cells: &[String; 11]) -> String {
    let [name, rest @ ..] = cells;
    rest.iter().fold(format!("{name:<20}"), |line, cell| format!("{line}{cell:>10}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_tiers::gpu::Device as _;
    use kvd_tiers::gpu::software::{SoftwareDevice, SoftwareOptions};

    #[test]
    fn bars_are_the_issue_s() {
        let bar = |what: What, kind, blocks| what.bar(kind, blocks);
        for what in [What::Load, What::Store, What::NodeLoad, What::NodeStore] {
            assert_eq!(bar(what, Kind::Whole, 256), Some(0.90));
            assert_eq!(bar(what, Kind::Tokens, 32), Some(0.80));
            assert_eq!(bar(what, Kind::Tokens, 1), None);
        }
        assert_eq!(
            (bar(What::KeptLoad, Kind::Heads, 32), bar(What::Checksum, Kind::Heads, 32)),
            (Some(0.85), None)
        );
    }

    #[test]
    fn a_stand_in_meets_and_misses_nothing() {
        let device = SoftwareDevice::open(SoftwareOptions::default()).unwrap();
        let mut info = device.info().clone();
        let mut lines = Lines::new(Output::Json, &info);
        assert_eq!((lines.held("one", Some(false)), lines.bars), (None, 0));
        info.software = false;
        let mut lines = Lines::new(Output::Json, &info);
        assert_eq!(lines.held("one", Some(false)), Some(false));
        assert_eq!((lines.held("two", Some(true)), lines.held("three", None)), (Some(true), None));
        assert_eq!((lines.bars, &lines.missed[..]), (2, &["one".to_owned()][..]));
    }
}
