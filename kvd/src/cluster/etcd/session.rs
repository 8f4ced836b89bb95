//! One node's life in etcd: its lease, its key, and hearing all others, over one endpoint at a time.
//!
//! Owns the lease and the way back. Invariants: at most one connection; a key stands under this node's lease or not at
//! all; a lease that ended is replaced without being asked; another node's key is never written over unless it has this
//! node's address. Leaves to others: who is in (`roster`), bytes (`record`), calls (`client`).

use super::client::Client;
use super::rpc::{Event as Change, KeyValue, PutRequest, WatchResponse, event::Type};
use super::{Settings, record};
use crate::cluster::roster::{Effects, Event, Roster};
use crate::cluster::{Member, Seat, unheard};
use kvd_proto::Error;
use std::convert::Infallible;
use std::time::{Duration, Instant};
use tokio::time::MissedTickBehavior;
use tonic::Streaming;

/// Attempts to put the key while others change it. At the limit: the session begins anew, after a pause.
const PUT_TRIES_MAX: u32 = 4;
/// Between two attempts, at first.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// And at most, if a third of the time to live, shared by all endpoints, is not less.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// This node.
pub(super) struct Session {
    settings: Settings,
    folder: String,
    folder_end: String,
    me: Member,
    seat: Seat,
    roster: Roster,
    started: Instant,
    client: Option<Client>,
    lease_id: Option<i64>,
}

impl Session {
    pub(super) fn new(settings: Settings, me: Member, seat: Seat) -> Self {
        let folder = record::folder(&settings.prefix);
        let roster = Roster::new(me.clone(), settings.ttl_s() * 1000);
        Self {
            folder_end: record::folder_end(&folder),
            folder,
            settings,
            me,
            seat,
            roster,
            started: Instant::now(),
            client: None,
            lease_id: None,
        }
    }

    /// Becomes a member and stays one, whatever etcd does.
    pub(super) async fn stay(&mut self) -> Infallible {
        let endpoints = self.settings.endpoints.len();
        let mut failures = 0;
        loop {
            let endpoint = self.settings.endpoints[failures % endpoints].clone();
            let Err(error) = self.live(&endpoint, &mut failures).await;
            self.seat.troubled(error);
            self.hear(Event::Lost);
            tokio::time::sleep(pause(failures, endpoints, self.settings.beat())).await;
            failures += 1;
        }
    }

    /// Tells the others by ending the lease, wherever etcd may be reached now.
    pub(super) async fn leave(mut self) -> Result<(), Error> {
        let Some(lease_id) = self.lease_id else { return Ok(()) };
        let mut trouble = match self.client.take() {
            Some(client) => client.revoke(lease_id).await.err(),
            None => Some(unheard("etcd is not reached")),
        };
        for endpoint in &self.settings.endpoints {
            if trouble.is_none() {
                break;
            }
            let revoked =
                async { Client::connect(endpoint, self.settings.beat()).await?.revoke(lease_id).await };
            trouble = revoked.await.err();
        }
        trouble.map_or(Ok(()), |error| Err(unheard(&error.message)))
    }

    /// One connection, to its end.
    async fn live(&mut self, endpoint: &str, failures: &mut usize) -> Result<Infallible, Error> {
        self.client = None;
        let client = Client::connect(endpoint, self.settings.call_time_max()).await?;
        self.client = Some(client.clone());
        self.join(&client).await?;
        loop {
            let listed = client.list(&self.folder, &self.folder_end).await?;
            let mut watch = client.watch(&self.folder, &self.folder_end, listed.revision + 1).await?;
            let members = listed.found.iter().filter_map(|found| self.member(found)).collect();
            self.seat.untroubled();
            self.hear(Event::Listing { members, beyond: listed.beyond });
            self.seat.joined();
            *failures %= self.settings.endpoints.len();
            self.follow(&client, &mut watch).await?;
        }
    }

    /// Until the listing must be got again.
    async fn follow(&mut self, client: &Client, watch: &mut Streaming<WatchResponse>) -> Result<(), Error> {
        let mut beat = tokio::time::interval(self.settings.beat());
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let effects = tokio::select! {
                _ = beat.tick() => self.beat(client).await?,
                reply = watch.message() => match reply {
                    Ok(Some(reply)) => self.hear_all(&reply).map_err(|why| client.away(&why))?,
                    Ok(None) => return Err(client.away("it ended the watch")),
                    Err(status) => return Err(client.away(status.message())),
                },
            };
            if effects.join_again {
                self.join(client).await?;
            }
            if effects.list_again {
                return Ok(());
            }
        }
    }

    /// Keeps the lease, and lets time pass for those who are doubted.
    async fn beat(&mut self, client: &Client) -> Result<Effects, Error> {
        let kept = match self.lease_id {
            Some(lease_id) => client.keep_alive(lease_id).await?,
            None => false,
        };
        let effects = self.hear(Event::Tick);
        Ok(Effects { join_again: effects.join_again || !kept, ..effects })
    }

    /// Has a lease that lives and the key under it.
    async fn join(&mut self, client: &Client) -> Result<(), Error> {
        if let Some(lease_id) = self.lease_id
            && !client.keep_alive(lease_id).await?
        {
            self.lease_id = None;
        }
        let lease_id = match self.lease_id {
            Some(lease_id) => lease_id,
            None => client.grant(self.settings.ttl_s() as i64).await?,
        };
        self.lease_id = Some(lease_id);
        let put = PutRequest {
            key: format!("{}{}", self.folder, self.me.name).into(),
            value: record::encode(&self.me).into(),
            lease: lease_id,
        };
        let mut revision = 0;
        for _ in 0..PUT_TRIES_MAX {
            match client.put_at(revision, put.clone()).await? {
                Ok(()) => return Ok(()),
                Err(Some(found)) if found.lease == lease_id && found.value == put.value => return Ok(()),
                Err(Some(found)) => revision = self.may_replace(&found)?,
                Err(None) => revision = 0,
            }
        }
        Err(client.away("this node's key is changed by somebody all the time"))
    }

    /// The revision to replace, if what is found is this node's earlier life.
    fn may_replace(&self, found: &KeyValue) -> Result<i64, Error> {
        let name = &self.me.name;
        let holder = record::decode(&self.folder, found);
        match holder {
            Some(holder) if holder.address == self.me.address => Ok(found.mod_revision),
            Some(holder) => Err(Error::invalid(
                "node_name",
                format!("`{name}` is the name of the node at {}, whose lease lives", holder.address),
                format!(
                    "give each node a name of its own; if that node is gone, its lease ends within {} s",
                    self.settings.ttl_s()
                ),
            )),
            None => Err(Error::invalid(
                "node_name",
                format!("`{}{name}` in etcd is not of this kvd", self.folder),
                "delete that key, or give this node another name or the cluster another cluster.prefix",
            )),
        }
    }

    /// An error is why etcd ended the watch. That changes were thrown away (compacted) before this node heard them is
    /// none: what they came to is in the listing.
    fn hear_all(&mut self, reply: &WatchResponse) -> Result<Effects, String> {
        if reply.canceled && reply.compact_revision == 0 {
            return Err(reply.cancel_reason.clone());
        }
        let mut effects = Effects { list_again: reply.compact_revision > 0, ..Effects::default() };
        for change in &reply.events {
            let Some(event) = self.event(change) else { continue };
            let more = self.apply(event);
            effects.join_again |= more.join_again;
            effects.list_again |= more.list_again;
        }
        self.seat.show(self.roster.members(), self.roster.ignored()); // once, as many may come at a time
        Ok(effects)
    }

    fn event(&self, change: &Change) -> Option<Event> {
        let found = change.kv.as_ref()?;
        match change.r#type() {
            Type::Put => self.member(found).map(Event::Put),
            Type::Delete => record::name(&self.folder, found).map(|name| Event::Delete { name }),
        }
    }

    fn member(&self, found: &KeyValue) -> Option<Member> {
        let member = record::decode(&self.folder, found);
        if member.is_none() {
            let key = String::from_utf8_lossy(&found.key);
            tracing::warn!(%key, "what stands there in etcd is no node; it is left out");
        }
        member
    }

    fn hear(&mut self, event: Event) -> Effects {
        let effects = self.apply(event);
        self.seat.show(self.roster.members(), self.roster.ignored());
        effects
    }

    fn apply(&mut self, event: Event) -> Effects {
        self.roster.apply(event, self.started.elapsed().as_millis() as u64)
    }
}

/// Twice as long after every round of all endpoints; a round always well within a lease, so that one that etcd kept is
/// not lost for being late.
fn pause(failures: usize, endpoints: usize, beat: Duration) -> Duration {
    let rounds = u32::try_from(failures / endpoints).unwrap_or(u32::MAX).min(16);
    (PAUSE_MIN * 2_u32.pow(rounds)).min(PAUSE_MAX).min(beat / endpoints as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{Members, Standing};
    use tokio::sync::watch;

    fn member(name: &str) -> Member {
        Member { name: name.to_owned(), address: format!("{name}:7700"), epoch: 1 }
    }

    fn session() -> (Session, watch::Receiver<Members>) {
        let (members, shown) = watch::channel(Members::from([member("a")]));
        let seat = Seat { members, standing: watch::channel(Standing::default()).0 };
        let settings = Settings { endpoints: vec![], prefix: "/kvd".to_owned(), ttl_ms: 1000 };
        (Session::new(settings, member("a"), seat), shown)
    }

    fn change(kind: Type, of: &Member) -> Change {
        let key = format!("/kvd/nodes/{}", of.name).into();
        let value = if kind == Type::Put { record::encode(of).into() } else { Vec::new().into() };
        Change { r#type: kind.into(), kv: Some(KeyValue { key, value, ..KeyValue::default() }) }
    }

    #[test]
    fn changes_are_told_and_an_end_of_the_watch_is_told_apart_from_one_that_fell_behind() {
        let (mut session, shown) = session();
        let [a, b] = ["a", "b"].map(member);
        let changes = |events| WatchResponse { events, ..WatchResponse::default() };
        let came = session.hear_all(&changes(vec![change(Type::Put, &b), Change::default()]));
        assert_eq!((came, shown.borrow().to_vec()), (Ok(Effects::default()), vec![a.clone(), b.clone()]));
        let went = session.hear_all(&changes(vec![change(Type::Delete, &a), change(Type::Delete, &b)]));
        assert_eq!(went, Ok(Effects { join_again: true, list_again: false }));
        assert_eq!(shown.borrow().to_vec(), [a]);
        let behind = WatchResponse { canceled: true, compact_revision: 7, ..WatchResponse::default() };
        assert_eq!(session.hear_all(&behind), Ok(Effects { join_again: false, list_again: true }));
        let ended = WatchResponse { canceled: true, cancel_reason: "no leader".to_owned(), ..behind };
        assert!(session.hear_all(&ended).is_ok(), "it says both");
        let ended = WatchResponse { compact_revision: 0, ..ended };
        assert_eq!(session.hear_all(&ended), Err("no leader".to_owned()));
    }

    #[test]
    fn only_an_earlier_life_of_this_node_is_replaced() {
        let (session, _shown) = session();
        let found = |holder: &Member| KeyValue { mod_revision: 5, ..change(Type::Put, holder).kv.unwrap() };
        assert_eq!(session.may_replace(&found(&Member { epoch: 9, ..member("a") })), Ok(5));
        let other = Member { address: "b:1".to_owned(), ..member("a") };
        assert_eq!(session.may_replace(&found(&other)).unwrap_err().field, "node_name");
        let odd = KeyValue { value: Vec::new().into(), ..found(&other) };
        assert_eq!(session.may_replace(&odd).unwrap_err().field, "node_name");
    }

    #[test]
    fn the_next_endpoint_is_asked_soon_and_all_of_them_less_and_less_often() {
        let pauses_ms = |endpoints, beat_ms| {
            let beat = Duration::from_millis(beat_ms);
            [0, 1, 2, 3, 9, usize::MAX].map(|failures| pause(failures, endpoints, beat).as_millis())
        };
        assert_eq!(pauses_ms(1, 100_000), [100, 200, 400, 800, 5000, 5000]);
        assert_eq!(pauses_ms(3, 100_000), [100, 100, 100, 200, 800, 5000]);
        assert_eq!(pauses_ms(1, 333), [100, 200, 333, 333, 333, 333]);
        assert_eq!(pauses_ms(4, 333), [83; 6]);
    }
}
