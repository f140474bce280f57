//! Random operations against plain bytes in memory. Whatever happens in between, a read gives
//! the right bytes or, where a source was told to fail, an error.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use weightfs_store::{Blob, Layout, ReadError, Store};

use super::source::{Fault, TestSource, status, unreachable};
use super::{MIB, id, noise, options, read};

/// Numbers that look random; the same for the same seed.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// A store with one blob, and what the blob should hold.
struct World {
    numbers: Numbers,
    data: Vec<u8>,
    layout: Layout,
    source: Arc<TestSource>,
    /// Directories of stores that were "killed" are kept until the end: they may be in use.
    dirs: Vec<TempDir>,
    open: Option<(Arc<Store>, Arc<Blob>)>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut numbers = Numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let size = 1 + numbers.below(14 * MIB);
        let data = noise(size, seed);
        let mut cuts: Vec<u64> = (0..numbers.below(6)).map(|_| numbers.below(size)).collect();
        cuts.sort_unstable();
        cuts.dedup();
        let layout = Layout::new(size, cuts.into_iter().filter(|cut| *cut > 0)).unwrap();
        let source = TestSource::new("test", data.clone());
        let mut world = Self { numbers, data, layout, source, dirs: vec![], open: None };
        world.start(tempfile::tempdir().unwrap());
        world
    }

    fn start(&mut self, dir: TempDir) {
        let mut options = options();
        options.fetch.request_bytes = MIB << self.numbers.below(3);
        options.fetch.connections = 1 + self.numbers.below(4) as usize;
        options.fetch.read_ahead_min = self.numbers.below(3) * MIB;
        options.fetch.read_ahead_max = 4 * MIB;
        let store = Store::open(dir.path(), options).unwrap();
        let blob = store.blob(id(&self.data), &self.layout).unwrap();
        blob.add_source(self.source.clone());
        self.open = Some((store, blob));
        self.dirs.push(dir);
    }

    fn blob(&self) -> Arc<Blob> {
        self.open.as_ref().unwrap().1.clone()
    }

    fn some_range(&mut self) -> std::ops::Range<u64> {
        let start = self.numbers.below(self.data.len() as u64);
        let end = self.layout.segment(self.layout.segment_at(start).unwrap()).unwrap().end;
        let longest = [64, 4096, 300_000, 3 * MIB][self.numbers.below(4) as usize];
        start..end.min(start + self.numbers.below(longest))
    }

    async fn read_some(&mut self) {
        let readers: Vec<_> = (0..1 + self.numbers.below(4))
            .map(|_| {
                let (blob, range) = (self.blob(), self.some_range());
                tokio::spawn(async move { (range.clone(), read(&blob, range).await) })
            })
            .collect();
        for reader in readers {
            let (range, result) = reader.await.unwrap();
            match result {
                Ok(slice) => {
                    assert_eq!(*slice, self.data[range.start as usize..range.end as usize]);
                }
                Err(ReadError::Source { .. }) => {}
                Err(other) => panic!("{other}"),
            }
        }
    }

    /// Three fixed-size reads in sequence, which read-ahead takes for a stream.
    async fn read_a_stream(&mut self) {
        let start = self.some_range().start;
        let end = self.layout.segment(self.layout.segment_at(start).unwrap()).unwrap().end;
        for step in 0..3 {
            let range = (start + step * MIB).min(end)..(start + (step + 1) * MIB).min(end);
            if let Ok(slice) = read(&self.blob(), range.clone()).await {
                assert_eq!(*slice, self.data[range.start as usize..range.end as usize]);
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
        self.source.fail([fault]);
    }

    fn restart(&mut self) {
        drop(self.open.take());
        let dir = self.dirs.pop().unwrap();
        self.start(dir);
    }

    /// Goes on with the files as they are now, without a word to the store that runs.
    fn kill(&mut self) {
        let dir = tempfile::tempdir().unwrap();
        copy(self.dirs.last().unwrap().path(), dir.path());
        drop(self.open.take());
        self.start(dir);
    }

    async fn step(&mut self) {
        match self.numbers.below(20) {
            0 => self.restart(),
            1 => self.kill(),
            2 => self.open.as_ref().unwrap().0.checkpoint().unwrap(),
            3..6 => self.fail_some(),
            6..9 => self.read_a_stream().await,
            _ => self.read_some().await,
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_operations_never_show_a_wrong_byte() {
    for seed in 1..=16 {
        let mut world = World::new(seed);
        for _ in 0..60 {
            world.step().await;
        }
    }
}
