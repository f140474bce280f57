//! A line that is slower and longer than loopback: a TCP proxy with one token bucket for all
//! connections, and a delay before each response.
//!
//! Invariant: what passes is what came; only its time changes.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use weightfs_tests::remote::{block_on, spawn};

/// Bytes per second of all connections together.
pub(crate) const BYTES_PER_SECOND: f64 = 200e6;

/// What each response is late.
pub(crate) const LATENCY: Duration = Duration::from_millis(20);

/// How much unused time the bucket keeps: more than a timer's tick, so that the rate is reached.
const CREDIT: Duration = Duration::from_millis(5);

const PIECE_BYTES: usize = 64 << 10;

/// A running proxy.
#[derive(Debug)]
pub(crate) struct Throttle {
    address: SocketAddr,
    acceptor: JoinHandle<()>,
}

impl Throttle {
    /// Starts one in front of `host:port`.
    pub(crate) fn start(upstream: &str) -> Self {
        let upstream = upstream.to_owned();
        let listener = block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let address = listener.local_addr().expect("the address of a socket that listens");
        let acceptor = spawn(accept(listener, upstream));
        Self { address, acceptor }
    }

    /// `127.0.0.1:port`.
    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

/// Accepts until aborted; its connections end with it.
async fn accept(listener: TcpListener, upstream: String) {
    let bucket = Arc::new(Bucket { free_from: Mutex::new(Instant::now()) });
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        connections.spawn(pass(client, upstream.clone(), Arc::clone(&bucket)));
        while connections.try_join_next().is_some() {}
    }
}

async fn pass(client: TcpStream, upstream: String, bucket: Arc<Bucket>) -> io::Result<()> {
    let server = TcpStream::connect(upstream).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let asked = AtomicBool::new(false);
    // Either end that closes ends both.
    tokio::select! {
        end = requests(from_client, to_server, &asked) => end,
        end = responses(from_server, to_client, &asked, &bucket) => end,
    }
}

async fn requests(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    asked: &AtomicBool,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match from.read(&mut piece).await? {
            0 => return Ok(()),
            count => {
                asked.store(true, Ordering::Release);
                to.write_all(&piece[..count]).await?;
            }
        }
    }
}

/// The first bytes after a request begin a response: HTTP/1.1 clients don't pipeline.
async fn responses(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    asked: &AtomicBool,
    bucket: &Bucket,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let count = from.read(&mut piece).await?;
        if count == 0 {
            return Ok(());
        }
        if asked.swap(false, Ordering::AcqRel) {
            tokio::time::sleep(LATENCY).await;
        }
        bucket.take(count).await;
        to.write_all(&piece[..count]).await?;
    }
}

/// When the line is free again.
#[derive(Debug)]
struct Bucket {
    free_from: Mutex<Instant>,
}

impl Bucket {
    /// Waits until that many bytes have had their time on the line.
    async fn take(&self, bytes: usize) {
        let now = Instant::now();
        let until = {
            let mut free_from = self.free_from.lock().expect("no holder panics");
            let start = (*free_from).max(now - CREDIT);
            *free_from = start + Duration::from_secs_f64(bytes as f64 / BYTES_PER_SECOND);
            *free_from
        };
        if until > now {
            tokio::time::sleep_until(until.into()).await;
        }
    }
}
