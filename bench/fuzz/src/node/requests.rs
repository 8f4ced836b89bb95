//! What is asked of the node: messages of valid shape, with hostile ids, lengths, numbers and names in them.
//!
//! Invariant: half of every choice is something that exists, or nothing beyond the first check would ever be reached.

use super::Shell;
use crate::material::Material;
use kvd::node::device::Given;
use kvd::node::event::{Event, MoveError, Offer, Question};
use kvd::node::{NodeConfig, NvmeConfig};
use kvd_proto::cost::PrefillProfile;
use kvd_proto::layout::DataType;
use kvd_proto::limits::CHAIN_BLOCKS_MAX;
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::wire::{self, IdScheme, purge_request::What};
use kvd_proto::{BlockId, Group, GroupKind, Layout, PROTOCOL_MAJOR, Space};
use prost::Message as _;

/// Of the test layout: four parts of 4 KiB.
const BLOCK_BYTES: u64 = 4 * 4096;
/// The smallest that takes such blocks.
pub const SEGMENT_BYTES: u64 = 6 * BLOCK_BYTES;
/// Tokens of every block of the layouts below.
const BLOCK_TOKENS: u32 = 16;

/// A node of a few slots, so that everything runs out.
pub fn config(material: &mut Material) -> NodeConfig {
    let choice = material.byte();
    let nvme = NvmeConfig {
        bytes: 2 * SEGMENT_BYTES,
        segment_bytes: SEGMENT_BYTES,
        eviction: if choice & 64 == 0 { "worth" } else { "lru" }.to_owned(),
        queue_depth: 2,
    };
    NodeConfig {
        epoch: 7,
        hbm_bytes: [0, 1 << 20][material.below(2)],
        dram_bytes: 3 * SEGMENT_BYTES,
        dram_segment_bytes: SEGMENT_BYTES,
        dram_eviction: if choice & 1 == 0 { "worth" } else { "s3fifo" }.to_owned(),
        numa_nodes: (0..u32::from(choice >> 1 & 3)).collect(),
        nvme: (choice & 8 == 0).then_some(nvme),
        wear_us_per_gib: 9000,
        lease_ttl_ms: 2000,
        lease_bytes_max: 14 * BLOCK_BYTES,
        sessions_max: 4,
        members_max: 6,
        profile: PrefillProfile::causal(0.0, 5.0, 0.001),
        profile_is_given: choice & 32 == 0,
        has_peers: choice & 16 == 0,
        has_bucket: choice & 8 == 0,
        upload_bytes_max: if choice & 4 == 0 { 1 << 20 } else { 0 },
        bucket_us_per_gib: if choice & 64 == 0 { 0 } else { 1_000_000 },
    }
}

/// An id of a small family, the root, or any.
pub fn id(material: &mut Material) -> BlockId {
    match material.byte() {
        0 => BlockId::default(),
        255 => BlockId(material.array()),
        small => family_id(u32::from(small)),
    }
}

/// The ids that are asked for.
pub fn family_id(number: u32) -> BlockId {
    let mut bytes = [0x11; 16];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    BlockId(bytes)
}

/// A prompt of one of a few families, from a depth on; ids of one family follow each other.
#[derive(Debug, Clone, Copy)]
struct Prompt {
    family: u32,
    depth: u32,
    blocks: u32,
}

/// Blocks of the longest prompt of a family.
const FAMILY_BLOCKS: u32 = 16;

impl Prompt {
    fn any(material: &mut Material) -> Self {
        let family = u32::from(material.byte() % 8);
        let depth = if material.one_in(4) { material.below(4) as u32 } else { 0 };
        Self { family, depth, blocks: 1 + material.below(12) as u32 }
    }

    fn id(self, depth: u32) -> BlockId {
        family_id(1 + self.family * FAMILY_BLOCKS + depth)
    }

    fn packed(self) -> Vec<u8> {
        (self.depth..self.depth + self.blocks).flat_map(|depth| self.id(depth).0).collect()
    }

    fn parent(self) -> BlockId {
        if self.depth == 0 { BlockId::default() } else { self.id(self.depth - 1) }
    }
}

/// A chain as one is asked for, mostly from a prompt's beginning.
fn packed(material: &mut Material) -> Vec<u8> {
    match material.byte() {
        250.. => material.piece().to_vec(),
        249 => vec![0; 16 * (CHAIN_BLOCKS_MAX + 1)],
        _ => Prompt::any(material).packed(),
    }
}

fn key(material: &mut Material) -> Vec<u8> {
    match material.byte() {
        0..=100 => Vec::new(),
        250.. => material.piece().to_vec(),
        small => vec![small % 4],
    }
}

fn space(material: &mut Material, shell: &Shell) -> u32 {
    if material.one_in(16) { material.number32() } else { material.pick(&shell.spaces).unwrap_or(0) }
}

fn lease(material: &mut Material, shell: &Shell) -> u64 {
    let known: Vec<u64> = shell.leases.iter().copied().collect();
    if material.one_in(8) { material.number() } else { material.pick(&known).unwrap_or(0) }
}

/// A session of its own, another member's, or nobody's.
pub fn open(material: &mut Material, shell: &Shell) -> wire::OpenSessionRequest {
    let join = match material.below(4) {
        0 => material.piece().to_vec(),
        1 => Vec::new(),
        _ => {
            let member = material.pick(&shell.members()).and_then(|member| shell.member(member));
            member.map(|member| member.token.clone()).unwrap_or_default()
        }
    };
    let tenant = ["a", "a", "b", ""][material.below(4)].to_owned();
    wire::OpenSessionRequest {
        client: u64::from(material.byte() & 1),
        version_major: if material.one_in(32) { material.number32() } else { PROTOCOL_MAJOR },
        version_minor: material.number32(),
        tenant,
        engine: String::from_utf8_lossy(material.take(2)).into_owned(),
        member: format!("rank-{}", material.below(3)),
        join: join.into(),
        held: (0..material.below(4)).map(|_| lease(material, shell)).collect(),
        numa_node: material.one_in(3).then(|| material.number32()),
    }
}

/// A space that fits the node of `config`; `kind` says which.
pub fn space_of(tenant: &str, kind: usize) -> Space {
    let full = Layout::full(2, 2, 64, DataType::Bf16, (2, 2), BLOCK_TOKENS).expect("a layout");
    let one = full.groups()[0].clone();
    let window = Group { kind: GroupKind::Window, window_tokens: 64, ..one.clone() };
    let layout = match kind {
        0 => full,
        1 => Layout::new(vec![one, window], BLOCK_TOKENS).expect("a layout"),
        _ => Layout::opaque(4096, BLOCK_TOKENS).expect("a layout"),
    };
    Space {
        tenant: tenant.to_owned(),
        model: format!("model-{kind}"),
        revision: b"r1".to_vec(),
        epoch: 0,
        layout,
        id_scheme: if kind == 2 { IdScheme::Named } else { IdScheme::Tokens },
    }
}

fn register(material: &mut Material) -> wire::RegisterSpaceRequest {
    let space = if material.one_in(4) {
        wire::Space::decode(material.piece()).ok()
    } else {
        Some(space_of("whoever asks", material.below(3)).to_wire())
    };
    wire::RegisterSpaceRequest { session: material.number(), space }
}

fn matching(material: &mut Material, shell: &Shell) -> wire::MatchRequest {
    let claim = |material: &mut Material| wire::Claim {
        key: vec![material.byte() % 4].into(),
        node: ["", "here", "there:1"][material.below(3)].to_owned(),
        wait_ms: material.number32(),
        tail_tokens: tail_tokens(material),
    };
    wire::MatchRequest {
        space: space(material, shell),
        request_key: key(material).into(),
        chain: packed(material).into(),
        skip_blocks: if material.one_in(4) { material.number32() } else { 0 },
        this_node_only: material.one_in(4),
        claim: material.one_in(3).then(|| claim(material)),
        hints: hints(material),
        memories: (0..material.below(6).saturating_sub(3)).map(|_| memory(material, shell)).collect(),
    }
}

fn hints(material: &mut Material) -> Option<wire::Hints> {
    let small = |material: &mut Material| {
        if material.one_in(4) { material.number32() } else { material.below(2000) as u32 }
    };
    material.one_in(3).then(|| wire::Hints {
        priority: small(material),
        ttl_ms: small(material),
        expects: small(material).cast_signed() % 4,
        return_ms: small(material),
    })
}

fn tail_tokens(material: &mut Material) -> u32 {
    match material.below(4) {
        0 => 3,
        1 => material.number32(),
        _ => 0,
    }
}

fn reserve(material: &mut Material, shell: &Shell) -> wire::ReserveRequest {
    let prompt = Prompt::any(material);
    let (chain, parent) = (prompt.packed(), prompt.parent());
    let chain = if material.one_in(16) { packed(material) } else { chain };
    let parent = if material.one_in(16) { id(material) } else { parent };
    let hand_off = |material: &mut Material| wire::HandOff {
        key: vec![material.byte() % 4].into(),
        ttl_ms: material.number32(),
        blocks: material.number32(),
    };
    wire::ReserveRequest {
        space: space(material, shell),
        request_key: key(material).into(),
        parent: if material.one_in(32) { material.piece().to_vec() } else { parent.0.to_vec() }.into(),
        depth: if material.one_in(16) { material.number32() } else { prompt.depth },
        chain: chain.into(),
        tail_tokens: tail_tokens(material),
        wait_ms: material.number32(),
        hand_off: material.one_in(3).then(|| hand_off(material)),
        apart: material.one_in(6),
        hints: hints(material),
    }
}

fn commit(material: &mut Material, shell: &Shell) -> wire::CommitRequest {
    let range =
        |material: &mut Material| wire::BlockRange { first: material.number32(), count: material.number32() };
    wire::CommitRequest {
        lease: lease(material, shell),
        blocks: (0..material.below(8).saturating_sub(5)).map(|_| range(material)).collect(),
        parts: (0..material.below(10).saturating_sub(6)).map(|_| material.number32()).collect(),
    }
}

/// A prompt stored as engines do it: what is reserved is committed and released next.
pub fn put(material: &mut Material, shell: &Shell) -> wire::ReserveRequest {
    let prompt = Prompt { depth: 0, ..Prompt::any(material) };
    let (parent, chain) = (prompt.parent().0.to_vec().into(), prompt.packed().into());
    wire::ReserveRequest { space: space(material, shell), parent, chain, ..wire::ReserveRequest::default() }
}

fn memory(material: &mut Material, shell: &Shell) -> u64 {
    let known: Vec<u64> = shell.memories.iter().copied().collect();
    if material.one_in(8) { material.number() } else { material.pick(&known).unwrap_or(0) }
}

/// With a handle, or of a few chunks, mostly as long as they are.
fn device_range(material: &mut Material) -> wire::DeviceRange {
    let bytes = material.number();
    if !material.one_in(4) {
        return wire::DeviceRange { handle: vec![1; 64].into(), bytes, chunks: Vec::new() };
    }
    let chunks: Vec<u64> = (0..material.below(5)).map(|_| material.number()).collect();
    let sum = chunks.iter().fold(0, |sum: u64, chunk| sum.wrapping_add(*chunk));
    let handle = if material.one_in(8) { vec![1; 64] } else { Vec::new() };
    wire::DeviceRange { handle: handle.into(), bytes: if material.one_in(8) { bytes } else { sum }, chunks }
}

/// As the reactor tells a request: what memory is to be opened with comes with a number of descriptors, mostly as many as it names.
pub fn event(member: u64, request_id: u64, body: Ask) -> Event {
    let Ask::OpenMemory(request) = body else { return Event::Request { member, request_id, body } };
    let named: usize = request.ranges.iter().map(|range| range.chunks.len()).sum();
    let count = if request_id.is_multiple_of(8) { request_id as usize % 5 } else { named };
    let given = Given { ticket: request_id, count };
    Event::OpenMemory { member, request_id, request: Box::new(request), given }
}

/// Mostly all layers and heads of a space's first group.
fn open_memory(material: &mut Material, shell: &Shell) -> wire::OpenMemoryRequest {
    let odd = material.one_in(4);
    let small = |material: &mut Material, usual: u32| if odd { material.number32() % 9 } else { usual };
    let layers = small(material, 2) as usize;
    wire::OpenMemoryRequest {
        space: space(material, shell),
        group: small(material, 0),
        device: vec![7; if odd { material.below(18) } else { 16 }].into(),
        ranges: vec![device_range(material); 1 + layers / 8],
        first_layer: small(material, 0),
        first_head: small(material, 0),
        heads: small(material, 2),
        page_tokens: material.number32(),
        pages: material.number32(),
        layers: vec![wire::LayerPlace::default(); layers],
    }
}

fn copy(material: &mut Material, shell: &Shell) -> wire::CopyRequest {
    let odd = material.one_in(4);
    let count = if odd { material.number32() } else { 1 + material.below(4) as u32 };
    wire::CopyRequest {
        lease: lease(material, shell),
        memory: memory(material, shell),
        blocks: Some(wire::BlockRange { first: if odd { material.number32() } else { 0 }, count }),
        table: material.take(4).to_vec().into(),
        first_layer_range: if odd { material.number32() } else { 0 },
        layer_ranges: if odd { material.number32() } else { material.below(3) as u32 },
        fence: odd.then(|| wire::Fence { range: 0, offset: material.number(), value: material.number32() }),
    }
}

/// Anything a member may ask on its socket.
pub fn ask(material: &mut Material, shell: &Shell) -> Ask {
    let session = 0;
    match material.below(27) {
        24 => Ask::OpenMemory(open_memory(material, shell)),
        25 => Ask::Copy(copy(material, shell)),
        26 => Ask::CloseMemory(wire::CloseMemoryRequest { memory: memory(material, shell) }),
        0..=1 => Ask::RegisterSpace(register(material)),
        2..=6 => Ask::Match(matching(material, shell)),
        7..=12 => Ask::Reserve(reserve(material, shell)),
        13..=15 => Ask::Commit(commit(material, shell)),
        16..=18 => Ask::Release(wire::ReleaseRequest { lease: lease(material, shell) }),
        19 => {
            let (lease, block, group) = (lease(material, shell), material.number32(), material.number32());
            Ask::Doubt(wire::DoubtRequest { lease, block, group })
        }
        20 => {
            let (space, chain) = (space(material, shell), packed(material).into());
            Ask::Exists(wire::ExistsRequest { space, chain, session })
        }
        21 => {
            let (space, chain) = (space(material, shell), packed(material).into());
            Ask::Pin(wire::PinRequest { space, chain, ttl_ms: material.number32(), session })
        }
        22 => {
            let (space, chain) = (space(material, shell), packed(material).into());
            Ask::Prefetch(wire::PrefetchRequest { space, chain, session })
        }
        _ => match material.below(3) {
            0 => Ask::CloseSession(wire::CloseSessionRequest { session }),
            1 => Ask::OpenSession(open(material, shell)),
            _ => Ask::Release(wire::ReleaseRequest { lease: material.number() }),
        },
    }
}

/// What a person may ask.
pub fn question(material: &mut Material) -> Question {
    let id_prefix = material.below(18);
    let id_prefix = id(material).0.iter().chain(&[0; 2]).take(id_prefix).copied().collect::<Vec<_>>();
    match material.below(8) {
        0 => Question::Status,
        1 => Question::Tiers,
        2 => Question::Spaces,
        3 => Question::Blocks(id_prefix),
        4 => Question::Pin { id_prefix, ttl_ms: material.number32() },
        5 => Question::Purge(What::IdPrefix(id_prefix.into())),
        6 => Question::Purge(What::Space(material.number32())),
        _ => Question::Purge(What::Everything(material.one_in(2))),
    }
}

/// How a transfer ended.
pub fn fate(material: &mut Material) -> Result<(), MoveError> {
    match material.below(8) {
        6 => Err(MoveError::Checksum),
        7 => Err(MoveError::Device("EIO".to_owned())),
        _ => Ok(()),
    }
}

/// What another node says it would send.
pub fn offer(material: &mut Material) -> Option<Offer> {
    let (blocks, predicted_us) = (material.number32(), material.number());
    (!material.one_in(4)).then(|| Offer {
        blocks,
        parent: id(material),
        predicted_us,
        from_bucket: material.one_in(2),
    })
}

/// What another node says of a claim.
pub fn status(material: &mut Material) -> wire::HandOffStatus {
    let state = if material.one_in(8) { material.number32().cast_signed() } else { material.below(4) as i32 };
    wire::HandOffStatus { state, ready_blocks: material.number32(), blocks: material.number32() }
}
