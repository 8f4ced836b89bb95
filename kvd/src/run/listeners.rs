//! Binding sockets: in the file system and on TCP.
//!
//! Invariant: nobody's live socket is taken away; an error names the key and the fix.

use crate::config::Config;
use kvd_proto::{Code, Error};
use std::path::Path;

/// Where gRPC and HTTP are served.
pub(super) struct Listeners {
    pub(super) unix: std::os::unix::net::UnixListener,
    pub(super) tcp: Option<std::net::TcpListener>,
    pub(super) http: Option<std::net::TcpListener>,
    /// Only a node of a cluster has other nodes to serve.
    pub(super) data: Option<std::net::TcpListener>,
}

impl Listeners {
    /// TCP first: whoever can dial a socket in the file system finds the rest listening too.
    pub(super) fn bind(config: &Config) -> Result<Self, Error> {
        let listen = &config.listen;
        let tcp = listen.grpc_address.map(|address| bind_tcp(address, "listen.grpc_address")).transpose()?;
        let http =
            listen.metrics_address.map(|address| bind_tcp(address, "listen.metrics_address")).transpose()?;
        let data = listen.data_address.filter(|_| config.cluster.is_one());
        let data = data.map(|address| bind_tcp(address, "listen.data_address")).transpose()?;
        Ok(Self { unix: bind(&listen.grpc_socket, "listen.grpc_socket")?, tcp, http, data })
    }
}

/// We hold the data directory's lock, so a socket file that is there is a dead daemon's, if it is a socket at all.
pub(super) fn bind(path: &Path, field: &str) -> Result<std::os::unix::net::UnixListener, Error> {
    use std::os::unix::fs::FileTypeExt as _;
    let refused =
        |what: String| Error::new(Code::Unavailable, field, what, "name a path where a socket can be made");
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(refused(format!("{} is another daemon's", path.display())));
            }
            let _ = std::fs::remove_file(path);
        }
        Ok(_) => return Err(refused(format!("{} is there and is no socket", path.display()))),
        Err(_) => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(path)
        .map_err(|e| refused(format!("{}: {e}", path.display())))?;
    listener.set_nonblocking(true).map_err(|e| refused(e.to_string()))?;
    Ok(listener)
}

fn bind_tcp(address: std::net::SocketAddr, field: &str) -> Result<std::net::TcpListener, Error> {
    let refused = |e: std::io::Error| {
        Error::new(
            Code::Unavailable,
            field,
            format!("{address}: {e}"),
            "name a free address, or \"\" for none",
        )
    };
    let listener = std::net::TcpListener::bind(address).map_err(refused)?;
    listener.set_nonblocking(true).map_err(refused)?;
    Ok(listener)
}
