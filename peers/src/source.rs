//! A blob's registry with the peers before it.
//!
//! Invariant: what it gives is in sequence and without gap, whoever gives it. What peers can't give
//! comes from the registry, whose errors alone are passed on.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{SinkExt as _, StreamExt as _};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::time::{sleep, timeout};
use tracing::{trace, warn};
use weightfs_store::{ByteStream, Piece, Source, SourceError, SourceKind};
use weightfs_swarm::{Answer, GROUP_BYTES, Group, Inquiry, Node, Quest, Step, Urgency, Way};

use crate::client::Failure;
use crate::table::node_of;
use crate::wire::{self, Wanted};
use crate::{Name, Peers, Trust, lock};

/// Pieces that wait for whoever reads them.
const PIECES: usize = 2;

/// A range longer than this is no request for chunks: somebody wants the whole.
const MAX_RANGE: u64 = 64 << 20;

/// Who gave what, as far as it is remembered: what was checked by now.
const MAX_GIVEN: usize = 256;

/// How long a peer may give nothing before somebody else is asked. What nobody waits for yet is
/// waited for longer than the peer itself waits for the next chunk.
const fn stall(urgency: Urgency) -> Duration {
    match urgency {
        Urgency::Demand => Duration::from_secs(1),
        Urgency::Ahead | Urgency::Background => Duration::from_secs(6),
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct PeerSource(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    peers: Arc<Peers>,
    registry: Arc<dyn Source>,
    name: Name,
    given: Mutex<Given>,
    /// Whether the registry gives the blob as a whole only. Then peers are not asked: the whole
    /// is on its way anyway.
    whole_only: AtomicBool,
}

/// Who gives, and gave, what.
#[derive(Debug, Default)]
struct Given {
    /// At this moment.
    now: Vec<(Node, Range<u64>)>,
    /// Lately, and not found wrong.
    before: VecDeque<(Node, Range<u64>)>,
    /// What peers gave wrong: it comes from the registry.
    wrong: VecDeque<Range<u64>>,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

type Pieces = futures::channel::mpsc::Sender<Result<Piece, SourceError>>;

/// Why there will be no more pieces.
enum Ended {
    /// Whoever reads has gone away.
    Reader,
    /// The registry's error was passed on.
    Registry,
}

impl PeerSource {
    pub(crate) fn new(peers: Arc<Peers>, registry: Arc<dyn Source>, name: Name) -> Self {
        Self(Arc::new(Inner {
            peers,
            registry,
            name,
            given: Mutex::default(),
            whole_only: AtomicBool::new(false),
        }))
    }

    /// Whether peers may give bytes of the blob.
    fn asks_peers(&self, range: &Range<u64>) -> bool {
        let Inner { peers, name, whole_only, .. } = &*self.0;
        if whole_only.load(Ordering::Relaxed) {
            return false;
        }
        if range.end.saturating_sub(range.start) > MAX_RANGE || !peers.table.has_members() {
            return false;
        }
        let may_check = |blob: Arc<weightfs_store::Blob>| match peers.trust {
            Trust::Digest => blob.has_digests(),
            Trust::Cluster => true,
        };
        peers.shared(name).is_some_and(may_check)
    }
}

impl Source for PeerSource {
    fn name(&self) -> &str {
        self.0.registry.name()
    }

    fn host(&self) -> &str {
        self.0.registry.host()
    }

    fn fetch(
        &self,
        range: Range<u64>,
        urgency: Urgency,
    ) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        if !self.asks_peers(&range) {
            return self.0.registry.fetch(range, urgency);
        }
        let inner = Arc::clone(&self.0);
        Box::pin(async move {
            let (pieces, read) = futures::channel::mpsc::channel(PIECES);
            // Ends with its reader: a piece that nobody takes fails.
            let task = tokio::spawn(async move {
                let mut pieces = pieces;
                for part in wire::by_group(&range) {
                    if inner.fetch_part(part, urgency, &mut pieces).await.is_err() {
                        return;
                    }
                }
            });
            let task = AbortOnDrop(task);
            let read = read.map(move |piece| {
                let _with_the_stream = &task;
                piece
            });
            Ok(read.boxed())
        })
    }

    fn gave_wrong(&self, bytes: &Range<u64>) {
        self.0.gave_wrong(bytes);
        self.0.registry.gave_wrong(bytes);
    }
}

/// A task that ends with the stream that it feeds.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Inner {
    /// Bytes of one group.
    async fn fetch_part(
        &self,
        part: Range<u64>,
        urgency: Urgency,
        pieces: &mut Pieces,
    ) -> Result<(), Ended> {
        let table = &self.peers.table;
        let group = Group::at(self.name.key(), part.start);
        let mut quest = table.quest(group, urgency, self.expected_from(&part));
        let mut at = part.start;
        let mut told_to_pull = None;
        let arrival = self.peers.coming.note(&self.name, part.clone());
        while at < part.end {
            let rest = at..part.end;
            if self.was_wrong(&rest) {
                return self.take_from_registry(rest, urgency, pieces).await;
            }
            let step = table.step(&mut quest);
            trace!(blob = %self.name.digest, at, end = part.end, ?urgency, ?step);
            match step {
                Step::Wait(time) => sleep(time).await,
                Step::Look => {
                    let inquiry = self.inquiry(&quest, &rest, true);
                    table.look(&mut quest, &inquiry);
                }
                Step::Ask { peer, pull } => {
                    told_to_pull = self.ask(&mut quest, peer, pull, &rest, urgency).await;
                }
                Step::Fetch { peer } => {
                    let pull = told_to_pull == Some(peer);
                    arrival.comes_from(Some(peer));
                    at = self.take_from_peer(&mut quest, peer, pull, rest, urgency, pieces).await?;
                    arrival.comes_from(None);
                }
                Step::Registry(way) => {
                    let fallback = self.note_fallback(way);
                    let came = self.take_from_registry(rest, urgency, pieces).await;
                    if let (Some(mut fallback), Err(Ended::Registry)) = (fallback, &came) {
                        fallback.well = false;
                    }
                    return came;
                }
            }
        }
        Ok(())
    }

    fn inquiry(&self, quest: &Quest, bytes: &Range<u64>, pull: bool) -> Inquiry {
        let table = &self.peers.table;
        Inquiry {
            group: Group::at(self.name.key(), bytes.start),
            bytes: bytes.clone(),
            asker: node_of(&table.my_name().unwrap_or_default()),
            pull,
            except: quest.except().to_vec(),
            gone: quest.gone().to_vec(),
        }
    }

    /// Asks a peer where the bytes are; gives it if it has them, or pulls them.
    async fn ask(
        &self,
        quest: &mut Quest,
        peer: Node,
        pull: bool,
        bytes: &Range<u64>,
        urgency: Urgency,
    ) -> Option<Node> {
        let Peers { table, client, .. } = &*self.peers;
        let Some(member) = table.name(peer) else {
            table.failed(quest, peer);
            return None;
        };
        let inquiry = self.inquiry(quest, bytes, pull);
        let names = [table.names(quest.except()), table.names(quest.gone())];
        let me = table.my_name().unwrap_or_default();
        let question = wire::question(&self.name, &inquiry, &me, urgency, names);
        match client.locate(&member, question, urgency).await.ok().and_then(wire::answer) {
            Some(answer) => {
                trace!(blob = %self.name.digest, at = bytes.start, ?peer, pull, ?answer);
                let has_it = answer == Answer::Have;
                table.answered(quest, peer, pull, answer);
                has_it.then_some(peer)
            }
            None => {
                table.failed(quest, peer);
                None
            }
        }
    }

    /// Takes bytes from a peer, as far as they come; gives the byte after the last one.
    async fn take_from_peer(
        &self,
        quest: &mut Quest,
        peer: Node,
        pull: bool,
        bytes: Range<u64>,
        urgency: Urgency,
        pieces: &mut Pieces,
    ) -> Result<u64, Ended> {
        let Peers { table, client, counters, .. } = &*self.peers;
        let Some(member) = table.name(peer) else {
            table.failed(quest, peer);
            return Ok(bytes.start);
        };
        let asker = table.my_name().unwrap_or_default().to_string();
        let wanted = Wanted { name: self.name.clone(), bytes: bytes.clone(), asker, urgency, pull };
        let _expected = self.note_expected(peer, &bytes);
        let body = match client.fetch(&member, &wanted).await {
            Ok(answer) => answer.into_body(),
            Err(Failure::Refused) => {
                table.refused(quest, peer);
                return Ok(bytes.start);
            }
            Err(Failure::Gone) => {
                table.failed(quest, peer);
                return Ok(bytes.start);
            }
        };
        let mut body = Body { body, at: bytes.start, end: bytes.end };
        loop {
            let at = body.at;
            let piece = match timeout(stall(urgency), body.next()).await {
                Ok(Came::Piece(piece)) => piece,
                Ok(Came::End) if at == bytes.end => {
                    table.progressed(quest);
                    return Ok(at);
                }
                // It has got nothing more itself.
                Ok(Came::End) if at > bytes.start => return Ok(at),
                Ok(Came::End) => {
                    table.refused(quest, peer);
                    return Ok(at);
                }
                Ok(Came::Broken) => {
                    table.failed(quest, peer);
                    return Ok(at);
                }
                // It may wait for the next chunk itself. Who is dead does not answer the next
                // question either.
                Err(_) => {
                    table.refused(quest, peer);
                    return Ok(at);
                }
            };
            counters.came_from(peer, piece.len() as u64);
            self.note_given(peer, at..at + piece.len() as u64);
            table.progressed(quest);
            let piece = Piece { bytes: piece, from: SourceKind::Peer };
            pieces.send(Ok(piece)).await.map_err(|_| Ended::Reader)?;
        }
    }

    /// Takes bytes from the registry; passes its errors on.
    async fn take_from_registry(
        &self,
        bytes: Range<u64>,
        urgency: Urgency,
        pieces: &mut Pieces,
    ) -> Result<(), Ended> {
        let mut body = match self.registry.fetch(bytes, urgency).await {
            Ok(body) => body,
            Err(error) => {
                if matches!(error, SourceError::NoRanges { .. }) {
                    self.whole_only.store(true, Ordering::Relaxed);
                }
                return fail(pieces, error).await;
            }
        };
        while let Some(piece) = body.next().await {
            match piece {
                Ok(piece) => {
                    self.peers.counters.came_from_registry(piece.bytes.len() as u64);
                    pieces.send(Ok(piece)).await.map_err(|_| Ended::Reader)?;
                }
                Err(error) => return fail(pieces, error).await,
            }
        }
        Ok(())
    }

    fn note_fallback(&self, way: Way) -> Option<FallbackGuard<'_>> {
        if way == Way::Turn {
            return None;
        }
        self.peers.counters.fell_back();
        Some(FallbackGuard { peers: &self.peers, well: true })
    }

    /// From whom bytes of the range are expected already.
    fn expected_from(&self, range: &Range<u64>) -> Vec<Node> {
        let given = lock(&self.given);
        let now = given.now.iter().filter(|(_, bytes)| overlap(bytes, range));
        now.map(|(node, _)| *node).collect()
    }

    fn was_wrong(&self, range: &Range<u64>) -> bool {
        lock(&self.given).wrong.iter().any(|wrong| overlap(wrong, range))
    }

    fn note_expected(&self, peer: Node, bytes: &Range<u64>) -> Expected<'_> {
        lock(&self.given).now.push((peer, bytes.clone()));
        Expected { given: &self.given, peer, bytes: bytes.clone() }
    }

    fn note_given(&self, peer: Node, bytes: Range<u64>) {
        let mut given = lock(&self.given);
        match given.before.iter_mut().find(|(node, gave)| *node == peer && gave.end == bytes.start)
        {
            Some((_, gave)) => gave.end = bytes.end,
            None => {
                if given.before.len() == MAX_GIVEN {
                    given.before.pop_front();
                }
                given.before.push_back((peer, bytes));
            }
        }
    }

    /// A chunk that peers gave is wrong. From now on it comes from the registry; and if one alone
    /// gave it, that one lied, or has a bad disk.
    fn gave_wrong(&self, bytes: &Range<u64>) {
        let who: Vec<Node> = {
            let mut given = lock(&self.given);
            let mut who = vec![];
            given.before.retain(|(node, gave)| {
                let gave_some = overlap(gave, bytes);
                if gave_some && !who.contains(node) {
                    who.push(*node);
                }
                !gave_some
            });
            if !who.is_empty() {
                if given.wrong.len() == MAX_GIVEN {
                    given.wrong.pop_front();
                }
                given.wrong.push_back(bytes.clone());
            }
            who
        };
        let [liar] = who[..] else { return };
        let Peers { table, counters, .. } = &*self.peers;
        table.lied(liar);
        counters.lied();
        let (blob, start, peer) = (self.name.digest, bytes.start, table.name(liar));
        warn!(%blob, start, peer = peer.as_deref(), "a peer gave wrong bytes: it is not asked any more");
    }
}

async fn fail(pieces: &mut Pieces, error: SourceError) -> Result<(), Ended> {
    // Whether anybody hears it or not.
    let _ = pieces.send(Err(error)).await;
    Err(Ended::Registry)
}

/// The bytes of a peer's answer, no more than were asked for.
struct Body {
    body: Incoming,
    at: u64,
    end: u64,
}

enum Came {
    Piece(Bytes),
    End,
    Broken,
}

impl Body {
    async fn next(&mut self) -> Came {
        loop {
            let Some(frame) = self.body.frame().await else { return Came::End };
            let Ok(frame) = frame else { return Came::Broken };
            let Ok(mut piece) = frame.into_data() else { continue };
            if piece.is_empty() {
                continue;
            }
            let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
            if left == 0 {
                return Came::Broken;
            }
            piece.truncate(left);
            self.at += piece.len() as u64;
            return Came::Piece(piece);
        }
    }
}

/// While a peer is to give bytes.
struct Expected<'a> {
    given: &'a Mutex<Given>,
    peer: Node,
    bytes: Range<u64>,
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        let mut given = lock(self.given);
        let known = |(peer, bytes): &(Node, Range<u64>)| *peer == self.peer && *bytes == self.bytes;
        if let Some(at) = given.now.iter().position(known) {
            given.now.swap_remove(at);
        }
    }
}

/// While the registry is asked for what peers should have given.
struct FallbackGuard<'a> {
    peers: &'a Peers,
    well: bool,
}

impl Drop for FallbackGuard<'_> {
    fn drop(&mut self) {
        self.peers.table.fallback_ended(self.well);
    }
}

// Requests are of whole groups, or of parts of one.
const _: () = assert!(MAX_RANGE.is_multiple_of(GROUP_BYTES));
