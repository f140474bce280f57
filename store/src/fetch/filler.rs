//! The way of a request's bytes into the cache file.
//!
//! Bytes arrive in pieces of any size, often a few KiB. Small writes cost twice the CPU time, and
//! the page cache keeps what they wrote in small folios, which halves the speed of every later
//! read. So pieces are gathered to aligned blocks, and each block is one `pwrite`.
//!
//! Larger blocks make larger folios, which later reads by mmap are a little faster from. Tried with
//! blocks of 1 MiB: mmap reads went from 0.82 to 0.88 of the speed of what comes from the disk in
//! folios of up to 2 MiB, random ones from 0.63 to 0.73, and the memory of a load from 46 to 55 MiB
//! and more, since each request gathers a block. It is not worth that: what is read from the disk
//! again is in large folios anyway. Nor are blocks of 2 MiB, which also span chunks.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use super::queue::Request;
use super::room::affordable;
use crate::budget::Reservation;
use crate::chunk::{ChunkNo, Unfit, VerifiedChunk, each};
use crate::layout::CHUNK_BYTES;
use crate::shared::Entered;
use crate::{Blob, Digest};

/// Bytes of a write, aligned in the file. Measured on ext4 (Linux 6.18): writes of 16, 64 and
/// 256 KiB take 0.32, 0.20 and 0.15 CPU seconds per GB, larger ones no less.
const BLOCK_BYTES: u64 = 256 << 10;

// Blocks never straddle the end of a chunk.
const _: () = assert!(CHUNK_BYTES.is_multiple_of(BLOCK_BYTES));

/// Writes bytes in sequence to a cache file and publishes each chunk that is whole.
pub(super) struct Filler<'a> {
    request: &'a Request,
    room: Reservation<'a>,
    file: File,
    segment: usize,
    /// First byte of the segment.
    origin: u64,
    /// What follows `position` and is not written yet; less than a block.
    gathered: Vec<u8>,
    /// Next byte of the blob to write.
    position: u64,
    end: u64,
    /// The end that the source was asked for.
    asked: u64,
    /// The chunk that is being written.
    chunk: ChunkNo,
    /// Its bytes in the blob.
    covers: Range<u64>,
    /// The first byte of it that was written.
    began: u64,
    /// Of these, where it is to be compared.
    hash: Option<Sha256>,
}

impl<'a> Filler<'a> {
    /// For the chunks of a request from `first` on, as far as there is room.
    pub(super) fn open(
        blob: &Blob,
        request: &'a Request,
        first: ChunkNo,
        room: Reservation<'a>,
    ) -> io::Result<Self> {
        let _entered = blob.enter()?;
        let outside = || io::Error::other("no such chunk");
        let table = blob.table();
        let (segment, covers) = table.bytes_of(first).ok_or_else(outside)?;
        // What is in the file already must not change, also where it is only to be compared.
        let here = each(&(first..request.end())).find(|chunk| blob.is_here(*chunk));
        let end = here.unwrap_or(request.end());
        let end = affordable(blob, first, end, room.left()).end;
        let end = end.0.checked_sub(1).map(ChunkNo);
        let (_, last) = end.and_then(|last| table.bytes_of(last)).ok_or_else(outside)?;
        let whole = table.layout().segment(segment).ok_or_else(outside)?;
        let file = blob.segments().open_to_fill(segment, whole.end - whole.start)?;
        let block = usize::try_from(BLOCK_BYTES.min(last.end - covers.start)).unwrap_or(0);
        Ok(Self {
            request,
            room,
            file,
            segment,
            origin: whole.start,
            gathered: Vec::with_capacity(block),
            position: covers.start,
            end: last.end,
            asked: last.end,
            chunk: first,
            began: covers.start,
            covers,
            hash: blob.has_digests().then(Sha256::new),
        })
    }

    /// What the source is to be asked for.
    pub(super) fn wanted(&self) -> Range<u64> {
        self.position..self.end
    }

    pub(super) fn is_done(&self) -> bool {
        self.position == self.end
    }

    /// Whether the request became shorter than what the source was asked for.
    pub(super) fn was_cut_short(&self) -> bool {
        self.end < self.asked
    }

    /// Bytes that have not come yet.
    pub(super) fn missing(&self) -> u64 {
        (self.end - self.position).saturating_sub(self.gathered.len() as u64)
    }

    /// Takes the next bytes; what is more than was asked for is not used.
    ///
    /// This blocks, on an async worker: a `pwrite` to the page cache takes a few dozen
    /// microseconds, less than handing it to another thread and back. What may take long is the
    /// disk's own pace when the page cache is full of dirty pages, and then it is right to slow
    /// the sources down.
    pub(super) fn take(&mut self, blob: &Arc<Blob>, piece: &[u8]) -> Result<(), Unfit> {
        let mut rest = piece;
        while !rest.is_empty() && !self.is_done() {
            let room = self.block_room();
            if self.gathered.is_empty() && rest.len() >= room {
                let (block, later) = rest.split_at(room);
                self.write(blob, block)?;
                rest = later;
                continue;
            }
            let (now, later) = rest.split_at(rest.len().min(room - self.gathered.len()));
            self.gathered.extend_from_slice(now);
            rest = later;
            if self.gathered.len() == room {
                let block = std::mem::take(&mut self.gathered);
                self.write(blob, &block)?;
                self.gathered = block;
                self.gathered.clear();
            }
        }
        Ok(())
    }

    /// Bytes from the next one to write up to the end of its block, or of its chunk.
    fn block_room(&self) -> usize {
        let block = BLOCK_BYTES - (self.position - self.origin) % BLOCK_BYTES;
        usize::try_from(block.min(self.covers.end - self.position)).unwrap_or(usize::MAX)
    }

    fn write(&mut self, blob: &Arc<Blob>, block: &[u8]) -> Result<(), Unfit> {
        let entered = blob.enter()?;
        let offset = self.position - self.origin;
        blob.segments().write(&self.file, self.segment, block, offset)?;
        if let Some(hash) = &mut self.hash {
            hash.update(block);
        }
        self.room.spend(block.len() as u64);
        self.position += block.len() as u64;
        if self.position == self.covers.end {
            self.land(blob, &entered)?;
            self.request.patience.extend(Instant::now() + blob.fetch_options().deadline);
        }
        Ok(())
    }

    /// Publishes the chunk that was just completed and goes on to the next.
    fn land(&mut self, blob: &Arc<Blob>, entered: &Entered<'_>) -> Result<(), Unfit> {
        let written = self.began..self.position;
        let hash = self.hash.take();
        let promises = blob.promises();
        let verified =
            VerifiedChunk::check(blob.table(), self.chunk, &written, promises.digests(), || {
                hash.map_or_else(
                    || self.hash_again(),
                    |hash| Ok(Digest::from_raw(hash.finalize().into())),
                )
            })?;
        blob.fetcher().publish(blob, &verified, self.request.priority, entered);
        drop(promises);
        self.hash = blob.has_digests().then(Sha256::new);
        self.chunk = self.chunk.next();
        self.began = self.position;
        if self.chunk >= self.request.end() {
            // The rest has become another request's.
            self.end = self.position;
        }
        if !self.is_done() {
            let next = blob.table().bytes_of(self.chunk);
            (_, self.covers) = next.ok_or_else(|| io::Error::other("no such chunk"))?;
        }
        Ok(())
    }

    /// What the chunk that was just written hashes to: its digest came while it was written.
    fn hash_again(&self) -> io::Result<Digest> {
        let len = usize::try_from(self.position - self.began).map_err(io::Error::other)?;
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, self.began - self.origin)?;
        Ok(Digest::of(&bytes))
    }
}
