//! Members that etcd knows: a key for each node, under a lease that lives as long as the node does.
//!
//! Owns the settings and the task. Invariants: nothing waits for etcd to start; an etcd that is away, slow, restarted or
//! emptied changes nothing for those who are in; no more than one task and one connection.
//! Leaves to others: what is in the keys (`record`), the lease and the way back (`session`), calls (`client`, `rpc`).

mod client;
mod record;
mod rpc;
mod session;

pub use record::{ADDRESS_BYTES_MAX, NAME_BYTES_MAX};

use super::{Member, Membership};
use kvd_proto::Error;
use session::Session;
use std::time::Duration;

/// Endpoints of one etcd cluster. At the limit: refused.
pub const ENDPOINTS_MAX: usize = 16;
/// A call that is not a beat may take so long at least: a put waits for etcd's disk.
const CALL_TIME_MIN: Duration = Duration::from_secs(1);
const CALL_TIME_MAX: Duration = Duration::from_secs(5);

/// Where etcd is and how long a node that says nothing is a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `host:port` or `http://host:port`; any of them will do.
    pub endpoints: Vec<String>,
    /// What all keys begin with, so that clusters can share an etcd.
    pub prefix: String,
    /// How long a node that says nothing is a member, in milliseconds.
    pub ttl_ms: u32,
}

impl Settings {
    fn check(&self) -> Result<(), Error> {
        let count = self.endpoints.len();
        if count == 0 || count > ENDPOINTS_MAX {
            let fix = format!("list 1 to {ENDPOINTS_MAX} endpoints of one etcd, as [\"10.0.0.1:2379\"]");
            return Err(Error::invalid("cluster.etcd", format!("{count} endpoints"), fix));
        }
        if self.ttl_ms == 0 {
            return Err(Error::invalid("cluster.ttl_ms", "it is 0", "use at least 1000"));
        }
        Ok(())
    }

    /// etcd counts whole seconds, so it is rounded up; and etcd itself gives no less than about 1.5 of its election
    /// timeouts, 2 s by default.
    fn ttl_s(&self) -> u64 {
        u64::from(self.ttl_ms).div_ceil(1000)
    }

    /// Between two words to etcd: two may be lost before the lease is.
    fn beat(&self) -> Duration {
        Duration::from_millis(self.ttl_s() * 1000 / 3)
    }

    fn call_time_max(&self) -> Duration {
        self.beat().clamp(CALL_TIME_MIN, CALL_TIME_MAX)
    }
}

/// Becomes a member; returns at once, and goes on trying for as long as it takes. An error is of what was set. In a runtime.
pub fn join(settings: Settings, me: Member) -> Result<Membership, Error> {
    settings.check()?;
    record::check(&me)?;
    let myself = me.clone();
    Ok(Membership::start(&me, |seat, leave| async move {
        let mut session = Session::new(settings, myself, seat);
        tokio::select! {
            _ = leave => {}
            never = session.stay() => match never {},
        }
        session.leave().await
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_whole_seconds_and_kept_well_within() {
        let settings = |ttl_ms| Settings { endpoints: vec![], prefix: String::new(), ttl_ms };
        assert_eq!([1, 1000, 1001, 5000].map(|ttl_ms| settings(ttl_ms).ttl_s()), [1, 1, 2, 5]);
        assert_eq!(settings(1001).beat(), Duration::from_millis(666));
        assert_eq!(settings(3_600_000).call_time_max(), CALL_TIME_MAX);
    }

    #[test]
    fn what_cannot_be_right_is_refused_by_field() {
        let good = Settings { endpoints: vec!["a:1".to_owned()], prefix: String::new(), ttl_ms: 1000 };
        let many = vec!["a:1".to_owned(); ENDPOINTS_MAX + 1];
        for (settings, field) in [
            (Settings { endpoints: vec![], ..good.clone() }, "cluster.etcd"),
            (Settings { endpoints: many, ..good.clone() }, "cluster.etcd"),
            (Settings { ttl_ms: 0, ..good.clone() }, "cluster.ttl_ms"),
        ] {
            assert_eq!(settings.check().unwrap_err().field, field);
        }
        good.check().unwrap();
    }
}
