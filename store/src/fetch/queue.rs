//! Which requests of a blob wait, which run, and which chunk belongs to which. No I/O and no
//! clock.
//!
//! Invariants: a chunk has a flight exactly while it is part of a request that waits or runs and
//! is not published; the chunks of two such requests never overlap in flights. A request that
//! runs goes forward through its chunks and ends where [`Request::end`] says, which may come
//! nearer while it runs, but never nearer than the chunk after the one that is being written.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{Span, debug_span};
use weightfs_swarm::Scatter;

use super::line::Priority;
use super::plan::Plan;
use super::{Patience, Ticket, Waiter};
use crate::chunk::{ChunkNo, ChunkTable, each};
use crate::layout::CHUNK_BYTES;
use crate::presence::Presence;
use crate::read_ahead::Access;

/// Chunks that wait for read-ahead at the most (8 GiB); beyond it, what waits longest is dropped:
/// its reader has moved on, or asks for it again.
const MAX_WAITING_AHEAD: u32 = 8192;

/// Chunks that a random read waits for at the most behind others of a running request. Two take
/// about as long as a request of its own.
const MAX_CHUNKS_BEHIND: u32 = 2;

/// How many requests, and how large.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    connections: usize,
    request_chunks: u32,
}

impl Limits {
    /// At least one request of one chunk.
    pub(super) fn new(connections: usize, request_bytes: u64) -> Self {
        Self { connections: connections.max(1), request_chunks: to_chunks(request_bytes) }
    }

    /// Requests that may run besides those in demand: some places are kept free, so that a read
    /// in demand need not wait until one of them ends.
    fn unhurried(&self) -> usize {
        let kept_free = if self.connections > 1 { self.connections.div_ceil(4) } else { 0 };
        self.connections - kept_free
    }
}

/// Whole chunks that fit; at least one.
fn to_chunks(bytes: u64) -> u32 {
    u32::try_from(bytes / CHUNK_BYTES).unwrap_or(u32::MAX).max(1)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct RequestId(u64);

/// A ranged read of chunks in sequence, inside one segment.
#[derive(Debug)]
pub(super) struct Request {
    id: RequestId,
    pub(super) priority: Priority,
    chunks: Range<ChunkNo>,
    end: Arc<AtomicU32>,
    pub(super) patience: Arc<Patience>,
    /// What is traced of it, below what was the first to want it.
    pub(super) span: Span,
}

impl Request {
    /// One that is in no queue: nobody joins it.
    pub(super) fn alone(chunks: Range<ChunkNo>, until: Instant) -> Self {
        let end = Arc::new(AtomicU32::new(chunks.end.0));
        let (id, patience) = (RequestId(u64::MAX), Arc::new(Patience::new(until)));
        let priority = Priority::ReadAhead;
        Self { id, priority, chunks, end, patience, span: Span::none() }
    }

    pub(super) fn start(&self) -> ChunkNo {
        self.chunks.start
    }

    /// One past its last chunk, as things are now.
    pub(super) fn end(&self) -> ChunkNo {
        ChunkNo(self.end.load(Ordering::Acquire))
    }

    fn len(&self) -> u32 {
        self.chunks.end.0 - self.chunks.start.0
    }
}

/// What is known of a request that runs.
#[derive(Debug)]
struct Run {
    priority: Priority,
    /// The chunk that is being written.
    front: ChunkNo,
    end: Arc<AtomicU32>,
}

#[derive(Debug)]
struct Flight {
    request: RequestId,
    patience: Arc<Patience>,
    waiters: Vec<Waiter>,
}

/// The requests of a blob.
#[derive(Debug, Default)]
pub(super) struct Queue {
    demand: VecDeque<Request>,
    read_ahead: VecDeque<Request>,
    profile: Plan,
    background: Plan,
    running: HashMap<RequestId, Run>,
    flights: HashMap<ChunkNo, Flight>,
    next_id: u64,
    /// Whether the blob stands in its host's ring.
    pub(super) in_ring: bool,
}

impl Queue {
    /// Joins or begins a flight for each absent chunk. The chunks lie in one segment.
    pub(super) fn demand(
        &mut self,
        chunks: &Range<ChunkNo>,
        access: Access,
        presence: &Presence,
        limits: Limits,
        until: Instant,
    ) -> Vec<Ticket> {
        // A published chunk has no flight, or one that is about to be taken away: see `landed`.
        let absent: Vec<_> = each(chunks).filter(|chunk| !presence.has(*chunk)).collect();
        for chunk in &absent {
            self.promote(*chunk);
            if access == Access::Random {
                self.overtake(*chunk, chunks.end, until);
            }
        }
        let most = limits.request_chunks;
        for request in self.requests(chunks, presence, most, Priority::Demand, until) {
            self.demand.push_back(request);
        }
        absent.into_iter().filter_map(|chunk| self.join(chunk, until)).collect()
    }

    /// Begins a flight for each absent chunk that has none, in requests of `request_bytes`.
    pub(super) fn read_ahead(
        &mut self,
        chunks: &Range<ChunkNo>,
        request_bytes: u64,
        presence: &Presence,
        limits: Limits,
        until: Instant,
    ) {
        let most = to_chunks(request_bytes).min(limits.request_chunks);
        for request in self.requests(chunks, presence, most, Priority::ReadAhead, until) {
            self.read_ahead.push_back(request);
        }
        while self.read_ahead.iter().map(Request::len).sum::<u32>() > MAX_WAITING_AHEAD {
            let Some(dropped) = self.read_ahead.pop_front() else { return };
            self.remove_flights(&dropped);
        }
    }

    /// Adds chunks to what is fetched when there is room; they may lie in several segments.
    /// `order` grows with each call, over all blobs.
    pub(super) fn plan(&mut self, priority: Priority, order: u64, chunks: Range<ChunkNo>) {
        match priority {
            Priority::Profile => self.profile.add(order, chunks),
            Priority::Demand | Priority::ReadAhead | Priority::Background => {
                self.background.add(order, chunks);
            }
        }
    }

    /// What nobody has asked for is fetched in an order of this node's own from now on.
    pub(super) fn scatter(&mut self, scatter: Scatter) {
        self.background.scatter(scatter);
    }

    /// When the first of what is expected was planned.
    pub(super) fn first_expected(&self) -> Option<u64> {
        self.profile.first_order()
    }

    /// Gives up what is planned inside `chunks`.
    pub(super) fn drop_plans(&mut self, chunks: &Range<ChunkNo>) {
        self.profile.drop_within(chunks);
        self.background.drop_within(chunks);
    }

    /// Chunks that have a flight.
    pub(super) fn in_flight(&self) -> HashSet<ChunkNo> {
        self.flights.keys().copied().collect()
    }

    /// Requests that run.
    pub(super) fn running(&self) -> usize {
        self.running.len()
    }

    /// Whether nothing waits.
    pub(super) fn is_idle(&self) -> bool {
        self.demand.is_empty()
            && self.read_ahead.is_empty()
            && self.profile.is_empty()
            && self.background.is_empty()
    }

    /// Whether there is nothing that a reader waits or is expected for.
    pub(super) fn is_calm(&self) -> bool {
        self.demand.is_empty() && self.read_ahead.is_empty() && self.background.is_empty()
    }

    /// The next request of that priority, if there is one and room for it. A planned one has
    /// `planned` chunks at the most and may go on until `until`.
    pub(super) fn start_next(
        &mut self,
        priority: Priority,
        planned: u32,
        presence: &Presence,
        table: &ChunkTable,
        limits: Limits,
        until: Instant,
    ) -> Option<Request> {
        let in_demand = self.running.values().filter(|run| run.priority == Priority::Demand);
        let unhurried = self.running.len() - in_demand.count();
        let room = match priority {
            Priority::Demand => self.running.len() < limits.connections,
            _ => self.running.len() < limits.connections && unhurried < limits.unhurried(),
        };
        if !room {
            return None;
        }
        let request = match priority {
            Priority::Demand => self.demand.pop_front(),
            Priority::ReadAhead => self.read_ahead.pop_front(),
            Priority::Profile | Priority::Background => {
                let most = planned.min(limits.request_chunks);
                self.take_planned(priority, presence, table, most, until)
            }
        }?;
        let run = Run { priority, front: request.chunks.start, end: Arc::clone(&request.end) };
        self.running.insert(request.id, run);
        Some(request)
    }

    /// A chunk was published: its flight is over. To be called after the publication, so that who
    /// finds no flight under the queue's lock finds the chunk.
    pub(super) fn landed(&mut self, chunk: ChunkNo) -> Vec<Waiter> {
        let Some(flight) = self.flights.remove(&chunk) else { return vec![] };
        if let Some(run) = self.running.get_mut(&flight.request) {
            run.front = chunk.next();
        }
        flight.waiters
    }

    /// The first of `chunks` that somebody waits for.
    pub(super) fn first_waited_for(&self, chunks: &Range<ChunkNo>) -> Option<ChunkNo> {
        let waited = |chunk: &ChunkNo| {
            self.flights.get(chunk).is_some_and(|flight| !flight.waiters.is_empty())
        };
        each(chunks).find(waited)
    }

    /// A request ended. Gives who still waits for chunks of it.
    pub(super) fn ended(&mut self, request: &Request) -> Vec<Waiter> {
        self.running.remove(&request.id);
        self.remove_flights(request)
    }

    fn remove_flights(&mut self, request: &Request) -> Vec<Waiter> {
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
    /// together, `most` at the most.
    fn requests(
        &mut self,
        chunks: &Range<ChunkNo>,
        presence: &Presence,
        most: u32,
        priority: Priority,
        until: Instant,
    ) -> Vec<Request> {
        let wanted = |chunk: &ChunkNo| !presence.has(*chunk) && !self.flights.contains_key(chunk);
        let mut runs: Vec<Range<ChunkNo>> = vec![];
        for chunk in each(chunks).filter(wanted) {
            match runs.last_mut() {
                Some(run) if run.end == chunk && run.end.0 - run.start.0 < most => {
                    run.end = chunk.next();
                }
                _ => runs.push(chunk..chunk.next()),
            }
        }
        runs.into_iter().map(|chunks| self.request(chunks, priority, until)).collect()
    }

    fn take_planned(
        &mut self,
        priority: Priority,
        presence: &Presence,
        table: &ChunkTable,
        most: u32,
        until: Instant,
    ) -> Option<Request> {
        let plan =
            if priority == Priority::Profile { &mut self.profile } else { &mut self.background };
        let flights = &self.flights;
        let wanted = |chunk: ChunkNo| !presence.has(chunk) && !flights.contains_key(&chunk);
        let cut = |chunk: ChunkNo| match table.bytes_of(chunk) {
            Some((segment, _)) => table.of_segment(segment).end,
            None => chunk.next(),
        };
        let chunks = plan.take(wanted, cut, most)?;
        Some(self.request(chunks, priority, until))
    }

    /// A request to which the flights of its chunks belong from now on.
    fn request(&mut self, chunks: Range<ChunkNo>, priority: Priority, until: Instant) -> Request {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let patience = Arc::new(Patience::new(until));
        for chunk in each(&chunks) {
            let waiters =
                self.flights.remove(&chunk).map_or_else(Vec::new, |flight| flight.waiters);
            let patience = Arc::clone(&patience);
            self.flights.insert(chunk, Flight { request: id, patience, waiters });
        }
        let end = Arc::new(AtomicU32::new(chunks.end.0));
        let span = span(priority, &chunks);
        Request { id, priority, chunks, end, patience, span }
    }

    /// If the chunk is part of a read-ahead that waits, that goes to the end of the demand, from
    /// the chunk on; what comes before the chunk stays where it is.
    fn promote(&mut self, chunk: ChunkNo) {
        let Some(id) = self.flights.get(&chunk).map(|flight| flight.request) else { return };
        let Some(at) = self.read_ahead.iter().position(|request| request.id == id) else {
            return;
        };
        let Some(mut whole) = self.read_ahead.remove(at) else { return };
        let rest = self.request(chunk..whole.chunks.end, Priority::Demand, whole.patience.until());
        self.demand.push_back(rest);
        whole.chunks.end = chunk;
        whole.end.store(chunk.0, Ordering::Release);
        if !whole.chunks.is_empty() {
            self.read_ahead.insert(at, whole);
        }
    }

    /// If the chunk lies far ahead in a request that runs, that request ends before it, and the
    /// chunk, with what is in demand after it up to `end`, gets a request of its own. What
    /// remains waits for its turn again.
    fn overtake(&mut self, chunk: ChunkNo, end: ChunkNo, until: Instant) {
        let Some(flight) = self.flights.get(&chunk) else { return };
        let Some(run) = self.running.get(&flight.request) else { return };
        if chunk.0.saturating_sub(run.front.0) < MAX_CHUNKS_BEHIND {
            return;
        }
        let whole = chunk..ChunkNo(run.end.swap(chunk.0, Ordering::AcqRel));
        let rest = whole.end.min(end)..whole.end;
        let own = self.request(chunk..rest.start, Priority::Demand, until);
        self.demand.push_back(own);
        if rest.is_empty() {
            return;
        }
        let waited_for = each(&rest)
            .any(|chunk| self.flights.get(&chunk).is_some_and(|flight| !flight.waiters.is_empty()));
        if waited_for {
            let rest = self.request(rest, Priority::Demand, until);
            self.demand.push_back(rest);
        } else {
            let rest = self.request(rest, Priority::ReadAhead, until);
            self.read_ahead.push_front(rest);
        }
    }
}

/// The span of a request. What is planned is wanted by nobody.
fn span(priority: Priority, chunks: &Range<ChunkNo>) -> Span {
    let (first, count) = (chunks.start.0, chunks.end.0 - chunks.start.0);
    match priority {
        Priority::Demand | Priority::ReadAhead => {
            debug_span!("request", ?priority, first_chunk = first, chunks = count)
        }
        Priority::Profile | Priority::Background => {
            debug_span!(parent: None, "request", ?priority, first_chunk = first, chunks = count)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::VerifiedChunk;
    use crate::fetch::line::PRIORITIES;
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
        presence.publish(&VerifiedChunk::recorded(&table, ChunkNo(number)).unwrap());
    }

    /// A blob of 1000 chunks, in segments of 400.
    struct World {
        queue: Queue,
        presence: Presence,
        table: ChunkTable,
        limits: Limits,
    }

    impl World {
        fn new() -> Self {
            let cuts = [400 * CHUNK_BYTES, 800 * CHUNK_BYTES];
            let table = ChunkTable::new(Layout::new(1000 * CHUNK_BYTES, cuts).unwrap()).unwrap();
            Self { queue: Queue::default(), presence: Presence::new(1000), table, limits: LIMITS }
        }

        fn demand(&mut self, range: Range<u32>) -> Vec<Ticket> {
            self.demand_as(range, Access::Sequential)
        }

        fn demand_as(&mut self, range: Range<u32>, access: Access) -> Vec<Ticket> {
            self.queue.demand(&chunks(range), access, &self.presence, self.limits, soon())
        }

        fn read_ahead(&mut self, range: Range<u32>) {
            let size = 16 * CHUNK_BYTES;
            self.queue.read_ahead(&chunks(range), size, &self.presence, self.limits, soon());
        }

        /// Publishes a chunk; how many had waited for it.
        fn land(&mut self, number: u32) -> usize {
            publish(&self.presence, number);
            self.queue.landed(ChunkNo(number)).len()
        }

        fn start(&mut self) -> Option<Request> {
            let Self { queue, presence, table, limits } = self;
            PRIORITIES.into_iter().find_map(|priority| {
                queue.start_next(priority, 8, presence, table, *limits, soon())
            })
        }

        fn start_all(&mut self) -> Vec<Request> {
            std::iter::from_fn(|| self.start()).collect()
        }

        fn started(&mut self) -> Vec<Range<ChunkNo>> {
            self.start_all().into_iter().map(|request| request.chunks).collect()
        }
    }

    #[test]
    fn a_second_reader_joins_and_adds_only_what_is_new() {
        let mut world = World::new();
        assert_eq!(world.demand(3..5).len(), 2);
        assert_eq!(world.demand(2..6).len(), 4);
        assert_eq!(world.started(), [chunks(3..5), chunks(2..3), chunks(5..6)]);
    }

    #[test]
    fn adjacent_chunks_are_one_request_up_to_the_limit() {
        let mut world = World::new();
        publish(&world.presence, 20);
        assert_eq!(world.demand(0..40).len(), 39);
        let expected = [chunks(0..16), chunks(16..20), chunks(21..37), chunks(37..40)];
        assert_eq!(world.started(), expected);
    }

    #[test]
    fn demand_overtakes_read_ahead_and_finds_room() {
        let mut world = World::new();
        world.read_ahead(100..400);
        assert_eq!(world.started().len(), 3, "one connection is kept for demand");
        world.demand(0..1);
        assert_eq!(world.started(), [chunks(0..1)]);
        world.demand(1..2);
        assert!(world.started().is_empty(), "no more than the connections");
    }

    #[test]
    fn a_read_of_what_waits_for_read_ahead_promotes_it_from_there_on() {
        let mut world = World::new();
        world.read_ahead(0..80);
        assert_eq!(world.started().len(), 3);
        assert_eq!(world.demand(70..71).len(), 1);
        assert_eq!(world.started(), [chunks(70..80)]);
        let waiting: Vec<_> = world.queue.read_ahead.iter().map(|r| r.chunks.clone()).collect();
        assert_eq!(waiting, [chunks(48..64), chunks(64..70)]);
    }

    #[test]
    fn a_random_read_far_ahead_in_a_running_request_gets_one_of_its_own() {
        let mut world = World::new();
        world.read_ahead(0..16);
        let running = world.start().unwrap();
        world.land(0);
        assert_eq!(world.demand_as(9..10, Access::Random).len(), 1);
        assert_eq!((running.start(), running.end()), (ChunkNo(0), ChunkNo(9)));
        let rest = world.start_all();
        let ranges: Vec<_> = rest.iter().map(|request| request.chunks.clone()).collect();
        assert_eq!(ranges, [chunks(9..10), chunks(10..16)]);
        assert_eq!(world.queue.flights.len(), 15, "no chunk is lost");
        assert!(world.queue.ended(&running).is_empty(), "its reader waits for another request");
        assert_eq!(world.queue.flights.len(), 7);
        assert_eq!(world.land(9), 1);
    }

    #[test]
    fn what_is_about_to_come_is_waited_for() {
        let mut world = World::new();
        world.read_ahead(0..16);
        let running = world.start().unwrap();
        world.demand_as(1..2, Access::Random);
        world.demand(12..13);
        assert_eq!(running.end(), ChunkNo(16), "near, or part of a stream");
        assert!(world.start().is_none());
    }

    #[test]
    fn readers_of_what_an_overtaken_request_leaves_are_still_served_first() {
        let mut world = World::new();
        world.read_ahead(0..16);
        world.start().unwrap();
        world.demand(14..15);
        world.demand_as(5..6, Access::Random);
        assert_eq!(world.queue.demand.len(), 2);
        assert!(world.queue.read_ahead.is_empty());
    }

    #[test]
    fn a_request_that_ends_frees_its_place_and_its_chunks() {
        let mut world = World::new();
        let tickets = world.demand(0..3);
        let request = world.start().unwrap();
        assert_eq!(world.land(0), 1);
        assert_eq!(world.queue.ended(&request).len(), 2);
        assert!(world.queue.flights.is_empty() && world.queue.running.is_empty());
        drop(tickets);
        world.demand(0..3);
        assert_eq!(world.started(), [chunks(1..3)], "asked for again, without what is here");
    }

    #[test]
    fn ending_a_request_leaves_the_flights_of_others() {
        let mut world = World::new();
        world.read_ahead(0..16);
        let first = world.start().unwrap();
        world.land(5);
        // Chunk 5 is published; whatever comes for it later is no business of the first request.
        let _later = world.queue.request(chunks(5..6), Priority::Demand, soon());
        world.queue.ended(&first);
        assert_eq!(world.queue.flights.keys().collect::<Vec<_>>(), [&ChunkNo(5)]);
    }

    #[test]
    fn waiting_read_ahead_is_bounded() {
        let (mut queue, presence) = (Queue::default(), Presence::new(100_000));
        queue.read_ahead(&chunks(0..50_000), 16 * CHUNK_BYTES, &presence, LIMITS, soon());
        let waiting: u32 = queue.read_ahead.iter().map(Request::len).sum();
        assert!(waiting <= MAX_WAITING_AHEAD);
        assert_eq!(queue.flights.len() as u32, waiting);
        assert!(queue.flights.contains_key(&ChunkNo(49_999)), "the newest stay");
    }

    #[test]
    fn requests_of_read_ahead_are_as_large_as_its_stream_allows() {
        let mut world = World::new();
        world.queue.read_ahead(&chunks(0..3), 1, &world.presence, LIMITS, soon());
        assert_eq!(world.started(), [chunks(0..1), chunks(1..2), chunks(2..3)]);
    }

    #[test]
    fn plans_are_carried_out_in_order_without_what_others_fetch() {
        let mut world = World::new();
        world.limits = Limits::new(100, 64 * CHUNK_BYTES);
        world.queue.plan(Priority::Background, 0, chunks(390..410));
        world.queue.plan(Priority::Profile, 0, chunks(700..702));
        assert!(world.queue.flights.is_empty(), "a plan takes no memory");
        publish(&world.presence, 393);
        world.demand(395..397);
        let expected = [
            chunks(395..397),
            chunks(700..702),
            chunks(390..393),
            chunks(394..395),
            chunks(397..400),
            chunks(400..408),
            chunks(408..410),
        ];
        assert_eq!(world.started(), expected, "demand, profile, background; cut at a segment");
        assert!(world.queue.is_idle());
    }

    #[test]
    fn one_connection_serves_all() {
        let mut world = World::new();
        world.limits = Limits::new(1, 0);
        world.read_ahead(0..2);
        let request = world.start().unwrap();
        assert_eq!(request.chunks, chunks(0..1));
        assert!(world.start().is_none());
    }
}
