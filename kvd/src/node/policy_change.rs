//! Another eviction policy, while the node serves: a person asks for it by name and parameters, or for the one before.
//!
//! Owns how far the search for copies is that the next policy must know. Invariants: a change is refused whole, with the value and the fix, or goes on by itself; the
//! old policy decides until the next knows every copy, a bounded share of which it is told in one call; what is changed ends with the daemon.
//! Leaves to others: how two policies stand beside each other (`kvd_tiers::eviction::live`), what policies make of a copy.

use super::Node;
use super::event::Answer;
use super::memory::at;
use kvd_proto::wire::{self, Tier, policy_request::Set};
use kvd_proto::{Code, Error};
use kvd_tiers::catalog::{Handle, TIERS};
use kvd_tiers::eviction::{Choice, Eviction as _};

/// Entries looked at in one call.
const LOOKED_PER_CALL_MAX: usize = 512;
/// A policy has few parameters, with short values.
const PARAMS_MAX: usize = 8;
const PARAM_BYTES_MAX: usize = 64;

/// See the file's head.
#[derive(Default)]
pub(super) struct PolicyChanges {
    /// The next entry to look at.
    next: Option<Handle>,
}

impl PolicyChanges {
    pub(super) fn under_way(&self) -> bool {
        self.next.is_some()
    }
}

impl Node {
    pub(super) fn policy_asked(&mut self, request: &wire::PolicyRequest) -> Answer {
        match self.tiers_of(request).and_then(|tiers| self.set_policies(&tiers, request.set.as_ref())) {
            Ok(tiers) => Answer::Policies(self.policies(&tiers)),
            Err(error) => Answer::Refused(error),
        }
    }

    fn tiers_of(&self, request: &wire::PolicyRequest) -> Result<Vec<Tier>, Error> {
        let there = |tier: &Tier| *tier == Tier::Dram || self.config.nvme.is_some();
        if request.tiers.is_empty() {
            return Ok(TIERS.into_iter().filter(there).collect());
        }
        let tiers = request.tiers.iter().map(|tier| Tier::try_from(*tier).unwrap_or_default());
        let tiers: Vec<_> =
            TIERS.into_iter().filter(|tier| tiers.clone().any(|asked| asked == *tier)).collect();
        if tiers.is_empty() || !tiers.iter().all(there) {
            let message = "no such tier of this node has a policy";
            return Err(Error::invalid("tier", message, "name dram, or nvme where there is one"));
        }
        Ok(tiers)
    }

    fn set_policies(&mut self, tiers: &[Tier], set: Option<&Set>) -> Result<Vec<Tier>, Error> {
        let choices = match set {
            None => return Ok(tiers.to_vec()),
            Some(_) if self.policy_changes.under_way() => {
                let message = "another change is under way";
                return Err(Error::new(
                    Code::Unavailable,
                    "set",
                    message,
                    "look at `kvctl policy show`, and set it then",
                ));
            }
            Some(Set::Choice(choice)) => vec![checked(choice)?; tiers.len()],
            Some(Set::Back(_)) => tiers.iter().map(|tier| self.before(*tier)).collect::<Result<_, _>>()?,
        };
        for (tier, choice) in tiers.iter().zip(choices) {
            self.set_policy(*tier, choice);
        }
        Ok(tiers.to_vec())
    }

    fn before(&self, tier: Tier) -> Result<Choice, Error> {
        let before = self.memory.tiers[at(tier)].eviction_before.clone();
        before.ok_or_else(|| {
            let message = format!("{} had no other policy before", tier.as_str_name());
            Error::invalid("back", message, "name a policy")
        })
    }

    fn set_policy(&mut self, tier: Tier, choice: Choice) {
        let space = &mut self.memory.tiers[at(tier)];
        if space.eviction == choice {
            return;
        }
        let text = format!("{tier:?}: {choice}");
        self.out.push(super::event::Effect::Note { kind: "policy", text });
        for pool in self.memory.pools.iter_mut().filter(|pool| pool.tier == tier) {
            pool.policy.change(choice.policy().expect("it was checked"));
        }
        space.eviction_before = Some(std::mem::replace(&mut space.eviction, choice));
        self.policy_changes.next = Some(0);
    }

    /// Tells the next policies of some copies; with the last, they take over. What came meanwhile they were told when it came.
    pub(super) fn change_policies(&mut self) {
        let Some(from) = self.policy_changes.next else { return };
        let some: Vec<_> =
            self.catalog.iter_from(from).take(LOOKED_PER_CALL_MAX).map(|(handle, _)| handle).collect();
        for &handle in &some {
            for tier in TIERS {
                if self.catalog.get(handle).readable(tier).is_some() {
                    self.arrives(handle, tier);
                }
            }
        }
        if some.len() == LOOKED_PER_CALL_MAX {
            self.policy_changes.next = some.last().map(|last| last + 1);
            return;
        }
        self.policy_changes.next = None;
        let changing = self.memory.pools.iter_mut().filter(|pool| pool.policy.changes());
        changing.for_each(|pool| pool.policy.changed());
    }

    fn policies(&self, tiers: &[Tier]) -> wire::PolicyReply {
        let of = |pool: &super::memory::Pool| {
            let space = &self.memory.tiers[at(pool.tier)];
            let standing = pool.policy.standing();
            let way = |(at, (name, saved_us)): (usize, &(&str, f64))| wire::PolicyWay {
                name: (*name).to_owned(),
                saved_us: *saved_us,
                decides: at == standing.driver,
            };
            let (policy, next) = match (&space.eviction_before, pool.policy.changes()) {
                (Some(before), true) => (before.to_string(), space.eviction.to_string()),
                _ => (space.eviction.to_string(), String::new()),
            };
            wire::PolicyStatus {
                tier: pool.tier.into(),
                tenant: self.tenants[pool.tenant].clone(),
                slot_bytes: pool.geometry.slot_bytes,
                policy,
                next,
                before: space.eviction_before.as_ref().map(Choice::to_string).unwrap_or_default(),
                copies: pool.policy.len() as u64,
                ways: standing.ways.iter().enumerate().map(way).collect(),
                sampled_one_in: standing.sampled_one_in,
                keep: keep(pool.tier, &space.eviction),
            }
        };
        let pools = self.memory.pools.iter().filter(|pool| tiers.contains(&pool.tier));
        wire::PolicyReply { policies: pools.map(of).collect() }
    }
}

/// What keeps the change beyond the daemon's end.
fn keep(tier: Tier, choice: &Choice) -> String {
    let section = if tier == Tier::Dram { "dram" } else { "nvme" };
    if choice.params.is_empty() {
        format!("{section}.eviction = \"{}\"", choice.name)
    } else {
        format!(
            "kvd.toml has no parameters of policies; {section}.eviction = \"{}\" is the nearest",
            choice.name
        )
    }
}

fn checked(choice: &wire::PolicyChoice) -> Result<Choice, Error> {
    let long = choice.params.iter().any(|(param, value)| param.len().max(value.len()) > PARAM_BYTES_MAX);
    if choice.params.len() > PARAMS_MAX || long {
        let message =
            format!("more than {PARAMS_MAX} parameters, or one of more than {PARAM_BYTES_MAX} bytes");
        return Err(Error::invalid("param", message, "give those that the policy has"));
    }
    let params = choice.params.iter().map(|(param, value)| (param.clone(), value.clone())).collect();
    let choice = Choice { name: choice.name.clone(), params };
    choice.policy()?;
    Ok(choice)
}
