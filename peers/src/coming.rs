//! What comes in at this moment: whoever gets bytes can have others wait for them.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;

use crate::{Name, lock};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Coming(Mutex<HashMap<Name, Vec<Range<u64>>>>);

impl Coming {
    /// Bytes of a blob come in while the guard is there.
    pub(crate) fn note<'a>(&'a self, name: &'a Name, bytes: Range<u64>) -> Arrival<'a> {
        lock(&self.0).entry(name.clone()).or_default().push(bytes.clone());
        Arrival { coming: self, name, bytes }
    }

    /// Whether a byte comes in.
    pub(crate) fn has(&self, name: &Name, byte: u64) -> bool {
        let coming = lock(&self.0);
        coming.get(name).is_some_and(|ranges| ranges.iter().any(|range| range.contains(&byte)))
    }
}

/// See [`Coming::note`].
#[derive(Debug)]
pub(crate) struct Arrival<'a> {
    coming: &'a Coming,
    name: &'a Name,
    bytes: Range<u64>,
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        let mut coming = lock(&self.coming.0);
        let Some(ranges) = coming.get_mut(self.name) else { return };
        if let Some(at) = ranges.iter().position(|range| *range == self.bytes) {
            ranges.swap_remove(at);
        }
        if ranges.is_empty() {
            coming.remove(self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use weightfs_store::Digest;

    use super::*;

    #[test]
    fn bytes_come_as_long_as_somebody_gets_them() {
        let coming = Coming::default();
        let name = Name { digest: Digest::of(b""), repository: "r/m".into() };
        let (first, second) = (coming.note(&name, 0..10), coming.note(&name, 5..10));
        drop(first);
        assert!(coming.has(&name, 5) && !coming.has(&name, 4) && !coming.has(&name, 10));
        let other = Name { repository: "r/other".into(), ..name.clone() };
        assert!(!coming.has(&other, 5));
        drop(second);
        assert!(!coming.has(&name, 5) && lock(&coming.0).is_empty());
    }
}
