//! The registry of engine workers: registrations, loads and wishes for capacity, from whoever may call.
#![no_main]

use fuzz::material::Material;
use kvd::workers::{Reserved, Workers};
use kvd_proto::limits::WORKERS_MAX;
use kvd_proto::wire::{self, WorkerProfile, WorkerRegistration};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

fuzz_target!(|bytes: &[u8]| {
    let mut material = Material(bytes);
    let (mut workers, mut now_us, mut known) = (Workers::default(), 0, Vec::new());
    while !material.is_empty() {
        now_us += if material.one_in(16) { material.number().min(60_000_000) } else { 1000 };
        step(&mut workers, &mut material, now_us, &known);
        let all = workers.list(now_us);
        assert!(all.len() <= WORKERS_MAX);
        all.iter().for_each(check);
        known = all.iter().map(|status| status.worker).collect();
    }
});

/// Never more promised than it said it can take.
fn check(status: &wire::WorkerStatus) {
    let registration = status.registration.as_ref().expect("as it came");
    assert!(status.reserved_requests <= registration.requests_max, "{status:?}");
}

fn step(workers: &mut Workers, material: &mut Material, now_us: u64, known: &[u64]) {
    let worker = if material.one_in(8) { material.number() } else { material.pick(known).unwrap_or(0) };
    match material.below(8) {
        0..=1 => drop(workers.join(registration(material), now_us)),
        2 => workers.leave(worker),
        3 => {
            let load = wire::WorkerLoad::decode(material.piece()).unwrap_or_default();
            let _ = workers.report(worker, load, now_us);
        }
        4 => workers.release(material.number()),
        5 => _ = workers.expire(now_us),
        _ => {
            let ask = wire::ReserveWorkerRequest {
                worker,
                request_key: format!("request-{}", material.below(4)),
                new_tokens: material.number(),
                kv_tokens: material.number(),
                ttl_ms: material.number32(),
            };
            if let Ok(Reserved::Granted { ttl_ms, .. }) = workers.reserve(&ask, now_us) {
                assert!(ttl_ms > 0);
            }
        }
    }
}

fn registration(material: &mut Material) -> WorkerRegistration {
    if material.one_in(4) {
        return WorkerRegistration::decode(material.piece()).unwrap_or_default();
    }
    WorkerRegistration {
        name: format!("worker-{}", material.below(4)),
        model: "model".to_owned(),
        address: "http://127.0.0.1:8000".to_owned(),
        role: 1 + material.below(3) as i32,
        profile: Some(WorkerProfile::default()),
        requests_max: material.number32(),
        kv_tokens_max: material.number(),
        fingerprint: material.take(material.0.len().min(32)).to_vec().into(),
        block_tokens: material.number32(),
        batched_tokens_max: material.number32(),
    }
}
