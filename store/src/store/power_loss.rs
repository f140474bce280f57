//! A power loss at any moment: a disk that forgets what was not synced, or keeps some of it.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use tempfile::TempDir;

use crate::disk::{Disk, Durability, LocalDisk};
use crate::shared::lock;
use crate::{
    Amount, Background, Blob, BlobId, ByteStream, CacheOptions, Digest, FetchOptions, Form,
    KeepDigests, Layout, Read, Recheck, Source, SourceError, Store, StoreOptions, Trust, Urgency,
};

const MIB: u64 = 1 << 20;

/// Losses in CI. `WEIGHTFS_POWER_LOSSES` asks for more.
const LOSSES: u64 = 40;

/// Bytes that a disk writes at once.
const SECTOR_BYTES: u64 = 4096;

/// What the disk does with what was not synced.
#[derive(Debug)]
enum Unsynced {
    Written(Range<u64>),
    Punched(Range<u64>),
    Replaced(Vec<u8>),
}

/// The real files, and beside them what a power loss would leave.
#[derive(Debug)]
struct ForgetfulDisk {
    live: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    durable: TempDir,
    unsynced: HashMap<PathBuf, Vec<Unsynced>>,
    /// Syncs, punches and replacements until the power goes.
    left: u64,
    numbers: u64,
}

impl State {
    fn below(&mut self, end: u64) -> u64 {
        self.numbers ^= self.numbers << 13;
        self.numbers ^= self.numbers >> 7;
        self.numbers ^= self.numbers << 17;
        self.numbers % end
    }

    /// Counts an operation; whether there still is power.
    fn has_power(&mut self) -> bool {
        self.left = self.left.saturating_sub(1);
        self.left > 0
    }
}

impl ForgetfulDisk {
    fn new(live: &Path, operations: u64, seed: u64) -> Self {
        let durable = tempfile::tempdir().unwrap();
        copy(live, durable.path(), Holes::Kept);
        let (unsynced, numbers) = (HashMap::new(), seed | 1);
        let state = State { durable, unsynced, left: operations, numbers };
        Self { live: live.to_owned(), state: Mutex::new(state) }
    }

    fn durable(&self, state: &State, path: &Path) -> PathBuf {
        let path = state.durable.path().join(path.strip_prefix(&self.live).unwrap());
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    fn forgettable(&self, path: &Path, what: Unsynced) {
        let mut state = lock(&self.state);
        // There are so many writes that the moments between the others would never come.
        let powered = match what {
            Unsynced::Written(_) => state.left > 0,
            Unsynced::Punched(_) | Unsynced::Replaced(_) => state.has_power(),
        };
        if powered {
            state.unsynced.entry(path.to_owned()).or_default().push(what);
        }
    }

    /// Makes a change of `path` durable; of a write only the sectors that `keep` says.
    fn settle(&self, path: &Path, durable: &Path, what: &Unsynced, mut keep: impl FnMut() -> bool) {
        match what {
            Unsynced::Replaced(content) => fs::write(durable, content).unwrap(),
            Unsynced::Punched(range) => {
                if keep() && durable.exists() {
                    LocalDisk.punch(durable, range.clone()).unwrap();
                }
            }
            Unsynced::Written(range) => {
                let live = File::open(path).unwrap();
                let mut options = OpenOptions::new();
                let file = options.write(true).create(true).truncate(false).open(durable).unwrap();
                file.set_len(live.metadata().unwrap().len()).unwrap();
                for start in (range.start..range.end).step_by(SECTOR_BYTES as usize) {
                    let mut sector =
                        vec![0; (range.end.min(start + SECTOR_BYTES) - start) as usize];
                    if keep() {
                        live.read_exact_at(&mut sector, start).unwrap();
                        file.write_all_at(&sector, start).unwrap();
                    }
                }
            }
        }
    }

    /// What is left after the loss: all that was synced, and of the rest as much as it pleases.
    fn lose_power(&self) -> TempDir {
        let mut state = lock(&self.state);
        state.left = 0;
        let unsynced = std::mem::take(&mut state.unsynced);
        for (path, changes) in unsynced {
            // A file that was created and never synced may be missing altogether.
            let durable = self.durable(&state, &path);
            let share = state.below(3);
            for what in changes.iter().filter(|_| share > 0) {
                let torn = matches!(what, Unsynced::Replaced(_)) && state.below(2) == 0;
                if torn {
                    fs::write(&durable, b"").unwrap();
                } else if path.exists() {
                    self.settle(&path, &durable, what, || state.below(2) < share);
                }
            }
        }
        // Not each file system tells what is a hole: what is believed must be right without that.
        let holes = if state.below(2) == 0 { Holes::Kept } else { Holes::Filled };
        let left = tempfile::tempdir().unwrap();
        copy(state.durable.path(), left.path(), holes);
        left
    }
}

impl Disk for ForgetfulDisk {
    fn write_at(&self, file: &File, path: &Path, bytes: &[u8], offset: u64) -> io::Result<()> {
        LocalDisk.write_at(file, path, bytes, offset)?;
        self.forgettable(path, Unsynced::Written(offset..offset + bytes.len() as u64));
        Ok(())
    }

    fn sync_data(&self, path: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        if state.has_power() {
            let durable = self.durable(&state, path);
            for what in state.unsynced.remove(path).unwrap_or_default() {
                self.settle(path, &durable, &what, || true);
            }
        }
        Ok(())
    }

    fn punch(&self, path: &Path, range: Range<u64>) -> io::Result<()> {
        LocalDisk.punch(path, range.clone())?;
        self.forgettable(path, Unsynced::Punched(range));
        Ok(())
    }

    fn replace(&self, path: &Path, content: &[u8], durability: Durability) -> io::Result<()> {
        LocalDisk.replace(path, content, Durability::Atomic)?;
        match durability {
            Durability::Atomic => self.forgettable(path, Unsynced::Replaced(content.to_vec())),
            Durability::Synced => {
                let mut state = lock(&self.state);
                if state.has_power() {
                    state.unsynced.remove(path);
                    fs::write(self.durable(&state, path), content)?;
                }
            }
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        LocalDisk.remove(path)?;
        let mut state = lock(&self.state);
        if state.has_power() {
            state.unsynced.remove(path);
            LocalDisk.remove(&self.durable(&state, path))?;
        }
        Ok(())
    }
}

/// What becomes of the holes of a file.
#[derive(Debug, Clone, Copy)]
enum Holes {
    Kept,
    Filled,
}

/// Copies a tree.
fn copy(from: &Path, to: &Path, holes: Holes) {
    let sparse = match holes {
        Holes::Kept => "--sparse=always",
        Holes::Filled => "--sparse=never",
    };
    let copied = Command::new("cp")
        .args(["-a", sparse, "--"])
        .args([from.join(".").as_os_str(), to.as_os_str()])
        .status();
    assert!(copied.unwrap().success());
}

#[derive(Debug)]
struct Memory(Bytes);

impl Source for Memory {
    fn name(&self) -> &str {
        "memory"
    }

    fn host(&self) -> &str {
        "memory"
    }

    fn fetch(
        &self,
        range: Range<u64>,
        _urgency: Urgency,
    ) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        let bytes = self.0.slice(range.start as usize..range.end as usize);
        Box::pin(async { Ok(stream::iter([Ok(crate::Piece::of_registry(bytes))]).boxed()) })
    }
}

fn noise(len: u64, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = vec![0; len as usize];
    for piece in bytes.chunks_mut(8) {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let word = (state ^ (state >> 29)).to_le_bytes();
        piece.copy_from_slice(&word[..piece.len()]);
    }
    bytes
}

fn options() -> StoreOptions {
    StoreOptions {
        fetch: FetchOptions {
            deadline: Duration::from_secs(30),
            connections: 4,
            connections_per_host: 64,
            request_bytes: 2 * MIB,
            read_ahead_min: 0,
            read_ahead_max: 0,
            background: Background::Off,
            prefetch: false,
        },
        cache: CacheOptions { limit: Some(Amount::Bytes(30 * MIB)), min_free: Amount::Bytes(0) },
        checkpoint_interval: Duration::from_millis(1),
        recheck: Recheck::AfterCrash,
        keep_digests: KeepDigests::WhereLimited,
        verify: crate::Verify::Background,
    }
}

struct Truth {
    data: Vec<u8>,
    layout: Layout,
}

impl Truth {
    fn new(size: u64, seed: u64) -> Self {
        let layout = Layout::new(size, [3 * MIB + 5, 17 * MIB]).unwrap();
        Self { data: noise(size, seed), layout }
    }

    fn id(&self) -> BlobId {
        BlobId { digest: Digest::of(&self.data), form: Form::AsStored }
    }

    fn open(&self, store: &Arc<Store>) -> Arc<Blob> {
        let blob = store.blob(self.id(), &self.layout).unwrap();
        blob.add_source(Arc::new(Memory(self.data.clone().into())));
        blob
    }

    async fn read_somewhere(&self, blob: &Arc<Blob>, at: u64) {
        let start = at % self.data.len() as u64;
        let segment = self.layout.segment(self.layout.segment_at(start).unwrap()).unwrap();
        let range = start..segment.end.min(start + MIB);
        let slice = match blob.read(range.clone()).unwrap() {
            Read::Ready(slice) => slice,
            Read::Missing(miss) => miss.wait().await.unwrap(),
        };
        assert!(*slice == self.data[range.start as usize..range.end as usize]);
    }

    /// All that the blob believes is right. Gives how many bytes that is.
    fn check(&self, blob: &Arc<Blob>) -> u64 {
        let mut believed = 0;
        for segment in 0..self.layout.segments() {
            let covers = self.layout.segment(segment).unwrap();
            for start in covers.clone().step_by(MIB as usize) {
                let range = start..covers.end.min(start + MIB);
                if let Read::Ready(slice) = blob.read(range.clone()).unwrap() {
                    let right = &self.data[range.start as usize..range.end as usize];
                    assert!(*slice == *right, "{range:?} of {} bytes", self.data.len());
                    believed += slice.len() as u64;
                }
            }
        }
        believed
    }
}

/// Works until the power goes; what is left.
async fn work(root: &Path, truths: &[Truth], round: u64) -> TempDir {
    let mut numbers = round.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut below = |end: u64| {
        numbers = numbers.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
        (numbers >> 33) % end
    };
    let disk = Arc::new(ForgetfulDisk::new(root, 10 + below(100), round));
    let boot = format!("boot {round}");
    let store = Store::open_on(root, options(), Arc::clone(&disk) as _, &boot).unwrap();
    store.start_evicting();
    let blobs: Vec<_> = truths.iter().map(|truth| truth.open(&store)).collect();
    while lock(&disk.state).left > 0 {
        let which = below(2) as usize;
        match below(4) {
            0 => drop(store.evict(truths[which].id()).unwrap()),
            _ => truths[which].read_somewhere(&blobs[which], below(u64::from(u32::MAX))).await,
        }
    }
    disk.lose_power()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whenever_the_power_goes_what_is_believed_is_right() {
    let truths = [Truth::new(28 * MIB + 77, 1), Truth::new(18 * MIB, 2)];
    let asked = std::env::var("WEIGHTFS_POWER_LOSSES").ok().and_then(|text| text.parse().ok());
    let mut root = tempfile::tempdir().unwrap();
    let mut believed = 0;
    for round in 1..=asked.unwrap_or(LOSSES) {
        root = work(root.path(), &truths, round).await;
        let boot = format!("after {round}");
        let disk = Arc::new(LocalDisk);
        let store = Store::open_on(root.path(), options(), disk, &boot).unwrap();
        for truth in &truths {
            let blob = store.blob(truth.id(), &truth.layout).unwrap();
            assert_ne!(blob.stats().trust, Trust::Poisoned);
            believed += truth.check(&blob);
        }
    }
    assert!(believed > 0, "something was recorded");
}

#[tokio::test]
async fn after_a_crash_of_the_machine_what_was_verified_is_hashed_again() {
    let truth = Truth::new(20 * MIB, 3);
    let root = tempfile::tempdir().unwrap();
    let open = |boot, recheck| {
        let options = StoreOptions { recheck, ..options() };
        Store::open_on(root.path(), options, Arc::new(LocalDisk), boot).unwrap()
    };
    let judged = async |blob: &Blob| {
        while blob.stats().trust == Trust::Transport {
            tokio::task::yield_now().await;
        }
        blob.stats().trust
    };
    {
        let store = open("one", Recheck::AfterCrash);
        let blob = truth.open(&store);
        for start in 0..20 {
            truth.read_somewhere(&blob, start * MIB + 5).await;
            truth.read_somewhere(&blob, (start * MIB).saturating_sub(5)).await;
        }
        assert_eq!(judged(&blob).await, Trust::Verified);
        store.checkpoint().unwrap();
        // Neither a clean stop nor a kill: the session is as a crash leaves it.
        fs::copy(root.path().join("session"), root.path().join("kept")).unwrap();
    }
    let crash = || fs::copy(root.path().join("kept"), root.path().join("session")).unwrap();
    crash();
    let segment = truth.layout.segment(1).unwrap();
    {
        let store = open("one", Recheck::AfterCrash);
        assert_eq!(truth.open(&store).stats().trust, Trust::Verified, "only the process died");
    }
    crash();
    {
        let store = open("two", Recheck::Never);
        assert_eq!(truth.open(&store).stats().trust, Trust::Verified, "as it was told");
    }
    crash();
    let dir = fs::read_dir(root.path().join("blobs/sha256")).unwrap().next().unwrap().unwrap();
    let dir = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
    let file = OpenOptions::new().write(true).open(dir.join("segment-1")).unwrap();
    file.write_all_at(&[!truth.data[segment.start as usize + 100]], 100).unwrap();
    {
        let store = open("three", Recheck::AfterCrash);
        let blob = truth.open(&store);
        assert_eq!(judged(&blob).await, Trust::Verified);
        let stats = blob.stats();
        assert_eq!(stats.rejected, 1, "the disk has lied");
        assert_eq!(stats.cached, stats.size - MIB, "what it lied about is fetched again");
    }
}
