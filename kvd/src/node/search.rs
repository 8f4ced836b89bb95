//! Finding blocks by the beginning of their ids, a slice a call: a node may have millions, and nothing is ordered by id.
//!
//! Invariants: looking changes nothing; a search names at most `BLOCKS_MAX` blocks, or is refused; what it found may have
//! gone by its end, and is left out then.

use super::Node;
use super::event::{Answer, Effect};
use kvd_proto::Error;
use kvd_tiers::catalog::{Handle, Key};
use std::collections::VecDeque;

/// Entries looked at in one call.
const ENTRIES_PER_CALL_MAX: usize = 4096;
/// Searches waiting. At the limit: refused.
const SEARCHES_MAX: usize = 16;
/// Entries one prefix may name. At the limit: refused, a longer prefix names fewer.
const BLOCKS_MAX: usize = 256;

#[derive(Default)]
pub(super) struct Searches {
    queue: VecDeque<Search>,
}

struct Search {
    ticket: u64,
    id_prefix: Vec<u8>,
    then: Then,
    next: Handle,
    found: Vec<Key>,
}

/// What is done with what is found.
#[derive(Debug, Clone, Copy)]
pub(super) enum Then {
    Describe,
    Pin { ttl_ms: u32 },
    Purge,
}

impl Node {
    pub(super) fn start_search(&mut self, ticket: u64, id_prefix: Vec<u8>, then: Then) {
        if let Err(error) = self.check_search(&id_prefix) {
            return self.out.push(Effect::Answer { ticket, answer: Answer::Refused(error) });
        }
        self.searches.queue.push_back(Search { ticket, id_prefix, then, next: 0, found: Vec::new() });
    }

    fn check_search(&self, id_prefix: &[u8]) -> Result<(), Error> {
        if id_prefix.is_empty() || id_prefix.len() > 16 {
            let message = format!("{} bytes", id_prefix.len());
            return Err(Error::invalid("id_prefix", message, "give 1 to 16 bytes of the block's id"));
        }
        if self.searches.queue.len() >= SEARCHES_MAX {
            return Err(Error::limit(
                "id_prefix",
                format!("{SEARCHES_MAX} are waiting"),
                "wait for one to end",
            ));
        }
        Ok(())
    }

    /// The next slice of the oldest search.
    pub(super) fn search_some(&mut self) {
        let Some(mut search) = self.searches.queue.pop_front() else { return };
        let mut entries = self.catalog.iter_from(search.next);
        let named = |key: &Key| key.id.0.starts_with(&search.id_prefix);
        let slice = entries.by_ref().take(ENTRIES_PER_CALL_MAX).map(|(_, entry)| entry.key());
        search.found.extend(slice.filter(named));
        let next = entries.next().map(|(handle, _)| handle);
        drop(entries);
        if search.found.len() > BLOCKS_MAX {
            let message = format!("more than {BLOCKS_MAX} blocks start so");
            let error = Error::limit("id_prefix", message, "give more of the block's id");
            return self.out.push(Effect::Answer { ticket: search.ticket, answer: Answer::Refused(error) });
        }
        match next {
            Some(next) => {
                search.next = next;
                self.searches.queue.push_front(search);
            }
            None => self.end_search(&search),
        }
    }

    fn end_search(&mut self, search: &Search) {
        let found = search.found.iter().filter_map(|key| self.catalog.find(key)).collect();
        let answer = match search.then {
            Then::Describe => self.describe_blocks(found),
            Then::Pin { ttl_ms } => self.pin_blocks(found, ttl_ms),
            Then::Purge => {
                let ids = search.found.iter().map(|key| key.id).collect();
                return self.start_purge_below(search.ticket, ids);
            }
        };
        self.out.push(Effect::Answer { ticket: search.ticket, answer });
    }

    pub(super) fn searching(&self) -> bool {
        !self.searches.queue.is_empty()
    }
}
