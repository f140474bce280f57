//! One Prepare of a layer at a time: a second one waits, and then finds what the first one made.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::OwnedMutexGuard;

/// A layer above a parent.
type Target = (String, Option<String>);

/// The layers that are being prepared. Bounded by the calls under way.
#[derive(Debug, Default)]
pub(super) struct Flights(Mutex<HashMap<Target, Weak<tokio::sync::Mutex<()>>>>);

impl Flights {
    /// Waits for its turn at a layer; the turn ends when the guard is dropped.
    pub(super) async fn turn(&self, reference: &str, parent: Option<&str>) -> OwnedMutexGuard<()> {
        self.lock_of((reference.to_owned(), parent.map(str::to_owned))).lock_owned().await
    }

    fn lock_of(&self, target: Target) -> Arc<tokio::sync::Mutex<()>> {
        let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lock) = flights.get(&target).and_then(Weak::upgrade) {
            return lock;
        }
        flights.retain(|_, lock| lock.strong_count() > 0);
        let lock = Arc::default();
        flights.insert(target, Arc::downgrade(&lock));
        lock
    }
}
