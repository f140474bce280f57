//! Walking a tar by its headers, without reading its members and without doing any input itself.
//!
//! [`Walker::needs`] says which bytes come next, [`Walker::feed`] takes them; what lies between is
//! content. So one walker serves ranged reads of a remote tar and a stream that is being inflated.
//! It reads what Go's archive/tar (and so containerd) reads: ustar, old (V7), GNU and pax tars;
//! global extended headers are ignored as containerd ignores them.
//!
//! Invariants: each `feed` moves the position on, so a walk ends; what is kept of foreign bytes is
//! bounded by [`MAX_ENTRIES`] and [`MAX_TEXT_BYTES`]; a file's range is inside the archive.

mod header;
mod pax;

use std::ops::Range;

pub use header::BLOCK_BYTES;
use header::{Basic, HeaderError};
use pax::Pax;

use crate::listing::{Entry, EntryKind};
use crate::path::{MAX_PATH_BYTES, shown};
use crate::tree::Timestamp;

/// Members of one tar at the most. The largest images that are in use have some hundred thousand;
/// two million of them take about half a GiB while they are merged.
pub const MAX_ENTRIES: usize = 1 << 21;

/// Bytes of one extended header or GNU long name at the most, as in Go's archive/tar.
pub const MAX_METADATA_BYTES: u64 = 1 << 20;

/// Bytes of names, link targets and attributes of one tar at the most: 100 for each of 600,000
/// members.
pub const MAX_TEXT_BYTES: usize = 64 << 20;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Why a tar can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    /// It ends too early.
    #[error("the tar ends at byte {offset}, in the middle of {inside}; push the layer again")]
    Truncated {
        /// Bytes that there are.
        offset: u64,
        /// What is cut.
        inside: String,
    },
    /// A header's checksum is wrong: this is no tar, or a damaged one.
    #[error("there is no tar header at byte {offset} (bad checksum); push the layer again")]
    Checksum {
        /// Where the header should be.
        offset: u64,
    },
    /// A header that breaks the format.
    #[error("the tar header at byte {offset} is malformed: {what}")]
    Malformed {
        /// Where the header is.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// A sparse file, whose bytes are not in one place.
    #[error(
        "{path:?} in the tar is a sparse file, which can't be read in place; pack it again without --sparse"
    )]
    Sparse {
        /// The member's name.
        path: String,
    },
    /// A member that is no file, directory, link, device or fifo.
    #[error(
        "{path:?} in the tar is of type {typeflag:?}, which is not supported; pack it again without it"
    )]
    Unsupported {
        /// The member's name.
        path: String,
        /// The type in its header.
        typeflag: char,
    },
    /// More than a bound allows.
    #[error("the tar has more than {limit} {what} (at byte {offset})")]
    TooMuch {
        /// Where it was noticed.
        offset: u64,
        /// What there is too much of.
        what: &'static str,
        /// The bound.
        limit: u64,
    },
}

/// A walk through one tar.
#[derive(Debug)]
pub struct Walker {
    /// Bytes of the archive, where they are known beforehand.
    size: Option<u64>,
    /// First byte of what is needed next.
    position: u64,
    /// One past the last byte of the member before; what follows up to `position` is padding.
    content_end: u64,
    state: State,
    pending: Pending,
    entries: usize,
    text_bytes: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Header,
    /// One block of zeros was seen; two end the archive.
    LoneZero,
    Metadata(Metadata, u64),
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Metadata {
    Pax,
    GlobalPax,
    LongName,
    LongLink,
}

/// What extended headers say of the next member.
#[derive(Debug, Default)]
struct Pending {
    pax: Option<Pax>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl Walker {
    /// Begins at byte 0 of an archive of `size` bytes, if that is known.
    pub fn new(size: Option<u64>) -> Self {
        Self {
            size,
            position: 0,
            content_end: 0,
            state: State::Header,
            pending: Pending::default(),
            entries: 0,
            text_bytes: 0,
        }
    }

    /// The bytes of the archive that [`Walker::feed`] wants next; `None` after its end.
    pub fn needs(&self) -> Option<Range<u64>> {
        let length = match self.state {
            State::Header | State::LoneZero => BLOCK,
            State::Metadata(_, size) => size,
            State::End => return None,
        };
        // Cannot overflow: `advance` keeps the position below i64::MAX.
        Some(self.position..self.position.saturating_add(length))
    }

    /// Takes the bytes that were needed and gives the member that they complete, if they do.
    ///
    /// # Errors
    /// When the tar is malformed, sparse or over a bound.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Option<Entry>, TarError> {
        let fed = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let wanted = self.needs().map_or(0, |range| range.end - range.start);
        if fed != wanted {
            return Err(self.truncated(self.position.saturating_add(fed)));
        }
        match (self.state, <&[u8; BLOCK_BYTES]>::try_from(bytes)) {
            (State::Metadata(kind, size), _) => {
                self.metadata(kind, bytes)?;
                self.state = State::Header;
                self.advance(size, size)?;
                Ok(None)
            }
            (State::Header | State::LoneZero, Ok(block)) if block.iter().all(|byte| *byte == 0) => {
                self.zeros()
            }
            (State::LoneZero, _) => Err(self.malformed("it follows a lone block of zeros")),
            (State::Header, Ok(block)) => self.header(block),
            (State::Header | State::End, _) => Ok(None),
        }
    }

    /// Says that the archive has only `size` bytes, fewer than were needed. Missing padding and
    /// missing end-of-archive blocks are accepted, as tar and Go do.
    ///
    /// # Errors
    /// When something is cut in the middle.
    pub fn end(&mut self, size: u64) -> Result<(), TarError> {
        let between = matches!(self.state, State::Header | State::LoneZero)
            && self.pending.is_empty()
            && (self.content_end..=self.position).contains(&size);
        if !between && self.state != State::End {
            return Err(self.truncated(size));
        }
        self.state = State::End;
        Ok(())
    }

    fn zeros(&mut self) -> Result<Option<Entry>, TarError> {
        if !self.pending.is_empty() {
            return Err(self.malformed("an extended header is the last thing in the tar"));
        }
        self.state = match self.state {
            State::LoneZero => State::End,
            _ => State::LoneZero,
        };
        self.advance(BLOCK, 0)?;
        Ok(None)
    }

    fn header(&mut self, block: &[u8; BLOCK_BYTES]) -> Result<Option<Entry>, TarError> {
        let offset = self.position;
        let basic = header::read(block).map_err(|error| match error {
            HeaderError::Checksum => TarError::Checksum { offset },
            HeaderError::Number(field) => self.malformed(&format!("bad {field}")),
        })?;
        let kind = match basic.typeflag {
            b'x' => Metadata::Pax,
            b'g' => Metadata::GlobalPax,
            b'L' => Metadata::LongName,
            b'K' => Metadata::LongLink,
            _ => return self.member(basic).map(Some),
        };
        if basic.size > MAX_METADATA_BYTES {
            return Err(self.too_much("bytes in one extended header", MAX_METADATA_BYTES));
        }
        self.advance(BLOCK, 0)?;
        self.state = State::Metadata(kind, basic.size);
        Ok(None)
    }

    fn metadata(&mut self, kind: Metadata, bytes: &[u8]) -> Result<(), TarError> {
        match kind {
            Metadata::Pax => {
                self.pending.pax = Some(pax::read(bytes).map_err(|what| self.malformed(what))?);
            }
            Metadata::GlobalPax => {}
            Metadata::LongName => self.pending.long_name = Some(until_nul(bytes)),
            Metadata::LongLink => self.pending.long_link = Some(until_nul(bytes)),
        }
        Ok(())
    }

    fn member(&mut self, basic: Basic) -> Result<Entry, TarError> {
        let pending = std::mem::take(&mut self.pending);
        let pax = pending.pax.unwrap_or_default();
        let path = pending.long_name.or(pax.path).unwrap_or(basic.path);
        let link = pending.long_link.or(pax.link).unwrap_or(basic.link);
        if pax.sparse || basic.typeflag == b'S' {
            return Err(TarError::Sparse { path: shown(&path) });
        }
        if path.len() > MAX_PATH_BYTES || link.len() > MAX_PATH_BYTES {
            return Err(self.malformed(&format!("a name is longer than {MAX_PATH_BYTES} bytes")));
        }
        let size = pax.size.unwrap_or(basic.size);
        let narrow = |number: u64, name: &str| {
            u32::try_from(number).map_err(|_| self.malformed(&format!("bad {name}")))
        };
        let uid = narrow(pax.uid.unwrap_or(basic.uid), "uid")?;
        let gid = narrow(pax.gid.unwrap_or(basic.gid), "gid")?;
        let data = self.position.saturating_add(BLOCK);
        let kind = match basic.typeflag {
            0 if path.ends_with(b"/") => EntryKind::Directory,
            0 | b'0' | b'7' => EntryKind::File(data..data.saturating_add(size)),
            b'1' => EntryKind::HardLink(link),
            b'2' => EntryKind::Symlink(link),
            b'3' => EntryKind::CharDevice(basic.device),
            b'4' => EntryKind::BlockDevice(basic.device),
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => {
                let typeflag = char::from(other);
                return Err(TarError::Unsupported { path: shown(&path), typeflag });
            }
        };
        // Only files have content, whatever the size field of another member says (Go: headerOnly).
        let content = if matches!(basic.typeflag, 0 | b'0' | b'7') { size } else { 0 };
        let entry = Entry {
            path,
            kind,
            permissions: u16::try_from(basic.mode & 0o7777).unwrap_or_default(),
            uid,
            gid,
            mtime: pax.mtime.unwrap_or(Timestamp { seconds: basic.mtime, nanos: 0 }),
            xattrs: pax.xattrs,
        };
        self.count(&entry)?;
        self.pass_content(&entry, content)?;
        Ok(entry)
    }

    fn count(&mut self, entry: &Entry) -> Result<(), TarError> {
        let link = match &entry.kind {
            EntryKind::HardLink(target) | EntryKind::Symlink(target) => target.len(),
            _ => 0,
        };
        let xattrs = entry.xattrs.iter().map(|(name, value)| name.len() + value.len());
        self.text_bytes += entry.path.len() + link + xattrs.sum::<usize>();
        self.entries += 1;
        if self.entries > MAX_ENTRIES {
            return Err(self.too_much("members", MAX_ENTRIES as u64));
        }
        if self.text_bytes > MAX_TEXT_BYTES {
            return Err(self.too_much("bytes of names and attributes", MAX_TEXT_BYTES as u64));
        }
        Ok(())
    }

    /// Goes on behind a member's header and content.
    fn pass_content(&mut self, entry: &Entry, content: u64) -> Result<(), TarError> {
        let end = self.position.checked_add(BLOCK).and_then(|start| start.checked_add(content));
        if let Some(size) = self.size
            && end.is_none_or(|end| end > size)
        {
            let inside = format!("{:?}, which has {content} bytes", shown(&entry.path));
            return Err(TarError::Truncated { offset: size, inside });
        }
        self.advance(BLOCK, 0)?;
        self.advance(content, content)
    }

    /// Moves on by `length` bytes and their padding; `content` of them must be there.
    fn advance(&mut self, length: u64, content: u64) -> Result<(), TarError> {
        let next = length.checked_next_multiple_of(BLOCK);
        let next = next.and_then(|length| self.position.checked_add(length));
        let Some(next) = next.filter(|next| *next < i64::MAX.cast_unsigned()) else {
            return Err(self.malformed("its size is beyond any tar"));
        };
        self.content_end = if content == 0 { next } else { self.position + content };
        self.position = next;
        Ok(())
    }

    fn truncated(&self, offset: u64) -> TarError {
        let inside = match self.state {
            State::Header if offset < self.content_end => "a file's content",
            State::Header | State::LoneZero => "a header",
            State::Metadata(..) => "an extended header",
            State::End => "the padding after its end",
        };
        TarError::Truncated { offset, inside: inside.to_owned() }
    }

    fn malformed(&self, what: &str) -> TarError {
        TarError::Malformed { offset: self.position, what: what.to_owned() }
    }

    fn too_much(&self, what: &'static str, limit: u64) -> TarError {
        TarError::TooMuch { offset: self.position, what, limit }
    }
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.pax.is_none() && self.long_name.is_none() && self.long_link.is_none()
    }
}

fn until_nul(bytes: &[u8]) -> Vec<u8> {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
}

#[cfg(test)]
pub(crate) mod fuzz;
#[cfg(test)]
pub(crate) mod tests;
