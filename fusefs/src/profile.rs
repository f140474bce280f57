//! Recorded profiles: the order in which a load touched a model, to be fetched in that order at
//! the next mount.
//!
//! ```text
//! "WFPROF01"                  8 bytes
//! digest of the manifest      32 bytes
//! extents, in order           12 bytes each: layer, first MiB in its blob, number of MiB (u32,
//!                             little-endian)
//! ```
//!
//! A profile travels between machines, so it is foreign: it is bounded and checked where it is
//! parsed, and what it says decides only what is fetched first.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use weightfs_store::{Blob, BlobId, Digest};

use crate::layer::OpenLayer;

const MAGIC: &[u8; 8] = b"WFPROF01";
const HEADER_BYTES: usize = MAGIC.len() + 32;
const EXTENT_BYTES: usize = 12;

/// Extents of a profile at the most: a terabyte that is read in sequence.
const MAX_EXTENTS: usize = 1 << 16;

/// Bytes of a profile at the most.
pub const MAX_PROFILE_BYTES: usize = HEADER_BYTES + MAX_EXTENTS * EXTENT_BYTES;

/// What extents are counted in.
const UNIT_BYTES: u64 = 1 << 20;

/// Units of an extent at the most. What several threads read at the same time stays interleaved
/// in such pieces.
const MAX_EXTENT_UNITS: u32 = 16;

/// Extents that may still grow: streams that are followed at the same time.
const OPEN_EXTENTS: usize = 64;

/// Why bytes are no profile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// It begins otherwise.
    #[error("it is no profile of this version; record it anew with `weightfs mount --record`")]
    NotAProfile,
    /// It ends within an extent, or is longer than any profile.
    #[error("a profile of {0} bytes is cut or too long (at most {MAX_PROFILE_BYTES})")]
    BadLength(usize),
    /// An extent is empty or lies beyond any blob.
    #[error("extent {0} of the profile makes no sense")]
    BadExtent(usize),
}

/// Adjacent bytes of a layer's blob.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Extent {
    /// Position of the layer in the manifest.
    layer: u32,
    units: Range<u32>,
}

/// What a load touched, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    manifest: Digest,
    extents: Vec<Extent>,
}

impl Profile {
    /// The manifest of the artifact that was loaded.
    pub const fn manifest(&self) -> Digest {
        self.manifest
    }

    /// Bytes that it covers, in whole MiB.
    pub fn bytes(&self) -> u64 {
        let units =
            self.extents.iter().map(|extent| u64::from(extent.units.end - extent.units.start));
        units.sum::<u64>() * UNIT_BYTES
    }

    /// Reads what [`Profile::encode`] has written.
    ///
    /// # Errors
    /// Anything else.
    pub fn parse(bytes: &[u8]) -> Result<Self, ProfileError> {
        if bytes.len() > MAX_PROFILE_BYTES {
            return Err(ProfileError::BadLength(bytes.len()));
        }
        let rest = bytes.strip_prefix(MAGIC).ok_or(ProfileError::NotAProfile)?;
        let cut = || ProfileError::BadLength(bytes.len());
        let (manifest, rest) = rest.split_first_chunk::<32>().ok_or_else(cut)?;
        let (extents, left_over) = rest.as_chunks::<EXTENT_BYTES>();
        if !left_over.is_empty() {
            return Err(cut());
        }
        let parsed = extents
            .iter()
            .enumerate()
            .map(|(index, extent)| Extent::decode(extent).ok_or(ProfileError::BadExtent(index)));
        Ok(Self {
            manifest: Digest::from_raw(*manifest),
            extents: parsed.collect::<Result<_, _>>()?,
        })
    }

    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.extents.len() * EXTENT_BYTES);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(self.manifest.as_raw());
        for Extent { layer, units } in &self.extents {
            for number in [*layer, units.start, units.end - units.start] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
        }
        bytes
    }

    /// The same for the artifact with that manifest, whose layers are `to`, where they were `from`:
    /// by their digests. What it says of layers that are not among them is left out.
    #[must_use]
    pub fn moved(&self, manifest: Digest, from: &[Digest], to: &[Digest]) -> Self {
        let moved = |extent: &Extent| {
            let digest = from.get(usize::try_from(extent.layer).ok()?)?;
            let layer = to.iter().position(|layer| layer == digest)?;
            Some(Extent { layer: u32::try_from(layer).ok()?, units: extent.units.clone() })
        };
        Self { manifest, extents: self.extents.iter().filter_map(moved).collect() }
    }

    /// Has everything fetched in the recorded order, after what readers wait for. `layers` are
    /// those of the manifest. Does not wait.
    pub fn expect(&self, layers: &[Arc<OpenLayer>]) {
        self.ranges(layers).for_each(|(blob, range)| blob.expect(&range));
    }

    /// What it has of the manifest's `layers`, in the recorded order, each inside one segment.
    pub fn ranges(
        &self,
        layers: &[Arc<OpenLayer>],
    ) -> impl Iterator<Item = (Arc<Blob>, Range<u64>)> {
        self.extents.iter().flat_map(move |Extent { layer, units }| {
            // Of another artifact, if there is no such layer.
            let layer = usize::try_from(*layer).ok().and_then(|at| layers.get(at));
            let range = u64::from(units.start) * UNIT_BYTES..u64::from(units.end) * UNIT_BYTES;
            layer.into_iter().flat_map(move |layer| {
                let blob = Arc::clone(&layer.blob);
                by_segment(&layer.blob, range.clone()).map(move |part| (Arc::clone(&blob), part))
            })
        })
    }
}

impl Extent {
    fn decode(bytes: &[u8; EXTENT_BYTES]) -> Option<Self> {
        let (numbers, _) = bytes.as_chunks::<4>();
        let [layer, start, count] = *numbers else { return None };
        let (start, count) = (u32::from_le_bytes(start), u32::from_le_bytes(count));
        let end = start.checked_add(count).filter(|end| *end > start)?;
        Some(Self { layer: u32::from_le_bytes(layer), units: start..end })
    }
}

/// The parts of `range` that lie in one segment each; nothing behind the blob's end.
fn by_segment(blob: &Blob, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let (layout, mut at) = (blob.layout(), range.start);
    std::iter::from_fn(move || {
        let segment = layout.segment_at(at).filter(|_| at < range.end)?;
        let end = layout.segment(segment)?.end.min(range.end);
        let part = at..end;
        at = end;
        Some(part)
    })
}

/// Follows a load.
#[derive(Debug)]
pub struct Recorder {
    layers: HashMap<BlobId, u32>,
    touched: Mutex<Touched>,
}

#[derive(Debug, Default)]
struct Touched {
    /// By layer: a bit for each unit.
    seen: HashMap<u32, Vec<u64>>,
    extents: Vec<Extent>,
}

impl Recorder {
    /// For an artifact with these layers.
    pub fn new(layers: &[Arc<OpenLayer>]) -> Arc<Self> {
        let numbered = layers.iter().zip(0..).map(|(layer, number)| (layer.blob.id(), number));
        Self::of(numbered)
    }

    fn of(layers: impl Iterator<Item = (BlobId, u32)>) -> Arc<Self> {
        // A blob that several layers share is the first one's.
        let mut known = HashMap::new();
        layers.for_each(|(id, number)| {
            known.entry(id).or_insert(number);
        });
        Arc::new(Self { layers: known, touched: Mutex::default() })
    }

    /// Bytes `range` of a blob are read.
    pub(crate) fn note(&self, blob: BlobId, range: &Range<u64>) {
        let Some(layer) = self.layers.get(&blob) else { return };
        let unit = |at: u64| u32::try_from(at / UNIT_BYTES).unwrap_or(u32::MAX);
        let mut touched = self.touched.lock().unwrap_or_else(PoisonError::into_inner);
        for unit in unit(range.start)..unit(range.end.saturating_sub(1)).saturating_add(1) {
            touched.note(*layer, unit);
        }
    }

    /// What was read so far, of the artifact with that manifest.
    pub fn profile(&self, manifest: Digest) -> Profile {
        let touched = self.touched.lock().unwrap_or_else(PoisonError::into_inner);
        Profile { manifest, extents: touched.extents.clone() }
    }
}

impl Touched {
    fn note(&mut self, layer: u32, unit: u32) {
        let seen = self.seen.entry(layer).or_default();
        let (word, bit) = (unit as usize / 64, 1u64 << (unit % 64));
        if seen.len() <= word {
            seen.resize(word + 1, 0);
        }
        let Some(word) = seen.get_mut(word).filter(|word| **word & bit == 0) else { return };
        *word |= bit;
        let grows = |extent: &&mut Extent| {
            extent.layer == layer
                && extent.units.end == unit
                && extent.units.end - extent.units.start < MAX_EXTENT_UNITS
        };
        let full = self.extents.len() >= MAX_EXTENTS;
        if let Some(extent) = self.extents.iter_mut().rev().take(OPEN_EXTENTS).find(grows) {
            extent.units.end = unit.saturating_add(1);
        } else if !full {
            // What comes after so many is found by read-ahead.
            self.extents.push(Extent { layer, units: unit..unit.saturating_add(1) });
        }
    }
}

#[cfg(test)]
mod tests {
    use weightfs_store::Form;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn blob(number: u8) -> BlobId {
        BlobId { digest: Digest::of(&[number]), form: Form::AsStored }
    }

    fn manifest() -> Digest {
        Digest::of(b"manifest")
    }

    fn recorder() -> Arc<Recorder> {
        Recorder::of([(blob(0), 0), (blob(1), 1), (blob(0), 2)].into_iter())
    }

    fn extents(recorder: &Recorder) -> Vec<(u32, Range<u32>)> {
        let profile = recorder.profile(manifest());
        profile.extents.into_iter().map(|extent| (extent.layer, extent.units)).collect()
    }

    #[test]
    fn what_is_touched_is_recorded_once_and_in_order() {
        let recorder = recorder();
        recorder.note(blob(1), &(0..8));
        recorder.note(blob(0), &(5 * MIB..7 * MIB + 1));
        recorder.note(blob(0), &(6 * MIB..8 * MIB));
        recorder.note(blob(1), &(MIB - 1..MIB + 1));
        recorder.note(blob(7), &(0..MIB));
        assert_eq!(extents(&recorder), [(1, 0..2), (0, 5..8)]);
        assert_eq!(recorder.profile(manifest()).bytes(), 5 * MIB);
    }

    #[test]
    fn streams_at_the_same_time_stay_interleaved() {
        let recorder = recorder();
        for at in 0..32 {
            recorder.note(blob(0), &(at * MIB..(at + 1) * MIB));
            recorder.note(blob(1), &(at * MIB..(at + 1) * MIB));
        }
        assert_eq!(extents(&recorder), [(0, 0..16), (1, 0..16), (0, 16..32), (1, 16..32)]);
    }

    #[test]
    fn a_profile_is_bounded() {
        let recorder = recorder();
        for at in 0..100_000 {
            recorder.note(blob(0), &(2 * at * MIB..2 * at * MIB + 1));
        }
        let profile = recorder.profile(manifest());
        assert_eq!(profile.encode().len(), MAX_PROFILE_BYTES);
        assert_eq!(Profile::parse(&profile.encode()), Ok(profile));
    }

    #[test]
    fn what_is_written_is_read_and_every_cut_is_noticed() {
        let recorder = recorder();
        recorder.note(blob(0), &(0..100 * MIB));
        let profile = recorder.profile(manifest());
        let bytes = profile.encode();
        assert_eq!(Profile::parse(&bytes), Ok(profile));
        for len in 0..bytes.len() {
            let whole = len >= HEADER_BYTES && (len - HEADER_BYTES).is_multiple_of(EXTENT_BYTES);
            assert_eq!(Profile::parse(&bytes[..len]).is_ok(), whole, "{len}");
        }
    }

    #[test]
    fn a_profile_is_moved_to_layers_in_another_order() {
        let recorder = recorder();
        recorder.note(blob(0), &(0..2 * MIB));
        recorder.note(blob(1), &(0..MIB));
        let [a, b, c] = [b"a", b"b", b"c"].map(|name| Digest::of(name));
        let (profile, other) = (recorder.profile(manifest()), Digest::of(b"other"));
        let moved = profile.moved(other, &[a, b], &[c, b, a]);
        assert_eq!(moved.manifest(), other);
        let layers: Vec<_> = moved.extents.iter().map(|extent| extent.layer).collect();
        assert_eq!(layers, [2, 1]);
        assert_eq!(moved.moved(manifest(), &[c, b, a], &[a, b]), profile);
        assert_eq!(profile.moved(other, &[a, b], &[b]).bytes(), MIB);
        assert_eq!(profile.moved(other, &[a], &[c]).bytes(), 0);
    }

    #[test]
    fn foreign_bytes_are_refused() {
        let good = recorder().profile(manifest()).encode();
        assert_eq!(Profile::parse(b"WFPROF02"), Err(ProfileError::NotAProfile));
        let too_long = vec![0; MAX_PROFILE_BYTES + 1];
        assert_eq!(Profile::parse(&too_long), Err(ProfileError::BadLength(too_long.len())));
        for (start, count) in [(0, 0), (u32::MAX, 1), (1, u32::MAX)] {
            let mut bytes = good.clone();
            for number in [0, start, count] {
                bytes.extend_from_slice(&u32::to_le_bytes(number));
            }
            assert_eq!(Profile::parse(&bytes), Err(ProfileError::BadExtent(0)));
        }
    }

    #[test]
    fn fuzz_profiles_are_refused_or_bounded() {
        let recorder = recorder();
        recorder.note(blob(0), &(0..100 * MIB));
        let sample = recorder.profile(manifest()).encode();
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&[&sample], input);
            let Ok(profile) = Profile::parse(&bytes) else { return };
            assert_eq!(profile.encode(), bytes);
            assert!(profile.bytes() < u64::MAX);
        });
    }
}
