//! Shows WeightFS beside an ordinary pull: a registry, a model, a mount, and a container; then the
//! same model in containers of stock containerd, as a model image and as it was pushed.
//!
//! `make demo` runs it. `MODEL_DIR=...` takes a real model; else one of 512 MiB is made up.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use weightfs_store::Digest;
use weightfs_tests::containerd::{Container, CriOptions, Version};
use weightfs_tests::cri::Cri;
use weightfs_tests::host::SNAPSHOTTER;
use weightfs_tests::image::{busybox_layer, image};
use weightfs_tests::layer::{Attributes, Compression, Layer, LayerBuilder};
use weightfs_tests::model::{Part, Tensor, make, read_safetensors_header};
use weightfs_tests::modelpack::{Dialect, files_of, pack, raw_plan};
use weightfs_tests::process::run;
use weightfs_tests::{Artifact, Bed, Containerd, ContainerdOptions, Target, Weightfs};

/// The model that is made up when none is given.
const GENERATED: &[Part] = &[
    Part { path: "config.json", bytes: 600, mode: 0o644 },
    Part { path: "tokenizer.json", bytes: 2 << 20, mode: 0o644 },
    Part { path: "model.safetensors", bytes: 512 << 20, mode: 0o644 },
];

/// What is read of a file that has no tensors.
const PIECE_BYTES: u64 = 1 << 20;

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        let text = panic.payload().downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.payload().downcast_ref().copied()).unwrap_or("failed");
        eprintln!("\ndemo: {text}");
    }));
    weightfs_tests::interrupt::watch();
    match std::panic::catch_unwind(demo) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn demo() {
    println!("WeightFS demo: one model, read through WeightFS and after an ordinary pull.\n");
    let bed = Bed::new();
    let model = Model::find(&bed);
    let pushed = step("pack it and push it as artifact and image", || Pushed::new(&bed, &model));
    let mount = step("weightfs mount, in a directory", || mounted(&bed, &model, &pushed));
    let lazy = step("weightfs rpull, in a container", || in_container(&bed, &model, &pushed, true));
    let plain = step("containerd's own pull, in a container", || {
        in_container(&bed, &model, &pushed, false)
    });
    print_table(&model, &mount, &lazy, &plain);
    println!("\nNow into any container, of an image that knows nothing of it.\n");
    let image = step("weightfs image, beside the artifact", || model_image(&bed, &pushed));
    let mut stock = vec![];
    for (road, version) in roads() {
        let what = format!("{}, containerd {}", road.name(), version_text(version));
        let way = step(&what, || in_any_container(&bed, &model, &pushed, &image, road, version));
        stock.push((what, way));
    }
    print_stock(&stock);
    let area = bed.area.path().to_owned();
    drop(bed);
    println!("\nStopped and cleaned up: {} is gone.", area.display());
}

/// The model, and the tensor that is read first.
struct Model {
    dir: PathBuf,
    files: Vec<String>,
    bytes: u64,
    /// The file with the tensor.
    path: String,
    tensor: Tensor,
    digest: Digest,
}

impl Model {
    fn find(bed: &Bed) -> Self {
        let dir = match std::env::var_os("MODEL_DIR").filter(|dir| !dir.is_empty()) {
            Some(dir) => fs::canonicalize(&dir)
                .unwrap_or_else(|e| panic!("MODEL_DIR={}: {e}", Path::new(&dir).display())),
            None => {
                let dir = bed.area.dir("model");
                step("make up a model", || make(&dir, GENERATED));
                dir
            }
        };
        let files = files_of(&dir);
        let size = |path: &String| fs::metadata(dir.join(path)).unwrap().len();
        let bytes = files.iter().map(size).sum();
        let path = files.iter().max_by_key(|path| size(path)).expect("a file in MODEL_DIR").clone();
        let tensor = middle_tensor(&dir.join(&path));
        let digest = read_tensor(&dir.join(&path), &tensor);
        Self { dir, files, bytes, path, tensor, digest }
    }
}

/// The first tensor behind the middle of the file; a piece of it if it has no tensors.
fn middle_tensor(path: &Path) -> Tensor {
    let file = File::open(path).unwrap();
    let size = file.metadata().unwrap().len();
    if path.extension().is_some_and(|extension| extension == "safetensors") {
        let tensors = read_safetensors_header(&file).unwrap();
        let behind = |tensor: &&Tensor| tensor.offset >= size / 2;
        if let Some(tensor) = tensors.iter().find(behind).or(tensors.last()) {
            return tensor.clone();
        }
    }
    let name = "(the bytes in the middle)".to_owned();
    Tensor { name, offset: size / 2, size: PIECE_BYTES.min(size - size / 2) }
}

fn read_tensor(path: &Path, tensor: &Tensor) -> Digest {
    let mut bytes = vec![0; usize::try_from(tensor.size).unwrap()];
    File::open(path).unwrap().read_exact_at(&mut bytes, tensor.offset).unwrap();
    Digest::of(&bytes)
}

/// The model in the registry.
struct Pushed {
    artifact: Artifact,
    image: Artifact,
    weights: Layer,
    artifact_reference: String,
    image_reference: String,
}

impl Pushed {
    fn new(bed: &Bed, model: &Model) -> Self {
        let artifact = pack(&model.dir, bed.area.path(), Dialect::Cncf, &raw_plan(&model.dir));
        let weights = weights_layer(bed.area.path(), model);
        let small = busybox_layer(bed.area.path(), Compression::Gzip);
        let image = image(&[weights.clone(), small]);
        let artifact_reference = bed.push(&artifact, "demo/model");
        let image_reference = bed.push(&image, "demo/image");
        Self { artifact, image, weights, artifact_reference, image_reference }
    }
}

/// A plain tar with the model below `/models`.
fn weights_layer(work: &Path, model: &Model) -> Layer {
    let mut layer = LayerBuilder::new(work).dir("models", &Attributes::mode(0o755));
    for path in &model.files {
        let source = model.dir.join(path);
        layer = layer.file_from(&format!("models/{path}"), &source, &Attributes::mode(0o644));
    }
    layer.finish(Compression::Plain)
}

/// How one way went.
struct Way {
    first: Duration,
    first_bytes: u64,
    full: Duration,
    full_bytes: u64,
    total_bytes: u64,
}

/// `weightfs mount` and reads in the directory, in a state directory of its own.
fn mounted(bed: &Bed, model: &Model, pushed: &Pushed) -> Way {
    let weightfs = Weightfs::new(&bed.area);
    let dir = bed.mount_point();
    let fetched = || bed.proxy.bytes(Target::Blobs);
    bed.proxy.forget();
    let start = Instant::now();
    let mounted = weightfs.mount(&bed.area, &pushed.artifact_reference, &dir);
    let tensor = middle_tensor(&dir.join(&model.path));
    assert_eq!(read_tensor(&dir.join(&model.path), &tensor), model.digest, "the tensor differs");
    let (first, first_bytes) = (start.elapsed(), fetched());
    for path in &model.files {
        std::io::copy(&mut File::open(dir.join(path)).unwrap(), &mut std::io::sink()).unwrap();
    }
    let (full, full_bytes) = (start.elapsed(), fetched());
    mounted.stop();
    Way { first, first_bytes, full, full_bytes, total_bytes: pushed.artifact.layer_bytes() }
}

/// A pull, and reads in a container; daemon and containerd already run.
fn in_container(bed: &Bed, model: &Model, pushed: &Pushed, lazy: bool) -> Way {
    let weightfs = Weightfs::new(&bed.area);
    let daemon = weightfs.serve(&bed.area);
    let options = ContainerdOptions {
        weightfs: Some(weightfs.snapshotter_socket()),
        ..ContainerdOptions::default()
    };
    let containerd = Containerd::start(&bed.area, &options);
    let fetched = || bed.proxy.bytes(Target::Blobs);
    let reference = &pushed.image_reference;
    bed.proxy.forget();
    let start = Instant::now();
    let container = if lazy {
        weightfs.rpull(&containerd.socket(), reference).ok();
        containerd.start_container(SNAPSHOTTER, reference, "demo")
    } else {
        containerd.pull(reference);
        containerd.start_container("overlayfs", reference, "demo")
    };
    let sum = exec(&container, &read_command(model));
    assert!(sum.starts_with(&model.digest.hex()), "the tensor differs");
    let (first, first_bytes) = (start.elapsed(), fetched());
    exec(&container, "find /models -type f -exec cat {} + > /dev/null");
    let (full, full_bytes) = (start.elapsed(), fetched());
    container.remove();
    drop(containerd);
    daemon.stop();
    assert!(full_bytes >= pushed.weights.blob.size, "a full load without all the bytes");
    Way { first, first_bytes, full, full_bytes, total_bytes: pushed.image.layer_bytes() }
}

/// How a container gets the model that is no part of its own image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Road {
    /// The model image, pulled and mounted by `ctr run --mount`.
    Image,
    /// The model image as an image volume of Kubernetes.
    Volume,
    /// The artifact as it was pushed, by `weightfs prepare`.
    Prepare,
}

impl Road {
    fn name(self) -> &'static str {
        match self {
            Self::Image => "model image",
            Self::Volume => "image volume (CRI)",
            Self::Prepare => "weightfs prepare",
        }
    }
}

/// Roads with the versions of containerd that are here; image volumes begin with 2.1.
fn roads() -> Vec<(Road, Version)> {
    let all = [
        (Road::Image, Version::Installed),
        (Road::Image, Version::V17),
        (Road::Volume, Version::V21),
        (Road::Prepare, Version::Installed),
    ];
    all.into_iter().filter(|(_, version)| version.is_here()).collect()
}

/// As the program says it: `containerd <package> <version> <revision>`.
fn version_text(version: Version) -> String {
    let text = run(Command::new(version.program("containerd")).arg("--version")).ok();
    let version = text.split_whitespace().nth(2).unwrap_or("?");
    version.split(['~', '+']).next().unwrap_or(version).to_owned()
}

/// Makes the model image; its reference.
fn model_image(bed: &Bed, pushed: &Pushed) -> String {
    let made = bed.weightfs.run_here(&["image", &pushed.artifact_reference, "--json"]).ok();
    let made: serde_json::Value = serde_json::from_str(&made).unwrap();
    made["reference"].as_str().unwrap().to_owned()
}

/// How one road went: until the model's files are there, and until the first tensor.
struct Stock {
    ready: Duration,
    /// Bytes of the weights by then.
    ready_bytes: u64,
    first: Duration,
    first_bytes: u64,
}

/// The first tensor in a container of a small image, with the model mounted at `/models`.
fn in_any_container(
    bed: &Bed,
    model: &Model,
    pushed: &Pushed,
    image_reference: &str,
    road: Road,
    version: Version,
) -> Stock {
    let small = image(&[busybox_layer(bed.area.path(), Compression::Plain)]);
    let small = bed.push(&small, "demo/small");
    let weightfs = Weightfs::new(&bed.area);
    let daemon = weightfs.serve(&bed.area);
    let cri = CriOptions {
        snapshotter: SNAPSHOTTER,
        sandbox_image: small.clone(),
        user_namespaces: None,
    };
    let options = ContainerdOptions {
        weightfs: Some(weightfs.snapshotter_socket()),
        cri: (road == Road::Volume).then_some(cri),
        version,
        ..ContainerdOptions::default()
    };
    let containerd = Containerd::start(&bed.area, &options);
    let weights = pushed.artifact.blobs.iter().max_by_key(|blob| blob.size).unwrap().digest;
    let fetched = || bed.proxy.bytes(Target::Blob(weights));
    bed.proxy.forget();
    let start = Instant::now();
    let now = || (start.elapsed(), fetched());
    let script = read_command(model);
    let (ready, sum) = match road {
        Road::Image => {
            weightfs.rpull(&containerd.socket(), image_reference).ok();
            let dir = bed.mount_point();
            let view = containerd.mount_view(SNAPSHOTTER, &dir);
            let mount = format!("type=bind,src={},dst=/models,options=rbind:ro", dir.display());
            let ready = now();
            let sum = run_with_mount(&containerd, &small, &mount, &script);
            view.remove();
            (ready, sum)
        }
        Road::Prepare => {
            let socket = containerd.socket();
            let reference = &pushed.artifact_reference;
            let arguments = ["prepare", reference, "--json", "--address", socket.to_str().unwrap()];
            let prepared = weightfs.run_here(&arguments).ok();
            let prepared: serde_json::Value = serde_json::from_str(&prepared).unwrap();
            let ready = now();
            let mount = prepared["mount"].as_str().unwrap();
            (ready, run_with_mount(&containerd, &small, mount, &script))
        }
        Road::Volume => {
            let cri = Cri::connect(&containerd, &bed.area.dir("pods"));
            let volume = cri.pull(image_reference).unwrap();
            cri.pull(&small).unwrap();
            let ready = now();
            let words = ["/bin/sh", "-c", &script];
            (ready, cri.run_with_volume(&small, &volume, "reader", &words).unwrap().output)
        }
    };
    assert!(sum.starts_with(&model.digest.hex()), "the tensor differs: {sum}");
    let (first, first_bytes) = now();
    drop(containerd);
    daemon.stop();
    Stock { ready: ready.0, ready_bytes: ready.1, first, first_bytes }
}

fn run_with_mount(containerd: &Containerd, image: &str, mount: &str, script: &str) -> String {
    containerd.pull(image);
    let id = format!("demo-{}", std::process::id());
    let arguments = ["run", "--rm", "--snapshotter", "overlayfs", "--mount", mount, image, &id];
    containerd.ctr(&[&arguments[..], &["/bin/sh", "-c", script]].concat()).ok()
}

fn read_command(model: &Model) -> String {
    let Tensor { offset, size, .. } = model.tensor;
    format!(
        "dd if='/models/{}' iflag=skip_bytes,count_bytes skip={offset} count={size} bs=1048576 \
         2>/dev/null | sha256sum",
        model.path
    )
}

fn exec(container: &Container<'_>, script: &str) -> String {
    container.exec(&["/bin/sh", "-c", script]).ok()
}

/// Says what is done and how long it took; ends the demo here if Ctrl-C was pressed.
fn step<T>(what: &str, work: impl FnOnce() -> T) -> T {
    use std::io::Write as _;
    print!("  {what} ");
    let _ = std::io::stdout().flush();
    let start = Instant::now();
    let result = work();
    println!(
        "{} {:>7.1} s",
        ".".repeat(48_usize.saturating_sub(what.len())),
        seconds(start.elapsed())
    );
    weightfs_tests::interrupt::check();
    result
}

fn print_table(model: &Model, mount: &Way, lazy: &Way, plain: &Way) {
    let tensor = &model.tensor;
    let (count, total) = (model.files.len(), size_text(model.bytes));
    println!("\nThe model: {total} in {count} files, in a docker-registry on 127.0.0.1.");
    println!("The first tensor, from the middle of {}:", model.path);
    println!("  {}, {}\n", tensor.name, size_text(tensor.size));
    println!("  {:<22}{:>16}{:>17}{:>18}", "", "weightfs", "weightfs", "containerd");
    println!("  {:<22}{:>16}{:>17}{:>18}", "", "mount", "in a container", "pull and run");
    let row = |name: &str, value: &dyn Fn(&Way) -> String| {
        println!("  {name:<22}{:>16}{:>17}{:>18}", value(mount), value(lazy), value(plain));
    };
    row("time to first tensor", &|way| format!("{:.2} s", seconds(way.first)));
    row("fetched by then", &|way| size_text(way.first_bytes));
    row("time to full load", &|way| format!("{:.2} s", seconds(way.full)));
    row("fetched by then", &|way| size_text(way.full_bytes));
    row("size in the registry", &|way| size_text(way.total_bytes));
    println!("\nTimes begin before the mount or pull; bytes are counted at the registry.");
    println!("The tensor's bytes were compared with the source each time.");
}

fn print_stock(stock: &[(String, Stock)]) {
    println!("\n  {:<38}{:>9}{:>13}{:>17}", "", "there", "weights", "first tensor");
    println!("  {:<38}{:>9}{:>13}{:>17}", "", "after", "fetched", "after");
    for (what, way) in stock {
        let (ready, first) = (seconds(way.ready), seconds(way.first));
        let (before, after) = (size_text(way.ready_bytes), size_text(way.first_bytes));
        println!("  {what:<38}{ready:>7.2} s{before:>13}{first:>15.2} s");
        println!("  {:<38}{:>9}{after:>13}", "", "");
    }
    println!("\nThe second figure of the weights is what was fetched for the tensor.");
}

fn seconds(time: Duration) -> f64 {
    time.as_secs_f64()
}

fn size_text(bytes: u64) -> String {
    let (unit, name) = if bytes < 1 << 20 { (1 << 10, "KiB") } else { (1 << 20, "MiB") };
    // Tenths, without floating point.
    let tenths = bytes * 10 / unit;
    format!("{}.{} {name}", tenths / 10, tenths % 10)
}
