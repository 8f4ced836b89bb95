//! Objects of a bucket that are damaged behind the back of the daemons that read them.
//!
//! Owns objects that a real daemon wrote, and what must hold after each damage: what was damaged is a miss that is counted, blocks of other
//! objects are right. A damaged object is forgotten as a whole, so it is damaged in one way at a time. Older bytes are another object's.

use crate::bucket_server::{BUCKET, Server};
use crate::daemon::{Daemon, MIB, Setup};
use crate::device::Named;
use crate::engines::{Engines, Name, SLOT_BYTES};
use crate::kind::{Image, Kind, Object, draw};
use crate::tally::{Found, Tally};
use crate::wait::{DEADLINE, until};
use kvd_client::Tier;
use kvd_proto::slot_header::stride_bytes;
use kvd_tiers::media::fault::splitmix64;
use kvd_tiers::s3::footer::TRAILER_BYTES;
use kvd_tiers::s3::{Footer, Trailer};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Objects looked at for one that a kind can befall.
const TRIES: usize = 40;
/// Blocks of whole objects that are looked at in each round, too.
const WHOLE_LOOKED: usize = 40;
const KINDS: [Kind; 9] = [
    Kind::BitFlip,
    Kind::Burst,
    Kind::HeaderFlip,
    Kind::ZeroedPage,
    Kind::SwappedPayloads,
    Kind::SwappedSlots,
    Kind::OlderPayload,
    Kind::OlderSlot,
    Kind::OtherTenant,
];

/// A bucket as a daemon left it.
struct Base {
    server: Server,
    /// All objects, one after the other.
    bytes: Vec<u8>,
    older: Vec<u8>,
    files: Vec<(PathBuf, Range<usize>)>,
    slots: Vec<Object>,
    /// Of each slot.
    named: Vec<Name>,
    /// Of each slot, among `files`.
    file: Vec<usize>,
}

impl Base {
    async fn new() -> Self {
        let mut base = Self {
            server: Server::start().unwrap(),
            bytes: Vec::new(),
            older: Vec::new(),
            files: Vec::new(),
            slots: Vec::new(),
            named: Vec::new(),
            file: Vec::new(),
        };
        let names = base.fill().await;
        base.look_at_files(&names);
        base
    }

    fn setup(&self) -> Setup {
        let s3 = format!(
            "[s3]\nbucket = \"{BUCKET}\"\nendpoint = \"{}\"\nkeys_file = \"{}\"\npack_ms = 300\nlist_ms = 100\n\
             object_bytes = \"1MiB\"\nbuffer_bytes = \"8MiB\"\n[recompute]\ntoken_ns = 10000000\n",
            self.server.endpoint(),
            self.server.keys_file().unwrap().display(),
        );
        Setup { dram_bytes: 64 * MIB, s3, ..Setup::default() }
    }

    /// Two tenants' blocks, by what their headers name.
    async fn fill(&self) -> BTreeMap<Named, Name> {
        let mut daemon = Daemon::start(&self.setup()).await;
        let engines = Engines::open(&daemon.socket()).await;
        let all = [(0, 640), (1, 320), (2, 480)];
        for (space, most) in all {
            engines.fill(space, 0..most).await;
        }
        knows(&daemon, 1440).await;
        daemon.stop().await;
        let names = all.into_iter().flat_map(|(space, most)| (0..most).map(move |number| (space, number)));
        names.map(|name| (engines.named(name), name)).collect()
    }

    fn look_at_files(&mut self, names: &BTreeMap<Named, Name>) {
        for (tenant, folder) in [(0, "default"), (1, "other")] {
            let mut found = Vec::new();
            files_below(
                &self.server.folder().join(BUCKET).join("kvd").join(folder).join("objects"),
                &mut found,
            );
            for path in found {
                let bytes = std::fs::read(&path).unwrap();
                let start = self.bytes.len();
                for (named, slot) in slots(&bytes) {
                    let shift = |range: Range<usize>| start + range.start..start + range.end;
                    let (header, payload) = (shift(slot.header), shift(slot.payload));
                    self.slots.push(Object { tenant, header, payload });
                    self.named.push(names[&named]);
                    self.file.push(self.files.len());
                }
                self.files.push((path, start..start + bytes.len()));
                self.bytes.extend(bytes);
            }
        }
        assert_eq!(self.slots.len(), 1440, "every block is in the bucket once");
        self.older.clone_from(&self.bytes);
        for at in 0..self.files.len() {
            let [one, other] = [at, (at + 1) % self.files.len()].map(|at| self.files[at].1.clone());
            if one.len() == other.len() {
                self.older[one].copy_from_slice(&self.bytes[other]);
            }
        }
    }

    /// Every object damaged in one way, as far as kinds can befall it, and the rest of the last ones cut.
    async fn round(&self, mut draws: u64, tally: &mut Tally) {
        let (bytes, older) = (self.bytes.clone(), &self.older);
        let mut image = Image { bytes, older, objects: &self.slots, cut_bytes: 1 };
        let mut touched: BTreeSet<usize> = BTreeSet::new();
        let mut damages = Vec::new();
        for kind in KINDS.iter().cycle().take(self.files.len()) {
            for _ in 0..TRIES {
                let at = draw(&mut draws, self.slots.len() as u64) as usize;
                if touched.contains(&self.file[at]) {
                    continue;
                }
                let free = |other: usize| !touched.contains(&self.file[other]);
                let hit = image.damage(*kind, at, &free, &mut draws);
                if !hit.is_empty() {
                    touched.extend(hit.iter().map(|at| self.file[*at]));
                    damages.push((*kind, hit));
                    break;
                }
            }
        }
        let cut = (0..self.files.len()).find(|file| !touched.contains(file));
        let cut = cut.map(|file| (file, draw(&mut draws, self.files[file].1.len() as u64)));
        self.put(&image.bytes, cut);
        if let Some((file, _)) = cut {
            touched.insert(file);
            let last = self.file.iter().rposition(|of| *of == file).expect("an object has slots");
            damages.push((Kind::Truncated, vec![last]));
        }
        self.judge(&damages, &touched, &mut draws, tally).await;
    }

    async fn judge(
        &self,
        damages: &[(Kind, Vec<usize>)],
        touched: &BTreeSet<usize>,
        draws: &mut u64,
        tally: &mut Tally,
    ) {
        let mut daemon = Daemon::start(&self.setup()).await;
        let engines = Engines::open(&daemon.socket()).await;
        knows(&daemon, 1440).await;
        let mut refused = 0;
        for (kind, hit) in damages {
            tally.injected(*kind);
            for at in hit {
                let found = engines.find(self.named[*at]).await;
                refused += u64::from(found == Found::Refused);
                tally.found(*kind, found);
            }
        }
        let whole: Vec<_> = (0..self.slots.len()).filter(|at| !touched.contains(&self.file[*at])).collect();
        for _ in 0..if whole.is_empty() { 0 } else { WHOLE_LOOKED } {
            let at = whole[draw(draws, whole.len() as u64) as usize];
            let found = engines.find(self.named[at]).await;
            assert!(matches!(found, Found::Right | Found::AnotherCopy), "{:?}: {found:?}", self.named[at]);
        }
        let counters = daemon.status().await.counters.unwrap();
        assert_eq!(counters.s3_errors, refused, "{counters:?}");
        daemon.is_well().await;
    }

    /// All objects with these bytes; one of them cut.
    fn put(&self, bytes: &[u8], cut: Option<(usize, u64)>) {
        for (number, (path, range)) in self.files.iter().enumerate() {
            let most = cut.filter(|(file, _)| *file == number).map_or(range.len(), |(_, most)| most as usize);
            std::fs::write(path, &bytes[range.clone()][..most]).unwrap();
        }
    }
}

/// Where an object's slots are, and what they hold.
fn slots(bytes: &[u8]) -> Vec<(Named, Object)> {
    let trailer = Trailer::decode(bytes.last_chunk().expect("a trailer"), bytes.len() as u64).unwrap();
    let end = bytes.len() - TRAILER_BYTES;
    let footer = Footer::decode(&bytes[end - trailer.footer_bytes as usize..end]).unwrap();
    let stride = stride_bytes(usize::from(footer.parts));
    let headers = end - footer.slots.len() * stride;
    let slot = |(at, header): (usize, &kvd_proto::slot_header::SlotHeader)| {
        let payload = at * SLOT_BYTES..(at + 1) * SLOT_BYTES;
        let named = (header.fingerprint.0, header.id);
        (named, Object { tenant: 0, header: headers + at * stride..headers + (at + 1) * stride, payload })
    };
    footer.slots.iter().enumerate().map(slot).collect()
}

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = std::fs::read_dir(folder).unwrap().map(Result::unwrap).collect();
    entries.sort_by_key(std::fs::DirEntry::path);
    for entry in entries {
        if entry.file_type().unwrap().is_dir() {
            files_below(&entry.path(), found);
        } else {
            found.push(entry.path());
        }
    }
}

async fn knows(daemon: &Daemon, blocks: u64) {
    let all = async || (daemon.tier(Tier::S3).await.copies == blocks).then_some(());
    until("blocks in the bucket", DEADLINE, all).await;
}

/// Rounds until so many were damaged.
async fn rounds(damages: u64, mut draws: u64) {
    let (base, mut tally) = (Base::new().await, Tally::default());
    while tally.total() < damages {
        let seed = splitmix64(&mut draws);
        println!("seed {seed}");
        base.round(seed, &mut tally).await;
    }
    tally.check("objects in S3", &KINDS, |_| false);
}

#[tokio::test]
async fn damaged_objects_are_misses() {
    rounds(40, 7).await;
}

#[tokio::test]
#[ignore = "slow: 10,000 damages, some 250 starts of a daemon"]
async fn ten_thousand_damages_in_a_bucket_are_misses() {
    rounds(10_000, 8).await;
}
