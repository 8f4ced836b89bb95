//! Every file of `vectors/` against the code. A difference here is a difference in every byte ever stored.

#[path = "../examples/vectors.rs"]
mod vectors;

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;

const BROKEN: &str = "this breaks every stored block; raise the version (FORMAT.md, version rule) and add new \
                      vectors, do not change these";

fn files() -> Vec<(String, Value)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors");
    let entries = std::fs::read_dir(folder).expect("proto/vectors is there");
    let read = |path: &Path| {
        let text = std::fs::read_to_string(path).expect("a vector file can be read");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let paths = entries.map(|entry| entry.expect("a folder entry").path());
    paths.map(|path| (path.display().to_string(), read(&path))).collect()
}

fn each_vector(mut check: impl FnMut(&str, &str, &Value, &Value)) {
    for (path, file) in files() {
        let kind = file["kind"].as_str().expect("a file has a kind");
        for vector in file["vectors"].as_array().expect("a file has vectors") {
            let name = format!("{path}: {}", vector["name"]);
            check(kind, &name, &vector["input"], &vector["output"]);
        }
    }
}

fn bytes_of(hex: &Value) -> Vec<u8> {
    let hex = hex.as_str().expect("hex").as_bytes();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    hex.chunks(2).map(byte).collect()
}

fn check(kind: &str, input: &Value, stored: &Value) -> Result<(), String> {
    let computed = vectors::output_of(kind, input).map_err(|error| format!("{error}: {BROKEN}"))?;
    if computed == *stored {
        return Ok(());
    }
    Err(format!("the code computes {computed}, the vector is {stored}: {BROKEN}"))
}

#[test]
fn every_vector_is_what_the_code_computes() {
    each_vector(|kind, name, input, stored| {
        check(kind, input, stored).unwrap_or_else(|difference| panic!("{name}: {difference}"));
    });
}

#[test]
fn no_kind_of_vector_is_missing() {
    let kinds: BTreeSet<String> =
        files().iter().map(|(_, file)| file["kind"].as_str().expect("a kind").to_owned()).collect();
    let expected = ["data", "deltas", "frames", "ids", "layouts", "slot_headers", "spaces"];
    assert!(kinds.iter().eq(expected), "{kinds:?}: {BROKEN}");
}

#[test]
fn stored_bytes_read_back() {
    each_vector(|kind, name, input, output| match kind {
        "frames" if output.get("frame_hex").is_some() => {
            assert!(vectors::frame_reads_back(input, &bytes_of(&output["frame_hex"])), "{name}: {BROKEN}");
        }
        "slot_headers" => {
            let header = kvd_proto::slot_header::SlotHeader::decode(&bytes_of(&output["stride_hex"]));
            assert!(
                header.is_some_and(|header| u64::from(header.depth) == input["depth"]),
                "{name}: {BROKEN}"
            );
        }
        _ => {}
    });
}

#[test]
fn one_changed_digit_raises_the_alarm() {
    let mut changed = 0;
    each_vector(|kind, name, input, stored| {
        for (field, value) in stored.as_object().expect("an output has fields") {
            let Some(hex) = value.as_str() else { continue };
            let flipped = if hex.ends_with('0') { "1" } else { "0" };
            let mut other = stored.clone();
            other[field] = format!("{}{flipped}", &hex[..hex.len() - 1]).into();
            let alarm = check(kind, input, &other).expect_err(name);
            assert!(alarm.contains("this breaks every stored block; raise the version"), "{alarm}");
            changed += 1;
        }
    });
    assert!(changed >= 20, "only {changed} outputs have bytes");
}
