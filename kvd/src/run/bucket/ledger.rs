//! This node's manifests: written when objects were, and made fewer when they are many.
//!
//! Owns what of this node's word is not in the bucket yet. Invariants: manifests of one tenant are written one after the other, each under a sequence
//! of its own; what was not written stays and is tried again; many manifests become few by writing all they say again, and only
//! then are they deleted (`tiers/FORMAT.md`, "Replacing"). Leaves to others: objects (`upload`), what other nodes say (`follow`).

use super::{Shared, lock};
use kvd_proto::{Code, Error};
use kvd_tiers::s3::bucket::{BucketError, WHOLE_BYTES_MAX};
use kvd_tiers::s3::manifest::{Entry, Manifest};
use kvd_tiers::s3::name::ManifestKey;
use kvd_tiers::s3::{Added, Listed, ObjectName};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;

/// How long an object waits at most for others to be told with.
const TOLD_WITHIN: Duration = Duration::from_secs(2);
/// Objects that are told without waiting.
const TOLD_TOGETHER: usize = 32;
/// Objects that wait to be told. Never reached while the bucket takes manifests; at the limit the oldest are not told, and found by nobody.
const UNTOLD_MAX: usize = 16_384;
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long writing or reading one manifest may take.
const MANIFEST_WAIT: Duration = Duration::from_secs(20);
/// Manifests of one tenant, written by this node, that become one.
const MANIFESTS_MAX: u32 = 32;
/// Of all its lives, that become one at a time.
const OWN_MAX: usize = 4096;

/// By tenant, what is written and not told.
#[derive(Default)]
pub(super) struct Ledger {
    untold: Mutex<HashMap<String, Untold>>,
    /// Held while manifests are written.
    writing: tokio::sync::Mutex<()>,
}

struct Untold {
    entries: Vec<Entry>,
    since: Instant,
    sequence: u32,
    /// Manifests written since the start, or since they were made one.
    written: u32,
}

/// As long as the daemon runs.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut look = tokio::time::interval(LOOK_EVERY);
    loop {
        look.tick().await;
        for tenant in shared.ledger.due() {
            shared.write_manifest(&tenant).await;
            if shared.ledger.many(&tenant)
                && let Err(error) = shared.make_one(&tenant).await
            {
                tracing::warn!(%error, tenant, "manifests stay as many as they are");
            }
        }
    }
}

impl Ledger {
    fn due(&self) -> Vec<String> {
        let untold = lock(&self.untold);
        let due = |untold: &Untold| {
            let waited = untold.since.elapsed() >= TOLD_WITHIN;
            !untold.entries.is_empty() && (waited || untold.entries.len() >= TOLD_TOGETHER)
        };
        untold.iter().filter(|(_, untold)| due(untold)).map(|(tenant, _)| tenant.clone()).collect()
    }

    fn many(&self, tenant: &str) -> bool {
        lock(&self.untold).get(tenant).is_some_and(|untold| untold.written >= MANIFESTS_MAX)
    }

    pub(super) fn has_untold(&self, tenant: &str) -> bool {
        lock(&self.untold).get(tenant).is_some_and(|untold| !untold.entries.is_empty())
    }

    pub(super) fn say(&self, tenant: &str, entry: Entry) {
        let mut untold = lock(&self.untold);
        let untold = untold.entry(tenant.to_owned()).or_insert_with(|| Untold {
            entries: Vec::new(),
            since: Instant::now(),
            sequence: 0,
            written: 0,
        });
        if untold.entries.is_empty() {
            untold.since = Instant::now();
        }
        untold.entries.push(entry);
        if untold.entries.len() > UNTOLD_MAX {
            untold.entries.remove(0);
        }
    }

    /// The next sequence of a tenant's manifests.
    fn sequence(&self, tenant: &str) -> u32 {
        lock(&self.untold).get_mut(tenant).map_or(0, |untold| {
            untold.sequence += 1;
            untold.sequence - 1
        })
    }

    fn peek(&self, tenant: &str) -> u32 {
        lock(&self.untold).get(tenant).map_or(0, |untold| untold.sequence)
    }

    fn few(&self, tenant: &str) {
        if let Some(untold) = lock(&self.untold).get_mut(tenant) {
            untold.written = 0;
        }
    }
}

impl Shared {
    /// An object is in the bucket: this node finds its blocks from now on, the others soon.
    pub(super) fn wrote(&self, tenant: String, added: Added) {
        let entry = Entry::Added(added);
        // said by a manifest to come: none of ours that makes others few takes it back
        let key = self.manifest_key(&tenant, u32::MAX);
        let known = Manifest { key, replaces_before: (0, 0), entries: vec![entry.clone()] };
        if let Err(error) = lock(&self.index).apply(known) {
            tracing::warn!(%error, "an object is not found here");
        }
        self.ledger.say(&tenant, entry);
    }

    fn manifest_key(&self, tenant: &str, sequence: u32) -> ManifestKey {
        let (node, write_epoch) = (self.config.node_name.clone(), self.write_epoch);
        ManifestKey { tenant: tenant.to_owned(), node, write_epoch, sequence }
    }

    /// Everything that is untold, once.
    pub(super) async fn write_manifests(&self) {
        let tenants: Vec<_> = lock(&self.ledger.untold).keys().cloned().collect();
        for tenant in tenants {
            self.write_manifest(&tenant).await;
        }
    }

    pub(super) async fn write_manifest(&self, tenant: &str) {
        let _one_at_a_time = self.ledger.writing.lock().await;
        let entries = {
            let mut untold = lock(&self.ledger.untold);
            untold.get_mut(tenant).map(|untold| std::mem::take(&mut untold.entries)).unwrap_or_default()
        };
        if entries.is_empty() {
            return;
        }
        let (written, rest) = self.write_entries(tenant, entries, (0, 0)).await;
        let mut untold = lock(&self.ledger.untold);
        let untold = untold.get_mut(tenant).expect("it was just there");
        untold.written += written;
        if !rest.is_empty() {
            untold.entries.splice(0..0, rest);
            untold.since = Instant::now();
        }
    }

    /// As few manifests as hold these; how many were written, and the entries of those that were not.
    async fn write_entries(
        &self,
        tenant: &str,
        entries: Vec<Entry>,
        replaces_before: (u64, u32),
    ) -> (u32, Vec<Entry>) {
        let (mut written, mut entries) = (0, entries.into_iter().peekable());
        while entries.peek().is_some() {
            let key = self.manifest_key(tenant, self.ledger.sequence(tenant));
            let mut manifest = Manifest { key, replaces_before: (0, 0), entries: Vec::new() };
            while let Some(entry) = entries.next_if(|entry| manifest.has_room(entry)) {
                manifest.entries.push(entry);
            }
            if entries.peek().is_none() {
                manifest.replaces_before = replaces_before; // the last says it, when all are there
            }
            if let Err(error) = self.put_manifest(&manifest).await {
                tracing::warn!(%error, tenant, "a manifest was not written, it is tried again");
                lock(&self.trouble).telling = Some(error.to_string());
                return (written, manifest.entries.into_iter().chain(entries).collect());
            }
            lock(&self.trouble).telling = None;
            written += 1;
        }
        (written, Vec::new())
    }

    async fn put_manifest(&self, manifest: &Manifest) -> Result<(), BucketError> {
        let key = manifest.key.key(&self.config.s3.prefix);
        let bytes = [manifest.encode().into()];
        self.bucket.put_if_absent(&key, &bytes, Instant::now() + MANIFEST_WAIT).await.map(drop)
    }

    /// Everything this node ever said and still holds, in new manifests; then the old ones go.
    async fn make_one(&self, tenant: &str) -> Result<(), Error> {
        let _one_at_a_time = self.ledger.writing.lock().await;
        let prefix = &self.config.s3.prefix;
        let deadline = || Instant::now() + MANIFEST_WAIT;
        let some = self.manifest_key(tenant, 0).key(prefix);
        let (folder, _) = some.rsplit_once('/').expect("a manifest lies in its node's folder");
        let listed = self.bucket.list(&format!("{folder}/"), "", OWN_MAX, deadline()).await?;
        let mut held: BTreeMap<ObjectName, Entry> = BTreeMap::new();
        for Listed { key, bytes, .. } in &listed {
            let bytes = self.bucket.get_bytes(key, 0..WHOLE_BYTES_MAX.min(*bytes), deadline()).await?;
            let named = ManifestKey::from_key(prefix, tenant, key);
            let manifest =
                Manifest::decode(&bytes).filter(|manifest| named.is_some_and(|key| manifest.is_of(&key)));
            for entry in manifest.ok_or_else(|| unreadable(key))?.entries {
                match entry {
                    Entry::Removed(object) => _ = held.remove(&object),
                    Entry::Added(added) => _ = held.insert(added.object, Entry::Added(added)),
                }
            }
        }
        let keys: Vec<_> = listed.into_iter().map(|listed| listed.key).collect();
        let first = self.ledger.peek(tenant);
        let (_, rest) =
            self.write_entries(tenant, held.into_values().collect(), (self.write_epoch, first)).await;
        if rest.is_empty() {
            self.bucket.delete(&keys, deadline()).await?;
            self.ledger.few(tenant);
        }
        Ok(())
    }
}

/// It may have been damaged on its way only: what it says is not thrown away for it.
fn unreadable(key: &str) -> Error {
    let fix = "nothing, if it is not said again; otherwise `kvd repair s3`";
    Error::new(Code::Unavailable, "s3", format!("{key} cannot be read"), fix)
}
