//! Which objects of a bucket have had their time: dropped, or what is still read of them packed anew.
//!
//! Owns what was read of which object lately. Invariants: an object younger than its time to live is kept; one of which nothing was read that
//! long is dropped; one of which less than half was read is packed anew from that; the others are kept. Nothing here knows the time: ages are told.
//! Leaves to others: listing, deleting, and that only the node which wrote an object judges it.

use super::name::ObjectName;
use hashbrown::HashMap;

/// Objects whose reads are remembered. At the limit: those of others are not, and look unread.
const OBJECTS_MAX: usize = 1 << 20;

/// What becomes of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It stays as it is.
    Keep,
    /// Nobody misses it.
    Drop,
    /// These of its slots are still read: they go into another object, and this one goes.
    Repack(Vec<u32>),
}

/// A bit a slot.
type Slots = Vec<u64>;

/// Slots that were read in this time to live, and in the one before: so a read counts for at least one.
#[derive(Debug, Default)]
pub struct Reads {
    now: HashMap<ObjectName, Slots>,
    before: HashMap<ObjectName, Slots>,
}

impl Reads {
    /// A slot has been read.
    pub fn read(&mut self, object: ObjectName, slot: u32) {
        if self.now.len() >= OBJECTS_MAX && !self.now.contains_key(&object) {
            return;
        }
        let slots = self.now.entry(object).or_default();
        let at = (slot / 64) as usize;
        if slots.len() <= at {
            slots.resize(at + 1, 0);
        }
        slots[at] |= 1 << (slot % 64);
    }

    /// A time to live has passed.
    pub fn turn(&mut self) {
        self.before = std::mem::take(&mut self.now);
    }

    /// What becomes of an object of so many slots.
    pub fn judge(&self, object: ObjectName, slots: u32, age_ms: u64, ttl_ms: u64) -> Verdict {
        if age_ms < ttl_ms {
            return Verdict::Keep;
        }
        let in_one = |reads: &HashMap<ObjectName, Slots>, slot: u32| {
            let word = reads.get(&object).and_then(|slots| slots.get((slot / 64) as usize));
            word.is_some_and(|word| word >> (slot % 64) & 1 == 1)
        };
        let live: Vec<u32> =
            (0..slots).filter(|slot| in_one(&self.now, *slot) || in_one(&self.before, *slot)).collect();
        match live.len() {
            0 => Verdict::Drop,
            read if read * 2 < slots as usize => Verdict::Repack(live),
            _ => Verdict::Keep,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OBJECT: ObjectName = ObjectName([1; 16]);
    const TTL_MS: u64 = 1000;

    #[test]
    fn what_was_not_read_for_long_goes() {
        let mut reads = Reads::default();
        let old = |reads: &Reads| reads.judge(OBJECT, 200, TTL_MS, TTL_MS);
        assert_eq!(reads.judge(OBJECT, 200, TTL_MS - 1, TTL_MS), Verdict::Keep, "it is young");
        assert_eq!(old(&reads), Verdict::Drop);
        [3, 64, 199].into_iter().for_each(|slot| reads.read(OBJECT, slot));
        assert_eq!(old(&reads), Verdict::Repack(vec![3, 64, 199]));
        reads.turn();
        reads.read(OBJECT, 100);
        assert_eq!(old(&reads), Verdict::Repack(vec![3, 64, 100, 199]), "both count");
        reads.turn();
        assert_eq!(old(&reads), Verdict::Repack(vec![100]));
        reads.turn();
        assert_eq!(old(&reads), Verdict::Drop);
        (0..100).for_each(|slot| reads.read(OBJECT, slot));
        assert_eq!(old(&reads), Verdict::Keep, "half of it is in use");
    }
}
