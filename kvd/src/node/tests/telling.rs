//! A follower of the node: what it was told adds up to what there is.

use super::super::event::{Effect, Event};
use super::harness::{World, id, ids, layout, with_nvme};
use kvd_proto::{BlockId, Fingerprint};
use kvd_tiers::catalog::{Handle, TIERS};
use std::collections::HashSet;

/// A whole copy, as followers know it.
type Told = (Fingerprint, BlockId, u8, i32);

/// What it was told.
#[derive(Debug, Default)]
pub(super) struct Follower {
    copies: HashSet<Told>,
    next: Option<Handle>,
    following: bool,
}

impl Follower {
    pub(super) fn told(&mut self, effect: Effect) {
        let runs = match effect {
            Effect::Copies { runs } => runs,
            Effect::Slice { runs, next, .. } => {
                self.next = next;
                runs
            }
            other => panic!("{other:?} tells no copies"),
        };
        for run in runs {
            for id in run.ids {
                let copy = (run.fingerprint, id, run.group, run.tier as i32);
                // a slice tells what a change before it may have told: hearing twice is nothing new
                let _ = if run.here { self.copies.insert(copy) } else { self.copies.remove(&copy) };
            }
        }
    }
}

impl World {
    /// Begins to follow, or asks for the next slice, or stops.
    pub(super) fn follow_on(&mut self, stop: bool) {
        match self.follower.next {
            Some(from) => self.apply(Event::TellSlice { ticket: 1, from }),
            None if self.follower.following && stop => {
                self.follower = Follower::default();
                self.apply(Event::Tell(false));
            }
            None if self.follower.following => {}
            None => {
                self.follower.following = true;
                self.apply(Event::Tell(true));
                self.apply(Event::TellSlice { ticket: 1, from: 0 });
            }
        }
    }

    /// After a tick: nothing waits to be told.
    pub(super) fn check_told(&self) {
        if !self.follower.following || self.follower.next.is_some() {
            return assert!(self.follower.following || self.follower.copies.is_empty());
        }
        let mut there = HashSet::new();
        for (_, entry) in self.node.catalog.iter() {
            let key = entry.key();
            let space = self.node.spaces[usize::from(key.space)].fingerprint;
            let whole = TIERS.into_iter().filter(|&tier| entry.readable(tier).is_some());
            if entry.tokens() < 16 {
                continue; // a tail is told to nobody
            }
            there.extend(whole.map(|tier| (space, key.id, key.group, tier as i32)));
        }
        assert_eq!(self.follower.copies, there, "a follower knows something else than there is");
    }
}

#[test]
fn slices_and_changes_between_them_add_up() {
    let mut world = World::new(with_nvme(2));
    let member = world.open("a");
    let space = world.space_of(member, "one", layout());
    world.put(member, space, &ids(1..12));
    world.pass_ms(50);
    world.check_told();
    world.follow_on(false);
    assert!(world.follower.next.is_some(), "more than one slice");
    // a chain that begins before the cursor, while the rest is still to come
    world.put(member, space, &[id(100), id(101)]);
    while world.follower.next.is_some() {
        world.follow_on(false);
    }
    world.pass_ms(50);
    world.check_told();
    assert_eq!(world.follower.copies.len(), 13);
    world.put(member, space, &ids(200..206)); // pushes others down to NVMe
    world.settle();
    world.pass_ms(50);
    world.check_told();
    world.follow_on(true);
    world.put(member, space, &ids(300..303));
    world.pass_ms(50);
    assert!(world.follower.copies.is_empty(), "nobody follows, nothing is told");
}
