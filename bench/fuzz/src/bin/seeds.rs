//! Writes what each target begins with: `seeds FOLDER` makes one folder a target, of golden vectors and of what encoders give.
//!
//! Owns nothing that lasts. Invariant: the same every time, so that a corpus grows and is not sown anew.

use fuzz::node::requests::{SEGMENT_BYTES, family_id, space_of};
use kvd_proto::data::{Answer, Hello, PieceAnswer};
use kvd_proto::delta::Delta;
use kvd_proto::slot_header::{FLAG_CHECKSUMMED, SlotHeader, stride_bytes};
use kvd_proto::wire::{self, Tier, client_frame::Body as Ask};
use kvd_proto::{BlockId, Fingerprint, frame};
use kvd_tiers::segment::Geometry;
use kvd_tiers::segment_header::SegmentHeader;
// the counters that the compiler puts into this program, too, are defined there
use libfuzzer_sys as _;
use prost::Message as _;
use serde_json::Value;
use std::io;
use std::path::{Path, PathBuf};

/// Leases of the node in `fuzz::node` count from here: its epoch, shifted.
const LEASES_FROM: u64 = 7 << 32;
/// Of targets that read choices out of their input: so many inputs of noise.
const NOISE_INPUTS: u64 = 24;

type Seeds = Vec<(&'static str, Vec<u8>)>;

fn main() -> io::Result<()> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from);
    let folder = folder.ok_or_else(|| io::Error::other("seeds FOLDER: say where to"))?;
    let all = [proto_vectors()?, tiers_vectors()?, spaces(), streams(), tables(), device(), noise()].concat();
    for (number, (target, bytes)) in all.iter().enumerate() {
        std::fs::create_dir_all(folder.join(target))?;
        std::fs::write(folder.join(target).join(format!("seed-{number:04}")), bytes)?;
    }
    println!("{} seeds", all.len());
    Ok(())
}

fn vectors(krate: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(krate).join("vectors")
}

/// Every output of a file of `proto/vectors`.
fn proto_outputs(file: &str) -> io::Result<Vec<Vec<u8>>> {
    let file: Value = serde_json::from_str(&std::fs::read_to_string(vectors("proto").join(file))?)?;
    let outputs = file["vectors"].as_array().into_iter().flatten().filter_map(|it| it["output"].as_object());
    Ok(outputs.flatten().filter_map(|(_, value)| value.as_str()).map(bytes_of).collect())
}

fn bytes_of(hex: &str) -> Vec<u8> {
    let byte = |at| u8::from_str_radix(hex.get(at..at + 2)?, 16).ok();
    (0..hex.len()).step_by(2).map_while(byte).collect()
}

fn proto_vectors() -> io::Result<Seeds> {
    let mut seeds = Seeds::new();
    seeds.extend(proto_outputs("slot_headers.json")?.into_iter().map(|header| ("slot_header", header)));
    seeds.extend(proto_outputs("deltas.json")?.into_iter().map(|delta| ("delta", delta)));
    seeds.extend(proto_outputs("data.json")?.into_iter().map(|message| ("data", message)));
    seeds.extend(proto_outputs("ids.json")?.into_iter().map(|id| ("chain", id)));
    for frame in proto_outputs("frames.json")? {
        seeds.push(("messages", [&[0], &frame[..]].concat()));
        let body = frame.get(8..).unwrap_or_default();
        (1..14).for_each(|kind| seeds.push(("messages", [&[kind], body].concat())));
        seeds.push(("session", frame));
    }
    seeds.push(("session", conversation()));
    Ok(seeds)
}

fn tiers_vectors() -> io::Result<Seeds> {
    let lines = |file: &str| -> io::Result<Vec<Vec<u8>>> {
        let text = std::fs::read_to_string(vectors("tiers").join(file))?;
        Ok(text.lines().filter_map(|line| line.split_once(" = ")).map(|(_, hex)| bytes_of(hex)).collect())
    };
    let mut seeds = vec![
        ("catalog", [&[0][..], &lines("catalog_chunks.txt")?.concat()].concat()),
        ("catalog", [&[1][..], &lines("catalog_spaces.txt")?.concat()].concat()),
    ];
    for (kind, file) in [(0, "s3_objects.txt"), (1, "s3_manifests.txt"), (2, "s3_objects.txt")] {
        seeds.extend(lines(file)?.into_iter().map(|value| ("bucket", [&[kind][..], &value].concat())));
    }
    let page = lines("segment_headers.txt")?.concat();
    seeds.extend((0..5).map(|size| ("segment_header", [&[size][..], &page].concat())));
    Ok(seeds)
}

fn spaces() -> Seeds {
    let definition = |kind| space_of("default", kind).to_wire().encode_to_vec();
    (0..3).map(|kind| ("space", definition(kind))).collect()
}

/// An engine that stores a prompt and reads it back, all in one session.
fn conversation() -> Vec<u8> {
    let chain: prost::bytes::Bytes = (1..4).flat_map(|id| family_id(id).0).collect::<Vec<_>>().into();
    let (lease, read) = (LEASES_FROM + 1, LEASES_FROM + 2);
    let (space, session, tenant) = (0, 0, "default".to_owned());
    let parent = BlockId::default().0.to_vec().into();
    let all = [
        Ask::OpenSession(wire::OpenSessionRequest { version_major: 1, tenant, ..Default::default() }),
        Ask::RegisterSpace(wire::RegisterSpaceRequest {
            session,
            space: Some(space_of("default", 0).to_wire()),
        }),
        Ask::Reserve(wire::ReserveRequest { space, parent, chain: chain.clone(), ..Default::default() }),
        Ask::Commit(wire::CommitRequest { lease, ..Default::default() }),
        Ask::Release(wire::ReleaseRequest { lease }),
        Ask::Match(wire::MatchRequest { space, chain: chain.clone(), ..Default::default() }),
        Ask::Doubt(wire::DoubtRequest { lease: read, block: 1, group: 0 }),
        Ask::Exists(wire::ExistsRequest { space, chain: chain.clone(), session }),
        Ask::Pin(wire::PinRequest { space, chain: chain.clone(), ttl_ms: 9, session }),
        Ask::Prefetch(wire::PrefetchRequest { space, chain, session }),
        Ask::Release(wire::ReleaseRequest { lease: read }),
        Ask::CloseSession(wire::CloseSessionRequest { session }),
    ];
    let mut out = Vec::new();
    for (request_id, body) in (1..).zip(all) {
        frame::push(&mut out, &wire::ClientFrame { request_id, body: Some(body) }, 0);
    }
    out
}

/// What other nodes, and etcd, say.
fn streams() -> Seeds {
    let delta = Delta {
        epoch: 7,
        sequence: 0, // of the time before
        fingerprint: Fingerprint([1; 32]),
        parent: BlockId::default(),
        depth: 0,
        group: 0,
        tier: Tier::Dram,
        here: true,
        ids: (1..9).map(family_id).collect(),
    };
    let mut deltas = Vec::new();
    delta.encode(&mut deltas);
    // time and members, time and answered, time and said; then epoch, sequence, whole, no speeds, and a question
    let before = [0, 0, 2, 7, 7, 9, 1, 1, 0, 9, 0, 4, 0, 0];
    let follow = [&before[..], &piece(&deltas), &[7, 1, 1, 0, 3, 1, 8, 0, 5]].concat();
    let answer = Answer::Pieces(vec![PieceAnswer::Whole(5), PieceAnswer::Gone]).encode(1);
    let receive = [&[1, 1, 1, 1, 1, 0][..], &piece(&answer), &[0], &piece(b"hello")].concat();
    let hello = [&[0, 3][..], &piece(&Hello::ours().encode()), &[0], &piece(&[])].concat();
    let record = br#"{"address":"10.0.0.1:7700","epoch":7,"version":"0.1.0"}"#;
    let etcd = [&piece(b"one")[..], &[0], record].concat();
    let chat = br#"1{"model":"m","messages":[{"role":"user","content":"a"}],"stream":true,"max_tokens":9}"#;
    let text = br#"0{"model":"m","prompt":[1,2,3],"stream_options":{"include_usage":true},"n":null}"#;
    let weights = [&2_u64.to_le_bytes()[..], b"{}weights"].concat();
    let revision = |sparse: u8| [&[sparse][..], &piece(b"{}"), &weights].concat();
    vec![
        ("revision", revision(b's')),
        ("revision", revision(b'-')),
        ("delta", deltas),
        ("follow", follow),
        ("receive", receive),
        ("receive", hello),
        ("etcd", etcd),
        ("openai", chat.to_vec()),
        ("openai", text.to_vec()),
    ]
}

fn piece(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u16).to_le_bytes()[..], bytes].concat()
}

/// A header of a block of `space_of("a", 0)`.
fn header(depth: u8, parts: usize) -> Vec<u8> {
    let bytes = parts as u64 * 4096;
    let header = SlotHeader {
        fingerprint: space_of("a", 0).fingerprint(),
        id: family_id(u32::from(depth) + 1),
        parent: if depth == 0 { BlockId::default() } else { family_id(depth.into()) },
        depth: depth.into(),
        tokens: 16,
        group: 0,
        flags: FLAG_CHECKSUMMED,
        element_tag: 0,
        length: bytes,
        stored_length: bytes,
        write_epoch: 9,
        key_id: 0,
        nonce: [0; 24],
        part_checksums: vec![7; parts],
    };
    let mut out = vec![0; stride_bytes(parts)];
    header.encode(&mut out);
    out
}

fn tables() -> Seeds {
    let torn = |mut header: Vec<u8>| {
        header[8] = 1;
        header
    };
    let table = |parts: usize| {
        let slots = [header(0, parts), torn(header(1, parts)), vec![0; stride_bytes(parts)]].concat();
        [&[parts as u8 - 1, 0][..], &slots].concat()
    };
    vec![("table", table(1)), ("table", table(4)), ("table", table(80))]
}

/// Two segments as a daemon left them, and a client that asks.
fn device() -> Seeds {
    let segment = |segment| {
        let space = space_of("a", 0);
        let mut header = SegmentHeader {
            segment,
            geometry: Geometry::nvme(4 * 4096, 4, SEGMENT_BYTES),
            write_epoch: 5,
            tenant: "a".to_owned(),
            spaces: Vec::new(),
        };
        header.list(space.fingerprint(), &space.to_wire().encode_to_vec());
        let page = header.encode();
        let used = page.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let headers = (0..4).flat_map(|depth| piece(&self::header(depth + 4 * segment as u8, 4)));
        [&[0][..], &piece(&page[..used]), &[4], &headers.collect::<Vec<_>>()].concat()
    };
    // whole prompts of the first family, each and loads that go well but for one
    let asks = [[2, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 6]; 3].concat();
    vec![("recover", [segment(0), segment(1), asks].concat())]
}

/// splitmix64, in growing lengths.
fn noise() -> Seeds {
    let bytes = |seed: u64| {
        let word = |at: u64| {
            let mut mixed = (seed << 32 | at).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            (mixed ^ (mixed >> 27)).to_le_bytes()
        };
        (0..8 * (1 + seed)).flat_map(word).collect::<Vec<u8>>()
    };
    let inputs = (0..NOISE_INPUTS).map(bytes);
    inputs
        .flat_map(|bytes| ["node", "workers", "follow", "chain"].map(|target| (target, bytes.clone())))
        .collect()
}
