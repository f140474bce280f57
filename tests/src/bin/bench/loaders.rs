//! Loads by other people's loaders: through a cold mount, and after a pull to local files.
//!
//! A loader has started and imported everything before the clock does. Both ways must give the
//! same tensors.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use weightfs_tests::Blob;
use weightfs_tests::figures::Figures;
use weightfs_tests::process::run_within;

use crate::download::Blobs;
use crate::lab::{Lab, Line, drop_caches};
use crate::{Bench, Options};

const PROGRAM: &str = include_str!("load.py");

/// Making a model of a gigabyte with PyTorch takes minutes on a busy machine.
const MAKE_PATIENCE: Duration = Duration::from_secs(900);

/// Loaders that need nothing but numpy, and those that need PyTorch.
const SMALL: [&str; 2] = ["safetensors", "gguf"];
const LARGE: [&str; 4] = ["transformers", "runai", "fastsafetensors", "tensorizer"];

/// What can be loaded with what.
#[derive(Debug)]
pub(crate) struct Loaders {
    cases: Vec<Case>,
}

#[derive(Debug)]
struct Case {
    loader: &'static str,
    python: PathBuf,
    repository: &'static str,
    /// On each line.
    blobs: [(Line, Blobs); 2],
    names: Vec<String>,
}

impl Loaders {
    /// Finds the environments, and makes and pushes the models that they load.
    pub(crate) fn new(options: &Options, lab: &Lab, figures: &mut Figures) -> Self {
        let mut cases = Vec::new();
        if options.wants("loaders") {
            small_cases(options, lab, figures, &mut cases);
            large_cases(options, lab, figures, &mut cases);
        }
        Self { cases }
    }
}

fn small_cases(options: &Options, lab: &Lab, figures: &mut Figures, cases: &mut Vec<Case>) {
    let python = options.target.join("python/bin/python");
    if !python.exists() {
        let reason = "no Python environment: packaging/python-env";
        SMALL.iter().for_each(|name| figures.leave_out(name, reason));
        return;
    }
    let blobs = Line::BOTH.map(|line| (line, lab.blobs(line)));
    let names = lab.model.shards.clone();
    let [safetensors, gguf] = SMALL;
    cases.push(Case {
        loader: safetensors,
        python: python.clone(),
        repository: "model",
        blobs,
        names,
    });
    let dir = lab.area.dir("gguf");
    let name = "model.gguf".to_owned();
    make(&python, &["make-gguf", &path_text(&dir.join(&name)), &options.shard_bytes.to_string()]);
    cases.push(pushed(lab, gguf, &python, "gguf", &dir, vec![name]));
}

fn large_cases(options: &Options, lab: &Lab, figures: &mut Figures, cases: &mut Vec<Case>) {
    let python = options.target.join("loaders-env/bin/python");
    let reason = match (options.all_loaders, python.exists()) {
        (true, true) => None,
        (true, false) => Some("no Python environment: packaging/loaders-env"),
        (false, _) => Some("needs PyTorch; LOADERS=all brings it"),
    };
    if let Some(reason) = reason {
        LARGE.iter().for_each(|name| figures.leave_out(name, reason));
        return;
    }
    let dir = lab.area.dir("torch");
    make(&python, &["make-torch", &path_text(&dir), &(4 * options.shard_bytes).to_string()]);
    let mut names = weightfs_tests::modelpack::files_of(&dir);
    let tensors = names.extract_if(.., |name| name.ends_with(".tensors")).collect();
    for loader in LARGE.into_iter().take(3) {
        cases.push(pushed(lab, loader, &python, "torch", &dir, names.clone()));
    }
    cases.push(pushed(lab, "tensorizer", &python, "tensors", &dir, tensors));
}

fn make(python: &Path, arguments: &[&str]) {
    run_within(MAKE_PATIENCE, Command::new(python).args(["-c", PROGRAM]).args(arguments)).ok();
}

fn pushed(
    lab: &Lab,
    loader: &'static str,
    python: &Path,
    repository: &'static str,
    dir: &Path,
    names: Vec<String>,
) -> Case {
    let blobs: Vec<Blob> = lab.push_model(repository, dir, &names);
    let blobs = Line::BOTH.map(|line| (line, Blobs::new(&lab.address(line), repository, &blobs)));
    Case { loader, python: python.to_owned(), repository, blobs, names }
}

/// One round.
pub(crate) fn measure(bench: &Bench, figures: &mut Figures) {
    for case in &bench.loaders.cases {
        for (line, blobs) in &case.blobs {
            let (mounted, by_mount) = through_mount(&bench.lab, case, *line);
            let (pulled, by_pull) = after_pull(&bench.lab, case, blobs);
            assert_eq!(by_mount, by_pull, "{} loaded wrong bytes", case.loader);
            let line = match line {
                Line::Direct => "",
                Line::Throttled => "_throttled",
            };
            figures.add(&format!("{}_mount{line}_s", case.loader), mounted.as_secs_f64());
            figures.add(&format!("{}_pull{line}_s", case.loader), pulled.as_secs_f64());
        }
    }
}

fn through_mount(lab: &Lab, case: &Case, line: Line) -> (Duration, String) {
    let loader = Loader::start(case);
    lab.with_mount(&lab.reference(line, case.repository), |mounted, start| {
        loader.load(mounted.dir(), start)
    })
}

fn after_pull(lab: &Lab, case: &Case, blobs: &Blobs) -> (Duration, String) {
    let loader = Loader::start(case);
    let dir = tempfile::tempdir_in(lab.area.path()).unwrap();
    drop_caches();
    let start = Instant::now();
    blobs.pull(dir.path(), &case.names);
    loader.load(dir.path(), start)
}

/// A loader that has imported what it needs.
#[derive(Debug)]
struct Loader {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Loader {
    fn start(case: &Case) -> Self {
        let mut command = Command::new(&case.python);
        command.args(["-c", PROGRAM, case.loader]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("Python starts");
        let input = child.stdin.take().expect("a pipe");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut loader = Self { child, input, output };
        assert_eq!(loader.line(), "ready", "{}: see its message above", case.loader);
        loader
    }

    /// Loads, gives the time since `start` and what was loaded, and waits for its end.
    fn load(mut self, dir: &Path, start: Instant) -> (Duration, String) {
        writeln!(self.input, "{}", dir.display()).expect("the loader listens");
        assert_eq!(self.line(), "loaded", "the loader failed: see its message above");
        let time = start.elapsed();
        let sum = self.line();
        let status = self.child.wait().expect("the loader's end");
        assert!(status.success(), "the loader ended with {status}");
        (time, sum)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the loader speaks UTF-8");
        line.trim_end().to_owned()
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // It has ended already unless something went wrong.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn path_text(path: &Path) -> String {
    path.to_str().expect("a path in UTF-8").to_owned()
}
