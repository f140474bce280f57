//! Reads of a source that survive passing errors: what has come stays, the rest is asked for
//! again until nothing came for the deadline.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use bytes::Bytes;
use futures::StreamExt as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};
use weightfs_store::{Digest, Source, SourceError, Urgency};

use super::LayerError;

/// First pause after a passing error.
const MIN_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause: a registry that comes back is noticed within it.
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// A layer's blob at its source.
#[derive(Debug, Clone)]
pub struct Remote {
    pub source: Arc<dyn Source>,
    pub digest: Digest,
    /// How long nothing at all may come.
    pub deadline: Duration,
}

impl Remote {
    /// All bytes of a range, in pieces as they came.
    ///
    /// # Errors
    /// An error that does not pass, or the deadline.
    pub async fn read(&self, range: Range<u64>) -> Result<Vec<Bytes>, LayerError> {
        let mut pieces = Vec::new();
        self.read_to(range, &mut pieces).await?;
        Ok(pieces)
    }

    /// The same, each piece as it comes.
    ///
    /// # Errors
    /// As [`Remote::read`].
    pub async fn read_to(
        &self,
        range: Range<u64>,
        pieces: &mut impl Pieces,
    ) -> Result<(), LayerError> {
        let mut got = Got { pieces, at: range.start, progress: Instant::now() };
        let pauses = || {
            let pauses = ExponentialBuilder::default().with_jitter().without_max_times();
            pauses.with_min_delay(MIN_PAUSE).with_max_delay(MAX_PAUSE).build()
        };
        let mut pause = pauses();
        while got.at < range.end {
            let before = got.at;
            let Err(failure) = self.attempt(&mut got, range.end).await else { break };
            match failure {
                Failure::Source(error) if error.may_pass() => {
                    if got.at > before {
                        pause = pauses();
                    }
                    let until = Instant::now() + pause.next().unwrap_or(MAX_PAUSE);
                    if until >= got.progress + self.deadline {
                        return Err(self.late(&error.to_string()));
                    }
                    sleep(until - Instant::now()).await;
                }
                Failure::Source(source) => {
                    return Err(LayerError::Source { digest: self.digest, source });
                }
                Failure::Silence => return Err(self.late("it gave no answer")),
            }
        }
        Ok(())
    }

    /// One request for what is missing.
    async fn attempt(&self, got: &mut Got<'_, impl Pieces>, end: u64) -> Result<(), Failure> {
        let silence = |_| Failure::Silence;
        let request = self.source.fetch(got.at..end, Urgency::Demand);
        let answer = timeout_at(got.progress + self.deadline, request).await.map_err(silence)?;
        let mut stream = answer.map_err(Failure::Source)?;
        loop {
            let next = timeout_at(got.progress + self.deadline, stream.next()).await;
            match next.map_err(silence)? {
                Some(piece) => got.take(piece.map_err(Failure::Source)?.bytes).await,
                None if got.at == end => return Ok(()),
                None => return Err(Failure::Source(self.wrong_length(got.at, end))),
            }
        }
    }

    fn wrong_length(&self, at: u64, end: u64) -> SourceError {
        SourceError::BadAnswer {
            source_name: self.source.name().to_owned(),
            what: format!("blob {}", self.digest),
            message: format!("the answer ended at byte {at} instead of {end}"),
        }
    }

    fn late(&self, cause: &str) -> LayerError {
        LayerError::Deadline {
            digest: self.digest,
            source_name: self.source.name().to_owned(),
            deadline: self.deadline,
            cause: cause.to_owned(),
        }
    }
}

/// Where pieces go as they come.
pub trait Pieces: Send {
    /// Takes one; until then no other comes.
    fn take(&mut self, piece: Bytes) -> impl Future<Output = ()> + Send;
}

impl Pieces for Vec<Bytes> {
    async fn take(&mut self, piece: Bytes) {
        self.push(piece);
    }
}

impl Pieces for mpsc::Sender<Bytes> {
    async fn take(&mut self, piece: Bytes) {
        // Who does not want any more drops the read.
        let _ = self.send(piece).await;
    }
}

/// What has come of a range.
struct Got<'a, P> {
    pieces: &'a mut P,
    /// The byte of the blob that is wanted next.
    at: u64,
    /// When the last byte was taken.
    progress: Instant,
}

impl<P: Pieces> Got<'_, P> {
    async fn take(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.at = self.at.saturating_add(u64::try_from(piece.len()).unwrap_or(u64::MAX));
            self.pieces.take(piece).await;
        }
        // An empty one is a sign of life.
        self.progress = Instant::now();
    }
}

enum Failure {
    Source(SourceError),
    Silence,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fault, MemorySource};

    const DEADLINE: Duration = Duration::from_secs(30);

    fn remote(source: &Arc<MemorySource>) -> Remote {
        let source: Arc<dyn Source> = Arc::clone(source) as _;
        Remote { source, digest: Digest::of(b""), deadline: DEADLINE }
    }

    #[tokio::test(start_paused = true)]
    async fn passing_errors_are_survived_and_bytes_come_once() {
        let source = MemorySource::new((0..=255).collect());
        source.fail_next([Fault::Refuse, Fault::CutAfter(10), Fault::CutAfter(7)]);
        let read = remote(&source).read(20..120).await.unwrap().concat();
        assert_eq!(read, (20..120).collect::<Vec<u8>>());
        assert_eq!(source.requests(), [20..120, 20..120, 30..120, 37..120]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_stays_away_is_given_up_at_the_deadline() {
        let source = MemorySource::new(vec![0; 100]);
        source.fail_always(Fault::Refuse);
        let started = Instant::now();
        let error = remote(&source).read(0..100).await.unwrap_err();
        assert!(matches!(&error, LayerError::Deadline { cause, .. } if cause.contains("refused")));
        assert!(started.elapsed() <= DEADLINE);
        assert!(source.requests().len() > 10, "it was asked again and again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_hangs_is_given_up_at_the_deadline() {
        for fault in [Fault::Hang, Fault::HangAfter(10)] {
            let source = MemorySource::new(vec![0; 100]);
            source.fail_always(fault);
            let started = Instant::now();
            let error = remote(&source).read(0..100).await.unwrap_err();
            assert!(matches!(error, LayerError::Deadline { .. }), "{error}");
            assert_eq!(started.elapsed(), DEADLINE);
        }
    }

    #[tokio::test]
    async fn an_error_that_does_not_pass_ends_the_read_at_once() {
        let source = MemorySource::new(vec![0; 100]);
        source.fail_always(Fault::NotFound);
        let error = remote(&source).read(0..100).await.unwrap_err();
        assert!(matches!(error, LayerError::Source { .. }), "{error}");
        assert_eq!(source.requests().len(), 1);
    }
}
