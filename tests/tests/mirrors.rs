//! Hosts that answer for a registry, as containerd's hosts.toml names them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use weightfs_tests::model::{Part, SMALL_MODEL};
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::wait::holds_within;
use weightfs_tests::{Bed, Proxy, Registry, RegistryOptions, Target};

/// Writes the hosts.toml of a registry, and has it read.
fn name_hosts(bed: &Bed, registry: &str, text: &str, more: &str) -> PathBuf {
    let dir = bed.area.path().join("certs.d");
    fs::create_dir_all(dir.join(registry)).unwrap();
    let path = dir.join(registry).join("hosts.toml");
    fs::write(&path, text).unwrap();
    bed.weightfs.configure(&format!("[mirrors]\nhosts_dir = \"{}\"\n{more}", dir.display()));
    path
}

/// A file of which each read fetches little.
struct Probe {
    file: File,
    expected: Vec<u8>,
}

impl Probe {
    const QUIET: &'static str = "[fetch]\nbackground = \"off\"\nread_ahead_min = \"1MiB\"\n\
        read_ahead_max = \"1MiB\"\nprefetch = false\n";

    fn open(source: &Path, mounted: &Path) -> Self {
        let name = "model.safetensors";
        let file = File::open(mounted.join(name)).unwrap();
        Self { file, expected: fs::read(source.join(name)).unwrap() }
    }

    fn check(&self, mebibyte: usize) {
        let at = mebibyte << 20;
        let mut bytes = [0; 4096];
        self.file.read_exact_at(&mut bytes, at as u64).unwrap();
        assert_eq!(bytes, self.expected[at..at + 4096]);
    }
}

#[test]
fn mirrors_come_first_and_the_registry_stands_in_while_they_are_away() {
    let bed = Bed::new();
    let source = bed.model(&[Part { path: "model.safetensors", bytes: 96 << 20, mode: 0o644 }]);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/mirrored");
    let mirror = Proxy::start(bed.registry.address());
    let registry = bed.proxy.address();
    let hosts = format!(
        "server = \"http://{registry}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n",
        mirror.address()
    );
    name_hosts(&bed, &registry, &hosts, Probe::QUIET);
    let mounted = bed.mount(&reference);
    let probe = Probe::open(&source, mounted.dir());
    probe.check(0);
    assert!(mirror.requests(Target::Blobs) > 0, "the mirror was not asked");
    assert_eq!(bed.proxy.requests(Target::Blobs), 0, "the registry was asked for a blob");
    assert_eq!(mirror.requests(Target::Manifests), 0, "the mirror may not say what a tag names");

    mirror.refuse();
    // Without a pattern that read-ahead could follow.
    let mut places = (1..96).map(|n| n * n * 41 % 97 % 96);
    places.by_ref().take(6).for_each(|at| probe.check(at));
    assert!(bed.proxy.requests(Target::Blobs) > 0);

    mirror.accept();
    mirror.forget();
    let back = holds_within(Duration::from_secs(60), || {
        probe.check(places.next().expect("the mirror is asked again before all is read"));
        std::thread::sleep(Duration::from_millis(100));
        mirror.requests(Target::Blobs) > 0
    });
    assert!(back, "the mirror was not asked again");
    mounted.stop();
}

#[test]
fn a_mirror_that_lacks_a_blob_is_passed_over() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/mirrored");
    let empty = Registry::start(&bed.area);
    let registry = bed.proxy.address();
    name_hosts(&bed, &registry, &format!("[host.\"http://{}\"]\n", empty.address()), "");
    let mounted = bed.mount(&reference);
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
}

#[test]
fn a_registry_is_shown_our_certificate_and_checked_by_its_authority() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let dir = bed.area.dir("mutual");
    let mut plain = Registry::start_in(&bed.area, &dir, RegistryOptions::default());
    bed.pack_raw(&source, Dialect::Cncf).push(plain.remote(), "tls/model", "v1");
    plain.kill();
    let options = RegistryOptions { tls: true, client_certificates: true, ..Default::default() };
    let registry = Registry::start_in(&bed.area, &dir, options);
    let reference = registry.remote().reference("tls/model", "v1");
    let server = format!("server = \"https://{}\"\n", registry.address());
    let (ca, client) = (registry.ca_file().unwrap(), registry.client_file().unwrap());
    let ca = format!("ca = \"{}\"\n", ca.display());
    let client = format!("client = \"{}\"\n", client.display());

    name_hosts(&bed, registry.address(), &server, "");
    bed.assert_refused(&reference, &[registry.address(), "certificate"]);
    name_hosts(&bed, registry.address(), &format!("{server}{ca}"), "");
    bed.assert_refused(&reference, &[registry.address()]);
    for trust in [&*ca, "skip_verify = true\n"] {
        name_hosts(&bed, registry.address(), &format!("{server}{client}{trust}"), "");
        let mounted = bed.mount(&reference);
        tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
        mounted.stop();
    }
}

#[test]
fn a_hosts_file_that_makes_no_sense_is_named() {
    let bed = Bed::new();
    let source = bed.model(&SMALL_MODEL[..1]);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/mirrored");
    let text = "[host.\"https://mirror\"]\ncapabilities = [\"fly\"]\n";
    let path = name_hosts(&bed, &bed.proxy.address(), text, "");
    bed.assert_refused(&reference, &[&path.display().to_string(), "fly"]);
}
