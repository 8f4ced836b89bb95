//! A world around one node: a clock that stands still until told, memory and a device that hold content instead of
//! bytes, and the clients' own view of what they were promised.
//!
//! Owns: what every slot really contains, which effects wait for their end, what each lease lets its holder touch. Invariant:
//! `checks` runs after every call. Leaves to others: what to ask (the tests).

use super::super::event::{Effect, Event, MemberId, Question};
use super::super::{Node, NodeConfig, NvmeConfig};
use super::transfers::Transfer;
use kvd_proto::layout::DataType;
use kvd_proto::slot_header::SlotHeader;
use kvd_proto::space::{Fingerprint, IdScheme};
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::wire::node_frame::Body as Reply;
use kvd_proto::wire::{self, Tier};
use kvd_proto::{BlockId, Error, Layout, PROTOCOL_MAJOR, Space};
use kvd_tiers::segment::{Geometry, SegmentId, SlotRef};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

/// Slots of one DRAM segment of the test layout.
pub(super) const SEGMENT_SLOTS: u64 = 8;
/// Parts of a block of the test layout.
pub(super) const PARTS: u32 = 4;
/// Bytes of a block of the test layout.
pub(super) const BLOCK_BYTES: u64 = PARTS as u64 * 4096;
pub(super) const LEASE_TTL_MS: u64 = 10_000;

pub(super) type Content = Option<(Fingerprint, BlockId, u16)>; // whose bytes are in a slot: `None` is noise

pub(super) struct Published {
    pub(super) generation: u32,
    pub(super) header: SlotHeader,
}

/// What a lease lets its holders touch, as they understood it.
#[derive(Clone)]
pub(super) struct Promise {
    /// Those who were given it, or committed by it, and have not let go.
    pub(super) askers: BTreeSet<MemberId>,
    pub(super) session: u64,
    pub(super) fill: bool,
    pub(super) space: u32,
    pub(super) chain: Vec<BlockId>,
    /// By (block, group): where, and whether it may be read or filled already.
    pub(super) slots: BTreeMap<(u32, u32), (SlotRef, bool)>,
}

pub(super) struct Client {
    pub(super) tenant: String,
    pub(super) session: u64,
    pub(super) token: Vec<u8>,
    pub(super) maps: bool,
    pub(super) pid: u32,
    pub(super) name: String,
    pub(super) connected: bool,
}

pub(super) struct World {
    pub(super) node: Node,
    pub(super) now_us: u64,
    pub(super) dram: BTreeMap<SlotRef, Content>,
    pub(super) nvme: BTreeMap<SlotRef, Content>,
    pub(super) published: BTreeMap<SlotRef, Published>,
    pub(super) moves: BTreeMap<u64, Transfer>,
    pub(super) checksums: VecDeque<(SlotRef, u32)>,
    pub(super) openings: VecDeque<(Tier, SegmentId)>,
    pub(super) segments: BTreeMap<(bool, SegmentId), (Geometry, String)>,
    /// Where each segment was ordered to lie.
    pub(super) numa_nodes: BTreeMap<(bool, SegmentId), Option<u32>>,
    pub(super) clients: BTreeMap<MemberId, Client>,
    pub(super) promises: BTreeMap<u64, Promise>,
    /// As they were before a member came back, in case it is refused.
    before_opening: BTreeMap<u64, Promise>,
    pub(super) closed: BTreeSet<MemberId>,
    pub(super) answers: Vec<(u64, super::super::event::Answer)>,
    pub(super) ready: Vec<(MemberId, wire::Ready)>,
    /// What was asked and not answered yet.
    asked: BTreeMap<(MemberId, u64), Ask>,
    pub(super) replies: BTreeMap<(MemberId, u64), Reply>,
    /// Segments open by themselves as soon as they are ordered.
    pub(super) opens_at_once: bool,
    pub(super) spaces: BTreeMap<u32, (Fingerprint, String)>,
    pub(super) follower: super::telling::Follower,
    pub(super) peers: super::transfers::Peers,
    pub(super) uploads: super::uploading::Uploads,
    pub(super) devices: super::tier_change::Devices,
    pub(super) gpus: super::pages::Gpus,
    pub(super) accesses: Vec<super::super::recording::Access>,
    pub(super) last: u64,
    digest: DefaultHasher,
}

/// Two DRAM segments of eight slots, no NVMe.
pub(super) fn config() -> NodeConfig {
    NodeConfig {
        epoch: 7,
        hbm_bytes: 0,
        dram_bytes: 2 * SEGMENT_SLOTS * BLOCK_BYTES,
        dram_segment_bytes: SEGMENT_SLOTS * BLOCK_BYTES,
        dram_eviction: "lru".to_owned(),
        numa_nodes: Vec::new(),
        nvme: None,
        wear_us_per_gib: 0,
        lease_ttl_ms: LEASE_TTL_MS as u32,
        lease_bytes_max: 64 * BLOCK_BYTES,
        sessions_max: 8,
        members_max: 16,
        profile: kvd_proto::cost::PrefillProfile::causal(0.0, 25.0, 0.001),
        profile_is_given: false,
        has_peers: false,
        has_bucket: false,
        upload_bytes_max: 0,
        bucket_us_per_gib: 0,
    }
}

/// As `config`, and `segments` NVMe extents of eleven slots.
pub(super) fn with_nvme(segments: u64) -> NodeConfig {
    let segment_bytes = 12 * BLOCK_BYTES;
    let nvme = NvmeConfig {
        bytes: segments * segment_bytes,
        segment_bytes,
        eviction: "lru".to_owned(),
        queue_depth: 4,
    };
    NodeConfig { nvme: Some(nvme), ..config() }
}

/// One group of four parts of 4 KiB.
pub(super) fn layout() -> Layout {
    Layout::full(2, 2, 64, DataType::Bf16, (2, 2), 16).expect("a layout")
}

/// Two groups of four and two parts.
pub(super) fn two_groups() -> Layout {
    let mut groups = layout().groups().to_vec();
    groups.push(kvd_proto::Group { layer_ranges: 1, layers: 1, ..groups[0].clone() });
    Layout::new(groups, 16).expect("a layout")
}

pub(super) fn id(number: u64) -> BlockId {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[8..].copy_from_slice(&(!number).to_be_bytes());
    BlockId(bytes)
}

pub(super) fn ids(numbers: std::ops::Range<u64>) -> Vec<BlockId> {
    numbers.map(id).collect()
}

pub(super) fn packed(chain: &[BlockId]) -> Vec<u8> {
    chain.iter().flat_map(|id| id.0).collect()
}

pub(super) fn match_of(space: u32, key: &str, chain: &[BlockId]) -> Ask {
    Ask::Match(wire::MatchRequest {
        space,
        request_key: key.as_bytes().to_vec().into(),
        chain: packed(chain).into(),
        ..wire::MatchRequest::default()
    })
}

pub(super) fn reserve_of(space: u32, key: &str, chain: &[BlockId], wait_ms: u32) -> wire::ReserveRequest {
    wire::ReserveRequest {
        space,
        request_key: key.as_bytes().to_vec().into(),
        parent: vec![0; 16].into(),
        depth: 0,
        chain: packed(chain).into(),
        wait_ms,
        ..wire::ReserveRequest::default()
    }
}

/// As `reserve_of`, after a block at depth `depth - 1`.
pub(super) fn reserve_after(
    space: u32,
    parent: BlockId,
    depth: u32,
    chain: &[BlockId],
) -> wire::ReserveRequest {
    wire::ReserveRequest { parent: parent.0.to_vec().into(), depth, ..reserve_of(space, "", chain, 0) }
}

pub(super) fn commit_of(lease: u64, blocks: &[(u32, u32)], parts: &[u32]) -> Ask {
    let blocks = blocks.iter().map(|&(first, count)| wire::BlockRange { first, count }).collect();
    Ask::Commit(wire::CommitRequest { lease, blocks, parts: parts.to_vec() })
}

pub(super) fn open_of(tenant: &str, name: &str) -> wire::OpenSessionRequest {
    wire::OpenSessionRequest {
        version_major: PROTOCOL_MAJOR,
        tenant: tenant.to_owned(),
        engine: "test".to_owned(),
        member: name.to_owned(),
        ..wire::OpenSessionRequest::default()
    }
}

impl World {
    pub(super) fn new(config: NodeConfig) -> Self {
        Self {
            devices: super::tier_change::Devices::new(&config),
            accesses: Vec::new(),
            node: Node::new(config),
            now_us: 0,
            dram: BTreeMap::new(),
            nvme: BTreeMap::new(),
            published: BTreeMap::new(),
            moves: BTreeMap::new(),
            checksums: VecDeque::new(),
            openings: VecDeque::new(),
            segments: BTreeMap::new(),
            numa_nodes: BTreeMap::new(),
            clients: BTreeMap::new(),
            promises: BTreeMap::new(),
            before_opening: BTreeMap::new(),
            closed: BTreeSet::new(),
            answers: Vec::new(),
            ready: Vec::new(),
            asked: BTreeMap::new(),
            replies: BTreeMap::new(),
            opens_at_once: true,
            spaces: BTreeMap::new(),
            follower: super::telling::Follower::default(),
            peers: super::transfers::Peers::default(),
            uploads: super::uploading::Uploads::default(),
            gpus: super::pages::Gpus::default(),
            last: 0,
            digest: DefaultHasher::new(),
        }
    }

    /// One event in one call; its effects carried out; everything checked.
    pub(super) fn apply(&mut self, event: Event) {
        self.forget_ended();
        let mut effects = Vec::new();
        self.node.apply_and_settle([event], self.now_us, &mut effects);
        effects.into_iter().for_each(|effect| self.execute(effect));
        self.check();
        while self.opens_at_once && (self.open_next(Ok(())) || self.end_next()) {}
    }

    /// A session that maps nothing reads no more by a lease that has ended, whoever joins it later.
    fn forget_ended(&mut self) {
        let mapped: BTreeSet<_> = self.clients.values().filter(|it| it.maps).map(|it| it.session).collect();
        let leases = &self.node.leases;
        self.promises.retain(|lease, promise| {
            promise.fill || mapped.contains(&promise.session) || leases.get(*lease).is_some()
        });
    }

    /// Of all effects so far.
    pub(super) fn digest(&self) -> u64 {
        self.digest.finish()
    }

    fn execute(&mut self, effect: Effect) {
        format!("{effect:?}").hash(&mut self.digest);
        match effect {
            Effect::Send { member, frame } => self.received(member, frame),
            Effect::Close { member } => {
                self.closed.insert(member);
                self.clients.remove(&member);
            }
            Effect::OpenSegment { tier, segment, geometry, tenant, numa_node } => {
                self.numa_nodes.insert((tier == Tier::Nvme, segment), numa_node);
                let before = self.segments.insert((tier == Tier::Nvme, segment), (geometry, tenant));
                assert!(before.is_none(), "{tier:?} segment {segment} is ordered while it is open");
                self.openings.push_back((tier, segment));
                self.check_place(tier, segment);
            }
            effect @ (Effect::CloseSegment { .. }
            | Effect::Resize { .. }
            | Effect::Attach { .. }
            | Effect::Detach) => {
                self.devices_told(effect);
            }
            Effect::Publish { slot, generation, header } => {
                self.check_content(slot, &header);
                let before = self.published.insert(slot, Published { generation, header: *header });
                assert!(before.is_none(), "{slot:?} is published over something");
                self.checksums.push_back((slot, generation));
            }
            Effect::Retire { slot, generation } => self.retire(slot, generation),
            Effect::Demote { token, from, to, header } => {
                assert_eq!(self.published[&from].header.id, header.id);
                self.check_untouched(to, true);
                let transfer = Transfer { promotion: false, from, to, generation: 0, header: *header };
                assert!(self.moves.insert(token, transfer).is_none());
            }
            Effect::Promote { token, from, to, generation, header } => {
                self.check_untouched(to, false);
                self.check_unheld(to);
                let transfer = Transfer { promotion: true, from, to, generation, header: *header };
                assert!(self.moves.insert(token, transfer).is_none());
            }
            Effect::Forget { slot } => {
                self.check_untouched(slot, true);
                self.nvme.remove(&slot);
            }
            Effect::Answer { ticket, answer } => self.answers.push((ticket, answer)),
            effect @ Effect::Upload { .. } => self.upload_told(effect),
            effect @ (Effect::Seek { .. } | Effect::Fetch { .. }) => self.peers_told(effect),
            effect @ (Effect::Copies { .. } | Effect::Slice { .. }) => self.follower.told(effect),
            Effect::Fill { slots, filler } => {
                assert_eq!(filler.epoch, self.node.config.epoch);
                slots
                    .iter()
                    .for_each(|slot| assert!(!self.published.contains_key(slot), "{slot:?} holds a block"));
            }
            Effect::Verify { slot, .. } => unreachable!("{slot:?} is no earlier daemon's"),
            Effect::Device(order) => self.gpus_told(order),
            Effect::Accessed(access) => self.accesses.push(*access),
            Effect::Note { .. } | Effect::Space { .. } => {}
        }
    }

    fn received(&mut self, member: MemberId, frame: wire::NodeFrame) {
        let body = frame.body.expect("a reply");
        match &body {
            Reply::Ready(ready) => {
                self.told_ready(member, ready);
                self.ready.push((member, ready.clone()));
            }
            Reply::Segment(segment) => self.check_announced(member, segment.segment),
            _ => {}
        }
        if frame.request_id == 0 {
            return;
        }
        let asked = self.asked.remove(&(member, frame.request_id)).expect("a question is answered once");
        match (&asked, &body) {
            (Ask::Match(request), Reply::Match(reply)) => {
                self.promise(member, false, request.space, &request.chain, reply.lease, &reply.runs);
            }
            (Ask::Reserve(request), Reply::Reserve(reply)) => {
                assert_eq!(reply.states.len() * 16, request.chain.len());
                self.promise(member, true, request.space, &request.chain, reply.lease, &reply.runs);
            }
            (Ask::OpenSession(request), Reply::SessionOpened(opened)) => {
                let client = self.clients.get_mut(&member).expect("it asked");
                (client.session, client.token) = (opened.session, opened.token.to_vec());
                client.name = request.member.clone();
                opened.segments.iter().for_each(|segment| self.check_announced(member, segment.segment));
            }
            (Ask::OpenSession(_), Reply::Error(_)) => {
                self.clients.remove(&member);
                self.promises = std::mem::take(&mut self.before_opening);
            }
            (Ask::Commit(request), Reply::Commit(_)) => {
                let promise = self.promises.get_mut(&request.lease);
                promise.expect("what is committed was promised").askers.insert(member);
            }
            _ => {}
        }
        self.replies.insert((member, frame.request_id), body);
    }

    fn promise(
        &mut self,
        member: MemberId,
        fill: bool,
        space: u32,
        chain: &[u8],
        lease: u64,
        runs: &[wire::Run],
    ) {
        if lease == 0 {
            assert!(runs.is_empty());
            return;
        }
        let chain: Vec<_> = chain.as_chunks::<16>().0.iter().copied().map(BlockId).collect();
        let known = self.promises.contains_key(&lease);
        let mut slots = BTreeMap::new();
        // what is in a device's memory nobody reads in place
        for run in runs.iter().filter(|run| !run.in_device) {
            for at in 0..run.count {
                let slot = (i64::from(run.first_slot) + i64::from(run.stride) * i64::from(at)) as u32;
                let slot = SlotRef { segment: run.segment, slot };
                self.check_announced(member, slot.segment);
                let block = run.first_block + at;
                if fill && !known {
                    self.check_unheld(slot);
                    self.check_untouched(slot, false);
                    self.dram.insert(slot, None);
                } else if !fill && run.ready {
                    self.check_readable(slot, space, chain[block as usize], run.group);
                }
                let before = slots.insert((block, run.group), (slot, fill || run.ready));
                assert!(before.is_none(), "block {block} comes twice");
            }
        }
        if let Some(known) = self.promises.get_mut(&lease) {
            assert!(known.chain == chain && known.fill == fill, "one lease for two questions");
            for (place, (slot, _)) in &slots {
                let before = known.slots.get(place).map_or(*slot, |(before, _)| *before);
                assert_eq!(before, *slot, "the same lease names another slot");
            }
            known.askers.insert(member);
            return;
        }
        let (askers, session) = (BTreeSet::from([member]), self.clients[&member].session);
        self.promises.insert(lease, Promise { askers, session, fill, space, chain, slots });
    }

    fn told_ready(&mut self, member: MemberId, ready: &wire::Ready) {
        let Some(promise) = self.promises.get(&ready.lease) else { return };
        let told = self.clients.get(&member).map(|client| client.session);
        assert!(told.is_none_or(|told| told == promise.session), "another session hears of {}", ready.lease);
        let (space, mut found) = (promise.space, Vec::new());
        let of = |ranges: &[wire::BlockRange]| -> Vec<u32> {
            ranges.iter().flat_map(|range| range.first..range.first + range.count).collect()
        };
        for block in of(&ready.blocks) {
            for (&(_, group), &(slot, _)) in promise.slots.range((block, 0)..(block + 1, 0)) {
                found.push((slot, promise.chain[block as usize], group));
            }
        }
        found.into_iter().for_each(|(slot, id, group)| self.check_readable(slot, space, id, group));
        let promise = self.promises.get_mut(&ready.lease).expect("it was there");
        for block in of(&ready.blocks) {
            promise.slots.range_mut((block, 0)..(block + 1, 0)).for_each(|(_, slot)| slot.1 = true);
        }
        for block in of(&ready.failed) {
            promise.slots.retain(|&(at, _), _| at != block);
        }
    }

    /// Ends the oldest ordered segment; `false`: none is.
    pub(super) fn open_next(&mut self, result: Result<(), String>) -> bool {
        let Some((tier, segment)) = self.openings.pop_front() else { return false };
        if result.is_err() {
            self.segments.remove(&(tier == Tier::Nvme, segment));
        }
        self.apply(Event::SegmentOpened { tier, segment, result });
        true
    }

    /// Ends one checksum; `false`: none is under way.
    pub(super) fn checksum_next(&mut self) -> bool {
        let Some((slot, generation)) = self.checksums.pop_front() else { return false };
        self.apply(Event::Checksummed { slot, generation, elapsed_us: 10 });
        true
    }

    pub(super) fn pass_ms(&mut self, ms: u64) {
        self.now_us += ms * 1000;
        self.apply(Event::Tick);
    }

    pub(super) fn try_open(
        &mut self,
        maps: bool,
        pid: u32,
        request: wire::OpenSessionRequest,
    ) -> Result<MemberId, Error> {
        self.last += 1;
        let (member, mut token) = (self.last, [0; 16]);
        token[..8].copy_from_slice(&member.to_le_bytes());
        let client = Client {
            tenant: request.tenant.clone(),
            session: 0,
            token: Vec::new(),
            maps,
            pid,
            name: String::new(),
            connected: true,
        };
        self.clients.insert(member, client);
        self.before_opening = self.promises.clone();
        // promises held by the member that comes back are its word; it gave up its share of the others
        if let Some(old) = self.comes_back(pid, &request) {
            self.promises.retain(|lease, promise| {
                if promise.askers.remove(&old) && request.held.contains(lease) {
                    promise.askers.insert(member);
                }
                !promise.askers.is_empty()
            });
        }
        self.asked.insert((member, member), Ask::OpenSession(request.clone()));
        self.apply(Event::Open { member, request_id: member, pid, maps, token, request });
        match self.replies.remove(&(member, member)).expect("an answer") {
            Reply::SessionOpened(_) => Ok(member),
            Reply::Error(error) => Err(error.into()),
            other => panic!("{other:?}"),
        }
    }

    fn comes_back(&self, pid: u32, request: &wire::OpenSessionRequest) -> Option<MemberId> {
        let same = |client: &Client| {
            !client.connected
                && client.token == request.join
                && client.pid == pid
                && client.name == request.member
                && pid != 0
        };
        self.clients.iter().find(|(_, client)| same(client)).map(|(member, _)| *member)
    }

    /// A session of one member that maps memory.
    pub(super) fn open(&mut self, tenant: &str) -> MemberId {
        self.try_open(true, 1000 + self.last as u32, open_of(tenant, "main")).expect("a session")
    }

    /// Another member of a member's session.
    pub(super) fn join(&mut self, first: MemberId, name: &str) -> MemberId {
        let client = &self.clients[&first];
        let mut request = open_of(&client.tenant, name);
        request.join = client.token.clone().into();
        self.try_open(true, 1000 + self.last as u32, request).expect("joined")
    }

    /// The answer, or `None` while the question waits.
    pub(super) fn try_ask(&mut self, member: MemberId, body: Ask) -> Option<Result<Reply, Error>> {
        let asked = self.begin(member, body);
        self.answer(member, asked)
    }

    /// Asks without looking for the answer.
    pub(super) fn begin(&mut self, member: MemberId, body: Ask) -> u64 {
        self.last += 1;
        let request_id = self.last;
        match &body {
            Ask::Release(release) => self.let_go(member, release.lease),
            Ask::CloseSession(_) => self.gone(member),
            Ask::Commit(_) => self.fill_all(member),
            _ => {}
        }
        self.asked.insert((member, request_id), body.clone());
        self.apply(Event::Request { member, request_id, body });
        request_id
    }

    pub(super) fn answer(&mut self, member: MemberId, request_id: u64) -> Option<Result<Reply, Error>> {
        Some(match self.replies.remove(&(member, request_id))? {
            Reply::Error(error) => Err(error.into()),
            reply => Ok(reply),
        })
    }

    pub(super) fn ask(&mut self, member: MemberId, body: Ask) -> Result<Reply, Error> {
        self.try_ask(member, body).expect("an answer at once")
    }

    /// It touches nothing of the lease any more; nor does anybody if all of it is committed.
    fn let_go(&mut self, member: MemberId, lease: u64) {
        let Some(promise) = self.promises.get_mut(&lease) else { return };
        let shared = promise.askers.remove(&member);
        let places = promise.slots.keys().copied().collect::<Vec<_>>();
        let alone = promise.askers.is_empty();
        let done = || places.iter().all(|(block, group)| self.committed(lease, *block, *group));
        if alone || (shared && self.promises[&lease].fill && done()) {
            self.promises.remove(&lease);
        }
    }

    /// Whoever commits has written what it was granted.
    fn fill_all(&mut self, member: MemberId) {
        let Some(session) = self.clients.get(&member).map(|client| client.session) else { return };
        let ours = self.promises.iter().filter(|(_, promise)| promise.fill && promise.session == session);
        let ours: Vec<_> = ours.map(|(lease, _)| *lease).collect();
        ours.into_iter().for_each(|lease| self.write(lease, false));
    }

    /// The holder writes into every slot of a fill lease that is not committed: its blocks, or noise.
    pub(super) fn write(&mut self, lease: u64, noise: bool) {
        let promise = &self.promises[&lease];
        let fingerprint = self.spaces[&promise.space].0;
        for (&(block, group), &(slot, _)) in &promise.slots {
            if self.published.contains_key(&slot) && self.committed(lease, block, group) {
                continue;
            }
            let content = (fingerprint, promise.chain[block as usize], group as u16);
            self.dram.insert(slot, (!noise).then_some(content));
        }
    }

    /// The block was committed under this lease: its holder writes no more.
    pub(super) fn committed(&self, lease: u64, block: u32, group: u32) -> bool {
        let Some(state) = self.node.leases.get(lease) else { return false };
        let of = |item: &&super::super::lease::Item| item.block == block && u32::from(item.group) == group;
        let item = state.items.iter().find(of).expect("a promised item");
        item.state == super::super::lease::ItemState::Committed
    }

    pub(super) fn lose_socket(&mut self, member: MemberId) {
        if let Some(client) = self.clients.get_mut(&member) {
            client.connected = false;
            if !client.maps {
                self.gone(member);
            }
        }
        self.apply(Event::SocketLost { member });
    }

    pub(super) fn kill(&mut self, member: MemberId) {
        self.gone(member);
        self.apply(Event::ProcessGone { member });
    }

    /// Its process touches nothing any more.
    fn gone(&mut self, member: MemberId) {
        self.clients.remove(&member);
        self.promises.retain(|_, promise| {
            promise.askers.remove(&member);
            !promise.askers.is_empty()
        });
    }

    pub(super) fn space_of(&mut self, member: MemberId, model: &str, layout: Layout) -> u32 {
        self.space_with(member, model, layout, IdScheme::Tokens)
    }

    pub(super) fn space_with(
        &mut self,
        member: MemberId,
        model: &str,
        layout: Layout,
        id_scheme: IdScheme,
    ) -> u32 {
        let tenant = self.clients[&member].tenant.clone();
        let space = Space {
            tenant: tenant.clone(),
            model: model.to_owned(),
            revision: b"r1".to_vec(),
            epoch: 0,
            layout,
            id_scheme,
        };
        let request = wire::RegisterSpaceRequest { session: 0, space: Some(space.to_wire()) };
        match self.ask(member, Ask::RegisterSpace(request)).expect("a space") {
            Reply::SpaceRegistered(registered) => {
                self.spaces.insert(registered.space, (space.fingerprint(), tenant));
                registered.space
            }
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn space(&mut self, member: MemberId) -> u32 {
        self.space_of(member, "model", layout())
    }

    pub(super) fn reserve(&mut self, member: MemberId, request: wire::ReserveRequest) -> wire::ReserveReply {
        match self.ask(member, Ask::Reserve(request)).expect("a reservation") {
            Reply::Reserve(reply) => reply,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn commit(&mut self, member: MemberId, lease: u64) -> u32 {
        match self.ask(member, commit_of(lease, &[], &[])).expect("a commit") {
            Reply::Commit(reply) => reply.committed,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn release(&mut self, member: MemberId, lease: u64) {
        self.ask(member, Ask::Release(wire::ReleaseRequest { lease })).expect("a release");
    }

    pub(super) fn matched(&mut self, member: MemberId, space: u32, chain: &[BlockId]) -> wire::MatchReply {
        match self.ask(member, match_of(space, "", chain)).expect("a match") {
            Reply::Match(reply) => reply,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn exists(&mut self, member: MemberId, space: u32, chain: &[BlockId]) -> wire::ExistsReply {
        let request = wire::ExistsRequest { space, chain: packed(chain).into(), session: 0 };
        match self.ask(member, Ask::Exists(request)).expect("an answer") {
            Reply::Exists(reply) => reply,
            other => panic!("{other:?}"),
        }
    }

    /// Reserve, fill, commit, release, in one go.
    pub(super) fn put_at_once(&mut self, member: MemberId, request: wire::ReserveRequest) {
        let reply = self.reserve(member, request);
        assert!(reply.states.iter().all(|state| *state == 0), "{:?}", reply.states);
        assert_eq!(self.commit(member, reply.lease) as usize, reply.states.len());
        self.release(member, reply.lease);
    }

    /// Block by block, so that memory grows, or what is oldest goes, in between.
    pub(super) fn put(&mut self, member: MemberId, space: u32, chain: &[BlockId]) {
        for (depth, id) in chain.iter().enumerate() {
            let parent = if depth == 0 { BlockId::default() } else { chain[depth - 1] };
            self.put_at_once(member, reserve_after(space, parent, depth as u32, &[*id]));
        }
    }

    /// As `put`; what should move has moved before the next block.
    pub(super) fn put_slowly(&mut self, member: MemberId, space: u32, chain: &[BlockId]) {
        for (depth, id) in chain.iter().enumerate() {
            let parent = if depth == 0 { BlockId::default() } else { chain[depth - 1] };
            self.put_at_once(member, reserve_after(space, parent, depth as u32, &[*id]));
            self.settle();
        }
    }

    /// What a person is told at once.
    pub(super) fn question(&mut self, question: Question) -> super::super::event::Answer {
        self.last += 1;
        let ticket = self.last;
        self.apply(Event::Ask { ticket, question });
        while self.node.busy() {
            self.apply(Event::Tick);
        }
        let at = self.answers.iter().position(|(of, _)| *of == ticket).expect("an answer");
        self.answers.remove(at).1
    }
}
