//! The devices of this machine on which engines have their pages: which there are, and a thread for each that is used.
//!
//! Invariants: nothing of a device is used before an engine asks for it, but for its name; every order ends with one input to the node, whatever becomes of the
//! device; the reactor waits for none of it. Leaves to others: addresses and copies (`pump`), who may have what copied (the node).

mod pump;
mod readers;
#[cfg(test)]
mod tests;

use super::chunks::Chunks;
use super::dram::DramSegments;
use super::inbox::{Inbox, Input};
use super::mover::{Found as Look, InFile};
use crate::config::{Config, DeviceChoice, Wish};
use crate::node::device::{Copied, CopyOrder, DeviceEnd, DeviceOrder, KeptSlot};
use crate::node::event::{Event, MoveError};
use kvd_proto::wire::{self, CopyMiss};
use kvd_proto::{Code, Error, Layout};
use kvd_tiers::gpu::files::FileReads;
use kvd_tiers::gpu::gds::GdsFiles;
use kvd_tiers::gpu::software::{SoftwareDevice, SoftwareOptions};
use kvd_tiers::gpu::transfer::Options;
use kvd_tiers::gpu::{Device, DeviceInfo, GpuError};
use kvd_tiers::mapping::Mapping;
use kvd_tiers::media::{MediumError, Wake};
use kvd_tiers::segment::SegmentId;
use pump::Pump;
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};

/// What the stand-in says it has.
const SOFTWARE_BYTES: u64 = 1 << 30;

/// An order to a device's thread.
enum Order {
    Open {
        memory: u64,
        layout: Box<Layout>,
        request: Box<wire::OpenMemoryRequest>,
        chunks: Chunks,
    },
    Close {
        memory: u64,
    },
    Copy(Box<CopyOrder>),
    /// Memory for copies.
    Take {
        segment: SegmentId,
        bytes: u64,
        slot_bytes: u32,
    },
    /// A block on NVMe to a slot of that memory.
    Lift {
        token: u64,
        /// Which of its parts.
        memory: u64,
        to: KeptSlot,
        /// `None`: its tier has no file for that.
        from: Option<InFile>,
    },
    /// The segment is given up.
    Unpin(Arc<Mapping>),
}

/// A device, and its thread as soon as it is used.
struct Found {
    info: DeviceInfo,
    thread: Option<Thread>,
}

#[derive(Clone)]
struct Thread {
    orders: Sender<Order>,
    waker: Arc<OnceLock<Arc<dyn Wake>>>,
}

impl Thread {
    fn order(&self, order: Order) {
        self.orders.send(order).expect("the thread lives as long as its senders");
        if let Some(waker) = self.waker.get() {
            waker.wake();
        }
    }
}

/// All of them, as the reactor has them.
pub(super) struct Gpus {
    found: HashMap<[u8; 16], Found>,
    choice: DeviceChoice,
    options: Options,
    capacity_bytes: u64,
    /// Whether devices are to read the NVMe tier by themselves.
    storage: bool,
    dram: Arc<DramSegments>,
    inbox: Inbox,
}

/// The devices that `hbm.device` names.
pub(crate) fn devices(choice: DeviceChoice) -> Result<Vec<DeviceInfo>, GpuError> {
    match choice {
        DeviceChoice::Off => Ok(Vec::new()),
        DeviceChoice::Software => Ok(vec![software()?.info().clone()]),
        DeviceChoice::Auto => kvd_tiers::gpu::cuda::devices(),
    }
}

fn software() -> Result<SoftwareDevice, GpuError> {
    SoftwareDevice::open(SoftwareOptions { memory_bytes: SOFTWARE_BYTES, ..SoftwareOptions::default() })
}

/// A device, and how it reads files by itself if it is to and can.
type Opened = (Box<dyn Device>, Option<Arc<dyn FileReads>>);

fn open(choice: DeviceChoice, info: &DeviceInfo, storage: bool) -> Result<Opened, GpuError> {
    if choice == DeviceChoice::Software {
        let device = software()?;
        let files = storage.then(|| Arc::new(device.files()) as Arc<dyn FileReads>);
        return Ok((Box::new(device), files));
    }
    let device = kvd_tiers::gpu::cuda::CudaDevice::open(info.ordinal)?;
    let files = if storage { cufile(info.ordinal) } else { None };
    Ok((Box::new(device), files))
}

/// Without nvidia-fs it goes through the processor's memory, where io_uring and a copy do better.
fn cufile(ordinal: u32) -> Option<Arc<dyn FileReads>> {
    kvd_tiers::gpu::probe::nvidia_fs()?;
    match GdsFiles::open(ordinal) {
        Ok(files) => Some(Arc::new(files)),
        Err(error) => {
            tracing::info!(%error, "blocks go from NVMe to devices through DRAM");
            None
        }
    }
}

/// A staging area that is smaller than the largest slot refuses such slots, not the device.
fn transfer_options(staging_bytes: u64) -> Options {
    let default = Options::default();
    Options {
        staging_bytes,
        chunk_bytes: default.chunk_bytes.min(staging_bytes / 4),
        slot_bytes_max: default.slot_bytes_max.min(u32::try_from(staging_bytes).unwrap_or(u32::MAX)),
        ..default
    }
}

impl Gpus {
    pub(super) fn find(config: &Config, dram: Arc<DramSegments>, inbox: Inbox) -> Self {
        let choice = config.hbm.device;
        let found = devices(choice).unwrap_or_else(|error| {
            tracing::info!(%error, "engines' pages are in this machine's memory only");
            Vec::new()
        });
        for info in &found {
            tracing::info!(device = info.name, driver = info.driver, "engines may have their pages there");
        }
        let found = found.into_iter().map(|info| (info.uuid, Found { info, thread: None })).collect();
        let options = transfer_options(config.hbm.staging_bytes);
        let capacity_bytes = config.hbm.capacity_bytes;
        let storage = config.hbm.storage == Wish::Auto && capacity_bytes > 0 && config.nvme.path.is_some();
        Self { found, choice, options, capacity_bytes, storage, dram, inbox }
    }

    /// Does what the node says, or answers why not. `chunks`: those of memory to be opened.
    pub(super) fn tell(&mut self, order: DeviceOrder, chunks: Chunks) {
        match order {
            DeviceOrder::Open { memory, layout, request, .. } => {
                self.open(memory, layout, request, chunks);
            }
            DeviceOrder::Close { memory, device } => self.thread(device).order(Order::Close { memory }),
            DeviceOrder::Copy(order) => self.thread(order.device).order(Order::Copy(order)),
            DeviceOrder::Take { segment, device, bytes, slot_bytes } => {
                self.thread(device).order(Order::Take { segment, bytes, slot_bytes });
            }
            DeviceOrder::Lift { .. } => unreachable!("somebody else knows where it is on NVMe"),
        }
    }

    /// A DRAM segment is about to be given up.
    pub(super) fn forget(&self, mapping: &Arc<Mapping>) {
        let threads = self.found.values().filter_map(|found| found.thread.as_ref());
        threads.for_each(|thread| thread.order(Order::Unpin(mapping.clone())));
    }

    /// For whoever knows where the block is on NVMe, if anybody does.
    pub(super) fn lift(&mut self, token: u64, (memory, device): (u64, [u8; 16]), to: KeptSlot) -> Look {
        let thread = self.thread(device).clone();
        Box::new(move |from| thread.order(Order::Lift { token, memory, to, from }))
    }

    fn open(
        &mut self,
        memory: u64,
        layout: Box<Layout>,
        request: Box<wire::OpenMemoryRequest>,
        chunks: Chunks,
    ) {
        let uuid = <[u8; 16]>::try_from(&request.device[..]).expect("the node checked its length");
        if !self.found.contains_key(&uuid) {
            let result = Err(self.unknown(&uuid));
            return self.inbox.push(Input::Event(Event::Device(DeviceEnd::Opened { memory, result })));
        }
        self.thread(uuid).order(Order::Open { memory, layout, request, chunks });
    }

    fn unknown(&self, uuid: &[u8; 16]) -> Error {
        let (message, fix) = match (self.choice, self.found.len()) {
            (DeviceChoice::Off, _) => (
                "this node uses no device".to_owned(),
                "set hbm.device to \"auto\" in the node's kvd.toml, or keep pages in the machine's memory",
            ),
            (_, 0) => (
                "this node has found no device".to_owned(),
                "see `kvd check`; in a container the node needs the same devices as the engine",
            ),
            (_, count) => (
                format!(
                    "{:032x} is none of the {count} devices that this node has found",
                    u128::from_be_bytes(*uuid)
                ),
                "give the node the same devices as the engine (CUDA_VISIBLE_DEVICES, the container's)",
            ),
        };
        Error::new(Code::Unavailable, "device", message, fix)
    }

    fn thread(&mut self, uuid: [u8; 16]) -> &Thread {
        let found = self.found.get_mut(&uuid).expect("a device that was found");
        let Found { info, thread } = found;
        thread.get_or_insert_with(|| {
            let (orders, ordered) = channel();
            let waker = Arc::<OnceLock<_>>::default();
            let (choice, info) = (self.choice, info.clone());
            let memory = (self.options, self.capacity_bytes, self.storage);
            let (dram, inbox, told) = (self.dram.clone(), self.inbox.clone(), waker.clone());
            let name = format!("kvd-gpu-{}", info.ordinal);
            super::workers::spawn(&name, move || {
                run((choice, &info), memory, &ordered, (dram, inbox), &told);
            });
            Thread { orders, waker }
        })
    }
}

/// A device's thread, until the reactor ends.
fn run(
    (choice, info): (DeviceChoice, &DeviceInfo),
    (options, capacity_bytes, storage): (Options, u64, bool),
    ordered: &Receiver<Order>,
    (dram, inbox): (Arc<DramSegments>, Inbox),
    told: &OnceLock<Arc<dyn Wake>>,
) {
    let unusable = |error: GpuError| MediumError::Unusable(error.to_string());
    let opened = open(choice, info, storage).map_err(unusable);
    let opened = opened.and_then(|device| Pump::new(device, options, capacity_bytes, (dram, inbox.clone())));
    match opened {
        Ok(pump) => {
            _ = told.set(pump.waker());
            serve(pump, ordered, &inbox, &info.name);
        }
        Err(error) => {
            tracing::warn!(device = info.name, %error, "a device cannot be used");
            refuse_all(ordered, &inbox, &error.to_string());
        }
    }
}

fn lift_refused(token: u64, why: &str) -> DeviceEnd {
    DeviceEnd::Lifted { token, result: Err(MoveError::Device(why.to_owned())) }
}

fn serve(mut pump: Pump, ordered: &Receiver<Order>, inbox: &Inbox, device: &str) {
    if let Some(why) = pump.run(ordered) {
        tracing::error!(device, why, "a device is gone, and not used any more");
        pump.give_up(&why);
        refuse_all(ordered, inbox, &why);
    }
}

/// Without a device: what engines still have open there is closed as soon as they want, and copies are misses.
fn refuse_all(ordered: &Receiver<Order>, inbox: &Inbox, why: &str) {
    while let Ok(order) = ordered.recv() {
        let end = match order {
            Order::Open { memory, .. } => {
                let fix = "see `kvd check`, and restart the node when the device is well";
                let result = Err(Error::new(Code::Unavailable, "device", why, fix));
                DeviceEnd::Opened { memory, result }
            }
            Order::Close { memory } => DeviceEnd::Closed { memory },
            Order::Take { segment, .. } => DeviceEnd::Taken { segment, result: Err(why.to_owned()) },
            Order::Copy(order) => {
                let copied = Copied { blocks: 0, miss: CopyMiss::Device, reason: why.to_owned() };
                DeviceEnd::Copied { token: order.token, result: Ok(copied) }
            }
            Order::Lift { token, .. } => lift_refused(token, why),
            Order::Unpin(_) => continue,
        };
        inbox.push(Input::Event(Event::Device(end)));
    }
}
