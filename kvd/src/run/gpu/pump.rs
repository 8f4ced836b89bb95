//! One device's thread: opens engines' memory, and has blocks copied between it and DRAM slots.
//!
//! Invariants: every order ends with one input to the node; memory is closed when all its copies have ended; what is reported as loaded had the checksums of its
//! slot's header (a block that was committed moments ago has none yet: it is read from the very memory it was just put into, as everywhere). Page tables are
//! checked whole before anything moves.
//! Leaves to others: how bytes move (`kvd_tiers::gpu::transfer`), who may have them moved (the node).

use super::super::chunks::{Chunks, HeldChunk};
use super::super::dram::DramSegments;
use super::super::inbox::{Inbox, Input};
use super::super::mover::InFile;
use super::readers::{Readers, Wanted};
use super::{Opened, Order, lift_refused};
use crate::node::device::{Copied, CopyBlock, CopyOrder, DeviceEnd, KeptSlot};
use crate::node::event::{Event, MoveError};
use kvd_client::paged::check_page_tokens;
use kvd_client::paged::table::PageTable;
use kvd_proto::slot_header::FLAG_CHECKSUMMED;
use kvd_proto::wire::{self, CopyMiss};
use kvd_proto::{Code, Error, GroupKind, Layout};
use kvd_tiers::gpu::paged::{Pages, Slice};
use kvd_tiers::gpu::shared::SharedDevice;
use kvd_tiers::gpu::transfer::{
    self, Direction, Ended, Fence, HostSlot, Item, Miss, Options, Outcome, Transfers,
};
use kvd_tiers::gpu::work::NO_PAGE;
use kvd_tiers::gpu::{Address, Chunk, Device, GpuError, Vector};
use kvd_tiers::media::hbm::{HbmMedium, HbmOptions};
use kvd_tiers::media::{Medium as _, MediumError, Wake};
use kvd_tiers::segment::SegmentId;
use rustix::fd::AsFd as _;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

/// Without orders the thread looks around this often.
const IDLE: Duration = Duration::from_millis(200);

pub(super) struct Pump {
    transfers: Transfers,
    memories: HashMap<u64, Memory>,
    /// By token, of which memory.
    copies: HashMap<u64, u64>,
    /// What the device has no room for yet.
    waiting: VecDeque<transfer::Order>,
    /// Memory of the device's own for copies, and how large a slot of each segment is.
    hbm: HbmMedium,
    slot_bytes: HashMap<SegmentId, u32>,
    /// What brings blocks there from NVMe; `None`: nothing does.
    readers: Option<Readers>,
    /// Blocks on that way, by token: read, then verified.
    lifts: HashMap<u64, Lift>,
    dram: Arc<DramSegments>,
    inbox: Inbox,
    outcomes: Vec<Outcome>,
    told: Vec<Input>,
}

struct Lift {
    /// Whose parts; nothing of the engine's is touched.
    pages: Arc<Pages>,
    kept: Address,
    checksums: Vec<u32>,
}

/// An engine's, open on this device.
struct Memory {
    pages: Arc<Pages>,
    page_tokens: u32,
    block_tokens: u32,
    /// A page has one state, of its block's last token.
    states: bool,
    first_layer_range: u32,
    part_layers: u32,
    ranges: Vec<Range<Address>>,
    copies: BTreeSet<u64>,
    closing: bool,
}

impl Pump {
    pub(super) fn new(
        (device, files): Opened,
        options: Options,
        capacity_bytes: u64,
        (dram, inbox): (Arc<DramSegments>, Inbox),
    ) -> Result<Self, MediumError> {
        let ordinal = device.info().ordinal;
        let shared = SharedDevice::new(device);
        let hbm = HbmMedium::new(Box::new(shared.clone()), HbmOptions { capacity_bytes, queue_depth: 1 })?;
        let unusable = |error: GpuError| MediumError::Unusable(error.to_string());
        let transfers = Transfers::new(Box::new(shared), options).map_err(unusable)?;
        let (memories, copies, waiting) = (HashMap::new(), HashMap::new(), VecDeque::new());
        let (outcomes, told) = (Vec::new(), Vec::new());
        let (slot_bytes, lifts) = (HashMap::new(), HashMap::new());
        let readers = files.map(|files| Readers::start(ordinal, &files, &transfers.waker()));
        Ok(Self {
            transfers,
            memories,
            copies,
            waiting,
            hbm,
            slot_bytes,
            readers,
            lifts,
            dram,
            inbox,
            outcomes,
            told,
        })
    }

    pub(super) fn waker(&self) -> Arc<dyn Wake> {
        self.transfers.waker()
    }

    /// Until nobody can order anything any more; otherwise the device is gone, and why.
    pub(super) fn run(&mut self, ordered: &Receiver<Order>) -> Option<String> {
        loop {
            loop {
                match ordered.try_recv() {
                    Ok(order) => self.order(order),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return None,
                }
            }
            let read = self.readers.as_ref().map(Readers::take_done).unwrap_or_default();
            read.into_iter().for_each(|(token, result)| self.was_read(token, result));
            self.submit_waiting();
            self.inbox.push_all(&mut self.told);
            self.transfers.reap(Some(IDLE), &mut self.outcomes);
            let outcomes = std::mem::take(&mut self.outcomes);
            outcomes.into_iter().for_each(|outcome| self.ended(outcome));
            if let Some(gone) = self.transfers.gone() {
                return Some(gone.to_string());
            }
        }
    }

    /// What was under way ends when the device was given up, and with it everything that it might still have done.
    pub(super) fn give_up(mut self, why: &str) {
        let Self { readers, transfers, hbm, .. } = self;
        drop(readers); // nothing is read into memory that is given up
        drop((transfers, hbm));
        for token in self.copies.into_keys() {
            let copied = Copied { blocks: 0, miss: CopyMiss::Device, reason: why.to_owned() };
            self.told.push(Input::Event(Event::Device(DeviceEnd::Copied { token, result: Ok(copied) })));
        }
        let lifts = self.lifts.into_keys().map(|token| lift_refused(token, why));
        self.told.extend(lifts.map(|end| Input::Event(Event::Device(end))));
        for (memory, _) in self.memories.into_iter().filter(|(_, memory)| memory.closing) {
            self.told.push(Input::Event(Event::Device(DeviceEnd::Closed { memory })));
        }
        self.inbox.push_all(&mut self.told);
    }

    fn tell(&mut self, end: DeviceEnd) {
        self.told.push(Input::Event(Event::Device(end)));
    }

    fn order(&mut self, order: Order) {
        match order {
            Order::Open { memory, layout, request, chunks } => {
                let opened = self.open(&layout, &request, &chunks);
                let reads_nvme = self.readers.is_some();
                let result = opened.map(|opened| {
                    self.memories.insert(memory, opened);
                    reads_nvme
                });
                self.tell(DeviceEnd::Opened { memory, result });
            }
            Order::Close { memory } => {
                let closing = self.memories.get_mut(&memory).expect("it is open");
                closing.closing = true;
                let copies: Vec<_> = closing.copies.iter().copied().collect();
                copies.into_iter().for_each(|token| self.stop(token));
                self.close_if_idle(memory);
            }
            Order::Copy(order) => {
                let token = order.token;
                if let Err(error) = self.copy(*order) {
                    self.tell(DeviceEnd::Copied { token, result: Err(error) });
                }
            }
            Order::Take { segment, bytes, slot_bytes } => {
                let taken = self.hbm.open_segment(segment, bytes);
                let taken = taken.map(|()| _ = self.slot_bytes.insert(segment, slot_bytes));
                if let (Ok(()), Some(readers)) = (&taken, &self.readers) {
                    readers.register(self.hbm.address(segment).expect("just opened"), bytes);
                }
                let result = taken.map_err(|error| error.to_string());
                self.tell(DeviceEnd::Taken { segment, result });
            }
            Order::Lift { token, memory, to, from } => {
                if let Err(why) = self.lift(token, memory, to, from) {
                    self.tell(lift_refused(token, why));
                }
            }
            Order::Unpin(mapping) => self.transfers.device_mut().unpin(&mapping),
        }
    }

    fn open(
        &mut self,
        layout: &Layout,
        request: &wire::OpenMemoryRequest,
        given: &Chunks,
    ) -> Result<Memory, Error> {
        let device = self.transfers.device_mut();
        let mut ranges = Vec::with_capacity(request.ranges.len());
        let mut given = given.iter();
        for (at, range) in request.ranges.iter().enumerate() {
            match open_range(device, range, &mut given) {
                Ok(address) => ranges.push(address..address + range.bytes),
                Err((error, fix)) => {
                    ranges.into_iter().for_each(|range| device.close(range.start));
                    return Err(Error::invalid(format!("ranges[{at}]"), error.to_string(), fix));
                }
            }
        }
        match pages(layout, request, &ranges) {
            Ok(pages) => Ok(Memory::new(layout, request, pages, ranges)),
            Err(error) => {
                ranges.into_iter().for_each(|range| device.close(range.start));
                Err(error)
            }
        }
    }

    fn stop(&mut self, token: u64) {
        // what the device has not been given yet ends here
        let waits = self.waiting.iter().position(|order| order.token == token);
        match waits {
            Some(at) => {
                self.waiting.remove(at).expect("just found");
                self.end(token, 0, CopyMiss::Stopped, "the memory is being closed".to_owned());
            }
            None => self.transfers.stop(token),
        }
    }

    /// Nothing has moved, and nothing will, after an error.
    fn copy(&mut self, order: CopyOrder) -> Result<(), Error> {
        let memory = &self.memories[&order.memory];
        let table: Vec<i32> =
            order.table.as_chunks::<4>().0.iter().map(|page| i32::from_le_bytes(*page)).collect();
        let (pages, layers) = (memory.pages.clone(), memory.layers(&order.layer_ranges));
        let rows = |(at, block): (usize, &CopyBlock)| {
            memory.rows(order.first_block + at as u32, block.tokens, &table, order.into_pages)
        };
        let rows: Vec<_> = order.blocks.iter().enumerate().map(rows).collect::<Result<_, _>>()?;
        let fence = order.fence.map(|fence| memory.fence(fence)).transpose()?;
        let mut items = Vec::with_capacity(rows.len());
        for (block, rows) in order.blocks.iter().zip(rows) {
            let parts = order.into_pages.then(|| pages.parts(layers.clone()));
            items.push(self.item(block, rows, &pages, parts)?);
        }
        let direction = if order.into_pages { Direction::Load } else { Direction::Store };
        self.copies.insert(order.token, order.memory);
        self.memories.get_mut(&order.memory).expect("open").copies.insert(order.token);
        self.waiting.push_back(transfer::Order {
            token: order.token,
            line: order.lease,
            direction,
            pages,
            layers,
            items,
            checksums_wanted: false,
            fence,
        });
        Ok(())
    }

    /// A block, in memory that the device reaches. `loaded`: the parts that must have their checksums.
    fn item(
        &mut self,
        block: &CopyBlock,
        rows: Vec<u64>,
        pages: &Pages,
        loaded: Option<impl Iterator<Item = u16>>,
    ) -> Result<Item, Error> {
        let kept = block.kept.map(|kept| self.kept(kept, pages));
        if block.kept.is_some_and(|kept| kept.there) {
            return Ok(Item { host: None, kept, rows, checksums: None });
        }
        let place = block.slot.expect("what is not in HBM is in DRAM");
        let (segment, slot) = (self.dram.get(place.segment), place.slot);
        let pinned = self.transfers.device_mut().pin(&segment.payload);
        pinned.map_err(|error| {
            let fix = "raise the limit of locked memory (ulimit -l, LimitMEMLOCK)";
            Error::new(Code::Unavailable, "device", error.to_string(), fix)
        })?;
        let checksums = loaded.map(|parts| {
            let header = segment.table().read(slot).map(|(_, header)| header);
            let known = header.filter(|header| header.flags & FLAG_CHECKSUMMED != 0);
            // of a block that was committed moments ago: they are computed from what it was just put into
            let all = known.map_or_else(|| segment.checksums(slot), |header| header.part_checksums);
            parts.map(|part| all[usize::from(part)]).collect()
        });
        let offset = segment.geometry.slot_offset(slot) as usize;
        let host = Some(HostSlot { mapping: segment.payload.clone(), offset });
        Ok(Item { host, kept, rows, checksums })
    }

    /// Begins to bring a block from NVMe; or why not.
    fn lift(
        &mut self,
        token: u64,
        memory: u64,
        to: KeptSlot,
        from: Option<InFile>,
    ) -> Result<(), &'static str> {
        let memory = self.memories.get(&memory).ok_or("the engine's memory is closed")?;
        let from = from.ok_or("the NVMe tier has no file that a device could read")?;
        let readers = self.readers.as_ref().ok_or("this device reads no files")?;
        let pages = memory.pages.clone();
        let (kept, layers) = (self.kept(to, &pages), 0..pages.slice().layers);
        let span = pages.span(layers.clone());
        let checksums = pages.parts(layers).map(|part| from.checksums[usize::from(part)]).collect();
        readers.read(Wanted {
            token,
            file: from.file,
            offset: from.offset + u64::from(span.start),
            address: kept.wrapping_add(u64::from(span.start)),
            bytes: span.len() as u64,
        });
        self.lifts.insert(token, Lift { pages, kept, checksums });
        Ok(())
    }

    /// Has what came from NVMe verified: a load of no page.
    fn was_read(&mut self, token: u64, result: Result<(), GpuError>) {
        if let Err(error) = result {
            self.lifts.remove(&token).expect("it was ordered");
            return self.tell(lift_refused(token, &error.to_string()));
        }
        let Lift { pages, kept, checksums } = &self.lifts[&token];
        let rows = vec![NO_PAGE; pages.rows() as usize];
        let checksums = Some(checksums.clone());
        self.waiting.push_back(transfer::Order {
            token,
            line: token,
            direction: Direction::Load,
            pages: pages.clone(),
            layers: 0..pages.slice().layers,
            items: vec![Item { host: None, kept: Some(*kept), rows, checksums }],
            checksums_wanted: false,
            fence: None,
        });
    }

    fn lifted(&mut self, token: u64, why: Option<Miss>) {
        self.lifts.remove(&token).expect("it was ordered");
        let result = match why {
            None => Ok(()),
            Some(Miss::Checksum(_)) => Err(MoveError::Checksum),
            Some(failed) => Err(MoveError::Device(failed.to_string())),
        };
        self.tell(DeviceEnd::Lifted { token, result });
    }

    /// A slot of HBM has a slice's span and no more: the address is that of the whole slot around it.
    fn kept(&self, kept: KeptSlot, pages: &Pages) -> Address {
        let first = self.hbm.address(kept.segment).expect("the node was told that it is open");
        let slot_bytes = self.slot_bytes[&kept.segment];
        let span = pages.span(0..pages.slice().layers);
        assert_eq!(span.len() as u32, slot_bytes, "a segment is of one slice");
        (first + u64::from(kept.slot) * u64::from(slot_bytes)).wrapping_sub(span.start.into())
    }

    fn submit_waiting(&mut self) {
        while let Some(order) = self.waiting.pop_front() {
            if let Err(order) = self.transfers.submit(order) {
                self.waiting.push_front(order);
                return;
            }
        }
    }

    fn ended(&mut self, outcome: Outcome) {
        let Outcome::Ended(Ended { token, items, .. }) = outcome else { return };
        if items.iter().any(|item| matches!(item, Err(Miss::Gone(_)))) {
            return; // it ends when the device was given up
        }
        let well = items.iter().take_while(|item| item.is_ok()).count();
        let why = items.into_iter().nth(well).and_then(Result::err);
        if self.lifts.contains_key(&token) {
            return self.lifted(token, why);
        }
        let (miss, reason) = match &why {
            None => (CopyMiss::None, String::new()),
            Some(Miss::Checksum(bad)) => (CopyMiss::Checksum, bad.to_string()),
            Some(Miss::Stopped) => (CopyMiss::Stopped, "the memory is being closed".to_owned()),
            Some(failed) => {
                tracing::warn!(%failed, "a copy between slots and device memory");
                (CopyMiss::Device, failed.to_string())
            }
        };
        self.end(token, well as u32, miss, reason);
    }

    fn end(&mut self, token: u64, blocks: u32, miss: CopyMiss, reason: String) {
        let id = self.copies.remove(&token).expect("a copy ends once");
        let memory = self.memories.get_mut(&id).expect("it outlives its copies");
        memory.copies.remove(&token);
        let copied = Copied { blocks, miss, reason };
        self.tell(DeviceEnd::Copied { token, result: Ok(copied) });
        self.close_if_idle(id);
    }

    fn close_if_idle(&mut self, id: u64) {
        // the last copy that was stopped before its turn closes it already
        let Some(memory) = self.memories.get(&id) else { return };
        if !memory.closing || !memory.copies.is_empty() {
            return;
        }
        let closed = self.memories.remove(&id).expect("just seen");
        let device = self.transfers.device_mut();
        closed.ranges.into_iter().for_each(|range| device.close(range.start));
        self.tell(DeviceEnd::Closed { memory: id });
    }
}

impl Memory {
    fn new(
        layout: &Layout,
        request: &wire::OpenMemoryRequest,
        pages: Pages,
        ranges: Vec<Range<Address>>,
    ) -> Self {
        let group = &layout.groups()[request.group as usize];
        let part_layers = group.layers / group.layer_ranges;
        Self {
            pages: Arc::new(pages),
            page_tokens: request.page_tokens,
            block_tokens: layout.block_tokens(),
            states: group.kind == GroupKind::State,
            first_layer_range: request.first_layer / part_layers,
            part_layers,
            ranges,
            copies: BTreeSet::new(),
            closing: false,
        }
    }

    /// A word of what the engine handed over.
    fn fence(&self, asked: wire::Fence) -> Result<Fence, Error> {
        let range = self.ranges.get(asked.range as usize);
        let address = range.and_then(|range| {
            let address = range.start.checked_add(asked.offset)?;
            (address.checked_add(4)? <= range.end).then_some(address)
        });
        let address = address.ok_or_else(|| {
            let what = format!("byte {} of range {}", asked.offset, asked.range);
            Error::invalid("fence", what, "give a word within one of the memory's ranges, counted from 0")
        })?;
        Ok(Fence { address, value: asked.value })
    }

    /// Layer ranges counted in the group, as layers counted in the memory.
    fn layers(&self, ranges: &Range<u32>) -> Range<u32> {
        let layer = |range: u32| (range - self.first_layer_range) * self.part_layers;
        layer(ranges.start)..layer(ranges.end)
    }

    /// Where the rows of a block's first `tokens` are. A store needs all of them.
    fn rows(&self, block: u32, tokens: u32, table: &[i32], into_pages: bool) -> Result<Vec<u64>, Error> {
        let pages = PageTable {
            table,
            pages: self.pages.slice().pages,
            page_tokens: self.page_tokens,
            block_tokens: self.block_tokens,
            last_only: self.states,
            seamless: false,
        };
        let mut rows = vec![NO_PAGE; self.pages.rows() as usize];
        let mut found = 0;
        for span in pages.spans(block, tokens)? {
            for row in 0..span.rows {
                rows[(span.block_row + row) as usize] =
                    u64::from(span.page) << 32 | u64::from(span.page_row + row);
            }
            found += span.rows;
        }
        let needed = if self.states { 1 } else { tokens };
        if !into_pages && found < needed {
            let what = format!("{} tokens of block {block} have no page", needed - found);
            return Err(Error::invalid("table", what, "store blocks whose tokens all have pages"));
        }
        Ok(rows)
    }
}

/// One allocation, by its handle or by as many of the given chunks as it names; or why not, and what to do.
fn open_range<'a>(
    device: &mut dyn Device,
    range: &wire::DeviceRange,
    given: &mut impl Iterator<Item = &'a HeldChunk>,
) -> Result<Address, (GpuError, &'static str)> {
    if range.chunks.is_empty() {
        let handle = range.handle[..].try_into().expect("the node checked its length");
        let fix = "give handles of allocations that live, made by cuIpcGetMemHandle of their first byte, and their sizes";
        return device.open(handle, range.bytes).map_err(|error| (error, fix));
    }
    let chunks: Vec<_> = range
        .chunks
        .iter()
        .map(|bytes| Chunk { memory: given.next().expect("the node counted them").as_fd(), bytes: *bytes })
        .collect();
    let fix = "give whole chunks of that device's memory, in order, each by what cuMemExportToShareableHandle (POSIX file descriptor) gives, and its size";
    device.map(&chunks).map_err(|error| (error, fix))
}

/// What was asked to be opened, as addresses of this device, each within what the engine handed over.
fn pages(
    layout: &Layout,
    request: &wire::OpenMemoryRequest,
    opened: &[Range<Address>],
) -> Result<Pages, Error> {
    let states = layout.groups()[request.group as usize].kind == GroupKind::State;
    let slice = Slice {
        group: request.group as usize,
        first_layer: request.first_layer,
        layers: request.layers.len() as u32,
        first_head: request.first_head,
        heads: request.heads,
        pages: request.pages,
        page_rows: if states { 1 } else { request.page_tokens },
    };
    check_page_tokens(request.page_tokens, layout.block_tokens())?;
    let mut vectors = Vec::new();
    for (at, layer) in request.layers.iter().enumerate() {
        for vector in &layer.vectors {
            let range = request.ranges.get(vector.range as usize).filter(|range| vector.offset < range.bytes);
            if range.is_none() {
                let what = format!("byte {} of range {}", vector.offset, vector.range);
                let fix = "count ranges from 0, and give offsets within them";
                return Err(Error::invalid(format!("layers[{at}]"), what, fix));
            }
            vectors.push(Vector {
                base: opened[vector.range as usize].start + vector.offset,
                page_stride: layer.page_stride,
                head_stride: layer.head_stride,
                token_stride: vector.token_stride,
            });
        }
    }
    Pages::new(layout, slice, vectors, opened)
}
