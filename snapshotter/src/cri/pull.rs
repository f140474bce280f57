//! What a PullImage says of who may pull (CRI, `PullImageRequest` of v1 and v1alpha2, which are the
//! same here). Only these fields are read; all others go by unread.

use prost::Message as _;
use weightfs_store::{Credentials, Repository, Secret, parse_reference};

/// Bytes before a message of gRPC: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// Docker Hub's names.
const DOCKER_HUB: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

/// Credentials, and what they are for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) repository: Repository,
    pub(super) credentials: Credentials,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    auth: Option<AuthConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
struct AuthConfig {
    #[prost(string, tag = "1")]
    username: String,
    #[prost(string, tag = "2")]
    password: String,
    #[prost(string, tag = "3")]
    auth: String,
    #[prost(string, tag = "4")]
    server_address: String,
    #[prost(string, tag = "5")]
    identity_token: String,
    #[prost(string, tag = "6")]
    registry_token: String,
}

impl std::fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AuthConfig(..)")
    }
}

/// What the body of a PullImage tells; nothing if it has no credentials, or can't be read.
pub(super) fn told(body: &[u8]) -> Option<Told> {
    let (prefix, message) = body.split_at_checked(PREFIX_BYTES)?;
    let (compressed, length) = prefix.split_first()?;
    let length = u32::from_be_bytes(length.try_into().ok()?);
    if *compressed != 0 || usize::try_from(length).ok()? != message.len() {
        return None;
    }
    let request = PullImageRequest::decode(message).ok()?;
    let reference = parse_reference(&request.image?.image).ok()?;
    let repository = Repository::of(&reference);
    let credentials = request.auth?.credentials(&repository.registry)?;
    Some(Told { repository, credentials })
}

impl AuthConfig {
    /// In the order of containerd's CRI (`ParseAuth`).
    fn credentials(self, registry: &str) -> Option<Credentials> {
        if !self.server_address.is_empty() && !is_at(&self.server_address, registry) {
            return None;
        }
        if !self.username.is_empty() {
            let password = Secret::new(self.password);
            return Some(Credentials::Password { user: self.username, password });
        }
        if !self.identity_token.is_empty() {
            return Some(Credentials::IdentityToken(Secret::new(self.identity_token)));
        }
        if !self.auth.is_empty() {
            return Credentials::from_auth(&self.auth).ok();
        }
        let token = Some(self.registry_token).filter(|token| !token.is_empty());
        token.map(|token| Credentials::RegistryToken(Secret::new(token)))
    }
}

/// Whether an address, a host or a URL, is of a registry.
fn is_at(address: &str, registry: &str) -> bool {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = rest.split('/').next().unwrap_or_default();
    host == registry || (DOCKER_HUB.contains(&host) && DOCKER_HUB.contains(&registry))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(image: &str, auth: AuthConfig) -> Vec<u8> {
        let image = Some(ImageSpec { image: image.to_owned() });
        let message = PullImageRequest { image, auth: Some(auth) }.encode_to_vec();
        let length = u32::try_from(message.len()).unwrap().to_be_bytes();
        [&[0], &length[..], &message].concat()
    }

    fn user(server_address: &str) -> AuthConfig {
        AuthConfig {
            username: "u".into(),
            password: "hidden".into(),
            server_address: server_address.into(),
            ..AuthConfig::default()
        }
    }

    fn named(auth: AuthConfig) -> Option<String> {
        told(&body("r.example.com/team/model:1", auth)).map(|told| told.credentials.to_string())
    }

    #[test]
    fn credentials_are_for_the_repository_that_is_pulled() {
        let told = told(&body("r.example.com:5000/team/model@sha256:f338e13524cf74c04cefcbd19e8f625e65aa35831bbd8b9ae24aa7d1a6e8bd19", user(""))).unwrap();
        assert_eq!(told.repository.to_string(), "r.example.com:5000/team/model");
        assert!(!format!("{told:?} {:?}", user("")).contains("hidden"));
        assert_eq!(named(user("")).as_deref(), Some("user \"u\""));
        assert_eq!(named(user("https://r.example.com/v1/")).as_deref(), Some("user \"u\""));
        assert_eq!(named(user("other.example.com")), None);
        assert_eq!(named(AuthConfig::default()), None);
        let auth = AuthConfig { auth: "bmFtZTpwOnc=".into(), ..AuthConfig::default() };
        assert_eq!(named(auth).as_deref(), Some("user \"name\""));
        let token = AuthConfig { identity_token: "hidden".into(), ..AuthConfig::default() };
        assert_eq!(named(token).as_deref(), Some("the identity token"));
        let token = AuthConfig { registry_token: "hidden".into(), ..AuthConfig::default() };
        assert_eq!(named(token).as_deref(), Some("the registry token"));
        assert!(is_at("https://index.docker.io/v1/", "docker.io"));
    }

    #[test]
    fn fuzz_pulls_tell_something_or_nothing() {
        let sample = body("r.example.com/team/model:1", user("https://r.example.com"));
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&[&sample], input);
            if let Some(told) = told(&bytes) {
                assert!(!told.repository.name.is_empty() && !told.repository.registry.is_empty());
            }
        });
    }
}
