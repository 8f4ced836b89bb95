//! What the manifests of one tenant name, all nodes' together.
//!
//! Invariants: of one node, manifests count in the order in which they were written, and not where a later one replaces them; the
//! names are whole only if every manifest was read: a node may replace its manifests while they are read here, and then all are
//! read again.
//! Leaves to others: whether what is named is there.

use super::rows::{Trouble, Why};
use super::{PAGE_NAMES, Patience, Place, READS_AT_ONCE, next_names, read_deadline};
use kvd_proto::Error;
use kvd_tiers::s3::bucket::{Bucket, BucketError};
use kvd_tiers::s3::manifest::{Entry, MANIFEST_BYTES_MAX, Manifest};
use kvd_tiers::s3::name::{ManifestKey, ObjectName, manifests_prefix};
use kvd_tiers::s3::{Added, Listed};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::task::JoinSet;

/// Objects of one tenant that are kept in mind: 56 bytes each. At the limit: an error.
const OBJECTS_MAX: usize = 4_000_000;
/// Manifests of one tenant: a node replaces its own long before. At the limit: an error.
const MANIFESTS_MAX: u64 = 1_000_000;
/// How often manifests are read anew because some were gone when their turn came. At the limit: the names are not whole.
const ROUNDS_MAX: u32 = 3;

/// How large an object is, as its manifest says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) bytes: u64,
    pub(super) blocks: u64,
}

/// What manifests say.
#[derive(Default)]
pub(super) struct Named {
    pub(super) objects: HashMap<ObjectName, Size>,
    pub(super) nodes: u64,
    pub(super) manifests: u64,
    pub(super) foreign: u64,
    pub(super) other_version: u64,
    pub(super) troubles: Vec<Trouble>,
    gone: bool,
    node: Node,
}

/// Of one node: when it said that an object was there.
#[derive(Default)]
struct Node {
    name: String,
    objects: HashMap<ObjectName, (Size, (u64, u32))>,
}

/// What came of reading a manifest.
enum Read {
    Good(Box<Manifest>),
    OtherVersion,
    Gone,
    Bad(Trouble),
}

impl Named {
    pub(super) async fn read(place: &Place, tenant: &str, patience: &mut Patience) -> Result<Self, Error> {
        let mut named = Self::round(place, tenant, patience).await?;
        for _ in 1..ROUNDS_MAX {
            if !named.gone {
                break;
            }
            named = Self::round(place, tenant, patience).await?;
        }
        Ok(named)
    }

    /// Whether nothing is named that is not in here.
    pub(super) fn is_whole(&self) -> bool {
        !self.gone && self.other_version == 0 && self.troubles.is_empty()
    }

    async fn round(place: &Place, tenant: &str, patience: &mut Patience) -> Result<Self, Error> {
        let (mut named, mut after) = (Self::default(), String::new());
        let prefix = manifests_prefix(place.prefix(), tenant);
        loop {
            let page = next_names(&place.bucket, &prefix, &mut after, PAGE_NAMES).await?;
            if page.is_empty() {
                break;
            }
            named.page(place, tenant, page, patience).await?;
        }
        named.end_node();
        Ok(named)
    }

    async fn page(
        &mut self,
        place: &Place,
        tenant: &str,
        page: Vec<Listed>,
        patience: &mut Patience,
    ) -> Result<(), Error> {
        let mut ours = Vec::new();
        for listed in page {
            match ManifestKey::from_key(place.prefix(), tenant, &listed.key) {
                Some(key) => ours.push((key, listed)),
                None => self.foreign += 1,
            }
        }
        for some in ours.chunks(READS_AT_ONCE) {
            for (key, read) in read_some(place, some).await {
                patience.hear(matches!(&read, Read::Bad(trouble) if trouble.why == Why::Unreadable))?;
                self.take(&key, read);
            }
        }
        if self.manifests > MANIFESTS_MAX || self.objects.len() + self.node.objects.len() > OBJECTS_MAX {
            let message =
                format!("tenant {tenant}: more than {OBJECTS_MAX} objects or {MANIFESTS_MAX} manifests");
            return Err(Error::limit(
                "s3",
                message,
                "look at a part of the cluster's nodes with a prefix of its own",
            ));
        }
        Ok(())
    }

    fn take(&mut self, key: &ManifestKey, read: Read) {
        self.manifests += 1;
        if self.node.name != key.node {
            self.end_node();
            self.nodes += 1;
            self.node.name.clone_from(&key.node);
        }
        match read {
            Read::Good(manifest) => self.node.apply(*manifest),
            Read::OtherVersion => self.other_version += 1,
            Read::Gone => self.gone = true,
            Read::Bad(trouble) => self.troubles.push(trouble),
        }
    }

    fn end_node(&mut self) {
        let node = std::mem::take(&mut self.node);
        self.objects.extend(node.objects.into_iter().map(|(name, (size, _))| (name, size)));
    }
}

impl Node {
    fn apply(&mut self, manifest: Manifest) {
        let at = (manifest.key.write_epoch, manifest.key.sequence);
        for entry in manifest.entries {
            match entry {
                Entry::Added(added) => drop(self.objects.insert(added.object, (Size::of(&added), at))),
                Entry::Removed(object) => drop(self.objects.remove(&object)),
            }
        }
        self.objects.retain(|_, (_, said)| *said >= manifest.replaces_before);
    }
}

impl Size {
    fn of(added: &Added) -> Self {
        Self { bytes: added.object_bytes(), blocks: added.records.len() as u64 }
    }
}

/// Several at a time, told in their order.
async fn read_some(place: &Place, some: &[(ManifestKey, Listed)]) -> Vec<(ManifestKey, Read)> {
    let mut reads = JoinSet::new();
    for (at, (key, listed)) in some.iter().cloned().enumerate() {
        let bucket = Arc::clone(&place.bucket);
        reads.spawn(async move { (at, read(&bucket, &key, &listed).await, key) });
    }
    let mut read = reads.join_all().await;
    read.sort_by_key(|(at, ..)| *at);
    read.into_iter().map(|(_, read, key)| (key, read)).collect()
}

async fn read(bucket: &Bucket, key: &ManifestKey, listed: &Listed) -> Read {
    let bad = |why, text: &str| Read::Bad(Trouble::new(&key.tenant, &listed.key, why, text));
    if listed.bytes > MANIFEST_BYTES_MAX as u64 {
        return bad(Why::Manifest, "larger than any manifest");
    }
    let bytes = match bucket.get_bytes(&listed.key, 0..listed.bytes, read_deadline()).await {
        Ok(bytes) => bytes,
        Err(BucketError::Gone) => return Read::Gone,
        Err(error) => return bad(Why::Unreadable, &error.to_string()),
    };
    match Manifest::decode(&bytes) {
        Some(manifest) if manifest.is_of(key) => Read::Good(Box::new(manifest)),
        Some(_) => bad(Why::Manifest, "another key's manifest"),
        None if Manifest::is_of_another_version(&bytes) => Read::OtherVersion,
        None => bad(Why::Manifest, "not a whole, intact manifest"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_proto::{BlockId, Fingerprint};
    use kvd_tiers::s3::manifest::Record;

    fn name(number: u8) -> ObjectName {
        ObjectName([number; 16])
    }

    fn added(number: u8) -> Entry {
        let (id, parent) = (BlockId([number; 16]), BlockId::default());
        let record = Record { id, parent, depth: 0, tokens: 16, space: 0, group: 0 };
        let fingerprints = vec![Fingerprint([1; 32])];
        let (object, records) = (name(number), vec![record]);
        Entry::Added(Added { object, slot_bytes: 4096, parts: 1, footer_bytes: 100, fingerprints, records })
    }

    fn take(named: &mut Named, node: &str, sequence: u32, replaces_before: (u64, u32), entries: Vec<Entry>) {
        let key = ManifestKey { tenant: "t".into(), node: node.into(), write_epoch: 1, sequence };
        let manifest = Manifest { key: key.clone(), replaces_before, entries };
        named.take(&key, Read::Good(Box::new(manifest)));
    }

    #[test]
    fn names_are_what_was_added_and_neither_removed_nor_replaced() {
        let mut named = Named::default();
        take(&mut named, "one", 0, (0, 0), vec![added(1), added(2)]);
        take(&mut named, "one", 1, (0, 0), vec![Entry::Removed(name(1)), added(3)]);
        take(&mut named, "one", 2, (1, 1), vec![added(4), Entry::Removed(name(9))]);
        take(&mut named, "two", 0, (0, 0), vec![added(2), added(4), Entry::Removed(name(3))]);
        named.end_node();
        let mut names: Vec<_> = named.objects.keys().copied().collect();
        names.sort();
        assert_eq!(names, [2, 3, 4].map(name), "2 is node two's word; 3 was removed by who did not add it");
        assert_eq!(named.objects[&name(4)], Size { bytes: 4096 + 100 + 32, blocks: 1 });
        assert_eq!((named.nodes, named.manifests, named.is_whole()), (2, 4, true));
    }

    #[test]
    fn names_are_not_whole_when_a_manifest_was_not_read() {
        let key = ManifestKey { tenant: "t".into(), node: "n".into(), write_epoch: 1, sequence: 0 };
        let trouble = Trouble::new("t", "k", Why::Unreadable, "x");
        for read in [Read::Gone, Read::OtherVersion, Read::Bad(trouble)] {
            let mut named = Named::default();
            named.take(&key, read);
            assert!(!named.is_whole());
        }
    }
}
