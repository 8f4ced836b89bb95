//! Every fault of the proxy: reads end by their deadline with the right bytes or an error; what is said to be stored is there.

use super::proxy::{FAULTS, Fault, Weather};
use super::rig::{Rig, TENANT, content, payload, soon, wishes};
use kvd_tiers::s3::bucket::BucketError;
use kvd_tiers::s3::upload::Put;
use kvd_tiers::s3::{Added, ObjectReader, ObjectRef};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Reads of each fault.
const READS: usize = 12;
/// What a hanging answer takes: longer than the bucket's patience.
const HANG: Duration = Duration::from_millis(1500);
/// How long a read may take.
const PATIENCE: Duration = Duration::from_secs(4);
/// How long after its deadline a read may come back on a busy machine.
const SLACK: Duration = Duration::from_secs(1);

/// How many of the reads were good; none may be wrong or late.
async fn good_reads(rig: &Rig, added: &[Added]) -> usize {
    let mut good = 0;
    for round in 0..READS {
        // Without a footer in memory, so that footers meet the fault too.
        let reader = ObjectReader::new(Arc::clone(&rig.bucket), 0);
        let (object, first) = (&added[round % 2], (round % 2) * 8);
        let wanted: Vec<(u32, usize)> = [0, 1, 2, 5, 6].map(|slot| (slot, first + slot as usize)).to_vec();
        let mut wishes = wishes(&wanted);
        let deadline = Instant::now() + PATIENCE;
        let read = reader.read(&ObjectRef::of_added(TENANT, object), &mut wishes, deadline).await;
        assert!(Instant::now() < deadline + SLACK, "{read:?} came late");
        if read.is_ok() {
            good += 1;
            for (wish, (_, number)) in wishes.iter().zip(&wanted) {
                assert!(wish.sink == payload(*number), "wrong bytes said to be good");
            }
        }
    }
    good
}

#[tokio::test]
async fn reads_under_every_fault_are_right_or_errors() {
    for (seed, fault) in FAULTS.into_iter().enumerate() {
        let rig = Rig::start(seed as u64).await;
        let added = rig.put_objects().await;
        rig.proxy.take();
        rig.proxy.set_fault(fault, 250, HANG);
        let good = good_reads(&rig, &added).await;
        let passed = rig.proxy.take();
        let done = passed.faults.get(&fault).copied().unwrap_or(0);
        println!(
            "{fault:?}: {good} of {READS} reads good, {done} faults in {} requests",
            passed.requests("GET")
        );
        assert!(done > 0, "{fault:?} was never done");
        assert!(good >= READS / 3, "{fault:?}: trying again should have helped");
    }
}

#[tokio::test]
async fn without_an_end_of_a_fault_every_read_is_an_error_in_time() {
    for fault in [Fault::Busy, Fault::ResetBefore, Fault::ResetInBody, Fault::Truncate, Fault::Flip] {
        let rig = Rig::start(9).await;
        let added = rig.put_objects().await;
        rig.proxy.set_fault(fault, 1000, HANG);
        let reader = ObjectReader::new(Arc::clone(&rig.bucket), 0);
        let deadline = Instant::now() + PATIENCE;
        let read =
            reader.read(&ObjectRef::of_added(TENANT, &added[0]), &mut wishes(&[(0, 0)]), deadline).await;
        assert!(read.is_err() && Instant::now() < deadline + SLACK, "{fault:?}: {read:?}");
    }
}

#[tokio::test]
async fn a_server_that_says_nothing_costs_no_more_than_the_deadline() {
    let rig = Rig::start(3).await;
    let added = rig.put_objects().await;
    rig.proxy.set_fault(Fault::Hang, 1000, Duration::from_mins(1));
    let (start, deadline) = (Instant::now(), Instant::now() + Duration::from_millis(200));
    let read =
        rig.reader.read(&ObjectRef::of_added(TENANT, &added[0]), &mut wishes(&[(0, 0)]), deadline).await;
    assert_eq!(read.map(|_| ()), Err(BucketError::Timeout.into()));
    assert!(start.elapsed() < Duration::from_millis(200) + SLACK);
}

#[tokio::test]
async fn what_came_before_a_break_is_not_asked_for_again() {
    let rig = Rig::start(4).await;
    let whole = content(4 << 20, 4);
    rig.bucket.put_if_absent("kvd/a", std::slice::from_ref(&whole), soon()).await.unwrap();
    let before = rig.bucket.counts();
    rig.proxy.set_fault(Fault::Truncate, 600, HANG);
    let mut read = Vec::new();
    let mut good = 0;
    for _ in 0..10 {
        good += usize::from(
            rig.bucket.get_range("kvd/a", 0..4 << 20, &mut read, soon()).await.is_ok_and(|()| read == whole),
        );
    }
    let counts = rig.bucket.counts();
    let came = counts.read_bytes - before.read_bytes;
    println!("{good} of 10 reads good, {came} bytes came, {} retries", counts.retries - before.retries);
    assert!(good > 0 && counts.retries > before.retries);
    assert!(came <= 10 * (4 << 20), "no byte came twice");
}

#[tokio::test]
async fn writes_under_every_fault_are_there_or_errors() {
    for (seed, fault) in FAULTS.into_iter().enumerate() {
        let rig = Rig::start(100 + seed as u64).await;
        rig.proxy.set_fault(fault, 300, HANG);
        let mut said = Vec::new();
        for number in 0..6_u8 {
            let key = format!("kvd/{number}");
            let deadline = Instant::now() + PATIENCE;
            let put = rig.bucket.put_if_absent(&key, &[content(100_000, number)], deadline).await;
            assert!(Instant::now() < deadline + SLACK, "{fault:?}: {put:?} came late");
            said.push((key, number, put));
        }
        rig.proxy.set(Weather::default());
        println!(
            "{fault:?}: {} of 6 writes said to be there",
            said.iter().filter(|(.., put)| put.is_ok()).count()
        );
        if fault == Fault::FlipSent {
            continue; // s3s-fs keeps what it then refuses for its checksum; what such an object is worth is the reader's to find
        }
        for (key, number, _) in said.iter().filter(|(.., put)| put.is_ok()) {
            let read = rig.bucket.get_bytes(key, 0..100_000, soon()).await;
            assert!(
                read.as_ref() == Ok(&content(100_000, *number)),
                "{fault:?}: {key} is not what was written"
            );
        }
        assert!(said.iter().any(|(.., put)| *put == Ok(Put::Stored)), "{fault:?}: {said:?}");
    }
}

#[tokio::test]
async fn an_upload_in_parts_survives_resets_or_leaves_nothing() {
    let rig = Rig::start(5).await;
    let pieces = [content(17 << 20, 1), content(17 << 20, 2)];
    for (number, fault) in [Fault::Busy, Fault::ResetBefore, Fault::ResetAfter].into_iter().enumerate() {
        rig.proxy.set_fault(fault, 200, HANG);
        let key = format!("kvd/{number}");
        let put = rig.bucket.put_if_absent(&key, &pieces, soon()).await;
        rig.proxy.set(Weather::default());
        let there = rig.bucket.head(&key, soon()).await.unwrap();
        println!("{fault:?}: {put:?}");
        assert_eq!(there, put.is_ok().then_some(34 << 20), "{fault:?}: {put:?}");
    }
}

/// A bit of an object that the bucket itself lost: found at every place, by the part it is in or by the footer.
#[tokio::test]
async fn a_bit_that_the_bucket_lost_is_never_served() {
    let rig = Rig::start(6).await;
    let added = rig.put_objects().await;
    let (file, object) = (rig.file(&added[0]), ObjectRef::of_added(TENANT, &added[0]));
    let whole = std::fs::read(&file).unwrap();
    let payload_bytes = added[0].footer_offset() as usize;
    for at in [0, 65_535, payload_bytes - 1, payload_bytes, payload_bytes + 40, payload_bytes + 600] {
        let mut damaged = whole.clone();
        damaged[at] ^= 4;
        std::fs::write(&file, &damaged).unwrap();
        let reader = ObjectReader::new(Arc::clone(&rig.bucket), 0);
        let mut wishes = wishes(&[(0, 0), (1, 1), (7, 7)]);
        let read = reader.read(&object, &mut wishes, soon()).await;
        assert!(matches!(read, Err(kvd_tiers::s3::reader::ReadError::Damaged { .. })), "byte {at}: {read:?}");
    }
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    assert!(rig.reader.read(&object, &mut wishes(&[(7, 7)]), soon()).await.is_err(), "cut in half");
}
