//! Random operations against plain bytes in memory. Whatever happens in between, a read gives
//! the right bytes or, where a source was told to fail, an error.
//!
//! `WEIGHTFS_MODEL_OPERATIONS` sets how many (`make soak` asks for a million), `WEIGHTFS_MODEL_SEED`
//! repeats a run.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tempfile::TempDir;
use weightfs_store::{Amount, Blob, Layout, ReadError, SegmentHold, Slice, Store};

use super::source::{Fault, TestSource, status, unreachable};
use super::{MIB, id, noise, options, read};

/// Operations in CI.
const OPERATIONS: u64 = 100_000;

/// Operations of one world, which has its own blobs, directory and options.
const OPERATIONS_OF_A_WORLD: u64 = 5_000;

/// Numbers that look random; the same for the same seed.
#[derive(Clone)]
struct Numbers(u64);

impl Numbers {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// What a blob should hold.
struct Truth {
    data: Vec<u8>,
    layout: Layout,
    source: Arc<TestSource>,
}

impl Truth {
    fn new(numbers: &mut Numbers) -> Arc<Self> {
        let size = 1 + numbers.below(40 * MIB);
        let data = noise(size, numbers.below(u64::MAX));
        let mut cuts: Vec<u64> = (0..numbers.below(6)).map(|_| numbers.below(size)).collect();
        cuts.sort_unstable();
        cuts.dedup();
        let layout = Layout::new(size, cuts.into_iter().filter(|cut| *cut > 0)).unwrap();
        let source = TestSource::new("test", data.clone());
        Arc::new(Self { data, layout, source })
    }

    fn bytes(&self, range: &Range<u64>) -> &[u8] {
        &self.data[range.start as usize..range.end as usize]
    }

    fn some_range(&self, numbers: &mut Numbers) -> Range<u64> {
        let start = numbers.below(self.data.len() as u64);
        let end = self.layout.segment(self.layout.segment_at(start).unwrap()).unwrap().end;
        let longest =
            [64, 4096, 100_000, 2 * MIB][[0, 1, 1, 1, 2, 2, 3][numbers.below(7) as usize]];
        start..end.min(start + numbers.below(longest))
    }
}

/// A store with two blobs.
struct World {
    seed: u64,
    numbers: Numbers,
    truths: [Arc<Truth>; 2],
    limited: bool,
    /// Directories of stores that were "killed" are kept until the end: they may be in use.
    dirs: Vec<TempDir>,
    store: Option<Arc<Store>>,
    blobs: [Option<Arc<Blob>>; 2],
    /// What is held on to, and must not change.
    slices: Vec<(usize, Range<u64>, Slice)>,
    files: Vec<(usize, usize, fs::File, SegmentHold)>,
    operations: Arc<AtomicU64>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut numbers = Numbers::new(seed);
        let truths = [Truth::new(&mut numbers), Truth::new(&mut numbers)];
        let mut world = Self {
            seed,
            limited: numbers.below(2) == 0,
            numbers,
            truths,
            dirs: vec![],
            store: None,
            blobs: [None, None],
            slices: vec![],
            files: vec![],
            operations: Arc::default(),
        };
        world.start(tempfile::tempdir().unwrap());
        world
    }

    fn start(&mut self, dir: TempDir) {
        let mut options = options();
        options.fetch.request_bytes = MIB << self.numbers.below(3);
        options.fetch.connections = 1 + self.numbers.below(4) as usize;
        options.fetch.read_ahead_min = self.numbers.below(3) * MIB;
        options.fetch.read_ahead_max = 4 * MIB;
        if self.limited {
            options.cache.limit = Some(Amount::Bytes((8 + self.numbers.below(40)) * MIB));
        }
        let store = Store::open(dir.path(), options).unwrap();
        store.start_evicting();
        self.store = Some(store);
        self.dirs.push(dir);
    }

    fn store(&self) -> &Arc<Store> {
        self.store.as_ref().unwrap()
    }

    /// One of the blobs, opened if it is not.
    fn some_blob(&mut self) -> (usize, Arc<Blob>, Arc<Truth>) {
        let which = self.numbers.below(2) as usize;
        let truth = Arc::clone(&self.truths[which]);
        let blob = match &self.blobs[which] {
            Some(blob) => Arc::clone(blob),
            None => {
                let blob = self.store().blob(id(&truth.data), &truth.layout).unwrap();
                blob.add_source(truth.source.clone());
                self.blobs[which].insert(blob).clone()
            }
        };
        (which, blob, truth)
    }

    /// A few readers, each of them a few times.
    async fn read_some(&mut self) {
        let readers: Vec<_> = (0..1 + self.numbers.below(4))
            .map(|_| {
                let (_, blob, truth) = self.some_blob();
                let mut numbers = Numbers::new(self.numbers.below(u64::MAX));
                let operations = Arc::clone(&self.operations);
                tokio::spawn(async move {
                    for _ in 0..16 {
                        operations.fetch_add(1, Ordering::Relaxed);
                        let range = truth.some_range(&mut numbers);
                        match read(&blob, range.clone()).await {
                            Ok(slice) => assert!(*slice == *truth.bytes(&range), "{range:?}"),
                            Err(ReadError::Source { .. }) => {}
                            Err(other) => panic!("{other}"),
                        }
                    }
                })
            })
            .collect();
        for reader in readers {
            reader.await.unwrap();
        }
    }

    /// Three fixed-size reads in sequence, which read-ahead takes for a stream.
    async fn read_a_stream(&mut self) {
        let (_, blob, truth) = self.some_blob();
        let start = truth.some_range(&mut self.numbers).start;
        let end = truth.layout.segment(truth.layout.segment_at(start).unwrap()).unwrap().end;
        for step in 0..3 {
            let range = (start + step * MIB).min(end)..(start + (step + 1) * MIB).min(end);
            if let Ok(slice) = read(&blob, range.clone()).await {
                assert!(*slice == *truth.bytes(&range), "{range:?}");
            }
        }
    }

    fn fail_some(&mut self) {
        let fault = match self.numbers.below(5) {
            0 => Fault::Refuse(unreachable("test")),
            1 => Fault::Refuse(status(503, None)),
            2 => Fault::Refuse(status(404, None)),
            3 => Fault::End(self.numbers.below(2 * MIB)),
            _ => Fault::Break(self.numbers.below(2 * MIB)),
        };
        self.truths[self.numbers.below(2) as usize].source.fail([fault]);
    }

    /// Holds on to what is read, or lets go of something.
    async fn hold_some(&mut self) {
        if self.slices.len() >= 4 || self.numbers.below(3) == 0 {
            self.slices.clear();
            self.files.clear();
            return;
        }
        let (which, blob, truth) = self.some_blob();
        let range = truth.some_range(&mut self.numbers);
        if let Ok(slice) = read(&blob, range.clone()).await {
            self.slices.push((which, range.clone(), slice));
        }
        let segment = truth.layout.segment_at(range.start).unwrap();
        if let Some((file, hold)) = blob.segment_file(segment).unwrap() {
            self.files.push((which, segment, file, hold));
        }
    }

    fn check_what_is_held(&self) {
        for (which, range, slice) in &self.slices {
            assert!(**slice == *self.truths[*which].bytes(range), "held {range:?}");
        }
        for (which, segment, file, _) in &self.files {
            let truth = &self.truths[*which];
            let range = truth.layout.segment(*segment).unwrap();
            let mut bytes = vec![0; (range.end - range.start) as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            assert!(bytes == truth.bytes(&range), "the file of segment {segment}");
        }
    }

    fn evict_some(&mut self) {
        let which = self.numbers.below(2) as usize;
        let id = id(&self.truths[which].data);
        match self.numbers.below(4) {
            0 => self.store().pin(id).unwrap(),
            1 => self.store().unpin(id).unwrap(),
            2 => drop(self.store().prune().unwrap()),
            _ => drop(self.store().evict(id).unwrap()),
        }
    }

    fn close_some(&mut self) {
        self.blobs[self.numbers.below(2) as usize] = None;
    }

    fn let_go(&mut self) {
        self.slices.clear();
        self.files.clear();
        self.blobs = [None, None];
        self.store = None;
    }

    fn restart(&mut self) {
        self.let_go();
        let dir = self.dirs.pop().unwrap();
        self.start(dir);
    }

    /// Goes on with the files as they are now, without a word to the store that runs.
    fn kill(&mut self) {
        if self.limited {
            // A copy takes its time. What is evicted meanwhile would be in it as bytes that are
            // half there; the test with a real kill does that better.
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        copy(self.dirs.last().unwrap().path(), dir.path());
        self.let_go();
        self.start(dir);
    }

    async fn step(&mut self) {
        self.operations.fetch_add(1, Ordering::Relaxed);
        match self.numbers.below(400) {
            0..4 => self.restart(),
            4..8 => self.kill(),
            8..16 => self.close_some(),
            16..24 => self.store().checkpoint().unwrap(),
            24..70 => self.evict_some(),
            70..120 => self.fail_some(),
            120..150 => self.hold_some().await,
            150..180 => {
                let (_, blob, truth) = self.some_blob();
                blob.expect(&truth.some_range(&mut self.numbers));
            }
            180..220 => self.read_a_stream().await,
            _ => self.read_some().await,
        }
        self.check_what_is_held();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("WEIGHTFS_MODEL_SEED={} repeats it", self.seed);
        }
    }
}

/// Copies a state directory while it is in use. A record is copied before the segments it speaks
/// of, as a process that is killed leaves both at one moment.
fn copy(from: &Path, to: &Path) {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort_by_key(|path| path.file_name().unwrap() != "state");
    for entry in entries {
        let target = to.join(entry.file_name().unwrap());
        if entry.is_dir() {
            fs::create_dir_all(&target).unwrap();
            copy(&entry, &target);
        } else if fs::copy(&entry, &target).is_err() {
            assert!(!entry.exists(), "only a temporary file may vanish");
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    now.as_millis() as u64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_operations_never_show_a_wrong_byte() {
    let wanted = number("WEIGHTFS_MODEL_OPERATIONS").unwrap_or(OPERATIONS);
    let first = number("WEIGHTFS_MODEL_SEED").unwrap_or_else(seed);
    let mut done = 0;
    for seed in first.. {
        let mut world = World::new(seed);
        while world.operations.load(Ordering::Relaxed) < OPERATIONS_OF_A_WORLD {
            world.step().await;
        }
        done += world.operations.load(Ordering::Relaxed);
        if done >= wanted {
            return;
        }
    }
}
