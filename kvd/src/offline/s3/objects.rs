//! Whether an object is what its name stands for: its footer, and every part by the footer's checksum.
//!
//! Invariant: damaged is only what came whole and twice and is wrong; what did not come is unreadable, and what another
//! version of kvd wrote is neither.

use super::{Place, read_deadline};
use kvd_tiers::s3::bucket::{BucketError, Sink};
use kvd_tiers::s3::footer::{TRAILER_BYTES, Trailer};
use kvd_tiers::s3::reader::{ReadError, Wish};
use kvd_tiers::s3::{ObjectName, ObjectReader};
use std::sync::Arc;
use tokio::task::JoinSet;

/// What came of reading an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nobody looked.
    Unverified,
    /// Every part of so many bytes is right.
    Good(u64),
    OtherVersion,
    /// Deleted since it was listed.
    Gone,
    Damaged(String),
    Unreadable(String),
}

/// Bytes are only summed up.
struct Nowhere;

impl Sink for Nowhere {
    fn write(&mut self, _: u64, _: &[u8]) {}
}

/// One for each object, in their order; all are read at one time.
pub(super) async fn verify(place: &Place, tenant: &str, objects: &[ObjectName]) -> Vec<Verdict> {
    let mut reads = JoinSet::new();
    for (at, &object) in objects.iter().enumerate() {
        let (reader, tenant) = (Arc::clone(&place.reader), tenant.to_owned());
        reads.spawn(async move { (at, verdict(&reader, &tenant, object).await) });
    }
    let mut read = reads.join_all().await;
    read.sort_by_key(|(at, _)| *at);
    read.into_iter().map(|(_, verdict)| verdict).collect()
}

async fn verdict(reader: &ObjectReader, tenant: &str, object: ObjectName) -> Verdict {
    let read = match read(reader, tenant, object).await {
        // what the way did to it, another look may not find
        Err(ReadError::Damaged { .. }) => read(reader, tenant, object).await,
        read => read,
    };
    match read {
        Ok(bytes) => Verdict::Good(bytes),
        Err(ReadError::Bucket(BucketError::Gone)) => Verdict::Gone,
        Err(ReadError::Bucket(error)) => Verdict::Unreadable(error.to_string()),
        Err(ReadError::Damaged { what, .. }) => damaged(reader, tenant, object, what).await,
    }
}

/// Every part of every slot; how many bytes that was.
async fn read(reader: &ObjectReader, tenant: &str, object: ObjectName) -> Result<u64, ReadError> {
    let deadline = read_deadline();
    let found = reader.look(tenant, object, deadline).await?;
    let footer = reader.footer(&found, deadline).await?;
    let wish = |(slot, header): (usize, &kvd_proto::slot_header::SlotHeader)| Wish {
        slot: slot as u32,
        fingerprint: header.fingerprint,
        group: header.group,
        id: header.id,
        sink: Nowhere,
    };
    let mut wishes: Vec<_> = footer.slots.iter().enumerate().map(wish).collect();
    reader.read(&found, &mut wishes, deadline).await?;
    Ok(footer.offset())
}

/// Not, where it ends as a later version's does.
async fn damaged(reader: &ObjectReader, tenant: &str, object: ObjectName, what: String) -> Verdict {
    let key = object.key(&reader.bucket().config().prefix, tenant);
    match reader.bucket().get_tail(&key, TRAILER_BYTES as u64, read_deadline()).await {
        Ok((tail, _)) if tail.first_chunk().is_some_and(Trailer::is_of_another_version) => {
            Verdict::OtherVersion
        }
        Ok(_) => Verdict::Damaged(what),
        Err(BucketError::Gone) => Verdict::Gone,
        Err(error) => Verdict::Unreadable(error.to_string()),
    }
}
