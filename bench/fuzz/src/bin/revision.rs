//! Folders of weights, as somebody downloaded them: safetensors headers whose lengths lie, files of any size.
#![no_main]

use fuzz::material::Material;
use kvd_client::revision::{of_adapter, of_model};
use libfuzzer_sys::fuzz_target;
use std::io;
use std::path::Path;

/// More than is read whole: a file with a hole, of which windows are.
const SPARSE_BYTES: u64 = 65 << 20;

fuzz_target!(|bytes: &[u8]| {
    let mut material = Material(bytes);
    let folder = std::env::temp_dir().join(format!("kvd-fuzz-revision-{}", std::process::id()));
    let sparse = material.byte() == b's';
    let written = write(&folder, material.piece(), material.0, sparse);
    written.expect("a folder for temporary files that takes some");
    let of = [of_model(&folder), of_adapter(&folder)];
    assert_eq!(of, [of_model(&folder), of_adapter(&folder)], "the same folder, the same revision");
});

fn write(folder: &Path, config: &[u8], weights: &[u8], sparse: bool) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("config.json"), config)?;
    std::fs::write(folder.join("adapter_config.json"), config)?;
    let file = folder.join("adapter_model.safetensors");
    std::fs::write(&file, weights)?;
    if sparse {
        std::fs::OpenOptions::new().write(true).open(&file)?.set_len(SPARSE_BYTES)?;
    }
    Ok(())
}
