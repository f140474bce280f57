//! How much disk the cache may take, and who gets it.
//!
//! Whoever writes to the cache reserves room first and says what he has written; the evictor
//! measures what is really there (allocated blocks), and makes room before it runs out. Who finds
//! none waits for the evictor, but not long: there may be nothing that can go.
//!
//! Invariant: what is used and reserved together stays within the limit, as far as was measured;
//! and a part of the file system stays free.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::layout::CHUNK_BYTES;
use crate::shared::lock;

/// How long a writer waits for room.
const PATIENCE: Duration = Duration::from_secs(1);

/// For how long it is taken for granted that there is nothing to evict, once that was found.
const BARREN: Duration = Duration::from_millis(200);

/// For how long nothing is fetched unasked after parts of blobs in use had to go: it would only
/// push out more of them, or itself.
const PRESSURE: Duration = Duration::from_secs(10);

/// The least that is evicted when the disk says that it is full, whatever was counted.
const FULL_DISK_BYTES: u64 = 64 << 20;

/// The room that is kept ready, so that writers need not wait: this share of the limit, which is
/// within what the cache may be off it, and bounds.
const HEADROOM_SHARE: u64 = 128;
const LEAST_HEADROOM: u64 = CHUNK_BYTES;
const MOST_HEADROOM: u64 = 256 << 20;

/// What may be evicted for a writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// Blobs that nobody uses; parts of those in use, too.
    Anything,
    /// Only blobs that nobody uses: it is fetched without being asked for.
    Unused,
}

/// What the evictor has to do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Task {
    /// Bytes to free, by whatever may go.
    pub(crate) anything: u64,
    /// Bytes to free as far as there are unused blobs; at least `anything`.
    pub(crate) unused: u64,
}

/// What a pass of the evictor was to free, and what it has freed, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Freed {
    /// What was missing.
    pub(crate) wanted: Task,
    /// By blobs that nobody used.
    pub(crate) unused: u64,
    /// By parts of blobs in use.
    pub(crate) parts: u64,
}

impl Freed {
    /// Whether there was something to do and nothing could be done.
    pub(crate) fn is_nothing(self) -> bool {
        self.is_nothing_for(Claim::Anything) || self.is_nothing_for(Claim::Unused)
    }

    fn is_nothing_for(self, claim: Claim) -> bool {
        match claim {
            Claim::Anything => self.wanted.anything > 0 && self.unused + self.parts == 0,
            Claim::Unused => self.wanted.unused > 0 && self.unused == 0,
        }
    }
}

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Measured {
    /// Bytes that the cache takes.
    pub(crate) used: u64,
    /// Bytes of the file system that are free.
    pub(crate) free: u64,
}

/// Limits in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) limit: Option<u64>,
    pub(crate) min_free: u64,
}

/// The disk space of a store.
#[derive(Debug)]
pub(crate) struct Budget {
    space: Mutex<Space>,
    /// Something was freed or given back, or a pass of the evictor ended.
    changed: Notify,
    /// The same, for those who wait in a thread.
    changed_too: Condvar,
    /// For the evictor.
    asked: Condvar,
}

#[derive(Debug)]
struct Space {
    limits: Limits,
    /// `None` before it was measured.
    used: Option<u64>,
    free: u64,
    reserved: u64,
    /// Bytes that somebody waits for.
    waited_for: Task,
    /// Bytes written so far. It only grows.
    written: u64,
    passes: u64,
    /// When a pass ended that found nothing that could go.
    barren: Option<Instant>,
    /// When a pass ended that found no unused blob.
    barren_of_unused: Option<Instant>,
    /// When parts of blobs in use were evicted last.
    pressed: Option<Instant>,
    disk_full: bool,
    call: Call,
}

/// What the evictor is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Rest,
    Work,
    End,
}

/// Why the evictor was woken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Woken {
    /// There may be something to do.
    Work,
    /// It is over.
    End,
}

impl Space {
    fn room(&self) -> u64 {
        let within = |limit: u64| limit.saturating_sub(self.used.unwrap_or(limit));
        let room = self.limits.limit.map_or(u64::MAX, within);
        let free = self.free.saturating_sub(self.limits.min_free);
        room.min(free).saturating_sub(self.reserved)
    }

    fn headroom(&self) -> u64 {
        let share = self.limits.limit.unwrap_or(u64::MAX) / HEADROOM_SHARE;
        share.clamp(LEAST_HEADROOM, MOST_HEADROOM)
    }

    /// What is missing.
    fn task(&self) -> Task {
        let over = self.reserved + self.headroom();
        let used = self.used.unwrap_or(0);
        let by_limit = |more: u64| match self.limits.limit {
            Some(limit) => (used + more).saturating_sub(limit),
            None => 0,
        };
        let by_disk = |more: u64| (self.limits.min_free + more).saturating_sub(self.free);
        let missing = |more: u64| by_limit(more).max(by_disk(more));
        // Half of the headroom may be used up before anything goes: what is fetched unasked takes
        // all but the headroom, and must not push out others by a few blocks.
        let short = missing(over - self.headroom() / 2 + self.waited_for.anything) > 0;
        let mut anything = if short { missing(over + self.waited_for.anything) } else { 0 };
        if self.disk_full {
            anything = anything.max(FULL_DISK_BYTES);
        }
        let waited_for = self.waited_for.anything + self.waited_for.unused;
        let unused = if short || waited_for > 0 { missing(over + waited_for) } else { 0 };
        Task { anything, unused: unused.max(anything) }
    }

    fn is_barren(&self, claim: Claim) -> bool {
        let ended = match claim {
            Claim::Anything => self.barren,
            Claim::Unused => self.barren_of_unused,
        };
        ended.is_some_and(|ended| ended.elapsed() < BARREN)
    }

    fn is_pressed(&self) -> bool {
        self.pressed.is_some_and(|at| at.elapsed() < PRESSURE)
    }

    /// What a writer may have.
    fn room_for(&self, claim: Claim) -> u64 {
        match claim {
            Claim::Anything => self.room(),
            Claim::Unused if self.is_pressed() => 0,
            // The headroom is for those who are waited for.
            Claim::Unused => self.room().saturating_sub(self.headroom()),
        }
    }
}

/// Room on the disk. What is not used of it is given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Reservation<'a> {
    budget: &'a Budget,
    left: u64,
}

impl Reservation<'_> {
    /// Bytes that may be written.
    pub(crate) fn left(&self) -> u64 {
        self.left
    }

    /// So many bytes were written.
    pub(crate) fn spend(&mut self, bytes: u64) {
        let spent = bytes.min(self.left);
        self.left -= spent;
        let mut space = lock(&self.budget.space);
        space.reserved = space.reserved.saturating_sub(spent);
        space.written += bytes;
        space.used = space.used.map(|used| used + bytes);
        space.free = space.free.saturating_sub(bytes);
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if self.left > 0 {
            let mut space = lock(&self.budget.space);
            space.reserved = space.reserved.saturating_sub(self.left);
            self.budget.tell(&space);
        }
    }
}

/// Somebody who waits for room.
struct Waiting<'a> {
    budget: &'a Budget,
    claim: Claim,
    bytes: u64,
}

impl<'a> Waiting<'a> {
    fn begin(budget: &'a Budget, space: &mut Space, claim: Claim, bytes: u64) -> Self {
        *count(space, claim) += bytes;
        Self { budget, claim, bytes }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        *count(&mut lock(&self.budget.space), self.claim) -= self.bytes;
    }
}

fn count(space: &mut Space, claim: Claim) -> &mut u64 {
    match claim {
        Claim::Anything => &mut space.waited_for.anything,
        Claim::Unused => &mut space.waited_for.unused,
    }
}

impl Budget {
    /// `free` bytes of the file system are free now.
    pub(crate) fn new(limits: Limits, free: u64) -> Self {
        let space = Space {
            limits,
            // Without a limit it does not matter.
            used: limits.limit.is_none().then_some(0),
            free,
            reserved: 0,
            waited_for: Task { anything: 0, unused: 0 },
            written: 0,
            passes: 0,
            barren: None,
            barren_of_unused: None,
            pressed: None,
            disk_full: false,
            call: Call::Work,
        };
        Self {
            space: Mutex::new(space),
            changed: Notify::new(),
            changed_too: Condvar::new(),
            asked: Condvar::new(),
        }
    }

    /// Whether the cache has a limit of its own, and is not only bounded by its disk.
    pub(crate) fn is_limited(&self) -> bool {
        self.limits().limit.is_some()
    }

    pub(crate) fn limits(&self) -> Limits {
        lock(&self.space).limits
    }

    /// Reserves room for at most `want` bytes, but not less than `least`. Waits for the evictor if
    /// there is none; `None` if it finds nothing that could go, or not by `until`.
    pub(crate) async fn reserve(
        &self,
        want: u64,
        least: u64,
        claim: Claim,
        until: Instant,
    ) -> Option<Reservation<'_>> {
        if let Some(room) = self.try_reserve(want, least, claim) {
            return Some(room);
        }
        let until = until.min(Instant::now() + PATIENCE);
        let (_waiting, asked_at) = self.begin_to_wait(want, claim)?;
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if let Some(room) = self.try_reserve(want, least, claim) {
                return Some(room);
            }
            if self.is_hopeless(claim, asked_at) {
                return None;
            }
            timeout_at(until, changed).await.ok()?;
        }
    }

    /// The same for a thread that may wait; reserves all of `bytes`.
    pub(crate) fn reserve_in_thread(&self, bytes: u64) -> Option<Reservation<'_>> {
        if let Some(room) = self.try_reserve(bytes, bytes, Claim::Anything) {
            return Some(room);
        }
        let until = Instant::now() + PATIENCE;
        let (_waiting, asked_at) = self.begin_to_wait(bytes, Claim::Anything)?;
        loop {
            if let Some(room) = self.try_reserve(bytes, bytes, Claim::Anything) {
                return Some(room);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.is_hopeless(Claim::Anything, asked_at) {
                return None;
            }
            // At intervals, so that nothing is missed between the attempt and the wait.
            let space = lock(&self.space);
            let step = left.min(Duration::from_millis(20));
            drop(self.changed_too.wait_timeout(space, step));
        }
    }

    /// `None` if that would be in vain.
    fn begin_to_wait(&self, bytes: u64, claim: Claim) -> Option<(Waiting<'_>, u64)> {
        let mut space = lock(&self.space);
        if space.call == Call::End {
            return None;
        }
        self.ask(&mut space);
        if space.is_barren(claim) || (claim == Claim::Unused && space.is_pressed()) {
            return None;
        }
        let waiting = Waiting::begin(self, &mut space, claim, bytes);
        Some((waiting, space.passes))
    }

    fn try_reserve(&self, want: u64, least: u64, claim: Claim) -> Option<Reservation<'_>> {
        let mut space = lock(&self.space);
        let room = space.room_for(claim);
        if space.room() < want.saturating_add(space.headroom() / 2) {
            self.ask(&mut space);
        }
        if room < least {
            return None;
        }
        let left = want.min(room);
        space.reserved += left;
        Some(Reservation { budget: self, left })
    }

    /// Whether the evictor has tried since then, found nothing, and nobody will give room back.
    fn is_hopeless(&self, claim: Claim, asked_at: u64) -> bool {
        let mut space = lock(&self.space);
        // The pass that ran when it was asked does not count.
        let tried = space.passes >= asked_at + 2 && space.is_barren(claim);
        self.ask(&mut space);
        space.call == Call::End || (tried && space.reserved == 0)
    }

    fn ask(&self, space: &mut Space) {
        if space.call == Call::Rest {
            space.call = Call::Work;
            self.asked.notify_one();
        }
    }

    /// A write found the disk full, whatever was counted.
    pub(crate) fn disk_is_full(&self) {
        let mut space = lock(&self.space);
        space.free = 0;
        space.disk_full = true;
        self.ask(&mut space);
    }

    fn tell(&self, _space: &MutexGuard<'_, Space>) {
        self.changed.notify_waiters();
        self.changed_too.notify_all();
    }
}

/// For the evictor.
impl Budget {
    /// Waits until there may be something to do, `longest` at the most.
    pub(crate) fn rest(&self, longest: Duration) -> Woken {
        let space = lock(&self.space);
        let idle = |space: &mut Space| space.call == Call::Rest;
        let woken = self.asked.wait_timeout_while(space, longest, idle);
        let (mut space, _) = woken.unwrap_or_else(PoisonError::into_inner);
        if space.call == Call::End {
            return Woken::End;
        }
        space.call = Call::Rest;
        Woken::Work
    }

    /// Bytes written so far: what is written while somebody measures must not be lost.
    pub(crate) fn written(&self) -> u64 {
        lock(&self.space).written
    }

    /// Takes in what was measured after `written` bytes had been written. Gives what is missing.
    pub(crate) fn measured(&self, Measured { used, free }: Measured, written: u64) -> Task {
        let mut space = lock(&self.space);
        let since = space.written - written;
        space.used = Some(used + since);
        space.free = free.saturating_sub(since);
        let task = space.task();
        space.disk_full = false;
        task
    }

    /// A pass is over.
    pub(crate) fn passed(&self, freed: Freed) {
        let mut space = lock(&self.space);
        space.passes += 1;
        if freed.parts > 0 {
            space.pressed = Some(Instant::now());
        }
        let now = Instant::now();
        space.barren = freed.is_nothing_for(Claim::Anything).then_some(now);
        space.barren_of_unused = freed.is_nothing_for(Claim::Unused).then_some(now);
        self.tell(&space);
    }

    /// No room is made any more.
    pub(crate) fn end(&self) {
        let mut space = lock(&self.space);
        space.call = Call::End;
        self.asked.notify_all();
        self.tell(&space);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const BOTH: Task = Task { anything: MIB, unused: MIB };

    fn budget(limit: u64, used: u64) -> Budget {
        let limits = Limits { limit: Some(limit), min_free: 10 * MIB };
        let budget = Budget::new(limits, 1000 * MIB);
        budget.rest(Duration::ZERO);
        budget.measured(Measured { used, free: 1000 * MIB }, 0);
        budget
    }

    #[test]
    fn reservations_stay_within_the_limit() {
        let budget = budget(100 * MIB, 90 * MIB);
        let mut first = budget.try_reserve(8 * MIB, MIB, Claim::Anything).unwrap();
        let second = budget.try_reserve(8 * MIB, MIB, Claim::Anything).unwrap();
        assert_eq!((first.left(), second.left()), (8 * MIB, 2 * MIB));
        assert!(budget.try_reserve(8 * MIB, MIB, Claim::Anything).is_none());
        first.spend(8 * MIB);
        drop((first, second));
        assert_eq!(lock(&budget.space).room(), 2 * MIB);
    }

    #[test]
    fn the_file_system_keeps_its_free_part() {
        let limits = Limits { limit: None, min_free: 10 * MIB };
        let budget = Budget::new(limits, 15 * MIB);
        let room = budget.try_reserve(100 * MIB, MIB, Claim::Anything).unwrap();
        assert_eq!(room.left(), 5 * MIB);
    }

    #[test]
    fn what_nobody_asked_for_leaves_the_headroom() {
        let budget = budget(1280 * MIB, 1265 * MIB);
        assert_eq!(lock(&budget.space).headroom(), 10 * MIB);
        assert_eq!(budget.try_reserve(8 * MIB, MIB, Claim::Unused).unwrap().left(), 5 * MIB);
        budget.passed(Freed { wanted: BOTH, unused: 0, parts: 1 });
        assert!(budget.try_reserve(8 * MIB, MIB, Claim::Unused).is_none(), "others had to go");
    }

    #[test]
    fn the_task_is_to_restore_the_headroom_and_serve_who_waits() {
        let budget = budget(1280 * MIB, 1271 * MIB);
        let written = budget.written();
        let measured = |used| Measured { used, free: 1000 * MIB };
        let idle = budget.measured(measured(1271 * MIB), written);
        assert_eq!(idle, Task { anything: 0, unused: 0 }, "nearly all of it is there");
        let measured = measured(1276 * MIB);
        let low = budget.measured(measured, written);
        assert_eq!(low, Task { anything: 6 * MIB, unused: 6 * MIB });
        let _waiting = budget.begin_to_wait(16 * MIB, Claim::Anything).unwrap();
        let _other = budget.begin_to_wait(4 * MIB, Claim::Unused).unwrap();
        let busy = budget.measured(measured, written);
        assert_eq!(busy, Task { anything: 22 * MIB, unused: 26 * MIB });
        budget.disk_is_full();
        let full = budget.measured(measured, written);
        assert_eq!(full.anything, FULL_DISK_BYTES);
    }

    #[test]
    fn what_is_written_while_somebody_measures_is_not_lost() {
        let budget = budget(100 * MIB, 0);
        let before = budget.written();
        budget.try_reserve(30 * MIB, MIB, Claim::Anything).unwrap().spend(30 * MIB);
        budget.measured(Measured { used: 0, free: 1000 * MIB }, before);
        assert_eq!(lock(&budget.space).room(), 70 * MIB);
    }

    #[tokio::test]
    async fn who_finds_no_room_waits_for_the_evictor_but_not_in_vain() {
        let budget = budget(100 * MIB, 100 * MIB);
        let until = Instant::now() + Duration::from_secs(60);
        let evictor = async {
            tokio::task::yield_now().await;
            budget.measured(Measured { used: 50 * MIB, free: 1000 * MIB }, budget.written());
            budget.passed(Freed { wanted: BOTH, unused: 50 * MIB, parts: 0 });
        };
        let waiter = budget.reserve(16 * MIB, MIB, Claim::Anything, until);
        let (room, ()) = tokio::join!(waiter, evictor);
        assert_eq!(room.unwrap().left(), 16 * MIB);
        budget.measured(Measured { used: 100 * MIB, free: 1000 * MIB }, budget.written());
        let evictor = async {
            for _ in 0..2 {
                tokio::task::yield_now().await;
                budget.passed(Freed { wanted: BOTH, unused: 0, parts: 0 });
            }
        };
        let waiter = budget.reserve(16 * MIB, MIB, Claim::Anything, until);
        let (room, ()) = tokio::join!(waiter, evictor);
        assert!(room.is_none());
        assert!(budget.reserve(16 * MIB, MIB, Claim::Anything, until).await.is_none());
    }

    #[test]
    fn that_no_blob_is_unused_does_not_keep_parts_from_going() {
        let budget = budget(100 * MIB, 100 * MIB);
        let wanted = Task { anything: 0, unused: MIB };
        budget.passed(Freed { wanted, unused: 0, parts: 0 });
        assert!(budget.begin_to_wait(MIB, Claim::Unused).is_none());
        assert!(budget.begin_to_wait(MIB, Claim::Anything).is_some());
    }
}
