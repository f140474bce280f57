//! docker's config.json: passwords and identity tokens by registry, or the helper that has them
//! (docker-credential-helpers, "Development"). A key may name a path below a registry, as in
//! containers-auth.json(5): the longest that fits counts.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;

use super::{Credentials, Secret, exec, read, read_open};
use crate::registry::Repository;

/// The name under which docker keeps its own registry's credentials.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// The user name with which a helper says that it gives an identity token.
const TOKEN_USER: &str = "<token>";

/// Permissions that nobody but the owner of a file of ours may have.
const OTHERS: u32 = 0o077;

/// Both kinds of padding are in use.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    auths: Option<BTreeMap<String, Option<Entry>>>,
    creds_store: Option<String>,
    cred_helpers: Option<BTreeMap<String, String>>,
}

#[derive(Default, Deserialize)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Entry(..)")
    }
}

/// What a helper answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// What a configuration says of a repository.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Nothing,
    These(Credentials),
    AskHelper { program: String, server: String },
}

/// Where docker keeps its configuration.
pub(super) fn default_directory() -> Option<PathBuf> {
    let home = || std::env::home_dir().map(|home| home.join(".docker"));
    std::env::var_os("DOCKER_CONFIG").map(PathBuf::from).or_else(home)
}

/// What docker's config.json, or a helper that it names, has for a repository.
///
/// # Errors
/// In words: a file that can't be used, a helper that fails.
pub(super) async fn config(path: &Path, to: &Repository) -> Result<Vec<Credentials>, String> {
    let bytes = match read(path).await {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        Err(error) => return Err(error.to_string()),
    };
    match Config::parse(&bytes)?.say(to)? {
        Said::Nothing => Ok(vec![]),
        Said::These(credentials) => Ok(vec![credentials]),
        Said::AskHelper { program, server } => ask_helper(&program, &server).await,
    }
}

/// What a file of our own has for a repository: it is in docker's format, names no helpers, and
/// nobody else can read it.
///
/// # Errors
/// In words: a file that can't be used.
pub(super) async fn own_file(path: &Path, to: &Repository) -> Result<Vec<Credentials>, String> {
    let words = |error: io::Error| error.to_string();
    let file = tokio::fs::File::open(path).await.map_err(words)?;
    let metadata = file.metadata().await.map_err(words)?;
    let ours = [0, nix::unistd::geteuid().as_raw()].contains(&metadata.uid());
    if !ours || metadata.mode() & OTHERS != 0 {
        return Err("others can read it; it must be root's, with mode 0600".into());
    }
    let config = Config::parse(&read_open(file).await.map_err(words)?)?;
    let config = Config { creds_store: None, cred_helpers: None, ..config };
    Ok(match config.say(to)? {
        Said::These(credentials) => vec![credentials],
        Said::Nothing | Said::AskHelper { .. } => vec![],
    })
}

impl Config {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        // The parser's words could repeat a part of a secret; line and column can't.
        serde_json::from_slice(bytes).map_err(|error| {
            format!("not docker's config.json (line {}, column {})", error.line(), error.column())
        })
    }

    fn say(mut self, to: &Repository) -> Result<Said, String> {
        let registry = well_known(&to.registry);
        let helper = |name: String| {
            let server = if registry == "docker.io" { DOCKER_HUB } else { registry };
            helper_program(&name)
                .map(|program| Said::AskHelper { program, server: server.to_owned() })
        };
        let helpers = self.cred_helpers.take().unwrap_or_default();
        let own =
            helpers.into_iter().find(|(key, name)| host_of(key) == registry && !name.is_empty());
        if let Some((_, name)) = own {
            return helper(name);
        }
        let auths = self.auths.take().unwrap_or_default();
        let entries = auths.into_iter().filter_map(|(key, entry)| {
            // docker leaves empty entries where its helper has what belongs there.
            let credentials = entry?.credentials().transpose()?;
            Some((reach(&key, registry, &to.name)?, credentials))
        });
        if let Some((_, credentials)) = entries.max_by_key(|(reach, _)| *reach) {
            return credentials.map(Said::These);
        }
        match self.creds_store.take().filter(|name| !name.is_empty()) {
            Some(name) => helper(name),
            None => Ok(Said::Nothing),
        }
    }
}

impl Entry {
    fn credentials(self) -> Result<Option<Credentials>, String> {
        let some = |text: Option<String>| text.filter(|text| !text.is_empty());
        if let Some(token) = some(self.identitytoken) {
            return Ok(Some(Credentials::IdentityToken(Secret::new(token))));
        }
        if let Some(token) = some(self.registrytoken) {
            return Ok(Some(Credentials::RegistryToken(Secret::new(token))));
        }
        if let Some(auth) = some(self.auth) {
            return decoded(&auth).map(Some);
        }
        Ok(match (some(self.username), self.password) {
            (Some(user), Some(password)) => {
                Some(Credentials::Password { user, password: Secret::new(password) })
            }
            _ => None,
        })
    }
}

/// The name and password in an `auth` field.
pub(super) fn decoded(auth: &str) -> Result<Credentials, String> {
    let text = BASE64.decode(auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    // docker's own writer pads with zero bytes.
    let pair = text.as_deref().map(|text| text.trim_end_matches('\0'));
    let (user, password) = pair
        .and_then(|pair| pair.split_once(':'))
        .ok_or("an `auth` field is not the base64 of name:password")?;
    Ok(Credentials::Password { user: user.to_owned(), password: Secret::new(password.to_owned()) })
}

/// How much of `registry/name` a key names, in bytes; nothing if it names something else.
fn reach(key: &str, registry: &str, name: &str) -> Option<usize> {
    let (host, path) = split(key);
    let path = path.strip_suffix('/').unwrap_or(path);
    // docker's older keys end so.
    let path = if matches!(path, "v1" | "v2") { "" } else { path };
    let rest = name.strip_prefix(path)?;
    let below = path.is_empty() || rest.is_empty() || rest.starts_with('/');
    (well_known(host) == registry && below).then_some(path.len())
}

/// Host and path of a key.
fn split(key: &str) -> (&str, &str) {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    key.split_once('/').unwrap_or((key, ""))
}

fn host_of(key: &str) -> &str {
    well_known(split(key).0)
}

/// Docker Hub has several names.
fn well_known(registry: &str) -> &str {
    match registry {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        other => other,
    }
}

fn helper_program(name: &str) -> Result<String, String> {
    let sound = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !name.chars().all(sound) {
        return Err(format!("{name:?} is no name of a credential helper"));
    }
    Ok(format!("docker-credential-{name}"))
}

async fn ask_helper(program: &str, server: &str) -> Result<Vec<Credentials>, String> {
    let (arguments, variables) = (["get".to_owned()], BTreeMap::new());
    let output = exec::run(OsStr::new(program), &arguments, &variables, server.as_bytes());
    let output = output.await.map_err(|why| format!("the credential helper {why}"))?;
    if output.success {
        return answered(&output.stdout)
            .map(|credentials| vec![credentials])
            .ok_or_else(|| format!("the credential helper {program} gave no credentials"));
    }
    // What docker's helpers print (docker-credential-helpers, errors.go).
    let none = String::from_utf8_lossy(&output.stdout).contains("credentials not found");
    if none { Ok(vec![]) } else { Err(format!("the credential helper {program} failed")) }
}

/// The credentials in a helper's output.
fn answered(output: &[u8]) -> Option<Credentials> {
    let Answer { username, secret } = serde_json::from_slice(output).ok()?;
    let secret = Secret::new(secret);
    Some(match &*username {
        TOKEN_USER => Credentials::IdentityToken(secret),
        _ => Credentials::Password { user: username, password: secret },
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn repository(registry: &str, name: &str) -> Repository {
        Repository { registry: registry.to_owned(), name: name.to_owned() }
    }

    fn say(text: &str, registry: &str, name: &str) -> Result<Said, String> {
        Config::parse(text.as_bytes())?.say(&repository(registry, name))
    }

    fn password(user: &str, password: &str) -> Credentials {
        let password = Secret::new(password.to_owned());
        Credentials::Password { user: user.to_owned(), password }
    }

    /// name:p:w, with and without padding.
    const AUTHS: &str = r#"{"auths":{
        "r.example.com":{"auth":"bmFtZTpwOnc="},
        "r.example.com/team":{"auth":"dGVhbTpwOnc"},
        "https://index.docker.io/v1/":{"identitytoken":"t"},
        "plain.example.com":{"username":"u","password":"w"},
        "taken.example.com":{"registrytoken":"r"},
        "empty.example.com":{}}}"#;

    #[test]
    fn the_longest_key_that_fits_counts() {
        let named = |registry, name| say(AUTHS, registry, name).unwrap();
        assert_eq!(named("r.example.com", "a/b"), Said::These(password("name", "p:w")));
        assert_eq!(named("r.example.com", "team/b"), Said::These(password("team", "p:w")));
        assert_eq!(named("r.example.com", "teams/b"), Said::These(password("name", "p:w")));
        assert_eq!(named("plain.example.com", "a"), Said::These(password("u", "w")));
        assert_eq!(named("empty.example.com", "a"), Said::Nothing);
        assert_eq!(named("r.example.com:5000", "a"), Said::Nothing);
        let token = |text: &str| Secret::new(text.to_owned());
        let identity = Said::These(Credentials::IdentityToken(token("t")));
        assert_eq!(named("docker.io", "library/a"), identity);
        let taken = Said::These(Credentials::RegistryToken(token("r")));
        assert_eq!(named("taken.example.com", "a"), taken);
    }

    #[test]
    fn helpers_are_asked_where_the_file_has_nothing_itself() {
        let text = r#"{"credsStore":"desk","credHelpers":{"e.example.com":"cloud"},
            "auths":{"r.example.com":{"auth":"bmFtZTpwOnc="},"s.example.com":{}}}"#;
        let helper = |program: &str, server: &str| {
            Ok(Said::AskHelper { program: program.into(), server: server.into() })
        };
        assert_eq!(
            say(text, "e.example.com", "a"),
            helper("docker-credential-cloud", "e.example.com")
        );
        assert_eq!(
            say(text, "s.example.com", "a"),
            helper("docker-credential-desk", "s.example.com")
        );
        assert_eq!(say(text, "docker.io", "a"), helper("docker-credential-desk", DOCKER_HUB));
        assert_eq!(say(text, "r.example.com", "a"), Ok(Said::These(password("name", "p:w"))));
        let bad = r#"{"credsStore":"../../bin/sh"}"#;
        assert!(say(bad, "r", "a").unwrap_err().contains("no name of a credential helper"));
    }

    #[test]
    fn what_is_wrong_is_said_without_the_secret() {
        for text in [
            r#"{"auths":{"r":{"auth":"c2VjcmV0"}}}"#,
            r#"{"auths":{"r":{"auth":"!secret!"}}}"#,
            r#"{"auths":{"r":{"auth":"secret""#,
            r#"{"auths":{"r":{"auth":["secret"]}}}"#,
        ] {
            let error = say(text, "r", "a").unwrap_err();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_file_that_others_can_read_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("credentials.json");
        std::fs::write(&path, AUTHS).unwrap();
        let to = repository("r.example.com", "a");
        for (mode, used) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let found = own_file(&path, &to).await;
            assert_eq!(found.is_ok(), used, "{mode:o}: {found:?}");
        }
        assert!(own_file(&directory.path().join("none"), &to).await.is_err());
        assert_eq!(config(&directory.path().join("none"), &to).await, Ok(vec![]));
    }

    #[test]
    fn fuzz_configurations_are_refused_or_say_something() {
        let helpers = r#"{"credsStore":"desk","credHelpers":{"r.example.com":"cloud"}}"#;
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&[AUTHS.as_bytes(), helpers.as_bytes()], input);
            let Ok(config) = Config::parse(&bytes) else { return };
            let said = config.say(&repository("r.example.com", "team/model"));
            if let Ok(Said::AskHelper { program, .. }) = said {
                assert!(program.starts_with("docker-credential-") && !program.contains('/'));
            }
        });
    }

    #[test]
    fn fuzz_answers_of_helpers_are_credentials_or_nothing() {
        let samples: [&[u8]; 2] = [
            br#"{"ServerURL":"r","Username":"u","Secret":"hidden"}"#,
            br#"{"ServerURL":"r","Username":"<token>","Secret":"hidden"}"#,
        ];
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&samples, input);
            let Some(credentials) = answered(&bytes) else { return };
            match credentials {
                Credentials::Password { user, .. } => assert_ne!(user, TOKEN_USER),
                other => assert!(!format!("{other:?} {other}").contains("hidden")),
            }
        });
    }
}
