//! `[s3]`: the bucket where blocks are written as they are stored, and from which other nodes' blocks come.
//!
//! Owns the section's keys, its typed values, their checks, and reading the files that it names.
//! Invariants: no secret stands in `kvd.toml` or in what `kvd config` prints: access keys come from a file that only its
//! owner may read, or from AWS's chain; with no bucket nothing of the section is checked or read.
//! Leaves to others: talking to the bucket (tiers), what goes there and when (`node`, `run`).

use super::keys::{Found, Key, Kind, fixed};
use super::machine::Machine;
use super::size::human;
use super::values::Values;
use super::{check_absolute, check_range, integer, path};
use kvd_proto::Error;
use kvd_tiers::s3::BucketConfig;
use serde::{Deserialize, Deserializer};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Certificates of an endpoint have no more. At the limit: refused.
const CA_FILE_BYTES_MAX: u64 = 1 << 20;
/// Two lines have no more. At the limit: refused.
const KEYS_FILE_BYTES_MAX: u64 = 4 << 10;
/// What buffers hold at most by default.
const BUFFER_DEFAULT_BYTES_MAX: u64 = 256 << 20;
/// More prefix would leave too little of the 1,024 bytes of a key for tenant, node and object. At the limit: refused.
const PREFIX_BYTES_MAX: usize = 256;
const OBJECT_BYTES_MIN: u64 = 1 << 20;
const OBJECT_BYTES_MAX: u64 = 64 << 20;
/// A block's index entry, for people.
const INDEX_BYTES_PER_BLOCK: u64 = 22;
const THIRTY_DAYS_MS: u32 = 30 * 86_400_000;

/// The section's rows.
pub(super) static KEYS: &[Key] = &[
    Key {
        name: "s3.bucket",
        kind: Kind::OptionalText,
        help: "Bucket of the S3 tier, which all nodes of a cluster share; \"\" for none. What is stored is written there too, soon after, and what other nodes put there is found.",
        default: |_, _| fixed("", "no S3 tier"),
    },
    Key {
        name: "s3.endpoint",
        kind: Kind::OptionalText,
        help: "Where the bucket is, \"https://host:port\"; \"\": AWS. With http:// blocks are not encrypted on their way: a network you trust.",
        default: |_, _| fixed("", "AWS's own for the region"),
    },
    Key {
        name: "s3.region",
        kind: Kind::Text,
        help: "The region that requests are signed for.",
        default: |_, _| fixed("us-east-1", "what most servers but AWS's take"),
    },
    Key {
        name: "s3.prefix",
        kind: Kind::OptionalText,
        help: "What all keys in the bucket begin with, without a slash at either end: one prefix a cluster; \"\" for none.",
        default: |_, _| fixed("kvd", "a bucket may hold other things"),
    },
    Key {
        name: "s3.path_style",
        kind: Kind::Flag,
        help: "Whether the bucket's name is in the path of a request and not in its host.",
        default: path_style,
    },
    Key {
        name: "s3.ca_file",
        kind: Kind::OptionalPath,
        help: "PEM certificates that the endpoint's is checked against, instead of the system's.",
        default: |_, _| fixed("", "the system's"),
    },
    Key {
        name: "s3.keys_file",
        kind: Kind::OptionalPath,
        help: "File that only its owner may read: the access key in its first line, the secret in its second; \"\": AWS's chain (environment, profile, web identity, instance).",
        default: |_, _| fixed("", "AWS's chain"),
    },
    Key {
        name: "s3.upload",
        kind: Kind::Flag,
        help: "Whether this node writes blocks to the bucket; false: it only reads. The same on all nodes of a cluster, which leave blocks to each other.",
        default: |_, _| fixed(true, "what a node alone has is gone with it"),
    },
    Key {
        name: "s3.price_us_per_gib",
        kind: Kind::Count,
        help: "What keeping a GiB in the bucket costs, in microseconds of GPU time, for as long as s3.ttl_ms or the bucket's rule keeps it. A block that is expected to save less on this node is not uploaded, where it is known what computing costs and the policy is worth; 0: all are, for other nodes too. A day of S3 Standard at $0.023 a GB and month, and a GPU at $10 an hour: 296000.",
        default: |_, _| {
            fixed(0, "what a block saves other nodes, and after a restart, this node does not know")
        },
    },
    Key {
        name: "s3.object_bytes",
        kind: Kind::Size,
        help: "Blocks are packed into objects of about this, 1MiB to 64MiB. 16 to 64MiB pay: smaller ones cost more requests a byte, larger ones wait longer to be full.",
        default: |_, _| (integer(32 << 20), "few requests, full within seconds".into()),
    },
    Key {
        name: "s3.pack_ms",
        kind: Kind::Count,
        help: "How long a block waits at most for others to share its object, 100 to 600000.",
        default: |_, _| {
            fixed(10_000, "what a crash may cost the bucket, against objects that are mostly empty")
        },
    },
    Key {
        name: "s3.buffer_bytes",
        kind: Kind::Size,
        help: "Memory for blocks on their way to the bucket, at least two objects. Beyond it blocks wait where they are.",
        default: buffer,
    },
    Key {
        name: "s3.list_ms",
        kind: Kind::Count,
        help: "How often other nodes' manifests are looked for, 100 to 3600000. A block is found elsewhere so much later; a listing is one request a tenant.",
        default: |_, _| fixed(10_000, "some 260,000 requests a month"),
    },
    Key {
        name: "s3.index_blocks_max",
        kind: Kind::Count,
        help: "Blocks in the bucket that this node knows, its own and others', at least 1000. Beyond it those it heard of first are forgotten, which costs hits.",
        default: |_, _| index_blocks(),
    },
    Key {
        name: "s3.requests_max",
        kind: Kind::Count,
        help: "Requests under way at once, 1 to 1024; more wait.",
        default: |_, _| fixed(32, "fills a 25 Gbit/s network at what one connection to AWS gives"),
    },
    Key {
        name: "s3.timeout_ms",
        kind: Kind::Count,
        help: "How long the server may be silent before a try is given up, 50 to 60000.",
        default: |_, _| fixed(2000, "far beyond what a healthy server takes"),
    },
    Key {
        name: "s3.tries_max",
        kind: Kind::Count,
        help: "Tries of one request, 1 to 10.",
        default: |_, _| fixed(4, "what is still refused then is no hiccup"),
    },
    Key {
        name: "s3.threads",
        kind: Kind::Count,
        help: "Threads that talk to the bucket: TLS, checksums and copies, 1 to 64.",
        default: threads,
    },
    Key {
        name: "s3.ttl_ms",
        kind: Kind::Count,
        help: "An object that is older than this, and was not read for so long, is deleted by the node that wrote it, at least 60000; 0: never.",
        default: |_, _| {
            fixed(THIRTY_DAYS_MS, "30 days: what nobody came back to in a month is computed again")
        },
    },
];

/// The S3 tier.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct S3 {
    /// The bucket; `None` is no S3 tier.
    #[serde(deserialize_with = "text")]
    pub bucket: Option<String>,
    /// Where it is; empty: AWS.
    pub endpoint: String,
    /// The region that requests are signed for.
    pub region: String,
    /// What all keys begin with; may be empty.
    pub prefix: String,
    /// Whether the bucket's name is in the path.
    pub path_style: bool,
    /// Certificates instead of the system's.
    #[serde(deserialize_with = "path")]
    pub ca_file: Option<PathBuf>,
    /// Access key and secret; `None`: AWS's chain.
    #[serde(deserialize_with = "path")]
    pub keys_file: Option<PathBuf>,
    /// Whether this node writes to the bucket.
    pub upload: bool,
    /// What keeping a GiB there costs, in microseconds.
    pub price_us_per_gib: u32,
    /// Bytes of an object, about.
    pub object_bytes: u64,
    /// How long a block waits for others, in milliseconds.
    pub pack_ms: u32,
    /// Memory for what is on its way to the bucket.
    pub buffer_bytes: u64,
    /// How often others' manifests are looked for, in milliseconds.
    pub list_ms: u32,
    /// Blocks that are known of.
    pub index_blocks_max: u32,
    /// Requests under way at once.
    pub requests_max: u32,
    /// How long a server may be silent, in milliseconds.
    pub timeout_ms: u32,
    /// Tries of one request.
    pub tries_max: u32,
    /// Threads that talk to the bucket.
    pub threads: u32,
    /// How long an object stays unread, in milliseconds; 0: for ever.
    pub ttl_ms: u32,
}

impl S3 {
    /// How the bucket is reached: the section, and what stands in the files that it names. Without a bucket: an error.
    pub fn bucket_config(&self) -> Result<BucketConfig, Error> {
        let Some(bucket) = &self.bucket else {
            return Err(Error::invalid("s3.bucket", "no S3 tier is configured", "name the bucket"));
        };
        Ok(BucketConfig {
            endpoint: self.endpoint.clone(),
            region: self.region.clone(),
            bucket: bucket.clone(),
            prefix: self.prefix.clone(),
            path_style: self.path_style,
            ca_pem: self.ca_file.as_deref().map(certificates).transpose()?,
            keys: self.keys_file.as_deref().map(access_keys).transpose()?,
            requests_max: self.requests_max as usize,
            timeout_ms: self.timeout_ms.into(),
            tries_max: self.tries_max,
            ..BucketConfig::default()
        })
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        let Some(bucket) = &self.bucket else { return Ok(()) };
        check_bucket(bucket)?;
        self.check_place()?;
        for (key, file) in [("s3.ca_file", &self.ca_file), ("s3.keys_file", &self.keys_file)] {
            file.as_deref().map_or(Ok(()), |file| check_absolute(key, file))?;
        }
        check_range("s3.object_bytes", self.object_bytes, OBJECT_BYTES_MIN, OBJECT_BYTES_MAX)?;
        check_range("s3.buffer_bytes", self.buffer_bytes, 2 * self.object_bytes, 1 << 40)?;
        let ranges = [
            ("s3.pack_ms", self.pack_ms, 100, 600_000),
            ("s3.list_ms", self.list_ms, 100, 3_600_000),
            ("s3.index_blocks_max", self.index_blocks_max, 1000, u32::MAX),
            ("s3.requests_max", self.requests_max, 1, 1024),
            ("s3.timeout_ms", self.timeout_ms, 50, 60_000),
            ("s3.tries_max", self.tries_max, 1, 10),
            ("s3.threads", self.threads, 1, 64),
        ];
        for (key, value, least, most) in ranges {
            check_range(key, value.into(), least, most.into())?;
        }
        let kept = self.ttl_ms > 0;
        if kept { check_range("s3.ttl_ms", self.ttl_ms.into(), 1000, u32::MAX.into()) } else { Ok(()) }
    }

    fn check_place(&self) -> Result<(), Error> {
        let host = ["http://", "https://"].iter().find_map(|scheme| self.endpoint.strip_prefix(scheme));
        if !self.endpoint.is_empty() && host.is_none_or(|host| host.is_empty() || host.starts_with('/')) {
            let fix = "write one such as \"https://minio.example:9000\", or \"\" for AWS";
            let message = format!("{:?} does not begin with https:// or http:// and a host", self.endpoint);
            return Err(Error::invalid("s3.endpoint", message, fix));
        }
        let prefix = &self.prefix;
        let strange = |part: &str| part.is_empty() || part == "." || part == "..";
        if !prefix.is_empty() && (prefix.len() > PREFIX_BYTES_MAX || prefix.split('/').any(strange)) {
            let fix = format!(
                "use at most {PREFIX_BYTES_MAX} bytes without a slash at either end, such as \"kvd\" or \"team/kvd\""
            );
            return Err(Error::invalid("s3.prefix", format!("{prefix:?} is not a prefix"), fix));
        }
        Ok(())
    }
}

fn check_bucket(bucket: &str) -> Result<(), Error> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if (3..=63).contains(&bucket.len()) && bucket.bytes().all(fine) {
        return Ok(());
    }
    let fix = "write its name alone, 3 to 63 letters, digits, '-', '_' and '.'; where it is goes to s3.endpoint, what is below to s3.prefix";
    Err(Error::invalid("s3.bucket", format!("{bucket:?} is not a bucket's name"), fix))
}

fn certificates(file: &Path) -> Result<Vec<u8>, Error> {
    read("s3.ca_file", file, CA_FILE_BYTES_MAX).map(|(bytes, _)| bytes)
}

/// Nothing of what the file says is in an error.
fn access_keys(file: &Path) -> Result<(String, String), Error> {
    let key = "s3.keys_file";
    let (bytes, mode) = read(key, file, KEYS_FILE_BYTES_MAX)?;
    let shown = file.display();
    if mode & 0o077 != 0 {
        let message = format!("{shown} may be read or written by others (mode {:o})", mode & 0o777);
        return Err(Error::invalid(key, message, format!("chmod 600 {shown}")));
    }
    let text = String::from_utf8(bytes).unwrap_or_default();
    let mut lines = text.lines().map(str::trim);
    let mut line = || lines.next().filter(|line| !line.is_empty() && !line.contains(char::is_whitespace));
    match (line(), line()) {
        (Some(access), Some(secret)) => Ok((access.to_owned(), secret.to_owned())),
        _ => {
            let fix = "write the access key in the first line and the secret in the second, nothing else";
            Err(Error::invalid(key, format!("{shown} has no access key and secret"), fix))
        }
    }
}

/// A file's bytes and mode.
fn read(key: &str, file: &Path, bytes_max: u64) -> Result<(Vec<u8>, u32), Error> {
    let refused = |why: String| {
        let fix = format!("name a file that this user may read, of at most {}", human(bytes_max));
        Error::invalid(key, format!("{}: {why}", file.display()), fix)
    };
    let found = std::fs::metadata(file).map_err(|error| refused(error.to_string()))?;
    // A pipe or device might never end.
    if !found.is_file() || found.len() > bytes_max {
        return Err(refused(format!("no file, or {} bytes", found.len())));
    }
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(file).map_err(|error| refused(error.to_string()))?;
    opened.take(bytes_max).read_to_end(&mut bytes).map_err(|error| refused(error.to_string()))?;
    Ok((bytes, found.mode()))
}

fn path_style(_: &Machine, values: &Values) -> Found {
    match values.text("s3.endpoint") {
        "" => fixed(false, "as AWS wants it"),
        _ => fixed(true, "s3.endpoint is not AWS's, and few other servers have a name for each bucket"),
    }
}

fn buffer(_: &Machine, values: &Values) -> Found {
    let eighth = values.bytes("dram.capacity_bytes") / 8;
    let objects = values.bytes("s3.object_bytes").saturating_mul(2);
    let why = "one eighth of dram.capacity_bytes, at most 256MiB and at least two objects";
    (integer(eighth.min(BUFFER_DEFAULT_BYTES_MAX).max(objects)), why.into())
}

fn threads(machine: &Machine, _: &Values) -> Found {
    let threads = (machine.cores / 4).clamp(1, 8);
    fixed(i64::from(threads), &format!("a quarter of {} cores, at most 8", machine.cores))
}

fn index_blocks() -> Found {
    let blocks: u32 = 10_000_000;
    let bytes = u64::from(blocks) * INDEX_BYTES_PER_BLOCK;
    fixed(blocks, &format!("{} at {INDEX_BYTES_PER_BLOCK} bytes a block", human(bytes)))
}

fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(deserializer)?;
    Ok(if text.is_empty() { None } else { Some(text) })
}
