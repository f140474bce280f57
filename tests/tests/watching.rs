//! What people see of a daemon: `status`, `top`, `map`, the status page, `log`, completions and manual.

use std::fs;

use serde_json::Value;
use weightfs_tests::json::{assert_documented, documented};
use weightfs_tests::metrics::{self, get};
use weightfs_tests::model::Part;
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::python::python;
use weightfs_tests::{Bed, Daemon, Mounted, wait_until};

const MODEL: &[Part] = &[
    Part { path: "model.safetensors", bytes: 40 << 20, mode: 0o644 },
    Part { path: "config.json", bytes: 517, mode: 0o644 },
];

/// A daemon with a model whose small file was read, and metrics.
struct Watched {
    mounted: Mounted,
    daemon: Daemon,
    reference: String,
    bed: Bed,
}

impl Watched {
    fn start() -> Self {
        let bed = Bed::new();
        metrics::configure(&bed.weightfs, "");
        let daemon = bed.weightfs.serve(&bed.area);
        let reference = bed.push(&bed.pack_raw(&bed.model(MODEL), Dialect::Cncf), "models/watched");
        let mounted = bed.mount(&reference);
        fs::read(mounted.dir().join("config.json")).unwrap();
        Self { mounted, daemon, reference, bed }
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let text = self.bed.weightfs.run_here(&[arguments, &["--json"]].concat()).ok();
        documented(arguments[0], &text)
    }

    fn mount(&self) -> Value {
        self.json(&["status"])["mounts"][0].clone()
    }

    fn stop(self) {
        self.mounted.stop();
        self.daemon.stop();
    }
}

#[test]
fn a_mount_is_watched_from_its_first_file_to_its_last() {
    let watched = Watched::start();
    let mount = watched.mount();
    assert_documented("a mount", &mount);
    assert_eq!(
        (&mount["name"], &mount["kind"]),
        (&watched.reference.as_str().into(), &"model".into())
    );
    assert_eq!((&mount["files"], &mount["files_complete"]), (&2.into(), &1.into()), "{mount}");
    assert_eq!(mount["state"], "partial", "{mount}");
    let table = watched.bed.weightfs.run_here(&["status"]).ok();
    assert!(table.contains("1/2") && table.contains("registry 100 %"), "{table}");
    assert!(
        table.lines().filter(|line| line.starts_with("  ")).all(|line| line.chars().count() <= 80)
    );

    fs::read(watched.mounted.dir().join("model.safetensors")).unwrap();
    wait_until("all is here and verified", || {
        let mount = watched.mount();
        mount["state"] == "complete" && mount["trust"] == "verified"
    });
    let mount = watched.mount();
    assert_eq!(
        (&mount["files_complete"], &mount["cached"]),
        (&2.into(), &mount["size"]),
        "{mount}"
    );
    let (hit, missed) =
        (mount["hit_bytes"].as_u64().unwrap(), mount["missed_bytes"].as_u64().unwrap());
    assert!(hit + missed >= 40 << 20, "{mount}");
    watched.stop();
}

#[test]
fn a_map_shows_what_is_here_and_what_is_not() {
    let watched = Watched::start();
    let map = watched.json(&["map", &watched.reference]);
    assert_documented("a blob of a map", &map["blobs"]);
    let blobs = map["blobs"].as_array().unwrap();
    let weights = blobs.iter().find(|blob| blob["name"] == "model.safetensors").unwrap();
    assert_eq!((&weights["chunks"], &weights["cached"]), (&40.into(), &0.into()), "{weights}");
    let file = watched.bed.area.path().join("map.svg");
    let words = ["map", &watched.reference, "-o", file.to_str().unwrap()];
    watched.bed.weightfs.run_here(&words).ok();
    let picture = fs::read_to_string(&file).unwrap();
    // Of each chunk of both files a square, and the legend's.
    assert!(picture.contains("<svg") && picture.matches("<rect").count() >= 41 + 5, "{picture}");
    let drawn =
        watched.bed.weightfs.run_here(&["map", watched.mounted.dir().to_str().unwrap()]).ok();
    assert!(drawn.contains("model.safetensors") && drawn.contains("· absent"), "{drawn}");
    let unknown = watched.bed.weightfs.run_here(&["map", "no/such:model"]);
    unknown.assert_fails(1, &["no model or image no/such:model is mounted here"]);
    watched.stop();
}

#[test]
fn the_status_page_says_the_same_and_changes_nothing() {
    let watched = Watched::start();
    let address = metrics::address(&watched.bed.weightfs);
    let (status, kind, page) = get(&address, "/");
    assert!(status == 200 && kind.starts_with("text/html"), "{status} {kind}");
    for expected in ["models/watched:v1", "1/2", "model.safetensors", "<svg", "partial"] {
        assert!(page.contains(expected), "{expected} in {page}");
    }
    let (status, _, live) = get(&address, "/live");
    assert!(status == 200 && live.contains("models/watched:v1") && !live.contains("<html"));
    assert_eq!(get(&address, "/healthz"), (200, "text/plain; charset=utf-8".into(), "ok\n".into()));
    assert_eq!(get(&address, "/no/such").0, 404);
    watched.stop();
}

/// Runs `top` in a terminal of 80 by 24, waits for a text, ends it by a key or a signal, and prints
/// how it ended and all that it drew.
const IN_A_TERMINAL: &str = r#"
import fcntl, os, pty, select, signal, struct, sys, termios, time
wanted, how, command = sys.argv[1].encode(), sys.argv[2], sys.argv[3:]
child, terminal = pty.fork()
if child == 0:
    os.environ["TERM"] = "xterm-256color"
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    os.execv(command[0], command)
drawn, until = b"", time.monotonic() + 60
def read():
    global drawn
    if select.select([terminal], [], [], 1)[0]:
        try:
            piece = os.read(terminal, 65536)
        except OSError:
            return False
        drawn += piece
        return bool(piece)
    return True
while wanted not in drawn and time.monotonic() < until and read():
    pass
os.write(terminal, b"q") if how == "key" else os.kill(child, signal.SIGTERM)
while read() and time.monotonic() < until:
    pass
_, status = os.waitpid(child, 0)
print(status, wanted in drawn, drawn.endswith(b"\x1b[?25h") or b"\x1b[?1049l" in drawn[-200:])
"#;

#[test]
fn top_draws_in_an_ordinary_terminal_and_leaves_it_as_it_was() {
    let watched = Watched::start();
    let config = watched.bed.weightfs.config();
    let program = weightfs_tests::weightfs::binary();
    let command = [program.to_str().unwrap(), "top", "--config", config.to_str().unwrap()];
    for how in ["key", "signal"] {
        let arguments = [&["models/watched:v1", how], &command[..]].concat();
        let ended = python(IN_A_TERMINAL, &arguments).ok();
        assert_eq!(ended.trim(), "0 True True", "{how}");
    }
    // Not in a terminal.
    watched.bed.weightfs.run_here(&["top"]).assert_fails(1, &["needs a terminal"]);
    watched.stop();
}

#[test]
fn what_is_logged_can_be_changed_while_the_daemon_runs() {
    let watched = Watched::start();
    let log = |words: &[&str]| watched.bed.weightfs.run_here(&[&["log"], words].concat());
    let began_with = log(&[]).ok();
    assert!(!watched.daemon.log().contains("DEBUG"), "{}", watched.daemon.log());
    assert!(log(&["debug"]).ok().contains("weightfs=debug"));
    watched.bed.proxy.fail(weightfs_tests::Target::Blobs, weightfs_tests::Fault::Status(503));
    std::thread::scope(|scope| {
        let read = scope.spawn(|| fs::read(watched.mounted.dir().join("model.safetensors")));
        wait_until("a failed fetch is logged", || watched.daemon.log().contains("fetch failed"));
        watched.bed.proxy.heal();
        read.join().unwrap().unwrap();
    });
    assert_eq!(log(&["default"]).ok(), began_with);
    log(&["weightfs=louder"]).assert_fails(1, &["neither a level"]);
    assert_eq!(watched.json(&["log"])["directives"], began_with.trim());
    watched.stop();
}

#[test]
fn completions_and_the_manual_are_made_from_the_command_line() {
    let bed = Bed::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = bed.weightfs.run(["completions", shell]).ok();
        assert!(script.contains("umount") && script.contains("weightfs"), "{shell}");
    }
    let dir = bed.area.path().join("man");
    bed.weightfs.run(["man", dir.to_str().unwrap()]).ok();
    let page = fs::read_to_string(dir.join("weightfs.1")).unwrap();
    assert!(page.contains(".TH") && dir.join("weightfs-mount.1").is_file(), "{page}");
}
