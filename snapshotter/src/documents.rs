//! Pages and files that are made from the code: a test fails when one is stale, and makes it anew
//! when it is told to (`make docs`).

use std::fs;
use std::path::Path;

/// The variable that has such files written.
const WRITE: &str = "WEIGHTFS_WRITE_DOCUMENTS";

/// Compares a file of this repository with what it should be.
pub(crate) fn assert_current(path: &str, expected: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    if std::env::var_os(WRITE).is_some() {
        fs::write(&file, expected).unwrap();
    }
    let actual = fs::read_to_string(&file).unwrap_or_default();
    assert!(actual == expected, "{path} is stale: `make docs` makes it anew");
}
