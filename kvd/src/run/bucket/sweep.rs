//! Keeping the bucket clean: what this node wrote and nobody reads any more goes, and what no manifest names.
//!
//! Invariants: a node judges only objects that its own manifests name; before an object is deleted they name it no more, and what of it is still
//! read is in another object, which they name. An object that nobody names is deleted when it is a day old: it is younger while its writer may still be about to name
//! it. While this node may have missed or forgotten something (a manifest it could not read, an index that is full), nothing unnamed is deleted.
//! What is deleted under somebody's hands is a miss there, and forgotten (law 5).

use super::{Shared, lock};
use kvd_proto::slot_header::SlotHeader;
use kvd_tiers::s3::bucket::BucketError;
use kvd_tiers::s3::manifest::Entry;
use kvd_tiers::s3::name::objects_prefix;
use kvd_tiers::s3::pack::Block;
use kvd_tiers::s3::reader::{ReadError, Wish};
use kvd_tiers::s3::sweep::Verdict;
use kvd_tiers::s3::{Listed, ObjectName, ObjectRef, Packer, Sealed};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

/// Objects of one page of a listing, which is judged before the next is asked for.
const PAGE: usize = 1000;
/// How long one request may take, and reading or writing one object.
const WAIT: Duration = Duration::from_secs(30);
/// An object that nobody names is deleted when it is so old.
const UNNAMED_AGE_MS: u64 = 86_400_000;
/// At the most often, and at the least.
const SWEEP_MIN: Duration = Duration::from_millis(250);
const SWEEP_MAX: Duration = Duration::from_hours(1);

/// As long as the daemon runs; at once, if objects are kept for ever.
pub(super) async fn run(shared: Arc<Shared>) {
    let ttl_ms = u64::from(shared.config.s3.ttl_ms);
    if ttl_ms == 0 {
        return;
    }
    let every = Duration::from_millis(ttl_ms / 4).clamp(SWEEP_MIN, SWEEP_MAX);
    let mut turned = Instant::now();
    loop {
        tokio::time::sleep(every).await;
        if turned.elapsed().as_millis() as u64 >= ttl_ms {
            lock(&shared.reads).turn();
            turned = Instant::now();
        }
        for tenant in shared.tenants() {
            if let Err(error) = shared.sweep(&tenant, ttl_ms).await {
                tracing::warn!(%error, tenant, "the bucket is not swept to its end");
            }
        }
    }
}

/// What one page of objects came to.
struct Page {
    packer: Packer,
    /// Objects that go when what is still read of them is in others.
    going: Vec<(ObjectName, String)>,
}

impl Shared {
    async fn sweep(&self, tenant: &str, ttl_ms: u64) -> Result<(), ReadError> {
        let prefix = &self.config.s3.prefix;
        let (folder, mut after) = (objects_prefix(prefix, tenant), String::new());
        loop {
            let listed = self.bucket.list(&folder, &after, PAGE, Instant::now() + WAIT).await?;
            let Some(last) = listed.last() else { return Ok(()) };
            after.clone_from(&last.key);
            let mut page = Page { packer: Packer::new(self.pack_limits()), going: Vec::new() };
            for listed in listed {
                if let Some(object) = ObjectName::from_key(prefix, tenant, &listed.key) {
                    self.judge_object(&mut page, tenant, object, listed, ttl_ms).await?;
                }
            }
            self.end_page(page, tenant).await?;
        }
    }

    async fn judge_object(
        &self,
        page: &mut Page,
        tenant: &str,
        object: ObjectName,
        listed: Listed,
        ttl_ms: u64,
    ) -> Result<(), ReadError> {
        let age_ms = listed.modified_s.map_or(0, age_ms);
        let (known, ours) = {
            let index = lock(&self.index);
            let known = index.named(tenant, object);
            let ours = known.is_some_and(|known| index.says(&self.config.node_name, known));
            (known.map(ObjectRef::of_known), ours)
        };
        match known {
            None if age_ms >= UNNAMED_AGE_MS && self.hears_all(tenant) => {
                self.bucket.delete(&[listed.key], Instant::now() + WAIT).await?;
            }
            Some(known) if ours => {
                let verdict = lock(&self.reads).judge(object, known.slots, age_ms, ttl_ms);
                if let Verdict::Repack(slots) = &verdict {
                    match self.repack(&known, slots, &mut page.packer).await {
                        Ok(sealed) => self.write_all(sealed).await?,
                        // nothing of it can be saved, and the others must not wait for it
                        Err(error @ (ReadError::Damaged { .. } | ReadError::Bucket(BucketError::Gone))) => {
                            tracing::warn!(%error, "an object goes");
                        }
                        Err(error) => return Err(error),
                    }
                }
                if verdict != Verdict::Keep {
                    page.going.push((object, listed.key));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Reads these slots, verified, into the pack; what that fills.
    async fn repack(
        &self,
        object: &ObjectRef,
        slots: &[u32],
        packer: &mut Packer,
    ) -> Result<Vec<Sealed>, ReadError> {
        let deadline = Instant::now() + WAIT;
        let footer = self.reader.footer(object, deadline).await?;
        let wish = |&slot: &u32| {
            let SlotHeader { fingerprint, group, id, .. } = footer.slots[slot as usize];
            Wish { slot, fingerprint, group, id, sink: Vec::with_capacity(object.slot_bytes as usize) }
        };
        let mut wishes: Vec<_> = slots.iter().map(wish).collect();
        self.reader.read(object, &mut wishes, deadline).await?;
        let mut sealed = Vec::new();
        for wish in wishes {
            let header = footer.slots[wish.slot as usize].clone();
            let definition = footer.spaces.iter().find(|listed| listed.fingerprint == header.fingerprint);
            let definition = definition.expect("a footer lists the spaces of its slots").clone();
            let block = Block { header, definition, payload: wish.sink.into() };
            sealed.extend(packer.add(&object.tenant, block, 0));
        }
        Ok(sealed)
    }

    async fn write_all(&self, sealed: Vec<Sealed>) -> Result<(), BucketError> {
        for Sealed { tenant, pieces, added } in sealed {
            let key = added.object.key(&self.config.s3.prefix, &tenant);
            self.bucket.put_if_absent(&key, &pieces, Instant::now() + WAIT).await?;
            self.wrote(tenant, added);
        }
        Ok(())
    }

    /// What is packed is written and named, what goes is named no more, and then goes.
    async fn end_page(&self, mut page: Page, tenant: &str) -> Result<(), BucketError> {
        self.write_all(page.packer.close_all()).await?;
        if page.going.is_empty() {
            return Ok(());
        }
        tracing::info!(tenant, objects = page.going.len(), "objects that nobody reads any more go");
        page.going.iter().for_each(|(object, _)| self.ledger.say(tenant, Entry::Removed(*object)));
        self.write_manifest(tenant).await;
        if self.ledger.has_untold(tenant) {
            return Ok(()); // with the next sweep: others would still be sent there
        }
        for (object, _) in &page.going {
            lock(&self.index).remove_object(tenant, *object);
        }
        let keys: Vec<_> = page.going.into_iter().map(|(_, key)| key).collect();
        self.bucket.delete(&keys, Instant::now() + WAIT).await
    }
}

fn age_ms(modified_s: i64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let modified = Duration::from_secs(modified_s.max(0) as u64);
    now.saturating_sub(modified).as_millis() as u64
}
