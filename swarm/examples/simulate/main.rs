//! Many nodes load one blob at the same moment: how long it takes, beside a node's own line, and
//! how often the blob leaves the registry. The nodes run the policy that daemons run.
//!
//! `make simulate N=3000`

mod chart;
mod links;
mod world;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use serde_json::{Map, Value, json};

use crate::world::{Options, Outcome, World};

/// What must be reached by nodes that nothing happens to: time, of a node's own line, and blobs.
const TIME_BOUND: f64 = 1.35;
const EGRESS_BOUND: f64 = 1.02;

#[derive(Debug, Parser)]
struct Arguments {
    /// Numbers of nodes
    #[arg(long = "nodes", short, value_delimiter = ',', default_values_t = [100, 1000, 3000])]
    nodes: Vec<usize>,
    /// Bytes of the blob, in MiB
    #[arg(long, default_value_t = 2048)]
    mebibytes: u64,
    /// Gigabits a second of a node's link
    #[arg(long, default_value_t = 10.0)]
    gigabits: f64,
    /// What the registry serves, in links of a node
    #[arg(long, default_value_t = 4.0)]
    registry: f64,
    /// Milliseconds of a round trip
    #[arg(long, default_value_t = 0.5)]
    round_trip: f64,
    /// Share of nodes that die during the first half
    #[arg(long, default_value_t = 0.0)]
    churn: f64,
    /// Share of nodes with a tenth of the link; they don't count for the time
    #[arg(long, default_value_t = 0.0)]
    slow: f64,
    /// Share of nodes that begin late
    #[arg(long, default_value_t = 0.0)]
    late: f64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Directory for simulate.json and simulate.svg
    #[arg(long, default_value = "target/bench")]
    output: PathBuf,
}

impl Arguments {
    fn options(&self, nodes: usize) -> Options {
        let groups = (self.mebibytes << 20).div_ceil(weightfs_swarm::GROUP_BYTES);
        Options {
            nodes,
            groups: usize::try_from(groups).unwrap_or(usize::MAX).max(1),
            line: self.gigabits * 1e9 / 8.0,
            registry_lines: self.registry,
            round_trip: self.round_trip / 1e3,
            churn: self.churn,
            slow: self.slow,
            late: self.late,
            seed: self.seed,
        }
    }

    /// Whether nothing happens to the nodes: the bounds are for that.
    fn is_calm(&self) -> bool {
        self.churn == 0.0 && self.slow == 0.0 && self.late == 0.0
    }
}

/// A run, with times in ideal loads.
#[derive(Debug)]
pub struct Run {
    nodes: usize,
    times: Vec<f64>,
    outcome: Outcome,
}

impl Run {
    fn at(&self, share: f64) -> f64 {
        let last = self.times.len().saturating_sub(1);
        self.times.get((last as f64 * share) as usize).copied().unwrap_or(f64::INFINITY)
    }

    fn figures(&self) -> [(String, f64, &'static str); 4] {
        let name = |what: &str| format!("simulate_{}_{what}", self.nodes);
        [
            (name("time"), self.at(1.0), "of ideal"),
            (name("median_time"), self.at(0.5), "of ideal"),
            (name("egress_blobs"), self.outcome.egress, "blobs"),
            (name("questions"), self.outcome.questions, "for each node"),
        ]
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut runs = Vec::new();
    println!(
        "{:>6}  {:>6}  {:>6}  {:>6}  {:>9}  took",
        "nodes", "time", "median", "egress", "questions"
    );
    for nodes in &arguments.nodes {
        let options = arguments.options(*nodes);
        let (ideal, began) = (options.ideal(), Instant::now());
        let outcome = World::new(options).run();
        let times = outcome.times.iter().map(|time| time / ideal).collect();
        let run = Run { nodes: *nodes, times, outcome };
        println!(
            "{nodes:>6}  {:>6.3}  {:>6.3}  {:>6.3}  {:>9.0}  {:.1} s",
            run.at(1.0),
            run.at(0.5),
            run.outcome.egress,
            run.outcome.questions,
            began.elapsed().as_secs_f64(),
        );
        runs.push(run);
    }
    if let Err(error) = write(&arguments, &runs) {
        eprintln!("simulate: {}: {error}", arguments.output.display());
        return ExitCode::FAILURE;
    }
    judge(&arguments, &runs)
}

fn write(arguments: &Arguments, runs: &[Run]) -> std::io::Result<()> {
    let figures: Map<String, Value> = runs
        .iter()
        .flat_map(Run::figures)
        .map(|(name, value, unit)| (name, json!({ "median": value, "unit": unit })))
        .collect();
    let document = json!({
        "mebibytes": arguments.mebibytes,
        "registry_lines": arguments.registry,
        "churn": arguments.churn,
        "slow": arguments.slow,
        "late": arguments.late,
        "figures": figures,
    });
    fs::create_dir_all(&arguments.output)?;
    fs::write(arguments.output.join("simulate.json"), format!("{document:#}\n"))?;
    fs::write(arguments.output.join("simulate.svg"), chart::draw(runs))
}

fn judge(arguments: &Arguments, runs: &[Run]) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for run in runs {
        if run.outcome.unfinished > 0 {
            println!("{} nodes: {} did not get all", run.nodes, run.outcome.unfinished);
            code = ExitCode::FAILURE;
        }
        let within = run.at(1.0) <= TIME_BOUND && run.outcome.egress <= EGRESS_BOUND;
        if arguments.is_calm() && !within {
            println!("{} nodes: over {TIME_BOUND} of ideal or {EGRESS_BOUND} blobs", run.nodes);
            code = ExitCode::FAILURE;
        }
    }
    code
}
