//! Calls to one etcd endpoint.
//!
//! Owns the connection and how long a call may take. Invariants: every call ends in its time; every error says which
//! endpoint, and is `Unavailable`: whatever etcd does, this node goes on. Leaves to others: what the answers mean (`session`).

use super::rpc::{
    Compare, KeyValue, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest, PutRequest,
    RangeRequest, RequestOp, TxnRequest, WatchCreateRequest, WatchRequest, WatchResponse, compare,
    kv_client::KvClient, lease_client::LeaseClient, range_request, request_op, response_op,
    watch_client::WatchClient, watch_request,
};
use kvd_proto::limits::NODES_MAX;
use kvd_proto::{Code, Error};
use std::time::Duration;
use tokio_stream::StreamExt as _;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

/// One answer of etcd. At the limit: an error, as for any answer that does not decode. A listing of `NODES_MAX` nodes
/// takes less than a megabyte.
const ANSWER_BYTES_MAX: usize = 8 << 20;

/// One endpoint; cheap to clone.
#[derive(Clone)]
pub(super) struct Client {
    endpoint: String,
    channel: Channel,
    call_time_max: Duration,
}

/// All keys of a folder, the oldest first.
pub(super) struct Listed {
    pub(super) found: Vec<KeyValue>,
    /// Keys beyond `NODES_MAX`.
    pub(super) beyond: u64,
    pub(super) revision: i64,
}

impl Client {
    /// Dials `endpoint`, "host:port" or "http://host:port".
    pub(super) async fn connect(endpoint: &str, call_time_max: Duration) -> Result<Self, Error> {
        let uri = if endpoint.contains("://") { endpoint.to_owned() } else { format!("http://{endpoint}") };
        if !uri.starts_with("http://") {
            return Err(away(endpoint, "only http:// is spoken to etcd"));
        }
        let connector = Endpoint::from_shared(uri).map_err(|error| away(endpoint, deepest(&error)))?;
        let channel = in_time(endpoint, call_time_max, connector.connect()).await?;
        let channel = channel.map_err(|error| away(endpoint, deepest(&error)))?;
        Ok(Self { endpoint: endpoint.to_owned(), channel, call_time_max })
    }

    pub(super) async fn grant(&self, ttl_s: i64) -> Result<i64, Error> {
        let mut lease = LeaseClient::new(self.channel.clone());
        let granted = self.call(lease.lease_grant(LeaseGrantRequest { ttl: ttl_s, id: 0 })).await?;
        if granted.error.is_empty() { Ok(granted.id) } else { Err(self.away(&granted.error)) }
    }

    pub(super) async fn revoke(&self, lease_id: i64) -> Result<(), Error> {
        let mut lease = LeaseClient::new(self.channel.clone());
        self.call(lease.lease_revoke(LeaseRevokeRequest { id: lease_id })).await.map(|_| ())
    }

    /// False: there is no such lease any more. A stream for one word each time: it is one a third of a time to live.
    pub(super) async fn keep_alive(&self, lease_id: i64) -> Result<bool, Error> {
        let mut lease = LeaseClient::new(self.channel.clone());
        let once = tokio_stream::once(LeaseKeepAliveRequest { id: lease_id });
        let answered = async { lease.lease_keep_alive(led(once)).await?.into_inner().message().await };
        let answer = in_time(&self.endpoint, self.call_time_max, answered).await?;
        match answer.map_err(|status| self.away(status.message()))? {
            Some(kept) => Ok(kept.ttl > 0),
            None => Err(self.away("it did not answer")),
        }
    }

    /// Puts if the key was last changed at `revision` (0: if there is none), else says what is there.
    pub(super) async fn put_at(
        &self,
        revision: i64,
        put: PutRequest,
    ) -> Result<Result<(), Option<KeyValue>>, Error> {
        let key = put.key.clone();
        let compare = Compare {
            result: compare::CompareResult::Equal.into(),
            target: compare::CompareTarget::Mod.into(),
            key: key.clone(),
            target_union: Some(compare::TargetUnion::ModRevision(revision)),
        };
        let get = request_op::Request::RequestRange(RangeRequest { key, ..RangeRequest::default() });
        let [put, get] =
            [request_op::Request::RequestPut(put), get].map(|request| RequestOp { request: Some(request) });
        let request = TxnRequest { compare: vec![compare], success: vec![put], failure: vec![get] };
        let done = self.call(KvClient::new(self.channel.clone()).txn(request)).await?;
        let there = || match done.responses.into_iter().next()?.response? {
            response_op::Response::ResponseRange(range) => range.kvs.into_iter().next(),
        };
        Ok(if done.succeeded { Ok(()) } else { Err(there()) })
    }

    /// The oldest first, so that all nodes leave out the same ones when there are too many.
    pub(super) async fn list(&self, folder: &str, end: &str) -> Result<Listed, Error> {
        let request = RangeRequest {
            key: folder.to_owned().into(),
            range_end: end.to_owned().into(),
            limit: NODES_MAX as i64,
            sort_order: range_request::SortOrder::Ascend.into(),
            sort_target: range_request::SortTarget::Create.into(),
        };
        let mut kv = KvClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX);
        let reply = self.call(kv.range(request)).await?;
        let beyond = (reply.count as u64).saturating_sub(reply.kvs.len() as u64);
        let revision = reply.header.ok_or_else(|| self.away("its answer has no revision"))?.revision;
        Ok(Listed { found: reply.kvs, beyond, revision })
    }

    /// Every change from `revision` on.
    pub(super) async fn watch(
        &self,
        folder: &str,
        end: &str,
        revision: i64,
    ) -> Result<Streaming<WatchResponse>, Error> {
        let create = WatchCreateRequest {
            key: folder.to_owned().into(),
            range_end: end.to_owned().into(),
            start_revision: revision,
        };
        let request =
            WatchRequest { request_union: Some(watch_request::RequestUnion::CreateRequest(create)) };
        let asked = tokio_stream::once(request).chain(tokio_stream::pending()); // its end would end the watch
        let mut watch = WatchClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX);
        self.call(watch.watch(led(asked))).await
    }

    /// An error of this endpoint.
    pub(super) fn away(&self, why: &str) -> Error {
        away(&self.endpoint, why)
    }

    async fn call<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, Error> {
        let answer = in_time(&self.endpoint, self.call_time_max, call).await?;
        answer.map(tonic::Response::into_inner).map_err(|status| self.away(status.message()))
    }
}

/// Asks an etcd that has lost its leader to say so, and not to be silent.
fn led<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
    request
}

async fn in_time<T>(endpoint: &str, time_max: Duration, call: impl Future<Output = T>) -> Result<T, Error> {
    let slow = |_| away(endpoint, format!("no answer for {} ms", time_max.as_millis()));
    tokio::time::timeout(time_max, call).await.map_err(slow)
}

/// What lies below, as the outer ones say only "transport error".
fn deepest(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .last()
        .map(ToString::to_string)
        .unwrap_or_default()
}

fn away(endpoint: &str, why: impl AsRef<str>) -> Error {
    let fix =
        "start etcd there, or set cluster.etcd to where it speaks plain http; the node serves meanwhile";
    Error::new(Code::Unavailable, "cluster.etcd", format!("{endpoint}: {}", why.as_ref()), fix)
}
