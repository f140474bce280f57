//! Processes that tests start: services that run until their guard goes, and commands that end.

use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::area::Area;
use crate::wait::{PATIENCE, holds_within};

/// How long a service may take to end after a signal before it is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(20);

/// A running process that ends with this guard. Its output goes to a file in the area's `log/`.
#[derive(Debug)]
pub struct Service {
    name: String,
    child: Child,
    log: PathBuf,
    quiet: bool,
}

impl Service {
    /// Starts `command`; `name` is for messages and the log file.
    ///
    /// # Panics
    /// When the program is not installed.
    pub fn start(area: &Area, name: &str, mut command: Command) -> Self {
        let log = free_name(&area.path().join("log"), name);
        let output = File::create(&log).unwrap();
        command.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
        // A Ctrl-C at the terminal is for the test, which then ends its services in order.
        command.process_group(0);
        let child = command.spawn().unwrap_or_else(|e| panic!("start {command:?}: {e}"));
        Self { name: name.to_owned(), child, log, quiet: false }
    }

    /// Keeps its log out of the report of a test that failed.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        pid_of(&self.child)
    }

    /// What it has written so far, both streams together.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits until `ready` gives a value.
    ///
    /// # Panics
    /// When the process ends before that, or the time is over, with its log.
    pub fn wait_ready<T>(&mut self, mut ready: impl FnMut(&Self) -> Option<T>) -> T {
        let mut value = None;
        holds_within(PATIENCE, || {
            value = ready(self);
            value.is_some() || !self.is_running()
        });
        value.unwrap_or_else(|| {
            let state = if self.is_running() { "is not ready" } else { "ended" };
            panic!("{} {state}; its log:\n{}", self.name, self.log())
        })
    }

    /// Whether it is still running.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let _ = kill(self.pid(), signal);
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end in time, with its log.
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        holds_within(PATIENCE, || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap_or_else(|| panic!("{} does not end; its log:\n{}", self.name, self.log()))
    }

    /// Kills it, as a crash would, and waits for its end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.signal(Signal::SIGTERM);
        if !holds_within(STOP_PATIENCE, || matches!(self.child.try_wait(), Ok(Some(_)))) {
            self.kill();
        }
        if thread::panicking() && !self.quiet {
            eprintln!("---- log of {}\n{}", self.name, tail(&self.log()));
        }
    }
}

/// How a command ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Exit code; 128 and the signal's number if a signal ended it, as shells have it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    /// Its standard output, if it ended well.
    ///
    /// # Panics
    /// When it did not.
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self}");
        self.stdout
    }

    /// Asserts that it failed with that exit code and that its message has each of `texts`.
    pub fn assert_fails(&self, code: i32, texts: &[&str]) {
        assert_eq!(self.code, code, "{self}");
        for text in texts {
            assert!(self.stderr.contains(text), "no {text:?} in: {self}");
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit code {}\nstdout: {}\nstderr: {}", self.code, self.stdout, self.stderr)
    }
}

/// Runs a command to its end.
///
/// # Panics
/// When the program is not installed or does not end within [`PATIENCE`].
pub fn run(command: &mut Command) -> Outcome {
    run_within(PATIENCE, command)
}

/// Runs a command to its end, for `patience` at the most.
///
/// # Panics
/// When the program is not installed or does not end in time.
pub fn run_within(patience: Duration, command: &mut Command) -> Outcome {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("start {command:?}: {e}"));
    let stdout = collect(child.stdout.take().unwrap());
    let stderr = collect(child.stderr.take().unwrap());
    let ended = holds_within(patience, || child.try_wait().unwrap().is_some());
    if !ended {
        let _ = child.kill();
    }
    let status = child.wait().unwrap();
    // A grandchild may hold the pipes open: its output is not waited for.
    let text = |part: thread::JoinHandle<String>| {
        holds_within(STOP_PATIENCE, || part.is_finished());
        if part.is_finished() { part.join().unwrap() } else { "(pipe still open)".to_owned() }
    };
    let outcome = Outcome { code: exit_code(status), stdout: text(stdout), stderr: text(stderr) };
    assert!(ended, "{command:?} did not end within {patience:?}: {outcome}");
    outcome
}

/// The exit code as shells have it.
pub fn exit_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt as _;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

fn collect(mut stream: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(child.id().try_into().unwrap())
}

fn free_name(dir: &Path, name: &str) -> PathBuf {
    let names = (1..).map(|n| dir.join(format!("{name}-{n}.log")));
    names.into_iter().find(|path| !path.exists()).unwrap()
}

fn tail(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}
