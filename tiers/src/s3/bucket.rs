//! A bucket: requests with a deadline, in bounded number, tried again where that helps.
//!
//! Owns: the connection, credentials, how many requests are under way, reads, listing, deleting. Writes are in `upload`.
//! Invariants: every request ends by the caller's deadline; bodies go into their destination as they come and are never
//! held whole, but for what `get_bytes` returns; a body of another length than asked for is an error.
//! Leaves to others: whether bytes are the right ones (`reader`: only checksums tell), and what a lost bucket means (a miss, kvd).

use super::attempt::{Failure, Tries, failure_of, sentence};
use super::join::join_all;
use super::name::below;
use super::single_flight::SingleFlight;
use aws_sdk_s3::Client;
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use bytes::Bytes;
use kvd_proto::{Code, Error};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

/// Names of one page of a listing, as the protocol has it.
const PAGE_NAMES: i32 = 1000;
/// Most bytes that a whole read may keep: above the largest manifest and footer. At the limit: an error; whoever wants more
/// gives a sink.
pub const WHOLE_BYTES_MAX: u64 = 32 << 20;

/// How to reach a bucket.
#[derive(Debug, Clone)]
pub struct BucketConfig {
    /// Where, for anything but AWS: `https://host:port`; empty: AWS's own for the region.
    pub endpoint: String,
    /// The region that requests are signed for.
    pub region: String,
    /// The bucket's name.
    pub bucket: String,
    /// What all keys begin with, without a slash at the end.
    pub prefix: String,
    /// Whether the bucket's name is in the path and not in the host.
    pub path_style: bool,
    /// Certificates (PEM) that the endpoint's is checked against, instead of the system's.
    pub ca_pem: Option<Vec<u8>>,
    /// Access key and secret; `None`: AWS's chain (environment, profile, web identity, instance).
    pub keys: Option<(String, String)>,
    /// Requests under way at one time. At the limit: they wait, within their deadline.
    pub requests_max: usize,
    /// How long a server may be silent before a try is given up.
    pub timeout_ms: u64,
    /// Tries of one request.
    pub tries_max: u32,
    /// Whether uploads carry CRC-32 headers, which servers that know them check.
    pub upload_checksums: bool,
}

impl Default for BucketConfig {
    fn default() -> Self {
        Self {
            endpoint: String::new(),
            region: "us-east-1".to_owned(),
            bucket: String::new(),
            prefix: "kvd".to_owned(),
            path_style: false,
            ca_pem: None,
            keys: None,
            requests_max: 32,
            timeout_ms: 2000,
            tries_max: 4,
            upload_checksums: true,
        }
    }
}

/// Why a request came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BucketError {
    /// There is no such object.
    #[error("the object is gone")]
    Gone,
    /// The deadline came first.
    #[error("no answer in time")]
    Timeout,
    /// Fewer bytes came than there should be, at every try.
    #[error("the object ends too early")]
    Truncated,
    /// The server asked for patience, at every try.
    #[error("the server is busy")]
    Busy,
    /// No server, or a connection that broke, at every try.
    #[error("the server cannot be reached: {0}")]
    Unreachable(String),
    /// The server said no.
    #[error("the server refused (status {status}): {message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The server's words.
        message: String,
    },
    /// An answer that does not fit the question.
    #[error("the server answered {0}")]
    Unexpected(&'static str),
}

impl From<BucketError> for Error {
    fn from(error: BucketError) -> Self {
        let fix = match &error {
            BucketError::Refused { status: 401 | 403, .. } => {
                "check the access key, and that its policy allows s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket"
            }
            BucketError::Refused { .. } => "check bucket, region and path style",
            BucketError::Unexpected(_) => "check that the endpoint speaks S3",
            // The SDK tells it by its words alone.
            BucketError::Unreachable(why) if why.contains("credentials") => {
                "name a file with an access key (s3.keys_file), or let AWS's chain find one on this machine"
            }
            BucketError::Unreachable(_) => {
                "check that the endpoint is right, reachable from here, and that its certificate is trusted (s3.ca_file)"
            }
            _ => "check that the endpoint is right and what it has to do",
        };
        Self::new(Code::Unavailable, "s3", error.to_string(), fix)
    }
}

/// Where the bytes of a read go.
pub trait Sink: Send {
    /// Bytes `at` after the first that was asked for. They come in order, each once; only a read that begins anew begins at 0 again.
    fn write(&mut self, at: u64, bytes: &[u8]);
}

impl Sink for Vec<u8> {
    fn write(&mut self, at: u64, bytes: &[u8]) {
        self.truncate(at as usize);
        self.extend_from_slice(bytes);
    }
}

impl Sink for &mut [u8] {
    fn write(&mut self, at: u64, bytes: &[u8]) {
        self[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }
}

/// An object as a listing has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its key.
    pub key: String,
    /// Its size.
    pub bytes: u64,
    /// When it was written, in seconds since 1970, if the server says.
    pub modified_s: Option<i64>,
}

/// Requests made, retries among them, and payload moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Reads.
    pub gets: u64,
    /// Writes: puts, parts, beginnings and ends of uploads.
    pub puts: u64,
    /// Everything else.
    pub others: u64,
    /// Tries after a first.
    pub retries: u64,
    /// Bytes that came.
    pub read_bytes: u64,
    /// Bytes that were sent, once for each try.
    pub written_bytes: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) gets: AtomicU64,
    pub(super) puts: AtomicU64,
    pub(super) others: AtomicU64,
    pub(super) retries: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

/// A bucket that can be reached, or not.
#[derive(Debug)]
pub struct Bucket {
    pub(super) client: Client,
    pub(super) config: BucketConfig,
    permits: Semaphore,
    reads: SingleFlight,
    /// The server does not know `If-None-Match`.
    pub(super) unconditional: AtomicBool,
    pub(super) counters: Counters,
}

/// A read's way so far.
struct Progress {
    got: u64,
    etag: Option<String>,
}

impl Bucket {
    /// Makes ready; nothing is sent, but where credentials come from AWS's chain.
    pub async fn open(config: BucketConfig) -> Result<Self, Error> {
        assert!(config.requests_max > 0 && config.tries_max > 0, "{config:?}");
        let client = super::connect::client(&config).await?;
        Ok(Self {
            client,
            permits: Semaphore::new(config.requests_max),
            config,
            reads: SingleFlight::default(),
            unconditional: AtomicBool::new(false),
            counters: Counters::default(),
        })
    }

    /// How it is reached.
    pub fn config(&self) -> &BucketConfig {
        &self.config
    }

    /// What it took so far.
    pub fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            gets: read(&self.counters.gets),
            puts: read(&self.counters.puts),
            others: read(&self.counters.others),
            retries: read(&self.counters.retries),
            read_bytes: read(&self.counters.read_bytes),
            written_bytes: read(&self.counters.written_bytes),
        }
    }

    pub(super) fn tries(&self, deadline: Instant) -> Tries<'_> {
        Tries::new(&self.permits, self.config.tries_max, deadline)
    }

    /// How long a server may be silent.
    pub(super) fn patience(&self) -> Duration {
        Duration::from_millis(self.config.timeout_ms)
    }

    /// Waits before another try, which is counted, or says why there is none.
    pub(super) async fn again(&self, tries: &mut Tries<'_>, failure: Failure) -> Result<(), BucketError> {
        tries.again(failure).await?;
        count(&self.counters.retries, 1);
        Ok(())
    }

    /// A range of an object into a sink. What came before a connection broke is not asked for again.
    pub async fn get_range<S: Sink + ?Sized>(
        &self,
        key: &str,
        range: Range<u64>,
        sink: &mut S,
        deadline: Instant,
    ) -> Result<(), BucketError> {
        if range.is_empty() {
            return Ok(());
        }
        let mut progress = Progress { got: 0, etag: None };
        let mut tries = self.tries(deadline);
        loop {
            // A body may take as long as the deadline allows, as long as it comes.
            let most = deadline.saturating_duration_since(Instant::now());
            let read = self.read_on(key, &range, &mut progress, sink);
            match tries.run(most, read).await {
                Ok(()) => return Ok(()),
                Err(failure) => self.again(&mut tries, failure).await?,
            }
        }
    }

    /// Several ranges at once.
    pub async fn get_ranges<S: Sink>(
        &self,
        wanted: impl IntoIterator<Item = (String, Range<u64>, S)>,
        deadline: Instant,
    ) -> Vec<Result<S, BucketError>> {
        let reads = wanted.into_iter().map(async |(key, range, mut sink)| {
            self.get_range(&key, range, &mut sink, deadline).await.map(|()| sink)
        });
        join_all(reads).await
    }

    /// A range that is kept whole; equal ones asked for at one time are one request.
    pub async fn get_bytes(
        &self,
        key: &str,
        range: Range<u64>,
        deadline: Instant,
    ) -> Result<Bytes, BucketError> {
        let bytes = range.end.saturating_sub(range.start);
        if bytes > WHOLE_BYTES_MAX {
            return Err(BucketError::Unexpected("with an object that is larger than any of ours"));
        }
        let fetch = async {
            let mut sink = Vec::with_capacity(bytes as usize);
            self.get_range(key, range.clone(), &mut sink, deadline).await?;
            Ok(Bytes::from(sink))
        };
        self.reads.get(key, range.clone(), fetch).await
    }

    /// At most the last `bytes` of an object, and its size.
    pub async fn get_tail(
        &self,
        key: &str,
        bytes: u64,
        deadline: Instant,
    ) -> Result<(Bytes, u64), BucketError> {
        let size = self.head(key, deadline).await?.ok_or(BucketError::Gone)?;
        Ok((self.get_bytes(key, size.saturating_sub(bytes)..size, deadline).await?, size))
    }

    /// One try to read what is missing.
    async fn read_on<S: Sink + ?Sized>(
        &self,
        key: &str,
        range: &Range<u64>,
        progress: &mut Progress,
        sink: &mut S,
    ) -> Result<(), Failure> {
        let (first, last) = (range.start + progress.got, range.end - 1);
        count(&self.counters.gets, 1);
        let request = self
            .client
            .get_object()
            .bucket(&self.config.bucket)
            .key(key)
            .range(format!("bytes={first}-{last}"));
        let answer = timeout(self.patience(), Box::pin(request.send())).await;
        let mut answer = answer.map_err(|_| Failure::Passing(BucketError::Timeout))?.map_err(failure_of)?;
        fits(&answer, first, last)?;
        if progress.got > 0 && progress.etag != answer.e_tag {
            // Not the object that the first bytes were of, or a server that is confused.
            *progress = Progress { got: 0, etag: None };
            return Err(Failure::Passing(BucketError::Unexpected("with another object's bytes")));
        }
        progress.etag = answer.e_tag.take();
        while progress.got < range.end - range.start {
            let chunk = timeout(self.patience(), answer.body.next()).await;
            let chunk = match chunk.map_err(|_| Failure::Passing(BucketError::Timeout))? {
                None => return Err(Failure::Passing(BucketError::Truncated)),
                Some(Err(error)) => return Err(Failure::Passing(BucketError::Unreachable(sentence(&error)))),
                Some(Ok(chunk)) => chunk,
            };
            if progress.got + chunk.len() as u64 > range.end - range.start {
                return Err(Failure::Passing(BucketError::Unexpected("with more bytes than it said")));
            }
            sink.write(progress.got, &chunk);
            progress.got += chunk.len() as u64;
            count(&self.counters.read_bytes, chunk.len() as u64);
        }
        Ok(())
    }

    /// An object's size; `None`: there is none.
    pub async fn head(&self, key: &str, deadline: Instant) -> Result<Option<u64>, BucketError> {
        let mut tries = self.tries(deadline);
        loop {
            count(&self.counters.others, 1);
            let request = self.client.head_object().bucket(&self.config.bucket).key(key);
            let head = async { Box::pin(request.send()).await.map_err(failure_of) };
            match tries.run(self.patience(), head).await {
                Ok(answer) => return Ok(answer.content_length.map(|bytes| bytes.max(0) as u64)),
                Err(Failure::Final(BucketError::Gone)) => return Ok(None),
                Err(failure) => self.again(&mut tries, failure).await?,
            }
        }
    }

    /// Up to `most` objects whose keys begin so, after the key `after`, in order.
    pub async fn list(
        &self,
        prefix: &str,
        after: &str,
        most: usize,
        deadline: Instant,
    ) -> Result<Vec<Listed>, BucketError> {
        let mut found: Vec<Listed> = Vec::new();
        loop {
            let after = found.last().map_or(after, |last| &last.key).to_owned();
            let (page, more) = self.page(prefix, &after, most - found.len(), deadline).await?;
            let came = page.len();
            found.extend(page);
            if !more || came == 0 || found.len() >= most {
                return Ok(found);
            }
        }
    }

    async fn page(
        &self,
        prefix: &str,
        after: &str,
        most: usize,
        deadline: Instant,
    ) -> Result<(Vec<Listed>, bool), BucketError> {
        let mut tries = self.tries(deadline);
        let names = i32::try_from(most).unwrap_or(PAGE_NAMES).min(PAGE_NAMES);
        let after = Some(after.to_owned()).filter(|after| !after.is_empty());
        loop {
            count(&self.counters.others, 1);
            let request =
                self.client.list_objects_v2().bucket(&self.config.bucket).prefix(prefix).max_keys(names);
            let list =
                async { Box::pin(request.set_start_after(after.clone()).send()).await.map_err(failure_of) };
            match tries.run(self.patience(), list).await {
                Ok(answer) => {
                    let more = answer.is_truncated.unwrap_or(false);
                    let listed = answer.contents.unwrap_or_default().into_iter().filter_map(|object| {
                        Some(Listed {
                            key: object.key?,
                            bytes: object.size.unwrap_or(0).max(0) as u64,
                            modified_s: object.last_modified.map(|modified| modified.secs()),
                        })
                    });
                    return Ok((listed.collect(), more));
                }
                Err(failure) => self.again(&mut tries, failure).await?,
            }
        }
    }

    /// Deletes objects, whether they are there or not; the first trouble, after all were tried. One request each: what deletes
    /// several needs checksums that not all servers agree on, and a request to delete costs nothing.
    pub async fn delete(&self, keys: &[String], deadline: Instant) -> Result<(), BucketError> {
        let deletes = keys.iter().map(|key| self.delete_one(key, deadline));
        join_all(deletes).await.into_iter().collect()
    }

    async fn delete_one(&self, key: &str, deadline: Instant) -> Result<(), BucketError> {
        let mut tries = self.tries(deadline);
        loop {
            count(&self.counters.others, 1);
            let request = self.client.delete_object().bucket(&self.config.bucket).key(key);
            let delete = async { Box::pin(request.send()).await.map_err(failure_of) };
            match tries.run(self.patience(), delete).await {
                Ok(_) | Err(Failure::Final(BucketError::Gone)) => return Ok(()),
                Err(failure) => self.again(&mut tries, failure).await?,
            }
        }
    }

    /// A key below the prefix.
    pub(super) fn below(&self, rest: &str) -> String {
        below(&self.config.prefix, rest)
    }
}

/// Whether an answer is of the range that was asked for, as far as it says.
fn fits(answer: &GetObjectOutput, first: u64, last: u64) -> Result<(), Failure> {
    let said = answer.content_range.as_deref().and_then(|range| range.strip_prefix("bytes "));
    let whole = match said.and_then(|range| range.split_once('/')) {
        Some((range, _)) if range == format!("{first}-{last}") => true,
        Some((range, _)) if range.split_once('-').is_some_and(|(from, _)| from == first.to_string()) => {
            return Err(Failure::Final(BucketError::Truncated));
        }
        Some(_) => false,
        // A server that was asked for everything may say so without a range.
        None => first == 0,
    };
    let length = answer.content_length.is_none_or(|bytes| bytes == (last - first + 1) as i64);
    let wrong = BucketError::Unexpected("with another range");
    if whole && length { Ok(()) } else { Err(Failure::Passing(wrong)) }
}
