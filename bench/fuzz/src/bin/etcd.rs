//! What stands in etcd for a node: whoever may write there may write anything.
#![no_main]

use fuzz::budget::bounded;
use fuzz::material::Material;
use libfuzzer_sys::fuzz_target;
use rpc::KeyValue;

/// The node's own file, which is private to its crate; compiled here between the two names that it uses.
#[path = "../../../../kvd/src/cluster/etcd/record.rs"]
#[expect(dead_code, unreachable_pub, reason = "the session, which uses the rest, is not here")]
mod record;

/// As far as a record needs it.
mod cluster {
    pub(crate) use kvd::cluster::Member;
}

/// As far as a record needs it.
mod rpc {
    #[derive(Debug, Default)]
    pub(crate) struct KeyValue {
        pub(crate) key: Vec<u8>,
        pub(crate) value: Vec<u8>,
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut material = Material(bytes);
    let folder = record::folder("/kvd");
    let key = material.piece();
    let key = if material.one_in(4) { key.to_vec() } else { [folder.as_bytes(), key].concat() };
    let found = KeyValue { key, value: material.0.to_vec() };
    let named = record::name(&folder, &found);
    let Some(member) = bounded(bytes.len(), 4, || record::decode(&folder, &found)) else { return };
    assert_eq!(Some(&member.name), named.as_ref());
    let again = KeyValue { key: found.key.clone(), value: record::encode(&member) };
    assert_eq!(record::decode(&folder, &again), Some(member));
});
