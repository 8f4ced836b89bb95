//! Golden vectors of `FORMAT.md`: prints every file of `vectors/`, or writes them to the folder given as argument.
//!
//! A vector is an input and the output that the code computes from it; `tests/vectors.rs` computes the stored inputs
//! again. Canonical bytes are built here a second time, from the words of `FORMAT.md`, so that the page is checked too.

use kvd_proto::data::{Answer, Hello, PieceAnswer, Read};
use kvd_proto::delta::Delta;
use kvd_proto::frame::{self, FrameHeader, HEADER_BYTES};
use kvd_proto::slot_header::{SlotHeader, stride_bytes};
use kvd_proto::wire::{self, client_frame, node_frame};
use kvd_proto::{BlockId, Chain, Error, Extra, Fingerprint, IdScheme, Layout, Prompt, Space, Span, block_id};
use prost::Message as _;
use serde_json::{Value, json};
use std::fmt::Write as _;

#[allow(dead_code)] // the test includes this file for `output_of` alone
fn main() -> std::io::Result<()> {
    let folder = std::env::args_os().nth(1).map(std::path::PathBuf::from);
    for (kind, inputs) in all_inputs() {
        let text = format!("{:#}\n", file_of(kind, inputs));
        match &folder {
            Some(folder) => std::fs::write(folder.join(format!("{kind}.json")), text)?,
            None => print!("{text}"),
        }
    }
    Ok(())
}

fn file_of(kind: &str, inputs: Vec<(&str, Value)>) -> Value {
    let vectors = inputs.into_iter().map(|(name, input)| {
        let output = output_of(kind, &input).expect("our own inputs are valid");
        json!({ "name": name, "input": input, "output": output })
    });
    json!({ "kind": kind, "version": "1.0", "vectors": vectors.collect::<Vec<_>>() })
}

/// Computes one vector with the code under test.
pub(crate) fn output_of(kind: &str, input: &Value) -> Result<Value, Error> {
    match kind {
        "spaces" => space_output(input),
        "layouts" => layout_output(input),
        "ids" => id_output(input),
        "frames" => Ok(frame_output(input)),
        "slot_headers" => Ok(slot_header_output(input)),
        "deltas" => Ok(delta_output(input)),
        "data" => Ok(data_output(input)),
        other => panic!("no vectors of kind {other}"),
    }
}

// ---- inputs ----

fn all_inputs() -> Vec<(&'static str, Vec<(&'static str, Value)>)> {
    vec![
        ("spaces", space_inputs()),
        ("layouts", layout_inputs()),
        ("ids", id_inputs()),
        ("frames", frame_inputs()),
        ("slot_headers", slot_header_inputs()),
        ("deltas", delta_inputs()),
        ("data", data_inputs()),
    ]
}

/// Llama-3-8B in bf16, 32 parts of 64 KiB at 16 tokens a block.
fn llama() -> Value {
    json!([{ "kind": 1, "layers": 32, "heads": 8, "head_size": 128, "vectors": 2, "dtype": 3,
             "layer_ranges": 4, "head_ranges": 8 }])
}

/// Every kind of group in one model that nobody would build.
fn mixed() -> Value {
    json!([
        { "kind": 1, "layers": 6, "heads": 4, "head_size": 64, "vectors": 2, "dtype": 4, "scale": 2,
          "scale_digest_hex": "000102030405060708090a0b0c0d0e0f", "layer_ranges": 3, "head_ranges": 2 },
        { "kind": 2, "window_tokens": 1024, "layers": 2, "heads": 4, "head_size": 64, "vectors": 2, "dtype": 2,
          "layer_ranges": 1, "head_ranges": 1 },
        { "kind": 3, "layers": 4, "heads": 1, "state_bytes": 5000, "layer_ranges": 2, "head_ranges": 1 },
        { "kind": 4, "layers": 3, "heads": 1, "head_size": 576, "vectors": 1, "dtype": 3,
          "layer_ranges": 3, "head_ranges": 1 },
        { "kind": 5, "layers": 1, "heads": 3, "head_size": 7, "vectors": 2, "dtype": 7, "scale": 3,
          "layer_ranges": 1, "head_ranges": 1 }
    ])
}

fn space_inputs() -> Vec<(&'static str, Value)> {
    let base = json!({ "tenant": "default", "model": "llama-3-8b", "revision_hex": "7231", "epoch": 0,
                       "block_tokens": 16, "id_scheme": 1, "groups": llama() });
    let with = |field: &str, value: Value| {
        let mut space = base.clone();
        space[field] = value;
        space
    };
    vec![
        ("llama-3-8b", base.clone()),
        ("another tenant", with("tenant", json!("team-a"))),
        ("a name that is not ASCII", with("model", json!("modèle/ü"))),
        ("a 32-byte revision", with("revision_hex", json!("ab".repeat(32)))),
        ("after a weight update", with("epoch", json!(u32::MAX))),
        ("ids named by the engine", with("id_scheme", json!(2))),
        ("longer blocks", with("block_tokens", json!(64))),
        ("every kind of group", with("groups", mixed())),
    ]
}

fn layout_inputs() -> Vec<(&'static str, Value)> {
    let of = |groups: Value, block_tokens: u32| json!({ "groups": groups, "block_tokens": block_tokens });
    let padded = json!([{ "kind": 1, "layers": 3, "heads": 1, "head_size": 10, "vectors": 2, "dtype": 4,
                          "layer_ranges": 3, "head_ranges": 1 }]);
    vec![
        ("llama-3-8b, 16 tokens", of(llama(), 16)),
        ("parts padded to 4 KiB", of(padded, 7)),
        ("every kind of group", of(mixed(), 32)),
    ]
}

fn id_inputs() -> Vec<(&'static str, Value)> {
    let space = "11".repeat(32);
    let root = "ae3f17c95bd2480691d0f3c2e5a4b786";
    let of = |mut input: Value| {
        input["space_hex"] = json!(space);
        input
    };
    let tokens: Vec<u32> = (0..16).map(|n| n * 1000).collect();
    let block = |kind: &str, tokens: &[u32], extras: Value| {
        of(json!({ "kind": kind, "parent_hex": root, "tokens": tokens, "extras": extras }))
    };
    let image = json!({ "kind": 1, "offset": 3, "bytes_hex": "cd".repeat(32) });
    let engine = json!({ "kind": 200, "offset": 15, "bytes_hex": "00" });
    vec![
        ("root", of(json!({ "kind": "root", "adapter_hex": "", "salt_hex": "" }))),
        ("root with adapter", of(json!({ "kind": "root", "adapter_hex": "a1b2c3", "salt_hex": "" }))),
        ("root with salt", of(json!({ "kind": "root", "adapter_hex": "", "salt_hex": "a1b2c3" }))),
        ("block of 16 tokens", block("block", &tokens, json!([]))),
        ("block of one extreme token", block("block", &[u32::MAX], json!([]))),
        ("block with an image", block("block", &tokens, json!([image]))),
        ("block with an image and an engine's extra", block("block", &tokens, json!([image, engine]))),
        ("tail of 5 tokens", block("tail", &tokens[..5], json!([]))),
        ("tail with an image", block("tail", &tokens[..5], json!([image]))),
        ("named by 8 bytes", of(json!({ "kind": "named", "key_hex": "0102030405060708" }))),
        ("named by 4096 bytes", of(json!({ "kind": "named", "key_hex": "5a".repeat(4096) }))),
        (
            "chain of 3 blocks, 2 tokens left over",
            of(json!({ "kind": "chain", "parent_hex": root, "block_tokens": 4,
                       "tokens": (1..=14).collect::<Vec<u32>>() })),
        ),
        (
            "prompt with spans that cross blocks",
            of(
                json!({ "kind": "prompt", "parent_hex": root, "block_tokens": 4, "tokens": (1..=14).collect::<Vec<u32>>(),
                       "spans": [{ "kind": 2, "position": 13, "tokens": 5, "digest_hex": "ee" },
                                 { "kind": 1, "position": 2, "tokens": 9, "digest_hex": "cd".repeat(32) }] }),
            ),
        ),
    ]
}

fn frame_inputs() -> Vec<(&'static str, Value)> {
    vec![
        (
            "open_session",
            json!({ "frame": "ClientFrame", "request_id": 1, "fds": 0, "body": "open_session",
                    "version_major": 1, "tenant": "default", "engine": "vllm-0", "member": "rank-0" }),
        ),
        (
            "match",
            json!({ "frame": "ClientFrame", "request_id": 300, "fds": 0, "body": "match", "space": 2,
                    "request_key_hex": "7265712d31", "chain_hex": "0a".repeat(16) + &"0b".repeat(16) }),
        ),
        (
            "match with hints",
            json!({ "frame": "ClientFrame", "request_id": 301, "fds": 0, "body": "match", "space": 2,
                    "request_key_hex": "", "chain_hex": "0a".repeat(16),
                    "hints": { "priority": 200, "ttl_ms": 60_000, "expects": 1, "return_ms": 1500 } }),
        ),
        (
            "release without a reply",
            json!({ "frame": "ClientFrame", "request_id": 0, "fds": 0, "body": "release", "lease": 77 }),
        ),
        (
            "chunks, three descriptors",
            json!({ "frame": "ClientFrame", "request_id": 302, "fds": 3, "body": "give_chunks", "first": 128, "count": 3 }),
        ),
        (
            "memory of three chunks",
            json!({ "frame": "ClientFrame", "request_id": 303, "fds": 0, "body": "open_memory", "space": 2,
                    "device_hex": "44".repeat(16), "chunks": [2_097_152, 20_971_520, 20_971_520] }),
        ),
        (
            "a new segment, two descriptors",
            json!({ "frame": "NodeFrame", "request_id": 0, "fds": 2, "body": "segment", "segment": 3,
                    "slot_bytes": 2_097_152, "slots": 128, "header_bytes": 512 }),
        ),
        (
            "an error",
            json!({ "frame": "NodeFrame", "request_id": 300, "fds": 0, "body": "error", "code": 4,
                    "field": "space", "message": "2 is not registered", "fix": "register it first" }),
        ),
        ("refused: another protocol", json!({ "header_hex": "505249202a204854" })),
        ("refused: a flag", json!({ "header_hex": "010000006b760001" })),
        ("refused: one byte too long", json!({ "header_hex": "010010006b760000" })),
        ("refused: one descriptor too many", json!({ "header_hex": "010000006b768100" })),
        ("accepted: the longest", json!({ "header_hex": "000010006b768000" })),
    ]
}

fn slot_header_inputs() -> Vec<(&'static str, Value)> {
    let header = |tokens: u32, flags: u16, checksums: &[u32]| {
        json!({ "fingerprint_hex": "11".repeat(32), "id_hex": "22".repeat(16), "parent_hex": "33".repeat(16),
                "depth": 41, "tokens": tokens, "group": 0, "flags": flags, "element_tag": 0x0300,
                "length": 2_097_152, "stored_length": 2_097_152, "write_epoch": 0x0102_0304_0506_0708_u64,
                "key_id": 0, "nonce_hex": "00".repeat(24), "part_checksums": checksums })
    };
    let many: Vec<u32> = (0..41).map(|part| 0x9e37_79b9_u32.wrapping_mul(part + 1)).collect();
    vec![
        ("one part", header(16, 1, &[0xdead_beef])),
        ("a tail, no checksums yet", header(5, 2, &[0, 0])),
        ("41 parts take two sectors", header(16, 1, &many)),
    ]
}

// ---- outputs ----

fn space_output(input: &Value) -> Result<Value, Error> {
    let wire = wire::Space {
        model: text(input, "model"),
        revision: bytes(input, "revision_hex").into(),
        epoch: number(input, "epoch") as u32,
        layout: Some(wire_layout(&input["groups"])),
        block_tokens: number(input, "block_tokens") as u32,
        id_scheme: (number(input, "id_scheme") as u32).cast_signed(),
    };
    let space = Space::from_wire(&text(input, "tenant"), &wire)?;
    assert_ne!(space.id_scheme, IdScheme::Unspecified);
    let mut canonical = Vec::new();
    for field in [space.tenant.as_bytes(), space.model.as_bytes(), &space.revision] {
        push_u32(&mut canonical, field.len() as u64);
        canonical.extend_from_slice(field);
    }
    for field in ["epoch", "block_tokens", "id_scheme"] {
        push_u32(&mut canonical, number(input, field));
    }
    canonical.extend(canonical_layout(&input["groups"]));
    let fingerprint = space.fingerprint();
    let by_the_page = blake3::derive_key("kvd 2026-11-20 space fingerprint v1", &canonical);
    assert_eq!(by_the_page, fingerprint.0, "FORMAT.md sections 1 and 3 do not describe the code");
    Ok(json!({ "canonical_hex": hex(&canonical), "fingerprint_hex": fingerprint.to_string() }))
}

fn layout_output(input: &Value) -> Result<Value, Error> {
    let layout = Layout::from_wire(&wire_layout(&input["groups"]), number(input, "block_tokens") as u32)?;
    let groups = (0..layout.groups().len()).map(|group| {
        let part = layout.part(group, 0);
        let last = layout.parts(group).last().expect("a slot has parts");
        json!({ "parts": layout.groups()[group].part_count(), "part_bytes": part.bytes,
                "part_stride_bytes": layout.part_stride(group), "slot_bytes": layout.slot_bytes(group),
                "last_part_offset": last.offset, "element_tag": layout.groups()[group].element.tag() })
    });
    let groups: Vec<_> = groups.collect();
    Ok(json!({ "canonical_hex": hex(&canonical_layout(&input["groups"])), "groups": groups }))
}

fn id_output(input: &Value) -> Result<Value, Error> {
    let space = Fingerprint(array(input, "space_hex"));
    let tokens = || numbers(input, "tokens");
    let id = match input["kind"].as_str().expect("a kind") {
        "root" => block_id::root(&space, &bytes(input, "adapter_hex"), &bytes(input, "salt_hex"))?,
        "block" => block_id::block(&space, parent(input), &tokens(), &extras(input))?,
        "tail" => block_id::tail(&space, parent(input), &tokens(), &extras(input))?,
        "named" => block_id::named(&space, &bytes(input, "key_hex"))?,
        "chain" => {
            let block_tokens = number(input, "block_tokens") as u32;
            let chain = Chain::of_tokens(&space, parent(input), &tokens(), block_tokens)?;
            return Ok(json!({ "packed_hex": hex(&chain.to_packed()) }));
        }
        "prompt" => {
            let mut prompt = Prompt::new(space, number(input, "block_tokens") as u32, parent(input));
            prompt.extend(&tokens(), &spans(input))?;
            let tail = prompt.tail()?.map(|(id, _)| id.to_string());
            return Ok(json!({ "packed_hex": hex(&prompt.chain()?.to_packed()), "tail_hex": tail }));
        }
        other => panic!("no ids of kind {other}"),
    };
    Ok(json!({ "id_hex": id.to_string() }))
}

fn frame_output(input: &Value) -> Value {
    if input.get("header_hex").is_some() {
        let header = FrameHeader::decode(array::<HEADER_BYTES>(input, "header_hex"));
        return json!({ "accepted": header.is_ok() });
    }
    let request_id = number(input, "request_id");
    let fds = number(input, "fds") as u8;
    let mut out = Vec::new();
    if text(input, "frame") == "ClientFrame" {
        frame::push(&mut out, &wire::ClientFrame { request_id, body: Some(client_body(input)) }, fds);
    } else {
        frame::push(&mut out, &wire::NodeFrame { request_id, body: Some(node_body(input)) }, fds);
    }
    json!({ "frame_hex": hex(&out) })
}

fn client_body(input: &Value) -> client_frame::Body {
    match input["body"].as_str().expect("a body") {
        "open_session" => client_frame::Body::OpenSession(wire::OpenSessionRequest {
            version_major: number(input, "version_major") as u32,
            tenant: text(input, "tenant"),
            engine: text(input, "engine"),
            member: text(input, "member"),
            ..Default::default()
        }),
        "match" => client_frame::Body::Match(wire::MatchRequest {
            space: number(input, "space") as u32,
            request_key: bytes(input, "request_key_hex").into(),
            chain: bytes(input, "chain_hex").into(),
            hints: input.get("hints").map(|hints| wire::Hints {
                priority: number(hints, "priority") as u32,
                ttl_ms: number(hints, "ttl_ms") as u32,
                expects: (number(hints, "expects") as u32).cast_signed(),
                return_ms: number(hints, "return_ms") as u32,
            }),
            ..Default::default()
        }),
        "release" => client_frame::Body::Release(wire::ReleaseRequest { lease: number(input, "lease") }),
        "give_chunks" => client_frame::Body::GiveChunks(wire::GiveChunksRequest {
            first: number(input, "first") as u32,
            count: number(input, "count") as u32,
        }),
        "open_memory" => {
            let sizes = input["chunks"].as_array().expect("chunks");
            let chunks: Vec<u64> = sizes.iter().map(|size| size.as_u64().expect("a size")).collect();
            let range = wire::DeviceRange { bytes: chunks.iter().sum(), chunks, ..Default::default() };
            client_frame::Body::OpenMemory(wire::OpenMemoryRequest {
                space: number(input, "space") as u32,
                device: bytes(input, "device_hex").into(),
                ranges: vec![range],
                ..Default::default()
            })
        }
        other => panic!("no client frame {other}"),
    }
}

fn node_body(input: &Value) -> node_frame::Body {
    match input["body"].as_str().expect("a body") {
        "segment" => node_frame::Body::Segment(wire::Segment {
            segment: number(input, "segment") as u32,
            slot_bytes: number(input, "slot_bytes") as u32,
            slots: number(input, "slots") as u32,
            header_bytes: number(input, "header_bytes") as u32,
            numa_node: None,
        }),
        "error" => node_frame::Body::Error(wire::Error {
            code: (number(input, "code") as u32).cast_signed(),
            field: text(input, "field"),
            message: text(input, "message"),
            fix: text(input, "fix"),
        }),
        other => panic!("no node frame {other}"),
    }
}

fn slot_header_output(input: &Value) -> Value {
    let header = SlotHeader {
        fingerprint: Fingerprint(array(input, "fingerprint_hex")),
        id: BlockId(array(input, "id_hex")),
        parent: parent(input),
        depth: number(input, "depth") as u32,
        tokens: number(input, "tokens") as u32,
        group: number(input, "group") as u16,
        flags: number(input, "flags") as u16,
        element_tag: number(input, "element_tag") as u16,
        length: number(input, "length"),
        stored_length: number(input, "stored_length"),
        write_epoch: number(input, "write_epoch"),
        key_id: number(input, "key_id"),
        nonce: array(input, "nonce_hex"),
        part_checksums: numbers(input, "part_checksums"),
    };
    let mut stride = vec![0; stride_bytes(header.part_checksums.len())];
    header.encode(&mut stride);
    assert_eq!(SlotHeader::decode(&stride), Some(header), "a header reads back as it was written");
    json!({ "stride_bytes": stride.len(), "stride_hex": hex(&stride) })
}

fn delta_inputs() -> Vec<(&'static str, Value)> {
    let delta = |here: u64, ids: &[&str]| {
        json!({ "epoch": 1_763_700_000_000_000_000_u64, "sequence": 7, "fingerprint_hex": "11".repeat(32),
                "parent_hex": "33".repeat(16), "depth": 41, "group": 1, "tier": 2 + here, "here": here, "ids_hex": ids })
    };
    let (one, two) = ("22".repeat(16), "000102030405060708090a0b0c0d0e0f");
    vec![("a run in DRAM is gone", delta(0, &[&one, two])), ("a block is on NVMe", delta(1, &[two]))]
}

fn delta_output(input: &Value) -> Value {
    let ids = input["ids_hex"].as_array().expect("ids").iter();
    let delta = Delta {
        epoch: number(input, "epoch"),
        sequence: number(input, "sequence"),
        fingerprint: Fingerprint(array(input, "fingerprint_hex")),
        parent: BlockId(array(input, "parent_hex")),
        depth: number(input, "depth") as u32,
        group: number(input, "group") as u16,
        tier: wire::Tier::try_from(number(input, "tier") as i32).expect("a tier"),
        here: number(input, "here") == 1,
        ids: ids.map(|id| BlockId(array(&json!({ "id": id }), "id"))).collect(),
    };
    let mut bytes = Vec::new();
    delta.encode(&mut bytes);
    assert_eq!(Delta::decode(&bytes), Some((delta, &[][..])), "a delta reads back as it was written");
    json!({ "hex": hex(&bytes) })
}

// ---- FORMAT.md section 3, once more ----

const GROUP_FIELDS: [&str; 11] = [
    "kind",
    "window_tokens",
    "layers",
    "heads",
    "head_size",
    "vectors",
    "dtype",
    "scale",
    "layer_ranges",
    "head_ranges",
    "state_bytes",
];

fn canonical_layout(groups: &Value) -> Vec<u8> {
    let groups = groups.as_array().expect("groups");
    let mut out = Vec::new();
    push_u32(&mut out, groups.len() as u64);
    for group in groups {
        for field in GROUP_FIELDS {
            push_u32(&mut out, number(group, field));
        }
        let digest = bytes(group, "scale_digest_hex");
        push_u32(&mut out, digest.len() as u64);
        out.extend(digest);
    }
    out
}

fn wire_layout(groups: &Value) -> wire::Layout {
    let groups = groups.as_array().expect("groups").iter().map(|group| {
        let field = |name: &str| number(group, name) as u32;
        wire::Group {
            kind: field("kind").cast_signed(),
            window_tokens: field("window_tokens"),
            layers: field("layers"),
            heads: field("heads"),
            head_size: field("head_size"),
            vectors: field("vectors"),
            element: Some(wire::Element {
                dtype: field("dtype").cast_signed(),
                scale: field("scale").cast_signed(),
                scale_digest: bytes(group, "scale_digest_hex").into(),
            }),
            layer_ranges: field("layer_ranges"),
            head_ranges: field("head_ranges"),
            state_bytes: field("state_bytes"),
        }
    });
    wire::Layout { groups: groups.collect() }
}

// ---- reading JSON: what is not given is zero or empty, as in protobuf ----

fn number(value: &Value, field: &str) -> u64 {
    value.get(field).map_or(0, |found| found.as_u64().unwrap_or_else(|| panic!("{field} is no number")))
}

fn numbers(value: &Value, field: &str) -> Vec<u32> {
    let list = value[field].as_array().unwrap_or_else(|| panic!("{field} is no list"));
    list.iter().map(|item| item.as_u64().expect("a number") as u32).collect()
}

fn text(value: &Value, field: &str) -> String {
    value.get(field).map_or("", |found| found.as_str().expect("a text")).to_owned()
}

fn bytes(value: &Value, field: &str) -> Vec<u8> {
    let text = text(value, field);
    assert!(text.len().is_multiple_of(2), "{field} is not whole bytes");
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex")).collect()
}

fn array<const N: usize>(value: &Value, field: &str) -> [u8; N] {
    bytes(value, field).try_into().unwrap_or_else(|_| panic!("{field} is not {N} bytes"))
}

fn parent(input: &Value) -> BlockId {
    BlockId(array(input, "parent_hex"))
}

fn spans(input: &Value) -> Vec<Span> {
    let span = |span: &Value| Span {
        kind: number(span, "kind") as u8,
        position: number(span, "position") as u32,
        tokens: number(span, "tokens") as u32,
        digest: bytes(span, "digest_hex"),
    };
    input["spans"].as_array().expect("spans").iter().map(span).collect()
}

fn extras(input: &Value) -> Vec<Extra> {
    let list = input["extras"].as_array().expect("extras");
    let extra = |extra: &Value| Extra {
        kind: number(extra, "kind") as u8,
        offset: number(extra, "offset") as u32,
        bytes: bytes(extra, "bytes_hex"),
    };
    list.iter().map(extra).collect()
}

fn push_u32(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(&(number as u32).to_le_bytes());
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        write!(out, "{byte:02x}").expect("a String grows");
        out
    })
}

/// Whether a stored frame decodes to the message that its input describes.
#[allow(dead_code)] // for the test
pub(crate) fn frame_reads_back(input: &Value, frame: &[u8]) -> bool {
    let (head, body) = frame.split_at(HEADER_BYTES);
    let header = FrameHeader::decode(head.try_into().expect("eight bytes")).expect("our own header");
    assert_eq!(header.body_bytes as usize, body.len());
    if text(input, "frame") == "ClientFrame" {
        wire::ClientFrame::decode(body).is_ok_and(|frame| frame.body == Some(client_body(input)))
    } else {
        wire::NodeFrame::decode(body).is_ok_and(|frame| frame.body == Some(node_body(input)))
    }
}

// ---- the data connection ----

fn data_inputs() -> Vec<(&'static str, Value)> {
    let piece = |slot: u32, part: Option<u16>, offset: u32, bytes: u32| json!({ "segment": 3, "slot": slot, "generation": 7, "part": part, "offset": offset, "bytes": bytes });
    let read =
        |pieces: &[Value]| json!({ "message": "read", "request_id": 513, "lease": 77, "pieces": pieces });
    vec![
        ("hello", json!({ "message": "hello", "major_min": 1, "major_max": 1, "features": 0 })),
        ("a whole slot", read(&[piece(9, None, 0, 2 << 20)])),
        ("parts of two slots", read(&[piece(9, Some(31), 0, 65_536), piece(10, Some(0), 4096, 1)])),
        ("one whole, one gone", json!({ "message": "answer", "request_id": 513, "bytes": [65_536, 0] })),
        (
            "refused",
            json!({ "message": "answer", "request_id": 513, "code": 6, "text": "lease 77 has ended" }),
        ),
    ]
}

fn data_output(input: &Value) -> Value {
    let request_id = number(input, "request_id");
    let message = match text(input, "message").as_str() {
        "hello" => {
            let field = |name: &str| number(input, name) as u16;
            let features = number(input, "features") as u32;
            Hello { major_min: field("major_min"), major_max: field("major_max"), features }.encode()
        }
        "read" => {
            let pieces: Vec<kvd_proto::data::Piece> =
                input["pieces"].as_array().expect("pieces").iter().map(data_piece).collect();
            Read::encode(request_id, number(input, "lease"), pieces.into_iter())
        }
        "answer" => data_answer(input).encode(request_id),
        other => panic!("no message {other}"),
    };
    json!({ "message_hex": hex(&message) })
}

fn data_piece(piece: &Value) -> kvd_proto::data::Piece {
    let field = |name: &str| number(piece, name) as u32;
    kvd_proto::data::Piece {
        segment: field("segment"),
        slot: field("slot"),
        generation: field("generation"),
        part: piece["part"].as_u64().map(|part| part as u16),
        offset: field("offset"),
        bytes: field("bytes"),
    }
}

fn data_answer(input: &Value) -> Answer {
    if let Some(code) = input["code"].as_i64() {
        let code = kvd_proto::Code::try_from(code as i32).expect("a code");
        return Answer::Refused { code, text: text(input, "text") };
    }
    let piece = |bytes: u32| if bytes == 0 { PieceAnswer::Gone } else { PieceAnswer::Whole(bytes) };
    Answer::Pieces(numbers(input, "bytes").into_iter().map(piece).collect())
}
