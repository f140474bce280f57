//! The line to one host: how many requests it bears, and which priority may start the next.
//! No I/O and no clock of its own.
//!
//! *How many.* The limit begins low and doubles while that brings more throughput; when it
//! doesn't, the last doubling is taken back and tried again later. A host that says that it is
//! asked too much (429, 503) halves it; from then on it grows by one at a time.
//!
//! *How large.* A request should last a few times as long as the wait for its first byte: shorter
//! ones leave the line idle, and in longer ones, which share the line, a stream waits for its next
//! bytes behind much that it needs later.
//!
//! *Which.* Demand may use the whole line. The others leave a part of it free, so that a read in
//! demand finds room at once. Every [`FLOOR_EVERY`]th start is offered in the reverse order, so
//! that nobody starves.

use std::time::Duration;

use tokio::time::Instant;

use crate::Urgency;

use crate::layout::CHUNK_BYTES;

/// What comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Priority {
    /// A reader waits.
    Demand,
    /// A reader will come: its stream leads there.
    ReadAhead,
    /// A reader is expected: earlier loads, or the format of the file, say so.
    Profile,
    /// Nobody has asked, but the file is in use.
    Background,
}

impl Priority {
    /// What sources know of it.
    pub(crate) const fn urgency(self) -> Urgency {
        match self {
            Self::Demand => Urgency::Demand,
            Self::ReadAhead => Urgency::Ahead,
            Self::Profile | Self::Background => Urgency::Background,
        }
    }
}

/// From the most to the least urgent.
pub(crate) const PRIORITIES: [Priority; 4] =
    [Priority::Demand, Priority::ReadAhead, Priority::Profile, Priority::Background];

/// Requests that a host is sent at once before it is known what it gives: enough for a fast one
/// nearby, and few enough for a small one. They share the line: the more there are, the later the
/// first of them is complete, for which a stream waits.
const FIRST_LIMIT: usize = 8;

/// A host whose first answer takes a multiple of this is sent that multiple of [`FIRST_LIMIT`] at
/// once from then on, up to the largest one: from far away it takes more requests to fill a line.
const FAR: Duration = Duration::from_millis(25);
const FARTHEST: usize = 4;

/// Requests that a read-ahead window is spread over: in small ones the first bytes come early, and
/// in parallel. But each costs its source some milliseconds, whatever its size: from a registry
/// nearby a gigabyte is read sooner in 4 than in 8 (8 %), and than in 2.
pub(super) const REQUESTS_PER_WINDOW: u64 = 8;
const REQUESTS_PER_WINDOW_NEARBY: u64 = 4;

/// How much more throughput twice as many requests must bring to be worth their memory.
const WORTH_DOUBLING: f64 = 1.3;

/// How long a limit that was found is kept before more is tried.
const HOLD: Duration = Duration::from_secs(20);

/// How long a host that asked for less is left alone.
const RESPITE: Duration = Duration::from_secs(5);

/// Shortest time that throughput is measured over; shorter ones measure chance.
const MIN_EPOCH: Duration = Duration::from_millis(100);

/// How long the body of a request should take, in waits for a first byte, and at the least.
const BODY_PER_WAIT: f64 = 2.0;
const SHORTEST_BODY: Duration = Duration::from_millis(250);

/// The share of the last request in what is known of them.
const NEWEST: f64 = 0.25;

/// Of so many starts, one is offered to the least urgent first.
const FLOOR_EVERY: u32 = 8;

/// Chunks of a request that nobody has asked for: it must not hold its place for long.
const PLANNED_CHUNKS: u32 = 8;

/// The same of background, while a reader waits.
const PLANNED_BESIDE_DEMAND: u32 = 4;

/// How the limit changes at the end of an epoch.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Growth {
    /// Doubled. `before` is the throughput of the limit before, in bytes a second.
    Doubling { before: f64 },
    /// Found; more is tried then.
    Settled { until: Instant },
    /// Halved, because the host complained; left alone until then.
    Respite { until: Instant },
    /// One more each time, because the host has complained.
    Careful,
}

/// The state of a line.
#[derive(Debug)]
pub(super) struct Line {
    limit: usize,
    largest: usize,
    growth: Growth,
    epoch: Epoch,
    /// By priority.
    running: [usize; PRIORITIES.len()],
    starts: u32,
    usual: Option<Usual>,
}

/// How a request went.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// Until its first byte came.
    pub(super) wait: Duration,
    /// From then on.
    pub(super) body: Duration,
}

/// How requests go lately.
#[derive(Debug, Clone, Copy)]
struct Usual {
    /// Seconds until the first byte.
    wait: f64,
    /// Bytes a second from then on.
    rate: f64,
}

/// What is measured between two looks at the limit.
#[derive(Debug)]
struct Epoch {
    began: Instant,
    bytes: u64,
    ended: usize,
    /// Whether there was work that the limit held back.
    full: bool,
}

impl Epoch {
    fn new(now: Instant) -> Self {
        Self { began: now, bytes: 0, ended: 0, full: false }
    }
}

impl Line {
    /// A line of `largest` requests at the most.
    pub(super) fn new(largest: usize, now: Instant) -> Self {
        Self {
            limit: FIRST_LIMIT.min(largest.max(1)),
            largest: largest.max(1),
            growth: Growth::Doubling { before: 0.0 },
            epoch: Epoch::new(now),
            running: [0; PRIORITIES.len()],
            starts: 0,
            usual: None,
        }
    }

    /// Bytes of a request that nobody waits for, at the most.
    pub(super) fn request_bytes(&self) -> u64 {
        let Some(Usual { wait, rate }) = self.usual else { return u64::MAX };
        let body = (BODY_PER_WAIT * wait).max(SHORTEST_BODY.as_secs_f64());
        // Saturates; a rate is neither negative nor NaN.
        ((rate * body) as u64).max(CHUNK_BYTES)
    }

    /// Bytes of the requests of a read-ahead window.
    pub(super) fn window_request_bytes(&self, window: u64) -> u64 {
        let requests = match self.usual {
            Some(usual) if usual.wait < FAR.as_secs_f64() => REQUESTS_PER_WINDOW_NEARBY,
            _ => REQUESTS_PER_WINDOW,
        };
        (window / requests).max(CHUNK_BYTES).min(self.request_bytes())
    }

    /// A request that brought `bytes` went so.
    pub(super) fn note(&mut self, bytes: u64, times: Times) {
        // Shorter ones say little of the rate.
        if bytes < CHUNK_BYTES {
            return;
        }
        let wait = times.wait.as_secs_f64();
        let rate = bytes as f64 / times.body.as_secs_f64().max(1e-6);
        let mix = |old: f64, new: f64| old + (new - old) * NEWEST;
        self.usual = Some(match self.usual {
            None => {
                let far = (wait / FAR.as_secs_f64()) as usize;
                let first = FIRST_LIMIT * far.clamp(1, FARTHEST);
                self.limit = self.limit.max(first.min(self.largest));
                Usual { wait, rate }
            }
            Some(old) => Usual { wait: mix(old.wait, wait), rate: mix(old.rate, rate) },
        });
    }

    /// Requests that it bears, as far as is known.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    pub(super) fn running_requests(&self) -> usize {
        self.running.iter().sum()
    }

    /// The priorities that may start a request now, in the order in which to ask them.
    pub(super) fn offers(&self) -> impl Iterator<Item = Priority> + use<> {
        let reversed = self.starts % FLOOR_EVERY == FLOOR_EVERY - 1;
        let mut order = PRIORITIES;
        if reversed {
            order.reverse();
        }
        let open = order.map(|priority| self.has_room(priority).then_some(priority));
        open.into_iter().flatten()
    }

    /// There is work for the line; if it has no room for it, more room may be worth it.
    pub(super) fn note_held_back(&mut self) {
        self.epoch.full |= self.running_requests() + self.kept_free() >= self.limit;
    }

    /// Chunks of a planned request at the most.
    pub(super) fn planned_chunks(&self, priority: Priority) -> u32 {
        let beside_demand = self.running(Priority::Demand) > 0;
        let most = if priority == Priority::Background && beside_demand {
            PLANNED_BESIDE_DEMAND
        } else {
            PLANNED_CHUNKS
        };
        let usual = u32::try_from(self.request_bytes() / CHUNK_BYTES).unwrap_or(u32::MAX);
        usual.clamp(1, most)
    }

    fn is_background_alone(&self) -> bool {
        self.running_requests() == self.running(Priority::Background)
    }

    pub(super) fn started(&mut self, priority: Priority) {
        self.running[slot(priority)] += 1;
        self.starts = self.starts.wrapping_add(1);
    }

    /// A request ended that brought `bytes`.
    pub(super) fn ended(&mut self, priority: Priority, bytes: u64, now: Instant) {
        let running = &mut self.running[slot(priority)];
        *running = running.saturating_sub(1);
        self.epoch.bytes += bytes;
        self.epoch.ended += 1;
        // Each place on the line was used about twice, so what came says something of the limit.
        if self.epoch.ended >= 2 * self.limit && now >= self.epoch.began + MIN_EPOCH {
            self.adapt(now);
        }
    }

    /// The host says that it is asked too much.
    pub(super) fn refused(&mut self, now: Instant) {
        // All requests of one moment are refused together; that counts once.
        let just_halved =
            matches!(self.growth, Growth::Respite { .. }) && now < self.epoch.began + MIN_EPOCH;
        if just_halved {
            return;
        }
        self.limit = (self.limit / 2).max(1);
        self.growth = Growth::Respite { until: now + RESPITE };
        self.epoch = Epoch::new(now);
    }

    fn adapt(&mut self, now: Instant) {
        let epoch = std::mem::replace(&mut self.epoch, Epoch::new(now));
        if !epoch.full {
            return;
        }
        let rate = epoch.bytes as f64 / (now - epoch.began).as_secs_f64();
        let limit = self.limit;
        let settled = Growth::Settled { until: now + HOLD };
        (self.limit, self.growth) = match self.growth {
            Growth::Doubling { before } if rate < before * WORTH_DOUBLING => {
                ((limit / 2).max(1), settled)
            }
            Growth::Settled { until } | Growth::Respite { until } if now < until => return,
            Growth::Respite { .. } | Growth::Careful => {
                ((limit + 1).min(self.largest), Growth::Careful)
            }
            // Not doubled, so the next look could not tell what it brought.
            Growth::Doubling { .. } | Growth::Settled { .. } if limit * 2 > self.largest => {
                (self.largest, settled)
            }
            Growth::Doubling { .. } | Growth::Settled { .. } => {
                (limit * 2, Growth::Doubling { before: rate })
            }
        };
    }

    fn running(&self, priority: Priority) -> usize {
        self.running[slot(priority)]
    }

    /// Places that only demand may take.
    fn kept_free(&self) -> usize {
        if self.limit > 1 { self.limit.div_ceil(4) } else { 0 }
    }

    fn has_room(&self, priority: Priority) -> bool {
        let total = self.running_requests();
        let unhurried = total - self.running(Priority::Demand);
        let shared = self.limit - self.kept_free();
        let own = match priority {
            Priority::Demand => return total < self.limit,
            Priority::ReadAhead => shared,
            Priority::Profile => (self.limit / 2).max(1),
            // Alone it may use what the others may. Beside streams it takes what they leave over:
            // their windows grow in steps, and the line is never idle between two. Beside readers
            // who wait it takes a quarter: random reads all over a file end soonest when the whole
            // of it comes soon.
            Priority::Background if self.is_background_alone() => shared,
            Priority::Background if self.running(Priority::Demand) == 0 => (self.limit / 2).max(1),
            Priority::Background => (self.limit / 4).max(1),
        };
        total < self.limit && unhurried < shared && self.running(priority) < own
    }
}

fn slot(priority: Priority) -> usize {
    priority as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A host whose requests of 1 MiB take `latency` and share `rate` bytes a second; so many
    /// rounds of a full line.
    fn rounds(line: &mut Line, now: &mut Instant, latency: f64, rate: f64, count: usize) {
        for _ in 0..count {
            let requests = line.limit;
            for _ in 0..requests {
                line.started(Priority::Demand);
            }
            line.note_held_back();
            let bytes = requests as u64 * MIB;
            *now += Duration::from_secs_f64(latency + bytes as f64 / rate);
            for _ in 0..requests {
                line.ended(Priority::Demand, MIB, *now);
            }
        }
    }

    fn starts(line: &mut Line, priority: Priority) -> usize {
        let mut count = 0;
        while line.has_room(priority) {
            line.started(priority);
            count += 1;
        }
        count
    }

    #[test]
    fn the_limit_grows_while_that_brings_throughput() {
        let mut now = Instant::now();
        let mut far = Line::new(64, now);
        rounds(&mut far, &mut now, 1.0, 1e9, 8);
        assert_eq!(far.limit, 64, "latency bound");
        let mut near = Line::new(64, now);
        rounds(&mut near, &mut now, 0.001, 1e8, 40);
        assert_eq!(near.limit, FIRST_LIMIT, "the line is full with few");
    }

    #[test]
    fn a_host_that_complains_is_asked_half_and_then_carefully_more() {
        let mut now = Instant::now();
        let mut line = Line::new(64, now);
        rounds(&mut line, &mut now, 1.0, 1e9, 8);
        line.refused(now);
        line.refused(now);
        assert_eq!(line.limit, 32, "complaints of one moment count once");
        rounds(&mut line, &mut now, 1.0, 1e9, 3);
        assert_eq!(line.limit, 32, "a respite");
        rounds(&mut line, &mut now, 1.0, 1e9, 12);
        assert!((34..=38).contains(&line.limit), "{}", line.limit);
        for _ in 0..10 {
            now += Duration::from_secs(1);
            line.refused(now);
        }
        assert_eq!(line.limit, 1, "never none");
    }

    #[test]
    fn a_line_that_is_not_full_says_nothing_of_its_limit() {
        let mut now = Instant::now();
        let mut line = Line::new(64, now);
        for _ in 0..100 {
            line.started(Priority::Demand);
            now += Duration::from_secs(1);
            line.ended(Priority::Demand, MIB, now);
        }
        assert_eq!(line.limit, FIRST_LIMIT);
    }

    #[test]
    fn demand_finds_room_beside_everything_else() {
        let mut line = Line::new(8, Instant::now());
        assert_eq!(starts(&mut line, Priority::Background), 6);
        assert_eq!(starts(&mut line, Priority::ReadAhead), 0);
        assert_eq!(starts(&mut line, Priority::Demand), 2);
        let mut line = Line::new(8, Instant::now());
        assert_eq!(starts(&mut line, Priority::ReadAhead), 6);
        assert_eq!(starts(&mut line, Priority::Background), 0);
        assert_eq!(starts(&mut line, Priority::Demand), 2);
    }

    #[test]
    fn background_takes_what_streams_leave_over_and_less_beside_demand() {
        let mut line = Line::new(8, Instant::now());
        line.started(Priority::ReadAhead);
        assert_eq!(starts(&mut line, Priority::Background), 4);
        assert_eq!(line.planned_chunks(Priority::Background), PLANNED_CHUNKS);
        let mut line = Line::new(8, Instant::now());
        line.started(Priority::Demand);
        assert_eq!(starts(&mut line, Priority::Background), 2);
        assert_eq!(line.planned_chunks(Priority::Background), PLANNED_BESIDE_DEMAND);
    }

    #[test]
    fn nobody_starves_beside_endless_demand() {
        let now = Instant::now();
        let mut line = Line::new(4, now);
        starts(&mut line, Priority::Demand);
        let mut started = [0; PRIORITIES.len()];
        for _ in 0..800 {
            line.ended(Priority::Demand, 0, now);
            // All have work.
            let next = line.offers().next().unwrap();
            line.started(next);
            started[slot(next)] += 1;
            if next != Priority::Demand {
                line.ended(next, 0, now);
                line.started(Priority::Demand);
            }
        }
        assert!(started[slot(Priority::Background)] > 20, "{started:?}");
        assert!(started[slot(Priority::Demand)] > 600, "{started:?}");
    }

    #[test]
    fn requests_are_as_large_as_their_wait_and_their_rate_make_worth_while() {
        let mut line = Line::new(8, Instant::now());
        assert_eq!(line.request_bytes(), u64::MAX, "nothing is known");
        assert_eq!(line.window_request_bytes(64 * MIB), 8 * MIB);
        assert_eq!(line.window_request_bytes(MIB), MIB, "a chunk at the least");
        let (ms, mib) = (Duration::from_millis, MIB as f64);
        // 2 MiB a second for each request, and a second's wait.
        line.note(4 * MIB, Times { wait: ms(1000), body: ms(2000) });
        assert_eq!(line.request_bytes(), 4 * MIB);
        assert_eq!(line.planned_chunks(Priority::Profile), 4);
        assert_eq!(line.window_request_bytes(16 * MIB), 2 * MIB, "far away");
        assert_eq!(line.window_request_bytes(64 * MIB), 4 * MIB);
        line.note(100, Times { wait: ms(0), body: ms(0) });
        assert_eq!(line.request_bytes(), 4 * MIB, "too little to tell");
        for _ in 0..100 {
            line.note(16 * MIB, Times { wait: ms(2), body: ms(100) });
        }
        let near = line.request_bytes() as f64 / mib;
        assert!((39.0..41.0).contains(&near), "160 MiB a second for 250 ms: {near}");
        assert_eq!(line.window_request_bytes(64 * MIB), 16 * MIB, "nearby");
    }

    #[test]
    fn a_host_far_away_is_sent_more_at_once() {
        for (wait, limit) in [(3, 8), (30, 8), (60, 16), (1000, 32)] {
            let mut line = Line::new(64, Instant::now());
            let (wait, body) = (Duration::from_millis(wait), Duration::from_millis(10));
            line.note(MIB, Times { wait, body });
            assert_eq!(line.limit, limit, "{wait:?}");
        }
        let mut small = Line::new(4, Instant::now());
        small.note(MIB, Times { wait: Duration::from_secs(1), body: Duration::ZERO });
        assert_eq!(small.limit, 4, "never over the configured bound");
    }

    #[test]
    fn one_place_serves_all() {
        let mut line = Line::new(1, Instant::now());
        for priority in PRIORITIES {
            assert_eq!(starts(&mut line, priority), 1);
            line.ended(priority, 0, Instant::now());
        }
    }
}
