//! The node's thread: waits for sockets, processes and other threads, hands what happened to the node in one batch, and
//! does what it decides.
//!
//! Invariants: nothing here decides; nothing here waits but the one `poll`; every wake-up drains everything into as few
//! `apply` calls as the node's batch limit allows. A member's process is watched by pidfd until the node lets it go.

mod devices;
mod frames;

use super::attach::Attach;
use super::bucket::BucketTier;
use super::chunks::{Allowance, Parked, Share};
use super::dram::DramSegments;
use super::fetcher;
use super::gpu::Gpus;
use super::grpc::Callers;
use super::inbox::{Inbox, Input};
use super::keeping::Keeping;
use super::lab::Lab;
use super::members::{Peer, random};
use super::metrics::Timings;
use super::mover::{Mover, Order};
use super::publisher::{Teller, Told};
use super::reattach::Reattached;
use super::socket::Left;
use super::watch::Watchers;
use super::workers::{Checksumming, Reading, checksummer, populator};
use crate::node::Node;
use crate::node::event::{Answer, Effect, Event, MemberId};
use kvd_proto::slot_header::SlotHeader;
use kvd_proto::wire::{self, Tier, client_frame, node_frame};
use kvd_tiers::catalog::record::SpaceRecord;
use kvd_tiers::segment::{SegmentId, SlotRef};
use mio::{Events, Interest, Poll, Token};
use prost::Message as _;
use rustix::fd::OwnedFd;
use rustix::process::{Resource, getrlimit};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

const LISTENER: Token = Token(0);
pub(super) const WAKE: Token = Token(1);
/// Tokens of members: `2 * member` the socket, `2 * member + 1` the process.
pub(super) const FIRST_MEMBER: MemberId = 1;
const TICK: Duration = Duration::from_millis(50);
const POLLED_MAX: usize = 1024;
/// Requests of one call: each may be a match of thousands of blocks, and nobody's answer waits for more than these.
const REQUESTS_PER_CALL_MAX: usize = 2;
/// Ended transfers and checksums of one round; the rest waits for the next, behind the requests that came meanwhile.
const ENDED_PER_ROUND_MAX: usize = 16;
const READ_BUFFER_BYTES: usize = 64 << 10;

/// What the reactor is made of.
pub(super) struct Parts {
    pub(super) poll: Poll,
    pub(super) listener: mio::net::UnixListener,
    pub(super) inbox: Inbox,
    pub(super) node: Node,
    pub(super) dram: Arc<DramSegments>,
    pub(super) mover: Option<Mover>,
    pub(super) bucket: Option<BucketTier>,
    pub(super) connections_max: usize,
    pub(super) timings: Arc<Timings>,
    pub(super) started: Instant,
    pub(super) teller: Teller,
    pub(super) fetcher: fetcher::Orders,
    pub(super) keeping: Keeping,
    pub(super) reattached: Reattached,
    pub(super) moving: Option<JoinHandle<()>>,
    pub(super) attach: Attach,
    pub(super) lab: Lab,
    pub(super) gpus: Gpus,
}

pub(super) struct Reactor {
    poll: Poll,
    listener: mio::net::UnixListener,
    inbox: Inbox,
    node: Node,
    dram: Arc<DramSegments>,
    /// While there is a device.
    mover: Option<Mover>,
    bucket: Option<BucketTier>,
    /// Its thread, or that of the one before, which may be closing it still.
    moving: Option<JoinHandle<()>>,
    attach: Attach,
    lab: Lab,
    gpus: Gpus,
    orders: Vec<Order>,
    checksums: Sender<Vec<Reading>>,
    /// Slots to read, as ordered in this round.
    to_read: Vec<Reading>,
    populate: Sender<(SegmentId, Arc<super::dram::DramSegment>)>,
    members: HashMap<MemberId, Peer>,
    last_member: MemberId,
    connections_max: usize,
    /// Sockets with unread bytes that edge-triggered polling will not mention again.
    unread: BTreeSet<MemberId>,
    unsent: BTreeSet<MemberId>,
    /// Asked to open a session in this round; whoever was not let in is no member.
    opening: Vec<MemberId>,
    callers: Callers,
    watchers: Watchers,
    teller: Teller,
    fetcher: fetcher::Orders,
    keeping: Keeping,
    /// Descriptors of engines' memory: what there may be, and those that the node is about to hear of.
    allowance: Arc<Allowance>,
    parked: Parked,
    questions: HashMap<u64, oneshot::Sender<Answer>>,
    /// By token, of promotions and fetches: the header to show once every part agrees.
    promotions: HashMap<u64, (SlotRef, u32, Box<SlotHeader>)>,
    last_ticket: u64,
    timings: Arc<Timings>,
    started: Instant,
    ticked: Instant,
    events: Vec<Event>,
    read_buffer: Vec<u8>,
    /// What other threads have finished; nobody waits for it as for an answer.
    ended: VecDeque<Event>,
    effects: Vec<Effect>,
    stopping: bool,
}

impl Reactor {
    pub(super) fn new(parts: Parts) -> std::io::Result<Self> {
        let mut listener = parts.listener;
        parts.poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
        let Reattached { segments, orphans } = parts.reattached;
        let (mut members, orphans_count) = (HashMap::new(), orphans.len());
        for orphan in orphans {
            members.insert(orphan.member, Peer::orphan(parts.poll.registry(), orphan)?);
        }
        let last_member = members.keys().copied().max().unwrap_or(FIRST_MEMBER);
        let populate = populator(parts.inbox.clone());
        segments.into_iter().for_each(|segment| _ = populate.send(segment));
        Ok(Self {
            poll: parts.poll,
            listener,
            checksums: checksummer(parts.inbox.clone()),
            to_read: Vec::new(),
            populate,
            inbox: parts.inbox,
            node: parts.node,
            dram: parts.dram,
            mover: parts.mover,
            bucket: parts.bucket,
            moving: parts.moving,
            attach: parts.attach,
            lab: parts.lab,
            gpus: parts.gpus,
            orders: Vec::new(),
            members,
            last_member,
            // those of earlier daemons take nobody's place
            connections_max: parts.connections_max + orphans_count,
            unread: BTreeSet::new(),
            unsent: BTreeSet::new(),
            opening: Vec::new(),
            callers: Callers::default(),
            watchers: Watchers::default(),
            teller: parts.teller,
            fetcher: parts.fetcher,
            keeping: parts.keeping,
            allowance: Allowance::of(getrlimit(Resource::Nofile).current),
            parked: Parked::default(),
            questions: HashMap::new(),
            promotions: HashMap::new(),
            last_ticket: 0,
            timings: parts.timings,
            started: parts.started,
            ticked: parts.started,
            events: Vec::new(),
            read_buffer: vec![0; READ_BUFFER_BYTES],
            ended: VecDeque::new(),
            effects: Vec::new(),
            stopping: false,
        })
    }

    /// Until `Input::Stop`. The thread that is left ends by itself.
    pub(super) fn run(mut self) -> std::io::Result<Option<JoinHandle<()>>> {
        let mut polled = Events::with_capacity(POLLED_MAX);
        let mut inputs = Vec::new();
        while !self.stopping {
            let more = !self.unread.is_empty()
                || !self.events.is_empty()
                || !self.ended.is_empty()
                || self.node.busy();
            let timeout = if more { Duration::ZERO } else { TICK };
            match self.poll.poll(&mut polled, Some(timeout)) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                other => other?,
            }
            let woke = Instant::now();
            for event in &polled {
                self.polled(event);
            }
            self.read_rest();
            self.inbox.drain(&mut inputs);
            inputs.drain(..).for_each(|input| self.input(input));
            if self.ticked.elapsed() >= TICK {
                self.ticked = Instant::now();
                self.events.push(Event::Tick);
            }
            self.apply();
            self.timings.round.observe(woke.elapsed().as_secs_f64());
        }
        if let Some(mover) = &self.mover {
            mover.order(&mut vec![Order::Stop]);
        }
        Ok(self.moving)
    }

    fn polled(&mut self, event: &mio::event::Event) {
        match event.token() {
            LISTENER => self.accept(),
            WAKE => {}
            Token(token) => {
                let member = (token / 2) as MemberId;
                if token % 2 == 1 {
                    self.process_gone(member);
                    return;
                }
                if event.is_writable() {
                    self.unsent.insert(member);
                }
                if event.is_readable() || event.is_read_closed() || event.is_error() {
                    self.unread.insert(member);
                }
                let socket = self.members.get_mut(&member).and_then(|peer| peer.socket.as_mut());
                if let Some(socket) = socket.filter(|_| event.is_read_closed()) {
                    socket.ended = true; // said once, perhaps together with the last bytes
                }
            }
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.members.len() >= self.connections_max {
                tracing::warn!(limit = self.connections_max, "a connection is refused: limits.members_max");
                continue; // dropped: the peer sees the end at once
            }
            if let Err(error) = self.welcome(stream) {
                tracing::warn!(%error, "a connection could not be taken");
            }
        }
    }

    fn welcome(&mut self, stream: mio::net::UnixStream) -> std::io::Result<()> {
        self.last_member += 1;
        let member = self.last_member;
        let share = Share::new(self.allowance.clone());
        self.members.insert(member, Peer::welcome(self.poll.registry(), member, stream, share)?);
        self.unread.insert(member);
        Ok(())
    }

    fn process_gone(&mut self, member: MemberId) {
        let Some(peer) = self.members.remove(&member) else { return };
        self.let_go(peer);
        self.events.push(Event::ProcessGone { member });
    }

    fn let_go(&mut self, mut peer: Peer) {
        peer.unwatch(self.poll.registry());
        self.keeping.forget(peer.kept.take());
    }

    /// One share of every socket that has something.
    fn read_rest(&mut self) {
        let mut buffer = std::mem::take(&mut self.read_buffer);
        let mut frames = Vec::new();
        for member in std::mem::take(&mut self.unread) {
            let Some(peer) = self.members.get_mut(&member) else { continue };
            let Some(socket) = peer.socket.as_mut().filter(|socket| !socket.closing) else { continue };
            let left = socket.read(&mut buffer, &mut frames);
            frames.drain(..).for_each(|frame| self.frame(member, frame));
            match left {
                Ok(Left::Nothing) => {}
                Ok(Left::More) => {
                    self.unread.insert(member);
                }
                Ok(Left::Ended) => self.socket_lost(member),
                Err(error) => self.not_a_frame(member, error),
            }
        }
        self.read_buffer = buffer;
    }

    fn socket_lost(&mut self, member: MemberId) {
        let Some(peer) = self.members.get_mut(&member) else { return };
        if let Some(mut socket) = peer.socket.take() {
            let _ = self.poll.registry().deregister(&mut socket.stream);
            self.events.push(Event::SocketLost { member });
        }
        if !peer.opened || peer.let_go {
            let peer = self.members.remove(&member).expect("it is there");
            self.let_go(peer);
        }
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::Event(event) => self.ended.push_back(event),
            Input::Moved { token, result, elapsed_us, checksums } => {
                self.moved(token, result, elapsed_us, &checksums);
            }
            Input::Checksummed(done) => self.checksummed(done),
            Input::SegmentOpened { segment, result } => {
                self.events.push(Event::SegmentOpened { tier: Tier::Nvme, segment, result });
            }
            Input::Join { request, maps, answer } => {
                self.last_member += 1;
                let member = self.last_member;
                let request_id = self.callers.join(member, answer);
                let token = random();
                self.events.push(Event::Open { member, request_id, pid: 0, maps, token, request });
            }
            Input::Call { member, body, answer } => {
                if let client_frame::Body::Release(release) = &body {
                    self.callers.released(release.lease);
                }
                let request_id = self.callers.call(answer);
                self.events.push(Event::Request { member, request_id, body });
            }
            Input::Tell { member, body } => self.events.push(Event::Request { member, request_id: 0, body }),
            Input::Follow { lease, frames } => self.callers.follow(lease, frames),
            Input::Attached(attached) => self.attached(*attached),
            Input::Ask { mut question, answer } => {
                if let Err(error) = self.attach.complete(&mut question) {
                    let _ = answer.send(Answer::Refused(error)); // who stopped waiting is not told
                    return;
                }
                self.last_ticket += 1;
                self.questions.insert(self.last_ticket, answer);
                self.events.push(Event::Ask { ticket: self.last_ticket, question });
            }
            Input::Watch { events } => self.watchers.add(events),
            Input::Stop => self.stopping = true,
        }
    }

    /// A promotion's header is shown before its readers hear that it is ready.
    fn moved(
        &mut self,
        token: u64,
        result: Result<(), crate::node::event::MoveError>,
        elapsed_us: u64,
        checksums: &[u32],
    ) {
        if let Some((slot, generation, mut header)) = self.promotions.remove(&token)
            && result.is_ok()
        {
            header.part_checksums.copy_from_slice(checksums);
            self.dram.publish(slot, generation, &header);
        }
        self.ended.push_back(Event::Moved { token, result, elapsed_us });
    }

    fn checksummed(&mut self, done: Vec<Checksumming>) {
        for Checksumming { segment, slot, generation, header, elapsed_us } in done {
            let mut table = segment.table();
            if table.generation(slot.slot) == generation {
                table.publish(slot.slot, generation, &header);
            }
            drop(table);
            self.ended.push_back(Event::Checksummed { slot, generation, elapsed_us });
        }
    }

    /// Requests first, a few at a time, each few answered before the next; then a share of what ended elsewhere.
    fn apply(&mut self) {
        self.answer();
        let share = self.ended.len().min(ENDED_PER_ROUND_MAX);
        let events: Vec<_> = self.ended.drain(..share).collect();
        self.call(events);
        self.answer(); // what effects completed on the spot
        let now_us = self.now_us();
        self.with_node(|node, effects| node.settle(now_us, effects));
        self.forget_refused();
    }

    fn answer(&mut self) {
        while !self.events.is_empty() {
            let batch = self.events.len().min(REQUESTS_PER_CALL_MAX);
            let events: Vec<_> = self.events.drain(..batch).collect();
            self.call(events);
        }
        self.parked.close();
    }

    fn call(&mut self, events: Vec<Event>) {
        let now_us = self.now_us();
        self.with_node(|node, effects| node.apply(events, now_us, effects));
    }

    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// Does what the node says, down to the last answer sent.
    fn with_node(&mut self, decide: impl FnOnce(&mut Node, &mut Vec<Effect>)) {
        let mut effects = std::mem::take(&mut self.effects);
        decide(&mut self.node, &mut effects);
        effects.drain(..).for_each(|effect| self.effect(effect));
        self.effects = effects;
        if !self.to_read.is_empty() {
            let order = std::mem::take(&mut self.to_read);
            self.checksums.send(order).expect("the thread lives as long as its sender");
        }
        match &self.mover {
            Some(mover) => mover.order(&mut self.orders),
            None => self.orders.clear(), // spaces: who attaches a device is told all of them
        }
        self.send_all();
    }

    /// Peers that asked for a session and got none: they may ask again, or go like anybody who never asked.
    fn forget_refused(&mut self) {
        for member in std::mem::take(&mut self.opening) {
            let Some(peer) = self.members.get_mut(&member).filter(|peer| !peer.welcomed) else { continue };
            peer.opened = false;
            if peer.socket.is_none() {
                let peer = self.members.remove(&member).expect("it is there");
                self.let_go(peer);
            }
        }
    }

    fn effect(&mut self, effect: Effect) {
        match effect {
            Effect::Send { member, frame } => self.send(member, frame),
            Effect::Close { member } => self.close(member),
            Effect::OpenSegment { tier, segment, geometry, tenant, numa_node } => {
                self.open_segment(tier, segment, geometry, tenant, numa_node);
            }
            Effect::CloseSegment { tier, segment } => self.close_segment(tier, segment),
            Effect::Resize { tier, bytes } => self.resize(tier, bytes),
            Effect::Attach { path, bytes, segment_bytes } => self.attach.open(path, bytes, segment_bytes),
            Effect::Detach => self.detach(),
            Effect::Publish { slot, generation, header } => {
                let segment = self.dram.get(slot.segment);
                segment.table().publish(slot.slot, generation, &header);
                let checksumming = Checksumming { segment, slot, generation, header, elapsed_us: 0 };
                self.to_read.push(Reading::Checksum(checksumming));
            }
            Effect::Fill { slots, filler } => slots.into_iter().for_each(|slot| self.dram.fill(slot, filler)),
            Effect::Verify { token, slot } => {
                let segment = self.dram.get(slot.segment);
                self.to_read.push(Reading::Verify { token, segment, slot });
            }
            Effect::Upload { token, from, attempt } => self.upload(token, from, attempt),
            Effect::Retire { slot, generation } => {
                self.callers.retired(slot); // before anybody else can be given the slot
                self.dram.retire(slot, generation);
            }
            Effect::Demote { token, from, to, header } => {
                self.orders.push(Order::Demote { token, from, to, header });
            }
            Effect::Promote { token, from, to, generation, header } => {
                self.promotions.insert(token, (to, generation, header));
                self.orders.push(Order::Promote { token, from, to });
            }
            Effect::Seek { ticket, wanted } => self.tell_fetcher(fetcher::Order::Seek { ticket, wanted }),
            Effect::Fetch { ticket, orders } => {
                let headers = orders
                    .iter()
                    .map(|order| (order.token, (order.to, order.generation, order.header.clone())));
                self.promotions.extend(headers);
                self.tell_fetcher(fetcher::Order::Fetch { ticket, orders });
            }
            Effect::Forget { slot } => self.orders.push(Order::Forget { slot }),
            Effect::Space { fingerprint, tenant, definition } => {
                self.space(SpaceRecord { fingerprint, tenant, space: definition.encode_to_vec() });
            }
            Effect::Answer { ticket, answer } => {
                if let Some(asker) = self.questions.remove(&ticket) {
                    let _ = asker.send(answer); // who stopped waiting is not told
                }
            }
            Effect::Copies { runs } => self.teller.tell(Told::Copies { runs }),
            Effect::Slice { ticket, runs, next } => {
                self.teller.tell(Told::Slice { follower: ticket, runs, next });
            }
            Effect::Device(order) => self.device(order),
            Effect::Accessed(access) => self.lab.tell(access),
            Effect::Note { kind, text } => {
                let at_ms = self.started.elapsed().as_millis() as u64;
                self.watchers.tell(at_ms, kind, text);
            }
        }
    }

    /// Without servers nothing is answered any more, and the node is about to end.
    fn tell_fetcher(&self, order: fetcher::Order) {
        let _ = self.fetcher.send(order);
    }

    fn send(&mut self, member: MemberId, frame: wire::NodeFrame) {
        if self.callers.deliver(member, &frame) {
            return;
        }
        let fds = self.descriptors(&frame);
        let Some(peer) = self.members.get_mut(&member) else { return };
        if let Some(node_frame::Body::SessionOpened(opened)) = &frame.body {
            peer.welcomed = true;
            peer.kept = self.keeping.member(member, opened.session, peer.client, peer.process.as_ref());
        }
        let Some(socket) = peer.socket.as_mut() else { return };
        let keeps_up = fds.map(|fds| socket.push(&frame, fds));
        self.unsent.insert(member);
        match keeps_up {
            Ok(true) => {}
            Ok(false) => {
                tracing::warn!(member, "a client does not read its replies: its connection is closed");
                self.socket_lost(member);
            }
            Err(error) => {
                tracing::error!(member, %error, "segments cannot be shared: raise the open files limit");
                self.socket_lost(member);
            }
        }
    }

    fn descriptors(&self, frame: &wire::NodeFrame) -> std::io::Result<Vec<OwnedFd>> {
        let segments: &[wire::Segment] = match &frame.body {
            Some(node_frame::Body::SessionOpened(opened)) => &opened.segments,
            Some(node_frame::Body::Segment(segment)) => std::slice::from_ref(segment),
            _ => return Ok(Vec::new()),
        };
        let mut fds = Vec::with_capacity(2 * segments.len());
        for segment in segments {
            fds.extend(self.dram.get(segment.segment).descriptors()?);
        }
        Ok(fds)
    }

    fn close(&mut self, member: MemberId) {
        self.callers.leave(member);
        let Some(peer) = self.members.get_mut(&member) else { return };
        match peer.socket.as_mut() {
            Some(socket) => {
                socket.shut();
                peer.let_go = true;
                self.unsent.insert(member);
            }
            None => {
                let peer = self.members.remove(&member).expect("it is there");
                self.let_go(peer);
            }
        }
    }

    fn send_all(&mut self) {
        for member in std::mem::take(&mut self.unsent) {
            let Some(peer) = self.members.get_mut(&member) else { continue };
            let Some(socket) = peer.socket.as_mut() else { continue };
            let (sent, closing) = (socket.flush(), socket.closing);
            match sent {
                Ok(all) if !(all && closing) => {}
                Ok(_) if peer.let_go => {
                    let peer = self.members.remove(&member).expect("it is there");
                    self.let_go(peer);
                }
                // after a frame that is none too: the process may still be filling what it leased
                _ => self.socket_lost(member),
            }
        }
    }
}
