//! Random sequences of calls against the model: with restarts between them, and with a process
//! that is killed in the middle. `WEIGHTFS_CONTRACT_CASES` and `WEIGHTFS_CONTRACT_KILLS` set how
//! many.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::harness::new_root;
use crate::model::{Call, Model, calls};
use crate::subject::Subject;

/// Calls of one sequence at the most.
const CALLS: usize = 40;

/// Root directory and seed of a process that makes calls until it is killed.
const VICTIM: &str = "WEIGHTFS_CONTRACT_VICTIM";

fn count(variable: &str, default: u32) -> u32 {
    std::env::var(variable).map_or(default, |count| count.parse().unwrap())
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(work)
}

async fn run(calls: Vec<Call>) {
    let root = new_root();
    let mut subject = Subject::open(root.path());
    let mut model = Model::default();
    for call in &calls {
        if matches!(call, Call::Restart) {
            drop(subject);
            subject = Subject::open(root.path());
        }
        let expected = model.apply(call);
        assert_eq!(subject.apply(call).await, expected, "{call:?}");
        subject.assert_is(root.path(), &model, &format!("{call:?}")).await;
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: count("WEIGHTFS_CONTRACT_CASES", 40),
        max_shrink_iters: 200,
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_calls_do_what_the_contract_says(calls in calls(CALLS)) {
        block_on(run(calls));
    }
}

/// The sequence of a seed, the same in every process. Cutting it short keeps its beginning.
fn sequence(seed: u64) -> Vec<Call> {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), random);
    let mut sequence = Vec::new();
    while sequence.len() < 10 * CALLS {
        sequence.extend(calls(CALLS).new_tree(&mut runner).unwrap().current());
    }
    sequence.retain(|call| !matches!(call, Call::Restart));
    sequence
}

/// Not a test of its own: what the victim does.
#[test]
fn victim() {
    let Ok(job) = std::env::var(VICTIM) else { return };
    let (seed, root) = job.split_once(' ').unwrap();
    block_on(async {
        let subject = Subject::open(Path::new(root));
        for call in sequence(seed.parse().unwrap()) {
            subject.apply(&call).await;
            // Straight to the pipe: the harness of tests holds back what is printed.
            std::io::stderr().write_all(b"done\n").unwrap();
        }
    });
    // Nothing is left to do but to be killed.
    std::thread::sleep(Duration::from_secs(60));
}

/// Makes calls in a process that is killed after some of them; gives how many it had done.
fn kill_one(root: &Path, seed: u64) -> usize {
    let me: PathBuf = std::env::current_exe().unwrap();
    let mut victim = Command::new(me)
        .args(["--exact", "random::victim", "--nocapture"])
        .env(VICTIM, format!("{seed} {}", root.display()))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(victim.stderr.take().unwrap()).lines();
    let mut is_done = || lines.next().is_some_and(|line| line.unwrap() == "done");
    let wanted = (seed % 7) as usize * 5 + 1;
    let mut done = 0;
    while done < wanted && is_done() {
        done += 1;
    }
    // Not to hide a race but to be anywhere in one.
    std::thread::sleep(Duration::from_micros(seed.wrapping_mul(7919) % 20_000));
    victim.kill().unwrap();
    while is_done() {
        done += 1;
    }
    victim.wait().unwrap();
    assert!(done >= wanted, "it ended by itself");
    done
}

#[test]
fn whenever_it_is_killed_a_call_was_made_or_not() {
    for seed in 0..u64::from(count("WEIGHTFS_CONTRACT_KILLS", 10)) {
        let root = new_root();
        let done = kill_one(root.path(), seed);
        let sequence = sequence(seed);
        let mut model = Model::default();
        for call in &sequence[..done] {
            model.apply(call);
        }
        block_on(async {
            let subject = Subject::open(root.path());
            let names = subject.observe(root.path()).await;
            // The call under way may have come to its end without having said so.
            if let Some(call) = sequence.get(done)
                && without_files(&names) != without_files(&model.0)
            {
                model.apply(call);
            }
            // A file is written without anybody's word.
            for (name, found) in model.0.iter_mut().filter(|(_, found)| !found.lazy) {
                if let Some(seen) = names.get(name) {
                    assert!(seen.files.len().abs_diff(found.files.len()) <= 1, "{name}");
                    found.files = seen.files.clone();
                }
            }
            let after = format!("{done} calls of seed {seed}");
            subject.assert_is(root.path(), &model, &after).await;
            // And it goes on.
            for call in sequence.iter().skip(done + 1).take(CALLS) {
                assert_eq!(subject.apply(call).await, model.apply(call), "{call:?} after {after}");
            }
        });
    }
}

type There = std::collections::BTreeMap<String, crate::model::Modelled>;

fn without_files(there: &There) -> There {
    let strip = |(name, found): (&String, &crate::model::Modelled)| {
        let mut found = found.clone();
        found.files.clear();
        (name.clone(), found)
    };
    there.iter().map(strip).collect()
}
