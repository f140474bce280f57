//! Which hosts answer for a registry, in which order: containerd's `hosts.toml`, read as it is
//! (containerd, docs/hosts.md), so that one configuration serves both.
//!
//! Invariant: a file that can't be understood is an error that names it. Nothing is asked of a host
//! that a file does not allow.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use toml::{Table, Value};

use super::RegistryOptions;
use super::host::is_loopback;

/// Largest file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Hosts of one registry at the most.
const MAX_ENDPOINTS: usize = 32;

/// The directory for registries that have none of their own.
const DEFAULT_DIRECTORY: &str = "_default";

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

/// The fields of a host, and those of the registry itself at the top of the file.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct HostTable {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany>,
    client: Option<Clients>,
    skip_verify: bool,
    override_path: bool,
    header: Table,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(PathBuf),
    Many(Vec<PathBuf>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<PathBuf> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Clients {
    One(PathBuf),
    Files(Vec<PathBuf>),
    Pairs(Vec<Vec<PathBuf>>),
}

impl Clients {
    /// The files of the first identity; one is all that a handshake can use.
    fn into_first(self) -> Vec<PathBuf> {
        let files = match self {
            Self::One(file) => vec![file],
            Self::Files(files) => files.into_iter().take(1).collect(),
            Self::Pairs(pairs) => pairs.into_iter().next().unwrap_or_default(),
        };
        files.into_iter().filter(|file| !file.as_os_str().is_empty()).collect()
    }
}

/// The hosts of a registry, in the order in which they are asked: its mirrors, and itself last.
/// `options` is what our own configuration says of it; without, `dir` is containerd's directory of
/// directories with hosts.toml.
///
/// # Errors
/// What is wrong, in words: a registry that is no host name, a file that can't be used.
pub(super) fn endpoints(
    registry: &str,
    options: Option<&RegistryOptions>,
    dir: Option<&Path>,
) -> Result<Vec<Endpoint>, String> {
    let own = itself(registry, options).ok_or("not a host name")?;
    let file = match (options, dir) {
        (None, Some(dir)) => find(registry, dir)?,
        _ => None,
    };
    let Some((path, text)) = file else { return Ok(vec![own]) };
    parse(&text, &path, own).map_err(|why| format!("{}: {why}", path.display()))
}

/// The registry itself. Docker Hub's answers under another name than its references have.
fn itself(registry: &str, options: Option<&RegistryOptions>) -> Option<Endpoint> {
    let address = match registry {
        "docker.io" | "index.docker.io" => "registry-1.docker.io",
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
    })
}

/// The registry's hosts.toml, or the default one.
fn find(registry: &str, dir: &Path) -> Result<Option<(PathBuf, String)>, String> {
    // containerd writes host:port as host_port_, too, for file systems without colons.
    let underscored = registry.rsplit_once(':').map(|(host, port)| format!("{host}_{port}_"));
    let names = underscored.iter().map(String::as_str).chain([registry, DEFAULT_DIRECTORY]);
    for name in names.filter(|name| !name.contains('/') && *name != "..") {
        let path = dir.join(name).join("hosts.toml");
        match read(&path) {
            Ok(text) => return Ok(Some((path, text))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(format!("{}: {error}", path.display())),
        }
    }
    Ok(None)
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(std::io::Error::other("it is larger than 1 MiB"));
    }
    Ok(text)
}

fn parse(text: &str, path: &Path, own: Endpoint) -> Result<Vec<Endpoint>, String> {
    let mut top: Table = text.parse().map_err(|error: toml::de::Error| string(&error))?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    let hosts = match top.remove("host") {
        None => Table::new(),
        Some(Value::Table(hosts)) => hosts,
        Some(_) => return Err("`host` is not a table".into()),
    };
    let server = match top.remove("server") {
        None => own.api.clone(),
        Some(Value::String(server)) => base(&server)?,
        Some(_) => return Err("`server` is not a string".into()),
    };
    let server_table: HostTable = top.try_into().map_err(|error| string(&error))?;
    let mut found = vec![];
    for (name, table) in hosts.into_iter().take(MAX_ENDPOINTS - 1) {
        let table: HostTable =
            table.try_into().map_err(|error| format!("host {name:?}: {}", string(&error)))?;
        found.push(endpoint(base(&name)?, table, dir)?);
    }
    found.push(endpoint(server, server_table, dir)?);
    let itself = own.api.origin();
    for endpoint in &mut found {
        endpoint.mirror = endpoint.api.origin() != itself;
    }
    Ok(found)
}

fn endpoint(base: Url, table: HostTable, dir: &Path) -> Result<Endpoint, String> {
    let in_dir = |files: Vec<PathBuf>| files.into_iter().map(|file| dir.join(file)).collect();
    Ok(Endpoint {
        api: api(base, table.override_path)?,
        mirror: true,
        can: capabilities(table.capabilities.as_deref())?,
        authorities: in_dir(table.ca.map(OneOrMany::into_vec).unwrap_or_default()),
        identity: in_dir(table.client.map(Clients::into_first).unwrap_or_default()),
        skip_verify: table.skip_verify,
        headers: headers(&table.header)?,
    })
}

/// A host's address; without a scheme it speaks TLS, except on loopback.
fn base(text: &str) -> Result<Url, String> {
    let whole = match text.contains("://") {
        true => text.to_owned(),
        false if is_loopback(text) => format!("http://{text}"),
        false => format!("https://{text}"),
    };
    let url = Url::parse(&whole).map_err(|error| format!("host {text:?}: {error}"))?;
    let plain = url.username().is_empty() && url.password().is_none() && url.query().is_none();
    if !matches!(url.scheme(), "http" | "https") || !plain {
        return Err(format!("host {text:?}: not http://host or https://host"));
    }
    Ok(url)
}

/// Where a host's repositories are: below /v2/ of its address, or of its address as it is.
fn api(mut base: Url, override_path: bool) -> Result<Url, String> {
    let path = base.path().trim_end_matches('/');
    let path = match override_path || path.ends_with("/v2") {
        true => format!("{path}/"),
        false => format!("{path}/v2/"),
    };
    base.set_path(&path);
    Ok(base)
}

fn capabilities(names: Option<&[String]>) -> Result<Capabilities, String> {
    let Some(names) = names else { return Ok(Capabilities::ALL) };
    let mut can = Capabilities { ranges: false, pull: false, resolve: false, push: false };
    for name in names {
        match name.to_ascii_lowercase().as_str() {
            "pull" => (can.ranges, can.pull) = (true, true),
            "resolve" => can.resolve = true,
            "push" => can.push = true,
            // Of containerd 2.1 and later; they go with pulling here.
            "referrers" => {}
            _ => return Err(format!("unknown capability {name:?}")),
        }
    }
    Ok(can)
}

fn headers(table: &Table) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, value) in table {
        let header = HeaderName::try_from(name).map_err(|error| format!("{name:?}: {error}"))?;
        let values = match value {
            Value::Array(values) => values.as_slice(),
            one => std::slice::from_ref(one),
        };
        for value in values {
            let text = value.as_str().ok_or_else(|| format!("header {name:?}: not a string"))?;
            // The value may be a secret: it is not repeated.
            let mut value = HeaderValue::try_from(text)
                .map_err(|_| format!("header {name:?}: not a header's value"))?;
            value.set_sensitive(true);
            headers.append(header.clone(), value);
        }
    }
    Ok(headers)
}

/// An error of the parser in one line, without the text around it, which may hold a secret.
fn string(error: &toml::de::Error) -> String {
    error.message().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<Endpoint>, String> {
        let own = itself("registry.example.com", None).unwrap();
        parse(text, Path::new("/certs/registry.example.com/hosts.toml"), own)
    }

    fn apis(text: &str) -> Vec<String> {
        parsed(text).unwrap().iter().map(|endpoint| endpoint.api.to_string()).collect()
    }

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
    fn mirrors_are_asked_in_the_order_of_the_file_and_the_registry_last() {
        let text = r#"
            server = "https://registry.example.com"
            [host."https://z.example.com"]
            capabilities = ["pull"]
            [host."http://a.example.com:5000"]
            skip_verify = true
            [host."https://proxy.example.com/v2/hub"]
            override_path = true
            [host."https://old.example.com/sub"]
        "#;
        assert_eq!(
            apis(text),
            [
                "https://z.example.com/v2/",
                "http://a.example.com:5000/v2/",
                "https://proxy.example.com/v2/hub/",
                "https://old.example.com/sub/v2/",
                "https://registry.example.com/v2/",
            ]
        );
        let hosts = parsed(text).unwrap();
        let pulls = Capabilities { ranges: true, pull: true, resolve: false, push: false };
        assert_eq!(hosts[0].can, pulls);
        assert!(hosts[1].skip_verify && !hosts[0].skip_verify);
        assert_eq!(hosts.iter().filter(|host| host.mirror).count(), 4);
    }

    #[test]
    fn files_are_relative_to_the_one_that_names_them() {
        let of = |text: &str| {
            let hosts = parsed(&format!("[host.\"https://m\"]\n{text}")).unwrap();
            let host = hosts.into_iter().next().unwrap();
            let names = host.authorities.iter().chain(&host.identity);
            names.map(|file| file.display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(of("ca = \"ca.pem\""), ["/certs/registry.example.com/ca.pem"]);
        assert_eq!(of("ca = [\"/a.pem\", \"/b.pem\"]"), ["/a.pem", "/b.pem"]);
        assert_eq!(of("client = \"/both.pem\""), ["/both.pem"]);
        assert_eq!(of("client = [\"/first.pem\", \"/second.pem\"]"), ["/first.pem"]);
        assert_eq!(of("client = [[\"/c.pem\", \"/k.pem\"], [\"/x\", \"\"]]"), ["/c.pem", "/k.pem"]);
        assert_eq!(of("client = [[\"/both.pem\", \"\"]]"), ["/both.pem"]);
    }

    #[test]
    fn headers_are_kept_and_never_shown() {
        let text = "[host.\"https://m\"]\n[host.\"https://m\".header]\n\
            x-one = \"secret\"\nx-two = [\"a\", \"b\"]\n";
        let hosts = parsed(text).unwrap();
        assert_eq!(hosts[0].headers.get("x-one").unwrap(), "secret");
        assert_eq!(hosts[0].headers.get_all("x-two").iter().count(), 2);
        assert!(!format!("{hosts:?}").contains("secret"));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (text, named) in [
            ("host = 1", "host"),
            ("server = 1", "server"),
            ("[host.\"ftp://m\"]", "ftp://m"),
            ("[host.\"https://user:pw@m\"]", "not http"),
            ("[host.\"https://m\"]\ncapabilities = [\"fly\"]", "fly"),
            ("[host.\"https://m\"]\nskip_verify = 3", "https://m"),
            ("[host.\"https://m\".header]\nx = 3", "x"),
            ("= x", ""),
        ] {
            let error = parsed(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
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
            found[0].api.host_str().unwrap().to_owned()
        };
        assert_eq!(first("a.example:5000"), "a.example");
        put("_default", "default.mirror");
        assert_eq!(first("a.example:5000"), "default.mirror");
        put("a.example:5000", "colon.mirror");
        assert_eq!(first("a.example:5000"), "colon.mirror");
        put("a.example_5000_", "underscore.mirror");
        assert_eq!(first("a.example:5000"), "underscore.mirror");
        let configured = RegistryOptions::default();
        let found = endpoints("a.example:5000", Some(&configured), Some(dir.path())).unwrap();
        assert_eq!(found.len(), 1, "our own configuration of a registry holds");
        assert!(
            find("..", dir.path())
                .unwrap()
                .is_some_and(|(path, _)| path.ends_with("_default/hosts.toml"))
        );
    }

    #[test]
    fn fuzz_hosts_files_are_refused_or_bounded() {
        let samples: [&[u8]; 2] = [
            b"server = \"https://r\"\n[host.\"https://m/v2\"]\ncapabilities = [\"pull\"]\n",
            b"[host.m]\nca = \"x\"\nclient = [[\"a\", \"b\"]]\n[host.m.header]\nx = [\"y\"]\n",
        ];
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&samples, input);
            let Ok(hosts) = parsed(&String::from_utf8_lossy(&bytes)) else { return };
            assert!((1..=MAX_ENDPOINTS).contains(&hosts.len()));
            assert!(hosts.iter().all(|host| host.api.path().ends_with('/')));
        });
    }
}
