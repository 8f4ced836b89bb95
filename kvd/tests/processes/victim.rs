//! A client in a process of its own, to be killed and stopped: this test binary again, told on stdin what to do.
//!
//! A victim does one thing after the other: a line in, the thing done, a line out.

use crate::engine::{BLOCK_BYTES, Engine, PART_BYTES, fill_all, read_all};
use crate::gpu::Pages;
use crate::hand_off::reserve_for;
use crate::wait::within;
use crate::{content, wait};
use kvd_client::{ConnectOptions, Fill, Match};
use kvd_proto::Code;
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

/// Before every line that is for the test and not from the harness.
const MARK: &str = "victim: ";

pub(crate) struct Victim {
    child: Child,
    orders: ChildStdin,
    answers: Receiver<String>,
}

impl Victim {
    /// A client of the daemon at `socket`, which has its session and space.
    pub(crate) fn start(socket: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["victim::obeys", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = child.stdin.take().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            // the harness prints the test's name without ending the line
            let ours = |line: String| Some(line.split_once(MARK)?.1.to_owned());
            lines.map_while(Result::ok).filter_map(ours).for_each(|line| drop(sender.send(line)));
        });
        let mut victim = Self { child, orders, answers };
        victim.tell(&format!("open {}", socket.display()));
        victim
    }

    /// Gives an order and waits until it is done; returns what came of it.
    pub(crate) fn tell(&mut self, order: &str) -> String {
        self.order(order);
        self.hear(order)
    }

    /// Gives an order.
    pub(crate) fn order(&mut self, order: &str) {
        writeln!(self.orders, "{order}").unwrap();
        self.orders.flush().unwrap();
    }

    /// Waits until the last order is done.
    pub(crate) fn hear(&mut self, order: &str) -> String {
        self.answers.recv_timeout(wait::DEADLINE).unwrap_or_else(|_| panic!("no answer to {order:?}"))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub(crate) fn stop(&self) {
        self.signal(Signal::STOP);
    }

    pub(crate) fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    /// Kills it (-9) and waits until the process is gone.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill(); // a stopped process too; gone already is fine
        let _ = self.child.wait();
    }
}

/// The victim's own end.
#[test]
#[ignore = "the entry of a child process, which the other tests start"]
fn obeys() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let mut held = Held::default();
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split(' ').collect();
        let answer = runtime.block_on(held.obey(words[0], &words[1..]));
        println!("\n{MARK}{answer}");
    }
}

#[derive(Default)]
struct Held {
    engine: Option<Engine>,
    fill: Option<Fill>,
    found: Option<Match>,
    pages: Option<Pages>,
    /// Of the fill.
    names: Vec<u64>,
    /// Of the match.
    found_names: Vec<u64>,
}

impl Held {
    async fn obey(&mut self, order: &str, words: &[&str]) -> String {
        match order {
            "open" => self.engine = Some(Engine::open(Path::new(words[0])).await),
            "join" => self.engine = Some(join(words).await),
            "reserve" => {
                self.names = numbers(words);
                let fill = self.engine().reserve(b"shared", &self.names).await.unwrap();
                let granted = fill.granted().len();
                self.fill = Some(fill);
                return format!("granted {granted}");
            }
            "hand-off-reserve" => {
                self.names = numbers(&words[1..]);
                let fill = reserve_for(self.engine(), words[0], &self.names).await;
                let granted = fill.granted().len();
                self.fill = Some(fill);
                return format!("granted {granted}");
            }
            "hand-off" => {
                let names = numbers(&words[1..]);
                let fill = reserve_for(self.engine(), words[0], &names).await;
                fill_all(&fill, &names);
                return outcome(within("commit", fill.commit()).await);
            }
            "fill" => fill_all(self.fill.as_ref().unwrap(), &self.names),
            "spoil" => {
                // what a client does that does not know that its time is over
                let fill = self.fill.as_ref().unwrap();
                for block in fill.granted() {
                    fill.write(block, 0, &vec![0xEE; BLOCK_BYTES]);
                }
            }
            "fill-parts" => {
                self.fill_parts(&words.iter().map(|word| word.parse().unwrap()).collect::<Vec<_>>());
            }
            "commit-parts" => {
                let parts: Vec<u32> = words.iter().map(|word| word.parse().unwrap()).collect();
                let fill = self.fill.as_mut().unwrap();
                return outcome(within("commit", fill.commit_parts(&[], &parts)).await);
            }
            "commit" => {
                let fill = self.fill.as_mut().unwrap();
                return outcome(within("commit", fill.commit_parts(&[], &[])).await);
            }
            "put" => return format!("stored {}", self.engine().put(&numbers(words)).await),
            "match" => {
                self.found_names = numbers(words);
                let found = self.engine().lease(b"", &self.found_names).await.unwrap();
                let blocks = found.blocks();
                self.found = Some(found);
                return format!("leased {blocks}");
            }
            "read" => {
                let whole = read_all(self.found.as_ref().unwrap(), &self.found_names).await;
                return format!("whole {whole}");
            }
            "device" => self.pages = Some(Pages::open(self.engine(), words[0].parse().unwrap())),
            "device-chunks" => {
                let (pages, chunks) = (words[0].parse().unwrap(), words[1].parse().unwrap());
                self.pages = Some(Pages::open_chunks(self.engine(), pages, chunks));
            }
            "device-loads" => {
                let found = std::sync::Arc::new(self.found.take().unwrap());
                self.pages.as_mut().unwrap().begin_loads(&found, words[0].parse().unwrap());
            }
            "release" => (self.fill, self.found) = (None, None),
            other => panic!("{other:?} is no order"),
        }
        "done".into()
    }

    fn engine(&self) -> &Engine {
        self.engine.as_ref().unwrap()
    }

    fn fill_parts(&self, parts: &[u16]) {
        let fill = self.fill.as_ref().unwrap();
        for block in fill.granted() {
            let bytes = content::of(self.names[block as usize], BLOCK_BYTES);
            for part in parts {
                let start = usize::from(*part) * PART_BYTES;
                fill.write_part(block, 0, *part, &bytes[start..start + PART_BYTES]);
            }
        }
    }
}

async fn join(words: &[&str]) -> Engine {
    let byte = |at: usize| u8::from_str_radix(&words[1][at..at + 2], 16).unwrap();
    let join = (0..words[1].len()).step_by(2).map(byte).collect();
    let options = ConnectOptions { join, member: "rank-1".into(), ..ConnectOptions::new(words[0]) };
    Engine::open_as(options).await
}

fn outcome(committed: Result<u32, kvd_proto::Error>) -> String {
    match committed {
        Ok(blocks) => format!("committed {blocks}"),
        Err(error) if error.code == Code::Unavailable => "unavailable".into(),
        Err(error) => format!("refused {}", error.code.as_str_name()),
    }
}

/// "3..7" or single numbers.
fn numbers(words: &[&str]) -> Vec<u64> {
    let number = |word: &str| word.parse::<u64>().unwrap();
    let range = |word: &&str| match word.split_once("..") {
        Some((first, end)) => number(first)..number(end),
        None => number(word)..number(word) + 1,
    };
    words.iter().flat_map(range).collect()
}
