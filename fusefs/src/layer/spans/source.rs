//! Decompressed bytes of a layer, from a source of the compressed ones.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::{Buf as _, Bytes};
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt as _};
use weightfs_store::{ByteStream, Piece, Source, SourceError, SourceKind, Urgency, in_order};

use super::decoder::Decoder;
use super::points::Points;

/// Fetches and inflates the spans that are asked for.
#[derive(Debug)]
pub(in crate::layer) struct InflatedSource {
    compressed: Arc<dyn Source>,
    points: Arc<Points>,
}

impl InflatedSource {
    pub(in crate::layer) fn new(compressed: Arc<dyn Source>, points: Arc<Points>) -> Self {
        Self { compressed, points }
    }

    fn bad(&self, message: &str) -> SourceError {
        SourceError::BadAnswer {
            source_name: self.compressed.name().to_owned(),
            what: "a compressed span".to_owned(),
            message: message.to_owned(),
        }
    }

    async fn open(&self, range: Range<u64>, urgency: Urgency) -> Result<ByteStream, SourceError> {
        let outside = || self.bad("no access point covers it");
        let span = self.points.span(&range).ok_or_else(outside)?;
        let decoder = span.decoder().map_err(|error| self.bad(&error.to_string()))?;
        let body = match self.compressed.fetch(span.blob.clone(), urgency).await {
            // The host gives all or nothing, and whoever begins at the start takes all.
            Err(SourceError::NoRanges { .. }) if range.start == 0 => {
                let whole = in_order(Arc::clone(&self.compressed), self.points.blob_bytes());
                whole.fetch(span.blob.clone(), urgency).await?
            }
            answer => answer?,
        };
        let inflating = Inflating {
            body,
            decoder,
            pending: Bytes::new(),
            from: SourceKind::Registry,
            skip: range.start - span.content(),
            left: range.end - range.start,
            source_name: self.compressed.name().to_owned(),
        };
        Ok(stream::try_unfold(inflating, Inflating::next).boxed())
    }
}

impl Source for InflatedSource {
    fn name(&self) -> &str {
        self.compressed.name()
    }

    fn host(&self) -> &str {
        self.compressed.host()
    }

    fn fetch(
        &self,
        range: Range<u64>,
        urgency: Urgency,
    ) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        Box::pin(self.open(range, urgency))
    }
}

/// A span on its way.
struct Inflating {
    body: ByteStream,
    decoder: Decoder,
    /// What came and is not inflated yet, and from whom.
    pending: Bytes,
    from: SourceKind,
    /// Bytes that come before what was asked for, and bytes of that.
    skip: u64,
    left: u64,
    source_name: String,
}

impl Inflating {
    /// The next bytes. Inflating them takes about as long as the write that follows: too short
    /// to hand it to another thread.
    async fn next(mut self) -> Result<Option<(Piece, Self)>, SourceError> {
        while self.left > 0 {
            let step = self.decoder.step(&self.pending).map_err(|error| self.bad(&error))?;
            self.pending.advance(step.consumed.min(self.pending.len()));
            let produced = self.decoder.bytes(&step.produced);
            let skipped = self.skip.min(produced.len() as u64);
            self.skip -= skipped;
            let wanted = produced.get(usize::try_from(skipped).unwrap_or(usize::MAX)..);
            let wanted = wanted.unwrap_or_default();
            let count = wanted.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
            if let Some(wanted @ [_, ..]) = wanted.get(..count) {
                let bytes = Bytes::copy_from_slice(wanted);
                self.left -= bytes.len() as u64;
                return Ok(Some((Piece { bytes, from: self.from }, self)));
            }
            if step.consumed == 0 && step.produced.is_empty() {
                match self.body.next().await {
                    Some(piece) => Piece { bytes: self.pending, from: self.from } = piece?,
                    None => {
                        let error = io::Error::from(io::ErrorKind::UnexpectedEof);
                        return Err(self.bad(&error));
                    }
                }
            }
        }
        Ok(None)
    }

    fn bad(&self, error: &io::Error) -> SourceError {
        SourceError::BadAnswer {
            source_name: self.source_name.clone(),
            what: "a compressed span".to_owned(),
            message: format!("it can't be decompressed: {error}"),
        }
    }
}

#[cfg(test)]
mod tests;
