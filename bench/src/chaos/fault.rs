//! One fault: somebody is killed, stays away for a while, and is started again; meanwhile the fleet is looked at.
//!
//! Owns what ought to be seen after a death, after a return, and all the time. Invariant: one fault at a time, and it is over when everything
//! is right again or `PATIENCE` is. Leaves to others: how one looks (`eyes`), whether it was soon enough (`verdict`).

use super::eyes::{Eyes, View};
use crate::etcd::Etcd;
use crate::failure::Failure;
use crate::fleet::Fleet;
use std::time::{Duration, Instant};

/// For one thing to be seen. At the limit: it is noted as never seen.
const PATIENCE: Duration = Duration::from_secs(15);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(25);

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Victim {
    Engine(usize),
    Node(usize),
    Etcd,
}

/// A fault that is to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Planned {
    pub(super) victim: Victim,
    /// From the fault before, or from the beginning.
    pub(super) pause: Duration,
    /// How long it stays away.
    pub(super) away: Duration,
    /// How long it is looked at after its return, at least.
    pub(super) watched: Duration,
}

/// One thing to be seen, and how long that took; none: it was not seen.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sight {
    pub(super) what: &'static str,
    pub(super) after: Option<Duration>,
}

/// A fault that was.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    pub(super) victim: Victim,
    pub(super) killed: Instant,
    /// When everything was right again, or patience at its end.
    pub(super) over: Instant,
    /// After the kill.
    pub(super) gone: Vec<Sight>,
    /// After it served again.
    pub(super) back: Vec<Sight>,
    /// Looks at which somebody was missing who was there.
    pub(super) missed: u64,
    pub(super) looks: u64,
}

/// All there is to be killed.
pub(super) struct Stage<'a> {
    pub(super) fleet: &'a mut Fleet,
    pub(super) etcd: &'a mut Etcd,
    pub(super) eyes: &'a Eyes,
}

type Seen = Vec<(&'static str, bool)>;

impl Stage<'_> {
    /// Lets it happen.
    pub(super) async fn suffer(&mut self, planned: Planned) -> Result<Fault, Failure> {
        let victim = planned.victim;
        tokio::time::sleep(planned.pause).await;
        self.eyes.wrong_blocks().await; // of an engine it is the last word
        let before = self.eyes.look().await;
        if let Victim::Engine(at) = victim {
            self.eyes.taken(at).await;
        }
        let killed = Instant::now();
        self.kill(victim)?;
        let mut fault =
            Fault { victim, killed, over: killed, gone: vec![], back: vec![], missed: 0, looks: 0 };
        let expect = self.expect(victim, &before);
        fault.gone = expect.watch(self.eyes, killed, planned.away, Expect::gone, &mut fault).await;
        self.start_again(victim)?;
        let served = Instant::now();
        fault.back = expect.watch(self.eyes, served, planned.watched, Expect::right, &mut fault).await;
        fault.over = Instant::now();
        Ok(fault)
    }

    fn kill(&mut self, victim: Victim) -> Result<(), Failure> {
        match victim {
            Victim::Engine(at) => self.fleet.engines[at].kill(),
            Victim::Node(at) => self.fleet.daemons[at].kill(),
            Victim::Etcd => self.etcd.kill(),
        }
    }

    fn start_again(&mut self, victim: Victim) -> Result<(), Failure> {
        match victim {
            Victim::Engine(at) => self.fleet.engines[at].start_again(),
            Victim::Node(at) => self.fleet.daemons[at].start_again(),
            Victim::Etcd => self.etcd.start_again(),
        }
    }

    fn expect(&self, victim: Victim, before: &View) -> Expect {
        let (nodes, engines) = (self.fleet.nodes.clone(), self.fleet.engines.len());
        let epoch = match victim {
            Victim::Node(at) => before.of(at, &nodes[at]).map_or(0, |node| node.node_epoch),
            Victim::Engine(_) | Victim::Etcd => 0,
        };
        Expect { victim, nodes, engines, epoch }
    }
}

/// What ought to be seen.
struct Expect {
    victim: Victim,
    nodes: Vec<String>,
    engines: usize,
    /// Of the node that is killed, before.
    epoch: u64,
}

impl Expect {
    /// Looks until all of it was seen, and for `least` in any case.
    async fn watch(
        &self,
        eyes: &Eyes,
        from: Instant,
        least: Duration,
        so: fn(&Self, &View) -> Seen,
        fault: &mut Fault,
    ) -> Vec<Sight> {
        let mut sights: Vec<Sight> = Vec::new();
        loop {
            let view = eyes.look().await;
            let seen = so(self, &view);
            sights.resize_with(seen.len(), || Sight { what: "", after: None });
            for (sight, (what, so)) in sights.iter_mut().zip(seen) {
                sight.what = what;
                sight.after = sight.after.or_else(|| so.then(|| from.elapsed()));
            }
            fault.looks += 1;
            fault.missed += u64::from(!self.others_are_there(&view));
            let all = sights.iter().all(|sight| sight.after.is_some());
            if (all && from.elapsed() >= least) || from.elapsed() > PATIENCE {
                return sights;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// After the death.
    fn gone(&self, view: &View) -> Seen {
        let left = Some(self.engines - self.lost_engines());
        let listed = ("workers", view.workers == left);
        match self.victim {
            Victim::Engine(_) => vec![listed],
            Victim::Node(dead) => {
                vec![listed, ("index", self.others(dead).all(|at| self.knows_nothing(view, at, dead)))]
            }
            Victim::Etcd => vec![("told", view.nodes.iter().flatten().all(|said| !said.trouble.is_empty()))],
        }
    }

    /// After the return.
    fn right(&self, view: &View) -> Seen {
        let listed = ("workers", view.workers == Some(self.engines));
        match self.victim {
            Victim::Engine(_) => vec![listed],
            Victim::Node(_) => vec![listed, ("index", self.index_is_whole(view))],
            Victim::Etcd => {
                let well =
                    view.nodes.iter().all(|said| said.as_ref().is_some_and(|it| it.trouble.is_empty()));
                vec![("told", well), ("index", self.index_is_whole(view))]
            }
        }
    }

    /// Whoever was not killed is listed; who does not answer has not said otherwise.
    fn others_are_there(&self, view: &View) -> bool {
        let engines = view.workers.is_none_or(|listed| listed >= self.engines - self.lost_engines());
        let lists = |asked: usize, at: usize| {
            view.nodes[asked].is_none() || view.of(asked, &self.nodes[at]).is_some_and(|node| node.complete)
        };
        let survivors = || (0..self.nodes.len()).filter(|at| self.victim != Victim::Node(*at));
        engines && survivors().all(|asked| survivors().all(|at| lists(asked, at)))
    }

    fn lost_engines(&self) -> usize {
        match self.victim {
            Victim::Engine(_) => 1,
            // they stand at the nodes in turn
            Victim::Node(dead) => (0..self.engines).filter(|at| at % self.nodes.len() == dead).count(),
            Victim::Etcd => 0,
        }
    }

    fn others(&self, dead: usize) -> impl Iterator<Item = usize> {
        (0..self.nodes.len()).filter(move |at| *at != dead)
    }

    fn knows_nothing(&self, view: &View, asked: usize, dead: usize) -> bool {
        let answered = view.nodes[asked].is_some();
        answered && view.of(asked, &self.nodes[dead]).is_none_or(|node| node.blocks == 0 && !node.complete)
    }

    /// Every node has heard every node out, and the one that was killed since its return.
    fn index_is_whole(&self, view: &View) -> bool {
        let fresh = |at: usize, epoch: u64| self.victim != Victim::Node(at) || epoch != self.epoch;
        let heard = |asked: usize, at: usize| {
            view.of(asked, &self.nodes[at])
                .is_some_and(|node| node.connected && node.complete && fresh(at, node.node_epoch))
        };
        (0..self.nodes.len()).all(|asked| (0..self.nodes.len()).all(|at| heard(asked, at)))
    }
}
