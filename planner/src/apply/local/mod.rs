//! Workers as processes of this machine: spawned from a command template, drained with SIGTERM, killed at a deadline.
//!
//! Owns every process it spawned, each in a process group of its own. Invariants: at most `WORKERS_MAX` processes; whoever
//! ends is noticed and its group ended with it; when the planner ends, in whatever way, no worker is left: `close` drains,
//! dropping kills, and the kernel kills those of a planner that was itself killed.

use super::Action;
use crate::observe::{Role, WorkerSeen, WorkerState};
use crate::plan::Plan;
use kvd_proto::{Code, Error};
use rustix::process::{Pid, PidfdFlags, Signal};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::process::ExitStatus;
use std::time::{Duration, Instant};
use tokio::io::unix::AsyncFd;
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// Processes at once, draining ones included. At the limit: the start is refused.
pub const WORKERS_MAX: usize = 256;

/// How to run a worker.
#[derive(Debug, Clone)]
pub struct Template {
    /// Program and arguments; `{role}`, `{index}` and `{port}` are replaced in each.
    pub command: Vec<String>,
    /// Port of index 0; the others follow.
    pub first_port: u16,
    /// From spawning until it counts as running; also the pause after one that died before.
    pub startup: Duration,
    /// From SIGTERM until SIGKILL.
    pub drain: Duration,
}

impl Template {
    fn filled(&self, role: Role, index: u16) -> Command {
        let port = self.first_port.saturating_add(index).to_string();
        let fill = |text: &String| {
            text.replace("{role}", role.name())
                .replace("{index}", &index.to_string())
                .replace("{port}", &port)
        };
        let mut command = Command::new(fill(&self.command[0]));
        command.args(self.command[1..].iter().map(fill));
        command
    }
}

/// How one ended.
#[derive(Debug)]
pub struct Ended {
    /// Which slot it had.
    pub index: u16,
    /// Its exit status; none where the system would not say.
    pub status: Option<ExitStatus>,
    /// Whether SIGKILL was needed.
    pub killed: bool,
}

#[derive(Debug)]
struct Process {
    role: Role,
    since: Instant,
    /// Sent, or dropped, to drain; none once it is draining.
    drain: Option<oneshot::Sender<()>>,
}

/// All local workers.
#[derive(Debug)]
pub struct Local {
    template: Template,
    processes: BTreeMap<u16, Process>,
    minders: JoinSet<Ended>,
    /// No worker of the role is started before.
    paused: BTreeMap<Role, Instant>,
    /// Processes that ended without having been told to.
    deaths: u64,
}

impl Local {
    /// No workers yet. Must be used from within one current-thread runtime: the kernel ends a worker with the thread that
    /// spawned it.
    pub fn new(template: Template) -> Self {
        assert!(!template.command.is_empty(), "the config checks the command");
        let (processes, paused) = (BTreeMap::new(), BTreeMap::new());
        Self { template, processes, minders: JoinSet::new(), paused, deaths: 0 }
    }

    /// Who is there now.
    pub fn workers(&mut self) -> Vec<WorkerSeen> {
        while let Some(ended) = self.minders.try_join_next() {
            self.take(ended.expect("a minder does not panic"));
        }
        let state =
            |process: &Process| match (&process.drain, process.since.elapsed() < self.template.startup) {
                (None, _) => WorkerState::Draining,
                (Some(_), true) => WorkerState::Starting,
                (Some(_), false) => WorkerState::Running,
            };
        let seen = |process: &Process| WorkerSeen { role: process.role, state: state(process), load: 0.0 };
        self.processes.values().map(seen).collect()
    }

    /// Processes that ended without having been told to.
    pub fn deaths(&self) -> u64 {
        self.deaths
    }

    /// Starts and drains until as many are there, draining ones not counted, as planned.
    pub fn apply(&mut self, plan: &Plan) -> Result<Vec<Action>, Error> {
        self.workers();
        let mut done = Vec::new();
        for planned in &plan.roles {
            let there =
                self.processes.values().filter(|p| p.role == planned.role && p.drain.is_some()).count();
            match Action::between(planned.role, there as u32, planned.planned) {
                Some(Action::Start { role, .. }) if self.is_paused(role) => {}
                Some(action @ Action::Start { role, count }) => {
                    (0..count).try_for_each(|_| self.start(role))?;
                    done.push(action);
                }
                Some(action @ Action::Drain { role, count }) => {
                    (0..count).for_each(|_| self.drain_youngest(role));
                    done.push(action);
                }
                None => {}
            }
        }
        Ok(done)
    }

    /// Waits for the next one to end; none where there are none.
    pub async fn next_end(&mut self) -> Option<Ended> {
        let ended = self.minders.join_next().await?.expect("a minder does not panic");
        Some(self.take(ended))
    }

    /// Drains all, kills who does not end in time, and waits for every one.
    pub async fn close(mut self) {
        self.processes.values_mut().for_each(|process| drop(process.drain.take()));
        while self.next_end().await.is_some() {}
        assert!(self.processes.is_empty(), "every process has a minder");
    }

    fn is_paused(&self, role: Role) -> bool {
        self.paused.get(&role).is_some_and(|until| Instant::now() < *until)
    }

    fn start(&mut self, role: Role) -> Result<(), Error> {
        let used: BTreeSet<u16> = self.processes.keys().copied().collect();
        let Some(index) = (0..WORKERS_MAX as u16).find(|index| !used.contains(index)) else {
            let message = format!("{WORKERS_MAX} processes run or drain");
            return Err(Error::limit(
                "apply.local",
                message,
                "lower fleet.budget_gpus, or wait for draining ones",
            ));
        };
        let (child, pidfd) = spawn(self.template.filled(role, index)).map_err(|error| {
            let message = format!("{}: {error}", self.template.command.join(" "));
            Error::new(Code::Unavailable, "local.command", message, "name a program that this user may run")
        })?;
        let (drain, told) = oneshot::channel();
        tracing::info!(role = role.name(), index, pid = child.id(), "started a worker");
        self.minders.spawn(mind(index, child, pidfd, told, self.template.drain));
        self.processes.insert(index, Process { role, since: Instant::now(), drain: Some(drain) });
        Ok(())
    }

    /// The youngest has the least in its cache.
    fn drain_youngest(&mut self, role: Role) {
        let serving = self.processes.iter_mut().filter(|(_, p)| p.role == role && p.drain.is_some());
        let Some((index, process)) = serving.max_by_key(|(_, process)| process.since) else { return };
        tracing::info!(role = role.name(), index, "draining a worker");
        drop(process.drain.take());
    }

    fn take(&mut self, ended: Ended) -> Ended {
        let process = self.processes.remove(&ended.index).expect("a minder minds a process");
        let role = process.role.name();
        let (index, killed) = (ended.index, ended.killed);
        let status = ended.status.map_or_else(|| "unknown".to_owned(), |status| status.to_string());
        if process.drain.is_none() {
            tracing::info!(role, index, status, killed, "a drained worker ended");
            return ended;
        }
        self.deaths += 1;
        tracing::warn!(role, index, status, "a worker died");
        if process.since.elapsed() < self.template.startup {
            self.paused.insert(process.role, Instant::now() + self.template.startup);
        }
        ended
    }
}

/// Spawns in a group of its own, to be killed with us, with a descriptor that tells its end without reaping it.
fn spawn(mut command: Command) -> std::io::Result<(Child, AsyncFd<OwnedFd>)> {
    let parent = rustix::process::getpid();
    command.stdin(std::process::Stdio::null()).process_group(0).kill_on_drop(true);
    let die_with_us = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // we may have ended before the kernel was told
        if rustix::process::getppid() == Some(parent) { Ok(()) } else { Err(rustix::io::Errno::SRCH.into()) }
    };
    // SAFETY: the closure runs between fork and exec; it makes two system calls, and neither allocates nor locks.
    unsafe { command.pre_exec(die_with_us) };
    let child = command.spawn()?;
    let pidfd = watch(pid(&child))?;
    Ok((child, pidfd))
}

/// Readable once the process has ended, whether or not it was waited for.
fn watch(pid: Pid) -> std::io::Result<AsyncFd<OwnedFd>> {
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)?;
    // SAFETY: the `OwnedFd` holds a valid descriptor, and nobody replaces or closes it while the `AsyncFd` has it.
    let pidfd = unsafe { AsyncFd::register(pidfd)? };
    Ok(pidfd)
}

/// Waits for the process's end, or drains it when told; its group ends with it.
async fn mind(
    index: u16,
    mut child: Child,
    pidfd: AsyncFd<OwnedFd>,
    told: oneshot::Receiver<()>,
    drain: Duration,
) -> Ended {
    let group = Group(pid(&child));
    let ended = async { drop(pidfd.readable().await) };
    tokio::pin!(ended);
    let mut killed = false;
    tokio::select! {
        () = &mut ended => {}
        _ = told => {
            group.signal(Signal::TERM);
            killed = tokio::time::timeout(drain, &mut ended).await.is_err();
        }
    }
    drop(group);
    Ended { index, status: child.wait().await.ok(), killed }
}

/// A worker's process group, killed when dropped; its leader is reaped later, so its number cannot have become another's.
struct Group(Pid);

impl Group {
    /// An empty group is what a signal is for: not an error.
    fn signal(&self, signal: Signal) {
        if let Err(error) = rustix::process::kill_process_group(self.0, signal)
            && error != rustix::io::Errno::SRCH
        {
            tracing::warn!(%error, group = self.0.as_raw_nonzero(), "could not signal a worker");
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// Its process, which is also its group's number.
fn pid(child: &Child) -> Pid {
    let pid = child.id().expect("it was not waited for");
    Pid::from_raw(pid.cast_signed()).expect("a process has a positive number")
}

#[cfg(test)]
pub(crate) mod tests;
