//! What the policies hear: whose use it was, at which place of which chain, and what it saves; and that it is bounded.

use super::harness::{World, config, id, ids, packed, reserve_after, reserve_of, with_nvme};
use kvd_proto::wire::{self, Tier, client_frame::Body as Ask, node_frame::Body as Reply};
use kvd_proto::{BlockId, Expects, Hints};
use kvd_tiers::eviction::live::Live;
use kvd_tiers::eviction::{Eviction, Handle, Request, Use};
use std::sync::{Arc, Mutex};

/// A call, the request's number, the block's place (blocks of the chain for a request), and what was known.
type Call = (&'static str, u32, u32, u32);

/// Least recently inserted goes first; everything it hears is written down.
#[derive(Default)]
struct Scribe {
    calls: Arc<Mutex<Vec<Call>>>,
    /// Of each use what its engine said, and what it saves.
    said: Arc<Mutex<Vec<(Hints, f32)>>>,
    known: u32,
    requests: u32,
    order: Vec<Handle>,
}

impl Scribe {
    fn write(&self, what: &'static str, used: &Use) {
        assert!(used.saved_us > 0.0, "{what}: having a block saves something");
        self.calls.lock().unwrap().push((what, used.request.number, used.at, used.request.known));
        self.said.lock().unwrap().push((used.request.hints, used.saved_us));
    }
}

impl Eviction for Scribe {
    fn name(&self) -> &'static str {
        "scribe"
    }
    fn request(&mut self, chain: &[u64], now_us: u64) -> Request {
        self.requests += 1;
        let blocks = chain.len() as u32;
        self.calls.lock().unwrap().push(("request", self.requests, blocks, self.known));
        Request { number: self.requests, known: self.known, ..Request::unknown(blocks, now_us) }
    }
    fn insert(&mut self, handle: Handle, used: &Use) {
        self.write("insert", used);
        self.order.push(handle);
    }
    fn admit(&mut self, handle: Handle, _key: u64, _now_us: u64) {
        self.calls.lock().unwrap().push(("admit", 0, 0, 0));
        self.order.push(handle);
    }
    fn seen(&mut self, used: &Use) {
        self.write("seen", used);
    }
    fn touch(&mut self, handle: Handle, used: &Use) {
        assert!(self.order.contains(&handle));
        self.write("touch", used);
    }
    fn expose(&mut self, handle: Handle) {
        assert!(self.order.contains(&handle));
        self.calls.lock().unwrap().push(("expose", 0, 0, 0));
    }
    fn remove(&mut self, handle: Handle) {
        self.calls.lock().unwrap().push(("remove", 0, 0, 0));
        self.order.retain(|known| *known != handle);
    }
    fn victim(&mut self, _: u64, _: usize, eligible: &mut dyn FnMut(Handle) -> bool) -> Option<Handle> {
        self.order.iter().copied().find(|handle| eligible(*handle))
    }
    fn len(&self) -> usize {
        self.order.len()
    }
}

struct Heard {
    dram: Arc<Mutex<Vec<Call>>>,
    nvme: Arc<Mutex<Vec<Call>>>,
    /// Of both.
    said: Arc<Mutex<Vec<(Hints, f32)>>>,
}

impl Heard {
    /// Writes down what the pools of the space hear from now on; `known`: of every chain.
    fn from(world: &mut World, known: u32) -> Self {
        let heard = Self { dram: Arc::default(), nvme: Arc::default(), said: Arc::default() };
        for pool in &mut world.node.memory.pools {
            let calls = Arc::clone(if pool.tier == Tier::Dram { &heard.dram } else { &heard.nvme });
            assert_eq!(pool.policy.len(), 0, "it must know what is there");
            let said = Arc::clone(&heard.said);
            pool.policy = Live::new(Box::new(Scribe { calls, said, known, ..Scribe::default() }));
        }
        heard
    }

    fn dram(&self) -> Vec<Call> {
        std::mem::take(&mut self.dram.lock().unwrap())
    }

    fn nvme(&self) -> Vec<Call> {
        std::mem::take(&mut self.nvme.lock().unwrap())
    }

    fn said(&self) -> Vec<(Hints, f32)> {
        std::mem::take(&mut self.said.lock().unwrap())
    }
}

fn world(known: u32) -> (World, u64, u32, Heard) {
    let mut world = World::new(with_nvme(6));
    let member = world.open("a");
    let space = world.space(member);
    let heard = Heard::from(&mut world, known);
    (world, member, space, heard)
}

fn fill(world: &mut World, member: u64, request: wire::ReserveRequest) {
    let reply = world.reserve(member, request);
    world.write(reply.lease, false);
    world.commit(member, reply.lease);
    world.release(member, reply.lease);
    world.pass_ms(1);
}

#[test]
fn what_a_request_computes_is_the_same_requests_as_what_it_found() {
    let (mut world, member, space, heard) = world(2);
    fill(&mut world, member, reserve_of(space, "", &ids(1..3), 0));
    assert_eq!(heard.dram(), [("request", 1, 2, 2), ("insert", 1, 1, 2), ("insert", 1, 0, 2)]);
    assert_eq!(heard.nvme(), [("request", 1, 2, 2), ("seen", 1, 1, 2), ("seen", 1, 0, 2)]);
    let lease = world.matched(member, space, &ids(1..6)).lease;
    world.pass_ms(1);
    assert_eq!(heard.dram(), [("request", 2, 5, 2), ("touch", 2, 1, 2), ("touch", 2, 0, 2)]);
    assert_eq!(heard.nvme(), [("request", 2, 5, 2), ("seen", 2, 1, 2), ("seen", 2, 0, 2)]);
    world.release(member, lease);
    // in two steps, as a prefill in chunks is stored
    fill(&mut world, member, reserve_after(space, id(2), 2, &ids(3..5)));
    fill(&mut world, member, reserve_after(space, id(4), 4, &ids(5..6)));
    assert_eq!(heard.dram(), [("insert", 2, 3, 2), ("insert", 2, 2, 2), ("insert", 2, 4, 2)]);
    assert_eq!(heard.nvme(), [("seen", 2, 3, 2), ("seen", 2, 2, 2), ("seen", 2, 4, 2)]);
    // what follows is what the engine computed beyond the prompt
    fill(&mut world, member, reserve_after(space, id(5), 5, &ids(6..7)));
    assert_eq!(heard.dram(), [("insert", 2, 5, 2)]);
}

#[test]
fn who_reserves_without_having_asked_is_a_request_behind_what_is_there() {
    let (mut world, member, space, heard) = world(0);
    fill(&mut world, member, reserve_of(space, "", &ids(1..3), 0));
    heard.dram();
    world.node.usage = super::super::usage::Usage::default(); // as if many others had come between
    fill(&mut world, member, reserve_after(space, id(2), 2, &ids(3..4)));
    assert_eq!(heard.dram(), [("request", 2, 1, 0), ("insert", 2, 2, 2)]);
}

#[test]
fn what_is_loaded_comes_for_the_request_that_waits_for_it() {
    let (mut world, member, space, heard) = world(0);
    for prompt in 0..16 {
        world.put_slowly(member, space, &ids(prompt * 10 + 1..prompt * 10 + 3));
    }
    world.settle();
    let moved = heard.nvme();
    assert!(moved.iter().filter(|call| call.0 == "admit").count() > 2, "{moved:?}");
    let left = heard.dram();
    let exposed = left.iter().filter(|call| call.0 == "expose").count();
    assert!(exposed > 2, "parents whose children went: {left:?}");
    let lease = world.matched(member, space, &ids(1..3)).lease;
    world.settle();
    let dram: Vec<_> = heard.dram().into_iter().filter(|call| call.1 > 0).collect();
    let number = dram[0].1;
    assert_eq!(dram[0], ("request", number, 2, 0));
    assert_eq!(dram[1..3], [("seen", number, 1, 0), ("seen", number, 0, 0)]);
    let came: Vec<_> = dram[3..].iter().map(|call| (call.0, call.1)).collect();
    assert_eq!(came, [("insert", number); 2]);
    let nvme = heard.nvme();
    assert_eq!(nvme.iter().filter(|call| call.0 == "touch").count(), 2, "{nvme:?}");
    world.release(member, lease);
    world.pass_ms(1);
    let again: Vec<_> = heard.dram().into_iter().filter(|call| call.0 == "touch").collect();
    assert_eq!(again, [("touch", number, 1, 0), ("touch", number, 0, 0)], "in order, tail first");
}

fn match_with(space: u32, chain: &[BlockId], hints: Option<wire::Hints>) -> Ask {
    let chain = packed(chain).into();
    Ask::Match(wire::MatchRequest { space, chain, hints, ..wire::MatchRequest::default() })
}

#[test]
fn what_an_engine_says_of_a_request_is_heard_with_each_of_its_uses() {
    let (mut world, member, space, heard) = world(2);
    fill(&mut world, member, reserve_of(space, "", &ids(1..3), 0));
    heard.said();
    let matched = |world: &mut World, hints: Hints| {
        let answer = world.ask(member, match_with(space, &ids(1..4), hints.to_wire()));
        let Ok(Reply::Match(reply)) = answer else { panic!("{answer:?}") };
        world.release(member, reply.lease);
        world.pass_ms(1);
        let said = heard.said();
        assert!(!said.is_empty() && said.iter().all(|(heard, _)| *heard == hints), "{said:?}");
        said
    };
    let unhinted = matched(&mut world, Hints::default());
    let expects = Expects::ToolCall { return_ms: 700 };
    let hints = Hints { priority_percent: 200, ttl_ms: 5000, expects };
    let hinted = matched(&mut world, hints);
    for ((_, weighed_us), (_, saved_us)) in hinted.iter().zip(&unhinted) {
        assert!((weighed_us / saved_us - 2.0).abs() < 1e-6, "{weighed_us} us, {saved_us} us");
    }
    // and what it computes then
    fill(&mut world, member, reserve_after(space, id(2), 2, &ids(3..4)));
    let said = heard.said();
    assert!(said.len() == 2 && said.iter().all(|(heard, _)| *heard == hints), "{said:?}");
    matched(&mut world, Hints::default()); // the last use counts
}

#[test]
fn who_reserves_without_having_matched_may_hint_too() {
    let (mut world, member, space, heard) = world(0);
    let hints = Hints { expects: Expects::SessionEnd, ..Hints::default() };
    let request = reserve_of(space, "", &ids(1..3), 0);
    fill(&mut world, member, wire::ReserveRequest { hints: hints.to_wire(), ..request.clone() });
    let said = heard.said();
    assert!(said.len() == 4 && said.iter().all(|(heard, _)| *heard == hints), "{said:?}");
    let wrong = Some(wire::Hints { priority: 5000, ..wire::Hints::default() });
    for ask in
        [match_with(space, &ids(1..3), wrong), Ask::Reserve(wire::ReserveRequest { hints: wrong, ..request })]
    {
        let error = world.ask(member, ask).expect_err("a refusal");
        assert!(error.field == "hints.priority" && error.message.contains("5000"), "{error:?}");
    }
}

#[test]
fn a_groups_copy_is_told_from_anothers() {
    let mut world = World::new(config());
    let member = world.open("a");
    let space = world.space_of(member, "m", super::harness::two_groups());
    let heard = Heard::from(&mut world, 0);
    fill(&mut world, member, reserve_of(space, "", &ids(1..2), 0));
    let calls = heard.dram();
    assert_eq!(calls.iter().filter(|call| call.0 == "request").count(), 2, "one of each group: {calls:?}");
    assert_eq!(calls.iter().filter(|call| call.0 == "insert").count(), 2, "{calls:?}");
}

/// Each costs the policies a few cache misses: an answer to somebody else does not wait for a long chain's.
#[test]
fn one_call_tells_a_bounded_share_and_says_that_more_is_left() {
    let (mut world, member, space, heard) = world(0);
    for _ in 0..4 {
        world.matched(member, space, &ids(1..1001));
    }
    let asked = || heard.dram().iter().filter(|call| call.0 == "request").count();
    let told = asked();
    assert!((1..=4).contains(&told), "{told}");
    let mut calls = 0;
    while world.node.busy() {
        world.pass_ms(0);
        calls += 1;
        assert!(calls < 100, "it comes to an end");
    }
    assert_eq!(told + asked(), 4);
}

/// Each request counted as half its blocks: of those with one block there was no end in one call.
#[test]
fn short_requests_are_bounded_too() {
    let (mut world, _, _, heard) = world(0);
    for _ in 0..2000 {
        world.node.tell_matched(Vec::new(), 0, &ids(1..2), 0, None, Hints::default());
    }
    world.pass_ms(0);
    let told = heard.dram().len();
    assert!((1..=256).contains(&told) && world.node.busy(), "{told}");
}
