//! What engines ask of their nodes: match a chain, read what can be had of it, compute and store the rest.
//!
//! Owns requests under way, and what each lease lets its holder read. Invariants: every block that is read is compared with the one
//! that was asked for; what is granted holds noise until it is filled.
//! Leaves to others: the nodes' answers, what they bring from each other (`fetching`), memory (`machine`).

use super::clock::Chance;
use super::world::{Event, World};
use crate::content::mix;
use kvd::node::event::{Event as Told, MemberId};
use kvd_proto::wire;
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::wire::node_frame::Body as Reply;
use kvd_proto::{BlockId, PROTOCOL_MAJOR};
use kvd_tiers::segment::SlotRef;
use std::collections::{BTreeMap, VecDeque};

/// Prompts begin in one of so many ways, the first the most often, and go on in one of so many.
const FAMILIES: u64 = 600;
const VARIANTS: u64 = 40;
/// Reading what is ready; what has to come up first, at most.
const READ_US: u64 = 300;
const LOAD_US_MAX: u64 = 20_000;
/// Some readers are slow: others' blocks come and go around what they hold.
const SLOW_SHARE: f64 = 0.1;
const SLOW_US: (u64, u64) = (100_000, 4_000_000);
/// Computing one block.
const FILL_US: u64 = 2_000;
/// The engine's connection, and that of other nodes.
const ENGINE: MemberId = 1;
pub(super) const PEERS: MemberId = 2;

/// What a reply is to; the rest of its number is the request's.
const MATCH: u64 = 0;
pub(super) const SERVE: u64 = 1;
const RESERVE: u64 = 2;
pub(super) const KINDS: u64 = 4;

/// One prompt on its way.
struct Request {
    machine: u16,
    chain: Vec<BlockId>,
    /// Blocks that were read on its own machine.
    local: usize,
    lease: u64,
    slots: Vec<(usize, SlotRef)>,
}

/// A read lease.
struct Reading {
    request: u64,
    /// By block of the chain: where, and whether it may be read.
    slots: BTreeMap<u32, (SlotRef, bool)>,
}

/// All that is under way, and what came of it.
#[derive(Default)]
pub(super) struct Requests {
    running: BTreeMap<u64, Request>,
    readings: BTreeMap<(u16, u64), Reading>,
    pub(super) asked: u64,
    pub(super) read_blocks: u64,
    pub(super) stored_blocks: u64,
    pub(super) refused: u64,
}

impl Requests {
    /// Its engine and its leases are gone with it.
    pub(super) fn died(&mut self, machine: u16) {
        self.running.retain(|_, request| request.machine != machine);
        self.readings.retain(|(of, _), _| *of != machine);
    }
}

/// A prompt: what it begins with is shared by its family.
fn prompt(chance: &mut Chance) -> Vec<BlockId> {
    let (family, variant) = (chance.ranked(FAMILIES), chance.ranked(VARIANTS));
    let shared = 2 + mix(family) % 9;
    let blocks = shared + 1 + mix(family << 32 | variant) % 8;
    let name = |depth| family << 32 | depth << 16 | if depth < shared { 0 } else { variant + 1 };
    (0..blocks).map(|depth| id(name(depth))).collect()
}

fn id(name: u64) -> BlockId {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&mix(name).to_le_bytes());
    bytes[8..].copy_from_slice(&mix(!name).to_le_bytes());
    BlockId(bytes)
}

pub(super) fn packed(ids: &[BlockId]) -> Vec<u8> {
    ids.iter().flat_map(|id| id.0).collect()
}

/// The slots of runs, by block.
pub(super) fn slots(runs: &[wire::Run]) -> BTreeMap<u32, (SlotRef, bool)> {
    let slot = |run: &wire::Run, at: u32| {
        let slot = i64::from(run.first_slot) + i64::from(run.stride) * i64::from(at);
        (run.first_block + at, (SlotRef { segment: run.segment, slot: slot as u32 }, run.ready))
    };
    runs.iter().flat_map(|run| (0..run.count).map(move |at| slot(run, at))).collect()
}

pub(super) fn blocks(ranges: &[wire::BlockRange]) -> impl Iterator<Item = u32> {
    ranges.iter().flat_map(|range| range.first..range.first + range.count)
}

pub(super) fn request(member: MemberId, request_id: u64, body: Ask) -> Told {
    Told::Request { member, request_id, body }
}

pub(super) fn release(member: MemberId, lease: u64) -> Told {
    request(member, 0, Ask::Release(wire::ReleaseRequest { lease }))
}

impl World {
    /// Of its engine, and one for what other nodes fetch.
    pub(super) fn open_sessions(&mut self, machine: u16) {
        for member in [ENGINE, PEERS] {
            let opening = wire::OpenSessionRequest {
                version_major: PROTOCOL_MAJOR,
                engine: "simulated".to_owned(),
                ..wire::OpenSessionRequest::default()
            };
            let token = [member as u8; 16];
            self.tell(
                machine,
                Told::Open { member, request_id: 1, pid: 1, maps: true, token, request: opening },
            );
            let space = Some(super::machine::space().to_wire());
            let register = Ask::RegisterSpace(wire::RegisterSpaceRequest { session: 0, space });
            self.tell(machine, request(member, 1, register));
        }
        assert!(self.living(machine).space.is_some(), "its space is registered at once");
    }

    pub(super) fn ask_later(&mut self, machine: u16) {
        let us = self.chance.gap(1e6 / self.setup.requests_per_s);
        let life = self.living(machine).life;
        if self.clock.now_us() + us < self.setup.busy_us {
            self.clock.after(us, Event::Asked { machine, life });
        }
    }

    /// An engine has a prompt.
    pub(super) fn ask(&mut self, machine: u16) {
        self.requests.asked += 1;
        let number = self.requests.asked;
        let chain = prompt(&mut self.chance);
        let body = Ask::Match(wire::MatchRequest {
            space: self.space(machine),
            request_key: number.to_le_bytes().to_vec().into(),
            chain: packed(&chain).into(),
            ..wire::MatchRequest::default()
        });
        let asked = Request { machine, chain, local: 0, lease: 0, slots: Vec::new() };
        self.requests.running.insert(number, asked);
        self.tell(machine, request(ENGINE, number * KINDS + MATCH, body));
        self.ask_later(machine);
    }

    fn space(&self, machine: u16) -> u32 {
        self.machine(machine).and_then(|machine| machine.space).expect("it has sessions")
    }

    /// A node's word; what it is told next goes into `next`.
    pub(super) fn answered(&mut self, at: u16, frame: wire::NodeFrame, next: &mut VecDeque<Told>) {
        let (of, kind) = (frame.request_id / KINDS, frame.request_id % KINDS);
        match frame.body.expect("a reply has a body") {
            Reply::SpaceRegistered(registered) => self.living(at).space = Some(registered.space),
            Reply::Match(reply) if kind == SERVE => self.served(at, of, &reply, next),
            Reply::Match(reply) => self.matched(at, of, &reply, next),
            Reply::Reserve(reply) => self.reserved(at, of, &reply),
            Reply::Ready(ready) => self.ready(at, &ready),
            Reply::Error(error) => {
                assert!(of > 0, "its sessions are opened: {error:?}");
                self.requests.refused += 1;
                match kind {
                    MATCH => self.was_read(of, &[], next),
                    RESERVE => _ = self.requests.running.remove(&of),
                    _ => {} // a fetch is given up
                }
            }
            _ => {}
        }
    }

    fn matched(&mut self, at: u16, of: u64, reply: &wire::MatchReply, next: &mut VecDeque<Told>) {
        if reply.lease == 0 {
            return self.was_read(of, &[], next);
        }
        let reading = Reading { request: of, slots: slots(&reply.runs) };
        self.requests.readings.insert((at, reply.lease), reading);
        let slow = self.chance.happens(SLOW_SHARE);
        let slow_us = if slow { self.chance.between(SLOW_US.0, SLOW_US.1) } else { 0 };
        let us = READ_US + reply.predicted_us.min(LOAD_US_MAX) + slow_us;
        self.clock.after(us, Event::Read { machine: at, lease: reply.lease });
    }

    fn ready(&mut self, at: u16, ready: &wire::Ready) {
        let Some(reading) = self.requests.readings.get_mut(&(at, ready.lease)) else {
            return self.fetches.ready(at, ready);
        };
        for block in blocks(&ready.blocks) {
            reading.slots.entry(block).and_modify(|slot| slot.1 = true);
        }
        blocks(&ready.failed).for_each(|block| _ = reading.slots.remove(&block));
    }

    /// The beginning that is ready is read, and the lease released.
    pub(super) fn read(&mut self, machine: u16, lease: u64) {
        let Some(reading) = self.requests.readings.remove(&(machine, lease)) else { return };
        let memory = &self.living(machine).memory;
        let ready = (0..).map_while(|block| reading.slots.get(&block).filter(|(_, ready)| *ready));
        let contents: Vec<_> = ready.map(|(slot, _)| memory.read(*slot).unwrap_or_default()).collect();
        let mut next = VecDeque::from([release(ENGINE, lease)]);
        self.was_read(reading.request, &contents, &mut next);
        self.tell_all(machine, next);
    }

    fn was_read(&mut self, of: u64, contents: &[BlockId], next: &mut VecDeque<Told>) {
        let Some(asked) = self.requests.running.get_mut(&of) else { return };
        self.checks.compare_read(contents, &asked.chain);
        asked.local = contents.len();
        self.requests.read_blocks += contents.len() as u64;
        self.reserve(of, next);
    }

    /// What was not on its machine is computed and stored there.
    fn reserve(&mut self, of: u64, next: &mut VecDeque<Told>) {
        let asked = &self.requests.running[&of];
        let (local, chain) = (asked.local, &asked.chain);
        if local == chain.len() {
            self.requests.running.remove(&of);
            return;
        }
        let parent = if local == 0 { BlockId::default() } else { chain[local - 1] };
        let body = Ask::Reserve(wire::ReserveRequest {
            space: self.space(asked.machine),
            request_key: of.to_le_bytes().to_vec().into(),
            parent: parent.0.to_vec().into(),
            depth: local as u32,
            chain: packed(&chain[local..]).into(),
            ..wire::ReserveRequest::default()
        });
        next.push_back(request(ENGINE, of * KINDS + RESERVE, body));
    }

    fn reserved(&mut self, at: u16, of: u64, reply: &wire::ReserveReply) {
        let granted = slots(&reply.runs);
        let memory = &mut self.living(at).memory;
        granted.values().for_each(|(slot, _)| memory.granted(*slot));
        if reply.lease == 0 {
            self.requests.running.remove(&of);
            return;
        }
        let asked = self.requests.running.get_mut(&of).expect("its engine lives");
        asked.lease = reply.lease;
        asked.slots =
            granted.into_iter().map(|(block, (slot, _))| (asked.local + block as usize, slot)).collect();
        self.clock.after(FILL_US * asked.slots.len() as u64, Event::Filled { request: of });
    }

    pub(super) fn filled(&mut self, of: u64) {
        let Some(asked) = self.requests.running.remove(&of) else { return };
        let memory = &mut self.living(asked.machine).memory;
        asked.slots.iter().for_each(|(block, slot)| memory.write(*slot, asked.chain[*block]));
        self.requests.stored_blocks += asked.slots.len() as u64;
        let commit = wire::CommitRequest { lease: asked.lease, blocks: Vec::new(), parts: Vec::new() };
        self.tell(asked.machine, request(ENGINE, 0, Ask::Commit(commit)));
        self.tell(asked.machine, release(ENGINE, asked.lease));
    }
}
