//! A TCP link with bad days: stands in front of an address and passes bytes both ways, no faster than it is told.
//!
//! Owns its thread and every connection through it. Invariants: bytes pass unchanged and in order; a rate is of all connections together, each way
//! by itself; without one, bytes go as fast as they come. Leaves to others: what passes, and when it is slow.

use crate::failure::Failure;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

/// Bytes that pass at once; at a low rate, so much is late together.
const PIECE_BYTES: usize = 16 << 10;

/// See the file's head; ends when dropped, and all connections with it.
pub(crate) struct Link {
    address: SocketAddr,
    lanes: [Arc<Lane>; 2],
    _stop: oneshot::Sender<()>,
}

impl Link {
    /// Listens at `listen` for connections to `to`.
    pub(crate) fn start(listen: SocketAddr, to: SocketAddr) -> Result<Self, Failure> {
        let listener = std::net::TcpListener::bind(listen)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let lanes = [Arc::new(Lane::default()), Arc::new(Lane::default())];
        let (stop, stopped) = oneshot::channel::<()>();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let passing = lanes.clone();
        // a thread of its own: whoever measures keeps its own busy
        std::thread::Builder::new().name("link".to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = serve(listener, to, passing) => {}
                    _ = stopped => {}
                }
            });
        })?;
        Ok(Self { address, lanes, _stop: stop })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// From the next piece on: so many bytes a microsecond each way, or as fast as it goes.
    pub(crate) fn set(&self, bytes_per_us: Option<f64>) {
        self.lanes.iter().for_each(|lane| lane.set(bytes_per_us));
    }
}

/// One way through the link.
#[derive(Default)]
struct Lane {
    state: Mutex<LaneState>,
}

#[derive(Default)]
struct LaneState {
    bytes_per_us: Option<f64>,
    /// When what was let in has passed.
    busy_until: Option<Instant>,
}

impl Lane {
    fn set(&self, bytes_per_us: Option<f64>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = LaneState { bytes_per_us, busy_until: None };
    }

    /// Until when these bytes are on their way; `None`: they have passed.
    fn enter(&self, bytes: usize) -> Option<Instant> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let passing = Duration::from_secs_f64(bytes as f64 / state.bytes_per_us? / 1e6);
        let now = Instant::now();
        let due = state.busy_until.map_or(now, |until| until.max(now)) + passing;
        state.busy_until = Some(due);
        Some(due)
    }
}

async fn serve(listener: std::net::TcpListener, to: SocketAddr, lanes: [Arc<Lane>; 2]) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    while let Ok((near, _)) = listener.accept().await {
        let [there, back] = lanes.clone();
        tokio::spawn(async move {
            let Ok(far) = TcpStream::connect(to).await else { return }; // who dialled finds the connection closed
            let _ = (near.set_nodelay(true), far.set_nodelay(true)); // slower without, not wrong
            let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
            tokio::join!(pass(near_in, far_out, there), pass(far_in, near_out, back));
        });
    }
}

/// Until one end closes, which the other then hears.
async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, lane: Arc<Lane>) {
    let mut piece = vec![0; PIECE_BYTES];
    while let Ok(bytes @ 1..) = from.read(&mut piece).await {
        if let Some(due) = lane.enter(bytes) {
            tokio::time::sleep_until(due.into()).await;
        }
        if to.write_all(&piece[..bytes]).await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await; // an error means that it is closed already
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    const ANYWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

    /// Both ways through a link to somebody who sends back what comes; seconds.
    fn round_trip_s(link: &Link, bytes: &[u8]) -> f64 {
        let mut stream = std::net::TcpStream::connect(link.address()).unwrap();
        let start = Instant::now();
        stream.write_all(bytes).unwrap();
        let mut came = vec![0; bytes.len()];
        stream.read_exact(&mut came).unwrap();
        assert!(came == bytes);
        start.elapsed().as_secs_f64()
    }

    #[test]
    fn bytes_pass_unchanged_and_no_faster_than_told() {
        let echo = std::net::TcpListener::bind(ANYWHERE).unwrap();
        let link = Link::start(ANYWHERE, echo.local_addr().unwrap()).unwrap();
        std::thread::spawn(move || {
            for stream in echo.incoming().map_while(Result::ok) {
                std::thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
            }
        });
        let bytes: Vec<u8> = (0..100_000_u32).map(|at| (at * 7 % 251) as u8).collect();
        round_trip_s(&link, &bytes);
        link.set(Some(0.5));
        let slow_s = round_trip_s(&link, &bytes);
        assert!(slow_s >= 0.2, "{slow_s} s for 100 kB at half a byte a microsecond");
        link.set(None);
        assert!(round_trip_s(&link, &bytes) < slow_s);
    }
}
