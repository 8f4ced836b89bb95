//! Every limit that is part of the protocol, with what happens at it. Node-local limits live in the node's config.
//!
//! Invariant: a limit is asserted or checked where the thing it bounds is made; the number stands only here.

/// Names of tenants. At the limit: the session is refused (`Invalid`).
pub const TENANT_BYTES_MAX: usize = 64;
/// Names of models. At the limit: the space is refused.
pub const MODEL_BYTES_MAX: usize = 256;
/// A revision: a digest or the operator's word. At the limit: the space is refused.
pub const REVISION_BYTES_MAX: usize = 64;
/// A digest of scales kept outside the blocks. At the limit: the space is refused.
pub const SCALE_DIGEST_BYTES_MAX: usize = 64;
/// An engine's or member's name. At the limit: the session is refused.
pub const ENGINE_BYTES_MAX: usize = 128;
/// A request key. At the limit: the request is refused.
pub const REQUEST_KEY_BYTES_MAX: usize = 64;
/// An engine's own key in the `named` scheme, and one typed extra. At the limit: the id is refused.
pub const KEY_BYTES_MAX: usize = 4096;
/// Typed extras of one block. At the limit: the id is refused.
pub const EXTRAS_MAX: usize = 64;
/// Tokens of one block. At the limit: the space is refused.
pub const BLOCK_TOKENS_MAX: u32 = 4096;
/// Blocks in one request's chain (2 million tokens at 128 a block). At the limit: the request is refused; ask in pieces.
pub const CHAIN_BLOCKS_MAX: usize = 16_384;
/// Groups of one layout. At the limit: the space is refused.
pub const GROUPS_MAX: usize = 8;
/// Parts of one group. At the limit: the space is refused.
pub const PARTS_MAX: usize = 256;
/// A part is a whole number of these, and starts at one: what O_DIRECT and RDMA like.
pub const PART_ALIGN: u32 = 4096;
/// Bytes of one slot. At the limit: the space is refused.
pub const SLOT_BYTES_MAX: u32 = 64 << 20;
/// Body of one frame on the session socket. At the limit: `Frame` error, the connection is closed.
pub const FRAME_BYTES_MAX: usize = 1 << 20;
/// Descriptors beside one frame (the kernel's SCM_MAX_FD is 253). More segments than fit come in frames of their own, and so do more chunks.
pub const FRAME_FDS_MAX: usize = 128;
/// Bytes of one chunk in a gRPC stream, so that a chunk stays well below gRPC's usual 4 MiB message limit.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;
/// Runs of slots in one answer, 48 bytes each at most. At the limit: a match leases a shorter prefix, a reservation grants fewer blocks.
pub const RUNS_MAX: usize = 16_384;
/// How long `reserve` may wait for space. Longer wishes are cut to this.
pub const RESERVE_WAIT_MS_MAX: u32 = 10_000;
/// How long a hand-off lease may wait to be claimed. Longer wishes are cut to this.
pub const HAND_OFF_TTL_MS_MAX: u32 = 60_000;
/// Percent of what time is worth to a request that hints at its priority. At the limit: the request is refused.
pub const HINT_PRIORITY_PERCENT_MAX: u32 = 1000;
/// How far ahead a hint reaches, in time to live and time to return: a day. At the limit: the request is refused.
pub const HINT_MS_MAX: u32 = 86_400_000;
/// Registered spaces of one node. At the limit: the space is refused.
pub const SPACES_MAX: usize = 4096;
/// Workers of one node. At the limit: the worker is refused.
pub const WORKERS_MAX: usize = 256;
/// Requests that one worker says it can take. At the limit: the worker is refused.
pub const WORKER_REQUESTS_MAX: u32 = 16_384;
/// Tokens of KV that one worker says it holds. At the limit: the worker is refused.
pub const WORKER_KV_TOKENS_MAX: u64 = 1 << 40;
/// Names and addresses of workers. At the limit: the worker is refused.
pub const WORKER_NAME_BYTES_MAX: usize = 256;
/// Reservations claimed by one report. At the limit: the report is refused; claim the rest with the next.
pub const CLAIMED_MAX: usize = 1024;
/// How long a reservation may last unclaimed. Longer wishes are cut to this.
pub const RESERVATION_TTL_MS_MAX: u32 = 60_000;
/// Device memories that one member of a session has open. At the limit: `Limit`.
pub const MEMORIES_MAX: usize = 256;
/// Allocations of one device memory. At the limit: the memory is refused.
pub const MEMORY_RANGES_MAX: usize = 1024;
/// Chunks of one device memory (320 GiB in those of 20 MiB that torch makes), and descriptors of chunks that one connection has on their way at once, mapped by none
/// yet. At the limit: `Limit`.
pub const MEMORY_CHUNKS_MAX: usize = 16_384;
/// Copies between slots and device memory that one member has under way. At the limit: `Limit`.
pub const COPIES_MAX: usize = 1024;
/// The bit that a fence has after a copy that failed; its values are below. (Not the uppermost: a stream that waits for "greater or equal" compares cyclically.)
pub const FENCE_FAILED: u32 = 1 << 30;
/// Blocks in one delta of the location index. Longer runs go in several.
pub const DELTA_BLOCKS_MAX: usize = 4096;
/// Pieces of one batch on a data connection. At the limit: ask in several batches; a longer request ends the connection.
pub const PIECES_MAX: usize = 4096;
/// Payload of one batch on a data connection. At the limit: as above.
pub const BATCH_BYTES_MAX: u64 = 256 << 20;
/// The sentence of a refusal on a data connection. Longer ones are cut.
pub const REFUSAL_BYTES_MAX: usize = 512;
/// Nodes of one cluster. At the limit: the config is refused.
pub const NODES_MAX: usize = 1024;

const _: () = {
    assert!(CHAIN_BLOCKS_MAX * 16 + 1024 <= FRAME_BYTES_MAX, "a full chain fits a frame");
    assert!(RUNS_MAX * 48 + CHAIN_BLOCKS_MAX + 1024 <= FRAME_BYTES_MAX, "a full answer fits a frame");
    assert!(
        MEMORY_CHUNKS_MAX * 10 + MEMORY_RANGES_MAX * 128 < FRAME_BYTES_MAX / 2,
        "every chunk's size fits a frame"
    );
    assert!(PARTS_MAX <= u16::MAX as usize);
    assert!(SLOT_BYTES_MAX.is_multiple_of(PART_ALIGN));
    assert!(FRAME_FDS_MAX.is_multiple_of(2), "segments travel as pairs of descriptors");
};
