//! What every side of the Membership seam must do: a written list, etcd, and the fake, also on its bad days.
//!
//! One suite of properties, each run in a cluster of its own against each side; below it what only one side can show:
//! etcd killed, emptied, late or not an etcd at all; the fake's faults. Nothing sleeps: a wait is for an event, or for
//! the absence of one.

mod server;

use kvd::cluster::fake::Fake;
use kvd::cluster::{Member, Members, Membership, etcd, standalone};
use kvd_proto::limits::NODES_MAX;
use server::Server;
use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::watch;

/// etcd gives no shorter lease with its usual election timeout.
const ETCD_TTL: Duration = Duration::from_secs(2);
const FAKE_TTL: Duration = Duration::from_millis(600);
/// How long an event is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// What a loaded machine may add to a time to live.
const SLACK: Duration = Duration::from_secs(1);

/// How to be a member of a cluster, by the cluster's name.
trait Side: Sync {
    fn join(&self, cluster: &str, me: Member) -> Membership;
    /// After so long a death is known; None: never.
    fn ttl(&self) -> Option<Duration>;
    /// Many more members.
    async fn crowd(&self, cluster: &str, members: Vec<Member>);
    /// The registry forgets one who is there.
    async fn expire(&self, cluster: &str, name: &str);
}

/// The three that every property is about, and whoever was added to the crowd.
#[derive(Default)]
struct Listed(Mutex<Vec<String>>);

impl Side for Listed {
    fn join(&self, _: &str, me: Member) -> Membership {
        let crowd = self.0.lock().unwrap();
        let three = ["a", "b", "c"].map(|name| member(name, 0).address);
        let list: Vec<String> = three.into_iter().chain(crowd.iter().cloned()).collect();
        standalone::join(me, &list)
    }

    fn ttl(&self) -> Option<Duration> {
        None
    }

    async fn crowd(&self, _: &str, members: Vec<Member>) {
        // a and b and c are there already
        *self.0.lock().unwrap() = members.into_iter().skip(2).map(|member| member.address).collect();
    }

    async fn expire(&self, _: &str, _: &str) {}
}

impl Side for Server {
    fn join(&self, cluster: &str, me: Member) -> Membership {
        etcd_join(&[&self.endpoint()], cluster, me)
    }

    fn ttl(&self) -> Option<Duration> {
        Some(ETCD_TTL)
    }

    async fn crowd(&self, cluster: &str, members: Vec<Member>) {
        let value = |member: &Member| format!(r#"{{"address":"{}","epoch":1}}"#, member.address);
        let pairs = members.iter().map(|member| (format!("/{cluster}/nodes/{}", member.name), value(member)));
        self.put(pairs).await;
    }

    async fn expire(&self, cluster: &str, name: &str) {
        self.delete(format!("/{cluster}/nodes/{name}")).await;
    }
}

/// A fake for each cluster.
struct Fakes {
    fakes: Mutex<HashMap<String, Fake>>,
    garbled: bool,
}

impl Fakes {
    fn new(garbled: bool) -> Self {
        Self { fakes: Mutex::default(), garbled }
    }

    fn of(&self, cluster: &str) -> Fake {
        let mut fakes = self.fakes.lock().unwrap();
        let fake = fakes.entry(cluster.to_owned()).or_insert_with(|| Fake::new(FAKE_TTL));
        if self.garbled {
            fake.garble();
        }
        fake.clone()
    }
}

impl Side for Fakes {
    fn join(&self, cluster: &str, me: Member) -> Membership {
        self.of(cluster).join(me)
    }

    fn ttl(&self) -> Option<Duration> {
        Some(FAKE_TTL)
    }

    async fn crowd(&self, cluster: &str, members: Vec<Member>) {
        self.of(cluster).crowd(members);
    }

    async fn expire(&self, cluster: &str, name: &str) {
        self.of(cluster).expire(name);
    }
}

fn etcd_join(endpoints: &[&str], cluster: &str, me: Member) -> Membership {
    let settings = etcd::Settings {
        endpoints: endpoints.iter().map(ToString::to_string).collect(),
        prefix: format!("/{cluster}"),
        ttl_ms: ETCD_TTL.as_millis() as u32,
    };
    etcd::join(settings, me).unwrap()
}

fn member(name: &str, epoch: u64) -> Member {
    Member { name: name.to_owned(), address: format!("{name}.test:7700"), epoch }
}

/// One node's view; every set that is seen through it is checked.
struct View {
    members: watch::Receiver<Members>,
}

impl View {
    fn of(membership: &Membership) -> Self {
        Self { members: membership.members() }
    }

    async fn until(&mut self, what: &str, right: impl Fn(&Members) -> bool) -> Members {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let members = self.members.borrow_and_update().clone();
            assert!(members.is_sorted_by(|a, b| a.address < b.address), "sorted: {members:?}");
            if right(&members) {
                return members;
            }
            let changed = tokio::time::timeout_at(deadline, self.members.changed()).await;
            let changed = changed.unwrap_or_else(|_| panic!("{what}: still {members:?}"));
            changed.unwrap();
            assert_ne!(*self.members.borrow(), members, "a wake without a change");
        }
    }

    async fn until_names(&mut self, names: &[&str]) -> Members {
        let addresses: Vec<String> = names.iter().map(|name| member(name, 0).address).collect();
        let right = |members: &Members| members.iter().map(|member| &member.address).eq(&addresses);
        self.until(&format!("{names:?}"), right).await
    }

    /// Not since it was last looked at, and not for so long from now on.
    async fn unchanged_for(&mut self, time: Duration) {
        let changed = tokio::time::timeout(time, self.members.changed()).await;
        assert!(changed.is_err(), "the set changed: {:?}", self.members.borrow());
    }
}

/// a, b and c, who see each other.
async fn three(side: &impl Side, cluster: &str) -> [(Membership, View); 3] {
    see_each_other(["a", "b", "c"].map(|name| side.join(cluster, member(name, 1)))).await
}

async fn see_each_other(joined: [Membership; 3]) -> [(Membership, View); 3] {
    let mut three = joined.map(|membership| {
        let view = View::of(&membership);
        (membership, view)
    });
    for (at, (membership, view)) in three.iter_mut().enumerate() {
        let members = view.until_names(&["a", "b", "c"]).await;
        assert_eq!(members[at], member(["a", "b", "c"][at], 1), "itself as it is");
        membership.settled().await.unwrap();
        assert_eq!((membership.trouble(), membership.ignored()), (None, 0));
    }
    three
}

async fn joiners_are_seen_by_all(side: &impl Side) {
    let mut three = three(side, "joiners").await;
    for (_, view) in &mut three {
        view.unchanged_for(FAKE_TTL).await; // beats wake nobody
    }
}

async fn a_member_sees_itself_at_once(side: &impl Side) {
    let membership = side.join("itself", member("a", 7));
    assert!(membership.members().borrow().contains(&member("a", 7)));
    membership.settled().await.unwrap();
    assert!(membership.members().borrow().contains(&member("a", 7)));
}

async fn leaving_is_seen(side: &impl Side) {
    let [(a, mut at_a), (b, _), (_c, mut at_c)] = three(side, "leaving").await;
    let started = Instant::now();
    b.leave().await.unwrap();
    let Some(ttl) = side.ttl() else { return at_a.unchanged_for(FAKE_TTL).await };
    at_a.until_names(&["a", "c"]).await;
    at_c.until_names(&["a", "c"]).await;
    assert!(started.elapsed() < ttl, "leaving takes {:?}, as a death", started.elapsed());
    a.leave().await.unwrap();
    at_c.until_names(&["c"]).await;
}

async fn a_death_is_seen(side: &impl Side) {
    let Some(ttl) = side.ttl() else { return };
    let [(_a, mut at_a), (b, _), _c] = three(side, "death").await;
    drop(b);
    let died = Instant::now();
    at_a.until_names(&["a", "c"]).await;
    println!("a death was seen after {:?} of {ttl:?}", died.elapsed());
    assert!(died.elapsed() < ttl + SLACK, "seen after {:?}", died.elapsed());
}

async fn a_killed_node_comes_back_at_once_with_its_new_epoch(side: &impl Side) {
    let [(_a, mut at_a), (b, _), _c] = three(side, "epoch").await;
    drop(b);
    let back = side.join("epoch", member("b", 2));
    back.settled().await.unwrap();
    if side.ttl().is_some() {
        let all = |members: &Members| {
            assert_eq!(members.len(), 3, "b is in throughout");
            members[1] == member("b", 2)
        };
        at_a.until("b's new epoch", all).await;
        at_a.unchanged_for(FAKE_TTL * 2).await;
    }
}

async fn a_name_that_is_taken_is_refused(side: &impl Side) {
    if side.ttl().is_none() {
        return; // a list has no names
    }
    let [(_a, mut at_a), _b, _c] = three(side, "names").await;
    let second = side.join("names", Member { address: "z.test:7700".to_owned(), ..member("b", 1) });
    let error = second.settled().await.unwrap_err();
    assert_eq!(error.field, "node_name");
    assert!(error.message.contains("b.test:7700"), "{error}");
    assert_eq!(second.trouble(), Some(error.to_string()));
    at_a.unchanged_for(FAKE_TTL).await;
}

async fn who_is_forgotten_comes_back(side: &impl Side) {
    let Some(ttl) = side.ttl() else { return };
    let [(_a, mut at_a), (b, mut at_b), _c] = three(side, "forgotten").await;
    side.expire("forgotten", "b").await;
    at_a.until_names(&["a", "c"]).await;
    at_a.until_names(&["a", "b", "c"]).await;
    at_b.unchanged_for(ttl).await;
    assert_eq!(b.trouble(), None);
}

async fn too_many_are_left_out_and_counted(side: &impl Side) {
    let crowd: Vec<Member> = (0..NODES_MAX + 6).map(|at| member(&format!("n{at:04}"), 1)).collect();
    side.crowd("crowd", crowd).await;
    let a = side.join("crowd", member("a", 1));
    let mut at_a = View::of(&a);
    let members = at_a.until("all that may be", |members| members.len() == NODES_MAX).await;
    assert_eq!(members[0], member("a", 1));
    assert_eq!(a.ignored(), 7);
}

async fn conformance(side: &impl Side) {
    tokio::join!(
        a_member_sees_itself_at_once(side),
        joiners_are_seen_by_all(side),
        leaving_is_seen(side),
        a_death_is_seen(side),
        a_killed_node_comes_back_at_once_with_its_new_epoch(side),
        a_name_that_is_taken_is_refused(side),
        who_is_forgotten_comes_back(side),
    );
    too_many_are_left_out_and_counted(side).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_written_list_conforms() {
    conformance(&Listed::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_fake_conforms() {
    conformance(&Fakes::new(false)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_fake_conforms_with_events_told_twice_and_listings_backwards() {
    conformance(&Fakes::new(true)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_conforms() {
    let Some(server) = Server::start() else { return };
    conformance(&server).await;
}

/// etcd is killed and comes back after 3 s: nobody sees any change, then and later; and it still works.
async fn etcd_comes_back(forgot: bool) {
    let Some(mut server) = Server::start() else { return };
    let [a, b] = ["a", "b"].map(|name| server.join("back", member(name, 1)));
    // it comes back later than the others, who must not take it for dead
    let c = etcd_join(&["127.0.0.1:0", &server.endpoint()], "back", member("c", 1));
    let [mut a, mut b, mut c] = see_each_other([a, b, c]).await;
    server.kill();
    a.1.unchanged_for(Duration::from_secs(3)).await;
    assert!(a.0.trouble().is_some_and(|trouble| trouble.contains("cluster.etcd")), "{:?}", a.0.trouble());
    if forgot {
        server.lose_data();
    }
    assert!(server.run());
    a.1.unchanged_for(ETCD_TTL * 2 + SLACK).await;
    for (membership, view) in [&mut b, &mut c] {
        view.unchanged_for(Duration::ZERO).await;
        assert_eq!(membership.trouble(), None);
    }
    let d = server.join("back", member("d", 1));
    a.1.until_names(&["a", "b", "c", "d"]).await;
    View::of(&d).until_names(&["a", "b", "c", "d"]).await;
    drop(b.0);
    a.1.until_names(&["a", "c", "d"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_killed_and_restarted_changes_nothing() {
    etcd_comes_back(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_killed_and_emptied_changes_nothing() {
    etcd_comes_back(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_died_while_etcd_was_away_is_missed_afterwards() {
    let Some(mut server) = Server::start() else { return };
    let [(_a, mut at_a), (b, _), _c] = three(&server, "away").await;
    server.kill();
    drop(b);
    at_a.unchanged_for(ETCD_TTL + SLACK).await;
    assert!(server.run());
    at_a.until_names(&["a", "c"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_that_comes_late_is_joined_then() {
    let Some(mut server) = Server::planned() else { return };
    let a = server.join("late", member("a", 1));
    a.settled().await.unwrap();
    assert!(a.trouble().unwrap().contains(&server.endpoint()), "{:?}", a.trouble());
    assert_eq!(*View::of(&a).members.borrow().to_vec(), [member("a", 1)]);
    assert!(server.run(), "its port was taken by another test");
    let b = server.join("late", member("b", 1));
    View::of(&a).until_names(&["a", "b"]).await;
    View::of(&b).until_names(&["a", "b"]).await;
    assert_eq!(a.trouble(), None);
}

/// Listens and answers whoever connects with `bytes`.
async fn no_etcd(bytes: &'static [u8]) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((mut socket, _)) = listener.accept().await {
            let _ = socket.write_all(bytes).await;
            kept.push(socket);
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_etcd_is_trouble_and_no_refusal() {
    let tls_alert = no_etcd(b"\x15\x03\x01\x00\x02\x02\x46").await;
    let silent = no_etcd(b"").await;
    for wrong in [tls_alert.as_str(), &silent, "https://127.0.0.1:1", "no address", "", "127.0.0.1:0"] {
        let a = etcd_join(&[wrong], "wrong", member("a", 1));
        tokio::time::timeout(PATIENCE, a.settled()).await.unwrap().unwrap();
        let trouble = a.trouble().unwrap();
        assert!(trouble.contains(wrong), "{wrong}: {trouble}");
        assert_eq!(a.members().borrow().to_vec(), [member("a", 1)]);
        println!("{trouble}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_endpoint_will_do_and_a_leave_finds_one() {
    let Some(server) = Server::start() else { return };
    let silent = no_etcd(b"").await;
    let endpoint = format!("http://{}", server.endpoint());
    let a = etcd_join(&["127.0.0.1:0", &silent, &endpoint], "any", member("a", 1));
    let b = server.join("any", member("b", 1));
    let mut at_b = View::of(&b);
    at_b.until_names(&["a", "b"]).await;
    a.leave().await.unwrap();
    at_b.until_names(&["b"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_node_in_etcd_harms_nobody() {
    let Some(server) = Server::start() else { return };
    let put = |name: &str, value: &str| (format!("/odd/nodes/{name}"), value.to_owned());
    server.put([put("", "x"), put("b", "{}"), put("c", r#"{"address":"nowhere","epoch":1}"#)]).await;
    let a = server.join("odd", member("a", 1));
    a.settled().await.unwrap();
    let mut at_a = View::of(&a);
    server.put([put("d", "\0"), put("e", r#"{"address":"e.test:7700","epoch":3,"more":[1]}"#)]).await;
    at_a.until_names(&["a", "e"]).await;
    let b = server.join("odd", member("b", 1));
    let error = b.settled().await.unwrap_err();
    assert!(error.message.contains("/odd/nodes/b"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaving_while_nobody_hears_says_so_and_ends() {
    let Some(mut server) = Server::start() else { return };
    let a = server.join("unheard", member("a", 1));
    a.settled().await.unwrap();
    server.kill();
    let error = tokio::time::timeout(PATIENCE, a.leave()).await.unwrap().unwrap_err();
    assert_eq!(error.field, "cluster.etcd", "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_cut_off_keeps_what_it_knows_and_is_missed_by_the_others() {
    let fakes = Fakes::new(false);
    let [(_a, mut at_a), (b, mut at_b), _c] = three(&fakes, "cut").await;
    fakes.of("cut").cut("b");
    at_a.until_names(&["a", "c"]).await;
    at_b.unchanged_for(FAKE_TTL).await;
    assert!(b.trouble().is_some());
    fakes.of("cut").heal("b");
    at_a.until_names(&["a", "b", "c"]).await;
    at_b.unchanged_for(FAKE_TTL * 2).await;
    assert_eq!(b.trouble(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_stalls_and_forgets_changes_nothing() {
    let fakes = Fakes::new(true);
    for forgot in [false, true] {
        let cluster = format!("stall-{forgot}");
        let mut three = three(&fakes, &cluster).await;
        fakes.of(&cluster).stall();
        three[0].1.unchanged_for(FAKE_TTL * 2).await;
        fakes.of(&cluster).resume(forgot);
        for (membership, view) in &mut three {
            view.unchanged_for(FAKE_TTL * 2).await;
            assert_eq!(membership.trouble(), None);
        }
    }
}
