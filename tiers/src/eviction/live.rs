//! A policy that another one takes the place of while copies come and go: the new one is told of every copy before it decides anything.
//!
//! Owns which copies the new one knows. Invariants: until it knows all, the old one decides and both hear everything; then the old one is gone.
//! Leaves to others: finding all copies, a share at a time (the caller's `arrives`).

use super::{Eviction, Handle, Request, Standing, Use};

/// The policy of a pool.
pub struct Live {
    now: Box<dyn Eviction>,
    next: Option<Next>,
}

struct Next {
    policy: Box<dyn Eviction>,
    /// By handle.
    known: Vec<bool>,
}

impl Next {
    fn knows(&self, handle: Handle) -> bool {
        self.known.get(handle as usize).is_some_and(|known| *known)
    }

    fn set(&mut self, handle: Handle, known: bool) {
        let at = handle as usize;
        if at >= self.known.len() {
            self.known.resize(at + 1, false);
        }
        self.known[at] = known;
    }
}

impl Live {
    /// With this one.
    pub fn new(policy: Box<dyn Eviction>) -> Self {
        Self { now: policy, next: None }
    }

    /// That one is to take its place; one that was to before is not any more.
    pub fn change(&mut self, policy: Box<dyn Eviction>) {
        self.next = Some(Next { policy, known: Vec::new() });
    }

    /// Whether another one is to take its place.
    pub fn changes(&self) -> bool {
        self.next.is_some()
    }

    /// A copy that is here, to the next one, unless it knows it.
    pub fn arrives(&mut self, handle: Handle, key: u64, now_us: u64) {
        let Some(next) = &mut self.next else { return };
        if !next.knows(handle) {
            next.policy.admit(handle, key, now_us);
            next.set(handle, true);
        }
    }

    /// All copies have arrived. Panics where they have not: the caller's promise.
    pub fn changed(&mut self) {
        let next = self.next.take().expect("a policy is to change");
        assert_eq!(next.policy.len(), self.now.len(), "every copy has arrived");
        self.now = next.policy;
    }

    fn each(&mut self, handle: Handle, tell: impl Fn(&mut dyn Eviction)) {
        tell(&mut *self.now);
        if let Some(next) = self.next.as_mut().filter(|next| next.knows(handle)) {
            tell(&mut *next.policy);
        }
    }
}

impl Eviction for Live {
    fn name(&self) -> &'static str {
        self.now.name()
    }

    fn request(&mut self, chain: &[u64], now_us: u64) -> Request {
        // by the old one's numbers: what the new one takes for the same request was another at worst
        self.now.request(chain, now_us)
    }

    fn insert(&mut self, handle: Handle, used: &Use) {
        self.now.insert(handle, used);
        if let Some(next) = &mut self.next {
            next.policy.insert(handle, used);
            next.set(handle, true);
        }
    }

    fn admit(&mut self, handle: Handle, key: u64, now_us: u64) {
        self.now.admit(handle, key, now_us);
        self.arrives(handle, key, now_us);
    }

    fn seen(&mut self, used: &Use) {
        self.now.seen(used);
        self.next.iter_mut().for_each(|next| next.policy.seen(used));
    }

    fn touch(&mut self, handle: Handle, used: &Use) {
        self.each(handle, |policy| policy.touch(handle, used));
    }

    fn expose(&mut self, handle: Handle) {
        self.each(handle, |policy| policy.expose(handle));
    }

    fn remove(&mut self, handle: Handle) {
        self.each(handle, |policy| policy.remove(handle));
        if let Some(next) = self.next.as_mut().filter(|next| next.knows(handle)) {
            next.set(handle, false);
        }
    }

    fn victim(
        &mut self,
        now_us: u64,
        scan_limit: usize,
        eligible: &mut dyn FnMut(Handle) -> bool,
    ) -> Option<Handle> {
        self.now.victim(now_us, scan_limit, eligible)
    }

    fn would_save_us(&self, key: u64, now_us: u64) -> Option<f32> {
        self.now.would_save_us(key, now_us)
    }

    fn standing(&self) -> Standing {
        self.now.standing()
    }

    fn len(&self) -> usize {
        self.now.len()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{NAMES, by_name};
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        /// Whatever comes and goes meanwhile, the new one knows what is here when it takes over.
        #[test]
        fn the_next_one_knows_every_copy(
            steps in proptest::collection::vec((0..5_u8, 0..40_u32), 1..300),
            from in 0..NAMES.len(), to in 0..NAMES.len(),
        ) {
            let mut live = Live::new(by_name(NAMES[from]).unwrap());
            let (mut here, mut cursor) = (BTreeSet::new(), 0);
            for (at, (kind, handle)) in steps.iter().enumerate() {
                if at == steps.len() / 4 {
                    live.change(by_name(NAMES[to]).unwrap());
                }
                let used = Use::unknown(u64::from(*handle), at as u64);
                match (kind, here.contains(handle)) {
                    (0, false) => {
                        live.insert(*handle, &used);
                        here.insert(*handle);
                    }
                    (1, false) => {
                        live.admit(*handle, used.key, at as u64);
                        here.insert(*handle);
                    }
                    (2, true) => live.touch(*handle, &used),
                    (3, true) => {
                        live.remove(*handle);
                        here.remove(handle);
                    }
                    _ if live.changes() => {
                        here.range(cursor..).take(1).for_each(|here| live.arrives(*here, (*here).into(), 0));
                        cursor = here.range(cursor..).next().map_or(cursor, |here| here + 1);
                    }
                    _ => {}
                }
            }
            if live.changes() {
                here.range(cursor..).for_each(|here| live.arrives(*here, (*here).into(), 0));
                live.changed();
                prop_assert_eq!(live.name(), NAMES[to]);
            }
            let mut left = here.len();
            while let Some(victim) = live.victim(1_000_000, 1000, &mut |_| true) {
                prop_assert!(here.contains(&victim));
                live.remove(victim);
                left -= 1;
            }
            prop_assert_eq!(left, 0);
        }
    }
}
