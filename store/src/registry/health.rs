//! Whether a host answers, so that not every request finds out for itself.
//!
//! Invariants: no host is given up. One that fails is asked after the others for a while, and then
//! first by a single request. One that asks for time (Retry-After) is asked nothing until then.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use super::host::Host;
use crate::shared::lock;

/// How long a host is set aside after its first failure in a row; each more doubles it.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest that it is set aside: so long a host that is back may go unnoticed.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The longest that a host is left alone because it asked for it. More may be a mistake, and nobody
/// would notice when it is over.
const LONGEST_REST: Duration = Duration::from_secs(60);

/// How a host has answered lately.
#[derive(Debug, Default)]
pub(super) struct Health(Mutex<State>);

#[derive(Debug, Default)]
enum State {
    #[default]
    Well,
    /// It asked for time.
    Resting {
        until: Instant,
        /// What it answered with.
        status: u16,
    },
    Aside {
        failures: u32,
        until: Instant,
        /// Whether one request tries it now.
        tried: bool,
    },
}

impl Health {
    /// It answered as it should. An answer that was on its way says nothing about a host that asked
    /// for time since.
    pub(super) fn well(&self) {
        let mut state = lock(&self.0);
        if !matches!(*state, State::Resting { until, .. } if Instant::now() < until) {
            *state = State::Well;
        }
    }

    /// It did not answer, or said that it can't. Requests that fail together count once.
    pub(super) fn failed(&self) {
        let mut state = lock(&self.0);
        let now = Instant::now();
        let failures = match *state {
            State::Resting { until, .. } if now < until => return,
            State::Well | State::Resting { .. } => 0,
            State::Aside { until, tried: false, .. } if now < until => return,
            State::Aside { failures, .. } => failures,
        };
        let pause = FIRST_PAUSE.saturating_mul(1 << failures.min(16)).min(LONGEST_PAUSE);
        *state = State::Aside { failures: failures + 1, until: now + pause, tried: false };
    }

    /// It answered with this status, and that it be left alone for so long.
    pub(super) fn asked_for_rest(&self, status: u16, rest: Duration) {
        let until = Instant::now() + rest.min(LONGEST_REST);
        *lock(&self.0) = State::Resting { until, status };
    }

    /// How long it is still to be left alone, and with which status it asked for that.
    pub(super) fn resting(&self) -> Option<(u16, Duration)> {
        match *lock(&self.0) {
            State::Resting { until, status } => {
                let left = until.saturating_duration_since(Instant::now());
                (!left.is_zero()).then_some((status, left))
            }
            State::Well | State::Aside { .. } => None,
        }
    }

    /// Whether to ask it in its turn. When its pause is over, one caller hears yes, and the others
    /// wait for what comes of it.
    fn is_in_turn(&self) -> bool {
        match &mut *lock(&self.0) {
            State::Well | State::Resting { .. } => true,
            State::Aside { until, .. } if Instant::now() < *until => false,
            State::Aside { until, tried, .. } => {
                (*until, *tried) = (Instant::now() + FIRST_PAUSE, true);
                true
            }
        }
    }
}

/// Hosts in the order in which to ask them: those that were set aside come last.
pub(super) fn by_health<'a>(
    hosts: impl Iterator<Item = &'a Arc<Host>>,
) -> impl Iterator<Item = &'a Arc<Host>> {
    let hosts: Vec<_> = hosts.collect();
    let only = hosts.len() == 1;
    let (well, aside): (Vec<_>, Vec<_>) =
        hosts.into_iter().partition(|host| only || host.health().is_in_turn());
    well.into_iter().chain(aside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_host_that_fails_is_tried_again_by_one_after_growing_pauses() {
        let health = Health::default();
        assert!(health.is_in_turn());
        for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
            health.failed();
            health.failed();
            tokio::time::advance(Duration::from_secs(pause) - Duration::from_millis(1)).await;
            assert!(!health.is_in_turn(), "{pause}");
            tokio::time::advance(Duration::from_millis(2)).await;
            assert!(health.is_in_turn(), "{pause}");
            assert!(!health.is_in_turn(), "one is enough");
        }
        health.well();
        assert!(health.is_in_turn() && health.is_in_turn());
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_asks_for_time_gets_it_and_no_more_than_a_minute() {
        let health = Health::default();
        health.asked_for_rest(429, Duration::from_secs(5));
        health.failed();
        health.well();
        tokio::time::advance(Duration::from_secs(4)).await;
        assert_eq!(health.resting(), Some((429, Duration::from_secs(1))));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(health.resting(), None);
        assert!(health.is_in_turn());
        health.asked_for_rest(503, Duration::MAX);
        assert_eq!(health.resting(), Some((503, LONGEST_REST)));
    }
}
