//! Which blob may send the next request: one line for each host, shared by all blobs that are
//! fetched from it, in turn.
//!
//! A blob with something to fetch stands in its host's ring until it has nothing left. Lock
//! order: the scheduler's state, then a blob's queue.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use tokio::time::Instant;

use super::hedge::Hedging;
use super::line::{Line, Priority, REQUESTS_PER_WINDOW, Times};
use super::queue::Request;
use crate::Blob;
use crate::counters::Counters;
use crate::shared::lock;

/// Memory that a request takes while it runs: what the HTTP client reads at once (417 KiB, hyper's
/// largest buffer) and the piece before that, which is being written.
const REQUEST_BUFFER_BYTES: usize = 1 << 20;

/// Memory for requests in flight, over all hosts.
const BUFFER_BUDGET_BYTES: usize = 64 << 20;

/// Requests in flight at the most, over all hosts.
const MAX_REQUESTS: usize = BUFFER_BUDGET_BYTES / REQUEST_BUFFER_BYTES;

/// Hosts that are remembered while nothing is fetched from them.
const MAX_IDLE_HOSTS: usize = 256;

/// The lines of a store.
#[derive(Debug)]
pub(crate) struct Scheduler {
    connections_per_host: usize,
    state: Mutex<State>,
    /// As in the state, for those who must not take its lock.
    running: AtomicUsize,
    hedging: Hedging,
    counters: Arc<Counters>,
    planned: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    hosts: HashMap<Arc<str>, Host>,
    running: usize,
}

#[derive(Debug)]
struct Host {
    line: Line,
    /// Blobs that may have something to fetch. They are not kept open by it.
    ring: VecDeque<Weak<Blob>>,
}

/// What goes on, over all hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// Requests that run.
    pub requests: usize,
    /// Requests that the hosts bear together, as far as is known.
    pub limit: usize,
    /// Hosts that are known.
    pub hosts: usize,
}

/// A request that is to run.
#[derive(Debug)]
pub(super) struct Next {
    pub(super) blob: Arc<Blob>,
    pub(super) request: Request,
    /// The host whose line it takes a place on.
    pub(super) host: Arc<str>,
}

impl Scheduler {
    pub(crate) fn new(connections_per_host: usize, counters: Arc<Counters>) -> Self {
        Self {
            connections_per_host,
            state: Mutex::default(),
            running: AtomicUsize::new(0),
            hedging: Hedging::default(),
            counters,
            planned: AtomicU64::new(0),
        }
    }

    /// A number for what is planned next.
    pub(super) fn next_order(&self) -> u64 {
        self.planned.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether anything is being fetched, from any host. Takes no lock.
    pub(crate) fn is_busy(&self) -> bool {
        self.running.load(Ordering::Relaxed) > 0
    }

    /// A blob has something to fetch from `host`.
    pub(super) fn enter(&self, host: &Arc<str>, blob: &Arc<Blob>) {
        let mut state = lock(&self.state);
        if state.hosts.len() >= MAX_IDLE_HOSTS {
            state
                .hosts
                .retain(|_, host| !(host.line.running_requests() == 0 && host.ring.is_empty()));
        }
        let largest = self.connections_per_host;
        let host = state.hosts.entry(Arc::clone(host)).or_insert_with(|| Host {
            line: Line::new(largest, Instant::now()),
            ring: VecDeque::new(),
        });
        if blob.fetcher().enters_ring() {
            host.ring.push_back(Arc::downgrade(blob));
        }
    }

    /// The next request, if there is room for one.
    pub(super) fn next(&self) -> Option<Next> {
        let mut state = lock(&self.state);
        let State { hosts, running } = &mut *state;
        if *running >= MAX_REQUESTS {
            return None;
        }
        let mut busy: Vec<_> = hosts.iter_mut().filter(|(_, host)| !host.ring.is_empty()).collect();
        // The buffers are shared by all hosts: who uses few of them comes first.
        busy.sort_by_key(|(_, host)| host.line.running_requests());
        for (name, host) in busy {
            if let Some((blob, request)) = host.start_next() {
                *running += 1;
                self.running.store(*running, Ordering::Relaxed);
                return Some(Next { blob, request, host: Arc::clone(name) });
            }
        }
        None
    }

    /// Bytes of the requests of a read-ahead window of so many bytes.
    pub(super) fn window_request_bytes(&self, host: &str, window: u64) -> u64 {
        let state = lock(&self.state);
        let line = state.hosts.get(host).map(|host| &host.line);
        line.map_or(window / REQUESTS_PER_WINDOW, |line| line.window_request_bytes(window))
    }

    /// A request that [`Scheduler::next`] gave is over; it brought `bytes`. `times` is how it
    /// went, if it went well.
    pub(super) fn ended(&self, host: &str, priority: Priority, bytes: u64, times: Option<Times>) {
        let mut state = lock(&self.state);
        state.running = state.running.saturating_sub(1);
        self.running.store(state.running, Ordering::Relaxed);
        if let Some(host) = state.hosts.get_mut(host) {
            host.line.ended(priority, bytes, Instant::now());
            if let Some(times) = times {
                host.line.note(bytes, times);
            }
        }
    }

    /// A host said that it is asked too much.
    pub(super) fn refused(&self, host: &str) {
        if let Some(host) = lock(&self.state).hosts.get_mut(host) {
            host.line.refused(Instant::now());
        }
        self.hedging.refused(host);
    }

    /// A request that was sent a second time came before the first.
    pub(super) fn overtook(&self) {
        self.counters.hedges_won.increment();
    }

    /// How things are on all lines.
    pub(crate) fn traffic(&self) -> Traffic {
        let state = lock(&self.state);
        let limits = state.hosts.values().map(|host| host.line.limit());
        Traffic { requests: state.running, limit: limits.sum(), hosts: state.hosts.len() }
    }

    /// What is known of slow requests.
    pub(super) fn hedging(&self) -> &Hedging {
        &self.hedging
    }

    /// A place for a request to `host` that is sent a second time, if there is one and the host
    /// may be asked again.
    pub(super) fn hedge(&self, host: &str) -> Option<Place<'_>> {
        let mut state = lock(&self.state);
        if state.running >= MAX_REQUESTS || !self.hedging.may_hedge(host) {
            return None;
        }
        state.running += 1;
        self.counters.hedges.increment();
        Some(Place(self))
    }
}

/// A place among all requests, beside that of the request it repeats; given back when dropped.
#[derive(Debug)]
pub(super) struct Place<'a>(&'a Scheduler);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.running = state.running.saturating_sub(1);
    }
}

impl Host {
    fn start_next(&mut self) -> Option<(Arc<Blob>, Request)> {
        for priority in self.line.offers() {
            if let Some(found) = self.start(priority) {
                self.line.started(priority);
                return Some(found);
            }
        }
        self.leave_ring();
        if !self.ring.is_empty() {
            self.line.note_held_back();
        }
        None
    }

    /// The next request of that priority, from the blobs in turn.
    fn start(&mut self, priority: Priority) -> Option<(Arc<Blob>, Request)> {
        let planned = self.line.planned_chunks(priority);
        if priority == Priority::Profile {
            return self.start_expected(planned);
        }
        for _ in 0..self.ring.len() {
            let blob = self.ring.pop_front()?;
            let Some(open) = blob.upgrade() else { continue };
            self.ring.push_back(blob);
            if let Some(request) = open.fetcher().start_next(&open, priority, planned) {
                return Some((open, request));
            }
        }
        None
    }

    /// What was expected first, whichever blob it is of: loads have an order.
    fn start_expected(&mut self, planned: u32) -> Option<(Arc<Blob>, Request)> {
        let open = self.ring.iter().filter_map(Weak::upgrade);
        let mut first: Vec<_> =
            open.filter_map(|blob| Some((blob.fetcher().first_expected()?, blob))).collect();
        first.sort_by_key(|(order, _)| *order);
        first.into_iter().find_map(|(_, blob)| {
            let request = blob.fetcher().start_next(&blob, Priority::Profile, planned)?;
            Some((blob, request))
        })
    }

    /// Takes out who has nothing to fetch any more.
    fn leave_ring(&mut self) {
        self.ring.retain(|blob| blob.upgrade().is_some_and(|blob| blob.fetcher().stays_in_ring()));
    }
}
