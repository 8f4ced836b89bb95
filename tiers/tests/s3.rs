//! A bucket against an S3 server in this process, in good weather and behind a proxy with bad days.
//!
//! What must hold whatever the weather: a read ends by its deadline, with the right bytes or with an error.

#[path = "s3/proxy.rs"]
mod proxy;
#[path = "s3/rig.rs"]
mod rig;
#[path = "s3/server.rs"]
#[allow(dead_code)] // `bench` needs some of it
mod server;

#[path = "s3/faults.rs"]
mod faults;

use bytes::Bytes;
use kvd_tiers::s3::bucket::{BucketConfig, BucketError};
use kvd_tiers::s3::manifest::{Entry, Manifest};
use kvd_tiers::s3::name::{ManifestKey, ObjectName, manifests_prefix};
use kvd_tiers::s3::upload::Put;
use kvd_tiers::s3::{Bucket, ObjectRef, S3Index};
use proxy::Weather;
use rig::{GROUP, Rig, SLOT, TENANT, chain, content, soon, space, wishes};

#[tokio::test]
async fn objects_are_put_read_listed_and_deleted() {
    let rig = Rig::start(1).await;
    let content = content(100_000, 1);
    let pieces = [content.slice(..1), content.slice(1..70_000), content.slice(70_000..)];
    assert_eq!(rig.bucket.put_if_absent("kvd/a", &pieces, soon()).await, Ok(Put::Stored));
    assert_eq!(rig.bucket.put_if_absent("kvd/a", &pieces[..1], soon()).await, Ok(Put::Present));
    assert_eq!(rig.bucket.get_bytes("kvd/a", 5..70_001, soon()).await.unwrap(), content.slice(5..70_001));
    let ranges =
        [(0..10), (99_999..100_000), (500..600)].map(|range| ("kvd/a".to_owned(), range, Vec::new()));
    let read = rig.bucket.get_ranges(ranges, soon()).await;
    let read: Vec<Vec<u8>> = read.into_iter().collect::<Result<_, _>>().unwrap();
    assert_eq!(read, [&content[0..10], &content[99_999..], &content[500..600]]);
    assert_eq!(rig.bucket.head("kvd/a", soon()).await, Ok(Some(100_000)));
    for key in ["kvd/b", "kvd/c/d", "other"] {
        rig.bucket.put_if_absent(key, &pieces[..1], soon()).await.unwrap();
    }
    let keys = |listed: Vec<kvd_tiers::s3::Listed>| listed.into_iter().map(|one| one.key).collect::<Vec<_>>();
    assert_eq!(keys(rig.bucket.list("kvd/", "", 10, soon()).await.unwrap()), ["kvd/a", "kvd/b", "kvd/c/d"]);
    assert_eq!(keys(rig.bucket.list("kvd/", "kvd/a", 1, soon()).await.unwrap()), ["kvd/b"]);
    rig.bucket.delete(&["kvd/a".to_owned(), "kvd/never".to_owned()], soon()).await.unwrap();
    assert_eq!(rig.bucket.head("kvd/a", soon()).await, Ok(None));
    assert_eq!(rig.bucket.get_bytes("kvd/a", 0..1, soon()).await, Err(BucketError::Gone));
}

#[tokio::test]
async fn an_object_that_is_shorter_than_asked_for_is_no_answer() {
    let rig = Rig::start(1).await;
    rig.bucket.put_if_absent("kvd/a", &[content(1000, 1)], soon()).await.unwrap();
    assert_eq!(rig.bucket.get_bytes("kvd/a", 0..1001, soon()).await, Err(BucketError::Truncated));
    assert_eq!(rig.bucket.get_bytes("kvd/a", 1000..1001, soon()).await, Err(BucketError::Truncated));
    assert_eq!(rig.bucket.get_bytes("kvd/a", 0..0, soon()).await, Ok(Bytes::new()));
    assert!(matches!(
        rig.bucket.get_bytes("kvd/a", 0..1 << 40, soon()).await,
        Err(BucketError::Unexpected(_))
    ));
}

#[tokio::test]
async fn of_two_writers_one_stores() {
    let rig = Rig::start(1).await;
    let other = Bucket::open(rig.config.clone()).await.unwrap();
    for round in 0..8 {
        let (key, small) = (format!("kvd/{round}"), [content(2000, round)]);
        let puts = tokio::join!(
            rig.bucket.put_if_absent(&key, &small, soon()),
            other.put_if_absent(&key, &small, soon())
        );
        assert!(
            matches!(puts, (Ok(Put::Stored), Ok(Put::Present)) | (Ok(Put::Present), Ok(Put::Stored))),
            "{puts:?}"
        );
    }
}

#[tokio::test]
async fn large_objects_go_in_parts_and_only_if_there_is_none() {
    let rig = Rig::start(1).await;
    let pieces: Vec<Bytes> = (0..9).map(|number| content((5 << 20) + 13, number)).collect();
    rig.proxy.take();
    assert_eq!(rig.bucket.put_if_absent("kvd/big", &pieces, soon()).await, Ok(Put::Stored));
    let passed = rig.proxy.take();
    assert_eq!(
        (passed.requests("PUT"), passed.requests("POST")),
        (3, 2),
        "three parts, a beginning and an end"
    );
    let whole = Bytes::from(pieces.concat());
    let mut read = Vec::new();
    rig.bucket.get_range("kvd/big", 0..whole.len() as u64, &mut read, soon()).await.unwrap();
    assert!(read == whole, "the bytes are the pieces, in order");
    assert_eq!(rig.bucket.put_if_absent("kvd/big", &pieces, soon()).await, Ok(Put::Present));
    assert_eq!(rig.proxy.take().requests("DELETE"), 1, "what was uploaded for nothing is removed");
}

#[tokio::test]
async fn a_server_that_knows_no_conditions_is_asked_first() {
    let rig = Rig::start(1).await;
    rig.proxy.set(Weather { unconditional: true, ..Weather::default() });
    let small = [content(1000, 1)];
    assert_eq!(rig.bucket.put_if_absent("kvd/a", &small, soon()).await, Ok(Put::Stored));
    assert!(rig.bucket.asks_first());
    rig.proxy.take();
    assert_eq!(rig.bucket.put_if_absent("kvd/a", &small, soon()).await, Ok(Put::Present));
    let passed = rig.proxy.take();
    assert_eq!((passed.requests("HEAD"), passed.requests("PUT")), (1, 0));
    assert_eq!(rig.bucket.put_if_absent("kvd/b", &[content(20 << 20, 2)], soon()).await, Ok(Put::Stored));
    let findings = rig.bucket.check(soon()).await;
    let problems: Vec<_> =
        findings.iter().filter_map(|found| Some((found.step, found.problem.as_ref()?))).collect();
    assert_eq!(problems.len(), 1, "{findings:?}");
    assert!(problems[0].1.to_string().contains("If-None-Match"));
}

#[tokio::test]
async fn a_check_finds_what_is_wrong_and_leaves_nothing() {
    let rig = Rig::start(1).await;
    let steps: Vec<_> =
        rig.bucket.check(soon()).await.into_iter().map(|found| (found.step, found.problem)).collect();
    let expected = ["list", "put", "put only if absent", "get a range", "delete"].map(|step| (step, None));
    assert_eq!(steps, expected);
    assert!(rig.bucket.list("", "", 10, soon()).await.unwrap().is_empty());
    let keys = Some(("AKEY".to_owned(), "wrong".to_owned()));
    let refused = Bucket::open(BucketConfig { keys, ..rig.config.clone() }).await.unwrap();
    let findings = refused.check(soon()).await;
    assert_eq!(findings.len(), 2, "what cannot work is not tried");
    assert!(findings.iter().all(|found| found.problem.as_ref().unwrap().to_string().contains("access key")));
    let nobody = "http://127.0.0.1:1".to_owned();
    let away = Bucket::open(BucketConfig { endpoint: nobody, ..rig.config.clone() }).await.unwrap();
    assert!(away.check(soon()).await[0].problem.as_ref().unwrap().to_string().contains("endpoint"));
}

#[tokio::test]
async fn equal_reads_at_one_time_are_one_request() {
    let rig = Rig::start(1).await;
    rig.bucket.put_if_absent("kvd/a", &[content(1000, 1)], soon()).await.unwrap();
    rig.proxy.take();
    let (one, two) = tokio::join!(
        rig.bucket.get_bytes("kvd/a", 0..100, soon()),
        rig.bucket.get_bytes("kvd/a", 0..100, soon())
    );
    assert_eq!((one.clone(), rig.proxy.take().requests("GET")), (two, 1));
    assert_eq!(one.unwrap(), content(1000, 1).slice(..100));
}

/// The way of a block: packed, put, named in a manifest, found by another node, read, and gone.
#[tokio::test]
async fn what_one_node_packs_another_finds_and_reads() {
    let rig = Rig::start(1).await;
    let added = rig.put_objects().await;
    let key = ManifestKey { tenant: TENANT.to_owned(), node: "one".to_owned(), write_epoch: 3, sequence: 0 };
    let entries = added.iter().cloned().map(Entry::Added).collect();
    let manifest = Manifest { key: key.clone(), replaces_before: (0, 0), entries };
    rig.bucket.put_if_absent(&key.key("kvd"), &[manifest.encode().into()], soon()).await.unwrap();

    let mut index = S3Index::new(1000);
    for listed in rig.bucket.list(&manifests_prefix("kvd", TENANT), "", 100, soon()).await.unwrap() {
        let bytes = rig.bucket.get_bytes(&listed.key, 0..listed.bytes, soon()).await.unwrap();
        let manifest = Manifest::decode(&bytes).unwrap();
        assert!(manifest.is_of(&ManifestKey::from_key("kvd", TENANT, &listed.key).unwrap()));
        index.apply(manifest).unwrap();
    }
    let places = index.find(&space(), GROUP, &chain(), 0);
    assert_eq!(places.len(), chain().len());
    for (number, place) in places.iter().enumerate() {
        let object = ObjectRef::of_known(index.object(place.object));
        let mut wishes = wishes(&[(place.slot, number)]);
        rig.reader.read(&object, &mut wishes, soon()).await.unwrap();
        assert!(wishes[0].sink == rig::payload(number));
    }
    let object = added[0].object;
    rig.bucket.delete(&[object.key("kvd", TENANT)], soon()).await.unwrap();
    let read = rig.reader.read(&ObjectRef::of_added(TENANT, &added[0]), &mut wishes(&[(0, 0)]), soon()).await;
    assert_eq!(read.map(|_| ()), Err(BucketError::Gone.into()));
    assert!(index.remove_object(TENANT, object));
    assert!(index.find(&space(), GROUP, &chain(), 0).is_empty());
}

#[tokio::test]
async fn slots_that_lie_together_are_one_request_and_footers_are_kept() {
    let rig = Rig::start(1).await;
    let added = rig.put_objects().await;
    let object = ObjectRef::of_added(TENANT, &added[0]);
    rig.proxy.take();
    for expected in [2, 1] {
        let mut wishes = wishes(&[(1, 1), (2, 2), (3, 3)]);
        rig.reader.read(&object, &mut wishes, soon()).await.unwrap();
        assert!(wishes.iter().zip(1..).all(|(wish, number)| wish.sink == rig::payload(number)));
        assert_eq!(rig.proxy.take().requests("GET"), expected);
    }
    let fresh = kvd_tiers::s3::ObjectReader::new(rig.reader.bucket().clone(), 1 << 20);
    assert_eq!(fresh.look(TENANT, object.object, soon()).await, Ok(object.clone()), "by its name alone");
    assert!(fresh.look("another", object.object, soon()).await.is_err());
}

/// Law 1: what is there under the right name, whole and intact, and is not what was asked for.
#[tokio::test]
async fn another_block_another_slot_another_object_are_never_good() {
    let rig = Rig::start(1).await;
    let added = rig.put_objects().await;
    let object = ObjectRef::of_added(TENANT, &added[0]);
    for wrong in [
        wishes(&[(1, 2)]),
        wishes(&[(object.slots, 1)]),
        wishes(&[(1, 1)])
            .into_iter()
            .map(|wish| kvd_tiers::s3::reader::Wish { group: GROUP + 1, ..wish })
            .collect(),
    ] {
        let mut wrong = wrong;
        assert!(rig.reader.read(&object, &mut wrong, soon()).await.is_err(), "{wrong:?}");
    }
    let lies = [
        ObjectRef { object: added[1].object, ..object.clone() },
        ObjectRef { slots: object.slots - 1, ..object.clone() },
        ObjectRef { parts: object.parts * 2, ..object.clone() },
        ObjectRef { footer_bytes: object.footer_bytes - 1, ..object.clone() },
    ];
    let fresh = kvd_tiers::s3::ObjectReader::new(rig.reader.bucket().clone(), 1 << 20);
    for lie in lies {
        assert!(fresh.read(&lie, &mut wishes(&[(0, 0)]), soon()).await.is_err(), "{lie:?}");
    }
    rig.swap_objects(&added[0], &added[1]);
    let fresh = kvd_tiers::s3::ObjectReader::new(rig.reader.bucket().clone(), 1 << 20);
    assert!(
        fresh.read(&object, &mut wishes(&[(0, 0)]), soon()).await.is_err(),
        "another object under the key"
    );
    assert_eq!(added[0].slot_bytes as usize, SLOT);
    assert!(ObjectName::from_key("kvd", TENANT, &object.object.key("kvd", TENANT)).is_some());
}
