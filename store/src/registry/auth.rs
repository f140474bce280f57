//! Who we are to a registry: docker's credentials, and the tokens they are exchanged for.
//!
//! Tokens belong to a repository. One that is refused is renewed once, by one task, while others
//! who met the same refusal wait for the outcome.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use docker_credential::{CredentialRetrievalError, DockerCredential, get_credential_from_reader};
use oci_client::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};
use reqwest::Url;
use tokio::sync::Mutex;

use super::Repository;
use super::host::{USER_AGENT, is_loopback};
use crate::SourceError;

/// The name under which docker keeps its own registry's credentials.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// The user name with which registries that hand out identity tokens take one for a password
/// (Azure Container Registry, "Authenticate with an Azure container registry").
const IDENTITY_TOKEN_USER: &str = "00000000-0000-0000-0000-000000000000";

/// Every name and every address, as a list of hosts that need no proxy has it.
const EVERY_HOST: &str = "*,0.0.0.0/0,::/0";

/// What is to be done in a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Right {
    Pull,
    Push,
}

impl Right {
    fn operation(self) -> RegistryOperation {
        match self {
            Self::Pull => RegistryOperation::Pull,
            Self::Push => RegistryOperation::Push,
        }
    }
}

/// What a request says of us.
#[derive(Clone)]
pub(super) enum Authorization {
    /// Nothing.
    None,
    Bearer(String),
    Basic {
        user: String,
        password: String,
    },
}

impl std::fmt::Debug for Authorization {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Bearer(_) => "Bearer(..)",
            Self::Basic { .. } => "Basic(..)",
        })
    }
}

/// Authenticates with one registry.
#[derive(Debug)]
pub(super) struct Authority {
    registry: String,
    plain_http: bool,
    loopback: bool,
    ca: Option<Vec<u8>>,
    skip_verify: bool,
    docker_config: Option<PathBuf>,
    timeout: Duration,
}

/// What a token is asked for with.
struct Credentials {
    client: Client,
    auth: RegistryAuth,
    /// What to call them.
    name: String,
}

impl Authority {
    pub(super) fn new(
        registry: &str,
        base: &Url,
        ca: Option<Vec<u8>>,
        skip_verify: bool,
        docker_config: Option<PathBuf>,
        timeout: Duration,
    ) -> Self {
        let (plain_http, loopback) = (base.scheme() == "http", is_loopback(base.authority()));
        let registry = registry.to_owned();
        Self { registry, plain_http, loopback, ca, skip_verify, docker_config, timeout }
    }

    async fn authenticate(
        self: &Arc<Self>,
        from: &Repository,
        what: &str,
        right: Right,
    ) -> Result<Grant, SourceError> {
        let own = Arc::clone(self);
        // Blocking: it reads files, and may run a credential helper.
        let prepared = tokio::task::spawn_blocking(move || own.prepare()).await;
        let prepared = prepared.unwrap_or_else(|_| Err("the credential lookup panicked".into()));
        let Credentials { client, auth, name } =
            prepared.map_err(|why| unauthorized(from, what, why))?;
        let image = Reference::with_tag(self.registry.clone(), from.name.clone(), "latest".into());
        let asked = client.auth(&image, &auth, right.operation());
        let token = match tokio::time::timeout(self.timeout, asked).await {
            Ok(Ok(token)) => token,
            Ok(Err(error)) => return Err(token_error(from, what, name, error)),
            Err(_) => {
                let message = format!("no token within {:?}", self.timeout);
                return Err(SourceError::Unreachable { source_name: from.to_string(), message });
            }
        };
        let authorization = match (token, auth) {
            (Some(token), _) => Authorization::Bearer(token),
            (None, RegistryAuth::Basic(user, password)) => Authorization::Basic { user, password },
            (None, _) => Authorization::None,
        };
        Ok(Grant { number: 0, authorization, credentials: name })
    }

    fn prepare(&self) -> Result<Credentials, String> {
        let (auth, name) = self.credentials()?;
        let client =
            self.token_client().map_err(|error| format!("TLS can't be set up: {error}"))?;
        Ok(Credentials { client, auth, name })
    }

    /// A client for one token. Not kept: tokens are rare, it would remember them a second time,
    /// and a machine without certificates needs none where no token is wanted.
    fn token_client(&self) -> Result<Client, OciDistributionError> {
        let ca = self.ca.clone();
        let ca = ca.map(|data| Certificate { encoding: CertificateEncoding::Pem, data });
        // Naming a proxy that is used for no host is the one way to keep this client from using
        // those of the environment, which can't reach our own loopback.
        let no_proxy = self.loopback.then(|| EVERY_HOST.to_owned());
        Client::try_from(ClientConfig {
            protocol: if self.plain_http { ClientProtocol::Http } else { ClientProtocol::Https },
            extra_root_certificates: ca.into_iter().collect(),
            accept_invalid_certificates: self.skip_verify,
            read_timeout: Some(self.timeout),
            connect_timeout: Some(self.timeout),
            user_agent: USER_AGENT,
            http_proxy: no_proxy.as_ref().map(|_| "http://127.0.0.1:9".to_owned()),
            no_proxy,
            ..ClientConfig::default()
        })
    }

    /// The credentials for this registry and what to call them, or why they can't be had.
    fn credentials(&self) -> Result<(RegistryAuth, String), String> {
        let none = || Ok((RegistryAuth::Anonymous, "no credentials".to_owned()));
        let Some(path) = self.docker_config.as_ref().map(|dir| dir.join("config.json")) else {
            return none();
        };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return none(),
            Err(error) => return Err(format!("{}: {error}", path.display())),
        };
        let server = match &*self.registry {
            "docker.io" | "index.docker.io" | "registry-1.docker.io" => DOCKER_HUB,
            other => other,
        };
        match get_credential_from_reader(BufReader::new(file), server) {
            Ok(DockerCredential::UsernamePassword(user, password)) => {
                let name = format!("user {user:?} from {}", path.display());
                Ok((RegistryAuth::Basic(user, password), name))
            }
            Ok(DockerCredential::IdentityToken(token)) => {
                let name = format!("the identity token from {}", path.display());
                Ok((RegistryAuth::Basic(IDENTITY_TOKEN_USER.into(), token), name))
            }
            Err(error) if has_none(&error) => none(),
            Err(error) => Err(why(&path, &error)),
        }
    }
}

/// Whether docker simply has no credentials for the registry.
fn has_none(error: &CredentialRetrievalError) -> bool {
    match error {
        CredentialRetrievalError::NoCredentialConfigured
        | CredentialRetrievalError::ConfigNotFound => true,
        // What docker's helpers print (docker-credential-helpers, errors.go).
        CredentialRetrievalError::HelperFailure { stdout, .. } => {
            stdout.contains("credentials not found")
        }
        _ => false,
    }
}

/// In words, without what a helper printed: that may hold a secret.
fn why(path: &Path, error: &CredentialRetrievalError) -> String {
    match error {
        CredentialRetrievalError::HelperFailure { helper, .. } => {
            format!("{}: the credential helper {helper} failed", path.display())
        }
        other => format!("{}: {other}", path.display()),
    }
}

fn unauthorized(from: &Repository, what: &str, credentials: String) -> SourceError {
    SourceError::Unauthorized { source_name: from.to_string(), what: what.to_owned(), credentials }
}

fn token_error(
    from: &Repository,
    what: &str,
    credentials: String,
    error: OciDistributionError,
) -> SourceError {
    let source_name = from.to_string();
    match error {
        OciDistributionError::AuthenticationFailure(_)
        | OciDistributionError::UnauthorizedError { .. } => unauthorized(from, what, credentials),
        OciDistributionError::RequestError(error) => super::host::unreachable(from, error),
        OciDistributionError::RegistryTokenDecodeError(_) => SourceError::BadAnswer {
            source_name,
            what: what.to_owned(),
            message: "the token server's answer holds no token".into(),
        },
        other => SourceError::Unreachable {
            source_name,
            message: format!("no token could be had: {other}"),
        },
    }
}

/// What a registry gave us for our credentials.
#[derive(Debug, Clone)]
pub(super) struct Grant {
    /// Counts renewals.
    number: u64,
    authorization: Authorization,
    /// Which credentials it was given for, in words.
    credentials: String,
}

impl Grant {
    pub(super) fn authorization(&self) -> &Authorization {
        &self.authorization
    }

    /// That it was not good enough.
    pub(super) fn refused(&self, from: &Repository, what: &str) -> SourceError {
        unauthorized(from, what, self.credentials.clone())
    }
}

/// Access to one repository, with one right.
#[derive(Debug)]
pub(super) struct Access {
    authority: Arc<Authority>,
    right: Right,
    grant: Mutex<Arc<Grant>>,
}

impl Access {
    pub(super) fn new(authority: Arc<Authority>, right: Right) -> Self {
        let credentials = "no credentials".to_owned();
        let grant = Grant { number: 0, authorization: Authorization::None, credentials };
        Self { authority, right, grant: Mutex::new(Arc::new(grant)) }
    }

    /// The grant to try; waits while one is renewed.
    pub(super) async fn current(&self) -> Arc<Grant> {
        Arc::clone(&*self.grant.lock().await)
    }

    /// A grant that is newer than `refused`.
    pub(super) async fn renew(
        &self,
        refused: &Grant,
        from: &Repository,
        what: &str,
    ) -> Result<Arc<Grant>, SourceError> {
        let mut grant = self.grant.lock().await;
        if grant.number == refused.number {
            let fresh = self.authority.authenticate(from, what, self.right).await?;
            *grant = Arc::new(Grant { number: refused.number + 1, ..fresh });
        }
        Ok(Arc::clone(&grant))
    }
}
