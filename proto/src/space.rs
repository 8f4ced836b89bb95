//! A space: what a block's KV means, over *meaning* and not over who computed it. Bytes: `FORMAT.md` section 1.
//!
//! Invariant: two engines whose spaces have one fingerprint may read each other's blocks; nothing that does not change
//! the numbers (parallel degree, engine, page size) is in it, everything that does is.

use crate::error::Error;
use crate::layout::Layout;
use crate::limits::{MODEL_BYTES_MAX, REVISION_BYTES_MAX, TENANT_BYTES_MAX};
use crate::wire;
use prost::Message as _;
use std::fmt;

pub use crate::wire::IdScheme;

const CONTEXT: &str = "kvd 2026-11-20 space fingerprint v1";

/// Keys all block ids of a space.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// Tenant, model, revision, epoch, layout, block_tokens, id scheme.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Space {
    /// Whose it is.
    pub tenant: String,
    /// The model's name.
    pub model: String,
    /// Digest of config and weights, or the operator's word.
    pub revision: Vec<u8>,
    /// Raised by an in-place weight update.
    pub epoch: u32,
    /// What the bytes mean; carries `block_tokens`.
    pub layout: Layout,
    /// How ids are made.
    pub id_scheme: IdScheme,
}

impl Space {
    /// Checks every field; layouts check themselves.
    pub fn check(&self) -> Result<(), Error> {
        check_name("tenant", self.tenant.as_bytes(), TENANT_BYTES_MAX)?;
        check_name("model", self.model.as_bytes(), MODEL_BYTES_MAX)?;
        check_name("revision", &self.revision, REVISION_BYTES_MAX)?;
        if self.id_scheme == IdScheme::Unspecified {
            return Err(Error::invalid("id_scheme", "not given", "say tokens or named"));
        }
        Ok(())
    }

    /// BLAKE3 `derive_key` over the canonical bytes.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut bytes = Vec::with_capacity(256);
        for field in [self.tenant.as_bytes(), self.model.as_bytes(), &self.revision] {
            bytes.extend_from_slice(&(field.len() as u32).to_le_bytes());
            bytes.extend_from_slice(field);
        }
        for number in [self.epoch, self.layout.block_tokens(), self.id_scheme as u32] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        self.layout.push_canonical(&mut bytes);
        Fingerprint(blake3::derive_key(CONTEXT, &bytes))
    }

    /// From the bytes of its message, which stand beside its fingerprint on a device; `None`: they are not of this space.
    pub fn from_stored(tenant: &str, definition: &[u8], fingerprint: &Fingerprint) -> Option<Self> {
        let definition = wire::Space::decode(definition).ok()?;
        let space = Self::from_wire(tenant, &definition).ok()?;
        (space.fingerprint() == *fingerprint).then_some(space)
    }

    /// From the wire, checked; the tenant is the session's.
    pub fn from_wire(tenant: &str, space: &wire::Space) -> Result<Self, Error> {
        let layout = space.layout.as_ref().ok_or_else(|| {
            Error::invalid("layout", "not given", "describe the groups of the model's KV cache")
        })?;
        let space = Self {
            tenant: tenant.to_owned(),
            model: space.model.clone(),
            revision: space.revision.to_vec(),
            epoch: space.epoch,
            layout: Layout::from_wire(layout, space.block_tokens)?,
            id_scheme: space.id_scheme(),
        };
        space.check()?;
        Ok(space)
    }

    /// As it travels.
    pub fn to_wire(&self) -> wire::Space {
        wire::Space {
            model: self.model.clone(),
            revision: self.revision.clone().into(),
            epoch: self.epoch,
            layout: Some(self.layout.to_wire()),
            block_tokens: self.layout.block_tokens(),
            id_scheme: self.id_scheme.into(),
        }
    }
}

fn check_name(field: &str, bytes: &[u8], most: usize) -> Result<(), Error> {
    if bytes.is_empty() || bytes.len() > most {
        let message = format!("{} bytes", bytes.len());
        return Err(Error::invalid(field, message, format!("give 1 to {most} bytes")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::DataType;

    fn space() -> Space {
        Space {
            tenant: "default".into(),
            model: "llama-3-8b".into(),
            revision: b"r1".to_vec(),
            epoch: 0,
            layout: Layout::full(32, 8, 128, DataType::Bf16, (4, 8), 16).unwrap(),
            id_scheme: IdScheme::Tokens,
        }
    }

    #[test]
    fn each_field_is_in_the_fingerprint() {
        let changed = [
            Space { tenant: "other".into(), ..space() },
            Space { model: "llama-3-8c".into(), ..space() },
            Space { revision: b"r2".to_vec(), ..space() },
            Space { epoch: 1, ..space() },
            Space { id_scheme: IdScheme::Named, ..space() },
            Space { layout: Layout::full(32, 8, 128, DataType::F16, (4, 8), 16).unwrap(), ..space() },
            Space { layout: Layout::full(32, 8, 128, DataType::Bf16, (4, 8), 32).unwrap(), ..space() },
            // a byte moved from one name to the next
            Space { tenant: "defaultl".into(), model: "lama-3-8b".into(), ..space() },
        ];
        let all: std::collections::HashSet<_> =
            changed.iter().chain([&space()]).map(Space::fingerprint).collect();
        assert_eq!(all.len(), changed.len() + 1);
    }

    #[test]
    fn wire_round_trip_and_named_fields() {
        let wire = space().to_wire();
        assert_eq!(Space::from_wire("default", &wire).unwrap(), space());
        let field = |wire: wire::Space| Space::from_wire("default", &wire).unwrap_err().field;
        assert_eq!(field(wire::Space { model: String::new(), ..wire.clone() }), "model");
        assert_eq!(field(wire::Space { revision: vec![0; 65].into(), ..wire.clone() }), "revision");
        assert_eq!(field(wire::Space { layout: None, ..wire.clone() }), "layout");
        assert_eq!(field(wire::Space { id_scheme: 0, ..wire }), "id_scheme");
    }
}
