//! What the fuzz targets in `bin/` share. A target is a program that libFuzzer feeds with bytes; `run.sh` builds and runs them all.
//!
//! Owns: reading hostile values out of an input (`material`), checksums that are right over bytes that lie (`seal`), how much
//! memory a decoder may take (`budget`), and a shell around the node that keeps the shell's promises (`node`). Invariant: what
//! a target asserts is promised where the code under test stands; a target never mends what it finds.

pub mod budget;
pub mod material;
pub mod node;
pub mod seal;
