//! A source that does on command what registries do by accident.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use tokio::sync::watch;
use weightfs_store::{ByteStream, Source, SourceError};

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
}

impl TestSource {
    pub fn new(name: &str, data: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            data: data.into(),
            faults: Mutex::default(),
            requests: Mutex::default(),
            allowed: watch::Sender::new(u64::MAX),
        })
    }

    /// The next requests meet these faults, one each.
    pub fn fail(&self, faults: impl IntoIterator<Item = Fault>) {
        self.faults.lock().unwrap().extend(faults);
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

    fn body(&self, range: Range<u64>, fault: Option<Fault>) -> ByteStream {
        let (end, breaks) = match fault {
            Some(Fault::End(bytes)) => (range.end.min(range.start + bytes), false),
            Some(Fault::Break(bytes)) => (range.end.min(range.start + bytes), true),
            _ => (range.end, false),
        };
        let (data, name, allowed) =
            (self.data.clone(), self.name.clone(), self.allowed.subscribe());
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
                Some((Ok(data.slice(at as usize..next as usize)), (next, allowed, breaks)))
            }
        })
        .boxed()
    }
}

pub fn unreachable(name: &str) -> SourceError {
    SourceError::Unreachable { source_name: name.to_owned(), message: "connection reset".into() }
}

pub fn status(status: u16, retry_after: Option<u64>) -> SourceError {
    let (source_name, what) = ("test".to_owned(), "blob".to_owned());
    SourceError::Status { source_name, what, status, retry_after }
}

impl Source for TestSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn host(&self) -> &str {
        &self.name
    }

    fn fetch(&self, range: Range<u64>) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        Box::pin(async move {
            self.requests.lock().unwrap().push(range.clone());
            let fault = self.faults.lock().unwrap().pop_front();
            match fault {
                Some(Fault::Refuse(error)) => Err(error),
                Some(Fault::Panic) => panic!("a source that panics"),
                fault => Ok(self.body(range, fault)),
            }
        })
    }
}
