//! Inflating gzip members (RFC 1952) step by step, with a look at block boundaries.
//!
//! The checksum of a member is compared if all of it was inflated here.

use std::io;
use std::ops::Range;

use flate2::Crc;
use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::{
    TINFL_FLAG_HAS_MORE_INPUT, TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY,
    TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
};
use miniz_oxide::inflate::core::{BlockBoundaryState, DecompressorOxide, decompress};

use super::decoder::Step;

/// Bytes that a deflate stream can refer back to (RFC 1951, 2).
pub(super) const WINDOW_BYTES: usize = 32 << 10;
/// Bytes that are inflated in one step at the most.
const OUTPUT_BYTES: usize = 256 << 10;
/// Bytes of a member's header at the most: names and comments have no bound of their own.
const MAX_HEADER_BYTES: usize = 256 << 10;
/// CRC32 and size (RFC 1952, 2.3.1).
const TRAILER_BYTES: usize = 8;

/// Where a decoder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Header,
    Body,
    /// In the body, between two blocks.
    Boundary,
    Trailer,
}

/// Inflates members, one after the other.
pub(in crate::layer) struct Gunzip {
    state: State,
    inflate: Box<DecompressorOxide>,
    /// What was inflated last, after what it may refer back to.
    buffer: Vec<u8>,
    end: usize,
    /// What came of a header or a trailer.
    header: Vec<u8>,
    /// Of the member, from its start on.
    checksum: Option<Crc>,
    /// Whether there was a member.
    begun: bool,
}

impl Gunzip {
    pub(super) fn new() -> Self {
        Self {
            state: State::Header,
            inflate: Box::default(),
            buffer: vec![0; WINDOW_BYTES + OUTPUT_BYTES],
            end: 0,
            header: vec![],
            checksum: None,
            begun: false,
        }
    }

    /// Goes on between two blocks: with bits of the byte before, and what came before.
    pub(super) fn resume(num_bits: u8, bit_buf: u8, window: &[u8]) -> io::Result<Self> {
        let mut new = Self::new();
        let space = new.buffer.get_mut(..window.len().min(WINDOW_BYTES));
        match space.filter(|space| space.len() == window.len() && num_bits < 8) {
            Some(space) => space.copy_from_slice(window),
            None => return Err(malformed("an access point makes no sense")),
        }
        let boundary = BlockBoundaryState { num_bits, bit_buf, ..BlockBoundaryState::default() };
        *new.inflate = DecompressorOxide::from_block_boundary_state(&boundary);
        new.end = window.len();
        new.state = State::Boundary;
        Ok(new)
    }

    /// Takes some of `input`.
    pub(super) fn step(&mut self, input: &[u8]) -> io::Result<Step> {
        match self.state {
            State::Header => self.read_header(input),
            State::Trailer => self.read_trailer(input),
            State::Body | State::Boundary => self.read_body(input),
        }
    }

    fn read_header(&mut self, input: &[u8]) -> io::Result<Step> {
        let before = self.header.len();
        self.header.extend_from_slice(input);
        let Some(len) = header_bytes(&self.header)? else {
            if self.header.len() > MAX_HEADER_BYTES {
                return Err(malformed("a gzip header is too long"));
            }
            return Ok(Step { consumed: input.len(), produced: 0..0 });
        };
        self.header.clear();
        self.checksum = Some(Crc::new());
        self.begun = true;
        *self.inflate = DecompressorOxide::new();
        self.state = State::Boundary;
        Ok(Step { consumed: len.saturating_sub(before), produced: 0..0 })
    }

    fn read_body(&mut self, input: &[u8]) -> io::Result<Step> {
        if self.buffer.len() - self.end < OUTPUT_BYTES / 2 {
            let keep = self.end.saturating_sub(WINDOW_BYTES)..self.end;
            self.end = keep.len();
            self.buffer.copy_within(keep, 0);
        }
        let flags = TINFL_FLAG_HAS_MORE_INPUT
            | TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY
            | TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let start = self.end;
        let (status, consumed, written) =
            decompress(&mut self.inflate, input, &mut self.buffer, start, flags);
        self.end = start + written;
        self.state = match status {
            TINFLStatus::Done => State::Trailer,
            TINFLStatus::BlockBoundary => State::Boundary,
            TINFLStatus::NeedsMoreInput | TINFLStatus::HasMoreOutput => State::Body,
            _ => return Err(malformed("the deflate stream is malformed")),
        };
        let produced = start..self.end;
        if let Some(checksum) = &mut self.checksum {
            checksum.update(self.buffer.get(produced.clone()).unwrap_or_default());
        }
        Ok(Step { consumed, produced })
    }

    fn read_trailer(&mut self, input: &[u8]) -> io::Result<Step> {
        let consumed = (TRAILER_BYTES - self.header.len()).min(input.len());
        self.header.extend(input.iter().take(consumed));
        if let [a, b, c, d, size @ ..] = self.header.as_slice()
            && let Ok(size) = <[u8; 4]>::try_from(size)
        {
            let found = (u32::from_le_bytes([*a, *b, *c, *d]), u32::from_le_bytes(size));
            if let Some(checksum) = self.checksum.take()
                && (checksum.sum(), checksum.amount()) != found
            {
                return Err(malformed("a checksum does not match"));
            }
            self.header.clear();
            self.state = State::Header;
        }
        Ok(Step { consumed, produced: 0..0 })
    }

    pub(super) fn bytes(&self, produced: &Range<usize>) -> &[u8] {
        self.buffer.get(produced.clone()).unwrap_or_default()
    }

    /// What [`Gunzip::resume`] needs, if it is between two blocks.
    pub(super) fn point(&self) -> Option<(u8, u8, &[u8])> {
        if self.state != State::Boundary {
            return None;
        }
        let window = self.buffer.get(self.end.saturating_sub(WINDOW_BYTES)..self.end)?;
        // Before the first block there is no state, and no bit is left over.
        let state = self.inflate.block_boundary_state().unwrap_or_default();
        Some((state.num_bits, state.bit_buf, window))
    }

    /// Whether the input may end here.
    pub(super) fn may_end(&self) -> bool {
        self.begun && self.state == State::Header && self.header.is_empty()
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Bytes of the header that `bytes` begins with; `None` if it is cut.
fn header_bytes(bytes: &[u8]) -> io::Result<Option<usize>> {
    const FHCRC: u8 = 2;
    const FEXTRA: u8 = 4;
    const FNAME: u8 = 8;
    const FCOMMENT: u8 = 16;
    const RESERVED: u8 = 0xe0;
    let start = bytes.get(..3).unwrap_or(bytes);
    if !start.is_empty() && !b"\x1f\x8b\x08".starts_with(start) {
        return Err(malformed("a gzip member begins with something else"));
    }
    let Some((fixed, mut rest)) = bytes.split_first_chunk::<10>() else { return Ok(None) };
    let [_, _, _, flags, ..] = *fixed;
    if flags & RESERVED != 0 {
        return Err(malformed("a gzip header has flags that nobody knows"));
    }
    if flags & FEXTRA != 0 {
        let Some((len, after)) = rest.split_first_chunk::<2>() else { return Ok(None) };
        let Some(after) = after.get(usize::from(u16::from_le_bytes(*len))..) else {
            return Ok(None);
        };
        rest = after;
    }
    for flag in [FNAME, FCOMMENT] {
        if flags & flag != 0 {
            let Some(end) = rest.iter().position(|byte| *byte == 0) else { return Ok(None) };
            rest = rest.get(end + 1..).unwrap_or_default();
        }
    }
    if flags & FHCRC != 0 {
        let Some(after) = rest.get(2..) else { return Ok(None) };
        rest = after;
    }
    Ok(Some(bytes.len() - rest.len()))
}
