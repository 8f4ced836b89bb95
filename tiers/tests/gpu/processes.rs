//! A device's memory in two processes: what one writes the other sees, and neither's death hurts the other.
//!
//! The second process is this test binary again, told on stdin what to do: a line in, the thing done, a line out.

use crate::devices::{DEVICES, MEMORY_BYTES};
use crate::rig::{Host, PATIENCE, Rig, on_each, pattern};
use kvd_tiers::gpu::{Address, GpuError, Handle, Piece, Way};
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

/// Before every line that is for the test and not from the harness.
const MARK: &str = "other: ";
const BYTES: usize = 3 << 20;

/// Another process with a device of the same kind.
struct Other {
    child: Child,
    orders: ChildStdin,
    answers: Receiver<String>,
}

impl Other {
    fn start(rig: &Rig) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["processes::obeys", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
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
        let mut other = Self { child, orders, answers };
        assert_eq!(other.tell(if rig.is_software() { "device software" } else { "device cuda" }), "done");
        other
    }

    fn tell(&mut self, order: &str) -> String {
        writeln!(self.orders, "{order}").unwrap();
        self.orders.flush().unwrap();
        self.answers.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no answer to {order:?}"))
    }

    fn open(&mut self, handle: &Handle, bytes: usize) -> String {
        self.tell(&format!("open {} {bytes}", hex(handle)))
    }

    /// Memory of the other process with this pattern in it.
    fn export(&mut self, seed: u64, bytes: usize) -> Handle {
        unhex(&self.tell(&format!("export {seed} {bytes}")))
    }

    /// -9, and until the process is gone.
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill(); // gone already is fine
        let _ = self.child.wait();
    }
}

fn hex(handle: &Handle) -> String {
    handle.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn unhex(text: &str) -> Handle {
    assert_eq!(text.len(), 128, "{text:?} is no handle");
    std::array::from_fn(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap())
}

/// The other process's own end.
#[test]
#[ignore = "the entry of a child process, which the other tests start"]
fn obeys() {
    let mut held = None;
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split(' ').collect();
        let answer = obey(&mut held, words[0], &words[1..]);
        println!("\n{MARK}{answer}");
    }
}

struct Held {
    rig: Rig,
    memory: Address,
    host: Option<Host>,
}

fn obey(held: &mut Option<Held>, order: &str, words: &[&str]) -> String {
    let number = |at: usize| words[at].parse::<u64>().unwrap();
    if order == "device" {
        let (_, open) = DEVICES.iter().find(|(kind, _)| *kind == words[0]).unwrap();
        *held = Some(Held { rig: Rig::new(open().unwrap()), memory: 0, host: None });
        return "done".into();
    }
    let Held { rig, memory, host } = held.as_mut().expect("a device first");
    match order {
        "open" => match rig.device.open(&unhex(words[0]), number(1)) {
            Ok(address) => *memory = address,
            Err(error) => return format!("{error:?}"),
        },
        "close" => rig.device.close(*memory),
        "write" => rig.put(*memory + number(0), &pattern(number(1), number(2) as usize)),
        "read" => {
            let bytes = rig.get(*memory + number(0), number(1) as usize);
            return format!("{:08x}", crc32fast::hash(&bytes));
        }
        "export" => {
            *memory = rig.filled(&pattern(number(0), number(1) as usize));
            return hex(&rig.device.export(*memory).unwrap());
        }
        "free" => rig.device.free(*memory),
        // copies there and back that nobody waits for: enough that a death is in the middle of them
        "churn" => {
            let bytes = number(0) as usize;
            let host = host.insert(rig.host(&pattern(7, bytes)));
            let to = [Piece { from: host.at, to: *memory, bytes: bytes as u64 }];
            let back = [Piece { from: *memory, to: host.at, bytes: bytes as u64 }];
            for _ in 0..500 {
                rig.device.copy(rig.stream, Way::In, &to).unwrap();
                rig.device.copy(rig.stream, Way::Out, &back).unwrap();
            }
        }
        other => panic!("{other:?} is no order"),
    }
    "done".into()
}

fn crc(seed: u64, bytes: usize) -> String {
    format!("{:08x}", crc32fast::hash(&pattern(seed, bytes)))
}

#[test]
fn two_processes_share_what_one_exports() {
    on_each(|rig| {
        let mut other = Other::start(rig);
        let memory = rig.filled(&pattern(1, BYTES));
        let handle = rig.device.export(memory).unwrap();
        assert_eq!(rig.device.export(memory).unwrap(), handle, "one memory, one handle");
        assert_eq!(other.open(&handle, BYTES), "done");
        assert_eq!(other.tell(&format!("read 0 {BYTES}")), crc(1, BYTES));
        let half = BYTES / 2;
        assert_eq!(other.tell(&format!("write {half} 2 {half}")), "done");
        assert!(rig.get(memory, half) == pattern(1, BYTES)[..half]);
        assert!(rig.get(memory + half as u64, half) == pattern(2, half), "the other's bytes");
        rig.put(memory, &pattern(3, half));
        assert_eq!(other.tell(&format!("read 0 {half}")), crc(3, half));
        assert_eq!(other.tell("close"), "done");
        assert!(rig.get(memory, half) == pattern(3, half), "closing takes nothing away");
        assert_eq!(other.open(&handle, half), "done");
        assert_eq!(other.tell(&format!("read 0 {half}")), crc(3, half));
    });
}

#[test]
fn an_opener_that_is_killed_in_the_middle_leaves_the_memory_usable() {
    on_each(|rig| {
        let before = rig.device.free_bytes().unwrap();
        let memory = rig.filled(&pattern(1, BYTES));
        let handle = rig.device.export(memory).unwrap();
        for round in 0..3 {
            let mut other = Other::start(rig);
            assert_eq!(other.open(&handle, BYTES), "done");
            assert_eq!(other.tell(&format!("churn {BYTES}")), "done");
            other.kill();
            rig.put(memory, &pattern(round, BYTES));
            assert!(rig.get(memory, BYTES) == pattern(round, BYTES));
        }
        rig.device.free(memory);
        let after = rig.device.free_bytes().unwrap();
        assert!(after == before || !rig.is_software(), "{after} of {before}");
    });
}

#[test]
fn memory_outlives_its_exporter_until_it_is_closed() {
    on_each(|rig| {
        let mut other = Other::start(rig);
        let handle = other.export(4, BYTES);
        let memory = rig.device.open(&handle, BYTES as u64).unwrap();
        assert!(rig.get(memory, BYTES) == pattern(4, BYTES));
        rig.put(memory, &pattern(5, 1000));
        assert_eq!(other.tell("read 0 1000"), crc(5, 1000));
        other.kill();
        assert!(rig.get(memory, 1000) == pattern(5, 1000));
        assert!(rig.get(memory + 1000, BYTES - 1000) == pattern(4, BYTES)[1000..]);
        rig.put(memory, &pattern(6, BYTES));
        assert!(rig.get(memory, BYTES) == pattern(6, BYTES));
        rig.device.close(memory);
        let refused = rig.device.open(&handle, BYTES as u64);
        assert!(matches!(refused, Err(GpuError::BadHandle(_))), "a dead process's: {refused:?}");
    });
}

#[test]
fn a_handle_of_no_memory_is_refused() {
    on_each(|rig| {
        let mut other = Other::start(rig);
        let handle = other.export(4, BYTES);
        let refused = rig.device.open(&handle, 64 * BYTES as u64);
        assert!(matches!(refused, Err(GpuError::BadHandle(_))), "longer than it is: {refused:?}");
        let memory = rig.device.open(&handle, 1).unwrap();
        rig.device.close(memory);
        assert_eq!(other.tell("free"), "done");
        let mut torn = handle;
        torn[8..].iter_mut().for_each(|byte| *byte ^= 0x5A);
        for wrong in [handle, torn, [0; 64], [0xFF; 64]] {
            let refused = rig.device.open(&wrong, 4096);
            assert!(matches!(refused, Err(GpuError::BadHandle(_))), "{wrong:?}: {refused:?}");
        }
        rig.finish(rig.stream).expect("a handle that is none hurts nobody");
    });
}

/// Which CUDA's driver does not do.
#[test]
fn the_stand_in_opens_its_own_process_s_handles_too() {
    let mut rig = Rig::new(Box::new(crate::devices::software()));
    let mut other = Rig::new(Box::new(crate::devices::software()));
    let memory = rig.filled(&pattern(1, 10_000));
    let handle = rig.device.export(memory).unwrap();
    let (mine, theirs) =
        (rig.device.open(&handle, 10_000).unwrap(), other.device.open(&handle, 10_000).unwrap());
    assert!(mine != memory && rig.get(mine, 10_000) == pattern(1, 10_000));
    other.put(theirs, &pattern(2, 10_000));
    assert!(rig.get(memory, 10_000) == pattern(2, 10_000));
    assert_eq!(other.device.free_bytes(), Ok(MEMORY_BYTES), "what is opened is somebody else's");
    rig.device.free(memory);
    assert!(matches!(other.device.open(&handle, 1), Err(GpuError::BadHandle(_))), "it was given back");
    assert!(other.get(theirs, 10_000) == pattern(2, 10_000));
}
