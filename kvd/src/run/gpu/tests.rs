//! A device's thread on the stand-in, with the days that a daemon's own stand-in cannot be given.

use super::pump::Pump;
use super::*;
use crate::node::device::{CopyBlock, CopyOrder};
use kvd_proto::layout::DataType;
use kvd_tiers::gpu::software::{Operation, SoftwareControl};
use kvd_tiers::media::dram::DramOptions;
use kvd_tiers::segment::{Geometry, SlotRef};
use std::collections::VecDeque;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);
const BLOCKS: u32 = 4;

struct Rig {
    orders: Sender<Order>,
    inbox: Inbox,
    control: SoftwareControl,
    thread: Option<std::thread::JoinHandle<()>>,
    layout: Layout,
    heard: VecDeque<Input>,
    _poll: mio::Poll,
    _engine: SoftwareDevice,
}

/// A pump with an engine's memory open as number 1, and four slots of DRAM.
fn rig() -> Rig {
    let poll = mio::Poll::new().unwrap();
    let inbox = Inbox::new(mio::Waker::new(poll.registry(), mio::Token(1)).unwrap());
    let layout = Layout::full(2, 2, 64, DataType::Bf16, (2, 2), 16).unwrap();
    let slot_bytes = layout.slot_bytes(0);
    let options = DramOptions { capacity_bytes: 1 << 20, queue_depth: 1, huge_pages: false, lock: false };
    let dram = Arc::new(DramSegments::new(options));
    dram.open(0, Geometry::dram(slot_bytes, 4, u64::from(BLOCKS * slot_bytes)), None).unwrap();
    let device = software().unwrap();
    let control = device.control();
    let files: Arc<dyn FileReads> = Arc::new(device.files());
    let (opened, hbm_bytes): (Opened, _) = ((Box::new(device), Some(files)), u64::from(BLOCKS * slot_bytes));
    let pump =
        Pump::new(opened, transfer_options(64 << 20), hbm_bytes, (dram.clone(), inbox.clone())).unwrap();
    let (orders, ordered) = channel();
    let told = inbox.clone();
    let thread = std::thread::spawn(move || serve(pump, &ordered, &told, "the device"));
    let mut engine = software().unwrap();
    let bytes = u64::from(BLOCKS) * u64::from(slot_bytes);
    let address = engine.allocate(bytes).unwrap();
    let handle = engine.export(address).unwrap().to_vec().into();
    let vector = |at: u64| wire::VectorPlace { range: 0, offset: at * bytes / 4, token_stride: 256 };
    let layer = |at: u64| wire::LayerPlace {
        page_stride: 4096,
        head_stride: 128,
        vectors: vec![vector(2 * at), vector(2 * at + 1)],
    };
    let request = wire::OpenMemoryRequest {
        device: engine.info().uuid.to_vec().into(),
        ranges: vec![wire::DeviceRange { handle, bytes, ..Default::default() }],
        heads: 2,
        page_tokens: 16,
        pages: BLOCKS,
        layers: (0..2).map(layer).collect(),
        ..wire::OpenMemoryRequest::default()
    };
    let (request, chunks) = (Box::new(request), Chunks::default());
    orders.send(Order::Open { memory: 1, layout: Box::new(layout.clone()), request, chunks }).unwrap();
    let mut rig = Rig {
        orders,
        inbox,
        control,
        thread: Some(thread),
        layout,
        heard: VecDeque::new(),
        _poll: poll,
        _engine: engine,
    };
    assert!(matches!(rig.hear(), DeviceEnd::Opened { memory: 1, result: Ok(true) }));
    rig
}

impl Rig {
    fn copy(&self, token: u64) {
        let block = |slot| CopyBlock { slot: Some(SlotRef { segment: 0, slot }), tokens: 16, kept: None };
        let table = (0..BLOCKS as i32).flat_map(i32::to_le_bytes).collect::<Vec<_>>().into();
        let order = CopyOrder {
            token,
            lease: 1,
            memory: 1,
            device: [0; 16],
            into_pages: false,
            first_block: 0,
            blocks: (0..BLOCKS).map(block).collect(),
            table,
            layer_ranges: 0..self.layout.groups()[0].layer_ranges,
            fence: None,
        };
        self.orders.send(Order::Copy(Box::new(order))).unwrap();
    }

    /// A segment of the device's own memory.
    fn take(&mut self) {
        let slot_bytes = self.layout.slot_bytes(0);
        let bytes = u64::from(BLOCKS * slot_bytes);
        self.orders.send(Order::Take { segment: 1, bytes, slot_bytes }).unwrap();
        assert!(matches!(self.hear(), DeviceEnd::Taken { segment: 1, result: Ok(()) }));
    }

    fn lift(&self, token: u64, from: Option<InFile>) {
        let to = KeptSlot { segment: 1, slot: 2, there: false };
        self.orders.send(Order::Lift { token, memory: 1, to, from }).unwrap();
    }

    fn lifted(&mut self, token: u64) -> Result<(), MoveError> {
        match self.hear() {
            DeviceEnd::Lifted { token: of, result } if of == token => result,
            other => panic!("{other:?}"),
        }
    }

    /// A file with a slot at 4096, and what its parts' checksums are; `None`: no O_DIRECT here.
    fn in_file(&self, folder: &std::path::Path) -> Option<InFile> {
        let (path, slot_bytes) = (folder.join("slots"), self.layout.slot_bytes(0) as usize);
        let bytes: Vec<u8> = (0..4096 + slot_bytes).map(|at| ((at * 7) >> 3) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let parts = bytes[4096..].chunks(self.layout.part_stride(0) as usize);
        let checksums = parts.map(crc32fast::hash).collect();
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECT;
        let Ok(file) = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()) else {
            println!("SKIPPED: no O_DIRECT on the temporary folder's file system");
            return None;
        };
        Some(InFile { file: Arc::new(file), offset: 4096, checksums })
    }

    /// The next end that the node is told of.
    fn hear(&mut self) -> DeviceEnd {
        let until = std::time::Instant::now() + PATIENCE;
        let mut inputs = Vec::new();
        while self.heard.is_empty() {
            assert!(std::time::Instant::now() < until, "nothing is told");
            self.inbox.drain(&mut inputs);
            self.heard.extend(inputs.drain(..));
            std::thread::yield_now();
        }
        let Some(Input::Event(Event::Device(end))) = self.heard.pop_front() else { panic!("something else") };
        end
    }

    fn copied(&mut self, token: u64) -> Copied {
        match self.hear() {
            DeviceEnd::Copied { token: of, result: Ok(copied) } if of == token => copied,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.orders = channel().0;
        self.thread.take().expect("it runs").join().unwrap();
    }
}

#[test]
fn a_device_that_goes_ends_what_was_under_way_and_refuses_the_rest() {
    let mut rig = rig();
    rig.copy(1);
    assert_eq!(rig.copied(1), Copied { blocks: BLOCKS, miss: CopyMiss::None, reason: String::new() });
    rig.control.hold();
    rig.copy(2);
    assert!(rig.control.wait_held(PATIENCE), "it is under way");
    rig.control.lose("it fell off the bus");
    let copied = rig.copied(2);
    assert_eq!((copied.blocks, copied.miss), (0, CopyMiss::Device));
    assert!(copied.reason.contains("fell off the bus"), "{copied:?}");
    rig.copy(3);
    assert_eq!(rig.copied(3).miss, CopyMiss::Device);
    rig.orders.send(Order::Take { segment: 1, bytes: 4096, slot_bytes: 4096 }).unwrap();
    assert!(matches!(rig.hear(), DeviceEnd::Taken { segment: 1, result: Err(_) }));
    rig.orders.send(Order::Close { memory: 1 }).unwrap();
    assert!(matches!(rig.hear(), DeviceEnd::Closed { memory: 1 }));
}

#[test]
fn memory_that_is_closed_under_its_copies_is_closed_when_they_have_ended() {
    let mut rig = rig();
    rig.control.hold();
    (1..40).for_each(|token| rig.copy(token));
    assert!(rig.control.wait_held(PATIENCE), "one is under way");
    rig.orders.send(Order::Close { memory: 1 }).unwrap();
    rig.control.release();
    let mut ended = 0;
    loop {
        match rig.hear() {
            DeviceEnd::Copied { result, .. } => {
                let miss = result.unwrap().miss;
                assert!(matches!(miss, CopyMiss::None | CopyMiss::Stopped), "{miss:?}");
                ended += 1;
            }
            DeviceEnd::Closed { memory } => break assert_eq!((memory, ended), (1, 39)),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_block_is_lifted_only_if_every_part_of_it_has_its_checksum() {
    let (mut rig, folder) = (rig(), tempfile::tempdir().unwrap());
    rig.take();
    let Some(right) = rig.in_file(folder.path()) else { return };
    let again =
        |right: &InFile| InFile { file: right.file.clone(), checksums: right.checksums.clone(), ..*right };
    rig.lift(1, Some(again(&right)));
    assert_eq!(rig.lifted(1), Ok(()));
    let mut wrong = again(&right);
    *wrong.checksums.last_mut().expect("parts") ^= 1;
    rig.lift(2, Some(wrong));
    assert_eq!(rig.lifted(2), Err(MoveError::Checksum));
    let text = |result: Result<(), MoveError>| match result {
        Err(MoveError::Device(why)) => why,
        other => panic!("{other:?}"),
    };
    rig.lift(3, Some(InFile { offset: 1 << 30, ..again(&right) }));
    assert!(text(rig.lifted(3)).contains("ends before"));
    rig.lift(4, None);
    assert!(text(rig.lifted(4)).contains("no file"));
    let error = GpuError::Driver { operation: "read a file", reason: "EIO".to_owned() };
    rig.control.fail_next(Operation::ReadFile, error);
    rig.lift(5, Some(again(&right)));
    assert!(text(rig.lifted(5)).contains("EIO"));
    // what is closed meanwhile is lifted for nobody
    rig.orders.send(Order::Close { memory: 1 }).unwrap();
    assert!(matches!(rig.hear(), DeviceEnd::Closed { memory: 1 }));
    rig.lift(6, Some(right));
    assert!(text(rig.lifted(6)).contains("closed"));
}

#[test]
fn a_device_that_goes_ends_its_lifts_too() {
    let (mut rig, folder) = (rig(), tempfile::tempdir().unwrap());
    rig.take();
    let Some(right) = rig.in_file(folder.path()) else { return };
    rig.control.hold();
    rig.copy(1);
    assert!(rig.control.wait_held(PATIENCE), "it is under way");
    rig.lift(2, Some(right));
    rig.control.lose("it fell off the bus");
    let mut ended = std::collections::BTreeSet::new();
    while ended.len() < 2 {
        match rig.hear() {
            DeviceEnd::Copied { token, result } => {
                assert!(ended.insert(token) && result.unwrap().miss == CopyMiss::Device);
            }
            DeviceEnd::Lifted { token, result } => assert!(ended.insert(token) && result.is_err()),
            other => panic!("{other:?}"),
        }
    }
    rig.lift(3, None);
    rig.lifted(3).unwrap_err();
}
