//! Where credentials come from: sources that are asked in a configured order, and anew whenever a
//! token is, so that a secret that was rotated is found.
//!
//! Invariants: a secret is in memory only, and in nothing that can be printed: `Debug` hides it, and
//! errors say where credentials come from and whose they are. What foreign files and programs give is
//! bounded. A source that fails is said so, and does not keep the others from being asked.

mod docker;
mod exec;
mod images;
mod plugins;
mod pull_secrets;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt as _;

use self::plugins::Plugins;
pub use self::pull_secrets::{Noted, PullSecrets};
use super::Repository;

/// Largest file of credentials that is read, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The credentials that one source may give for a repository.
const MAX_OF_ONE_SOURCE: usize = 8;

/// The user name with which registries that hand out identity tokens take one for a password
/// (Azure Container Registry, "Authenticate with an Azure container registry").
pub(super) const IDENTITY_TOKEN_USER: &str = "00000000-0000-0000-0000-000000000000";

/// A password or a token.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides it.
    pub const fn new(text: String) -> Self {
        Self(text)
    }

    /// To be sent to whom it is for, and to be written nowhere.
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Who we are to a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A user's name and password, or what stands for them.
    Password {
        /// The name.
        user: String,
        /// The password.
        password: Secret,
    },
    /// What the token server gives tokens for (OAuth 2, "refresh token").
    IdentityToken(Secret),
    /// What the registry takes as it is.
    RegistryToken(Secret),
}

impl fmt::Display for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Password { user, .. } => write!(f, "user {user:?}"),
            Self::IdentityToken(_) => f.write_str("the identity token"),
            Self::RegistryToken(_) => f.write_str("the registry token"),
        }
    }
}

/// A kind of source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CredentialSource {
    /// What the kubelet said when it pulled an image.
    PullSecrets,
    /// A file of our own, in docker's format.
    File,
    /// docker's config.json, with credential helpers.
    Docker,
    /// The kubelet's credential provider plugins.
    KubeletPlugins,
}

impl CredentialSource {
    /// From what is said for one repository to what is said for a machine.
    pub const ALL: [Self; 4] = [Self::PullSecrets, Self::File, Self::Docker, Self::KubeletPlugins];
}

/// Which sources there are, and where.
#[derive(Debug, Clone)]
pub struct CredentialOptions {
    /// The order in which they are asked.
    pub sources: Vec<CredentialSource>,
    /// The directory with docker's config.json. Default: `$DOCKER_CONFIG`, else `~/.docker`.
    pub docker_config: Option<PathBuf>,
    /// A file in the format of config.json that only its owner may read.
    pub file: Option<PathBuf>,
    /// The kubelet's plugins.
    pub plugins: Option<PluginOptions>,
}

impl Default for CredentialOptions {
    fn default() -> Self {
        Self {
            sources: CredentialSource::ALL.to_vec(),
            docker_config: None,
            file: None,
            plugins: None,
        }
    }
}

/// The kubelet's credential provider plugins, as the kubelet is told of them.
#[derive(Debug, Clone)]
pub struct PluginOptions {
    /// `--image-credential-provider-config`
    pub config: PathBuf,
    /// `--image-credential-provider-bin-dir`
    pub directory: PathBuf,
}

/// Credentials, and which source gave them, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) credentials: Credentials,
    pub(super) source: String,
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} from {}", self.credentials, self.source)
    }
}

/// What all sources had.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// In the order in which to try them.
    pub(super) candidates: Vec<Candidate>,
    /// Sources that had nothing for the repository, in words.
    pub(super) empty: Vec<String>,
    /// Sources that failed, and why.
    pub(super) failed: Vec<String>,
}

/// The sources.
#[derive(Debug)]
pub(super) struct Sources {
    options: CredentialOptions,
    pull_secrets: Arc<PullSecrets>,
    plugins: Option<Plugins>,
}

impl Sources {
    pub(super) fn new(mut options: CredentialOptions) -> Self {
        options.docker_config = options.docker_config.or_else(docker::default_directory);
        let plugins = options.plugins.clone().map(Plugins::new);
        Self { options, pull_secrets: Arc::default(), plugins }
    }

    pub(super) fn pull_secrets(&self) -> &Arc<PullSecrets> {
        &self.pull_secrets
    }

    /// Asks all of them.
    pub(super) async fn find(&self, to: &Repository) -> Found {
        let mut found = Found::default();
        for source in &self.options.sources {
            let Some((name, asked)) = self.ask(*source, to).await else { continue };
            match asked {
                Ok(credentials) if credentials.is_empty() => found.empty.push(name),
                Ok(credentials) => {
                    for credentials in credentials.into_iter().take(MAX_OF_ONE_SOURCE) {
                        let known = |known: &Candidate| known.credentials == credentials;
                        if !found.candidates.iter().any(known) {
                            found.candidates.push(Candidate { credentials, source: name.clone() });
                        }
                    }
                }
                Err(why) => found.failed.push(format!("{name}: {why}")),
            }
        }
        found
    }

    /// What a source is called, and what it has for the repository; nothing if there is no such
    /// source here.
    async fn ask(
        &self,
        source: CredentialSource,
        to: &Repository,
    ) -> Option<(String, Result<Vec<Credentials>, String>)> {
        let options = &self.options;
        Some(match source {
            CredentialSource::PullSecrets if !self.pull_secrets.is_fed() => return None,
            CredentialSource::PullSecrets => {
                ("the kubelet's pull secrets".into(), Ok(self.pull_secrets.of(to)))
            }
            CredentialSource::File => {
                let path = options.file.as_ref()?;
                (path.display().to_string(), docker::own_file(path, to).await)
            }
            CredentialSource::Docker => {
                let path = options.docker_config.as_ref()?.join("config.json");
                (path.display().to_string(), docker::config(&path, to).await)
            }
            CredentialSource::KubeletPlugins => {
                let plugins = self.plugins.as_ref()?;
                (plugins.name(), plugins.find(to).await)
            }
        })
    }

    /// These were refused: what is remembered of them is not good any more.
    pub(super) fn refused(&self, credentials: &Credentials) {
        if let Some(plugins) = &self.plugins {
            plugins.forget(credentials);
        }
    }
}

/// Reads a file to its end, and no more than [`MAX_FILE_BYTES`] of it.
async fn read(path: &Path) -> io::Result<Vec<u8>> {
    read_open(tokio::fs::File::open(path).await?).await
}

async fn read_open(file: tokio::fs::File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![];
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).await?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::other("it is larger than 1 MiB"));
    }
    Ok(bytes)
}
