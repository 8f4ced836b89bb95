//! An NVMe file that is damaged while no daemon looks, and under one that serves from it.
//!
//! Owns a file that a real daemon wrote, with slots used twice, and what must hold after each damage: what was damaged is right or a
//! miss that is counted, everything else is right.

use crate::daemon::{Daemon, MIB, Setup};
use crate::device::{Named, objects};
use crate::engines::{Engines, Name};
use crate::kind::{Image, Kind, Object, draw};
use crate::tally::{Found, Tally};
use kvd_tiers::media::fault::splitmix64;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

const SEGMENT_BYTES: u64 = 4 * MIB;
/// Blocks damaged at a time, of some 950.
const DAMAGED_TOGETHER: usize = 200;
/// Objects looked at for one that a kind can befall.
const TRIES: usize = 40;

const AT_REST: [Kind; 10] = [
    Kind::BitFlip,
    Kind::Burst,
    Kind::HeaderFlip,
    Kind::ZeroedPage,
    Kind::SwappedPayloads,
    Kind::SwappedSlots,
    Kind::OlderPayload,
    Kind::StaleHeaderPage,
    Kind::OlderSlot,
    Kind::OtherTenant,
];
/// A daemon that runs looks at no header again.
const SERVED: [Kind; 5] =
    [Kind::BitFlip, Kind::Burst, Kind::ZeroedPage, Kind::SwappedPayloads, Kind::OlderPayload];

/// A file as a daemon left it.
struct Base {
    daemon: Daemon,
    /// All that was ever stored.
    names: Vec<Name>,
    bytes: Vec<u8>,
    older: Vec<u8>,
    objects: Vec<Object>,
    /// Of each object.
    named: Vec<Name>,
    /// Which block was in its slot before, if another was.
    named_before: Vec<Option<Name>>,
}

/// What was done: a kind, and the objects that it changed.
type Damage = (Kind, Vec<usize>);

impl Base {
    /// Two tenants; then more of one, so that slots are used again.
    async fn new() -> Self {
        let setup = Setup {
            dram_bytes: 8 * MIB,
            segment_bytes: SEGMENT_BYTES,
            nvme_bytes: 32 * MIB,
            ..Setup::default()
        };
        let mut daemon = Daemon::start(&setup).await;
        let engines = Engines::open(&daemon.socket()).await;
        let ids = |name: &Name| (engines.named(*name), *name);
        engines.fill(0, 0..500).await;
        engines.fill(1, 0..300).await;
        again(&mut daemon).await;
        let later = Engines::open(&daemon.socket()).await;
        later.fill(2, 0..450).await;
        stop(&mut daemon).await;
        let older = std::fs::read(file_of(daemon.folder())).unwrap();
        daemon.start_again().await;
        let later = Engines::open(&daemon.socket()).await;
        later.fill(0, 500..1300).await;
        stop(&mut daemon).await;
        let bytes = std::fs::read(file_of(daemon.folder())).unwrap();
        copy_folder(&catalog_of(daemon.folder()), &daemon.folder().join("kept"));
        let all = [(0, 1300), (1, 300), (2, 450)];
        let names: Vec<Name> =
            all.into_iter().flat_map(|(space, most)| (0..most).map(move |number| (space, number))).collect();
        let by_id: BTreeMap<Named, Name> = names.iter().map(ids).collect();
        let found = objects(&bytes, SEGMENT_BYTES as usize);
        let named = found.iter().map(|(named, _)| by_id[named]).collect();
        let before = objects(&older, SEGMENT_BYTES as usize).into_iter();
        let before: BTreeMap<usize, Named> =
            before.map(|(named, object)| (object.payload.start, named)).collect();
        let named_before = found.iter().map(|(now, object)| {
            let before = before.get(&object.payload.start).filter(|before| *before != now);
            before.map(|before| by_id[before])
        });
        let named_before = named_before.collect();
        let objects: Vec<_> = found.into_iter().map(|(_, object)| object).collect();
        assert!(objects.len() > 700, "{} blocks are on NVMe", objects.len());
        Self { daemon, names, bytes, older, objects, named, named_before }
    }

    fn image(&self) -> Image<'_> {
        let bytes = self.bytes.clone();
        Image { bytes, older: &self.older, objects: &self.objects, cut_bytes: SEGMENT_BYTES as usize }
    }

    /// The file with these bytes, and the catalog as it was or none.
    fn put(&self, bytes: &[u8], catalog: bool) {
        let folder = self.daemon.folder();
        std::fs::write(file_of(folder), bytes).unwrap();
        std::fs::remove_dir_all(catalog_of(folder)).unwrap();
        if catalog {
            copy_folder(&folder.join("kept"), &catalog_of(folder));
        }
    }

    /// Everything that was ever stored, looked for. A look the other way finds in DRAM what the last one brought there.
    async fn look(&self, backwards: bool) -> (BTreeMap<Name, Found>, u64) {
        let engines = Engines::open(&self.daemon.socket()).await;
        let (mut found, mut names) = (BTreeMap::new(), self.names.clone());
        if backwards {
            names.reverse();
        }
        for name in names {
            found.insert(name, engines.find(name).await);
        }
        let refused = found.values().filter(|found| **found == Found::Refused).count();
        (found, refused as u64)
    }

    /// Each damage, and that nothing else changed.
    fn judge(&self, damages: &[Damage], found: &BTreeMap<Name, Found>, tally: &mut Tally) {
        let mut touched = BTreeSet::new();
        for (kind, hit) in damages {
            tally.injected(*kind);
            for object in hit {
                let name = self.named[*object];
                touched.insert(name);
                tally.found(*kind, found[&name]);
                let claimed = self.named_before[*object].filter(|_| kind.brings_headers_back());
                claimed.iter().for_each(|before| tally.found(*kind, found[before]));
            }
        }
        let wrong: Vec<_> = found.iter().filter(|(_, found)| **found == Found::Wrong).collect();
        assert!(wrong.is_empty(), "served wrong: {wrong:?}");
        for name in self.named.iter().filter(|name| !touched.contains(*name)) {
            assert!(matches!(found[name], Found::Right | Found::AnotherCopy), "{name:?}: {:?}", found[name]);
        }
    }

    /// Damaged while no daemon runs; the next one has the catalog of the last or headers alone.
    async fn at_rest(&mut self, mut draws: u64, catalog: bool, tally: &mut Tally) {
        let mut image = self.image();
        let mut damages = damage(&mut image, &AT_REST, DAMAGED_TOGETHER, &mut draws);
        if draw(&mut draws, 4) == 0 {
            truncate(&mut image, &mut damages, &mut draws);
        }
        let bytes = image.bytes;
        self.put(&bytes, catalog);
        self.daemon.start_again().await;
        let (found, refused) = self.look(false).await;
        self.judge(&damages, &found, tally);
        self.counted(refused).await;
        self.daemon.kill();
    }

    /// Damaged under a daemon that has some of it in DRAM too.
    async fn served(&mut self, mut draws: u64, tally: &mut Tally) {
        self.put(&self.bytes, true);
        self.daemon.start_again().await;
        let (before, _) = self.look(false).await;
        assert!(self.named.iter().all(|name| before[name] == Found::Right), "all of it, at first");
        let mut image = self.image();
        let mut damages = damage(&mut image, &SERVED, DAMAGED_TOGETHER, &mut draws);
        let file = std::fs::File::options().write(true).open(file_of(self.daemon.folder())).unwrap();
        for object in damages.iter().flat_map(|(_, hit)| hit).map(|hit| &self.objects[*hit]) {
            file.write_all_at(&image.bytes[object.payload.clone()], object.payload.start as u64).unwrap();
        }
        let (found, mut refused) = self.look(true).await;
        self.judge(&damages, &found, tally);
        image.cut_bytes = 4096;
        let whole = damages.len();
        truncate(&mut image, &mut damages, &mut draws);
        file.set_len(image.bytes.len() as u64).unwrap();
        let (cut, more) = self.look(true).await; // by now others are in DRAM
        refused += more;
        assert!(cut.values().all(|found| *found != Found::Wrong), "served wrong: {cut:?}");
        for (kind, hit) in &damages[whole..] {
            tally.injected(*kind);
            hit.iter().for_each(|object| tally.found(*kind, cut[&self.named[*object]]));
        }
        self.counted(refused).await;
        self.daemon.kill();
    }

    /// Every miss that bytes caused is in the daemon's own count.
    async fn counted(&mut self, refused: u64) {
        let counters = self.daemon.status().await.counters.unwrap();
        assert_eq!(counters.checksum_errors + counters.nvme_errors, refused, "{counters:?}");
        self.daemon.is_well().await;
    }
}

/// Of each kind as many, each to blocks of its own.
fn damage(image: &mut Image<'_>, kinds: &[Kind], count: usize, draws: &mut u64) -> Vec<Damage> {
    let mut touched: BTreeSet<usize> = BTreeSet::new();
    let mut damages = Vec::new();
    for kind in kinds.iter().cycle().take(count) {
        for _ in 0..TRIES {
            let at = draw(draws, image.objects.len() as u64) as usize;
            if touched.contains(&at) {
                continue;
            }
            let hit = image.damage(*kind, at, &|other| !touched.contains(&other), draws);
            if !hit.is_empty() {
                touched.extend(&hit);
                damages.push((*kind, hit));
                break;
            }
        }
    }
    damages
}

/// Somewhere in the second half; what was damaged before and is lost now is the first damage's.
fn truncate(image: &mut Image<'_>, damages: &mut Vec<Damage>, draws: &mut u64) {
    let half = image.objects.len() / 2;
    let at = half + draw(draws, half as u64) as usize;
    let touched: BTreeSet<usize> = damages.iter().flat_map(|(_, hit)| hit).copied().collect();
    let hit = image.damage(Kind::Truncated, at, &|_| true, draws);
    damages.push((Kind::Truncated, hit.into_iter().filter(|at| !touched.contains(at)).collect()));
}

fn file_of(folder: &Path) -> PathBuf {
    folder.join("nvme.kvd")
}

fn catalog_of(folder: &Path) -> PathBuf {
    folder.join("catalog")
}

async fn stop(daemon: &mut Daemon) {
    assert!(daemon.stop().await.success());
    daemon.kill(); // forgets its channel, too
}

async fn again(daemon: &mut Daemon) {
    stop(daemon).await;
    daemon.start_again().await;
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// Rounds until so many were damaged, three at rest for one that is served.
async fn rounds(damages: u64, mut draws: u64) {
    let mut base = Base::new().await;
    let (mut at_rest, mut served) = (Tally::default(), Tally::default());
    for round in 0.. {
        let seed = splitmix64(&mut draws);
        println!("round {round}, seed {seed}");
        match round % 4 {
            0 => base.at_rest(seed, true, &mut at_rest).await,
            3 => base.served(seed, &mut served).await,
            _ => base.at_rest(seed, false, &mut at_rest).await,
        }
        if at_rest.total() + served.total() >= damages && round >= 3 {
            break;
        }
    }
    at_rest.check("NVMe at rest", &AT_REST, Kind::may_be_harmless);
    served.check("NVMe while served", &SERVED, |_| false);
}

#[tokio::test]
async fn damaged_blocks_on_nvme_are_misses() {
    rounds(300, 5).await;
}

#[tokio::test]
#[ignore = "slow: 10,000 damages, some fifty starts of a daemon"]
async fn ten_thousand_damages_on_nvme_are_misses() {
    rounds(10_000, 6).await;
}
