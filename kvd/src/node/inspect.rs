//! What a person is told: status, tiers, spaces, blocks.
//!
//! Invariant: looking changes nothing.

use super::Node;
use super::event::Answer;
use kvd_proto::cost;
use kvd_proto::wire::{self, Tier};
use kvd_tiers::catalog::{Handle, Mark, TIERS};

impl Node {
    /// Whether work is left that needs no new event.
    pub fn busy(&self) -> bool {
        let told = self.purging() || self.searching() || self.hunting();
        told || self.usage.waits()
            || self.policy_changes.under_way()
            || self.changing()
            || !self.deferred.is_empty()
    }

    pub(super) fn status(&self) -> Answer {
        let (sessions, members) = self.sessions.counts();
        let (leases, leased_bytes) = self.leases.totals();
        let (hand_offs, hand_off_bytes) = self.hand_offs.totals();
        let (device_memories, device_copies) = self.pages.counts();
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
            hand_offs: hand_offs as u32,
            hand_off_bytes,
            device_memories: device_memories as u32,
            device_copies: device_copies as u32,
        }))
    }

    pub(super) fn tiers(&self) -> Answer {
        let tiers = TIERS.iter().filter(|tier| **tier == Tier::Dram || self.config.nvme.is_some());
        let largest = self.memory.pools.iter().map(|pool| pool.geometry.slot_bytes).max().unwrap_or(0);
        let status = |tier: &Tier| wire::TierStatus {
            copies: self.catalog.copies(*tier) as u64,
            read_us: self.movement.fetch_us(*tier, largest.into()),
            read_latency_us: self.movement.read_speed(*tier).latency_us(),
            read_bytes_per_us: self.movement.read_speed(*tier).bytes_per_us(),
            write_us: if *tier == Tier::Nvme { self.movement.write_us(largest.into()) } else { 0 },
            trouble: self.tier_trouble(*tier),
            change: self.tier_change(*tier),
            ..self.memory.status(*tier)
        };
        let hbm = self.hbm_status();
        Answer::Tiers(wire::ListTiersReply { tiers: hbm.into_iter().chain(tiers.map(status)).collect() })
    }

    pub(super) fn tier_trouble(&self, tier: Tier) -> String {
        let device = if tier == Tier::Nvme { self.movement.trouble(self.now_us) } else { String::new() };
        if device.is_empty() { self.memory.trouble(tier) } else { device }
    }

    pub(super) fn list_spaces(&self) -> Answer {
        let status = |(at, registered): (usize, &super::RegisteredSpace)| wire::SpaceStatus {
            space: at as u32,
            tenant: self.tenants[registered.tenant].clone(),
            definition: Some(registered.space.to_wire()),
            fingerprint: registered.fingerprint.0.to_vec().into(),
            blocks: self.catalog.space_blocks(at as u16),
        };
        Answer::Spaces(wire::ListSpacesReply { spaces: self.spaces.iter().enumerate().map(status).collect() })
    }

    pub(super) fn describe_blocks(&self, blocks: Vec<Handle>) -> Answer {
        let blocks = blocks.into_iter().map(|handle| self.block_status(handle)).collect();
        Answer::Blocks(wire::DescribeBlockReply { blocks })
    }

    fn block_status(&self, handle: Handle) -> wire::BlockStatus {
        let entry = self.catalog.get(handle);
        let key = entry.key();
        let registered = &self.spaces[usize::from(key.space)];
        let context = u64::from(entry.depth()) * u64::from(registered.space.layout.block_tokens());
        let recompute_us = self.profile_of(key.space).recompute_us(entry.tokens().into(), context);
        let age_s = self.now_s().saturating_sub(entry.first_use_s()).max(1);
        let reuses_per_s = f64::from(entry.uses().saturating_sub(1)) / f64::from(age_s);
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
                worth: self.worth(handle, *tier, reuses_per_s, recompute_us),
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
            recompute_us: recompute_us as u64,
            reuses_per_s,
        }
    }

    /// Worth of one copy: what it saves over the next cheapest way to get the block if this copy were gone.
    fn worth(&self, handle: Handle, tier: Tier, reuses_per_s: f64, recompute_us: f64) -> f64 {
        let bytes = self.slot_bytes_of(handle);
        let entry = self.catalog.get(handle);
        let others = TIERS.iter().filter(|other| **other != tier && entry.readable(**other).is_some());
        let fetch = |tier: &Tier| self.movement.fetch_us(*tier, bytes) as f64;
        let next_us = others.map(fetch).fold(recompute_us, f64::min);
        cost::worth(reuses_per_s, next_us, fetch(&tier), bytes)
    }
}
