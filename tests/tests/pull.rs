//! `weightfs pull`: files in the cache before anybody reads them.

use std::fs;

use serde_json::{Value, json};
use weightfs_tests::model::SMALL_MODEL;
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::process::Outcome;
use weightfs_tests::{Bed, Target};

const FIRST: &str = "weights/model-00001-of-00003.safetensors";

fn pull(bed: &Bed, reference: &str, more: &[&str]) -> Outcome {
    bed.weightfs.run_here(&[&["pull", reference, "--json"], more].concat())
}

fn pulled(bed: &Bed, reference: &str, more: &[&str]) -> Value {
    serde_json::from_str(&pull(bed, reference, more).ok()).unwrap()
}

/// No registry is needed any more for what was pulled.
fn assert_read_from_the_cache(bed: &Bed, reference: &str, source: &std::path::Path) {
    let before = bed.proxy.bytes(Target::Blobs);
    let mounted = bed.mount(reference);
    for part in SMALL_MODEL {
        let found = fs::read(mounted.dir().join(part.path)).unwrap();
        assert!(found == fs::read(source.join(part.path)).unwrap(), "{}", part.path);
    }
    mounted.stop();
    // Only the config is asked for anew.
    let fetched = bed.proxy.bytes(Target::Blobs) - before;
    assert!(fetched < 4096, "{fetched} bytes");
}

#[test]
fn chosen_files_first_and_the_rest_later() {
    let bed = Bed::new();
    bed.weightfs.configure("[fetch]\nbackground = \"off\"\nprefetch = false");
    let source = bed.model(SMALL_MODEL);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/pulled");
    let size = fs::metadata(source.join(FIRST)).unwrap().len();
    let first = pulled(&bed, &reference, &["--files", "weights/*-00001-*"]);
    assert_eq!(first, json!({ "files": 1, "size": size, "fetched": size }));
    let all: u64 =
        SMALL_MODEL.iter().map(|p| fs::metadata(source.join(p.path)).unwrap().len()).sum();
    let rest = pulled(&bed, &reference, &[]);
    assert_eq!(rest, json!({ "files": SMALL_MODEL.len(), "size": all, "fetched": all - size }));
    assert_eq!(pulled(&bed, &reference, &[])["fetched"], 0);
    assert_read_from_the_cache(&bed, &reference, &source);
}

#[test]
fn a_daemon_pulls_into_its_cache() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/pulled");
    let daemon = bed.weightfs.serve(&bed.area);
    let all = pulled(&bed, &reference, &["--files", "*", "--files", "**/*"]);
    assert_eq!(all["files"], SMALL_MODEL.len());
    assert_read_from_the_cache(&bed, &reference, &source);
    daemon.stop();
}

#[test]
fn what_can_not_be_pulled_is_named() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/pulled");
    let outcome = pull(&bed, &reference, &["--files", "*.gguf"]);
    assert_eq!(outcome.code, 1);
    assert!(outcome.stderr.contains("no file of") && outcome.stderr.contains("*.gguf"));
    let outcome = pull(&bed, &reference, &["--files", "a[b"]);
    assert_eq!(outcome.code, 2, "{outcome:?}");
    let gone = bed.proxy.reference("models/gone", "v1");
    assert_eq!(pull(&bed, &gone, &[]).code, 1);
}
