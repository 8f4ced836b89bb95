//! What the set of members is, after everything that was heard.
//!
//! Owns who is in and who is doubted. Invariants: time is an argument; this node is always in; at most `NODES_MAX` with
//! it, and those who are in stay in when others come; between `Lost` and the next `Listing` nobody goes.
//! Leaves to others: hearing (`etcd`, `fake`), telling (`Seat`).

use super::{Member, Members};
use kvd_proto::limits::NODES_MAX;
use std::collections::{BTreeMap, BTreeSet};

/// What was heard of the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// All there is, the longest in it first, and how many more there are.
    Listing {
        /// Those.
        members: Vec<Member>,
        /// Further ones, that are not among them.
        beyond: u64,
    },
    /// One came, or came back.
    Put(Member),
    /// One went, or its lease ended.
    Delete {
        /// Which.
        name: String,
    },
    /// The registry is not heard any more.
    Lost,
    /// Nothing but time.
    Tick,
}

/// What to do about it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Effects {
    /// There is room for one who was ignored: get the listing again.
    pub list_again: bool,
    /// This node was taken off the list: put it there again.
    pub join_again: bool,
}

/// The set.
#[derive(Debug)]
pub struct Roster {
    me: Member,
    /// What a member has to come back after the registry was away.
    ttl_ms: u64,
    others: BTreeMap<String, Other>,
    arrivals: u64,
    ignored: u64,
    lost: bool,
    grace_ends_ms: u64,
}

#[derive(Debug)]
struct Other {
    member: Member,
    /// Of two with the same address the later one is there.
    arrival: u64,
    /// The registry does not have it any more, which may be the registry's fault: it stays in until then.
    goes_ms: Option<u64>,
}

impl Roster {
    /// This node alone: nobody to be lost yet.
    pub fn new(me: Member, ttl_ms: u64) -> Self {
        let others = BTreeMap::new();
        Self { me, ttl_ms, others, arrivals: 0, ignored: 0, lost: false, grace_ends_ms: 0 }
    }

    /// Takes in what was heard at `now_ms`, on a clock that does not go back.
    pub fn apply(&mut self, event: Event, now_ms: u64) -> Effects {
        let (before, mut effects) = (self.others.len(), Effects::default());
        match event {
            Event::Listing { members, beyond } => self.list(members, beyond, now_ms),
            Event::Put(member) => self.put(member),
            Event::Delete { name } if name == self.me.name => effects.join_again = true,
            Event::Delete { name } => self.delete(&name, now_ms),
            Event::Lost => self.lose(),
            Event::Tick => self.others.retain(|_, other| other.goes_ms.is_none_or(|goes| goes > now_ms)),
        }
        effects.list_again = self.others.len() < before && self.ignored > 0;
        effects
    }

    /// Sorted by address, one member an address: this node before any other, the later arrival before the earlier.
    pub fn members(&self) -> Members {
        let mut members: Vec<(&Member, u64)> =
            self.others.values().map(|other| (&other.member, other.arrival)).collect();
        members.push((&self.me, u64::MAX));
        members
            .sort_by(|(a, a_arrival), (b, b_arrival)| (&a.address, b_arrival).cmp(&(&b.address, a_arrival)));
        members.dedup_by(|(later, _), (kept, _)| later.address == kept.address);
        assert!(members.len() <= NODES_MAX, "the roster is bounded");
        members.into_iter().map(|(member, _)| member.clone()).collect()
    }

    /// How many there were too many, about: exact after a listing.
    pub fn ignored(&self) -> u64 {
        self.ignored
    }

    /// A listing after a loss may be of a registry that forgot members, or let their leases end, while nobody could
    /// reach it: those have one time to live to come back.
    fn list(&mut self, members: Vec<Member>, beyond: u64, now_ms: u64) {
        if std::mem::take(&mut self.lost) {
            self.grace_ends_ms = now_ms.saturating_add(self.ttl_ms);
        }
        let listed: BTreeSet<&String> = members.iter().map(|member| &member.name).collect();
        let gone: Vec<String> = self.others.keys().filter(|name| !listed.contains(name)).cloned().collect();
        gone.iter().for_each(|name| self.delete(name, now_ms));
        // this node is in the registry when it lists, and takes no place of the others'
        self.ignored = if listed.contains(&self.me.name) { beyond } else { beyond.saturating_sub(1) };
        members.into_iter().for_each(|member| self.put(member));
    }

    fn put(&mut self, member: Member) {
        if member.name == self.me.name {
            return;
        }
        let full = self.others.len() + 1 >= NODES_MAX;
        self.arrivals += 1;
        let arrival = self.arrivals;
        match self.others.get_mut(&member.name) {
            Some(other) if other.member == member => other.goes_ms = None,
            None if full => self.ignored += 1,
            _ => {
                self.others.insert(member.name.clone(), Other { member, arrival, goes_ms: None });
            }
        }
    }

    /// While the registry is lost, its next listing decides. In the time after it a leave looks like a lease that ended
    /// while the registry was away, so it is seen up to one time to live later than usually.
    fn delete(&mut self, name: &str, now_ms: u64) {
        if self.lost {
            return;
        }
        if now_ms >= self.grace_ends_ms {
            self.others.remove(name);
        } else if let Some(other) = self.others.get_mut(name) {
            other.goes_ms.get_or_insert(self.grace_ends_ms);
        }
    }

    fn lose(&mut self) {
        self.lost = true;
        self.others.values_mut().for_each(|other| other.goes_ms = None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TTL_MS: u64 = 100;

    fn member(name: &str, epoch: u64) -> Member {
        Member { name: name.to_owned(), address: format!("{name}:7700"), epoch }
    }

    fn listing(names: &[&str]) -> Event {
        Event::Listing { members: names.iter().map(|name| member(name, 1)).collect(), beyond: 0 }
    }

    fn delete(name: &str) -> Event {
        Event::Delete { name: name.to_owned() }
    }

    fn names(roster: &Roster) -> Vec<String> {
        roster.members().iter().map(|member| member.name.clone()).collect()
    }

    /// `me`, which heard `b` and `c`.
    fn settled() -> Roster {
        let mut roster = Roster::new(member("me", 1), TTL_MS);
        roster.apply(listing(&["c", "b", "me"]), 0);
        roster
    }

    #[test]
    fn a_death_is_seen_at_once_when_the_registry_was_there() {
        let mut roster = settled();
        assert_eq!(names(&roster), ["b", "c", "me"]);
        assert_eq!(roster.apply(delete("b"), TTL_MS), Effects::default());
        assert_eq!(names(&roster), ["c", "me"]);
        roster.apply(listing(&["me"]), TTL_MS);
        assert_eq!(names(&roster), ["me"], "a listing without a loss is exact");
    }

    #[test]
    fn a_registry_that_forgot_everybody_changes_nothing_for_those_who_come_back() {
        let mut roster = settled();
        roster.apply(Event::Lost, 1000);
        roster.apply(Event::Tick, 60_000);
        roster.apply(delete("c"), 60_000);
        assert_eq!(names(&roster), ["b", "c", "me"]);
        roster.apply(listing(&[]), 60_000);
        roster.apply(delete("b"), 60_050);
        roster.apply(Event::Put(member("b", 1)), 60_060);
        roster.apply(Event::Tick, 60_099);
        assert_eq!(names(&roster), ["b", "c", "me"]);
        roster.apply(Event::Tick, 60_100);
        assert_eq!(names(&roster), ["b", "me"], "c did not come back");
    }

    #[test]
    fn own_name_stays_and_is_put_again() {
        let mut roster = settled();
        assert!(roster.apply(delete("me"), TTL_MS).join_again);
        roster.apply(Event::Put(Member { address: "x:1".to_owned(), ..member("me", 9) }), TTL_MS);
        assert_eq!(names(&roster), ["b", "c", "me"]);
        assert_eq!(roster.members()[2], member("me", 1));
    }

    #[test]
    fn one_address_is_one_member_the_later_one() {
        let mut roster = settled();
        roster.apply(Event::Put(Member { address: "b:7700".to_owned(), ..member("renamed", 2) }), TTL_MS);
        roster.apply(Event::Put(Member { address: "me:7700".to_owned(), ..member("twin", 2) }), TTL_MS);
        assert_eq!(names(&roster), ["renamed", "c", "me"]);
        roster.apply(delete("renamed"), TTL_MS);
        assert_eq!(names(&roster), ["b", "c", "me"]);
    }

    #[test]
    fn too_many_are_ignored_counted_and_looked_for_when_there_is_room() {
        let mut roster = Roster::new(member("me", 1), 0);
        roster.apply(listing(&[]), 0);
        for at in 0..NODES_MAX as u64 + 6 {
            roster.apply(Event::Put(member(&format!("n{at}"), 1)), 0);
        }
        assert_eq!((roster.members().len(), roster.ignored()), (NODES_MAX, 7));
        assert!(!roster.members().contains(&member("n1023", 1)), "those who were there stay");
        roster.apply(Event::Put(member("n5", 2)), 0);
        assert!(roster.members().contains(&member("n5", 2)), "an epoch is news of one who is in");
        assert!(roster.apply(delete("n3"), 0).list_again);
        assert!(!roster.apply(delete("nobody"), 0).list_again);
    }

    /// What may happen to a registry of five, and to hearing it.
    fn happening() -> impl Strategy<Value = (u8, u8, u64)> {
        (0..6_u8, 0..5_u8, 0..TTL_MS)
    }

    proptest! {
        #[test]
        fn the_set_is_whole_and_comes_to_the_truth(happenings in prop::collection::vec(happening(), 0..60)) {
            let mut roster = Roster::new(member("n0", 1), TTL_MS);
            let mut truth: BTreeMap<String, Member> = BTreeMap::new();
            let (mut heard, mut now_ms, mut epoch) = (false, 0, 1);
            let all = |truth: &BTreeMap<String, Member>|
                Event::Listing { members: truth.values().cloned().collect(), beyond: 0 };
            for (what, who, later_ms) in happenings {
                now_ms += later_ms;
                let name = format!("n{who}");
                let before = names(&roster);
                let event = match what {
                    0 | 1 => {
                        epoch += 1;
                        truth.insert(name.clone(), member(&name, epoch));
                        Event::Put(member(&name, epoch))
                    }
                    2 => { truth.remove(&name); Event::Delete { name } }
                    3 => { heard = false; Event::Lost }
                    4 => { heard = true; all(&truth) }
                    _ => Event::Tick,
                };
                if heard || matches!(event, Event::Lost | Event::Tick) {
                    roster.apply(event.clone(), now_ms);
                    roster.apply(event, now_ms); // twice is as once
                }
                let after = roster.members();
                prop_assert!(after.is_sorted_by(|a, b| a.address < b.address));
                prop_assert!(after.contains(&member("n0", 1)));
                prop_assert!(heard || before == names(&roster), "nobody goes while nothing is heard");
            }
            roster.apply(all(&truth), now_ms);
            roster.apply(Event::Tick, now_ms + TTL_MS);
            truth.insert("n0".to_owned(), member("n0", 1));
            prop_assert_eq!(roster.members().to_vec(), truth.into_values().collect::<Vec<_>>());
        }
    }
}
