//! Downloads without any file system of ours: the raw ceiling, and what a pull does.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use reqwest::{Client, StatusCode};
use sha2::{Digest as _, Sha256};
use weightfs_store::Digest;
use weightfs_tests::Blob;
use weightfs_tests::remote::block_on;

/// Bytes of one ranged request, and requests in flight: what docker-registry serves quickest on
/// loopback.
const RANGE_BYTES: u64 = 16 << 20;
const CONNECTIONS: usize = 4;

/// Blobs of one repository behind one address.
#[derive(Debug, Clone)]
pub(crate) struct Blobs {
    base: String,
    blobs: Vec<(Digest, u64)>,
}

impl Blobs {
    /// Names blobs of `repository` at `host:port`.
    pub(crate) fn new(address: &str, repository: &str, blobs: &[Blob]) -> Self {
        let blobs = blobs.iter().map(|blob| (blob.digest, blob.size)).collect();
        Self::of_sizes(address, repository, blobs)
    }

    /// The same of blobs that nobody has.
    pub(crate) fn of_sizes(address: &str, repository: &str, blobs: Vec<(Digest, u64)>) -> Self {
        Self { base: format!("http://{address}/v2/{repository}/blobs"), blobs }
    }

    /// Downloads all in parallel ranges and keeps nothing: no client can be faster. Gives bytes.
    pub(crate) fn download_to_nowhere(&self) -> u64 {
        let jobs = Arc::new(Mutex::new(self.ranges()));
        let client = client();
        block_on(async {
            let worker = || tokio::spawn(fetch_ranges(client.clone(), Arc::clone(&jobs)));
            let workers: Vec<_> = (0..CONNECTIONS).map(|_| worker()).collect();
            let mut bytes = 0;
            for worker in workers {
                bytes += worker.await.expect("the download");
            }
            bytes
        })
    }

    /// How long it takes to get what a read of one byte needs, on a new connection: bytes in the
    /// middle of a blob.
    ///
    /// # Panics
    /// When they don't come.
    pub(crate) fn time_chunk(&self, chunk: u64) -> Duration {
        let (digest, size) = self.blobs.last().expect("a blob");
        let start = size / 2 / chunk * chunk;
        let jobs = Mutex::new(vec![(self.url(digest), start, start + chunk)]);
        let client = client();
        let begin = Instant::now();
        let bytes = block_on(fetch_ranges(client, Arc::new(jobs)));
        let time = begin.elapsed();
        assert_eq!(bytes, chunk, "the raw download is incomplete");
        time
    }

    /// Pulls every blob to a file of `dir`, all at once, each in one request, hashed on the way,
    /// as clients of registries do.
    pub(crate) fn pull(&self, dir: &Path, names: &[String]) {
        let client = client();
        thread::scope(|scope| {
            for ((digest, _), name) in self.blobs.iter().zip(names) {
                let (url, to, client) = (self.url(digest), dir.join(name), &client);
                scope.spawn(move || pull_one(client, &url, *digest, &to));
            }
        });
    }

    fn url(&self, digest: &Digest) -> String {
        format!("{}/{digest}", self.base)
    }

    /// Every range, the last one first.
    fn ranges(&self) -> Vec<(String, u64, u64)> {
        let mut ranges = Vec::new();
        for (digest, size) in &self.blobs {
            let starts = (0..*size).step_by(RANGE_BYTES as usize);
            ranges.extend(
                starts.map(|start| (self.url(digest), start, (start + RANGE_BYTES).min(*size))),
            );
        }
        ranges.reverse();
        ranges
    }
}

fn client() -> Client {
    Client::builder().no_proxy().http1_only().build().expect("an HTTP client")
}

async fn fetch_ranges(client: Client, jobs: Arc<Mutex<Vec<(String, u64, u64)>>>) -> u64 {
    let next = || jobs.lock().expect("no holder panics").pop();
    let mut bytes = 0;
    while let Some((url, start, end)) = next() {
        let range = format!("bytes={start}-{}", end - 1);
        let response = client.get(&url).header("range", range).send().await;
        let mut response = response.expect("the registry answers");
        assert_eq!(response.status(), StatusCode::PARTIAL_CONTENT, "{url}");
        while let Some(piece) = response.chunk().await.expect("the registry sends on") {
            bytes += piece.len() as u64;
        }
    }
    bytes
}

fn pull_one(client: &Client, url: &str, digest: Digest, to: &Path) {
    let mut file = File::create(to).expect("a file for the blob");
    let mut hash = Sha256::new();
    block_on(async {
        let mut response = client.get(url).send().await.expect("the registry answers");
        assert_eq!(response.status(), StatusCode::OK, "{url}");
        while let Some(piece) = response.chunk().await.expect("the registry sends on") {
            hash.update(&piece);
            file.write_all(&piece).expect("room for the blob");
        }
    });
    assert_eq!(Digest::from_raw(hash.finalize().into()), digest, "{url}");
}
