//! Which copy of a tier goes first: one trait, one file per policy.
//!
//! The caller guarantees: a handle is inserted once and removed once; one touch a request, chains touched tail first,
//! and new copies of a chain inserted tail first, so that a parent is never older than its children. (Where that is
//! broken nothing is wrong, only slow: parents are looked at, found ineligible and moved away, one look each.)
//! The policy guarantees: amortised O(1) a call, bounded scanning, no clock, no randomness; it never decides whether a
//! copy *may* go (leases, pins, children: the caller's `eligible`).

pub mod lru;
pub mod s3fifo;

use kvd_proto::Error;

/// An entry of the catalog.
pub type Handle = u32;

/// The policies' names, as the config has them.
pub const NAMES: [&str; 2] = [lru::NAME, s3fifo::NAME];

/// A request as a policy sees it begin, to be handed back with each of its uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// When it began, by the caller's clock in microseconds.
    pub now_us: u64,
    /// Blocks of its chain.
    pub blocks: u32,
    /// So many of them, from the head on, the policy has seen before, whether they are here or gone.
    pub known: u32,
    /// Which turn of a conversation it is, as far as the policy has seen the others: 1 and more.
    pub turn: u8,
}

impl Request {
    /// One of which nothing is known.
    pub fn unknown(blocks: u32, now_us: u64) -> Self {
        Self { now_us, blocks, known: 0, turn: 1 }
    }
}

/// A use of a block by a request. Uses of a block by requests that began in the same millisecond count as one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Use {
    /// The block id's first 64 bits, which outlive the handle: a policy may know it when it comes back.
    pub key: u64,
    /// Whose.
    pub request: Request,
    /// Its place in the request's chain.
    pub at: u32,
    /// Microseconds that having the block saves, over the next best source of it. Chains are worth something by their tails: all
    /// blocks that go and come with the same tail have the mean of them.
    pub saved_us: f32,
}

impl Use {
    /// A use of which nothing is known but when.
    pub fn unknown(key: u64, now_us: u64) -> Self {
        Self { key, request: Request::unknown(1, now_us), at: 0, saved_us: 0.0 }
    }
}

/// An order of eviction over handles.
pub trait Eviction: Send {
    /// Its name in the config: "lru", "s3fifo".
    fn name(&self) -> &'static str;
    /// A request with this chain, head first, begins.
    fn request(&mut self, chain: &[u64], now_us: u64) -> Request {
        Request::unknown(chain.len() as u32, now_us)
    }
    /// A new copy.
    fn insert(&mut self, handle: Handle, used: &Use);
    /// The copy was used by a request.
    fn touch(&mut self, handle: Handle, used: &Use);
    /// The copy is gone.
    fn remove(&mut self, handle: Handle);
    /// The first eligible copy in order, looking at no more than `scan_limit`. It stays until `remove`.
    /// What is not eligible is moved out of the way, so that a later call finds others first.
    fn victim(
        &mut self,
        now_us: u64,
        scan_limit: usize,
        eligible: &mut dyn FnMut(Handle) -> bool,
    ) -> Option<Handle>;
    /// Copies it knows.
    fn len(&self) -> usize;
    /// Whether it knows none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The policy with that name in the config.
pub fn by_name(name: &str) -> Result<Box<dyn Eviction>, Error> {
    match name {
        lru::NAME => Ok(Box::new(lru::Lru::new())),
        s3fifo::NAME => Ok(Box::new(s3fifo::S3Fifo::new(s3fifo::SMALL_PERCENT_DEFAULT))),
        _ => Err(Error::invalid(
            "eviction",
            format!("no policy is called {name:?}"),
            format!("give one of: {}", NAMES.join(", ")),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_found_by_name() {
        for name in NAMES {
            assert_eq!(by_name(name).unwrap().name(), name);
        }
        let error = by_name("lfu").err().expect("unknown");
        assert_eq!(error.field, "eviction");
        assert!(error.to_string().contains("\"lfu\"") && error.fix.contains("lru, s3fifo"), "{error}");
    }

    /// One-hit blocks pass by, more than the cache holds; a block that was used stays under S3-FIFO only.
    #[test]
    fn a_scan_evicts_the_reused_block_from_lru_and_not_from_s3fifo() {
        let survives = |name: &str| {
            let mut policy = by_name(name).unwrap();
            (0..100).for_each(|handle| policy.insert(handle, &Use::unknown(u64::from(handle), 0)));
            policy.touch(50, &Use::unknown(50, 0));
            for handle in 100..1000 {
                let victim = policy.victim(0, 200, &mut |_| true).expect("all are eligible");
                policy.remove(victim);
                if victim == 50 {
                    return false;
                }
                policy.insert(handle, &Use::unknown(u64::from(handle), 0));
            }
            true
        };
        assert!(survives(s3fifo::NAME) && !survives(lru::NAME));
    }
}
