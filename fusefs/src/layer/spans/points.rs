//! Access points: made while a stream is decompressed, stored, and checked when they are read.
//!
//! Stored: their number (u32), 24 bytes for each (offset in the content, u64; in the blob, u64;
//! bytes of its window as stored, u32; bits, u8; their value, u8; two zeros), then the windows.

use std::io;
use std::ops::Range;

use bytes::{BufMut as _, Bytes, BytesMut};
use miniz_oxide::deflate::compress_to_vec;
use miniz_oxide::inflate::decompress_to_vec_with_limit;

use super::decoder::Decoder;
use super::gunzip::WINDOW_BYTES;
use crate::artifact::Compression;

/// Content between two points at the least: what is fetched and inflated for a small read. A
/// point takes some 10 KiB, so half of a hundredth of the content at the most.
const SPAN_BYTES: u64 = 2 << 20;

/// Bytes of all points at the most: they are read whole. Layers that need more (some 40 GB) are
/// not read in part.
const MAX_POINTS_BYTES: usize = 200 << 20;

/// How hard windows are compressed: beyond this it takes longer and gains little.
const LEVEL: u8 = 6;

const ENTRY_BYTES: usize = 24;

/// Gathers points while a stream is decompressed.
#[derive(Debug, Default)]
pub(in crate::layer) struct Collector {
    count: u32,
    last: u64,
    table: BytesMut,
    windows: BytesMut,
}

impl Collector {
    /// To be called between steps: so much of the content was given, so much of the blob taken.
    pub(in crate::layer) fn note(&mut self, decoder: &Decoder, content: u64, blob: u64) {
        let due = self.count == 0 || content - self.last >= SPAN_BYTES;
        if !due || self.windows.len() + self.table.len() > MAX_POINTS_BYTES {
            return;
        }
        let Some((bits, value, window)) = decoder.point() else { return };
        let window = match window {
            [] => vec![],
            window => compress_to_vec(window, LEVEL),
        };
        self.table.put_u64_le(content);
        self.table.put_u64_le(blob);
        self.table.put_u32_le(u32::try_from(window.len()).unwrap_or(u32::MAX));
        self.table.put_slice(&[bits, value, 0, 0]);
        self.windows.put_slice(&window);
        self.count += 1;
        self.last = content;
    }

    /// As they are stored, where the content has ended at `content`; nothing if there is but one,
    /// or there were too many.
    pub(in crate::layer) fn finish(mut self, content: u64) -> Bytes {
        if self.count > 0 && self.last == content {
            // The end of the last frame; nothing begins there, and it has no window.
            self.count -= 1;
            self.table.truncate(self.table.len() - ENTRY_BYTES);
        }
        if self.count < 2 || self.windows.len() + self.table.len() > MAX_POINTS_BYTES {
            return Bytes::new();
        }
        let mut bytes = BytesMut::with_capacity(4 + self.table.len() + self.windows.len());
        bytes.put_u32_le(self.count);
        bytes.put_slice(&self.table);
        bytes.put_slice(&self.windows);
        bytes.freeze()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Point {
    content: u64,
    blob: u64,
    bits: u8,
    value: u8,
    window: Range<usize>,
}

/// The points of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::layer) struct Points {
    points: Vec<Point>,
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
        let (mut points, mut at) = (Vec::with_capacity(count), 0usize);
        for entry in table.as_chunks::<ENTRY_BYTES>().0 {
            let point = Point::decode(entry, at).ok_or("its access points are malformed")?;
            at = point.window.end;
            points.push(point);
        }
        let ascending = points
            .iter()
            .zip(points.iter().skip(1))
            .all(|(point, next)| point.content < next.content && point.blob < next.blob);
        let first = points.first().is_some_and(|first| first.content == 0);
        let last = points.last();
        let inside =
            last.is_some_and(|last| last.content < content_bytes && last.blob < blob_bytes);
        let zstd = compression == Compression::Zstd;
        let plain = !zstd || points.iter().all(|p| p.window.is_empty() && p.bits == 0);
        if !ascending || !first || !inside || !plain || at != windows.len() {
            return Err("its access points contradict each other");
        }
        Ok(Self { points, windows, compression, blob_bytes, content_bytes })
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
        let next = self.points.partition_point(|point| point.content < range.end);
        let end = self.points.get(next).map_or(self.blob_bytes, |point| point.blob);
        Some(Span { points: self, point, blob: point.blob..end })
    }
}

impl Point {
    fn decode(entry: &[u8; ENTRY_BYTES], window: usize) -> Option<Self> {
        let (content, rest) = entry.split_first_chunk::<8>()?;
        let (blob, rest) = rest.split_first_chunk::<8>()?;
        let (len, rest) = rest.split_first_chunk::<4>()?;
        let [bits, value, 0, 0] = *rest else { return None };
        let len = usize::try_from(u32::from_le_bytes(*len)).ok()?;
        (bits < 8).then_some(Self {
            content: u64::from_le_bytes(*content),
            blob: u64::from_le_bytes(*blob),
            bits,
            value,
            window: window..window.checked_add(len)?,
        })
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
