//! A registered space, as Python asks it: match, reserve, store, load.

use crate::blocks::{exist_each, filled, load_each, loaded, store_each};
use crate::buffer::Held;
use crate::chain::Chain;
use crate::client::{Claim, HandOff, Text, now};
use crate::error::{Miss, invalid, raise};
use crate::hints::Hints;
use crate::lease::{PyFill, PyMatch, number, tier_name};
use crate::pages::{Pages, Storing, store_from};
use crate::pending::{Copies, Pending, seconds};
use kvd_client::{MatchOptions, ReserveState, SpaceHandle};
use kvd_proto::limits::REQUEST_KEY_BYTES_MAX;
use kvd_proto::{Error, IdScheme, Prompt, block_id};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyList};
use std::sync::Arc;

/// A state of reserved blocks, by name.
pub(crate) fn state_name(state: ReserveState) -> &'static str {
    match state {
        ReserveState::Granted => "granted",
        ReserveState::Present => "present",
        ReserveState::Busy => "busy",
        ReserveState::NoSpace => "no_space",
    }
}

/// What a model's blocks mean, and the questions about them.
#[pyclass(frozen, module = "kvd")]
pub(crate) struct Space {
    handle: SpaceHandle,
    id_scheme: IdScheme,
}

/// What became of blocks that were to be stored.
#[pyclass(frozen, module = "kvd", get_all)]
#[derive(Default, Clone)]
pub(crate) struct Stored {
    /// By us, now.
    stored: u32,
    /// They were there.
    present: u32,
    /// Somebody else is storing them.
    busy: u32,
    /// Left out: nothing could be evicted in time.
    no_space: u32,
    /// Kept for whoever claims them.
    handed_off: bool,
    /// Copied out of pages.
    bytes: u64,
}

impl From<kvd_client::Stored> for Stored {
    fn from(stored: kvd_client::Stored) -> Self {
        let kvd_client::Stored { filled, present, busy, no_space, handed_off, bytes } = stored;
        Self { stored: filled, present, busy, no_space, handed_off, bytes }
    }
}

#[pymethods]
impl Stored {
    fn __repr__(&self) -> String {
        let Self { stored, present, busy, no_space, handed_off, .. } = self;
        format!(
            "Stored(stored={stored}, present={present}, busy={busy}, no_space={no_space}, handed_off={handed_off})"
        )
    }
}

/// The prefix that could be read, and why not more.
#[pyclass(frozen, module = "kvd")]
pub(crate) struct Loaded {
    #[pyo3(get)]
    blocks: u32,
    #[pyo3(get)]
    miss: Option<Py<Miss>>,
}

#[pymethods]
impl Loaded {
    fn __repr__(&self) -> String {
        let miss = self.miss.as_ref().map_or("None".to_owned(), |miss| miss.get().__repr__());
        format!("Loaded(blocks={}, miss={miss})", self.blocks)
    }
}

impl Space {
    pub(crate) fn new(handle: SpaceHandle, id_scheme: IdScheme) -> Self {
        Self { handle, id_scheme }
    }

    pub(crate) fn handle(&self) -> &SpaceHandle {
        &self.handle
    }

    /// The same blocks asked for again are the same question.
    pub(crate) fn key(key: Text) -> PyResult<Vec<u8>> {
        let key = key.into_bytes();
        if key.len() > REQUEST_KEY_BYTES_MAX {
            let fix = format!("give at most {REQUEST_KEY_BYTES_MAX} bytes");
            return Err(invalid("key", format!("{} bytes", key.len()), &fix));
        }
        Ok(key)
    }

    fn one_group(&self) -> PyResult<usize> {
        if self.handle.layout().groups().len() == 1 {
            return Ok(self.handle.layout().slot_bytes(0) as usize);
        }
        Err(invalid("layout", "several groups", "use match() and reserve(), which take a group"))
    }

    fn held(&self, buffers: &Bound<'_, PyAny>, writable: bool) -> PyResult<Vec<Held>> {
        let bytes = self.one_group()?;
        buffers.try_iter()?.map(|buffer| Held::of(&buffer?, bytes, writable)).collect()
    }
}

fn named_only(chain: &Chain) -> PyResult<()> {
    if chain.is_apart() {
        return Ok(());
    }
    Err(invalid(
        "chain",
        "a prompt's, whose blocks are of use only in order",
        "use load(), store(), exists()",
    ))
}

#[pymethods]
impl Space {
    /// Keys all its block ids: two engines with the same one may read each other's blocks.
    #[getter]
    fn fingerprint<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.handle.fingerprint().0)
    }

    #[getter]
    fn layout(&self) -> crate::layout::Layout {
        crate::layout::Layout { layout: self.handle.layout().clone() }
    }

    #[getter]
    fn block_tokens(&self) -> u32 {
        self.handle.layout().block_tokens()
    }

    /// The chain of a prompt; `adapter`: digest of the adapter's weights; `salt`: a wall between users.
    #[pyo3(signature = (tokens=Vec::new(), *, adapter=Vec::new(), salt=Vec::new()))]
    fn chain(&self, tokens: Vec<u32>, adapter: Vec<u8>, salt: Vec<u8>) -> PyResult<Chain> {
        if self.id_scheme != IdScheme::Tokens {
            return Err(invalid("id_scheme", "this space is for keys", "use named()"));
        }
        let fingerprint = self.handle.fingerprint();
        let root = block_id::root(&fingerprint, &adapter, &salt).map_err(raise)?;
        let mut prompt = Prompt::new(fingerprint, self.block_tokens(), root);
        prompt.extend(&tokens, &[]).map_err(raise)?;
        Ok(Chain::of_prompt(prompt))
    }

    /// Blocks by an engine's own keys, each of which stands for itself.
    fn named(&self, keys: Vec<Text>) -> PyResult<Chain> {
        if self.id_scheme != IdScheme::Named {
            return Err(invalid("id_scheme", "this space is for tokens", "use chain()"));
        }
        let keys: Vec<_> = keys.into_iter().map(Text::into_bytes).collect();
        Chain::of_keys(&self.handle.fingerprint(), &keys)
    }

    /// Leases the prefix worth loading. See `match`.
    #[pyo3(signature = (key, chain, *, skip=0, claim=None, hints=None, into=vec![]))]
    fn match_soon(
        &self,
        key: Text,
        chain: &Chain,
        skip: u32,
        claim: Option<Claim>,
        hints: Option<Hints>,
        into: Vec<Pages>,
    ) -> PyResult<Pending> {
        let (key, tail_tokens) = (Self::key(key)?, chain.tail());
        let (handle, asked) = (self.handle.clone(), chain.from(0)?);
        let claim = claim.map(|claim| kvd_client::Claim {
            key: claim.key,
            node: claim.node,
            wait: claim.wait,
            tail_tokens,
        });
        let said = hints.map(|hints| hints.said).unwrap_or_default();
        let into: Vec<_> = into.iter().filter_map(Pages::device).collect();
        let work = async move {
            let options = MatchOptions { claim: claim.as_ref(), hints: said, into: &into };
            handle.match_with(&key, &asked, skip, &options).await
        };
        let layout = self.handle.layout().clone();
        Pending::spawn(work, move |py, found| Ok(Py::new(py, PyMatch::new(found, &layout))?.into_any()))
    }

    /// Leases the prefix worth loading, without its first `skip` blocks. The same key and chain: the same lease, until released. `into`: pages on a device, of a group each, that it will be
    /// loaded into, and nothing else: what is on NVMe may come there past DRAM.
    #[pyo3(name = "match", signature = (key, chain, *, skip=0, claim=None, hints=None, into=vec![], timeout_s=Some(2.0)))]
    fn match_now(
        &self,
        py: Python<'_>,
        key: Text,
        chain: &Chain,
        skip: u32,
        claim: Option<Claim>,
        hints: Option<Hints>,
        into: Vec<Pages>,
        timeout_s: Option<f64>,
    ) -> PyResult<Py<PyAny>> {
        now(py, &self.match_soon(key, chain, skip, claim, hints, into)?, timeout_s)
    }

    /// Slots to fill. See `reserve`.
    #[pyo3(signature = (key, chain, *, first=0, wait_s=0.0, hand_off=None))]
    fn reserve_soon(
        &self,
        key: Text,
        chain: &Chain,
        first: u32,
        wait_s: f64,
        hand_off: Option<HandOff>,
    ) -> PyResult<Pending> {
        let work = self.reserving(Self::key(key)?, chain, first, wait_s, hand_off)?;
        let layout = self.handle.layout().clone();
        let blocks = chain.ids_slice().len() - first as usize;
        Pending::spawn(work, move |py, fill| {
            Ok(Py::new(py, PyFill::new(fill, first, blocks, layout))?.into_any())
        })
    }

    /// Reserves slots for the chain's blocks from `first` on, waiting up to `wait_s` for space.
    #[pyo3(signature = (key, chain, *, first=0, wait_s=0.0, hand_off=None, timeout_s=Some(2.0)))]
    fn reserve(
        &self,
        py: Python<'_>,
        key: Text,
        chain: &Chain,
        first: u32,
        wait_s: f64,
        hand_off: Option<HandOff>,
        timeout_s: Option<f64>,
    ) -> PyResult<Py<PyAny>> {
        now(py, &self.reserve_soon(key, chain, first, wait_s, hand_off)?, timeout_s)
    }

    /// The tiers of the stored prefix. See `exists`.
    fn exists_soon(&self, chain: &Chain) -> PyResult<Pending> {
        let (handle, asked) = (self.handle.clone(), chain.from(0)?);
        Pending::spawn(async move { handle.exists(&asked).await }, |py, tiers| {
            let names = tiers.into_iter().map(tier_name);
            Ok(PyList::new(py, names.collect::<Vec<_>>())?.into_any().unbind())
        })
    }

    /// The tiers of the longest stored prefix, one a block; pins and touches nothing.
    #[pyo3(signature = (chain, timeout_s=Some(2.0)))]
    fn exists(&self, py: Python<'_>, chain: &Chain, timeout_s: Option<f64>) -> PyResult<Py<PyAny>> {
        now(py, &self.exists_soon(chain)?, timeout_s)
    }

    /// Keeps the stored prefix from eviction for a while; 0 unpins. Returns how many blocks.
    #[pyo3(signature = (chain, ttl_s, timeout_s=Some(2.0)))]
    fn pin(&self, py: Python<'_>, chain: &Chain, ttl_s: f64, timeout_s: Option<f64>) -> PyResult<Py<PyAny>> {
        let ttl = seconds("ttl_s", Some(ttl_s))?.unwrap_or_default();
        let (handle, asked) = (self.handle.clone(), chain.from(0)?);
        now(py, &Pending::spawn(async move { handle.pin(&asked, ttl).await }, number)?, timeout_s)
    }

    /// Begins to bring the stored prefix into memory; returns how many blocks began to move.
    #[pyo3(signature = (chain, timeout_s=Some(2.0)))]
    fn prefetch(&self, py: Python<'_>, chain: &Chain, timeout_s: Option<f64>) -> PyResult<Py<PyAny>> {
        let (handle, asked) = (self.handle.clone(), chain.from(0)?);
        now(py, &Pending::spawn(async move { handle.prefetch(&asked).await }, number)?, timeout_s)
    }

    /// Stores blocks, one buffer each. See `store`.
    #[pyo3(signature = (chain, blocks, *, key=Text::Bytes(Vec::new()), first=0, wait_s=0.0))]
    fn store_soon(
        &self,
        chain: &Chain,
        blocks: &Bound<'_, PyAny>,
        key: Text,
        first: u32,
        wait_s: f64,
    ) -> PyResult<Pending> {
        let held = self.held(blocks, false)?;
        let chain = chain.prefix(first as usize + held.len());
        if chain.ids_slice().len() < first as usize + held.len() {
            let message = format!("{} from {first} of a chain of {}", held.len(), chain.ids_slice().len());
            return Err(invalid("blocks", message, "give one buffer a block of the chain"));
        }
        let work = self.reserving(Self::key(key)?, &chain, first, wait_s, None)?;
        let copies = Arc::new(Copies::default());
        let guard = copies.clone();
        let work = async move {
            let (fill, stored) = filled(work.await?, held, guard).await;
            Ok(Stored { stored: fill.commit().await?, ..stored })
        };
        Pending::copying(copies, work, |py, stored| Ok(Py::new(py, stored)?.into_any()))
    }

    /// Stores the chain's blocks from `first` on: one buffer a block, each exactly a slot. Nobody may change them meanwhile.
    #[pyo3(signature = (chain, blocks, *, key=Text::Bytes(Vec::new()), first=0, wait_s=0.0, timeout_s=Some(2.0)))]
    fn store(
        &self,
        py: Python<'_>,
        chain: &Chain,
        blocks: &Bound<'_, PyAny>,
        key: Text,
        first: u32,
        wait_s: f64,
        timeout_s: Option<f64>,
    ) -> PyResult<Py<PyAny>> {
        now(py, &self.store_soon(chain, blocks, key, first, wait_s)?, timeout_s)
    }

    /// Loads the stored prefix. See `load`.
    #[pyo3(signature = (chain, into, *, key=Text::Bytes(Vec::new()), first=0))]
    fn load_soon(&self, chain: &Chain, into: &Bound<'_, PyAny>, key: Text, first: u32) -> PyResult<Pending> {
        let held = self.held(into, true)?;
        let (handle, asked) = (self.handle.clone(), chain.prefix(first as usize + held.len()).from(0)?);
        let key = Self::key(key)?;
        let copies = Arc::new(Copies::default());
        let guard = copies.clone();
        let work = async move { Ok(loaded(handle, key, asked, first, held, guard).await) };
        Pending::copying(copies, work, |py, (blocks, miss, held)| {
            held.iter().take(blocks as usize).try_for_each(|held| held.finish(py))?;
            let miss = miss.map(|miss| Py::new(py, miss)).transpose()?;
            Ok(Py::new(py, Loaded { blocks, miss })?.into_any())
        })
    }

    /// Loads the chain's blocks from `first` on into memory, one buffer a block, verified, as far as they can be had. A node that is
    /// away is a miss.
    #[pyo3(signature = (chain, into, *, key=Text::Bytes(Vec::new()), first=0, timeout_s=Some(2.0)))]
    fn load(
        &self,
        py: Python<'_>,
        chain: &Chain,
        into: &Bound<'_, PyAny>,
        key: Text,
        first: u32,
        timeout_s: Option<f64>,
    ) -> PyResult<Py<PyAny>> {
        now(py, &self.load_soon(chain, into, key, first)?, timeout_s)
    }

    /// Begins to store the chain's blocks from `first` on out of an engine's pages: one `Pages` and one page table for each group;
    /// `tables[g][i]` is the page of the i-th page of tokens from the first block on. `done`, `wait`, `stop` and `outcome` say the rest. `by_layers`: layers are
    /// still being computed, and read as `computed` says that they are there.
    #[pyo3(signature = (key, chain, pages, tables, *, first=0, wait_s=0.0, hand_off=None, by_layers=false))]
    fn store_from(
        &self,
        key: Text,
        chain: &Chain,
        pages: Vec<Pages>,
        tables: Vec<Vec<i32>>,
        first: u32,
        wait_s: f64,
        hand_off: Option<HandOff>,
        by_layers: bool,
    ) -> PyResult<Storing> {
        store_from(self, key, chain, pages, tables, first, wait_s, hand_off, by_layers)
    }

    /// A chain out of ids that another process hashed, as `Chain.root` and `Chain.ids` are.
    #[pyo3(signature = (root, ids, tail_tokens=0))]
    fn chain_of(&self, root: &[u8], ids: &[u8], tail_tokens: u32) -> PyResult<Chain> {
        Chain::of_ids(root, ids, tail_tokens)
    }

    /// As `exists_each`.
    fn exists_each_soon(&self, chain: &Chain) -> PyResult<Pending> {
        named_only(chain)?;
        let (handle, asked) = (self.handle.clone(), chain.from(0)?);
        let work = async move {
            Ok(exist_each(&handle, &asked).await.unwrap_or_else(|_| vec![false; asked.ids().len()]))
        };
        Pending::spawn(work, |py, there| Ok(PyList::new(py, there)?.into_any().unbind()))
    }

    /// Whether each key's block is stored. A node that is away: none is.
    #[pyo3(signature = (chain, timeout_s=Some(2.0)))]
    fn exists_each(&self, py: Python<'_>, chain: &Chain, timeout_s: Option<f64>) -> PyResult<Py<PyAny>> {
        now(py, &self.exists_each_soon(chain)?, timeout_s)
    }

    /// As `load_each`.
    fn load_each_soon(&self, chain: &Chain, into: &Bound<'_, PyAny>) -> PyResult<Pending> {
        named_only(chain)?;
        let held = self.held(into, true)?;
        let (handle, asked) = (self.handle.clone(), chain.prefix(held.len()).from(0)?);
        let copies = Arc::new(Copies::default());
        let guard = copies.clone();
        let work = async move { Ok(load_each(handle, asked, held, guard).await) };
        Pending::copying(copies, work, |py, read| {
            let list = PyList::empty(py);
            for (held, miss) in read {
                match miss {
                    None => {
                        held.finish(py)?;
                        list.append(PyBool::new(py, true))?;
                    }
                    Some(miss) => list.append(Py::new(py, miss)?)?,
                }
            }
            Ok(list.into_any().unbind())
        })
    }

    /// Loads each key's block that can be had: `True` or its miss, one a key.
    #[pyo3(signature = (chain, into, timeout_s=Some(2.0)))]
    fn load_each(
        &self,
        py: Python<'_>,
        chain: &Chain,
        into: &Bound<'_, PyAny>,
        timeout_s: Option<f64>,
    ) -> PyResult<Py<PyAny>> {
        now(py, &self.load_each_soon(chain, into)?, timeout_s)
    }

    /// As `store_each`.
    #[pyo3(signature = (chain, blocks, *, wait_s=0.0))]
    fn store_each_soon(&self, chain: &Chain, blocks: &Bound<'_, PyAny>, wait_s: f64) -> PyResult<Pending> {
        named_only(chain)?;
        let held = self.held(blocks, false)?;
        let count = held.len();
        let reserving = self.reserving(Vec::new(), &chain.prefix(count), 0, wait_s, None)?;
        let copies = Arc::new(Copies::default());
        let guard = copies.clone();
        let work = async move {
            let stored = store_each(reserving, held, guard).await;
            Ok(stored.unwrap_or_else(|_| vec![false; count]))
        };
        Pending::copying(copies, work, |py, stored| Ok(PyList::new(py, stored)?.into_any().unbind()))
    }

    /// Stores each key's block: whether it is stored now, by us or before. A node that is away: none is.
    #[pyo3(signature = (chain, blocks, *, wait_s=0.0, timeout_s=Some(2.0)))]
    fn store_each(
        &self,
        py: Python<'_>,
        chain: &Chain,
        blocks: &Bound<'_, PyAny>,
        wait_s: f64,
        timeout_s: Option<f64>,
    ) -> PyResult<Py<PyAny>> {
        now(py, &self.store_each_soon(chain, blocks, wait_s)?, timeout_s)
    }
}

impl Space {
    /// Asks for slots, checked; spawned by whoever goes on with them.
    pub(crate) fn reserving(
        &self,
        key: Vec<u8>,
        chain: &Chain,
        first: u32,
        wait_s: f64,
        hand_off: Option<HandOff>,
    ) -> PyResult<impl Future<Output = Result<kvd_client::Fill, Error>> + Send + use<>> {
        let wait = seconds("wait_s", Some(wait_s))?.unwrap_or_default();
        let (handle, asked, apart) = (self.handle.clone(), chain.from(first)?, chain.is_apart());
        let (parent, hand_off) = (chain.parent(first), hand_off.map(|hand_off| hand_off.of(chain)));
        Ok(async move {
            match hand_off {
                _ if apart => handle.reserve_apart(&key, parent, &asked, wait).await,
                Some(hand_off) => handle.reserve_for(&hand_off, &key, parent, first, &asked, wait).await,
                None => handle.reserve(&key, parent, first, &asked, wait).await,
            }
        })
    }
}
