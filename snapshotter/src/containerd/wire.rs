//! A socket on which a call costs one wake-up, one read and one write.
//!
//! - What is written waits for [`AsyncWrite::poll_flush`] and goes out at once, so that an answer's
//!   head, message and status are one message for its reader, too.
//! - The kernel is asked to say when there is room again only while there is none. Else it wakes us
//!   each time the other side has read something.
//! - grpc-go measures its connection all the time: it sends a PING with what it does after an
//!   answer, and the next one once that is acknowledged. Acknowledged at once, that is another
//!   message each way for each call; so an acknowledgement that has nothing to travel with goes out
//!   [`ACKNOWLEDGE_AFTER`]. RFC 9113 (6.7) asks for haste, but sets no time; keepalives wait for
//!   seconds.
//!
//! Invariant: a flush comes where frames end, as h2 does it; so what is added then is between two.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::mem;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// How late a PING is acknowledged.
const ACKNOWLEDGE_AFTER: Duration = Duration::from_millis(100);

/// How the acknowledgement of a PING begins (RFC 9113, 4.1 and 6.7): 8 bytes follow, type 6, flag
/// ACK, stream 0.
const ACKNOWLEDGEMENT: [u8; 9] = [0, 0, 8, 6, 1, 0, 0, 0, 0];

/// Bytes of it in all.
const ACKNOWLEDGEMENT_BYTES: usize = ACKNOWLEDGEMENT.len() + 8;

/// A connected socket.
#[derive(Debug)]
pub(super) struct Wire {
    socket: AsyncFd<UnixStream>,
    /// The same once more, while there is no room in it.
    full: Option<AsyncFd<UnixStream>>,
    /// What waits for a flush, or for room.
    out: Vec<u8>,
    /// Bytes of it that are written.
    written: usize,
    /// The acknowledgement that waits for its time.
    late: Option<Vec<u8>>,
    time: Pin<Box<Sleep>>,
}

impl Wire {
    /// The socket must not block.
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        let socket = watch(socket, Interest::READABLE)?;
        let time = Box::pin(sleep(ACKNOWLEDGE_AFTER));
        Ok(Self { socket, full: None, out: vec![], written: 0, late: None, time })
    }

    /// Keeps back what is nothing but an acknowledgement, and adds it when its time has come.
    fn acknowledge_late(&mut self, context: &mut Context<'_>) {
        let alone = self.written == 0
            && self.out.len() == ACKNOWLEDGEMENT_BYTES
            && self.out.starts_with(&ACKNOWLEDGEMENT);
        if alone && self.late.is_none() {
            self.late = Some(mem::take(&mut self.out));
            self.time.as_mut().reset(Instant::now() + ACKNOWLEDGE_AFTER);
        }
        if self.late.is_some() && self.time.as_mut().poll(context).is_ready() {
            self.out.extend(self.late.take().into_iter().flatten());
        }
    }

    fn write_out(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.out.len() {
            match self.socket.get_ref().write(&self.out[self.written..]) {
                Ok(0) => return Poll::Ready(Err(ErrorKind::WriteZero.into())),
                Ok(count) => self.written += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    ready!(self.poll_room(context))?;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        self.full = None;
        self.out.clear();
        self.written = 0;
        Poll::Ready(Ok(()))
    }

    /// Waits for room.
    fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let full = match &mut self.full {
            Some(full) => full,
            none => none.insert(watch(self.socket.get_ref().try_clone()?, Interest::WRITABLE)?),
        };
        ready!(full.poll_write_ready(context))?.clear_ready();
        Poll::Ready(Ok(()))
    }
}

/// Has the kernel say when a socket is ready, for one thing only.
fn watch(socket: UnixStream, interest: Interest) -> io::Result<AsyncFd<UnixStream>> {
    // SAFETY: a UnixStream owns its descriptor, keeps it open and never changes it.
    #[expect(unsafe_code, reason = "tokio's own UnixStream is always told of both")]
    let watched = unsafe { AsyncFd::register_with_interest(socket, interest) };
    Ok(watched?)
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut readable = ready!(self.socket.poll_read_ready(context))?;
            let room = buffer.initialize_unfilled();
            let wanted = room.len();
            let Ok(read) = readable.try_io(|socket| socket.get_ref().read(room)) else { continue };
            let count = match read {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                read => read?,
            };
            // That was all: the next read would find nothing.
            if 0 < count && count < wanted {
                readable.clear_ready();
            }
            buffer.advance(count);
            return Poll::Ready(Ok(()));
        }
    }
}

impl AsyncWrite for Wire {
    /// h2 flushes after a frame or two, so what waits is bounded.
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.out.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.acknowledge_late(context);
        self.write_out(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.write_out(context))?;
        Poll::Ready(self.socket.get_ref().shutdown(Shutdown::Write))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const PING_ACK: [u8; ACKNOWLEDGEMENT_BYTES] = *b"\0\0\x08\x06\x01\0\0\0\0whatever";

    /// A wire and its other end, on which each write is a message of its own.
    fn messages() -> (Wire, UnixStream) {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_NONBLOCK)
                .unwrap();
        (Wire::new(ours.into()).unwrap(), theirs.into())
    }

    fn message(mut peer: &UnixStream) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 1 << 16];
        match peer.read(&mut buffer) {
            Ok(count) => Some(buffer[..count].to_vec()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        }
    }

    #[tokio::test]
    async fn what_is_written_before_a_flush_is_one_message() {
        let (mut wire, peer) = messages();
        for part in ["head", "message", "status"] {
            wire.write_all(part.as_bytes()).await.unwrap();
        }
        assert_eq!(message(&peer), None);
        wire.flush().await.unwrap();
        assert_eq!(message(&peer).unwrap(), b"headmessagestatus");
        assert_eq!(message(&peer), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lone_acknowledgement_goes_out_later_and_holds_nothing_up() {
        let (mut wire, peer) = messages();
        wire.write_all(&PING_ACK).await.unwrap();
        wire.flush().await.unwrap();
        assert_eq!(message(&peer), None, "not at once");
        wire.write_all(b"answer").await.unwrap();
        wire.flush().await.unwrap();
        assert_eq!(message(&peer).unwrap(), b"answer");
        tokio::time::advance(ACKNOWLEDGE_AFTER).await;
        wire.write_all(b"another").await.unwrap();
        wire.flush().await.unwrap();
        assert_eq!(message(&peer).unwrap(), [b"another".as_slice(), &PING_ACK].concat());
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_acknowledgements_one_goes_out_at_once() {
        let (mut wire, peer) = messages();
        for _ in 0..2 {
            wire.write_all(&PING_ACK).await.unwrap();
            wire.flush().await.unwrap();
        }
        assert_eq!(message(&peer).unwrap(), PING_ACK);
        assert_eq!(message(&peer), None);
        tokio::time::advance(ACKNOWLEDGE_AFTER).await;
        wire.flush().await.unwrap();
        assert_eq!(message(&peer).unwrap(), PING_ACK);
    }

    #[tokio::test]
    async fn what_finds_no_room_waits_for_it_and_arrives_whole() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut wire = Wire::new(ours).unwrap();
        let sent: Vec<u8> = (0..4_000_000_u32).map(|number| number as u8).collect();
        wire.write_all(&sent).await.unwrap();
        let flushed = poll_fn(|context| Poll::Ready(Pin::new(&mut wire).poll_flush(context))).await;
        assert!(flushed.is_pending(), "no socket has so much room");
        let mut peer = tokio::net::UnixStream::from_std(theirs).unwrap();
        let mut received = vec![0; sent.len()];
        let (flushed, read) = tokio::join!(wire.flush(), peer.read_exact(&mut received));
        flushed.unwrap();
        read.unwrap();
        assert!(received == sent);
        assert!(wire.full.is_none(), "and the kernel is no longer asked for room");
    }

    #[tokio::test]
    async fn an_end_that_came_with_the_last_bytes_is_seen() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (&theirs).write_all(b"last").unwrap();
        drop(theirs);
        let mut received = vec![];
        Wire::new(ours).unwrap().read_to_end(&mut received).await.unwrap();
        assert_eq!(received, b"last");
    }
}
