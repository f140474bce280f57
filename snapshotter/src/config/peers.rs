//! `[peers]`: the other nodes of the cluster.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use weightfs_peers::{Files, Members, Options, Transport, Trust};

/// `[peers]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PeersConfig {
    /// Where others reach this node; without it there are no peers.
    pub listen: Option<SocketAddr>,
    /// This node's name among the members.
    pub name: Option<String>,
    /// The members.
    pub members: Option<Vec<String>>,
    /// A name whose addresses are the members.
    pub dns: Option<String>,
    /// A service of Kubernetes whose endpoints are the members.
    pub service: Option<String>,
    /// Whose bytes are used.
    pub trust: PeerTrust,
    /// Answers to others at once.
    pub uploads: usize,
    /// The authority of all peers' certificates.
    pub ca_file: Option<PathBuf>,
    /// This node's certificate.
    pub cert_file: Option<PathBuf>,
    /// Its key.
    pub key_file: Option<PathBuf>,
    /// The name in all peers' certificates.
    pub server_name: Option<String>,
    /// Plain text.
    pub plaintext: bool,
}

/// Whose bytes are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerTrust {
    /// Those that can be compared with a digest, chunk by chunk.
    Digest,
    /// All.
    Cluster,
}

impl Default for PeersConfig {
    fn default() -> Self {
        Self {
            listen: None,
            name: None,
            members: None,
            dns: None,
            service: None,
            trust: PeerTrust::Digest,
            uploads: 32,
            ca_file: None,
            cert_file: None,
            key_file: None,
            server_name: None,
            plaintext: false,
        }
    }
}

/// What is wrong: the key, and what would be right.
type Problem = (&'static str, &'static str);

impl PeersConfig {
    /// What the peers need of it; `None` if there are to be none.
    ///
    /// # Errors
    /// A key that is missing or makes no sense.
    pub fn options(&self) -> Result<Option<Options>, Problem> {
        let Some(listen) = self.listen else { return Ok(None) };
        let members = match (&self.members, &self.dns, &self.service) {
            (Some(members), None, None) => Members::Listed(members.clone()),
            (None, Some(name), None) => Members::Dns(name.clone()),
            (None, None, Some(service)) => Members::Service(
                service.parse().map_err(|_| ("peers.service", "must be namespace/name:port"))?,
            ),
            _ => {
                let wanted = "or peers.dns or peers.service must be given, and only one of them";
                return Err(("peers.members", wanted));
            }
        };
        let names = match &members {
            Members::Listed(names) => names.as_slice(),
            Members::Dns(name) => std::slice::from_ref(name),
            Members::Service(_) => &[],
        };
        if !names.iter().chain(&self.name).all(|name| is_host_and_port(name)) {
            return Err(("peers.members", "must be host:port each, as peers.name and peers.dns"));
        }
        if !(1..=1024).contains(&self.uploads) {
            return Err(("peers.uploads", "must be from 1 to 1024"));
        }
        let trust = match self.trust {
            PeerTrust::Digest => Trust::Digest,
            PeerTrust::Cluster => Trust::Cluster,
        };
        let (name, uploads) = (self.name.clone(), self.uploads);
        let transport = self.transport(listen)?;
        Ok(Some(Options { listen, name, members, transport, trust, uploads }))
    }

    fn transport(&self, listen: SocketAddr) -> Result<Transport, Problem> {
        match (&self.ca_file, &self.cert_file, &self.key_file) {
            (None, None, None) if self.plaintext && listen.ip().is_loopback() => {
                Ok(Transport::Plaintext)
            }
            (None, None, None) if self.plaintext => {
                Err(("peers.plaintext", "is for a loopback address only"))
            }
            (Some(ca), Some(certificate), Some(key)) if !self.plaintext => {
                Ok(Transport::Tls(Files {
                    ca: ca.clone(),
                    certificate: certificate.clone(),
                    key: key.clone(),
                    server_name: self.server_name.clone(),
                }))
            }
            _ => {
                Err(("peers.ca_file", "peers.cert_file and peers.key_file must be given together"))
            }
        }
    }
}

fn is_host_and_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-._[]:".contains(&byte);
    !host.is_empty() && text.len() <= 261 && host.bytes().all(fits) && port.parse::<u16>().is_ok()
}
