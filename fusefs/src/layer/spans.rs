//! Reading compressed layers in part: *access points*, places from which a stream can be
//! decompressed, and a source that gives decompressed bytes by fetching and inflating only the
//! spans between them that are asked for.
//!
//! A point of a gzip stream is a boundary of deflate blocks with the 32 KiB that come before it;
//! one of a zstd stream is the start of a frame. What they are is written down in
//! `docs/index-format.md`.
//!
//! Invariant: points are not trusted. What comes out is compared with chunk digests; points that
//! make no sense make spans that can't be read.

mod decoder;
mod gunzip;
mod points;
mod source;

pub(super) use decoder::Decoder;
pub(super) use points::{Collector, Points};
pub(super) use source::InflatedSource;
