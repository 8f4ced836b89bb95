//! Writing objects: whole or in parts, and only if there is none yet.
//!
//! Invariants: of several writers of one key at most one is told that it stored it, where the server knows conditional writes;
//! everyone may be told that it is there. An upload that fails is aborted; one whose writer died costs space until the bucket's
//! lifecycle rule for unfinished uploads removes it. Nothing is copied: bodies are the pieces themselves.
//! Leaves to others: what the pieces are, and naming them so that equal keys mean equal bytes (`name`).

use super::attempt::{Failure, failure_of};
use super::bucket::{Bucket, BucketError, count};
use super::join::join_all;
use aws_sdk_s3::primitives::{ByteStream, SdkBody};
use aws_sdk_s3::types::{ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::Instant;

/// The largest object that is written by one request: 32 MiB of blocks and their footer. In parts it would be two requests more, and several
/// objects are under way at once anyway; for larger ones a try that fails would repeat too much.
pub const WHOLE_BYTES_MAX: u64 = 40 << 20;
/// The largest part of larger objects, which go in equal ones, of 8 MiB at least.
pub const PART_BYTES_MAX: u64 = 16 << 20;
/// The slowest link that is still waited for.
const SLOWEST_BYTES_PER_MS: u64 = 1 << 10;
/// How long cleaning up after a failure may take.
const ABORT_WAIT: Duration = Duration::from_secs(5);

/// What became of a put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// It was written.
    Stored,
    /// It was there already (or an earlier try of ours, whose answer was lost, wrote it).
    Present,
}

impl Bucket {
    /// Writes an object unless there is one. The pieces follow each other.
    pub async fn put_if_absent(
        &self,
        key: &str,
        pieces: &[Bytes],
        deadline: Instant,
    ) -> Result<Put, BucketError> {
        let bytes = length(pieces);
        if self.asks_first() && self.head(key, deadline).await?.is_some() {
            return Ok(Put::Present);
        }
        if bytes <= WHOLE_BYTES_MAX {
            self.put_whole(key, pieces, bytes, deadline).await
        } else {
            self.put_parts(key, cut(pieces, bytes), deadline).await
        }
    }

    /// Whether the server was found not to know conditional writes.
    pub fn asks_first(&self) -> bool {
        self.unconditional.load(Ordering::Relaxed)
    }

    async fn put_whole(
        &self,
        key: &str,
        pieces: &[Bytes],
        bytes: u64,
        deadline: Instant,
    ) -> Result<Put, BucketError> {
        let mut tries = self.tries(deadline);
        let mut conditional = !self.asks_first();
        loop {
            let put = self.put_once(key, pieces, conditional);
            match tries.run(self.patience_for(bytes), put).await {
                Ok(()) => {
                    self.unconditional.store(!conditional, Ordering::Relaxed);
                    return Ok(Put::Stored);
                }
                Err(Failure::Final(BucketError::Refused { status: 412, .. })) => return Ok(Put::Present),
                Err(Failure::Final(BucketError::Refused { status: 400 | 501, .. })) if conditional => {
                    conditional = false;
                    if self.head(key, deadline).await?.is_some() {
                        return Ok(Put::Present);
                    }
                    tries = self.tries(deadline);
                }
                Err(failure) => self.again(&mut tries, failure).await?,
            }
        }
    }

    async fn put_once(&self, key: &str, pieces: &[Bytes], conditional: bool) -> Result<(), Failure> {
        self.counts_write(pieces);
        let request = self.client.put_object().bucket(&self.config.bucket).key(key).body(body_of(pieces));
        let request = request.set_checksum_crc32(self.crc32(pieces));
        let request = request.set_if_none_match(conditional.then(|| "*".to_owned()));
        Box::pin(request.customize().disable_payload_signing().send()).await.map_err(failure_of)?;
        Ok(())
    }

    async fn put_parts(
        &self,
        key: &str,
        parts: Vec<Vec<Bytes>>,
        deadline: Instant,
    ) -> Result<Put, BucketError> {
        let upload = self.begin(key, deadline).await?;
        let sent =
            parts.iter().zip(1..).map(|(part, number)| self.put_part(key, &upload, part, number, deadline));
        let sent: Result<Vec<CompletedPart>, _> = join_all(sent).await.into_iter().collect();
        let result = match sent {
            Ok(parts) => self.complete(key, &upload, parts, deadline).await,
            Err(error) => Err(error),
        };
        if result != Ok(Put::Stored) {
            self.abort(key, &upload).await;
        }
        result
    }

    async fn begin(&self, key: &str, deadline: Instant) -> Result<String, BucketError> {
        let mut tries = self.tries(deadline);
        let algorithm = self.config.upload_checksums.then_some(ChecksumAlgorithm::Crc32);
        loop {
            count(&self.counters.puts, 1);
            let request = self.client.create_multipart_upload().bucket(&self.config.bucket).key(key);
            let begin = async {
                Box::pin(request.set_checksum_algorithm(algorithm.clone()).send()).await.map_err(failure_of)
            };
            match tries.run(self.patience(), begin).await {
                Ok(answer) => {
                    return answer.upload_id.ok_or(BucketError::Unexpected("without a name for the upload"));
                }
                Err(failure) => self.again(&mut tries, failure).await?,
            }
        }
    }

    async fn put_part(
        &self,
        key: &str,
        upload: &str,
        pieces: &[Bytes],
        number: i32,
        deadline: Instant,
    ) -> Result<CompletedPart, BucketError> {
        let bytes = length(pieces);
        let mut tries = self.tries(deadline);
        loop {
            let put = self.put_part_once(key, upload, pieces, number);
            match tries.run(self.patience_for(bytes), put).await {
                Ok(part) => return Ok(part),
                Err(failure) => self.again(&mut tries, failure).await?,
            }
        }
    }

    async fn put_part_once(
        &self,
        key: &str,
        upload: &str,
        pieces: &[Bytes],
        number: i32,
    ) -> Result<CompletedPart, Failure> {
        self.counts_write(pieces);
        let checksum = self.crc32(pieces);
        let request = self.client.upload_part().bucket(&self.config.bucket).key(key).upload_id(upload);
        let request = request.part_number(number).set_checksum_crc32(checksum.clone()).body(body_of(pieces));
        let answer =
            Box::pin(request.customize().disable_payload_signing().send()).await.map_err(failure_of)?;
        let part = CompletedPart::builder().part_number(number).set_e_tag(answer.e_tag);
        Ok(part.set_checksum_crc32(checksum).build())
    }

    async fn complete(
        &self,
        key: &str,
        upload: &str,
        parts: Vec<CompletedPart>,
        deadline: Instant,
    ) -> Result<Put, BucketError> {
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let mut tries = self.tries(deadline);
        let mut conditional = !self.asks_first();
        loop {
            count(&self.counters.puts, 1);
            let request = self
                .client
                .complete_multipart_upload()
                .bucket(&self.config.bucket)
                .key(key)
                .upload_id(upload);
            let request = request
                .multipart_upload(parts.clone())
                .set_if_none_match(conditional.then(|| "*".to_owned()));
            let complete = async { Box::pin(request.send()).await.map_err(failure_of) };
            match tries.run(self.patience_for(PART_BYTES_MAX), complete).await {
                Ok(_) => {
                    self.unconditional.store(!conditional, Ordering::Relaxed);
                    return Ok(Put::Stored);
                }
                Err(Failure::Final(BucketError::Refused { status: 412, .. })) => return Ok(Put::Present),
                Err(Failure::Final(BucketError::Refused { status: 400 | 501, .. })) if conditional => {
                    conditional = false;
                    if self.head(key, deadline).await?.is_some() {
                        return Ok(Put::Present);
                    }
                    tries = self.tries(deadline);
                }
                // The upload is gone: an earlier try whose answer was lost ended it.
                Err(Failure::Final(BucketError::Gone)) => {
                    return self.head(key, deadline).await?.map(|_| Put::Present).ok_or(BucketError::Gone);
                }
                Err(failure) => self.again(&mut tries, failure).await?,
            }
        }
    }

    /// As well as it goes: whoever asked has an answer already.
    async fn abort(&self, key: &str, upload: &str) {
        let deadline = Instant::now() + ABORT_WAIT;
        let mut tries = self.tries(deadline);
        loop {
            count(&self.counters.others, 1);
            let request =
                self.client.abort_multipart_upload().bucket(&self.config.bucket).key(key).upload_id(upload);
            let abort = async { Box::pin(request.send()).await.map_err(failure_of) };
            match tries.run(self.patience(), abort).await {
                Ok(_) => return,
                Err(failure) => {
                    if self.again(&mut tries, failure).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    fn counts_write(&self, pieces: &[Bytes]) {
        count(&self.counters.puts, 1);
        count(&self.counters.written_bytes, length(pieces));
    }

    /// How long a request with such a body may take.
    fn patience_for(&self, bytes: u64) -> Duration {
        self.patience() + Duration::from_millis(bytes / SLOWEST_BYTES_PER_MS)
    }

    /// As the header has it: base64 of the big-endian number.
    fn crc32(&self, pieces: &[Bytes]) -> Option<String> {
        let sum = || {
            let mut hasher = crc32fast::Hasher::new();
            pieces.iter().for_each(|piece| hasher.update(piece));
            aws_smithy_types::base64::encode(hasher.finalize().to_be_bytes())
        };
        self.config.upload_checksums.then(sum)
    }
}

/// Pieces one after the other, as one body.
struct Pieces {
    rest: VecDeque<Bytes>,
    bytes: u64,
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = self.rest.pop_front();
        self.bytes -= piece.as_ref().map_or(0, |piece| piece.len() as u64);
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes)
    }
}

fn body_of(pieces: &[Bytes]) -> ByteStream {
    let body = Pieces { rest: pieces.iter().cloned().collect(), bytes: length(pieces) };
    ByteStream::new(SdkBody::from_body_1_x(body))
}

fn length(pieces: &[Bytes]) -> u64 {
    pieces.iter().map(|piece| piece.len() as u64).sum()
}

/// As few parts as may be, of equal size.
fn cut(pieces: &[Bytes], bytes: u64) -> Vec<Vec<Bytes>> {
    let part_bytes = bytes.div_ceil(bytes.div_ceil(PART_BYTES_MAX)) as usize;
    let (mut parts, mut room) = (vec![Vec::new()], part_bytes);
    for piece in pieces {
        let mut rest = piece.clone();
        while !rest.is_empty() {
            if room == 0 {
                parts.push(Vec::new());
                room = part_bytes;
            }
            let taken = rest.split_to(room.min(rest.len()));
            room -= taken.len();
            parts.last_mut().expect("one at least").push(taken);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_equal_and_hold_everything_in_order() {
        let pieces: Vec<Bytes> = (0..35_u8).map(|number| vec![number; 1 << 20].into()).collect();
        let parts = cut(&pieces, 35 << 20);
        let sizes: Vec<usize> = parts.iter().map(|part| part.iter().map(Bytes::len).sum()).collect();
        assert_eq!((sizes.len(), sizes.iter().sum::<usize>()), (3, 35 << 20));
        assert!(sizes[..2].iter().all(|size| *size >= 8 << 20 && *size as u64 <= PART_BYTES_MAX));
        assert_eq!(parts.concat().concat(), pieces.concat());
        assert_eq!(cut(&[vec![7; (32 << 20) + 1].into()], (32 << 20) + 1).len(), 3);
    }
}
