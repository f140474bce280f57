//! Unix sockets that only root may talk to, made without a moment in which others could, or
//! inherited from whoever kept them while no daemon ran.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockname, listen,
    socket,
};
use nix::sys::stat::{Mode, fchmod};
use tokio::net::UnixListener;

/// Owner only: who may open the socket may mount and remove snapshots.
const SOCKET_MODE: Mode = Mode::from_bits_truncate(0o600);

/// A socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody listens there.
    #[error("socket {} is in use; is another weightfs running?", path.display())]
    InUse {
        /// The socket's path.
        path: PathBuf,
    },
    /// Something else lies there.
    #[error("{} is not a socket; move it away or name another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("cannot {action} socket {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The socket's path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Where a socket comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// It listened before this process began.
    Inherited,
    /// It was made now.
    New,
}

/// Listens at `path` on the inherited socket, if it is there, or else on a new one. Call it within
/// a tokio runtime.
pub fn listen_at(
    inherited: Option<OwnedFd>,
    path: &Path,
) -> Result<(UnixListener, Origin), SocketError> {
    let Some(inherited) = inherited else { return Ok((bind_socket(path)?, Origin::New)) };
    if !is_at(&inherited, path) {
        tracing::warn!(path = %path.display(), "the inherited socket is at another path; closed");
        drop(inherited);
        return Ok((bind_socket(path)?, Origin::New));
    }
    let failed = |source| SocketError::Io { action: "listen on", path: path.to_owned(), source };
    let listener = std::os::unix::net::UnixListener::from(inherited);
    listener.set_nonblocking(true).map_err(failed)?;
    Ok((UnixListener::from_std(listener).map_err(failed)?, Origin::Inherited))
}

/// Whether a socket is the one that clients find at `path`, as far as can be told: it was bound
/// there, and there is a socket.
fn is_at(socket: &OwnedFd, path: &Path) -> bool {
    let bound = getsockname::<UnixAddr>(socket.as_raw_fd()).ok();
    let bound = bound.as_ref().and_then(UnixAddr::path).map(Path::canonicalize);
    match (bound, path.canonicalize()) {
        (Some(Ok(bound)), Ok(path)) => bound == path,
        _ => false,
    }
}

/// Listens on a new socket at `path`, mode 0600, and makes the directories above it. A socket that
/// an earlier process left is replaced; one that somebody listens on is not. Call it within a
/// tokio runtime.
pub fn bind_socket(path: &Path) -> Result<UnixListener, SocketError> {
    let failed =
        |action| move |source: io::Error| SocketError::Io { action, path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed("make the directory of"))?;
    }
    remove_stale(path)?;
    let fd = listening(path).map_err(io::Error::from).map_err(failed("listen on"))?;
    let listener = std::os::unix::net::UnixListener::from(fd);
    UnixListener::from_std(listener).map_err(failed("listen on"))
}

/// Binds a socket that has its mode from the first moment: Linux gives the new file the mode of
/// the socket's own inode (`unix_bind_bsd`).
fn listening(path: &Path) -> nix::Result<OwnedFd> {
    let fd = new_socket()?;
    fchmod(&fd, SOCKET_MODE)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::MAXCONN)?;
    Ok(fd)
}

fn new_socket() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::Stream, flags, None)
}

/// Removes a socket on which nobody answers.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let failed =
        |action| move |source: io::Error| SocketError::Io { action, path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look for")(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(SocketError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match try_connect(path) {
        Err(Errno::ECONNREFUSED) => std::fs::remove_file(path).map_err(failed("replace")),
        // Without blocking, a full queue of connections says EAGAIN: somebody is there.
        Ok(()) | Err(Errno::EAGAIN) => Err(SocketError::InUse { path: path.to_owned() }),
        Err(error) => Err(failed("try")(error.into())),
    }
}

fn try_connect(path: &Path) -> nix::Result<()> {
    let fd = new_socket()?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn a_socket_is_the_owners_only_and_its_directory_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/weightfs/a.sock");
        let listener = bind_socket(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        let (accepted, connected) =
            tokio::join!(listener.accept(), tokio::net::UnixStream::connect(&path));
        assert!(accepted.is_ok() && connected.is_ok());
    }

    #[tokio::test]
    async fn a_left_socket_is_replaced_and_one_in_use_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let first = bind_socket(&path).unwrap();
        assert!(matches!(bind_socket(&path), Err(SocketError::InUse { .. })));
        drop(first);
        assert!(path.exists(), "a listener leaves its file");
        bind_socket(&path).unwrap();
    }

    #[tokio::test]
    async fn an_inherited_socket_is_used_where_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let [a, b] = ["a.sock", "b.sock"].map(|name| directory.path().join(name));
        let kept = listening(&a).unwrap();
        // Somebody connects while no daemon runs.
        let waiting = tokio::net::UnixStream::connect(&a).await.unwrap();
        let (listener, origin) = listen_at(Some(kept.try_clone().unwrap()), &a).unwrap();
        assert_eq!(origin, Origin::Inherited);
        listener.accept().await.unwrap();
        drop((listener, waiting));
        // The configuration names another path now.
        let (_, origin) = listen_at(Some(kept.try_clone().unwrap()), &b).unwrap();
        assert_eq!(origin, Origin::New);
        // Somebody has removed the file.
        std::fs::remove_file(&a).unwrap();
        let (listener, origin) = listen_at(Some(kept), &a).unwrap();
        assert_eq!(origin, Origin::New);
        let connected = tokio::net::UnixStream::connect(&a);
        assert!(matches!(tokio::join!(listener.accept(), connected), (Ok(_), Ok(_))));
    }

    #[tokio::test]
    async fn what_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(bind_socket(&path), Err(SocketError::NotASocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn a_path_too_long_for_a_socket_is_refused_with_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a".repeat(200));
        let error = bind_socket(&path).unwrap_err();
        assert!(error.to_string().contains(&"a".repeat(200)), "{error}");
    }
}
