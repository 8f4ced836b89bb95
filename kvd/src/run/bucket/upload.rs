//! Uploads: slots read out, packed into objects, and written, each to its end.
//!
//! Invariants: an order is answered at once, by `Moved` when the slot has been copied, or need not be; its bytes are let go of by one `Uploaded`. What
//! was copied has its checksums, seen on the copy. A block that another node has too is left to it, until that has had time enough: then the
//! one whose name and the block's id hash highest uploads it, and after that whoever still has it. An object is written however long that takes, as
//! what waits is bounded by the node. Leaves to others: which blocks, in which order (the node); that others learn of the object (`ledger`).

use super::super::dram::DramSegment;
use super::super::inbox::Input;
use super::{Known, Shared, lock};
use crate::node::event::{Event, MoveError};
use kvd_proto::slot_header::SlotHeader;
use kvd_proto::{BlockId, Chain, Fingerprint};
use kvd_tiers::s3::manifest::Record;
use kvd_tiers::s3::pack::Block;
use kvd_tiers::s3::upload::Put;
use kvd_tiers::s3::{Added, Packer, Sealed};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Packs are looked at for their age this often.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long one try to write an object may take in all.
const PUT_WAIT: Duration = Duration::from_mins(1);
/// Between two tries, from and to.
const AGAIN: Duration = Duration::from_millis(500);
const AGAIN_MAX: Duration = Duration::from_secs(30);
/// How long a block of a new tenant waits for what the bucket has of it. Then it is left for later.
const HEARD_WAIT: Duration = Duration::from_secs(5);
/// How often a block is left to others.
const LEFT_MAX: u32 = 2;

/// What the node's thread orders.
pub(in super::super) enum Order {
    /// A slot whose header stays until `Moved`.
    Upload { token: u64, segment: Arc<DramSegment>, slot: u32, attempt: u32 },
    /// Write what there is, then say so.
    Stop { done: oneshot::Sender<()> },
}

struct Uploads {
    shared: Arc<Shared>,
    packer: Packer,
    /// Objects on their way: as many as the buffer holds. What each holds comes back when the index knows it.
    puts: JoinSet<Vec<BlockKey>>,
    /// What is in them.
    on_its_way: HashSet<BlockKey>,
}

/// Space, group, id.
type BlockKey = (Fingerprint, u16, BlockId);

/// Until it is told to stop.
pub(super) async fn run(shared: Arc<Shared>, mut orders: mpsc::UnboundedReceiver<Order>) {
    let mut uploads = Uploads {
        packer: Packer::new(shared.pack_limits()),
        puts: JoinSet::new(),
        on_its_way: HashSet::new(),
        shared: shared.clone(),
    };
    let mut look = tokio::time::interval(LOOK_EVERY);
    loop {
        tokio::select! {
            order = orders.recv() => match order {
                Some(Order::Upload { token, segment, slot, attempt }) => {
                    uploads.take(token, &segment, slot, attempt).await;
                }
                Some(Order::Stop { done }) => {
                    uploads.end().await;
                    let _ = done.send(());
                    return;
                }
                None => return,
            },
            _ = look.tick() => uploads.close_old(),
            Some(put) = uploads.puts.join_next() => uploads.arrived(&put.expect("a put ends with its object")),
        }
    }
}

impl Uploads {
    async fn take(&mut self, token: u64, segment: &DramSegment, slot: u32, attempt: u32) {
        let bytes = u64::from(segment.geometry.slot_bytes);
        let (result, taken) = match self.wanted(segment, slot, attempt).await {
            Ok(Some((tenant, block))) => {
                let sealed = self.packer.add(&tenant, block, self.now_ms());
                self.put_all(sealed);
                (Ok(()), true)
            }
            Ok(None) => (Ok(()), false),
            Err(why) => (Err(why), false),
        };
        // how long a copy within memory takes is known from checksums
        let mut told = vec![Input::Moved { token, result, elapsed_us: 0, checksums: Vec::new() }];
        if !taken {
            told.push(Input::Event(Event::Uploaded { bytes, stored: false }));
        }
        self.shared.inbox.push_all(&mut told);
    }

    /// The block, copied; `None`: it is there, or on its way.
    async fn wanted(
        &self,
        segment: &DramSegment,
        slot: u32,
        attempt: u32,
    ) -> Result<Option<(String, Block)>, MoveError> {
        let Some((_, header)) = segment.table().read(slot) else {
            unreachable!("slot {slot} is marked as moving, so its header stays")
        };
        let Some(Known { tenant, definition, since }) = self.shared.known(&header.fingerprint) else {
            unreachable!("a block's space is told before it")
        };
        if !self.shared.has_heard(&tenant, since).await && attempt < LEFT_MAX {
            return Err(MoveError::Later);
        }
        let key = (header.fingerprint, header.group, header.id);
        let packed = self.packer.holds(&header) || self.on_its_way.contains(&key);
        if packed || self.shared.has(&tenant, &header) {
            return Ok(None);
        }
        if self.shared.leave_to_others(&header, attempt).await {
            return Err(MoveError::Later);
        }
        let payload = segment.copy_out(slot, &header.part_checksums).map_err(|_| MoveError::Checksum)?;
        Ok(Some((tenant, Block { header, definition, payload })))
    }

    fn now_ms(&self) -> u64 {
        self.shared.now_us() / 1000
    }

    fn close_old(&mut self) {
        let pack_ms = u64::from(self.shared.config.s3.pack_ms);
        let old = self.now_ms().saturating_sub(pack_ms);
        let sealed = self.packer.close_older(old);
        self.put_all(sealed);
    }

    fn put_all(&mut self, sealed: Vec<Sealed>) {
        for sealed in sealed {
            self.on_its_way.extend(keys_of(&sealed.added));
            self.puts.spawn(put(self.shared.clone(), sealed));
        }
    }

    fn arrived(&mut self, keys: &[BlockKey]) {
        keys.iter().for_each(|key| _ = self.on_its_way.remove(key));
    }

    /// All that was taken, and the manifests that say so.
    async fn end(&mut self) {
        let sealed = self.packer.close_all();
        self.put_all(sealed);
        while self.puts.join_next().await.is_some() {}
        self.shared.write_manifests().await;
    }
}

fn keys_of(added: &Added) -> impl Iterator<Item = BlockKey> {
    let space = |record: &Record| added.fingerprints[usize::from(record.space)];
    added.records.iter().map(move |record| (space(record), record.group, record.id))
}

/// Writes an object, again and again until it is there; what it holds.
async fn put(shared: Arc<Shared>, sealed: Sealed) -> Vec<BlockKey> {
    let Sealed { tenant, pieces, added } = sealed;
    let key = added.object.key(&shared.config.s3.prefix, &tenant);
    let mut wait = AGAIN;
    let stored = loop {
        match shared.bucket.put_if_absent(&key, &pieces, Instant::now() + PUT_WAIT).await {
            Ok(put) => break put == Put::Stored,
            Err(error) => {
                tracing::warn!(%error, key, "an object was not written, it is tried again");
                lock(&shared.trouble).uploads = Some(error.to_string());
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(AGAIN_MAX);
            }
        }
    };
    lock(&shared.trouble).uploads = None;
    drop(pieces);
    let (bytes, keys) = (added.footer_offset(), keys_of(&added).collect());
    shared.wrote(tenant, added);
    shared.inbox.push(Input::Event(Event::Uploaded { bytes, stored }));
    keys
}

impl Shared {
    /// Whether it is known what the bucket has of a tenant, or is soon.
    async fn has_heard(&self, tenant: &str, since: std::time::Instant) -> bool {
        let mut heard = self.heard.subscribe();
        let heard = heard.wait_for(|heard| heard.contains(tenant));
        tokio::time::timeout_at((since + HEARD_WAIT).into(), heard).await.is_ok_and(|heard| heard.is_ok())
    }

    /// Whether the bucket has the block, as far as is known here.
    fn has(&self, tenant: &str, header: &SlotHeader) -> bool {
        let index = lock(&self.index);
        let found = index.find(&header.fingerprint, header.group, &[header.id], 0);
        found.first().is_some_and(|place| index.object(place.object).tenant == tenant)
    }

    /// Whether another node has the block and should upload it.
    async fn leave_to_others(&self, header: &SlotHeader, attempt: u32) -> bool {
        let Some(locations) = self.locations.get().filter(|_| attempt < LEFT_MAX) else { return false };
        let Ok(chain) = Chain::from_ids("chain", vec![header.id]) else { return false };
        let Ok(group) = u8::try_from(header.group) else { return false };
        let Ok(located) = locations.locate(chain, group, 0).await else { return false };
        let own = &self.config.cluster.address;
        let mut others =
            located.nodes.iter().filter(|node| node.node_epoch != self.write_epoch && node.blocks > 0);
        match attempt {
            0 => others.next().is_some(),
            _ => others.any(|node| rank(&node.address, &header.id) > rank(own, &header.id)),
        }
    }
}

/// Rendezvous: every node reckons the same order of nodes for a block.
fn rank(address: &str, id: &BlockId) -> u64 {
    let (low, high) = id.0.split_at(8);
    let seed = u64::from_le_bytes(low.try_into().expect("eight bytes"))
        ^ u64::from_le_bytes(high.try_into().expect("eight bytes"));
    // FNV-1a over the address, begun at the block
    address.bytes().fold(seed ^ 0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}
