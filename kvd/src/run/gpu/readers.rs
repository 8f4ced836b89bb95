//! Threads that read blocks of the NVMe tier's file into a device's memory.
//!
//! Invariants: every read that is ordered ends with one `Read`; after it, and after this is dropped, nothing of it touches the device's memory. Leaves to others: how a file is
//! read (`kvd_tiers::gpu::files`), checksums, how many are ordered at a time (the node's limit).

use kvd_tiers::gpu::files::FileReads;
use kvd_tiers::gpu::{Address, GpuError};
use kvd_tiers::media::Wake;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Reads at a time: each keeps one transfer of the drive under way.
const THREADS: usize = 4;

/// A range of a file, and where it goes.
pub(super) struct Wanted {
    pub(super) token: u64,
    pub(super) file: Arc<OwnedFd>,
    pub(super) offset: u64,
    pub(super) address: Address,
    pub(super) bytes: u64,
}

/// How one has ended, by its token.
pub(super) type Read = (u64, Result<(), GpuError>);

enum Task {
    Register { address: Address, bytes: u64 },
    Read(Wanted),
}

/// See the file's head.
pub(super) struct Readers {
    /// `None`: it ends.
    tasks: Option<Sender<Task>>,
    threads: Vec<JoinHandle<()>>,
    done: Arc<Mutex<Vec<Read>>>,
}

impl Readers {
    /// For the device of that number; `waker` is called after each read.
    pub(super) fn start(ordinal: u32, files: &Arc<dyn FileReads>, waker: &Arc<dyn Wake>) -> Self {
        let (tasks, wanted) = channel();
        let (wanted, done) = (Arc::new(Mutex::new(wanted)), Arc::<Mutex<Vec<Read>>>::default());
        let thread = |at: usize| {
            let (files, wanted) = (files.clone(), wanted.clone());
            let (done, waker) = (done.clone(), waker.clone());
            let name = format!("kvd-gds-{ordinal}-{at}");
            super::super::workers::spawn(&name, move || work(&*files, &wanted, &done, &*waker))
        };
        let threads = (0..THREADS).map(thread).collect();
        Self { tasks: Some(tasks), threads, done }
    }

    /// Tells of memory that reads will go to.
    pub(super) fn register(&self, address: Address, bytes: u64) {
        self.give(Task::Register { address, bytes });
    }

    pub(super) fn read(&self, wanted: Wanted) {
        self.give(Task::Read(wanted));
    }

    fn give(&self, task: Task) {
        let tasks = self.tasks.as_ref().expect("it has not ended");
        tasks.send(task).expect("its threads live as long");
    }

    /// What has ended since it was asked for last.
    pub(super) fn take_done(&self) -> Vec<Read> {
        std::mem::take(&mut *self.done.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.tasks = None;
        for thread in self.threads.drain(..) {
            _ = thread.join(); // a panic there has ended the process
        }
    }
}

fn work(files: &dyn FileReads, wanted: &Mutex<Receiver<Task>>, done: &Mutex<Vec<Read>>, waker: &dyn Wake) {
    loop {
        let task = wanted.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match task {
            Ok(Task::Register { address, bytes }) => {
                if let Err(error) = files.register(address, bytes) {
                    tracing::info!(%error, "reads from NVMe into device memory are slower than they could be");
                }
            }
            Ok(Task::Read(Wanted { token, file, offset, address, bytes })) => {
                let result = files.read(&file, offset, address, bytes);
                done.lock().unwrap_or_else(PoisonError::into_inner).push((token, result));
                waker.wake();
            }
            Err(_) => return,
        }
    }
}
