//! Compiles `kvd/v1/*.proto` in pure Rust (protox): the build needs no protoc.
use prost::Message as _;

#[expect(clippy::disallowed_methods, reason = "OUT_DIR is cargo's word to a build script")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "kvd/v1/session.proto",
        "kvd/v1/admin.proto",
        "kvd/v1/workers.proto",
        "kvd/v1/index.proto",
        "kvd/v1/peer.proto",
        "kvd/v1/keeper.proto",
    ];
    let descriptors = protox::compile(files, ["."])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("kvd.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    for file in files {
        println!("cargo::rerun-if-changed={file}");
    }
    Ok(())
}
