//! What a block's bytes mean: groups of layers that keep KV alike, each cut into parts. Bytes: `FORMAT.md` section 3.
//!
//! Canonical order within a slot: layer range, head range; within a part: head, layer, K/V, token, dim.
//! Invariant: a `Layout` that exists is valid: every count positive and in limits, ranges divide evenly, every part of
//! a group has the same size, a multiple of `PART_ALIGN` with zero padding at its end.

use crate::error::Error;
use crate::limits::{
    BLOCK_TOKENS_MAX, GROUPS_MAX, PART_ALIGN, PARTS_MAX, SCALE_DIGEST_BYTES_MAX, SLOT_BYTES_MAX,
};
use crate::wire;

pub use crate::wire::{DataType, GroupKind, ScaleKind};

/// Layer ranges that `Layout::cut` gives where they divide the layers.
const LAYER_CUT_USUAL: u32 = 4;
/// A part that `Layout::cut` would make smaller by cutting layers stays whole.
const LAYER_CUT_BYTES_MIN: u32 = 16 << 10;
/// Layers and heads that `Layout::cut` looks at: as many as a layout may have.
const CUT_MAX: u32 = 65_536;

/// How one number is stored, and where its scale is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    /// The number's type.
    pub dtype: DataType,
    /// What one scale covers.
    pub scale: ScaleKind,
    /// Digest of scales kept outside the blocks, empty where there are none.
    pub scale_digest: Vec<u8>,
}

impl Element {
    /// An unscaled element.
    pub fn plain(dtype: DataType) -> Self {
        Self { dtype, scale: ScaleKind::None, scale_digest: Vec::new() }
    }

    /// Bits of one number.
    pub fn bits(&self) -> u64 {
        match self.dtype {
            DataType::Unspecified => unreachable!("a checked element has a type"),
            DataType::F32 => 32,
            DataType::F16 | DataType::Bf16 => 16,
            DataType::F8E4m3 | DataType::F8E5m2 | DataType::I8 => 8,
            DataType::F4E2m1 => 4,
        }
    }

    /// Two bytes for the slot header: type, scale.
    pub fn tag(&self) -> u16 {
        (self.dtype as u16) << 8 | self.scale as u16
    }
}

/// Layers that keep KV alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// What they keep.
    pub kind: GroupKind,
    /// Window groups: how far back they look.
    pub window_tokens: u32,
    /// Layers in the group.
    pub layers: u32,
    /// KV heads (1 for a latent).
    pub heads: u32,
    /// Numbers a vector.
    pub head_size: u32,
    /// Vectors a token, layer and head: 2 for K and V, 1 for a latent.
    pub vectors: u32,
    /// How a number is stored.
    pub element: Element,
    /// Equal cuts over layers.
    pub layer_ranges: u32,
    /// Equal cuts over heads.
    pub head_ranges: u32,
    /// State groups: bytes a layer and head, whatever the tokens.
    pub state_bytes: u32,
}

/// One contiguous run of a slot: one layer range x one head range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// `layer_range * head_ranges + head_range`.
    pub index: u16,
    /// Byte offset in the slot, a multiple of `PART_ALIGN`.
    pub offset: u32,
    /// Bytes with meaning; the rest up to the next part is zero.
    pub bytes: u32,
}

/// All groups of a model, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    groups: Vec<Group>,
    block_tokens: u32,
}

impl Group {
    /// Parts in a slot.
    pub fn part_count(&self) -> u32 {
        self.layer_ranges * self.head_ranges
    }

    fn part_bytes(&self, block_tokens: u32) -> u64 {
        u64::try_from(self.wide_part_bytes(block_tokens)).expect("a checked group's slot is small")
    }

    fn wide_part_bytes(&self, block_tokens: u32) -> u128 {
        let parts = u128::from(self.layer_ranges) * u128::from(self.head_ranges);
        self.block_bits(block_tokens).div_ceil(8 * parts)
    }

    /// A block's bits without padding, of numbers that nobody has checked yet.
    fn block_bits(&self, block_tokens: u32) -> u128 {
        let cells = u128::from(self.layers) * u128::from(self.heads);
        if self.kind == GroupKind::State {
            return cells.saturating_mul(u128::from(self.state_bytes) * 8);
        }
        if self.element.dtype == DataType::Unspecified {
            return 0;
        }
        let numbers = [self.vectors, block_tokens, self.head_size];
        let numbers = numbers.iter().fold(cells, |all, count| all.saturating_mul(u128::from(*count)));
        numbers.saturating_mul(u128::from(self.element.bits()))
    }

    fn check(&self, at: usize, block_tokens: u32) -> Result<(), Error> {
        let field = |name: &str| format!("layout.groups[{at}].{name}");
        let positive = [
            ("layers", self.layers),
            ("heads", self.heads),
            ("layer_ranges", self.layer_ranges),
            ("head_ranges", self.head_ranges),
        ];
        for (name, value) in positive {
            if value == 0 || value > 65_536 {
                return Err(Error::invalid(field(name), format!("{value}"), "give 1 to 65536"));
            }
        }
        if self.kind == GroupKind::Unspecified {
            return Err(Error::invalid(
                field("kind"),
                "not given",
                "say full, window, state, latent or draft",
            ));
        }
        let sizes = match self.kind {
            GroupKind::State => vec![("state_bytes", self.state_bytes, SLOT_BYTES_MAX)],
            _ => vec![("head_size", self.head_size, 65_536), ("vectors", self.vectors, 4)],
        };
        for (name, value, most) in sizes {
            if value == 0 || value > most {
                return Err(Error::invalid(field(name), format!("{value}"), format!("give 1 to {most}")));
            }
        }
        if (self.kind == GroupKind::Window) != (self.window_tokens > 0) {
            return Err(Error::invalid(
                field("window_tokens"),
                format!("{} for a {:?} group", self.window_tokens, self.kind),
                "give it for window groups and only there",
            ));
        }
        if self.kind != GroupKind::State && self.element.dtype == DataType::Unspecified {
            return Err(Error::invalid(field("element.dtype"), "not given", "name the element type"));
        }
        if self.element.scale_digest.len() > SCALE_DIGEST_BYTES_MAX {
            return Err(Error::invalid(
                field("element.scale_digest"),
                format!("{} bytes", self.element.scale_digest.len()),
                format!("give at most {SCALE_DIGEST_BYTES_MAX}"),
            ));
        }
        for (name, whole, ranges) in
            [("layer_ranges", self.layers, self.layer_ranges), ("head_ranges", self.heads, self.head_ranges)]
        {
            if whole % ranges != 0 {
                return Err(Error::invalid(
                    field(name),
                    format!("{ranges} does not divide {whole}"),
                    "cut into equal ranges",
                ));
            }
        }
        let parts = u64::from(self.layer_ranges) * u64::from(self.head_ranges);
        if parts > PARTS_MAX as u64 {
            return Err(Error::limit(
                field("layer_ranges"),
                format!("{parts} parts a block"),
                format!("cut into at most {PARTS_MAX} parts"),
            ));
        }
        let part = self.wide_part_bytes(block_tokens).next_multiple_of(u128::from(PART_ALIGN));
        let slot = part.saturating_mul(u128::from(parts));
        if slot > u128::from(SLOT_BYTES_MAX) {
            return Err(Error::limit(
                field("layers"),
                format!("{slot} bytes a block"),
                format!("use fewer block_tokens: a slot holds at most {SLOT_BYTES_MAX} bytes"),
            ));
        }
        Ok(())
    }
}

impl Layout {
    /// Checks the groups against each other and the limits.
    pub fn new(groups: Vec<Group>, block_tokens: u32) -> Result<Self, Error> {
        if groups.is_empty() || groups.len() > GROUPS_MAX {
            return Err(Error::invalid(
                "layout.groups",
                format!("{} groups", groups.len()),
                format!("give 1 to {GROUPS_MAX}"),
            ));
        }
        if block_tokens == 0 || block_tokens > BLOCK_TOKENS_MAX {
            return Err(Error::invalid(
                "block_tokens",
                format!("{block_tokens}"),
                format!("give 1 to {BLOCK_TOKENS_MAX}"),
            ));
        }
        groups.iter().enumerate().try_for_each(|(at, group)| group.check(at, block_tokens))?;
        Ok(Self { groups, block_tokens })
    }

    /// Fills in a group's `layer_ranges` and `head_ranges`. The cut is part of the space's fingerprint, so engines share blocks only if all
    /// choose the same, whatever their tensor and pipeline degrees: this is the one choice, from nothing but what the model is.
    ///
    /// Heads first, as tensor parallelism cuts there: as many ranges as there are heads, or the largest divisor that keeps parts at
    /// `PART_ALIGN` bytes or more and at most `PARTS_MAX` of them. So every tensor degree that divides the ranges finds whole parts; a degree above
    /// them (more ranks than heads) has ranks that keep the same heads, and one of them stores. Latents are one range: every rank has all of it.
    ///
    /// Then layers: the largest divisor up to 4 that keeps parts at 16 KiB or more. Four ranges let pipelines of 2 and 4 equal stages find whole
    /// parts, and loading layer by layer start when a quarter is there; more would only make parts smaller, where headers, requests and copies cost
    /// by the part. A number of layers that 2, 3 and 4 do not divide (61, 47, 35) takes its smallest larger divisor under the same bounds, often
    /// one range a layer, because one range would leave it no pipeline at all. Where nothing fits, it is one range.
    ///
    /// Numbers that `new` refuses are no error here: they give one range.
    pub fn cut(group: Group, block_tokens: u32) -> Group {
        let (layers, heads) = (group.layers.min(CUT_MAX), group.heads.min(CUT_MAX));
        let bytes = |parts: u32| group.block_bits(block_tokens) / (8 * u128::from(parts));
        let fits = |parts: u32, least: u32| parts as usize <= PARTS_MAX && bytes(parts) >= u128::from(least);
        let of_heads = |ranges: &u32| heads.is_multiple_of(*ranges) && fits(*ranges, PART_ALIGN);
        let head_ranges = match group.kind {
            GroupKind::Latent => 1,
            _ => (1..=heads).rev().find(of_heads).unwrap_or(1),
        };
        let of_layers =
            |ranges: &u32| layers.is_multiple_of(*ranges) && fits(ranges * head_ranges, LAYER_CUT_BYTES_MIN);
        let few = (2..=LAYER_CUT_USUAL.min(layers)).rev().find(of_layers);
        let divided = (2..=LAYER_CUT_USUAL).any(|ranges| layers.is_multiple_of(ranges));
        let many = (LAYER_CUT_USUAL + 1..=layers).find(of_layers).filter(|_| !divided);
        Group { layer_ranges: few.or(many).unwrap_or(1), head_ranges, ..group }
    }

    /// One full-attention group with K and V, the usual case.
    pub fn full(
        layers: u32,
        heads: u32,
        head_size: u32,
        dtype: DataType,
        ranges: (u32, u32),
        block_tokens: u32,
    ) -> Result<Self, Error> {
        let group = Group {
            kind: GroupKind::Full,
            window_tokens: 0,
            layers,
            heads,
            head_size,
            vectors: 2,
            element: Element::plain(dtype),
            layer_ranges: ranges.0,
            head_ranges: ranges.1,
            state_bytes: 0,
        };
        Self::new(vec![group], block_tokens)
    }

    /// Bytes without further meaning: one part of `bytes` (a multiple of 4096), for benchmarks and `named` engines.
    pub fn opaque(bytes: u32, block_tokens: u32) -> Result<Self, Error> {
        let group = Group {
            kind: GroupKind::Full,
            window_tokens: 0,
            layers: 1,
            heads: 1,
            head_size: bytes / block_tokens.max(1),
            vectors: 1,
            element: Element::plain(DataType::I8),
            layer_ranges: 1,
            head_ranges: 1,
            state_bytes: 0,
        };
        if block_tokens == 0 || !bytes.is_multiple_of(block_tokens) {
            return Err(Error::invalid(
                "block_tokens",
                format!("{block_tokens} does not divide {bytes} bytes"),
                "give a divisor of the block's bytes",
            ));
        }
        Self::new(vec![group], block_tokens)
    }

    /// The groups, in order.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Tokens a whole block has.
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// Distance between parts of a slot, a multiple of `PART_ALIGN`.
    pub fn part_stride(&self, group: usize) -> u32 {
        self.groups[group].part_bytes(self.block_tokens).next_multiple_of(u64::from(PART_ALIGN)) as u32
    }

    /// Bytes of one slot of a group.
    pub fn slot_bytes(&self, group: usize) -> u32 {
        self.part_stride(group) * self.groups[group].part_count()
    }

    /// The part with the given index.
    pub fn part(&self, group: usize, index: u16) -> Part {
        assert!(u32::from(index) < self.groups[group].part_count(), "part {index} of group {group}");
        Part {
            index,
            offset: self.part_stride(group) * u32::from(index),
            bytes: self.groups[group].part_bytes(self.block_tokens) as u32,
        }
    }

    /// All parts of a group's slot, in order.
    pub fn parts(&self, group: usize) -> impl Iterator<Item = Part> + '_ {
        (0..self.groups[group].part_count() as u16).map(move |index| self.part(group, index))
    }

    /// Appends the canonical bytes that the fingerprint covers.
    pub(crate) fn push_canonical(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.groups.len() as u32).to_le_bytes());
        for group in &self.groups {
            let numbers = [
                group.kind as u32,
                group.window_tokens,
                group.layers,
                group.heads,
                group.head_size,
                group.vectors,
                group.element.dtype as u32,
                group.element.scale as u32,
                group.layer_ranges,
                group.head_ranges,
                group.state_bytes,
                group.element.scale_digest.len() as u32,
            ];
            numbers.iter().for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
            out.extend_from_slice(&group.element.scale_digest);
        }
    }

    /// From the wire, checked.
    pub fn from_wire(layout: &wire::Layout, block_tokens: u32) -> Result<Self, Error> {
        let groups = layout.groups.iter().map(|group| {
            let element = group.element.clone().unwrap_or_default();
            Group {
                kind: group.kind(),
                window_tokens: group.window_tokens,
                layers: group.layers,
                heads: group.heads,
                head_size: group.head_size,
                vectors: group.vectors,
                element: Element {
                    dtype: element.dtype(),
                    scale: element.scale(),
                    scale_digest: element.scale_digest.to_vec(),
                },
                layer_ranges: group.layer_ranges,
                head_ranges: group.head_ranges,
                state_bytes: group.state_bytes,
            }
        });
        Self::new(groups.collect(), block_tokens)
    }

    /// As it travels.
    pub fn to_wire(&self) -> wire::Layout {
        let groups = self.groups.iter().map(|group| wire::Group {
            kind: group.kind.into(),
            window_tokens: group.window_tokens,
            layers: group.layers,
            heads: group.heads,
            head_size: group.head_size,
            vectors: group.vectors,
            element: Some(wire::Element {
                dtype: group.element.dtype.into(),
                scale: group.element.scale.into(),
                scale_digest: group.element.scale_digest.clone().into(),
            }),
            layer_ranges: group.layer_ranges,
            head_ranges: group.head_ranges,
            state_bytes: group.state_bytes,
        });
        wire::Layout { groups: groups.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_3_8b_has_32_parts_of_64_kib() {
        let layout = Layout::full(32, 8, 128, DataType::Bf16, (4, 8), 16).unwrap();
        assert_eq!(layout.slot_bytes(0), 2 << 20);
        assert_eq!(layout.parts(0).count(), 32);
        assert_eq!(layout.part(0, 5), Part { index: 5, offset: 5 * 65_536, bytes: 65_536 });
        assert_eq!(Layout::from_wire(&layout.to_wire(), 16).unwrap(), layout);
    }

    #[test]
    fn parts_are_padded_to_the_alignment() {
        let layout = Layout::full(3, 1, 10, DataType::F8E4m3, (3, 1), 7).unwrap();
        assert_eq!(layout.part(0, 2), Part { index: 2, offset: 8192, bytes: 140 });
        assert_eq!(layout.slot_bytes(0), 3 * 4096);
    }

    fn cut(kind: GroupKind, layers: u32, heads: u32, head_size: u32, block_tokens: u32) -> (u32, u32) {
        let full = Layout::full(1, 1, 1, DataType::Bf16, (1, 1), 1).unwrap().groups()[0].clone();
        let vectors = if kind == GroupKind::Latent { 1 } else { 2 };
        let whole =
            Group { kind, layers, heads, head_size, vectors, layer_ranges: 0, head_ranges: 0, ..full };
        let group = Layout::cut(whole, block_tokens);
        let layout = Layout::new(vec![group.clone()], block_tokens).unwrap();
        assert_eq!(Layout::cut(layout.groups()[0].clone(), block_tokens), group, "cut once is cut for good");
        (group.layer_ranges, group.head_ranges)
    }

    #[test]
    fn models_are_cut_the_same_by_everyone() {
        let (full, latent) = (GroupKind::Full, GroupKind::Latent);
        assert_eq!(cut(full, 32, 8, 128, 16), (4, 8), "Llama 3 8B");
        assert_eq!(cut(full, 80, 8, 128, 16), (4, 8), "Llama 3 70B");
        assert_eq!(cut(full, 94, 4, 128, 16), (2, 4), "Qwen 3 235B");
        assert_eq!(cut(full, 24, 2, 64, 16), (4, 2), "Qwen 2.5 0.5B");
        assert_eq!(cut(full, 32, 32, 128, 16), (4, 32), "Llama 2 7B");
        assert_eq!(cut(full, 96, 96, 128, 8), (2, 96), "256 parts at most");
        assert_eq!(cut(latent, 61, 1, 576, 16), (61, 1), "DeepSeek V3: a prime number of layers");
        assert_eq!(cut(latent, 61, 1, 576, 8), (1, 1), "parts of 9 KiB would be too small");
        assert_eq!(cut(latent, 27, 1, 576, 16), (3, 1), "DeepSeek V2 Lite");
        assert_eq!(cut(full, 1, 8, 128, 16), (1, 8), "a draft of one layer");
        assert_eq!(cut(full, 1, 8, 128, 4), (1, 4), "a part of one head would be below 4 KiB");
        assert_eq!(cut(full, 4, 4, 8, 2), (1, 1), "a toy");
    }

    #[test]
    fn nonsense_is_cut_without_a_word_and_refused_later() {
        let good = Layout::full(4, 2, 8, DataType::F16, (2, 1), 16).unwrap().groups()[0].clone();
        let none = Group { layers: 0, heads: 0, ..good.clone() };
        let most = Group {
            layers: u32::MAX,
            heads: u32::MAX,
            head_size: u32::MAX,
            vectors: u32::MAX,
            ..good.clone()
        };
        let unnamed = Group { element: Element::plain(DataType::Unspecified), ..good };
        for group in [none, most, unnamed] {
            let cut = Layout::cut(group, 16);
            assert!(Layout::new(vec![cut], 16).is_err());
        }
    }

    #[test]
    fn each_bad_number_is_named() {
        let good = Layout::full(4, 2, 8, DataType::F16, (2, 1), 16).unwrap().groups()[0].clone();
        let bad = [
            ("layers", Group { layers: 0, ..good.clone() }),
            ("layer_ranges", Group { layer_ranges: 3, ..good.clone() }),
            ("kind", Group { kind: GroupKind::Unspecified, ..good.clone() }),
            ("window_tokens", Group { kind: GroupKind::Window, ..good.clone() }),
            ("head_size", Group { head_size: 0, ..good.clone() }),
            ("state_bytes", Group { kind: GroupKind::State, ..good.clone() }),
            ("element.dtype", Group { element: Element::plain(DataType::Unspecified), ..good.clone() }),
            ("layers", Group { layers: 60_000, heads: 60_000, ..good.clone() }),
            // more than 64 bits can say: once the size came out as 0, and all was well
            (
                "layers",
                Group { layers: 65_536, heads: 65_536, head_size: 65_536, vectors: 4, ..good.clone() },
            ),
        ];
        for (field, group) in bad {
            let error = Layout::new(vec![group], 16).unwrap_err();
            assert!(error.field.ends_with(field), "{error}");
        }
        assert_eq!(Layout::new(vec![], 16).unwrap_err().field, "layout.groups");
        assert_eq!(Layout::new(vec![good], 0).unwrap_err().field, "block_tokens");
    }
}
