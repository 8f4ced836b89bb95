//! What all nodes wrote: their manifests, listed again and again, and read once; and the probe of a way that failed.
//!
//! Invariants: manifests of one node are applied in the order they were written; one that cannot be read, or is not its key's, is passed over and
//! said so once; trouble costs what was not heard of, nothing else. What this daemon itself wrote it knows already.

use super::{Shared, lock};
use kvd_tiers::s3::bucket::{BucketError, Listed, WHOLE_BYTES_MAX};
use kvd_tiers::s3::manifest::Entry;
use kvd_tiers::s3::name::{ManifestKey, manifests_prefix};
use kvd_tiers::s3::{Manifest, ObjectName};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// Manifests of one tenant that are listed. At the limit: later ones are not seen; nodes make theirs few.
const LISTED_MAX: usize = 100_000;
/// Manifests that are read at once.
const TOGETHER: usize = 16;
/// Entries that are applied at once.
const ENTRIES_TOGETHER: usize = 16;
/// How long one listing, or so many manifests, may take.
const WAIT: Duration = Duration::from_secs(20);
/// A way that failed is tried this often.
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// Bytes of a probe.
const PROBE_BYTES: u64 = 32;

/// As long as the daemon runs.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut seen: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let every = Duration::from_millis(shared.config.s3.list_ms.into());
    loop {
        let mut trouble = None;
        for tenant in shared.tenants() {
            let seen = seen.entry(tenant.clone()).or_default();
            let heard = shared.hear(&tenant, seen).await;
            match &heard {
                Ok(()) => _ = shared.heard.send_if_modified(|heard| heard.insert(tenant)),
                Err(error) => tracing::warn!(%error, tenant, "manifests are not heard"),
            }
            trouble = trouble.or(heard.err().map(|error| error.to_string()));
        }
        lock(&shared.trouble).hearing = trouble;
        let _ = tokio::time::timeout(every, shared.new_tenant.notified()).await;
    }
}

/// Reopens a way that failed when something can be read again.
pub(super) async fn probe(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(PROBE_EVERY).await;
        if !lock(&shared.way).rests(0, shared.now_us()) {
            continue;
        }
        match shared.probe().await {
            Ok(()) => shared.read_worked(),
            Err(error) => shared.read_failed(&error.to_string()),
        }
    }
}

impl Shared {
    /// What is new for a tenant. An error: some of it was not heard, and is not among `seen`.
    async fn hear(&self, tenant: &str, seen: &mut BTreeSet<String>) -> Result<(), BucketError> {
        let folder = manifests_prefix(&self.config.s3.prefix, tenant);
        let listed = self.bucket.list(&folder, "", LISTED_MAX, Instant::now() + WAIT).await?;
        let there: BTreeSet<&String> = listed.iter().map(|listed| &listed.key).collect();
        seen.retain(|key| there.contains(key));
        let mut new = Vec::new();
        for Listed { key, bytes, .. } in listed {
            if seen.contains(&key) {
                continue;
            }
            match ManifestKey::from_key(&self.config.s3.prefix, tenant, &key) {
                Some(named) if self.is_own(&named) => _ = seen.insert(key),
                Some(named) => new.push((named, key, bytes.min(WHOLE_BYTES_MAX))),
                None => {
                    tracing::warn!(key, "not the name of a manifest");
                    seen.insert(key);
                }
            }
        }
        for some in new.chunks(TOGETHER) {
            self.hear_some(some, seen).await?;
        }
        Ok(())
    }

    /// Said in this life: known when it was written.
    fn is_own(&self, named: &ManifestKey) -> bool {
        named.node == self.config.node_name && named.write_epoch == self.write_epoch
    }

    /// Reads these at once, and applies them in order.
    async fn hear_some(
        &self,
        some: &[(ManifestKey, String, u64)],
        seen: &mut BTreeSet<String>,
    ) -> Result<(), BucketError> {
        let wanted: Vec<_> =
            some.iter().map(|(_, key, bytes)| (key.clone(), 0..*bytes, Vec::new())).collect();
        let came = self.bucket.get_ranges(wanted, Instant::now() + WAIT).await;
        for ((named, key, _), bytes) in some.iter().zip(came) {
            match bytes {
                Ok(bytes) if self.heard(named, &bytes) => {}
                Ok(bytes) => {
                    // once more, in case the way did it
                    let again = 0..bytes.len() as u64;
                    let again = self.bucket.get_bytes(key, again, Instant::now() + WAIT).await;
                    if !again.is_ok_and(|bytes| self.heard(named, &bytes)) {
                        tracing::warn!(key, "not a manifest, or another's, or one too many");
                        self.missed.store(true, Ordering::Relaxed);
                    }
                }
                Err(BucketError::Gone) => continue, // made one with others meanwhile
                Err(error) => return Err(error),
            }
            seen.insert(key.clone());
        }
        Ok(())
    }

    /// Applied a few entries at a time: whoever looks for blocks does not wait for all of it. `false`: it is none, or cannot be used.
    fn heard(&self, named: &ManifestKey, bytes: &[u8]) -> bool {
        let manifest = Manifest::decode(bytes).filter(|manifest| manifest.is_of(named));
        let Some(mut manifest) = manifest else { return false };
        let entries = std::mem::take(&mut manifest.entries);
        let some = |entries: &[Entry]| Manifest {
            replaces_before: (0, 0),
            entries: entries.to_vec(),
            ..manifest.clone()
        };
        let applied =
            entries.chunks(ENTRIES_TOGETHER).try_for_each(|entries| lock(&self.index).apply(some(entries)));
        let applied = applied.and_then(|()| lock(&self.index).apply(manifest.clone()));
        applied.inspect_err(|error| tracing::warn!(%error, "a manifest is not used")).is_ok()
    }

    /// Reads a few bytes of some object; without one, looks for one.
    async fn probe(&self) -> Result<(), BucketError> {
        let wait = Instant::now() + Duration::from_millis(self.config.s3.timeout_ms.into());
        let prefix = &self.config.s3.prefix;
        let known: Option<(String, ObjectName)> =
            lock(&self.index).newest().map(|known| (known.tenant.clone(), known.object));
        let read = match known {
            None => self.bucket.list(prefix, "", 1, wait).await.map(drop),
            Some((tenant, object)) => {
                self.bucket.get_bytes(&object.key(prefix, &tenant), 0..PROBE_BYTES, wait).await.map(drop)
            }
        };
        match read {
            Err(BucketError::Gone | BucketError::Truncated) => Ok(()), // it answers
            other => other,
        }
    }
}
