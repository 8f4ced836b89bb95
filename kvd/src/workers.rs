//! The engine workers of this node: who they are, how loaded they say they are, and what of their capacity is promised.
//!
//! Owns registrations, loads and reservations, and decides who gets the last slot. Invariants: time is an argument; a worker
//! never has more promised and counted requests than it said it can take; a reservation ends by its release, by
//! its worker counting the request, by its worker's end or by its time; names are unique.
//! Leaves to others: streams and people (`run/grpc/workers`), choosing among workers (router).

use kvd_proto::limits::{
    CLAIMED_MAX, MODEL_BYTES_MAX, REQUEST_KEY_BYTES_MAX, RESERVATION_TTL_MS_MAX, WORKER_KV_TOKENS_MAX,
    WORKER_NAME_BYTES_MAX, WORKER_REQUESTS_MAX, WORKERS_MAX,
};
use kvd_proto::wire::{self, WorkerLoad, WorkerProfile, WorkerRegistration, WorkerRole};
use kvd_proto::{Code, Error};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// A worker that has not reported for so long is given nothing: five reports missed.
pub const SILENT_US: u64 = 5_000_000;

/// Names one registration; never reused.
pub type WorkerId = u64;
/// Names one reservation; never reused.
pub type ReservationId = u64;

/// What became of a wish for capacity.
#[derive(Debug, PartialEq, Eq)]
pub enum Reserved {
    /// It is promised.
    Granted {
        /// To claim or release it with.
        reservation: ReservationId,
        /// Until then, unless it is claimed.
        ttl_ms: u32,
    },
    /// There is no room now, and why.
    Busy(String),
}

/// All of them.
#[derive(Debug, Default)]
pub struct Workers {
    workers: BTreeMap<WorkerId, Worker>,
    /// Whose it is, for every reservation there is.
    reservations: HashMap<ReservationId, WorkerId>,
    last_worker: WorkerId,
    last_reservation: ReservationId,
}

#[derive(Debug)]
struct Worker {
    registration: WorkerRegistration,
    load: WorkerLoad,
    reported_us: u64,
    promised: BTreeMap<ReservationId, Promise>,
    by_key: HashMap<String, ReservationId>,
    ends: BTreeSet<(u64, ReservationId)>,
    promised_tokens: u64,
    promised_kv_tokens: u64,
}

#[derive(Debug)]
struct Promise {
    request_key: String,
    new_tokens: u64,
    kv_tokens: u64,
    ends_us: u64,
}

impl Workers {
    /// A worker comes. One of the same name makes place for it, and is returned: it was restarted, or is mistaken.
    pub fn join(
        &mut self,
        registration: WorkerRegistration,
        now_us: u64,
    ) -> Result<(WorkerId, Option<WorkerId>), Error> {
        check(&registration)?;
        let same = |worker: &Worker| worker.registration.name == registration.name;
        let replaced = self.workers.iter().find(|(_, worker)| same(worker)).map(|(&id, _)| id);
        if replaced.is_none() && self.workers.len() == WORKERS_MAX {
            let fix = "stop workers that are not needed";
            return Err(Error::limit("registration", format!("this node has {WORKERS_MAX} workers"), fix));
        }
        if let Some(replaced) = replaced {
            self.leave(replaced);
        }
        self.last_worker += 1;
        self.workers.insert(self.last_worker, Worker::new(registration, now_us));
        Ok((self.last_worker, replaced))
    }

    /// A worker is gone, and what it had promised; one that was replaced is gone already.
    pub fn leave(&mut self, worker: WorkerId) {
        let Some(gone) = self.workers.remove(&worker) else { return };
        for reservation in gone.promised.keys() {
            self.reservations.remove(reservation);
        }
    }

    /// A worker's load now.
    pub fn report(&mut self, worker: WorkerId, mut load: WorkerLoad, now_us: u64) -> Result<(), Error> {
        let claimed = std::mem::take(&mut load.claimed);
        if claimed.len() > CLAIMED_MAX {
            let message = format!("{} reservations in one report", claimed.len());
            return Err(Error::limit("claimed", message, format!("claim at most {CLAIMED_MAX} at a time")));
        }
        let known = self.workers.get_mut(&worker).ok_or_else(|| unknown(worker))?;
        (known.load, known.reported_us) = (load, now_us);
        for reservation in claimed {
            if known.end(reservation) {
                self.reservations.remove(&reservation);
            }
        }
        Ok(())
    }

    /// Promises capacity for one request, if there is any.
    pub fn reserve(&mut self, ask: &wire::ReserveWorkerRequest, now_us: u64) -> Result<Reserved, Error> {
        self.expire(now_us);
        if ask.request_key.is_empty() || ask.request_key.len() > REQUEST_KEY_BYTES_MAX {
            let fix = format!("give 1 to {REQUEST_KEY_BYTES_MAX} bytes");
            return Err(Error::invalid("request_key", format!("{} bytes", ask.request_key.len()), fix));
        }
        let worker = self.workers.get_mut(&ask.worker).ok_or_else(|| unknown(ask.worker))?;
        if ask.kv_tokens > worker.registration.kv_tokens_max {
            let message = format!(
                "{} tokens, and the worker holds {}",
                ask.kv_tokens, worker.registration.kv_tokens_max
            );
            return Err(Error::invalid("kv_tokens", message, "shorten the prompt, or use a larger worker"));
        }
        let ttl_ms = match ask.ttl_ms {
            0 => RESERVATION_TTL_MS_MAX,
            ttl_ms => ttl_ms.min(RESERVATION_TTL_MS_MAX),
        };
        let ends_us = now_us + u64::from(ttl_ms) * 1000;
        if let Some(&reservation) = worker.by_key.get(&ask.request_key) {
            worker.prolong(reservation, ends_us);
            return Ok(Reserved::Granted { reservation, ttl_ms });
        }
        if let Some(why) = worker.busy(now_us) {
            return Ok(Reserved::Busy(why));
        }
        self.last_reservation += 1;
        worker.promise(self.last_reservation, ask, ends_us);
        self.reservations.insert(self.last_reservation, ask.worker);
        Ok(Reserved::Granted { reservation: self.last_reservation, ttl_ms })
    }

    /// Gives a reservation back; one that has ended already is fine.
    pub fn release(&mut self, reservation: ReservationId) {
        if let Some(worker) = self.reservations.remove(&reservation) {
            let worker = self.workers.get_mut(&worker).expect("a reservation goes with its worker");
            assert!(worker.end(reservation), "both sides know a reservation");
        }
    }

    /// All workers as they are now, in the order they came.
    pub fn list(&mut self, now_us: u64) -> Vec<wire::WorkerStatus> {
        self.expire(now_us);
        self.workers.iter().map(|(&id, worker)| worker.status(id, now_us)).collect()
    }

    /// Ends what has had its time; whether anything has.
    pub fn expire(&mut self, now_us: u64) -> bool {
        let before = self.reservations.len();
        for worker in self.workers.values_mut() {
            while let Some(&(_, reservation)) = worker.ends.first().filter(|(ends_us, _)| *ends_us <= now_us)
            {
                assert!(worker.end(reservation), "what ends was promised");
                self.reservations.remove(&reservation);
            }
        }
        self.reservations.len() < before
    }
}

impl Worker {
    fn new(registration: WorkerRegistration, now_us: u64) -> Self {
        Self {
            registration,
            load: WorkerLoad::default(),
            reported_us: now_us,
            promised: BTreeMap::new(),
            by_key: HashMap::new(),
            ends: BTreeSet::new(),
            promised_tokens: 0,
            promised_kv_tokens: 0,
        }
    }

    fn busy(&self, now_us: u64) -> Option<String> {
        let silent_us = now_us.saturating_sub(self.reported_us);
        let counted = u64::from(self.load.running_requests) + u64::from(self.load.waiting_requests);
        let requests_max = u64::from(self.registration.requests_max);
        if self.load.draining {
            Some("it is draining".to_owned())
        } else if silent_us > SILENT_US {
            Some(format!("it has not reported for {} ms", silent_us / 1000))
        } else if counted + self.promised.len() as u64 >= requests_max {
            Some(format!("{counted} requests and {} promised of {requests_max}", self.promised.len()))
        } else {
            None
        }
    }

    fn promise(&mut self, reservation: ReservationId, ask: &wire::ReserveWorkerRequest, ends_us: u64) {
        let promise = Promise {
            request_key: ask.request_key.clone(),
            new_tokens: ask.new_tokens.min(ask.kv_tokens),
            kv_tokens: ask.kv_tokens,
            ends_us,
        };
        self.promised_tokens += promise.new_tokens;
        self.promised_kv_tokens += promise.kv_tokens;
        self.by_key.insert(promise.request_key.clone(), reservation);
        self.ends.insert((ends_us, reservation));
        self.promised.insert(reservation, promise);
    }

    fn prolong(&mut self, reservation: ReservationId, ends_us: u64) {
        let promise = self.promised.get_mut(&reservation).expect("a key names a promise");
        self.ends.remove(&(promise.ends_us, reservation));
        promise.ends_us = ends_us;
        self.ends.insert((ends_us, reservation));
    }

    /// Whether there was one.
    fn end(&mut self, reservation: ReservationId) -> bool {
        let Some(promise) = self.promised.remove(&reservation) else { return false };
        self.promised_tokens -= promise.new_tokens;
        self.promised_kv_tokens -= promise.kv_tokens;
        self.by_key.remove(&promise.request_key);
        self.ends.remove(&(promise.ends_us, reservation));
        true
    }

    fn status(&self, worker: WorkerId, now_us: u64) -> wire::WorkerStatus {
        let silent_ms = now_us.saturating_sub(self.reported_us) / 1000;
        wire::WorkerStatus {
            worker,
            registration: Some(self.registration.clone()),
            load: Some(self.load.clone()),
            silent_ms: u32::try_from(silent_ms).unwrap_or(u32::MAX),
            reserved_requests: self.promised.len() as u32,
            reserved_tokens: self.promised_tokens,
            reserved_kv_tokens: self.promised_kv_tokens,
        }
    }
}

fn unknown(worker: WorkerId) -> Error {
    Error::new(
        Code::UnknownWorker,
        "worker",
        format!("{worker} is not here"),
        "list the node's workers again",
    )
}

fn check(registration: &WorkerRegistration) -> Result<(), Error> {
    name("name", &registration.name, WORKER_NAME_BYTES_MAX)?;
    name("model", &registration.model, MODEL_BYTES_MAX)?;
    name("address", &registration.address, WORKER_NAME_BYTES_MAX)?;
    if !registration.address.starts_with("http://") && !registration.address.starts_with("https://") {
        let fix = "say where the engine serves: http://host:port";
        return Err(Error::invalid("address", format!("{:?} is no URL", registration.address), fix));
    }
    if registration.role() == WorkerRole::Unspecified {
        return Err(Error::invalid("role", "not given", "say prefill, decode or both"));
    }
    if registration.requests_max == 0 || registration.requests_max > WORKER_REQUESTS_MAX {
        let fix = format!("give 1 to {WORKER_REQUESTS_MAX}");
        return Err(Error::invalid("requests_max", registration.requests_max.to_string(), fix));
    }
    if registration.kv_tokens_max == 0 || registration.kv_tokens_max > WORKER_KV_TOKENS_MAX {
        let fix = format!("say how many tokens of KV the engine holds, 1 to {WORKER_KV_TOKENS_MAX}");
        return Err(Error::invalid("kv_tokens_max", registration.kv_tokens_max.to_string(), fix));
    }
    if ![0, 32].contains(&registration.fingerprint.len()) {
        let message = format!("{} bytes", registration.fingerprint.len());
        return Err(Error::invalid("fingerprint", message, "give the 32 bytes of its space, or nothing"));
    }
    let profile = registration.profile.as_ref();
    profile.ok_or_else(|| Error::invalid("profile", "not given", "measure the engine")).and_then(speeds)
}

fn name(field: &str, text: &str, most: usize) -> Result<(), Error> {
    if text.is_empty() || text.len() > most {
        let fix = format!("give 1 to {most} bytes");
        return Err(Error::invalid(field, format!("{} bytes", text.len()), fix));
    }
    Ok(())
}

/// Decode curves may bend down; the rest is time, which is not negative.
fn speeds(profile: &WorkerProfile) -> Result<(), Error> {
    for (field, value, least) in [
        ("profile.prefill_base_us", profile.prefill_base_us, 0.0),
        ("profile.prefill_token_us", profile.prefill_token_us, 0.0),
        ("profile.prefill_square_us", profile.prefill_square_us, 0.0),
        ("profile.prefill_context_us", profile.prefill_context_us, 0.0),
        ("profile.decode_a_us", profile.decode_a_us, f64::MIN),
        ("profile.decode_b_us", profile.decode_b_us, f64::MIN),
        ("profile.decode_c_us", profile.decode_c_us, 0.0),
    ] {
        if !value.is_finite() || value < least {
            return Err(Error::invalid(field, value.to_string(), "give microseconds"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn registration(name: &str, requests_max: u32) -> WorkerRegistration {
        WorkerRegistration {
            name: name.into(),
            model: "llama".into(),
            address: "http://127.0.0.1:8000".into(),
            role: WorkerRole::Both.into(),
            profile: Some(WorkerProfile { prefill_token_us: 15.0, ..WorkerProfile::default() }),
            requests_max,
            kv_tokens_max: 1000,
            fingerprint: vec![7; 32].into(),
            block_tokens: 16,
            batched_tokens_max: 8192,
        }
    }

    fn ask(worker: WorkerId, key: &str) -> wire::ReserveWorkerRequest {
        wire::ReserveWorkerRequest {
            worker,
            request_key: key.into(),
            new_tokens: 100,
            kv_tokens: 300,
            ttl_ms: 1000,
        }
    }

    fn granted(reserved: Reserved) -> ReservationId {
        match reserved {
            Reserved::Granted { reservation, .. } => reservation,
            Reserved::Busy(why) => panic!("{why}"),
        }
    }

    #[test]
    fn two_routers_cannot_have_the_last_slot() {
        let mut workers = Workers::default();
        let (worker, _) = workers.join(registration("a", 2), 0).unwrap();
        let load = WorkerLoad { running_requests: 1, ..WorkerLoad::default() };
        workers.report(worker, load, 0).unwrap();
        let first = granted(workers.reserve(&ask(worker, "r1"), 0).unwrap());
        let second = workers.reserve(&ask(worker, "r2"), 0).unwrap();
        assert_eq!(second, Reserved::Busy("1 requests and 1 promised of 2".into()));
        assert_eq!(granted(workers.reserve(&ask(worker, "r1"), 0).unwrap()), first, "asked again");
        workers.release(first);
        workers.release(first);
        granted(workers.reserve(&ask(worker, "r2"), 0).unwrap());
    }

    #[test]
    fn a_promise_ends_when_it_is_counted_or_forgotten() {
        let mut workers = Workers::default();
        let (worker, _) = workers.join(registration("a", 1), 0).unwrap();
        let reservation = granted(workers.reserve(&ask(worker, "r1"), 0).unwrap());
        let status = &workers.list(999_999)[0];
        let reserved = (status.reserved_requests, status.reserved_tokens, status.reserved_kv_tokens);
        assert_eq!(reserved, (1, 100, 300));
        // counted: the worker's own number takes its place
        let load =
            WorkerLoad { running_requests: 1, claimed: vec![reservation, 99], ..WorkerLoad::default() };
        workers.report(worker, load, 0).unwrap();
        assert_eq!(workers.list(0)[0].reserved_requests, 0);
        assert!(matches!(workers.reserve(&ask(worker, "r2"), 0).unwrap(), Reserved::Busy(_)));
        workers.report(worker, WorkerLoad::default(), 0).unwrap();
        // forgotten: a router that died keeps nobody out for longer than its time, unless it asks again
        granted(workers.reserve(&ask(worker, "r3"), 0).unwrap());
        granted(workers.reserve(&ask(worker, "r3"), 900_000).unwrap());
        assert!(matches!(workers.reserve(&ask(worker, "r4"), 1_000_000).unwrap(), Reserved::Busy(_)));
        granted(workers.reserve(&ask(worker, "r4"), 1_900_000).unwrap());
    }

    #[test]
    fn draining_or_silent_workers_get_nothing() {
        let mut workers = Workers::default();
        let (worker, _) = workers.join(registration("a", 8), 0).unwrap();
        let busy = |workers: &mut Workers, now_us| match workers.reserve(&ask(worker, "r"), now_us).unwrap() {
            Reserved::Busy(why) => why,
            granted @ Reserved::Granted { .. } => panic!("{granted:?}"),
        };
        assert_eq!(busy(&mut workers, SILENT_US + 1000), "it has not reported for 5001 ms");
        let load = WorkerLoad { draining: true, ..WorkerLoad::default() };
        workers.report(worker, load, SILENT_US).unwrap();
        assert_eq!(busy(&mut workers, SILENT_US), "it is draining");
    }

    #[test]
    fn who_comes_again_takes_its_own_place() {
        let mut workers = Workers::default();
        let (old, replaced) = workers.join(registration("a", 1), 0).unwrap();
        assert_eq!(replaced, None);
        let reservation = granted(workers.reserve(&ask(old, "r1"), 0).unwrap());
        let (new, replaced) = workers.join(registration("a", 1), 0).unwrap();
        assert_eq!(replaced, Some(old));
        workers.leave(old);
        workers.release(reservation);
        assert_eq!(workers.report(old, WorkerLoad::default(), 0).unwrap_err().code, Code::UnknownWorker);
        assert_eq!(workers.reserve(&ask(old, "r2"), 0).unwrap_err().code, Code::UnknownWorker);
        granted(workers.reserve(&ask(new, "r1"), 0).unwrap());
        for at in 1..WORKERS_MAX {
            workers.join(registration(&at.to_string(), 1), 0).unwrap();
        }
        assert_eq!(workers.join(registration("one more", 1), 0).unwrap_err().code, Code::Limit);
        workers.join(registration("a", 1), 0).unwrap();
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_its_field() {
        let refused = |change: fn(&mut WorkerRegistration)| {
            let mut wrong = registration("a", 1);
            change(&mut wrong);
            Workers::default().join(wrong, 0).unwrap_err().field
        };
        assert_eq!(refused(|r| r.name.clear()), "name");
        assert_eq!(refused(|r| r.model = "m".repeat(MODEL_BYTES_MAX + 1)), "model");
        assert_eq!(refused(|r| r.address = "127.0.0.1:8000".into()), "address");
        assert_eq!(refused(|r| r.role = 77), "role");
        assert_eq!(refused(|r| r.requests_max = 0), "requests_max");
        assert_eq!(refused(|r| r.kv_tokens_max = 0), "kv_tokens_max");
        assert_eq!(refused(|r| r.fingerprint = vec![1].into()), "fingerprint");
        assert_eq!(refused(|r| r.profile = None), "profile");
        let token_us =
            |us| move |r: &mut WorkerRegistration| r.profile.as_mut().unwrap().prefill_token_us = us;
        for us in [f64::NAN, f64::INFINITY, -1.0] {
            let mut wrong = registration("a", 1);
            token_us(us)(&mut wrong);
            assert_eq!(Workers::default().join(wrong, 0).unwrap_err().field, "profile.prefill_token_us");
        }
        let mut workers = Workers::default();
        let (worker, _) = workers.join(registration("a", 1), 0).unwrap();
        let wrong = [
            ("request_key", ask(worker, "")),
            ("request_key", ask(worker, &"k".repeat(65))),
            ("kv_tokens", wire::ReserveWorkerRequest { kv_tokens: 1001, ..ask(worker, "r") }),
            ("worker", ask(77, "r")),
        ];
        for (field, wrong) in wrong {
            assert_eq!(workers.reserve(&wrong, 0).unwrap_err().field, field);
        }
        let load = WorkerLoad { claimed: vec![1; CLAIMED_MAX + 1], ..WorkerLoad::default() };
        assert_eq!(workers.report(worker, load, 0).unwrap_err().field, "claimed");
    }

    #[derive(Debug, Clone)]
    enum Step {
        Reserve(u64, u8),
        Release(u64),
        Report(u64, u32, Vec<u64>),
        Join(u8),
        Leave(u64),
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (1_u64..6, any::<u8>()).prop_map(|(worker, key)| Step::Reserve(worker, key)),
            (0_u64..40).prop_map(Step::Release),
            (1_u64..6, 0_u32..3, proptest::collection::vec(0_u64..40, 0..3))
                .prop_map(|(worker, running, claimed)| Step::Report(worker, running, claimed)),
            (0_u8..3).prop_map(Step::Join),
            (1_u64..6).prop_map(Step::Leave),
            (0_u64..700_000).prop_map(Step::Wait),
        ]
    }

    proptest! {
        /// Sums are those of the promises, both sides know the same reservations, and nobody promises more than there is.
        #[test]
        fn nothing_is_promised_twice_or_forgotten(steps in proptest::collection::vec(step(), 1..80)) {
            let (mut workers, mut now_us) = (Workers::default(), 0);
            for step in steps {
                match step {
                    Step::Reserve(worker, key) => {
                        let room = workers.workers.get(&worker).is_some_and(|worker| {
                            worker.load.running_requests + (worker.promised.len() as u32) < 4
                                && now_us - worker.reported_us <= SILENT_US
                        });
                        let granted = workers.reserve(&ask(worker, &key.to_string()), now_us);
                        let granted = matches!(granted, Ok(Reserved::Granted { .. }));
                        prop_assert!(!room || granted);
                    }
                    Step::Release(reservation) => workers.release(reservation),
                    Step::Report(worker, running_requests, claimed) => {
                        let load = WorkerLoad { running_requests, claimed, ..WorkerLoad::default() };
                        let _ = workers.report(worker, load, now_us);
                    }
                    Step::Join(name) => {
                        workers.join(registration(&name.to_string(), 4), now_us).unwrap();
                    }
                    Step::Leave(worker) => workers.leave(worker),
                    Step::Wait(us) => now_us += us,
                }
                let promised: usize = workers.workers.values().map(|worker| worker.promised.len()).sum();
                prop_assert_eq!(promised, workers.reservations.len());
                for worker in workers.workers.values() {
                    prop_assert!(worker.promised.len() <= 4);
                    prop_assert_eq!(worker.promised.len(), worker.ends.len());
                    prop_assert_eq!(worker.promised.len(), worker.by_key.len());
                    let kv_tokens: u64 = worker.promised.values().map(|promise| promise.kv_tokens).sum();
                    prop_assert_eq!(kv_tokens, worker.promised_kv_tokens);
                }
            }
        }
    }
}
