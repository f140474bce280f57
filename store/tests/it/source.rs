//! A source that does on command what registries do by accident.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use tokio::sync::watch;
use weightfs_store::{ByteStream, Piece, Source, SourceError, Urgency};

/// Bytes of a piece: neither a divisor nor a multiple of a chunk.
const PIECE_BYTES: u64 = 100_003;

/// What a source does to one request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Answers with this.
    Refuse(SourceError),
    /// Ends the body after so many bytes, as if it were whole.
    End(u64),
    /// Breaks the body off after so many bytes.
    Break(u64),
    /// Gives the bytes that lie so far behind those that it was asked for.
    Elsewhere(u64),
    /// Gives the bytes of another blob.
    Other(Bytes),
    /// Flips a bit of the byte at that offset of the blob.
    Flip(u64),
    /// Gives a byte each second.
    Trickle,
    /// Panics.
    Panic,
}

/// Bytes in memory, and what is to go wrong with them.
#[derive(Debug)]
pub struct TestSource {
    name: String,
    data: Bytes,
    faults: Mutex<VecDeque<Fault>>,
    requests: Mutex<Vec<Range<u64>>>,
    /// Bytes of each answer that are given before the source holds its breath.
    allowed: watch::Sender<u64>,
    away: AtomicBool,
}

impl TestSource {
    pub fn new(name: &str, data: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            data: data.into(),
            faults: Mutex::default(),
            requests: Mutex::default(),
            allowed: watch::Sender::new(u64::MAX),
            away: AtomicBool::new(false),
        })
    }

    /// The next requests meet these faults, one each.
    pub fn fail(&self, faults: impl IntoIterator<Item = Fault>) {
        self.faults.lock().unwrap().extend(faults);
    }

    /// The next requests meet none.
    pub fn clear_faults(&self) {
        self.faults.lock().unwrap().clear();
    }

    /// Refuses all requests from now on.
    pub fn go_away(&self) {
        self.away.store(true, Ordering::SeqCst);
    }

    /// Is there again.
    pub fn come_back(&self) {
        self.away.store(false, Ordering::SeqCst);
    }

    /// Gives so many bytes of each answer and then nothing, until it is allowed more.
    pub fn allow(&self, bytes: u64) {
        self.allowed.send_replace(bytes);
    }

    /// The ranges that were asked for since the last call.
    pub fn take_requests(&self) -> Vec<Range<u64>> {
        std::mem::take(&mut *self.requests.lock().unwrap())
    }

    /// Waits until so many requests were made.
    pub async fn requested(&self, count: usize) {
        while self.requests.lock().unwrap().len() < count {
            tokio::task::yield_now().await;
        }
    }

    /// The bytes that a lie is made of, and others the whole.
    fn data_for(&self, fault: Option<&Fault>) -> Bytes {
        match fault {
            Some(Fault::Elsewhere(by)) => {
                let by = *by as usize % self.data.len();
                [&self.data[by..], &self.data[..by]].concat().into()
            }
            Some(Fault::Other(data)) => data.clone(),
            Some(Fault::Flip(at)) => {
                let mut data = self.data.to_vec();
                data[*at as usize] ^= 4;
                data.into()
            }
            _ => self.data.clone(),
        }
    }

    fn body(&self, range: Range<u64>, fault: Option<Fault>) -> ByteStream {
        if let Some(Fault::Trickle) = fault {
            return trickle(self.data.slice(range.start as usize..range.end as usize));
        }
        let (end, breaks) = match fault {
            Some(Fault::End(bytes)) => (range.end.min(range.start + bytes), false),
            Some(Fault::Break(bytes)) => (range.end.min(range.start + bytes), true),
            _ => (range.end, false),
        };
        let (data, name, allowed) =
            (self.data_for(fault.as_ref()), self.name.clone(), self.allowed.subscribe());
        let start = range.start;
        stream::unfold((start, allowed, breaks), move |(at, mut allowed, breaks)| {
            let (data, name) = (data.clone(), name.clone());
            async move {
                allowed.wait_for(|bytes| at - start < *bytes).await.ok()?;
                if at >= end {
                    let error = unreachable(&name);
                    return breaks.then(|| (Err(error), (at, allowed, false)));
                }
                let limit = start.saturating_add(*allowed.borrow());
                let next = (at + PIECE_BYTES).min(end).min(limit);
                let piece = Piece::of_registry(data.slice(at as usize..next as usize));
                Some((Ok(piece), (next, allowed, breaks)))
            }
        })
        .boxed()
    }
}

/// A byte each second.
fn trickle(data: Bytes) -> ByteStream {
    stream::unfold(data, async |mut data| {
        tokio::time::sleep(Duration::from_secs(1)).await;
        (!data.is_empty()).then(|| (Ok(Piece::of_registry(data.split_to(1))), data))
    })
    .boxed()
}

pub fn unreachable(name: &str) -> SourceError {
    SourceError::Unreachable { source_name: name.to_owned(), message: "connection reset".into() }
}

pub fn status(status: u16, retry_after: Option<u64>) -> SourceError {
    let (source_name, what) = ("test".to_owned(), "blob".to_owned());
    let retry_after = retry_after.map(Duration::from_secs);
    SourceError::Status { source_name, what, status, retry_after }
}

impl Source for TestSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn host(&self) -> &str {
        &self.name
    }

    fn fetch(
        &self,
        range: Range<u64>,
        _urgency: Urgency,
    ) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        Box::pin(async move {
            self.requests.lock().unwrap().push(range.clone());
            if self.away.load(Ordering::SeqCst) {
                return Err(unreachable(&self.name));
            }
            let fault = self.faults.lock().unwrap().pop_front();
            match fault {
                Some(Fault::Refuse(error)) => Err(error),
                Some(Fault::Panic) => panic!("a source that panics"),
                fault => Ok(self.body(range, fault)),
            }
        })
    }
}
