//! The service outlives a time without file descriptors. Alone in its process, which it starves.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use containerd_client::services::v1::snapshots::ListSnapshotsRequest;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use weightfs::metadata::{Metadata, TreeNumber, Usage};
use weightfs::reason::Reason;
use weightfs::snapshots::{LayerMounter, LayerRequest, Snapshots, Verdict};
use weightfs::{containerd, socket::bind_socket};

/// Long enough for any machine.
const PATIENCE: Duration = Duration::from_secs(30);

struct NeverLazy;

#[tonic::async_trait]
impl LayerMounter for NeverLazy {
    async fn mount(&self, _: LayerRequest) -> Verdict {
        Verdict::Ordinary { reason: Reason::NoLabels }
    }

    fn directory(&self, tree: TreeNumber) -> PathBuf {
        Path::new("/nowhere").join(tree.to_string())
    }

    async fn unmount(&self, _: TreeNumber) {}

    fn clean_up(&self) {}

    fn usage(&self, _: TreeNumber) -> Usage {
        Usage::default()
    }
}

/// Hands log lines to the test.
struct Lines(mpsc::Sender<String>);

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.send(String::from_utf8_lossy(line).into_owned()).map_err(io::Error::other)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lack_of_file_descriptors_pauses_the_service_and_does_not_end_it() {
    let (lines, logged) = mpsc::channel();
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(move || Lines(lines.clone()))
        .init();
    let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let metadata = Arc::new(Metadata::open(root.path()).unwrap());
    let snapshots = Snapshots::open(root.path(), metadata, Arc::new(NeverLazy)).unwrap();
    let path = root.path().join("s.sock");
    let listener = bind_socket(&path).unwrap();
    tokio::spawn(containerd::serve(snapshots, listener, std::future::pending()));

    let client = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
    let hoard: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    connect(client.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    let line = logged.recv_timeout(PATIENCE).expect("the service never ran out of descriptors");
    assert!(line.contains("cannot accept"), "{line}");

    drop(hoard);
    let mut client = SnapshotsClient::new(containerd_client::connect(&path).await.unwrap());
    let listed = client.list(ListSnapshotsRequest::default());
    tokio::time::timeout(PATIENCE, listed).await.expect("the service is stuck").unwrap();
}
