//! What every transport must do, asked of TCP over loopback and of the fake; and TCP against peers that misbehave.
//!
//! No test sleeps: each waits for an end that must come, with a limit after which it fails.

use kvd_client::transport::fault::{FaultTransport, Faults};
use kvd_client::transport::serve::{ServeOptions, Server, Source};
use kvd_client::transport::tcp::{PeerOptions, PeerPool};
use kvd_client::transport::{
    Batch, Destination, Fate, Held, Miss, Outcome, Piece, Ticket, Transport, read_and_wait,
};
use kvd_proto::data::{Answer, HEADER_BYTES, Header, Hello, PieceAnswer, Read};
use kvd_proto::{Code, Error};
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What a test waits for at most.
const PATIENCE: Duration = Duration::from_secs(10);
const SLOT_BYTES: usize = 1 << 20;
const SLOTS: u32 = 8;
/// The lease that the source refuses.
const UNKNOWN_LEASE: u64 = 404;
/// The generation that slots have.
const GENERATION: u32 = 3;

/// Eight slots of noise.
struct Slots {
    bytes: Arc<Vec<u8>>,
}

impl Slots {
    fn new() -> Arc<Self> {
        let byte = |at: usize| (at.wrapping_mul(2_654_435_761) >> 13) as u8;
        Arc::new(Self { bytes: Arc::new((0..SLOT_BYTES * SLOTS as usize).map(byte).collect()) })
    }

    fn expected(&self, piece: &Piece) -> &[u8] {
        let start = piece.slot as usize * SLOT_BYTES + piece.offset as usize;
        &self.bytes[start..start + piece.bytes as usize]
    }
}

impl Source for Slots {
    fn admit(&self, lease: u64) -> Result<(), Error> {
        if lease == UNKNOWN_LEASE {
            return Err(Error::new(Code::UnknownLease, "lease", "there is none", "match again"));
        }
        Ok(())
    }

    fn piece(&self, _lease: u64, piece: &Piece) -> Option<Held> {
        let end = piece.offset as usize + piece.bytes as usize;
        let there = piece.slot < SLOTS && piece.generation == GENERATION && end <= SLOT_BYTES;
        let start = piece.slot as usize * SLOT_BYTES + piece.offset as usize;
        there.then(|| Held::shared(Arc::clone(&self.bytes), start..start + piece.bytes as usize))
    }
}

fn piece(slot: u32, offset: u32, bytes: u32) -> Piece {
    Piece { segment: 0, slot, generation: GENERATION, part: None, offset, bytes }
}

fn batch_of(pieces: &[Piece], within: Duration) -> Batch {
    let with = |piece: &Piece| (*piece, Destination::private(piece.bytes as usize));
    Batch { lease: 1, pieces: pieces.iter().map(with).collect(), deadline: Instant::now() + within }
}

/// Ten bytes, for tests in which it matters when a batch ends.
fn small(within: Duration) -> Batch {
    batch_of(&[piece(0, 0, 10)], within)
}

fn start(transport: &dyn Transport, batch: Batch) -> (Ticket, Receiver<Outcome>) {
    let (tell, told) = channel();
    (transport.read(batch, Box::new(move |outcome| drop(tell.send(outcome)))), told)
}

fn fates(outcome: &Outcome) -> Vec<Fate> {
    outcome.pieces.iter().map(|(_, fate)| *fate).collect()
}

/// Every whole piece has its source's bytes.
fn check_bytes(slots: &Slots, pieces: &[Piece], outcome: &Outcome) {
    assert_eq!(pieces.len(), outcome.pieces.len());
    for (piece, (destination, fate)) in pieces.iter().zip(&outcome.pieces) {
        if *fate == Fate::Whole {
            assert!(destination.as_slice() == slots.expected(piece), "{piece:?}");
        }
    }
}

fn wait_for(condition: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < until, "it never came true");
        std::thread::yield_now();
    }
}

// ---- one suite for both sides ----

/// A transport with what must outlive it.
struct Side {
    transport: Box<dyn Transport>,
    _server: Option<Server>,
    _silent: Option<Peer>,
}

fn serve(slots: &Arc<Slots>, options: ServeOptions) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    Server::start(listener, Arc::clone(slots) as Arc<dyn Source>, options).unwrap()
}

fn tcp(slots: &Arc<Slots>) -> Side {
    let server = serve(slots, ServeOptions::default());
    let pool = PeerPool::connect(server.address(), PeerOptions::default()).unwrap();
    Side { transport: Box::new(pool), _server: Some(server), _silent: None }
}

fn fake_of(slots: &Arc<Slots>, faults: Faults, seed: u64) -> FaultTransport {
    FaultTransport::new(Arc::clone(slots) as Arc<dyn Source>, faults, seed).unwrap()
}

fn fake(slots: &Arc<Slots>) -> Side {
    Side { transport: Box::new(fake_of(slots, Faults::default(), 7)), _server: None, _silent: None }
}

/// A peer that greets and then says nothing.
fn silent_tcp() -> Side {
    let peer = Peer::start(|mut stream| {
        greet(&mut stream);
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let options = PeerOptions { stall: PATIENCE * 2, ..PeerOptions::default() };
    let pool = PeerPool::connect(peer.address, options).unwrap();
    Side { transport: Box::new(pool), _server: None, _silent: Some(peer) }
}

fn silent_fake() -> Side {
    let faults = Faults { stalled: 1000, ..Faults::default() };
    Side { transport: Box::new(fake_of(&Slots::new(), faults, 7)), _server: None, _silent: None }
}

#[test]
fn noncontiguous_pieces_land_where_the_receiver_says() {
    let slots = Slots::new();
    for side in [tcp(&slots), fake(&slots)] {
        let pieces =
            [piece(3, 4096, 65_536), piece(0, 0, SLOT_BYTES as u32), piece(7, 1, 1), piece(3, 0, 4095)];
        let outcome = read_and_wait(&*side.transport, batch_of(&pieces, PATIENCE));
        assert_eq!((fates(&outcome), &outcome.miss), (vec![Fate::Whole; 4], &None));
        check_bytes(&slots, &pieces, &outcome);
    }
}

#[test]
fn what_the_owner_no_longer_has_is_gone_and_the_rest_comes() {
    let slots = Slots::new();
    let elsewhere = Piece { generation: GENERATION + 1, ..piece(1, 0, 4096) };
    for side in [tcp(&slots), fake(&slots)] {
        let pieces = [elsewhere, piece(1, 0, 4096), piece(SLOTS, 0, 1), piece(2, 4096, 100), elsewhere];
        let outcome = read_and_wait(&*side.transport, batch_of(&pieces, PATIENCE));
        let expected = [Fate::Gone, Fate::Whole, Fate::Gone, Fate::Whole, Fate::Gone];
        assert_eq!((fates(&outcome), &outcome.miss), (expected.to_vec(), &None));
        check_bytes(&slots, &pieces, &outcome);
        assert_eq!(outcome.pieces[0].0.as_slice(), [0; 4096], "untouched");
        let outcome = read_and_wait(&*side.transport, batch_of(&[elsewhere; 3], PATIENCE));
        assert_eq!((fates(&outcome), outcome.miss), (vec![Fate::Gone; 3], None), "an answer without payload");
    }
}

#[test]
fn an_unknown_lease_is_refused_and_the_connection_lives() {
    let slots = Slots::new();
    for side in [tcp(&slots), fake(&slots)] {
        let refused = Batch { lease: UNKNOWN_LEASE, ..small(PATIENCE) };
        let outcome = read_and_wait(&*side.transport, refused);
        let no = Some(Miss::Refused(Code::UnknownLease));
        assert_eq!((fates(&outcome), outcome.miss), (vec![Fate::Missed], no));
        assert_eq!(read_and_wait(&*side.transport, small(PATIENCE)).whole(), 1);
    }
}

#[test]
fn what_is_beyond_the_limits_never_starts() {
    let slots = Slots::new();
    for side in [tcp(&slots), fake(&slots)] {
        let short = vec![(piece(0, 0, 10), Destination::private(9))];
        let too_short = Batch { pieces: short, ..small(PATIENCE) };
        let too_many = batch_of(&vec![piece(0, 0, 1); 4097], PATIENCE);
        let beyond_a_slot = batch_of(&[piece(0, 64 << 20, 1)], PATIENCE);
        for batch in [too_short, too_many, batch_of(&[], PATIENCE), beyond_a_slot] {
            assert_eq!(read_and_wait(&*side.transport, batch).miss, Some(Miss::Invalid));
        }
    }
}

#[test]
fn many_batches_in_flight_all_end_with_their_own_bytes() {
    let slots = Slots::new();
    for side in [tcp(&slots), fake(&slots)] {
        let pieces_of =
            |batch: u32| (0..100).map(move |at| piece((batch + at) % SLOTS, at * 977, 1 + batch * 1000));
        let batches: Vec<Vec<Piece>> = (0..24).map(|batch| pieces_of(batch).collect()).collect();
        let told: Vec<_> =
            batches.iter().map(|pieces| start(&*side.transport, batch_of(pieces, PATIENCE)).1).collect();
        for (pieces, told) in batches.iter().zip(told) {
            let outcome = told.recv_timeout(PATIENCE).unwrap();
            assert_eq!((outcome.whole(), &outcome.miss), (100, &None));
            check_bytes(&slots, pieces, &outcome);
        }
    }
}

#[test]
fn deadlines_hold_against_a_silent_peer() {
    for side in [silent_tcp(), silent_fake()] {
        let started = Instant::now();
        let (_, long) = start(&*side.transport, small(Duration::from_millis(60)));
        let (_, short) = start(&*side.transport, small(Duration::from_millis(30)));
        for told in [short, long] {
            let outcome = told.recv_timeout(PATIENCE).unwrap();
            assert_eq!((fates(&outcome), outcome.miss), (vec![Fate::Missed], Some(Miss::Deadline)));
        }
        assert!(started.elapsed() >= Duration::from_millis(60) && started.elapsed() < PATIENCE / 2);
    }
}

#[test]
fn a_cancelled_batch_ends_at_once_and_only_it() {
    for side in [silent_tcp(), silent_fake()] {
        let (first, first_told) = start(&*side.transport, small(PATIENCE));
        let (second, second_told) = start(&*side.transport, small(PATIENCE));
        side.transport.cancel(second);
        side.transport.cancel(second);
        assert_eq!(second_told.recv_timeout(PATIENCE / 2).unwrap().miss, Some(Miss::Cancelled));
        assert!(first_told.try_recv().is_err(), "the other goes on");
        side.transport.cancel(first);
        assert_eq!(first_told.recv_timeout(PATIENCE / 2).unwrap().miss, Some(Miss::Cancelled));
    }
}

#[test]
fn at_the_limit_a_batch_is_turned_away() {
    for side in [silent_tcp(), silent_fake()] {
        let many: Vec<_> = (0..100).map(|_| start(&*side.transport, small(PATIENCE)).1).collect();
        let ended = many.iter().filter_map(|told| told.try_recv().ok());
        let full = ended.filter(|outcome| outcome.miss == Some(Miss::Full)).count();
        assert!((60..100).contains(&full), "{full}");
    }
}

#[test]
fn closing_ends_every_batch() {
    for mut side in [silent_tcp(), silent_fake()] {
        let told: Vec<_> = (0..8).map(|_| start(&*side.transport, small(PATIENCE)).1).collect();
        side.transport = fake(&Slots::new()).transport; // drops the other
        for told in told {
            assert_eq!(told.try_recv().unwrap().miss, Some(Miss::Cancelled), "ended when the drop returns");
        }
    }
}

#[test]
fn under_faults_every_batch_ends_and_what_is_whole_is_right() {
    let slots = Slots::new();
    let delay_max = Duration::from_millis(2);
    let faults = Faults {
        refused: 100,
        delayed: 200,
        delay_max,
        cut: 100,
        wrong_length: 100,
        flipped: 0,
        stalled: 50,
    };
    let fake = fake_of(&slots, faults, 99);
    let pieces = [piece(1, 0, 5000), piece(2, 7, 9000), piece(5, 1, 1)];
    let (mut missed, mut kept) = (0, 0);
    for _ in 0..200 {
        let outcome = read_and_wait(&fake, batch_of(&pieces, Duration::from_millis(20)));
        check_bytes(&slots, &pieces, &outcome);
        assert_eq!(outcome.miss.is_none(), outcome.whole() == 3, "{outcome:?}");
        missed += usize::from(outcome.miss.is_some());
        kept += usize::from(outcome.miss == Some(Miss::Disconnected) && outcome.whole() > 0);
    }
    assert!((30..140).contains(&missed) && kept > 3, "{missed} of 200 missed, {kept} of them in part");
}

#[test]
fn a_flipped_bit_arrives_as_whole_for_checksums_to_find() {
    let slots = Slots::new();
    let fake = fake_of(&slots, Faults { flipped: 1000, ..Faults::default() }, 5);
    let asked = piece(1, 0, 5000);
    let outcome = read_and_wait(&fake, batch_of(&[asked], PATIENCE));
    let pairs = outcome.pieces[0].0.as_slice().iter().zip(slots.expected(&asked));
    assert_eq!(pairs.map(|(seen, sent)| (seen ^ sent).count_ones()).sum::<u32>(), 1);
}

// ---- TCP against peers that misbehave ----

/// A listener that does with each connection what the test says.
struct Peer {
    address: SocketAddr,
    open: Arc<Mutex<Vec<TcpStream>>>,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    fn start(behave: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let open: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let (mine, behave) = (Arc::clone(&open), Arc::new(behave));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let mut first = [0];
                if stream.peek(&mut first).unwrap_or(0) == 1 && first == *b"." {
                    return; // the test is over
                }
                mine.lock().unwrap().push(stream.try_clone().unwrap());
                let behave = Arc::clone(&behave);
                std::thread::spawn(move || behave(stream));
            }
        });
        Self { address, open, thread: Some(thread) }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        TcpStream::connect(self.address).unwrap().write_all(b".").unwrap();
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.thread.take().unwrap().join().unwrap();
    }
}

fn greet(stream: &mut TcpStream) {
    if read_message(stream).is_some() {
        let _ = stream.write_all(&Hello::ours().encode());
    }
}

fn read_message(stream: &mut TcpStream) -> Option<(Header, Vec<u8>)> {
    let mut head = [0; HEADER_BYTES];
    stream.read_exact(&mut head).ok()?;
    let header = Header::decode(&head).unwrap();
    let mut body = vec![0; header.body_bytes as usize];
    stream.read_exact(&mut body).ok()?;
    Some((header, body))
}

/// One connection, a short stall, and attempts that follow quickly.
fn options() -> PeerOptions {
    PeerOptions {
        connections: 1,
        stall: Duration::from_millis(100),
        backoff_min: Duration::from_millis(1),
        backoff_max: Duration::from_millis(5),
        ..PeerOptions::default()
    }
}

/// What a batch of two pieces comes to when the peer sends `answer(request id)` and keeps the connection open.
fn against(answer: impl Fn(u64) -> Vec<u8> + Send + Sync + 'static) -> (Outcome, PeerPool, Peer) {
    let peer = Peer::start(move |mut stream| {
        greet(&mut stream);
        while let Some((header, _)) = read_message(&mut stream) {
            let _ = stream.write_all(&answer(header.request_id));
        }
    });
    let pool = PeerPool::connect(peer.address, options()).unwrap();
    let outcome = read_and_wait(&pool, batch_of(&[piece(0, 0, 10), piece(1, 0, 20)], PATIENCE));
    (outcome, pool, peer)
}

fn whole(bytes: &[u32]) -> Answer {
    Answer::Pieces(bytes.iter().map(|&bytes| PieceAnswer::Whole(bytes)).collect())
}

#[test]
fn what_is_no_answer_to_what_was_asked_ends_the_connection() {
    type Wrong = (&'static str, fn(u64) -> Vec<u8>);
    let wrong: [Wrong; 6] = [
        ("noise", |_| vec![0x5a; 4096]),
        ("another request's id", |id| [whole(&[10, 20]).encode(id + 1), vec![0; 30]].concat()),
        ("another length", |id| [whole(&[10, 21]).encode(id), vec![0; 31]].concat()),
        ("too few pieces", |id| [whole(&[10]).encode(id), vec![0; 10]].concat()),
        ("a second hello", |_| Hello::ours().encode()),
        ("a flipped bit", |id| {
            let mut bytes = whole(&[10, 20]).encode(id);
            bytes[HEADER_BYTES + 3] ^= 1;
            bytes
        }),
    ];
    for (what, answer) in wrong {
        let (outcome, pool, _peer) = against(answer);
        assert_eq!((fates(&outcome), outcome.miss), (vec![Fate::Missed; 2], Some(Miss::Garbage)), "{what}");
        assert_eq!(pool.counts().garbage, 1, "{what}");
    }
}

#[test]
fn an_answer_in_crumbs_is_an_answer() {
    let peer = Peer::start(|mut stream| {
        stream.set_nodelay(true).unwrap();
        greet(&mut stream);
        let Some((header, _)) = read_message(&mut stream) else { return };
        let pieces = vec![PieceAnswer::Whole(10), PieceAnswer::Gone, PieceAnswer::Whole(20)];
        let answer = [Answer::Pieces(pieces).encode(header.request_id), (0..30).collect()].concat();
        answer.iter().for_each(|&byte| stream.write_all(&[byte]).unwrap());
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let pool = PeerPool::connect(peer.address, options()).unwrap();
    let pieces = [piece(0, 0, 10), piece(0, 0, 5), piece(1, 0, 20)];
    let outcome = read_and_wait(&pool, batch_of(&pieces, PATIENCE));
    assert_eq!((fates(&outcome), &outcome.miss), (vec![Fate::Whole, Fate::Gone, Fate::Whole], &None));
    let seen = [outcome.pieces[0].0.as_slice(), outcome.pieces[2].0.as_slice()].concat();
    assert_eq!(seen, (0..30).collect::<Vec<u8>>());
}

#[test]
fn an_answer_that_nobody_asked_for_ends_the_connection() {
    let peer = Peer::start(|mut stream| {
        greet(&mut stream);
        let refusal = Answer::Refused { code: Code::Internal, text: String::new() };
        let _ = stream.write_all(&refusal.encode(0));
    });
    let pool = PeerPool::connect(peer.address, options()).unwrap();
    wait_for(|| pool.counts().garbage > 0);
}

#[test]
fn a_peer_that_stops_in_the_middle_costs_one_stall_and_keeps_what_came() {
    let (outcome, pool, _peer) = against(|id| [whole(&[10, 20]).encode(id), vec![7; 15]].concat());
    assert_eq!((fates(&outcome), outcome.miss), (vec![Fate::Whole, Fate::Missed], Some(Miss::Stalled)));
    assert_eq!(outcome.pieces[0].0.as_slice(), [7; 10]);
    assert_eq!(pool.counts().stalls, 1);
}

#[test]
fn a_cancelled_batch_is_never_written_again_and_the_next_is_right() {
    let (go, gate) = channel::<()>();
    let gate = Mutex::new(gate);
    let peer = Peer::start(move |mut stream| {
        greet(&mut stream);
        let Some((first, _)) = read_message(&mut stream) else { return };
        stream.write_all(&[whole(&[1000, 1000]).encode(first.request_id), vec![1; 1500]].concat()).unwrap();
        gate.lock().unwrap().recv().unwrap();
        stream.write_all(&[2; 500]).unwrap();
        let Some((second, _)) = read_message(&mut stream) else { return };
        stream.write_all(&[whole(&[1000]).encode(second.request_id), vec![3; 1000]].concat()).unwrap();
    });
    let pool = PeerPool::connect(peer.address, PeerOptions { stall: PATIENCE, ..options() }).unwrap();
    let (ticket, told) = start(&pool, batch_of(&[piece(0, 0, 1000), piece(1, 0, 1000)], PATIENCE));
    wait_for(|| pool.counts().bytes >= (2 * HEADER_BYTES + 1500) as u64);
    pool.cancel(ticket);
    let cancelled = told.recv_timeout(PATIENCE).unwrap();
    assert_eq!(
        (fates(&cancelled), &cancelled.miss),
        (vec![Fate::Whole, Fate::Missed], &Some(Miss::Cancelled)),
        "told before the peer sends the rest"
    );
    go.send(()).unwrap();
    let next = read_and_wait(&pool, batch_of(&[piece(0, 0, 1000)], PATIENCE));
    assert_eq!((next.whole(), next.pieces[0].0.as_slice()), (1, &[3; 1000][..]));
    assert!(!cancelled.pieces[1].0.as_slice().contains(&2), "what came later went elsewhere");
}

#[test]
fn a_peer_that_is_away_is_a_miss_and_is_found_when_it_comes() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let pool = PeerPool::connect(address, options()).unwrap();
    assert_eq!(read_and_wait(&pool, small(PATIENCE)).miss, Some(Miss::Away));

    let listener = TcpListener::bind(address).unwrap();
    let server = Server::start(listener, Slots::new() as Arc<dyn Source>, ServeOptions::default()).unwrap();
    wait_for(|| read_and_wait(&pool, small(PATIENCE)).whole() == 1);
    drop(server); // and it goes away again
    let outcome = read_and_wait(&pool, small(PATIENCE));
    assert!(matches!(outcome.miss, Some(Miss::Away | Miss::Disconnected)), "{outcome:?}");
}

#[test]
fn a_batch_may_be_started_from_the_end_of_another() {
    let server = serve(&Slots::new(), ServeOptions::default());
    let one = PeerOptions { connections: 1, batches_max: 1, ..PeerOptions::default() };
    let pool = Arc::new(PeerPool::connect(server.address(), one).unwrap());
    let (tell, told) = channel();
    let again = Arc::clone(&pool);
    let done = move |_: Outcome| {
        again.read(small(PATIENCE), Box::new(move |outcome| tell.send(outcome).unwrap()));
    };
    pool.read(small(PATIENCE), Box::new(done));
    assert_eq!(told.recv_timeout(PATIENCE).unwrap().whole(), 1, "its room is free by then");
}

// ---- the server against askers that misbehave ----

fn served(options: ServeOptions) -> (Server, TcpStream) {
    let server = serve(&Slots::new(), options);
    let stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    (server, stream)
}

/// Whether the server ends the connection, rather than that the test loses its patience.
fn ends(mut stream: TcpStream) -> bool {
    match stream.read_to_end(&mut Vec::new()) {
        Ok(_) => true,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn an_asker_that_sends_garbage_is_cut_off_and_counted() {
    let request = Read::encode(1, 1, [piece(0, 0, 10)].into_iter());
    let flipped = [&request[..50], &[request[50] ^ 1], &request[51..]].concat();
    let hello = Hello::ours().encode();
    let sent =
        [vec![b'G'; 100], request.clone(), [&hello[..], &flipped].concat(), [&hello[..], &hello].concat()];
    for bytes in sent {
        let (server, mut stream) = served(ServeOptions::default());
        stream.write_all(&bytes).unwrap();
        assert!(ends(stream));
        wait_for(|| server.counts().garbage == 1);
    }
}

#[test]
fn an_asker_that_is_too_slow_is_cut_off() {
    let short = Duration::from_millis(20);
    let options = ServeOptions { request: short, stall: short, ..ServeOptions::default() };
    let (server, mut stream) = served(options);
    stream.write_all(&Hello::ours().encode()[..7]).unwrap(); // and no more
    assert!(ends(stream));
    wait_for(|| server.counts().stalls == 1);

    let (server, mut stream) = served(options);
    stream.write_all(&Hello::ours().encode()).unwrap();
    let pieces: Vec<Piece> = (0..64).map(|at| piece(at % SLOTS, 0, SLOT_BYTES as u32)).collect();
    stream.write_all(&Read::encode(1, 1, pieces.into_iter())).unwrap();
    wait_for(|| server.counts().stalls == 1); // nobody takes the answer
}

#[test]
fn connections_beyond_the_limit_are_turned_away() {
    let (server, mut first) = served(ServeOptions { connections_max: 1, ..ServeOptions::default() });
    first.write_all(&Hello::ours().encode()).unwrap();
    first.read_exact(&mut vec![0; Hello::ours().encode().len()]).unwrap();
    assert!(ends(TcpStream::connect(server.address()).unwrap()));
    assert_eq!((server.counts().connections, server.counts().turned_away), (1, 1));
}
