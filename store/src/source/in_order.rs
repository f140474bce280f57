//! A blob that its host gives only as a whole, from the first byte on: one answer is read in order
//! and serves one range after the other.
//!
//! Ranges that ascend cost one download. What lies between them is thrown away; a range that lies
//! further back begins the download again.

use std::ops::Range;
use std::sync::Arc;

use futures::future::BoxFuture;
use futures::{StreamExt as _, stream};
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::{ByteStream, Piece, Source};
use crate::{SourceError, Urgency};

/// See the module.
#[derive(Debug)]
struct InOrder {
    source: Arc<dyn Source>,
    size: u64,
    cursor: Arc<Mutex<Option<Cursor>>>,
}

/// The answer that is being read.
struct Cursor {
    body: ByteStream,
    /// What came and was not taken yet.
    rest: Option<Piece>,
    /// The offset of the next byte, that of `rest` if there is one.
    position: u64,
}

impl std::fmt::Debug for Cursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cursor").field("position", &self.position).finish_non_exhaustive()
    }
}

/// A range that is being read; the cursor goes back when it was read to its end.
struct Reading {
    place: OwnedMutexGuard<Option<Cursor>>,
    cursor: Cursor,
    range: Range<u64>,
    name: String,
}

/// A source of `size` bytes that ignores ranges, as one that has them. Of several ranges at once
/// one is read after the other, in the order in which they were asked for.
pub fn in_order(source: Arc<dyn Source>, size: u64) -> Arc<dyn Source> {
    Arc::new(InOrder { source, size, cursor: Arc::default() })
}

impl InOrder {
    async fn read(&self, range: Range<u64>, urgency: Urgency) -> Result<ByteStream, SourceError> {
        let mut place = Arc::clone(&self.cursor).lock_owned().await;
        let cursor = match place.take() {
            Some(cursor) if cursor.position <= range.start => cursor,
            _ => {
                let body = self.source.fetch(0..self.size, urgency).await;
                let body = body.map_err(not_even_whole)?;
                Cursor { body, rest: None, position: 0 }
            }
        };
        let name = self.source.name().to_owned();
        let reading = Reading { place, cursor, range, name };
        Ok(stream::unfold(Some(reading), next).boxed())
    }
}

impl Source for InOrder {
    fn name(&self) -> &str {
        self.source.name()
    }

    fn host(&self) -> &str {
        self.source.host()
    }

    fn fetch(
        &self,
        range: Range<u64>,
        urgency: Urgency,
    ) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        Box::pin(self.read(range, urgency))
    }
}

/// Whoever hears that there are no ranges fetches the whole; that is what was tried.
fn not_even_whole(error: SourceError) -> SourceError {
    match error {
        SourceError::NoRanges { source_name, what } => {
            let message = "it is given neither in ranges nor as a whole".into();
            SourceError::BadAnswer { source_name, what, message }
        }
        other => other,
    }
}

async fn next(reading: Option<Reading>) -> Option<(Result<Piece, SourceError>, Option<Reading>)> {
    let mut reading = reading?;
    if reading.cursor.position >= reading.range.end {
        let Reading { mut place, cursor, .. } = reading;
        *place = Some(cursor);
        return None;
    }
    let cursor = &mut reading.cursor;
    let piece = match cursor.rest.take() {
        Some(rest) if !rest.bytes.is_empty() => Some(Ok(rest)),
        _ => cursor.body.next().await,
    };
    match piece {
        Some(Ok(piece)) => Some((Ok(cursor.cut(piece, &reading.range)), Some(reading))),
        Some(Err(error)) => Some((Err(error), None)),
        None => {
            let message = format!("the body ended at byte {}", cursor.position);
            let source_name = reading.name;
            Some((Err(SourceError::Unreachable { source_name, message }), None))
        }
    }
}

impl Cursor {
    /// What of the next bytes is in the range; nothing, as a sign of life, where they lie before.
    fn cut(&mut self, piece: Piece, range: &Range<u64>) -> Piece {
        let Piece { bytes: mut piece, from } = piece;
        let before = range.start.saturating_sub(self.position);
        let before = usize::try_from(before).unwrap_or(usize::MAX).min(piece.len());
        let mut piece = piece.split_off(before);
        self.position += before as u64;
        let wanted = range.end.saturating_sub(self.position);
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX).min(piece.len());
        self.rest = Some(Piece { bytes: piece.split_off(wanted), from });
        self.position += wanted as u64;
        Piece { bytes: piece, from }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    /// Gives all of its bytes in pieces of 7, and counts how often.
    #[derive(Debug, Default)]
    struct Whole(std::sync::atomic::AtomicUsize);

    const SIZE: u64 = 100;

    fn byte(at: u64) -> u8 {
        at as u8
    }

    impl Source for Whole {
        fn name(&self) -> &str {
            "whole"
        }

        fn host(&self) -> &str {
            "whole"
        }

        fn fetch(
            &self,
            range: Range<u64>,
            _urgency: Urgency,
        ) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
            assert_eq!(range, 0..SIZE);
            self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let all: Vec<u8> = range.map(byte).collect();
            let pieces: Vec<_> =
                all.chunks(7).map(|p| Ok(Piece::of_registry(Bytes::copy_from_slice(p)))).collect();
            Box::pin(async move { Ok(stream::iter(pieces).boxed()) })
        }
    }

    async fn read(source: &Arc<dyn Source>, range: Range<u64>) {
        let pieces: Vec<_> =
            source.fetch(range.clone(), Urgency::Demand).await.unwrap().collect().await;
        let bytes: Vec<u8> = pieces.into_iter().flat_map(|piece| piece.unwrap().bytes).collect();
        assert_eq!(bytes, range.map(byte).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn ranges_that_ascend_are_read_from_one_answer() {
        let whole = Arc::new(Whole::default());
        let downloads = || whole.0.load(std::sync::atomic::Ordering::Relaxed);
        let source = in_order(Arc::clone(&whole) as _, SIZE);
        for range in [0..1, 1..30, 30..30, 45..46, 60..99, 99..100] {
            read(&source, range).await;
        }
        assert_eq!(downloads(), 1);
        read(&source, 98..100).await;
        assert_eq!(downloads(), 2);
    }

    #[tokio::test]
    async fn a_range_that_is_given_up_costs_a_new_answer() {
        let whole = Arc::new(Whole::default());
        let source = in_order(Arc::clone(&whole) as _, SIZE);
        let mut body = source.fetch(0..50, Urgency::Demand).await.unwrap();
        assert_eq!(body.next().await.unwrap().unwrap().bytes.len(), 7);
        drop(body);
        read(&source, 10..20).await;
        assert_eq!(whole.0.load(std::sync::atomic::Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn an_answer_that_ends_early_is_an_error() {
        let whole: Arc<dyn Source> = Arc::new(Whole::default());
        let source = Arc::new(InOrder { source: whole, size: SIZE, cursor: Arc::default() });
        let body = source.read(90..SIZE + 5, Urgency::Demand).await.unwrap();
        let pieces: Vec<_> = body.collect().await;
        let error = pieces.last().unwrap().as_ref().unwrap_err();
        assert!(error.to_string().contains("byte 100"), "{error}");
    }
}
