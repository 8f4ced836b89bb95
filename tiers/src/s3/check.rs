//! What a bucket lets us do, tried out: for `kvd check`.
//!
//! Invariant: it touches nothing but one key of its own below the prefix, and removes that.

use super::bucket::{Bucket, BucketError};
use super::upload::Put;
use bytes::Bytes;
use kvd_proto::{Code, Error};
use std::hash::{BuildHasher as _, RandomState};
use tokio::time::Instant;

/// What is written and read back.
const CONTENT: &[u8] = b"written by kvd check; may be deleted";

/// The step that tells whether two nodes may write one object twice.
pub const CONDITIONAL: &str = "put only if absent";

/// One step, and what was wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was tried.
    pub step: &'static str,
    /// `None`: it works.
    pub problem: Option<Error>,
}

impl Bucket {
    /// Tries what kvd needs of a bucket, in order; what cannot work without an earlier step is left out.
    pub async fn check(&self, deadline: Instant) -> Vec<Finding> {
        let key = self.below(&format!(".kvd-check-{:016x}", RandomState::new().hash_one(())));
        let mut findings = vec![finding("list", self.list(&key, "", 1, deadline).await, Vec::is_empty)];
        let content = [Bytes::from_static(CONTENT)];
        let put = self.put_if_absent(&key, &content, deadline).await;
        let written = put.is_ok();
        findings.push(finding("put", put, |put| *put == Put::Stored));
        if !written {
            return findings;
        }
        findings.push(self.check_conditional(&key, &content, deadline).await);
        let range = 11..CONTENT.len() as u64;
        let read = self.get_bytes(&key, range.clone(), deadline).await;
        findings.push(finding("get a range", read, |bytes| *bytes == CONTENT[range.start as usize..]));
        let deleted = self.delete(std::slice::from_ref(&key), deadline).await;
        let gone = match deleted {
            Ok(()) => self.head(&key, deadline).await.map(|found| found.is_none()),
            Err(error) => Err(error),
        };
        findings.push(finding("delete", gone, |gone| *gone));
        findings
    }

    async fn check_conditional(&self, key: &str, content: &[Bytes], deadline: Instant) -> Finding {
        let step = CONDITIONAL;
        let again = self.put_if_absent(key, content, deadline).await;
        if again == Ok(Put::Present) && self.asks_first() {
            let fix = "nothing must be done: kvd asks before it writes, and two nodes may rarely write one object twice";
            let problem = Error::new(Code::Unavailable, "s3", "the server does not know If-None-Match", fix);
            return Finding { step, problem: Some(problem) };
        }
        finding(step, again, |put| *put == Put::Present)
    }
}

fn finding<T>(step: &'static str, result: Result<T, BucketError>, right: impl FnOnce(&T) -> bool) -> Finding {
    let problem = match result {
        Ok(result) if right(&result) => None,
        Ok(_) => Some(BucketError::Unexpected("something else than what was just done asks for").into()),
        Err(error) => Some(error.into()),
    };
    Finding { step, problem }
}
