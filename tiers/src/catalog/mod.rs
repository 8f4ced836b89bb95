//! What this node holds: the truth in memory, one entry per (space, block, group), found by its key.
//!
//! Owns: entries in a slab addressed by handles, the hash table over them, the tree of parents and children, counts.
//! Invariants: `find` gives an entry exactly while it has a copy; an entry's children count in a tier is the number of
//! entries that name it as their parent and have a copy there, whether it has one itself or not; a parent handle always
//! points at the parent.
//! So that the last holds without a list of children, an entry that loses its last copy while others name it stays as a
//! vacant place (not found, not counted) until the last of them is gone or it is inserted again, when it has its children
//! back. Evicting leaf first never makes one; a purge makes at most one for each ancestor of a surviving block.
//! Not adopted: children that were inserted when their parent was not here at all. They are leaves of nothing: the cost
//! is that the parent, inserted later, may be evicted before them. A match stops at the gap either way.
//! Cost: 96 B an entry and 5 B x 8/7..16/7 of table. Give `with_capacity` the node's blocks: growing a table of millions
//! hashes every entry again within one insert (about 0.1 us each), and a doubling slab moves.
//! Leaves to others: which slots are free (`slots`), what goes first (`eviction`), what lasts (`record`, `store`).

pub mod behind;
pub mod entry;
pub mod rebuild;
pub mod record;
pub mod store;

pub use crate::eviction::Handle;
pub use entry::{Entry, Key, Mark, NewEntry, TIERS};

use crate::segment::SlotRef;
use entry::{NO_HANDLE, at};
use hashbrown::HashTable;
use kvd_proto::BlockId;
use kvd_proto::wire::Tier;

/// Entries of one catalog. At the limit: `insert` asserts; the node evicts before.
pub const ENTRIES_MAX: usize = 1 << 30;

/// All entries of a node.
#[derive(Debug, Default)]
pub struct Catalog {
    entries: Vec<Slab>,
    table: HashTable<Handle>,
    /// Handles to use again. Last in, first out: a chain evicted tail first comes back as ascending handles, which
    /// `find_chain` reads in order.
    spare: Vec<Handle>,
    vacant: usize,
    copies: [usize; 2],
    space_blocks: Vec<u64>,
    /// The newest entry's handle, while it is there: most often the next one's parent.
    newest: Handle,
}

type Slab = Option<Entry>;

impl Catalog {
    /// Room for `entries` before anything grows.
    pub fn with_capacity(entries: usize) -> Self {
        Self {
            entries: Vec::with_capacity(entries),
            table: HashTable::with_capacity(entries),
            ..Self::default()
        }
    }

    /// Room for so many entries more before anything grows.
    pub fn reserve(&mut self, entries: usize) {
        self.entries.reserve(entries);
        let known = &self.entries;
        self.table.reserve(entries, |&handle| hash_of(known, handle));
    }

    /// Fetches the table's cache lines of these keys, many at a time: who then looks for them one by one waits for none. (A million entries
    /// are 2 MB of them, and the next insert waits for the one before.)
    pub fn fetch(&self, keys: impl Iterator<Item = Key>) {
        keys.for_each(|key| _ = std::hint::black_box(self.table.find(hash(&key), |_| false)));
    }

    /// The entry with a copy that has this key.
    pub fn find(&self, key: &Key) -> Option<Handle> {
        self.lookup(key).filter(|&handle| self.get(handle).has_copy())
    }

    /// Appends the entries of a chain's longest prefix that has copies (any tier, whole or not) to `found`.
    ///
    /// A chain inserted together lies together: after two neighbours the next one is tried before the table, which saves
    /// the table's cache misses (256 blocks of a million: 3 us, else 17).
    pub fn find_chain(
        &self,
        space: u16,
        group: u8,
        ids: impl Iterator<Item = BlockId>,
        found: &mut Vec<Handle>,
    ) {
        let (mut next, mut in_order) = (NO_HANDLE, false);
        for id in ids {
            let key = Key { space, group, id };
            let guessed = if in_order { self.at_guess(next, &key) } else { None };
            let Some(handle) = guessed.or_else(|| self.find(&key)) else { return };
            found.push(handle);
            (next, in_order) = (handle + 1, handle == next);
        }
    }

    /// The entry behind a handle that is in use.
    pub fn get(&self, handle: Handle) -> &Entry {
        self.entries[handle as usize].as_ref().unwrap_or_else(|| panic!("handle {handle} is not in use"))
    }

    /// As `get`, where the handle may have come to be unused.
    pub fn try_get(&self, handle: Handle) -> Option<&Entry> {
        self.entries.get(handle as usize)?.as_ref().filter(|entry| entry.has_copy())
    }

    /// As `get`, to change what belongs to the entry alone.
    pub fn get_mut(&mut self, handle: Handle) -> &mut Entry {
        self.entries[handle as usize].as_mut().unwrap_or_else(|| panic!("handle {handle} is not in use"))
    }

    /// A new entry with its first copy, linked to its parent's entry of the same space and group where there is one.
    /// Asserts that `find` does not give it.
    pub fn insert(&mut self, new: &NewEntry, tier: Tier, slot: SlotRef) -> Handle {
        let handle = match self.lookup(&new.key) {
            Some(vacant) => self.revive(vacant, new),
            None => self.create(new),
        };
        *self.space_blocks_mut(new.key.space) += 1;
        self.set_copy(handle, tier, slot);
        handle
    }

    /// Another copy of an entry.
    pub fn set_copy(&mut self, handle: Handle, tier: Tier, slot: SlotRef) {
        let entry = self.get_mut(handle);
        entry.put_copy(tier, slot);
        let parent = entry.parent_handle;
        self.copies[at(tier)] += 1;
        if parent != NO_HANDLE {
            self.get_mut(parent).children[at(tier)] += 1;
        }
    }

    /// A copy is on its way out: its parent need not wait for it, so that a chain leaves as fast as a device takes it and
    /// not block after block.
    pub fn leave(&mut self, handle: Handle, tier: Tier) {
        let entry = self.get_mut(handle);
        entry.mark(tier, Mark::Leaving);
        let parent = entry.parent_handle;
        if parent != NO_HANDLE {
            let children = &mut self.get_mut(parent).children[at(tier)];
            *children = children.checked_sub(1).expect("a child is counted once");
        }
    }

    /// A copy that was on its way out stays after all, or goes now.
    pub fn stay(&mut self, handle: Handle, tier: Tier) {
        let entry = self.get_mut(handle);
        entry.unmark(tier, Mark::Leaving);
        let parent = entry.parent_handle;
        if parent != NO_HANDLE {
            self.get_mut(parent).children[at(tier)] += 1;
        }
    }

    /// A copy is gone. With the last copy goes the entry, its handle with it; asserts that no lease is on it then.
    pub fn clear_copy(&mut self, handle: Handle, tier: Tier) -> SlotRef {
        if self.get(handle).is(tier, Mark::Leaving) {
            self.stay(handle, tier);
        }
        let entry = self.get_mut(handle);
        let slot = entry.take_copy(tier);
        let (parent, space, stays) = (entry.parent_handle, entry.space, entry.has_copy());
        assert!(stays || entry.leases() == 0, "the last copy of a leased block: {entry:?}");
        self.copies[at(tier)] -= 1;
        if parent != NO_HANDLE {
            let children = &mut self.get_mut(parent).children[at(tier)];
            *children = children.checked_sub(1).expect("a child is counted once");
        }
        if !stays {
            *self.space_blocks_mut(space) -= 1;
            self.vacant += 1;
            self.remove_vacant(handle);
        }
        slot
    }

    /// Entries that have this one as their parent and a copy in the tier that is not on its way out.
    pub fn children(&self, handle: Handle, tier: Tier) -> u32 {
        self.get(handle).children[at(tier)]
    }

    /// No child has a copy in the tier: this one's may go before its parent's.
    pub fn is_leaf(&self, handle: Handle, tier: Tier) -> bool {
        self.children(handle, tier) == 0
    }

    /// Entries with a copy.
    pub fn len(&self) -> usize {
        self.table.len() - self.vacant
    }

    /// Whether no entry has a copy.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Entries without a copy, kept for their children.
    pub fn vacant(&self) -> usize {
        self.vacant
    }

    /// Copies in a tier.
    pub fn copies(&self, tier: Tier) -> usize {
        self.copies[at(tier)]
    }

    /// Entries with a copy in a space.
    pub fn space_blocks(&self, space: u16) -> u64 {
        self.space_blocks.get(usize::from(space)).copied().unwrap_or(0)
    }

    /// Entries with a copy, by ascending handle.
    pub fn iter(&self) -> impl Iterator<Item = (Handle, &Entry)> {
        self.iter_from(0)
    }

    /// As `iter`, from a handle on: how work over all entries is done in slices.
    pub fn iter_from(&self, first: Handle) -> impl Iterator<Item = (Handle, &Entry)> {
        let rest = self.entries.get(first as usize..).unwrap_or_default();
        let used = (first..).zip(rest).filter_map(|(handle, slab)| Some((handle, slab.as_ref()?)));
        used.filter(|(_, entry)| entry.has_copy())
    }

    fn at_guess(&self, guess: Handle, key: &Key) -> Option<Handle> {
        let entry = self.entries.get(guess as usize)?.as_ref()?;
        (entry.key() == *key && entry.has_copy()).then_some(guess)
    }

    fn lookup(&self, key: &Key) -> Option<Handle> {
        self.table.find(hash(key), |&handle| self.get(handle).key() == *key).copied()
    }

    fn create(&mut self, new: &NewEntry) -> Handle {
        assert!(self.table.len() < ENTRIES_MAX, "{} entries", self.table.len());
        let parent = self.parent_of(new);
        let handle = self.place(Entry::new(new, parent));
        if parent != NO_HANDLE {
            self.get_mut(parent).links += 1;
        }
        self.newest = handle;
        let entries = &self.entries;
        self.table.insert_unique(hash(&new.key), handle, |&handle| hash_of(entries, handle));
        handle
    }

    /// Chains come in order: the newest entry is tried before the table.
    fn parent_of(&self, new: &NewEntry) -> Handle {
        let key = Key { id: new.parent, ..new.key };
        let newest = self.entries.get(self.newest as usize).and_then(Option::as_ref);
        if newest.is_some_and(|newest| newest.key() == key) {
            return self.newest;
        }
        self.lookup(&key).unwrap_or(NO_HANDLE)
    }

    fn place(&mut self, entry: Entry) -> Handle {
        if let Some(handle) = self.spare.pop() {
            self.entries[handle as usize] = Some(entry);
            return handle;
        }
        self.entries.push(Some(entry));
        (self.entries.len() - 1) as Handle
    }

    /// A vacant entry is whole again, with the children that kept it.
    fn revive(&mut self, handle: Handle, new: &NewEntry) -> Handle {
        let old = self.get_mut(handle);
        assert!(!old.has_copy(), "inserted twice: {old:?}");
        let mut entry = Entry::new(new, old.parent_handle);
        (entry.parent, entry.children, entry.links) = (old.parent, old.children, old.links);
        *old = entry;
        self.vacant -= 1;
        handle
    }

    /// Removes a vacant entry nobody names, then its parent if that was all it was kept for, and so on up. Each step
    /// frees an entry, so the work is paid for by its insert.
    fn remove_vacant(&mut self, mut handle: Handle) {
        while handle != NO_HANDLE {
            let entry = self.get(handle);
            if entry.has_copy() || entry.links > 0 {
                return;
            }
            assert_eq!(entry.children, [0; 2], "children without links: {entry:?}");
            let (key, parent) = (entry.key(), entry.parent_handle);
            self.table.find_entry(hash(&key), |&other| other == handle).expect("in the table").remove();
            self.entries[handle as usize] = None;
            self.spare.push(handle);
            self.vacant -= 1;
            if parent != NO_HANDLE {
                self.get_mut(parent).links -= 1;
            }
            handle = parent;
        }
    }

    fn space_blocks_mut(&mut self, space: u16) -> &mut u64 {
        let space = usize::from(space);
        if self.space_blocks.len() <= space {
            self.space_blocks.resize(space + 1, 0);
        }
        &mut self.space_blocks[space]
    }
}

fn hash_of(entries: &[Slab], handle: Handle) -> u64 {
    hash(&entries[handle as usize].as_ref().expect("a handle in the table is in use").key())
}

/// Block ids are as good as random; space and group are spread over all bits.
fn hash(key: &Key) -> u64 {
    let place = u64::from(key.space) << 8 | u64::from(key.group);
    key.id.to_u64() ^ place.wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Tier::{Dram, Nvme};

    fn id(number: u64) -> BlockId {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        BlockId(bytes)
    }

    fn key(number: u64) -> Key {
        Key { space: 1, group: 0, id: id(number) }
    }

    fn slot(slot: u32) -> SlotRef {
        SlotRef { segment: 3, slot }
    }

    /// Block `number` after block `number - 1`, in DRAM.
    fn add(catalog: &mut Catalog, number: u64) -> Handle {
        let new = NewEntry { key: key(number), parent: id(number - 1), depth: number as u32, tokens: 16 };
        catalog.insert(&new, Dram, slot(number as u32))
    }

    #[test]
    fn an_entry_lives_as_long_as_its_copies() {
        let mut catalog = Catalog::default();
        let handle = add(&mut catalog, 1);
        catalog.set_copy(handle, Nvme, slot(9));
        assert_eq!((catalog.copies(Dram), catalog.copies(Nvme), catalog.space_blocks(1)), (1, 1, 1));
        assert_eq!(catalog.clear_copy(handle, Dram), slot(1));
        assert_eq!(catalog.find(&key(1)), Some(handle));
        assert_eq!(catalog.clear_copy(handle, Nvme), slot(9));
        assert_eq!((catalog.find(&key(1)), catalog.len(), catalog.space_blocks(1)), (None, 0, 0));
    }

    #[test]
    fn space_and_group_are_walls() {
        let mut catalog = Catalog::default();
        let parent = add(&mut catalog, 1);
        for other in [Key { space: 2, ..key(1) }, Key { group: 1, ..key(1) }] {
            assert_eq!(catalog.find(&other), None);
            let child = NewEntry { key: Key { id: id(2), ..other }, parent: id(1), depth: 1, tokens: 16 };
            let child = catalog.insert(&child, Dram, slot(5));
            assert_eq!(catalog.get(child).parent_handle(), None);
        }
        assert!(catalog.is_leaf(parent, Dram));
    }

    #[test]
    fn children_are_counted_by_tier() {
        let mut catalog = Catalog::default();
        let (parent, child) = (add(&mut catalog, 1), add(&mut catalog, 2));
        assert_eq!(catalog.get(child).parent_handle(), Some(parent));
        catalog.set_copy(child, Nvme, slot(7));
        assert_eq!((catalog.children(parent, Dram), catalog.children(parent, Nvme)), (1, 1));
        catalog.clear_copy(child, Dram);
        assert!(catalog.is_leaf(parent, Dram) && !catalog.is_leaf(parent, Nvme));
    }

    #[test]
    fn a_purged_parent_comes_back_with_its_children() {
        let mut catalog = Catalog::default();
        let handles: Vec<_> = (1..=3).map(|number| add(&mut catalog, number)).collect();
        catalog.clear_copy(handles[0], Dram);
        catalog.clear_copy(handles[1], Dram);
        assert_eq!((catalog.find(&key(1)), catalog.find(&key(2))), (None, None));
        assert_eq!((catalog.len(), catalog.vacant(), catalog.iter().count()), (1, 2, 1));
        assert_eq!(add(&mut catalog, 2), handles[1]);
        assert_eq!((catalog.children(handles[1], Dram), catalog.vacant()), (1, 1));
        catalog.clear_copy(handles[1], Dram);
        catalog.clear_copy(handles[2], Dram);
        assert_eq!((catalog.len(), catalog.vacant(), catalog.table.len()), (0, 0, 0));
    }

    #[test]
    fn a_chain_is_found_up_to_its_first_gap() {
        let mut catalog = Catalog::default();
        let handles: Vec<_> = (1..=4).map(|number| add(&mut catalog, number)).collect();
        let find = |catalog: &Catalog| {
            let mut found = Vec::new();
            catalog.find_chain(1, 0, (1..=9).map(id), &mut found);
            found
        };
        assert_eq!(find(&catalog), handles);
        catalog.clear_copy(handles[2], Dram);
        assert_eq!(find(&catalog), handles[..2]);
    }

    #[test]
    fn a_chain_evicted_tail_first_comes_back_in_order() {
        let mut catalog = Catalog::default();
        let handles: Vec<_> = (1..=4).map(|number| add(&mut catalog, number)).collect();
        handles.iter().rev().for_each(|&handle| _ = catalog.clear_copy(handle, Dram));
        assert_eq!((11..=14).map(|number| add(&mut catalog, number)).collect::<Vec<_>>(), handles);
    }

    #[test]
    fn marks_belong_to_a_copy() {
        let mut catalog = Catalog::default();
        let handle = add(&mut catalog, 1);
        catalog.get_mut(handle).mark(Dram, Mark::Filling);
        assert_eq!(catalog.get(handle).readable(Dram), None);
        catalog.set_copy(handle, Nvme, slot(9));
        assert_eq!(catalog.get(handle).readable(Nvme), Some(slot(9)));
        catalog.clear_copy(handle, Dram);
        catalog.set_copy(handle, Dram, slot(2));
        assert!(!catalog.get(handle).is(Dram, Mark::Filling));
    }

    #[test]
    fn broken_promises_stop_the_daemon() {
        let broken: [fn(&mut Catalog, Handle); 6] = [
            |catalog, handle| _ = catalog.clear_copy(handle, Nvme),
            |catalog, handle| catalog.set_copy(handle, Dram, slot(2)),
            |catalog, _| _ = add(catalog, 1),
            |catalog, handle| catalog.get_mut(handle).release(),
            |catalog, handle| catalog.get_mut(handle).mark(Nvme, Mark::Moving),
            |catalog, handle| {
                catalog.get_mut(handle).lease();
                catalog.clear_copy(handle, Dram);
            },
        ];
        for breaks in broken {
            let mut catalog = Catalog::default();
            let handle = add(&mut catalog, 1);
            let result =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| breaks(&mut catalog, handle)));
            assert!(result.is_err());
        }
    }
}
