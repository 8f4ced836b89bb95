//! What hints are worth to the policies that take them: agents that call tools, think and end, served with and without their engine's word.
//!
//! Owns a cache of chains that evicts leaves, and a workload of agents. Invariant: same seed, same run. Leaves to others: how each
//! hint is understood (unit tests of `eviction`), its way to a policy (`kvd`).

use kvd_proto::{Expects, Hints};
use kvd_tiers::eviction::{self, Eviction, Handle, Use};
use std::collections::{BTreeMap, HashMap};

const BLOCK_SAVES_US: f64 = 1000.0;
const TAKE_HINTS: [&str; 2] = ["class-ttl", "worth"];

/// Copies of blocks by key, as one tier of a node keeps them.
struct Cache {
    policy: Box<dyn Eviction>,
    capacity: usize,
    copies: HashMap<u64, Handle>,
    keys: HashMap<Handle, (u64, Option<u64>)>,
    children: HashMap<u64, u32>,
    free: Vec<Handle>,
    saved_us: f64,
}

impl Cache {
    fn new(policy: &str, capacity: usize) -> Self {
        Self::with(eviction::by_name(policy).expect("known"), capacity)
    }

    fn with(policy: Box<dyn Eviction>, capacity: usize) -> Self {
        Self {
            policy,
            capacity,
            copies: HashMap::new(),
            keys: HashMap::new(),
            children: HashMap::new(),
            free: Vec::new(),
            saved_us: 0.0,
        }
    }

    /// A request; how many of its blocks are here, from the first on.
    fn ask(&mut self, chain: &[u64], now_us: u64, hints: Hints) -> usize {
        let here = chain.iter().take_while(|key| self.copies.contains_key(key)).count();
        self.saved_us += here as f64 * BLOCK_SAVES_US;
        let mut request = self.policy.request(chain, now_us);
        request.hints = hints;
        for (at, key) in chain.iter().enumerate().rev() {
            let saved_us = hints.weigh_us(BLOCK_SAVES_US) as f32;
            let used = Use { key: *key, request, at: at as u32, saved_us };
            if let Some(handle) = self.copies.get(key) {
                self.policy.touch(*handle, &used);
                continue;
            }
            let handle = self.free.pop().unwrap_or(self.keys.len() as Handle);
            self.policy.insert(handle, &used);
            let parent = at.checked_sub(1).map(|before| chain[before]);
            self.copies.insert(*key, handle);
            self.keys.insert(handle, (*key, parent));
            parent.into_iter().for_each(|parent| *self.children.entry(parent).or_default() += 1);
        }
        while self.copies.len() > self.capacity {
            self.evict(now_us);
        }
        here
    }

    fn evict(&mut self, now_us: u64) {
        let leaf = &mut |handle: Handle| !self.children.contains_key(&self.keys[&handle].0);
        let mut search = || self.policy.victim(now_us, 64, leaf);
        let victim = (0..self.capacity).find_map(|_| search()).expect("it comes to a leaf in time");
        self.policy.remove(victim);
        self.free.push(victim);
        let (key, parent) = self.keys.remove(&victim).expect("it is here");
        self.copies.remove(&key);
        let Some(parent) = parent else { return };
        let children = self.children.get_mut(&parent).expect("it had one");
        *children -= 1;
        if *children == 0 {
            self.children.remove(&parent);
            self.policy.expose(self.copies[&parent]);
        }
    }

    fn has(&self, chain: &[u64]) -> usize {
        chain.iter().filter(|key| self.copies.contains_key(key)).count()
    }
}

/// Numbers without a pattern.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB) >> 16
    }

    /// About so much, the longer the rarer.
    fn about(&mut self, mean: f64) -> f64 {
        let uniform = (self.next() % 1_000_000 + 1) as f64 / 1_000_001.0;
        -uniform.ln() * mean
    }
}

/// What follows a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Next {
    Tool,
    Person,
    End,
}

/// A request of an agent: its chain, when, and what follows.
struct Asked {
    chain: Vec<u64>,
    now_us: u64,
    next: Next,
}

/// Sessions begin every few seconds: a beginning that all share, a task, then steps of tools with a person's word between.
fn agents(seed: u64, sessions: u64) -> Vec<Asked> {
    let mut draw = Draw(seed);
    let (mut asked, mut begins_s) = (BTreeMap::new(), 0.0);
    for session in 1..=sessions {
        begins_s += draw.about(4.0);
        let (mut now_s, mut blocks) = (begins_s, 12 + draw.next() % 30);
        loop {
            let next = match draw.next() % 10 {
                0..7 => Next::Tool,
                7 => Next::Person,
                _ => Next::End,
            };
            let key = |at: u64| if at < 8 { at } else { session << 20 | at };
            let chain = (0..blocks).map(|at| key(at).wrapping_mul(0xD6E8_FEB8_6659_FD93)).collect();
            let now_us = (now_s * 1e6) as u64;
            asked.insert((now_us, session, blocks), Asked { chain, now_us, next });
            now_s += match next {
                Next::Tool => 0.5 + draw.about(20.0),
                Next::Person => 20.0 + draw.about(200.0),
                Next::End => break,
            };
            blocks += 1 + draw.next() % 6;
        }
    }
    asked.into_values().collect()
}

fn expecting(expects: Expects) -> Hints {
    Hints { expects, ..Hints::default() }
}

fn told(next: Next) -> Hints {
    match next {
        Next::Tool => expecting(Expects::ToolCall { return_ms: 0 }),
        Next::Person => Hints::default(),
        Next::End => expecting(Expects::SessionEnd),
    }
}

/// Seconds of prefill that a cache saves.
fn saved_s(policy: &str, capacity: usize, asked: &[Asked], mut hint: impl FnMut(Next) -> Hints) -> f64 {
    let mut cache = Cache::new(policy, capacity);
    for Asked { chain, now_us, next } in asked {
        cache.ask(chain, *now_us, hint(*next));
    }
    cache.saved_us / 1e6
}

/// Wrong two times of three.
fn liar(seed: u64) -> impl FnMut(Next) -> Hints {
    let mut draw = Draw(seed);
    move |_| told([Next::Tool, Next::Person, Next::End][(draw.next() % 3) as usize])
}

#[test]
fn hints_save_time_and_wrong_ones_are_seen_through() {
    let asked = agents(1, 500);
    for policy in TAKE_HINTS {
        let none = saved_s(policy, 600, &asked, |_| Hints::default());
        let [right, wrong] = [saved_s(policy, 600, &asked, told), saved_s(policy, 600, &asked, liar(1))];
        assert!(right > none * 1.15, "{policy}: {right} s with hints, {none} s without");
        assert!(wrong > none * 0.97, "{policy}: {wrong} s with wrong hints, {none} s without");
    }
}

/// The table of `ARCHITECTURE.md`, "What is the worth of a copy".
#[test]
#[ignore = "slow: a minute; prints a table"]
fn what_hints_are_worth() {
    let asked = agents(1, 1500);
    println!("all fits: {:.0}", saved_s("lru", usize::MAX, &asked, told));
    println!("policy blocks none right wrong");
    for blocks in [300, 600, 1200] {
        for policy in ["lru", "s3fifo"] {
            println!("{policy} {blocks} {:.0}", saved_s(policy, blocks, &asked, told));
        }
        for policy in TAKE_HINTS {
            let none = saved_s(policy, blocks, &asked, |_| Hints::default());
            let [right, wrong] =
                [saved_s(policy, blocks, &asked, told), saved_s(policy, blocks, &asked, liar(1))];
            println!("{policy} {blocks} {none:.0} {right:.0} {wrong:.0}");
        }
    }
}

/// Chain number so many, of ten blocks.
fn chain(number: u64) -> Vec<u64> {
    (0..10).map(|at| (number << 8 | at).wrapping_mul(0xD6E8_FEB8_6659_FD93)).collect()
}

/// A cache that has seen half of what nobody hints at come back after 20 s, for 1000 s.
fn warm(policy: &str, capacity: usize) -> Cache {
    let mut cache = Cache::new(policy, capacity);
    for second in 0..1000_u64 {
        let number = if second % 3 == 2 { second.saturating_sub(20) } else { second };
        cache.ask(&chain(number), second * 1_000_000, Hints::default());
    }
    cache
}

/// Blocks that are left of twenty chains of each kind, when twice as many others have come.
fn left(policy: &str, kinds: &[Hints]) -> Vec<usize> {
    let mut cache = warm(policy, 500);
    let numbers = || (0..20 * kinds.len()).map(|number| (10_000 + number as u64, number % kinds.len()));
    for (number, kind) in numbers() {
        cache.ask(&chain(number), (1000 + number / 1000) * 1_000_000, kinds[kind]);
    }
    for number in 0..40 {
        cache.ask(&chain(20_000 + number), (1012 + number / 4) * 1_000_000, Hints::default());
    }
    let left =
        |kind| numbers().filter(|(_, of)| *of == kind).map(|(number, _)| cache.has(&chain(number))).sum();
    (0..kinds.len()).map(left).collect()
}

#[test]
fn before_anything_is_learned_of_hints_an_engines_word_counts() {
    let kinds = [told(Next::Tool), told(Next::Person), told(Next::End)];
    for policy in TAKE_HINTS {
        let left = left(policy, &kinds);
        let [tool, person, end] = left[..] else { unreachable!("three kinds") };
        println!("{policy} {left:?}");
        assert!(tool > person && person >= end && end < 20, "{policy}: {left:?}");
    }
}

#[test]
fn what_is_worth_twice_as_much_stays() {
    let kinds = [100, 200].map(|priority_percent| Hints { priority_percent, ..Hints::default() });
    let left = left("worth", &kinds);
    assert!(left[1] > left[0] + 50, "{left:?}");
}

#[test]
fn a_time_to_live_is_kept_whichever_way_drives_and_no_longer() {
    let param =
        |way: &str| eviction::Choice { name: "worth".into(), params: [("way".into(), way.into())].into() };
    let ways = ["newest", "saved", "lru", "s3fifo", "class-ttl"].map(param);
    for choice in ways.into_iter().chain([eviction::Choice::named("class-ttl")]) {
        let mut cache = Cache::with(choice.policy().unwrap(), 200);
        cache.ask(&chain(1), 0, Hints { ttl_ms: 60_000, ..Hints::default() });
        for number in 1..60 {
            cache.ask(&chain(1000 + number), number * 1_000_000, Hints::default());
        }
        assert_eq!(cache.has(&chain(1)), 10, "{choice}");
        for number in 60..600 {
            cache.ask(&chain(1000 + number), number * 1_000_000, Hints::default());
            cache.ask(&chain(1000 + number), number * 1_000_000, Hints::default());
        }
        assert!(cache.has(&chain(1)) < 10, "{choice}");
    }
}

/// If all are to be kept, none is: whoever comes next finds room all the same.
#[test]
fn who_wants_to_keep_all_keeps_a_share() {
    for policy in TAKE_HINTS {
        let mut cache = Cache::new(policy, 400);
        let keep = Hints { ttl_ms: 3_600_000, ..Hints::default() };
        for number in 0..40 {
            cache.ask(&chain(number), number * 1000, keep);
        }
        for number in 0..100 {
            cache.ask(&chain(100 + number), 1_000_000 + number * 1000, Hints::default());
        }
        let kept: usize = (0..40).map(|number| cache.has(&chain(number))).sum();
        assert!((80..=200).contains(&kept), "{policy}: {kept} of 400");
    }
}
