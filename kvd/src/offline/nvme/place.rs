//! Which file or device, cut into segments of which size, with which catalog beside it.
//!
//! Invariants: the machine's defaults are asked only where neither a path nor a configuration was given; a segment size that
//! nobody named is the one that the most segments of the file say.
//! Leaves to others: opening and locking it (`Tier`), what its segments hold.

use crate::config::{
    Config, SEGMENT_ALIGN_BYTES, SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN, human_size, parse_size,
};
use clap::Args;
use kvd_proto::Error;
use kvd_tiers::segment_header::{PAGE_BYTES, SegmentHeader};
use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// Segments that are asked whether a size is theirs.
const SEGMENTS_ASKED: u64 = 16;

#[derive(Debug, Args)]
pub(super) struct Which {
    /// The kvd.toml of the daemon that uses it; without --path and this, the machine's defaults.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The file or device, if not nvme.path of the configuration.
    #[arg(long, value_name = "FILE")]
    path: Option<PathBuf>,
    /// Size of its segments ("256MiB"); else nvme.segment_bytes, or of another file what its segments say.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    segment_bytes: Option<u64>,
    /// Only blocks of spaces whose fingerprint begins with this.
    #[arg(long, value_name = "PREFIX", value_parser = hex)]
    pub(super) space: Option<String>,
}

/// Where a tier is.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) path: PathBuf,
    pub(super) segment_bytes: u64,
    /// If a configuration says which it is.
    pub(super) catalog: Option<PathBuf>,
}

impl Which {
    pub(super) fn place(&self) -> Result<Place, Error> {
        let config = match (&self.config, &self.path) {
            (None, Some(_)) => None,
            (config, _) => Some(Config::load(config.as_deref())?),
        };
        let configured = config.as_ref().and_then(|config| config.nvme.path.as_ref());
        let path = self.path.as_ref().or(configured).ok_or_else(|| {
            Error::invalid("nvme.path", "no NVMe tier is configured", "name its file with --path")
        })?;
        let config = config.as_ref().filter(|_| same(configured, path));
        let given = self.segment_bytes.or(config.map(|config| config.nvme.segment_bytes));
        Ok(Place {
            segment_bytes: given.map_or_else(|| found(path), Ok)?,
            catalog: config.map(|config| config.data_dir.join("catalog")),
            path: path.clone(),
        })
    }
}

impl Place {
    /// A file has whole segments. Cut off, or of another segment size, it is refused with what would do.
    pub(super) fn check(&self) -> Result<(), Error> {
        let Ok(file) = std::fs::metadata(&self.path) else { return Ok(()) }; // opening it says why
        let (bytes, size, shown) = (file.len(), self.segment_bytes, self.path.display());
        if !file.is_file() || bytes.is_multiple_of(size) {
            return Ok(());
        }
        let fix = self.hint().unwrap_or_else(|| {
            format!("give the size it was made with (--segment-bytes), or make whole segments of a file that was cut off (`truncate -s %{size}`)")
        });
        let text =
            format!("the {bytes} bytes of {shown} are no whole number of segments of {}", human_size(size));
        Err(Error::invalid("segment_bytes", text, fix))
    }

    /// No segment is here.
    pub(super) fn no_tier(&self) -> Error {
        let (shown, size) = (self.path.display(), human_size(self.segment_bytes));
        let fix = self.hint().unwrap_or_else(|| "name the right file".to_owned());
        Error::invalid("path", format!("{shown} holds no segment of {size}"), fix)
    }

    /// The segment size that the file speaks of, in words, where it is another.
    fn hint(&self) -> Option<String> {
        let file = File::open(&self.path).ok()?;
        let bytes = (&file).seek(SeekFrom::End(0)).ok()?;
        let size = likely(&file, bytes).filter(|size| *size != self.segment_bytes)?;
        Some(format!("it was made with segments of {} (--segment-bytes {size})", human_size(size)))
    }
}

fn same(configured: Option<&PathBuf>, path: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    configured.is_some_and(|configured| real(configured) == real(path))
}

/// As clap wants it.
fn size(text: &str) -> Result<u64, String> {
    let size = parse_size(text).ok_or("write bytes as an integer, or \"256MiB\"")?;
    let fits = size.is_multiple_of(PAGE_BYTES as u64) && (1..=SEGMENT_BYTES_MAX).contains(&size);
    fits.then_some(size).ok_or_else(|| format!("segments are whole pages, at most {SEGMENT_BYTES_MAX} bytes"))
}

fn hex(text: &str) -> Result<String, String> {
    let fits = (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    fits.then(|| text.to_ascii_lowercase()).ok_or_else(|| "write 1 to 64 hex digits".to_owned())
}

fn found(path: &Path) -> Result<u64, Error> {
    let shown = path.display();
    let refused = |error: std::io::Error| {
        Error::invalid("path", format!("{shown}: {error}"), "name a file or device that this user may read")
    };
    let file = File::open(path).map_err(refused)?;
    let bytes = (&file).seek(SeekFrom::End(0)).map_err(refused)?;
    if bytes == 0 {
        return Ok(SEGMENT_BYTES_MIN); // of nothing
    }
    likely(&file, bytes).ok_or_else(|| {
        let fix = "name the right file, or the size it was made with (--segment-bytes)";
        Error::invalid("path", format!("{shown} does not look like a tier of kvd's"), fix)
    })
}

/// The size that the most of the first segments agree with.
fn likely(file: &File, bytes: u64) -> Option<u64> {
    let step = SEGMENT_ALIGN_BYTES;
    let sizes = (SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).step_by(step as usize);
    let votes = |size: u64| {
        let segments = (bytes / size).min(SEGMENTS_ASKED) as u32;
        (0..segments).filter(|segment| is_segment(file, *segment, size)).count()
    };
    let counted = sizes.map(|size| (votes(size), size)).filter(|(votes, _)| *votes > 0);
    counted.max_by_key(|(votes, size)| (*votes, std::cmp::Reverse(*size))).map(|(_, size)| size)
}

fn is_segment(file: &File, segment: u32, size: u64) -> bool {
    let mut page = [0; PAGE_BYTES];
    file.read_exact_at(&mut page, u64::from(segment) * size).is_ok()
        && SegmentHeader::decode(&page, size).is_some_and(|header| header.segment == segment)
}
