//! What stands in for a node's fetcher: finds who has the rest of a chain, leases it there, carries names instead of bytes.
//!
//! Owns fetches under way, on both ends. Invariants, as of `kvd/src/run/fetcher.rs`: every `Seek` is answered by one `Offered`, every order by
//! one `Moved`; an owner's lease lasts until the last order that is read under it has ended. What is read under a lease is the block
//! that was leased, or it is a wrong answer.
//! Leaves to others: who has what (`kvd::index`), whether it pays (`kvd::links`), what becomes of the blocks (the nodes).

use super::network::Network;
use super::requests::{KINDS, PEERS, SERVE, blocks, packed, release, request, slots};
use super::world::{Event, World, number};
use kvd::links::{Choice, Trip};
use kvd::node::event::{Event as Told, FetchOrder, MoveError, Offer, Wanted};
use kvd_proto::wire::{self, client_frame::Body as Ask};
use kvd_proto::{BlockId, Chain};
use kvd_tiers::segment::SlotRef;
use std::collections::{BTreeMap, VecDeque};

/// Until an offer is made; then there is none.
const OFFER_US: u64 = 100_000;
/// Carrying one block, and a look whether the owner has more of them ready.
const BLOCK_US: u64 = 40;
const LOOK_US: u64 = 1_000;
/// Some fetches are slow.
const SLOW_SHARE: f64 = 0.1;
const SLOW_US: (u64, u64) = (50_000, 1_000_000);
/// Looks in vain. Then the rest has not come.
const LOOKS_MAX: u32 = 1_000;

/// From one machine to another.
struct Fetch {
    machine: u16,
    ticket: u64,
    owner: u16,
    /// The owner's, when it was asked.
    life: u32,
    wanted: Box<Wanted>,
    choice: Choice,
    step: Step,
    offer: Option<Offer>,
    lease: u64,
    /// By block of the chain, at the owner: where, and whether it may be read.
    slots: BTreeMap<u32, (SlotRef, bool)>,
    orders: Vec<FetchOrder>,
    /// While its blocks are carried.
    trip: Option<Trip>,
    looks: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Asking,
    Offered,
    Carrying,
}

/// All of them.
#[derive(Default)]
pub(super) struct Fetches {
    running: BTreeMap<u64, Fetch>,
    by_ticket: BTreeMap<(u16, u64), u64>,
    by_lease: BTreeMap<(u16, u64), u64>,
    pub(super) begun: u64,
    pub(super) failed: u64,
    pub(super) blocks: u64,
}

impl Fetches {
    /// At the owner: blocks are ready under one of its leases, or will never be.
    pub(super) fn ready(&mut self, owner: u16, ready: &wire::Ready) {
        let Some(of) = self.by_lease.get(&(owner, ready.lease)) else { return };
        let fetch = self.running.get_mut(of).expect("its lease is its own");
        for block in blocks(&ready.blocks) {
            fetch.slots.entry(block).and_modify(|slot| slot.1 = true);
        }
        blocks(&ready.failed).for_each(|block| _ = fetch.slots.remove(&block));
    }
}

impl World {
    /// Whether somebody has more of it, and whether that pays.
    pub(super) fn seek(&mut self, at: u16, ticket: u64, wanted: Box<Wanted>, next: &mut VecDeque<Told>) {
        let now_us = self.clock.now_us();
        let chain = Chain::from_ids("chain", wanted.chain.clone()).expect("a chain within limits");
        let machine = self.living(at);
        let found = machine.follower.index().locate(&chain, 0, 0);
        let choice = machine.links.choose(&wanted, &found, machine.epoch, now_us - machine.started_us);
        for location in &found {
            let owner = self.machines[usize::from(number(&location.address))].as_ref();
            self.checks.hint(owner, location, chain.ids(), now_us);
        }
        let Some(choice) = choice else {
            return next.push_back(Told::Offered { ticket, offer: None });
        };
        self.fetches.begun += 1;
        let (of, owner) = (self.fetches.begun, number(&choice.address));
        let fetch = Fetch {
            machine: at,
            ticket,
            owner,
            life: 0,
            wanted,
            choice,
            step: Step::Asking,
            offer: None,
            lease: 0,
            slots: BTreeMap::new(),
            orders: Vec::new(),
            trip: None,
            looks: 0,
        };
        self.fetches.running.insert(of, fetch);
        self.fetches.by_ticket.insert((at, ticket), of);
        self.pass(at, owner, Event::FetchAsked { fetch: of });
        self.clock.after(OFFER_US, Event::GivenUp { fetch: of });
    }

    /// From machine to machine, if the link carries it.
    fn pass(&mut self, from: u16, to: u16, event: Event) {
        if !self.network.still(from, to, self.clock.now_us()) {
            let us = Network::latency_us(&mut self.chance);
            self.clock.after(us, event);
        }
    }

    /// The owner looks again: it is the truth about what it has.
    pub(super) fn fetch_asked(&mut self, of: u64) {
        let Some(fetch) = self.fetches.running.get_mut(&of) else { return };
        let owner = fetch.owner;
        let Some(machine) = &self.machines[usize::from(owner)] else { return }; // it is given up
        fetch.life = machine.life;
        let chain = &fetch.wanted.chain[..fetch.choice.blocks as usize];
        let asked = wire::MatchRequest {
            space: machine.space.expect("it has sessions"),
            chain: packed(chain).into(),
            skip_blocks: fetch.wanted.stored,
            this_node_only: true,
            ..wire::MatchRequest::default()
        };
        self.tell(owner, request(PEERS, of * KINDS + SERVE, Ask::Match(asked)));
    }

    /// The owner has leased it, or has nothing.
    pub(super) fn served(
        &mut self,
        owner: u16,
        of: u64,
        reply: &wire::MatchReply,
        next: &mut VecDeque<Told>,
    ) {
        let Some(fetch) = self.fetches.running.get_mut(&of).filter(|fetch| fetch.step == Step::Asking) else {
            if reply.lease != 0 {
                next.push_back(release(PEERS, reply.lease)); // it was given up
            }
            return;
        };
        (fetch.lease, fetch.slots) = (reply.lease, slots(&reply.runs));
        if reply.lease != 0 && reply.blocks > fetch.wanted.stored {
            fetch.offer = Some(Offer {
                blocks: reply.blocks.min(fetch.choice.blocks),
                parent: BlockId::from_slice("parent", &reply.parent).expect("an id"),
                predicted_us: fetch.choice.predicted_us.max(reply.predicted_us),
                from_bucket: false,
            });
        }
        let machine = fetch.machine;
        if reply.lease != 0 {
            self.fetches.by_lease.insert((owner, reply.lease), of);
        }
        self.pass(owner, machine, Event::OfferCame { fetch: of });
    }

    pub(super) fn offer_came(&mut self, of: u64) {
        let Some(fetch) = self.fetches.running.get_mut(&of).filter(|fetch| fetch.step == Step::Asking) else {
            return;
        };
        let (machine, ticket, offer) = (fetch.machine, fetch.ticket, fetch.offer.clone());
        let leased = offer.as_ref().map_or(fetch.wanted.stored, |offer| offer.blocks);
        self.checks.stale_hints += u64::from(fetch.choice.blocks - leased);
        if offer.is_some() {
            fetch.step = Step::Offered;
        } else {
            self.end_fetch(of);
        }
        self.tell(machine, Told::Offered { ticket, offer });
    }

    /// No offer came in time.
    pub(super) fn given_up(&mut self, of: u64) {
        let Some(fetch) = self.fetches.running.get(&of).filter(|fetch| fetch.step == Step::Asking) else {
            return;
        };
        let (machine, ticket) = (fetch.machine, fetch.ticket);
        self.checks.stale_hints += u64::from(fetch.choice.blocks - fetch.wanted.stored);
        self.failed(of);
        self.end_fetch(of);
        self.tell(machine, Told::Offered { ticket, offer: None });
    }

    /// The way to its owner is left alone for a while.
    fn failed(&mut self, of: u64) {
        self.fetches.failed += 1;
        let now_us = self.clock.now_us();
        let fetch = &self.fetches.running[&of];
        let machine = self.machines[usize::from(fetch.machine)].as_mut().expect("its fetches die with it");
        let now_us = now_us - machine.started_us;
        machine.links.failed(&fetch.choice.address, fetch.choice.node_epoch, now_us);
    }

    pub(super) fn ordered(&mut self, at: u16, ticket: u64, orders: Vec<FetchOrder>) {
        let of = self.fetches.by_ticket[&(at, ticket)];
        if orders.is_empty() {
            return self.end_fetch(of);
        }
        let now_us = self.clock.now_us();
        let fetch = self.fetches.running.get_mut(&of).expect("what is fetched was offered");
        fetch.step = Step::Carrying;
        let bytes = orders.len() as u64 * super::machine::BLOCK_BYTES;
        let slow = self.chance.happens(SLOW_SHARE);
        let slow_us = if slow { self.chance.between(SLOW_US.0, SLOW_US.1) } else { 0 };
        let us = BLOCK_US * orders.len() as u64 + slow_us;
        fetch.orders = orders;
        let address = fetch.choice.address.clone();
        let machine = self.living(at);
        let trip = machine.links.began(&address, bytes, now_us - machine.started_us);
        self.fetches.running.get_mut(&of).expect("it was just there").trip = Some(trip);
        self.clock.after(us + Network::latency_us(&mut self.chance), Event::Carried { fetch: of });
    }

    /// What is ready at the owner is here now; the rest is looked for again.
    pub(super) fn carried(&mut self, of: u64) {
        let now_us = self.clock.now_us();
        let Some(fetch) = self.fetches.running.get_mut(&of) else { return };
        fetch.looks += 1;
        let still = self.network.still(fetch.machine, fetch.owner, now_us);
        let owner = self.machines[usize::from(fetch.owner)].as_ref();
        let owner = owner.filter(|owner| owner.life == fetch.life && !still && fetch.looks < LOOKS_MAX);
        let (mut ended, mut left) = (Vec::new(), Vec::new());
        for order in std::mem::take(&mut fetch.orders) {
            match (owner, fetch.slots.get(&order.block)) {
                (None, _) | (_, None) => ended.push((order, None)),
                (Some(owner), Some((slot, true))) => ended.push((order, owner.memory.read(*slot))),
                _ => left.push(order),
            }
        }
        let (machine, over, came) = (fetch.machine, left.is_empty(), owner.is_some());
        fetch.orders = left;
        if over {
            let (address, trip) = (fetch.choice.address.clone(), fetch.trip.take().expect("it carries"));
            let failed = (!came).then_some(fetch.choice.node_epoch);
            let machine = self.living(machine);
            machine.links.ended(&address, trip, failed, now_us - machine.started_us);
            self.fetches.failed += u64::from(!came);
            self.end_fetch(of);
        } else {
            self.clock.after(LOOK_US, Event::Carried { fetch: of });
        }
        ended.into_iter().for_each(|(order, content)| self.arrived_block(machine, &order, came, content));
    }

    /// As told: a block that is not there any more, or what is under the lease.
    fn arrived_block(&mut self, at: u16, order: &FetchOrder, came: bool, content: Option<BlockId>) {
        let id = order.header.id;
        let memory = &mut self.living(at).memory;
        let result = if content == Some(id) {
            memory.write(order.to, id);
            memory.publish(order.to, id);
            self.fetches.blocks += 1;
            Ok(())
        } else if came && content.is_some() {
            self.checks.wrong_answers += 1;
            Err(MoveError::Checksum)
        } else {
            Err(MoveError::Device("its owner has it no longer".to_owned()))
        };
        self.tell(at, Told::Moved { token: order.token, result, elapsed_us: LOOK_US });
    }

    /// The owner hears that its lease is not needed any more.
    fn end_fetch(&mut self, of: u64) {
        let fetch = self.fetches.running.remove(&of).expect("it ends once");
        self.fetches.by_ticket.remove(&(fetch.machine, fetch.ticket));
        if fetch.lease != 0 {
            self.fetches.by_lease.remove(&(fetch.owner, fetch.lease));
            let us = Network::latency_us(&mut self.chance);
            let (machine, life, lease) = (fetch.owner, fetch.life, fetch.lease);
            self.clock.after(us, Event::LeaseEnds { machine, life, lease });
        }
    }

    /// With whoever wanted it.
    pub(super) fn fetches_die(&mut self, machine: u16) {
        let of_it = self.fetches.running.iter().filter(|(_, fetch)| fetch.machine == machine);
        for of in of_it.map(|(of, _)| *of).collect::<Vec<_>>() {
            self.end_fetch(of);
        }
    }

    pub(super) fn lease_ends(&mut self, machine: u16, lease: u64) {
        self.tell(machine, release(PEERS, lease));
    }
}
