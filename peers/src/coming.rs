//! What is got at this moment: whoever gets bytes, or looks for them, can have others wait for them.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use weightfs_swarm::Node;

use crate::{Name, lock};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Coming {
    stretches: Mutex<HashMap<Name, Vec<Stretch>>>,
    next: AtomicU64,
}

/// Bytes, and the peer that is to give them, if one was found.
#[derive(Debug)]
struct Stretch {
    id: u64,
    bytes: Range<u64>,
    from: Option<Node>,
}

impl Coming {
    /// Bytes of a blob are got while the guard is there.
    pub(crate) fn note<'a>(&'a self, name: &'a Name, bytes: Range<u64>) -> Arrival<'a> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let stretch = Stretch { id, bytes, from: None };
        lock(&self.stretches).entry(name.clone()).or_default().push(stretch);
        Arrival { coming: self, name, id }
    }

    /// Whether a byte comes in that `asker` may wait for: not from the asker itself.
    pub(crate) fn has(&self, name: &Name, byte: u64, asker: Node) -> bool {
        let comes =
            |stretch: &Stretch| stretch.bytes.contains(&byte) && stretch.from != Some(asker);
        lock(&self.stretches).get(name).is_some_and(|stretches| stretches.iter().any(comes))
    }
}

/// See [`Coming::note`].
#[derive(Debug)]
pub(crate) struct Arrival<'a> {
    coming: &'a Coming,
    name: &'a Name,
    id: u64,
}

impl Arrival<'_> {
    /// They are to come from a peer, or from the registry.
    pub(crate) fn comes_from(&self, from: Option<Node>) {
        let mut stretches = lock(&self.coming.stretches);
        let stretch = stretches
            .get_mut(self.name)
            .and_then(|stretches| stretches.iter_mut().find(|stretch| stretch.id == self.id));
        if let Some(stretch) = stretch {
            stretch.from = from;
        }
    }
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        let mut all = lock(&self.coming.stretches);
        let Some(stretches) = all.get_mut(self.name) else { return };
        stretches.retain(|stretch| stretch.id != self.id);
        if stretches.is_empty() {
            all.remove(self.name);
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
        let (giver, asker) = (Node(1), Node(2));
        let (first, second) = (coming.note(&name, 0..10), coming.note(&name, 5..10));
        drop(first);
        let comes = |name, byte| coming.has(name, byte, asker);
        assert!(comes(&name, 5) && !comes(&name, 4) && !comes(&name, 10));
        let other = Name { repository: "r/other".into(), ..name.clone() };
        assert!(!comes(&other, 5));
        second.comes_from(Some(giver));
        assert!(comes(&name, 5) && !coming.has(&name, 5, giver), "nobody waits for itself");
        second.comes_from(None);
        assert!(coming.has(&name, 5, giver));
        drop(second);
        assert!(!comes(&name, 5) && lock(&coming.stretches).is_empty());
    }
}
