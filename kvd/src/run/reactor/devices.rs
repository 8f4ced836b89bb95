//! Segments and devices that come and go, as the node says: what DRAM does at once, what the NVMe thread is ordered to; and what the bucket is.
//!
//! Invariant: each is answered by its event, DRAM's in the same round.

use super::Reactor;
use crate::node::device::{DeviceOrder, Given};
use crate::node::event::Event;
use crate::run::attach::Attached;
use crate::run::bucket;
use crate::run::mover::{Mover, Order};
use crate::run::reattach::segment_key;
use kvd_proto::wire::Tier;
use kvd_tiers::catalog::record::SpaceRecord;
use kvd_tiers::segment::{Geometry, SegmentId, SlotRef};

impl Reactor {
    pub(super) fn open_segment(
        &mut self,
        tier: Tier,
        segment: SegmentId,
        geometry: Geometry,
        tenant: String,
        numa_node: Option<u32>,
    ) {
        if tier == Tier::Nvme {
            self.orders.push(Order::Open { segment, geometry, tenant });
            return;
        }
        let result = self.dram.open(segment, geometry, numa_node).map(|opened| {
            self.keeping.segment(segment, &opened, tenant, numa_node);
            let _ = self.populate.send((segment, opened));
        });
        self.events.push(Event::SegmentOpened { tier, segment, result });
    }

    pub(super) fn device(&mut self, order: DeviceOrder) {
        let given = match &order {
            DeviceOrder::Open { given, .. } => *given,
            _ => Given::default(),
        };
        let DeviceOrder::Lift { token, memory, device, from, to } = order else {
            return self.gpus.tell(order, self.parked.take(given));
        };
        let wanted = self.gpus.lift(token, (memory, device), to);
        match &self.mover {
            Some(_) => self.orders.push(Order::Look { slot: from, wanted }),
            None => wanted(None),
        }
    }

    pub(super) fn upload(&self, token: u64, from: SlotRef, attempt: u32) {
        let (segment, slot) = (self.dram.get(from.segment), from.slot);
        let bucket = self.bucket.as_ref().expect("uploads are for a bucket");
        bucket.order(bucket::Order::Upload { token, segment, slot, attempt });
    }

    /// Whoever keeps blocks beyond the daemon's end keeps what they mean.
    pub(super) fn space(&mut self, space: SpaceRecord) {
        self.keeping.space(&space);
        if let Some(bucket) = &self.bucket {
            bucket.space(&space);
        }
        self.orders.push(Order::Space(space));
    }

    pub(super) fn close_segment(&mut self, tier: Tier, segment: SegmentId) {
        if tier == Tier::Nvme {
            return self.orders.push(Order::Close { segment });
        }
        self.gpus.forget(&self.dram.get(segment).payload);
        self.dram.give_up(segment);
        self.keeping.forget(Some(segment_key(segment)));
        self.events.push(Event::SegmentClosed { tier, segment });
    }

    pub(super) fn resize(&mut self, tier: Tier, bytes: u64) {
        if tier == Tier::Nvme {
            return self.orders.push(Order::Resize { bytes });
        }
        let result = self.dram.resize(bytes);
        self.events.push(Event::Resized { tier, result });
    }

    pub(super) fn attached(&mut self, attached: Result<Attached, String>) {
        let result = attached.map(|Attached { medium, left, nvme }| {
            let (dram, inbox) = (self.dram.clone(), self.inbox.clone());
            let started = Mover::start(Box::new(medium), nvme.segment_bytes, left, dram, inbox);
            tracing::info!(nvme = started.0.info.description, bytes = nvme.bytes, "attached");
            (self.mover, self.moving) = (Some(started.0), Some(started.1));
            nvme
        });
        self.events.push(Event::Attached { result });
    }

    /// `Event::Detached` comes from the thread when it has closed the device.
    pub(super) fn detach(&mut self) {
        let mover = self.mover.take().expect("the node detaches what is attached");
        self.orders.push(Order::Stop);
        mover.order(&mut self.orders);
        tracing::info!(nvme = mover.info.description, "detached");
    }
}
