//! Sessions and their members: who is connected, whose process is alive, which spaces they know.
//!
//! Invariants: a member belongs to one session; a session ends with its last member; a member that maps memory ends only
//! by closing, or with its process (a lost socket proves nothing, law 2).

use super::event::{Effect, MemberId};
use super::lease::{LeaseId, RequestKind};
use super::{Node, RegisteredSpace};
use kvd_proto::limits::{ENGINE_BYTES_MAX, SPACES_MAX, TENANT_BYTES_MAX};
use kvd_proto::wire::{self, Tier, node_frame::Body as Reply};
use kvd_proto::{Code, Error, PROTOCOL_MAJOR, PROTOCOL_MINOR, Space};
use std::collections::{BTreeMap, BTreeSet, HashMap};

pub(super) type SessionId = u64;

/// A session whose members map nothing is closed after this long without a request.
const IDLE_US_MAX: u64 = 600_000_000;

/// Tenants of one daemon. At the limit: a session of a new one is refused.
pub(super) const TENANTS_MAX: usize = 4096;

#[derive(Default)]
pub(super) struct Sessions {
    pub(super) sessions: BTreeMap<SessionId, Session>,
    members: BTreeMap<MemberId, Member>,
    by_token: HashMap<[u8; 16], SessionId>,
    last: SessionId,
}

pub(super) struct Session {
    token: [u8; 16],
    pub(super) tenant: usize,
    engine: String,
    members: BTreeSet<MemberId>,
    pub(super) leases: BTreeSet<LeaseId>,
    /// So that asking again gives the same answer.
    pub(super) by_key: HashMap<(RequestKind, Vec<u8>), LeaseId>,
    pub(super) leased_bytes: u64,
}

struct Member {
    session: SessionId,
    name: String,
    pid: u32,
    maps: bool,
    /// What its client calls itself at every daemon; 0: nothing.
    client: u64,
    /// Place of the memory node it is near to.
    memory_node: usize,
    connected: bool,
    seen_us: u64,
}

impl Sessions {
    pub(super) fn seen(&mut self, member: MemberId, now_us: u64) -> Result<(), Error> {
        let member = self.members.get_mut(&member).ok_or_else(unknown_session)?;
        member.seen_us = now_us;
        Ok(())
    }

    pub(super) fn of(&self, member: MemberId) -> Result<SessionId, Error> {
        self.members.get(&member).map(|member| member.session).ok_or_else(unknown_session)
    }

    pub(super) fn get(&self, session: SessionId) -> &Session {
        &self.sessions[&session]
    }

    pub(super) fn get_mut(&mut self, session: SessionId) -> &mut Session {
        self.sessions.get_mut(&session).expect("a session that a member or lease names")
    }

    pub(super) fn memory_node(&self, member: MemberId) -> usize {
        self.members.get(&member).map_or(0, |member| member.memory_node)
    }

    /// Whether it maps memory.
    pub(super) fn member_maps(&self, member: MemberId) -> bool {
        self.members.get(&member).is_some_and(|member| member.maps)
    }

    /// Nobody is in it, and nothing holds it: devices copied by its leases when its last member left.
    pub(super) fn is_left(&self, session: SessionId) -> bool {
        let session = self.get(session);
        session.members.is_empty() && session.leases.is_empty()
    }

    pub(super) fn maps(&self, session: SessionId) -> bool {
        self.get(session).members.iter().any(|member| self.members[member].maps)
    }

    pub(super) fn client(&self, member: MemberId) -> Option<u64> {
        self.members.get(&member).map(|member| member.client).filter(|client| *client != 0)
    }

    pub(super) fn counts(&self) -> (usize, usize) {
        (self.sessions.len(), self.members.len())
    }

    /// Whoever must hear of a tenant's new segment.
    fn mapping_members(&self, tenant: usize) -> Vec<MemberId> {
        let ours = |member: &&MemberId| {
            let member = &self.members[*member];
            member.maps && member.connected && self.sessions[&member.session].tenant == tenant
        };
        self.members.keys().filter(ours).copied().collect()
    }
}

fn unknown_session() -> Error {
    Error::new(
        Code::UnknownSession,
        "session",
        "this node does not know it",
        "open one; after a daemon restart every session is unknown",
    )
}

impl Node {
    pub(super) fn open_session(
        &mut self,
        member: MemberId,
        request_id: u64,
        pid: u32,
        maps: bool,
        token: [u8; 16],
        request: wire::OpenSessionRequest,
    ) -> Result<(), Error> {
        check_open(&request)?;
        let memory_node = self.memory.place_of(request.numa_node, member)?;
        if self.sessions.members.contains_key(&member) {
            let fix = "open another connection for another session";
            return Err(Error::invalid("open_session", "this connection has its session", fix));
        }
        if self.sessions.members.len() >= self.config.members_max {
            let message = format!("{} connections", self.config.members_max);
            return Err(Error::limit("limits.members_max", message, "close some or raise the limit"));
        }
        let tenant = if request.tenant.is_empty() { "default" } else { &request.tenant };
        if !self.tenants.iter().any(|known| known == tenant) {
            self.check_new_tenant(&request)?;
        }
        let tenant = self.tenant(tenant);
        let session = if request.join.is_empty() {
            self.new_session(tenant, token, &request)?
        } else {
            self.joined_session(tenant, &request)?
        };
        let name = if request.member.is_empty() { "main".to_owned() } else { request.member };
        let seen_us = self.now_us;
        let (client, connected) = (request.client, true);
        let new = Member { session, name: name.clone(), pid, maps, client, memory_node, connected, seen_us };
        self.sessions.members.insert(member, new);
        self.sessions.get_mut(session).members.insert(member);
        self.replace_member(member, &request.held);
        let engine = self.sessions.get(session).engine.clone();
        self.note("session", || format!("{engine} ({name}, pid {pid}) opened session {session}"));
        self.welcome(member, request_id, session);
        Ok(())
    }

    fn check_new_tenant(&self, request: &wire::OpenSessionRequest) -> Result<(), Error> {
        if !request.join.is_empty() {
            return Err(unknown_session()); // a tenant nobody has heard of has no session
        }
        if self.tenants.len() >= TENANTS_MAX {
            let message = format!("{TENANTS_MAX} tenants have been here");
            return Err(Error::limit("tenant", message, "restart the node to forget old ones"));
        }
        Ok(())
    }

    fn new_session(
        &mut self,
        tenant: usize,
        token: [u8; 16],
        request: &wire::OpenSessionRequest,
    ) -> Result<SessionId, Error> {
        if self.sessions.sessions.len() >= self.config.sessions_max {
            let message = format!("{} sessions", self.config.sessions_max);
            return Err(Error::limit("limits.sessions_max", message, "close some or raise the limit"));
        }
        self.sessions.last += 1;
        let id = self.sessions.last;
        let session = Session {
            token,
            tenant,
            engine: request.engine.clone(),
            members: BTreeSet::new(),
            leases: BTreeSet::new(),
            by_key: HashMap::new(),
            leased_bytes: 0,
        };
        self.sessions.sessions.insert(id, session);
        let clash = self.sessions.by_token.insert(token, id);
        assert!(clash.is_none(), "two sessions with one token");
        Ok(id)
    }

    fn joined_session(&self, tenant: usize, request: &wire::OpenSessionRequest) -> Result<SessionId, Error> {
        let token = <[u8; 16]>::try_from(&request.join[..]).ok();
        let session = token.and_then(|token| self.sessions.by_token.get(&token)).copied();
        // another tenant's token is as unknown as a made-up one (law 9)
        session.filter(|session| self.sessions.get(*session).tenant == tenant).ok_or_else(unknown_session)
    }

    /// A member that comes back after a lost socket takes its old self's place, its leases with it; it has no share in those
    /// it no longer holds. A process without a number is never known again: it may be another one.
    fn replace_member(&mut self, member: MemberId, held: &[LeaseId]) {
        let new = &self.sessions.members[&member];
        let session = new.session;
        let same = |member: &&MemberId| {
            let old = &self.sessions.members[*member];
            !old.connected && old.name == new.name && old.pid == new.pid && old.pid != 0
        };
        let Some(old) = self.sessions.get(session).members.iter().find(same).copied() else { return };
        self.sessions.members.remove(&old);
        self.sessions.get_mut(session).members.remove(&old);
        self.pages.take_over(old, member);
        self.take_over_leases(session, old, member, &held.iter().copied().collect());
        self.out.push(Effect::Close { member: old });
    }

    fn welcome(&mut self, member: MemberId, request_id: u64, session: SessionId) {
        let (tenant, token) = (self.sessions.get(session).tenant, self.sessions.get(session).token);
        let maps = self.sessions.members[&member].maps;
        let mut segments = if maps { self.memory.announced(tenant) } else { Vec::new() };
        let with_reply = segments.len().min(kvd_proto::limits::FRAME_FDS_MAX / 2);
        let more = segments.split_off(with_reply);
        let opened = wire::SessionOpened {
            session,
            token: token.to_vec().into(),
            node_epoch: self.config.epoch,
            lease_ttl_ms: self.config.lease_ttl_ms,
            lease_bytes_limit: self.config.lease_bytes_max,
            version_major: PROTOCOL_MAJOR,
            version_minor: PROTOCOL_MINOR,
            segments,
        };
        // the other segments first: whoever has the reply has everything
        more.into_iter().for_each(|segment| self.send(member, 0, Reply::Segment(segment)));
        self.send(member, request_id, Reply::SessionOpened(opened));
    }

    pub(super) fn tenant(&mut self, name: &str) -> usize {
        if let Some(at) = self.tenants.iter().position(|tenant| tenant == name) {
            return at;
        }
        self.tenants.push(name.to_owned());
        self.tenants.len() - 1
    }

    pub(super) fn register_space(
        &mut self,
        member: MemberId,
        request: &wire::RegisterSpaceRequest,
    ) -> Result<wire::SpaceRegistered, Error> {
        let tenant = self.sessions.get(self.sessions.of(member)?).tenant;
        let wanted = request.space.as_ref();
        let wanted = wanted.ok_or_else(|| Error::invalid("space", "not given", "describe the space"))?;
        let space = Space::from_wire(&self.tenants[tenant], wanted)?;
        let id = self.space(tenant, space, self.sessions.memory_node(member))?;
        let registered = &self.spaces[usize::from(id)];
        let layout = &registered.space.layout;
        Ok(wire::SpaceRegistered {
            space: id.into(),
            fingerprint: registered.fingerprint.0.to_vec().into(),
            slot_bytes: (0..layout.groups().len()).map(|group| layout.slot_bytes(group)).collect(),
        })
    }

    /// The space's number, new or known; opens the first segment of each of its slot classes.
    pub(super) fn space(&mut self, tenant: usize, space: Space, near: usize) -> Result<u16, Error> {
        let id = self.add_space(tenant, space)?;
        for (dram, _) in self.spaces[usize::from(id)].pools.clone() {
            self.grow_if_empty(dram, near);
        }
        Ok(id)
    }

    /// The space's number, new or known.
    pub(super) fn add_space(&mut self, tenant: usize, space: Space) -> Result<u16, Error> {
        let fingerprint = space.fingerprint();
        if let Some(known) = self.by_fingerprint.get(&fingerprint) {
            return Ok(*known);
        }
        if self.spaces.len() >= SPACES_MAX {
            let message = format!("{SPACES_MAX} spaces are registered");
            return Err(Error::limit("space", message, "restart the node to forget old ones"));
        }
        for group in 0..space.layout.groups().len() {
            self.memory.check_class(space.layout.slot_bytes(group))?;
        }
        let mut pools = Vec::new();
        for group in 0..space.layout.groups().len() {
            let class = (space.layout.slot_bytes(group), space.layout.groups()[group].part_count() as u16);
            let dram = self.memory.pool(Tier::Dram, tenant, class);
            let nvme = self.config.nvme.is_some().then(|| self.memory.pool(Tier::Nvme, tenant, class));
            pools.push((dram, nvme));
        }
        let id = self.spaces.len() as u16;
        let text = format!("{} of {} as {id}", space.model, space.tenant);
        self.by_fingerprint.insert(fingerprint, id);
        let definition = Box::new(space.to_wire());
        self.out.push(Effect::Space { fingerprint, tenant: space.tenant.clone(), definition });
        self.spaces.push(RegisteredSpace { space, fingerprint, tenant, pools });
        self.note("space", || text);
        Ok(id)
    }

    /// The space a request names, if it is the member's tenant's.
    pub(super) fn space_of(&self, member: MemberId, space: u32) -> Result<u16, Error> {
        let tenant = self.sessions.get(self.sessions.of(member)?).tenant;
        let known = self.spaces.get(space as usize).filter(|known| known.tenant == tenant);
        known.map(|_| space as u16).ok_or_else(|| {
            Error::new(
                Code::UnknownSpace,
                "space",
                format!("{space} is not registered by this tenant"),
                "register the space first",
            )
        })
    }

    pub(super) fn announce_segment(&mut self, tenant: usize, segment: wire::Segment) {
        for member in self.sessions.mapping_members(tenant) {
            self.send(member, 0, Reply::Segment(segment));
        }
    }

    pub(super) fn socket_lost(&mut self, member: MemberId) {
        let Some(lost) = self.sessions.members.get_mut(&member) else { return };
        lost.connected = false;
        if !lost.maps {
            self.end_member(member, "connection lost");
        } else {
            self.note("session", || format!("member {member} lost its socket; its process is alive"));
        }
    }

    pub(super) fn process_gone(&mut self, member: MemberId) {
        if self.orphan_settled(member) {
            return;
        }
        self.end_member(member, "process gone");
    }

    /// The reply leaves before the connection is forgotten.
    pub(super) fn close_member(&mut self, member: MemberId, request_id: u64) {
        if request_id != 0 {
            self.send(member, request_id, Reply::SessionClosed(wire::SessionClosed {}));
        }
        self.end_member(member, "closed");
    }

    /// The member touches nothing any more. Its open fills are aborted; what others of its session asked for too, and may
    /// be reading or writing, stays theirs until they release it or are gone.
    fn end_member(&mut self, member: MemberId, why: &str) {
        let Some(gone) = self.sessions.members.remove(&member) else { return };
        let session = gone.session;
        self.sessions.get_mut(session).members.remove(&member);
        self.abandon_pages(member);
        self.abandon_leases(session, member);
        if self.sessions.get(session).members.is_empty() {
            let token = self.sessions.get(session).token;
            self.sessions.by_token.remove(&token); // nobody joins what is over
            self.end_session_if_left(session);
        }
        self.note("session", || format!("{} of session {session}: {why}", gone.name));
        self.out.push(Effect::Close { member });
    }

    pub(super) fn end_session(&mut self, session: SessionId) {
        let ended = self.sessions.sessions.remove(&session).expect("it was there");
        assert!(ended.leases.is_empty() && ended.leased_bytes == 0, "a session ends without leases");
        self.filler_gone(session);
    }

    pub(super) fn close_idle(&mut self) {
        let idle = |(member, state): (&MemberId, &Member)| {
            (!state.maps && self.now_us - state.seen_us > IDLE_US_MAX).then_some(*member)
        };
        let idle: Vec<_> = self.sessions.members.iter().filter_map(idle).collect();
        idle.into_iter().for_each(|member| self.end_member(member, "idle"));
    }
}

fn check_open(request: &wire::OpenSessionRequest) -> Result<(), Error> {
    if request.version_major != PROTOCOL_MAJOR {
        return Err(Error::new(
            Code::UnsupportedVersion,
            "version_major",
            format!("the client speaks {}, the node {PROTOCOL_MAJOR}", request.version_major),
            "install the same major version of both",
        ));
    }
    let names = [
        ("tenant", &request.tenant, TENANT_BYTES_MAX),
        ("engine", &request.engine, ENGINE_BYTES_MAX),
        ("member", &request.member, ENGINE_BYTES_MAX),
    ];
    for (field, name, most) in names {
        if name.len() > most {
            let message = format!("{} bytes", name.len());
            return Err(Error::invalid(field, message, format!("give at most {most} bytes")));
        }
    }
    Ok(())
}
