//! What a node says of its NVMe tier: to a person by `kvctl tiers`, to an alarm by a metric.

use crate::daemon::Daemon;
use crate::demo::load::{get, http};
use crate::failure::Failure;
use crate::scrape::counted;
use kvd_client::Tier;
use kvd_proto::wire::admin_client::AdminClient;
use kvd_proto::wire::{ListTiersRequest, TierStatus};
use std::net::SocketAddr;
use tonic::transport::Channel;

/// One daemon.
pub(crate) struct Node {
    admin: AdminClient<Channel>,
    metrics: SocketAddr,
}

impl Node {
    /// `metrics`: where it serves /metrics.
    pub(crate) async fn dial(daemon: &Daemon, metrics: SocketAddr) -> Result<Self, Failure> {
        let socket = daemon.grpc_socket();
        let client = kvd_client::grpc::Client::connect(&socket.to_string_lossy()).await?;
        Ok(Self { admin: AdminClient::new(client.channel()), metrics })
    }

    /// What `kvctl tiers` says of its NVMe; nothing where all is well.
    pub(crate) async fn trouble(&self) -> Result<String, Failure> {
        let tiers = self.admin.clone().list_tiers(ListTiersRequest {}).await?.into_inner().tiers;
        let nvme = tiers.into_iter().find(|tier| tier.tier() == Tier::Nvme);
        Ok(nvme.map(|tier: TierStatus| tier.trouble).unwrap_or_default())
    }

    /// Whether its metric says so.
    pub(crate) async fn degraded(&self) -> Result<bool, Failure> {
        let text = get(&http(), &format!("http://{}/metrics", self.metrics)).await?;
        Ok(counted(&text, "kvd_tier_degraded", "nvme") > 0.0)
    }
}
