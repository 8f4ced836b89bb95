//! Whether it was right: what was read, what indexes named, and how soon they knew better.
//!
//! Owns the counts. Invariant: the truth comes from memory and from who lives, never from a node's or an index's own word.

use super::machine::{Machine, TTL_MS};
use kvd::index::Index;
use kvd_proto::BlockId;
use kvd_proto::wire::NodeLocation;
use std::collections::BTreeSet;

/// So long after a copy, or its node, is gone it may still be named.
const STALE_US_MAX: u64 = TTL_MS as u64 * 1000 + 2_000_000;

/// A machine that died, and who may still believe that it lives.
struct Death {
    machine: u16,
    epoch: u64,
    at_us: u64,
    unaware: BTreeSet<u16>,
}

/// What was found.
#[derive(Default)]
pub(super) struct Checks {
    ended: Vec<Death>,
    pub(super) deaths: u64,
    /// Blocks read that were not the ones asked for.
    pub(super) wrong_answers: u64,
    /// Blocks that an index named and the owner did not have.
    pub(super) stale_hints: u64,
    /// Blocks named that their node never had.
    pub(super) invented_hints: u64,
    /// Blocks named for too long after they, or their node, were gone.
    pub(super) overdue_hints: u64,
    pub(super) worst_recovery_us: u64,
    pub(super) late_recoveries: u64,
    /// Pairs of living machines, at the end, of which one does not know exactly what the other has.
    pub(super) wrong_indexes: u64,
}

impl Checks {
    /// Nothing that must not be.
    pub(super) fn good(&self) -> bool {
        let broken = [
            self.wrong_answers,
            self.invented_hints,
            self.overdue_hints,
            self.late_recoveries,
            self.wrong_indexes,
        ];
        broken == [0; 5]
    }

    pub(super) fn compare_read(&mut self, contents: &[BlockId], chain: &[BlockId]) {
        self.wrong_answers += contents.iter().zip(chain).filter(|(content, id)| content != id).count() as u64;
    }

    /// Under the epoch that its node has now, a block was there lately; another epoch is a dead node's, and `look` sees to it.
    pub(super) fn hint(
        &mut self,
        owner: Option<&Machine>,
        location: &NodeLocation,
        ids: &[BlockId],
        now_us: u64,
    ) {
        let Some(owner) = owner.filter(|owner| owner.epoch == location.node_epoch) else { return };
        for id in &ids[..location.blocks as usize] {
            match owner.memory.gone_for_us(*id, now_us) {
                None => self.invented_hints += 1,
                Some(gone_us) => self.overdue_hints += u64::from(gone_us > STALE_US_MAX),
            }
        }
    }

    pub(super) fn died(&mut self, machine: u16, epoch: u64, machines: &[Option<Machine>], at_us: u64) {
        self.deaths += 1;
        self.ended.iter_mut().for_each(|death| _ = death.unaware.remove(&machine));
        let living = (0..).zip(machines).filter(|(_, other)| other.is_some());
        let unaware = living.map(|(other, _)| other).collect();
        self.ended.push(Death { machine, epoch, at_us, unaware });
    }

    /// Who does a machine believe to live?
    pub(super) fn look(&mut self, machine: u16, index: &Index, addresses: &[String], now_us: u64) {
        for death in &mut self.ended {
            if !death.unaware.contains(&machine) {
                continue;
            }
            let known = index.node(&addresses[usize::from(death.machine)]).expect("it is of the cluster");
            if known.epoch() == death.epoch && known.blocks() > 0 {
                let late = now_us - death.at_us > STALE_US_MAX;
                self.late_recoveries += u64::from(late);
                if !late {
                    continue;
                }
            }
            death.unaware.remove(&machine);
            self.worst_recovery_us = self.worst_recovery_us.max(now_us - death.at_us);
        }
        self.ended.retain(|death| !death.unaware.is_empty());
    }

    /// At the end: every living machine's index against every machine's memory.
    pub(super) fn compare(&mut self, machines: &[Option<Machine>], addresses: &[String]) {
        for observer in machines.iter().flatten() {
            for (owner, address) in machines.iter().zip(addresses) {
                let known = observer.follower.index().node(address).expect("it is of the cluster");
                let right = match owner {
                    None => known.blocks() == 0,
                    Some(owner) => {
                        known.epoch() == owner.epoch
                            && known.blocks() == owner.memory.blocks()
                            && owner.memory.copies().all(|(id, tier)| known.has(id, 0, tier))
                    }
                };
                self.wrong_indexes += u64::from(!right);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_is_not_the_one_asked_for_is_a_wrong_answer_and_a_shorter_answer_is_none() {
        let id = |number| BlockId([number; 16]);
        let mut checks = Checks::default();
        checks.compare_read(&[id(1), id(2)], &[id(1), id(2), id(3)]);
        assert!(checks.good());
        checks.compare_read(&[id(1), BlockId::default()], &[id(1), id(2), id(3)]);
        assert_eq!((checks.wrong_answers, checks.good()), (1, false));
    }
}
