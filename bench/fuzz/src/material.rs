//! An input as a source of values: what a peer, a client or a damaged page may say where a number, an id or a name belongs.
//!
//! Invariants: every input gives values, one that is used up gives zeros; the same input gives the same values.

/// Numbers at which arithmetic goes wrong.
const EDGES: [u64; 12] = [
    0,
    1,
    255,
    256,
    4095,
    4096,
    (1 << 31) - 1,
    u32::MAX as u64,
    1 << 32,
    i64::MAX as u64,
    u64::MAX - 1,
    u64::MAX,
];

/// What is left of an input.
#[derive(Debug, Clone, Copy)]
pub struct Material<'a>(pub &'a [u8]);

impl<'a> Material<'a> {
    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// Below `end`, which is at most 256.
    pub fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    /// Once in so many times.
    pub fn one_in(&mut self, chances: usize) -> bool {
        self.below(chances) == chances - 1
    }

    /// So many bytes, or what is left.
    pub fn take(&mut self, bytes: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(bytes.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// Exactly so many.
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let taken = self.take(N);
        let mut array = [0; N];
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    /// Bytes that say their own length first.
    pub fn piece(&mut self) -> &'a [u8] {
        let bytes = u16::from_le_bytes(self.array());
        self.take(usize::from(bytes))
    }

    /// Mostly small, sometimes an edge, sometimes anything.
    pub fn number(&mut self) -> u64 {
        match self.byte() {
            small @ 0..=191 => u64::from(small % 32),
            edge @ 192..=239 => EDGES[usize::from(edge) % EDGES.len()],
            _ => u64::from_le_bytes(self.array()),
        }
    }

    /// As `number`, cut to 32 bits.
    pub fn number32(&mut self) -> u32 {
        self.number() as u32
    }

    /// Any of these, or nothing where there are none.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        let at = self.byte();
        (!from.is_empty()).then(|| from[usize::from(at) % from.len()])
    }
}
