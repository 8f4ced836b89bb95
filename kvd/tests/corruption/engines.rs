//! Engines of two tenants and three spaces, whose blocks are filled and read one by one.

use crate::content;
use crate::device::Named;
use crate::tally::Found;
use crate::wait::{DEADLINE, within};
use kvd_client::{ConnectOptions, ReserveState, Session, SpaceHandle, Tier};
use kvd_proto::layout::DataType;
use kvd_proto::space::IdScheme;
use kvd_proto::{BlockId, Chain, Layout, Space, block_id};
use std::path::Path;

/// 2 layers, 4 heads, 64 numbers, K and V, 2 bytes, 16 tokens; 2 parts.
pub(crate) const SLOT_BYTES: usize = 32 << 10;
/// Tenant and model.
const SPACES: [(&str, &str); 3] = [("default", "a"), ("default", "b"), ("other", "a")];

/// A block of these tests: its space, and its number there.
pub(crate) type Name = (u8, u32);

pub(crate) struct Engines(Vec<SpaceHandle>);

impl Engines {
    pub(crate) async fn open(socket: &Path) -> Self {
        let mut spaces = Vec::new();
        for (tenant, model) in SPACES {
            let options = ConnectOptions { tenant: tenant.to_owned(), ..ConnectOptions::new(socket) };
            let session = within("a session", Session::open(options)).await.unwrap();
            let handle = within("a space", session.space(&space(tenant, model))).await.unwrap();
            assert_eq!(handle.layout().slot_bytes(0) as usize, SLOT_BYTES);
            spaces.push(handle);
        }
        Self(spaces)
    }

    /// What its header names it by.
    pub(crate) fn named(&self, name: Name) -> Named {
        let space = &self.0[usize::from(name.0)];
        (space.fingerprint().0, self.chain(name).ids()[0])
    }

    /// A prompt of one block, so that each is found by itself.
    fn chain(&self, (space, number): Name) -> Chain {
        let fingerprint = self.0[usize::from(space)].fingerprint();
        Chain::of_tokens(&fingerprint, root(&fingerprint), &[number; 16], 16).unwrap()
    }

    pub(crate) async fn fill(&self, space: u8, numbers: std::ops::Range<u32>) {
        let handle = &self.0[usize::from(space)];
        for number in numbers {
            let (key, chain) = (number.to_le_bytes(), self.chain((space, number)));
            let root = root(&handle.fingerprint());
            let reserve = handle.reserve(&key, root, 0, &chain, DEADLINE);
            let reserved = within("reserve", reserve).await.unwrap();
            assert_eq!(reserved.state(0), ReserveState::Granted, "block {number}");
            reserved.write(0, 0, &content::of(content_name((space, number)), SLOT_BYTES));
            assert_eq!(within("commit", reserved.commit()).await.unwrap(), 1);
        }
    }

    /// What is found under the name, all of it read in place: there nobody but the daemon has looked at its bytes before.
    pub(crate) async fn find(&self, name: Name) -> Found {
        let (handle, chain) = (&self.0[usize::from(name.0)], self.chain(name));
        let request = name.1.to_be_bytes();
        let found = within("match", handle.match_prefix(&request, &chain, 0)).await.unwrap();
        if found.blocks() == 0 {
            return Found::Nothing; // or it is known, and the device left alone for a while: it has failed too often
        }
        let tier = found.source(0);
        let here = within("its arrival", found.wait_ready(0)).await;
        let right = found.view(0, 0).filter(|_| here).and_then(|view| {
            let word = |at: u64| view.word(at as usize * 8) == content::word(content_name(name), at);
            let right = (0..SLOT_BYTES as u64 / 8).all(word);
            view.still_valid().then_some(right)
        });
        within("release", found.release()).await.unwrap();
        match (right, tier) {
            (None, _) => Found::Refused,
            (Some(false), _) => Found::Wrong,
            (Some(true), Tier::Nvme | Tier::S3) => Found::Right,
            (Some(true), _) => Found::AnotherCopy,
        }
    }
}

fn content_name((space, number): Name) -> u64 {
    u64::from(space) << 32 | u64::from(number)
}

fn root(fingerprint: &kvd_proto::Fingerprint) -> BlockId {
    block_id::root(fingerprint, b"", b"").unwrap()
}

fn space(tenant: &str, model: &str) -> Space {
    Space {
        tenant: tenant.into(),
        model: model.into(),
        revision: b"r".to_vec(),
        epoch: 0,
        layout: Layout::full(2, 4, 64, DataType::Bf16, (2, 1), 16).unwrap(),
        id_scheme: IdScheme::Tokens,
    }
}
