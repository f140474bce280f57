//! `weightfs keeper`: runs one command again and again, and keeps the descriptors that it hands
//! over while it does not run, by the protocol of systemd's file descriptor store (sd_notify(3)):
//! `NOTIFY_SOCKET`, `FDSTORE=1`, `FDSTOREREMOVE=1`, `FDNAME=`, `BARRIER=1`, `READY=1`, and
//! `LISTEN_FDS` at each start.
//!
//! It must outlive everything, so it does little: one thread, no configuration, no network, no
//! file but its socket.
//!
//! Invariants: it ends only when it is asked to, or when its command has ended and nothing is
//! kept. Nothing is accepted but from the command's own process, and no more than a fixed number
//! of descriptors.

mod child;
mod store;

use std::ffi::OsString;
use std::io;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::os::fd::AsFd as _;
use tracing::{info, warn};

use child::{Child, Ended};
use store::Store;

/// The pause before the command is started again after it served.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// The longest pause, after it failed again and again.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// How long the command may take to end when it is asked to. Then it is killed.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// Signals that mean something here; all others do what they always do.
const SIGNALS: [Signal; 7] = [
    Signal::SIGCHLD,
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// The keeper can't work.
#[derive(Debug, thiserror::Error)]
#[error("keeper: {action}: {source}")]
pub struct KeeperError {
    action: &'static str,
    #[source]
    source: io::Error,
}

fn cannot(action: &'static str) -> impl Fn(io::Error) -> KeeperError {
    move |source| KeeperError { action, source }
}

/// What the command does.
#[derive(Debug)]
enum State {
    /// It runs; when it has to be gone, if it was asked to end.
    Running { child: Child, killed_at: Option<Instant> },
    /// It is started again then.
    Waiting { until: Instant },
}

#[derive(Debug)]
struct Keeper<'a> {
    command: &'a [OsString],
    store: Store,
    state: State,
    /// Starts that failed since the command last served.
    failures: u32,
    /// Whether the keeper was asked to end.
    ending: bool,
}

/// Runs `command` until the keeper is asked to end, or nothing is left to keep. Call it before
/// there are other threads. Gives the command's exit status.
///
/// # Errors
/// When the socket can't be made or the command can't be started at all.
pub fn run(command: &[OsString]) -> Result<ExitCode, KeeperError> {
    let mask: SigSet = SIGNALS.into_iter().collect();
    let inherited = mask.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK);
    let inherited = inherited.map_err(|error| cannot("block signals")(error.into()))?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(|error| cannot("wait for signals")(error.into()))?;
    let store = Store::new().map_err(cannot("make its socket"))?;
    let child = Child::start(command, &store, &inherited).map_err(cannot("start the command"))?;
    let state = State::Running { child, killed_at: None };
    let mut keeper = Keeper { command, store, state, failures: 0, ending: false };
    loop {
        keeper.wait(&signals).map_err(cannot("wait"))?;
        keeper.take_messages();
        while let Ok(Some(signal)) = signals.read_signal() {
            keeper.on_signal(Signal::try_from(signal.ssi_signo.cast_signed()).ok());
        }
        if let Some(code) = keeper.advance(&inherited) {
            return Ok(code);
        }
    }
}

impl Keeper<'_> {
    /// Waits until there is something to do.
    fn wait(&self, signals: &SignalFd) -> io::Result<()> {
        let until = match &self.state {
            State::Running { killed_at, .. } => *killed_at,
            State::Waiting { until } => Some(*until),
        };
        let timeout = until.map_or(PollTimeout::NONE, |until| {
            // Rounded up: a wait that ends early would be a busy one.
            let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let mut polled = vec![
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.store.socket(), PollFlags::POLLIN),
        ];
        // Without events: errors only. A mount that is gone need not be kept.
        polled.extend(self.store.kept().map(|kept| PollFd::new(kept, PollFlags::empty())));
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes what the command sent.
    fn take_messages(&mut self) {
        let from = match &self.state {
            State::Running { child, .. } => Some(child.pid()),
            State::Waiting { .. } => None,
        };
        if self.store.receive(from) {
            self.failures = 0;
        }
        self.store.drop_dead();
    }

    fn on_signal(&mut self, signal: Option<Signal>) {
        match signal {
            None | Some(Signal::SIGCHLD) => {}
            Some(signal @ (Signal::SIGTERM | Signal::SIGINT | Signal::SIGQUIT)) => {
                info!(%signal, "ending the command, and its mount");
                self.ending = true;
                self.end(Signal::SIGINT);
            }
            Some(Signal::SIGHUP) => {
                info!("starting the command again");
                self.end(Signal::SIGTERM);
            }
            Some(other) => {
                if let State::Running { child, .. } = &self.state {
                    child.signal(other);
                }
            }
        }
    }

    /// Asks the command to end.
    fn end(&mut self, signal: Signal) {
        if let State::Running { child, killed_at } = &mut self.state {
            child.signal(signal);
            killed_at.get_or_insert(Instant::now() + END_PATIENCE);
        }
    }

    /// Starts what is to be started and buries what has ended. Gives the exit status at the end.
    fn advance(&mut self, mask: &SigSet) -> Option<ExitCode> {
        match &mut self.state {
            State::Running { child, killed_at } => {
                if killed_at.is_some_and(|at| at <= Instant::now()) {
                    warn!("the command did not end in time and is killed");
                    child.signal(Signal::SIGKILL);
                    *killed_at = None;
                }
                let ended = child.ended()?;
                // What it sent last counts.
                self.take_messages();
                self.on_end(ended)
            }
            State::Waiting { .. } if self.ending => Some(ExitCode::SUCCESS),
            State::Waiting { until } => {
                if *until <= Instant::now() {
                    self.start(mask);
                }
                None
            }
        }
    }

    fn on_end(&mut self, ended: Ended) -> Option<ExitCode> {
        let done = match ended {
            Ended::Exited(_) => self.store.is_empty(),
            Ended::Killed(_) => false,
        };
        if self.ending || done {
            return Some(ended.code());
        }
        let pause = self.pause();
        info!(%ended, ?pause, kept = self.store.len(), "the command is started again");
        self.state = State::Waiting { until: Instant::now() + pause };
        None
    }

    fn start(&mut self, mask: &SigSet) {
        match Child::start(self.command, &self.store, mask) {
            Ok(child) => self.state = State::Running { child, killed_at: None },
            Err(error) => {
                let pause = self.pause();
                warn!(%error, ?pause, "the command can't be started");
                self.state = State::Waiting { until: Instant::now() + pause };
            }
        }
    }

    /// How long to wait, longer each time that the command ends without having served.
    fn pause(&mut self) -> Duration {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(16)).min(LONGEST_PAUSE);
        self.failures = self.failures.saturating_add(1);
        pause
    }
}
