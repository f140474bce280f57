//! Who may read what: secrets that are rotated, tokens of seconds, rights of repositories, pull
//! secrets by way of the CRI proxy, and where a secret must never be found.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use weightfs_tests::containerd::Version;
use weightfs_tests::cri::Cri;
use weightfs_tests::layer::Layer;
use weightfs_tests::model::{Part, SMALL_MODEL, write_safetensors};
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::remote::{Credentials, OCI_MANIFEST};
use weightfs_tests::tokens::TokenServer;
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::{
    Area, Bed, Fault, Host, Proxy, Registry, RegistryOptions, Target, Weightfs, digest, metrics,
    wait_until,
};

const MIB: u64 = 1 << 20;

/// Nothing is fetched but what is read.
const ONLY_WHAT_IS_READ: &str = "background = \"off\"\nprefetch = false\nread_ahead_min = \"1MiB\"\nread_ahead_max = \"1MiB\"\n";

/// Not in base64, too: no name of a test's file has these.
const SECRET: &str = "hush-4f1b9c7e";

fn user(name: &str, password: &str) -> Credentials {
    Credentials { user: name.into(), password: password.into() }
}

fn with_password(who: &Credentials) -> Bed {
    let credentials = Some(who.clone());
    Bed::with_registry(RegistryOptions { credentials, ..RegistryOptions::default() })
}

/// A file of which each read fetches little, and what is in it.
struct Probe {
    file: File,
    expected: Vec<u8>,
}

impl Probe {
    fn open(path: &Path, source: &Path) -> Self {
        Self { file: File::open(path).unwrap(), expected: fs::read(source).unwrap() }
    }

    /// Reads a little of one MiB, with no error, and compares it.
    fn read(&self, mebibyte: u64) {
        let at = mebibyte * MIB;
        let mut bytes = [0; 4096];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        let start = usize::try_from(at).unwrap();
        assert!(bytes[..] == self.expected[start..start + bytes.len()], "other bytes at {at}");
    }
}

#[test]
fn secrets_are_rotated_while_a_model_is_read() {
    let (old, new) = (user("someone", "the-old-one"), user("someone", "the-new-one"));
    let bed = with_password(&old);
    bed.weightfs.configure(&format!("[fetch]\n{ONLY_WHAT_IS_READ}"));
    let source = bed.model(&[Part { path: "model.safetensors", bytes: 16 * MIB, mode: 0o644 }]);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "private/model");
    let registry = bed.proxy.address();
    bed.weightfs.log_in(&registry, &old.user, &old.password);
    let mounted = bed.mount(&reference);
    let name = "model.safetensors";
    let probe = Probe::open(&mounted.dir().join(name), &source.join(name));
    probe.read(0);
    // The config is there first.
    bed.weightfs.log_in(&registry, &new.user, &new.password);
    bed.registry.change_password(&new);
    // In no order that could be foreseen: what is read later is not here yet.
    [3, 1, 6].into_iter().for_each(|mebibyte| probe.read(mebibyte));
    // The registry is first: readers wait.
    bed.registry.change_password(&old);
    bed.proxy.forget();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| probe.read(12));
        wait_until("the reader is refused", || bed.proxy.requests(Target::Blobs) > 2);
        assert!(!reader.is_finished(), "read without the right to");
        bed.weightfs.log_in(&registry, &old.user, &old.password);
        reader.join().unwrap();
    });
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
}

/// docker-registry with tokens, and what is in it.
struct Tokens {
    server: TokenServer,
    registry: Registry,
    weightfs: Weightfs,
    source: PathBuf,
    area: Area,
}

impl Tokens {
    /// The same model in each of `repositories`.
    fn start(life: Duration, repositories: &[&str], parts: &[Part]) -> Self {
        let area = Area::new();
        let (data, source) = (area.dir("data"), area.dir("model"));
        weightfs_tests::model::make(&source, parts);
        let open = Registry::start_in(&area, &data, RegistryOptions::default());
        let plan = weightfs_tests::modelpack::raw_plan(&source);
        let artifact = weightfs_tests::modelpack::pack(&source, area.path(), Dialect::Cncf, &plan);
        for repository in repositories {
            artifact.push(open.remote(), repository, "v1");
        }
        drop(open);
        let server = TokenServer::start(&area, life);
        let tokens = Some(server.realm());
        let options = RegistryOptions { tokens, ..RegistryOptions::default() };
        let registry = Registry::start_in(&area, &data, options);
        let weightfs = Weightfs::new(&area);
        Self { server, registry, weightfs, source, area }
    }

    fn reference(&self, repository: &str) -> String {
        self.registry.remote().reference(repository, "v1")
    }
}

#[test]
fn tokens_of_seconds_last_a_whole_load() {
    let who = user("someone", SECRET);
    let parts = [Part { path: "model.safetensors", bytes: 8 * MIB, mode: 0o644 }];
    let bed = Tokens::start(Duration::from_secs(1), &["private/model"], &parts);
    bed.server.allow(&who, &["private/model"]);
    bed.weightfs.configure(&format!("[fetch]\n{ONLY_WHAT_IS_READ}"));
    bed.weightfs.log_in(bed.registry.address(), &who.user, &who.password);
    let dir = bed.area.dir("mnt");
    let mounted = bed.weightfs.mount(&bed.area, &bed.reference("private/model"), &dir);
    let probe = Probe::open(&dir.join("model.safetensors"), &bed.source.join("model.safetensors"));
    for mebibyte in [0, 5, 2, 6] {
        probe.read(mebibyte);
        let last = bed.server.issued().pop().unwrap();
        wait_until("the token is over", || last.is_over());
    }
    assert!(bed.server.issued().len() > 3, "{} tokens", bed.server.issued().len());
    // The right is taken away and given back: a new password, known to docker a little later.
    bed.server.allow(&user("someone", "another"), &["private/model"]);
    let last = bed.server.issued().pop().unwrap();
    wait_until("the token is over", || last.is_over());
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| probe.read(7));
        bed.weightfs.log_in(bed.registry.address(), &who.user, "another");
        reader.join().unwrap();
    });
    tree::assert_same(&bed.source, &dir, Scope::ModelFiles);
    mounted.stop();
}

#[test]
fn each_mount_is_authorised_by_its_own_repository() {
    let who = user("someone", SECRET);
    let repositories = ["team/model", "others/model"];
    let bed = Tokens::start(Duration::from_secs(300), &repositories, SMALL_MODEL);
    bed.server.allow(&who, &["team/model"]);
    bed.weightfs.log_in(bed.registry.address(), &who.user, &who.password);
    let daemon = bed.weightfs.serve(&bed.area);
    let (ours, theirs) = (bed.area.dir("ours"), bed.area.dir("theirs"));
    let mount = |repository: &str, dir: &Path| {
        bed.weightfs.run_here(&[
            "mount",
            "--daemon",
            &bed.reference(repository),
            dir.to_str().unwrap(),
        ])
    };
    mount("team/model", &ours).ok();
    // All of it is here now.
    tree::assert_same(&bed.source, &ours, Scope::ModelFiles);
    let refused = mount("others/model", &theirs);
    refused.assert_fails(1, &[bed.registry.address(), "others/model", "someone", "config.json"]);
    assert_eq!(fs::read_dir(&theirs).unwrap().count(), 0);
    bed.server.allow(&who, &repositories);
    wait_until("the right is there", || mount("others/model", &theirs).code == 0);
    tree::assert_same(&bed.source, &theirs, Scope::ModelFiles);
    weightfs_tests::weightfs::umount(&bed.weightfs, &ours);
    weightfs_tests::weightfs::umount(&bed.weightfs, &theirs);
    daemon.stop();
}

#[test]
fn a_manifest_does_not_give_what_its_repository_does_not() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let reference = bed.push(&artifact, "private/model");
    let daemon = bed.weightfs.serve(&bed.area);
    let mount = |reference: &str, dir: &Path| {
        bed.weightfs.run_here(&["mount", "--daemon", reference, dir.to_str().unwrap()])
    };
    let (ours, theirs) = (bed.area.dir("ours"), bed.area.dir("theirs"));
    mount(&reference, &ours).ok();
    // All of it is here now.
    tree::assert_same(&source, &ours, Scope::ModelFiles);
    // Who knows the digests writes a manifest into a registry of their own.
    let registry = Proxy::start(bed.registry.address());
    let remote = bed.registry.remote();
    let mut empty = artifact.clone();
    empty.blobs.truncate(1);
    empty.manifest["layers"] = serde_json::json!([]);
    empty.push(remote, "others/model", "v1");
    let manifest = serde_json::to_vec(&artifact.manifest).unwrap();
    let media_type = OCI_MANIFEST.to_owned();
    registry.fail(Target::Manifests, Fault::Replace { media_type, body: manifest.into() });
    let forged = registry.reference("others/model", "v1");
    let refused = mount(&forged, &theirs);
    refused.assert_fails(1, &[&registry.address(), "others/model", "blob sha256:"]);
    assert_eq!(fs::read_dir(&theirs).unwrap().count(), 0);
    artifact.push(remote, "others/model", "v1");
    registry.forget();
    mount(&forged, &theirs).ok();
    tree::assert_same(&source, &theirs, Scope::ModelFiles);
    assert_eq!(registry.bytes(Target::Blobs), artifact.blobs[0].size);
    // Learned once.
    registry.forget();
    weightfs_tests::weightfs::umount(&bed.weightfs, &theirs);
    mount(&forged, &theirs).ok();
    assert_eq!(registry.requests(Target::Blobs), 1, "more than its config");
    weightfs_tests::weightfs::umount(&bed.weightfs, &ours);
    weightfs_tests::weightfs::umount(&bed.weightfs, &theirs);
    daemon.stop();
}

#[test]
fn sources_are_asked_in_their_order_and_named_where_all_were_refused() {
    let who = user("someone", SECRET);
    let bed = with_password(&who);
    let source = bed.model(&SMALL_MODEL[..1]);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "private/model");
    let registry = bed.proxy.address();
    let auth = |who: &Credentials| STANDARD.encode(format!("{}:{}", who.user, who.password));
    let file = |who: &Credentials| {
        let auths = serde_json::json!({ "auths": { &registry: { "auth": auth(who) } } });
        let path = bed.area.file("credentials.json", auths.to_string());
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        path
    };
    // A plugin of the kubelet's, as a cloud has it.
    let plugin = |who: &Credentials| {
        let (name, password) = (&who.user, &who.password);
        let answer = serde_json::json!({
            "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
            "kind": "CredentialProviderResponse",
            "cacheKeyType": "Registry",
            "auth": { &registry: { "username": name, "password": password } },
        });
        let program = bed.area.file("plugins/cloud", format!("#!/bin/sh\necho '{answer}'\n"));
        fs::set_permissions(program, Permissions::from_mode(0o700)).unwrap();
    };
    let plugins = bed.area.file(
        "plugins.yaml",
        "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- name: cloud\n  \
         apiVersion: credentialprovider.kubelet.k8s.io/v1\n  defaultCacheDuration: 1h\n  \
         matchImages: [\"127.0.0.1:*\"]\n"
            .replace("127.0.0.1:*", &registry),
    );
    let path = file(&user("filed", "wrong-1"));
    bed.weightfs.configure(&format!(
        "[credentials]\nsources = [\"file\", \"docker\", \"kubelet-plugins\"]\nfile = {path:?}\n\
         plugin_config = {plugins:?}\nplugin_dir = {:?}\n",
        bed.area.path().join("plugins")
    ));
    bed.weightfs.log_in(&registry, "docked", "wrong-2");
    plugin(&user("plugged", "wrong-3"));
    let outcome = bed.assert_refused(
        &reference,
        &[
            &registry,
            "private/model",
            "filed",
            "credentials.json",
            "docked",
            "plugged",
            "plugins.yaml",
        ],
    );
    assert!(!outcome.stderr.contains("wrong-"), "{outcome}");
    let mounts = || {
        let mounted = bed.mount(&reference);
        tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
        mounted.stop();
    };
    plugin(&who);
    mounts();
    plugin(&user("plugged", "wrong-3"));
    file(&who);
    mounts();
    // What others can read is not used, and said.
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    bed.weightfs.log_out();
    bed.assert_refused(&reference, &["credentials.json", "0600"]);
}

#[test]
fn a_credential_helper_is_asked_anew_and_named_where_it_fails() {
    let who = user("someone", SECRET);
    let mut bed = with_password(&who);
    let path = std::env::var("PATH").unwrap();
    let programs = bed.area.dir("programs");
    bed.weightfs =
        bed.weightfs.with_variable("PATH", &format!("{}:{path}", programs.to_str().unwrap()));
    let source = bed.model(&SMALL_MODEL[..1]);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "private/model");
    let registry = bed.proxy.address();
    let config = serde_json::json!({ "credHelpers": { &registry: "vault" } }).to_string();
    fs::write(bed.weightfs.config().with_file_name("config.json"), config).unwrap();
    // As docker's helpers are: told the registry, they print a document.
    let helper = |script: &str| {
        let program = bed.area.file("programs/docker-credential-vault", script);
        fs::set_permissions(program, Permissions::from_mode(0o700)).unwrap();
    };
    helper("#!/bin/sh\nexit 1\n");
    bed.assert_refused(&reference, &[&registry, "docker-credential-vault failed"]);
    let answer = serde_json::json!({ "Username": who.user, "Secret": who.password });
    helper(&format!(
        "#!/bin/sh\nread server; [ \"$1 $server\" = 'get {registry}' ] || exit 2\n\
         cat <<'END'\n{answer}\nEND\n"
    ));
    let mounted = bed.mount(&reference);
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
}

/// A node whose kubelet pulls through the daemon from a registry that wants a password.
struct Node {
    host: Host,
    /// By the daemon, as the kubelet sees it.
    cri: Cri,
    /// containerd itself.
    direct: Cri,
    layer: Layer,
    source: PathBuf,
    reference: String,
}

impl Node {
    fn start(version: Version, who: &Credentials) -> Self {
        let bed = with_password(who);
        let [address, containerd] =
            ["cri.sock", "containerd.sock"].map(|name| bed.area.path().join(name));
        bed.weightfs.configure(&format!(
            "[cri]\naddress = {address:?}\ncontainerd = {containerd:?}\n\
             [fetch]\ndeadline = \"60s\"\n{ONLY_WHAT_IS_READ}"
        ));
        let daemon = bed.weightfs.serve_kept(&bed.area);
        let host = Host::with_cri_beside(bed, daemon, version);
        symlink(host.containerd.socket(), containerd).unwrap();
        let source = host.bed.area.path().join("weights");
        write_safetensors(&source, 16 * MIB, 1).unwrap();
        let layer = host.weights_layer(&source, "weights");
        let (reference, _) = host.push_image_below("private/image", std::slice::from_ref(&layer));
        let logs = host.bed.area.dir("pods");
        let cri = Cri::connect_at(&address, &logs);
        let direct = Cri::connect(&host.containerd, &logs);
        Self { host, cri, direct, layer, source, reference }
    }

    /// The weights as the daemon's own mount shows them.
    fn probe(&self) -> Probe {
        let trees = fs::read_dir(self.host.bed.weightfs.root().join("mnt")).unwrap();
        let files = trees.map(|tree| tree.unwrap().path().join("models/weights"));
        let shown = files.into_iter().find(|file| file.exists()).unwrap();
        Probe::open(&shown, &self.source)
    }
}

fn a_kubelet_pulls_with_secrets_through_the_daemon(version: Version) {
    let who = user("someone", SECRET);
    let node = Node::start(version, &who);
    let Node { host, cri, direct, reference, .. } = &node;
    let wrong = cri.pull_as(reference, &user("someone", "guessed")).unwrap_err();
    let same = direct.pull_as(reference, &user("someone", "guessed")).unwrap_err();
    assert_eq!((wrong.code(), wrong.message()), (same.code(), same.message()));
    cri.pull_as(reference, &who).unwrap();
    let fetched = host.fetched(&node.layer);
    assert!(fetched <= 4 * MIB, "{fetched} bytes of a lazy layer");
    assert_eq!(cri.account(reference), direct.account(reference));
    assert_eq!(cri.call_unknown(), direct.call_unknown());
    let probe = node.probe();
    probe.read(1);
    drop(probe);
    // The next daemon knows no secret before the kubelet speaks again.
    host.daemon.kill_kept().unwrap();
    host.daemon.wait_starts(2);
    let probe = node.probe();
    probe.read(1);
    host.bed.proxy.forget();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| probe.read(9));
        wait_until("the reader is refused", || {
            host.bed.proxy.requests(Target::Blob(node.layer.blob.digest)) > 1
        });
        assert!(!reader.is_finished(), "read without the right to");
        // The kubelet's connection goes on through the same socket.
        wait_until("the kubelet is heard", || cri.pull_as(reference, &who).is_ok());
        reader.join().unwrap();
    });
    cri.pull_as(&host.bed.proxy.reference("small", "v1"), &who).unwrap();
    let ended = cri.run(reference, "lazy", &["/bin/sha256sum", "/models/weights"]).unwrap();
    let sum = digest::of_file(&node.source).unwrap().hex();
    assert!(ended.output.starts_with(&sum), "{ended:?}");
    cri.remove(reference).unwrap();
    assert!(!direct.tags().unwrap().contains(reference));
}

#[test]
fn a_kubelet_pulls_with_secrets_through_the_daemon_from_1_6() {
    a_kubelet_pulls_with_secrets_through_the_daemon(Version::Installed);
}

#[test]
fn a_kubelet_pulls_with_secrets_through_the_daemon_from_2_1() {
    if Version::V21.is_here() {
        a_kubelet_pulls_with_secrets_through_the_daemon(Version::V21);
    }
}

/// Every regular file below a directory.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() && entry.file_name() != "mnt" {
            found.extend(files(&entry.path()));
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
    found
}

#[test]
fn a_secret_is_nowhere_but_in_memory() {
    let (who, life) = (user("someone", SECRET), Duration::from_secs(300));
    let bed = Tokens::start(life, &["private/model", "others/model"], SMALL_MODEL);
    bed.server.allow(&who, &["private/model"]);
    bed.weightfs.log_in(bed.registry.address(), &who.user, &who.password);
    metrics::configure(&bed.weightfs, "");
    let mut command = bed.weightfs.command(["keeper", "--"]);
    let serve = bed.weightfs.serve_command();
    command.arg(serve.get_program()).args(serve.get_args()).env("WEIGHTFS_LOG", "trace");
    let mut keeper = weightfs_tests::process::Service::start(&bed.area, "keeper", command).quiet();
    keeper.wait_ready(|service| service.log().contains("INFO serving").then_some(()));
    let dir = bed.area.dir("mnt");
    let mount = |repository: &str| {
        bed.weightfs.run_here(&[
            "mount",
            "--daemon",
            &bed.reference(repository),
            dir.to_str().unwrap(),
        ])
    };
    // Refused, wrong, and good.
    let refused = mount("others/model");
    refused.assert_fails(1, &["others/model"]);
    bed.weightfs.log_in(bed.registry.address(), "someone", &format!("{SECRET}-wrong"));
    let wrong = mount("private/model");
    wrong.assert_fails(1, &["private/model", "someone"]);
    bed.weightfs.log_in(bed.registry.address(), &who.user, &who.password);
    wait_until("the password is taken", || mount("private/model").code == 0);
    tree::assert_same(&bed.source, &dir, Scope::ModelFiles);
    let status = bed.weightfs.run_here(&["status", "--json"]);
    let config = bed.weightfs.run_here(&["config"]);
    let pair = |password: &str| STANDARD.encode(format!("someone:{password}"));
    let tokens = bed.server.issued();
    assert!(!tokens.is_empty());
    let mut secrets = vec![SECRET.to_owned(), pair(SECRET), pair(&format!("{SECRET}-wrong"))];
    secrets.extend(tokens.into_iter().map(|issued| issued.token));
    let find = |place: &str, bytes: &[u8]| {
        for secret in &secrets {
            let secret = secret.as_bytes();
            let found = bytes.windows(secret.len()).any(|window| window == secret);
            assert!(!found, "a secret in {place}");
        }
    };
    let (_, _, figures) = metrics::get(&metrics::address(&bed.weightfs), "/metrics");
    assert!(figures.contains("weightfs_fetched_bytes_total"), "no metrics: {figures}");
    find("the metrics", figures.as_bytes());
    let log = keeper.log();
    assert!(log.contains("TRACE") || log.contains("DEBUG"), "no log of everything: {log}");
    find("the log", log.as_bytes());
    for outcome in [refused, wrong, status, config] {
        find("an output", outcome.to_string().as_bytes());
    }
    let state = files(&bed.weightfs.root());
    assert!(!state.is_empty());
    for path in state.iter().filter(|path| !path.to_str().unwrap().contains("segment-")) {
        match fs::read(path) {
            Ok(bytes) => find(&path.display().to_string(), &bytes),
            // Records are replaced while the daemon runs.
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{path:?}"),
        }
    }
    // What outlives the daemon with its keeper: the ledger.
    let kept = format!("/proc/{}/fd", keeper.pid());
    let ledgers = fs::read_dir(kept).unwrap().map(|entry| entry.unwrap().path());
    let is_memory = |path: &PathBuf| {
        fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("memfd:"))
    };
    let ledgers: Vec<_> = ledgers.filter(is_memory).collect();
    assert!(!ledgers.is_empty(), "no ledger is kept");
    for path in ledgers {
        find("the ledger", &fs::read(path).unwrap());
    }
    weightfs_tests::weightfs::umount(&bed.weightfs, &dir);
}

#[test]
fn a_proxy_is_not_told_what_belongs_to_the_registry() {
    let who = user("someone", SECRET);
    let bed = with_password(&who);
    let source = bed.model(&SMALL_MODEL[..1]);
    bed.push(&bed.pack_raw(&source, Dialect::Cncf), "private/model");
    let mirror = Proxy::start(bed.registry.address());
    let dir = bed.area.path().join("certs.d");
    let registry = bed.proxy.address();
    fs::create_dir_all(dir.join(&registry)).unwrap();
    let hosts = format!("[host.\"http://{}\"]\n", mirror.address());
    fs::write(dir.join(&registry).join("hosts.toml"), hosts).unwrap();
    bed.weightfs.configure(&format!("[mirrors]\nhosts_dir = {dir:?}\n"));
    bed.weightfs.log_in(&registry, &who.user, &who.password);
    let mounted = bed.mount(&bed.proxy.reference("private/model", "v1"));
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    assert!(mirror.requests(Target::All) > 0, "the mirror was not asked");
    assert!(mirror.seen().iter().all(|seen| !seen.authorized()), "credentials went to a mirror");
    mounted.stop();
}
