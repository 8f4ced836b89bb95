//! The cluster: what happens when, and every effect carried out in memory.
//!
//! Owns the machines and what becomes of them. Invariants: no thread, no I/O, no clock but the virtual one; an effect of a node is
//! carried out after all effects before it; nothing of a machine's earlier life reaches a later one.
//! Leaves to others: what engines ask (`requests`), whether it was right (`checks`).

use super::checks::Checks;
use super::clock::{Chance, Clock};
use super::fetching::Fetches;
use super::machine::{Caller, Machine, Move, TTL_MS, address};
use super::network::{Network, Word};
use super::requests::Requests;
use kvd::index::{follow, publish};
use kvd::node::event::{Effect, Event as Told, MoveError};
use kvd_tiers::segment::SlotRef;
use std::collections::VecDeque;
use std::fmt::Write as _;
use std::hash::Hash as _;

/// Between two ticks of a node, beats of its publisher, ticks of its follower.
const BEAT_US: u64 = publish::BEAT_MS * 1000;
/// A checksum, and a move between the tiers, at most.
const CHECKSUM_US: u64 = 1_000;
const MOVE_US: (u64, u64) = (500, 5_000);
/// After a death, until the machine comes back, if it does.
const AWAY_US: (u64, u64) = (500_000, 8_000_000);
/// The share of dead machines that stay away.
const STAY_AWAY_SHARE: f64 = 0.2;
/// How long a link stands still: shorter and longer than the time to live.
const STILL_US: (u64, u64) = (200_000, 8_000_000);
/// After the last request and the last trouble: until everything known must be right.
pub(super) const SETTLE_US: u64 = TTL_MS as u64 * 1000 + 5_000_000;

/// What will happen; of a life: not if that is over.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Event {
    Beat { machine: u16, life: u32 },
    Called { follower: u16, owner: u16, call: u64 },
    Arrived { follower: u16, owner: u16, call: u64 },
    Checksummed { machine: u16, life: u32, slot: SlotRef, generation: u32 },
    Moved { machine: u16, life: u32, token: u64 },
    Asked { machine: u16, life: u32 },
    Read { machine: u16, lease: u64 },
    FetchAsked { fetch: u64 },
    OfferCame { fetch: u64 },
    GivenUp { fetch: u64 },
    Carried { fetch: u64 },
    LeaseEnds { machine: u16, life: u32, lease: u64 },
    Filled { request: u64 },
    Death { machine: u16, silent: bool },
    Return { machine: u16 },
    Cut { one: u16, other: u16 },
    Still { one: u16, other: u16, us: u64 },
    MoveAgain { one: u16, other: u16 },
}

/// What does not change.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setup {
    pub(super) machines: u16,
    pub(super) seed: u64,
    /// While engines ask and trouble comes.
    pub(super) busy_us: u64,
    pub(super) kill_share: f64,
    /// Each machine's requests, on average.
    pub(super) requests_per_s: f64,
}

/// All machines, and what lies between them.
pub(super) struct World {
    pub(super) setup: Setup,
    pub(super) clock: Clock<Event>,
    pub(super) chance: Chance,
    pub(super) network: Network,
    /// By number; `None`: dead.
    pub(super) machines: Vec<Option<Machine>>,
    lives: Vec<u32>,
    pub(super) addresses: Vec<String>,
    pub(super) requests: Requests,
    pub(super) fetches: Fetches,
    pub(super) checks: Checks,
    pub(super) words: u64,
    pub(super) returns: u64,
}

impl World {
    pub(super) fn new(setup: Setup) -> Self {
        let mut world = Self {
            setup,
            clock: Clock::new(),
            chance: Chance::new(setup.seed),
            network: Network::new(setup.machines),
            machines: (0..setup.machines).map(|_| None).collect(),
            lives: vec![0; usize::from(setup.machines)],
            addresses: (0..setup.machines).map(address).collect(),
            requests: Requests::default(),
            fetches: Fetches::default(),
            checks: Checks::default(),
            words: 0,
            returns: 0,
        };
        (0..setup.machines).for_each(|machine| world.start(machine));
        world.arrange_deaths();
        world.arrange_cuts();
        world
    }

    /// To the end, and what is known then.
    pub(super) fn run(&mut self) {
        let away_us = self.setup.busy_us * 3 / 5 + AWAY_US.1;
        let until_us = self.setup.busy_us.max(away_us) + SETTLE_US;
        while let Some(event) = self.clock.next(until_us) {
            self.handle(event);
        }
        self.checks.compare(&self.machines, &self.addresses);
    }

    fn arrange_deaths(&mut self) {
        let machines = self.setup.machines;
        let deaths = (f64::from(machines) * self.setup.kill_share).round() as usize;
        let mut alive: Vec<u16> = (0..machines).collect();
        for _ in 0..deaths.min(alive.len()) {
            let machine = alive.swap_remove(self.chance.below(alive.len() as u64) as usize);
            let at_us = self.chance.between(self.setup.busy_us / 5, self.setup.busy_us * 3 / 5);
            let silent = self.chance.happens(0.5);
            self.clock.at(at_us, Event::Death { machine, silent });
            if !self.chance.happens(STAY_AWAY_SHARE) {
                let back_us = at_us + self.chance.between(AWAY_US.0, AWAY_US.1);
                self.clock.at(back_us, Event::Return { machine });
            }
        }
    }

    /// As many as there are machines, of all streams.
    fn arrange_cuts(&mut self) {
        let machines = u64::from(self.setup.machines);
        for _ in 0..machines {
            let (one, other) = (self.chance.below(machines) as u16, self.chance.below(machines) as u16);
            let at_us = self.chance.between(self.setup.busy_us / 10, self.setup.busy_us);
            let us = self.chance.between(STILL_US.0, STILL_US.1).min(self.setup.busy_us - at_us);
            let cut = self.chance.happens(0.5);
            let event = if cut { Event::Cut { one, other } } else { Event::Still { one, other, us } };
            self.clock.at(at_us, event);
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Beat { machine, life } if self.lives(machine, life) => self.beat(machine, life),
            Event::Called { follower, owner, call } => self.called(follower, owner, call),
            Event::Arrived { follower, owner, call } => self.arrived(follower, owner, call),
            Event::Checksummed { machine, life, slot, generation } if self.lives(machine, life) => {
                self.tell(machine, Told::Checksummed { slot, generation, elapsed_us: CHECKSUM_US });
            }
            Event::Moved { machine, life, token } if self.lives(machine, life) => self.moved(machine, token),
            Event::Asked { machine, life } if self.lives(machine, life) => self.ask(machine),
            Event::Read { machine, lease } => self.read(machine, lease),
            Event::FetchAsked { fetch } => self.fetch_asked(fetch),
            Event::OfferCame { fetch } => self.offer_came(fetch),
            Event::GivenUp { fetch } => self.given_up(fetch),
            Event::Carried { fetch } => self.carried(fetch),
            Event::LeaseEnds { machine, life, lease } if self.lives(machine, life) => {
                self.lease_ends(machine, lease);
            }
            Event::Filled { request } => self.filled(request),
            Event::Death { machine, silent } => self.death(machine, silent),
            Event::Return { machine } => {
                self.returns += 1;
                self.start(machine);
            }
            Event::Cut { one, other } => self.cut(one, other),
            Event::Still { one, other, us } => {
                self.network.stand_still(one, other, self.clock.now_us() + us);
                self.clock.after(us, Event::MoveAgain { one, other });
            }
            Event::MoveAgain { one, other } => self.move_again(one, other),
            Event::Beat { .. }
            | Event::Checksummed { .. }
            | Event::Moved { .. }
            | Event::Asked { .. }
            | Event::LeaseEnds { .. } => {} // of an earlier life
        }
    }

    fn lives(&self, machine: u16, life: u32) -> bool {
        self.machine(machine).is_some_and(|machine| machine.life == life)
    }

    pub(super) fn machine(&self, machine: u16) -> Option<&Machine> {
        self.machines[usize::from(machine)].as_ref()
    }

    pub(super) fn living(&mut self, machine: u16) -> &mut Machine {
        self.machines[usize::from(machine)].as_mut().expect("nothing is asked of the dead")
    }

    fn start(&mut self, machine: u16) {
        let at = usize::from(machine);
        self.lives[at] += 1;
        let life = self.lives[at];
        self.network.power(machine, true);
        self.machines[at] = Some(Machine::new(machine, life, self.setup.seed, self.clock.now_us()));
        self.open_sessions(machine);
        self.clock.after(self.chance.below(BEAT_US), Event::Beat { machine, life });
        let members = self.addresses.iter().map(|address| (address.clone(), 0)).collect();
        self.hear(machine, follow::Event::Members { members });
        self.ask_later(machine);
    }

    fn death(&mut self, machine: u16, silent: bool) {
        let Some(dead) = self.machines[usize::from(machine)].take() else { return };
        self.requests.died(machine);
        self.fetches_die(machine);
        self.network.power(machine, !silent);
        for other in (0..self.setup.machines).filter(|other| *other != machine) {
            let heard = self.network.cut(other, machine);
            if !silent {
                heard.into_iter().for_each(|call| self.send(other, machine, call, Word::Ended));
                self.network.cut(machine, other);
            }
        }
        self.checks.died(machine, dead.epoch, &self.machines, self.clock.now_us());
    }

    /// Both streams between them end.
    fn cut(&mut self, one: u16, other: u16) {
        for (follower, owner) in [(one, other), (other, one)] {
            if let Some(call) = self.network.cut(follower, owner) {
                self.send(follower, owner, call, Word::Ended);
            }
        }
    }

    fn move_again(&mut self, one: u16, other: u16) {
        let now_us = self.clock.now_us();
        if self.network.still(one, other, now_us) {
            return; // it stands still for longer by now
        }
        for (follower, owner, call, words) in self.network.move_again(one, other) {
            (0..words).for_each(|_| self.clock.after(0, Event::Arrived { follower, owner, call }));
        }
    }

    fn beat(&mut self, machine: u16, life: u32) {
        self.tell(machine, Told::Tick);
        self.publish(machine, publish::Event::Beat, None);
        self.hear(machine, follow::Event::Tick);
        let (now_us, addresses) = (self.clock.now_us(), &self.addresses);
        let follower = &self.machines[usize::from(machine)].as_ref().expect("it lives").follower;
        self.checks.look(machine, follower.index(), addresses, now_us);
        self.clock.after(BEAT_US, Event::Beat { machine, life });
    }

    /// Tells a node, and carries out what it wants.
    pub(super) fn tell(&mut self, machine: u16, event: Told) {
        self.tell_all(machine, VecDeque::from([event]));
    }

    pub(super) fn tell_all(&mut self, at: u16, mut events: VecDeque<Told>) {
        let mut effects = Vec::new();
        while let Some(event) = events.pop_front() {
            let now_us = self.clock.now_us();
            let machine = self.living(at);
            let now_us = now_us - machine.started_us;
            machine.node.apply([event], now_us, &mut effects);
            machine.node.settle(now_us, &mut effects);
            for effect in effects.drain(..) {
                write!(self.clock.digest, "{effect:?}").expect("a digest takes everything");
                self.execute(at, effect, &mut events);
            }
        }
    }

    fn execute(&mut self, at: u16, effect: Effect, next: &mut VecDeque<Told>) {
        let now_us = self.clock.now_us();
        let life = self.living(at).life;
        let memory = &mut self.machines[usize::from(at)].as_mut().expect("it lives").memory;
        match effect {
            Effect::Send { frame, .. } => self.answered(at, frame, next),
            Effect::OpenSegment { tier, segment, .. } => {
                next.push_back(Told::SegmentOpened { tier, segment, result: Ok(()) });
            }
            Effect::Publish { slot, generation, header } => {
                let right = memory.publish(slot, header.id);
                self.checks.wrong_answers += u64::from(!right);
                let event = Event::Checksummed { machine: at, life, slot, generation };
                self.clock.after(CHECKSUM_US, event);
            }
            Effect::Retire { slot, .. } => memory.retire(slot, now_us),
            Effect::Forget { slot } => memory.forget(slot, now_us),
            Effect::Demote { token, from, to, header } => {
                self.start_move(at, token, Move { promotion: false, from, to, id: header.id });
            }
            Effect::Promote { token, from, to, header, .. } => {
                self.start_move(at, token, Move { promotion: true, from, to, id: header.id });
            }
            Effect::Seek { ticket, wanted } => self.seek(at, ticket, wanted, next),
            Effect::Fetch { ticket, orders } => self.ordered(at, ticket, orders),
            Effect::Copies { runs } => self.published(at, publish::Event::Copies { runs }, None, next),
            Effect::Slice { ticket, runs, next: more } => {
                let slice = publish::Event::Slice { follower: ticket, runs, next: more };
                self.published(at, slice, None, next);
            }
            Effect::Accessed(_) => unreachable!("nobody records here"),
            Effect::Verify { slot, .. } => unreachable!("{slot:?} is no earlier daemon's"),
            Effect::Device(_) => unreachable!("nobody has a device here"),
            Effect::Upload { from, .. } => unreachable!("{from:?} is read out for no bucket"),
            Effect::CloseSegment { .. } | Effect::Resize { .. } | Effect::Attach { .. } | Effect::Detach => {
                unreachable!("nobody changes tiers here")
            }
            Effect::Close { .. }
            | Effect::Space { .. }
            | Effect::Fill { .. }
            | Effect::Answer { .. }
            | Effect::Note { .. } => {}
        }
    }

    fn start_move(&mut self, at: u16, token: u64, moving: Move) {
        let us = self.chance.between(MOVE_US.0, MOVE_US.1);
        let machine = self.living(at);
        machine.memory.moves.insert(token, moving);
        let life = machine.life;
        self.clock.after(us, Event::Moved { machine: at, life, token });
    }

    fn moved(&mut self, machine: u16, token: u64) {
        let right = self.living(machine).memory.carry(token);
        self.checks.wrong_answers += u64::from(!right);
        let result = if right { Ok(()) } else { Err(MoveError::Checksum) };
        self.tell(machine, Told::Moved { token, result, elapsed_us: MOVE_US.0 });
    }

    fn publish(&mut self, at: u16, event: publish::Event, joining: Option<Caller>) {
        let mut next = VecDeque::new();
        self.published(at, event, joining, &mut next);
        self.tell_all(at, next);
    }

    /// `joining`: whoever `Joined` is about.
    fn published(
        &mut self,
        at: u16,
        event: publish::Event,
        joining: Option<Caller>,
        next: &mut VecDeque<Told>,
    ) {
        let (network, mut effects) = (&self.network, Vec::new());
        let machine = self.machines[usize::from(at)].as_mut().expect("it lives");
        let followers = &machine.followers;
        let waiting = |follower| {
            followers.get(&follower).and_then(|caller| network.waiting(caller.machine, at, caller.call))
        };
        machine.publisher.apply(event, &waiting, &mut effects);
        for effect in effects {
            match effect {
                publish::Effect::Admit { follower } => {
                    let caller = joining.expect("somebody joined");
                    self.living(at).followers.insert(follower, caller);
                    self.send(caller.machine, at, caller.call, Word::Answered);
                }
                publish::Effect::Refuse { .. } => {
                    let caller = joining.expect("somebody joined");
                    self.send(caller.machine, at, caller.call, Word::Ended);
                }
                publish::Effect::Send { follower, reply } => {
                    let caller = self.living(at).followers[&follower];
                    self.send(caller.machine, at, caller.call, Word::Said(reply));
                }
                publish::Effect::CutOff { follower } => {
                    let caller = self.living(at).followers.remove(&follower).expect("it was admitted");
                    self.network.close(caller.machine, at, caller.call);
                    self.send(caller.machine, at, caller.call, Word::Ended);
                }
                publish::Effect::Tell(on) => next.push_back(Told::Tell(on)),
                publish::Effect::TellSlice { follower, from } => {
                    next.push_back(Told::TellSlice { ticket: follower, from });
                }
            }
        }
    }

    fn send(&mut self, follower: u16, owner: u16, call: u64, word: Word) {
        let now_us = self.clock.now_us();
        let arrival_us = self.network.send((follower, owner, call), word, now_us, &mut self.chance);
        if let Some(at_us) = arrival_us {
            self.clock.at(at_us, Event::Arrived { follower, owner, call });
        }
    }

    fn called(&mut self, follower: u16, owner: u16, call: u64) {
        if self.network.still(follower, owner, self.clock.now_us()) {
            return; // nobody hears it
        }
        if self.machine(owner).is_none() {
            return self.send(follower, owner, call, Word::Ended);
        }
        if self.network.take_up(follower, owner, call) {
            let caller = Caller { machine: follower, call };
            self.publish(owner, publish::Event::Joined, Some(caller));
        }
    }

    fn arrived(&mut self, follower: u16, owner: u16, call: u64) {
        let now_us = self.clock.now_us();
        let Some(word) = self.network.arrived(follower, owner, call, now_us) else { return };
        let Some(machine) = self.machine(follower) else { return };
        if u64::from(machine.life) != call >> 32 {
            return;
        }
        let (address, attempt) = (self.addresses[usize::from(owner)].clone(), call & u64::from(u32::MAX));
        self.words += 1;
        let event = match word {
            Word::Answered => follow::Event::Answered { address, attempt },
            Word::Said(reply) => {
                let said = (reply.node_epoch, reply.sequence, reply.complete, &reply.deltas);
                said.hash(&mut self.clock.digest);
                follow::Event::Said { address, attempt, reply }
            }
            Word::Ended => follow::Event::Ended { address, attempt, trouble: super::ended() },
        };
        self.hear(follower, event);
    }

    fn hear(&mut self, at: u16, event: follow::Event) {
        let now_us = self.clock.now_us();
        let mut effects = Vec::new();
        let machine = self.living(at);
        let life = u64::from(machine.life);
        machine.follower.apply(event, now_us - machine.started_us, &mut effects);
        for effect in effects {
            match effect {
                follow::Effect::Dial { address, attempt } => {
                    let (owner, call) = (number(&address), life << 32 | attempt);
                    self.network.call(at, owner, call);
                    let us = Network::latency_us(&mut self.chance);
                    self.clock.after(us, Event::Called { follower: at, owner, call });
                }
                follow::Effect::HangUp { address, .. } => self.network.hang_up(at, number(&address)),
            }
        }
    }
}

/// Of the machine at an address.
pub(super) fn number(address: &str) -> u16 {
    address[1..].parse().expect("addresses are made of numbers")
}
