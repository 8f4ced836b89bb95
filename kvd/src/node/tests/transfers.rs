//! Bytes on their way in a test's world: between the tiers, and from other nodes.
//!
//! Owns what is under way and how it ends. Invariant: bytes move only when a test says so, and then all of them.

use super::super::event::{Effect, Event, FetchOrder, MoveError, Offer, Wanted};
use super::harness::{Published, World};
use kvd_proto::BlockId;
use kvd_proto::slot_header::SlotHeader;
use kvd_tiers::segment::SlotRef;
use std::collections::{BTreeMap, BTreeSet};

pub(super) struct Transfer {
    pub(super) promotion: bool,
    pub(super) from: SlotRef,
    pub(super) to: SlotRef,
    pub(super) generation: u32,
    pub(super) header: SlotHeader,
}

/// Other nodes, as the node sees them.
#[derive(Default)]
pub(super) struct Peers {
    /// By ticket: what was sought and not answered yet.
    pub(super) sought: BTreeMap<u64, Wanted>,
    /// Tickets of offers on which no word has come yet.
    offered: BTreeSet<u64>,
    /// By token.
    pub(super) fetches: BTreeMap<u64, FetchOrder>,
}

impl World {
    pub(super) fn retire(&mut self, slot: SlotRef, generation: u32) {
        self.check_untouched(slot, false);
        self.check_unheld(slot);
        if let Some(published) = self.published.remove(&slot) {
            assert_eq!(published.generation.wrapping_add(1), generation, "{slot:?}");
        }
        self.dram.insert(slot, None);
    }

    pub(super) fn peers_told(&mut self, effect: Effect) {
        match effect {
            Effect::Seek { ticket, wanted } => {
                assert!((wanted.stored as usize) < wanted.chain.len(), "nothing is sought");
                assert!(self.peers.sought.insert(ticket, *wanted).is_none());
            }
            Effect::Fetch { ticket, orders } => {
                assert!(self.peers.offered.remove(&ticket), "an offer is answered once");
                for order in orders {
                    self.check_untouched(order.to, false);
                    self.check_unheld(order.to);
                    assert!(self.peers.fetches.insert(order.token, order).is_none());
                }
            }
            other => panic!("{other:?}"),
        }
    }

    /// Another node offers so many blocks more than are here; 0: nobody has any.
    pub(super) fn offer(&mut self, ticket: u64, more: u32) {
        let wanted = self.peers.sought.remove(&ticket).expect("it was sought");
        let offer = (more > 0).then(|| Offer {
            blocks: (wanted.stored + more).min(wanted.chain.len() as u32),
            parent: if wanted.stored == 0 {
                BlockId::default()
            } else {
                wanted.chain[wanted.stored as usize - 1]
            },
            predicted_us: 1000,
            from_bucket: ticket.is_multiple_of(3),
        });
        if offer.is_some() {
            self.peers.offered.insert(ticket);
        }
        self.apply(Event::Offered { ticket, offer });
    }

    /// Ends one fetch: for better (the bytes are verified as the shell would) or worse.
    pub(super) fn end_fetch(&mut self, token: u64, failure: Option<MoveError>) {
        let FetchOrder { to, generation, header, .. } = self.peers.fetches.remove(&token).expect("under way");
        if failure.is_none() {
            self.dram.insert(to, Some((header.fingerprint, header.id, header.group)));
            let shown = Published { generation, header: *header };
            assert!(self.published.insert(to, shown).is_none(), "a fetch into a published slot");
        }
        self.apply(Event::Moved { token, result: failure.map_or(Ok(()), Err), elapsed_us: 100 });
    }

    /// Ends one move: for better (the bytes are verified as the shell would) or worse.
    pub(super) fn end_move(&mut self, token: u64, failure: Option<MoveError>) {
        self.end_move_after(token, failure, 100);
    }

    /// As `end_move`; it took so long.
    pub(super) fn end_move_after(&mut self, token: u64, failure: Option<MoveError>, elapsed_us: u64) {
        let moved = self.moves.remove(&token).expect("under way");
        let result = match failure {
            Some(error) => Err(error),
            None => {
                self.carry(&moved);
                Ok(())
            }
        };
        self.apply(Event::Moved { token, result, elapsed_us });
    }

    fn carry(&mut self, moved: &Transfer) {
        if !moved.promotion {
            self.nvme.insert(moved.to, self.dram[&moved.from]);
            return;
        }
        let content = self.nvme[&moved.from];
        let header = &moved.header;
        assert_eq!(content, Some((header.fingerprint, header.id, header.group)), "NVMe holds another block");
        self.dram.insert(moved.to, content);
        let shown = Published { generation: moved.generation, header: header.clone() };
        assert!(self.published.insert(moved.to, shown).is_none(), "a promotion into a published slot");
    }

    /// Ends everything that is under way, well.
    pub(super) fn settle(&mut self) {
        loop {
            if self.open_next(Ok(())) || self.checksum_next() || self.end_next() {
                continue;
            }
            if let Some((&token, _)) = self.moves.first_key_value() {
                self.end_move(token, None);
            } else if let Some((&ticket, _)) = self.peers.sought.first_key_value() {
                self.offer(ticket, 0);
            } else if let Some((&token, _)) = self.peers.fetches.first_key_value() {
                self.end_fetch(token, None);
            } else if let Some((&token, _)) = self.uploads.reading.first_key_value() {
                self.end_upload(token, None);
            } else if self.store_oldest() {
            } else {
                return;
            }
        }
    }
}
