//! One node, by its gRPC Unix socket or TCP address: dialling, deadlines, and errors that say what to do.

use crate::show::Located;
use crate::text::{Id, Prefix};
use hyper_util::rt::TokioIo;
use kvd_proto::wire::admin_client::AdminClient;
use kvd_proto::wire::index_client::IndexClient;
use kvd_proto::wire::workers_client::WorkersClient;
use kvd_proto::wire::{self, purge_request::What};
use kvd_proto::{Code, Error};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// How long one answer may take. At the limit: an error, the node may still finish.
const ANSWER_WAIT: Duration = Duration::from_secs(30);
/// How long a simulation may take to begin, or one of its combinations; a trace is sent meanwhile. At the limit: an error.
pub(crate) const SIMULATION_WAIT: Duration = Duration::from_mins(10);
const SYSTEM_SOCKET: &str = "/var/lib/kvd/grpc.sock";
const USER_SOCKET: &str = ".local/share/kvd/grpc.sock";

/// A node that answered the dial, or one that is dialled when it is asked; clones share the connection, which comes back
/// by itself.
#[derive(Clone)]
pub(crate) struct Node {
    client: AdminClient<Channel>,
    workers: WorkersClient<Channel>,
    index: IndexClient<Channel>,
    /// Its socket's path, or its TCP address.
    at: String,
    wait: Duration,
}

impl Node {
    /// Dials `socket`, or the first default one that exists.
    pub(crate) async fn dial(socket: Option<&Path>) -> Result<Self, Error> {
        let socket = match socket {
            Some(socket) => socket.to_owned(),
            None => default_socket()?,
        };
        // tonic wants an address for its headers; the connector ignores it
        let endpoint = Endpoint::from_static("http://kvd.local");
        let path = socket.clone();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let dialled = tokio::time::timeout(ANSWER_WAIT, endpoint.connect_with_connector(connector)).await;
        let at = socket.display().to_string();
        match dialled {
            Ok(Ok(channel)) => Ok(Self::over(channel, at, ANSWER_WAIT)),
            Ok(Err(error)) => Err(away(&at, &deepest(&error))),
            Err(_) => Err(away(&at, "it takes no connection")),
        }
    }

    /// The node at a TCP address, `host:port`; dialled when it is asked.
    pub(crate) fn reach(address: &str, wait: Duration) -> Result<Self, Error> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"));
        let endpoint = endpoint.map_err(|error| away(address, &deepest(&error)))?;
        Ok(Self::over(endpoint.connect_lazy(), address.to_owned(), wait))
    }

    fn over(channel: Channel, at: String, wait: Duration) -> Self {
        let workers = WorkersClient::new(channel.clone());
        let index = IndexClient::new(channel.clone());
        Self { client: AdminClient::new(channel), workers, index, at, wait }
    }

    /// The same node, given less time for an answer.
    pub(crate) fn hurried(self, wait: Duration) -> Self {
        Self { wait, ..self }
    }

    pub(crate) async fn status(&mut self) -> Result<wire::StatusReply, Error> {
        let answer = self.client.status(wire::StatusRequest {});
        within(&self.at, self.wait, answer).await
    }

    pub(crate) async fn spaces(&mut self) -> Result<wire::ListSpacesReply, Error> {
        let answer = self.client.list_spaces(wire::ListSpacesRequest {});
        within(&self.at, self.wait, answer).await
    }

    pub(crate) async fn tiers(&mut self) -> Result<wire::ListTiersReply, Error> {
        let answer = self.client.list_tiers(wire::ListTiersRequest {});
        within(&self.at, self.wait, answer).await
    }

    pub(crate) async fn nodes(&mut self) -> Result<wire::ListNodesReply, Error> {
        let answer = self.index.list_nodes(wire::ListNodesRequest {});
        within(&self.at, self.wait, answer).await
    }

    pub(crate) async fn locate(&mut self, ids: &[Id], group: u8, block_bytes: u64) -> Result<Located, Error> {
        let chain: Vec<u8> = ids.iter().flat_map(|id| id.0).collect();
        let request = wire::LocateRequest { chain: chain.into(), group: group.into(), block_bytes };
        let reply = within(&self.at, self.wait, self.index.locate(request)).await?;
        Ok(Located { reply, block_bytes })
    }

    pub(crate) async fn workers(&mut self) -> Result<wire::ListWorkersReply, Error> {
        let answer = self.workers.list_workers(wire::ListWorkersRequest {});
        within(&self.at, self.wait, answer).await
    }

    pub(crate) async fn block(&mut self, prefix: &Prefix) -> Result<wire::DescribeBlockReply, Error> {
        let request = wire::DescribeBlockRequest { id_prefix: prefix.0.clone().into() };
        let reply = within(&self.at, self.wait, self.client.describe_block(request)).await?;
        if reply.blocks.is_empty() {
            return Err(no_block(prefix));
        }
        Ok(reply)
    }

    /// `ttl_ms` 0 unpins.
    pub(crate) async fn pin(&mut self, prefix: &Prefix, ttl_ms: u32) -> Result<wire::PinBlockReply, Error> {
        let request = wire::PinBlockRequest { id_prefix: prefix.0.clone().into(), ttl_ms };
        let reply = within(&self.at, self.wait, self.client.pin_block(request)).await?;
        if reply.blocks == 0 {
            return Err(no_block(prefix));
        }
        Ok(reply)
    }

    pub(crate) async fn purge(&mut self, what: What) -> Result<wire::PurgeReply, Error> {
        let answer = self.client.purge(wire::PurgeRequest { what: Some(what) });
        within(&self.at, self.wait, answer).await
    }

    pub(crate) async fn change_tier(
        &mut self,
        request: wire::ChangeTierRequest,
    ) -> Result<wire::ChangeTierReply, Error> {
        within(&self.at, self.wait, self.client.change_tier(request)).await
    }

    pub(crate) async fn policy(&mut self, request: wire::PolicyRequest) -> Result<wire::PolicyReply, Error> {
        within(&self.at, self.wait, self.client.policy(request)).await
    }

    pub(crate) async fn compare(
        &mut self,
        request: wire::ComparePoliciesRequest,
    ) -> Result<wire::ComparePoliciesReply, Error> {
        within(&self.at, self.wait, self.client.compare_policies(request)).await
    }

    pub(crate) async fn record(
        &mut self,
        request: wire::RecordTraceRequest,
    ) -> Result<tonic::Streaming<wire::TraceLines>, Error> {
        within(&self.at, self.wait, self.client.record_trace(request)).await
    }

    /// `asked` has the options first.
    pub(crate) async fn simulate(
        &mut self,
        asked: impl tokio_stream::Stream<Item = wire::SimulateRequest> + Send + 'static,
    ) -> Result<tonic::Streaming<wire::SimulateReply>, Error> {
        within(&self.at, SIMULATION_WAIT, self.client.simulate_policies(asked)).await
    }

    pub(crate) async fn events(&mut self) -> Result<tonic::Streaming<wire::NodeEvent>, Error> {
        let answer = self.client.events(wire::EventsRequest {});
        within(&self.at, self.wait, answer).await
    }

    /// The node ended a stream that has no end.
    pub(crate) fn gone(&self) -> Error {
        away(&self.at, "it stopped")
    }
}

async fn within<T>(
    at: &str,
    wait: Duration,
    answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, Error> {
    match tokio::time::timeout(wait, answer).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => match std::error::Error::source(&status) {
            Some(cause) => Err(away(at, &deepest(cause))), // the connection's trouble, not the node's word
            None => Err(status.into()),
        },
        Err(_) => Err(away(at, &format!("no answer within {wait:?}"))),
    }
}

fn no_block(prefix: &Prefix) -> Error {
    Error::invalid("block", format!("no block's id begins with {prefix}"), "look at `kvctl events` for ids")
}

fn away(at: &str, reason: &str) -> Error {
    Error::new(
        Code::Unavailable,
        "--socket",
        format!("no node answers at {at}: {reason}"),
        "start one with `kvd serve`, or name its listen.grpc_socket with --socket",
    )
}

/// The cause that names the system call's trouble, under tonic's "transport error".
pub(crate) fn deepest(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .last()
        .map_or_else(String::new, ToString::to_string)
}

fn default_socket() -> Result<PathBuf, Error> {
    let home = std::env::home_dir().map(|home| home.join(USER_SOCKET));
    let candidates: Vec<PathBuf> = [Some(SYSTEM_SOCKET.into()), home].into_iter().flatten().collect();
    if let Some(found) = candidates.iter().find(|path| path.exists()) {
        return Ok(found.clone());
    }
    let looked: Vec<_> = candidates.iter().map(|path| path.display().to_string()).collect();
    Err(Error::new(
        Code::Unavailable,
        "--socket",
        format!("no node on this machine: neither {} exists", looked.join(" nor ")),
        "start one with `kvd serve`, or name its listen.grpc_socket with --socket",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dial(socket: &Path) -> Error {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(Node::dial(Some(socket))).err().expect("nobody is there")
    }

    #[test]
    fn a_node_that_is_away_is_a_clear_sentence() {
        let error = dial(Path::new("/no/such/folder/grpc.sock"));
        assert_eq!(error.code, Code::Unavailable);
        let text = error.to_string();
        assert!(
            text.starts_with("--socket: no node answers at /no/such/folder/grpc.sock: No such file"),
            "{text}"
        );
        assert!(text.contains("`kvd serve`"), "{text}");
    }
    #[tokio::test]
    async fn a_node_of_the_cluster_that_is_away_or_silent_or_no_address_is_told_apart() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let ask = async |address: &str| Node::reach(address, Duration::from_millis(50))?.status().await;
        let silent = ask(&address).await.unwrap_err();
        assert!(silent.message.ends_with(&format!("at {address}: no answer within 50ms")), "{silent}");
        drop(listener);
        let away = ask(&address).await.unwrap_err();
        assert!(away.message.contains(&address) && away.message.contains("refused"), "{away}");
        assert!(ask("no address").await.unwrap_err().message.contains("no address"));
    }
}
