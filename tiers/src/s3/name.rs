//! Names in a bucket: of objects and of manifests. Bytes: `FORMAT.md`, "S3 objects" and "S3 manifests".
//!
//! Invariant: a key is made of its parts in one way and read back to exactly those parts; no tenant or node name can leave
//! its place in the key.
//! Leaves to others: the bucket, and what is under a key.

use kvd_proto::limits::TENANT_BYTES_MAX;
use std::fmt::{self, Write as _};

/// Longest name of a node. At the limit: `manifest_key` asserts; the config refuses longer names.
pub const NODE_BYTES_MAX: usize = 253;

/// Names an object: the first 16 bytes of BLAKE3 of its footer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName(pub [u8; 16]);

impl ObjectName {
    /// The name of the object that has this footer.
    pub fn of_footer(footer: &[u8]) -> Self {
        let digest = blake3::hash(footer);
        Self(std::array::from_fn(|at| digest.as_bytes()[at]))
    }

    /// Its key below the bucket.
    pub fn key(&self, prefix: &str, tenant: &str) -> String {
        format!("{}{:02x}/{self}", objects_prefix(prefix, tenant), self.0[0])
    }

    /// The object of a key that `key` made.
    pub fn from_key(prefix: &str, tenant: &str, key: &str) -> Option<Self> {
        let (_, digits) = key.strip_prefix(&objects_prefix(prefix, tenant))?.split_once('/')?;
        let name = Self(u128::from_str_radix(digits, 16).ok()?.to_be_bytes());
        (name.key(prefix, tenant) == key).then_some(name)
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ObjectName({self})")
    }
}

/// Which manifest: whose, of which life, the how many-th.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestKey {
    /// Whose blocks.
    pub tenant: String,
    /// The node that wrote it.
    pub node: String,
    /// Its write epoch.
    pub write_epoch: u64,
    /// Counts from 0 in each epoch.
    pub sequence: u32,
}

impl ManifestKey {
    /// The key below the bucket.
    pub fn key(&self, prefix: &str) -> String {
        assert!((1..=NODE_BYTES_MAX).contains(&self.node.len()), "{self:?}");
        let folder = manifests_prefix(prefix, &self.tenant);
        format!("{folder}{}/{:016x}-{:08x}", encoded(&self.node), self.write_epoch, self.sequence)
    }

    /// The manifest of a key that `key` made.
    pub fn from_key(prefix: &str, tenant: &str, key: &str) -> Option<Self> {
        let (node, place) = key.strip_prefix(&manifests_prefix(prefix, tenant))?.split_once('/')?;
        let (write_epoch, sequence) = place.split_once('-')?;
        let found = Self {
            tenant: tenant.to_owned(),
            node: decoded(node).filter(|node| (1..=NODE_BYTES_MAX).contains(&node.len()))?,
            write_epoch: u64::from_str_radix(write_epoch, 16).ok()?,
            sequence: u32::from_str_radix(sequence, 16).ok()?,
        };
        (found.key(prefix) == key).then_some(found)
    }
}

/// The tenant of a key below the prefix, whatever else the key is.
pub fn tenant_of_key(prefix: &str, key: &str) -> Option<String> {
    let (tenant, _) = key.strip_prefix(&below(prefix, ""))?.split_once('/')?;
    decoded(tenant).filter(|name| (1..=TENANT_BYTES_MAX).contains(&name.len()) && encoded(name) == tenant)
}

/// Where a tenant's objects are.
pub fn objects_prefix(prefix: &str, tenant: &str) -> String {
    format!("{}objects/", tenant_prefix(prefix, tenant))
}

/// Where all nodes' manifests of a tenant are.
pub fn manifests_prefix(prefix: &str, tenant: &str) -> String {
    format!("{}manifests/", tenant_prefix(prefix, tenant))
}

/// A key below the prefix of the bucket.
pub(super) fn below(prefix: &str, rest: &str) -> String {
    if prefix.is_empty() { rest.to_owned() } else { format!("{prefix}/{rest}") }
}

fn tenant_prefix(prefix: &str, tenant: &str) -> String {
    assert!((1..=TENANT_BYTES_MAX).contains(&tenant.len()), "tenant {tenant:?}");
    below(prefix, &format!("{}/", encoded(tenant)))
}

/// Percent-encoded, dots too: no name is `..`, and no store that keeps keys as paths is led astray.
fn encoded(name: &str) -> String {
    name.bytes().fold(String::new(), |mut out, byte| {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => out.push(char::from(byte)),
            _ => write!(out, "%{byte:02X}").expect("a String grows"),
        }
        out
    })
}

fn decoded(text: &str) -> Option<String> {
    let (mut out, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        out.push(if byte == b'%' {
            let (digits, after) = rest.split_at_checked(2)?;
            rest = after;
            u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?
        } else {
            byte
        });
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keys_read_as_the_format_says() {
        let name = ObjectName(std::array::from_fn(|at| at as u8 + 0xA0));
        assert_eq!(
            name.key("pre/fix", "a.b/c"),
            "pre/fix/a%2Eb%2Fc/objects/a0/a0a1a2a3a4a5a6a7a8a9aaabacadaeaf"
        );
        assert!(name.key("", "default").starts_with("default/objects/a0/"));
        let key = ManifestKey { tenant: "t".into(), node: "n-1.x".into(), write_epoch: 0xE, sequence: 17 };
        assert_eq!(key.key("p"), "p/t/manifests/n-1%2Ex/000000000000000e-00000011");
    }

    #[test]
    fn other_spellings_of_a_key_are_no_key() {
        let name = ObjectName([0xAB; 16]);
        let key = name.key("p", "t");
        assert_eq!(ObjectName::from_key("p", "t", &key), Some(name));
        for other in [key.to_uppercase(), key.replace("/ab/", "/ac/"), format!("{key}0"), key[1..].to_owned()]
        {
            assert_eq!(ObjectName::from_key("p", "t", &other), None, "{other}");
        }
        for other in
            ["p/t/manifests/n/+1-2", "p/t/manifests/n/1-2", "p/t/manifests//x", "p/t/manifests/%zz/0-0"]
        {
            assert_eq!(ManifestKey::from_key("p", "t", other), None, "{other}");
        }
        for other in ["p/t", "q/t/x", "pt/x", "p//x", "p/a.b/x", "p/%2/x", "p/%41/x"] {
            assert_eq!(tenant_of_key("p", other), None, "{other}");
        }
    }

    proptest! {
        #[test]
        fn keys_round_trip(tenant in ".{1,16}", node in ".{1,40}", write_epoch in any::<u64>(), sequence in any::<u32>()) {
            let key = ManifestKey { tenant: tenant.clone(), node, write_epoch, sequence };
            let text = key.key("p");
            prop_assert!(!text.contains("..") && text.matches('/').count() == 4);
            prop_assert_eq!(ManifestKey::from_key("p", &tenant, &text), Some(key));
            prop_assert_eq!(tenant_of_key("p", &text), Some(tenant));
        }

        #[test]
        fn any_text_never_panics(text in ".*") {
            prop_assert_eq!(ObjectName::from_key("", "t", &text), None);
            prop_assert_eq!(ManifestKey::from_key("", "t", &text), None);
            let _ = tenant_of_key("", &text);
        }
    }
}
