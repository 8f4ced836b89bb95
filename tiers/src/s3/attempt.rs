//! Trying again: within the caller's deadline, a stated number of times, after a wait that spreads out those who wait.
//!
//! Owns: which answers are worth another try. Invariant: nothing waits beyond the deadline, not even for its turn.
//! Leaves to others: whether trying again is harmless; objects are immutable and puts are conditional, so here it always is.

use super::bucket::BucketError;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use std::error::Error as StdError;
use std::hash::{BuildHasher as _, RandomState};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until, timeout_at};

/// The wait before the second try; doubles with each.
const BACKOFF: Duration = Duration::from_millis(25);
/// The longest wait.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// Characters of a server's sentence that are kept.
const SENTENCE_MAX: usize = 512;

/// Why one try came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// Another try would end alike.
    Final(BucketError),
    /// It may pass.
    Passing(BucketError),
}

/// The tries of one request.
pub(super) struct Tries<'a> {
    permits: &'a Semaphore,
    deadline: Instant,
    left: u32,
    made: u32,
}

impl<'a> Tries<'a> {
    /// None made yet.
    pub(super) fn new(permits: &'a Semaphore, tries_max: u32, deadline: Instant) -> Self {
        Self { permits, deadline, left: tries_max, made: 0 }
    }

    /// One try, in its turn, for at most `most` and not beyond the deadline.
    pub(super) async fn run<T>(
        &mut self,
        most: Duration,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        self.left -= 1;
        self.made += 1;
        let turn = timeout_at(self.deadline, self.permits.acquire()).await;
        let _turn =
            turn.map_err(|_| Failure::Final(BucketError::Timeout))?.expect("the semaphore is never closed");
        let end = self.deadline.min(Instant::now() + most);
        timeout_at(end, work).await.unwrap_or(Err(Failure::Passing(BucketError::Timeout)))
    }

    /// Waits before the next try, or says why there is none.
    pub(super) async fn again(&mut self, failure: Failure) -> Result<(), BucketError> {
        let why = match failure {
            Failure::Final(why) => return Err(why),
            Failure::Passing(why) => why,
        };
        let next = Instant::now() + self.wait();
        if self.left == 0 || next >= self.deadline {
            return Err(why);
        }
        sleep_until(next).await;
        Ok(())
    }

    /// Somewhere between nothing and twice the last wait's bound ("full jitter"): many who fail together do not return together.
    fn wait(&self) -> Duration {
        let most = BACKOFF_MAX.min(BACKOFF * 2_u32.saturating_pow(self.made - 1));
        let share = RandomState::new().hash_one(()) as f64 / u64::MAX as f64;
        most.mul_f64(share)
    }
}

/// What an answer other than success means.
pub(super) fn failure_of<E>(error: SdkError<E, HttpResponse>) -> Failure
where
    E: ProvideErrorMetadata + StdError + 'static,
{
    let status = error.raw_response().map(|response| response.status().as_u16());
    let code = error.code().unwrap_or_default().to_owned();
    let message = match error.message() {
        Some(words) => format!("{code}: {words}").chars().take(SENTENCE_MAX).collect(),
        None => sentence(&error),
    };
    match (status, code.as_str()) {
        (_, "NoSuchBucket") => Failure::Final(BucketError::Refused { status: 404, message }),
        (Some(404), _) => Failure::Final(BucketError::Gone),
        // The object is shorter than it should be.
        (Some(416), _) => Failure::Final(BucketError::Truncated),
        // What we sent did not arrive as it was.
        (Some(400), "BadDigest" | "IncompleteBody" | "RequestTimeout" | "XAmzContentChecksumMismatch") => {
            Failure::Passing(BucketError::Unreachable(message))
        }
        // Another writer of the same key is under way.
        (Some(409), _) => Failure::Passing(BucketError::Busy),
        (Some(408 | 429 | 500 | 502 | 503 | 504), _) => Failure::Passing(BucketError::Busy),
        (Some(status), _) if !(200..300).contains(&status) => {
            Failure::Final(BucketError::Refused { status, message })
        }
        _ => Failure::Passing(BucketError::Unreachable(message)),
    }
}

/// What happened, in one line: from the call down to what failed below.
pub(super) fn sentence(error: &(dyn StdError + 'static)) -> String {
    let causes = std::iter::successors(Some(error as &dyn StdError), |error| (*error).source())
        .map(ToString::to_string);
    causes.collect::<Vec<_>>().join(": ").chars().take(SENTENCE_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn tried(tries_max: u32, most: Duration, failure: fn() -> Failure) -> (u32, BucketError) {
        let permits = Semaphore::new(1);
        let mut tries = Tries::new(&permits, tries_max, Instant::now() + most);
        loop {
            let failure = tries.run(most, async { Err::<(), _>(failure()) }).await.unwrap_err();
            if let Err(why) = tries.again(failure).await {
                return (tries.made, why);
            }
        }
    }

    /// On a clock of its own: a busy machine's once made it fail.
    #[tokio::test(start_paused = true)]
    async fn tries_end_with_their_number_the_deadline_or_an_answer() {
        let minute = Duration::from_mins(1);
        assert_eq!(tried(3, minute, || Failure::Passing(BucketError::Busy)).await, (3, BucketError::Busy));
        assert_eq!(tried(3, minute, || Failure::Final(BucketError::Gone)).await, (1, BucketError::Gone));
        let (before, most) = (Instant::now(), Duration::from_millis(100));
        assert_eq!(tried(1000, most, || Failure::Passing(BucketError::Busy)).await.1, BucketError::Busy);
        let step = Duration::from_millis(1); // of the clock
        assert!(before.elapsed() <= most + step, "no wait that would end after the deadline is begun");
    }

    #[tokio::test]
    async fn waiting_for_a_turn_counts() {
        let permits = Semaphore::new(0);
        let deadline = Instant::now() + Duration::from_millis(20);
        let mut tries = Tries::new(&permits, 9, deadline);
        let result = tries.run(Duration::from_secs(1), async { Ok(()) }).await;
        assert!(matches!(result, Err(Failure::Final(BucketError::Timeout))) && Instant::now() >= deadline);
    }
}
