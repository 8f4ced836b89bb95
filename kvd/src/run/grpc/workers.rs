//! The `Workers` service: engines' streams, reservations, and whoever watches.
//!
//! Owns: the task that owns `Workers`, and the streams. Invariants: one task decides, so the last slot goes to one; an
//! engine's standing ends with its stream; a watcher that is slow gets fewer and newer lists, never a backlog.

use crate::node::event::Event;
use crate::run::inbox::{Inbox, Input};
use crate::workers::{Reserved, WorkerId, Workers};
use kvd_proto::wire::{self, reserve_worker_reply, worker_report, workers_server};
use kvd_proto::{Code, Error, Fingerprint};
use std::collections::HashMap;
use std::pin::Pin;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Questions waiting for the task. At the limit: the asking stream or call waits.
const WAITING_MAX: usize = 1024;
/// Between two lists to one watcher: changes in between are told as one.
const WATCH_EVERY: Duration = Duration::from_millis(20);
/// How often promises are looked at that may have had their time.
const EXPIRE_EVERY: Duration = Duration::from_millis(100);

type Reply<T> = oneshot::Sender<Result<T, Error>>;

enum Ask {
    Join { registration: Box<wire::WorkerRegistration>, end: oneshot::Sender<String>, reply: Reply<WorkerId> },
    Report { worker: WorkerId, load: wire::WorkerLoad, reply: Reply<()> },
    Leave { worker: WorkerId },
    Reserve { request: wire::ReserveWorkerRequest, reply: Reply<Reserved> },
    Release { reservation: u64, reply: Reply<()> },
    List { reply: Reply<wire::ListWorkersReply> },
}

type Notices = mpsc::Sender<Result<wire::WorkerNotice, Status>>;

/// Decides; one for all streams and calls.
struct Desk {
    workers: Workers,
    /// Ends a standing, with the reason.
    ends: HashMap<WorkerId, oneshot::Sender<String>>,
    node_epoch: u64,
    /// To the node, which weighs by what the engines say.
    inbox: Inbox,
    started: Instant,
    changed: watch::Sender<u64>,
}

impl Desk {
    async fn run(mut self, mut asks: mpsc::Receiver<Ask>) {
        let mut expire = tokio::time::interval(EXPIRE_EVERY);
        loop {
            tokio::select! {
                ask = asks.recv() => match ask {
                    Some(ask) => self.answer(ask),
                    None => return,
                },
                _ = expire.tick() => {
                    if self.workers.expire(self.now_us()) {
                        self.change();
                    }
                }
            }
        }
    }

    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    fn change(&self) {
        self.changed.send_modify(|version| *version += 1);
    }

    /// Whoever does not wait for the answer any more does not get it.
    fn answer(&mut self, ask: Ask) {
        let now_us = self.now_us();
        match ask {
            Ask::Join { registration, end, reply } => {
                let _ = reply.send(self.join(*registration, end, now_us));
            }
            Ask::Report { worker, load, reply } => {
                let _ = reply.send(self.workers.report(worker, load, now_us));
            }
            Ask::Leave { worker } => {
                self.ends.remove(&worker);
                self.workers.leave(worker);
            }
            Ask::Reserve { request, reply } => {
                let reserved = self.workers.reserve(&request, now_us);
                if let Err(Ok(Reserved::Granted { reservation, .. })) = reply.send(reserved) {
                    self.workers.release(reservation); // its caller has gone meanwhile
                }
            }
            Ask::Release { reservation, reply } => {
                self.workers.release(reservation);
                let _ = reply.send(Ok(()));
            }
            Ask::List { reply } => {
                let workers = self.workers.list(now_us);
                let _ = reply.send(Ok(wire::ListWorkersReply { node_epoch: self.node_epoch, workers }));
                return; // looking changes nothing
            }
        }
        self.change();
    }

    fn join(
        &mut self,
        registration: wire::WorkerRegistration,
        end: oneshot::Sender<String>,
        now_us: u64,
    ) -> Result<WorkerId, Error> {
        let name = registration.name.clone();
        let profile = profile(&registration);
        let (worker, replaced) = self.workers.join(registration, now_us)?;
        if let Some(old) = replaced.and_then(|old| self.ends.remove(&old)) {
            // one whose stream has ended already needs no reason
            let _ =
                old.send(format!("another worker came as {name:?}; give each worker of a node its own name"));
        }
        self.ends.insert(worker, end);
        self.inbox.push_all(&mut profile.into_iter().map(Input::Event).collect());
        Ok(worker)
    }
}

/// What the node is told of an engine that keeps its blocks here; its registration is checked by then.
fn profile(registration: &wire::WorkerRegistration) -> Option<Event> {
    let fingerprint = Fingerprint(registration.fingerprint[..].try_into().ok()?);
    let (profile, _) = registration.profile.as_ref()?.into();
    Some(Event::Profile { fingerprint, profile })
}

/// The service; cheap to clone.
#[derive(Clone)]
pub(super) struct Service {
    asks: mpsc::Sender<Ask>,
    changed: watch::Receiver<u64>,
}

impl Service {
    /// Starts the task that decides, in the current runtime.
    pub(super) fn start(node_epoch: u64, inbox: Inbox) -> Self {
        let (asks, asked) = mpsc::channel(WAITING_MAX);
        let (changed, changes) = watch::channel(0);
        let desk = Desk {
            workers: Workers::default(),
            ends: HashMap::new(),
            node_epoch,
            inbox,
            started: Instant::now(),
            changed,
        };
        tokio::spawn(desk.run(asked));
        Self { asks, changed: changes }
    }

    async fn ask<T>(&self, ask: impl FnOnce(Reply<T>) -> Ask) -> Result<T, Error> {
        let gone = || Error::new(Code::Unavailable, "", "the node is stopping", "ask again once it is back");
        let (reply, replied) = oneshot::channel();
        self.asks.send(ask(reply)).await.map_err(|_| gone())?;
        replied.await.map_err(|_| gone())?
    }

    /// Registers with the first report and passes on the rest, until the stream or the standing ends.
    async fn serve_worker(&self, mut reports: Streaming<wire::WorkerReport>, notices: Notices) {
        let (end, ended) = oneshot::channel();
        let last = match self.registered(&mut reports, end).await {
            Err(error) => Some(Err(error.into())),
            Ok(worker) => {
                let last = tokio::select! {
                    reported = self.reported(worker, &mut reports) => reported.err().map(|error| Err(error.into())),
                    reason = ended => reason.ok().map(|reason| Ok(wire::WorkerNotice { reason })),
                    () = notices.closed() => None,
                };
                let _ = self.asks.send(Ask::Leave { worker }).await; // a node that stops needs no goodbye
                last
            }
        };
        if let Some(last) = last {
            let _ = notices.send(last).await; // nobody there: nobody to tell
        }
    }

    async fn registered(
        &self,
        reports: &mut Streaming<wire::WorkerReport>,
        end: oneshot::Sender<String>,
    ) -> Result<WorkerId, Error> {
        match reports.message().await.map_err(Error::from)?.and_then(|report| report.report) {
            Some(worker_report::Report::Registration(registration)) => {
                let registration = Box::new(registration);
                self.ask(|reply| Ask::Join { registration, end, reply }).await
            }
            _ => Err(Error::invalid("report", "the first is no registration", "register first")),
        }
    }

    async fn reported(
        &self,
        worker: WorkerId,
        reports: &mut Streaming<wire::WorkerReport>,
    ) -> Result<(), Error> {
        while let Ok(Some(report)) = reports.message().await {
            match report.report {
                Some(worker_report::Report::Load(load)) => {
                    self.ask(|reply| Ask::Report { worker, load, reply }).await?;
                }
                _ => return Err(Error::invalid("report", "no load", "register once, then send loads")),
            }
        }
        Ok(())
    }

    /// Lists now and after changes, until nobody listens.
    async fn watched(mut self, lists: mpsc::Sender<Result<wire::ListWorkersReply, Status>>) {
        loop {
            self.changed.borrow_and_update();
            let Ok(list) = self.ask(|reply| Ask::List { reply }).await else { return };
            if lists.send(Ok(list)).await.is_err() {
                return;
            }
            tokio::select! {
                changed = self.changed.changed() => if changed.is_err() { return },
                () = lists.closed() => return,
            }
            tokio::time::sleep(WATCH_EVERY).await;
        }
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send + 'static>>;

#[tonic::async_trait]
impl workers_server::Workers for Service {
    type ServeStream = Answers<wire::WorkerNotice>;

    async fn serve(
        &self,
        request: Request<Streaming<wire::WorkerReport>>,
    ) -> Result<Response<Self::ServeStream>, Status> {
        let (notices, told) = mpsc::channel(1);
        let service = self.clone();
        tokio::spawn(async move { service.serve_worker(request.into_inner(), notices).await });
        Ok(Response::new(Box::pin(ReceiverStream::new(told))))
    }

    async fn list_workers(
        &self,
        _: Request<wire::ListWorkersRequest>,
    ) -> Result<Response<wire::ListWorkersReply>, Status> {
        Ok(Response::new(self.ask(|reply| Ask::List { reply }).await?))
    }

    type WatchWorkersStream = Answers<wire::ListWorkersReply>;

    async fn watch_workers(
        &self,
        _: Request<wire::WatchWorkersRequest>,
    ) -> Result<Response<Self::WatchWorkersStream>, Status> {
        let (lists, listed) = mpsc::channel(1);
        tokio::spawn(self.clone().watched(lists));
        Ok(Response::new(Box::pin(ReceiverStream::new(listed))))
    }

    async fn reserve_worker(
        &self,
        request: Request<wire::ReserveWorkerRequest>,
    ) -> Result<Response<wire::ReserveWorkerReply>, Status> {
        let request = request.into_inner();
        let outcome = match self.ask(|reply| Ask::Reserve { request, reply }).await? {
            Reserved::Granted { reservation, ttl_ms } => {
                reserve_worker_reply::Outcome::Reserved(wire::WorkerReserved { reservation, ttl_ms })
            }
            Reserved::Busy(why) => reserve_worker_reply::Outcome::Busy(why),
        };
        Ok(Response::new(wire::ReserveWorkerReply { outcome: Some(outcome) }))
    }

    async fn release_worker(
        &self,
        request: Request<wire::ReleaseWorkerRequest>,
    ) -> Result<Response<wire::ReleaseWorkerReply>, Status> {
        let reservation = request.into_inner().reservation;
        self.ask(|reply| Ask::Release { reservation, reply }).await?;
        Ok(Response::new(wire::ReleaseWorkerReply {}))
    }
}
