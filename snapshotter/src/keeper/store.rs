//! What is kept, and the socket that it comes through.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;

use nix::cmsg_space;
use nix::sys::socket::sockopt::PassCred;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, setsockopt};
use nix::unistd::Pid;
use tempfile::TempDir;
use tracing::warn;
use weightfs_fusefs::session::is_connected;

/// Where the socket's directory is made: gone after a restart of the machine, as the keeper is.
const RUN_DIRECTORY: &str = "/run";

/// The socket, in a directory of its own.
const SOCKET: &str = "notify";

/// Descriptors that are kept at the most; a daemon has five.
const KEPT_MAX: usize = 16;

/// Longest message, in bytes; a daemon's have less than a hundred.
const MESSAGE_MAX_BYTES: usize = 4096;

/// Most descriptors in one message that are looked at (the kernel allows 253).
const MESSAGE_MAX_DESCRIPTORS: usize = 16;

/// Longest name of a descriptor (sd_notify(3)).
const NAME_MAX_BYTES: usize = 255;

/// What is kept.
#[derive(Debug)]
pub(super) struct Store {
    socket: UnixDatagram,
    kept: Vec<(String, OwnedFd)>,
    /// Removed when the keeper ends.
    directory: TempDir,
}

/// What a message asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Message {
    Keep {
        name: String,
    },
    Forget {
        name: String,
    },
    Ready,
    /// Something that does not matter here. Its descriptors are closed, which is all that a
    /// barrier asks for.
    Other,
}

impl Store {
    /// Listens on a socket of its own.
    pub(super) fn new() -> io::Result<Self> {
        let directory =
            tempfile::Builder::new().prefix("weightfs-keeper-").tempdir_in(RUN_DIRECTORY)?;
        let socket = UnixDatagram::bind(directory.path().join(SOCKET))?;
        socket.set_nonblocking(true)?;
        setsockopt(&socket, PassCred, &true)?;
        Ok(Self { socket, kept: Vec::new(), directory })
    }

    /// Where the command sends its messages.
    pub(super) fn path(&self) -> PathBuf {
        self.directory.path().join(SOCKET)
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn kept(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.kept.iter().map(|(_, descriptor)| descriptor.as_fd())
    }

    /// Names and descriptors, in the order in which they came.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&str, BorrowedFd<'_>)> {
        self.kept.iter().map(|(name, descriptor)| (name.as_str(), descriptor.as_fd()))
    }

    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Takes all messages that are there, and heeds those of that process. Gives whether it said
    /// that it serves.
    pub(super) fn receive(&mut self, from: Option<Pid>) -> bool {
        let mut ready = false;
        while let Some((sender, message, descriptors)) = self.next() {
            if sender.is_none() || sender != from {
                warn!(sender = sender.map(Pid::as_raw), "a message from a stranger is ignored");
                continue;
            }
            match Message::parse(&message) {
                Message::Keep { name } => self.keep(&name, descriptors),
                Message::Forget { name } => self.kept.retain(|(known, _)| *known != name),
                Message::Ready => ready = true,
                Message::Other => {}
            }
        }
        ready
    }

    /// Lets go of mounts that the kernel has ended.
    pub(super) fn drop_dead(&mut self) {
        self.kept.retain(|(_, descriptor)| is_connected(descriptor.as_fd()));
    }

    fn keep(&mut self, name: &str, descriptors: Vec<OwnedFd>) {
        for descriptor in descriptors {
            if self.kept.len() < KEPT_MAX {
                self.kept.push((name.to_owned(), descriptor));
            } else {
                warn!(name, "more than {KEPT_MAX} descriptors are not kept");
            }
        }
    }

    /// The next message: its sender, its text, its descriptors. `None` if none is there.
    fn next(&self) -> Option<(Option<Pid>, Vec<u8>, Vec<OwnedFd>)> {
        let mut text = vec![0; MESSAGE_MAX_BYTES];
        let mut space = cmsg_space!([i32; MESSAGE_MAX_DESCRIPTORS], UnixCredentials);
        let mut parts = [IoSliceMut::new(&mut text)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let socket = self.socket.as_raw_fd();
        let received = recvmsg::<()>(socket, &mut parts, Some(&mut space), flags).ok()?;
        let (mut sender, mut descriptors) = (None, Vec::new());
        for part in received.cmsgs().into_iter().flatten() {
            match part {
                ControlMessageOwned::ScmCredentials(of) => sender = Some(Pid::from_raw(of.pid())),
                // SAFETY: the kernel has just opened them for us.
                #[expect(unsafe_code, reason = "messages carry descriptors as numbers")]
                ControlMessageOwned::ScmRights(raw) => descriptors
                    .extend(raw.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) })),
                _ => {}
            }
        }
        let length = received.bytes;
        text.truncate(length);
        Some((sender, text, descriptors))
    }
}

impl Message {
    /// Lines of `NAME=value` (sd_notify(3)).
    fn parse(text: &[u8]) -> Self {
        let text = String::from_utf8_lossy(text);
        let has = |line: &str| text.lines().any(|other| other == line);
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
        let name = name.filter(|name| is_name(name)).unwrap_or("stored").to_owned();
        if has("FDSTORE=1") {
            Self::Keep { name }
        } else if has("FDSTOREREMOVE=1") {
            Self::Forget { name }
        } else if has("READY=1") {
            Self::Ready
        } else {
            Self::Other
        }
    }
}

/// Whether it can be passed on in `LISTEN_FDNAMES`.
fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_graphic() && byte != b':';
    (1..=NAME_MAX_BYTES).contains(&name.len()) && name.bytes().all(fits)
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read as _, Write as _};

    use nix::sys::socket::{ControlMessage, UnixAddr, sendmsg};

    use super::*;

    fn send(store: &Store, text: &str, descriptors: &[BorrowedFd<'_>]) {
        let raw: Vec<_> = descriptors.iter().map(|descriptor| descriptor.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        let socket = UnixDatagram::unbound().unwrap();
        let address = UnixAddr::new(&store.path()).unwrap();
        let parts = [IoSlice::new(text.as_bytes())];
        sendmsg(socket.as_raw_fd(), &parts, rights, MsgFlags::empty(), Some(&address)).unwrap();
    }

    fn names(store: &Store) -> Vec<&str> {
        store.entries().map(|(name, _)| name).collect()
    }

    #[test]
    fn what_is_sent_is_kept_under_its_name_until_it_is_removed() {
        let mut store = Store::new().unwrap();
        let file = tempfile::tempfile().unwrap();
        (&file).write_all(b"kept").unwrap();
        send(&store, "FDSTORE=1\nFDNAME=mount\n", &[file.as_fd()]);
        send(&store, "FDSTORE=1\nFDNAME=a:b", &[file.as_fd()]);
        send(&store, "FDNAME=control\nFDSTORE=1", &[file.as_fd(), file.as_fd()]);
        assert!(!store.receive(Some(Pid::this())));
        assert_eq!(names(&store), ["mount", "stored", "control", "control"]);
        send(&store, "FDSTOREREMOVE=1\nFDNAME=control", &[]);
        send(&store, "READY=1\nSTATUS=x", &[]);
        assert!(store.receive(Some(Pid::this())));
        assert_eq!(names(&store), ["mount", "stored"]);
        // It is the same file, not a copy.
        let kept = store.kept().next().unwrap().try_clone_to_owned().unwrap();
        let mut text = String::new();
        std::io::Seek::rewind(&mut &file).unwrap();
        std::fs::File::from(kept).read_to_string(&mut text).unwrap();
        assert_eq!(text, "kept");
    }

    #[test]
    fn strangers_are_not_heard() {
        let mut store = Store::new().unwrap();
        let file = tempfile::tempfile().unwrap();
        send(&store, "FDSTORE=1\nFDNAME=mount", &[file.as_fd()]);
        send(&store, "READY=1", &[]);
        assert!(!store.receive(Some(Pid::from_raw(1))));
        send(&store, "READY=1", &[]);
        assert!(!store.receive(None), "while nothing runs");
        assert!(store.is_empty());
    }

    #[test]
    fn no_more_than_so_many_are_kept() {
        let mut store = Store::new().unwrap();
        let file = tempfile::tempfile().unwrap();
        for _ in 0..KEPT_MAX + 3 {
            send(&store, "FDSTORE=1\nFDNAME=x", &[file.as_fd()]);
            store.receive(Some(Pid::this()));
        }
        assert_eq!(store.len(), KEPT_MAX);
    }

    #[test]
    fn a_barrier_is_a_descriptor_that_is_closed() {
        let mut store = Store::new().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        send(&store, "BARRIER=1\n", &[writer.as_fd()]);
        drop(writer);
        store.receive(Some(Pid::this()));
        assert!(store.is_empty());
        assert_eq!(reader.read(&mut [0]).unwrap(), 0, "nobody has the other end");
    }

    #[test]
    fn a_connection_that_is_gone_is_not_kept() {
        let mut store = Store::new().unwrap();
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let (stream, other) = std::os::unix::net::UnixStream::pair().unwrap();
        send(&store, "FDSTORE=1\nFDNAME=mount", &[stream.as_fd()]);
        send(&store, "FDSTORE=1\nFDNAME=ledger", &[ours.as_fd()]);
        store.receive(Some(Pid::this()));
        store.drop_dead();
        assert_eq!(store.len(), 2);
        drop((stream, other));
        store.drop_dead();
        assert_eq!(names(&store), ["ledger"]);
        drop(theirs);
    }
}
