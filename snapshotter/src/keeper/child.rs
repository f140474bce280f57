//! The command that the keeper runs.

use std::ffi::{CString, OsStr, OsString};
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::process::ExitCode;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, execvpe, fork, getpid};

use super::store::Store;
use crate::handover::{KEEPER_VARIABLE, NOTIFY_VARIABLE};

/// The first descriptor that is handed over (`SD_LISTEN_FDS_START`).
const FIRST_DESCRIPTOR: i32 = 3;

/// The exit status of a command that can't be run, as shells have it.
const CANNOT_RUN: i32 = 127;

/// Variables that are the keeper's business.
const OWN_VARIABLES: [&str; 6] = [
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "LISTEN_PIDFDID",
    NOTIFY_VARIABLE,
    KEEPER_VARIABLE,
];

/// A running command.
#[derive(Debug)]
pub(super) struct Child(Pid);

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// By itself, with that status.
    Exited(i32),
    /// By a signal.
    Killed(Signal),
}

impl Ended {
    /// The status as shells have it.
    pub(super) fn code(self) -> ExitCode {
        let code = match self {
            Self::Exited(code) => code,
            Self::Killed(signal) => 128 + signal as i32,
        };
        ExitCode::from(u8::try_from(code).unwrap_or(1))
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(formatter, "exit status {code}"),
            Self::Killed(signal) => write!(formatter, "killed by {signal}"),
        }
    }
}

impl Child {
    /// Starts the command with what is kept. `mask` is the signal mask that it gets.
    pub(super) fn start(command: &[OsString], store: &Store, mask: &SigSet) -> io::Result<Self> {
        let words = command.iter().map(|word| c_string(word)).collect::<io::Result<Vec<_>>>()?;
        let program = words.first().ok_or(io::ErrorKind::InvalidInput)?;
        let (names, kept): (Vec<_>, Vec<_>) = store.entries().unzip();
        let mut variables = inherited_variables()?;
        variables.push(variable(NOTIFY_VARIABLE, store.path().as_os_str())?);
        variables.push(variable(KEEPER_VARIABLE, getpid().to_string())?);
        if !kept.is_empty() {
            variables.push(variable("LISTEN_FDS", kept.len().to_string())?);
            variables.push(variable("LISTEN_FDNAMES", names.join(":"))?);
        }
        // SAFETY: this process has one thread, so the child may do what any process may.
        #[expect(unsafe_code, reason = "LISTEN_PID is known only between fork and exec")]
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Self(child)),
            ForkResult::Child => {
                let error = become_command(program, &words, variables, &kept, mask);
                eprintln!("weightfs: keeper: {}: {error}", program.to_string_lossy());
                // SAFETY: _exit runs nothing of the parent's.
                #[expect(unsafe_code, reason = "exit would run the parent's cleanup")]
                unsafe {
                    libc::_exit(CANNOT_RUN)
                }
            }
        }
    }

    pub(super) const fn pid(&self) -> Pid {
        self.0
    }

    /// Sends a signal.
    pub(super) fn signal(&self, signal: Signal) {
        // It fails only if the child has ended, which is noticed elsewhere.
        let _ = kill(self.0, signal);
    }

    /// How it ended, if it has. To be asked no more once it has said so.
    pub(super) fn ended(&self) -> Option<Ended> {
        match waitpid(self.0, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => Some(Ended::Exited(code)),
            Ok(WaitStatus::Signaled(_, signal, _)) => Some(Ended::Killed(signal)),
            // Nobody else waits for it; should it be gone all the same, it has failed.
            Err(Errno::ECHILD) => Some(Ended::Exited(1)),
            Ok(_) | Err(_) => None,
        }
    }
}

/// Turns the forked child into the command; returns only if it can't.
fn become_command(
    program: &CString,
    words: &[CString],
    mut variables: Vec<CString>,
    kept: &[BorrowedFd<'_>],
    mask: &SigSet,
) -> io::Error {
    let prepare = || -> io::Result<()> {
        place(kept)?;
        variables.push(variable("LISTEN_PID", getpid().to_string())?);
        mask.thread_set_mask()?;
        execvpe(program, words, &variables)?;
        Ok(())
    };
    let mut prepare = prepare;
    prepare().err().unwrap_or_else(|| io::ErrorKind::Other.into())
}

/// Puts descriptors where the command looks for them, and open for it.
fn place(kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    let count = i32::try_from(kept.len()).map_err(io::Error::other)?;
    let above = FIRST_DESCRIPTOR + count;
    // Out of the way first: one may lie where another has to go.
    let high = kept.iter().map(|kept| fcntl(kept, FcntlArg::F_DUPFD_CLOEXEC(above)));
    let high = high.collect::<nix::Result<Vec<_>>>()?;
    for (raw, at) in high.into_iter().zip(FIRST_DESCRIPTOR..above) {
        // SAFETY: what is replaced belongs to the parent's copy of things, which this child never
        // uses again: it becomes the command.
        #[expect(unsafe_code, reason = "the protocol wants fixed numbers")]
        let placed = unsafe { libc::dup2(raw, at) };
        if placed < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn inherited_variables() -> io::Result<Vec<CString>> {
    let own = |name: &OsStr| OWN_VARIABLES.iter().any(|own| name == *own);
    let others = std::env::vars_os().filter(|(name, _)| !own(name));
    others.map(|(name, value)| variable(&name, value)).collect()
}

fn variable(name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> io::Result<CString> {
    let mut text = name.as_ref().to_owned();
    text.push("=");
    text.push(value);
    c_string(&text)
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    Ok(CString::new(text.as_bytes())?)
}
