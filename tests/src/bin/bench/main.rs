//! `make bench`: what WeightFS is worth, beside containerd's own pull, a raw download and ext4.
//!
//! Everything is on loopback and in private directories. docs/benchmark.md says what is measured
//! and how to read it.

mod chart;
mod cold;
mod download;
mod figures;
mod images;
mod index;
mod lab;
mod loaders;
mod polling;
mod read;
mod report;
mod restart;
mod start;
mod throttle;
mod usage;
mod warm;
mod zeros;

use std::cell::OnceCell;
use std::env;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use weightfs_tests::containerd::{Containerd, ContainerdOptions, Version};
use weightfs_tests::figures::Figures;

use crate::figures::CATALOGUE;
use crate::lab::Lab;
use crate::loaders::Loaders;
use crate::polling::Polled;

/// What the environment asks for.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// A small model and one round: shows that everything can be measured.
    pub(crate) quick: bool,
    /// How often everything is measured.
    pub(crate) rounds: usize,
    /// Bytes of one shard.
    pub(crate) shard_bytes: u64,
    /// With the loaders that need PyTorch.
    pub(crate) all_loaders: bool,
    /// Sections to be measured; all if none is named.
    pub(crate) only: Vec<String>,
    /// Cargo's target directory.
    pub(crate) target: PathBuf,
}

impl Options {
    fn from_environment() -> Result<Self, String> {
        let variable = |name| env::var(name).ok().filter(|value: &String| !value.is_empty());
        let quick = variable("QUICK").is_some();
        let rounds = match variable("ROUNDS") {
            None if quick => 1,
            None => 3,
            Some(text) => {
                text.parse().ok().filter(|n| *n > 0).ok_or(format!("ROUNDS={text} is no number"))?
            }
        };
        let program = env::current_exe().map_err(|e| e.to_string())?;
        let target = program.ancestors().nth(2).unwrap_or(Path::new("target")).to_owned();
        let only = variable("ONLY").unwrap_or_default();
        Ok(Self {
            quick,
            rounds,
            shard_bytes: if quick { 16 << 20 } else { 256 << 20 },
            all_loaders: variable("LOADERS").as_deref() == Some("all"),
            only: only.split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect(),
            target,
        })
    }

    fn wants(&self, section: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == section)
    }
}

/// Everything that the sections measure with.
#[derive(Debug)]
pub(crate) struct Bench {
    containerd21: Option<Containerd>,
    containerd16: Containerd,
    loaders: Loaders,
    polled: OnceCell<Polled>,
    quick: bool,
    /// The last field, so that it goes last.
    lab: Lab,
}

type Section = fn(&Bench, &mut Figures);

const SECTIONS: [(&str, Section); 8] = [
    ("cold", cold::measure),
    ("images", images::measure),
    ("warm", warm::measure),
    ("loaders", loaders::measure),
    ("polling", polling::measure),
    ("restart", restart::measure),
    ("start", start::measure),
    ("index", index::measure),
];

impl Bench {
    fn new(options: &Options, figures: &mut Figures) -> Self {
        let lab = Lab::new(options);
        let containerd16 = Containerd::start(&lab.area, &ContainerdOptions::default());
        let version = Version::V21;
        let containerd21 = version.is_here().then(|| {
            Containerd::start(&lab.area, &ContainerdOptions { version, ..Default::default() })
        });
        if containerd21.is_none() {
            figures.leave_out("containerd21_", "containerd 2.1 can't be had from Debian sid");
        }
        let loaders = Loaders::new(options, &lab, figures);
        let (polled, quick) = (OnceCell::new(), options.quick);
        Self { containerd21, containerd16, loaders, polled, quick, lab }
    }
}

fn main() -> ExitCode {
    let options = match Options::from_environment() {
        Ok(options) => options,
        Err(message) => {
            eprintln!("bench: {message}");
            return ExitCode::from(2);
        }
    };
    let start = Instant::now();
    let mut figures = Figures::new(CATALOGUE);
    let failed = measure_all(&options, &mut figures);
    report::print(&options, &figures, start.elapsed());
    if let Err(error) = write_files(&options, &figures) {
        eprintln!("bench: can't write the results: {error}");
        return ExitCode::FAILURE;
    }
    // Where only some sections were asked for, the others' figures are not missed.
    let missing = if options.only.is_empty() { figures.missing() } else { Vec::new() };
    for name in &missing {
        eprintln!("bench: {name} was not measured");
    }
    if failed || !missing.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Runs every round of every section. A section that fails does not keep the others from running;
/// its panic says why. Gives whether one did.
fn measure_all(options: &Options, figures: &mut Figures) -> bool {
    let set_up = catch_unwind(AssertUnwindSafe(|| Bench::new(options, figures)));
    let Ok(bench) = set_up else { return true };
    let mut failed = false;
    for round in 1..=options.rounds {
        for (name, section) in SECTIONS.iter().filter(|(name, _)| options.wants(name)) {
            eprintln!("bench: round {round} of {}: {name}", options.rounds);
            let done = catch_unwind(AssertUnwindSafe(|| section(&bench, figures)));
            failed |= done.is_err();
        }
    }
    failed | catch_unwind(AssertUnwindSafe(|| drop(bench))).is_err()
}

fn write_files(options: &Options, figures: &Figures) -> std::io::Result<()> {
    let dir = options.target.join("bench");
    fs::create_dir_all(&dir)?;
    let text = serde_json::to_string_pretty(&report::to_json(options, figures))?;
    fs::write(dir.join("load.json"), text + "\n")?;
    fs::write(dir.join("load.svg"), chart::draw(figures))?;
    eprintln!("bench: wrote {0}/load.json and {0}/load.svg", dir.display());
    Ok(())
}
