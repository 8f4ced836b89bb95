//! Waiting for conditions, with a deadline; and a deadline over everything that is awaited.

use std::time::{Duration, Instant};

/// Nothing here takes this long unless it hangs.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);
/// Slots of a process that has ended are free within this.
pub(crate) const FREED_WITHIN: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(5);

/// The future's value, or a panic that names `what`.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("{what}: nothing in {DEADLINE:?}"))
}

/// Asks again and again until `condition` gives something.
pub(crate) async fn until<T>(what: &str, most: Duration, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    let mut pause = tokio::time::interval(POLL);
    loop {
        if let Some(value) = within(what, condition()).await {
            return value;
        }
        assert!(start.elapsed() < most, "{what}: not within {most:?}");
        pause.tick().await;
    }
}
