//! Several requests at once, within the task that asked.
//!
//! Invariant: nothing runs on when the whole is dropped, so what the requests write into is free again at once (law 2). That
//! is why they are not spawned.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

/// Waits for all; the results in order. Each wake-up looks at every one that is left: they are tens, not thousands.
pub(super) async fn join_all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut waiting: Vec<Option<Pin<Box<F>>>> =
        futures.into_iter().map(|future| Some(Box::pin(future))).collect();
    let mut done: Vec<Option<F::Output>> = waiting.iter().map(|_| None).collect();
    poll_fn(|context| {
        for (slot, result) in waiting.iter_mut().zip(&mut done) {
            if let Some(future) = slot
                && let Poll::Ready(output) = future.as_mut().poll(context)
            {
                *result = Some(output);
                *slot = None;
            }
        }
        if waiting.iter().all(Option::is_none) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    done.into_iter().map(|output| output.expect("all are done")).collect()
}
