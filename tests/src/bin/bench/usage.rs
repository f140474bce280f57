//! What a process takes: CPU time and memory, as the kernel counts them.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::unistd::Pid;
use weightfs_tests::wait::holds_within;

/// Clock ticks per second in /proc (proc_pid_stat(5)); 100 on every architecture of today.
const USER_HZ: f64 = 100.0;

/// Time between two looks at a process's memory: short against a read of 64 MiB.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(10);

/// A process that used no CPU for this long has nothing left to do.
const QUIET: Duration = Duration::from_millis(300);

/// Longest wait for a process to become quiet.
const PATIENCE: Duration = Duration::from_secs(60);

/// CPU seconds of all threads of a process so far, in user mode and in the kernel.
pub(crate) fn cpu_seconds(pid: Pid) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs");
    // Fields 14 and 15, counted after the command's closing parenthesis.
    let (_, rest) = stat.rsplit_once(") ").expect("the form of /proc/pid/stat");
    let ticks: f64 =
        rest.split(' ').skip(11).take(2).map(|n| n.parse::<f64>().unwrap_or_default()).sum();
    ticks / USER_HZ
}

/// Waits until a process does nothing any more: background fetches and hashing are done.
pub(crate) fn wait_quiet(pid: Pid) {
    let mut before = f64::NAN;
    let quiet = holds_within(PATIENCE, || {
        let now = cpu_seconds(pid);
        let quiet = now == before;
        before = now;
        if !quiet {
            thread::sleep(QUIET);
        }
        quiet
    });
    assert!(quiet, "process {pid} is still busy after {PATIENCE:?}");
}

/// Watches the memory of a process that is not a mapping of a file.
#[derive(Debug)]
pub(crate) struct MemoryWatch {
    stop: Arc<AtomicBool>,
    watcher: JoinHandle<u64>,
}

impl MemoryWatch {
    /// Begins to watch.
    pub(crate) fn start(pid: Pid) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let watcher = thread::spawn(move || {
            let mut peak = 0;
            while !until.load(Ordering::Relaxed) {
                peak = peak.max(private_kib(pid));
                thread::sleep(SAMPLE_INTERVAL);
            }
            peak
        });
        Self { stop, watcher }
    }

    /// The most that it saw, in MiB.
    pub(crate) fn peak_mib(self) -> f64 {
        self.stop.store(true, Ordering::Relaxed);
        self.watcher.join().expect("the watcher's end") as f64 / 1024.0
    }
}

/// RssAnon + RssShmem of proc_pid_status(5): VmRSS without RssFile, in KiB.
fn private_kib(pid: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let value = |line: &str| line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
    let wanted = |line: &&str| line.starts_with("RssAnon:") || line.starts_with("RssShmem:");
    status.lines().filter(wanted).filter_map(value).sum()
}
