//! `bench front` as a person runs it, with a few requests: its numbers are there, and go together.

use serde_json::Value;
use std::process::Command;

fn front(arguments: &[&str]) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.args(["front", "--output", "json"]).args(arguments).output().unwrap()
}

#[test]
fn both_ways_are_measured_and_the_router_says_what_its_stages_take() {
    let output = front(&["--seconds", "1", "--rate", "20", "--prompt-tokens", "500"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let end: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(end["pairs"], 20, "{end}");
    let ms = |at: &str| end.pointer(at).and_then(Value::as_f64).unwrap_or_else(|| panic!("{at}: {end}"));
    assert!(ms("/first_byte/direct_ms/p50") > 0.0 && ms("/tokenise_alone_ms/p50") > 0.0);
    assert!(ms("/first_byte/through_ms/p50") <= ms("/last_byte/through_ms/p50"), "{end}");
    let stages = end["stages"].as_array().unwrap();
    let names: Vec<&str> = stages.iter().map(|stage| stage["stage"].as_str().unwrap()).collect();
    assert_eq!(names, ["tokenise", "locate", "place", "reserve"]);
    assert!(stages.iter().all(|stage| stage["mean_ms"].as_f64() > Some(0.0)), "{end}");
}

#[test]
fn a_rate_that_cannot_be_is_told_in_a_sentence() {
    for rate in ["0", "-1", "1e9", "NaN"] {
        let output = front(&[&format!("--rate={rate}")]);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && message.contains("--rate"), "{message}");
    }
}
