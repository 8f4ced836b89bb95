//! Layouts as Python describes them: groups of layers, cut into parts.

use crate::error::{invalid, raise};
use kvd_proto::layout::{DataType, Element, GroupKind, ScaleKind};
use pyo3::prelude::*;

const DTYPES: &[(&str, DataType)] = &[
    ("f32", DataType::F32),
    ("f16", DataType::F16),
    ("bf16", DataType::Bf16),
    ("f8_e4m3", DataType::F8E4m3),
    ("f8_e5m2", DataType::F8E5m2),
    ("i8", DataType::I8),
    ("f4_e2m1", DataType::F4E2m1),
];
const KINDS: &[(&str, GroupKind)] = &[
    ("full", GroupKind::Full),
    ("window", GroupKind::Window),
    ("state", GroupKind::State),
    ("latent", GroupKind::Latent),
    ("draft", GroupKind::Draft),
];
const SCALES: &[(&str, ScaleKind)] = &[
    ("none", ScaleKind::None),
    ("per_tensor", ScaleKind::PerTensor),
    ("per_head", ScaleKind::PerHead),
    ("per_token", ScaleKind::PerToken),
];

fn named<T: Copy>(field: &str, known: &[(&str, T)], name: &str) -> PyResult<T> {
    let found = known.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
    found.ok_or_else(|| {
        let names: Vec<_> = known.iter().map(|(name, _)| *name).collect();
        invalid(field, format!("{name:?}"), &format!("say one of {}", names.join(", ")))
    })
}

/// Layers that keep KV alike.
#[pyclass(frozen, module = "kvd", from_py_object)]
#[derive(Clone)]
pub(crate) struct Group {
    pub(crate) group: kvd_proto::Group,
}

#[pymethods]
impl Group {
    #[new]
    #[pyo3(signature = (kind, layers, heads, head_size, dtype="bf16", *, vectors=2, window_tokens=0, state_bytes=0,
                        layer_ranges=0, head_ranges=0, scale="none", scale_digest=Vec::new()))]
    fn new(
        kind: &str,
        layers: u32,
        heads: u32,
        head_size: u32,
        dtype: &str,
        vectors: u32,
        window_tokens: u32,
        state_bytes: u32,
        layer_ranges: u32,
        head_ranges: u32,
        scale: &str,
        scale_digest: Vec<u8>,
    ) -> PyResult<Self> {
        let dtype = named("dtype", DTYPES, dtype)?;
        let element = Element { dtype, scale: named("scale", SCALES, scale)?, scale_digest };
        let kind = named("kind", KINDS, kind)?;
        let group = kvd_proto::Group {
            kind,
            window_tokens,
            layers,
            heads,
            head_size,
            vectors,
            element,
            layer_ranges,
            head_ranges,
            state_bytes,
        };
        Ok(Self { group })
    }

    #[getter]
    fn kind(&self) -> &'static str {
        KINDS.iter().find(|(_, kind)| *kind == self.group.kind).map_or("", |(name, _)| name)
    }

    #[getter]
    fn layers(&self) -> u32 {
        self.group.layers
    }

    #[getter]
    fn heads(&self) -> u32 {
        self.group.heads
    }

    #[getter]
    fn head_size(&self) -> u32 {
        self.group.head_size
    }

    #[getter]
    fn vectors(&self) -> u32 {
        self.group.vectors
    }

    #[getter]
    fn window_tokens(&self) -> u32 {
        self.group.window_tokens
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        let dtype = self.group.element.dtype;
        DTYPES.iter().find(|(_, known)| *known == dtype).map_or("", |(name, _)| name)
    }

    #[getter]
    fn layer_ranges(&self) -> u32 {
        self.group.layer_ranges
    }

    #[getter]
    fn head_ranges(&self) -> u32 {
        self.group.head_ranges
    }

    fn __repr__(&self) -> String {
        let group = &self.group;
        format!(
            "Group({:?}, layers={}, heads={}, head_size={}, dtype={:?}, vectors={}, layer_ranges={}, head_ranges={})",
            self.kind(),
            group.layers,
            group.heads,
            group.head_size,
            self.dtype(),
            group.vectors,
            group.layer_ranges,
            group.head_ranges
        )
    }
}

/// What a block's bytes mean.
#[pyclass(frozen, module = "kvd", from_py_object)]
#[derive(Clone)]
pub(crate) struct Layout {
    pub(crate) layout: kvd_proto::Layout,
}

#[pymethods]
impl Layout {
    /// Ranges that are 0 are chosen, the same wherever they are.
    #[new]
    fn new(groups: Vec<Group>, block_tokens: u32) -> PyResult<Self> {
        let cut = |group: Group| {
            let (given, chosen) = (group.group.clone(), kvd_proto::Layout::cut(group.group, block_tokens));
            let or = |given: u32, chosen: u32| if given > 0 { given } else { chosen };
            kvd_proto::Group {
                layer_ranges: or(given.layer_ranges, chosen.layer_ranges),
                head_ranges: or(given.head_ranges, chosen.head_ranges),
                ..given
            }
        };
        let groups = groups.into_iter().map(cut).collect();
        Ok(Self { layout: kvd_proto::Layout::new(groups, block_tokens).map_err(raise)? })
    }

    /// One group of full attention.
    #[staticmethod]
    fn full(layers: u32, heads: u32, head_size: u32, dtype: &str, block_tokens: u32) -> PyResult<Self> {
        let group = Group::new("full", layers, heads, head_size, dtype, 2, 0, 0, 0, 0, "none", Vec::new())?;
        Self::new(vec![group], block_tokens)
    }

    /// Bytes without further meaning: whole 4 KiB of them, as a slot has nothing else that the caller could fill.
    #[staticmethod]
    #[pyo3(signature = (bytes, block_tokens=1))]
    fn opaque(bytes: u32, block_tokens: u32) -> PyResult<Self> {
        if !bytes.is_multiple_of(kvd_proto::limits::PART_ALIGN) {
            return Err(invalid(
                "bytes",
                format!("{bytes}"),
                "give a multiple of 4096, and leave the rest of it zero",
            ));
        }
        Ok(Self { layout: kvd_proto::Layout::opaque(bytes, block_tokens).map_err(raise)? })
    }

    #[getter]
    fn block_tokens(&self) -> u32 {
        self.layout.block_tokens()
    }

    #[getter]
    fn groups(&self) -> Vec<Group> {
        self.layout.groups().iter().map(|group| Group { group: group.clone() }).collect()
    }

    /// Bytes of one slot.
    #[pyo3(signature = (group=0))]
    fn slot_bytes(&self, group: usize) -> PyResult<u32> {
        self.check_group(group)?;
        Ok(self.layout.slot_bytes(group))
    }

    /// (index, offset, bytes) of each part of a slot.
    #[pyo3(signature = (group=0))]
    fn parts(&self, group: usize) -> PyResult<Vec<(u16, u32, u32)>> {
        self.check_group(group)?;
        Ok(self.layout.parts(group).map(|part| (part.index, part.offset, part.bytes)).collect())
    }

    fn __repr__(&self) -> String {
        let groups: Vec<_> = self.groups().iter().map(Group::__repr__).collect();
        format!("Layout([{}], block_tokens={})", groups.join(", "), self.block_tokens())
    }
}

impl Layout {
    pub(crate) fn check_group(&self, group: usize) -> PyResult<()> {
        let groups = self.layout.groups().len();
        if group < groups {
            return Ok(());
        }
        Err(invalid("group", format!("{group} of a layout with {groups}"), "number groups from 0"))
    }
}
