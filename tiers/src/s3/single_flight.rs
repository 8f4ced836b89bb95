//! Equal reads at one time are one request.
//!
//! Invariants: whoever asks while the same range of the same object is on its way gets those bytes; if the asker that does
//! the work fails or gives up, the next one does it, by its own deadline. Nothing is kept after the last asker left.

use super::bucket::BucketError;
use bytes::Bytes;
use hashbrown::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use tokio::sync::OnceCell;

type Key = (String, Range<u64>);

/// What is on its way.
#[derive(Debug, Default)]
pub(super) struct SingleFlight {
    flights: Mutex<HashMap<Key, Weak<OnceCell<Bytes>>>>,
}

impl SingleFlight {
    /// The bytes of one request, whoever made it; `fetch` is only waited for if nobody else's is under way.
    pub(super) async fn get(
        &self,
        name: &str,
        range: Range<u64>,
        fetch: impl Future<Output = Result<Bytes, BucketError>>,
    ) -> Result<Bytes, BucketError> {
        let cell = self.join((name.to_owned(), range));
        cell.get_or_try_init(|| fetch).await.cloned()
    }

    fn join(&self, key: Key) -> Arc<OnceCell<Bytes>> {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        // Few are under way at a time, so looking at all for those that nobody waits for costs nothing.
        flights.retain(|_, flight| flight.strong_count() > 0);
        if let Some(cell) = flights.get(&key).and_then(Weak::upgrade) {
            return cell;
        }
        let cell = Arc::new(OnceCell::new());
        flights.insert(key, Arc::downgrade(&cell));
        cell
    }
}

#[cfg(test)]
mod tests {
    use super::super::join::join_all;
    use super::*;
    use std::cell::Cell;

    #[tokio::test]
    async fn equal_reads_are_one_and_a_failure_is_only_its_own() {
        let (flight, asked) = (SingleFlight::default(), Cell::new(0));
        let fetch = async |result: Result<Bytes, BucketError>| {
            asked.set(asked.get() + 1);
            tokio::task::yield_now().await;
            result
        };
        let good = || Ok(Bytes::from_static(b"bytes"));
        let three = (0..3).map(|_| flight.get("a", 0..5, fetch(good())));
        assert_eq!(join_all(three).await, vec![good(); 3]);
        assert_eq!(asked.take(), 1);
        flight.get("a", 0..5, fetch(good())).await.unwrap();
        flight.get("a", 0..4, fetch(good())).await.unwrap();
        assert_eq!(asked.take(), 2, "nothing is kept, and another range is another read");
        let results =
            [Err(BucketError::Gone), good(), good()].map(|result| flight.get("a", 0..5, fetch(result)));
        assert_eq!(join_all(results).await, [Err(BucketError::Gone), good(), good()]);
        assert_eq!(asked.get(), 2);
    }
}
