//! The roof of reads: bare HTTP. Requests are signed before the clock runs; then it is hyper's client and memory.

use crate::failure::Failure;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::Request;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// A request that is ready to be sent.
pub(super) type Signed = Request<Empty<Bytes>>;

/// A client that keeps its connections.
pub(super) struct Http {
    client: Client<HttpConnector, Empty<Bytes>>,
}

impl Http {
    pub(super) fn new() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Self { client: Client::builder(TokioExecutor::new()).build(connector) }
    }

    /// All of them, so many at one time; the bytes that came.
    pub(super) async fn read(&self, signed: Vec<Signed>, requests: u64) -> Result<u64, Failure> {
        let (mut reads, turns) = (JoinSet::new(), Arc::new(Semaphore::new(requests as usize)));
        for request in signed {
            let (client, turns) = (self.client.clone(), Arc::clone(&turns));
            reads.spawn(async move {
                let _turn = turns.acquire().await.expect("never closed");
                let mut body = client.request(request).await.map_err(|error| error.to_string())?.into_body();
                let mut memory = Vec::with_capacity(super::raw::RANGE_BYTES as usize);
                while let Some(frame) = body.frame().await {
                    let frame = frame.map_err(|error| error.to_string())?;
                    memory.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
                }
                Ok::<_, String>(std::hint::black_box(memory).len() as u64)
            });
        }
        let came: Vec<u64> = reads.join_all().await.into_iter().collect::<Result<_, _>>()?;
        Ok(came.iter().sum())
    }
}
