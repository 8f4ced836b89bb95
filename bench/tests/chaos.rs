//! `bench chaos` as a person runs it: real processes that are killed under load, for a short while.

use serde_json::Value;
use std::process::Command;

#[test]
fn whoever_is_killed_every_request_ends_properly_and_lists_are_right_again() {
    let output = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(["chaos", "--seconds", "8", "--output", "json"])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    let end: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    if let Some(why) = end["skipped"].as_str() {
        return println!("SKIPPED: {why}");
    }
    let victims: Vec<&str> =
        end["faults"].as_array().unwrap().iter().map(|row| row["victim"].as_str().unwrap()).collect();
    assert!(victims.len() >= 3 && victims[0].starts_with("engine-"), "{victims:?}");
    assert!(victims[1].starts_with("kvd-") && victims[2] == "etcd", "{victims:?}");
    assert!(end["requests"]["whole"].as_u64() > Some(10), "{end}");
    assert_eq!((&end["wrong_blocks"], &end["broken"]), (&Value::from(0), &Value::from(Vec::<Value>::new())));
}
