//! The status page in a browser: it is drawn, goes on by itself, and runs nothing that a registry says.
//!
//! `make test-page` installs the browser and runs it; without one it is left out.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use weightfs_tests::model::Part;
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::process::{run, run_within};
use weightfs_tests::{Bed, metrics};

/// A name that would be markup if it were not escaped.
const EVIL: &str = "<img src=x onerror=document.title='run'>.safetensors";

const MODEL: &[Part] = &[
    Part { path: "config.json", bytes: 517, mode: 0o644 },
    Part { path: EVIL, bytes: 40 << 20, mode: 0o644 },
    Part { path: "model.safetensors", bytes: 40 << 20, mode: 0o644 },
];

/// How long a browser may take to start and draw.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the browser prints.
fn browse(profile: &Path, what: &[&str], url: &str) -> String {
    let mut command = Command::new("chromium");
    command.args(["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]);
    command.arg(format!("--user-data-dir={}", profile.display())).args(what).arg(url);
    for name in ["http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(name).env_remove(name.to_uppercase());
    }
    run_within(PATIENCE, &mut command).ok()
}

#[test]
fn a_browser_shows_what_goes_on_and_runs_nothing_foreign() {
    if run(Command::new("sh").args(["-c", "command -v chromium"])).code != 0 {
        println!("left out: there is no chromium here (`make test-page` installs it)");
        return;
    }
    let bed = Bed::new();
    metrics::configure(&bed.weightfs, "");
    let daemon = bed.weightfs.serve(&bed.area);
    let reference = bed.push(&bed.pack_raw(&bed.model(MODEL), Dialect::Cncf), "models/page");
    let mounted = bed.mount(&reference);
    fs::read(mounted.dir().join("model.safetensors")).unwrap();
    let url = format!("http://{}/", metrics::address(&bed.weightfs));
    let profile = tempfile::tempdir_in(bed.area.path()).unwrap();

    // Time passes faster in there: the script has asked again by then.
    let page = browse(profile.path(), &["--virtual-time-budget=5000", "--dump-dom"], &url);
    for expected in ["models/page:v1", "model.safetensors", "of 80.0 MiB", "&lt;img src=x"] {
        assert!(page.contains(expected), "{expected} in {page}");
    }
    assert!(page.contains("data-looks=") && !page.contains("class=\"gone\""), "{page}");
    assert!(!page.contains("<img") && page.contains("<title>WeightFS</title>"), "{page}");

    let picture = Path::new(env!("CARGO_TARGET_TMPDIR")).join("page.png");
    let screenshot = format!("--screenshot={}", picture.display());
    browse(profile.path(), &["--window-size=1100,1000", &screenshot], &url);
    let drawn = fs::read(&picture).unwrap();
    assert!(drawn.starts_with(b"\x89PNG") && drawn.len() > 20_000, "{} bytes", drawn.len());
    println!("drawn to {}", picture.display());
    mounted.stop();
    daemon.stop();
}
