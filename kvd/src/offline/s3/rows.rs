//! What is told of a bucket, a row a thing. The names of the fields are a promise to programs: the help lists them.

use super::manifests::Named;
use crate::config::human_size;
use crate::offline::report::Row;
use kvd_tiers::s3::BucketConfig;
use serde::Serialize;
use std::fmt::Write as _;

/// Counts of a tenant, or of all.
#[derive(Debug, Default, Clone, Serialize)]
pub(super) struct Counts {
    pub(super) manifests: u64,
    /// That manifests name and that are there.
    pub(super) objects: u64,
    /// In them.
    pub(super) blocks: u64,
    pub(super) bytes: u64,
    /// That no manifest names.
    pub(super) orphans: u64,
    pub(super) orphan_bytes: u64,
    /// That manifests name and that are not there.
    pub(super) gone: u64,
    /// Keys that are none of kvd's.
    pub(super) foreign: u64,
    /// Manifests and objects of a version that is not known here.
    pub(super) other_version: u64,
    pub(super) verified_bytes: u64,
}

impl Counts {
    pub(super) fn of(named: &Named) -> Self {
        Self {
            manifests: named.manifests,
            foreign: named.foreign,
            other_version: named.other_version,
            ..Self::default()
        }
    }

    fn add(&mut self, more: &Self) {
        self.manifests += more.manifests;
        self.objects += more.objects;
        self.blocks += more.blocks;
        self.bytes += more.bytes;
        self.orphans += more.orphans;
        self.orphan_bytes += more.orphan_bytes;
        self.gone += more.gone;
        self.foreign += more.foreign;
        self.other_version += more.other_version;
        self.verified_bytes += more.verified_bytes;
    }
}

#[derive(Serialize)]
#[serde(tag = "kind", rename = "tenant")]
pub(super) struct TenantRow {
    pub(super) tenant: String,
    /// That wrote manifests.
    pub(super) nodes: u64,
    #[serde(flatten)]
    pub(super) counts: Counts,
}

impl Row for TenantRow {
    const HEADER: &'static str =
        "TENANT            NODES  MANIFESTS   OBJECTS      BLOCKS       BYTES  ORPHANS     GONE  FOREIGN";

    fn line(&self) -> String {
        let Counts { manifests, objects, blocks, bytes, orphans, gone, foreign, .. } = self.counts;
        format!(
            "{:<16}  {:>5}  {manifests:>9}  {objects:>8}  {blocks:>10}  {:>10}  {orphans:>7}  {gone:>7}  {foreign:>7}",
            self.tenant,
            self.nodes,
            human_size(bytes)
        )
    }
}

/// Why something is no good, or no longer needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Why {
    /// Bytes that are no manifest of that key.
    Manifest,
    /// An object that is not what its name stands for.
    Damaged,
    /// An object of another size than its manifest says.
    Size,
    /// It could not be read, or not be deleted.
    Unreadable,
    /// An object that nobody names, and that is old.
    Orphan,
}

impl Why {
    /// Whether a repair drops it: what is lost already, and what nobody finds.
    pub(super) fn is_dropped(self) -> bool {
        matches!(self, Self::Manifest | Self::Damaged | Self::Orphan)
    }
}

/// What is said of a key.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Trouble {
    tenant: String,
    pub(super) key: String,
    pub(super) why: Why,
    text: String,
}

impl Trouble {
    pub(super) fn new(tenant: &str, key: &str, why: Why, text: &str) -> Self {
        Self { tenant: tenant.to_owned(), key: key.to_owned(), why, text: text.to_owned() }
    }

    /// The same, still there.
    pub(super) fn undropped(self, error: &str) -> Self {
        Self { text: format!("{}; not deleted: {error}", self.text), ..self }
    }

    fn line(&self) -> String {
        format!("{}: {}", self.key, self.text)
    }
}

#[derive(Serialize)]
#[serde(tag = "kind", rename = "bad")]
pub(super) struct BadRow {
    #[serde(flatten)]
    pub(super) trouble: Trouble,
}

impl Row for BadRow {
    fn line(&self) -> String {
        format!("bad: {}", self.trouble.line())
    }
}

#[derive(Serialize)]
#[serde(tag = "kind", rename = "dropped")]
pub(super) struct DroppedRow {
    #[serde(flatten)]
    pub(super) trouble: Trouble,
    /// Nothing was deleted.
    pub(super) dry_run: bool,
}

impl Row for DroppedRow {
    fn line(&self) -> String {
        format!("{}: {}", if self.dry_run { "would drop" } else { "dropped" }, self.trouble.line())
    }
}

/// All of it.
#[derive(Serialize)]
#[serde(tag = "kind", rename = "summary")]
pub(super) struct Summary {
    endpoint: String,
    bucket: String,
    prefix: String,
    pub(super) tenants: u64,
    #[serde(flatten)]
    pub(super) counts: Counts,
    /// Rows of kind `bad`.
    pub(super) bad: u64,
    /// Rows of kind `dropped`.
    pub(super) dropped: u64,
}

impl Summary {
    pub(super) fn new(config: &BucketConfig) -> Self {
        Self {
            endpoint: config.endpoint.clone(),
            bucket: config.bucket.clone(),
            prefix: config.prefix.clone(),
            tenants: 0,
            counts: Counts::default(),
            bad: 0,
            dropped: 0,
        }
    }

    pub(super) fn count(&mut self, tenant: &TenantRow) {
        self.tenants += 1;
        self.counts.add(&tenant.counts);
    }
}

impl Row for Summary {
    fn line(&self) -> String {
        let Counts { objects, blocks, bytes, verified_bytes, orphans, gone, other_version, .. } = self.counts;
        let mut line = format!(
            "{}/{}: {} tenants, {objects} objects, {blocks} blocks, {}, {} verified, {} bad",
            self.bucket,
            self.prefix,
            self.tenants,
            human_size(bytes),
            human_size(verified_bytes),
            self.bad
        );
        let rest = [
            (orphans, "orphans"),
            (gone, "gone"),
            (other_version, "of other versions"),
            (self.dropped, "dropped"),
        ];
        for (count, what) in rest.into_iter().filter(|(count, _)| *count > 0) {
            write!(line, ", {count} {what}").expect("a String grows");
        }
        line
    }
}
