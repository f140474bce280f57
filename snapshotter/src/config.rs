//! The configuration: one TOML file, and the one place where every default is.
//!
//! Invariants: an unknown key is refused (a misspelt one would silently do nothing), and each key
//! that exists is described in `KEYS`.

mod peers;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};
use weightfs_fusefs::index::find::Believe;
use weightfs_fusefs::index::signature::{KeyError, PublicKey};
use weightfs_store::{
    AccessOptions, Amount, Background, CacheOptions, CredentialOptions, CredentialSource,
    Dragonfly, FetchOptions, KeepDigests, PluginOptions, Recheck, Registries, RegistryOptions,
    SourceError, StoreOptions, Verify,
};

pub use self::peers::{PeerTrust, PeersConfig};
use crate::indexes::{IndexPolicy, Indexes};

/// Where the configuration is looked for; its absence means defaults.
pub const DEFAULT_PATH: &str = "/etc/weightfs/config.toml";

/// Largest configuration file that is read, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Every key with what it means; `*` stands for a name of the user's choice.
const KEYS: &[(&str, &str)] = &[
    ("root", "State directory: a local file system (ext4, xfs), one owner at a time."),
    ("snapshotter.address", "Unix socket on which containerd reaches the snapshotter."),
    (
        "snapshotter.min_layer_size",
        "Image layers in plain tar from this size on are mounted lazily; smaller ones are pulled.",
    ),
    ("control.address", "Unix socket on which this command line reaches the daemon."),
    (
        "metrics.address",
        "Prometheus metrics, by HTTP: a port of this machine (\"9478\"), or an address (\"0.0.0.0:9478\"). Unset: none.",
    ),
    ("containerd.config", "containerd's configuration, for `doctor` and `node install`."),
    ("containerd.program", "containerd's program, which knows what it is told."),
    (
        "cache.limit",
        "Disk space that the cache may take (\"500GiB\", \"80%\" of the file system). Unset: all but min_free.",
    ),
    (
        "cache.min_free",
        "What the cache leaves free of its file system (\"50GiB\", \"15%\"), whoever fills the rest.",
    ),
    (
        "cache.checkpoint_interval",
        "How long what was fetched may wait until it is synced and recorded (it survives a crash).",
    ),
    (
        "cache.recheck",
        "When what is cached is hashed again: \"after-crash\" of the machine, \"always\", \"never\".",
    ),
    (
        "cache.verify",
        "\"background\": serve what comes over a trusted transport, hash the whole when it is here; \"strict\": serve nothing of a blob before all of it is here and verified.",
    ),
    (
        "verify.referrers",
        "Which indexes beside an artifact are believed: those of the \"same-repository\", those that are \"signed\", none (\"off\"). One that the manifest names by its digest, or a file that is given, is believed in any case.",
    ),
    (
        "verify.keys",
        "Public keys (PEM files, as cosign makes them) of which one must have signed an index.",
    ),
    (
        "index.publish",
        "Make and push the index of an artifact that was loaded and verified here and has none.",
    ),
    ("fetch.deadline", "A read that no source has served within this time fails with EIO."),
    ("fetch.connections", "Requests in flight for one blob at the most."),
    (
        "fetch.connections_per_host",
        "Requests in flight to one host at the most; as many are sent as bring throughput.",
    ),
    ("fetch.request_size", "Bytes of one ranged request at the most."),
    ("fetch.read_ahead_min", "First read-ahead window of a sequential reader."),
    ("fetch.read_ahead_max", "Largest read-ahead window of a sequential reader."),
    (
        "fetch.background",
        "What is fetched unasked: the rest of \"touched-files\", \"everything\", or nothing (\"off\").",
    ),
    ("fetch.prefetch", "Fetch the headers, tokenizers and next shards that a loader will read."),
    (
        "credentials.sources",
        "Where credentials are looked for, in this order: what the kubelet tells the CRI proxy (\"pull-secrets\"), credentials.file (\"file\"), docker's config.json with its helpers (\"docker\"), and the kubelet's plugins (\"kubelet-plugins\").",
    ),
    (
        "credentials.docker_config",
        "Directory of docker's config.json. Unset: $DOCKER_CONFIG, else ~/.docker.",
    ),
    (
        "credentials.file",
        "A file in the format of docker's config.json, root's and with mode 0600. Unset: none.",
    ),
    (
        "credentials.plugin_config",
        "The kubelet's --image-credential-provider-config. Unset: its plugins are not asked.",
    ),
    ("credentials.plugin_dir", "The kubelet's --image-credential-provider-bin-dir."),
    (
        "cri.address",
        "Unix socket for the kubelet's --image-service-endpoint: all goes on to containerd, and the pull secrets are remembered (in memory) for lazy reads. Unset: none.",
    ),
    ("cri.containerd", "containerd's socket, which answers what comes to cri.address."),
    (
        "mirrors.hosts_dir",
        "containerd's directory of hosts.toml files, for registries that have no table here.",
    ),
    ("peers.listen", "Address and port at which other nodes reach this one. Unset: no peers."),
    (
        "peers.name",
        "This node among the members (\"host:port\"). Unset: the member that is an address of this machine.",
    ),
    ("peers.members", "All nodes, this one included: [\"host:port\", …]."),
    (
        "peers.dns",
        "Instead: a name whose addresses are the members (\"name:port\"), as of a headless service.",
    ),
    (
        "peers.trust",
        "\"digest\": bytes of peers are used where each chunk has a digest (an index); \"cluster\": always, and the whole is hashed when it is here.",
    ),
    ("peers.uploads", "Answers to other nodes at once; more are refused, and they ask elsewhere."),
    ("peers.ca_file", "PEM file of the authority that all peers' certificates are from."),
    ("peers.cert_file", "PEM file of this node's certificate, for servers and clients."),
    ("peers.key_file", "PEM file of its key. All three are read again when they change."),
    (
        "peers.server_name",
        "The name in all peers' certificates. Unset: each has the host that it is a member by.",
    ),
    ("peers.plaintext", "No TLS: between daemons on one machine, on loopback only."),
    (
        "dragonfly.endpoint",
        "The proxy of Dragonfly's daemon on this node (\"http://127.0.0.1:4001\"): blobs are fetched through it first. Unset: not used.",
    ),
    (
        "dragonfly.tag",
        "Keeps Dragonfly's tasks apart from those with another tag, or with none, on all nodes.",
    ),
    ("registry.*.plain_http", "Plain HTTP. Unset: only on loopback, as docker does it."),
    ("registry.*.ca_file", "PEM file of certificate authorities besides the system's."),
];

/// The tables, in the order in which they are printed; those of registries follow.
const SECTIONS: [&str; 13] = [
    "snapshotter",
    "control",
    "metrics",
    "containerd",
    "cri",
    "cache",
    "verify",
    "index",
    "fetch",
    "credentials",
    "mirrors",
    "peers",
    "dragonfly",
];

/// What WeightFS was told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The state directory.
    pub root: PathBuf,
    /// The containerd plugin.
    pub snapshotter: SnapshotterConfig,
    /// The control socket.
    pub control: ControlConfig,
    /// The metrics address.
    pub metrics: MetricsConfig,
    /// containerd.
    pub containerd: ContainerdConfig,
    /// The image service for the kubelet.
    pub cri: CriConfig,
    /// The cache.
    pub cache: CacheConfig,
    /// What is believed.
    pub verify: VerifyConfig,
    /// Making indexes.
    pub index: IndexConfig,
    /// How misses are filled.
    pub fetch: FetchConfig,
    /// Where credentials come from.
    pub credentials: CredentialsConfig,
    /// Other hosts that answer for registries.
    pub mirrors: MirrorsConfig,
    /// Other nodes.
    pub peers: PeersConfig,
    /// Dragonfly.
    pub dragonfly: DragonflyConfig,
    /// Registries by `host` or `host:port`.
    pub registry: BTreeMap<String, RegistryConfig>,
}

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

/// `[mirrors]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MirrorsConfig {
    /// Where containerd's hosts.toml files are.
    pub hosts_dir: PathBuf,
}

/// `[control]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ControlConfig {
    /// Its socket.
    pub address: PathBuf,
}

/// `[metrics]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MetricsConfig {
    /// Where they can be had.
    pub address: Option<ListenAddress>,
}

/// Where to listen: a port, which means this machine alone, or an address with a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ListenAddress(pub SocketAddr);

impl TryFrom<String> for ListenAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let loopback = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let address = text.parse().map(loopback).or_else(|_| text.parse());
        address.map(Self).map_err(|_| {
            format!("{text:?} is neither a port (\"9478\") nor an address (\"0.0.0.0:9478\")")
        })
    }
}

impl From<ListenAddress> for String {
    fn from(ListenAddress(address): ListenAddress) -> Self {
        address.to_string()
    }
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

/// `[cri]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CriConfig {
    /// Its socket.
    pub address: Option<PathBuf>,
    /// Who answers.
    pub containerd: PathBuf,
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

/// `[verify]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VerifyConfig {
    /// Which indexes are believed.
    pub referrers: IndexPolicy,
    /// Files of public keys.
    pub keys: Vec<PathBuf>,
}

/// `[index]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IndexConfig {
    /// Whether what was verified here is indexed and pushed.
    pub publish: bool,
}

/// Disk space: bytes ("10GiB"), or a percentage of the file system ("10%").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Space {
    /// So many bytes.
    Bytes(ByteSize),
    /// So many hundredths.
    Percent(u8),
}

impl TryFrom<String> for Space {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let Some(percent) = text.strip_suffix('%') else {
            return Ok(Self::Bytes(text.parse()?));
        };
        let percent = percent.trim().parse().ok().filter(|percent| *percent <= 100);
        percent.map(Self::Percent).ok_or_else(|| format!("{text} is no percentage"))
    }
}

/// A size that reads as the same: "8.0 MiB", or in bytes where that would round it.
fn size_text(size: ByteSize) -> String {
    let short = size.to_string();
    if short.parse() == Ok(size) { short } else { format!("{}B", size.as_u64()) }
}

/// Writes a size as [`size_text`].
fn exactly<S: serde::Serializer>(size: &ByteSize, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&size_text(*size))
}

impl From<Space> for String {
    fn from(space: Space) -> Self {
        match space {
            Space::Bytes(bytes) => size_text(bytes),
            Space::Percent(percent) => format!("{percent}%"),
        }
    }
}

impl From<Space> for Amount {
    fn from(space: Space) -> Self {
        match space {
            Space::Bytes(bytes) => Self::Bytes(bytes.as_u64()),
            Space::Percent(percent) => Self::Percent(percent),
        }
    }
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
    fn daemon(&self) -> Option<Result<Dragonfly, String>> {
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

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/weightfs".into(),
            snapshotter: SnapshotterConfig::default(),
            control: ControlConfig::default(),
            metrics: MetricsConfig::default(),
            containerd: ContainerdConfig::default(),
            cri: CriConfig::default(),
            cache: CacheConfig::default(),
            verify: VerifyConfig::default(),
            index: IndexConfig::default(),
            fetch: FetchConfig::default(),
            credentials: CredentialsConfig::default(),
            mirrors: MirrorsConfig::default(),
            peers: PeersConfig::default(),
            dragonfly: DragonflyConfig::default(),
            registry: BTreeMap::new(),
        }
    }
}

impl Default for SnapshotterConfig {
    fn default() -> Self {
        Self { address: "/run/weightfs/snapshotter.sock".into(), min_layer_size: ByteSize::mib(8) }
    }
}

impl Default for ControlConfig {
    fn default() -> Self {
        Self { address: "/run/weightfs/control.sock".into() }
    }
}

impl Default for ContainerdConfig {
    fn default() -> Self {
        Self { config: "/etc/containerd/config.toml".into(), program: "containerd".into() }
    }
}

impl Default for CriConfig {
    fn default() -> Self {
        Self { address: None, containerd: "/run/containerd/containerd.sock".into() }
    }
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

impl Default for MirrorsConfig {
    fn default() -> Self {
        // Where containerd's own configuration has it (`config_path` of its CRI plugin).
        Self { hosts_dir: "/etc/containerd/certs.d".into() }
    }
}

impl Default for VerifyConfig {
    fn default() -> Self {
        Self { referrers: IndexPolicy::SameRepository, keys: vec![] }
    }
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

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The file is no TOML, or a value has the wrong type.
    #[error("{}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, column and what was expected.
        message: String,
    },
    /// There is no such key.
    #[error("{}: unknown key `{key}`; the nearest known key is `{nearest}`", path.display())]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key, with its tables.
        key: String,
        /// What was probably meant.
        nearest: String,
    },
    /// A value makes no sense.
    #[error("{}: `{key}` {problem}", path.display())]
    BadValue {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong and what would be right.
        problem: String,
    },
}

impl Config {
    /// Reads `path`. Without one, [`DEFAULT_PATH`] if it is there, else the defaults.
    ///
    /// # Errors
    /// A named file that is not there, bad TOML, unknown keys, impossible values.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let named = path.is_some();
        let path = path.unwrap_or(Path::new(DEFAULT_PATH));
        match read_bounded(path) {
            Ok(text) => Self::parse(&text, path),
            Err(error) if !named && error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(source) => Err(ConfigError::Read { path: path.into(), source }),
        }
    }

    /// Parses the text of `path`.
    ///
    /// # Errors
    /// See [`Config::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let syntax = |error: toml::de::Error| ConfigError::Syntax {
            path: path.into(),
            message: error.to_string().trim_end().into(),
        };
        let table: Table = toml::from_str(text).map_err(syntax)?;
        if let Some(key) = unknown_key(&table, "") {
            let nearest = nearest_key(&key);
            return Err(ConfigError::UnknownKey { path: path.into(), key, nearest });
        }
        let config: Self = toml::from_str(text).map_err(syntax)?;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let fetch = &self.fetch;
        let mib = 1 << 20;
        let bad = |key, problem: &str| {
            Err(ConfigError::BadValue { path: path.into(), key, problem: problem.into() })
        };
        if !self.root.is_absolute() {
            return bad("root", "must be an absolute path");
        }
        if fetch.deadline.is_zero() {
            return bad("fetch.deadline", "must be longer than 0s");
        }
        if self.cache.checkpoint_interval < Duration::from_millis(100) {
            return bad("cache.checkpoint_interval", "must be 100ms or longer");
        }
        match self.cache.limit {
            Some(Space::Bytes(limit)) if limit < ByteSize::mib(64) => {
                return bad("cache.limit", "must be 64MiB or more");
            }
            Some(Space::Percent(0)) => return bad("cache.limit", "must be more than 0%"),
            _ => {}
        }
        if self.verify.referrers == IndexPolicy::Signed && self.verify.keys.is_empty() {
            return bad(
                "verify.keys",
                "must name a public key where verify.referrers is \"signed\": the file that \
                 `cosign generate-key-pair` calls cosign.pub",
            );
        }
        if let Err((key, problem)) = self.peers.options() {
            return bad(key, problem);
        }
        if self.peers.listen.is_some() && self.dragonfly.endpoint.is_some() {
            return bad("peers.listen", "and dragonfly.endpoint exclude each other");
        }
        if let Some(Err(problem)) = self.dragonfly.daemon() {
            return bad("dragonfly.endpoint", &format!("can't be used: {problem}"));
        }
        if !(1..=256).contains(&fetch.connections) {
            return bad("fetch.connections", "must be from 1 to 256");
        }
        if !(1..=256).contains(&fetch.connections_per_host) {
            return bad("fetch.connections_per_host", "must be from 1 to 256");
        }
        if !(mib..=64 * mib).contains(&fetch.request_size.as_u64()) {
            return bad("fetch.request_size", "must be from 1MiB to 64MiB");
        }
        if fetch.read_ahead_min > fetch.read_ahead_max {
            return bad("fetch.read_ahead_min", "must not be larger than fetch.read_ahead_max");
        }
        if self.cri.address.as_deref() == Some(&*self.cri.containerd) {
            return bad("cri.address", "must not be containerd's own socket");
        }
        Ok(())
    }

    /// What the store needs of it.
    pub fn store_options(&self) -> StoreOptions {
        let fetch = &self.fetch;
        StoreOptions {
            fetch: FetchOptions {
                deadline: fetch.deadline,
                connections: fetch.connections,
                connections_per_host: fetch.connections_per_host,
                request_bytes: fetch.request_size.as_u64(),
                read_ahead_min: fetch.read_ahead_min.as_u64(),
                read_ahead_max: fetch.read_ahead_max.as_u64(),
                background: fetch.background,
                prefetch: fetch.prefetch,
            },
            cache: CacheOptions {
                limit: self.cache.limit.map(Amount::from),
                min_free: self.cache.min_free.into(),
            },
            checkpoint_interval: self.cache.checkpoint_interval,
            verify: self.cache.verify,
            recheck: self.cache.recheck,
            keep_digests: match self.index.publish {
                true => KeepDigests::Always,
                false => KeepDigests::WhereLimited,
            },
        }
    }

    /// What finds indexes.
    ///
    /// # Errors
    /// A public key that can't be used.
    pub fn indexes(&self) -> Result<Arc<Indexes>, KeyError> {
        let keys = || self.verify.keys.iter().map(|path| PublicKey::read(path));
        let believe = match self.verify.referrers {
            IndexPolicy::SameRepository => Some(Believe::SameRepository),
            IndexPolicy::Signed => Some(Believe::Signed(keys().collect::<Result<_, _>>()?)),
            IndexPolicy::Off => None,
        };
        Ok(Indexes::new(believe, self.cache.verify))
    }

    /// The registries that it speaks of, and all others.
    ///
    /// # Errors
    /// See [`Registries::new`].
    pub fn registries(&self) -> Result<Arc<Registries>, SourceError> {
        let options = |registry: &RegistryConfig| RegistryOptions {
            plain_http: registry.plain_http,
            ca_file: registry.ca_file.clone(),
        };
        let registries = self.registry.iter();
        let registries = registries.map(|(host, registry)| (host.clone(), options(registry)));
        let unusable = |message| SourceError::Unreachable {
            source_name: "the configuration's dragonfly.endpoint".to_owned(),
            message,
        };
        Registries::new(AccessOptions {
            registries: registries.collect(),
            hosts_dir: Some(self.mirrors.hosts_dir.clone()),
            credentials: self.credential_options(),
            dragonfly: self.dragonfly.daemon().transpose().map_err(unusable)?,
            timeout: self.fetch.deadline,
        })
    }

    fn credential_options(&self) -> CredentialOptions {
        let CredentialsConfig { sources, docker_config, file, plugin_config, plugin_dir } =
            self.credentials.clone();
        let plugins = plugin_config.map(|config| PluginOptions { config, directory: plugin_dir });
        CredentialOptions { sources, docker_config, file, plugins }
    }

    /// The whole configuration as commented TOML; read again, it gives the same.
    pub fn to_commented_toml(&self) -> String {
        let values = Table::try_from(self).unwrap_or_default();
        let mut text = String::new();
        render(&mut text, &values, "");
        for section in SECTIONS {
            text.push_str(&format!("\n[{section}]\n"));
            if let Some(Value::Table(table)) = values.get(section) {
                render(&mut text, table, &format!("{section}."));
            }
        }
        text.push_str("\n# [registry.\"host:port\"]\n");
        let empty = Table::new();
        render(&mut text, &empty, "registry.*.");
        for (host, registry) in &self.registry {
            text.push_str(&format!("\n[registry.{}]\n", Value::String(host.clone())));
            text.push_str(&toml::to_string(registry).unwrap_or_default());
        }
        text
    }
}

fn read_bounded(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_CONFIG_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_CONFIG_BYTES {
        return Err(std::io::Error::other("a configuration is 1 MiB at the most"));
    }
    Ok(text)
}

/// The keys directly below `prefix`, with their values or, where they have none, as a comment.
fn render(text: &mut String, values: &Table, prefix: &str) {
    for (key, comment) in KEYS {
        let Some(name) = key.strip_prefix(prefix).filter(|name| !name.contains('.')) else {
            continue;
        };
        text.push_str(&format!("# {comment}\n"));
        match values.get(name) {
            Some(value) => text.push_str(&format!("{name} = {value}\n")),
            None => text.push_str(&format!("# {name} =\n")),
        }
    }
}

/// The first key of `table`, with its tables, that [`KEYS`] does not have.
fn unknown_key(table: &Table, prefix: &str) -> Option<String> {
    table.iter().find_map(|(name, value)| {
        let known = match prefix {
            "registry." => format!("{prefix}*"),
            _ => format!("{prefix}{name}"),
        };
        let is_table = KEYS.iter().any(|(key, _)| key.starts_with(&format!("{known}.")));
        match value {
            Value::Table(inner) if is_table => unknown_key(inner, &format!("{known}.")),
            _ if is_table || KEYS.iter().any(|(key, _)| *key == known) => None,
            _ => Some(format!("{prefix}{name}")),
        }
    })
}

fn nearest_key(unknown: &str) -> String {
    let distance = |key: &str| strsim::damerau_levenshtein(key, unknown);
    let tables = KEYS.iter().filter_map(|(key, _)| key.split_once('.').map(|(table, _)| table));
    let candidates = KEYS.iter().map(|(key, _)| *key).chain(tables);
    candidates.min_by_key(|key| distance(key)).unwrap_or("root").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("test.toml"))
    }

    #[test]
    fn an_empty_file_means_defaults() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn a_metrics_address_without_a_host_is_this_machine_s() {
        let address = |text: &str| {
            let parsed = parse(&format!("[metrics]\naddress = {text:?}"));
            parsed.map(|config| config.metrics.address.unwrap().0.to_string())
        };
        assert_eq!(address("9478").unwrap(), "127.0.0.1:9478");
        assert_eq!(address("0.0.0.0:9478").unwrap(), "0.0.0.0:9478");
        assert_eq!(address("[::1]:9478").unwrap(), "[::1]:9478");
        assert!(parse("").unwrap().metrics.address.is_none(), "off unless it is asked for");
        for bad in ["", "localhost", "70000", ":9478", "1.2.3.4"] {
            let error = address(bad).unwrap_err().to_string();
            assert!(error.contains("neither a port"), "{error}");
        }
    }

    #[test]
    fn what_is_printed_is_read_again_as_the_same() {
        let text = r#"
            root = "/x"
            [cache]
            limit = "123456789012B"
            min_free = "15%"
            [verify]
            referrers = "signed"
            keys = ["/etc/weightfs/cosign.pub"]
            [index]
            publish = true
            [fetch]
            deadline = "1m 5s"
            request_size = "4MiB"
            [credentials]
            sources = ["docker", "file"]
            docker_config = "/root/.docker"
            [cri]
            address = "/run/weightfs/cri.sock"
            [registry."127.0.0.1:5000"]
            plain_http = true
        "#;
        let config = parse(text).unwrap();
        assert_eq!(config.fetch.deadline, Duration::from_secs(65));
        assert_eq!(config.fetch.request_size, ByteSize::mib(4));
        assert_eq!(config.cache.limit, Some(Space::Bytes(ByteSize(123_456_789_012))));
        assert_eq!(config.cache.min_free, Space::Percent(15));
        assert_eq!(parse(&config.to_commented_toml()).unwrap(), config);
        let defaults = Config::default();
        assert_eq!(parse(&defaults.to_commented_toml()).unwrap(), defaults);
    }

    #[test]
    fn every_key_is_described_and_printed() {
        let printed = Config::default().to_commented_toml();
        for (key, comment) in KEYS {
            let name = key.rsplit('.').next().unwrap();
            assert!(printed.contains(&format!("{name} =")), "{key}");
            assert!(printed.contains(comment), "{key}");
        }
        let table = Table::try_from(Config::default()).unwrap();
        assert_eq!(unknown_key(&table, ""), None, "a field without an entry in KEYS");
    }

    #[test]
    fn an_unknown_key_names_the_nearest_known_one() {
        for (text, key, nearest) in [
            ("rot = '/x'", "rot", "root"),
            ("[fetch]\ndedline = '1s'", "fetch.dedline", "fetch.deadline"),
            ("[snapshoter]\naddress = '/x'", "snapshoter", "snapshotter"),
            ("[registry.'a:1']\nplain_htp = true", "registry.*.plain_htp", "registry.*.plain_http"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(&format!("unknown key `{key}`")), "{error}");
            assert!(error.contains(&format!("`{nearest}`")), "{error}");
        }
    }

    #[test]
    fn a_wrong_value_names_the_file_and_the_key() {
        for (text, needle) in [
            ("root = 'relative'", "`root` must be an absolute path"),
            ("[fetch]\nconnections = 0", "`fetch.connections` must be from 1 to 256"),
            ("[fetch]\nrequest_size = '65MiB'", "`fetch.request_size`"),
            ("[fetch]\ndeadline = '0s'", "`fetch.deadline`"),
            ("[cache]\ncheckpoint_interval = '1ms'", "`cache.checkpoint_interval`"),
            ("[cache]\nlimit = '10MiB'", "`cache.limit` must be 64MiB or more"),
            ("[cache]\nlimit = '0%'", "`cache.limit`"),
            ("[cache]\nmin_free = '101%'", "no percentage"),
            ("[peers]\nlisten = '0.0.0.0:7700'", "`peers.members`"),
            ("[peers]\nlisten = '0.0.0.0:7700'\nmembers = ['a']", "host:port"),
            ("[peers]\nlisten = '0.0.0.0:7700'\nmembers = ['a:1']", "`peers.ca_file`"),
            ("[peers]\nlisten = '0.0.0.0:7700'\nmembers = ['a:1']\nplaintext = true", "loopback"),
            ("[peers]\nlisten = '[::1]:1'\ndns = 'a:1'\nplaintext = true\nuploads = 0", "1024"),
            ("[cri]\naddress = '/run/containerd/containerd.sock'", "`cri.address`"),
            ("[credentials]\nsources = ['keychain']", "line 2"),
            ("[fetch]\nread_ahead_min = '1GiB'", "`fetch.read_ahead_min`"),
            ("[verify]\nreferrers = 'signed'", "`verify.keys` must name a public key"),
            ("root = 3", "line 1"),
            ("root = ", "line 1"),
            ("[fetch]\nconnections = 'many'", "line 2"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with("test.toml: ") && error.contains(needle), "{error}");
        }
    }

    #[test]
    fn a_named_file_must_be_there() {
        let error = Config::load(Some(Path::new("/nonexistent/x.toml"))).unwrap_err();
        assert!(matches!(error, ConfigError::Read { .. }));
    }

    #[test]
    fn a_size_is_printed_as_it_is() {
        let text =
            "[snapshotter]\nmin_layer_size = \"8MB\"\n[fetch]\nrequest_size = \"4194305B\"\n";
        let config = parse(text).unwrap();
        assert_eq!(config.snapshotter.min_layer_size, ByteSize(8_000_000));
        assert_eq!(parse(&config.to_commented_toml()).unwrap(), config);
    }

    #[test]
    fn fuzz_configurations_are_refused_or_printed_as_the_same() {
        let sample = Config::default().to_commented_toml() + "[registry.'a:1']\nplain_http = true";
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&[sample.as_bytes()], input);
            let Ok(text) = std::str::from_utf8(&bytes) else { return };
            if let Ok(config) = parse(text) {
                assert_eq!(parse(&config.to_commented_toml()).unwrap(), config);
            }
        });
    }
}
