//! How a blob is cut into segments. The store is given the cuts and knows no more about them.
//!
//! Invariants: the segments cover the blob without gap or overlap, none is empty (an empty blob
//! has no segment), and a chunk never straddles a cut.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Bytes of a chunk: the unit of presence, verification and small reads. The last chunk of a
/// segment is shorter.
pub const CHUNK_BYTES: u64 = 1 << 20;

/// Segments a blob may have at the most; each is a cache file.
pub const MAX_SEGMENTS: usize = 1 << 20;

/// The cuts of a blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawLayout", into = "RawLayout")]
pub struct Layout {
    size: u64,
    /// First byte of each segment; the first is 0.
    starts: Vec<u64>,
}

/// Why cuts don't make a layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A segment would be empty or begin before its predecessor.
    #[error("cut {cut} of a blob of {size} bytes is out of order or outside")]
    BadCut {
        /// The offending offset, in bytes.
        cut: u64,
        /// The blob's size, in bytes.
        size: u64,
    },
    /// More segments than [`MAX_SEGMENTS`].
    #[error("a blob can have {MAX_SEGMENTS} segments at the most")]
    TooMany,
}

impl Layout {
    /// One segment: a raw layer.
    pub fn whole(size: u64) -> Self {
        Self { size, starts: if size == 0 { vec![] } else { vec![0] } }
    }

    /// A layout of `size` bytes cut at `cuts`: offsets in ascending order, inside the blob,
    /// without 0.
    ///
    /// # Errors
    /// When a cut is 0, out of order, repeated or not inside the blob, or there are too many.
    pub fn new(size: u64, cuts: impl IntoIterator<Item = u64>) -> Result<Self, LayoutError> {
        let mut layout = Self::whole(size);
        for cut in cuts {
            if cut >= size || layout.starts.last().is_none_or(|last| cut <= *last) {
                return Err(LayoutError::BadCut { cut, size });
            }
            if layout.starts.len() == MAX_SEGMENTS {
                return Err(LayoutError::TooMany);
            }
            layout.starts.push(cut);
        }
        Ok(layout)
    }

    /// Bytes of the blob.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Number of segments.
    pub fn segments(&self) -> usize {
        self.starts.len()
    }

    /// The bytes of the blob that segment `index` covers, if there is one.
    pub fn segment(&self, index: usize) -> Option<Range<u64>> {
        let start = *self.starts.get(index)?;
        Some(start..self.starts.get(index + 1).copied().unwrap_or(self.size))
    }

    /// The segment that byte `offset` of the blob lies in.
    pub fn segment_at(&self, offset: u64) -> Option<usize> {
        if offset >= self.size {
            return None;
        }
        self.starts.partition_point(|start| *start <= offset).checked_sub(1)
    }
}

#[derive(Serialize, Deserialize)]
struct RawLayout {
    size: u64,
    cuts: Vec<u64>,
}

impl TryFrom<RawLayout> for Layout {
    type Error = LayoutError;

    fn try_from(raw: RawLayout) -> Result<Self, LayoutError> {
        Self::new(raw.size, raw.cuts)
    }
}

impl From<Layout> for RawLayout {
    fn from(layout: Layout) -> Self {
        Self { size: layout.size, cuts: layout.starts.into_iter().skip(1).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_cover_the_blob() {
        let layout = Layout::new(100, [10, 40]).unwrap();
        let ranges: Vec<_> = (0..layout.segments()).filter_map(|i| layout.segment(i)).collect();
        assert_eq!(ranges, [0..10, 10..40, 40..100]);
        assert_eq!([0, 9, 10, 99].map(|at| layout.segment_at(at).unwrap()), [0, 0, 1, 2]);
        assert_eq!(layout.segment_at(100), None);
    }

    #[test]
    fn an_empty_blob_has_no_segment() {
        let layout = Layout::whole(0);
        assert_eq!((layout.segments(), layout.segment_at(0)), (0, None));
    }

    #[test]
    fn bad_cuts_are_refused() {
        for cuts in [vec![0], vec![10, 10], vec![20, 10], vec![100], vec![101]] {
            assert!(Layout::new(100, cuts.clone()).is_err(), "{cuts:?}");
        }
        assert!(Layout::new(0, [0]).is_err());
    }

    #[test]
    fn a_foreign_layout_is_checked_when_it_is_read() {
        assert!(serde_json::from_str::<Layout>(r#"{"size":5,"cuts":[9]}"#).is_err());
        let layout = Layout::new(5, [3]).unwrap();
        let text = serde_json::to_string(&layout).unwrap();
        assert_eq!(serde_json::from_str::<Layout>(&text).unwrap(), layout);
    }
}
