//! The paged KV memory of one engine: blocks in use by requests, and idle ones that may be found again.
//!
//! Invariants: a block in use is never evicted; idle blocks go in the order they became idle, a chain's tail first; the numbers
//! of blocks in use, idle and free add up to the capacity. Leaves to others: when blocks are taken and given back (`engine`).

use kvd_tiers::eviction::{Eviction, Handle, Use, lru::Lru};
use std::collections::HashMap;

/// A block of a prompt; equal names are equal prefixes.
pub(crate) type BlockName = u64;

/// Blocks of one engine.
pub(crate) struct Hbm {
    slots: Vec<Slot>,
    found: HashMap<BlockName, Handle>,
    free: Vec<Handle>,
    idle: Lru,
    used: u32,
}

struct Slot {
    /// `None`: what it holds is never asked for again.
    name: Option<BlockName>,
    users: u32,
}

impl Hbm {
    pub(crate) fn new(blocks: u32) -> Self {
        let slot = || Slot { name: None, users: 0 };
        Self {
            slots: std::iter::repeat_with(slot).take(blocks as usize).collect(),
            found: HashMap::new(),
            free: (0..blocks).rev().collect(),
            idle: Lru::new(),
            used: 0,
        }
    }

    /// Blocks in use by requests.
    pub(crate) fn used(&self) -> u32 {
        self.used
    }

    /// How many blocks of a chain's beginning are here.
    pub(crate) fn prefix(&self, chain: &[BlockName]) -> usize {
        chain.iter().take_while(|name| self.has(**name)).count()
    }

    pub(crate) fn has(&self, name: BlockName) -> bool {
        self.found.contains_key(&name)
    }

    /// A block with this name for one more user, found or made; `None`: every block is in use.
    pub(crate) fn acquire(&mut self, name: Option<BlockName>) -> Option<Handle> {
        if let Some(&handle) = name.and_then(|name| self.found.get(&name)) {
            if self.slots[handle as usize].users == 0 {
                self.idle.remove(handle);
                self.used += 1;
            }
            self.slots[handle as usize].users += 1;
            return Some(handle);
        }
        let handle = self.free.pop().or_else(|| self.evict())?;
        self.used += 1;
        self.slots[handle as usize] = Slot { name, users: 1 };
        if let Some(name) = name {
            self.found.insert(name, handle);
        }
        Some(handle)
    }

    /// One user less for each, the last first.
    pub(crate) fn release(&mut self, handles: Vec<Handle>) {
        for handle in handles.into_iter().rev() {
            let slot = &mut self.slots[handle as usize];
            slot.users = slot.users.checked_sub(1).expect("released once for each acquire");
            self.used -= u32::from(slot.users == 0);
            match (slot.users, slot.name) {
                (0, Some(name)) => self.idle.insert(handle, &Use::unknown(name, 0)),
                (0, None) => self.free.push(handle),
                _ => {}
            }
        }
    }

    fn evict(&mut self) -> Option<Handle> {
        let handle = self.idle.victim(0, 1, &mut |_| true)?;
        self.idle.remove(handle);
        let name = self.slots[handle as usize].name.expect("idle blocks have names");
        self.found.remove(&name);
        Some(handle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_blocks_are_found_again_until_their_room_is_needed_tails_first() {
        let mut hbm = Hbm::new(4);
        let one: Vec<_> = [1, 2, 3].map(|name| hbm.acquire(Some(name)).unwrap()).into();
        let two = vec![hbm.acquire(Some(1)).unwrap(), hbm.acquire(None).unwrap()];
        assert_eq!((hbm.acquire(Some(9)), hbm.used()), (None, 4), "all are in use");
        hbm.release(one);
        assert_eq!(hbm.prefix(&[1, 2, 3, 4]), 3);
        let three = hbm.acquire(Some(9)).unwrap();
        assert_eq!(hbm.prefix(&[1, 2, 3]), 2, "the tail went, the beginning is in use");
        hbm.release(two);
        hbm.release(vec![three]);
        let room: Vec<_> = (0..4).map(|_| hbm.acquire(None).unwrap()).collect();
        assert_eq!(hbm.prefix(&[1]) + hbm.prefix(&[9]), 0);
        hbm.release(room);
        assert_eq!(hbm.used(), 0);
    }
}
