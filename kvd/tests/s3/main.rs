//! `kvd inspect s3`, `kvd repair s3` and `kvd check` against an S3 server in this process: what is whole is counted, what was
//! changed is named, dropping drops that alone, and nothing else is touched.

#[path = "../../../tiers/tests/s3/proxy.rs"]
#[allow(dead_code)] // the tiers' own tests need more of it
mod proxy;
#[path = "../../../tiers/tests/s3/rig.rs"]
#[allow(dead_code)] // as above
mod rig;
#[path = "../../../tiers/tests/s3/server.rs"]
#[allow(dead_code)] // as above
mod server;

mod left;

use left::Left;
use proxy::{Fault, Weather};
use std::time::Duration;

#[tokio::test]
async fn a_healthy_bucket_is_counted_whole() {
    let left = Left::behind().await;
    let said = left.kvd(&["inspect", "s3", "--verify"]).await;
    said.is_well();
    let tenants = said.of("tenant");
    assert_eq!(tenants.len(), 2, "{tenants:?}");
    let first = tenants[0];
    assert_eq!((first["tenant"].as_str(), first["nodes"].as_u64()), (Some(rig::TENANT), Some(2)));
    let counts =
        ["manifests", "objects", "blocks", "orphans", "gone", "foreign"].map(|key| first[key].as_u64());
    assert_eq!(counts, [3, 5, 20, 1, 0, 0].map(Some));
    assert_eq!(first["verified_bytes"].as_u64(), Some(24 * rig::SLOT as u64), "orphans, too");
    assert_eq!((tenants[1]["tenant"].as_str(), tenants[1]["objects"].as_u64()), (Some("other"), Some(1)));
    let counts = ["tenants", "objects", "foreign", "bad"].map(|key| said.summary()[key].as_u64());
    assert_eq!(counts, [2, 6, 2, 0].map(Some), "a key and a folder of nobody's");
    let one = left.kvd(&["inspect", "s3", "--tenant", "other"]).await;
    assert_eq!((one.code, one.of("tenant").len(), one.summary()["objects"].as_u64()), (0, 1, Some(1)));
    assert_eq!(one.summary()["verified_bytes"], 0);
    let table = left.text(&["inspect", "s3"]).await;
    let lines: Vec<_> = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
    assert_eq!(lines[1][..5], ["a.tenant", "2", "3", "5", "20"], "{table}");
    assert!(table.ends_with("6 objects, 24 blocks, 1.5 MiB, 0 B verified, 0 bad, 1 orphans\n"), "{table}");
}

#[tokio::test]
async fn what_was_changed_is_named_and_dropping_drops_that_alone() {
    let left = Left::behind().await;
    left.truncate(0);
    left.flip(1);
    left.put_under_another_key(3, 2);
    left.cut_manifest();
    let (first, manifest) = (left.keys(&[0]), left.cut.clone());
    let expected = left::sorted([left.keys(&[0, 1, 2]), vec![manifest.clone()]].concat());

    let looked = left.kvd(&["inspect", "s3"]).await;
    assert_eq!((looked.code, looked.keys("bad")), (1, left::sorted([first, vec![manifest]].concat())));
    let said = left.kvd(&["inspect", "s3", "--verify"]).await;
    assert_eq!((said.code, said.keys("bad")), (1, expected.clone()));
    let before = left.files();
    let would = left.kvd(&["repair", "s3", "--dry-run"]).await;
    assert_eq!((would.code, would.keys("dropped")), (1, expected.clone()));
    assert!(before == left.files(), "a dry run writes nothing, and neither does inspect");

    let mended = left.kvd(&["repair", "s3"]).await;
    assert_eq!((mended.code, mended.keys("dropped"), mended.keys("bad")), (0, expected.clone(), vec![]));
    let mut kept = before;
    kept.retain(|key, _| !expected.contains(key));
    assert!(kept == left.files(), "what was dropped, and nothing else, is gone");
    let again = left.kvd(&["inspect", "s3", "--verify"]).await;
    again.is_well();
    let counts = ["objects", "gone", "orphans"].map(|key| again.of("tenant")[0][key].as_u64());
    assert_eq!(counts, [1, 3, 2].map(Some), "of the manifest that was cut, the object is nobody's");
}

#[tokio::test]
async fn objects_that_nobody_names_go_when_they_are_old_and_all_manifests_were_read() {
    let left = Left::behind().await;
    left.age(left::ORPHAN, Duration::from_hours(25));
    left.age(0, Duration::from_hours(2500));
    let orphan = left.keys(&[left::ORPHAN]);
    left.set_manifest_version(2);
    let newer = left.kvd(&["repair", "s3"]).await;
    newer.is_well();
    assert_eq!((newer.summary()["other_version"].as_u64(), newer.keys("dropped")), (Some(1), vec![]));
    left.set_manifest_version(1);
    left.cut_manifest();
    let cut = left.kvd(&["repair", "s3"]).await;
    assert_eq!((cut.code, cut.keys("dropped")), (0, vec![left.cut.clone()]));
    let whole = left.kvd(&["repair", "s3"]).await;
    assert_eq!((whole.code, whole.keys("dropped")), (0, orphan), "not what is young, nor what is named");
    left.kvd(&["inspect", "s3", "--verify"]).await.is_well();
}

#[tokio::test]
async fn bad_weather_is_not_taken_for_damage_and_a_bucket_that_is_away_ends_it() {
    let left = Left::behind().await;
    let faults = [Fault::Busy, Fault::ResetBefore, Fault::ResetInBody, Fault::Truncate];
    let per_mille = faults.map(|fault| (fault, 60)).to_vec();
    left.rig.proxy.set(Weather { per_mille, ..Weather::default() });
    let said = left.kvd(&["inspect", "s3", "--verify"]).await;
    said.is_well();
    assert!(left.rig.proxy.take().faults.len() > 1, "the weather was bad");
    left.rig.proxy.set_fault(Fault::Busy, 1000, Duration::ZERO);
    let away = left.kvd(&["inspect", "s3", "--verify"]).await;
    assert_eq!((away.code, away.rows.len()), (1, 0));
    assert!(away.errors.contains("busy"), "{}", away.errors);
}

#[tokio::test]
async fn a_check_says_what_the_bucket_lets_us_do() {
    let left = Left::behind().await;
    let before = left.files();
    let line = left.check().await;
    assert!(
        line.contains("ok ") && line.contains("conditional writes") && line.contains("below \"kvd\""),
        "{line}"
    );
    left.rig.proxy.set(Weather { unconditional: true, ..Weather::default() });
    let line = left.check().await;
    assert!(line.contains("without conditional writes") && line.contains("nothing must be done"), "{line}");
    assert!(before == left.files(), "a check leaves nothing");
    left.rig.proxy.set(Weather::default());
    left.write_keys("AKEY\nwrong\n");
    let line = left.check().await;
    assert!(
        line.starts_with("without") && line.contains("list, put: ") && line.contains("access key"),
        "{line}"
    );
    left.write_keys("one line\n");
    assert!(left.check().await.contains("s3.keys_file"));
}
