//! The engine's standing at its node: registered as a worker, with its load.
//!
//! Owns dialling the node until it answers; from then on `kvd_client::Worker` comes back by itself. Invariants: the engine never
//! waits for it; what is reported before the node has answered is dropped: nobody can have reserved anything.

use kvd_client::Worker;
use kvd_client::grpc::Client;
use kvd_proto::wire::{WorkerLoad, WorkerRegistration};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Between two tries to dial the node.
const DIAL_AGAIN: Duration = Duration::from_millis(200);

/// Clones share it; with no node, nobody is told anything.
#[derive(Debug, Clone, Default)]
pub(super) struct Standing {
    worker: Arc<OnceLock<Worker>>,
}

impl Standing {
    /// Registers at the node with that address, as soon as it answers.
    pub(super) fn at(node: String, registration: WorkerRegistration) -> Self {
        let standing = Self::default();
        tokio::spawn(register(node, registration, standing.clone()));
        standing
    }

    /// The load from now on.
    pub(super) fn report(&self, load: WorkerLoad) {
        if let Some(worker) = self.worker.get() {
            worker.report(load);
        }
    }

    /// Why the node does not list it.
    pub(super) fn trouble(&self) -> Option<String> {
        self.worker.get()?.trouble().map(|error| error.to_string())
    }
}

async fn register(node: String, registration: WorkerRegistration, standing: Standing) {
    let mut told = false;
    let client = loop {
        match Client::connect(&node).await {
            Ok(client) => break client,
            Err(error) if !told => eprintln!("bench engine: {error}; until then it is not listed"),
            Err(_) => {}
        }
        told = true;
        tokio::time::sleep(DIAL_AGAIN).await;
    };
    let worker = Worker::register(client.channel(), registration);
    standing.worker.set(worker).expect("registered once");
}
