//! A bucket as two nodes of a cluster left it, ways to spoil it, and what `kvd` says of it.

use super::rig::{self, Rig, soon};
use super::server::BUCKET;
use kvd_tiers::s3::manifest::{Entry, Manifest};
use kvd_tiers::s3::name::ManifestKey;
use kvd_tiers::s3::pack::PackLimits;
use kvd_tiers::s3::{Added, Packer};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

/// Of four blocks each: node one's two manifests name two each, node two's names one.
const OBJECTS: usize = 6;
/// The one that nobody names.
pub(super) const ORPHAN: usize = 5;
const OBJECT_BLOCKS: usize = 4;

pub(super) struct Left {
    pub(super) rig: Rig,
    objects: Vec<Added>,
    /// The key of node two's manifest.
    pub(super) cut: String,
    folder: tempfile::TempDir,
}

/// What a command said, row by row.
pub(super) struct Said {
    pub(super) code: i32,
    pub(super) rows: Vec<Value>,
    pub(super) errors: String,
}

impl Left {
    pub(super) async fn behind() -> Self {
        let rig = Rig::start(7).await;
        let objects = put_objects(&rig, rig::TENANT, OBJECTS).await;
        put_manifest(&rig, rig::TENANT, ("one", 0), &objects[..2]).await;
        put_manifest(&rig, rig::TENANT, ("one", 1), &objects[2..4]).await;
        let cut = put_manifest(&rig, rig::TENANT, ("two", 0), &objects[4..5]).await;
        let others = put_objects(&rig, "other", 1).await;
        put_manifest(&rig, "other", ("one", 0), &others).await;
        for foreign in ["kvd/notes", "kvd/not.a.tenant/x"] {
            rig.bucket.put_if_absent(foreign, &[rig::content(9, 0)], soon()).await.unwrap();
        }
        let left = Self { rig, objects, cut, folder: tempfile::tempdir().unwrap() };
        left.write_keys("AKEY\nASECRET\n");
        left.write_config();
        left
    }

    fn write_config(&self) {
        let folder = self.folder.path().display();
        let text = format!(
            "data_dir = \"{folder}\"\n[dram]\ncapacity_bytes = \"16MiB\"\nhuge_pages = \"off\"\nlock = \"off\"\n\
             [nvme]\npath = \"\"\n[s3]\nbucket = \"{BUCKET}\"\nendpoint = \"{}\"\nkeys_file = \"{folder}/keys\"\ntries_max = 10\n",
            self.rig.proxy.endpoint()
        );
        std::fs::write(self.config(), text).unwrap();
    }

    fn config(&self) -> PathBuf {
        self.folder.path().join("kvd.toml")
    }

    pub(super) fn write_keys(&self, text: &str) {
        let path = self.folder.path().join("keys");
        let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path).unwrap();
        file.write_all_at(text.as_bytes(), 0).unwrap();
    }

    /// Not on this thread, which serves the proxy.
    async fn run(&self, words: &[&str]) -> std::process::Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvd"));
        command.args(words).arg("--config").arg(self.config()).stdin(Stdio::null());
        tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap()
    }

    pub(super) async fn kvd(&self, words: &[&str]) -> Said {
        let output = self.run(&[words, &["--output", "json"]].concat()).await;
        let text = String::from_utf8(output.stdout).unwrap();
        Said {
            code: output.status.code().unwrap(),
            rows: text.lines().map(|line| serde_json::from_str(line).unwrap()).collect(),
            errors: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// As people see it.
    pub(super) async fn text(&self, words: &[&str]) -> String {
        String::from_utf8(self.run(words).await.stdout).unwrap()
    }

    /// What `kvd check` says of the bucket.
    pub(super) async fn check(&self) -> String {
        let text = self.text(&["check"]).await;
        let from = text.lines().position(|line| line.contains(" s3 ")).expect("a line of the bucket");
        let lines: Vec<_> = text.lines().collect();
        let more = lines[from + 1..].iter().take_while(|line| line.starts_with("    ")).count();
        lines[from..=from + more].join("\n")
    }

    /// Keys of objects, sorted.
    pub(super) fn keys(&self, objects: &[usize]) -> Vec<String> {
        sorted(objects.iter().map(|&number| self.key(number)).collect())
    }

    fn key(&self, number: usize) -> String {
        self.objects[number].object.key("kvd", rig::TENANT)
    }

    fn file(&self, key: &str) -> File {
        File::options().read(true).write(true).open(self.bucket().join(key)).unwrap()
    }

    fn object(&self, number: usize) -> File {
        self.file(&self.key(number))
    }

    fn bucket(&self) -> PathBuf {
        self.rig.server.folder().join(BUCKET)
    }

    /// Every key and what is under it.
    pub(super) fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        collect(&self.bucket(), &self.bucket(), &mut files);
        files
    }

    pub(super) fn truncate(&self, number: usize) {
        let object = self.object(number);
        object.set_len(object.metadata().unwrap().len() - 1000).unwrap();
    }

    /// A bit of a payload.
    pub(super) fn flip(&self, number: usize) {
        let (object, at, mut byte) = (self.object(number), 3 * rig::SLOT as u64 - 1, [0]);
        object.read_exact_at(&mut byte, at).unwrap();
        object.write_all_at(&[byte[0] ^ 4], at).unwrap();
    }

    /// One object's bytes, where another's should be.
    pub(super) fn put_under_another_key(&self, from: usize, to: usize) {
        let bytes = std::fs::read(self.bucket().join(self.key(from))).unwrap();
        std::fs::write(self.bucket().join(self.key(to)), bytes).unwrap();
    }

    pub(super) fn cut_manifest(&self) {
        let manifest = self.file(&self.cut);
        manifest.set_len(manifest.metadata().unwrap().len() / 2).unwrap();
    }

    /// As another version would write it, checksum and all.
    pub(super) fn set_manifest_version(&self, major: u16) {
        let mut bytes = std::fs::read(self.bucket().join(&self.cut)).unwrap();
        bytes[8..10].copy_from_slice(&major.to_le_bytes());
        let checksum = crc32fast::hash(&bytes[8..]).to_le_bytes();
        bytes[4..8].copy_from_slice(&checksum);
        self.file(&self.cut).write_all_at(&bytes, 0).unwrap();
    }

    /// As if it was written so long ago.
    pub(super) fn age(&self, number: usize, by: Duration) {
        self.object(number).set_modified(SystemTime::now() - by).unwrap();
    }
}

impl Said {
    pub(super) fn of(&self, kind: &str) -> Vec<&Value> {
        self.rows.iter().filter(|row| row["kind"] == kind).collect()
    }

    pub(super) fn summary(&self) -> &Value {
        let last = self.rows.last().unwrap_or_else(|| panic!("nothing was said: {}", self.errors));
        assert_eq!(last["kind"], "summary", "{}", self.errors);
        last
    }

    /// What rows of this kind are about, sorted.
    pub(super) fn keys(&self, kind: &str) -> Vec<String> {
        sorted(self.of(kind).iter().map(|row| row["key"].as_str().unwrap().to_owned()).collect())
    }

    #[track_caller]
    pub(super) fn is_well(&self) {
        assert_eq!((self.code, self.of("bad")), (0, vec![]), "{}", self.errors);
    }
}

pub(super) fn sorted(mut keys: Vec<String>) -> Vec<String> {
    keys.sort();
    keys
}

async fn put_objects(rig: &Rig, tenant: &str, objects: usize) -> Vec<Added> {
    let bytes = (OBJECT_BLOCKS * rig::SLOT) as u64;
    let mut packer = Packer::new(PackLimits { object_bytes: bytes, pack_bytes_max: bytes });
    let blocks = 0..objects * OBJECT_BLOCKS;
    let sealed: Vec<_> = blocks.flat_map(|number| packer.add(tenant, rig::block(number), 0)).collect();
    assert_eq!(sealed.len(), objects);
    for sealed in &sealed {
        let key = sealed.added.object.key("kvd", tenant);
        rig.bucket.put_if_absent(&key, &sealed.pieces, soon()).await.unwrap();
    }
    sealed.into_iter().map(|sealed| sealed.added).collect()
}

/// Its key.
async fn put_manifest(rig: &Rig, tenant: &str, (node, sequence): (&str, u32), objects: &[Added]) -> String {
    let key = ManifestKey { tenant: tenant.to_owned(), node: node.to_owned(), write_epoch: 3, sequence };
    let entries = objects.iter().cloned().map(Entry::Added).collect();
    let bytes = Manifest { key: key.clone(), replaces_before: (0, 0), entries }.encode();
    rig.bucket.put_if_absent(&key.key("kvd"), &[bytes.into()], soon()).await.unwrap();
    key.key("kvd")
}

fn collect(bucket: &Path, folder: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(bucket, &path, files);
        } else {
            let key = path.strip_prefix(bucket).unwrap().to_str().unwrap().to_owned();
            files.insert(key, std::fs::read(&path).unwrap());
        }
    }
}
