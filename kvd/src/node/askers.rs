//! Askers: the members of a session that share a lease, because they asked the same question.
//!
//! Owns who joins a lease and who leaves it. Invariants: a lease that stands has an asker, and every asker is a member of its
//! session; one member's word is for itself, so what a lease holds is free when its last asker has let go or is gone
//! (law 2). A number alone gives no share: whoever reads or fills asks, with the same key and chain, or commits.
//! Leaves to others: what a lease holds and what becomes of that (`lease`), who is a member (`session`).

use super::Node;
use super::event::MemberId;
use super::lease::{ItemState, Lease, LeaseId, RequestKind, unknown_lease};
use super::session::SessionId;
use kvd_proto::{Error, wire};
use std::collections::BTreeSet;

impl Lease {
    fn is_filling(&self) -> bool {
        self.items.iter().any(|item| matches!(item.state, ItemState::Filling(_)))
    }

    /// A fill with nothing left to write: it holds no memory, whoever shares it.
    fn is_done(&self) -> bool {
        self.kind == RequestKind::Reserve && self.items.iter().all(|item| item.state == ItemState::Committed)
    }
}

impl Node {
    /// The member reads or fills by this lease too.
    pub(super) fn join_lease(&mut self, id: LeaseId, member: MemberId) {
        let session = self.sessions.of(member).ok();
        let lease = self.leases.get_mut(id).expect("a lease just found");
        assert_eq!(session, Some(lease.session), "a lease is shared within its session");
        lease.askers.insert(member);
    }

    /// This member is done. The others go on, unless nothing is left to do: of what is committed nobody writes any more,
    /// and who committed by the lease's number alone may never say so.
    pub(super) fn release(
        &mut self,
        member: MemberId,
        request: &wire::ReleaseRequest,
    ) -> Result<wire::ReleaseReply, Error> {
        let asked = self.leases.get(request.lease).filter(|lease| lease.askers.contains(&member));
        let lease = asked.ok_or_else(|| unknown_lease(request.lease))?;
        if lease.is_done() && lease.copying.is_empty() {
            self.release_lease(request.lease);
        } else {
            self.leave_lease(request.lease, member);
        }
        Ok(wire::ReleaseReply {})
    }

    /// One asker less; with the last one the lease is released.
    fn leave_lease(&mut self, id: LeaseId, member: MemberId) {
        let lease = self.leases.get_mut(id).expect("a lease with askers");
        assert!(lease.askers.remove(&member), "who leaves a lease shares it");
        if lease.askers.is_empty() && lease.copying.is_empty() {
            self.release_lease(id);
        }
    }

    /// The member touches nothing of its leases any more, and did not say that it was done: its parts of what is being filled
    /// will never come, so the fill ends for all. Other ranks may be writing theirs: quarantine, until they let go.
    pub(super) fn abandon_leases(&mut self, session: SessionId, member: MemberId) {
        for id in self.leases_of(session, member) {
            self.leave_lease(id, member);
            if self.leases.get(id).is_some_and(Lease::is_filling) {
                self.end_lease(id);
            }
        }
    }

    /// A member under a new connection shares what it still holds, and nothing else of its old self's.
    pub(super) fn take_over_leases(
        &mut self,
        session: SessionId,
        old: MemberId,
        new: MemberId,
        held: &BTreeSet<LeaseId>,
    ) {
        for id in self.leases_of(session, old).into_iter().filter(|id| held.contains(id)) {
            self.join_lease(id, new);
            self.leave_lease(id, old);
        }
        self.abandon_leases(session, old);
    }

    fn leases_of(&self, session: SessionId, member: MemberId) -> Vec<LeaseId> {
        let shares = |lease: &&LeaseId| self.leases.leases[*lease].askers.contains(&member);
        self.sessions.get(session).leases.iter().filter(shares).copied().collect()
    }
}
