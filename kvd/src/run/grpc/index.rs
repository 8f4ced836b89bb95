//! The `Index` service: what this node has, for followers; which node has what, for anybody.

use crate::links::Links;
use crate::run::follower::Locations;
use crate::run::publisher::Joining;
use kvd_proto::wire::{self, index_server};
use kvd_proto::{Chain, Code, Error};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

#[derive(Clone)]
pub(super) struct Service {
    joining: Joining,
    /// `None`: this node is of no cluster.
    locations: Option<Locations>,
    links: Arc<Mutex<Links>>,
}

impl Service {
    pub(super) fn new(joining: Joining, locations: Option<Locations>, links: Arc<Mutex<Links>>) -> Self {
        Self { joining, locations, links }
    }

    fn locations(&self) -> Result<&Locations, Error> {
        self.locations.as_ref().ok_or_else(|| {
            let fix = "list every node's gRPC address in cluster.nodes, this one's too, or set cluster.etcd";
            Error::new(Code::Unavailable, "cluster.nodes", "this node is of no cluster", fix)
        })
    }
}

#[tonic::async_trait]
impl index_server::Index for Service {
    type FollowStream = Pin<Box<dyn Stream<Item = Result<wire::FollowReply, Status>> + Send + 'static>>;

    async fn follow(&self, _: Request<wire::FollowRequest>) -> Result<Response<Self::FollowStream>, Status> {
        Ok(Response::new(Box::pin(ReceiverStream::new(self.joining.follow().await?))))
    }

    async fn locate(
        &self,
        request: Request<wire::LocateRequest>,
    ) -> Result<Response<wire::LocateReply>, Status> {
        let request = request.into_inner();
        let chain = Chain::from_packed("chain", &request.chain)?;
        let group = u8::try_from(request.group).map_err(|_| {
            Error::invalid("group", request.group.to_string(), "give the number of a group of the layout")
        })?;
        let mut reply = self.locations()?.locate(chain, group, request.block_bytes).await?;
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        for node in &mut reply.nodes {
            node.sending = Some(links.speed(&node.address));
        }
        drop(links);
        Ok(Response::new(reply))
    }

    async fn list_nodes(
        &self,
        _: Request<wire::ListNodesRequest>,
    ) -> Result<Response<wire::ListNodesReply>, Status> {
        Ok(Response::new(self.locations()?.list().await?))
    }
}
