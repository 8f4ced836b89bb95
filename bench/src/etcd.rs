//! A real etcd of a run's own: one process on free ports, which can be killed and started again where it was.
//!
//! Owns finding it (Debian's `etcd-server`, installed where that may be done) and its life: it is killed when the `Etcd` is dropped.
//! Invariant: it serves when `start` and `start_again` have returned. Leaves to others: what is kept in it (kvd's `cluster`).

use crate::failure::Failure;
use crate::fleet::free_addresses;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Starts before it is given up: somebody may have taken a port in between.
const STARTS_MAX: u32 = 5;

/// Why there is no etcd here and none can be had; nothing if there is one.
pub(crate) fn missing() -> Option<String> {
    if is_there() {
        return None;
    }
    for arguments in
        [&["update", "-q"][..], &["install", "-y", "-q", "--no-install-recommends", "etcd-server"]]
    {
        if let Err(error) = Command::new("apt-get").args(arguments).output() {
            return Some(format!("no etcd here, and no apt-get: {error}"));
        }
    }
    let why = "no etcd here, and apt-get cannot install etcd-server (it needs root)";
    (!is_there()).then(|| why.to_owned())
}

fn is_there() -> bool {
    Command::new("etcd").arg("--version").output().is_ok_and(|said| said.status.success())
}

/// One server.
#[derive(Debug)]
pub(crate) struct Etcd {
    child: Child,
    data: PathBuf,
    /// For clients, for peers.
    addresses: [String; 2],
}

impl Etcd {
    /// Starts one that keeps its data in `folder`.
    pub(crate) fn start(folder: &Path) -> Result<Self, Failure> {
        for attempt in 0..STARTS_MAX {
            let [client, peer] = <[String; 2]>::try_from(free_addresses(2)?).expect("two were asked for");
            let data = folder.join(format!("etcd-{attempt}"));
            if let Some(child) = serve(&client, &peer, &data)? {
                return Ok(Self { child, data, addresses: [client, peer] });
            }
        }
        Err(format!("etcd ended {STARTS_MAX} times before it served").into())
    }

    /// `host:port`.
    pub(crate) fn endpoint(&self) -> &str {
        &self.addresses[0]
    }

    /// With SIGKILL.
    pub(crate) fn kill(&mut self) -> Result<(), Failure> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// The same again, with what it knew.
    pub(crate) fn start_again(&mut self) -> Result<(), Failure> {
        let [client, peer] = &self.addresses;
        let served = serve(client, peer, &self.data)?;
        self.child = served.ok_or("etcd ended before it served again")?;
        Ok(())
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // an error means that it is gone already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// None: it ended before it served.
fn serve(client: &str, peer: &str, data: &Path) -> Result<Option<Child>, Failure> {
    let [client, peer] = [client, peer].map(|address| format!("http://{address}"));
    let mut child = Command::new("etcd")
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--name", "one", "--initial-cluster", &format!("one={peer}"), "--data-dir"])
        .arg(data)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(child.stderr.take().expect("piped above")).lines().map_while(Result::ok);
    if lines.any(|line| line.contains("ready to serve")) {
        std::thread::spawn(move || lines.for_each(drop)); // it would stop at a full pipe
        return Ok(Some(child));
    }
    child.wait()?;
    Ok(None)
}
