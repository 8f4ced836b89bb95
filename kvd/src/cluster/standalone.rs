//! Members that somebody wrote down: the list in the config, or this node alone.
//!
//! Owns nothing that changes. Invariants: it knows no deaths, so who is listed stays listed; names and epochs of the
//! others are not known, so a name is the address and an epoch is 0.
//! Leaves to others: whether the list is right (`config`).

use super::roster::{Event, Roster};
use super::{Member, Membership};

/// This node and `addresses`, its own among them or not. `leave` tells nobody, as there is nobody to tell.
pub fn join(me: Member, addresses: &[String]) -> Membership {
    let named = |address: &String| Member { name: address.clone(), address: address.clone(), epoch: 0 };
    let members = addresses.iter().filter(|address| **address != me.address).map(named).collect();
    let mut roster = Roster::new(me.clone(), 0);
    roster.apply(Event::Listing { members, beyond: 0 }, 0);
    Membership::start(&me, |seat, leave| async move {
        seat.show(roster.members(), roster.ignored());
        seat.joined();
        let _ = leave.await; // a dropped handle ends this task
        Ok(())
    })
}
