//! Blobs by way of Dragonfly. Its daemon is a stand-in here, a proxy that answers as the real one was
//! seen to; `make test-dragonfly` loads through real ones.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use weightfs_store::Digest;
use weightfs_tests::model::Part;
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::remote::Credentials;
use weightfs_tests::wait::holds_within;
use weightfs_tests::{Bed, Fault, Mounted, Proxy, Target};

const MIB: usize = 1 << 20;
const FILE: &str = "model.safetensors";

/// A model of one blob, mounted through a stand-in for dfdaemon.
struct Lab {
    mounted: Mounted,
    weights: Vec<u8>,
    blob: Target,
    dfdaemon: Proxy,
    bed: Bed,
}

impl Lab {
    /// What dfdaemon asks is the registry itself: what the bed's proxy sees came to it directly.
    fn start(mebibytes: usize, more: &str) -> Self {
        let bed = Bed::new();
        let dfdaemon = Proxy::start(bed.registry.address());
        Self::with(bed, dfdaemon, mebibytes, more, |_| {})
    }

    fn with(
        bed: Bed,
        dfdaemon: Proxy,
        mebibytes: usize,
        more: &str,
        prepare: impl FnOnce(&Bed),
    ) -> Self {
        let source =
            bed.model(&[Part { path: FILE, bytes: (mebibytes << 20) as u64, mode: 0o644 }]);
        let weights = fs::read(source.join(FILE)).unwrap();
        let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/fleet");
        prepare(&bed);
        let endpoint = format!("endpoint = \"http://{}\"", dfdaemon.address());
        bed.weightfs.configure(&format!("[dragonfly]\n{endpoint}\ntag = \"team\"\n{more}"));
        let mounted = bed.mount(&reference);
        let blob = Target::Blob(Digest::of(&weights));
        Self { mounted, weights, blob, dfdaemon, bed }
    }

    fn path(&self) -> PathBuf {
        self.mounted.dir().join(FILE)
    }

    fn assert_loads(&self) {
        assert!(fs::read(self.path()).unwrap() == self.weights, "wrong bytes");
    }

    fn read_page(&self, mebibyte: usize) {
        let at = mebibyte * MIB;
        let mut page = [0; 4096];
        File::open(self.path()).unwrap().read_exact_at(&mut page, at as u64).unwrap();
        assert!(page == self.weights[at..at + 4096], "wrong bytes");
    }
}

/// Each read fetches a MiB, and nothing else does.
const QUIET: &str = "[fetch]\nbackground = \"off\"\nread_ahead_min = \"1MiB\"\n\
    read_ahead_max = \"1MiB\"\nprefetch = false\n";

/// Places of which none leads to the next.
fn scattered(mebibytes: usize) -> impl Iterator<Item = usize> {
    (1..mebibytes).map(move |n| n * n * 41 % 97 % mebibytes)
}

#[test]
fn weights_come_through_dragonfly_and_names_from_the_registry() {
    let lab = Lab::start(40, "");
    lab.assert_loads();
    assert_eq!(lab.bed.proxy.requests(lab.blob), 0, "the registry was asked for weights");
    assert_eq!(lab.dfdaemon.requests(Target::Manifests), 0, "a mount must be the registry's word");
    let seen = lab.dfdaemon.seen();
    assert!(!seen.is_empty());
    let registry = format!("http://{}", lab.bed.proxy.address());
    for request in seen {
        for (name, value) in [
            ("x-dragonfly-registry", &*registry),
            ("x-dragonfly-use-p2p", "true"),
            ("x-dragonfly-enable-task-id-based-blob-digest", "true"),
            ("x-dragonfly-scheduling-policy", "always"),
            ("x-dragonfly-piece-length", "4mib"),
            ("x-dragonfly-tag", "team"),
        ] {
            assert_eq!(request.header(name), value, "{name}");
        }
        let range = request.range.as_deref().and_then(|range| range.strip_prefix("bytes="));
        let (first, last) = range.and_then(|range| range.split_once('-')).expect("a single range");
        let bytes = last.parse::<usize>().unwrap() - first.parse::<usize>().unwrap() + 1;
        let reads_on = (bytes > 4 * MIB).to_string();
        assert_eq!(request.header("x-dragonfly-prefetch"), reads_on, "{bytes} bytes");
    }
    lab.mounted.stop();
}

/// A load while something is wrong with dfdaemon: the registry stands in.
fn assert_registry_stands_in(break_it: impl FnOnce(&Proxy)) {
    let lab = Lab::start(24, "");
    break_it(&lab.dfdaemon);
    lab.assert_loads();
    assert!(lab.bed.proxy.requests(lab.blob) > 0);
    lab.mounted.stop();
}

#[test]
fn the_registry_stands_in_for_a_daemon_that_is_away() {
    assert_registry_stands_in(Proxy::refuse);
}

#[test]
fn the_registry_stands_in_for_a_daemon_that_hangs() {
    assert_registry_stands_in(|dfdaemon| dfdaemon.fail(Target::All, Fault::Hang));
}

#[test]
fn the_registry_stands_in_for_a_daemon_that_fails() {
    let fault = Fault::Dragonfly { status: 500, failed: "dfdaemon" };
    assert_registry_stands_in(|dfdaemon| dfdaemon.fail(Target::All, fault));
}

#[test]
fn an_empty_success_is_no_answer() {
    let fault = Fault::Dragonfly { status: 200, failed: "backend" };
    assert_registry_stands_in(|dfdaemon| dfdaemon.fail(Target::All, fault));
}

#[test]
fn the_registry_stands_in_for_a_daemon_that_gives_something_else() {
    assert_registry_stands_in(|dfdaemon| {
        dfdaemon.fail(Target::All, Fault::Elsewhere { by: 4096 });
    });
}

#[test]
fn a_daemon_that_asks_for_patience_is_not_passed_over() {
    let lab = Lab::start(4, QUIET);
    lab.read_page(0);
    let busy = Fault::Dragonfly { status: 429, failed: "proxy" };
    lab.dfdaemon.fail(Target::All, busy);
    std::thread::scope(|scope| {
        let before = lab.dfdaemon.requests(lab.blob);
        let reader = scope.spawn(|| lab.read_page(2));
        let asked =
            holds_within(Duration::from_secs(20), || lab.dfdaemon.requests(lab.blob) > before + 1);
        assert!(asked, "dfdaemon was not asked again");
        lab.dfdaemon.heal();
        reader.join().unwrap();
    });
    assert_eq!(lab.bed.proxy.requests(lab.blob), 0, "the registry bears what dfdaemon can't");
    lab.mounted.stop();
}

#[test]
fn a_daemon_that_is_back_is_asked_again() {
    let lab = Lab::start(96, QUIET);
    let mut places = scattered(96);
    lab.dfdaemon.refuse();
    places.by_ref().take(4).for_each(|place| lab.read_page(place));
    assert!(lab.bed.proxy.requests(lab.blob) > 0);
    lab.dfdaemon.accept();
    lab.dfdaemon.forget();
    let back = holds_within(Duration::from_secs(60), || {
        lab.read_page(places.next().expect("it is asked again before all is read"));
        std::thread::sleep(Duration::from_millis(100));
        lab.dfdaemon.requests(lab.blob) > 0
    });
    assert!(back, "dfdaemon was not asked again");
    lab.mounted.stop();
}

#[test]
fn tokens_go_along_and_are_renewed_when_the_registry_refuses_them() {
    let bed = Bed::new();
    // Here dfdaemon's registry is the proxy, which wants tokens.
    let dfdaemon = Proxy::start(&bed.proxy.address());
    let credentials = Credentials { user: "robot".into(), password: "correct".into() };
    let lab = Lab::with(bed, dfdaemon, 64, QUIET, |bed| {
        bed.proxy.require_tokens(credentials.clone());
        bed.weightfs.log_in(&bed.proxy.address(), "robot", "correct");
    });
    lab.read_page(0);
    lab.bed.proxy.expire_tokens();
    lab.read_page(30);
    let seen = lab.dfdaemon.seen();
    assert!(seen.iter().any(|request| request.authorized()));
    // Each request of the registry came from dfdaemon, the refused one, too.
    assert_eq!(lab.bed.proxy.requests(lab.blob), lab.dfdaemon.requests(lab.blob));
    lab.mounted.stop();
}

#[test]
fn an_endpoint_that_would_show_tokens_to_a_network_is_refused() {
    let bed = Bed::new();
    bed.weightfs.configure("[dragonfly]\nendpoint = \"http://10.0.0.1:4001\"\n");
    let outcome = bed.weightfs.mount_fails(&bed.proxy.reference("a/b", "v1"), Path::new("/mnt"));
    bed.assert_clean_failure(&outcome, &["dragonfly.endpoint", "10.0.0.1", "plain text"]);
}
