//! A device without space: puts go on in memory, what is lost is counted, no byte is wrong.

use crate::daemon::{Daemon, MIB, Setup};
use crate::engine::Engine;
use crate::wait::{DEADLINE, until};
use kvd_client::Tier;
use std::path::Path;
use std::process::Command;

/// A file system of its own that is full soon.
struct Small {
    folder: tempfile::TempDir,
}

impl Small {
    fn mount(bytes: u64) -> Result<Self, String> {
        let folder = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "kvd-test"]).arg(folder.path());
        let output = mount.output().map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        Ok(Self { folder })
    }

    fn grow(&self, bytes: u64) {
        let options = format!("remount,size={bytes}");
        let grown = Command::new("mount").args(["-o", &options]).arg(self.path()).status().unwrap();
        assert!(grown.success(), "it was mounted by us");
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // lazily: the daemon's file goes with the daemon
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

#[tokio::test]
async fn puts_go_on_and_what_is_lost_is_counted() {
    let small = match Small::mount(10 * MIB) {
        Ok(small) => small,
        Err(why) => {
            println!("SKIPPED: no small file system to fill: {why}");
            return;
        }
    };
    let nvme_path = Some(small.path().join("nvme.kvd"));
    let setup = Setup { dram_bytes: 8 * MIB, nvme_bytes: 64 * MIB, nvme_path, ..Setup::default() };
    let mut daemon = Daemon::start(&setup).await;
    let engine = Engine::open(&daemon.socket()).await;
    let chains: Vec<Vec<u64>> = (0..32).map(|chain| (chain * 16..(chain + 1) * 16).collect()).collect();
    for names in &chains {
        assert_eq!(engine.put(names).await, 16);
    }
    let counters = until("the counters", DEADLINE, async || {
        let counters = daemon.status().await.counters.unwrap();
        let lost = counters.dropped_blocks + counters.evicted_nvme_blocks;
        (counters.nvme_errors > 0 && lost > 0).then_some(counters)
    })
    .await;
    assert_eq!((counters.committed_blocks, counters.checksum_errors), (512, 0));
    let nvme = daemon.tier(Tier::Nvme).await;
    assert!(nvme.segment_bytes_total <= 10 * MIB, "{nvme:?}");
    let mut whole = 0;
    for names in &chains {
        whole += engine.get(names).await; // asserts every byte
    }
    assert!((100..512).contains(&whole), "{whole} of 512 blocks");
    assert!(nvme.trouble.contains("no new segment") && nvme.trouble.contains("space"), "{}", nvme.trouble);

    small.grow(80 * MIB);
    until("the tier is well again", DEADLINE, async || {
        for names in &chains {
            engine.put(names).await;
        }
        daemon.tier(Tier::Nvme).await.trouble.is_empty().then_some(())
    })
    .await;
    assert!(daemon.tier(Tier::Nvme).await.segment_bytes_total > 10 * MIB);
    daemon.is_well().await;
}
