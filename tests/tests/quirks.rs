//! Every kind of artifact behind every quirk of registries: mounted, read, and compared byte for byte,
//! with no error that a reader sees.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use weightfs_tests::image::image;
use weightfs_tests::layer::{Attributes, Compression, LayerBuilder};
use weightfs_tests::model::Part;
use weightfs_tests::modelpack::{Dialect, Plan, files_of};
use weightfs_tests::remote::Credentials;
use weightfs_tests::{
    Bed, Certificates, Fault, Mounted, Proxy, Signatures, Target, Total, Weightfs,
};

/// Large enough for several ranged requests where each is a MiB.
const MODEL: &[Part] = &[
    Part { path: "config.json", bytes: 517, mode: 0o644 },
    Part { path: "docs/README.md", bytes: 3_000, mode: 0o644 },
    Part { path: "weights/a.safetensors", bytes: 3 << 20, mode: 0o644 },
    Part { path: "weights/b.safetensors", bytes: 1_200_000, mode: 0o644 },
];

/// The file of which a page in the middle is read first.
const LARGE: &str = "weights/a.safetensors";

/// Requests of a MiB, so that blobs are read in ranges; nothing that nobody asked for.
const SMALL_REQUESTS: &str = "[fetch]\nbackground = \"off\"\nprefetch = false\n\
    request_size = \"1MiB\"\nread_ahead_min = \"1MiB\"\nread_ahead_max = \"2MiB\"\n";

/// Cells that run at once. They wait more than they work.
const AT_ONCE: usize = 12;

/// A repository and a tag.
type Kind = (&'static str, &'static str);

/// Pushes the model as every kind of artifact.
fn push_all(bed: &Bed, source: &Path) -> Vec<Kind> {
    let remote = bed.registry.remote();
    let files = || files_of(source);
    let tar = |compression| {
        let (docs, rest): (Vec<_>, Vec<_>) = files().into_iter().partition(|f| f.contains("docs"));
        [Plan::Tar(Compression::Plain, docs), Plan::Tar(compression, rest)]
    };
    let raw: Vec<_> = files().into_iter().map(Plan::Raw).collect();
    let [plain, gzip, zstd] = [Compression::Plain, Compression::Gzip, Compression::Zstd].map(tar);
    let mut kinds = vec![];
    for (repository, dialect, plans) in [
        ("cncf/raw", Dialect::Cncf, &raw[..]),
        ("cncf/tar", Dialect::Cncf, &plain),
        ("cncf/tar-gzip", Dialect::Cncf, &gzip),
        ("cncf/tar-zstd", Dialect::Cncf, &zstd),
        ("cnai/raw", Dialect::Cnai, &raw),
        ("docker/raw", Dialect::Docker, &raw),
        ("oras/raw", Dialect::Oras, &raw),
    ] {
        bed.pack(source, dialect, plans).push(remote, repository, "v1");
        kinds.push((repository, "v1"));
    }
    for (repository, compression) in
        [("image/plain", Compression::Plain), ("image/gzip", Compression::Gzip)]
    {
        let mut layer = LayerBuilder::new(bed.area.path());
        for file in files() {
            layer = layer.file_from(&file, &source.join(&file), &Attributes::mode(0o644));
        }
        image(&[layer.finish(compression)]).push(remote, repository, "v1");
        kinds.push((repository, "v1"));
    }
    let reference = |repository| remote.reference(repository, "v1");
    bed.pack(source, Dialect::Cncf, &gzip).push(remote, "cncf/indexed", "v1");
    bed.weightfs.run_here(&["index", &reference("cncf/indexed")]).ok();
    bed.weightfs.run_here(&["image", &reference("cncf/raw"), "--tag", "image"]).ok();
    kinds.extend([("cncf/indexed", "v1"), ("cncf/raw", "image")]);
    kinds
}

/// A registry with a quirk.
struct Stage {
    /// What is asked.
    registry: Proxy,
    /// What else answers.
    others: Vec<Proxy>,
    config: String,
    credentials: Option<Credentials>,
    /// Whether the quirk had an effect.
    showed: Box<dyn Fn(&Stage) -> bool + Send + Sync>,
    /// Done while a cell loads.
    meanwhile: fn(&Stage),
}

impl Stage {
    fn new(bed: &Bed) -> Self {
        Self {
            registry: Proxy::start(bed.registry.address()),
            others: vec![],
            config: String::new(),
            credentials: None,
            showed: Box::new(|stage| stage.registry.requests(Target::Blobs) > 0),
            meanwhile: |_| {},
        }
    }

    /// A registry whose blobs have a fault.
    fn failing(bed: &Bed, fault: Fault) -> Self {
        let stage = Self::new(bed);
        stage.registry.fail(Target::Blobs, fault);
        stage
    }

    /// A mirror of a good registry whose blobs have a fault.
    fn mirror_failing(bed: &Bed, fault: Fault) -> Self {
        let mirror = Proxy::start(bed.registry.address());
        mirror.fail(Target::Blobs, fault);
        Self::new(bed).with_mirror(bed, mirror)
    }

    fn with_mirror(mut self, bed: &Bed, mirror: Proxy) -> Self {
        let host = format!("[host.\"http://{}\"]\n", mirror.address());
        self = self.with_hosts(bed, &host);
        self.others.push(mirror);
        self.showed = Box::new(|stage| stage.others[0].requests(Target::Blobs) > 0);
        self
    }

    fn with_hosts(mut self, bed: &Bed, text: &str) -> Self {
        let dir = bed.area.path().join("certs.d");
        let own = dir.join(self.registry.address());
        fs::create_dir_all(&own).unwrap();
        fs::write(own.join("hosts.toml"), text).unwrap();
        self.config = format!("[mirrors]\nhosts_dir = \"{}\"\n", dir.display());
        self
    }

    /// A registry that speaks TLS with an authority of its own, maybe to those it knows only.
    fn with_tls(bed: &Bed, client_certificates: bool) -> Self {
        let dir = tempfile::tempdir_in(bed.area.path()).unwrap().keep();
        let certificates = Certificates::make(&dir);
        let registry = Proxy::start_tls(bed.registry.address(), &certificates, client_certificates);
        let stage = Self { registry, ..Self::new(bed) };
        let authority = certificates.authority();
        let client = match client_certificates {
            true => format!("client = \"{}\"\n", certificates.client().display()),
            false => String::new(),
        };
        let hosts = format!(
            "server = \"https://{}\"\nca = \"{}\"\n{client}",
            stage.registry.address(),
            authority.display()
        );
        stage.with_hosts(bed, &hosts)
    }

    /// A registry that signs what it redirects to.
    fn signing(bed: &Bed, uses: u32) -> Self {
        let signatures = Signatures::good_for(uses);
        let storage = Proxy::start(bed.registry.address());
        storage.fail(Target::Blobs, Fault::Unsigned(signatures.clone()));
        let stage = Self::new(bed);
        let to = storage.address();
        stage.registry.fail(Target::Blobs, Fault::Sign { to, signatures: signatures.clone() });
        let showed = move |stage: &Self| {
            let storage = &stage.others[0];
            let alone = storage.seen().iter().all(|seen| !seen.authorized());
            signatures.given() > 0 && storage.bytes(Target::Blobs) > 0 && alone
        };
        Self { others: vec![storage], showed: Box::new(showed), ..stage }
    }

    /// A registry whose tokens live so long.
    fn with_tokens(bed: &Bed, life: Duration) -> Self {
        let credentials = Credentials { user: "robot$reader".into(), password: "pa:ss".into() };
        let stage = Self::new(bed);
        stage.registry.require_tokens_of(credentials.clone(), life);
        Self { credentials: Some(credentials), ..stage }
    }

    fn weightfs(&self, bed: &Bed) -> Weightfs {
        let weightfs = Weightfs::new(&bed.area);
        weightfs.configure(&format!("{SMALL_REQUESTS}{}", self.config));
        if let Some(Credentials { user, password }) = &self.credentials {
            weightfs.log_in(&self.registry.address(), user, password);
        }
        weightfs
    }
}

/// The quirks, by name.
fn quirks(bed: &Bed) -> Vec<(&'static str, Stage)> {
    let tokens_and_signatures = || {
        let stage = Stage::signing(bed, 3);
        let credentials = Credentials { user: "robot$project+reader".into(), password: "x".into() };
        stage.registry.require_tokens_of(credentials.clone(), Duration::from_secs(2));
        Stage { credentials: Some(credentials), ..stage }
    };
    let down_and_up = || {
        let stage = Stage::new(bed).with_mirror(bed, Proxy::start(bed.registry.address()));
        let meanwhile = |stage: &Stage| {
            stage.others[0].refuse();
            stage.others[0].accept();
        };
        Stage { meanwhile, ..stage }
    };
    vec![
        ("none", Stage::new(bed)),
        ("ranges ignored", Stage::failing(bed, Fault::IgnoreRange)),
        ("no range satisfied", Stage::failing(bed, Fault::Unsatisfiable)),
        ("totals unknown", Stage::failing(bed, Fault::ContentRange(Total::Unknown))),
        ("lengths untold", Stage::failing(bed, Fault::NoLength)),
        ("more than asked for", Stage::failing(bed, Fault::TooMuch(70_000))),
        ("cut in mid-body", Stage::failing(bed, Fault::Cut { after: 300_000 })),
        ("bursts of 429", Stage::failing(bed, Fault::Bursts { of: 24, refused: 2 })),
        ("signed for one use", Stage::signing(bed, 1)),
        ("tokens of two seconds", Stage::with_tokens(bed, Duration::from_secs(2))),
        ("tokens and signatures", tokens_and_signatures()),
        ("private authority", Stage::with_tls(bed, false)),
        ("client certificates", Stage::with_tls(bed, true)),
        ("mirror: down and up", down_and_up()),
        ("mirror: ranges ignored", Stage::mirror_failing(bed, Fault::IgnoreRange)),
        ("mirror: wrong totals", Stage::mirror_failing(bed, Fault::ContentRange(Total::Wrong))),
        ("mirror: no range told", Stage::mirror_failing(bed, Fault::ContentRange(Total::Missing))),
        ("mirror: another range", Stage::mirror_failing(bed, Fault::Elsewhere { by: 4096 })),
        ("mirror: compressed", Stage::mirror_failing(bed, Fault::Compressed { transfer: false })),
        ("mirror: gzip, chunked", Stage::mirror_failing(bed, Fault::Compressed { transfer: true })),
        ("mirror: nothing there", Stage::mirror_failing(bed, Fault::Status(404))),
        ("mirror: forbidden", Stage::mirror_failing(bed, Fault::Status(403))),
        ("mirror: broken", Stage::mirror_failing(bed, Fault::Status(500))),
    ]
}

/// Reads a page in the middle, then everything; compares each byte.
fn load(source: &Path, mounted: &Mounted, meanwhile: impl FnOnce()) {
    let expected = |path: &str| fs::read(source.join(path)).unwrap();
    let file = File::open(mounted.dir().join(LARGE)).unwrap();
    let (mut page, at) = ([0; 4096], 2 << 20);
    file.read_exact_at(&mut page, at as u64).unwrap();
    assert!(page == expected(LARGE)[at..at + 4096], "a page of {LARGE}");
    meanwhile();
    for path in files_of(source) {
        let found = fs::read(mounted.dir().join(&path));
        let found = found.unwrap_or_else(|error| panic!("{path}: {error}\n{}", mounted.log()));
        assert!(found == expected(&path), "{path}: other bytes");
    }
}

/// What went wrong in a cell, if something did.
fn cell(bed: &Bed, stage: &Stage, source: &Path, kind: Kind) -> Option<String> {
    let reference = stage.registry.reference(kind.0, kind.1);
    let run = || {
        let mounted = stage.weightfs(bed).mount(&bed.area, &reference, &bed.mount_point());
        load(source, &mounted, || (stage.meanwhile)(stage));
        mounted.stop();
    };
    let panic = catch_unwind(AssertUnwindSafe(run)).err()?;
    let text = panic.downcast_ref::<String>().map(String::as_str);
    Some(text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_owned())
}

#[test]
fn every_kind_of_artifact_loads_behind_every_quirk() {
    let bed = Bed::new();
    let source: PathBuf = bed.model(MODEL);
    let kinds = push_all(&bed, &source);
    let quirks = quirks(&bed);
    // Kind by kind, so that each registry is asked by few at once.
    let cells: Vec<_> =
        kinds.iter().flat_map(|kind| quirks.iter().map(move |quirk| (quirk, *kind))).collect();
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(vec![]));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(((name, stage), kind)) =
                    cells.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    if let Some(why) = cell(&bed, stage, &source, *kind) {
                        failed
                            .lock()
                            .unwrap()
                            .push(format!("{name} × {}:{}: {why}", kind.0, kind.1));
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} of {} cells:\n{}", failed.len(), cells.len(), failed.join("\n"));
    for (name, stage) in &quirks {
        assert!((stage.showed)(stage), "nothing was seen of: {name}");
    }
}
