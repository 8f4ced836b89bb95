//! One call: events in, effects out, then what keeps the house in order.

use super::device::Given;
use super::event::{Effect, Event, MemberId, Question};
use super::recovery::RecoveredSegment;
use super::search::Then;
use super::{EVENTS_PER_CALL_MAX, Node};
use kvd_proto::wire::client_frame::Body as Ask;
use kvd_proto::wire::node_frame::Body as Reply;
use kvd_proto::{Code, Error};

impl Node {
    /// Takes what happened up to `now_us` (microseconds since the node started, never going back) and appends what to do.
    /// Answers only: whoever calls it calls `settle` when they are sent.
    pub fn apply(&mut self, events: impl IntoIterator<Item = Event>, now_us: u64, effects: &mut Vec<Effect>) {
        self.at(now_us, effects, |node| {
            let mut count = 0;
            for event in events {
                count += 1;
                assert!(count <= EVENTS_PER_CALL_MAX, "more than {EVENTS_PER_CALL_MAX} events in one call");
                node.one(event);
            }
            node.serve_claims();
            node.announce_ready();
        });
    }

    /// What keeps the house in order and nobody waits for as for an answer: a bounded share of it.
    pub fn settle(&mut self, now_us: u64, effects: &mut Vec<Effect>) {
        self.at(now_us, effects, |node| {
            node.tell_policies();
            node.change_policies();
            node.verify_some();
            node.upload_some();
            node.change_tiers();
            node.make_room();
            node.serve_waiting();
            node.serve_held();
            node.serve_deferred();
            node.purge_some();
            node.search_some();
            node.tell_if_due();
        });
    }

    /// Both, for tests that do not care what comes between.
    #[cfg(test)]
    pub(super) fn apply_and_settle(
        &mut self,
        events: impl IntoIterator<Item = Event>,
        now_us: u64,
        effects: &mut Vec<Effect>,
    ) {
        self.apply(events, now_us, effects);
        self.settle(now_us, effects);
    }

    fn at(&mut self, now_us: u64, effects: &mut Vec<Effect>, work: impl FnOnce(&mut Self)) {
        assert!(now_us >= self.now_us, "time went back from {} to {now_us}", self.now_us);
        self.now_us = now_us;
        std::mem::swap(&mut self.out, effects);
        work(self);
        std::mem::swap(&mut self.out, effects);
    }

    fn one(&mut self, event: Event) {
        match event {
            Event::Open { member, request_id, pid, maps, token, request } => {
                let opened = self.open_session(member, request_id, pid, maps, token, request);
                if let Err(error) = opened {
                    self.refuse(member, request_id, error);
                }
            }
            Event::Request { member, request_id, body } => {
                self.request(member, request_id, body, Given::default());
            }
            Event::OpenMemory { member, request_id, request, given } => {
                self.request(member, request_id, Ask::OpenMemory(*request), given);
            }
            Event::SocketLost { member } => self.socket_lost(member),
            Event::ProcessGone { member } => self.process_gone(member),
            Event::SegmentOpened { tier, segment, result } => self.segment_opened(tier, segment, result),
            Event::Populated { segment, bytes } => self.memory.populated(segment, bytes),
            Event::Checksummed { slot, generation, elapsed_us } => {
                self.checksummed(slot, generation, elapsed_us);
            }
            Event::Moved { token, result, elapsed_us } => self.moved(token, result, elapsed_us),
            Event::Uploaded { bytes, stored } => self.uploaded(bytes, stored),
            Event::Offered { ticket, offer } => self.offered(ticket, offer),
            Event::Claimed { ticket, status } => self.claimed_there(ticket, status),
            Event::RecoveredSpace { space } => self.recovered_space(*space),
            Event::Orphan { member, filler, client } => self.orphans.add(member, filler, client),
            Event::RecoveredSegment { tier, segment, geometry, tenant, numa_node, generations } => {
                let found = RecoveredSegment { tier, segment, geometry, numa_node, generations };
                self.recovered_segment(&found, &tenant);
            }
            Event::Recovered(blocks) => self.recovered_blocks(&blocks),
            Event::RecoveredFill { slot, filler } => self.recovered_fill(slot, filler),
            Event::Ask { ticket, question } => self.ask(ticket, question),
            Event::Tell(on) => self.tell(on),
            Event::TellSlice { ticket, from } => self.tell_slice(ticket, from),
            Event::SegmentClosed { tier, segment } => self.segment_closed(tier, segment),
            Event::Resized { tier, result } => self.resized(tier, result),
            Event::Attached { result } => self.attached(result),
            Event::Slow { transfer_ms } => self.slow(transfer_ms),
            Event::Detached => self.detached(),
            Event::Profile { fingerprint, profile } => self.engine_profile(fingerprint, profile),
            Event::Device(end) => self.device_ended(end),
            Event::Tick => self.tick(),
        }
    }

    fn request(&mut self, member: MemberId, request_id: u64, body: Ask, given: Given) {
        if let Err(error) = self.sessions.seen(member, self.now_us) {
            self.refuse(member, request_id, error);
            return;
        }
        let reply = match body {
            Ask::OpenSession(_) => Err(Error::invalid(
                "open_session",
                "this connection has its session",
                "open another connection for another session",
            )),
            Ask::RegisterSpace(request) => self.register_space(member, &request).map(Reply::SpaceRegistered),
            Ask::Match(request) => match self.match_or_claim(member, request_id, request) {
                Ok(None) => return, // waits for its claim, asks other nodes first, or is loaded in slices
                Ok(Some(reply)) => Ok(Reply::Match(reply)),
                Err(error) => Err(error),
            },
            Ask::Reserve(request) => match self.reserve(member, request_id, &request) {
                Ok(None) => return, // waits for space
                Ok(Some(reply)) => Ok(Reply::Reserve(reply)),
                Err(error) => Err(error),
            },
            Ask::Commit(request) => self.commit(member, &request).map(Reply::Commit),
            Ask::Release(request) => self.release(member, &request).map(Reply::Release),
            Ask::Doubt(request) => return self.doubt(member, &request),
            Ask::Exists(request) => self.exists(member, &request).map(Reply::Exists),
            Ask::Pin(request) => self.pin_chain(member, &request).map(Reply::Pin),
            Ask::Prefetch(request) => self.prefetch(member, &request).map(Reply::Prefetch),
            Ask::Settled(_) => return self.client_settled(member),
            Ask::OpenMemory(request) => match self.open_memory(member, request_id, request, given) {
                Ok(()) => return, // until it is open
                Err(error) => Err(error),
            },
            // on a socket the shell takes them: the node has descriptors only with what they are for
            Ask::GiveChunks(_) => Err(Error::invalid(
                "give_chunks",
                "asked over gRPC, which carries no descriptors",
                "use the session's Unix socket, on the node's own machine",
            )),
            Ask::CloseMemory(request) => match self.close_memory(member, request_id, request) {
                Ok(()) => return, // until nothing touches it
                Err(error) => Err(error),
            },
            Ask::Copy(request) => match self.copy_pages(member, request_id, request) {
                Ok(None) => return, // until it has ended
                Ok(Some(reply)) => Ok(Reply::Copy(reply)),
                Err(error) => Err(error),
            },
            Ask::CloseSession(_) => return self.close_member(member, request_id),
        };
        match reply {
            Ok(reply) if request_id != 0 => self.send(member, request_id, reply),
            Ok(_) => {}
            Err(error) => self.refuse(member, request_id, error),
        }
    }

    pub(super) fn refuse(&mut self, member: MemberId, request_id: u64, error: Error) {
        self.counters.refused_requests += 1;
        // a one-way release of a lease that has ended meanwhile is nobody's mistake
        if request_id != 0 || error.code != Code::UnknownLease {
            self.note("refuse", || format!("member {member}: {error}"));
        }
        if request_id != 0 {
            self.send(member, request_id, Reply::Error(error.into()));
        }
    }

    fn ask(&mut self, ticket: u64, question: Question) {
        let answer = match question {
            Question::Status => self.status(),
            Question::Tiers => self.tiers(),
            Question::Spaces => self.list_spaces(),
            Question::Policy(request) => self.policy_asked(&request),
            Question::Blocks(prefix) => return self.start_search(ticket, prefix, Then::Describe),
            Question::Pin { id_prefix, ttl_ms } => {
                return self.start_search(ticket, id_prefix, Then::Pin { ttl_ms });
            }
            Question::Purge(what) => return self.start_purge(ticket, what),
            Question::ChangeTier(request) => return self.start_tier_change(ticket, &request),
        };
        self.out.push(Effect::Answer { ticket, answer });
    }

    fn tick(&mut self) {
        self.end_leases();
        self.end_hand_offs();
        self.end_claims();
        self.give_up_stalled();
        self.give_up_seeking();
        self.unpin_expired();
        self.close_idle();
        self.search_again();
        self.end_waits();
        self.telling.due = true;
    }
}
