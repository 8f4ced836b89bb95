//! The way through a bucket: tenants, their manifests, their objects; what is found is told, and where that is asked, dropped.
//!
//! Invariants: nothing is dropped but by `repair`, and told as dropped only when the bucket took it; of a tenant whose manifests
//! were not all read, no object is taken for one that nobody names.
//! Leaves to others: what is good (`manifests`, `objects`).

use super::manifests::{Named, Size};
use super::objects::{Verdict, verify};
use super::repair::Mending;
use super::rows::{BadRow, Counts, DroppedRow, Summary, TenantRow, Trouble, Why};
use super::{PAGE_NAMES, Patience, Place, READS_AT_ONCE, Telling, next_names, request_deadline};
use crate::offline::report::Report;
use kvd_proto::Error;
use kvd_tiers::s3::Listed;
use kvd_tiers::s3::name::{ObjectName, objects_prefix, tenant_of_key};

pub(super) struct Walk {
    place: Place,
    verify: bool,
    /// `None`: only look.
    mending: Option<Mending>,
    report: Report,
    summary: Summary,
    patience: Patience,
}

/// An object that is there.
struct Seen {
    listed: Listed,
    /// As a manifest says; `None`: none names it.
    named: Option<Size>,
    verdict: Verdict,
}

impl Walk {
    pub(super) fn new(place: Place, verify: bool, mending: Option<Mending>, telling: &Telling) -> Self {
        let (report, summary) = (Report::new(telling.output), Summary::new(place.bucket.config()));
        Self { place, verify, mending, report, summary, patience: Patience::default() }
    }

    /// Of this tenant only, or of all; whether all is well.
    pub(super) async fn all(mut self, only: Option<&str>) -> Result<bool, Error> {
        match only {
            Some(tenant) => self.tenant(tenant).await?,
            None => self.tenants().await?,
        }
        self.report.row(&self.summary);
        let would_drop = self.mending.is_some_and(|mending| mending.dry_run) && self.summary.dropped > 0;
        Ok(self.summary.bad == 0 && !would_drop)
    }

    /// Tenants are what the first parts of keys say.
    async fn tenants(&mut self) -> Result<(), Error> {
        let prefix = self.place.prefix().to_owned();
        let below = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        let mut after = String::new();
        while let Some(first) = next_names(&self.place.bucket, &below, &mut after, 1).await?.pop() {
            match tenant_of_key(&prefix, &first.key) {
                Some(tenant) => self.tenant(&tenant).await?,
                None => self.summary.counts.foreign += 1,
            }
            if let Some((folder, _)) = first.key[below.len()..].split_once('/') {
                after = format!("{below}{folder}0"); // '0' comes after '/'
            }
        }
        Ok(())
    }

    async fn tenant(&mut self, tenant: &str) -> Result<(), Error> {
        let mut named = Named::read(&self.place, tenant, &mut self.patience).await?;
        let counts = Counts::of(&named);
        let mut row = TenantRow { tenant: tenant.to_owned(), nodes: named.nodes, counts };
        self.report.expect(named.objects.len() as u64, "objects");
        let whole = named.is_whole();
        for trouble in std::mem::take(&mut named.troubles) {
            self.trouble(trouble).await;
        }
        let (prefix, mut after) = (objects_prefix(self.place.prefix(), tenant), String::new());
        loop {
            let page = next_names(&self.place.bucket, &prefix, &mut after, PAGE_NAMES).await?;
            if page.is_empty() {
                break;
            }
            self.page(page, &mut named, whole, &mut row).await?;
        }
        row.counts.gone += named.objects.len() as u64;
        self.summary.count(&row);
        self.report.row(&row);
        Ok(())
    }

    async fn page(
        &mut self,
        page: Vec<Listed>,
        named: &mut Named,
        whole: bool,
        row: &mut TenantRow,
    ) -> Result<(), Error> {
        let mut ours = Vec::new();
        for listed in page {
            match ObjectName::from_key(self.place.prefix(), &row.tenant, &listed.key) {
                Some(name) => ours.push((name, listed)),
                None => row.counts.foreign += 1,
            }
        }
        for some in ours.chunks(READS_AT_ONCE) {
            let names: Vec<_> = some.iter().map(|(name, _)| *name).collect();
            let verdicts = if self.verify {
                verify(&self.place, &row.tenant, &names).await
            } else {
                vec![Verdict::Unverified; names.len()]
            };
            for ((name, listed), verdict) in some.iter().zip(verdicts) {
                let named = named.objects.remove(name);
                self.object(Seen { listed: listed.clone(), named, verdict }, whole, row).await?;
                self.report.step();
            }
        }
        Ok(())
    }

    async fn object(&mut self, seen: Seen, whole: bool, row: &mut TenantRow) -> Result<(), Error> {
        let Seen { listed, named, verdict } = seen;
        let trouble = |why, text: &str| Trouble::new(&row.tenant, &listed.key, why, text);
        let silent = matches!(verdict, Verdict::Unreadable(_));
        match verdict {
            Verdict::Damaged(text) => self.trouble(trouble(Why::Damaged, &text)).await,
            Verdict::Unreadable(text) => self.trouble(trouble(Why::Unreadable, &text)).await,
            Verdict::Gone => row.counts.gone += u64::from(named.is_some()),
            Verdict::OtherVersion => row.counts.other_version += 1,
            Verdict::Good(_) | Verdict::Unverified => match named {
                None if whole && self.mending.is_some_and(|mending| mending.is_old(&listed)) => {
                    self.trouble(trouble(Why::Orphan, "old, and no manifest names it")).await;
                }
                Some(size) if size.bytes != listed.bytes => {
                    let text = format!("{} bytes, and its manifest says {}", listed.bytes, size.bytes);
                    self.trouble(trouble(Why::Size, &text)).await;
                }
                _ => row.counts.well(named, listed.bytes, &verdict),
            },
        }
        self.patience.hear(silent)
    }

    /// Drops it, if that is asked for and it is no loss; else it is bad.
    async fn trouble(&mut self, trouble: Trouble) {
        let Some(mending) = self.mending.filter(|_| trouble.why.is_dropped()) else {
            return self.bad(trouble);
        };
        let keys = if mending.dry_run { &[][..] } else { std::slice::from_ref(&trouble.key) };
        match self.place.bucket.delete(keys, request_deadline()).await {
            Ok(()) => {
                self.summary.dropped += 1;
                self.report.row(&DroppedRow { trouble, dry_run: mending.dry_run });
            }
            Err(error) => self.bad(trouble.undropped(&error.to_string())),
        }
    }

    fn bad(&mut self, trouble: Trouble) {
        self.summary.bad += 1;
        self.report.row(&BadRow { trouble });
    }
}

impl Counts {
    fn well(&mut self, named: Option<Size>, bytes: u64, verdict: &Verdict) {
        if let Verdict::Good(verified) = verdict {
            self.verified_bytes += verified;
        }
        match named {
            Some(size) => {
                self.objects += 1;
                self.blocks += size.blocks;
                self.bytes += bytes;
            }
            None => {
                self.orphans += 1;
                self.orphan_bytes += bytes;
            }
        }
    }
}
