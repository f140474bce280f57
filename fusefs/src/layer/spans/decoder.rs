//! A decompressor that is driven step by step, and says where another could go on.

use std::fmt;
use std::io;
use std::ops::Range;

use zstd::stream::raw::{Decoder as ZstdDecoder, Operation as _};

use super::gunzip::Gunzip;
use crate::artifact::Compression;

/// Bytes that a step gives at the most.
const OUTPUT_BYTES: usize = 256 << 10;

/// What a step did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::layer) struct Step {
    /// Bytes of the input that are not to be given again.
    pub(in crate::layer) consumed: usize,
    /// See [`Decoder::bytes`].
    pub(in crate::layer) produced: Range<usize>,
}

/// Decompresses a stream.
pub(in crate::layer) enum Decoder {
    Plain(Vec<u8>),
    Gzip(Gunzip),
    Zstd(Unzstd),
}

/// Zstd frames, one after the other.
pub(in crate::layer) struct Unzstd {
    decoder: ZstdDecoder<'static>,
    buffer: Vec<u8>,
    /// Whether it is before or between frames.
    between: bool,
}

impl Decoder {
    /// At the start of a stream.
    pub(in crate::layer) fn new(compression: Compression) -> io::Result<Self> {
        match compression {
            Compression::Gzip => Ok(Self::Gzip(Gunzip::new())),
            Compression::Zstd => Ok(Self::Zstd(Unzstd {
                decoder: ZstdDecoder::new()?,
                buffer: vec![0; OUTPUT_BYTES],
                between: true,
            })),
            Compression::None => Ok(Self::Plain(vec![])),
        }
    }

    /// Goes on at a point of a gzip stream.
    pub(super) fn resume_gzip(num_bits: u8, bit_buf: u8, window: &[u8]) -> io::Result<Self> {
        Gunzip::resume(num_bits, bit_buf, window).map(Self::Gzip)
    }

    /// Takes some of `input` and gives some bytes. One that did neither needs more input.
    pub(in crate::layer) fn step(&mut self, input: &[u8]) -> io::Result<Step> {
        match self {
            Self::Plain(buffer) => {
                buffer.clear();
                buffer.extend(input.iter().take(OUTPUT_BYTES));
                Ok(Step { consumed: buffer.len(), produced: 0..buffer.len() })
            }
            Self::Gzip(gunzip) => gunzip.step(input),
            Self::Zstd(Unzstd { decoder, buffer, between }) => {
                if *between && input.is_empty() {
                    return Ok(Step { consumed: 0, produced: 0..0 });
                }
                let status = decoder.run_on_buffers(input, buffer)?;
                *between = status.remaining == 0;
                Ok(Step { consumed: status.bytes_read, produced: 0..status.bytes_written })
            }
        }
    }

    /// What the last step gave.
    pub(in crate::layer) fn bytes(&self, produced: &Range<usize>) -> &[u8] {
        match self {
            Self::Plain(buffer) => buffer.get(produced.clone()).unwrap_or_default(),
            Self::Gzip(gunzip) => gunzip.bytes(produced),
            Self::Zstd(unzstd) => unzstd.buffer.get(produced.clone()).unwrap_or_default(),
        }
    }

    /// Bits and window with which another can go on from here, if one can.
    pub(super) fn point(&self) -> Option<(u8, u8, &[u8])> {
        match self {
            Self::Plain(_) => None,
            Self::Gzip(gunzip) => gunzip.point(),
            Self::Zstd(unzstd) => unzstd.between.then_some((0, 0, &[])),
        }
    }

    /// Whether the input may end here.
    pub(in crate::layer) fn may_end(&self) -> bool {
        match self {
            Self::Plain(_) => true,
            Self::Gzip(gunzip) => gunzip.may_end(),
            Self::Zstd(unzstd) => unzstd.between,
        }
    }
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Plain(_) => "Plain",
            Self::Gzip(_) => "Gzip",
            Self::Zstd(_) => "Zstd",
        };
        f.debug_tuple(name).finish_non_exhaustive()
    }
}
