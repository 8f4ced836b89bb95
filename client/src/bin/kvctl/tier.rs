//! `kvctl tier`: a tier that grows, shrinks, drains, goes or comes while its node serves.
//!
//! Invariant: a change goes on in the node whether kvctl waits or not; what ends with the daemon is said to.

use crate::show::Show;
use crate::text::{Interval, Size};
use clap::{Args, Subcommand, ValueEnum};
use kvd_proto::Error;
use kvd_proto::wire::{self, change_tier_request::What};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// The node's answer comes before kvctl stops waiting for it. At the limit: what is longer is shortened to this.
const WAIT_MS_MAX: u32 = 25_000;

#[derive(Debug, Args)]
pub(crate) struct TierArgs {
    #[command(subcommand)]
    command: TierCommand,
    /// How long to wait for the end; then it says how far it is, and goes on (at most 25s at a time)
    #[arg(long, global = true, default_value = "20s")]
    wait: Interval,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Tier {
    Dram,
    Nvme,
}

#[derive(Debug, Subcommand)]
enum TierCommand {
    /// Give a tier more room, or less: its fullest parts stay, what is in the others is written to NVMe or dropped
    Resize {
        /// Which
        tier: Tier,
        /// Whole segments, at least two: 64GiB, 512MiB
        size: Size,
    },
    /// Write nothing new to NVMe; what is there is read as before
    Drain {
        /// Which: nvme
        tier: Tier,
        /// Write to it again; takes back a detach that has not ended, too
        #[arg(long)]
        undo: bool,
    },
    /// Forget every block on NVMe and close the device, so that it can be taken out; its file keeps what it holds
    Detach {
        /// Which: nvme
        tier: Tier,
    },
    /// Take a file or block device as NVMe. The tier begins empty: what is on the device is overwritten bit by bit
    Attach {
        /// Which: nvme
        tier: Tier,
        /// A file, made if missing, or an unused block device
        path: PathBuf,
        /// Bytes for blocks, whole segments: 1TiB, 200GiB
        #[arg(long, value_name = "SIZE")]
        capacity: Size,
        /// Bytes of one segment [default: the node's nvme.segment_bytes]
        #[arg(long, value_name = "SIZE")]
        segment: Option<Size>,
    },
}

impl TierArgs {
    pub(crate) fn to_wire(&self) -> Result<wire::ChangeTierRequest, Error> {
        let (tier, what) = match &self.command {
            TierCommand::Resize { tier, size } => (tier, What::CapacityBytes(size.0)),
            TierCommand::Drain { tier, undo } => (tier, What::Drain(!undo)),
            TierCommand::Detach { tier } => (tier, What::Detach(true)),
            TierCommand::Attach { tier, path, capacity, segment } => {
                let path = absolute(path)?;
                let segment_bytes = segment.map_or(0, |segment| segment.0);
                let attach = wire::AttachTier { path, capacity_bytes: capacity.0, segment_bytes };
                (tier, What::Attach(attach))
            }
        };
        let tier = match tier {
            Tier::Dram => wire::Tier::Dram,
            Tier::Nvme => wire::Tier::Nvme,
        };
        let wait_ms = self.wait.0.min(WAIT_MS_MAX);
        Ok(wire::ChangeTierRequest { tier: tier.into(), what: Some(what), wait_ms })
    }
}

/// As the node would see it from its own folder.
fn absolute(path: &Path) -> Result<String, Error> {
    let whole = std::path::absolute(path).ok().and_then(|path| path.into_os_string().into_string().ok());
    whole.ok_or_else(|| {
        let message = format!("{} has no absolute path in UTF-8", path.display());
        Error::invalid("path", message, "name a file or a block device from the root on")
    })
}

impl Show for wire::ChangeTierReply {
    fn table(&self) -> String {
        if self.done {
            return format!("done, until the daemon ends: {}\n", self.keep);
        }
        format!("not done yet, it goes on: {}; see `kvctl tiers`\nwhen it is: {}\n", self.change, self.keep)
    }

    fn objects(&self) -> Vec<Value> {
        vec![json!({ "done": self.done, "change": self.change, "keep": self.keep })]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Alone {
        #[command(flatten)]
        tier: TierArgs,
    }

    fn asked(line: &str) -> Result<wire::ChangeTierRequest, String> {
        let parsed = Alone::try_parse_from(std::iter::once("tier").chain(line.split(' ')));
        parsed.map_err(|error| error.to_string())?.tier.to_wire().map_err(|error| error.to_string())
    }

    #[test]
    fn a_change_says_exactly_what() {
        for (line, tier, what) in [
            ("resize dram 64GiB", wire::Tier::Dram, What::CapacityBytes(64 << 30)),
            ("drain nvme", wire::Tier::Nvme, What::Drain(true)),
            ("drain nvme --undo", wire::Tier::Nvme, What::Drain(false)),
            ("detach nvme", wire::Tier::Nvme, What::Detach(true)),
        ] {
            let request = asked(line).unwrap();
            assert_eq!((request.tier(), request.what, request.wait_ms), (tier, Some(what), 20_000), "{line}");
        }
        let Some(What::Attach(attach)) = asked("attach nvme new.kvd --capacity 1TiB --wait 1h").unwrap().what
        else {
            panic!("it is no attach");
        };
        assert!(attach.path.starts_with('/') && attach.path.ends_with("/new.kvd"), "{}", attach.path);
        assert_eq!((attach.capacity_bytes, attach.segment_bytes), (1 << 40, 0));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in
            ["resize s3 1GiB", "resize dram", "resize dram 8GB", "attach nvme /x", "drain nvme --wait 0s"]
        {
            assert!(asked(line).is_err(), "{line}");
        }
    }
}
