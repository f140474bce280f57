//! The harness does what the other tests believe of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use reqwest::Client;
use weightfs_tests::containerd::CriOptions;
use weightfs_tests::cri::Cri;
use weightfs_tests::image::{busybox_layer, image, push_index};
use weightfs_tests::layer::{Attributes, Compression, LayerBuilder};
use weightfs_tests::model::{self, SMALL_MODEL};
use weightfs_tests::modelpack::{Dialect, Plan, pack, raw_plan};
use weightfs_tests::process::run;
use weightfs_tests::python::python;
use weightfs_tests::remote::{Credentials, block_on};
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::{
    Area, Artifact, Blob, Containerd, ContainerdOptions, Fault, Proxy, Registry, RegistryOptions,
    Target,
};

/// A registry with one blob of 3 MB behind a proxy.
struct Counted {
    proxy: Proxy,
    _registry: Registry,
    blob: Blob,
    content: Vec<u8>,
    _area: Area,
}

fn counted() -> Counted {
    let area = Area::new();
    let registry = Registry::start(&area);
    let content = model::noise(3_000_000, 1);
    let blob = Blob::from_bytes(content.clone());
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": { "mediaType": "x/y", "digest": blob.digest.to_string(), "size": blob.size },
        "layers": [],
    });
    Artifact { blobs: vec![blob.clone()], manifest }.push(registry.remote(), "some/thing", "v1");
    let proxy = Proxy::start(registry.address());
    Counted { proxy, _registry: registry, blob, content, _area: area }
}

impl Counted {
    fn client() -> Client {
        Client::builder().no_proxy().build().unwrap()
    }

    fn url(&self) -> String {
        let Self { proxy, blob, .. } = self;
        format!("http://{}/v2/some/thing/blobs/{}", proxy.address(), blob.digest)
    }

    fn get(&self, range: Option<&str>) -> reqwest::Result<(u16, Vec<u8>)> {
        self.get_with(range, None)
    }

    fn get_with(
        &self,
        range: Option<&str>,
        token: Option<&str>,
    ) -> reqwest::Result<(u16, Vec<u8>)> {
        let mut request = Self::client().get(self.url()).timeout(Duration::from_secs(30));
        if let Some(range) = range {
            request = request.header("range", range);
        }
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        block_on(async {
            let response = request.send().await?;
            Ok((response.status().as_u16(), response.bytes().await?.to_vec()))
        })
    }
}

#[test]
fn the_proxy_counts_what_passes() {
    let counted = counted();
    let target = Target::Blob(counted.blob.digest);
    assert_eq!(counted.get(None).unwrap(), (200, counted.content.clone()));
    let part = counted.get(Some("bytes=1000-1999")).unwrap();
    assert_eq!(part, (206, counted.content[1000..2000].to_vec()));
    assert_eq!(counted.proxy.bytes(target), 3_001_000);
    assert_eq!(counted.proxy.requests(target), 2);
    assert_eq!(counted.proxy.bytes(Target::Manifests), 0);
    assert_eq!(counted.proxy.seen()[1].range.as_deref(), Some("bytes=1000-1999"));
    counted.proxy.forget();
    assert_eq!(counted.proxy.bytes(Target::All), 0);
}

#[test]
fn the_proxy_fails_on_command() {
    let counted = counted();
    let fail = |fault| {
        counted.proxy.heal();
        counted.proxy.fail(Target::Blobs, fault);
    };
    fail(Fault::Status(503));
    assert_eq!(counted.get(None).unwrap(), (503, Vec::new()));
    fail(Fault::Cut { after: 1_000_000 });
    counted.proxy.forget();
    assert!(counted.get(None).unwrap_err().is_decode(), "the body is cut");
    assert_eq!(counted.proxy.bytes(Target::All), 1_000_000);
    fail(Fault::Corrupt { at: 1500 });
    let (_, whole) = counted.get(None).unwrap();
    let wrong: Vec<_> = (0..whole.len()).filter(|at| whole[*at] != counted.content[*at]).collect();
    assert_eq!(wrong, [1500]);
    let (_, part) = counted.get(Some("bytes=1400-1599")).unwrap();
    assert_eq!(part[100], whole[1500]);
    assert_eq!(part[..100], counted.content[1400..1500]);
    fail(Fault::IgnoreRange);
    assert_eq!(counted.get(Some("bytes=5-9")).unwrap(), (200, counted.content.clone()));
    counted.proxy.heal();
    assert_eq!(counted.get(Some("bytes=5-9")).unwrap(), (206, counted.content[5..10].to_vec()));
}

#[test]
fn what_hangs_in_the_proxy_goes_on_when_healed() {
    let counted = counted();
    for fault in [Fault::Hang, Fault::Stall { after: 500_000 }] {
        counted.proxy.forget();
        counted.proxy.fail(Target::Blobs, fault.clone());
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| counted.get(None).unwrap());
            let sent = if fault == Fault::Hang { 0 } else { 500_000 };
            weightfs_tests::wait_until("the request waits", || {
                counted.proxy.requests(Target::Blobs) == 1
                    && counted.proxy.bytes(Target::Blobs) == sent
            });
            assert!(!reader.is_finished());
            counted.proxy.heal();
            assert_eq!(reader.join().unwrap(), (200, counted.content.clone()));
        });
    }
}

#[test]
fn the_proxy_refuses_and_accepts_again_on_the_same_port() {
    let counted = counted();
    counted.proxy.refuse();
    assert!(counted.get(None).unwrap_err().is_connect());
    counted.proxy.accept();
    assert_eq!(counted.get(None).unwrap().0, 200);
}

#[test]
fn the_proxy_redirects_and_asks_for_tokens() {
    let counted = counted();
    let store = Proxy::start(counted._registry.address());
    counted.proxy.fail(Target::Blobs, Fault::Redirect { to: store.address() });
    assert_eq!(counted.get(None).unwrap().0, 200);
    assert_eq!((counted.proxy.bytes(Target::All), store.bytes(Target::Blobs)), (0, 3_000_000));

    counted.proxy.heal();
    let credentials = Credentials { user: "u".into(), password: "p".into() };
    counted.proxy.require_tokens(credentials);
    assert_eq!(counted.get(None).unwrap().0, 401);
    let token = block_on(async {
        let url = format!("http://{}/token", counted.proxy.address());
        let ask = Counted::client().get(url).basic_auth("u", Some("p"));
        let answer: serde_json::Value =
            serde_json::from_slice(&ask.send().await.unwrap().bytes().await.unwrap()).unwrap();
        answer["token"].as_str().unwrap().to_owned()
    });
    assert_eq!(counted.get_with(None, Some(&token)).unwrap().0, 200);
    counted.proxy.expire_tokens();
    assert_eq!(counted.get_with(None, Some(&token)).unwrap().0, 401);
}

#[test]
fn registries_ask_for_credentials_and_speak_tls() {
    let area = Area::new();
    let credentials = Credentials { user: "someone".into(), password: "secret".into() };
    let options =
        RegistryOptions { credentials: Some(credentials), tls: true, ..RegistryOptions::default() };
    let registry = Registry::start_with(&area, options);
    let image = image(&[LayerBuilder::new(area.path()).finish(Compression::Plain)]);
    image.push(registry.remote(), "a/b", "c");
    let inspect = |credentials: &str| {
        let reference = format!("docker://{}", registry.remote().reference("a/b", "c"));
        run(Command::new("skopeo")
            .args(["inspect", "--tls-verify=false", "--creds", credentials])
            .arg(reference))
    };
    assert!(inspect("someone:secret").ok().contains("Layers"));
    assert_ne!(inspect("someone:else").code, 0);
}

#[test]
fn a_foreign_client_pulls_what_the_packer_made() {
    let area = Area::new();
    let registry = Registry::start(&area);
    let source = area.dir("source");
    model::make(&source, SMALL_MODEL);
    let raw = pack(&source, area.path(), Dialect::Cncf, &raw_plan(&source));
    raw.push(registry.remote(), "models/raw", "v1");
    let tar_plans = [
        Plan::Tar(Compression::Plain, vec!["weights".into()]),
        Plan::Tar(Compression::Gzip, vec!["docs".into()]),
        Plan::Tar(Compression::Zstd, vec!["config.json".into(), "empty.txt".into()]),
        Plan::Raw("tokenizer.json".into()),
        Plan::Raw("run.sh".into()),
    ];
    pack(&source, area.path(), Dialect::Cncf, &tar_plans).push(
        registry.remote(),
        "models/tar",
        "v1",
    );
    for name in ["models/raw", "models/tar"] {
        let to = area.path().join(name);
        let reference = registry.remote().reference(name, "v1");
        let program = "import sys; from modelpack_client import ModelPackClient\n\
                       ModelPackClient(insecure=True).pull(sys.argv[1], sys.argv[2])";
        python(program, &[&reference, to.to_str().unwrap()]).ok();
        // That client rounds times and widens modes, so only names and bytes are compared.
        let kinds = |dir: &Path| -> BTreeMap<_, _> {
            tree::read(dir).into_iter().map(|(path, entry)| (path, entry.kind)).collect()
        };
        assert_eq!(kinds(&source), kinds(&to));
    }
}

#[test]
#[should_panic(expected = "the trees differ")]
fn trees_that_differ_in_a_time_are_not_the_same() {
    let area = Area::new();
    for name in ["a", "b"] {
        fs::create_dir(area.path().join(name)).unwrap();
        model::make(&area.path().join(name), &SMALL_MODEL[..1]);
    }
    let path = area.path().join("b/config.json");
    model::set_mtime(&path, model::mtime(0) + Duration::from_nanos(1));
    tree::assert_same(&area.path().join("a"), &area.path().join("b"), Scope::ModelFiles);
}

#[test]
fn containerd_runs_an_image_of_the_packer() {
    let area = Area::new();
    let registry = Registry::start(&area);
    let file =
        Attributes::mode(0o4751).owned(1000, 1001).at(1_600_000_000, 42).xattr("user.x", "y");
    let upper = LayerBuilder::new(area.path())
        .dir("data", &Attributes::mode(0o700).owned(5, 6))
        .file("data/tool", b"content", &file)
        .hard_link("data/same", "data/tool", &file)
        .finish(Compression::Gzip);
    let image = image(&[busybox_layer(area.path(), Compression::Plain), upper]);
    push_index(
        registry.remote(),
        "t/image",
        "v1",
        &[(weightfs_tests::image::architecture(), &image)],
    );
    let reference = registry.remote().reference("t/image", "v1");

    let containerd = Containerd::start(&area, &ContainerdOptions::default());
    containerd.pull(&reference);
    let text = containerd.run("overlayfs", &reference, "first", &["/bin/cat", "/data/same"]).ok();
    assert_eq!(text, "content");
    let container = containerd.start_container("overlayfs", &reference, "second");
    assert_eq!(
        container.exec(&["/bin/stat", "-c", "%a %u %g", "/data/tool"]).ok(),
        "4751 1000 1001\n"
    );
    let seen = tree::read(&container.root().join("data"));
    let tool = &seen[Path::new("tool")];
    assert_eq!((tool.mtime, tool.mode, tool.uid), (1_600_000_000_000_000_042, 0o4751, 1000));
    assert_eq!(tool.xattrs["user.x"], b"y");
    assert_eq!(tool.linked_to.as_deref(), Some("same".as_ref()));
    container.remove();
    containerd.remove_image(&reference);
    assert!(containerd.snapshots("overlayfs").is_empty());
    drop(containerd);
    area.assert_no_mounts();
}

#[test]
fn cri_pulls_and_runs() {
    let area = Area::new();
    let registry = Registry::start(&area);
    let image = image(&[busybox_layer(area.path(), Compression::Plain)]);
    image.push(registry.remote(), "t/busybox", "v1");
    let reference = registry.remote().reference("t/busybox", "v1");
    let sandbox_image = reference.clone();
    let cri = CriOptions { snapshotter: "overlayfs", sandbox_image, user_namespaces: None };
    let options = ContainerdOptions { cri: Some(cri), ..ContainerdOptions::default() };
    let containerd = Containerd::start(&area, &options);
    let cri = Cri::connect(&containerd, &area.dir("pods"));
    cri.pull(&reference).unwrap();
    let ended = cri.run(&reference, "one", &["/bin/sh", "-c", "echo hello; exit 3"]).unwrap();
    assert_eq!((ended.code, ended.output.as_str()), (3, "hello\n"));
    drop(containerd);
    area.assert_no_mounts();
}
