//! An engine's standing as a worker of its node, as Python reports it.
//!
//! Owns the first dial, again and again while the node is away. Invariants: nothing here waits for the node or raises because it is away;
//! only what can never be right is refused; what is reported before the first registration is told with it. Leaves to others: the
//! stream and its coming back (`kvd_client::Worker`), what the load is (the engine).

use crate::error::invalid;
use crate::runtime;
use crate::space::Space;
use kvd_client::grpc;
use kvd_proto::Error;
use kvd_proto::wire::{WorkerLoad, WorkerProfile, WorkerRegistration, WorkerRole};
use pyo3::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::task::AbortHandle;

/// From a dial that failed to the next.
const DIAL_PAUSE: Duration = Duration::from_millis(200);

/// How far it is.
enum State {
    /// Nobody has answered yet: the newest load, and why.
    Dialling(WorkerLoad, Option<Error>),
    Registered(kvd_client::Worker),
    Closed,
}

/// Shared with the task that dials.
struct Standing(Mutex<State>);

impl Standing {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Dials until somebody answers.
    async fn begin(self: Arc<Self>, node: String, registration: WorkerRegistration) {
        let client = loop {
            match grpc::Client::connect(&node).await {
                Ok(client) => break client,
                Err(error) => self.failed(error),
            }
            tokio::time::sleep(DIAL_PAUSE).await;
        };
        let mut state = self.lock();
        if let State::Dialling(load, _) = &*state {
            let worker = kvd_client::Worker::register(client.channel(), registration);
            worker.report(load.clone());
            *state = State::Registered(worker);
        }
    }

    fn failed(&self, error: Error) {
        if let State::Dialling(_, trouble) = &mut *self.lock() {
            *trouble = Some(error);
        }
    }
}

/// A worker of the node for as long as this lives.
#[pyclass(frozen, module = "kvd")]
pub(crate) struct Worker {
    standing: Arc<Standing>,
    dialling: AbortHandle,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
    }
}

impl Worker {
    fn end(&self) {
        self.dialling.abort();
        let standing = std::mem::replace(&mut *self.standing.lock(), State::Closed);
        drop(standing); // without the lock
    }
}

#[pymethods]
impl Worker {
    /// Registers with a node, again and again while it is away: `node` is the path of its gRPC socket, or "http://host:port". `address` is where
    /// the engine serves OpenAI's API; `profile` its speed as measured, microseconds by the names of `WorkerProfile` (workers.proto), 0 where one is
    /// left out; `space` the one its blocks are in, if it keeps any.
    #[new]
    #[pyo3(signature = (node, *, name, model, address, requests_max, kv_tokens_max, profile, role="both", space=None,
                        batched_tokens_max=0))]
    fn new(
        node: std::path::PathBuf,
        name: String,
        model: String,
        address: String,
        requests_max: u32,
        kv_tokens_max: u64,
        profile: BTreeMap<String, f64>,
        role: &str,
        space: Option<PyRef<'_, Space>>,
        batched_tokens_max: u32,
    ) -> PyResult<Self> {
        let handle = space.as_ref().map(|space| space.handle());
        let registration = WorkerRegistration {
            name,
            model,
            address,
            role: role_named(role)?.into(),
            profile: Some(profile_of(profile)?),
            requests_max,
            kv_tokens_max,
            fingerprint: handle.map_or_else(Vec::new, |handle| handle.fingerprint().0.to_vec()).into(),
            block_tokens: handle.map_or(0, |handle| handle.layout().block_tokens()),
            batched_tokens_max,
        };
        let standing = Arc::new(Standing(Mutex::new(State::Dialling(WorkerLoad::default(), None))));
        let node = node.to_string_lossy().into_owned();
        let task = runtime::handle()?.spawn(standing.clone().begin(node, registration));
        Ok(Self { standing, dialling: task.abort_handle() })
    }

    /// The load from now on. `claimed`: reservations whose requests are counted in it; before the node knows the engine there are none.
    #[pyo3(signature = (running, waiting, waiting_tokens, kv_tokens, claimed=Vec::new(), draining=false))]
    fn report(
        &self,
        running: u32,
        waiting: u32,
        waiting_tokens: u64,
        kv_tokens: u64,
        claimed: Vec<u64>,
        draining: bool,
    ) {
        let load = WorkerLoad {
            running_requests: running,
            waiting_requests: waiting,
            waiting_tokens,
            kv_tokens,
            draining,
            claimed,
        };
        match &mut *self.standing.lock() {
            State::Dialling(last, _) => *last = WorkerLoad { claimed: Vec::new(), ..load },
            State::Registered(worker) => worker.report(load),
            State::Closed => {}
        }
    }

    /// Why the node does not list it, if that is known; `None`: it does, or has not answered yet.
    #[getter]
    fn trouble(&self) -> Option<String> {
        let error = match &*self.standing.lock() {
            State::Dialling(_, trouble) => trouble.clone(),
            State::Registered(worker) => worker.trouble(),
            State::Closed => None,
        };
        error.map(|error| error.to_string())
    }

    /// Takes it off the node's list.
    fn close(&self) {
        self.end();
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, pyo3::types::PyTuple>) {
        self.end();
    }
}

fn role_named(role: &str) -> PyResult<WorkerRole> {
    match role {
        "prefill" => Ok(WorkerRole::Prefill),
        "decode" => Ok(WorkerRole::Decode),
        "both" => Ok(WorkerRole::Both),
        other => Err(invalid("role", format!("{other:?}"), "say prefill, decode or both")),
    }
}

fn profile_of(given: BTreeMap<String, f64>) -> PyResult<WorkerProfile> {
    let mut profile = WorkerProfile::default();
    for (name, us) in given {
        let place = match name.as_str() {
            "prefill_base_us" => &mut profile.prefill_base_us,
            "prefill_token_us" => &mut profile.prefill_token_us,
            "prefill_square_us" => &mut profile.prefill_square_us,
            "prefill_context_us" => &mut profile.prefill_context_us,
            "decode_a_us" => &mut profile.decode_a_us,
            "decode_b_us" => &mut profile.decode_b_us,
            "decode_c_us" => &mut profile.decode_c_us,
            _ => return Err(invalid("profile", name, "use the names of WorkerProfile (workers.proto)")),
        };
        *place = us;
    }
    Ok(profile)
}
