//! `kvctl policy`: which copies go first, what the ways that compete would have saved, and another policy without a restart.
//!
//! Owns `show` and `set`; `compare` and `simulate` have files of their own.
//! Invariant: a change goes on in the node by itself; what ends with the daemon is said to.

use crate::compare::CompareArgs;
use crate::node::Node;
use crate::show::{Show, tier};
use crate::simulate::SimulateArgs;
use crate::table::columns;
use crate::text::{count, duration_us, size};
use clap::{Args, Subcommand, ValueEnum};
use kvd_proto::Error;
use kvd_proto::wire::{self, policy_request::Set};
use serde_json::{Value, json};
use std::fmt::Write as _;

#[derive(Debug, Args)]
pub(crate) struct PolicyArgs {
    #[command(subcommand)]
    pub(crate) command: PolicyCommand,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tier {
    Dram,
    Nvme,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Which policy each tier has, and where several ways compete, what each would have saved of late
    Show {
        /// Only this tier
        #[arg(long)]
        tier: Option<Tier>,
    },
    /// Another policy from now on, until the daemon ends; copies stay where they are
    Set {
        /// lru, s3fifo, class-ttl or worth
        #[arg(required_unless_present = "back", conflicts_with = "back")]
        name: Option<String>,
        /// Its parameters: small_percent=20 (s3fifo), way=newest (worth)
        #[arg(value_name = "PARAM=VALUE", value_parser = param, conflicts_with = "back")]
        params: Vec<(String, String)>,
        /// What it was before the last change
        #[arg(long)]
        back: bool,
        /// Only this tier
        #[arg(long)]
        tier: Option<Tier>,
    },
    /// What each policy would have found of what was asked for of late, beside what was found
    Compare(CompareArgs),
    /// What nodes of other sizes and policies would have made of what was asked for of late, or of a trace
    Simulate(SimulateArgs),
}

fn param(given: &str) -> Result<(String, String), String> {
    let split = given.split_once('=').filter(|(param, value)| !param.is_empty() && !value.is_empty());
    let (param, value) = split.ok_or("a parameter is a name and a value, such as small_percent=20")?;
    Ok((param.to_owned(), value.to_owned()))
}

impl PolicyArgs {
    /// What is asked of the node.
    pub(crate) async fn ask(&self, node: &mut Node) -> Result<Box<dyn Show>, Error> {
        Ok(match &self.command {
            PolicyCommand::Show { tier } => Box::new(node.policy(to_wire(*tier, None)).await?),
            PolicyCommand::Set { name, params, back, tier } => {
                let set = set(name.as_deref(), params, *back)?;
                Box::new(node.policy(to_wire(*tier, Some(set))).await?)
            }
            PolicyCommand::Compare(compare) => Box::new(compare.ask(node).await?),
            PolicyCommand::Simulate(simulate) => Box::new(simulate.ask(node).await?),
        })
    }
}

fn to_wire(tier: Option<Tier>, set: Option<Set>) -> wire::PolicyRequest {
    let tier = tier.map(|tier| match tier {
        Tier::Dram => wire::Tier::Dram.into(),
        Tier::Nvme => wire::Tier::Nvme.into(),
    });
    wire::PolicyRequest { tiers: tier.into_iter().collect(), set }
}

fn set(name: Option<&str>, params: &[(String, String)], back: bool) -> Result<Set, Error> {
    if back {
        return Ok(Set::Back(true));
    }
    let known = |at: usize, param: &String| params[..at].iter().any(|(before, _)| before == param);
    if let Some((_, (param, _))) = params.iter().enumerate().find(|(at, (param, _))| known(*at, param)) {
        return Err(Error::invalid("param", format!("{param} is given twice"), "give it once"));
    }
    let name = name.unwrap_or_default().to_owned();
    Ok(Set::Choice(wire::PolicyChoice { name, params: params.iter().cloned().collect() }))
}

impl Show for wire::PolicyReply {
    fn table(&self) -> String {
        if self.policies.is_empty() {
            return "no space is registered yet: there is nothing to choose from\n".to_owned();
        }
        let row = |status: &wire::PolicyStatus| {
            vec![
                tier(status.tier),
                status.tenant.clone(),
                size(status.slot_bytes.into()),
                count(status.copies),
                status.policy.clone(),
                status.next.clone(),
                status.before.clone(),
            ]
        };
        let header = ["TIER", "TENANT", "BLOCK", "COPIES", "POLICY", "NEXT", "BEFORE"];
        let mut shown = columns(&header, &["BLOCK", "COPIES"], self.policies.iter().map(row).collect());
        for status in self.policies.iter().filter(|status| !status.ways.is_empty()) {
            let heading = (tier(status.tier), &status.tenant, status.sampled_one_in);
            writeln!(
                shown,
                "\n{}, {}: of late each way would have saved, on one in {} branches",
                heading.0, heading.1, heading.2
            )
            .expect("writing to a string");
            let row = |way: &wire::PolicyWay| {
                let decides = if way.decides { "decides" } else { "" };
                vec![way.name.clone(), duration_us(way.saved_us as u64), decides.to_owned()]
            };
            shown += &columns(&["WAY", "SAVED", ""], &["SAVED"], status.ways.iter().map(row).collect());
        }
        if let Some(status) = self.policies.iter().find(|status| !status.before.is_empty()) {
            writeln!(shown, "\nuntil the daemon ends; to keep it: {}", status.keep)
                .expect("writing to a string");
        }
        shown
    }

    fn objects(&self) -> Vec<Value> {
        let way = |way: &wire::PolicyWay| json!({ "name": way.name, "saved_us": way.saved_us, "decides": way.decides });
        let object = |status: &wire::PolicyStatus| {
            json!({
                "tier": tier(status.tier), "tenant": status.tenant, "slot_bytes": status.slot_bytes, "copies": status.copies,
                "policy": status.policy, "next": status.next, "before": status.before, "keep": status.keep,
                "sampled_one_in": status.sampled_one_in, "ways": status.ways.iter().map(way).collect::<Vec<_>>(),
            })
        };
        self.policies.iter().map(object).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Alone {
        #[command(flatten)]
        policy: PolicyArgs,
    }

    fn asked(line: &str) -> Result<wire::PolicyRequest, String> {
        let parsed = Alone::try_parse_from(std::iter::once("policy").chain(line.split(' ')));
        match parsed.map_err(|error| error.to_string())?.policy.command {
            PolicyCommand::Show { tier } => Ok(to_wire(tier, None)),
            PolicyCommand::Set { name, params, back, tier } => {
                let set = set(name.as_deref(), &params, back).map_err(|error| error.to_string())?;
                Ok(to_wire(tier, Some(set)))
            }
            other => panic!("{other:?} is tested where it is"),
        }
    }

    #[test]
    fn what_is_asked_is_what_was_said() {
        assert_eq!(asked("show").unwrap(), wire::PolicyRequest::default());
        let set = asked("set s3fifo small_percent=20 --tier nvme").unwrap();
        assert_eq!(set.tiers, [wire::Tier::Nvme as i32]);
        let Some(Set::Choice(choice)) = set.set else { panic!("a choice") };
        assert_eq!((choice.name.as_str(), choice.params["small_percent"].as_str()), ("s3fifo", "20"));
        assert_eq!(asked("set --back").unwrap().set, Some(Set::Back(true)));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (line, says) in [
            ("set", "NAME"),
            ("set lru --back", "--back"),
            ("set s3fifo small_percent", "small_percent=20"),
            ("set s3fifo small_percent=1 small_percent=2", "twice"),
            ("show --tier s3", "dram"),
        ] {
            let error = asked(line).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
