//! Ways to a registry: forward proxies, of the environment and of hosts.toml, and IPv6.

use std::fs;

use weightfs_tests::certificates::SERVER_NAME;
use weightfs_tests::model::SMALL_MODEL;
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::{Bed, Certificates, Fault, Forward, Proxy, Target, Weightfs};

const REPOSITORY: &str = "models/far";

/// A registry whose name only the proxy knows, over plain HTTP or TLS.
struct Far {
    bed: Bed,
    source: std::path::PathBuf,
    registry: Proxy,
    certificates: Option<Certificates>,
    forward: Forward,
    name: String,
}

impl Far {
    fn new(tls: bool) -> Self {
        let bed = Bed::new();
        let source = bed.model(SMALL_MODEL);
        bed.push(&bed.pack_raw(&source, Dialect::Cncf), REPOSITORY);
        let certificates = tls.then(|| Certificates::make(&bed.area.dir("certificates")));
        let registry = match &certificates {
            Some(certificates) => Proxy::start_tls(bed.registry.address(), certificates, false),
            None => Proxy::start(bed.registry.address()),
        };
        let name = format!("{SERVER_NAME}:5000");
        let forward = Forward::start(&[(&name, &registry.address())]);
        Self { bed, source, registry, certificates, forward, name }
    }

    /// What says how to speak to it.
    fn table(&self) -> String {
        let how = match &self.certificates {
            Some(certificates) => format!("ca_file = \"{}\"", certificates.authority().display()),
            None => "plain_http = true".to_owned(),
        };
        format!("[registry.\"{}\"]\n{how}\n", self.name)
    }

    fn reference(&self) -> String {
        format!("{}/{REPOSITORY}:v1", self.name)
    }

    fn assert_loads(&self, weightfs: &Weightfs) {
        let dir = self.bed.mount_point();
        let mounted = weightfs.mount(&self.bed.area, &self.reference(), &dir);
        tree::assert_same(&self.source, mounted.dir(), Scope::ModelFiles);
        mounted.stop();
        assert!(self.registry.requests(Target::Blobs) > 0);
    }
}

#[test]
fn plain_registries_are_reached_through_the_proxy_of_the_environment() {
    let far = Far::new(false);
    far.bed.weightfs.configure(&far.table());
    let weightfs = far.bed.weightfs.clone().with_variable("http_proxy", &far.forward.url());
    far.assert_loads(&weightfs);
    assert!(far.forward.requests().iter().all(|host| *host == far.name));
    assert!(!far.forward.requests().is_empty() && far.forward.tunnels().is_empty());
    // Not where the environment excepts it: then nobody knows its name.
    let without = Weightfs::new(&far.bed.area)
        .with_variable("http_proxy", &far.forward.url())
        .with_variable("no_proxy", SERVER_NAME);
    without.configure(&far.table());
    let outcome = without.mount_fails(&far.reference(), &far.bed.mount_point());
    far.bed.assert_clean_failure(&outcome, &[SERVER_NAME]);
}

#[test]
fn registries_with_tls_are_reached_through_a_tunnel() {
    let far = Far::new(true);
    far.bed.weightfs.configure(&far.table());
    let weightfs = far.bed.weightfs.clone().with_variable("https_proxy", &far.forward.url());
    far.assert_loads(&weightfs);
    assert!(far.forward.tunnels().iter().all(|host| *host == far.name));
    assert!(!far.forward.tunnels().is_empty() && far.forward.requests().is_empty());
    // What came over TLS goes on over TLS.
    far.registry.fail(Target::Blobs, Fault::Redirect { to: far.bed.registry.address().into() });
    let fresh = Weightfs::new(&far.bed.area).with_variable("https_proxy", &far.forward.url());
    fresh.configure(&far.table());
    let outcome = fresh.mount_fails(&far.reference(), &far.bed.mount_point());
    far.bed.assert_clean_failure(&outcome, &["from https to plain http"]);
}

#[test]
fn a_host_s_own_proxy_comes_before_that_of_the_environment() {
    let far = Far::new(true);
    let dir = far.bed.area.path().join("certs.d");
    let own = dir.join(&far.name);
    fs::create_dir_all(&own).unwrap();
    let authority = far.certificates.as_ref().unwrap().authority();
    let text = format!("ca = \"{}\"\nproxy = \"{}\"\n", authority.display(), far.forward.url());
    fs::write(own.join("hosts.toml"), text).unwrap();
    far.bed.weightfs.configure(&format!("[mirrors]\nhosts_dir = \"{}\"\n", dir.display()));
    let other = Forward::start(&[]);
    let weightfs = far.bed.weightfs.clone().with_variable("https_proxy", &other.url());
    far.assert_loads(&weightfs);
    assert!(other.tunnels().is_empty() && !far.forward.tunnels().is_empty());
}

#[test]
fn a_registry_may_have_an_address_of_ipv6() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    bed.push(&bed.pack_raw(&source, Dialect::Cncf), REPOSITORY);
    let registry = Proxy::start_at("[::1]:0", bed.registry.address());
    let reference = registry.reference(REPOSITORY, "v1");
    assert!(reference.starts_with("[::1]:"), "{reference}");
    let mounted = bed.mount(&reference);
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
}
