//! Kubernetes's volume plugin: the Identity and Node services of the Container Storage Interface,
//! for inline volumes of pods and for PersistentVolumes that somebody has written.
//!
//! It is a thin edge: it checks what it is asked and asks the daemon, over the control socket. It
//! keeps nothing, mounts nothing and needs no privilege but that socket, so it can be started again
//! or replaced at any time.
//!
//! Invariant: what the plugin answers with OK the daemon has done and will do again after a restart.

mod attributes;
mod identity;
mod node;
mod registration;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use tokio_stream::wrappers::UnixListenerStream;
use tonic::Status;
use tonic::transport::{Channel, Server};
use tracing::info;
use weightfs_proto::control::control_client::ControlClient;
use weightfs_proto::csi::identity_server::IdentityServer;
use weightfs_proto::csi::node_server::NodeServer;
use weightfs_proto::registration::registration_server::RegistrationServer;

use crate::control;
use crate::socket::{SocketError, bind_socket};
use registration::Registration;

pub use attributes::{AttributeError, Attributes};

/// The driver's name, if nobody gives it another.
pub const DEFAULT_DRIVER: &str = "csi.weightfs.io";

/// Characters of a driver's name at the most (CSI, `GetPluginInfo`).
const MAX_DRIVER_CHARS: usize = 63;

/// Bytes of a node's name at the most (CSI, `NodeGetInfo`).
const MAX_NODE_BYTES: usize = 256;

/// A name that CSI does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// A driver's.
    #[error(
        "{0:?} is no name of a driver: letters, digits, `-` and `.`, {MAX_DRIVER_CHARS} at the most, a letter or digit first and last"
    )]
    Driver(String),
    /// A node's.
    #[error("the name of a node must have 1 to {MAX_NODE_BYTES} bytes")]
    Node,
}

/// A driver's name: a domain name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverName(String);

impl FromStr for DriverName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
        let ends = |c: char| c.is_ascii_alphanumeric();
        let fits = text.len() <= MAX_DRIVER_CHARS
            && text.chars().all(inner)
            && text.starts_with(ends)
            && text.ends_with(ends);
        fits.then(|| Self(text.to_owned())).ok_or_else(|| NameError::Driver(text.to_owned()))
    }
}

impl fmt::Display for DriverName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A node's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeName(String);

impl FromStr for NodeName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let fits = (1..=MAX_NODE_BYTES).contains(&text.len());
        fits.then(|| Self(text.to_owned())).ok_or(NameError::Node)
    }
}

/// What the plugin is and whom it asks.
#[derive(Debug, Clone)]
pub struct Plugin {
    /// Its name.
    pub driver: DriverName,
    /// The node that it runs on.
    pub node_id: NodeName,
    /// The daemon's control socket.
    pub control: PathBuf,
}

impl Plugin {
    /// The daemon; anew for each call, since it may be another one by now.
    async fn daemon(&self) -> Result<ControlClient<Channel>, Status> {
        control::connect(&self.control).await.map_err(|error| {
            Status::unavailable(format!(
                "the daemon does not answer at {}: {error}",
                self.control.display()
            ))
        })
    }
}

/// The plugin can't run.
#[derive(Debug, thiserror::Error)]
pub enum CsiError {
    /// A socket can't be used.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A socket broke.
    #[error("the plugin's socket: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// Serves the plugin at `endpoint`, and tells the kubelet of it if its directory of plugins is
/// given, until `stop`. Calls that are under way then are cut off; the daemon finishes them.
///
/// # Errors
/// When a socket can't be had or breaks.
pub async fn serve(
    plugin: Plugin,
    endpoint: &Path,
    registration_dir: Option<&Path>,
    stop: impl Future<Output = ()>,
) -> Result<(), CsiError> {
    let listener = UnixListenerStream::new(bind_socket(endpoint)?);
    let registration = match registration_dir {
        None => None,
        Some(dir) => {
            let path = dir.join(format!("{}-reg.sock", plugin.driver));
            Some((UnixListenerStream::new(bind_socket(&path)?), path))
        }
    };
    info!(driver = %plugin.driver, endpoint = %endpoint.display(), "plugin ready");
    let (driver, node) = (plugin.driver.clone(), plugin.node_id.clone());
    let services = Server::builder()
        .add_service(IdentityServer::new(plugin.clone()))
        .add_service(NodeServer::new(plugin))
        .serve_with_incoming(listener);
    let registered = async {
        let Some((listener, path)) = registration else { return std::future::pending().await };
        let registration = Registration { driver, endpoint: endpoint.to_owned() };
        info!(node = node.0, socket = %path.display(), "the kubelet is told");
        Server::builder()
            .add_service(RegistrationServer::new(registration))
            .serve_with_incoming(listener)
            .await
    };
    tokio::select! {
        ended = services => Ok(ended?),
        ended = registered => Ok(ended?),
        () = stop => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_csi_allows() {
        assert_eq!(DEFAULT_DRIVER.parse::<DriverName>().unwrap().to_string(), DEFAULT_DRIVER);
        for bad in ["", "-a", "a.", "a/b", "a b", &"a".repeat(64)] {
            assert!(bad.parse::<DriverName>().is_err(), "{bad:?}");
        }
        assert!("node-1".parse::<NodeName>().is_ok());
        assert_eq!("".parse::<NodeName>(), Err(NameError::Node));
        assert_eq!("n".repeat(257).parse::<NodeName>(), Err(NameError::Node));
    }
}
