//! `make bench-peers`: real daemons on shaped links load one model at the same moment, with and
//! without each other, and while things go wrong.
//!
//! Each daemon has a network namespace of its own; the links are shaped by the kernel. Every byte
//! that is read is compared by its digest with what was pushed.

mod cluster;
mod demand;
mod figures;
mod lab;
mod mishaps;

use std::env;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use serde_json::{Value, json};
use weightfs_tests::Megabits;
use weightfs_tests::figures::{Figures, machine, print_reaches, print_table, reaches_json, short};

use crate::cluster::{Cluster, longest};
use crate::figures::{CATALOGUE, REACHES};
use crate::lab::Lab;

/// What the registry's link is, in links of a node.
const REGISTRY_LINKS: f64 = 4.0;

/// What the environment asks for.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// Few nodes and a small model: shows that everything can be measured.
    quick: bool,
    /// How many nodes there are.
    nodes: usize,
    /// Bytes of the model.
    model_bytes: u64,
    /// A node's link, each way.
    link: Megabits,
    /// How often everything is measured.
    rounds: usize,
    /// Sections to be measured; all if none is named.
    only: Vec<String>,
    /// Where the results go.
    output: PathBuf,
}

impl Options {
    fn from_environment() -> Result<Self, String> {
        let variable = |name| env::var(name).ok().filter(|value: &String| !value.is_empty());
        let quick = variable("QUICK").is_some();
        let number = |name, otherwise: f64| match variable(name) {
            None => Ok(otherwise),
            Some(text) => match text.parse::<f64>() {
                Ok(number) if number >= 1.0 => Ok(number),
                _ => Err(format!("{name}={text} is no number from 1 on")),
            },
        };
        let (nodes, mebibytes, link) =
            if quick { (4.0, 32.0, 400.0) } else { (16.0, 256.0, 100.0) };
        let program = env::current_exe().map_err(|error| error.to_string())?;
        let target = program.ancestors().nth(2).unwrap_or(Path::new("target"));
        Ok(Self {
            quick,
            nodes: number("NODES", nodes)?.clamp(4.0, 200.0) as usize,
            model_bytes: (number("MIB", mebibytes)? as u64) << 20,
            link: Megabits(number("MBIT", link)?),
            rounds: number("ROUNDS", 1.0)? as usize,
            only: words(&variable("ONLY").unwrap_or_default()),
            output: variable("OUTPUT").map_or_else(|| target.join("bench"), PathBuf::from),
        })
    }

    fn wants(&self, section: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == section)
    }

    /// Seconds in which the model goes over a node's link.
    fn ideal(&self) -> f64 {
        self.model_bytes as f64 / self.link.bytes_per_second()
    }
}

fn words(text: &str) -> Vec<String> {
    text.split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

type Section = fn(&Lab, &mut Figures);

const SECTIONS: [(&str, Section); 9] = [
    ("together", together),
    ("no-peers", no_peers),
    ("killed", mishaps::killed),
    ("slow", mishaps::slow),
    ("lying", mishaps::lying),
    ("gone", mishaps::registry_gone),
    ("late", mishaps::late),
    ("lost", mishaps::peers_lost),
    ("demand", demand::measure),
];

fn main() -> ExitCode {
    let options = match Options::from_environment() {
        Ok(options) => options,
        Err(message) => {
            eprintln!("bench-peers: {message}");
            return ExitCode::from(2);
        }
    };
    let start = Instant::now();
    let mut figures = Figures::new(CATALOGUE);
    let failed = measure_all(&options, &mut figures);
    let Options { nodes, model_bytes, link, .. } = options;
    println!(
        "\n{nodes} nodes, {} MiB, {} Mbit/s a node, the registry {REGISTRY_LINKS} times that; \
         {:.0} s; {}\n",
        model_bytes >> 20,
        link.0,
        start.elapsed().as_secs_f64(),
        machine()
    );
    print_table(&figures);
    match options.quick {
        true => println!("\nQUICK: this run shows that everything can be measured, no more."),
        false => print_reaches(REACHES, &figures),
    }
    if let Err(error) = write(&options, &figures) {
        eprintln!("bench-peers: {}: {error}", options.output.display());
        return ExitCode::FAILURE;
    }
    let missing = if options.only.is_empty() { figures.missing() } else { Vec::new() };
    for name in &missing {
        eprintln!("bench-peers: {name} was not measured");
    }
    if failed || !missing.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Runs every round of every section; gives whether one failed. Its panic has said why.
fn measure_all(options: &Options, figures: &mut Figures) -> bool {
    let Ok(lab) = catch_unwind(AssertUnwindSafe(|| Lab::new(options))) else { return true };
    let mut failed = false;
    for round in 1..=options.rounds {
        for (name, section) in SECTIONS.iter().filter(|(name, _)| options.wants(name)) {
            let (before, start) = (figures.counts(), Instant::now());
            failed |= catch_unwind(AssertUnwindSafe(|| section(&lab, figures))).is_err();
            let new =
                figures.since(&before).map(|(name, value)| format!("{name} {}", short(value)));
            eprintln!(
                "bench-peers: round {round} of {}, {name}, {:.0} s: {}",
                options.rounds,
                start.elapsed().as_secs_f64(),
                new.collect::<Vec<_>>().join(", ")
            );
        }
    }
    failed | catch_unwind(AssertUnwindSafe(|| drop(lab))).is_err()
}

fn write(options: &Options, figures: &Figures) -> std::io::Result<()> {
    let document: Value = json!({
        "quick": options.quick,
        "machine": machine(),
        "nodes": options.nodes,
        "model_bytes": options.model_bytes,
        "link_mbit_s": options.link.0,
        "registry_links": REGISTRY_LINKS,
        "figures": figures.to_json(),
        "reach": reaches_json(REACHES, figures),
    });
    fs::create_dir_all(&options.output)?;
    let path = options.output.join("peers.json");
    fs::write(&path, format!("{document:#}\n"))?;
    eprintln!("bench-peers: wrote {}", path.display());
    Ok(())
}

/// All nodes load the model at the same moment.
fn together(lab: &Lab, figures: &mut Figures) {
    let cluster = Cluster::of_peers(lab, lab.options.nodes);
    cluster.start(0..lab.options.nodes);
    let (makespan, ideal) =
        (longest(&cluster.load(0..lab.options.nodes, |_| ())), lab.options.ideal());
    eprintln!(
        "bench-peers: {} requests to the registry because peers were silent or busy",
        cluster.fallbacks()
    );
    figures.add("egress_blobs", lab.egress());
    figures.add("makespan_s", makespan);
    figures.add("makespan_ideal_s", ideal);
    figures.add("makespan_of_ideal", makespan / ideal);
}

/// The same, each from the registry.
fn no_peers(lab: &Lab, figures: &mut Figures) {
    let cluster = Cluster::without_peers(lab, lab.options.nodes);
    cluster.start(0..lab.options.nodes);
    let makespan = longest(&cluster.load(0..lab.options.nodes, |_| ()));
    figures.add("makespan_no_peers_s", makespan);
    figures.add("no_peers_egress_blobs", lab.egress());
}
