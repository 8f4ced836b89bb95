//! `bench gpu` as a person and as a script runs it: all of it on the stand-in with small sizes, and what it says where there is no GPU.
//!
//! Owns the field names that `bench/gpu.sh` and kept results rely on. Leaves to others: how fast anything is, which is nothing to test.

use serde_json::Value;
use std::collections::BTreeSet;
use std::process::Command;

/// The lines of a run that ended well.
fn gpu(words: &[&str]) -> Vec<Value> {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.args(["gpu", "--output", "json", "--folder"]).arg(folder.path()).args(words);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "its files are gone");
    let lines = std::str::from_utf8(&output.stdout).unwrap().lines();
    lines.map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn everything_is_measured_on_the_stand_in_and_said_to_be_that() {
    let lines = gpu(&["--device", "software", "--blocks", "2", "--seconds", "1", "--kills", "1"]);
    for line in &lines {
        assert_eq!(
            (&line["bench"], &line["device"]),
            (&"gpu".into(), &"kvd software device".into()),
            "{line}"
        );
        assert!(line["driver"].is_string() && line["note"].as_str().unwrap().contains("stand-in"), "{line}");
        assert!(line.get("met").is_none_or(Value::is_null), "a stand-in meets no bar: {line}");
    }
    let text = |line: &Value, name: &str| line[name].as_str().unwrap_or_default().to_owned();
    let measured: Vec<&Value> = lines.iter().filter(|line| line["ratio"].is_number()).collect();
    let cases: BTreeSet<_> = measured.iter().map(|line| (text(line, "case"), text(line, "pages"))).collect();
    for case in [
        "load",
        "store",
        "store_summed",
        "kept_load",
        "kept_load_verified",
        "kept_store",
        "node_load",
        "node_store",
    ] {
        for pages in ["whole", "layers", "heads", "tokens"] {
            assert!(cases.contains(&(case.to_owned(), pages.to_owned())), "{case} {pages}");
        }
    }
    for line in &measured {
        assert!(line["pairs"].as_u64() >= Some(5) && line["cpu_s_per_gb"].as_f64() > Some(0.0), "{line}");
        assert!(line["p50_us"].as_f64() > Some(0.0) && line["roof_gbps"].as_f64() > Some(0.0), "{line}");
        let of_a_node = text(line, "case").starts_with("node_");
        assert_eq!(of_a_node, line["daemon_cpu_s_per_gb"].is_number(), "{line}");
        assert_eq!(of_a_node, line["with_request_us"].is_number(), "{line}");
    }
    let one = |case: &str| lines.iter().find(|line| line["case"] == case).unwrap();
    assert!(one("crossover")["crossover_bytes"].is_u64());
    assert!(text(one("cufile"), "skipped").starts_with("SKIPPED: "));
    let kill = one("kill");
    assert_eq!((kill["kills"].as_u64(), kill["device_memories"].as_u64()), (Some(1), Some(0)), "{kill}");
    assert_eq!(one("bars")["broken"].as_array().map(Vec::len), Some(0));
}

#[test]
fn without_a_gpu_it_says_so_and_ends_well() {
    if kvd_tiers::gpu::cuda::devices().is_ok_and(|devices| !devices.is_empty()) {
        return println!("SKIPPED: there is a GPU, on which this would be a long measurement");
    }
    let [line] = &gpu(&[])[..] else { panic!("one line") };
    assert!(line["skipped"].as_str().unwrap().starts_with("SKIPPED: "), "{line}");
}
