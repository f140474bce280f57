//! The tables of the configuration, with their defaults.

use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use weightfs_store::{Background, CredentialSource, Dragonfly, Recheck, Verify};

use super::values::{ListenAddress, Space, exactly};
use crate::indexes::IndexPolicy;

/// `[snapshotter]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SnapshotterConfig {
    /// Its socket.
    pub address: PathBuf,
    /// Layers below this size are pulled: one download is quicker than many reads.
    #[serde(serialize_with = "exactly")]
    pub min_layer_size: ByteSize,
}

impl Default for SnapshotterConfig {
    fn default() -> Self {
        Self { address: "/run/weightfs/snapshotter.sock".into(), min_layer_size: ByteSize::mib(8) }
    }
}

/// `[control]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ControlConfig {
    /// Its socket.
    pub address: PathBuf,
}

impl Default for ControlConfig {
    fn default() -> Self {
        Self { address: "/run/weightfs/control.sock".into() }
    }
}

/// `[metrics]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MetricsConfig {
    /// Where they can be had.
    pub address: Option<ListenAddress>,
}

/// `[containerd]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ContainerdConfig {
    /// Its configuration file.
    pub config: PathBuf,
    /// Its program: a path, or a name to look for in `PATH`.
    pub program: PathBuf,
}

impl Default for ContainerdConfig {
    fn default() -> Self {
        Self { config: "/etc/containerd/config.toml".into(), program: "containerd".into() }
    }
}

/// `[cri]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CriConfig {
    /// Its socket.
    pub address: Option<PathBuf>,
    /// Who answers.
    pub containerd: PathBuf,
}

impl Default for CriConfig {
    fn default() -> Self {
        Self { address: None, containerd: "/run/containerd/containerd.sock".into() }
    }
}

/// `[cache]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheConfig {
    /// Disk space for the cache.
    pub limit: Option<Space>,
    /// Disk space that stays free.
    pub min_free: Space,
    /// What was fetched is recorded within this time.
    #[serde(with = "humantime_serde")]
    pub checkpoint_interval: Duration,
    /// When bytes are served.
    pub verify: Verify,
    /// When it is hashed again.
    pub recheck: Recheck,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            limit: None,
            // Less than what makes the kubelet evict (imagefs 15 %, nodefs 10 %): whoever shares
            // the file system with it sets more.
            min_free: Space::Percent(5),
            // Measured: more often costs throughput, less often loses more.
            checkpoint_interval: Duration::from_millis(250),
            verify: Verify::Background,
            recheck: Recheck::AfterCrash,
        }
    }
}

/// `[verify]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VerifyConfig {
    /// Which indexes are believed.
    pub referrers: IndexPolicy,
    /// Files of public keys.
    pub keys: Vec<PathBuf>,
}

impl Default for VerifyConfig {
    fn default() -> Self {
        Self { referrers: IndexPolicy::SameRepository, keys: vec![] }
    }
}

/// `[index]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IndexConfig {
    /// Whether what was verified here is indexed and pushed.
    pub publish: bool,
}

/// `[fetch]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FetchConfig {
    /// Each read ends within this time.
    #[serde(with = "humantime_serde")]
    pub deadline: Duration,
    /// Requests in flight for one blob.
    pub connections: usize,
    /// Requests in flight to one host.
    pub connections_per_host: usize,
    /// Bytes of one request at the most.
    #[serde(serialize_with = "exactly")]
    pub request_size: ByteSize,
    /// First read-ahead window.
    #[serde(serialize_with = "exactly")]
    pub read_ahead_min: ByteSize,
    /// Largest read-ahead window.
    #[serde(serialize_with = "exactly")]
    pub read_ahead_max: ByteSize,
    /// What is fetched without being asked for.
    pub background: Background,
    /// Whether what a loader will read is fetched before it does.
    pub prefetch: bool,
}

impl Default for FetchConfig {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(30),
            connections: 32,
            connections_per_host: 64,
            request_size: ByteSize::mib(16),
            read_ahead_min: ByteSize::mib(8),
            read_ahead_max: ByteSize::mib(256),
            background: Background::TouchedFiles,
            prefetch: true,
        }
    }
}

/// `[credentials]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CredentialsConfig {
    /// The order in which sources are asked.
    pub sources: Vec<CredentialSource>,
    /// Directory of docker's config.json.
    pub docker_config: Option<PathBuf>,
    /// A file in the same format.
    pub file: Option<PathBuf>,
    /// The kubelet's configuration of its plugins.
    pub plugin_config: Option<PathBuf>,
    /// Where its plugins are.
    pub plugin_dir: PathBuf,
}

impl Default for CredentialsConfig {
    fn default() -> Self {
        Self {
            sources: CredentialSource::ALL.to_vec(),
            docker_config: None,
            file: None,
            plugin_config: None,
            // Where distributions of Kubernetes put it.
            plugin_dir: "/usr/libexec/kubernetes/image-credential-provider-plugins".into(),
        }
    }
}

/// `[mirrors]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MirrorsConfig {
    /// Where containerd's hosts.toml files are.
    pub hosts_dir: PathBuf,
}

impl Default for MirrorsConfig {
    fn default() -> Self {
        // Where containerd's own configuration has it (`config_path` of its CRI plugin).
        Self { hosts_dir: "/etc/containerd/certs.d".into() }
    }
}

/// `[dragonfly]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DragonflyConfig {
    /// The proxy of its daemon.
    pub endpoint: Option<String>,
    /// What keeps its tasks apart.
    pub tag: Option<String>,
}

impl DragonflyConfig {
    /// The daemon, if there is one, or what is wrong with it, in words.
    pub(super) fn daemon(&self) -> Option<Result<Dragonfly, String>> {
        let endpoint = self.endpoint.as_deref()?;
        Some(Dragonfly::new(endpoint, self.tag.as_deref()))
    }
}

/// `[registry."host:port"]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// Plain HTTP.
    pub plain_http: Option<bool>,
    /// Certificate authorities.
    pub ca_file: Option<PathBuf>,
}
