//! hosts.toml: the registry's mirrors, and how to reach each (containerd, docs/hosts.md, "hosts.toml
//! Content Description").

use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::SignedDuration;
use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use toml::{Table, Value};

use super::super::host::is_loopback;
use super::{Capabilities, Endpoint, HUB, HUB_API, MAX_ENDPOINTS};

/// Its name.
pub(super) const NAME: &str = "hosts.toml";

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
    dial_timeout: Option<String>,
    proxy: Option<String>,
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
    Many(Vec<Client>),
}

/// A certificate with its key in the same file, or in another one.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Client {
    Both(PathBuf),
    Pair([PathBuf; 2]),
}

impl Clients {
    /// The files of the first identity; one is all that a handshake can use.
    fn into_first(self) -> Vec<PathBuf> {
        let first = match self {
            Self::One(file) => Some(Client::Both(file)),
            Self::Many(clients) => clients.into_iter().next(),
        };
        let files = match first {
            None => vec![],
            Some(Client::Both(file)) => vec![file],
            Some(Client::Pair(files)) => files.to_vec(),
        };
        files.into_iter().filter(|file| !file.as_os_str().is_empty()).collect()
    }
}

/// The hosts that a file in `dir` names, and the registry itself, last.
///
/// # Errors
/// What makes no sense, in words.
pub(super) fn parse(text: &str, dir: &Path, own: Endpoint) -> Result<Vec<Endpoint>, String> {
    let mut top: Table = text.parse().map_err(|error: toml::de::Error| string(&error))?;
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
    if hosts.len() >= MAX_ENDPOINTS {
        return Err(format!("it names more than {} hosts", MAX_ENDPOINTS - 1));
    }
    let mut found = vec![];
    for (name, table) in hosts {
        let table: HostTable =
            table.try_into().map_err(|error| format!("host {name:?}: {}", string(&error)))?;
        found.push(endpoint(base(&name)?, table, dir).map_err(|e| format!("host {name:?}: {e}"))?);
    }
    found.push(endpoint(server, server_table, dir)?);
    for endpoint in &mut found {
        endpoint.mirror = endpoint.api.authority() != own.api.authority();
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
        dial_timeout: table.dial_timeout.as_deref().map(dial_timeout).transpose()?,
        proxy: table.proxy.as_deref().map(proxy).transpose()?,
    })
}

/// A host's address; without a scheme it speaks TLS, except on loopback.
fn base(text: &str) -> Result<Url, String> {
    let whole = match text.contains("://") {
        true => text.to_owned(),
        false if is_loopback(text) => format!("http://{text}"),
        false => format!("https://{text}"),
    };
    let mut url = Url::parse(&whole).map_err(|error| format!("host {text:?}: {error}"))?;
    if url.host_str() == Some(HUB) {
        url.set_host(Some(HUB_API)).map_err(|error| format!("host {text:?}: {error}"))?;
    }
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

/// As Go writes a time (`1s`, `1m30s`, `300ms`).
fn dial_timeout(text: &str) -> Result<Duration, String> {
    let time = text.parse::<SignedDuration>().ok().and_then(|time| Duration::try_from(time).ok());
    time.filter(|time| !time.is_zero())
        .ok_or_else(|| format!("dial_timeout {text:?}: not a time as \"1s\" or \"300ms\""))
}

/// A proxy's address. It may hold a password: it is not repeated.
fn proxy(text: &str) -> Result<Url, String> {
    let url = text.parse::<Url>().ok().filter(|url| {
        let bare =
            matches!(url.path(), "" | "/") && url.query().is_none() && url.fragment().is_none();
        bare && url.has_host() && matches!(url.scheme(), "http" | "https" | "socks5" | "socks5h")
    });
    url.ok_or_else(|| "proxy: not an address as \"http://proxy:8080\"".to_owned())
}

const NONE: Capabilities = Capabilities { ranges: false, pull: false, resolve: false, push: false };

fn capabilities(names: Option<&[String]>) -> Result<Capabilities, String> {
    let Some(names) = names.filter(|names| !names.is_empty()) else {
        return Ok(Capabilities::ALL);
    };
    let mut can = NONE;
    for name in names {
        match name.to_ascii_lowercase().as_str() {
            "pull" => (can.ranges, can.pull) = (true, true),
            "resolve" => can.resolve = true,
            "push" => can.push = true,
            // Lists of referrers; they go with resolving here.
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
    use super::super::itself;
    use super::*;

    fn parsed(text: &str) -> Result<Vec<Endpoint>, String> {
        let own = itself("registry.example.com", None).unwrap();
        parse(text, Path::new("/certs/registry.example.com"), own)
    }

    fn apis(text: &str) -> Vec<String> {
        parsed(text).unwrap().iter().map(|endpoint| endpoint.api.to_string()).collect()
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
        assert_eq!(hosts[0].can, Capabilities { ranges: true, pull: true, ..NONE });
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
        assert_eq!(of("client = [\"/both.pem\", [\"/c.pem\", \"/k.pem\"]]"), ["/both.pem"]);
        assert!(of("client = []").is_empty() && of("ca = []").is_empty());
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
    fn no_capabilities_are_all_of_them() {
        let can = |text: &str| parsed(&format!("[host.\"https://m\"]\n{text}")).unwrap()[0].can;
        assert_eq!(can(""), Capabilities::ALL);
        assert_eq!(can("capabilities = []"), Capabilities::ALL);
        assert_eq!(can("capabilities = [\"Resolve\"]"), Capabilities { resolve: true, ..NONE });
        assert_eq!(can("capabilities = [\"referrers\"]"), NONE);
    }

    #[test]
    fn connections_have_their_own_limits_and_proxies() {
        let text = "proxy = \"http://user:secret@own:1\"\n[host.\"https://m\"]\ndial_timeout = \"1m2.5s\"\n";
        let [mirror, own] = &parsed(text).unwrap()[..] else { panic!("two hosts") };
        assert_eq!(mirror.dial_timeout, Some(Duration::from_millis(62_500)));
        assert_eq!((&mirror.proxy, own.dial_timeout), (&None, None));
        assert_eq!(own.proxy.as_ref().unwrap().host_str(), Some("own"));
        let error = parsed("proxy = \"ftp://user:secret@own:1\"").unwrap_err();
        assert!(!error.contains("secret"), "{error}");
    }

    #[test]
    fn a_registry_under_another_scheme_is_still_itself() {
        let mirrors =
            |text: &str| parsed(text).unwrap().iter().map(|host| host.mirror).collect::<Vec<_>>();
        assert_eq!(mirrors("server = \"http://registry.example.com\""), [false]);
        assert_eq!(mirrors("server = \"https://registry.example.com:443\""), [false]);
        assert_eq!(mirrors("server = \"https://registry.example.com:8443\""), [true]);
        assert_eq!(
            mirrors("[host.\"registry.example.com\"]\n[host.other]\n"),
            [false, true, false]
        );
    }

    #[test]
    fn docker_hub_answers_under_another_name() {
        let own = itself("docker.io", None).unwrap();
        let hosts =
            parse("server = \"https://docker.io\"", Path::new("/certs/docker.io"), own).unwrap();
        assert_eq!(hosts[0].api.as_str(), "https://registry-1.docker.io/v2/");
        assert!(!hosts[0].mirror);
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
            ("[host.\"https://m\"]\nclient = [[\"only.pem\"]]", "https://m"),
            ("[host.\"https://m\"]\ndial_timeout = \"soon\"", "soon"),
            ("dial_timeout = \"-1s\"", "dial_timeout"),
            ("proxy = \"proxy:8080\"", "proxy"),
            ("proxy = \"http://proxy:8080/path\"", "proxy"),
            ("= x", ""),
        ] {
            let error = parsed(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn fuzz_hosts_files_are_refused_or_bounded() {
        let samples: [&[u8]; 3] = [
            b"server = \"https://r\"\n[host.\"https://m/v2\"]\ncapabilities = [\"pull\"]\n",
            b"[host.m]\nca = \"x\"\nclient = [[\"a\", \"b\"]]\n[host.m.header]\nx = [\"y\"]\n",
            b"dial_timeout = \"1m2.5s\"\nproxy = \"http://p:1\"\noverride_path = true\n",
        ];
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&samples, input);
            let Ok(hosts) = parsed(&String::from_utf8_lossy(&bytes)) else { return };
            assert!((1..=MAX_ENDPOINTS).contains(&hosts.len()));
            assert!(hosts.iter().all(|host| host.api.path().ends_with('/')));
        });
    }
}
