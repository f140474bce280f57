//! The bytes of one try of a request, from one answer or from two: a slow one is asked for again,
//! and whoever is ahead is listened to.
//!
//! Invariant: what is given is in sequence and without gap, whoever it comes from. The second
//! answer begins where the first one was when it was asked for; what it brings that is known is
//! dropped, and once it is ahead the first one is given up.

use std::ops::Range;

use futures::future::FutureExt;
use futures::stream::{BoxStream, StreamExt, TryStreamExt};
use tokio::time::{Instant, sleep_until};

use super::hedge::{Hedging, Usual};
use super::line::Priority;
use super::scheduler::{Place, Scheduler};
use crate::source::{Piece, Source, SourceKind};
use crate::{SourceError, Urgency};

type Next = Option<Result<Piece, SourceError>>;

/// One answer.
struct Runner<'a> {
    /// Its next byte in the blob.
    at: u64,
    wanted: Range<u64>,
    began: Instant,
    body: BoxStream<'a, Result<Piece, SourceError>>,
}

impl<'a> Runner<'a> {
    fn new(source: &'a dyn Source, wanted: Range<u64>, urgency: Urgency) -> Self {
        let body = source.fetch(wanted.clone(), urgency).into_stream().try_flatten().boxed();
        Self { at: wanted.start, wanted, began: Instant::now(), body }
    }

    fn has_begun(&self) -> bool {
        self.at > self.wanted.start
    }

    /// Takes a piece; what of it lies behind `position`.
    fn take(&mut self, mut piece: Piece, position: u64) -> Piece {
        let known = usize::try_from(position - self.at).unwrap_or(usize::MAX);
        self.at += piece.bytes.len() as u64;
        piece.bytes = piece.bytes.split_off(known.min(piece.bytes.len()));
        piece
    }
}

/// Whether there is a second answer.
enum Second<'a> {
    /// It is asked for when the first is slow by then.
    Waits(Usual),
    Runs(Runner<'a>, Place<'a>),
    /// There was one, or there will be none.
    Never,
}

/// Who has something to say.
enum Said {
    First(Next),
    Second(Next),
    /// The first is slow.
    Slow,
}

/// A request to a source, and perhaps its repetition.
pub(super) struct Race<'a> {
    source: &'a dyn Source,
    urgency: Urgency,
    scheduler: &'a Scheduler,
    /// The next byte to give.
    position: u64,
    first: Runner<'a>,
    second: Second<'a>,
    /// Bytes that came and were known already, and from whom.
    dropped: Vec<(SourceKind, u64)>,
}

impl<'a> Race<'a> {
    pub(super) fn new(
        source: &'a dyn Source,
        scheduler: &'a Scheduler,
        wanted: Range<u64>,
        priority: Priority,
    ) -> Self {
        let usual = scheduler.hedging().sent(source.host(), wanted.end - wanted.start);
        let second = match (priority, usual) {
            // Nobody waits for the others.
            (Priority::Demand | Priority::ReadAhead, Some(usual)) => Second::Waits(usual),
            _ => Second::Never,
        };
        let urgency = priority.urgency();
        let (position, first) = (wanted.start, Runner::new(source, wanted, urgency));
        Self { source, urgency, scheduler, position, first, second, dropped: Vec::new() }
    }

    /// The next bytes, as [`Source::fetch`] gives them.
    pub(super) async fn next(&mut self) -> Next {
        loop {
            match self.listen().await {
                Said::Slow => self.ask_again(),
                Said::First(Some(Ok(piece))) => {
                    if let Some(new) = self.first_said(piece) {
                        return Some(Ok(new));
                    }
                }
                Said::First(ended) => match std::mem::replace(&mut self.second, Second::Never) {
                    // It failed or was cut, but there is another one.
                    Second::Runs(second, _place) if self.position < self.first.wanted.end => {
                        self.first = second;
                    }
                    _ => return ended,
                },
                Said::Second(Some(Ok(piece))) => {
                    if let Some(new) = self.second_said(piece) {
                        return Some(Ok(new));
                    }
                }
                Said::Second(Some(Err(_)) | None) => {
                    // Whoever refuses the second has enough to do.
                    self.hedging().refused(self.source.host());
                    self.second = Second::Never;
                }
            }
        }
    }

    /// Bytes that came for nothing since the last call.
    pub(super) fn take_dropped(&mut self) -> Vec<(SourceKind, u64)> {
        std::mem::take(&mut self.dropped)
    }

    async fn listen(&mut self) -> Said {
        let first = self.first.body.next();
        match &mut self.second {
            Second::Never => Said::First(first.await),
            Second::Waits(usual) => {
                let begun = self.first.at > self.first.wanted.start;
                let usual = if begun { usual.whole } else { usual.first.min(usual.whole) };
                let slow = self.first.began + usual;
                tokio::select! {
                    biased;
                    piece = first => Said::First(piece),
                    () = sleep_until(slow) => Said::Slow,
                }
            }
            Second::Runs(second, _) => tokio::select! {
                biased;
                piece = first => Said::First(piece),
                piece = second.body.next() => Said::Second(piece),
            },
        }
    }

    fn ask_again(&mut self) {
        let rest = self.position..self.first.wanted.end;
        let place = if rest.is_empty() { None } else { self.scheduler.hedge(self.source.host()) };
        self.second = match place {
            Some(place) => Second::Runs(Runner::new(self.source, rest, self.urgency), place),
            None => Second::Never,
        };
    }

    fn hedging(&self) -> &'a Hedging {
        self.scheduler.hedging()
    }

    fn first_said(&mut self, piece: Piece) -> Option<Piece> {
        if !self.first.has_begun() {
            self.hedging().began(self.source.host(), self.first.began.elapsed());
            if matches!(self.second, Second::Runs(..)) {
                // It was only its answer that took so long.
                self.second = Second::Never;
            }
        }
        let new = self.first.take(piece, self.position);
        self.advance(new)
    }

    fn second_said(&mut self, piece: Piece) -> Option<Piece> {
        let Second::Runs(second, _) = &mut self.second else { return None };
        let len = piece.bytes.len();
        let new = second.take(piece, self.position);
        let known = len - new.bytes.len();
        if known > 0 {
            self.dropped.push((new.from, known as u64));
        }
        if !new.bytes.is_empty()
            && let Second::Runs(second, _) = std::mem::replace(&mut self.second, Second::Never)
        {
            // How long the first would have taken is not known; longer than this at least.
            let (bytes, time) = (self.first.wanted.clone(), self.first.began.elapsed());
            self.hedging().ended(self.source.host(), bytes.end - bytes.start, time);
            self.first = second;
            self.scheduler.overtook();
        }
        self.advance(new)
    }

    fn advance(&mut self, new: Piece) -> Option<Piece> {
        self.position += new.bytes.len() as u64;
        if self.position >= self.first.wanted.end && !new.bytes.is_empty() {
            let bytes = self.first.wanted.end - self.first.wanted.start;
            self.hedging().ended(self.source.host(), bytes, self.first.began.elapsed());
            self.second = Second::Never;
        }
        (!new.bytes.is_empty()).then_some(new)
    }
}
