//! Bytes that change between two nodes: the real asker and the real server, with somebody in between on a real connection.
//!
//! Owns the one in between, who damages a frame when he is told to. Every piece ends as a miss, or is refused by its part checksums
//! as the fetcher does it, or is right.

use crate::content;
use crate::kind::{Image, Kind, Object, draw};
use crate::tally::{Found, Tally};
use kvd_client::transport::serve::{ServeOptions, Server, Source};
use kvd_client::transport::tcp::{PeerOptions, PeerPool};
use kvd_client::transport::{Batch, Destination, Fate, Held, Outcome, Piece, read_and_wait};
use kvd_proto::Error;
use kvd_proto::data::{HEADER_BYTES, Header};
use kvd_tiers::checksum::verify;
use kvd_tiers::mapping::Mapping;
use kvd_tiers::media::fault::splitmix64;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PART_BYTES: usize = 8 << 10;
const PARTS: usize = 2;
const SLOT_BYTES: usize = PART_BYTES * PARTS;
const SLOTS: u32 = 32;
/// Of one batch.
const PIECES: usize = 4;
/// Nothing here takes this long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(10);
/// A peer that owes an answer and says nothing.
const STALL: Duration = Duration::from_millis(100);

const KINDS: [Kind; 7] = [
    Kind::BitFlip,
    Kind::Burst,
    Kind::HeaderFlip,
    Kind::ZeroedPage,
    Kind::SwappedPayloads,
    Kind::OlderPayload,
    Kind::OlderSlot,
];

/// The owner's slots.
struct Slots(Arc<Vec<u8>>);

impl Slots {
    fn new() -> Self {
        Self(Arc::new((0..SLOTS).flat_map(|slot| content::of(slot.into(), SLOT_BYTES)).collect()))
    }

    fn of(&self, slot: u32) -> &[u8] {
        &self.0[slot as usize * SLOT_BYTES..][..SLOT_BYTES]
    }

    /// As the owner tells them beside the lease.
    fn checksums(&self, slot: u32) -> Vec<u32> {
        self.of(slot).chunks(PART_BYTES).map(crc32fast::hash).collect()
    }
}

impl Source for Slots {
    fn admit(&self, _: u64) -> Result<(), Error> {
        Ok(())
    }

    fn piece(&self, _: u64, piece: &Piece) -> Option<Held> {
        let start = piece.slot as usize * SLOT_BYTES + piece.offset as usize;
        (piece.slot < SLOTS).then(|| Held::shared(self.0.clone(), start..start + piece.bytes as usize))
    }
}

/// What is to befall the next frame.
#[derive(Clone, Copy)]
struct Armed {
    kind: Kind,
    /// Of the asker, or of the owner.
    request: bool,
    seed: u64,
}

#[derive(Default)]
struct Between {
    armed: Mutex<Option<Armed>>,
    /// The last answer that passed.
    older: Mutex<Vec<u8>>,
    /// Which pieces the last damage hit.
    hit: Mutex<Vec<usize>>,
}

/// Passes connections on to the owner.
struct Proxy {
    address: SocketAddr,
    between: Arc<Between>,
    acceptor: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Proxy {
    fn start(owner: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let between = Arc::<Between>::default();
        let shared = between.clone();
        let acceptor = std::thread::spawn(move || {
            let mut threads = Vec::new();
            for asker in listener.incoming().map(Result::unwrap) {
                let mut first = [0];
                if asker.peek(&mut first).unwrap_or(0) == 1 && first == *b"." {
                    break; // the test is over
                }
                let Ok(to_owner) = TcpStream::connect(owner) else { break };
                for (from, to, request) in [(&asker, &to_owner, true), (&to_owner, &asker, false)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let between = shared.clone();
                    threads.push(std::thread::spawn(move || {
                        let _ = between.pass(&from, &to, request);
                        [from, to].iter().for_each(|end| drop(end.shutdown(Shutdown::Both)));
                    }));
                }
                threads.retain(|thread: &JoinHandle<()>| !thread.is_finished());
            }
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
        Self { address, between, acceptor: Some(acceptor) }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = TcpStream::connect(self.address).and_then(|mut end| end.write_all(b"."));
        let ended = self.acceptor.take().expect("joined once").join();
        assert!(ended.is_ok() || std::thread::panicking());
    }
}

impl Between {
    /// Frame by frame, until one side ends or is to be ended.
    fn pass(&self, mut from: &TcpStream, mut to: &TcpStream, request: bool) -> std::io::Result<()> {
        loop {
            let frame = frame(&mut from)?;
            let (damaged, ends) = self.damaged(&frame, request);
            to.write_all(&damaged)?;
            match ends {
                None => {}
                Some(End::Closed) => return Ok(()),
                // nothing more comes, and nobody says so: until the asker hangs up
                Some(End::Silent) => return from.read(&mut [0]).map(drop),
            }
        }
    }

    fn damaged(&self, frame: &[u8], request: bool) -> (Vec<u8>, Option<End>) {
        let head_bytes = HEADER_BYTES + header(frame).body_bytes as usize;
        let is_hello = frame.len() == head_bytes && !request || header(frame).request_id == 0;
        let armed = if is_hello { None } else { lock(&self.armed).take_if(|armed| armed.request == request) };
        if !request && !is_hello {
            let older = std::mem::replace(&mut *lock(&self.older), frame.to_vec());
            if let Some(armed) = armed {
                return self.damage(frame, &older, head_bytes, armed);
            }
        }
        match armed {
            Some(armed) => self.damage(frame, &[], head_bytes, armed),
            None => (frame.to_vec(), None),
        }
    }

    fn damage(&self, frame: &[u8], older: &[u8], head_bytes: usize, armed: Armed) -> (Vec<u8>, Option<End>) {
        let mut draws = armed.seed;
        let pieces = frame[head_bytes..].chunks(SLOT_BYTES).count();
        let of = |piece: usize| head_bytes + piece * SLOT_BYTES..head_bytes + (piece + 1) * SLOT_BYTES;
        let header = 0..head_bytes;
        let object = |payload| Object { tenant: 0, header: header.clone(), payload };
        let whole = matches!(armed.kind, Kind::OlderSlot | Kind::Truncated);
        let objects: Vec<Object> = if whole || pieces == 0 {
            vec![object(head_bytes..frame.len())]
        } else {
            (0..pieces).map(|piece| object(of(piece))).collect()
        };
        let at = draw(&mut draws, objects.len() as u64) as usize;
        if armed.kind == Kind::Truncated {
            let (left, silent) = (draw(&mut draws, frame.len() as u64) as usize, draw(&mut draws, 8) == 0);
            *lock(&self.hit) = (0..PIECES).collect();
            return (frame[..left].to_vec(), Some(if silent { End::Silent } else { End::Closed }));
        }
        let mut image = Image { bytes: frame.to_vec(), older, objects: &objects, cut_bytes: 1 };
        let hit = image.damage(armed.kind, at, &|_| true, &mut draws);
        let all = whole || pieces == 0 || armed.kind == Kind::HeaderFlip;
        if hit.is_empty() {
            *lock(&self.armed) = Some(armed); // not with this frame
        }
        *lock(&self.hit) = if all { (0..PIECES).collect() } else { hit };
        (image.bytes, None)
    }
}

/// How a connection goes on after a frame that was cut.
#[derive(Clone, Copy)]
enum End {
    Closed,
    Silent,
}

fn header(frame: &[u8]) -> Header {
    Header::decode(frame[..HEADER_BYTES].try_into().expect("a header")).expect("both sides are well")
}

fn frame(from: &mut &TcpStream) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; HEADER_BYTES];
    from.read_exact(&mut bytes)?;
    let header = header(&bytes);
    let rest = header.body_bytes as usize + header.payload_bytes as usize;
    bytes.resize(HEADER_BYTES + rest, 0);
    from.read_exact(&mut bytes[HEADER_BYTES..])?;
    Ok(bytes)
}

struct Nodes {
    slots: Arc<Slots>,
    pool: PeerPool,
    proxy: Proxy,
    _server: Server,
}

impl Nodes {
    fn new() -> Self {
        let slots = Arc::new(Slots::new());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Server::start(listener, slots.clone(), ServeOptions::default()).unwrap();
        let proxy = Proxy::start(server.address());
        let options = PeerOptions {
            connections: 1,
            stall: STALL,
            backoff_min: Duration::from_millis(1),
            backoff_max: Duration::from_millis(1),
            ..PeerOptions::default()
        };
        let pool = PeerPool::connect(proxy.address, options).unwrap();
        Self { slots, pool, proxy, _server: server }
    }

    fn read(&self, slots: &[u32; PIECES]) -> Outcome {
        let piece = |slot: &u32| Piece {
            segment: 0,
            slot: *slot,
            generation: 1,
            part: None,
            offset: 0,
            bytes: SLOT_BYTES as u32,
        };
        let pieces = slots.iter().map(|slot| (piece(slot), Destination::private(SLOT_BYTES))).collect();
        read_and_wait(&self.pool, Batch { lease: 1, pieces, deadline: Instant::now() + PATIENCE })
    }

    /// One damage, and what became of the pieces that it hit.
    fn damage(&self, kind: Kind, seed: u64, tally: &mut Tally) {
        let mut draws = seed;
        let request = kind == Kind::HeaderFlip && draw(&mut draws, 2) == 0;
        *lock(&self.proxy.between.armed) = Some(Armed { kind, request, seed });
        let until = Instant::now() + PATIENCE;
        loop {
            let first = draw(&mut draws, u64::from(SLOTS)) as u32;
            let slots: [u32; PIECES] = std::array::from_fn(|at| (first + 5 * at as u32) % SLOTS);
            let outcome = self.read(&slots);
            let done = lock(&self.proxy.between.armed).is_none();
            let hit = if done { std::mem::take(&mut *lock(&self.proxy.between.hit)) } else { vec![] };
            for (at, (slot, (destination, fate))) in slots.iter().zip(&outcome.pieces).enumerate() {
                let found = self.found(*slot, destination, *fate);
                assert!(found != Found::Wrong, "{kind:?}, seed {seed}: slot {slot} was served wrong");
                if hit.contains(&at) {
                    tally.found(kind, found);
                }
            }
            if done {
                return tally.injected(kind);
            }
            assert!(Instant::now() < until, "{kind:?}, seed {seed}, never came: {:?}", outcome.miss);
            std::thread::yield_now(); // the connection comes back
        }
    }

    /// As the fetcher judges it.
    fn found(&self, slot: u32, destination: &Destination, fate: Fate) -> Found {
        if fate != Fate::Whole {
            return Found::Nothing;
        }
        let landed = Mapping::anonymous(SLOT_BYTES).unwrap();
        landed.copy_in(0, destination.as_slice());
        if verify(&landed, 0, PART_BYTES, &self.slots.checksums(slot)).is_err() {
            return Found::Refused;
        }
        if destination.as_slice() == self.slots.of(slot) { Found::Right } else { Found::Wrong }
    }
}

fn damages(count: u64, mut draws: u64) {
    let (nodes, mut tally) = (Nodes::new(), Tally::default());
    let kinds: Vec<Kind> = KINDS.into_iter().chain([Kind::Truncated]).collect();
    for kind in kinds.iter().cycle().take(count as usize) {
        nodes.damage(*kind, splitmix64(&mut draws), &mut tally);
    }
    // what came before the end of a frame came
    tally.check("between two nodes", &kinds, |kind| kind == Kind::Truncated);
}

#[test]
fn damaged_frames_between_nodes_are_misses() {
    damages(320, 7);
}

#[test]
#[ignore = "slow: 10,000 damaged frames, about a minute"]
fn ten_thousand_damaged_frames_between_nodes_are_misses() {
    damages(10_000, 8);
}
