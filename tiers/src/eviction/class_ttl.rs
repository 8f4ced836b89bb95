//! Each class has its own time to live, learned from when its blocks came back: whatever is the least likely to come back now goes.
//!
//! After "KVCache Cache in the Wild" (Wang et al., USENIX ATC 2025, arXiv 2506.02634): per class, reuse times are about exponential, so that the
//! rate to expect is `share that comes back / mean age x e^(-age / mean age)`. What differs: our classes (`class`), and priors for those
//! with few samples (`reuse`). Invariants: as `queues`. Memory: 26 B a handle, 96 B a copy of what was seen; measured 121 at a million.

use super::held::Held;
use super::learned::Learned;
use super::lens::Lens;
use super::queues::{Queues, now_ms};
use super::{Eviction, Handle, Request, Use};

/// In the config.
pub const NAME: &str = "class-ttl";
/// Uses after which what was learned is used.
const LEARN_EVERY_USES: u32 = 2048;

/// The policy.
#[derive(Debug)]
pub struct ClassTtl {
    learned: Learned,
    queues: Queues,
    held: Held,
    lens: Lens,
    unlearned: u32,
}

impl ClassTtl {
    /// Knows no copies.
    pub fn new() -> Self {
        Self {
            learned: Learned::new(),
            queues: Queues::new(),
            held: Held::default(),
            lens: Lens::ttl(),
            unlearned: 0,
        }
    }

    fn used(&mut self, used: &Use, here: bool) -> super::class::Class {
        self.unlearned += 1;
        if self.unlearned == LEARN_EVERY_USES {
            self.unlearned = 0;
            self.lens.learn(&self.learned.reuse, 0.0, 0.0);
        }
        self.learned.used(used, here, self.queues.len()).0
    }
}

impl Default for ClassTtl {
    fn default() -> Self {
        Self::new()
    }
}

impl Eviction for ClassTtl {
    fn name(&self) -> &'static str {
        NAME
    }

    fn request(&mut self, chain: &[u64], now_us: u64) -> Request {
        self.learned.request(chain, now_us)
    }

    fn insert(&mut self, handle: Handle, used: &Use) {
        let class = self.used(used, true);
        self.queues.insert(handle, class, used);
        self.held.used(handle, used);
    }

    fn admit(&mut self, handle: Handle, key: u64, now_us: u64) {
        let last = self.learned.admitted(key, now_us);
        self.queues.admit(handle, key, last);
    }

    fn seen(&mut self, used: &Use) {
        self.used(used, false);
    }

    fn touch(&mut self, handle: Handle, used: &Use) {
        let class = self.used(used, true);
        self.queues.touch(handle, class, used);
        self.held.used(handle, used);
    }

    fn expose(&mut self, handle: Handle) {
        self.queues.expose(handle);
    }

    fn remove(&mut self, handle: Handle) {
        let fingerprint = self.queues.remove(handle);
        self.learned.gone(fingerprint);
        self.held.remove(handle);
    }

    fn victim(
        &mut self,
        now_us: u64,
        scan_limit: usize,
        eligible: &mut dyn FnMut(Handle) -> bool,
    ) -> Option<Handle> {
        let Self { queues, lens, .. } = self;
        self.held.victim(queues.len(), now_us, scan_limit, eligible, |eligible| {
            queues.victim(lens, now_ms(now_us), scan_limit, eligible)
        })
    }

    fn len(&self) -> usize {
        self.queues.len()
    }
}
