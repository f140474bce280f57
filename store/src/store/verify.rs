//! Hashing again what the cache files hold, on request: chunk by chunk where there are digests of
//! them, else as a whole.

use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::{Store, read_layout};
use crate::blob::Compared;
use crate::chunk::each;
use crate::hash::judge;
use crate::state::Verdict;
use crate::trust::Settled;
use crate::{Blob, BlobId, Digest, Form, OpenError, ReadError};

/// What came of hashing a blob again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checked {
    /// It hashes to its digest, or what is here of it, chunk by chunk, to theirs.
    Good,
    /// It does not: nothing of it is served from now on.
    Bad {
        /// The digest that its bytes have.
        actual: Digest,
    },
    /// Some chunks were not what their digests promise. They are gone from the cache, and are
    /// fetched again when they are read.
    BadChunks {
        /// How many.
        count: u64,
        /// Whether the others are all here.
        others: Others,
    },
    /// Not all of it is here, and there is no digest but that of the whole.
    Partial,
    /// It was inflated here, from bytes that matched their digest; it has none of its own.
    NoDigest,
    /// It is not in the cache.
    Absent,
}

/// What is here of a blob beside its bad chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// All of it.
    Here,
    /// Not all of it.
    Missing,
}

/// Why a blob could not be hashed.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// It can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

impl Store {
    /// Reads all of a blob and compares its digest, or what is here of it and compares the digest
    /// of each chunk where they are known; `progress` is told how many bytes were hashed
    /// since its last call. A blob that does not match is poisoned, as if it had just been
    /// fetched so; one that was poisoned before is not read again. Blocks, as reading does.
    ///
    /// # Errors
    /// When it can't be opened or read.
    pub fn verify(
        self: &Arc<Self>,
        id: BlobId,
        mut progress: impl FnMut(u64),
    ) -> Result<Checked, VerifyError> {
        let dir = self.catalog.dir(id);
        let opened = self.catalog.opened(id);
        let blob = match (opened, read_layout(&dir)) {
            (Some(blob), _) => blob,
            (None, Some(layout)) => self.blob(id, &layout)?,
            (None, None) => return Ok(Checked::Absent),
        };
        if let Some(Verdict::Poisoned { actual }) = blob.verdict() {
            return Ok(Checked::Bad { actual });
        }
        if blob.has_digests() {
            return Ok(compare(&blob, &mut progress)?);
        }
        if id.form == Form::Decompressed {
            return Ok(Checked::NoDigest);
        }
        let era = blob.era();
        let hashed = hash(&blob, &mut progress)?;
        let Some((actual, chunks)) = hashed else { return Ok(Checked::Partial) };
        match judge(&blob, actual, &chunks, era) {
            // A part of it was evicted and fetched again meanwhile.
            Settled::Outdated => Ok(Checked::Partial),
            Settled::Now | Settled::Before if actual == id.digest => Ok(Checked::Good),
            Settled::Now | Settled::Before => Ok(Checked::Bad { actual }),
        }
    }
}

/// Compares each chunk that is here. One that somebody has in use for long can't be taken away:
/// then all of the blob is bad.
fn compare(blob: &Arc<Blob>, progress: &mut dyn FnMut(u64)) -> Result<Checked, ReadError> {
    let failed = |cause| ReadError::Cache { digest: blob.id().digest, cause: Arc::new(cause) };
    let (mut count, mut others) = (0, Others::Here);
    for chunk in each(&blob.table().all()) {
        match blob.compare(chunk).map_err(failed)? {
            Compared::Fits => {}
            Compared::Wrong => count += 1,
            Compared::Nothing => {
                others = Others::Missing;
                continue;
            }
        }
        progress(blob.table().len_of(chunk));
    }
    Ok(match blob.verdict() {
        Some(Verdict::Poisoned { actual }) => Checked::Bad { actual },
        _ if count > 0 => Checked::BadChunks { count, others },
        _ => Checked::Good,
    })
}

/// The digest of all bytes, and those of the chunks where they are kept; `None` if some are missing.
fn hash(
    blob: &Arc<Blob>,
    progress: &mut dyn FnMut(u64),
) -> Result<Option<(Digest, Vec<u8>)>, ReadError> {
    let (mut hasher, mut chunks) = (Sha256::new(), Vec::new());
    for chunk in each(&blob.table().all()) {
        let Some(bytes) = blob.chunk_bytes(chunk)? else { return Ok(None) };
        hasher.update(&*bytes);
        if blob.keeps_digests() {
            chunks.extend_from_slice(Digest::of(&bytes).as_raw());
        }
        progress(bytes.len() as u64);
    }
    Ok(Some((Digest::from_raw(hasher.finalize().into()), chunks)))
}
