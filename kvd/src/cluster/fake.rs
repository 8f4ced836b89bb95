//! A registry in this process, with bad days on demand.
//!
//! Owns what the registry knows and what it does to whom. Without faults it behaves as etcd does. Invariants: nothing is
//! random; who is behind is cut off and hears a listing next; a stalled registry's time stands still, as etcd's leases do
//! until it leads again. Leaves to others: who is in (`roster`).

use super::roster::{Event, Roster};
use super::{Member, Membership, Seat, unheard};
use kvd_proto::{Code, Error};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Events that wait for one node. At the limit: it is cut off and begins anew.
const EVENTS_MAX: usize = 256;
/// Beats in a time to live.
const BEATS: u32 = 4;

/// The registry; every clone is the same one.
#[derive(Clone)]
pub struct Fake {
    registry: Arc<Mutex<Registry>>,
    ttl: Duration,
}

#[derive(Default)]
struct Registry {
    leases: BTreeMap<String, Lease>,
    hearing: BTreeMap<u64, Hearing>,
    last_node: u64,
    stalled: bool,
    duplicated: bool,
    reordered: bool,
    cut: BTreeSet<String>,
}

struct Lease {
    member: Member,
    node: u64,
    ends: Instant,
}

struct Hearing {
    name: String,
    events: mpsc::Sender<Event>,
}

impl Fake {
    /// An empty registry.
    pub fn new(ttl: Duration) -> Self {
        Self { registry: Arc::default(), ttl }
    }

    /// This node becomes a member, in the current runtime.
    pub fn join(&self, me: Member) -> Membership {
        let fake = self.clone();
        let node = {
            let mut registry = self.lock();
            registry.last_node += 1;
            registry.last_node
        };
        Membership::start(&me.clone(), move |seat, leave| async move {
            let roster = Roster::new(me.clone(), fake.ttl.as_millis() as u64);
            let name = me.name.clone();
            let mut life = Life { fake: fake.clone(), me, node, seat, roster, started: Instant::now() };
            tokio::select! {
                _ = leave => {}
                () = life.stay() => {}
            }
            fake.lock().leave(&name, node)
        })
    }

    /// `members` are in it, without being anybody: for as long as no time to live is over.
    pub fn crowd(&self, members: impl IntoIterator<Item = Member>) {
        let mut registry = self.lock();
        let ends = Instant::now() + self.ttl;
        for member in members {
            registry.tell(&Event::Put(member.clone()));
            registry.leases.insert(member.name.clone(), Lease { member, node: 0, ends });
        }
    }

    /// `name` and the registry do not reach each other.
    pub fn cut(&self, name: &str) {
        let mut registry = self.lock();
        registry.cut.insert(name.to_owned());
        registry.hearing.retain(|_, hearing| hearing.name != name);
    }

    /// They do again.
    pub fn heal(&self, name: &str) {
        self.lock().cut.remove(name);
    }

    /// `name`'s lease ends now, although it is there.
    pub fn expire(&self, name: &str) {
        self.lock().remove(name);
    }

    /// Nobody reaches the registry.
    pub fn stall(&self) {
        let mut registry = self.lock();
        registry.stalled = true;
        registry.hearing.clear();
    }

    /// Everybody does again; with nothing in it, if it `forgot`.
    pub fn resume(&self, forgot: bool) {
        let mut registry = self.lock();
        registry.stalled = false;
        let ends = Instant::now() + self.ttl;
        registry.leases.values_mut().for_each(|lease| lease.ends = ends);
        if forgot {
            registry.leases.clear();
        }
    }

    /// Every event is told twice from now on, and listings are told from their end.
    pub fn garble(&self) {
        let mut registry = self.lock();
        (registry.duplicated, registry.reordered) = (true, true);
    }

    fn lock(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registry {
    fn reach(&self, name: &str) -> Result<(), Error> {
        if self.stalled || self.cut.contains(name) {
            return Err(Error::new(
                Code::Unavailable,
                "",
                "the registry is not reached",
                "resume or heal it",
            ));
        }
        Ok(())
    }

    /// `node` says that it lives, and where.
    fn keep(&mut self, me: &Member, node: u64, now: Instant, ttl: Duration) -> Result<(), Error> {
        self.reach(&me.name)?;
        self.expire_until(now);
        let ends = now + ttl;
        match self.leases.get_mut(&me.name) {
            Some(lease) if lease.node == node => lease.ends = ends,
            Some(lease) if lease.member.address != me.address => {
                let message = format!("`{}` is the name of the node at {}", me.name, lease.member.address);
                return Err(Error::invalid("node_name", message, "give each node a name of its own"));
            }
            _ => {
                self.leases.insert(me.name.clone(), Lease { member: me.clone(), node, ends });
                self.tell(&Event::Put(me.clone()));
            }
        }
        Ok(())
    }

    fn hear(&mut self, name: &str, node: u64) -> (Event, mpsc::Receiver<Event>) {
        let (events, heard) = mpsc::channel(EVENTS_MAX);
        self.hearing.insert(node, Hearing { name: name.to_owned(), events });
        let mut members: Vec<Member> = self.leases.values().map(|lease| lease.member.clone()).collect();
        if self.reordered {
            members.reverse();
        }
        (Event::Listing { members, beyond: 0 }, heard)
    }

    fn leave(&mut self, name: &str, node: u64) -> Result<(), Error> {
        self.reach(name).map_err(|error| unheard(&error.message))?;
        if self.leases.get(name).is_some_and(|lease| lease.node == node) {
            self.remove(name);
        }
        Ok(())
    }

    fn expire_until(&mut self, now: Instant) {
        let over = |(name, lease): (&String, &Lease)| (lease.ends <= now).then(|| name.clone());
        let ended: Vec<String> = self.leases.iter().filter_map(over).collect();
        ended.iter().for_each(|name| self.remove(name));
    }

    fn remove(&mut self, name: &str) {
        if self.leases.remove(name).is_some() {
            self.tell(&Event::Delete { name: name.to_owned() });
        }
    }

    fn tell(&mut self, event: &Event) {
        let times = if self.duplicated { 2 } else { 1 };
        self.hearing.retain(|_, hearing| (0..times).all(|_| hearing.events.try_send(event.clone()).is_ok()));
    }
}

/// One node's task.
struct Life {
    fake: Fake,
    me: Member,
    node: u64,
    seat: Seat,
    roster: Roster,
    started: Instant,
}

impl Life {
    async fn stay(&mut self) {
        let mut beat = tokio::time::interval(self.fake.ttl / BEATS);
        let mut heard: Option<mpsc::Receiver<Event>> = None;
        loop {
            let event = tokio::select! {
                _ = beat.tick() => match self.keep() {
                    Ok(()) if heard.is_some() => Event::Tick,
                    Ok(()) => {
                        let (listing, events) = self.fake.lock().hear(&self.me.name, self.node);
                        heard = Some(events);
                        listing
                    }
                    Err(error) => {
                        self.seat.troubled(error);
                        heard = None;
                        Event::Lost
                    }
                },
                event = next(&mut heard) => event,
            };
            if event == Event::Lost {
                heard = None;
            }
            let listed = matches!(event, Event::Listing { .. });
            let effects = self.roster.apply(event, self.started.elapsed().as_millis() as u64);
            self.seat.show(self.roster.members(), self.roster.ignored());
            if listed {
                self.seat.joined();
            }
            if effects.list_again {
                heard = None; // the next beat listens anew
            }
        }
    }

    fn keep(&self) -> Result<(), Error> {
        self.fake.lock().keep(&self.me, self.node, Instant::now(), self.fake.ttl)?;
        self.seat.untroubled();
        Ok(())
    }
}

/// The next event; an end of them is a loss, and who hears nothing waits.
async fn next(heard: &mut Option<mpsc::Receiver<Event>>) -> Event {
    match heard {
        Some(events) => events.recv().await.unwrap_or(Event::Lost),
        None => std::future::pending().await,
    }
}
