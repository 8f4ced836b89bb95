//! Which copy of a tier goes first: one trait, one file per policy.
//!
//! The caller guarantees: a handle is inserted once and removed once; one touch a request, chains touched tail first,
//! and new copies of a chain inserted tail first, so that a parent is never older than its children; a parent whose last
//! child has gone is exposed. (Where that is broken nothing is wrong, only slow: parents are looked at, found ineligible and
//! moved away, one look each.)
//! The policy guarantees: amortised O(1) a call, bounded scanning, no clock, no randomness; it never decides whether a
//! copy *may* go (leases, pins, children: the caller's `eligible`).

mod class;
pub mod class_ttl;
mod held;
pub(crate) mod keys;
mod learned;
mod lens;
mod lists;
pub mod live;
pub mod lru;
mod queues;
mod reuse;
pub mod s3fifo;
mod shadow;
pub mod worth;

pub(crate) use learned::TRUNK_USES;

use kvd_proto::{Error, Hints};
use std::collections::BTreeMap;
use std::fmt;

/// An entry of the catalog.
pub type Handle = u32;

/// The policies' names, as the config has them.
pub const NAMES: [&str; 4] = [lru::NAME, s3fifo::NAME, class_ttl::NAME, worth::NAME];

/// Those of them that learn nothing from requests, for callers that tell of none.
pub const WITHOUT_REQUESTS: [&str; 2] = [lru::NAME, s3fifo::NAME];

/// A request as a policy sees it begin, to be handed back with each of its uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Given by the policy, to tell requests apart: a request's uses of a block count once.
    pub number: u32,
    /// When it began, by the caller's clock in microseconds.
    pub now_us: u64,
    /// Blocks of its chain.
    pub blocks: u32,
    /// So many of them, from the head on, the policy has seen before, whether they are here or gone.
    pub known: u32,
    /// Which turn of a conversation it is, as far as the policy has seen the others: 1 and more.
    pub turn: u8,
    /// So many blocks, from the head on, are used by very many requests.
    pub trunk: u32,
    /// Stands for the rest of the chain where chains are sampled.
    pub branch: u32,
    /// What its engine says of it, set by the caller; its priority is in what its uses save already. LRU and S3-FIFO take no hints.
    pub hints: Hints,
}

impl Request {
    /// One of which nothing is known.
    pub fn unknown(blocks: u32, now_us: u64) -> Self {
        Self { number: 0, now_us, blocks, known: 0, turn: 1, trunk: 0, branch: 0, hints: Hints::default() }
    }
}

/// A use of a block by a request.
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

/// How a policy does, for people.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Standing {
    /// The ways to evict that it compares, if it does, and what each would have saved of late, in microseconds, on the uses that are sampled.
    pub ways: Vec<(&'static str, f64)>,
    /// Which of them decides now.
    pub driver: usize,
    /// One in so many branches is sampled.
    pub sampled_one_in: u32,
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
    /// A new copy that no request brought, but room: it left the tier above, or was there before the daemon. Its uses, if there were any, were `seen`.
    fn admit(&mut self, handle: Handle, key: u64, now_us: u64) {
        self.insert(handle, &Use::unknown(key, now_us));
    }
    /// A request used a block that has no copy here.
    fn seen(&mut self, _used: &Use) {}
    /// The copy was used by a request.
    fn touch(&mut self, handle: Handle, used: &Use);
    /// The copy has no child here any more: it may go, as far as that goes.
    fn expose(&mut self, _handle: Handle) {}
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
    /// What a copy of a block that is not here would save, as far as uses of it were `seen`: the chance that it is used again before it would go, times
    /// what it saves then, in microseconds. `None`: the policy does not know.
    fn would_save_us(&self, _key: u64, _now_us: u64) -> Option<f32> {
        None
    }
    /// How it does.
    fn standing(&self) -> Standing {
        Standing::default()
    }
    /// Copies it knows.
    fn len(&self) -> usize;
    /// Whether it knows none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A policy by its name, and what of it is not as it would be by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// One of `NAMES`.
    pub name: String,
    /// By name: s3fifo has "small_percent", worth "way".
    pub params: BTreeMap<String, String>,
}

impl Choice {
    /// As it is by itself.
    pub fn named(name: &str) -> Self {
        Self { name: name.to_owned(), params: BTreeMap::new() }
    }

    /// The policy, which knows no copies; an error names what is not known, or no value for it.
    pub fn policy(&self) -> Result<Box<dyn Eviction>, Error> {
        let mut params = self.params.clone();
        let policy: Box<dyn Eviction> = match self.name.as_str() {
            lru::NAME => Box::new(lru::Lru::new()),
            s3fifo::NAME => Box::new(match params.remove("small_percent") {
                None => s3fifo::S3Fifo::new(s3fifo::SMALL_PERCENT_DEFAULT),
                Some(given) => s3fifo::S3Fifo::new(small_percent(&given)?),
            }),
            class_ttl::NAME => Box::new(class_ttl::ClassTtl::new()),
            worth::NAME => Box::new(match params.remove("way") {
                None => worth::Worth::new(),
                Some(way) => worth::Worth::only(&way)?,
            }),
            name => {
                return Err(Error::invalid(
                    "eviction",
                    format!("no policy is called {name:?}"),
                    format!("give one of: {}", NAMES.join(", ")),
                ));
            }
        };
        let Some((param, value)) = params.first_key_value() else { return Ok(policy) };
        let fix = match self.name.as_str() {
            s3fifo::NAME => "s3fifo has small_percent",
            worth::NAME => "worth has way",
            _ => "it has none",
        };
        Err(Error::invalid("param", format!("{} has no {param} that could be {value:?}", self.name), fix))
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        self.params.iter().try_for_each(|(param, value)| write!(f, " {param}={value}"))
    }
}

fn small_percent(given: &str) -> Result<usize, Error> {
    let percent = given.parse().ok().filter(|percent| (1..100).contains(percent));
    percent.ok_or_else(|| {
        Error::invalid("param", format!("small_percent is {given:?}"), "give a share of the copies, 1 to 99")
    })
}

/// The policy with that name in the config.
pub fn by_name(name: &str) -> Result<Box<dyn Eviction>, Error> {
    Choice::named(name).policy()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_proto::Expects;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    /// Requests for chains of a small tree, more than fit, in a cache that evicts leaves only and now and then loses something.
    fn serve(name: &str, requests: &[(u64, u8, bool)], capacity: usize) -> Vec<Handle> {
        let mut policy = by_name(name).unwrap();
        // by block: its handle; a block is its branch, and its place there
        let mut found = BTreeMap::<(u64, u8), Handle>::new();
        let (mut free, mut evicted) = ((0..1000).rev().collect::<Vec<Handle>>(), Vec::new());
        for (number, (branch, blocks, loses)) in requests.iter().enumerate() {
            let now_us = number as u64 * 100_000;
            let chain: Vec<_> = (0..*blocks).map(|at| (branch * u64::from(at > 1), at)).collect();
            let keys: Vec<_> = chain.iter().map(|(branch, at)| branch << 8 | u64::from(*at)).collect();
            let mut request = policy.request(&keys, now_us);
            request.hints = hints_of(number);
            assert_eq!(request.blocks, chain.len() as u32);
            assert!(request.known <= request.blocks && request.turn > 0);
            for (at, block) in chain.iter().enumerate().rev() {
                let used = Use { key: keys[at], request, at: at as u32, saved_us: 100.0 * at as f32 };
                if let Some(handle) = found.get(block) {
                    policy.touch(*handle, &used);
                } else {
                    let handle = free.pop().expect("few are here");
                    policy.insert(handle, &used);
                    found.insert(*block, handle);
                }
            }
            let over = found.len().saturating_sub(capacity) + usize::from(*loses);
            for _ in 0..over.min(found.len()) {
                let parents: BTreeSet<_> = found.keys().filter_map(|block| parent(*block)).collect();
                let leaf =
                    |handle| found.iter().any(|(block, known)| *known == handle && !parents.contains(block));
                let mut search = || policy.victim(now_us, 8, &mut |handle| leaf(handle));
                let victim = (0..found.len() + 8).find_map(|_| search()).expect("it comes to a leaf in time");
                assert!(leaf(victim));
                policy.remove(victim);
                free.push(victim);
                evicted.push(victim);
                let block = *found.iter().find(|(_, known)| **known == victim).expect("it is here").0;
                found.remove(&block);
                let above =
                    parent(block).filter(|above| !found.keys().any(|block| parent(*block) == Some(*above)));
                above.and_then(|above| found.get(&above)).into_iter().for_each(|above| policy.expose(*above));
            }
            assert_eq!(policy.len(), found.len());
        }
        evicted
    }

    /// None, each kind, and a time to live that outlasts the test: in a cache where all is to be kept there is room all the same.
    fn hints_of(number: usize) -> Hints {
        let expects =
            [Expects::Unknown, Expects::ToolCall { return_ms: 700 }, Expects::SessionEnd][number % 3];
        let ttl_ms = [0, 300, u32::MAX][number / 3 % 3];
        Hints { ttl_ms, expects, ..Hints::default() }
    }

    fn parent((branch, at): (u64, u8)) -> Option<(u64, u8)> {
        at.checked_sub(1).map(|at| (branch * u64::from(at > 1), at))
    }

    proptest! {
        #[test]
        fn every_policy_keeps_its_promises(
            requests in proptest::collection::vec((0..12_u64, 1..9_u8, any::<bool>()), 1..150),
            capacity in 4..40_usize,
        ) {
            for name in NAMES {
                let once = serve(name, &requests, capacity);
                prop_assert_eq!(once, serve(name, &requests, capacity), "no chance in {}", name);
            }
        }
    }

    #[test]
    fn a_choice_has_parameters_and_refuses_what_makes_no_sense() {
        let choice = |name: &str, param: &str, value: &str| {
            let mut choice = Choice::named(name);
            choice.params.insert(param.into(), value.into());
            choice
        };
        let twenty = choice("s3fifo", "small_percent", "20");
        assert_eq!(
            (twenty.policy().unwrap().name(), twenty.to_string()),
            ("s3fifo", "s3fifo small_percent=20".into())
        );
        let lru = choice("worth", "way", "lru").policy().unwrap();
        assert_eq!(lru.standing().ways[lru.standing().driver].0, "lru");
        for (name, param, value, says) in [
            ("s3fifo", "small_percent", "0", "1 to 99"),
            ("s3fifo", "small_percent", "most", "\"most\""),
            ("s3fifo", "big_percent", "20", "s3fifo has small_percent"),
            ("lru", "small_percent", "20", "lru has no small_percent"),
            ("worth", "way", "backwards", "newest"),
        ] {
            let error = choice(name, param, value).policy().err().expect("it makes no sense");
            assert!(error.field == "param" && error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn policies_are_found_by_name() {
        for name in NAMES {
            assert_eq!(by_name(name).unwrap().name(), name);
        }
        let error = by_name("lfu").err().expect("unknown");
        assert_eq!(error.field, "eviction");
        assert!(
            error.to_string().contains("\"lfu\"") && error.fix.contains("lru, s3fifo, class-ttl, worth"),
            "{error}"
        );
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
