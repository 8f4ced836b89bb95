//! An engine's standing as a worker of its node: registered, and reporting, as long as this lives.
//!
//! Owns the stream and its coming back. Invariants: an engine never waits for it; only the newest load is told, at least once a
//! second; a registration that makes no sense ends it, as asking again would not help; `trouble` says why it is not listed. Leaves to others: what the load is (the engine), what to do with it (node, router).

use kvd_proto::limits::CLAIMED_MAX;
use kvd_proto::wire::workers_client::WorkersClient;
use kvd_proto::wire::{WorkerLoad, WorkerNotice, WorkerRegistration, WorkerReport, worker_report::Report};
use kvd_proto::{Code, Error};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// A load is told so often even if it has not changed.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// Between two reports: what changes in between is told as one.
const REPORT_PAUSE: Duration = Duration::from_millis(5);
/// From a lost stream to the next attempt.
const COME_BACK_AFTER: Duration = Duration::from_millis(200);

/// Dropping it takes the worker from its node's list.
#[derive(Debug)]
pub struct Worker {
    load: watch::Sender<WorkerLoad>,
    trouble: watch::Receiver<Option<Error>>,
    task: tokio::task::JoinHandle<()>,
}

impl Worker {
    /// Registers over a node's gRPC channel, again and again while the node is away; in a tokio runtime.
    pub fn register(channel: Channel, registration: WorkerRegistration) -> Self {
        let (load, _) = watch::channel(WorkerLoad::default());
        let (tell, trouble) = watch::channel(None);
        let task = tokio::spawn(stand(WorkersClient::new(channel), registration, load.clone(), tell));
        Self { load, trouble, task }
    }

    /// The load from now on; reservations in `claimed` are told once, with this or a later load.
    pub fn report(&self, load: WorkerLoad) {
        add(&self.load, load);
    }

    /// Why the node does not list it now; `None`: it does, or has not answered yet.
    pub fn trouble(&self) -> Option<Error> {
        self.trouble.borrow().clone()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn stand(
    mut client: WorkersClient<Channel>,
    registration: WorkerRegistration,
    load: watch::Sender<WorkerLoad>,
    trouble: watch::Sender<Option<Error>>,
) {
    loop {
        let error = serve(&mut client, &registration, &load, &trouble).await;
        let refused = error.code == Code::Invalid;
        trouble.send_replace(Some(error));
        if refused {
            return;
        }
        tokio::time::sleep(COME_BACK_AFTER).await;
    }
}

/// One stream; returns why it ended.
async fn serve(
    client: &mut WorkersClient<Channel>,
    registration: &WorkerRegistration,
    load: &watch::Sender<WorkerLoad>,
    trouble: &watch::Sender<Option<Error>>,
) -> Error {
    let report = |report| WorkerReport { report: Some(report) };
    let (reports, told) = mpsc::channel(1);
    let mut changes = load.subscribe();
    let first = report(Report::Registration(registration.clone()));
    let mut notices = match (reports.try_send(first), client.serve(ReceiverStream::new(told)).await) {
        (Ok(()), Ok(notices)) => notices.into_inner(),
        (_, Err(refused)) => return refused.into(),
        (Err(_), _) => unreachable!("a new channel has room"),
    };
    trouble.send_replace(None);
    loop {
        changes.mark_unchanged();
        let now = tokio::select! {
            room = reports.reserve() => room.map(|room| room.send(report(Report::Load(untold(load))))),
            notice = notices.message() => return ended(notice),
        };
        if now.is_err() {
            return ended(notices.message().await); // nobody takes reports any more: the stream's last word says why
        }
        tokio::select! {
            notice = notices.message() => return ended(notice),
            changed = changes.changed() => changed.expect("the sender is in this function's hands"),
            () = tokio::time::sleep(REPORT_EVERY) => {}
        }
        tokio::time::sleep(REPORT_PAUSE).await;
    }
}

/// What is claimed stays until it is told.
fn add(load: &watch::Sender<WorkerLoad>, now: WorkerLoad) {
    load.send_modify(|last| {
        let untold = std::mem::replace(last, now).claimed;
        last.claimed.splice(..0, untold);
    });
}

/// The newest load, with reservations that are told by this.
fn untold(load: &watch::Sender<WorkerLoad>) -> WorkerLoad {
    let mut now = WorkerLoad::default();
    load.send_if_modified(|last| {
        let told = last.claimed.len().min(CLAIMED_MAX);
        now = WorkerLoad { claimed: last.claimed.drain(..told).collect(), ..last.clone() };
        !last.claimed.is_empty() // the rest goes with the next
    });
    now
}

fn ended(notice: Result<Option<WorkerNotice>, tonic::Status>) -> Error {
    let reason = match notice {
        Ok(Some(notice)) => notice.reason,
        Ok(None) => "the node ended the stream".to_owned(),
        Err(status) => return status.into(),
    };
    Error::new(Code::Unavailable, "", reason, "nothing to do if the node is restarting")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_claim_is_told_once_with_the_newest_load() {
        let (load, _) = watch::channel(WorkerLoad::default());
        let report = |running_requests, claimed| {
            add(&load, WorkerLoad { running_requests, claimed, ..WorkerLoad::default() });
        };
        report(1, vec![1]);
        report(2, (2..CLAIMED_MAX as u64 + 3).collect());
        let first = untold(&load);
        assert_eq!((first.running_requests, first.claimed.len(), first.claimed[0]), (2, CLAIMED_MAX, 1));
        assert_eq!(untold(&load).claimed, [CLAIMED_MAX as u64 + 1, CLAIMED_MAX as u64 + 2]);
        assert_eq!(untold(&load), WorkerLoad { running_requests: 2, ..WorkerLoad::default() });
    }
}
