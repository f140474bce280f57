//! What comes in at this moment: whoever gets bytes can have others wait for them.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;

use weightfs_swarm::Node;

use crate::{Name, lock};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Coming(Mutex<HashMap<Name, Vec<Stretch>>>);

/// Bytes, and who gives them: a peer, or the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stretch {
    bytes: Range<u64>,
    from: Option<Node>,
}

impl Coming {
    /// Bytes of a blob come in from a peer, or from the registry, while the guard is there.
    pub(crate) fn note<'a>(
        &'a self,
        name: &'a Name,
        bytes: Range<u64>,
        from: Option<Node>,
    ) -> Arrival<'a> {
        let stretch = Stretch { bytes, from };
        lock(&self.0).entry(name.clone()).or_default().push(stretch.clone());
        Arrival { coming: self, name, stretch }
    }

    /// Whether a byte comes in that `asker` may wait for: not from the asker itself.
    pub(crate) fn has(&self, name: &Name, byte: u64, asker: Node) -> bool {
        let comes =
            |stretch: &Stretch| stretch.bytes.contains(&byte) && stretch.from != Some(asker);
        lock(&self.0).get(name).is_some_and(|stretches| stretches.iter().any(comes))
    }
}

/// See [`Coming::note`].
#[derive(Debug)]
pub(crate) struct Arrival<'a> {
    coming: &'a Coming,
    name: &'a Name,
    stretch: Stretch,
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        let mut coming = lock(&self.coming.0);
        let Some(stretches) = coming.get_mut(self.name) else { return };
        if let Some(at) = stretches.iter().position(|stretch| *stretch == self.stretch) {
            stretches.swap_remove(at);
        }
        if stretches.is_empty() {
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
        let (giver, asker) = (Node(1), Node(2));
        let (first, second) = (coming.note(&name, 0..10, None), coming.note(&name, 5..10, None));
        drop(first);
        let comes = |name, byte| coming.has(name, byte, asker);
        assert!(comes(&name, 5) && !comes(&name, 4) && !comes(&name, 10));
        let other = Name { repository: "r/other".into(), ..name.clone() };
        assert!(!comes(&other, 5));
        drop(second);
        let third = coming.note(&name, 5..10, Some(giver));
        assert!(comes(&name, 5) && !coming.has(&name, 5, giver), "nobody waits for itself");
        drop(third);
        assert!(!comes(&name, 5) && lock(&coming.0).is_empty());
    }
}
