//! Digests of files, read once from front to back.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use sha2::{Digest as _, Sha256};
use weightfs_store::Digest;

const BUFFER_BYTES: usize = 1 << 20;

/// The digest of what a reader gives.
///
/// # Errors
/// What the reader says.
pub fn of_reader(mut reader: impl Read) -> io::Result<Digest> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut hash = Sha256::new();
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(Digest::from_raw(hash.finalize().into())),
            count => hash.update(&buffer[..count]),
        }
    }
}

/// The digest of a file.
///
/// # Errors
/// What the file system says.
pub fn of_file(path: &Path) -> io::Result<Digest> {
    of_reader(File::open(path)?)
}

/// Passes bytes on and hashes them.
#[derive(Debug)]
pub struct Hashing<W> {
    to: W,
    hash: Sha256,
    count: u64,
}

impl<W: Write> Hashing<W> {
    /// Hashes what goes to `to`.
    pub fn new(to: W) -> Self {
        Self { to, hash: Sha256::new(), count: 0 }
    }

    /// What it wrote to, the digest and the number of bytes.
    pub fn finish(self) -> (W, Digest, u64) {
        (self.to, Digest::from_raw(self.hash.finalize().into()), self.count)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.to.write(bytes)?;
        self.hash.update(&bytes[..count]);
        self.count += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}
