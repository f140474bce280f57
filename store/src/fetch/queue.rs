//! Which requests wait, which run, and which chunk belongs to which. No I/O and no clock.
//!
//! Invariants: a chunk has a flight exactly while it is part of a request that waits or runs and
//! is not published; the chunks of two such requests never overlap in flights.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Outcome, Patience, Ticket};
use crate::chunk::{ChunkNo, each};
use crate::layout::CHUNK_BYTES;
use crate::presence::Presence;

/// Chunks that wait for read-ahead at the most (8 GiB); beyond it, what waits longest is dropped:
/// its reader has moved on, or asks for it again.
const MAX_WAITING_AHEAD: u32 = 8192;

/// How many requests, and how large.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    connections: usize,
    request_chunks: u32,
}

impl Limits {
    /// At least one request of one chunk.
    pub(super) fn new(connections: usize, request_bytes: u64) -> Self {
        let chunks = u32::try_from(request_bytes / CHUNK_BYTES).unwrap_or(u32::MAX);
        Self { connections: connections.max(1), request_chunks: chunks.max(1) }
    }

    /// Requests that may run for the sake of read-ahead: some are kept free, so that a read in
    /// demand need not wait until one of them ends.
    fn for_read_ahead(&self) -> usize {
        let kept_free = if self.connections > 1 { self.connections.div_ceil(4) } else { 0 };
        self.connections - kept_free
    }
}

/// What comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Priority {
    /// A reader waits.
    Demand,
    /// A reader will come.
    ReadAhead,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RequestId(u64);

/// A ranged read of chunks in sequence, inside one segment.
#[derive(Debug)]
pub(super) struct Request {
    id: RequestId,
    priority: Priority,
    pub(super) chunks: Range<ChunkNo>,
    pub(super) patience: Arc<Patience>,
}

#[derive(Debug)]
struct Flight {
    request: RequestId,
    patience: Arc<Patience>,
    waiters: Vec<oneshot::Sender<Outcome>>,
}

/// The requests of one priority.
#[derive(Debug, Default)]
struct Lane {
    waiting: VecDeque<Request>,
    running: usize,
}

impl Lane {
    fn start(&mut self) -> Option<Request> {
        let request = self.waiting.pop_front()?;
        self.running += 1;
        Some(request)
    }
}

/// The requests of a blob.
#[derive(Debug, Default)]
pub(super) struct Queue {
    demand: Lane,
    read_ahead: Lane,
    flights: HashMap<ChunkNo, Flight>,
    next_id: u64,
}

impl Queue {
    /// Joins or begins a flight for each absent chunk. The chunks lie in one segment.
    pub(super) fn demand(
        &mut self,
        chunks: &Range<ChunkNo>,
        presence: &Presence,
        limits: Limits,
        until: Instant,
    ) -> Vec<Ticket> {
        // A published chunk has no flight, or one that is about to be taken away: see `landed`.
        let absent: Vec<_> = each(chunks).filter(|chunk| !presence.has(*chunk)).collect();
        for chunk in &absent {
            self.promote(*chunk);
        }
        for request in self.requests(chunks, presence, limits, Priority::Demand, until) {
            self.demand.waiting.push_back(request);
        }
        absent.into_iter().filter_map(|chunk| self.join(chunk, until)).collect()
    }

    /// Begins a flight for each absent chunk that has none.
    pub(super) fn read_ahead(
        &mut self,
        chunks: &Range<ChunkNo>,
        presence: &Presence,
        limits: Limits,
        until: Instant,
    ) {
        for request in self.requests(chunks, presence, limits, Priority::ReadAhead, until) {
            self.read_ahead.waiting.push_back(request);
        }
        while self.read_ahead.waiting.iter().map(Request::len).sum::<u32>() > MAX_WAITING_AHEAD {
            let Some(dropped) = self.read_ahead.waiting.pop_front() else { return };
            self.remove_flights(&dropped);
        }
    }

    /// The next request to run, if there is room for it.
    pub(super) fn start_next(&mut self, limits: Limits) -> Option<Request> {
        if self.demand.running + self.read_ahead.running >= limits.connections {
            return None;
        }
        self.demand.start().or_else(|| {
            let room = self.read_ahead.running < limits.for_read_ahead();
            if room { self.read_ahead.start() } else { None }
        })
    }

    /// A chunk was published: its flight is over. To be called after the publication, so that who
    /// finds no flight under the queue's lock finds the chunk.
    pub(super) fn landed(&mut self, chunk: ChunkNo) -> Vec<oneshot::Sender<Outcome>> {
        self.flights.remove(&chunk).map_or_else(Vec::new, |flight| flight.waiters)
    }

    /// A request ended. Gives who still waits for chunks of it.
    pub(super) fn ended(&mut self, request: &Request) -> Vec<oneshot::Sender<Outcome>> {
        let lane = match request.priority {
            Priority::Demand => &mut self.demand,
            Priority::ReadAhead => &mut self.read_ahead,
        };
        lane.running = lane.running.saturating_sub(1);
        self.remove_flights(request)
    }

    fn remove_flights(&mut self, request: &Request) -> Vec<oneshot::Sender<Outcome>> {
        let mut waiters = vec![];
        for chunk in each(&request.chunks) {
            if self.flights.get(&chunk).is_some_and(|flight| flight.request == request.id) {
                waiters.append(&mut self.landed(chunk));
            }
        }
        waiters
    }

    fn join(&mut self, chunk: ChunkNo, until: Instant) -> Option<Ticket> {
        let flight = self.flights.get_mut(&chunk)?;
        let (sender, outcome) = oneshot::channel();
        flight.waiters.push(sender);
        flight.patience.extend(until);
        Some(Ticket { outcome, patience: Arc::clone(&flight.patience) })
    }

    /// Requests, with flights, for what is neither published nor in flight: adjacent chunks
    /// together, up to the limit.
    fn requests(
        &mut self,
        chunks: &Range<ChunkNo>,
        presence: &Presence,
        limits: Limits,
        priority: Priority,
        until: Instant,
    ) -> Vec<Request> {
        let wanted = |chunk: &ChunkNo| !presence.has(*chunk) && !self.flights.contains_key(chunk);
        let mut runs: Vec<Range<ChunkNo>> = vec![];
        for chunk in each(chunks).filter(wanted) {
            match runs.last_mut() {
                Some(run)
                    if run.end == chunk && run.end.0 - run.start.0 < limits.request_chunks =>
                {
                    run.end = chunk.next();
                }
                _ => runs.push(chunk..chunk.next()),
            }
        }
        let mut make = |chunks| self.request(chunks, priority, Arc::new(Patience::new(until)));
        runs.into_iter().map(&mut make).collect()
    }

    /// A request to which the flights of its chunks belong from now on.
    fn request(
        &mut self,
        chunks: Range<ChunkNo>,
        priority: Priority,
        patience: Arc<Patience>,
    ) -> Request {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        for chunk in each(&chunks) {
            let waiters = self.landed(chunk);
            let patience = Arc::clone(&patience);
            self.flights.insert(chunk, Flight { request: id, patience, waiters });
        }
        Request { id, priority, chunks, patience }
    }

    /// If the chunk is part of a read-ahead that waits, that goes to the end of the demand, from
    /// the chunk on; what comes before the chunk stays where it is.
    fn promote(&mut self, chunk: ChunkNo) {
        let Some(id) = self.flights.get(&chunk).map(|flight| flight.request) else { return };
        let Some(at) = self.read_ahead.waiting.iter().position(|request| request.id == id) else {
            return;
        };
        let Some(mut whole) = self.read_ahead.waiting.remove(at) else { return };
        let patience = Arc::new(Patience::new(whole.patience.until()));
        let rest = self.request(chunk..whole.chunks.end, Priority::Demand, patience);
        self.demand.waiting.push_back(rest);
        whole.chunks.end = chunk;
        if !whole.is_empty() {
            self.read_ahead.waiting.insert(at, whole);
        }
    }
}

impl Request {
    fn len(&self) -> u32 {
        self.chunks.end.0 - self.chunks.start.0
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::{ChunkTable, VerifiedChunk};
    use crate::layout::Layout;

    const LIMITS: Limits = Limits { connections: 4, request_chunks: 16 };

    fn chunks(range: Range<u32>) -> Range<ChunkNo> {
        ChunkNo(range.start)..ChunkNo(range.end)
    }

    fn soon() -> Instant {
        Instant::now() + std::time::Duration::from_secs(30)
    }

    fn publish(presence: &Presence, number: u32) {
        let table = ChunkTable::new(Layout::whole(1000 * CHUNK_BYTES)).unwrap();
        let chunk = ChunkNo(number);
        let bytes = table.bytes_of(chunk).unwrap().1;
        presence.publish(&VerifiedChunk::check(&table, chunk, &bytes).unwrap());
    }

    fn started(queue: &mut Queue) -> Vec<Range<ChunkNo>> {
        std::iter::from_fn(|| queue.start_next(LIMITS)).map(|request| request.chunks).collect()
    }

    #[test]
    fn a_second_reader_joins_and_adds_only_what_is_new() {
        let (mut queue, presence) = (Queue::default(), Presence::new(1000));
        assert_eq!(queue.demand(&chunks(3..5), &presence, LIMITS, soon()).len(), 2);
        assert_eq!(queue.demand(&chunks(2..6), &presence, LIMITS, soon()).len(), 4);
        assert_eq!(started(&mut queue), [chunks(3..5), chunks(2..3), chunks(5..6)]);
    }

    #[test]
    fn adjacent_chunks_are_one_request_up_to_the_limit() {
        let (mut queue, presence) = (Queue::default(), Presence::new(1000));
        publish(&presence, 20);
        let tickets = queue.demand(&chunks(0..40), &presence, LIMITS, soon());
        assert_eq!(tickets.len(), 39);
        let expected = [chunks(0..16), chunks(16..20), chunks(21..37), chunks(37..40)];
        assert_eq!(started(&mut queue), expected);
    }

    #[test]
    fn demand_overtakes_read_ahead_and_finds_room() {
        let (mut queue, presence) = (Queue::default(), Presence::new(1000));
        queue.read_ahead(&chunks(100..400), &presence, LIMITS, soon());
        assert_eq!(started(&mut queue).len(), 3, "one connection is kept for demand");
        queue.demand(&chunks(0..1), &presence, LIMITS, soon());
        assert_eq!(started(&mut queue), [chunks(0..1)]);
        queue.demand(&chunks(1..2), &presence, LIMITS, soon());
        assert!(started(&mut queue).is_empty(), "no more than the connections");
    }

    #[test]
    fn a_read_of_what_waits_for_read_ahead_promotes_it_from_there_on() {
        let (mut queue, presence) = (Queue::default(), Presence::new(1000));
        queue.read_ahead(&chunks(0..80), &presence, LIMITS, soon());
        assert_eq!(started(&mut queue).len(), 3);
        assert_eq!(queue.demand(&chunks(70..71), &presence, LIMITS, soon()).len(), 1);
        assert_eq!(started(&mut queue), [chunks(70..80)]);
        let waiting: Vec<_> = queue.read_ahead.waiting.iter().map(|r| r.chunks.clone()).collect();
        assert_eq!(waiting, [chunks(48..64), chunks(64..70)]);
    }

    #[test]
    fn a_request_that_ends_frees_its_place_and_its_chunks() {
        let (mut queue, presence) = (Queue::default(), Presence::new(1000));
        let tickets = queue.demand(&chunks(0..3), &presence, LIMITS, soon());
        let request = queue.start_next(LIMITS).unwrap();
        publish(&presence, 0);
        assert_eq!(queue.landed(ChunkNo(0)).len(), 1);
        assert_eq!(queue.ended(&request).len(), 2);
        assert!(queue.flights.is_empty() && queue.demand.running == 0);
        drop(tickets);
        queue.demand(&chunks(0..3), &presence, LIMITS, soon());
        assert_eq!(started(&mut queue), [chunks(1..3)], "asked for again, without what is here");
    }

    #[test]
    fn ending_a_request_leaves_the_flights_of_others() {
        let (mut queue, presence) = (Queue::default(), Presence::new(1000));
        queue.read_ahead(&chunks(0..16), &presence, LIMITS, soon());
        let first = queue.start_next(LIMITS).unwrap();
        publish(&presence, 5);
        queue.landed(ChunkNo(5));
        // Chunk 5 is published; whatever comes for it later is no business of the first request.
        let _later = queue.request(chunks(5..6), Priority::Demand, Arc::clone(&first.patience));
        queue.ended(&first);
        assert_eq!(queue.flights.keys().collect::<Vec<_>>(), [&ChunkNo(5)]);
    }

    #[test]
    fn waiting_read_ahead_is_bounded() {
        let (mut queue, presence) = (Queue::default(), Presence::new(100_000));
        queue.read_ahead(&chunks(0..50_000), &presence, LIMITS, soon());
        let waiting: u32 = queue.read_ahead.waiting.iter().map(Request::len).sum();
        assert!(waiting <= MAX_WAITING_AHEAD);
        assert_eq!(queue.flights.len() as u32, waiting);
        assert!(queue.flights.contains_key(&ChunkNo(49_999)), "the newest stay");
    }

    #[test]
    fn one_connection_serves_both() {
        let (mut queue, presence) = (Queue::default(), Presence::new(10));
        let limits = Limits::new(1, 0);
        queue.read_ahead(&chunks(0..2), &presence, limits, soon());
        let request = queue.start_next(limits).unwrap();
        assert_eq!(request.chunks, chunks(0..1));
        assert!(queue.start_next(limits).is_none());
    }
}
