//! Slots of taken-over memory that engines were given by an earlier daemon and may still be writing.
//!
//! A restarted daemon has the very memory that its engines have mapped, and none of the leases that it gave. What reads there finds out by the
//! slot's generation, as it must anyway; what writes there finds out nothing. So a slot that was to be filled stays in quarantine until every
//! process of the session that it was given to is gone, or has come back and said that it writes no more (law 2).
//! Invariants: nobody waits for such a slot; it is never a block; each is freed once. Leaves to others: who is alive (the shell).

use super::Node;
use super::event::{Effect, MemberId};
use kvd_proto::wire::Tier;
use kvd_tiers::segment::SlotRef;
use kvd_tiers::table::Filler;
use std::collections::BTreeMap;

/// Processes, and the slots that they may write.
#[derive(Default)]
pub(super) struct Orphans {
    members: BTreeMap<MemberId, Orphan>,
    slots: BTreeMap<Filler, Vec<SlotRef>>,
}

struct Orphan {
    filler: Filler,
    client: u64,
}

impl Orphans {
    pub(super) fn add(&mut self, member: MemberId, filler: Filler, client: u64) {
        let double = self.members.insert(member, Orphan { filler, client });
        assert!(double.is_none(), "member {member} is named twice");
    }

    fn may_write(&self, filler: Filler) -> bool {
        self.members.values().any(|orphan| orphan.filler == filler)
    }

    /// `None`: it is no orphan. Otherwise the slots that nobody writes any more, now that it does not.
    fn settle(&mut self, member: MemberId) -> Option<Vec<SlotRef>> {
        let Orphan { filler, .. } = self.members.remove(&member)?;
        if self.may_write(filler) {
            return Some(Vec::new());
        }
        Some(self.slots.remove(&filler).unwrap_or_default())
    }

    fn of_client(&self, client: u64) -> Vec<MemberId> {
        let same = self.members.iter().filter(|(_, orphan)| orphan.client == client);
        same.map(|(member, _)| *member).collect()
    }
}

impl Node {
    pub(super) fn recovered_fill(&mut self, slot: SlotRef, filler: Filler) {
        let Some(pool) = self.memory.pool_of_segment(Tier::Dram, slot.segment) else { return };
        if !self.orphans.may_write(filler) {
            return; // its processes are gone: the slot is as free as any
        }
        let slots = &mut self.memory.pools[pool].slots;
        slots.adopt(slot, 0);
        slots.quarantine(slot);
        self.orphans.slots.entry(filler).or_default().push(slot);
        self.recovered.quarantined_slots += 1;
    }

    /// Whether it was one: nothing of it writes any more.
    pub(super) fn orphan_settled(&mut self, member: MemberId) -> bool {
        let Some(slots) = self.orphans.settle(member) else { return false };
        for slot in slots {
            let pool = self.memory.pool_of_segment(Tier::Dram, slot.segment).expect("a quarantined slot's");
            let pool = &mut self.memory.pools[pool].slots;
            pool.release_quarantine(slot);
            self.out.push(Effect::Retire { slot, generation: pool.generation(slot) });
        }
        self.out.push(Effect::Close { member });
        true
    }

    /// The client of this member has nothing under way that an earlier daemon let it write.
    pub(super) fn client_settled(&mut self, member: MemberId) {
        let Some(client) = self.sessions.client(member) else { return };
        for orphan in self.orphans.of_client(client) {
            assert!(self.orphan_settled(orphan), "it was just found");
        }
    }
}
