//! Real child processes: they grow, drain, refuse to, die, and are never left behind.

use super::*;
use crate::observe::Census;
use crate::plan::RolePlan;
use crate::predict::Demand;
use tokio::io::{AsyncBufReadExt as _, BufReader};

/// A plan for so many workers.
pub(crate) fn plan(roles: &[(Role, u32)]) -> Plan {
    let role = |(role, planned): &(Role, u32)| RolePlan {
        role: *role,
        census: Census::default(),
        needed: *planned,
        planned: *planned,
        gpus: *planned,
    };
    Plan {
        at_ms: 0,
        demand: Demand {
            requests_per_s: 0.0,
            prompt_tokens: 0.0,
            generated_tokens: 0.0,
            prefix_hit_share: 0.0,
        },
        model: "none".to_owned(),
        roles: roles.iter().map(role).collect(),
        ttft_us: None,
        itl_us: None,
        reasons: Vec::new(),
        problems: Vec::new(),
    }
}

fn local(command: &[&str]) -> Local {
    Local::new(Template {
        command: command.iter().map(|text| (*text).to_owned()).collect(),
        first_port: 9000,
        startup: Duration::ZERO,
        drain: Duration::from_secs(20),
    })
}

/// A process that is to end, held so that its number cannot become another's.
struct Watched(AsyncFd<OwnedFd>);

impl Watched {
    fn new(pid: &str) -> Self {
        let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
        Self(watch(pid).unwrap())
    }

    async fn ends(self) {
        let ended = tokio::time::timeout(Duration::from_secs(20), self.0.readable()).await;
        drop(ended.expect("it should have ended").unwrap());
    }
}

/// A fifo into which each worker writes a line once it is ready: reading waits for exactly that.
struct Ready {
    folder: tempfile::TempDir,
}

impl Ready {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let made = std::process::Command::new("mkfifo").arg(folder.path().join("ready")).status().unwrap();
        assert!(made.success());
        Self { folder }
    }

    /// `sh -c` that runs `before`, says `line`, and then `after`.
    fn script(&self, before: &str, line: &str, after: &str) -> String {
        format!("{before} echo {line} > {}/ready; {after}", self.folder.path().display())
    }

    async fn line(&self) -> String {
        let file = tokio::net::unix::pipe::OpenOptions::new()
            .read_write(true)
            .open_receiver(self.folder.path().join("ready"))
            .unwrap();
        let mut line = String::new();
        BufReader::new(file).read_line(&mut line).await.unwrap();
        line.trim().to_owned()
    }
}

#[tokio::test]
async fn follows_the_plan_up_and_down() {
    let mut local = local(&["sleep", "600"]);
    assert_eq!(
        local.apply(&plan(&[(Role::Both, 3)])).unwrap(),
        [Action::Start { role: Role::Both, count: 3 }]
    );
    assert!(local.apply(&plan(&[(Role::Both, 3)])).unwrap().is_empty(), "already there");
    assert_eq!(local.workers().len(), 3);
    assert_eq!(
        local.apply(&plan(&[(Role::Both, 1)])).unwrap(),
        [Action::Drain { role: Role::Both, count: 2 }]
    );
    for _ in 0..2 {
        let ended = local.next_end().await.unwrap();
        assert!(!ended.killed && ended.index > 0, "the youngest go first: {ended:?}");
    }
    assert_eq!(local.workers(), [WorkerSeen { role: Role::Both, state: WorkerState::Running, load: 0.0 }]);
    assert_eq!(local.deaths(), 0);
    local.close().await;
}

#[tokio::test]
async fn a_worker_that_ignores_sigterm_is_killed_at_the_deadline_with_its_children() {
    let ready = Ready::new();
    let script = ready.script("trap '' TERM; sleep 600 &", "$!", "wait; sleep 600");
    let mut local = local(&["sh", "-c", &script]);
    local.template.drain = Duration::from_millis(50);
    local.apply(&plan(&[(Role::Decode, 1)])).unwrap();
    let grandchild = Watched::new(&ready.line().await);
    local.apply(&plan(&[(Role::Decode, 0)])).unwrap();
    assert_eq!(local.workers()[0].state, WorkerState::Draining);
    assert!(local.next_end().await.unwrap().killed);
    grandchild.ends().await;
}

#[tokio::test]
async fn a_worker_that_drains_ends_by_itself() {
    let ready = Ready::new();
    let script =
        ready.script("trap 'exit 7' TERM;", "{role}-{index}-{port}", "while :; do sleep 600 & wait; done");
    let mut local = local(&["sh", "-c", &script]);
    local.apply(&plan(&[(Role::Prefill, 1)])).unwrap();
    assert_eq!(ready.line().await, "prefill-0-9000");
    local.apply(&plan(&[(Role::Prefill, 0)])).unwrap();
    let ended = local.next_end().await.unwrap();
    assert_eq!(ended.status.unwrap().code(), Some(7));
    assert!(!ended.killed && local.deaths() == 0);
}

#[tokio::test]
async fn a_death_is_noticed_and_replaced_and_one_at_the_start_pauses() {
    let mut local = local(&["sh", "-c", "exit 3"]);
    local.apply(&plan(&[(Role::Both, 1)])).unwrap();
    assert_eq!(local.next_end().await.unwrap().status.unwrap().code(), Some(3));
    assert_eq!(local.deaths(), 1);
    assert_eq!(local.apply(&plan(&[(Role::Both, 1)])).unwrap().len(), 1, "replaced");
    local.template.startup = Duration::from_hours(1);
    local.next_end().await.unwrap();
    assert!(local.apply(&plan(&[(Role::Both, 1)])).unwrap().is_empty(), "it would only die again");
}

#[tokio::test]
async fn a_program_that_is_not_there_is_an_error() {
    let error = local(&["no-such-program-anywhere"]).apply(&plan(&[(Role::Both, 1)])).unwrap_err();
    assert_eq!(error.field, "local.command");
}

#[tokio::test]
async fn dropped_it_leaves_nothing() {
    let ready = Ready::new();
    let script = ready.script("trap '' TERM;", "$$", "exec sleep 600");
    let mut local = local(&["sh", "-c", &script]);
    local.apply(&plan(&[(Role::Both, 1)])).unwrap();
    let child = Watched::new(&ready.line().await);
    drop(local);
    child.ends().await;
}
