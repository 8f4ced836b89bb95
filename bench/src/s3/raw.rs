//! The other side: the SDK alone, with as many requests under way, and nothing verified.

use super::TURN_WAIT;
use super::http::Signed;
use crate::failure::Failure;
use aws_sdk_s3::Client;
use aws_sdk_s3::presigning::PresigningConfig;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;
use http_body_util::Empty;
use hyper::Request;
use kvd_tiers::s3::BucketConfig;
use kvd_tiers::s3::connect;
use kvd_tiers::s3::upload::PART_BYTES_MAX;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Bytes of one range, as the reader asks for them.
pub(super) const RANGE_BYTES: u64 = 8 << 20;

/// The SDK's client, and what it wrote.
pub(super) struct Raw {
    client: Client,
    bucket: String,
    written: Mutex<Vec<String>>,
}

impl Raw {
    pub(super) async fn open(config: &BucketConfig) -> Result<Self, Failure> {
        let client = connect::client(config).await?;
        Ok(Self { client, bucket: config.bucket.clone(), written: Mutex::new(Vec::new()) })
    }

    /// The same bytes in parts of the same size, as so many objects; their keys.
    pub(super) async fn write(
        &self,
        content: &Bytes,
        objects: u64,
        requests: u64,
    ) -> Result<Vec<String>, Failure> {
        let (mut uploads, turns) = (JoinSet::new(), Arc::new(Semaphore::new(requests as usize)));
        let keys: Vec<String> = (0..objects).map(|number| format!("kvd-bench/raw-{number}")).collect();
        for key in keys.clone() {
            let (client, bucket, content) = (self.client.clone(), self.bucket.clone(), content.clone());
            uploads.spawn(upload(client, bucket, key, content, Arc::clone(&turns)));
        }
        uploads.join_all().await.into_iter().collect::<Result<Vec<()>, _>>()?;
        self.written.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&keys);
        Ok(keys)
    }

    /// Requests for all of them, in the same ranges.
    pub(super) async fn signed(&self, keys: &[String], object_bytes: u64) -> Result<Vec<Signed>, Failure> {
        let mut signed = Vec::new();
        for key in keys {
            for range in ranges(object_bytes) {
                let request = self.client.get_object().bucket(&self.bucket).key(key).range(range);
                let request = request.presigned(PresigningConfig::expires_in(TURN_WAIT)?).await?;
                let plain =
                    request.headers().fold(Request::builder().uri(request.uri()), |plain, (name, value)| {
                        plain.header(name, value)
                    });
                signed.push(plain.body(Empty::new())?);
            }
        }
        Ok(signed)
    }

    /// All of them, in parallel ranges.
    pub(super) async fn read(
        &self,
        keys: &[String],
        object_bytes: u64,
        requests: u64,
    ) -> Result<(), Failure> {
        let (mut reads, turns) = (JoinSet::new(), Arc::new(Semaphore::new(requests as usize)));
        for key in keys {
            for range in ranges(object_bytes) {
                let request = self.client.get_object().bucket(&self.bucket).key(key).range(range);
                let turns = Arc::clone(&turns);
                reads.spawn(async move {
                    let _turn = turns.acquire().await.expect("never closed");
                    let mut body = request.send().await.map_err(sentence)?.body;
                    let mut memory = Vec::with_capacity(RANGE_BYTES as usize);
                    while let Some(chunk) = body.next().await {
                        memory.extend_from_slice(&chunk.map_err(sentence)?);
                    }
                    Ok::<_, String>(std::hint::black_box(memory).len() as u64)
                });
            }
        }
        let came: Vec<u64> = reads.join_all().await.into_iter().collect::<Result<_, _>>()?;
        assert_eq!(came.iter().sum::<u64>(), object_bytes * keys.len() as u64);
        Ok(())
    }

    /// What it wrote.
    pub(super) async fn delete(&self) -> Result<(), Failure> {
        let written = std::mem::take(&mut *self.written.lock().unwrap_or_else(PoisonError::into_inner));
        for key in written {
            self.client.delete_object().bucket(&self.bucket).key(key).send().await?;
        }
        Ok(())
    }
}

fn ranges(object_bytes: u64) -> impl Iterator<Item = String> {
    let starts = (0..object_bytes).step_by(RANGE_BYTES as usize);
    starts.map(move |from| format!("bytes={from}-{}", (from + RANGE_BYTES).min(object_bytes) - 1))
}

async fn upload(
    client: Client,
    bucket: String,
    key: String,
    content: Bytes,
    turns: Arc<Semaphore>,
) -> Result<(), String> {
    let begun = client.create_multipart_upload().bucket(&bucket).key(&key).send().await.map_err(sentence)?;
    let id = begun.upload_id.ok_or("an upload without a name")?;
    // Of the size that ours cuts, whose footer makes the object a little longer.
    let bytes = content.len() as u64;
    let part_bytes = (bytes + 1).div_ceil((bytes + 1).div_ceil(PART_BYTES_MAX)) as usize;
    let mut sent = JoinSet::new();
    for (number, from) in (1..).zip((0..content.len()).step_by(part_bytes)) {
        let part = content.slice(from..(from + part_bytes).min(content.len()));
        let request = client.upload_part().bucket(&bucket).key(&key).upload_id(&id).part_number(number);
        let (request, turns) = (request.body(ByteStream::from(part)), Arc::clone(&turns));
        sent.spawn(async move {
            let _turn = turns.acquire().await.expect("never closed");
            let answer = request.customize().disable_payload_signing().send().await.map_err(sentence)?;
            Ok::<_, String>(CompletedPart::builder().part_number(number).set_e_tag(answer.e_tag).build())
        });
    }
    let mut parts: Vec<CompletedPart> = sent.join_all().await.into_iter().collect::<Result<_, _>>()?;
    parts.sort_by_key(|part| part.part_number);
    let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
    let complete = client.complete_multipart_upload().bucket(bucket).key(key).upload_id(id);
    complete.multipart_upload(parts).send().await.map_err(sentence)?;
    Ok(())
}

fn sentence(error: impl std::error::Error + 'static) -> String {
    aws_sdk_s3::error::DisplayErrorContext(&error).to_string()
}
