//! A tier without a daemon: `kvd inspect` looks at what lies in it, `kvd repair` drops what is no good.
//!
//! One folder a medium (`nvme`, `s3`), one way of telling (`report`). Invariants: looking writes nothing; repair only ever drops,
//! it writes no payload and makes no header; neither touches a file that a daemon serves from, and of a bucket, which is all nodes',
//! goes only what none of them can use; memory is bounded, whatever lies in the tier; what cannot be read is told and the rest goes on.
//! Leaves to others: what the bytes mean (tiers, proto), what a running daemon holds (kvctl).

mod nvme;
mod report;
mod s3;

use clap::{Args, Subcommand, ValueEnum};
use kvd_proto::{Code, Error};
use std::process::ExitCode;

/// Something is bad or cannot be read.
const BAD: u8 = 1;
/// What was asked for makes no sense; clap's own number for it.
const USAGE: u8 = 2;

/// What `kvd inspect` can look at.
#[derive(Debug, Subcommand)]
pub enum Inspect {
    /// What lies in the file or device of an NVMe tier, read without a daemon and without its catalog. Writes nothing.
    Nvme(nvme::Inspect),
    /// What lies in the bucket of an S3 tier: manifests, objects, and what of them is no good. Writes nothing; nodes go on.
    S3(s3::Inspect),
}

/// What `kvd repair` can mend.
#[derive(Debug, Subcommand)]
pub enum Repair {
    /// Drops what is no good from the file or device of an NVMe tier, so that the rest can be served. Not beside a daemon.
    Nvme(nvme::Repair),
    /// Drops what is no good from the bucket of an S3 tier. Nodes go on.
    S3(s3::Repair),
}

/// How to tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Table,
    /// For programs: an object a line, its `kind` first.
    Json,
}

#[derive(Debug, Args)]
struct Telling {
    /// How to tell it.
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// Looks; how well it is, as an exit code.
pub fn inspect(what: &Inspect) -> ExitCode {
    match what {
        Inspect::Nvme(asked) => end(nvme::inspect(asked)),
        Inspect::S3(asked) => end(s3::inspect(asked)),
    }
}

/// Mends; how well it is now, as an exit code.
pub fn repair(what: &Repair) -> ExitCode {
    match what {
        Repair::Nvme(asked) => end(nvme::repair(asked)),
        Repair::S3(asked) => end(s3::repair(asked)),
    }
}

/// `true`: all is well.
fn end(ended: Result<bool, Error>) -> ExitCode {
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(BAD),
        Err(error) => {
            eprintln!("kvd: {error}");
            ExitCode::from(if error.code == Code::Invalid { USAGE } else { BAD })
        }
    }
}
