//! The `Admin` service: questions to the node, answers as they are.

use super::ask;
use crate::node::event::{Answer, Question};
use crate::run::bucket::BucketTier;
use crate::run::dram::DramSegments;
use crate::run::inbox::{Inbox, Input};
use crate::run::lab::{Lab, simulate};
use kvd_proto::Error;
use kvd_proto::wire::{self, admin_server};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Events one slow reader may be behind. At the limit: it loses some and is told how many.
const EVENTS_BEHIND_MAX: usize = 1024;

pub(super) struct Admin {
    inbox: Inbox,
    dram: Arc<DramSegments>,
    bucket: Option<BucketTier>,
    lab: Lab,
}

impl Admin {
    pub(super) fn new(inbox: Inbox, dram: Arc<DramSegments>, bucket: Option<BucketTier>, lab: Lab) -> Self {
        Self { inbox, dram, bucket, lab }
    }
}

type Told<T> = std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send + 'static>>;

macro_rules! answered {
    ($self:ident, $question:expr, $variant:ident) => {
        match ask(&$self.inbox, $question).await.map_err(Status::from)? {
            Answer::$variant(reply) => reply,
            other => unreachable!("the node answers what it is asked, not {other:?}"),
        }
    };
}

#[tonic::async_trait]
impl admin_server::Admin for Admin {
    async fn status(&self, _: Request<wire::StatusRequest>) -> Result<Response<wire::StatusReply>, Status> {
        match ask(&self.inbox, Question::Status).await.map_err(Status::from)? {
            Answer::Status(reply) => Ok(Response::new(*reply)),
            other => unreachable!("the node answers what it is asked, not {other:?}"),
        }
    }

    async fn list_spaces(
        &self,
        _: Request<wire::ListSpacesRequest>,
    ) -> Result<Response<wire::ListSpacesReply>, Status> {
        Ok(Response::new(answered!(self, Question::Spaces, Spaces)))
    }

    async fn list_tiers(
        &self,
        _: Request<wire::ListTiersRequest>,
    ) -> Result<Response<wire::ListTiersReply>, Status> {
        let mut reply = answered!(self, Question::Tiers, Tiers);
        for tier in &mut reply.tiers {
            if tier.tier() == wire::Tier::Dram {
                tier.medium = self.dram.info().description;
            }
        }
        reply.tiers.extend(self.bucket.as_ref().map(BucketTier::status));
        Ok(Response::new(reply))
    }

    async fn describe_block(
        &self,
        request: Request<wire::DescribeBlockRequest>,
    ) -> Result<Response<wire::DescribeBlockReply>, Status> {
        let question = Question::Blocks(request.into_inner().id_prefix.to_vec());
        Ok(Response::new(answered!(self, question, Blocks)))
    }

    async fn pin_block(
        &self,
        request: Request<wire::PinBlockRequest>,
    ) -> Result<Response<wire::PinBlockReply>, Status> {
        let request = request.into_inner();
        let (id_prefix, ttl_ms) = (request.id_prefix.to_vec(), request.ttl_ms);
        Ok(Response::new(answered!(self, Question::Pin { id_prefix, ttl_ms }, Pin)))
    }

    async fn purge(
        &self,
        request: Request<wire::PurgeRequest>,
    ) -> Result<Response<wire::PurgeReply>, Status> {
        let what = request.into_inner().what.ok_or_else(|| {
            Status::from(Error::invalid("what", "not given", "say everything, a space or an id prefix"))
        })?;
        Ok(Response::new(answered!(self, Question::Purge(what), Purge)))
    }

    async fn change_tier(
        &self,
        request: Request<wire::ChangeTierRequest>,
    ) -> Result<Response<wire::ChangeTierReply>, Status> {
        let question = Question::ChangeTier(request.into_inner());
        Ok(Response::new(answered!(self, question, TierChange)))
    }

    async fn policy(
        &self,
        request: Request<wire::PolicyRequest>,
    ) -> Result<Response<wire::PolicyReply>, Status> {
        let question = Question::Policy(request.into_inner());
        Ok(Response::new(answered!(self, question, Policies)))
    }

    async fn compare_policies(
        &self,
        request: Request<wire::ComparePoliciesRequest>,
    ) -> Result<Response<wire::ComparePoliciesReply>, Status> {
        Ok(Response::new(self.lab.compare(&request.into_inner()).await?))
    }

    type RecordTraceStream = Told<wire::TraceLines>;

    async fn record_trace(
        &self,
        request: Request<wire::RecordTraceRequest>,
    ) -> Result<Response<Self::RecordTraceStream>, Status> {
        let lines = self.lab.record(request.into_inner()).await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(lines).map(Ok))))
    }

    type SimulatePoliciesStream = Told<wire::SimulateReply>;

    async fn simulate_policies(
        &self,
        request: Request<tonic::Streaming<wire::SimulateRequest>>,
    ) -> Result<Response<Self::SimulatePoliciesStream>, Status> {
        let replies = simulate(&self.lab, request.into_inner()).await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    type EventsStream = Told<wire::NodeEvent>;

    async fn events(&self, _: Request<wire::EventsRequest>) -> Result<Response<Self::EventsStream>, Status> {
        let (events, told) = mpsc::channel(EVENTS_BEHIND_MAX);
        self.inbox.push(Input::Watch { events });
        Ok(Response::new(Box::pin(ReceiverStream::new(told).map(Ok))))
    }
}
