//! The body of an answer: as many bytes as were asked for, or an error.
//!
//! Invariant: every body ends. A host that gives too little for too long is given up where another
//! one could be asked; one that falls silent, by its connection's timeout.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use reqwest::Response;
use tokio::time::Instant;

use super::Repository;
use super::host::{Host, unreachable};
use crate::SourceError;
use crate::source::{ByteStream, Piece};

/// How long a body may be slow before another host is asked. A few fail-overs fit into a read's
/// deadline.
const SLOW_FOR: Duration = Duration::from_secs(5);

/// What is slow, over that time: at this pace a chunk takes longer than any read waits.
const SLOW_BYTES: u64 = (16 << 10) * SLOW_FOR.as_secs();

/// A host counts as well again when so much came, or all of it: anybody can begin a body.
const WELL_BYTES: u64 = 256 << 10;

/// Whether a slow body is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slow {
    /// There is nobody else to ask.
    Bear,
    /// Another host may be faster.
    GiveUp,
}

type Pieces = BoxStream<'static, Result<Bytes, SourceError>>;

/// What is still to come.
struct Rest {
    pieces: Pieces,
    left: u64,
    /// Bytes that came since the host was last called well.
    fresh: u64,
    pace: Pace,
    end: End,
}

/// What is done as a body ends.
struct End {
    host: Arc<Host>,
    name: String,
    slow: Slow,
}

/// The first `wanted` bytes of an answer's body. How it goes is noted with its host.
pub(super) fn body(
    host: &Arc<Host>,
    from: &Repository,
    answer: Response,
    wanted: u64,
    slow: Slow,
) -> ByteStream {
    let (name, repository) = (from.to_string(), from.clone());
    let pieces =
        answer.bytes_stream().map(move |piece| piece.map_err(|e| unreachable(&repository, e)));
    let end = End { host: Arc::clone(host), name, slow };
    let rest = Rest { pieces: pieces.boxed(), left: wanted, fresh: 0, pace: Pace::default(), end };
    let from = host.kind();
    let pieces = stream::unfold(Some(rest), next);
    pieces.map(move |piece| piece.map(|bytes| Piece { bytes, from })).boxed()
}

async fn next(rest: Option<Rest>) -> Option<(Result<Bytes, SourceError>, Option<Rest>)> {
    let mut rest = rest.filter(|rest| rest.left > 0)?;
    let asked = Instant::now();
    let piece = rest.pieces.next().await;
    match rest.take(piece, asked.elapsed()) {
        Ok(piece) => Some((Ok(piece), Some(rest))),
        Err(error) => {
            rest.end.host.health().failed();
            Some((Err(error), None))
        }
    }
}

impl Rest {
    /// What came after `waited`, without what is more than was asked for.
    fn take(
        &mut self,
        piece: Option<Result<Bytes, SourceError>>,
        waited: Duration,
    ) -> Result<Bytes, SourceError> {
        let Some(piece) = piece else {
            return Err(self.end.failed(format!("the body ended {} bytes early", self.left)));
        };
        let mut piece = piece?;
        piece.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
        let len = piece.len() as u64;
        self.left -= len;
        self.fresh += len;
        if self.left == 0 || self.fresh >= WELL_BYTES {
            self.end.host.health().well();
            self.fresh = 0;
        }
        if self.left > 0 && self.pace.is_slow(len, waited) && self.end.slow == Slow::GiveUp {
            let message = format!("the body comes slower than {SLOW_BYTES} bytes in {SLOW_FOR:?}");
            return Err(self.end.failed(message));
        }
        Ok(piece)
    }
}

impl End {
    fn failed(&self, message: String) -> SourceError {
        SourceError::Unreachable { source_name: self.name.clone(), message }
    }
}

/// How fast bytes come. Only the time counts in which they were waited for.
#[derive(Debug, Default)]
struct Pace {
    waited: Duration,
    bytes: u64,
}

impl Pace {
    fn is_slow(&mut self, bytes: u64, waited: Duration) -> bool {
        self.bytes += bytes;
        self.waited += waited;
        if self.waited < SLOW_FOR {
            return false;
        }
        std::mem::take(self).bytes < SLOW_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_slow_when_little_comes_for_long() {
        let mut pace = Pace::default();
        let second = Duration::from_secs(1);
        assert!((0..4).all(|_| !pace.is_slow(1, second)), "it may yet come");
        assert!(pace.is_slow(1, second));
        assert!((0..50).all(|_| !pace.is_slow(SLOW_BYTES / 5, second)));
        assert!((0..5000).all(|_| !pace.is_slow(1, Duration::ZERO)), "nobody waited for more");
    }
}
