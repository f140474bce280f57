//! The index beside an artifact: for each layer its files and the sha256 of each chunk. With it a
//! mount needs no walk through tars, and every chunk is checked before it is published.
//!
//! The format is written down in `docs/index-format.md`. An index is foreign bytes: it is bounded
//! and checked once, here. Chunk digests are used where they lie: opening the index of a model of
//! 100 GB reads its directory only.
//!
//! An index may have a recorded profile, too: in which order a load touches the layers.
//!
//! Invariants: an index speaks of one manifest; its sections follow each other without a gap and
//! fill it; every layer has one digest for each of its chunks; files don't overlap.

pub mod build;
pub mod find;
pub mod signature;

use bytes::{BufMut as _, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use weightfs_store::{CHUNK_BYTES, Digest, Layout};

use crate::artifact::Compression;
use crate::listing::{EntryKind, Listing};
use crate::profile::Profile;

/// Media type of an index, and artifact type of the manifest that carries it.
pub const MEDIA_TYPE: &str = "application/vnd.weightfs.index.v1";

/// The annotation of a manifest that says the digest of its index: where the manifest is known by
/// its digest, so is the index.
pub const ANNOTATION: &str = "org.weightfs.index";

/// The annotation of the manifest that carries an index with a recorded profile: the profile's
/// digest. Of several indexes such a one is preferred.
pub const PROFILE_ANNOTATION: &str = "org.weightfs.profile";

/// Bytes of an index at the most: 16 TiB of weights in chunks of 1 MiB take half of it.
pub const MAX_INDEX_BYTES: u64 = 1 << 30;

const MAGIC: &[u8; 8] = b"WFSINDEX";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 16;
const DIGEST_BYTES: usize = 32;

/// Layers of an index at the most; as many as a manifest can have.
const MAX_LAYERS: usize = crate::artifact::MAX_LAYERS;

/// Why an index can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// It is no index, or cut.
    #[error("it is no index: {0}")]
    Malformed(String),
    /// Written by a newer program.
    #[error("it has version {found}, but only version {VERSION} is understood; upgrade weightfs")]
    Version {
        /// Its version.
        found: u32,
    },
    /// It is larger than it can be in earnest.
    #[error("it is larger than {MAX_INDEX_BYTES} bytes")]
    TooLarge,
    /// It is about another artifact.
    #[error("it is the index of {found}, not of {wanted}")]
    OtherManifest {
        /// The manifest that it speaks of.
        found: Digest,
        /// The manifest that was asked for.
        wanted: Digest,
    },
    /// What it says of a layer makes no sense.
    #[error("layer {digest}: {why}")]
    Layer {
        /// The layer.
        digest: Digest,
        /// What is wrong.
        why: String,
    },
}

/// An index.
#[derive(Debug, Clone)]
pub struct Index {
    manifest: Digest,
    layers: Vec<LayerIndex>,
    /// Its layers are numbered as they are here.
    profile: Option<Profile>,
}

/// What an index says of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerIndex {
    /// Digest of the blob in the registry.
    pub digest: Digest,
    /// Bytes of the blob in the registry.
    pub size: u64,
    /// How the blob is compressed.
    pub compression: Compression,
    /// Digest of the decompressed bytes; the blob's own if it is not compressed.
    pub content_digest: Digest,
    /// Its files and cuts; decompressed, if it is compressed. Empty for a raw layer.
    pub listing: Listing,
    /// The sha256 of each chunk, one after the other.
    pub chunk_digests: Bytes,
    /// Where a compressed blob can be read in part, as it is stored; empty where it can't.
    pub points: Bytes,
}

/// The part of an index that is read when it is opened.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Directory {
    manifest: Digest,
    layers: Vec<Row>,
    /// Bytes of the recorded profile, which is the last section.
    #[serde(default, skip_serializing_if = "is_zero")]
    profile_bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    digest: Digest,
    size: u64,
    compression: Compression,
    content_digest: Digest,
    chunk_bytes: u64,
    /// Bytes of the sections of this layer, in the order in which they lie in the index.
    listing_bytes: u64,
    chunks_bytes: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    points_bytes: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "what serde calls it with")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Index {
    /// The index of an artifact.
    pub fn new(manifest: Digest, layers: Vec<LayerIndex>) -> Self {
        Self { manifest, layers, profile: None }
    }

    /// With a profile of a load of an artifact that has the layers `of`.
    #[must_use]
    pub fn with_profile(self, profile: &Profile, of: &[Digest]) -> Self {
        let profile = profile.moved(self.manifest, of, &self.digests());
        Self { profile: Some(profile), ..self }
    }

    /// Its profile, for the artifact with that manifest that has the layers `of`.
    pub fn profile_of(&self, manifest: Digest, of: &[Digest]) -> Option<Profile> {
        self.profile.as_ref().map(|profile| profile.moved(manifest, &self.digests(), of))
    }

    fn digests(&self) -> Vec<Digest> {
        self.layers.iter().map(|layer| layer.digest).collect()
    }

    /// What it says of a layer.
    pub fn layer(&self, digest: Digest) -> Option<&LayerIndex> {
        self.layers.iter().find(|layer| layer.digest == digest)
    }

    /// All layers.
    pub fn layers(&self) -> &[LayerIndex] {
        &self.layers
    }

    /// The index as bytes; the same index gives the same bytes.
    ///
    /// # Errors
    /// When it would be over its bound.
    pub fn to_bytes(&self) -> Result<Bytes, IndexError> {
        let listings: Vec<_> = self.layers.iter().map(|layer| layer.listing.to_bytes()).collect();
        let rows = self.layers.iter().zip(&listings).map(|(layer, listing)| Row {
            digest: layer.digest,
            size: layer.size,
            compression: layer.compression,
            content_digest: layer.content_digest,
            chunk_bytes: CHUNK_BYTES,
            listing_bytes: listing.len() as u64,
            chunks_bytes: layer.chunk_digests.len() as u64,
            points_bytes: layer.points.len() as u64,
        });
        let profile = self.profile.as_ref().map(Profile::encode).unwrap_or_default();
        let directory = Directory {
            manifest: self.manifest,
            layers: rows.collect(),
            profile_bytes: profile.len() as u64,
        };
        let directory = serde_json::to_vec(&directory).unwrap_or_default();
        let length = u32::try_from(directory.len()).map_err(|_| IndexError::TooLarge)?;
        let mut bytes = BytesMut::new();
        bytes.put_slice(MAGIC);
        bytes.put_u32_le(VERSION);
        bytes.put_u32_le(length);
        bytes.put_slice(&directory);
        for (layer, listing) in self.layers.iter().zip(&listings) {
            bytes.put_slice(listing);
            bytes.put_slice(&layer.chunk_digests);
            bytes.put_slice(&layer.points);
        }
        bytes.put_slice(&profile);
        if bytes.len() as u64 > MAX_INDEX_BYTES {
            return Err(IndexError::TooLarge);
        }
        Ok(bytes.freeze())
    }

    /// Reads the index of `manifest`.
    ///
    /// # Errors
    /// Bytes that are no index, one of another version or manifest, or one that contradicts
    /// itself.
    pub fn parse(bytes: &Bytes, manifest: Digest) -> Result<Self, IndexError> {
        let index = Self::parse_bound(bytes)?;
        if index.manifest != manifest {
            return Err(IndexError::OtherManifest { found: index.manifest, wanted: manifest });
        }
        Ok(index)
    }

    /// Reads an index that is bound by its own digest, whatever manifest it was made for: its
    /// layers are known by their digests.
    ///
    /// # Errors
    /// As [`Index::parse`].
    pub fn parse_bound(bytes: &Bytes) -> Result<Self, IndexError> {
        if bytes.len() as u64 > MAX_INDEX_BYTES {
            return Err(IndexError::TooLarge);
        }
        let (directory, mut rest) = split_directory(bytes)?;
        let directory: Directory = serde_json::from_slice(&directory)
            .map_err(|error| IndexError::Malformed(error.to_string()))?;
        let manifest = directory.manifest;
        if directory.layers.len() > MAX_LAYERS {
            return Err(IndexError::Malformed(format!("it has more than {MAX_LAYERS} layers")));
        }
        let mut layers = Vec::with_capacity(directory.layers.len());
        for row in directory.layers {
            let digest = row.digest;
            let layer = row.read(&mut rest);
            layers.push(layer.map_err(|why| IndexError::Layer { digest, why })?);
        }
        let profile = read_profile(&mut rest, directory.profile_bytes, manifest)?;
        if !rest.is_empty() {
            return Err(IndexError::Malformed(format!("{} bytes too many", rest.len())));
        }
        Ok(Self { manifest, layers, profile })
    }
}

/// The directory and what follows it.
fn split_directory(bytes: &Bytes) -> Result<(Bytes, Bytes), IndexError> {
    let malformed = |what: &str| IndexError::Malformed(what.to_owned());
    let (magic, rest) = bytes.split_first_chunk::<8>().ok_or_else(|| malformed("it is cut"))?;
    if magic != MAGIC {
        return Err(malformed("it does not begin with WFSINDEX"));
    }
    let (version, rest) = rest.split_first_chunk::<4>().ok_or_else(|| malformed("it is cut"))?;
    let found = u32::from_le_bytes(*version);
    if found != VERSION {
        return Err(IndexError::Version { found });
    }
    let (length, _) = rest.split_first_chunk::<4>().ok_or_else(|| malformed("it is cut"))?;
    let mut rest = bytes.slice(HEAD_BYTES..);
    let directory = take(&mut rest, u64::from(u32::from_le_bytes(*length)));
    Ok((directory.ok_or_else(|| malformed("its directory is cut"))?, rest))
}

/// The profile, which comes last, if there is one.
fn read_profile(
    rest: &mut Bytes,
    bytes: u64,
    manifest: Digest,
) -> Result<Option<Profile>, IndexError> {
    if bytes == 0 {
        return Ok(None);
    }
    let malformed = |why: String| IndexError::Malformed(format!("its profile: {why}"));
    let section = take(rest, bytes).ok_or_else(|| malformed("it is cut".into()))?;
    let profile = Profile::parse(&section).map_err(|error| malformed(error.to_string()))?;
    if profile.manifest() != manifest {
        return Err(malformed(format!("it is of {}", profile.manifest())));
    }
    Ok(Some(profile))
}

/// The first `count` bytes of what is left.
fn take(rest: &mut Bytes, count: u64) -> Option<Bytes> {
    let count = usize::try_from(count).ok()?;
    (count <= rest.len()).then(|| rest.split_to(count))
}

impl Row {
    /// Reads the layer's sections, which come next.
    fn read(self, rest: &mut Bytes) -> Result<LayerIndex, String> {
        if self.chunk_bytes != CHUNK_BYTES {
            return Err(format!("chunks of {} bytes are not understood", self.chunk_bytes));
        }
        let listing = take(rest, self.listing_bytes).ok_or("its list of files is cut")?;
        let chunk_digests = take(rest, self.chunks_bytes).ok_or("its chunk digests are cut")?;
        let points = take(rest, self.points_bytes).ok_or("its access points are cut")?;
        let listing = Listing::from_bytes(&listing).ok_or("its list of files is malformed")?;
        if overlap(&listing) {
            return Err("its files overlap".into());
        }
        let layout = listing.layout();
        if self.compression == Compression::None && layout.size() != self.size {
            return Err(format!("its cuts are of {} bytes, not of {}", layout.size(), self.size));
        }
        let chunks = chunks_of(layout);
        if chunk_digests.len() as u64 != chunks.saturating_mul(DIGEST_BYTES as u64) {
            return Err(format!("it has not one digest for each of its {chunks} chunks"));
        }
        if !points.is_empty() {
            crate::layer::check_points(&points, self.compression, self.size, layout.size())?;
        }
        Ok(LayerIndex {
            digest: self.digest,
            size: self.size,
            compression: self.compression,
            content_digest: self.content_digest,
            listing,
            chunk_digests,
            points,
        })
    }
}

/// Chunks of a blob that is cut like that: each segment has its own, counted from its start.
fn chunks_of(layout: &Layout) -> u64 {
    let segments = (0..layout.segments()).filter_map(|index| layout.segment(index));
    segments.map(|segment| (segment.end - segment.start).div_ceil(CHUNK_BYTES)).sum()
}

/// Whether two files share bytes, or one lies before its predecessor.
fn overlap(listing: &Listing) -> bool {
    let mut end = 0;
    listing.entries().iter().any(|entry| match &entry.kind {
        EntryKind::File(range) if !range.is_empty() => {
            let overlaps = range.start < end;
            end = range.end;
            overlaps
        }
        _ => false,
    })
}

#[cfg(test)]
mod tests;
