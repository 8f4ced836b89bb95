//! Chains: a prompt's block ids that grow with its tokens, or keys of an engine's own.

use crate::error::{invalid, raise};
use kvd_proto::{BlockId, Fingerprint, Prompt, Span, block_id};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// Block ids in order.
#[pyclass(module = "kvd", from_py_object)]
#[derive(Clone)]
pub(crate) struct Chain {
    of: Of,
    /// The last id is a tail's, of so many tokens.
    tail_tokens: u32,
}

#[derive(Clone)]
enum Of {
    Prompt(Prompt),
    /// A piece of a prompt that does not grow, or keys.
    Ids {
        root: BlockId,
        ids: Vec<BlockId>,
        apart: bool,
    },
}

impl Chain {
    pub(crate) fn of_prompt(prompt: Prompt) -> Self {
        Self { of: Of::Prompt(prompt), tail_tokens: 0 }
    }

    pub(crate) fn of_keys(fingerprint: &Fingerprint, keys: &[Vec<u8>]) -> PyResult<Self> {
        let root = block_id::root(fingerprint, b"", b"").map_err(raise)?;
        let ids = keys.iter().map(|key| block_id::named(fingerprint, key)).collect::<Result<_, _>>();
        Ok(Self { of: Of::Ids { root, ids: ids.map_err(raise)?, apart: true }, tail_tokens: 0 })
    }

    pub(crate) fn of_ids(root: &[u8], ids: &[u8], tail_tokens: u32) -> PyResult<Self> {
        let root = BlockId::from_slice("root", root).map_err(raise)?;
        let ids = kvd_proto::Chain::from_packed("ids", ids).map_err(raise)?.ids().to_vec();
        Ok(Self { of: Of::Ids { root, ids, apart: false }, tail_tokens })
    }

    pub(crate) fn ids_slice(&self) -> &[BlockId] {
        match &self.of {
            Of::Prompt(prompt) => prompt.ids(),
            Of::Ids { ids, .. } => ids,
        }
    }

    pub(crate) fn root(&self) -> BlockId {
        match &self.of {
            Of::Prompt(prompt) => prompt.root(),
            Of::Ids { root, .. } => *root,
        }
    }

    pub(crate) fn is_apart(&self) -> bool {
        matches!(self.of, Of::Ids { apart: true, .. })
    }

    pub(crate) fn tail(&self) -> u32 {
        self.tail_tokens
    }

    /// As the client library asks with it; blocks before `first` left out.
    pub(crate) fn from(&self, first: u32) -> PyResult<kvd_proto::Chain> {
        let ids = self.ids_slice();
        let Some(ids) = ids.get(first as usize..) else {
            return Err(invalid(
                "first",
                format!("{first} of a chain of {}", ids.len()),
                "give a block of the chain",
            ));
        };
        kvd_proto::Chain::from_ids("chain", ids.to_vec()).map_err(raise)
    }

    /// The id before a block.
    pub(crate) fn parent(&self, block: u32) -> BlockId {
        match block {
            0 => self.root(),
            block => self.ids_slice()[block as usize - 1],
        }
    }
}

#[pymethods]
impl Chain {
    /// Appends tokens, and spans (kind, position, tokens, digest) that begin in them; returns the whole blocks so far.
    #[pyo3(signature = (tokens, spans=Vec::new()))]
    fn extend(&mut self, tokens: Vec<u32>, spans: Vec<(u8, u32, u32, Vec<u8>)>) -> PyResult<usize> {
        let Of::Prompt(prompt) = &mut self.of else {
            return Err(invalid(
                "chain",
                "a piece of another, or keys",
                "extend the chain that space.chain() made",
            ));
        };
        let span = |(kind, position, tokens, digest)| Span { kind, position, tokens, digest };
        let spans: Vec<_> = spans.into_iter().map(span).collect();
        prompt.extend(&tokens, &spans).map_err(raise)?;
        Ok(prompt.ids().len())
    }

    fn __len__(&self) -> usize {
        self.ids_slice().len()
    }

    /// Tokens given so far; 0 for a piece or keys.
    #[getter]
    fn tokens(&self) -> usize {
        match &self.of {
            Of::Prompt(prompt) => prompt.tokens(),
            Of::Ids { .. } => 0,
        }
    }

    /// Of its last block, if that is a tail; else 0.
    #[getter]
    fn tail_tokens(&self) -> u32 {
        self.tail_tokens
    }

    /// All ids, 16 bytes each.
    #[getter]
    fn ids<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let packed: Vec<u8> = self.ids_slice().iter().flat_map(|id| id.0).collect();
        PyBytes::new(py, &packed)
    }

    /// The parent of its first block.
    #[getter(root)]
    fn root_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.root().0)
    }

    /// One id.
    fn id<'py>(&self, py: Python<'py>, block: usize) -> PyResult<Bound<'py, PyBytes>> {
        let id = self.ids_slice().get(block).ok_or_else(|| {
            invalid("block", format!("{block} of a chain of {}", self.__len__()), "number blocks from 0")
        })?;
        Ok(PyBytes::new(py, &id.0))
    }

    /// Its first blocks, as they are now.
    pub(crate) fn prefix(&self, blocks: usize) -> Self {
        let ids = self.ids_slice();
        let ids = ids[..blocks.min(ids.len())].to_vec();
        let tail_tokens = if ids.len() == self.__len__() { self.tail_tokens } else { 0 };
        Self { of: Of::Ids { root: self.root(), ids, apart: self.is_apart() }, tail_tokens }
    }

    /// As it is now, with what is left over after its whole blocks as a tail; only for hand-offs.
    fn with_tail(&self) -> PyResult<Self> {
        let Of::Prompt(prompt) = &self.of else {
            return Err(invalid(
                "chain",
                "a piece of another, or keys",
                "take the tail of the chain that space.chain() made",
            ));
        };
        let mut ids = prompt.ids().to_vec();
        let tail = prompt.tail().map_err(raise)?;
        ids.extend(tail.map(|(id, _)| id));
        let tail_tokens = tail.map_or(0, |(_, tokens)| tokens);
        Ok(Self { of: Of::Ids { root: prompt.root(), ids, apart: false }, tail_tokens })
    }
}
