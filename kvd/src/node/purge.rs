//! Dropping blocks on a person's word, a slice a call: a node may have millions.
//!
//! Invariant: what is leased, pinned or moving stays and is counted as kept.

use super::Node;
use super::event::{Answer, Effect};
use super::search::Then;
use super::verifying::unverified;
use kvd_proto::wire::{self, Tier, purge_request::What};
use kvd_proto::{BlockId, Error};
use kvd_tiers::catalog::{Handle, Mark};
use std::collections::{HashSet, VecDeque};

/// Entries looked at in one call.
const ENTRIES_PER_CALL_MAX: usize = 4096;
/// Purges waiting, those that a search of as many names later not counted. At the limit: refused.
const PURGES_MAX: usize = 16;

#[derive(Default)]
pub(super) struct Purges {
    queue: VecDeque<Purge>,
}

struct Purge {
    ticket: u64,
    what: Which,
    next: Handle,
    done: wire::PurgeReply,
}

enum Which {
    Everything,
    Space(u16),
    /// Blocks with these ids, and blocks whose parent is one of them. Parents have lower depth, not lower handles, so
    /// passes repeat until one finds nothing new.
    Below {
        ids: HashSet<BlockId>,
        grew: bool,
    },
}

impl Which {
    /// Whether this pass found blocks that the one before did not know.
    fn take_grew(&mut self) -> bool {
        match self {
            Self::Below { grew, .. } => std::mem::take(grew),
            Self::Everything | Self::Space(_) => false,
        }
    }
}

impl Node {
    pub(super) fn start_purge(&mut self, ticket: u64, what: What) {
        match self.purge(ticket, what) {
            Ok(purge) => self.purges.queue.extend(purge),
            Err(error) => self.out.push(Effect::Answer { ticket, answer: Answer::Refused(error) }),
        }
    }

    /// `None`: a search names the blocks first.
    fn purge(&mut self, ticket: u64, what: What) -> Result<Option<Purge>, Error> {
        if self.purges.queue.len() >= PURGES_MAX {
            return Err(Error::limit("purge", format!("{PURGES_MAX} are waiting"), "wait for one to end"));
        }
        let what = match what {
            What::Everything(true) => Which::Everything,
            What::Everything(false) => {
                return Err(Error::invalid("everything", "false", "say what to purge"));
            }
            What::Space(space) if (space as usize) < self.spaces.len() => Which::Space(space as u16),
            What::Space(space) => {
                let message = format!("no space has the number {space}");
                return Err(Error::invalid("space", message, "see `kvctl spaces`"));
            }
            What::IdPrefix(prefix) => {
                self.start_search(ticket, prefix.to_vec(), Then::Purge);
                return Ok(None);
            }
        };
        Ok(Some(Purge { ticket, what, next: 0, done: wire::PurgeReply::default() }))
    }

    /// Of blocks that a search has named, and what is below them.
    pub(super) fn start_purge_below(&mut self, ticket: u64, ids: HashSet<BlockId>) {
        let what = Which::Below { ids, grew: false };
        self.purges.queue.push_back(Purge { ticket, what, next: 0, done: wire::PurgeReply::default() });
    }

    /// The next slice of the oldest purge.
    pub(super) fn purge_some(&mut self) {
        let Some(mut purge) = self.purges.queue.pop_front() else { return };
        let mut next = None;
        let slice: Vec<_> = {
            let mut entries = self.catalog.iter_from(purge.next);
            let slice = entries
                .by_ref()
                .take(ENTRIES_PER_CALL_MAX)
                .map(|(handle, entry)| (handle, entry.key(), entry.parent()));
            let slice = slice.collect();
            next = next.or(entries.next().map(|(handle, _)| handle));
            slice
        };
        for (handle, key, parent) in slice {
            let wanted = match &mut purge.what {
                Which::Everything => true,
                Which::Space(space) => key.space == *space,
                Which::Below { ids, grew } => {
                    let below = ids.contains(&parent) && ids.insert(key.id);
                    *grew |= below;
                    below || ids.contains(&key.id)
                }
            };
            if wanted {
                self.purge_entry(handle, &mut purge.done);
            }
        }
        let again = next.is_none() && purge.what.take_grew();
        match next {
            Some(next) => purge.next = next,
            None if again => (purge.next, purge.done.kept) = (0, 0), // the next pass meets them again
            None => {
                let answer = Answer::Purge(purge.done);
                self.note("purge", || format!("{answer:?}"));
                self.out.push(Effect::Answer { ticket: purge.ticket, answer });
                return;
            }
        }
        self.purges.queue.push_front(purge);
    }

    pub(super) fn purging(&self) -> bool {
        !self.purges.queue.is_empty()
    }

    /// A copy of an earlier daemon that nobody has looked at is in nobody's way.
    fn forget_unverified(&mut self, handle: Handle, done: &mut wire::PurgeReply) {
        if unverified(self.catalog.get(handle)) && !self.movement.brings(handle) {
            let pool = self.pool_of(handle, Tier::Dram);
            self.forget_slot(handle, Tier::Dram, pool);
            done.copies += 1;
        }
    }

    fn purge_entry(&mut self, handle: Handle, done: &mut wire::PurgeReply) {
        self.forget_unverified(handle, done);
        let Some(entry) = self.catalog.try_get(handle) else { return };
        let busy = |tier| entry.is(tier, Mark::Filling) || entry.is(tier, Mark::Moving);
        let pinned = self.pins.contains_key(&handle);
        if entry.leases() > 0 || pinned || busy(Tier::Dram) || busy(Tier::Nvme) {
            done.kept += 1;
            return;
        }
        let tiers = [Tier::Dram, Tier::Nvme].map(|tier| entry.copy(tier).map(|_| tier));
        for tier in tiers.into_iter().flatten() {
            self.drop_copy(handle, tier);
            done.copies += 1;
        }
    }
}
