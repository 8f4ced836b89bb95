//! What happens to bytes: one list for every place they lie in or pass, and one function over an image of it.
//!
//! Invariants: drawn from a seed; what was damaged is told in full, so that everything else must be as it was.

use std::ops::Range;

/// What devices read and write, and what is zeroed at once.
const PAGE_BYTES: usize = 4096;

/// A thing that happens to a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// One bit of its payload.
    BitFlip,
    /// 2 to 64 bits of its payload, within a page.
    Burst,
    /// One bit of what is said of it.
    HeaderFlip,
    /// A page of its payload reads as zeros.
    ZeroedPage,
    /// Its payload and another's, each in the other's place.
    SwappedPayloads,
    /// The same, with what is said of them.
    SwappedSlots,
    /// The payload that was there before.
    OlderPayload,
    /// What was said there before: the page of it, so its neighbours' too.
    StaleHeaderPage,
    /// All that was there before.
    OlderSlot,
    /// It lies, with what is said of it, where another's tenant's was, and nowhere else.
    OtherTenant,
    /// The image ends before it.
    Truncated,
}

/// Where a block lies in an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Object {
    /// Whose it is.
    pub(crate) tenant: u8,
    /// What is said of it; empty where that lies elsewhere.
    pub(crate) header: Range<usize>,
    pub(crate) payload: Range<usize>,
}

/// A device, an object or a frame, as bytes.
pub(crate) struct Image<'a> {
    pub(crate) bytes: Vec<u8>,
    /// The same at an earlier time.
    pub(crate) older: &'a [u8],
    pub(crate) objects: &'a [Object],
    /// It is cut at multiples of this.
    pub(crate) cut_bytes: usize,
}

impl Kind {
    /// Whether the right bytes may still be found after it.
    pub(crate) fn may_be_harmless(self) -> bool {
        // headers need not be looked at (a catalog), have bytes that mean nothing there (the live word), and move with their payload
        matches!(self, Self::HeaderFlip | Self::StaleHeaderPage | Self::SwappedSlots | Self::OlderSlot)
    }

    /// Whether blocks that are no longer there are said to be.
    pub(crate) fn brings_headers_back(self) -> bool {
        matches!(self, Self::StaleHeaderPage | Self::OlderSlot)
    }
}

impl Image<'_> {
    /// Damages object `at`, and with it only those that may be. Which are no longer what they were; empty: this cannot befall it.
    pub(crate) fn damage(
        &mut self,
        kind: Kind,
        at: usize,
        may_be: &dyn Fn(usize) -> bool,
        draws: &mut u64,
    ) -> Vec<usize> {
        let object = self.objects[at].clone();
        match kind {
            Kind::BitFlip => self.flip(at, object.payload, 1, draws),
            Kind::Burst => {
                let page = page(&object.payload, draws);
                let bits = 2 + draw(draws, 63);
                self.flip(at, page, bits, draws)
            }
            Kind::HeaderFlip => self.flip(at, object.header, 1, draws),
            Kind::ZeroedPage => {
                let page = page(&object.payload, draws);
                self.bytes[page].fill(0);
                vec![at]
            }
            Kind::SwappedPayloads | Kind::SwappedSlots => {
                let Some(other) = self.other(at, |other| other.tenant == object.tenant, may_be, draws) else {
                    return vec![];
                };
                let partner = &self.objects[other];
                swap(&mut self.bytes, &object.payload, &partner.payload);
                if kind == Kind::SwappedSlots {
                    swap(&mut self.bytes, &object.header, &partner.header);
                }
                vec![at, other]
            }
            Kind::OlderPayload => self.put_back(at, &[object.payload]),
            Kind::OlderSlot => self.put_back(at, &[object.header, object.payload]),
            Kind::StaleHeaderPage => self.stale_headers(at, &object, may_be),
            Kind::OtherTenant => self.moved_to_another(at, &object, may_be, draws),
            Kind::Truncated => self.cut_before(object.payload.start),
        }
    }

    fn flip(&mut self, at: usize, range: Range<usize>, bits: u64, draws: &mut u64) -> Vec<usize> {
        if range.is_empty() {
            return vec![];
        }
        let mut flipped = std::collections::BTreeSet::new();
        while (flipped.len() as u64) < bits {
            flipped.insert(draw(draws, range.len() as u64 * 8) as usize);
        }
        for bit in flipped {
            self.bytes[range.start + bit / 8] ^= 1 << (bit % 8);
        }
        vec![at]
    }

    /// Another object that fits, whose bytes differ.
    fn other(
        &self,
        at: usize,
        fits: impl Fn(&Object) -> bool,
        may_be: &dyn Fn(usize) -> bool,
        draws: &mut u64,
    ) -> Option<usize> {
        let (count, payload) = (self.objects.len(), &self.objects[at].payload);
        let start = draw(draws, count as u64) as usize;
        (0..count).map(|step| (start + step) % count).find(|other| {
            let partner = &self.objects[*other];
            *other != at
                && may_be(*other)
                && fits(partner)
                && partner.payload.len() == payload.len()
                && self.bytes[partner.payload.clone()] != self.bytes[payload.clone()]
        })
    }

    /// What was there before, if that was something else.
    fn put_back(&mut self, at: usize, ranges: &[Range<usize>]) -> Vec<usize> {
        let older = |range: &Range<usize>| self.older.get(range.clone());
        let differs = |range: &Range<usize>| {
            older(range).is_some_and(|bytes| {
                bytes != &self.bytes[range.clone()] && bytes.iter().any(|byte| *byte != 0)
            })
        };
        if !ranges.iter().all(differs) {
            return vec![];
        }
        for range in ranges {
            self.bytes[range.clone()].copy_from_slice(&self.older[range.clone()]);
        }
        vec![at]
    }

    fn stale_headers(&mut self, at: usize, object: &Object, may_be: &dyn Fn(usize) -> bool) -> Vec<usize> {
        let start = object.header.start / PAGE_BYTES * PAGE_BYTES;
        let page = start..start + PAGE_BYTES;
        let within = |other: &Object| page.contains(&other.header.start);
        let touched: Vec<_> = (0..self.objects.len()).filter(|other| within(&self.objects[*other])).collect();
        let free = touched.iter().all(|other| *other == at || may_be(*other));
        if !free || self.put_back(at, &[page]).is_empty() { vec![] } else { touched }
    }

    fn moved_to_another(
        &mut self,
        at: usize,
        object: &Object,
        may_be: &dyn Fn(usize) -> bool,
        draws: &mut u64,
    ) -> Vec<usize> {
        let Some(other) = self.other(at, |other| other.tenant != object.tenant, may_be, draws) else {
            return vec![];
        };
        let partner = self.objects[other].clone();
        for (from, to) in [(&object.header, &partner.header), (&object.payload, &partner.payload)] {
            self.bytes.copy_within(from.clone(), to.start);
            self.bytes[from.clone()].fill(0);
        }
        vec![at, other]
    }

    fn cut_before(&mut self, end: usize) -> Vec<usize> {
        let end = end / self.cut_bytes * self.cut_bytes;
        self.bytes.truncate(end);
        (0..self.objects.len()).filter(|other| self.objects[*other].payload.end > end).collect()
    }
}

/// One of the payload's pages.
fn page(payload: &Range<usize>, draws: &mut u64) -> Range<usize> {
    let pages = payload.len() / PAGE_BYTES;
    let start = payload.start + draw(draws, pages as u64) as usize * PAGE_BYTES;
    start..start + PAGE_BYTES
}

fn swap(bytes: &mut [u8], one: &Range<usize>, other: &Range<usize>) {
    let kept = bytes[one.clone()].to_vec();
    bytes.copy_within(other.clone(), one.start);
    bytes[other.clone()].copy_from_slice(&kept);
}

/// Up to `below`, which is not 0.
pub(crate) fn draw(draws: &mut u64, below: u64) -> u64 {
    kvd_tiers::media::fault::splitmix64(draws) % below
}
