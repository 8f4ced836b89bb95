//! A shell around the node, for targets: it carries out effects as the daemon's own would, and what comes from outside may be anything.
//!
//! Owns what is under way and what the node has promised so far. Invariants: the shell keeps its own promises (an effect that
//! asks for an end gets one, once; time does not go back); what it tells on behalf of clients, other nodes and devices is hostile.
//! Checked after every call: a request is answered at most once, every frame fits the socket, runs lie in open segments of the
//! asker's tenant, no slot is published twice. Leaves to others: what is asked (`requests`), when (the targets).

pub mod requests;

use kvd::node::device::{Copied, CopyOrder, DeviceEnd, DeviceOrder};
use kvd::node::event::{Effect, Event, MemberId, MoveError, Offer, Wanted};
use kvd::node::{EVENTS_PER_CALL_MAX, Node, NodeConfig};
use kvd_proto::limits::FRAME_FDS_MAX;
use kvd_proto::wire::node_frame::Body as Reply;
use kvd_proto::wire::{self, CopyMiss, HandOffState, Tier};
use kvd_proto::{Code, Error, frame};
use kvd_tiers::segment::{SegmentId, SlotRef};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

/// Names that hostile requests choose from.
const REMEMBERED_MAX: usize = 32;

/// What is known of one connection.
#[derive(Debug, Default, Clone)]
pub struct Member {
    /// To join its session with.
    pub token: Vec<u8>,
    tenant: String,
    /// Its socket has not been lost.
    pub connected: bool,
}

/// See the file's head.
pub struct Shell {
    node: Node,
    now_us: u64,
    last: u64,
    members: BTreeMap<MemberId, Member>,
    /// The newest, by which requests name what they mean.
    pub leases: VecDeque<u64>,
    /// Registered ones.
    pub spaces: Vec<u32>,
    segments: HashMap<SegmentId, (u32, String)>,
    openings: VecDeque<(Tier, SegmentId)>,
    checksums: VecDeque<(SlotRef, u32)>,
    /// By token; where a header is shown if all goes well.
    moves: BTreeMap<u64, Option<SlotRef>>,
    /// Of them, those to the bucket, with their bytes.
    uploads: HashMap<u64, u32>,
    slot_bytes: HashMap<SegmentId, u32>,
    /// Of devices: what is to be opened, taken or closed, in order.
    devices: VecDeque<DeviceOrder>,
    /// Copies under way.
    copies: VecDeque<CopyOrder>,
    /// By which requests name them.
    pub memories: VecDeque<u64>,
    sought: BTreeMap<u64, Wanted>,
    offered: BTreeSet<u64>,
    /// Where the next slice of everything begins.
    slice_from: u32,
    unanswered: HashMap<(MemberId, u64), usize>,
    published: BTreeSet<SlotRef>,
    socket: Vec<u8>,
}

impl Shell {
    /// Around a new node.
    pub fn new(config: NodeConfig) -> Self {
        let mut node = Node::new(config);
        node.known_as(vec!["here".to_owned(), "127.0.0.1:7700".to_owned()]);
        Self {
            node,
            now_us: 0,
            last: 0,
            members: BTreeMap::new(),
            leases: VecDeque::new(),
            spaces: Vec::new(),
            segments: HashMap::new(),
            openings: VecDeque::new(),
            checksums: VecDeque::new(),
            moves: BTreeMap::new(),
            uploads: HashMap::new(),
            slot_bytes: HashMap::new(),
            devices: VecDeque::new(),
            copies: VecDeque::new(),
            memories: VecDeque::new(),
            sought: BTreeMap::new(),
            offered: BTreeSet::new(),
            slice_from: 0,
            unanswered: HashMap::new(),
            published: BTreeSet::new(),
            socket: Vec::new(),
        }
    }

    /// Numbers requests, members and tickets.
    pub fn next_number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// Everybody who has asked for a session and is not known to be gone.
    pub fn members(&self) -> Vec<MemberId> {
        self.members.keys().copied().collect()
    }

    /// One of them.
    pub fn member(&self, member: MemberId) -> Option<&Member> {
        self.members.get(&member)
    }

    /// Time passes, and the house is put in order.
    pub fn pass_us(&mut self, us: u64) {
        self.now_us += us;
        self.tell([Event::Tick]);
    }

    /// A connection asks for a session.
    pub fn open(&mut self, pid: u32, maps: bool, request: wire::OpenSessionRequest) -> MemberId {
        let member = self.next_number();
        let mut token = [0; 16];
        token[..8].copy_from_slice(&member.to_le_bytes());
        let tenant = if request.tenant.is_empty() { "default" } else { &request.tenant };
        let known = Member { token: Vec::new(), tenant: tenant.to_owned(), connected: true };
        self.members.insert(member, known);
        self.expect(member, member);
        self.tell([Event::Open { member, request_id: member, pid, maps, token, request }]);
        member
    }

    /// An answer is wanted, unless the number is 0.
    pub fn expect(&mut self, member: MemberId, request_id: u64) {
        if request_id != 0 {
            *self.unanswered.entry((member, request_id)).or_default() += 1;
        }
    }

    /// Events in one call, then what keeps the house in order; all effects are carried out.
    pub fn tell(&mut self, events: impl IntoIterator<Item = Event>) {
        let mut effects = Vec::new();
        self.node.apply(events, self.now_us, &mut effects);
        self.carry_out(&mut effects);
        self.node.settle(self.now_us, &mut effects);
        self.carry_out(&mut effects);
    }

    /// What an earlier daemon left, in calls of the right length; nothing is asked for then.
    pub fn recover(&mut self, events: Vec<Event>) {
        let (mut effects, mut events) = (Vec::new(), events.into_iter().peekable());
        while events.peek().is_some() {
            self.node.apply(events.by_ref().take(EVENTS_PER_CALL_MAX), 0, &mut effects);
        }
        let quiet = |effect: &Effect| matches!(effect, Effect::Space { .. } | Effect::Note { .. });
        assert!(effects.iter().all(quiet), "recovery asks for something: {effects:?}");
        let recovered = self.node.recovered();
        (0..recovered.spaces).for_each(|space| self.spaces.push(space as u32));
    }

    /// Somebody follows, who has heard as much as was told, or nothing.
    pub fn tell_slice(&mut self, anew: bool) {
        let from = if anew { 0 } else { self.slice_from };
        self.tell([Event::TellSlice { ticket: 1, from }]);
    }

    /// A connection ends; what maps nothing is gone with it.
    pub fn lose_socket(&mut self, member: MemberId) {
        if let Some(known) = self.members.get_mut(&member) {
            known.connected = false;
        }
        self.tell([Event::SocketLost { member }]);
    }

    /// A process ends.
    pub fn kill(&mut self, member: MemberId) {
        self.members.remove(&member);
        self.tell([Event::ProcessGone { member }]);
    }

    /// The oldest ordered segment is there, or is refused; `false`: none was ordered.
    pub fn end_opening(&mut self, opened: bool) -> bool {
        let Some((tier, segment)) = self.openings.pop_front() else { return false };
        let result = if opened { Ok(()) } else { Err("no space".to_owned()) };
        if !opened && tier == Tier::Dram {
            self.segments.remove(&segment);
        }
        self.tell([Event::SegmentOpened { tier, segment, result }]);
        true
    }

    /// The oldest published slot has its checksums; `false`: all have.
    pub fn end_checksum(&mut self, elapsed_us: u64) -> bool {
        let Some((slot, generation)) = self.checksums.pop_front() else { return false };
        self.tell([Event::Checksummed { slot, generation, elapsed_us }]);
        true
    }

    /// Bytes have moved, or not; `at` picks which; `false`: none are on their way.
    pub fn end_move(&mut self, at: usize, result: Result<(), MoveError>, elapsed_us: u64) -> bool {
        let Some(&token) = self.moves.keys().nth(at % self.moves.len().max(1)) else { return false };
        let shown = self.moves.remove(&token).expect("it was just there");
        if let Some(slot) = shown.filter(|_| result.is_ok()) {
            assert!(self.published.insert(slot), "a copy lands in a published slot: {slot:?}");
        }
        let uploaded = self.uploads.remove(&token).map(|bytes| (bytes, result.is_ok()));
        self.tell([Event::Moved { token, result, elapsed_us }]);
        if let Some((bytes, stored)) = uploaded {
            self.tell([Event::Uploaded { bytes: bytes.into(), stored }]);
        }
        true
    }

    /// A device has done something, well or not; `false`: nothing was asked of any. Copies end before what they copy is closed.
    pub fn end_device(&mut self, well: bool, short: u32) -> bool {
        if let Some(order) = self.copies.pop_front() {
            let blocks = order.blocks.len() as u32;
            let miss = [CopyMiss::Checksum, CopyMiss::Device, CopyMiss::Stopped][short as usize % 3];
            let (blocks, miss) = if well { (blocks, CopyMiss::None) } else { (short % blocks, miss) };
            let result = Ok(Copied { blocks, miss, reason: String::new() });
            self.tell([Event::Device(DeviceEnd::Copied { token: order.token, result })]);
            return true;
        }
        let end = match self.devices.pop_front() {
            None => return false,
            Some(DeviceOrder::Open { memory, .. }) => {
                let result =
                    if well { Ok(true) } else { Err(Error::invalid("ranges[0]", "no", "give others")) };
                DeviceEnd::Opened { memory, result }
            }
            Some(DeviceOrder::Close { memory, .. }) => DeviceEnd::Closed { memory },
            Some(DeviceOrder::Take { segment, .. }) => {
                DeviceEnd::Taken { segment, result: if well { Ok(()) } else { Err("no room".to_owned()) } }
            }
            Some(DeviceOrder::Lift { token, .. }) => {
                let failed = if short.is_multiple_of(2) { MoveError::Checksum } else { MoveError::Device("EIO".to_owned()) };
                DeviceEnd::Lifted { token, result: if well { Ok(()) } else { Err(failed) } }
            }
            Some(DeviceOrder::Copy(_)) => unreachable!("copies have a queue of their own"),
        };
        self.tell([Event::Device(end)]);
        true
    }

    /// What other nodes are asked for, by ticket.
    pub fn sought(&self) -> Vec<u64> {
        self.sought.keys().copied().collect()
    }

    /// Another node says what of a claim there is; `NotYet` ends the seek.
    pub fn claimed(&mut self, ticket: u64, status: wire::HandOffStatus) {
        if self.sought.get(&ticket).is_none_or(|wanted| wanted.claim.is_none()) {
            return;
        }
        if status.state() == HandOffState::NotYet {
            self.sought.remove(&ticket);
        }
        self.tell([Event::Claimed { ticket, status }]);
    }

    /// Other nodes have, or have not, what is sought.
    pub fn offer(&mut self, ticket: u64, offer: Option<Offer>) {
        if self.sought.remove(&ticket).is_some() {
            if offer.is_some() {
                self.offered.insert(ticket);
            }
            self.tell([Event::Offered { ticket, offer }]);
        }
    }

    /// Everything ends well, everybody goes: nothing may be left that an event would be needed for.
    pub fn end(&mut self) {
        for _ in 0..1000 {
            let more = self.end_opening(true)
                || self.end_checksum(1)
                || self.end_device(true, 0)
                || self.end_move(0, Ok(()), 1);
            if let Some(ticket) = self.sought().first() {
                self.offer(*ticket, None);
            } else if !more {
                break;
            }
        }
        self.members().into_iter().for_each(|member| self.kill(member));
        while self.end_device(true, 0) {}
        (0..3).for_each(|_| self.pass_us(1_000_000));
    }

    fn carry_out(&mut self, effects: &mut Vec<Effect>) {
        effects.drain(..).for_each(|effect| self.execute(effect));
    }

    fn execute(&mut self, effect: Effect) {
        match effect {
            Effect::Send { member, frame } => self.send(member, &frame),
            Effect::Close { member } => _ = self.members.remove(&member),
            Effect::OpenSegment { tier, segment, geometry, tenant, .. } => {
                self.openings.push_back((tier, segment));
                if tier == Tier::Dram {
                    self.slot_bytes.insert(segment, geometry.slot_bytes);
                    let before = self.segments.insert(segment, (geometry.slots, tenant));
                    assert!(before.is_none(), "segment {segment} is ordered twice");
                }
            }
            Effect::Publish { slot, generation, .. } => {
                assert!(self.published.insert(slot), "{slot:?} is published twice");
                self.checksums.push_back((slot, generation));
            }
            Effect::Retire { slot, .. } => _ = self.published.remove(&slot),
            Effect::Demote { token, .. } => self.start(token, None),
            Effect::Promote { token, to, .. } => self.start(token, Some(to)),
            Effect::Upload { token, from, .. } => {
                assert!(self.published.contains(&from), "what is uploaded is shown");
                self.uploads.insert(token, self.slot_bytes[&from.segment]);
                self.start(token, None);
            }
            Effect::Seek { ticket, wanted } => {
                assert!((wanted.stored as usize) < wanted.chain.len(), "nothing is sought");
                assert!(self.sought.insert(ticket, *wanted).is_none());
            }
            Effect::Fetch { ticket, orders } => {
                assert!(self.offered.remove(&ticket), "an offer is answered once");
                orders.into_iter().for_each(|order| self.start(order.token, Some(order.to)));
            }
            Effect::Device(DeviceOrder::Copy(order)) => {
                assert!(!order.blocks.is_empty(), "a copy of nothing: {order:?}");
                self.copies.push_back(*order);
            }
            Effect::Device(order) => {
                if let DeviceOrder::Open { memory, .. } = order {
                    self.memories.push_back(memory);
                    self.memories.truncate(REMEMBERED_MAX);
                }
                self.devices.push_back(order);
            }
            Effect::Slice { next, .. } => self.slice_from = next.unwrap_or(0),
            _ => {}
        }
    }

    fn start(&mut self, token: u64, shown: Option<SlotRef>) {
        assert!(self.moves.insert(token, shown).is_none(), "two transfers with one token");
    }

    fn send(&mut self, member: MemberId, sent: &wire::NodeFrame) {
        let body = sent.body.as_ref().expect("a frame says something");
        let fds = match body {
            Reply::SessionOpened(opened) => 2 * opened.segments.len(),
            Reply::Segment(_) => 2,
            _ => 0,
        };
        assert!(fds <= FRAME_FDS_MAX);
        self.socket.clear();
        frame::push(&mut self.socket, sent, fds as u8);
        if sent.request_id != 0 {
            let unanswered = self.unanswered.get_mut(&(member, sent.request_id));
            let unanswered = unanswered.filter(|count| **count > 0).expect("somebody asked");
            *unanswered -= 1;
        }
        self.learn(member, body);
    }

    fn learn(&mut self, member: MemberId, body: &Reply) {
        match body {
            Reply::SessionOpened(opened) => {
                self.members.entry(member).or_default().token = opened.token.to_vec();
            }
            Reply::SpaceRegistered(registered) if !self.spaces.contains(&registered.space) => {
                self.spaces.push(registered.space);
            }
            Reply::Match(reply) => self.granted(member, reply.lease, &reply.runs),
            Reply::Reserve(reply) => self.granted(member, reply.lease, &reply.runs),
            Reply::Error(error) => assert_ne!(error.code(), Code::Internal, "{error:?}"),
            _ => {}
        }
    }

    fn granted(&mut self, member: MemberId, lease: u64, runs: &[wire::Run]) {
        assert!(lease != 0 || runs.is_empty(), "slots without a lease");
        let tenant = self.members.get(&member).map(|member| &member.tenant);
        for run in runs {
            let (slots, owner) = self.segments.get(&run.segment).expect("an open segment");
            assert!(tenant.is_none_or(|tenant| tenant == owner), "a segment of {owner} for {tenant:?}");
            let last = i64::from(run.first_slot) + i64::from(run.stride) * (i64::from(run.count) - 1);
            assert!(run.count > 0 && run.first_slot < *slots && (0..i64::from(*slots)).contains(&last));
        }
        if self.leases.len() == REMEMBERED_MAX {
            self.leases.pop_front();
        }
        self.leases.push_back(lease);
    }
}
