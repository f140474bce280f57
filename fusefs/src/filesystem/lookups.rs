//! How often the kernel holds inodes of each tree.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::warn;

use super::TreeNumber;
use crate::ledger::{Entry, Kind, Ledger, Slot};
use crate::tree::Tree;

/// The kernel's lookups of one tree.
#[derive(Debug)]
pub(super) struct Lookups {
    number: TreeNumber,
    ledger: Arc<Ledger>,
    tally: Mutex<Tally>,
}

#[derive(Debug, Clone, Copy)]
struct Tally {
    count: u64,
    fingerprint: u64,
    /// `None` before the first lookup, or where there was no room.
    slot: Option<Slot>,
}

impl Lookups {
    /// None so far.
    pub(super) fn none(number: TreeNumber, ledger: Arc<Ledger>) -> Self {
        let tally = Mutex::new(Tally { count: 0, fingerprint: 0, slot: None });
        Self { number, ledger, tally }
    }

    /// Counts one; the kernel is told of it afterwards.
    pub(super) fn add(&self, tree: &Tree) {
        let mut tally = self.lock();
        if tally.count == 0 && tally.slot.is_none() {
            tally.fingerprint = tree.fingerprint();
            tally.slot = self.ledger.reserve().inspect_err(|error| self.not_recorded(error)).ok();
        }
        tally.count += 1;
        self.record(&tally);
    }

    /// The kernel forgot so many. Gives what is left.
    pub(super) fn forget(&self, count: u64) -> u64 {
        let mut tally = self.lock();
        // Saturating: what the kernel says is not ours to check.
        tally.count = tally.count.saturating_sub(count);
        self.record(&tally);
        tally.count
    }

    /// Takes it out of the ledger if nothing is left.
    pub(super) fn end_if_none(&self) -> bool {
        let mut tally = self.lock();
        if tally.count > 0 {
            return false;
        }
        if let Some(slot) = tally.slot.take()
            && let Err(error) = self.ledger.clear(slot)
        {
            self.not_recorded(&error);
        }
        true
    }

    fn record(&self, tally: &Tally) {
        let Some(slot) = tally.slot else { return };
        let entry = Entry {
            kind: Kind::Tree,
            backing: 0,
            key: self.number.0.into(),
            count: tally.count,
            mark: tally.fingerprint,
        };
        if let Err(error) = self.ledger.set(slot, &entry) {
            self.not_recorded(&error);
        }
    }

    fn not_recorded(&self, error: &io::Error) {
        let tree = self.number.0;
        warn!(tree, %error, "lookups are not recorded: a restart may end a removed tree's users");
    }

    fn lock(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a predecessor counted, by tree.
#[derive(Debug)]
pub(super) struct Inherited(Mutex<HashMap<TreeNumber, InheritedTree>>);

/// What a predecessor counted of one tree.
#[derive(Debug)]
pub(super) struct InheritedTree {
    number: TreeNumber,
    tally: Tally,
}

impl Inherited {
    /// What that ledger says of trees.
    pub(super) fn of(ledger: &Ledger) -> io::Result<Self> {
        let trees = ledger.entries()?.into_iter().filter_map(|(slot, entry)| {
            let number = TreeNumber(u32::try_from(entry.key).ok()?);
            let tally = Tally { count: entry.count, fingerprint: entry.mark, slot: Some(slot) };
            let tree = InheritedTree { number, tally };
            (entry.kind == Kind::Tree).then_some((number, tree))
        });
        Ok(Self(Mutex::new(trees.collect())))
    }

    /// Gives what was counted of a tree, once.
    pub(super) fn take(&self, number: TreeNumber) -> Option<InheritedTree> {
        self.lock().remove(&number)
    }

    /// Trees whose count was not taken and that the kernel holds.
    pub(super) fn numbers(&self) -> Vec<TreeNumber> {
        let trees = self.lock();
        trees.values().filter(|tree| tree.tally.count > 0).map(|tree| tree.number).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TreeNumber, InheritedTree>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InheritedTree {
    /// Goes on counting, if this is the tree that the kernel knows by that number.
    pub(super) fn resume(self, tree: &Tree, ledger: Arc<Ledger>) -> Option<Lookups> {
        let Self { number, tally } = self;
        if tally.count > 0 && tree.fingerprint() != tally.fingerprint {
            return None;
        }
        Some(Lookups { number, ledger, tally: Mutex::new(tally) })
    }
}
