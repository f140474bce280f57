//! Which hosts answer for a registry, in which order, as containerd's directories say: a hosts.toml
//! each, or certificates as docker keeps them (containerd, docs/hosts.md). They are read as they are,
//! so that one configuration serves both.
//!
//! Invariant: a file that can't be understood is an error that names it. Nothing is asked of a host
//! that a file does not allow.

mod certificates;
mod hosts_toml;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;
use reqwest::header::HeaderMap;

use super::RegistryOptions;
use super::files::{self, Stamp};
use super::host::is_loopback;

/// Largest hosts.toml that is read, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Hosts of one registry at the most.
const MAX_ENDPOINTS: usize = 32;

/// The directory for registries that have none of their own.
const DEFAULT_DIRECTORY: &str = "_default";

/// Docker Hub in references, and the host that answers for it.
const HUB: &str = "docker.io";
const HUB_API: &str = "registry-1.docker.io";

/// A host that answers for a registry.
#[derive(Debug, Clone)]
pub(super) struct Endpoint {
    /// What its repositories are below; ends with a slash.
    pub(super) api: Url,
    /// Whether it is not the registry itself.
    pub(super) mirror: bool,
    pub(super) can: Capabilities,
    /// PEM files of authorities besides the system's.
    pub(super) authorities: Vec<PathBuf>,
    /// PEM files that say who we are: a certificate and its key, maybe both in one.
    pub(super) identity: Vec<PathBuf>,
    pub(super) skip_verify: bool,
    pub(super) headers: HeaderMap,
    /// How long a connection may take.
    pub(super) dial_timeout: Option<Duration>,
    /// The proxy to use, whatever the environment says.
    pub(super) proxy: Option<Url>,
}

/// The hosts of a registry, and the files that say so.
#[derive(Debug)]
pub(super) struct Found {
    /// In the order in which they are asked: mirrors first, the registry itself last.
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) stamp: Stamp,
}

/// What a host may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// Ranges of blobs.
    pub(super) ranges: bool,
    /// Small blobs, and manifests by digest.
    pub(super) pull: bool,
    /// What a tag names: the host is trusted for it.
    pub(super) resolve: bool,
    pub(super) push: bool,
}

impl Capabilities {
    const ALL: Self = Self { ranges: true, pull: true, resolve: true, push: true };

    /// Of a way to the blobs that is none to what names them.
    pub(super) const RANGES: Self = Self { ranges: true, pull: false, resolve: false, push: false };
}

/// The hosts of a registry. `options` is what our own configuration says of it; without, `dir` is
/// containerd's directory of directories.
///
/// # Errors
/// What is wrong, in words: a registry that is no host name, a file that can't be used.
pub(super) fn endpoints(
    registry: &str,
    options: Option<&RegistryOptions>,
    dir: Option<&Path>,
) -> Result<Found, String> {
    let own = itself(registry, options).ok_or("not a host name")?;
    let mut stamp = Stamp::default();
    let dir = match (options, dir) {
        (None, Some(dir)) => {
            find(registry, dir, &mut stamp).map_err(|(path, e)| named(&path, &e))?
        }
        _ => None,
    };
    let endpoints = match dir {
        None => vec![own],
        Some(dir) => read(&dir, own)?,
    };
    for endpoint in &endpoints {
        let files = endpoint.authorities.iter().chain(&endpoint.identity);
        files.for_each(|file| stamp.note(file));
    }
    Ok(Found { endpoints, stamp })
}

/// The registry itself. Docker Hub's answers under another name than its references have.
fn itself(registry: &str, options: Option<&RegistryOptions>) -> Option<Endpoint> {
    let address = match registry {
        HUB | "index.docker.io" => HUB_API,
        other => other,
    };
    let plain = options.and_then(|options| options.plain_http);
    let scheme = if plain.unwrap_or_else(|| is_loopback(address)) { "http" } else { "https" };
    let url = Url::parse(&format!("{scheme}://{address}/")).ok()?;
    let only_host = url.path() == "/" && url.query().is_none() && url.fragment().is_none();
    if !only_host || !url.username().is_empty() || url.password().is_some() {
        return None;
    }
    let authorities = options.and_then(|options| options.ca_file.clone()).into_iter().collect();
    Some(Endpoint {
        api: url.join("v2/").ok()?,
        mirror: false,
        can: Capabilities::ALL,
        authorities,
        identity: vec![],
        skip_verify: false,
        headers: HeaderMap::new(),
        dial_timeout: None,
        proxy: None,
    })
}

/// The directory of the registry, or the default one: the first that is there.
fn find(
    registry: &str,
    dir: &Path,
    stamp: &mut Stamp,
) -> Result<Option<PathBuf>, (PathBuf, io::Error)> {
    // containerd writes host:port as host_port_, too, for file systems without colons.
    let underscored = registry.rsplit_once(':').map(|(host, port)| format!("{host}_{port}_"));
    let names = underscored.iter().map(String::as_str).chain([registry, DEFAULT_DIRECTORY]);
    for name in names.filter(|name| !name.contains('/') && *name != "..") {
        let path = dir.join(name);
        stamp.note(&path);
        match std::fs::metadata(&path) {
            Ok(_) => {
                stamp.note(&path.join(hosts_toml::NAME));
                return Ok(Some(path));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err((path, error)),
        }
    }
    Ok(None)
}

/// What a directory says: its hosts.toml, or its certificates where it has none or an empty one.
fn read(dir: &Path, own: Endpoint) -> Result<Vec<Endpoint>, String> {
    let path = dir.join(hosts_toml::NAME);
    let text = match files::read(&path, MAX_FILE_BYTES).map(String::from_utf8) {
        Ok(Ok(text)) => text,
        Ok(Err(_)) => return Err(format!("{}: it is not UTF-8", path.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(named(&path, &error)),
    };
    if text.is_empty() {
        let found = certificates::add(dir, own);
        return found.map(|own| vec![own]).map_err(|error| named(dir, &error));
    }
    hosts_toml::parse(&text, dir, own).map_err(|why| format!("{}: {why}", path.display()))
}

fn named(path: &Path, error: &io::Error) -> String {
    format!("{}: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_plain_by_itself() {
        let scheme = |registry: &str, plain_http| {
            let options = RegistryOptions { plain_http, ca_file: None };
            itself(registry, Some(&options)).unwrap().api.scheme().to_owned()
        };
        for registry in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.9.9.9", "[::1]:5000"]
        {
            assert_eq!(scheme(registry, None), "http", "{registry}");
            assert_eq!(scheme(registry, Some(false)), "https", "{registry}");
        }
        for registry in ["example.com", "localhost.example.com", "10.0.0.1:5000", "128.0.0.1"] {
            assert_eq!(scheme(registry, None), "https", "{registry}");
            assert_eq!(scheme(registry, Some(true)), "http", "{registry}");
        }
    }

    #[test]
    fn a_registry_is_a_host_and_nothing_else() {
        for registry in ["", "a/b", "user@host", "host?x", "host#x", "a b"] {
            assert!(itself(registry, None).is_none(), "{registry}");
        }
        let hub = itself("docker.io", None).unwrap();
        assert_eq!(hub.api.as_str(), "https://registry-1.docker.io/v2/");
    }

    #[test]
    fn the_directory_of_a_registry_is_found_under_either_name() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, mirror: &str| {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
            let text = format!("[host.\"https://{mirror}\"]\n");
            std::fs::write(dir.path().join(name).join("hosts.toml"), text).unwrap();
        };
        let first = |registry: &str| {
            let found = endpoints(registry, None, Some(dir.path())).unwrap();
            found.endpoints[0].api.host_str().unwrap().to_owned()
        };
        assert_eq!(first("a.example:5000"), "a.example");
        put("_default", "default.mirror");
        assert_eq!(first("a.example:5000"), "default.mirror");
        put("a.example:5000", "colon.mirror");
        assert_eq!(first("a.example:5000"), "colon.mirror");
        put("a.example_5000_", "underscore.mirror");
        assert_eq!(first("a.example:5000"), "underscore.mirror");
        put("[::1]:5000", "six.mirror");
        assert_eq!(first("[::1]:5000"), "six.mirror");
        std::fs::create_dir(dir.path().join("bare.example")).unwrap();
        assert_eq!(
            first("bare.example"),
            "bare.example",
            "a directory of its own holds, with nothing in it"
        );
        let configured = RegistryOptions::default();
        let found = endpoints("a.example:5000", Some(&configured), Some(dir.path())).unwrap();
        assert_eq!(found.endpoints.len(), 1, "our own configuration of a registry holds");
        let above = find("..", dir.path(), &mut Stamp::default()).unwrap();
        assert!(above.is_some_and(|path| path.ends_with("_default")));
    }

    #[test]
    fn a_change_of_what_a_registry_s_hosts_are_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let found = || endpoints("a.example", None, Some(dir.path())).unwrap();
        let none = found();
        let own = dir.path().join("a.example");
        std::fs::create_dir(&own).unwrap();
        assert!(!none.stamp.is_current(), "the directory came");
        let empty = found();
        std::fs::write(own.join("hosts.toml"), "ca = \"ca.pem\"\n").unwrap();
        assert!(!empty.stamp.is_current(), "the file came");
        let without_ca = found();
        assert!(without_ca.stamp.is_current());
        std::fs::write(own.join("ca.pem"), "").unwrap();
        assert!(!without_ca.stamp.is_current(), "the authority came");
    }

    #[test]
    fn without_a_file_a_directory_s_certificates_are_used() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("a.example");
        std::fs::create_dir(&own).unwrap();
        let names = ["b.crt", "a.crt", "me.cert", "me.key", "other.cert", "hosts.toml", "notes"];
        names.iter().for_each(|name| std::fs::write(own.join(name), "").unwrap());
        let found = endpoints("a.example", None, Some(dir.path())).unwrap().endpoints;
        let files = |names: &[&str]| names.iter().map(|name| own.join(name)).collect::<Vec<_>>();
        assert_eq!(found[0].authorities, files(&["a.crt", "b.crt"]));
        assert_eq!(found[0].identity, files(&["me.cert", "me.key"]));
        std::fs::remove_file(own.join("me.key")).unwrap();
        let found = endpoints("a.example", None, Some(dir.path())).unwrap().endpoints;
        assert_eq!(found[0].identity, files(&["me.cert"]), "with its key inside");
    }
}
