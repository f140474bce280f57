//! Publishing, reading and evicting an extent, in every order that two or three threads can have.
//!
//! The code under test is the store's own, compiled here with loom's atomics in the place of the
//! standard ones (`crate::atomic`), and the cache file is a cell of loom's, which notices any
//! unsynchronised access.

#[allow(dead_code, reason = "the store uses more of it")]
#[path = "../src/presence/bits.rs"]
mod bits;
#[allow(dead_code, reason = "the store uses more of it")]
#[path = "../src/extents.rs"]
mod extents;

mod atomic {
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
}

use loom::cell::UnsafeCell;
use loom::model::Builder;
use loom::sync::Arc;
use loom::thread;

use bits::Bits;
use extents::Extents;

const EXTENT: u32 = 0;
const CHUNK: u32 = 0;
const RIGHT: u8 = 7;
const HOLE: u8 = 0;

/// A blob of one extent with one chunk.
struct Blob {
    extents: Extents,
    presence: Bits,
    file: UnsafeCell<u8>,
}

// The cell is the thing that is checked.
#[expect(unsafe_code, reason = "loom's cell checks each access at run time")]
// SAFETY: loom panics when two threads access the cell without an order between them.
unsafe impl Sync for Blob {}

impl Blob {
    fn new(published: bool) -> Arc<Self> {
        let presence = Bits::new(1);
        if published {
            presence.set(CHUNK);
        }
        let file = UnsafeCell::new(if published { RIGHT } else { HOLE });
        Arc::new(Self { extents: Extents::new(1), presence, file })
    }

    #[expect(unsafe_code, reason = "loom's cell checks each access at run time")]
    fn look(&self) -> u8 {
        // SAFETY: see above.
        self.file.with(|bytes| unsafe { *bytes })
    }

    #[expect(unsafe_code, reason = "loom's cell checks each access at run time")]
    fn write(&self, byte: u8) {
        // SAFETY: see above.
        self.file.with_mut(|bytes| unsafe { *bytes = byte });
    }

    /// As `Blob::read` does it: hold, look, use, release. Whether it was a hit.
    fn read(&self) -> bool {
        if !self.extents.hold(&(EXTENT..EXTENT + 1)) {
            return false;
        }
        let hit = self.presence.get(CHUNK);
        if hit {
            assert_eq!(self.look(), RIGHT, "a published byte is wrong");
        }
        self.extents.release(&(EXTENT..EXTENT + 1));
        hit
    }

    /// As a request does it: hold, fill what is absent, publish, release.
    fn fill(&self) -> bool {
        if !self.extents.hold(&(EXTENT..EXTENT + 1)) {
            return false;
        }
        if !self.presence.get(CHUNK) {
            self.write(RIGHT);
            self.presence.set(CHUNK);
        }
        // Its waiter's slice.
        assert_eq!(self.look(), RIGHT);
        self.extents.release(&(EXTENT..EXTENT + 1));
        true
    }

    /// As `Blob::evict` does it.
    fn evict(&self) -> bool {
        if !self.extents.begin_eviction(EXTENT) {
            return false;
        }
        self.presence.clear(CHUNK);
        self.write(HOLE);
        self.extents.end_eviction(EXTENT);
        true
    }
}

/// Runs `test` in all orders with at most three preemptions, which is where such bugs are.
fn in_all_orders(test: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(test);
}

#[test]
fn a_reader_never_sees_a_hole() {
    in_all_orders(|| {
        let blob = Blob::new(true);
        let (one, two) = (Arc::clone(&blob), Arc::clone(&blob));
        let reader = thread::spawn(move || one.read());
        let evictor = thread::spawn(move || two.evict());
        blob.read();
        let (_, evicted) = (reader.join().unwrap(), evictor.join().unwrap());
        assert_eq!(blob.read(), !evicted);
    });
}

#[test]
fn what_is_filled_while_it_is_evicted_is_whole_or_absent() {
    in_all_orders(|| {
        let blob = Blob::new(true);
        let (one, two) = (Arc::clone(&blob), Arc::clone(&blob));
        let filler = thread::spawn(move || one.fill());
        let evictor = thread::spawn(move || two.evict());
        blob.read();
        filler.join().unwrap();
        evictor.join().unwrap();
        blob.read();
        assert!(blob.extents.is_free(EXTENT), "nothing is held, nothing is being evicted");
        assert!(blob.fill() && blob.read());
    });
}

#[test]
fn two_evictors_do_not_meet() {
    in_all_orders(|| {
        let blob = Blob::new(true);
        let other = Arc::clone(&blob);
        let evictor = thread::spawn(move || other.evict());
        blob.evict();
        evictor.join().unwrap();
        assert!(!blob.read() && blob.fill() && blob.read());
    });
}
