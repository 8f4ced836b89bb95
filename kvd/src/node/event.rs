//! What the node is told and what it decides: the only vocabulary between the state machine and its shells.
//!
//! Invariants: events carry facts (bytes moved, processes gone, time passed), effects carry orders; neither carries a
//! file, socket or clock. Every `Effect` that starts something has the `Event` that ends it.

use super::NvmeConfig;
use super::device::{DeviceEnd, DeviceOrder, Given};
use super::telling::Run;
use kvd_proto::cost::PrefillProfile;
use kvd_proto::slot_header::SlotHeader;
use kvd_proto::wire::{self, Tier, client_frame, node_frame};
use kvd_proto::{BlockId, Fingerprint, Space};
use kvd_tiers::catalog::Handle;
use kvd_tiers::segment::{Geometry, SegmentId, SlotRef};
use kvd_tiers::table::Filler;

/// One connection, named by the shell; never reused.
pub type MemberId = u64;

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// A connection asks to open, join or come back to a session.
    Open {
        /// The connection.
        member: MemberId,
        /// To answer with.
        request_id: u64,
        /// Its process, 0 if unknown.
        pid: u32,
        /// Whether it maps memory: its leases then hold slots until it is proven gone.
        maps: bool,
        /// Sixteen random bytes, should a token be needed.
        token: [u8; 16],
        /// What it asks.
        request: wire::OpenSessionRequest,
    },
    /// A member asks something.
    Request {
        /// Who.
        member: MemberId,
        /// To answer with; 0: no answer wanted.
        request_id: u64,
        /// What.
        body: client_frame::Body,
    },
    /// A member asks for device memory to be opened, and may have given descriptors for it. The same call orders it or refuses it.
    OpenMemory {
        /// Who.
        member: MemberId,
        /// To answer with.
        request_id: u64,
        /// What.
        request: Box<wire::OpenMemoryRequest>,
        /// Of the chunks that it names.
        given: Given,
    },
    /// The connection is gone; its process may still be reading and writing slots.
    SocketLost {
        /// Whose.
        member: MemberId,
    },
    /// The process is gone, proven: nothing of it reads or writes any more.
    ProcessGone {
        /// Whose.
        member: MemberId,
    },
    /// Ends `Effect::OpenSegment`.
    SegmentOpened {
        /// Its tier.
        tier: Tier,
        /// Which.
        segment: SegmentId,
        /// Or why not.
        result: Result<(), String>,
    },
    /// So much of a DRAM segment is populated now.
    Populated {
        /// Which.
        segment: SegmentId,
        /// Bytes touched since the last such event.
        bytes: u64,
    },
    /// Ends `Effect::Publish`, unless the block went before.
    Checksummed {
        /// Which.
        slot: SlotRef,
        /// The slot's generation when it was asked; another one now: the block has gone meanwhile.
        generation: u32,
        /// How long reading it took.
        elapsed_us: u64,
    },
    /// Ends `Effect::Demote`, `Effect::Promote`, `Effect::Verify`, `Effect::Upload` or one order of `Effect::Fetch`.
    Moved {
        /// The effect's token.
        token: u64,
        /// Both ends agree on every byte, or why not.
        result: Result<(), MoveError>,
        /// From start to end.
        elapsed_us: u64,
    },
    /// Bytes that were read out for the bucket are in nobody's hands any more.
    Uploaded {
        /// As many as the slots had.
        bytes: u64,
        /// Whether this node has written them there.
        stored: bool,
    },
    /// Ends `Effect::Seek`. What is offered is answered by `Effect::Fetch`, even if none of it is wanted any more.
    Offered {
        /// The effect's ticket.
        ticket: u64,
        /// What another node has leased to this one, if it pays.
        offer: Option<Offer>,
    },
    /// What became of the claim that a `Seek` carried. `NotYet` ends the seek; otherwise `Offered` comes after it.
    Claimed {
        /// The effect's ticket.
        ticket: u64,
        /// As the other node said.
        status: wire::HandOffStatus,
    },
    /// An earlier daemon had this space. Before any client: spaces, then segments, then blocks, parents first.
    RecoveredSpace {
        /// Checked against its fingerprint; carries its tenant.
        space: Box<Space>,
    },
    /// A process that had a session with an earlier daemon and may still be writing where that let it. Before `RecoveredSegment`; it ends
    /// with `ProcessGone`, or when it comes back and says so, and then with `Effect::Close`.
    Orphan {
        /// The name it has from now on.
        member: MemberId,
        /// Of which session.
        filler: Filler,
        /// What it calls itself; 0: nothing.
        client: u64,
    },
    /// A segment of an earlier daemon, open.
    RecoveredSegment {
        /// Its tier.
        tier: Tier,
        /// Which.
        segment: SegmentId,
        /// How it is cut.
        geometry: Geometry,
        /// Whose.
        tenant: String,
        /// DRAM only: the memory node its pages lie in.
        numa_node: Option<u32>,
        /// DRAM only: of each slot, as in its table.
        generations: Vec<u32>,
    },
    /// Blocks that an earlier daemon left in recovered segments, at most `EVENTS_PER_CALL_MAX` in one call; the shell keeps their part checksums.
    Recovered(Vec<RecoveredBlock>),
    /// A slot of a recovered DRAM segment that an earlier daemon had given to a session to fill.
    RecoveredFill {
        /// Where.
        slot: SlotRef,
        /// To whom.
        filler: Filler,
    },
    /// A person asks.
    Ask {
        /// To answer with.
        ticket: u64,
        /// What.
        question: Question,
    },
    /// Whether to tell of copies that come and go, from now on.
    Tell(bool),
    /// Somebody new follows: a slice of everything is wanted; answered by `Slice`.
    TellSlice {
        /// To answer with.
        ticket: u64,
        /// 0, then what the last slice said.
        from: Handle,
    },
    /// Ends `Effect::CloseSegment`.
    SegmentClosed {
        /// Its tier.
        tier: Tier,
        /// Which.
        segment: SegmentId,
    },
    /// Ends `Effect::Resize`.
    Resized {
        /// Which.
        tier: Tier,
        /// Or why not: it is as it was.
        result: Result<(), String>,
    },
    /// Ends `Effect::Attach`.
    Attached {
        /// What there is now, or why not.
        result: Result<NvmeConfig, String>,
    },
    /// The NVMe device has become slow, or is no longer.
    Slow {
        /// It has had one transfer for so long; 0: a later one was quick.
        transfer_ms: u64,
    },
    /// Ends `Effect::Detach`: the device is closed.
    Detached,
    /// An engine has registered: what computing costs it in the space where its blocks are.
    Profile {
        /// The space.
        fingerprint: Fingerprint,
        /// What it measured.
        profile: PrefillProfile,
    },
    /// Ends `Effect::Device`.
    Device(DeviceEnd),
    /// Time has passed; sent at least ten times a second.
    Tick,
}

/// A block as an earlier daemon's header names it.
#[derive(Debug, Clone, Copy)]
pub struct RecoveredBlock {
    /// The segment's tier.
    pub tier: Tier,
    /// Where.
    pub slot: SlotRef,
    /// The space's.
    pub fingerprint: Fingerprint,
    /// The block.
    pub id: BlockId,
    /// The block before it, or the root.
    pub parent: BlockId,
    /// Blocks before it in its chain.
    pub depth: u32,
    /// Tokens in it.
    pub tokens: u32,
    /// Group of the layout.
    pub group: u16,
}

/// Why bytes did not move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MoveError {
    /// The device failed.
    Device(String),
    /// The bytes are not those whose checksums were recorded.
    Checksum,
    /// An upload that should wait: another node has the block too, and may be about to upload it.
    Later,
}

/// What to do.
#[derive(Debug)]
pub enum Effect {
    /// Send a frame; descriptors go with `SessionOpened` and `Segment`.
    Send {
        /// To whom.
        member: MemberId,
        /// What.
        frame: wire::NodeFrame,
    },
    /// Forget a connection after what was sent to it.
    Close {
        /// Whose.
        member: MemberId,
    },
    /// Make a segment; answered by `SegmentOpened`.
    OpenSegment {
        /// Its tier.
        tier: Tier,
        /// Its id, new.
        segment: SegmentId,
        /// How it is cut.
        geometry: Geometry,
        /// Whose.
        tenant: String,
        /// DRAM only: the memory node its pages should lie in.
        numa_node: Option<u32>,
    },
    /// A session is about to be told to fill these DRAM slots: said in their tables first, for a later daemon to know.
    Fill {
        /// Where.
        slots: Vec<SlotRef>,
        /// Who.
        filler: Filler,
    },
    /// Read a DRAM slot whose table has its checksums and see whether its bytes have them; answered by `Moved`.
    Verify {
        /// To answer with.
        token: u64,
        /// Where.
        slot: SlotRef,
    },
    /// A DRAM slot holds a committed block from now on: clients may find its header. Its part checksums are computed and
    /// shown as soon as may be; answered by `Checksummed`.
    Publish {
        /// Where.
        slot: SlotRef,
        /// Of the slot.
        generation: u32,
        /// Its part checksums are zeros.
        header: Box<SlotHeader>,
    },
    /// A DRAM slot holds nothing any more.
    Retire {
        /// Where.
        slot: SlotRef,
        /// The slot's new generation.
        generation: u32,
    },
    /// Copy a checksummed DRAM slot to NVMe; answered by `Moved`.
    Demote {
        /// To answer with.
        token: u64,
        /// DRAM.
        from: SlotRef,
        /// NVMe.
        to: SlotRef,
        /// For the device; the shell puts in the checksums.
        header: Box<SlotHeader>,
    },
    /// Copy an NVMe slot to DRAM and verify every part; answered by `Moved`.
    Promote {
        /// To answer with.
        token: u64,
        /// NVMe.
        from: SlotRef,
        /// DRAM.
        to: SlotRef,
        /// Of the DRAM slot, for the header that is published when every part agrees.
        generation: u32,
        /// The block that must be there; the shell puts in the checksums.
        header: Box<SlotHeader>,
    },
    /// Read a checksummed DRAM slot for the bucket, unless that has the block; answered by `Moved` as soon as the slot is not needed any
    /// more, and by `Uploaded` when its bytes are not.
    Upload {
        /// To answer with.
        token: u64,
        /// DRAM.
        from: SlotRef,
        /// How often it was left to another node before.
        attempt: u32,
    },
    /// Find out who else, or whether the bucket, has the rest of a chain, and lease it there if that pays; answered by `Offered`.
    Seek {
        /// To answer with.
        ticket: u64,
        /// What.
        wanted: Box<Wanted>,
    },
    /// Bring these of the offered blocks and verify every part, each answered by `Moved`; the rest is not wanted. Then the
    /// other node's lease ends.
    Fetch {
        /// The offer's.
        ticket: u64,
        /// In the chain's order.
        orders: Vec<FetchOrder>,
    },
    /// An NVMe slot holds nothing any more.
    Forget {
        /// Where.
        slot: SlotRef,
    },
    /// Give up a segment of which nothing is used; answered by `SegmentClosed`.
    CloseSegment {
        /// Its tier.
        tier: Tier,
        /// Which.
        segment: SegmentId,
    },
    /// Segments of the tier may take so many bytes, and no more; answered by `Resized`.
    Resize {
        /// Which.
        tier: Tier,
        /// Whole segments.
        bytes: u64,
    },
    /// Open a device as the NVMe tier, empty; answered by `Attached`.
    Attach {
        /// From the root on.
        path: String,
        /// Whole segments.
        bytes: u64,
        /// Of one segment.
        segment_bytes: u64,
    },
    /// Close the NVMe device: nothing moves, and what is there stays there; answered by `Detached`.
    Detach,
    /// A space whose blocks may outlive the daemon, for a later one to know; again for each device.
    Space {
        /// What its blocks' headers say.
        fingerprint: Fingerprint,
        /// Whose.
        tenant: String,
        /// What it stands for.
        definition: Box<wire::Space>,
    },
    /// Answer a person.
    Answer {
        /// The question's ticket.
        ticket: u64,
        /// What.
        answer: Answer,
    },
    /// Copies that came or went, in order.
    Copies {
        /// As chains.
        runs: Vec<Run>,
    },
    /// A slice of all whole copies, in order with `Copies`.
    Slice {
        /// The question's.
        ticket: u64,
        /// As chains.
        runs: Vec<Run>,
        /// Where the next slice begins, if there is one.
        next: Option<Handle>,
    },
    /// Something for one of this machine's devices to do; each ends with an `Event::Device`.
    Device(DeviceOrder),
    /// A request did something, for whoever records that.
    Accessed(Box<super::recording::Access>),
    /// Something worth telling whoever watches.
    Note {
        /// One word: "commit", "evict"...
        kind: &'static str,
        /// The rest.
        text: String,
    },
}

/// A chain of which this node has only the beginning.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Carries its tenant.
    pub space: Space,
    /// From the prompt's beginning; not longer than there is room for.
    pub chain: Vec<BlockId>,
    /// Blocks of the beginning that are here.
    pub stored: u32,
    /// What recomputing costs.
    pub profile: PrefillProfile,
    /// What another node holds for this request, to be asked for first.
    pub claim: Option<wire::Claim>,
}

/// Blocks that another node has leased to this one, or that the bucket has: those of the chain from what is here on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// The leased prefix, what is here included.
    pub blocks: u32,
    /// The id before the first block that is not here.
    pub parent: BlockId,
    /// Until all of it could be here.
    pub predicted_us: u64,
    /// Whether they come from the bucket.
    pub from_bucket: bool,
}

/// One block of an offer, and where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchOrder {
    /// To answer with.
    pub token: u64,
    /// Index in the chain.
    pub block: u32,
    /// Of the layout.
    pub group: u8,
    /// DRAM.
    pub to: SlotRef,
    /// Of the DRAM slot, for the header that is published when every part agrees.
    pub generation: u32,
    /// The block; the shell puts in the checksums.
    pub header: Box<SlotHeader>,
}

/// What a person asks.
#[derive(Debug)]
pub enum Question {
    /// Counts and counters.
    Status,
    /// The tiers.
    Tiers,
    /// The registered spaces.
    Spaces,
    /// Blocks by id prefix.
    Blocks(Vec<u8>),
    /// Pin (or with 0 unpin) blocks by id prefix.
    Pin {
        /// 1 to 16 bytes.
        id_prefix: Vec<u8>,
        /// How long.
        ttl_ms: u32,
    },
    /// Resize, drain, detach or attach a tier.
    ChangeTier(wire::ChangeTierRequest),
    /// Which copies go first, and perhaps others from now on.
    Policy(wire::PolicyRequest),
    /// Drop blocks.
    Purge(wire::purge_request::What),
}

/// What a person is told.
#[derive(Debug)]
pub enum Answer {
    /// Counts and counters.
    Status(Box<wire::StatusReply>),
    /// The tiers.
    Tiers(wire::ListTiersReply),
    /// The registered spaces.
    Spaces(wire::ListSpacesReply),
    /// Blocks by id prefix.
    Blocks(wire::DescribeBlockReply),
    /// How many were pinned.
    Pin(wire::PinBlockReply),
    /// What decides which copies go first.
    Policies(wire::PolicyReply),
    /// How far a change of a tier is.
    TierChange(wire::ChangeTierReply),
    /// How many were dropped.
    Purge(wire::PurgeReply),
    /// The question makes no sense.
    Refused(kvd_proto::Error),
}

/// A reply's body in its envelope.
pub(crate) fn frame(request_id: u64, body: node_frame::Body) -> wire::NodeFrame {
    wire::NodeFrame { request_id, body: Some(body) }
}
