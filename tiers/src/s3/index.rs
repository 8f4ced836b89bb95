//! What the bucket holds, as far as manifests told: from a block to an object and a slot.
//!
//! Owns: which object is known by which number, and what of it can be found. A block takes 8 bytes of key with its object and 9
//! in a table, at a load of 44 to 88 %: some 22 bytes.
//! Invariants: it is a hint (law 5), with 64 bits of an id; but an object is only ever found under a space that it lists, so
//! never by another tenant (law 9). At most `blocks_max` blocks; a manifest takes time by its own length and by
//! what it drops, one that replaces others by the number of objects too.
//! Leaves to others: fetching manifests and objects, and telling when an object is gone.

use super::manifest::{Added, Entry, Manifest, Record};
use super::name::ObjectName;
use hashbrown::{HashMap, HashTable};
use kvd_proto::limits::NODES_MAX;
use kvd_proto::{BlockId, Error, Fingerprint};
use std::collections::VecDeque;

/// Tables, by key: one that grows moves a share of the blocks, not all of them in one call.
const SHARDS: usize = 64;

/// Names an object within one index; never used twice.
pub type ObjectNumber = u32;

/// An object that the index knows.
#[derive(Debug, Clone)]
pub struct Known {
    /// Its name.
    pub object: ObjectName,
    /// Whose blocks.
    pub tenant: String,
    /// Bytes of a slot.
    pub slot_bytes: u32,
    /// Parts of a slot.
    pub parts: u16,
    /// Length of its footer.
    pub footer_bytes: u32,
    /// Which spaces its blocks are in.
    fingerprints: Vec<Fingerprint>,
    /// The key of each slot.
    keys: Box<[u64]>,
    /// What stands before the blocks that begin a chain, `None` for the others: from this slot on, up to the next.
    roots: Vec<(u32, Option<BlockId>)>,
    /// Who says that it is there: the node, and its word's write epoch and sequence.
    claims: Vec<(u16, u64, u32)>,
}

impl Known {
    /// How many slots it has.
    pub fn slots(&self) -> u32 {
        self.keys.len() as u32
    }

    /// What stands before the block of this slot, if it is the first of its chain.
    pub fn root(&self, slot: u32) -> Option<BlockId> {
        let after = self.roots.partition_point(|(first, _)| *first <= slot);
        self.roots[after - 1].1
    }
}

/// A block's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The object.
    pub object: ObjectNumber,
    /// Its slot.
    pub slot: u32,
}

/// What an index holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Held {
    /// Objects.
    pub objects: u64,
    /// Blocks, counted as often as they are held.
    pub blocks: u64,
    /// Payload bytes.
    pub bytes: u64,
    /// Objects that were not, or no longer, indexed because of `blocks_max`, since the start.
    pub objects_dropped: u64,
}

/// Where blocks are in a bucket.
#[derive(Debug)]
pub struct S3Index {
    blocks_max: u64,
    shards: Vec<HashTable<Place>>,
    /// By number less `first`; `None`: gone.
    objects: VecDeque<Option<Known>>,
    first: ObjectNumber,
    names: HashMap<(String, ObjectName), ObjectNumber>,
    nodes: Vec<String>,
    held: Held,
}

impl S3Index {
    /// Empty; at the limit the objects known longest are forgotten.
    pub fn new(blocks_max: u64) -> Self {
        Self {
            blocks_max,
            shards: (0..SHARDS).map(|_| HashTable::new()).collect(),
            objects: VecDeque::new(),
            first: 0,
            names: HashMap::new(),
            nodes: Vec::new(),
            held: Held::default(),
        }
    }

    /// Takes in what a node says. Of one node, manifests come in order; one that comes again changes nothing.
    /// An error: more nodes than a cluster may have wrote manifests.
    pub fn apply(&mut self, manifest: Manifest) -> Result<(), Error> {
        let node = self.node(&manifest.key.node)?;
        let at = (manifest.key.write_epoch, manifest.key.sequence);
        for entry in manifest.entries {
            match entry {
                Entry::Added(added) => self.add(&manifest.key.tenant, added, (node, at.0, at.1)),
                Entry::Removed(object) => self.disclaim(&manifest.key.tenant, object, node),
            }
        }
        if manifest.replaces_before != (0, 0) {
            self.replace(&manifest.key.tenant, node, manifest.replaces_before);
        }
        Ok(())
    }

    fn node(&mut self, name: &str) -> Result<u16, Error> {
        if let Some(known) = self.nodes.iter().position(|known| known == name) {
            return Ok(known as u16);
        }
        if self.nodes.len() == NODES_MAX {
            return Err(Error::limit(
                "manifests",
                format!("{name} is one node more than {NODES_MAX}"),
                "delete the manifests of nodes that no longer exist",
            ));
        }
        self.nodes.push(name.to_owned());
        Ok(self.nodes.len() as u16 - 1)
    }

    fn add(&mut self, tenant: &str, added: Added, claim: (u16, u64, u32)) {
        let name = (tenant.to_owned(), added.object);
        if let Some(&number) = self.names.get(&name) {
            let claims = &mut self.get_mut(number).claims;
            claims.retain(|(node, ..)| *node != claim.0);
            claims.push(claim);
            return;
        }
        let blocks = added.records.len() as u64;
        if blocks > self.blocks_max {
            self.held.objects_dropped += 1;
            return;
        }
        while self.held.blocks + blocks > self.blocks_max {
            self.forget(self.first);
            self.held.objects_dropped += 1;
        }
        let number = self.first + self.objects.len() as u32;
        let key = |record: &Record| {
            key_of(&added.fingerprints[usize::from(record.space)], record.group, &record.id)
        };
        let keys: Box<[u64]> = added.records.iter().map(key).collect();
        self.held.objects += 1;
        self.held.blocks += blocks;
        self.held.bytes += added.footer_offset();
        self.names.insert(name, number);
        self.objects.push_back(Some(Known {
            object: added.object,
            tenant: tenant.to_owned(),
            slot_bytes: added.slot_bytes,
            parts: added.parts,
            footer_bytes: added.footer_bytes,
            fingerprints: added.fingerprints,
            keys,
            roots: roots_of(&added.records),
            claims: vec![claim],
        }));
        self.insert_slots(number);
    }

    fn insert_slots(&mut self, number: ObjectNumber) {
        let (objects, first) = (&self.objects, self.first);
        let key_at = |place: &Place| known(objects, first, place.object).keys[place.slot as usize];
        for slot in 0..known(objects, first, number).keys.len() as u32 {
            let place = Place { object: number, slot };
            let key = key_at(&place);
            self.shards[shard_of(key)].insert_unique(key, place, key_at);
        }
    }

    /// A node no longer says that an object is there; when nobody does, it is forgotten.
    fn disclaim(&mut self, tenant: &str, object: ObjectName, node: u16) {
        let Some(&number) = self.names.get(&(tenant.to_owned(), object)) else { return };
        let claims = &mut self.get_mut(number).claims;
        claims.retain(|(claimed, ..)| *claimed != node);
        if claims.is_empty() {
            self.forget(number);
        }
    }

    /// What a node said before a point, and did not say again, it takes back.
    fn replace(&mut self, tenant: &str, node: u16, before: (u64, u32)) {
        let old = |known: &Known| {
            known.tenant == tenant
                && known.claims.iter().any(|&(of, epoch, at)| of == node && (epoch, at) < before)
        };
        let old: Vec<ObjectName> =
            self.objects.iter().flatten().filter(|known| old(known)).map(|known| known.object).collect();
        old.into_iter().for_each(|object| self.disclaim(tenant, object, node));
    }

    /// Forgets an object that was found gone, or whose bytes are not what its name says; whether it was known.
    pub fn remove_object(&mut self, tenant: &str, object: ObjectName) -> bool {
        let number = self.names.get(&(tenant.to_owned(), object)).copied();
        number.inspect(|&number| self.forget(number)).is_some()
    }

    fn forget(&mut self, number: ObjectNumber) {
        let (objects, first) = (&self.objects, self.first);
        for (slot, &key) in known(objects, first, number).keys.iter().enumerate() {
            let place = Place { object: number, slot: slot as u32 };
            let entry = self.shards[shard_of(key)].find_entry(key, |found| *found == place);
            entry.expect("every slot is in its table").remove();
        }
        let gone = self.objects[(number - first) as usize].take().expect("found above");
        self.names.remove(&(gone.tenant, gone.object));
        self.held.objects -= 1;
        self.held.blocks -= gone.keys.len() as u64;
        self.held.bytes -= u64::from(gone.slot_bytes) * gone.keys.len() as u64;
        while self.objects.front().is_some_and(Option::is_none) {
            self.objects.pop_front();
            self.first += 1;
        }
    }

    /// Where the blocks of a chain are, from `from` on, up to the first that is nowhere. Of several places it takes the one
    /// after the last, so that a chain is read in as few pieces as it was written in.
    pub fn find(&self, fingerprint: &Fingerprint, group: u16, chain: &[BlockId], from: usize) -> Vec<Place> {
        let mut run: Vec<Place> = Vec::new();
        for id in chain.iter().skip(from) {
            let key = key_of(fingerprint, group, id);
            let next = run.last().map(|last| Place { object: last.object, slot: last.slot + 1 });
            let here = |place: &Place| {
                let known = known(&self.objects, self.first, place.object);
                known.keys[place.slot as usize] == key && known.fingerprints.contains(fingerprint)
            };
            let after =
                next.filter(|next| (next.slot as usize) < self.object(next.object).keys.len() && here(next));
            let Some(place) = after.or_else(|| self.shards[shard_of(key)].find(key, here).copied()) else {
                break;
            };
            run.push(place);
        }
        run
    }

    /// An object that `find` named.
    pub fn object(&self, number: ObjectNumber) -> &Known {
        known(&self.objects, self.first, number)
    }

    /// The object of this name.
    pub fn named(&self, tenant: &str, object: ObjectName) -> Option<&Known> {
        self.names.get(&(tenant.to_owned(), object)).map(|number| self.object(*number))
    }

    /// Whether the node's manifests say that the object is there.
    pub fn says(&self, node: &str, known: &Known) -> bool {
        let number = self.nodes.iter().position(|known| known == node);
        known.claims.iter().any(|(claimed, ..)| Some(usize::from(*claimed)) == number)
    }

    /// The object that became known last.
    pub fn newest(&self) -> Option<&Known> {
        self.objects.iter().rev().flatten().next()
    }

    /// What is held.
    pub fn held(&self) -> Held {
        self.held
    }

    fn get_mut(&mut self, number: ObjectNumber) -> &mut Known {
        self.objects[(number - self.first) as usize].as_mut().expect("names only name what is known")
    }
}

/// What stands before blocks that begin a chain, where that changes.
fn roots_of(records: &[Record]) -> Vec<(u32, Option<BlockId>)> {
    let root = |record: &Record| (record.depth == 0).then_some(record.parent);
    let mut roots: Vec<_> = (0..).zip(records.iter().map(root)).collect();
    roots.dedup_by_key(|(_, root)| *root);
    roots.shrink_to_fit();
    roots
}

fn known(objects: &VecDeque<Option<Known>>, first: ObjectNumber, number: ObjectNumber) -> &Known {
    objects[(number - first) as usize].as_ref().expect("the table only names what is known")
}

/// By bits that a table of less than 2^40 places uses for nothing: neither for the place nor for the tag.
fn shard_of(key: u64) -> usize {
    (key >> 40) as usize % SHARDS
}

/// 64 bits of the id, apart for each group and space: they are uniform already, so they are their own hash.
fn key_of(fingerprint: &Fingerprint, group: u16, id: &BlockId) -> u64 {
    let eight = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    eight(&id.0) ^ eight(&fingerprint.0) ^ u64::from(group).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

#[cfg(test)]
mod tests {
    use super::super::name::ManifestKey;
    use super::*;

    const SPACE: Fingerprint = Fingerprint([7; 32]);

    fn id(number: u8) -> BlockId {
        BlockId([number; 16])
    }

    /// An object of blocks `ids` in the group 0 of `SPACE`.
    fn added(object: u8, ids: impl IntoIterator<Item = u8>) -> Entry {
        let record =
            |number| Record { id: id(number), parent: id(0), depth: 0, tokens: 16, space: 0, group: 0 };
        Entry::Added(Added {
            object: ObjectName([object; 16]),
            slot_bytes: 4096,
            parts: 1,
            footer_bytes: 600,
            fingerprints: vec![SPACE],
            records: ids.into_iter().map(record).collect(),
        })
    }

    fn removed(object: u8) -> Entry {
        Entry::Removed(ObjectName([object; 16]))
    }

    fn said(node: &str, sequence: u32, entries: Vec<Entry>) -> Manifest {
        let key = ManifestKey { tenant: "t".into(), node: node.into(), write_epoch: 1, sequence };
        Manifest { key, replaces_before: (0, 0), entries }
    }

    fn found(index: &S3Index, ids: &[u8]) -> Vec<(u8, u32)> {
        let chain: Vec<BlockId> = ids.iter().copied().map(id).collect();
        let run = index.find(&SPACE, 0, &chain, 0);
        run.iter().map(|place| (index.object(place.object).object.0[0], place.slot)).collect()
    }

    #[test]
    fn a_chain_is_found_up_to_the_first_block_that_is_nowhere() {
        let mut index = S3Index::new(100);
        index.apply(said("a", 0, vec![added(1, [1, 2]), added(2, [3, 5])])).unwrap();
        assert_eq!(found(&index, &[1, 2, 3, 4, 5]), [(1, 0), (1, 1), (2, 0)]);
        let chain = [id(9), id(2), id(3)];
        assert_eq!(index.find(&SPACE, 0, &chain, 1).len(), 2, "from a depth on");
        assert!(index.find(&SPACE, 1, &chain, 1).is_empty(), "another group");
        assert!(index.find(&Fingerprint([8; 32]), 0, &chain, 1).is_empty(), "another space");
        assert_eq!(index.held(), Held { objects: 2, blocks: 4, bytes: 4 * 4096, objects_dropped: 0 });
    }

    /// Law 9: knowing another tenant's block id and fingerprint, one could make an id with the same key.
    #[test]
    fn a_forged_key_finds_nothing_under_a_space_that_the_object_does_not_list() {
        let mut index = S3Index::new(100);
        index.apply(said("a", 0, vec![added(1, [1])])).unwrap();
        let other = Fingerprint([9; 32]);
        let forged = BlockId(std::array::from_fn(|_| 1 ^ 7 ^ 9));
        assert_eq!(key_of(&other, 0, &forged), key_of(&SPACE, 0, &id(1)));
        assert!(index.find(&other, 0, &[forged], 0).is_empty());
    }

    #[test]
    fn what_stands_before_a_chain_is_known_of_each() {
        let first =
            |root, depth| Record { id: id(root), parent: id(root), depth, tokens: 16, space: 0, group: 0 };
        let records =
            [first(9, 1), first(1, 0), first(1, 1), first(1, 0), first(1, 0), first(2, 0), first(3, 7)];
        let Entry::Added(mut object) = added(1, []) else { unreachable!() };
        object.records = records.to_vec();
        let mut index = S3Index::new(100);
        index.apply(said("a", 0, vec![Entry::Added(object)])).unwrap();
        let known = index.object(0);
        let roots: Vec<_> = (0..7).map(|slot| known.root(slot).map(|root| root.0[0])).collect();
        assert_eq!(roots, [None, Some(1), None, Some(1), Some(1), Some(2), None]);
        assert_eq!(known.roots.len(), 6);
    }

    #[test]
    fn what_lies_together_is_found_together() {
        let mut index = S3Index::new(100);
        index.apply(said("a", 0, vec![added(1, [1]), added(2, [2]), added(3, [1, 2, 3])])).unwrap();
        let places = found(&index, &[1, 2, 3]);
        assert_eq!(places.len(), 3);
        assert_eq!(found(&index, &[3]), [(3, 2)]);
        index.remove_object("t", ObjectName([1; 16]));
        index.remove_object("t", ObjectName([2; 16]));
        assert_eq!(found(&index, &[1, 2, 3]), [(3, 0), (3, 1), (3, 2)], "the other copies stay");
    }

    #[test]
    fn an_object_stays_as_long_as_one_node_says_so() {
        let mut index = S3Index::new(100);
        index.apply(said("a", 0, vec![added(1, [1])])).unwrap();
        index.apply(said("b", 0, vec![added(1, [1])])).unwrap();
        index.apply(said("a", 1, vec![removed(1)])).unwrap();
        assert_eq!(index.held().objects, 1);
        index.apply(said("b", 1, vec![removed(1), removed(2)])).unwrap();
        assert_eq!(index.held(), Held::default());
        assert!(found(&index, &[1]).is_empty() && !index.remove_object("t", ObjectName([1; 16])));
        index.apply(said("b", 2, vec![added(3, [1])])).unwrap();
        let known = index.named("t", ObjectName([3; 16])).unwrap();
        assert_eq!(["a", "b", "c"].map(|node| index.says(node, known)), [false, true, false]);
        assert!(index.named("u", ObjectName([3; 16])).is_none());
    }

    #[test]
    fn what_was_replaced_and_not_said_again_is_forgotten() {
        let mut index = S3Index::new(100);
        index.apply(said("a", 0, vec![added(1, [1]), added(2, [2])])).unwrap();
        index.apply(said("b", 0, vec![added(3, [3])])).unwrap();
        index.apply(said("a", 1, vec![added(2, [2])])).unwrap();
        index.apply(Manifest { replaces_before: (1, 1), ..said("a", 2, vec![added(4, [4])]) }).unwrap();
        assert!(found(&index, &[1]).is_empty());
        assert!([2, 3, 4].iter().all(|number| found(&index, &[*number]).len() == 1));
    }

    #[test]
    fn at_the_limit_the_objects_known_longest_go() {
        let mut index = S3Index::new(4);
        index.apply(said("a", 0, vec![added(1, [1, 2]), added(2, [3, 4]), added(3, [5])])).unwrap();
        assert!(found(&index, &[1]).is_empty());
        assert_eq!((found(&index, &[3, 4]).len(), found(&index, &[5]).len()), (2, 1));
        assert_eq!(index.held(), Held { objects: 2, blocks: 3, bytes: 3 * 4096, objects_dropped: 1 });
        index.apply(said("a", 1, vec![added(4, 10..20)])).unwrap();
        assert_eq!(index.held().objects_dropped, 2, "what never fits drops nothing else");
        assert_eq!(index.held().blocks, 3);
    }

    #[test]
    fn more_nodes_than_a_cluster_may_have_are_refused() {
        let mut index = S3Index::new(4);
        for node in 0..NODES_MAX {
            index.apply(said(&format!("n{node}"), 0, Vec::new())).unwrap();
        }
        assert!(index.apply(said("one more", 0, Vec::new())).is_err());
        assert!(index.apply(said("n5", 1, Vec::new())).is_ok());
    }

    /// A long life: what is found is always what a plain map of the same story has.
    #[test]
    fn agrees_with_a_plain_map_over_a_long_story() {
        let mut index = S3Index::new(u64::MAX);
        let mut truth: std::collections::BTreeMap<u8, Vec<u8>> = std::collections::BTreeMap::new();
        let mut seed = 1_u32;
        for sequence in 0..2000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let (object, block) = ((seed >> 24) as u8, (seed >> 16) as u8);
            let entry = if truth.remove(&object).is_some() {
                removed(object)
            } else {
                truth.insert(object, vec![block, block.wrapping_add(1)]);
                added(object, [block, block.wrapping_add(1)])
            };
            index.apply(said("a", sequence, vec![entry])).unwrap();
            let has = truth.values().any(|blocks| blocks.contains(&block));
            assert_eq!(!found(&index, &[block]).is_empty(), has, "after {sequence}");
        }
        assert_eq!(index.held().objects, truth.len() as u64);
        assert!(index.objects.len() <= 2001 && index.held().blocks == 2 * truth.len() as u64);
    }
}
