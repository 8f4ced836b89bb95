//! How a policy sees the copies that stand first in their queues: a number for each, and the least goes.
//!
//! Owns the ways to see. Invariants: a score is finite; of two copies in one queue the older never scores more with `Recent` and `Ttl`
//! (with `Worth` nearly so: a chance may rise with age). Leaves to others: what is learned (`reuse`), which lens is the best (`worth`).

use super::class::CLASSES;
use super::queues::{Head, SAVED, saved_us};
use super::reuse::{AGES, Reuse, Table, age_at, age_from_ms};

#[derive(Debug)]
pub(super) enum Lens {
    /// The least recently used goes first.
    Recent,
    /// By class: share that comes back / mean age x e^(-age / mean age).
    Ttl(Vec<(f64, f64)>),
    /// The chance to come back before the others go, times what that saves.
    Worth(Box<Worth>),
}

/// The design's section 5, for copies of one size: reuse x saved.
#[derive(Debug)]
pub(super) struct Worth {
    chances: Vec<Table>,
    /// What having it saves, as it counts.
    saved: [f32; SAVED],
    /// What came last is compared, too.
    newest: bool,
}

impl Lens {
    pub(super) fn ttl() -> Self {
        Self::Ttl(vec![(0.0, 1.0); CLASSES])
    }

    /// `power` of what is saved counts: 1 as design.md has it; 0: all blocks count alike, for when nobody knows what they save.
    pub(super) fn worth(power: f32, newest: bool) -> Self {
        let saved = std::array::from_fn(|at| saved_us(at).powf(power));
        Self::Worth(Box::new(Worth { chances: vec![[0.0; AGES]; CLASSES], saved, newest }))
    }

    pub(super) fn sees_newest(&self) -> bool {
        matches!(self, Self::Worth(worth) if worth.newest)
    }

    /// Sees what has been learned since; copies stay for `residence_ms`, and there were as many uses as copies within `turnover_ms`.
    pub(super) fn learn(&mut self, reuse: &Reuse, residence_ms: f64, turnover_ms: f64) {
        match self {
            Self::Recent => {}
            Self::Ttl(means) => *means = reuse.means(),
            Self::Worth(worth) => {
                worth.chances = reuse.chances(if worth.newest { turnover_ms } else { residence_ms });
            }
        }
    }

    pub(super) fn score(&self, head: Head) -> f32 {
        match self {
            Self::Recent => -(head.behind as f32),
            Self::Ttl(means) => {
                let (share, mean_ms) = means[head.class];
                let per_ms = share / mean_ms.max(1.0);
                (per_ms * (-f64::from(head.age_ms) / mean_ms.max(1.0)).exp()) as f32
            }
            Self::Worth(worth) => worth.score(head),
        }
    }
}

impl Worth {
    fn score(&self, head: Head) -> f32 {
        let table = &self.chances[head.class];
        let at = age_at(head.age_ms);
        let next = (at + 1).min(AGES - 1);
        let (from_ms, to_ms) = (age_from_ms(at) as f32, age_from_ms(at + 1) as f32);
        let share = ((head.age_ms as f32 - from_ms) / (to_ms - from_ms)).clamp(0.0, 1.0);
        let chance = table[at] + (table[next] - table[at]) * share;
        chance * self.saved[head.saved]
    }
}
