//! Revision: the digest of a model's or an adapter's folder, so that blocks of other weights are never taken for its own.
//!
//! Owns which files say what a model computes, and how much of them is read. Invariants: reading is bounded whatever the folder
//! holds; up to `WHOLE_BYTES_MAX` of weights every byte counts, beyond that what the module's functions say.
//! Leaves to others: what a revision is part of (`proto::space`), the bytes that are hashed (FORMAT.md section 9).

use kvd_proto::Error;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

/// Weights of a folder, together, that are read whole; of more, samples are.
pub const WHOLE_BYTES_MAX: u64 = 64 << 20;
/// One sample.
const WINDOW_BYTES: u64 = 4 << 10;
/// Samples of one file, spread evenly between the first and the last, which come on top.
const WINDOWS: u64 = 64;
/// Of one configuration file. At the limit: `Limit`.
const CONFIG_BYTES_MAX: u64 = 16 << 20;
/// Of a safetensors header; the format's own limit. At the limit: `Invalid`, as it is none.
const HEADER_BYTES_MAX: u64 = 100 << 20;
/// Entries of a folder. At the limit: `Limit`.
const ENTRIES_MAX: usize = 4096;

const WORDS_CONTEXT: &str = "kvd 2026-11-21 revision with words v1";

/// What makes a folder a model's, or an adapter's.
struct Kind {
    context: &'static str,
    config: &'static str,
    /// Hashed where they are there: quantisation that is configured in a file of its own.
    beside: &'static [&'static str],
    weights_begin: &'static str,
    weights: &'static str,
}

const MODEL: Kind = Kind {
    context: "kvd 2026-11-21 model revision v1",
    config: "config.json",
    beside: &[
        "hf_quant_config.json",
        "quant_config.json",
        "quantization_config.json",
        "quantize_config.json",
    ],
    weights_begin: "",
    weights: "*.safetensors, *.bin or *.pt",
};

const ADAPTER: Kind = Kind {
    context: "kvd 2026-11-21 adapter revision v1",
    config: "adapter_config.json",
    beside: &[],
    weights_begin: "adapter_model.",
    weights: "adapter_model.safetensors, .bin or .pt",
};

/// The revision of the model in `folder`: of `config.json`, of the quantisation's own file where there is one, and of every
/// `*.safetensors`, `*.bin` and `*.pt` there (not below it): name, length, header and content.
///
/// Up to `WHOLE_BYTES_MAX` of weights, all files together, every byte counts. Of larger ones 66 windows of 4 KiB a file are read:
/// the first, the last and 64 spread evenly. **That misses a change which touches other bytes only**, say a few rows of one
/// matrix edited in place; training, merging, quantising and pruning change numbers everywhere. Who edits weights by hand
/// gives the space another revision by hand.
///
/// It waits for the disk: milliseconds where the folder is cached, not for a thread that serves others.
pub fn of_model(folder: &Path) -> Result<[u8; 32], Error> {
    digest(folder, &MODEL)
}

/// As `of_model`, of the adapter in `folder`: `adapter_config.json` and `adapter_model.*`. Few are larger than
/// `WHOLE_BYTES_MAX`. What it gives goes into the root of a prompt's chain.
pub fn of_adapter(folder: &Path) -> Result<[u8; 32], Error> {
    digest(folder, &ADAPTER)
}

/// A revision to which more belongs than its folder: a draft model's digest, how weights are loaded. Without words it is itself.
pub fn with_words<W: AsRef<[u8]>>(revision: [u8; 32], words: &[W]) -> [u8; 32] {
    if words.is_empty() {
        return revision;
    }
    let mut hasher = blake3::Hasher::new_derive_key(WORDS_CONTEXT);
    hasher.update(&revision);
    for word in words.iter().map(AsRef::as_ref) {
        hasher.update(&(word.len() as u32).to_le_bytes());
        hasher.update(word);
    }
    *hasher.finalize().as_bytes()
}

/// A revision of words alone; with none it is one, too.
pub fn of_words<W: AsRef<[u8]>>(words: &[W]) -> [u8; 32] {
    let all: Vec<&[u8]> = std::iter::once(&b"words"[..]).chain(words.iter().map(AsRef::as_ref)).collect();
    with_words([0; 32], &all)
}

fn digest(folder: &Path, kind: &Kind) -> Result<[u8; 32], Error> {
    let entries = entries(folder)?;
    let named = |name: &str| entries.iter().find(|entry| entry.name == name);
    let config = named(kind.config).ok_or_else(|| missing(folder, kind.config))?;
    let weights: Vec<_> = entries.iter().filter(|entry| entry.is_weights(kind)).collect();
    if weights.is_empty() {
        return Err(missing(folder, kind.weights));
    }
    let mut hasher = blake3::Hasher::new_derive_key(kind.context);
    for entry in std::iter::once(config).chain(kind.beside.iter().filter_map(|name| named(name))) {
        add_config(&mut hasher, entry)?;
    }
    let whole = weights.iter().map(|entry| entry.bytes).sum::<u64>() <= WHOLE_BYTES_MAX;
    hasher.update(&if whole { 1u32 } else { 2 }.to_le_bytes());
    for entry in weights {
        add_weights(&mut hasher, entry, whole).map_err(|error| unreadable(&entry.path, &error))?;
    }
    Ok(*hasher.finalize().as_bytes())
}

/// A regular file; links are followed, as model caches are made of them.
struct Entry {
    name: String,
    path: PathBuf,
    bytes: u64,
}

impl Entry {
    fn is_weights(&self, kind: &Kind) -> bool {
        let known = [".safetensors", ".bin", ".pt"].iter().any(|end| self.name.ends_with(end));
        known && self.name.starts_with(kind.weights_begin)
    }
}

/// The folder's files by name.
fn entries(folder: &Path) -> Result<Vec<Entry>, Error> {
    let mut entries = Vec::new();
    let listed = std::fs::read_dir(folder).map_err(|error| unreadable(folder, &error))?;
    for (count, listed) in listed.enumerate() {
        if count >= ENTRIES_MAX {
            let message = format!("more than {ENTRIES_MAX} entries in {}", folder.display());
            return Err(Error::limit("folder", message, "give the folder of one model alone"));
        }
        let listed = listed.map_err(|error| unreadable(folder, &error))?;
        let (name, path) = (listed.file_name().to_string_lossy().into_owned(), listed.path());
        let Ok(about) = std::fs::metadata(&path) else { continue }; // a link to nothing
        if about.is_file() {
            entries.push(Entry { name, path, bytes: about.len() });
        }
    }
    entries.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(entries)
}

fn add_config(hasher: &mut blake3::Hasher, entry: &Entry) -> Result<(), Error> {
    if entry.bytes > CONFIG_BYTES_MAX {
        let message = format!("{} has {} bytes", entry.path.display(), entry.bytes);
        return Err(Error::limit(
            "folder",
            message,
            format!("a configuration has at most {CONFIG_BYTES_MAX}"),
        ));
    }
    add_name(hasher, entry);
    let added = File::open(&entry.path).and_then(|mut file| add_range(hasher, &mut file, 0, entry.bytes));
    added.map_err(|error| unreadable(&entry.path, &error))
}

fn add_name(hasher: &mut blake3::Hasher, entry: &Entry) {
    hasher.update(&(entry.name.len() as u32).to_le_bytes());
    hasher.update(entry.name.as_bytes());
    hasher.update(&entry.bytes.to_le_bytes());
}

/// Name, length, header and content: all of it, or samples.
fn add_weights(hasher: &mut blake3::Hasher, entry: &Entry, whole: bool) -> std::io::Result<()> {
    add_name(hasher, entry);
    let mut file = File::open(&entry.path)?;
    let content = if entry.name.ends_with(".safetensors") { header_end(&mut file, entry.bytes)? } else { 0 };
    add_range(hasher, &mut file, 0, content)?;
    if whole {
        return add_range(hasher, &mut file, content, entry.bytes);
    }
    for start in windows(entry.bytes - content) {
        let start = content + start;
        add_range(hasher, &mut file, start, entry.bytes.min(start + WINDOW_BYTES))?;
    }
    Ok(())
}

/// Where a safetensors file's JSON ends, which names every tensor, its type and its shape.
fn header_end(file: &mut File, bytes: u64) -> std::io::Result<u64> {
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let end = u64::from_le_bytes(length).checked_add(8);
    end.filter(|end| *end <= bytes && *end <= HEADER_BYTES_MAX).ok_or_else(|| {
        std::io::Error::new(std::io::ErrorKind::InvalidData, "it is no whole safetensors file")
    })
}

/// Where the samples of so many bytes begin: the first, the last, and those between.
fn windows(bytes: u64) -> impl Iterator<Item = u64> {
    let last = bytes.saturating_sub(WINDOW_BYTES);
    (0..WINDOWS + 2).map(move |at| (u128::from(last) * u128::from(at) / u128::from(WINDOWS + 1)) as u64)
}

/// Hashes exactly these bytes; a file that has become shorter is an error.
fn add_range(hasher: &mut blake3::Hasher, file: &mut File, start: u64, end: u64) -> std::io::Result<()> {
    file.seek(SeekFrom::Start(start))?;
    let added = std::io::copy(&mut file.take(end - start), hasher)?;
    if added < end - start {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

fn missing(folder: &Path, what: &str) -> Error {
    let message = format!("{} has no {what}", folder.display());
    Error::invalid("folder", message, "give the folder that the engine loads")
}

fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    let message = format!("{}: {error}", path.display());
    Error::invalid("folder", message, "give a folder that is whole and that this process may read")
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvd_proto::Code;
    use std::os::unix::fs::FileExt as _;
    use tempfile::TempDir;

    const HEADER: &str = r#"{"a":{"dtype":"U8","shape":[600000],"data_offsets":[0,600000]}}"#;

    fn safetensors(header: &str, content: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), content].concat()
    }

    /// A model of one shard, of more bytes than are in its samples.
    fn model() -> Vec<(&'static str, Vec<u8>)> {
        let content: Vec<u8> = (0..600_000u32).map(|at| (at % 251) as u8).collect();
        vec![
            ("config.json", br#"{"rope_theta":10000}"#.to_vec()),
            ("model-00001-of-00001.safetensors", safetensors(HEADER, &content)),
        ]
    }

    fn folder(files: &[(&str, Vec<u8>)]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, bytes)| std::fs::write(folder.path().join(name), bytes).unwrap());
        folder
    }

    fn revision(files: &[(&str, Vec<u8>)]) -> [u8; 32] {
        of_model(folder(files).path()).unwrap()
    }

    #[test]
    fn only_what_the_model_is_made_of_counts() {
        let mut more = model();
        more.reverse();
        more.push(("README.md", b"about".to_vec()));
        more.push(("tokenizer.json", b"{}".to_vec()));
        assert_eq!(revision(&model()), revision(&more));
    }

    /// As FORMAT.md has it.
    #[test]
    fn it_is_what_the_format_says() {
        let files = model();
        let named = |(name, bytes): &(&str, Vec<u8>)| {
            let name_bytes = (name.len() as u32).to_le_bytes();
            [&name_bytes, name.as_bytes(), &(bytes.len() as u64).to_le_bytes()].concat()
        };
        let material = [&named(&files[0])[..], &files[0].1, &[1, 0, 0, 0], &named(&files[1]), &files[1].1];
        let expected = blake3::derive_key("kvd 2026-11-21 model revision v1", &material.concat());
        assert_eq!(revision(&files), expected);
    }

    #[test]
    fn every_byte_of_a_small_model_counts_and_so_does_all_that_is_said_about_it() {
        let of_weights = |change: fn(&mut Vec<u8>)| {
            let mut changed = model();
            change(&mut changed[1].1);
            revision(&changed)
        };
        let renamed = HEADER.replace("\"a\"", "\"b\"").into_bytes();
        let other_type = HEADER.replace("U8", "I8");
        let mut config = model();
        config[0].1 = br#"{"rope_theta":50000}"#.to_vec();
        let mut shard = model();
        shard[1].0 = "model.safetensors";
        let mut quantised = model();
        quantised.push(("quantize_config.json", br#"{"bits":4}"#.to_vec()));
        let mut more = model();
        more.push(("extra.pt", vec![1]));
        let mut header = model();
        header[1].1 = safetensors(&other_type, &model()[1].1[8 + HEADER.len()..]);
        let mut all = vec![
            revision(&model()),
            of_weights(|bytes| bytes[300_001] ^= 1),
            of_weights(|bytes| *bytes.last_mut().unwrap() ^= 1),
            of_weights(|bytes| bytes.push(0)),
            revision(&config),
            revision(&shard),
            revision(&quantised),
            revision(&more),
            revision(&header),
        ];
        let mut tensor = model();
        tensor[1].1[8..8 + renamed.len()].copy_from_slice(&renamed);
        all.push(revision(&tensor));
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    /// The stated limit, from both sides.
    #[test]
    fn of_a_large_model_the_samples_count() {
        let folder = folder(&model()[..1]);
        let file = File::create(folder.path().join("pytorch_model.bin")).unwrap();
        let bytes = WHOLE_BYTES_MAX * 2;
        file.set_len(bytes).unwrap(); // sparse
        let mut changed = |at: u64| {
            let before = of_model(folder.path()).unwrap();
            file.write_all_at(&[1], at).unwrap();
            of_model(folder.path()).unwrap() != before
        };
        assert!(
            [0, WINDOW_BYTES - 1, bytes - 1, bytes - WINDOW_BYTES].map(&mut changed).iter().all(|it| *it)
        );
        let between: Vec<u64> = windows(bytes).collect();
        assert_eq!(between.len() as u64, WINDOWS + 2);
        assert!(changed(between[30] + 17));
        assert!(!changed(between[30] + WINDOW_BYTES), "not sampled");
        file.set_len(bytes + 1).unwrap();
        assert_eq!(windows(100).max(), Some(0), "what is shorter than a sample is one");
    }

    #[test]
    fn what_is_no_model_is_refused_by_name() {
        let refused = |files: &[(&str, Vec<u8>)]| {
            let error = of_model(folder(files).path()).unwrap_err();
            assert_eq!((error.code, error.field.as_str()), (Code::Invalid, "folder"));
            error.message
        };
        assert!(refused(&model()[..1]).ends_with("has no *.safetensors, *.bin or *.pt"));
        assert!(refused(&model()[1..]).ends_with("has no config.json"));
        let with = |bytes: Vec<u8>| [model()[0].clone(), ("model.safetensors", bytes)];
        assert!(refused(&with(vec![1, 2, 3])).contains("model.safetensors"));
        assert!(refused(&with(u64::MAX.to_le_bytes().to_vec())).ends_with("no whole safetensors file"));
        assert!(
            refused(&with(safetensors(HEADER, b"")[..20].to_vec())).ends_with("no whole safetensors file")
        );
        assert_eq!(of_model(Path::new("/nonexistent")).unwrap_err().code, Code::Invalid);
        let folder = folder(&model());
        std::fs::remove_file(folder.path().join("config.json")).unwrap();
        std::fs::create_dir(folder.path().join("config.json")).unwrap();
        assert_eq!(of_model(folder.path()).unwrap_err().code, Code::Invalid, "a folder is no file");
    }

    #[test]
    fn words_are_part_of_a_revision_each_for_itself() {
        let words = |words: &[&str]| with_words([7; 32], words);
        assert_eq!(words(&[]), [7; 32]);
        let all = [words(&[]), words(&[""]), words(&["ab"]), words(&["a", "b"]), words(&["b", "a"])];
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
        let material = [&[7; 32][..], &[2, 0, 0, 0], b"ab"].concat();
        assert_eq!(words(&["ab"]), blake3::derive_key(WORDS_CONTEXT, &material));
    }

    #[test]
    fn an_adapter_is_its_two_files() {
        let files = [
            ("adapter_config.json", b"{}".to_vec()),
            ("adapter_model.safetensors", safetensors("{}", &[7; 9])),
        ];
        let (mut beside, mut changed) = (files.to_vec(), files.to_vec());
        beside.push(("training_args.bin", vec![1]));
        changed[1].1[10] ^= 1;
        let of = |files: &[(&str, Vec<u8>)]| of_adapter(folder(files).path());
        assert_eq!(of(&files), of(&beside));
        assert_ne!(of(&files), of(&changed));
        assert!(of(&files[..1]).unwrap_err().message.contains("adapter_model.safetensors"));
        assert_eq!(of(&model()).unwrap_err().code, Code::Invalid);
    }
}
