//! Access points: made while a stream is decompressed, stored, and checked when they are read.
//!
//! Between points lie *marks*: places up to which a span can be cut, but not begun. They have no
//! window, so there can be many of them.
//!
//! Stored: their number (u32), 24 bytes for each (offset in the content, u64; in the blob, u64;
//! bytes of its window as stored, u32; bits, u8; their value, u8; whether it is a mark, u8; a zero),
//! then the windows.

use std::io;
use std::ops::Range;

use bytes::{BufMut as _, Bytes, BytesMut};
use miniz_oxide::deflate::compress_to_vec;
use miniz_oxide::inflate::decompress_to_vec_with_limit;

use super::decoder::Decoder;
use super::gunzip::WINDOW_BYTES;
use crate::artifact::Compression;

/// Content between two points at the least, where the content before them has so many bytes at the
/// most: what is inflated, and half of it fetched, beside a small read. A point takes some 10 KiB, so
/// small layers, which are read in small pieces, have them closer together.
const SPAN_BYTES: [(u64, u64); 3] =
    [(256 << 20, 512 << 10), (1 << 30, 1 << 20), (u64::MAX, 2 << 20)];

/// Content between two marks, or points that have no window, at the least.
const MARK_BYTES: u64 = 64 << 10;

/// Bytes of all points at the most: they are read whole. Layers that need more (some 40 GB) are
/// not read in part.
const MAX_POINTS_BYTES: usize = 200 << 20;

/// How hard windows are compressed: beyond this it takes longer and gains little.
const LEVEL: u8 = 6;

const ENTRY_BYTES: usize = 24;

/// Gathers points while a stream is decompressed.
#[derive(Debug, Default)]
pub(in crate::layer) struct Collector {
    found: Vec<Found>,
    last_point: u64,
    bytes: usize,
}

/// A point or a mark, as it is stored.
#[derive(Debug)]
struct Found {
    content: u64,
    blob: u64,
    bits: u8,
    value: u8,
    mark: bool,
    window: Vec<u8>,
}

impl Collector {
    /// To be called between steps: so much of the content was given, so much of the blob taken.
    pub(in crate::layer) fn note(&mut self, decoder: &Decoder, content: u64, blob: u64) {
        let since = |at: Option<u64>| at.map_or(u64::MAX, |at| content - at);
        if since(self.found.last().map(|found| found.content)) < MARK_BYTES
            || self.bytes > MAX_POINTS_BYTES
        {
            return;
        }
        let Some((bits, value, window)) = decoder.point() else { return };
        let due = self.found.is_empty() || content - self.last_point >= span_bytes(content);
        let found = match window {
            [] => Found { content, blob, bits, value, mark: false, window: vec![] },
            window if due => {
                let window = compress_to_vec(window, LEVEL);
                Found { content, blob, bits, value, mark: false, window }
            }
            _ => Found { content, blob, bits: 0, value: 0, mark: true, window: vec![] },
        };
        if !found.mark {
            self.last_point = content;
        }
        self.bytes += ENTRY_BYTES + found.window.len();
        self.found.push(found);
    }

    /// As they are stored, where the content has ended at `content`; nothing if there is but one
    /// point, or there were too many.
    pub(in crate::layer) fn finish(mut self, content: u64) -> Bytes {
        // Nothing begins at the end.
        while self.found.pop_if(|last| last.content == content).is_some() {}
        let points = self.found.iter().filter(|found| !found.mark).count();
        let count = u32::try_from(self.found.len()).ok().filter(|_| points >= 2);
        let Some(count) = count.filter(|_| self.bytes <= MAX_POINTS_BYTES) else {
            return Bytes::new();
        };
        let mut bytes = BytesMut::with_capacity(4 + self.bytes);
        bytes.put_u32_le(count);
        for Found { content, blob, bits, value, mark, window } in &self.found {
            bytes.put_u64_le(*content);
            bytes.put_u64_le(*blob);
            bytes.put_u32_le(u32::try_from(window.len()).unwrap_or(u32::MAX));
            bytes.put_slice(&[*bits, *value, u8::from(*mark), 0]);
        }
        self.found.iter().for_each(|found| bytes.put_slice(&found.window));
        bytes.freeze()
    }
}

/// Content between two points at the least, behind so much of it.
fn span_bytes(content: u64) -> u64 {
    let fits = SPAN_BYTES.iter().find(|(up_to, _)| content < *up_to);
    fits.or(SPAN_BYTES.last()).map_or(0, |(_, bytes)| *bytes)
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Point {
    content: u64,
    blob: u64,
    bits: u8,
    value: u8,
    window: Range<usize>,
}

/// Where a span can end: so much of the content is given by so much of the blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct End {
    content: u64,
    blob: u64,
}

/// The points of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::layer) struct Points {
    points: Vec<Point>,
    /// Of points and marks.
    ends: Vec<End>,
    windows: Bytes,
    compression: Compression,
    /// Bytes of the blob and of its content.
    blob_bytes: u64,
    content_bytes: u64,
}

impl Points {
    /// Reads stored points of a layer of so many bytes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub(in crate::layer) fn parse(
        stored: &Bytes,
        compression: Compression,
        blob_bytes: u64,
        content_bytes: u64,
    ) -> Result<Self, &'static str> {
        let (count, _) = stored.split_first_chunk::<4>().ok_or("its access points are cut")?;
        let count = usize::try_from(u32::from_le_bytes(*count)).unwrap_or(usize::MAX);
        let len = count.checked_mul(ENTRY_BYTES).ok_or("it has too many access points")?;
        let table = stored.get(4..4 + len.min(stored.len())).filter(|table| table.len() == len);
        let table = table.ok_or("its access points are cut")?;
        let windows = stored.slice(4 + len..);
        let (mut points, mut ends, mut at) = (vec![], Vec::with_capacity(count), 0usize);
        for entry in table.as_chunks::<ENTRY_BYTES>().0 {
            let (point, mark) =
                Point::decode(entry, at).ok_or("its access points are malformed")?;
            at = point.window.end;
            ends.push(End { content: point.content, blob: point.blob });
            if !mark {
                points.push(point);
            }
        }
        let ascending = ends
            .iter()
            .zip(ends.iter().skip(1))
            .all(|(end, next)| end.content < next.content && end.blob < next.blob);
        let first = points.first().is_some_and(|first| first.content == 0);
        let last = ends.last();
        let inside =
            last.is_some_and(|last| last.content < content_bytes && last.blob < blob_bytes);
        let zstd = compression == Compression::Zstd;
        let plain = !zstd || points.iter().all(|p| p.window.is_empty() && p.bits == 0);
        if !ascending || !first || !inside || !plain || at != windows.len() {
            return Err("its access points contradict each other");
        }
        Ok(Self { points, ends, windows, compression, blob_bytes, content_bytes })
    }

    /// The size of the compressed stream.
    pub(super) const fn blob_bytes(&self) -> u64 {
        self.blob_bytes
    }

    /// Where to begin, and which bytes of the blob are needed, to get `range` of the content.
    pub(super) fn span(&self, range: &Range<u64>) -> Option<Span<'_>> {
        if range.end > self.content_bytes {
            return None;
        }
        let after = self.points.partition_point(|point| point.content <= range.start);
        let point = self.points.get(after.checked_sub(1)?)?;
        let next = self.ends.partition_point(|end| end.content < range.end);
        let end = self.ends.get(next).map_or(self.blob_bytes, |end| end.blob);
        Some(Span { points: self, point, blob: point.blob..end })
    }
}

impl Point {
    /// A point whose window begins there, or a mark.
    fn decode(entry: &[u8; ENTRY_BYTES], window: usize) -> Option<(Self, bool)> {
        let (content, rest) = entry.split_first_chunk::<8>()?;
        let (blob, rest) = rest.split_first_chunk::<8>()?;
        let (len, rest) = rest.split_first_chunk::<4>()?;
        let [bits, value, mark @ (0 | 1), 0] = *rest else { return None };
        let len = usize::try_from(u32::from_le_bytes(*len)).ok()?;
        let point = Self {
            content: u64::from_le_bytes(*content),
            blob: u64::from_le_bytes(*blob),
            bits,
            value,
            window: window..window.checked_add(len)?,
        };
        let mark = mark == 1;
        (bits < 8 && !(mark && (len, bits, value) != (0, 0, 0))).then_some((point, mark))
    }
}

/// A part of a stream that can be decompressed for itself.
#[derive(Debug)]
pub(super) struct Span<'a> {
    points: &'a Points,
    point: &'a Point,
    /// Its bytes in the blob.
    pub(super) blob: Range<u64>,
}

impl Span<'_> {
    /// The first byte of the content that it gives.
    pub(super) fn content(&self) -> u64 {
        self.point.content
    }

    /// A decoder for its bytes.
    pub(super) fn decoder(&self) -> io::Result<Decoder> {
        let Point { bits, value, window, .. } = self.point;
        if self.points.compression != Compression::Gzip {
            return Decoder::new(self.points.compression);
        }
        let window = match self.points.windows.get(window.clone()).unwrap_or_default() {
            [] => vec![],
            stored => decompress_to_vec_with_limit(stored, WINDOW_BYTES)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?,
        };
        Decoder::resume_gzip(*bits, *value, &window)
    }
}
