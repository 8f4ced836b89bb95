//! What a person is told: status, tiers, spaces, blocks.
//!
//! Invariant: looking changes nothing. A prefix search over all entries is cut at a stated number of answers.

use super::Node;
use super::event::Answer;
use kvd_proto::Error;
use kvd_proto::wire::{self, Tier};
use kvd_tiers::catalog::{Handle, Mark, TIERS};

/// Blocks one prefix may name. At the limit: refused, a longer prefix names fewer.
const BLOCKS_MAX: usize = 256;

impl Node {
    /// Whether work is left that needs no new event.
    pub fn busy(&self) -> bool {
        self.purging()
    }

    pub(super) fn status(&self) -> Answer {
        let (sessions, members) = self.sessions.counts();
        let (leases, leased_bytes) = self.leases.totals();
        Answer::Status(Box::new(wire::StatusReply {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node_epoch: self.config.epoch,
            uptime_ms: self.now_us / 1000,
            sessions: sessions as u32,
            members: members as u32,
            leases: leases as u32,
            leased_bytes,
            blocks: self.catalog.len() as u64,
            spaces: self.spaces.len() as u32,
            counters: Some(self.counters),
        }))
    }

    pub(super) fn tiers(&self) -> Answer {
        let tiers = TIERS.iter().filter(|tier| **tier == Tier::Dram || self.config.nvme.is_some());
        let largest = self.memory.pools.iter().map(|pool| pool.geometry.slot_bytes).max().unwrap_or(0);
        let status = |tier: &Tier| wire::TierStatus {
            copies: self.catalog.copies(*tier) as u64,
            read_us: self.movement.fetch_us(*tier, largest.into()),
            write_us: if *tier == Tier::Nvme { self.movement.write_us(largest.into()) } else { 0 },
            ..self.memory.status(*tier)
        };
        Answer::Tiers(wire::ListTiersReply { tiers: tiers.map(status).collect() })
    }

    pub(super) fn list_spaces(&self) -> Answer {
        let status = |(at, registered): (usize, &super::RegisteredSpace)| wire::SpaceStatus {
            space: at as u32,
            tenant: self.tenants[registered.tenant].clone(),
            definition: Some(registered.space.to_wire()),
            fingerprint: registered.fingerprint.0.to_vec().into(),
            blocks: self.catalog.space_blocks(at as u16),
        };
        Answer::Spaces(wire::ListSpacesReply {
            spaces: self.spaces.iter().enumerate().map(status).collect(),
        })
    }

    pub(super) fn describe_blocks(&self, id_prefix: &[u8]) -> Answer {
        match self.by_prefix(id_prefix) {
            Ok(handles) => Answer::Blocks(wire::DescribeBlockReply {
                blocks: handles.into_iter().map(|handle| self.block_status(handle)).collect(),
            }),
            Err(error) => Answer::Refused(error),
        }
    }

    /// Entries whose id starts so, at most `BLOCKS_MAX`.
    pub(super) fn by_prefix(&self, id_prefix: &[u8]) -> Result<Vec<Handle>, Error> {
        if id_prefix.is_empty() || id_prefix.len() > 16 {
            let message = format!("{} bytes", id_prefix.len());
            return Err(Error::invalid("id_prefix", message, "give 1 to 16 bytes of the block's id"));
        }
        let all = self.catalog.iter().filter(|(_, entry)| entry.key().id.0.starts_with(id_prefix));
        let found: Vec<_> = all.map(|(handle, _)| handle).take(BLOCKS_MAX + 1).collect();
        if found.len() > BLOCKS_MAX {
            let message = format!("more than {BLOCKS_MAX} blocks start so");
            return Err(Error::limit("id_prefix", message, "give more of the block's id"));
        }
        Ok(found)
    }

    fn block_status(&self, handle: Handle) -> wire::BlockStatus {
        let entry = self.catalog.get(handle);
        let key = entry.key();
        let registered = &self.spaces[usize::from(key.space)];
        let copies = TIERS.iter().filter_map(|tier| {
            let slot = entry.copy(*tier)?;
            let pool = self.pool_of(handle, *tier);
            Some(wire::CopyStatus {
                tier: (*tier).into(),
                segment: slot.segment,
                slot: slot.slot,
                generation: self.memory.pools[pool].slots.generation(slot),
                checksummed: entry.is(*tier, Mark::Checksummed),
                fetch_us: self.movement.fetch_us(*tier, self.slot_bytes_of(handle)),
            })
        });
        let copies: Vec<_> = copies.collect();
        let fastest = if entry.copy(Tier::Dram).is_some() { Tier::Dram } else { Tier::Nvme };
        wire::BlockStatus {
            id: key.id.0.to_vec().into(),
            parent: entry.parent().0.to_vec().into(),
            group: key.group.into(),
            space: key.space.into(),
            tenant: self.tenants[registered.tenant].clone(),
            depth: entry.depth(),
            tokens: entry.tokens(),
            copies,
            leases: entry.leases(),
            pinned: self.pins.contains_key(&handle),
            idle_ms: u64::from(self.now_s().saturating_sub(entry.last_use_s())) * 1000,
            uses: entry.uses().into(),
            children: self.catalog.children(handle, fastest),
        }
    }
}
