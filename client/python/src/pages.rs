//! Engines' paged memory, and blocks on their way in and out of it, as Python's connectors hold them.
//!
//! Invariants: an object that describes memory keeps what owns that memory alive; when a load or a store is dropped or stopped, nobody
//! touches the pages any more. Leaves to others: everything that is not a conversion (`kvd_client`).

use crate::chain::Chain;
use crate::client::{HandOff, Text};
use crate::error::{Miss, invalid, raise};
use crate::layout::Layout;
use crate::lease::PyMatch;
use crate::pending::seconds;
use crate::runtime;
use crate::space::{Space, Stored};
use kvd_client::Pages as Paged;
use kvd_client::{
    DeviceChunk, DeviceMemory, DevicePlace, DeviceRange, PagedGroup, PagedMemory, PagedShape, Store,
    VectorMemory,
};
use kvd_proto::{Group, GroupKind, wire};
use pyo3::prelude::*;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// One layer's KV in an engine's memory; all strides in bytes.
#[pyclass(frozen, module = "kvd", from_py_object)]
#[derive(Clone)]
pub(crate) struct LayerMemory {
    page_stride: isize,
    head_stride: isize,
    vectors: Vectors,
    /// Addresses are a device's.
    device: bool,
    keep: Option<Arc<Py<PyAny>>>,
}

/// How many vectors there are is known with the layout.
#[derive(Clone)]
enum Vectors {
    Every { first: VectorMemory, vector_stride: isize },
    Each(Vec<VectorMemory>),
}

#[pymethods]
impl LayerMemory {
    /// A vector of page p, head h, token t, K/V v begins at `ptr + p*page_stride + h*head_stride + t*token_stride + v*vector_stride`, and its
    /// numbers are contiguous. `keep`: an object whose life keeps the memory valid. `device`: `ptr` is a device's address.
    #[new]
    #[pyo3(signature = (ptr, *, page_stride, head_stride, token_stride, vector_stride=0, keep=None, device=false))]
    fn new(
        ptr: usize,
        page_stride: isize,
        head_stride: isize,
        token_stride: isize,
        vector_stride: isize,
        keep: Option<Py<PyAny>>,
        device: bool,
    ) -> PyResult<Self> {
        let first = vector((ptr, token_stride, None))?;
        let vectors = Vectors::Every { first, vector_stride };
        Ok(Self { page_stride, head_stride, vectors, device, keep: keep.map(Arc::new) })
    }

    /// K and V, or however many the group has, each with strides of its own: number n of page p, head h, token t lies at
    /// `ptr + p*page_stride + h*head_stride + t*token_stride + n*element_stride`. `element_stride` `None`: the numbers are contiguous.
    #[staticmethod]
    #[pyo3(signature = (vectors, *, page_stride, head_stride, keep=None))]
    fn of_vectors(
        vectors: Vec<(usize, isize, Option<isize>)>,
        page_stride: isize,
        head_stride: isize,
        keep: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let vectors = Vectors::Each(vectors.into_iter().map(vector).collect::<PyResult<_>>()?);
        let device = false;
        Ok(Self { page_stride, head_stride, vectors, device, keep: keep.map(Arc::new) })
    }
}

impl LayerMemory {
    fn of(&self, group: &Group) -> kvd_client::LayerMemory {
        let count = if group.kind == GroupKind::State { 1 } else { group.vectors };
        let vectors = match &self.vectors {
            Vectors::Every { first, vector_stride } => first.every(*vector_stride, count),
            Vectors::Each(vectors) => vectors.clone(),
        };
        kvd_client::LayerMemory { page_stride: self.page_stride, head_stride: self.head_stride, vectors }
    }
}

fn vector((ptr, token_stride, element_stride): (usize, isize, Option<isize>)) -> PyResult<VectorMemory> {
    if ptr == 0 {
        return Err(invalid("ptr", "0", "give the address of page 0"));
    }
    Ok(VectorMemory { base: ptr as *mut u8, token_stride, element_stride })
}

/// The memory in which one rank keeps its slice of a group.
#[pyclass(frozen, module = "kvd", from_py_object)]
#[derive(Clone)]
pub(crate) struct Pages {
    pages: Paged,
    shape: PagedShape,
    _keep: Vec<Arc<Py<PyAny>>>,
}

impl Pages {
    /// Of those on a device.
    pub(crate) fn device(&self) -> Option<Arc<DeviceMemory>> {
        match &self.pages {
            Paged::Device(memory) => Some(memory.clone()),
            Paged::Host(_) => None,
        }
    }
}

#[pymethods]
impl Pages {
    /// `layers`: from `first_layer` of the group on; `heads`: the rank's, from `first_head` on (0: all of them).
    #[new]
    #[pyo3(signature = (layout, layers, *, page_tokens, pages, group=0, first_layer=0, first_head=0, heads=0))]
    fn new(
        layout: &Layout,
        layers: Vec<LayerMemory>,
        page_tokens: u32,
        pages: u32,
        group: usize,
        first_layer: u32,
        first_head: u32,
        heads: u32,
    ) -> PyResult<Self> {
        layout.check_group(group)?;
        let kind = &layout.layout.groups()[group];
        let heads = if heads == 0 { kind.heads } else { heads };
        let shape = PagedShape { group, first_layer, first_head, heads, page_tokens, pages };
        if layers.iter().any(|layer| layer.device) {
            return Err(invalid("layers", "a device's addresses", "use Pages.on_device"));
        }
        let memory = layers.iter().map(|layer| layer.of(kind)).collect();
        let keep = layers.iter().filter_map(|layer| layer.keep.clone()).collect();
        // SAFETY: the connector's promise, in the docstrings: the strides are those of memory that `keep` keeps alive, and the engine
        // leaves pages alone while a load or store of theirs goes on.
        let pages = unsafe { PagedMemory::new(&layout.layout, shape, memory) }.map_err(raise)?;
        Ok(Self { pages: Paged::Host(Arc::new(pages)), shape, _keep: keep })
    }

    /// Pages in a device's memory, which the node copies from and to. `device`: its UUID, 16 bytes. `ranges`: the allocations that the layers
    /// are in, each as (address, bytes, the 64 bytes of its CUipcMemHandle); or, where there is none, (address, bytes, its chunks in order, each as
    /// (file descriptor, bytes)). Descriptors may be closed afterwards.
    #[staticmethod]
    #[pyo3(signature = (space, layers, *, device, ranges, page_tokens, pages, group=0, first_layer=0, first_head=0, heads=0))]
    fn on_device(
        space: &Space,
        layers: Vec<LayerMemory>,
        device: Vec<u8>,
        ranges: Vec<(usize, u64, Share)>,
        page_tokens: u32,
        pages: u32,
        group: usize,
        first_layer: u32,
        first_head: u32,
        heads: u32,
    ) -> PyResult<Self> {
        let kinds = space.handle().layout().groups();
        let Some(kind) = kinds.get(group) else {
            return Err(invalid("group", format!("{group} of {}", kinds.len()), "count groups from 0"));
        };
        let heads = if heads == 0 { kind.heads } else { heads };
        let shape = PagedShape { group, first_layer, first_head, heads, page_tokens, pages };
        let place = place(kind, &layers, &device, &ranges)?;
        let keep = layers.iter().filter_map(|layer| layer.keep.clone()).collect();
        let memory = DeviceMemory::new(space.handle(), shape, place).map_err(raise)?;
        Ok(Self { pages: Paged::Device(Arc::new(memory)), shape, _keep: keep })
    }

    /// Has the node open device pages now, and raises what stands against it; otherwise that is found with the first load or store.
    fn open(&self, py: Python<'_>) -> PyResult<()> {
        let Paged::Device(memory) = &self.pages else { return Ok(()) };
        let runtime = runtime::handle()?;
        py.detach(|| runtime.block_on(memory.open())).map_err(raise)
    }

    /// Returns when nothing of the node touches device pages any more, and their memory may be freed; `False`: not in that time.
    #[pyo3(signature = (timeout_s=None))]
    fn close(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<bool> {
        let Paged::Device(memory) = &self.pages else { return Ok(true) };
        let (runtime, timeout) = (runtime::handle()?, seconds("timeout_s", timeout_s)?);
        let closed = |left: Duration| {
            runtime.block_on(async { tokio::time::timeout(left, memory.close()).await }).ok()
        };
        Ok(patiently(py, timeout, closed)?.is_some())
    }

    /// Indices, in the group, of the parts that are this rank's.
    #[getter]
    fn parts(&self) -> Vec<u16> {
        self.pages.parts()
    }

    #[getter]
    fn page_tokens(&self) -> u32 {
        self.shape.page_tokens
    }

    #[getter]
    fn group(&self) -> usize {
        self.shape.group
    }
}

/// By what others open an allocation.
#[derive(FromPyObject)]
enum Share {
    Handle(Vec<u8>),
    /// Descriptors, which stay the caller's, and sizes.
    Chunks(Vec<(i32, u64)>),
}

impl Share {
    fn range(&self, bytes: u64) -> PyResult<DeviceRange> {
        let chunks = match self {
            Self::Handle(handle) => {
                let what = format!("a handle of {} bytes", handle.len());
                let handle = handle[..].try_into();
                let handle = handle.map_err(|_| invalid("ranges", what, "give CUipcMemHandle, 64 bytes"))?;
                return Ok(DeviceRange::Handle { handle, bytes });
            }
            Self::Chunks(chunks) => chunks.iter().map(chunk).collect::<PyResult<Vec<_>>>()?,
        };
        let range = DeviceRange::Chunks(chunks);
        if range.bytes() != bytes {
            let what = format!("chunks of {} bytes for {bytes}", range.bytes());
            return Err(invalid("ranges", what, "give all chunks of the range, with their sizes"));
        }
        Ok(range)
    }
}

/// Kept as long as the pages, since the node may have to open them again.
fn chunk((descriptor, bytes): &(i32, u64)) -> PyResult<DeviceChunk> {
    let refused = |what: String| {
        let fix = "give an open descriptor of cuMemExportToShareableHandle, and raise the limit of open files (ulimit -n) if it is that";
        invalid("ranges", format!("descriptor {descriptor}: {what}"), fix)
    };
    if *descriptor < 0 {
        return Err(refused("there is none of that number".to_owned()));
    }
    // SAFETY: the number is not -1. Whether it is open the kernel says, which makes another of it or refuses; nothing is done to it itself.
    let memory = unsafe { BorrowedFd::borrow_raw(*descriptor) }.try_clone_to_owned();
    let memory = memory.map_err(|error| refused(error.to_string()))?;
    Ok(DeviceChunk { memory: Arc::new(memory), bytes: *bytes })
}

/// Addresses as places within allocations.
fn place(
    kind: &Group,
    layers: &[LayerMemory],
    device: &[u8],
    ranges: &[(usize, u64, Share)],
) -> PyResult<DevicePlace> {
    let uuid = device.try_into();
    let device =
        uuid.map_err(|_| invalid("device", format!("{} bytes", device.len()), "give its UUID, 16 bytes"))?;
    let within = |address: usize| {
        let holds = |(base, bytes, _): &(usize, u64, Share)| {
            address.checked_sub(*base).is_some_and(|offset| (offset as u64) < *bytes)
        };
        let range = ranges.iter().position(holds)?;
        Some((range as u32, (address - ranges[range].0) as u64))
    };
    let layer = |layer: &LayerMemory| {
        if !layer.device {
            return Err(invalid(
                "layers",
                "the host's addresses",
                "use Pages, or LayerMemory with device=True",
            ));
        }
        let memory = layer.of(kind);
        let vector = |vector: &VectorMemory| {
            let address = vector.base as usize;
            if vector.element_stride.is_some() {
                return Err(invalid(
                    "element_stride",
                    "on a device",
                    "keep the numbers of a vector contiguous",
                ));
            }
            let (range, offset) = within(address).ok_or_else(|| {
                invalid(
                    "ranges",
                    format!("{address:#x} is in none"),
                    "give the allocations that the layers are in",
                )
            })?;
            Ok(wire::VectorPlace { range, offset, token_stride: vector.token_stride as i64 })
        };
        let vectors = memory.vectors.iter().map(vector).collect::<PyResult<_>>()?;
        let (page_stride, head_stride) = (memory.page_stride as i64, memory.head_stride as i64);
        Ok(wire::LayerPlace { page_stride, head_stride, vectors })
    };
    Ok(DevicePlace {
        device,
        ranges: ranges.iter().map(|(_, bytes, share)| share.range(*bytes)).collect::<PyResult<_>>()?,
        layers: layers.iter().map(layer).collect::<PyResult<_>>()?,
    })
}

fn paged(layout: &kvd_proto::Layout, pages: &[Pages], tables: Vec<Vec<i32>>) -> PyResult<Vec<PagedGroup>> {
    let groups = layout.groups().len();
    let in_order = pages.iter().enumerate().all(|(at, pages)| pages.shape.group == at);
    if pages.len() != groups || tables.len() != groups || !in_order {
        let message = format!("{} pages and {} tables for {groups} groups", pages.len(), tables.len());
        return Err(invalid("pages", message, "give pages and a table for each group, in order"));
    }
    Ok(pages.iter().map(|pages| pages.pages.clone()).zip(tables).collect())
}

/// Waits in short pieces, so that signals are seen.
fn patiently<T>(
    py: Python<'_>,
    timeout: Option<Duration>,
    wait: impl Fn(Duration) -> Option<T> + Sync,
) -> PyResult<Option<T>>
where
    T: Send,
{
    let piece = Duration::from_millis(100);
    let until = timeout.map(|timeout| std::time::Instant::now() + timeout);
    loop {
        let left = until.map_or(piece, |until| until.saturating_duration_since(std::time::Instant::now()));
        if let Some(done) = py.detach(|| wait(left.min(piece))) {
            return Ok(Some(done));
        }
        if left <= piece && until.is_some() {
            return Ok(None);
        }
        py.check_signals()?;
    }
}

/// The first block that is not there, why, and bytes copied.
type Outcome = (Option<u32>, Option<Miss>, u64);

/// Blocks on their way into pages.
#[pyclass(frozen, module = "kvd")]
pub(crate) struct Loading {
    loading: kvd_client::Loading,
    /// Its lease and its pages stay while it goes on.
    _keep: Vec<Pages>,
}

#[pymethods]
impl Loading {
    /// Whether nothing more will come.
    fn done(&self, py: Python<'_>) -> bool {
        py.detach(|| self.loading.ended())
    }

    /// Until a layer of a group is in its pages, as far as it will be; `False`: not yet.
    #[pyo3(signature = (layer, *, group=0, timeout_s=None))]
    fn wait_layer(&self, py: Python<'_>, layer: u32, group: usize, timeout_s: Option<f64>) -> PyResult<bool> {
        let there = |left| self.loading.wait_layer(group, layer, left).then_some(());
        Ok(patiently(py, seconds("timeout_s", timeout_s)?, there)?.is_some())
    }

    /// Until its end; `False`: it goes on.
    #[pyo3(signature = (timeout_s=None))]
    fn wait(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<bool> {
        let ended = |left| self.loading.wait(left).map(|_| ());
        Ok(patiently(py, seconds("timeout_s", timeout_s)?, ended)?.is_some())
    }

    /// Gives up what is not loaded yet, and waits for nothing: pages on a device may be touched until it is `done`.
    fn give_up(&self) {
        self.loading.give_up();
    }

    /// Gives up what is not loaded yet; afterwards nobody touches the pages.
    fn stop(&self, py: Python<'_>) {
        py.detach(|| self.loading.stop());
    }

    /// How it ended: (first block that is not there or `None`, why, bytes copied); raises if it made no sense. `None`: it goes on.
    fn outcome(&self, py: Python<'_>) -> PyResult<Option<Outcome>> {
        let Some(loaded) = py.detach(|| self.loading.wait(Duration::ZERO)) else { return Ok(None) };
        if let Some(refused) = loaded.refused {
            return Err(raise(refused));
        }
        Ok(Some((loaded.failed_from, loaded.miss.map(Miss::from), loaded.bytes)))
    }
}

/// Blocks on their way out of pages.
#[pyclass(frozen, module = "kvd")]
pub(crate) struct Storing {
    storing: Mutex<Option<kvd_client::Storing>>,
    ended: Mutex<Option<Result<kvd_client::Stored, kvd_proto::Error>>>,
    _keep: Vec<Pages>,
}

impl Storing {
    fn waited(&self, left: Duration) -> Option<()> {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if ended.is_none() {
            let storing = self.storing.lock().unwrap_or_else(PoisonError::into_inner);
            *ended = storing.as_ref().and_then(|storing| storing.wait(left));
        }
        ended.is_some().then_some(())
    }
}

#[pymethods]
impl Storing {
    /// Whether it has ended, one way or another.
    fn done(&self, py: Python<'_>) -> bool {
        py.detach(|| self.waited(Duration::ZERO)).is_some()
    }

    /// Until its end; `False`: it goes on.
    #[pyo3(signature = (timeout_s=None))]
    fn wait(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<bool> {
        Ok(patiently(py, seconds("timeout_s", timeout_s)?, |left| self.waited(left))?.is_some())
    }

    /// The first so many layers of a group are in the pages; for a store `by_layers`, which reads none before.
    #[pyo3(signature = (layers, *, group=0))]
    fn computed(&self, layers: u32, group: usize) {
        if let Some(storing) = self.storing.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            storing.computed(group, layers);
        }
    }

    /// Nothing more is stored; pages on a device may be read until it is `done`.
    fn give_up(&self) {
        if let Some(storing) = self.storing.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            storing.give_up();
        }
    }

    /// Returns when nobody reads the pages any more; what is not copied by then is left out.
    fn stop(&self, py: Python<'_>) {
        py.detach(|| {
            if let Some(storing) = self.storing.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
                storing.stop();
            }
        });
    }

    /// What was stored; raises what went wrong. `None`: it goes on.
    fn outcome(&self, py: Python<'_>) -> PyResult<Option<Stored>> {
        if py.detach(|| self.waited(Duration::ZERO)).is_none() {
            return Ok(None);
        }
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner).clone();
        ended.transpose().map(|stored| stored.map(Stored::from)).map_err(raise)
    }
}

/// Begins to load a match's blocks into pages (`Match.load_into`).
pub(crate) fn load_into(
    found: &PyMatch,
    pages: Vec<Pages>,
    tables: Vec<Vec<i32>>,
    first: u32,
    end: u32,
    patience_s: f64,
    fence: Option<(u32, u64, u32)>,
) -> PyResult<Loading> {
    let found = found.get()?;
    let patience = seconds("patience_s", Some(patience_s))?.unwrap_or_default();
    let groups = paged(found.layout(), &pages, tables)?;
    let fence = fence.map(|(range, offset, value)| wire::Fence { range, offset, value });
    let loading = kvd_client::Loading::begin(found, groups, first..end, patience, fence, &runtime::handle()?);
    Ok(Loading { loading, _keep: pages })
}

/// Begins to store a piece of a chain out of pages (`Space.store_from`).
pub(crate) fn store_from(
    space: &Space,
    key: Text,
    chain: &Chain,
    pages: Vec<Pages>,
    tables: Vec<Vec<i32>>,
    first: u32,
    wait_s: f64,
    hand_off: Option<HandOff>,
    by_layers: bool,
) -> PyResult<Storing> {
    let groups = paged(space.handle().layout(), &pages, tables)?;
    let first_token = u64::from(first) * u64::from(space.handle().layout().block_tokens());
    if let Some(amid) = pages.iter().find(|pages| !first_token.is_multiple_of(pages.shape.page_tokens.into()))
    {
        let message = format!("{first}: its first token is amid a page of {} tokens", amid.shape.page_tokens);
        return Err(invalid("first", message, "begin where a page begins"));
    }
    let blocks = chain.ids_slice().len() as u32 - first.min(chain.ids_slice().len() as u32);
    let reserved = space.reserving(Space::key(key)?, chain, first, wait_s, hand_off)?;
    let store = Store { space: space.handle().clone(), groups, tail_tokens: chain.tail(), by_layers };
    let storing = kvd_client::Storing::begin(store, blocks, reserved, &runtime::handle()?);
    Ok(Storing { storing: Mutex::new(Some(storing)), ended: Mutex::new(None), _keep: pages })
}
