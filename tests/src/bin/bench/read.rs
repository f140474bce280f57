//! The ways in which a model is read, each with a check of what was read.
//!
//! The check is a sum over 64-byte blocks that costs a twentieth of a second per gigabyte, so that
//! every timed read can have it. It tells swapped, shifted and zeroed bytes, not an attacker.

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::thread;

use memmap2::Mmap;

/// Bytes of one sequential read: what `cp` and loaders ask for.
const PIECE_BYTES: usize = 1 << 20;

/// Bytes of one random read.
const PAGE_BYTES: usize = 4096;

/// A sum of bytes in which their order counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sum([u64; 8]);

impl Sum {
    /// The sum of nothing.
    pub(crate) const EMPTY: Self = Self([0x9e37_79b9_7f4a_7c15; 8]);

    /// Adds bytes. All calls but a file's last bring a multiple of 64.
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        let (blocks, rest) = bytes.as_chunks::<64>();
        for block in blocks {
            self.add_block(block);
        }
        if !rest.is_empty() {
            let mut last = [0; 64];
            last[..rest.len()].copy_from_slice(rest);
            self.add_block(&last);
        }
    }

    fn add_block(&mut self, block: &[u8; 64]) {
        let (words, _) = block.as_chunks::<8>();
        for (lane, word) in self.0.iter_mut().zip(words) {
            let word = u64::from_le_bytes(*word);
            *lane = (lane.rotate_left(9) ^ word).wrapping_add(word);
        }
    }
}

/// Reads a file from front to back.
pub(crate) fn sequential(path: &Path) -> io::Result<Sum> {
    let file = File::open(path)?;
    let mut piece = vec![0; PIECE_BYTES];
    let mut sum = Sum::EMPTY;
    let mut at = 0;
    loop {
        let count = read_full(&file, &mut piece, at)?;
        sum.add(&piece[..count]);
        at += count as u64;
        if count < piece.len() {
            return Ok(sum);
        }
    }
}

/// Maps a file and copies it from front to back, as loaders do.
pub(crate) fn mapped(path: &Path) -> io::Result<Sum> {
    let map = map(path)?;
    let mut piece = vec![0; PIECE_BYTES];
    let mut sum = Sum::EMPTY;
    for part in map.chunks(PIECE_BYTES) {
        piece[..part.len()].copy_from_slice(part);
        sum.add(&piece[..part.len()]);
    }
    Ok(sum)
}

/// Reads each file in a thread of its own.
pub(crate) fn at_once(paths: &[PathBuf]) -> io::Result<Vec<Sum>> {
    thread::scope(|scope| {
        let readers: Vec<_> =
            paths.iter().map(|path| scope.spawn(move || sequential(path))).collect();
        readers.into_iter().map(|reader| reader.join().expect("the reader's end")).collect()
    })
}

/// Reads pages at these places (file, offset), one after the other.
pub(crate) fn pages(paths: &[PathBuf], places: &[(usize, u64)]) -> io::Result<Vec<Sum>> {
    let files = paths.iter().map(File::open).collect::<io::Result<Vec<_>>>()?;
    let mut page = [0; PAGE_BYTES];
    let mut sums = Vec::with_capacity(places.len());
    for (file, offset) in places {
        files[*file].read_exact_at(&mut page, *offset)?;
        let mut sum = Sum::EMPTY;
        sum.add(&page);
        sums.push(sum);
    }
    Ok(sums)
}

/// Random pages of these files, the same for the same seed.
pub(crate) fn places(paths: &[PathBuf], count: usize, seed: u64) -> io::Result<Vec<(usize, u64)>> {
    let mut random = fastrand::Rng::with_seed(seed);
    let page = PAGE_BYTES as u64;
    let pages = paths.iter().map(|path| Ok(path.metadata()?.len() / page));
    let pages = pages.collect::<io::Result<Vec<_>>>()?;
    let place = |_| {
        let file = random.usize(..paths.len());
        (file, random.u64(..pages[file]) * page)
    };
    Ok((0..count).map(place).collect())
}

/// Reads a file from front to back into one buffer and forgets it: the speed of the path alone.
pub(crate) fn drain(path: &Path) -> io::Result<u64> {
    let file = File::open(path)?;
    let mut piece = vec![0; PIECE_BYTES];
    let mut at = 0;
    loop {
        match file.read_at(&mut piece, at)? {
            0 => return Ok(at),
            count => at += count as u64,
        }
        black_box(&piece);
    }
}

/// Copies a mapped file from front to back into one buffer and forgets it.
pub(crate) fn drain_mapped(path: &Path) -> io::Result<u64> {
    let map = map(path)?;
    let mut piece = vec![0; PIECE_BYTES];
    for part in map.chunks(PIECE_BYTES) {
        piece[..part.len()].copy_from_slice(part);
        black_box(&piece);
    }
    Ok(map.len() as u64)
}

/// Reads pages at these places one after the other and forgets them.
pub(crate) fn drain_pages(paths: &[PathBuf], places: &[(usize, u64)]) -> io::Result<u64> {
    let files = paths.iter().map(File::open).collect::<io::Result<Vec<_>>>()?;
    let mut page = [0; PAGE_BYTES];
    for (file, offset) in places {
        files[*file].read_exact_at(&mut page, *offset)?;
        black_box(&page);
    }
    Ok((places.len() * PAGE_BYTES) as u64)
}

/// Copies mapped pages at these places one after the other and forgets them.
pub(crate) fn drain_mapped_pages(paths: &[PathBuf], places: &[(usize, u64)]) -> io::Result<u64> {
    let maps = paths.iter().map(|path| map(path)).collect::<io::Result<Vec<_>>>()?;
    let mut page = [0; PAGE_BYTES];
    for (file, offset) in places {
        let start = usize::try_from(*offset).map_err(io::Error::other)?;
        page.copy_from_slice(&maps[*file][start..start + PAGE_BYTES]);
        black_box(&page);
    }
    Ok((places.len() * PAGE_BYTES) as u64)
}

fn map(path: &Path) -> io::Result<Mmap> {
    let file = File::open(path)?;
    #[expect(unsafe_code, reason = "mapping a file")]
    // SAFETY: the benchmark's own files and what mounts show of them are not written to.
    unsafe {
        Mmap::map(&file)
    }
}

/// Fills the buffer, or what the file has left.
fn read_full(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64)? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> Sum {
        let mut sum = Sum::EMPTY;
        sum.add(bytes);
        sum
    }

    #[test]
    fn a_sum_tells_swapped_shifted_and_zeroed_blocks() {
        let bytes: Vec<u8> = (0..1024_u32).map(|n| (n * 7 % 251) as u8).collect();
        let mut swapped = bytes.clone();
        swapped.rotate_left(64);
        let mut zeroed = bytes.clone();
        zeroed[512..576].fill(0);
        let mut shifted = bytes.clone();
        shifted.rotate_left(1);
        for other in [swapped, zeroed, shifted] {
            assert_ne!(sum(&other), sum(&bytes));
        }
    }

    #[test]
    fn all_ways_to_read_agree() {
        let dir = tempfile::tempdir().unwrap();
        let paths = [dir.path().join("file")];
        let path = &paths[0];
        let bytes: Vec<u8> = (0..3 * PIECE_BYTES + 77).map(|n| (n % 255) as u8).collect();
        std::fs::write(path, &bytes).unwrap();
        assert_eq!(sequential(path).unwrap(), sum(&bytes));
        assert_eq!(mapped(path).unwrap(), sum(&bytes));
        assert_eq!(at_once(&paths).unwrap(), [sum(&bytes)]);
        assert_eq!(drain(path).unwrap(), bytes.len() as u64);
        assert_eq!(drain_mapped(path).unwrap(), bytes.len() as u64);
        assert_eq!(drain_pages(&paths, &[(0, 4096); 3]).unwrap(), 3 * 4096);
        assert_eq!(drain_mapped_pages(&paths, &[(0, 4096); 3]).unwrap(), 3 * 4096);
        let page = pages(&paths, &[(0, 8192)]).unwrap();
        assert_eq!(page, [sum(&bytes[8192..8192 + PAGE_BYTES])]);
    }
}
