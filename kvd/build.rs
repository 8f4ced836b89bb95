//! Compiles `etcd/rpc.proto` in pure Rust (protox): the build needs no protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let descriptors = protox::compile(["etcd/rpc.proto"], ["."])?;
    tonic_prost_build::configure().build_server(false).bytes(".").compile_fds(descriptors)?;
    println!("cargo::rerun-if-changed=etcd/rpc.proto");
    Ok(())
}
