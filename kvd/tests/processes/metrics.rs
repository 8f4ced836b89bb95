//! `/metrics` as Prometheus scrapes it: it parses, and it counts what was done.

use crate::daemon::{Daemon, Setup};
use crate::engine::Engine;
use std::collections::HashMap;
use std::io::{Read as _, Write as _};

/// The body of a GET.
fn get(address: &str, path: &str) -> String {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(crate::wait::DEADLINE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 200 OK\r\n"), "{reply}");
    reply.split_once("\r\n\r\n").unwrap().1.to_owned()
}

/// Every sample of the text format; panics on a line that is none, or a metric without help and type.
fn parse(text: &str) -> HashMap<String, String> {
    let mut described: Vec<&str> = Vec::new();
    let mut samples = HashMap::new();
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let words: Vec<&str> = comment.splitn(3, ' ').collect();
            assert!(["HELP", "TYPE"].contains(&words[0]) && !words[2].is_empty(), "{line}");
            described.push(words[1]);
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
        let bare = name.split('{').next().unwrap();
        let of = |suffix: &str| described.contains(&bare.strip_suffix(suffix).unwrap_or(bare));
        assert!(["", "_bucket", "_sum", "_count"].iter().any(|suffix| of(suffix)), "{line}");
        value.parse::<f64>().unwrap();
        samples.insert(name.to_owned(), value.to_owned());
    }
    samples
}

fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

#[tokio::test]
async fn it_parses_and_counts() {
    let address = free_address();
    let mut daemon = Daemon::start(&Setup { metrics_address: address.clone(), ..Setup::default() }).await;
    let scrape = async || {
        let address = address.clone();
        parse(&tokio::task::spawn_blocking(move || get(&address, "/metrics")).await.unwrap())
    };
    let before = scrape().await;
    assert_eq!([&before["kvd_committed_blocks_total"], &before["kvd_sessions"]], ["0", "0"]);

    let engine = Engine::open(&daemon.socket()).await;
    engine.put(&[1, 2, 3]).await;
    assert_eq!(engine.get(&[1, 2, 3, 4]).await, 3);
    let after = scrape().await;
    for (name, value) in [
        ("kvd_committed_blocks_total", "3"),
        ("kvd_match_blocks_total", "4"),
        ("kvd_hit_dram_blocks_total", "3"),
        ("kvd_miss_blocks_total", "1"),
        ("kvd_sessions", "1"),
        ("kvd_blocks", "3"),
        ("kvd_tier_copies{tier=\"dram\"}", "3"),
        ("kvd_tier_used_bytes{tier=\"dram\"}", "196608"),
    ] {
        assert_eq!(after[name], value, "{name}");
    }
    assert_ne!(after["kvd_node_round_seconds_count"], before["kvd_node_round_seconds_count"]);
    assert_eq!(tokio::task::spawn_blocking(move || get(&address, "/healthz")).await.unwrap(), "ok\n");
    daemon.is_well().await;
}
