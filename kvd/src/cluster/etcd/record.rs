//! What stands in etcd for one node: proto/FORMAT.md section 8.
//!
//! Owns that format. Invariants: what does not decode is no member, and harms nobody; unknown fields of a later version
//! are skipped. Leaves to others: leases and revisions (`session`).

use super::rpc::KeyValue;
use crate::cluster::Member;
use kvd_proto::Error;
use serde::{Deserialize, Serialize};

/// A node's name: a DNS name's length. At the limit: refused at the start; of another node: not a member.
pub const NAME_BYTES_MAX: usize = 253;
/// host:port. At the limit: as above.
pub const ADDRESS_BYTES_MAX: usize = 260;

#[derive(Serialize, Deserialize)]
struct Record {
    address: String,
    epoch: u64,
    /// Which kvd it is, for people.
    #[serde(default)]
    version: String,
}

/// The folder of all nodes. Slashes at the prefix's end do not matter.
pub(super) fn folder(prefix: &str) -> String {
    format!("{}/nodes/", prefix.trim_end_matches('/'))
}

/// The first key behind all keys that begin with `folder`: its last byte, a slash, and one.
pub(super) fn folder_end(folder: &str) -> String {
    let inside = folder.strip_suffix('/').expect("a folder ends with a slash");
    format!("{inside}0")
}

pub(super) fn check(me: &Member) -> Result<(), Error> {
    if me.name.is_empty() || me.name.len() > NAME_BYTES_MAX {
        let message = format!("`{}` has {} bytes", me.name, me.name.len());
        return Err(Error::invalid("node_name", message, format!("use 1 to {NAME_BYTES_MAX} bytes")));
    }
    let port = me.address.rsplit_once(':').and_then(|(host, port)| (!host.is_empty()).then_some(port));
    let port = port.and_then(|port| port.parse::<u16>().ok()).filter(|port| *port != 0);
    if port.is_none() || me.address.len() > ADDRESS_BYTES_MAX {
        let message = format!("`{}` is no host:port that others can dial", me.address);
        return Err(Error::invalid(
            "cluster.address",
            message,
            "give an address of this node, as 10.0.0.1:7700",
        ));
    }
    Ok(())
}

pub(super) fn encode(me: &Member) -> Vec<u8> {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let record = Record { address: me.address.clone(), epoch: me.epoch, version };
    serde_json::to_vec(&record).expect("a record of texts and a number is JSON")
}

/// The member's name, whether or not there is anything at its key.
pub(super) fn name(folder: &str, found: &KeyValue) -> Option<String> {
    let name = std::str::from_utf8(&found.key).ok()?.strip_prefix(folder)?;
    (!name.is_empty() && name.len() <= NAME_BYTES_MAX).then(|| name.to_owned())
}

pub(super) fn decode(folder: &str, found: &KeyValue) -> Option<Member> {
    let name = name(folder, found)?;
    let record: Record = serde_json::from_slice(&found.value).ok()?;
    let member = Member { name, address: record.address, epoch: record.epoch };
    check(&member).is_ok().then_some(member)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(key: &str, value: &[u8]) -> KeyValue {
        KeyValue { key: key.to_owned().into(), value: value.to_vec().into(), ..KeyValue::default() }
    }

    #[test]
    fn a_member_comes_back_as_it_was() {
        let me = Member { name: "a/b".to_owned(), address: "[::1]:7700".to_owned(), epoch: u64::MAX };
        let folder = folder("/kvd//");
        assert_eq!(folder, "/kvd/nodes/");
        assert_eq!(decode(&folder, &found("/kvd/nodes/a/b", &encode(&me))), Some(me));
        assert!(*"/kvd/nodes/\u{10ffff}" < *folder_end(&folder));
    }

    #[test]
    fn the_bytes_are_those_of_the_format() {
        let me = Member { name: "one".to_owned(), address: "10.0.0.1:7700".to_owned(), epoch: 7 };
        let written = String::from_utf8(encode(&me)).unwrap();
        let version = env!("CARGO_PKG_VERSION");
        assert_eq!(written, format!(r#"{{"address":"10.0.0.1:7700","epoch":7,"version":"{version}"}}"#));
        let example = br#"{"address":"10.0.0.1:7700","epoch":7,"version":"0.1.0"}"#;
        assert_eq!(decode("/kvd/nodes/", &found("/kvd/nodes/one", example)), Some(me));
    }

    #[test]
    fn what_is_no_record_is_no_member() {
        let good = br#"{"address":"a:1","epoch":1,"new":[]}"#;
        assert!(decode("/nodes/", &found("/nodes/a", good)).is_some());
        let long = "x".repeat(NAME_BYTES_MAX + 1);
        for key in ["/nodes/", "/nodesa", "/else/a", &format!("/nodes/{long}")] {
            assert_eq!(decode("/nodes/", &found(key, good)), None, "{key}");
        }
        for value in ["", "{}", "7", r#"{"address":"a:0","epoch":1}"#, r#"{"address":":1","epoch":1}"#] {
            assert_eq!(decode("/nodes/", &found("/nodes/a", value.as_bytes())), None, "{value}");
        }
        assert_eq!(decode("/nodes/", &found("/nodes/a", br#"{"address":"a:1","epoch":-1}"#)), None);
        assert!(check(&Member { name: long, address: "a:1".to_owned(), epoch: 0 }).is_err());
    }
}
