//! Response bodies on their way through: counted, and spoilt where a fault says so.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;

use super::State;
use super::fault::Fault;

pub(super) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// What happens to a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mishap {
    None,
    Stall {
        after: u64,
    },
    Cut {
        after: u64,
    },
    Trickle,
    /// Offset in this body.
    Corrupt {
        at: u64,
    },
}

impl Mishap {
    /// `first` is the offset in the blob of the body's first byte.
    pub(super) fn of(fault: Option<Fault>, first: u64) -> Self {
        match fault {
            Some(Fault::Stall { after }) => Self::Stall { after },
            Some(Fault::Cut { after }) => Self::Cut { after },
            Some(Fault::Trickle) => Self::Trickle,
            Some(Fault::Corrupt { at }) if at >= first => Self::Corrupt { at: at - first },
            _ => Self::None,
        }
    }
}

/// What is left of a body.
struct Passing {
    inner: Body,
    /// Data that was taken from `inner` and waits behind a mishap.
    held: Option<Bytes>,
    sent: u64,
    counter: Arc<AtomicU64>,
    mishap: Mishap,
    state: Arc<State>,
}

/// A body that adds what is taken from it to `counter`.
pub(super) fn counted(
    inner: Body,
    counter: Arc<AtomicU64>,
    mishap: Mishap,
    state: Arc<State>,
) -> Body {
    let passing = Passing { inner, held: None, sent: 0, counter, mishap, state };
    StreamBody::new(stream::unfold(passing, next)).boxed_unsync()
}

async fn next(mut body: Passing) -> Option<(io::Result<Frame<Bytes>>, Passing)> {
    let data = match body.held.take() {
        Some(held) => held,
        None => match body.inner.frame().await?.map(Frame::into_data) {
            Ok(Ok(data)) => data,
            Ok(Err(trailers)) => return Some((Ok(trailers), body)),
            Err(error) => return Some((Err(error), body)),
        },
    };
    let passed = body.pass(data).await.map(|data| {
        body.sent += data.len() as u64;
        body.counter.fetch_add(data.len() as u64, Ordering::Relaxed);
        Frame::data(data)
    });
    Some((passed, body))
}

impl Passing {
    /// What of `data` gets through now.
    async fn pass(&mut self, data: Bytes) -> io::Result<Bytes> {
        match self.mishap {
            Mishap::None => Ok(data),
            Mishap::Corrupt { at } => Ok(self.corrupt(data, at)),
            Mishap::Stall { after } | Mishap::Cut { after } if self.sent < after => {
                Ok(self.hold_back(data, after - self.sent))
            }
            Mishap::Trickle => {
                tokio::time::sleep(Duration::from_secs(1)).await;
                Ok(self.hold_back(data, 1))
            }
            Mishap::Stall { .. } => {
                self.mishap = Mishap::None;
                self.state.healed().await;
                Ok(data)
            }
            Mishap::Cut { .. } => Err(io::Error::other("cut on command")),
        }
    }

    fn corrupt(&self, data: Bytes, at: u64) -> Bytes {
        let place = at.checked_sub(self.sent).and_then(|place| usize::try_from(place).ok());
        let mut data = BytesMut::from(data);
        if let Some(byte) = place.and_then(|place| data.get_mut(place)) {
            *byte = !*byte;
        }
        data.freeze()
    }

    fn hold_back(&mut self, mut data: Bytes, room: u64) -> Bytes {
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        if room < data.len() {
            self.held = Some(data.split_off(room));
        }
        data
    }
}
