//! What goes into which object: blocks that are read together lie together.
//!
//! Owns: the open packs and what they hold. A block whose parent was the last one of an open pack's chain follows it; a new
//! chain begins a pack of its own while few are open, and then goes where there is most room.
//! Invariants: an object holds one tenant's blocks of one slot size and part count; no block lies in two open packs; all open
//! packs together hold at most `pack_bytes_max`; equal blocks in equal order make equal objects (nothing of this node is in them).
//! Time is an argument.
//! Leaves to others: which blocks, checksums (made before), and the bucket.

use super::footer::{Definition, Footer, OBJECT_BYTES_MAX, OBJECT_SLOTS_MAX, OBJECT_SPACES_MAX, end_of};
use super::manifest::{Added, Record};
use super::name::ObjectName;
use bytes::Bytes;
use hashbrown::{HashMap, HashSet};
use kvd_proto::slot_header::{FLAG_CHECKSUMMED, FLAG_TAIL, SlotHeader};
use kvd_proto::{BlockId, Fingerprint};

/// Packs open at one time for each tenant, slot size and part count. At the limit: a new chain joins the emptiest.
const OPEN_PACKS_MAX: usize = 4;

/// How large packs become.
#[derive(Debug, Clone, Copy)]
pub struct PackLimits {
    /// Payload bytes at which a pack is closed.
    pub object_bytes: u64,
    /// Payload bytes in all open packs. At the limit: the fullest is closed.
    pub pack_bytes_max: u64,
}

impl Default for PackLimits {
    fn default() -> Self {
        Self { object_bytes: 32 << 20, pack_bytes_max: 256 << 20 }
    }
}

/// A block to be packed.
#[derive(Debug, Clone)]
pub struct Block {
    /// With every part's checksum.
    pub header: SlotHeader,
    /// What its space is.
    pub definition: Definition,
    /// The whole slot.
    pub payload: Bytes,
}

/// An object ready to be written.
#[derive(Debug, Clone)]
pub struct Sealed {
    /// Whose blocks.
    pub tenant: String,
    /// Its bytes, piece after piece.
    pub pieces: Vec<Bytes>,
    /// What a manifest says of it, its name with it.
    pub added: Added,
}

type Class = (String, u32, u16);
type BlockKey = (Fingerprint, u16, BlockId);

#[derive(Debug)]
struct Pack {
    class: Class,
    opened_ms: u64,
    spaces: Vec<Definition>,
    slots: Vec<SlotHeader>,
    payloads: Vec<Bytes>,
    /// The last block of each chain in it.
    ends: HashSet<BlockKey>,
}

/// Blocks on their way into objects.
#[derive(Debug)]
pub struct Packer {
    limits: PackLimits,
    packs: Vec<Pack>,
    held: HashSet<BlockKey>,
    bytes: u64,
}

impl Packer {
    /// Empty.
    pub fn new(limits: PackLimits) -> Self {
        let object_bytes = limits.object_bytes;
        assert!(
            (1..=OBJECT_BYTES_MAX).contains(&object_bytes) && limits.pack_bytes_max >= object_bytes,
            "{limits:?}"
        );
        Self { limits, packs: Vec::new(), held: HashSet::new(), bytes: 0 }
    }

    /// Takes a block, unless it is in an open pack already; the packs that this closes.
    pub fn add(&mut self, tenant: &str, mut block: Block, now_ms: u64) -> Vec<Sealed> {
        let (slot_bytes, header) = (block.payload.len() as u32, &mut block.header);
        assert_eq!(
            header.flags & (FLAG_CHECKSUMMED | FLAG_TAIL),
            FLAG_CHECKSUMMED,
            "a whole block with its checksums"
        );
        assert_eq!(header.fingerprint, block.definition.fingerprint);
        let class = (tenant.to_owned(), slot_bytes, header.part_checksums.len() as u16);
        if !self.held.insert(key_of(header)) {
            return Vec::new();
        }
        // Of the node that computed it nothing remains, so that others make the same object of the same blocks.
        header.write_epoch = 0;
        header.flags = FLAG_CHECKSUMMED;
        let mut sealed = Vec::new();
        let at = self.pack_for(&class, &block, now_ms, &mut sealed);
        self.bytes += u64::from(slot_bytes);
        self.packs[at].push(block);
        if self.packs[at].is_full(&self.limits) {
            sealed.push(self.close(at));
        }
        while self.bytes > self.limits.pack_bytes_max {
            let fullest =
                (0..self.packs.len()).max_by_key(|at| self.packs[*at].bytes()).expect("bytes are in packs");
            sealed.push(self.close(fullest));
        }
        sealed
    }

    /// Closes packs that were opened before a time.
    pub fn close_older(&mut self, than_ms: u64) -> Vec<Sealed> {
        let mut sealed = Vec::new();
        while let Some(at) = self.packs.iter().position(|pack| pack.opened_ms < than_ms) {
            sealed.push(self.close(at));
        }
        sealed
    }

    /// Closes all.
    pub fn close_all(&mut self) -> Vec<Sealed> {
        (0..self.packs.len()).map(|_| self.close(0)).collect()
    }

    /// Whether the block is in an open pack.
    pub fn holds(&self, header: &SlotHeader) -> bool {
        self.held.contains(&key_of(header))
    }

    /// Payload bytes that wait.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The pack that a block goes into; a full one of its chain is closed, and followed by a new one.
    fn pack_for(&mut self, class: &Class, block: &Block, now_ms: u64, sealed: &mut Vec<Sealed>) -> usize {
        let header = &block.header;
        let parent = (header.fingerprint, header.group, header.parent);
        let of_class = |pack: &Pack| pack.class == *class;
        if let Some(at) = self.packs.iter().position(|pack| of_class(pack) && pack.ends.contains(&parent)) {
            if self.packs[at].takes(&block.definition) {
                return at;
            }
            sealed.push(self.close(at));
        }
        let open = self.packs.iter().filter(|pack| of_class(pack)).count();
        let takes = |at: &usize| of_class(&self.packs[*at]) && self.packs[*at].takes(&block.definition);
        let emptiest = (0..self.packs.len()).filter(takes).min_by_key(|at| self.packs[*at].bytes());
        match emptiest {
            Some(at) if open >= OPEN_PACKS_MAX => at,
            _ => {
                self.packs.push(Pack::new(class.clone(), now_ms));
                self.packs.len() - 1
            }
        }
    }

    fn close(&mut self, at: usize) -> Sealed {
        let pack = self.packs.remove(at);
        self.bytes -= pack.bytes();
        for header in &pack.slots {
            assert!(self.held.remove(&key_of(header)), "what lies in a pack is held");
        }
        pack.seal()
    }
}

impl Pack {
    fn new(class: Class, opened_ms: u64) -> Self {
        let (spaces, slots, payloads) = (Vec::new(), Vec::new(), Vec::new());
        Self { class, opened_ms, spaces, slots, payloads, ends: HashSet::new() }
    }

    fn bytes(&self) -> u64 {
        u64::from(self.class.1) * self.slots.len() as u64
    }

    fn takes(&self, definition: &Definition) -> bool {
        self.spaces.len() < OBJECT_SPACES_MAX
            || self.spaces.iter().any(|listed| listed.fingerprint == definition.fingerprint)
    }

    /// Whether another block would be too much.
    fn is_full(&self, limits: &PackLimits) -> bool {
        let next = self.bytes() + u64::from(self.class.1);
        self.bytes() >= limits.object_bytes
            || next > OBJECT_BYTES_MAX
            || self.slots.len() as u32 == OBJECT_SLOTS_MAX
    }

    fn push(&mut self, Block { header, definition, payload }: Block) {
        self.ends.remove(&(header.fingerprint, header.group, header.parent));
        self.ends.insert(key_of(&header));
        if self.spaces.iter().all(|listed| listed.fingerprint != definition.fingerprint) {
            self.spaces.push(definition);
        }
        self.slots.push(header);
        self.payloads.push(payload);
    }

    fn seal(self) -> Sealed {
        let (tenant, slot_bytes, parts) = self.class;
        let footer = Footer { tenant, slot_bytes, parts, spaces: self.spaces, slots: self.slots };
        let (object, end) = end_of(&footer);
        let mut pieces = self.payloads;
        let footer_bytes = end.len() as u32 - super::footer::TRAILER_BYTES as u32;
        pieces.push(end);
        let added = added_of(&footer, object, footer_bytes);
        Sealed { tenant: footer.tenant, pieces, added }
    }
}

/// What a manifest says of an object with this footer.
pub fn added_of(footer: &Footer, object: ObjectName, footer_bytes: u32) -> Added {
    let fingerprints: Vec<Fingerprint> = footer.spaces.iter().map(|space| space.fingerprint).collect();
    let places: HashMap<Fingerprint, u16> = fingerprints.iter().copied().zip(0..).collect();
    let record = |slot: &SlotHeader| Record {
        id: slot.id,
        parent: slot.parent,
        depth: slot.depth,
        tokens: slot.tokens,
        space: places[&slot.fingerprint],
        group: slot.group,
    };
    let records = footer.slots.iter().map(record).collect();
    let (slot_bytes, parts) = (footer.slot_bytes, footer.parts);
    Added { object, slot_bytes, parts, footer_bytes, fingerprints, records }
}

fn key_of(header: &SlotHeader) -> BlockKey {
    (header.fingerprint, header.group, header.id)
}

#[cfg(test)]
mod tests {
    use super::super::name::ObjectName;
    use super::*;

    const SLOT: usize = 8192;
    const LIMITS: PackLimits = PackLimits { object_bytes: 4 * SLOT as u64, pack_bytes_max: 10 * SLOT as u64 };

    /// The block `number` of chain `chain`, as a node of some write epoch has it.
    fn block(chain: u8, number: u8, write_epoch: u64) -> Block {
        let id =
            |number: u8| if number == 0 { BlockId([0; 16]) } else { BlockId([chain ^ (number << 4); 16]) };
        let payload = Bytes::from(vec![chain ^ number; SLOT]);
        let definition =
            Definition { fingerprint: Fingerprint([1; 32]), space: Bytes::from_static(b"space") };
        let part_checksums = payload.chunks(SLOT / 2).map(crc32fast::hash).collect();
        let header = SlotHeader {
            fingerprint: definition.fingerprint,
            id: id(number + 1),
            parent: id(number),
            depth: u32::from(number),
            tokens: 16,
            group: 0,
            flags: FLAG_CHECKSUMMED,
            element_tag: 0,
            length: SLOT as u64,
            stored_length: SLOT as u64,
            write_epoch,
            key_id: 0,
            nonce: [0; 24],
            part_checksums,
        };
        Block { header, definition, payload }
    }

    fn depths(sealed: &Sealed) -> Vec<u32> {
        sealed.added.records.iter().map(|record| record.depth).collect()
    }

    #[test]
    fn chains_that_grow_at_one_time_do_not_mix() {
        let mut packer = Packer::new(LIMITS);
        let mut sealed = Vec::new();
        for number in 0..4 {
            for chain in 1..=2 {
                sealed.extend(packer.add("t", block(chain, number, 7), 0));
            }
        }
        assert_eq!(sealed.iter().map(depths).collect::<Vec<_>>(), [[0, 1, 2, 3], [0, 1, 2, 3]]);
        assert_eq!((packer.bytes(), packer.held.len()), (0, 0));
    }

    #[test]
    fn what_is_written_reads_back_and_is_named_by_its_footer() {
        let mut packer = Packer::new(LIMITS);
        let sealed: Vec<Sealed> = (0..4).flat_map(|number| packer.add("t", block(1, number, 7), 0)).collect();
        let bytes = sealed[0].pieces.concat();
        let added = &sealed[0].added;
        assert_eq!(bytes.len() as u64, added.object_bytes());
        let from = added.footer_offset() as usize;
        let footer = &bytes[from..][..added.footer_bytes as usize];
        assert_eq!(ObjectName::of_footer(footer), added.object);
        let footer = Footer::decode(footer).unwrap();
        assert_eq!(&added_of(&footer, added.object, added.footer_bytes), added);
        for (slot, payload) in footer.slots.iter().zip(bytes.chunks(SLOT)) {
            assert_eq!(
                slot.part_checksums,
                payload.chunks(SLOT / 2).map(crc32fast::hash).collect::<Vec<_>>()
            );
        }
    }

    #[test]
    fn two_nodes_make_the_same_object_of_the_same_blocks() {
        let names = [3, 9].map(|write_epoch| {
            let mut packer = Packer::new(LIMITS);
            packer.add("t", block(1, 0, write_epoch), write_epoch);
            packer.add("t", block(1, 1, write_epoch), 0);
            packer.close_all()[0].added.object
        });
        assert_eq!(names[0], names[1]);
    }

    #[test]
    fn a_block_is_taken_once_and_tenants_are_apart() {
        let mut packer = Packer::new(LIMITS);
        packer.add("t", block(1, 0, 7), 0);
        packer.add("t", block(1, 0, 7), 0);
        assert_eq!(packer.bytes(), SLOT as u64);
        packer.add("u", block(2, 0, 7), 0);
        let sealed = packer.close_all();
        assert_eq!(sealed.iter().map(|sealed| sealed.tenant.as_str()).collect::<Vec<_>>(), ["t", "u"]);
    }

    #[test]
    fn memory_is_bounded_and_the_old_are_closed() {
        let limits = PackLimits { pack_bytes_max: 6 * SLOT as u64, ..LIMITS };
        let mut packer = Packer::new(limits);
        for chain in 1..=3 {
            for number in 0..2 {
                assert!(packer.add("t", block(chain, number, 7), u64::from(chain)).is_empty());
            }
        }
        let sealed = packer.add("t", block(1, 2, 7), 9);
        assert_eq!(sealed.iter().map(depths).collect::<Vec<_>>(), [[0, 1, 2]], "the fullest");
        assert_eq!(packer.close_older(3).len(), 1, "of those left one was opened before 3");
        assert_eq!((packer.close_all().len(), packer.bytes()), (1, 0));
    }

    #[test]
    fn with_enough_open_a_new_chain_joins_the_emptiest() {
        let mut packer = Packer::new(LIMITS);
        for chain in 1..=9 {
            packer.add("t", block(chain, 0, 7), 0);
        }
        assert_eq!(packer.packs.iter().map(|pack| pack.slots.len()).collect::<Vec<_>>(), [3, 2, 2, 2]);
    }
}
