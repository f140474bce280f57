//! How much is asked of the registry for groups whose homes are others: little at first, and more
//! while that goes well. Nodes that lose their peers all at once don't fall upon the registry all
//! at once, and yet each of them soon has what it would have without peers.

use std::time::Duration;

use crate::{Now, Urgency};

/// Requests at once to begin with.
const FIRST: usize = 2;

/// Requests at once at the most: as many as go to one host anyway.
const MOST: usize = 64;

/// More for readers who wait.
const FOR_DEMAND: usize = 2;

/// Without a request for so long, it begins anew.
const FORGET_AFTER: Duration = Duration::from_secs(10);

/// See the module. The window grows by one for each request that went well, so it doubles with
/// each round, and halves with each that failed.
#[derive(Debug)]
pub struct Fallback {
    window: usize,
    running: usize,
    last: Now,
}

impl Default for Fallback {
    fn default() -> Self {
        Self { window: FIRST, running: 0, last: Now::ZERO }
    }
}

impl Fallback {
    /// Whether one more may be sent now; it is if this says so, and then must be
    /// [`Fallback::ended`].
    pub fn try_start(&mut self, urgency: Urgency, now: Now) -> bool {
        if self.running == 0 && now.saturating_sub(self.last) > FORGET_AFTER {
            self.window = FIRST;
        }
        let most = match urgency {
            Urgency::Demand => self.window + FOR_DEMAND,
            Urgency::Ahead | Urgency::Background => self.window,
        };
        let may = self.running < most;
        if may {
            self.running += 1;
            self.last = now;
        }
        may
    }

    /// One is over.
    pub fn ended(&mut self, well: bool, now: Now) {
        self.running = self.running.saturating_sub(1);
        self.last = now;
        self.window = if well { (self.window + 1).min(MOST) } else { (self.window / 2).max(1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn starts(fallback: &mut Fallback, urgency: Urgency, now: Now) -> usize {
        std::iter::from_fn(|| fallback.try_start(urgency, now).then_some(())).count()
    }

    #[test]
    fn it_begins_with_few_and_doubles_with_each_round_that_goes_well() {
        let (mut fallback, mut now) = (Fallback::default(), Now::ZERO);
        for round in [2, 4, 8, 16, 32, 64, 64] {
            assert_eq!(starts(&mut fallback, Urgency::Ahead, now), round);
            now += Duration::from_secs(1);
            (0..round).for_each(|_| fallback.ended(true, now));
        }
        assert_eq!(starts(&mut fallback, Urgency::Ahead, now + FORGET_AFTER * 2), FIRST);
    }

    #[test]
    fn a_registry_that_fails_is_asked_less_but_never_nothing() {
        let mut fallback = Fallback::default();
        for _ in 0..10 {
            let started = starts(&mut fallback, Urgency::Background, Now::ZERO);
            assert!(started >= 1);
            (0..started).for_each(|_| fallback.ended(false, Now::ZERO));
        }
        assert_eq!(starts(&mut fallback, Urgency::Background, Now::ZERO), 1);
        assert_eq!(starts(&mut fallback, Urgency::Demand, Now::ZERO), FOR_DEMAND);
    }
}
