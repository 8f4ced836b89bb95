//! A tier that a person resizes, drains, detaches or attaches while the node serves, so that a disk can be replaced under load.
//!
//! Owns what is under way for each tier and who waits to hear of it. Invariants: a change is refused whole, with the value and the
//! fix, or it is begun and goes on whether anybody waits or not; one at a time for a tier, but for a resize or a detach that
//! takes the place of a resize that waits for segments to become empty, and a drain, which is a switch; NVMe is closed when no
//! copy is there and nothing moves (law 2). A draining tier is read like any other. A device that is detached keeps what it holds:
//! blocks are forgotten here and not there, so that a daemon which starts with it finds them. What is changed ends with the daemon.
//! Leaves to others: which segments and copies leave, and how (`leaving`); devices (the shell).

use super::event::{Answer, Effect};
use super::memory::at;
use super::{Node, NvmeConfig};
use kvd_proto::wire::{self, Tier, change_tier_request::What};
use kvd_proto::{Code, Error};

/// Segments that a tier has at least: one is filled while another becomes empty.
const SEGMENTS_MIN: u64 = 2;
/// A person waits so long at most for the answer.
const WAIT_MS_MAX: u32 = 60_000;
/// Persons who wait for one tier. At the limit: who comes next is answered at once, with how far it is.
const ASKERS_MAX: usize = 16;
/// Bytes of a path that the system takes.
const PATH_BYTES_MAX: usize = 4096;

/// What is under way.
#[derive(Default)]
pub(super) struct TierChanges {
    /// As `memory`'s tiers.
    of: [Change; 2],
    draining: bool,
}

#[derive(Default)]
struct Change {
    phase: Phase,
    askers: Vec<Asker>,
}

struct Asker {
    ticket: u64,
    until_us: u64,
    keep: String,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Phase {
    #[default]
    Settled,
    /// The shell makes room for so many bytes.
    Growing(u64),
    /// Segments become empty and are closed.
    Shrinking,
    /// The shell gives back what they took.
    Cutting,
    /// NVMe copies are forgotten.
    Detaching,
    /// The shell closes the device.
    Closing,
    /// The shell opens a device.
    Attaching,
}

impl TierChanges {
    pub(super) fn drains(&self) -> bool {
        self.draining
    }

    /// Whether copies are forgotten here and stay on the device.
    pub(super) fn detaches(&self) -> bool {
        self.of[at(Tier::Nvme)].phase == Phase::Detaching
    }
}

impl Node {
    pub(super) fn start_tier_change(&mut self, ticket: u64, request: &wire::ChangeTierRequest) {
        let (tier, keep) = match self.begin_change(request) {
            Ok(begun) => begun,
            Err(error) => return self.out.push(Effect::Answer { ticket, answer: Answer::Refused(error) }),
        };
        let until_us = self.now_us + u64::from(request.wait_ms.min(WAIT_MS_MAX)) * 1000;
        let change = &mut self.tier_changes.of[at(tier)];
        let asker = Asker { ticket, until_us, keep };
        if change.phase != Phase::Settled && change.askers.len() < ASKERS_MAX {
            change.askers.push(asker);
        } else {
            self.answer_change(tier, asker);
        }
    }

    /// The tier, and what to write down to keep the change.
    fn begin_change(&mut self, request: &wire::ChangeTierRequest) -> Result<(Tier, String), Error> {
        let tier = match request.tier() {
            tier @ (Tier::Dram | Tier::Nvme) => tier,
            other => {
                let message = format!("{} is changed in kvd.toml", other.as_str_name());
                return Err(Error::invalid("tier", message, "name dram or nvme"));
            }
        };
        let what = request.what.as_ref();
        let what =
            what.ok_or_else(|| Error::invalid("what", "not given", "say resize, drain, detach or attach"))?;
        let only_nvme = !matches!(what, What::CapacityBytes(_));
        if tier == Tier::Dram && only_nvme {
            let message = "all that engines read and write passes through DRAM";
            return Err(Error::invalid("tier", message, "resize it, or drain, detach and attach nvme"));
        }
        if tier == Tier::Nvme && self.config.nvme.is_none() && !matches!(what, What::Attach(_)) {
            let message = match self.tier_changes.of[at(tier)].phase {
                Phase::Settled => "no nvme is attached",
                _ => "nvme is being attached or detached",
            };
            return Err(Error::invalid("tier", message, "see `kvctl tiers`, or attach one first"));
        }
        let keep = match what {
            What::CapacityBytes(bytes) => self.begin_resize(tier, *bytes)?,
            What::Drain(drain) => self.drain(*drain),
            What::Detach(detach) => self.begin_detach(*detach)?,
            What::Attach(attach) => self.begin_attach(attach)?,
        };
        let name = name(tier);
        self.note("tier", || format!("{name}: {what:?}"));
        Ok((tier, keep))
    }

    fn begin_resize(&mut self, tier: Tier, bytes: u64) -> Result<String, Error> {
        let space = &self.memory.tiers[at(tier)];
        check_capacity(bytes, space.segment_bytes)?;
        let phase = self.tier_changes.of[at(tier)].phase;
        if !matches!(phase, Phase::Settled | Phase::Shrinking) {
            return Err(busy(tier));
        }
        let more = bytes > self.memory.tiers[at(tier)].given_bytes;
        self.let_stay(tier);
        if more {
            self.tier_changes.of[at(tier)].phase = Phase::Growing(bytes);
            self.out.push(Effect::Resize { tier, bytes });
        } else {
            self.set_capacity(tier, bytes);
            self.memory.leaving[at(tier)].begin();
            self.tier_changes.of[at(tier)].phase = Phase::Shrinking;
        }
        Ok(format!("put {}.capacity_bytes = {bytes} into kvd.toml", name(tier)))
    }

    fn set_capacity(&mut self, tier: Tier, bytes: u64) {
        self.memory.tiers[at(tier)].capacity_bytes = bytes;
        match &mut self.config.nvme {
            Some(nvme) if tier == Tier::Nvme => nvme.bytes = bytes,
            _ => self.config.dram_bytes = bytes,
        }
    }

    /// Ends `Effect::Resize`.
    pub(super) fn resized(&mut self, tier: Tier, result: Result<(), String>) {
        let phase = std::mem::take(&mut self.tier_changes.of[at(tier)].phase);
        assert!(matches!(phase, Phase::Growing(_) | Phase::Cutting), "{} was not to be resized", name(tier));
        if let Err(why) = result {
            if matches!(phase, Phase::Growing(_)) {
                self.tier_changes.of[at(tier)].phase = self.unfinished(tier);
            }
            let fix = "choose another size, or free space; see `kvctl tiers` for what it is now";
            return self.refuse_askers(tier, &Error::new(Code::Unavailable, "capacity_bytes", why, fix));
        }
        if let Phase::Growing(bytes) = phase {
            self.set_capacity(tier, bytes);
            self.grow_all(tier);
        }
        let space = &mut self.memory.tiers[at(tier)];
        space.given_bytes = space.capacity_bytes;
        self.tell_askers(tier);
    }

    /// A tier that was becoming smaller still is when what took the place of that has ended.
    fn unfinished(&self, tier: Tier) -> Phase {
        let space = &self.memory.tiers[at(tier)];
        if space.capacity_bytes < space.given_bytes { Phase::Shrinking } else { Phase::Settled }
    }

    fn drain(&mut self, drain: bool) -> String {
        if !drain && self.tier_changes.detaches() {
            self.tier_changes.of[at(Tier::Nvme)].phase = self.unfinished(Tier::Nvme);
            self.tell_askers(Tier::Nvme);
        }
        self.tier_changes.draining = drain;
        let now = if drain { "the next start writes to nvme again" } else { "as the next start does" };
        now.to_owned()
    }

    fn begin_detach(&mut self, detach: bool) -> Result<String, Error> {
        if !detach {
            return Err(Error::invalid("detach", "false", "say true, or drain = false to take one back"));
        }
        match self.tier_changes.of[at(Tier::Nvme)].phase {
            Phase::Detaching => {}
            Phase::Settled | Phase::Shrinking => {
                self.tier_changes.of[at(Tier::Nvme)].phase = Phase::Detaching;
                self.tier_changes.draining = true;
                self.memory.leaving[at(Tier::Nvme)].begin();
            }
            _ => return Err(busy(Tier::Nvme)),
        }
        Ok("put nvme.path = \"\" into kvd.toml".to_owned())
    }

    fn begin_attach(&mut self, attach: &wire::AttachTier) -> Result<String, Error> {
        if self.config.nvme.is_some() {
            let fix = "detach it first: `kvctl tier detach nvme`";
            return Err(Error::invalid("tier", "an nvme is attached already", fix));
        }
        if self.tier_changes.of[at(Tier::Nvme)].phase != Phase::Settled {
            return Err(busy(Tier::Nvme));
        }
        let wire::AttachTier { path, capacity_bytes, segment_bytes } = attach;
        if !path.starts_with('/') || path.len() > PATH_BYTES_MAX || path.contains('\0') {
            let message = format!("{path:?} is no absolute path");
            return Err(Error::invalid("path", message, "name a file or a block device from the root on"));
        }
        check_capacity(*capacity_bytes, *segment_bytes)?;
        let largest = self.memory.pools.iter().map(|pool| pool.geometry.slot_bytes).max().unwrap_or(0);
        check_largest(*segment_bytes, largest)?;
        self.tier_changes.of[at(Tier::Nvme)].phase = Phase::Attaching;
        let (path, bytes, segment_bytes) = (path.clone(), *capacity_bytes, *segment_bytes);
        let keep = format!(
            "put nvme.path = {path:?}, nvme.capacity_bytes = {bytes} and nvme.segment_bytes = {segment_bytes} into kvd.toml"
        );
        self.out.push(Effect::Attach { path, bytes, segment_bytes });
        Ok(keep)
    }

    /// Ends `Effect::Attach`.
    pub(super) fn attached(&mut self, result: Result<NvmeConfig, String>) {
        let change = &mut self.tier_changes.of[at(Tier::Nvme)];
        assert!(change.phase == Phase::Attaching, "nothing was to be attached");
        change.phase = Phase::Settled;
        let nvme = match result {
            Ok(nvme) => nvme,
            Err(why) => {
                let error = Error::new(Code::Unavailable, "path", why, "mend that, or attach another");
                return self.refuse_askers(Tier::Nvme, &error);
            }
        };
        self.memory.attach(&nvme);
        self.config.nvme = Some(nvme);
        for space in 0..self.spaces.len() {
            self.give_nvme(space);
        }
        self.tell_askers(Tier::Nvme);
    }

    /// Pools on NVMe for a space that was registered without, and what the device's own writing needs to know of it.
    fn give_nvme(&mut self, space: usize) {
        let registered = &mut self.spaces[space];
        for (group, (_, nvme)) in registered.pools.iter_mut().enumerate() {
            let layout = &registered.space.layout;
            let class = (layout.slot_bytes(group), layout.groups()[group].part_count() as u16);
            *nvme = Some(self.memory.pool(Tier::Nvme, registered.tenant, class));
        }
        let (fingerprint, tenant) = (registered.fingerprint, registered.space.tenant.clone());
        let definition = Box::new(registered.space.to_wire());
        self.out.push(Effect::Space { fingerprint, tenant, definition });
    }

    /// A share of what is under way.
    pub(super) fn change_tiers(&mut self) {
        for tier in [Tier::Dram, Tier::Nvme] {
            match self.tier_changes.of[at(tier)].phase {
                Phase::Shrinking => self.shrink_some(tier),
                Phase::Detaching => self.detach_some(),
                _ => {}
            }
        }
    }

    fn shrink_some(&mut self, tier: Tier) {
        self.choose_leaving(tier);
        self.empty_some(tier);
        self.close_unused(tier);
        let (space, leaving) = (&self.memory.tiers[at(tier)], &self.memory.leaving[at(tier)]);
        let gone = leaving.segments.is_empty() && leaving.closing.is_empty();
        // a segment on its way is chosen when it is there
        if gone && space.taken_bytes <= space.capacity_bytes && !self.memory.any_opening(tier) {
            let bytes = space.capacity_bytes;
            self.tier_changes.of[at(tier)].phase = Phase::Cutting;
            self.out.push(Effect::Resize { tier, bytes });
        }
    }

    fn detach_some(&mut self) {
        self.forget_some();
        self.close_unused(Tier::Nvme);
        let used = self.catalog.copies(Tier::Nvme) > 0
            || self.memory.any_opening(Tier::Nvme)
            || !self.memory.leaving[at(Tier::Nvme)].closing.is_empty();
        if used {
            return;
        }
        self.memory.detach();
        self.movement.forget_device();
        self.config.nvme = None;
        self.spaces.iter_mut().flat_map(|space| &mut space.pools).for_each(|(_, nvme)| *nvme = None);
        self.tier_changes.of[at(Tier::Nvme)].phase = Phase::Closing;
        self.out.push(Effect::Detach);
    }

    /// Ends `Effect::Detach`.
    pub(super) fn detached(&mut self) {
        let change = &mut self.tier_changes.of[at(Tier::Nvme)];
        assert!(change.phase == Phase::Closing, "nothing was to be detached");
        change.phase = Phase::Settled;
        self.tier_changes.draining = false;
        self.tell_askers(Tier::Nvme);
    }

    /// Whether a share is left that needs no new event.
    pub(super) fn changing(&self) -> bool {
        [Tier::Dram, Tier::Nvme].into_iter().any(|tier| {
            let leaving = &self.memory.leaving[at(tier)];
            let work = match self.tier_changes.of[at(tier)].phase {
                Phase::Shrinking => !leaving.segments.is_empty(),
                Phase::Detaching => true,
                _ => false,
            };
            work && leaving.awake(self.now_us)
        })
    }

    /// Who has waited long enough hears how far it is.
    pub(super) fn end_waits(&mut self) {
        let now_us = self.now_us;
        for tier in [Tier::Dram, Tier::Nvme] {
            let askers = &mut self.tier_changes.of[at(tier)].askers;
            let over: Vec<_> = askers.extract_if(.., |asker| asker.until_us <= now_us).collect();
            over.into_iter().for_each(|asker| self.answer_change(tier, asker));
        }
    }

    fn tell_askers(&mut self, tier: Tier) {
        let name = name(tier);
        self.note("tier", || format!("{name}: done"));
        for asker in std::mem::take(&mut self.tier_changes.of[at(tier)].askers) {
            self.answer_change(tier, asker);
        }
    }

    fn refuse_askers(&mut self, tier: Tier, error: &Error) {
        self.note("error", || format!("{}: {error}", name(tier)));
        for Asker { ticket, .. } in std::mem::take(&mut self.tier_changes.of[at(tier)].askers) {
            self.out.push(Effect::Answer { ticket, answer: Answer::Refused(error.clone()) });
        }
    }

    fn answer_change(&mut self, tier: Tier, Asker { ticket, keep, .. }: Asker) {
        let done = self.tier_changes.of[at(tier)].phase == Phase::Settled;
        let change = if done { String::new() } else { self.tier_change(tier) };
        let answer = Answer::TierChange(wire::ChangeTierReply { done, change, keep });
        self.out.push(Effect::Answer { ticket, answer });
    }

    /// What is under way, in words; empty: nothing.
    pub(super) fn tier_change(&self, tier: Tier) -> String {
        let (segments, slots) = self.left_in(tier);
        match self.tier_changes.of[at(tier)].phase {
            Phase::Settled if tier == Tier::Nvme && self.tier_changes.draining => {
                // every entry has a copy somewhere
                let alone = self.catalog.len() - self.catalog.copies(Tier::Dram);
                format!("draining: {alone} copies only here")
            }
            Phase::Settled => String::new(),
            Phase::Growing(_) => "growing".to_owned(),
            Phase::Shrinking => format!("leaving: {segments} segments, {slots} slots used"),
            Phase::Cutting => "giving back space".to_owned(),
            Phase::Detaching => format!("detaching: {} copies left", self.catalog.copies(Tier::Nvme)),
            Phase::Closing => "closing the device".to_owned(),
            Phase::Attaching => "opening the device".to_owned(),
        }
    }
}

fn name(tier: Tier) -> &'static str {
    if tier == Tier::Dram { "dram" } else { "nvme" }
}

fn busy(tier: Tier) -> Error {
    let message = format!("{} is being changed", name(tier));
    Error::new(Code::Unavailable, "tier", message, "wait for that to end: `kvctl tiers`")
}

fn check_capacity(bytes: u64, segment_bytes: u64) -> Result<(), Error> {
    if segment_bytes == 0 {
        return Err(Error::invalid("segment_bytes", "0", "give the size of one segment"));
    }
    let least = SEGMENTS_MIN * segment_bytes;
    if bytes < least {
        let message = format!("{bytes} is less than {SEGMENTS_MIN} segments of {segment_bytes}");
        return Err(Error::invalid("capacity_bytes", message, format!("give at least {least}")));
    }
    if !bytes.is_multiple_of(segment_bytes) {
        let message = format!("{bytes} is no whole number of segments of {segment_bytes}");
        let fix = format!("give {}", bytes - bytes % segment_bytes);
        return Err(Error::invalid("capacity_bytes", message, fix));
    }
    Ok(())
}

fn check_largest(segment_bytes: u64, slot_bytes: u32) -> Result<(), Error> {
    let least = super::memory::segment_bytes_min(slot_bytes);
    if segment_bytes >= least {
        return Ok(());
    }
    let message = format!("{segment_bytes}, and blocks of {slot_bytes} bytes are registered");
    Err(Error::invalid("segment_bytes", message, format!("give at least {least}")))
}
