//! What outlives this process: descriptors that systemd or `weightfs keeper` hold for it and give
//! to its successor (sd_notify(3), FDSTORE; sd_listen_fds(3)), so that the mount and the sockets
//! are never without one who answers for longer than a start takes.

use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;
use sd_notify::NotifyState;
use tracing::warn;

/// Variable by which `weightfs keeper` says that it is not systemd.
pub const KEEPER_VARIABLE: &str = "WEIGHTFS_KEEPER";

/// Variable that names the socket of whoever keeps descriptors (sd_notify(3)).
pub const NOTIFY_VARIABLE: &str = "NOTIFY_SOCKET";

/// How long a keeper may take to take what it was sent.
const KEEPER_PATIENCE: Duration = Duration::from_secs(5);

/// What is handed over, by the names that the keeper knows it by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Name {
    /// The mount's /dev/fuse descriptor.
    Mount,
    /// What the kernel holds of the mount.
    Ledger,
    /// The listening socket for containerd.
    Snapshotter,
    /// The listening socket for the command line.
    Control,
    /// The listening socket for the kubelet.
    Cri,
}

impl Name {
    const ALL: [Self; 5] = [Self::Mount, Self::Ledger, Self::Snapshotter, Self::Control, Self::Cri];

    /// Also `FileDescriptorName=` in the socket units.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Mount => "mount",
            Self::Ledger => "ledger",
            Self::Snapshotter => "snapshotter",
            Self::Control => "control",
            Self::Cri => "cri",
        }
    }
}

/// What a predecessor, or a socket unit, left for this process.
#[derive(Debug, Default)]
pub struct Inherited(Vec<(Name, OwnedFd)>);

impl Inherited {
    /// Takes what was handed to this process. To be called once.
    ///
    /// # Errors
    /// When the variables of sd_listen_fds(3) contradict each other.
    pub fn take() -> io::Result<Self> {
        let mut inherited = Self::default();
        for (raw, name) in sd_notify::listen_fds_with_names()? {
            // SAFETY: it was opened for this process (LISTEN_PID is checked), and nobody else in
            // it takes it: this is called once.
            #[expect(unsafe_code, reason = "the protocol hands over numbers")]
            let descriptor = unsafe { OwnedFd::from_raw_fd(raw) };
            match Name::ALL.into_iter().find(|known| known.as_str() == name) {
                Some(name) => inherited.0.push((name, descriptor)),
                None => warn!(name, "a descriptor of an unknown name was handed over; closed"),
            }
        }
        Ok(inherited)
    }

    /// The descriptor of that name; of several the first.
    pub fn get(&mut self, name: Name) -> Option<OwnedFd> {
        let at = self.0.iter().position(|(known, _)| *known == name)?;
        Some(self.0.remove(at).1)
    }
}

/// Who keeps descriptors while no daemon runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeper {
    /// Nobody.
    Nobody,
    /// systemd, for a unit with `FileDescriptorStoreMax=`.
    Systemd,
    /// `weightfs keeper`
    Own,
}

impl fmt::Display for Keeper {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Nobody => "nobody",
            Self::Systemd => "systemd",
            Self::Own => "weightfs keeper",
        })
    }
}

impl Keeper {
    /// Looks for one in the environment.
    pub fn find() -> Self {
        match (std::env::var_os(NOTIFY_VARIABLE), std::env::var_os(KEEPER_VARIABLE)) {
            (None, _) => Self::Nobody,
            (Some(_), None) => Self::Systemd,
            (Some(_), Some(_)) => Self::Own,
        }
    }

    /// Gives it a descriptor for the successor of this process.
    ///
    /// # Errors
    /// When it can't be sent.
    pub fn keep(self, name: Name, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        let state = [NotifyState::FdStore, NotifyState::FdName(name.as_str())];
        sd_notify::notify_with_fds(&state, &[descriptor])
    }

    /// Makes it close what it keeps by that name.
    ///
    /// # Errors
    /// When it can't be told.
    pub fn forget(self, name: Name) -> io::Result<()> {
        sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name.as_str())])
    }

    /// Waits until it has done what it was asked for. Blocks for a moment.
    ///
    /// # Errors
    /// When it does not.
    pub fn settle(self) -> io::Result<()> {
        if self == Self::Nobody {
            return Ok(());
        }
        // It closes its end when it has come to the message (sd_notify_barrier(3)).
        let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
        sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[theirs.as_fd()])?;
        drop(theirs);
        let patience = PollTimeout::try_from(KEEPER_PATIENCE).unwrap_or(PollTimeout::MAX);
        let mut polled = [PollFd::new(ours.as_fd(), PollFlags::empty())];
        match poll(&mut polled, patience)? {
            0 => Err(io::Error::new(io::ErrorKind::TimedOut, "it does not answer")),
            _ => Ok(()),
        }
    }

    /// Tells it that the daemon serves.
    pub fn tell_ready(self) {
        self.tell(NotifyState::Ready);
    }

    /// Tells it that the daemon is about to end.
    pub fn tell_stopping(self) {
        self.tell(NotifyState::Stopping);
    }

    fn tell(self, state: NotifyState<'_>) {
        if let Err(error) = sd_notify::notify(&[state]) {
            warn!(keeper = %self, %error, "the keeper can't be told how the daemon is");
        }
    }
}
