//! A session of this process with its node, as Python has it.

use crate::chain::Chain;
use crate::error::{invalid, raise};
use crate::layout::Layout;
use crate::pending::{Pending, seconds};
use crate::runtime;
use crate::space::Space;
use kvd_client::{ConnectOptions, Session};
use kvd_proto::{Code, Error, IdScheme};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::time::{Duration, Instant};

/// Between two looks at whether the node is there.
const LOOK_PAUSE: Duration = Duration::from_millis(2);

/// A session with the node; comes back by itself after a lost socket or a restarted daemon.
#[pyclass(frozen, module = "kvd")]
pub(crate) struct Client {
    session: std::sync::Mutex<Option<Session>>,
    tenant: String,
    process: u32,
}

/// An id scheme or raw bytes, as Python says it.
#[derive(FromPyObject)]
pub(crate) enum Text {
    #[pyo3(transparent)]
    Bytes(Vec<u8>),
    #[pyo3(transparent)]
    Text(String),
}

impl Text {
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Text(text) => text.into_bytes(),
        }
    }
}

impl Client {
    pub(crate) fn session(&self) -> PyResult<Session> {
        if self.process != std::process::id() {
            return Err(invalid(
                "client",
                "made before this process forked",
                "make a client in each process",
            ));
        }
        let session = self.session.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        session.ok_or_else(|| {
            raise(Error::new(Code::Unavailable, "client", "it is closed", "make another client"))
        })
    }
}

#[pymethods]
impl Client {
    #[new]
    #[pyo3(signature = (socket, *, tenant="default", engine="python", member="main", join=Vec::new(), numa_node=None, wait_s=10.0))]
    fn new(
        py: Python<'_>,
        socket: std::path::PathBuf,
        tenant: &str,
        engine: &str,
        member: &str,
        join: Vec<u8>,
        numa_node: Option<u32>,
        wait_s: f64,
    ) -> PyResult<Self> {
        let wait = seconds("wait_s", Some(wait_s))?.unwrap_or_default();
        let options = ConnectOptions {
            socket,
            tenant: tenant.to_owned(),
            engine: engine.to_owned(),
            member: member.to_owned(),
            join,
            populate: true,
            numa_node,
        };
        let session = {
            let _runtime = runtime::handle()?.enter();
            Session::start(options)
        };
        let client = Self {
            session: std::sync::Mutex::new(Some(session.clone())),
            tenant: tenant.to_owned(),
            process: std::process::id(),
        };
        if !wait.is_zero() && !client.wait_connected(py, wait.as_secs_f64())? {
            let fallback =
                || Error::new(Code::Unavailable, "socket", "no answer", "start the node (`kvd serve`)");
            return Err(raise(session.trouble().unwrap_or_else(fallback)));
        }
        Ok(client)
    }

    /// Whether the node can be asked right now.
    #[getter]
    fn connected(&self) -> PyResult<bool> {
        Ok(self.session()?.connected())
    }

    /// Waits until it can be; `False`: it cannot yet.
    fn wait_connected(&self, py: Python<'_>, timeout_s: f64) -> PyResult<bool> {
        let session = self.session()?;
        let until = Instant::now() + seconds("timeout_s", Some(timeout_s))?.unwrap_or_default();
        while !session.connected() {
            if Instant::now() >= until {
                return Ok(false);
            }
            py.detach(|| std::thread::sleep(LOOK_PAUSE));
            py.check_signals()?;
        }
        Ok(true)
    }

    /// Lets other members join the session (`join=`), in this process or another; empty until the node was there once.
    #[getter]
    fn token<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.session()?.token()))
    }

    /// The session to be a member of from now on: after a daemon's restart, the one who opened it has another token.
    fn join(&self, token: &[u8]) -> PyResult<()> {
        self.session()?.join(token);
        Ok(())
    }

    /// Of the daemon spoken to last; another value means that it was restarted.
    #[getter]
    fn node_epoch(&self) -> PyResult<u64> {
        Ok(self.session()?.node_epoch())
    }

    /// Why the node cannot be asked, if it cannot and that is known.
    #[getter]
    fn trouble(&self) -> PyResult<Option<String>> {
        Ok(self.session()?.trouble().map(|error| error.to_string()))
    }

    #[getter]
    fn tenant(&self) -> &str {
        &self.tenant
    }

    /// What blocks mean. Never waits: it is registered when the node is there.
    #[pyo3(signature = (model, revision, layout, *, epoch=0, id_scheme="tokens"))]
    fn space(
        &self,
        model: &str,
        revision: Text,
        layout: &Layout,
        epoch: u32,
        id_scheme: &str,
    ) -> PyResult<Space> {
        let id_scheme = match id_scheme {
            "tokens" => IdScheme::Tokens,
            "named" => IdScheme::Named,
            other => return Err(invalid("id_scheme", format!("{other:?}"), "say tokens or named")),
        };
        let space = kvd_proto::Space {
            tenant: self.tenant.clone(),
            model: model.to_owned(),
            revision: revision.into_bytes(),
            epoch,
            layout: layout.layout.clone(),
            id_scheme,
        };
        let session = self.session()?;
        Ok(Space::new(session.declare(&space).map_err(raise)?, id_scheme))
    }

    /// Ends the session once its last lease is gone.
    fn close(&self) {
        self.session.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, pyo3::types::PyTuple>) {
        self.close();
    }
}

/// What another engine has computed for this request: taken once, by its key.
#[pyclass(frozen, module = "kvd", from_py_object)]
#[derive(Clone)]
pub(crate) struct Claim {
    pub(crate) key: Vec<u8>,
    pub(crate) node: String,
    pub(crate) wait: Duration,
}

#[pymethods]
impl Claim {
    /// `node`: its name, or "host:port"; empty: this one.
    #[new]
    #[pyo3(signature = (key, *, node="", wait_s=0.0))]
    fn new(key: Text, node: &str, wait_s: f64) -> PyResult<Self> {
        let wait = seconds("wait_s", Some(wait_s))?.unwrap_or_default();
        Ok(Self { key: key.into_bytes(), node: node.to_owned(), wait })
    }
}

/// Keeps what is stored for whoever claims it.
#[pyclass(frozen, module = "kvd", from_py_object)]
#[derive(Clone)]
pub(crate) struct HandOff {
    pub(crate) key: Vec<u8>,
    pub(crate) ttl: Duration,
    pub(crate) blocks: u32,
}

#[pymethods]
impl HandOff {
    /// `blocks`: of the prompt, in all, tail included.
    #[new]
    #[pyo3(signature = (key, *, blocks, ttl_s=30.0))]
    fn new(key: Text, blocks: u32, ttl_s: f64) -> PyResult<Self> {
        let ttl = seconds("ttl_s", Some(ttl_s))?.unwrap_or_default();
        Ok(Self { key: key.into_bytes(), ttl, blocks })
    }
}

impl HandOff {
    pub(crate) fn of(&self, chain: &Chain) -> kvd_client::HandOff {
        kvd_client::HandOff {
            key: self.key.clone(),
            ttl: self.ttl,
            blocks: self.blocks,
            tail_tokens: chain.tail(),
        }
    }
}

/// Waits as the caller says, and gives up what is not done by then.
pub(crate) fn now(py: Python<'_>, pending: &Pending, timeout_s: Option<f64>) -> PyResult<Py<PyAny>> {
    pending.wait_or_cancel(py, seconds("timeout_s", timeout_s)?)
}
