//! Only says what it would do.
//!
//! Invariant: says each thing once, until the advice changes.

use super::Action;
use crate::plan::Plan;

/// Remembers what it said last.
#[derive(Debug, Default)]
pub struct Advise {
    said: Vec<Action>,
}

impl Advise {
    /// What somebody should do; logged where it is news.
    pub fn apply(&mut self, plan: &Plan) -> Vec<Action> {
        let actions: Vec<Action> = plan
            .roles
            .iter()
            .filter_map(|role| Action::between(role.role, role.census.supply(), role.planned))
            .collect();
        if actions != self.said {
            actions.iter().for_each(|action| tracing::info!(?action, "advice"));
            self.said.clone_from(&actions);
        }
        actions
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::local::tests::plan;
    use crate::observe::Role;

    #[test]
    fn says_the_way_from_what_is_there_to_the_plan() {
        let mut advise = Advise::default();
        let mut grown = plan(&[(Role::Prefill, 3), (Role::Decode, 1)]);
        grown.roles[0].census.running = 1;
        grown.roles[1].census.starting = 2;
        let expected =
            [Action::Start { role: Role::Prefill, count: 2 }, Action::Drain { role: Role::Decode, count: 1 }];
        assert_eq!(advise.apply(&grown), expected);
        assert_eq!(advise.apply(&grown), expected, "still true, if not news");
        grown.roles.clear();
        assert!(advise.apply(&grown).is_empty());
    }
}
