//! Reads: what the bucket has of a chain, whether that pays, and its bytes into the node's slots.
//!
//! Invariants: every order is answered by one `Moved`, by a deadline; bytes count as moved only when the object's name proved its footer and the
//! footer every part (law 1); an object that is gone or damaged is forgotten, so it costs one miss. A read that takes much longer than
//! predicted closes the way for those who come after it, while it goes on itself.

use super::super::inbox::Input;
use super::{BucketTier, Shared, lock};
use crate::links::Trip;
use crate::node::event::{FetchOrder, MoveError, Offer, Wanted};
use kvd_client::transport::Destination;
use kvd_tiers::s3::bucket::{BucketError, Sink};
use kvd_tiers::s3::index::Place;
use kvd_tiers::s3::reader::{ReadError, Wish};
use kvd_tiers::s3::{Footer, ObjectRef};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of one read, which is told together: as much as one request takes.
const READ_BYTES: u64 = 8 << 20;
/// How long a read may take: four times what was predicted, within these.
const PATIENCE: Duration = Duration::from_secs(1);
const PATIENCE_MAX: Duration = Duration::from_secs(30);
/// Over twice what was predicted by so much, a read is taken for a sign that the way is closed.
const SLOW: Duration = Duration::from_millis(200);
/// Bytes that measure the way: of one block, or the beginning of it.
const MEASURED_BYTES_MAX: u64 = 1 << 20;

/// What the bucket has of the rest of a chain.
pub(in super::super) struct Found {
    offer: Offer,
    /// How much longer computing it takes.
    pub(in super::super) saved_us: f64,
    places: Places,
}

/// By block and group: the object, and its slot.
type Places = HashMap<(u32, u8), (Arc<ObjectRef>, u32)>;

impl Found {
    pub(in super::super) fn offer(&self) -> Offer {
        self.offer.clone()
    }
}

/// A destination as a sink; whole, at its index.
struct Slot(Destination);

impl Sink for Slot {
    fn write(&mut self, at: u64, bytes: &[u8]) {
        self.0.as_mut_slice()[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }
}

/// Some slots of one object, in their order.
struct Share {
    object: Arc<ObjectRef>,
    orders: Vec<(u32, FetchOrder)>,
}

impl BucketTier {
    /// What the bucket has of it, if fetching that beats computing it. Answers at once.
    pub(in super::super) fn find(&self, wanted: &Wanted) -> Option<Found> {
        let shared = &self.shared;
        if lock(&shared.way).rests(0, shared.now_us()) {
            return None;
        }
        let (places, blocks, parent) = shared.places(wanted)?;
        let (predicted_us, saved_us) = match self.saves(blocks, wanted) {
            Ok(saves) => saves,
            Err(is_due) => {
                let some = places.into_values().next().filter(|_| is_due);
                some.map(|(object, _)| self.runtime.spawn(shared.clone().measure(object)));
                return None;
            }
        };
        let offer = Offer { blocks, parent, predicted_us: predicted_us as u64, from_bucket: true };
        Some(Found { offer, saved_us, places })
    }

    /// What fetching takes and saves; an error: nothing, and whether the way is to be measured for nobody now.
    fn saves(&self, blocks: u32, wanted: &Wanted) -> Result<(f64, f64), bool> {
        let mut way = lock(&self.shared.way);
        way.saves(blocks, wanted).ok_or_else(|| way.probe_is_due(self.shared.now_us()))
    }

    /// Carries out what is wanted of an offer.
    pub(in super::super) fn fetch(&self, found: Found, orders: Vec<FetchOrder>) {
        let patience = Duration::from_micros(found.offer.predicted_us);
        for share in shares(found, orders) {
            self.runtime.spawn(self.shared.clone().read(share, patience));
        }
    }
}

impl Shared {
    /// Where the rest of the chain is, up to the first block that some group lacks, and the id before it.
    fn places(&self, wanted: &Wanted) -> Option<(Places, u32, kvd_proto::BlockId)> {
        let (fingerprint, layout) = (wanted.space.fingerprint(), &wanted.space.layout);
        let from = wanted.stored as usize;
        let index = lock(&self.index);
        let fits = |group: usize, place: &Place| {
            let known = index.object(place.object);
            let parts = layout.groups()[group].part_count();
            known.tenant == wanted.space.tenant
                && (known.slot_bytes, u32::from(known.parts)) == (layout.slot_bytes(group), parts)
        };
        let mut by_group = Vec::new();
        for group in 0..layout.groups().len() {
            let run = index.find(&fingerprint, group as u16, &wanted.chain, from);
            let fitting = run.iter().take_while(|place| fits(group, place)).count();
            by_group.push(run[..fitting].to_vec());
        }
        let blocks = by_group.iter().map(Vec::len).min().filter(|blocks| *blocks > 0)?;
        let first = by_group[0][0];
        let parent = match from {
            0 => index.object(first.object).root(first.slot)?,
            from => wanted.chain[from - 1],
        };
        let (mut objects, mut places) = (HashMap::new(), Places::new());
        for (group, run) in (0..).zip(&by_group) {
            for (block, place) in (wanted.stored..).zip(&run[..blocks]) {
                let object = objects
                    .entry(place.object)
                    .or_insert_with(|| Arc::new(ObjectRef::of_known(index.object(place.object))));
                places.insert((block, group), (object.clone(), place.slot));
            }
        }
        Some((places, wanted.stored + blocks as u32, parent))
    }

    async fn read(self: Arc<Self>, share: Share, predicted: Duration) {
        let Share { object, orders } = share;
        let bytes = u64::from(object.slot_bytes) * orders.len() as u64;
        let wish = |(slot, order): &(u32, FetchOrder)| Wish {
            slot: *slot,
            fingerprint: order.header.fingerprint,
            group: order.group.into(),
            id: order.header.id,
            sink: Slot(self.dram.get(order.to.segment).destination(order.to.slot)),
        };
        let mut wishes: Vec<_> = orders.iter().map(wish).collect();
        let trip = lock(&self.way).began(bytes, self.now_us());
        let begun = Instant::now();
        let deadline = (predicted * 4).clamp(PATIENCE, PATIENCE_MAX);
        let result = {
            let read = self.reader.read(&object, &mut wishes, (begun + deadline).into());
            tokio::pin!(read);
            match tokio::time::timeout(predicted * 2 + SLOW, &mut read).await {
                Ok(result) => result,
                Err(_) => {
                    self.read_failed("no answer in time, asked again every second");
                    read.await
                }
            }
        };
        drop(wishes); // before anybody hears that the slots are free to be read, or used otherwise
        let elapsed_us = begun.elapsed().as_micros() as u64;
        self.judge(&object, trip, &result);
        if result.is_ok() {
            let mut reads = lock(&self.reads);
            orders.iter().for_each(|(slot, _)| reads.read(object.object, *slot));
        }
        let told = |(slot, order): (u32, FetchOrder)| moved(&result, slot, &order, elapsed_us);
        self.inbox.push_all(&mut orders.into_iter().map(told).collect());
    }

    /// Reads a little of an object for nobody: a way that is too slow to be of use is not known to be better otherwise.
    async fn measure(self: Arc<Self>, object: Arc<ObjectRef>) {
        let bytes = u64::from(object.slot_bytes).min(MEASURED_BYTES_MAX);
        let wait = Instant::now() + Duration::from_millis(self.config.s3.timeout_ms.into());
        let key = object.object.key(&self.config.s3.prefix, &object.tenant);
        let trip = lock(&self.way).began(bytes, self.now_us());
        let read = self.bucket.get_bytes(&key, 0..bytes, wait.into()).await;
        match read {
            Ok(_) => lock(&self.way).ended(trip, None, self.now_us()),
            Err(error) if of_way(&error) => {
                lock(&self.way).ended(trip, Some(0), self.now_us());
                self.read_failed(&error.to_string());
            }
            Err(_) => self.answered_only(trip),
        }
    }

    /// The bucket said that it has not what was asked for: that the way works, and nothing of how fast it is.
    fn answered_only(&self, trip: Trip) {
        let mut way = lock(&self.way);
        way.ended(trip, Some(0), self.now_us());
        way.worked();
    }

    /// What a read says of the way and of the object.
    fn judge(&self, object: &ObjectRef, trip: Trip, result: &Result<Arc<Footer>, ReadError>) {
        let failed = match result {
            Ok(_) => None,
            Err(ReadError::Bucket(error)) if of_way(error) => Some(error.to_string()),
            Err(error) => {
                tracing::warn!(%error, object = %object.object, "an object is forgotten");
                lock(&self.index).remove_object(&object.tenant, object.object);
                self.answered_only(trip);
                return;
            }
        };
        lock(&self.way).ended(trip, failed.is_some().then_some(0), self.now_us());
        match failed {
            Some(why) => self.read_failed(&why),
            None => self.read_worked(),
        }
    }
}

/// Not of the object.
fn of_way(error: &BucketError) -> bool {
    !matches!(error, BucketError::Gone | BucketError::Truncated)
}

fn moved(result: &Result<Arc<Footer>, ReadError>, slot: u32, order: &FetchOrder, elapsed_us: u64) -> Input {
    let token = order.token;
    match result {
        Ok(footer) => {
            let checksums = footer.slots[slot as usize].part_checksums.clone();
            Input::Moved { token, result: Ok(()), elapsed_us, checksums }
        }
        Err(error) => {
            let why = match error {
                ReadError::Damaged { .. } => MoveError::Checksum,
                ReadError::Bucket(error) => MoveError::Device(error.to_string()),
            };
            Input::Moved { token, result: Err(why), elapsed_us, checksums: Vec::new() }
        }
    }
}

/// By object, in the order of slots, cut where a request's bytes end.
fn shares(found: Found, orders: Vec<FetchOrder>) -> Vec<Share> {
    let mut by_object: BTreeMap<_, Share> = BTreeMap::new();
    for order in orders {
        let place = found.places.get(&(order.block, order.group));
        let (object, slot) = place.expect("only what was offered is ordered").clone();
        let share = by_object.entry(object.object).or_insert_with(|| Share { object, orders: Vec::new() });
        share.orders.push((slot, order));
    }
    let mut cut = Vec::new();
    for Share { object, mut orders } in by_object.into_values() {
        orders.sort_unstable_by_key(|(slot, _)| *slot);
        let most = (READ_BYTES / u64::from(object.slot_bytes)).max(1) as usize;
        while !orders.is_empty() {
            let rest = orders.split_off(orders.len().min(most));
            cut.push(Share { object: object.clone(), orders: std::mem::replace(&mut orders, rest) });
        }
    }
    cut
}
