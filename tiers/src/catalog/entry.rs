//! One entry of the catalog: a (space, block, group) and where its copies are. 96 bytes, what a match reads first.
//!
//! Invariant: what ties entries together (key, copies, children, links) changes only through the `Catalog`; what belongs
//! to the entry alone (leases, pin, uses) changes here, asserted.

use crate::eviction::Handle;
use crate::segment::SlotRef;
use kvd_proto::BlockId;
use kvd_proto::wire::Tier;
use std::num::NonZeroU32;

pub(super) const NO_HANDLE: Handle = u32::MAX;
const NO_SLOT: SlotRef = SlotRef { segment: u32::MAX, slot: u32::MAX };

/// Tiers the catalog knows copies in.
pub const TIERS: [Tier; 2] = [Tier::Dram, Tier::Nvme];

/// What an entry is found by. The space is part of it: a block id that another tenant made up is another key (law 9).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The node's number of the space.
    pub space: u16,
    /// Group of its layout.
    pub group: u8,
    /// The block.
    pub id: BlockId,
}

/// What a copy is besides being there; several may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Mark {
    /// Not whole yet: its parts are being filled, or its bytes are on their way here.
    Filling = 1,
    /// Every part's checksum is known.
    Checksummed = 2,
    /// Its bytes are being read for a copy elsewhere (DRAM to NVMe, NVMe to DRAM).
    Moving = 4,
    /// It goes as soon as it has moved; its parent does not wait for that to be a leaf. Set by `Catalog::leave`.
    Leaving = 8,
}

/// What a new entry is.
#[derive(Debug, Clone, Copy)]
pub struct NewEntry {
    /// What it is found by.
    pub key: Key,
    /// The block before it, or the root.
    pub parent: BlockId,
    /// Blocks before it in its chain.
    pub depth: u32,
    /// Tokens in it.
    pub tokens: u32,
}

/// A (space, block, group) with at least one copy.
#[derive(Debug, Clone)]
#[repr(C)]
pub struct Entry {
    pub(super) id: BlockId,
    pub(super) space: u16,
    pub(super) group: u8,
    /// Four bits of `Mark`s for each tier.
    marks: u8,
    copies: [SlotRef; 2],
    leases: u32,
    pub(super) children: [u32; 2],
    pub(super) parent_handle: Handle,
    /// Entries whose `parent_handle` this is, copies or not.
    pub(super) links: u32,
    depth: u32,
    /// Never zero, so that a vacant place in the slab takes no byte more.
    tokens: NonZeroU32,
    /// Seconds of the caller's clock; 0: not pinned.
    pub pinned_until_s: u32,
    first_use_s: u32,
    last_use_s: u32,
    uses: u16,
    pub(super) parent: BlockId,
}

const _: () = assert!(size_of::<Option<Entry>>() <= 96);

pub(super) fn at(tier: Tier) -> usize {
    TIERS.iter().position(|&known| known == tier).unwrap_or_else(|| panic!("no copies in {tier:?}"))
}

impl Entry {
    pub(super) fn new(new: &NewEntry, parent_handle: Handle) -> Self {
        Self {
            id: new.key.id,
            space: new.key.space,
            group: new.key.group,
            marks: 0,
            copies: [NO_SLOT; 2],
            leases: 0,
            children: [0; 2],
            parent_handle,
            links: 0,
            depth: new.depth,
            tokens: NonZeroU32::new(new.tokens).expect("a block has tokens"),
            pinned_until_s: 0,
            first_use_s: 0,
            last_use_s: 0,
            uses: 0,
            parent: new.parent,
        }
    }

    /// What it is found by.
    pub fn key(&self) -> Key {
        Key { space: self.space, group: self.group, id: self.id }
    }

    /// The block before it, or the root.
    pub fn parent(&self) -> BlockId {
        self.parent
    }

    /// The entry of the block before it, where the catalog knew one when this entry came.
    pub fn parent_handle(&self) -> Option<Handle> {
        (self.parent_handle != NO_HANDLE).then_some(self.parent_handle)
    }

    /// Blocks before it in its chain.
    pub fn depth(&self) -> u32 {
        self.depth
    }

    /// Tokens in it.
    pub fn tokens(&self) -> u32 {
        self.tokens.get()
    }

    /// Where its copy in a tier is.
    pub fn copy(&self, tier: Tier) -> Option<SlotRef> {
        let slot = self.copies[at(tier)];
        (slot != NO_SLOT).then_some(slot)
    }

    /// Whether it has a copy anywhere; every entry that `find` gives has.
    pub fn has_copy(&self) -> bool {
        self.copies != [NO_SLOT; 2]
    }

    /// Whether its copy in a tier has a mark.
    pub fn is(&self, tier: Tier, mark: Mark) -> bool {
        self.marks & bit(tier, mark) != 0
    }

    /// A copy that may be read: there, and whole.
    pub fn readable(&self, tier: Tier) -> Option<SlotRef> {
        self.copy(tier).filter(|_| !self.is(tier, Mark::Filling))
    }

    /// Puts a mark on a copy that does not have it.
    pub fn mark(&mut self, tier: Tier, mark: Mark) {
        assert!(self.copy(tier).is_some() && !self.is(tier, mark), "{mark:?} on {tier:?} of {self:?}");
        self.marks |= bit(tier, mark);
    }

    /// Takes a mark off a copy that has it.
    pub fn unmark(&mut self, tier: Tier, mark: Mark) {
        assert!(self.is(tier, mark), "no {mark:?} on {tier:?} of {self:?}");
        self.marks &= !bit(tier, mark);
    }

    /// Leases that hold it.
    pub fn leases(&self) -> u32 {
        self.leases
    }

    /// One more lease.
    pub fn lease(&mut self) {
        assert!(self.has_copy(), "a lease on nothing: {self:?}");
        self.leases = self.leases.checked_add(1).expect("leases are limited far below 2^32");
    }

    /// One lease less.
    pub fn release(&mut self) {
        self.leases = self.leases.checked_sub(1).expect("a lease that was never given");
    }

    /// A request used it; `now_s` never goes back.
    pub fn touch(&mut self, now_s: u32) {
        if self.uses == 0 {
            self.first_use_s = now_s;
        }
        self.last_use_s = self.last_use_s.max(now_s);
        self.uses = self.uses.saturating_add(1);
    }

    /// When a request first used it (a put is a use); 0: none has.
    pub fn first_use_s(&self) -> u32 {
        self.first_use_s
    }

    /// When a request last used it; 0: none has.
    pub fn last_use_s(&self) -> u32 {
        self.last_use_s
    }

    /// Requests that used it, up to 65,535.
    pub fn uses(&self) -> u16 {
        self.uses
    }

    pub(super) fn put_copy(&mut self, tier: Tier, slot: SlotRef) {
        assert!(
            self.copy(tier).is_none() && slot != NO_SLOT,
            "a second copy in {tier:?}: {slot:?}, {self:?}"
        );
        self.copies[at(tier)] = slot;
    }

    pub(super) fn take_copy(&mut self, tier: Tier) -> SlotRef {
        let slot = self.copy(tier).unwrap_or_else(|| panic!("no copy in {tier:?}: {self:?}"));
        self.copies[at(tier)] = NO_SLOT;
        self.marks &= !(0xF << (4 * at(tier)));
        slot
    }
}

fn bit(tier: Tier, mark: Mark) -> u8 {
    (mark as u8) << (4 * at(tier))
}
