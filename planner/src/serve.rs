//! The running planner: asks the source every interval, decides, applies, and serves what it decided.
//!
//! Owns the clock, the signals and the HTTP endpoint. Invariants: one round at a time; a round that fails leaves the last
//! plan and every worker as they are; before it returns, everything it started has ended.

use crate::apply::{Action, Applier, advise::Advise, local::Local};
use crate::config::{Config, Mode};
use crate::decide::Planner;
use crate::report::Report;
use crate::source::{HttpJson, Source};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use kvd_proto::{Code, Error};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::MissedTickBehavior;

/// The latest report and when its plan was made, shared with the HTTP endpoint.
#[derive(Clone, Default)]
struct Board(Arc<Mutex<(Report, Option<Instant>)>>);

impl Board {
    fn update(&self, change: impl FnOnce(&mut Report, &mut Option<Instant>)) {
        let mut board = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (report, made) = &mut *board;
        change(report, made);
    }

    fn read(&self) -> Report {
        let board = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let age_ms = board.1.map_or(0, |made| made.elapsed().as_millis() as u64);
        Report { age_ms, ..board.0.clone() }
    }
}

/// Runs until SIGTERM or SIGINT, on a runtime of this thread; says where it listens through `listening`.
pub fn serve(config: &Config, listening: impl FnOnce(std::net::SocketAddr)) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| system("runtime", &error))?;
    runtime.block_on(run(config, listening))
}

async fn run(config: &Config, listening: impl FnOnce(std::net::SocketAddr)) -> Result<(), Error> {
    let source = HttpJson::new(&config.source.url, Duration::from_millis(config.source.timeout_ms))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| system("signals", &error))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| system("signals", &error))?;
    let address = config.listen.http_address;
    let listener = TcpListener::bind(address).await.map_err(|error| taken(address, &error))?;
    listening(listener.local_addr().map_err(|error| system("listen.http_address", &error))?);
    let board = Board::default();
    let server = axum::serve(listener, router(board.clone()));
    let mut applier = match config.apply.mode {
        Mode::Local => Applier::Local(Local::new(config.template())),
        Mode::Advise => Applier::Advise(Advise::default()),
    };
    let stopped = tokio::select! {
        () = rounds(config, source, &mut applier, &board) => unreachable!("rounds have no end"),
        ended = server => ended.map_err(|error| system("listen.http_address", &error)),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    applier.close().await;
    stopped
}

async fn rounds(config: &Config, mut source: impl Source, applier: &mut Applier, board: &Board) {
    let mut planner = Planner::new(config.settings());
    let started = Instant::now();
    let mut interval = tokio::time::interval(Duration::from_millis(config.interval_ms));
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let seen = source.observe().await;
        let workers = applier.workers();
        if let Applier::Local(local) = applier {
            board.update(|report, _| report.counts.deaths = local.deaths());
        }
        // the planner's clock begins at 1: 0 is before its first observation
        let now_ms = 1 + started.elapsed().as_millis() as u64;
        let plan = seen.and_then(|mut observation| {
            observation.workers = workers.unwrap_or(observation.workers);
            planner.apply(&observation, now_ms)
        });
        let plan = match plan {
            Ok(plan) => plan,
            Err(error) => {
                tracing::warn!(%error, "no observation; the last plan stands");
                board.update(|report, _| {
                    report.counts.failed_observations += 1;
                    report.trouble = Some(error.to_string());
                });
                continue;
            }
        };
        let applied = applier.apply(&plan);
        board.update(|report, made| {
            note(report, applied, config.apply.mode);
            report.plan = Some(plan);
            *made = Some(Instant::now());
        });
    }
}

/// Advice is not counted: the same is given again until somebody follows it.
fn note(report: &mut Report, applied: Result<Vec<Action>, Error>, mode: Mode) {
    report.counts.plans += 1;
    report.trouble = None;
    report.actions = applied.unwrap_or_else(|error| {
        tracing::warn!(%error, "the plan could not be applied");
        report.counts.failed_applies += 1;
        report.trouble = Some(error.to_string());
        Vec::new()
    });
    for action in report.actions.iter().filter(|_| mode == Mode::Local) {
        match action {
            Action::Start { count, .. } => report.counts.started += u64::from(*count),
            Action::Drain { count, .. } => report.counts.drained += u64::from(*count),
        }
    }
}

fn router(board: Board) -> Router {
    Router::new()
        .route("/plan", get(plan_json))
        .route("/plan.txt", get(|State(board): State<Board>| async move { board.read().text() }))
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .with_state(board)
}

async fn plan_json(State(board): State<Board>) -> impl IntoResponse {
    let json = serde_json::to_string(&board.read()).expect("a report has text keys and finite numbers");
    ([(header::CONTENT_TYPE, "application/json")], json)
}

async fn metrics(State(board): State<Board>) -> Result<Vec<u8>, (StatusCode, String)> {
    crate::metrics::render(&board.read())
        .map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

fn taken(address: std::net::SocketAddr, error: &std::io::Error) -> Error {
    let message = format!("{address}: {error}");
    Error::new(
        Code::Unavailable,
        "listen.http_address",
        message,
        "choose an address that is free on this machine",
    )
}

fn system(what: &str, error: &std::io::Error) -> Error {
    Error::new(Code::Internal, what, error.to_string(), "see the limits of this process (`ulimit -a`)")
}
