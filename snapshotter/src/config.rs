//! The configuration: one TOML file, and the one place where every default is.
//!
//! Invariants: an unknown key is refused (a misspelt one would silently do nothing), and each key
//! that exists is described in `keys.rs`.

mod keys;
mod peers;
mod tables;
mod values;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use toml::Table;
use weightfs_fusefs::index::find::Believe;
use weightfs_fusefs::index::signature::{KeyError, PublicKey};
use weightfs_store::{
    AccessOptions, Amount, CacheOptions, CredentialOptions, FetchOptions, KeepDigests,
    PluginOptions, Registries, RegistryOptions, SourceError, StoreOptions,
};

use self::keys::{nearest_key, unknown_key};
pub use self::peers::{PeerTrust, PeersConfig};
pub use self::tables::{
    CacheConfig, ContainerdConfig, ControlConfig, CredentialsConfig, CriConfig, DragonflyConfig,
    FetchConfig, IndexConfig, MetricsConfig, MirrorsConfig, RegistryConfig, SnapshotterConfig,
    VerifyConfig,
};
pub use self::values::{ListenAddress, Space};
use crate::indexes::{IndexPolicy, Indexes};

/// Where the configuration is looked for; its absence means defaults.
pub const DEFAULT_PATH: &str = "/etc/weightfs/config.toml";

/// Largest configuration file that is read, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

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

#[cfg(test)]
mod tests {
    use super::keys::KEYS;
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
            ("[peers]\nlisten = '0.0.0.0:7700'\nservice = 'a:1'", "namespace/name:port"),
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
