//! Readers of one file that go on until they are told to stop, check every byte, and note how long
//! they had to wait.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use memmap2::{Mmap, UncheckedAdvice};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;

/// Bytes of one read at the most.
const READ_BYTES: u64 = 1 << 20;

/// Time between two questions for the daemon's pulse.
const BETWEEN_PULSES: Duration = Duration::from_millis(2);

/// What reads past the page cache are multiples of.
const BLOCK_BYTES: u64 = 4096;

/// How a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By read(2) on a file that stays open; what was read is dropped from the page cache.
    Read,
    /// By read(2) on a file that is opened each time.
    Open,
    /// Through a mapping that stays; its pages are dropped.
    Map,
    /// By read(2) past the page cache, which tries nothing twice.
    Direct,
}

/// Readers that run.
#[derive(Debug, Default)]
pub struct Readers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Figures>>,
    reads: Arc<AtomicU64>,
}

/// What readers saw.
#[derive(Debug, Clone, Copy, Default)]
pub struct Figures {
    /// Reads that they made.
    pub reads: u64,
    /// The longest that one took.
    pub longest: Duration,
}

impl Readers {
    /// Starts a reader of `path`, whose bytes are those of `source`.
    pub fn start(&mut self, way: Way, path: &Path, source: &Path) {
        let stop = Arc::clone(&self.stop);
        let reads = Arc::clone(&self.reads);
        let reader = Reader::open(way, path, source);
        let name = format!("{way:?}");
        let thread = thread::Builder::new().name(name).spawn(move || reader.run(&stop, &reads));
        self.threads.push(thread.unwrap());
    }

    /// Reads that were made so far.
    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    /// Ends them.
    ///
    /// # Panics
    /// When one had an error or saw wrong bytes.
    pub fn finish(self) -> Figures {
        self.stop.store(true, Ordering::Relaxed);
        let figures = self.threads.into_iter().map(|thread| thread.join().expect("a reader"));
        figures.fold(Figures::default(), |all, one| Figures {
            reads: all.reads + one.reads,
            longest: all.longest.max(one.longest),
        })
    }
}

/// Asks the daemon for something small again and again: the longest answer is its longest pause.
#[derive(Debug)]
pub struct Pulse {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Duration>,
}

impl Pulse {
    /// Starts asking for the attributes of a daemon's mount, which the kernel never remembers.
    pub fn start(mount: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut longest = Duration::ZERO;
            while !stopped.load(Ordering::Relaxed) {
                let begin = Instant::now();
                std::fs::metadata(&mount).unwrap();
                longest = longest.max(begin.elapsed());
                thread::sleep(BETWEEN_PULSES);
            }
            longest
        });
        Self { stop, thread }
    }

    /// Ends it, and gives the longest pause.
    ///
    /// # Panics
    /// When there was no answer.
    pub fn finish(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the daemon answers")
    }
}

struct Reader {
    way: Way,
    path: PathBuf,
    file: File,
    map: Mmap,
    source: File,
    length: u64,
}

impl Reader {
    fn open(way: Way, path: &Path, source: &Path) -> Self {
        let file = match way {
            Way::Direct => File::options().read(true).custom_flags(libc::O_DIRECT).open(path),
            Way::Read | Way::Open | Way::Map => File::open(path),
        };
        let file = file.unwrap();
        let map = map(&file);
        let source = File::open(source).unwrap();
        let length = source.metadata().unwrap().len();
        assert_eq!(map.len() as u64, length);
        Self { way, path: path.to_owned(), file, map, source, length }
    }

    fn run(self, stop: &AtomicBool, reads: &AtomicU64) -> Figures {
        let mut figures = Figures::default();
        let mut expected = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let count = fastrand::u64(1..=READ_BYTES.min(self.length));
            let offset = fastrand::u64(0..=self.length - count);
            let (offset, count) = match self.way {
                Way::Direct => {
                    (offset / BLOCK_BYTES * BLOCK_BYTES, count.next_multiple_of(BLOCK_BYTES))
                }
                Way::Read | Way::Open | Way::Map => (offset, count),
            };
            // Aligned, it may reach over the end.
            let count = count.min(self.length - offset);
            expected.resize(usize::try_from(count).unwrap(), 0);
            self.source.read_exact_at(&mut expected, offset).unwrap();
            let begin = Instant::now();
            self.check(offset, &expected);
            figures.longest = figures.longest.max(begin.elapsed());
            figures.reads += 1;
            reads.fetch_add(1, Ordering::Relaxed);
        }
        figures
    }

    fn check(&self, offset: u64, expected: &[u8]) {
        let place = format!("{} at {offset} by {:?}", self.path.display(), self.way);
        let mut bytes = vec![0; expected.len()];
        match self.way {
            Way::Read => {
                drop_pages(&self.file);
                self.file.read_exact_at(&mut bytes, offset).expect(&place);
            }
            Way::Direct => {
                let room = expected.len().next_multiple_of(BLOCK_BYTES as usize);
                let mut space = vec![0; room + BLOCK_BYTES as usize];
                let skip = space.as_ptr().align_offset(BLOCK_BYTES as usize);
                let aligned = &mut space[skip..skip + room];
                let count = self.file.read_at(aligned, offset).expect(&place);
                assert!(count >= expected.len(), "a short read: {place}");
                bytes.copy_from_slice(&aligned[..expected.len()]);
            }
            Way::Open => {
                let file = File::open(&self.path).expect(&place);
                file.read_exact_at(&mut bytes, offset).expect(&place);
            }
            Way::Map => {
                let start = usize::try_from(offset).unwrap();
                // SAFETY: nothing refers to the mapping here, and what it shows does not change.
                #[expect(unsafe_code, reason = "the pages have to be asked for again")]
                unsafe { self.map.unchecked_advise(UncheckedAdvice::DontNeed) }.unwrap();
                drop_pages(&self.file);
                bytes.copy_from_slice(&self.map[start..start + expected.len()]);
            }
        }
        assert!(bytes == expected, "wrong bytes: {place}");
    }
}

fn map(file: &File) -> Mmap {
    // SAFETY: files of a mount don't change.
    #[expect(unsafe_code, reason = "mapping is what is tested")]
    unsafe { Mmap::map(file) }.unwrap()
}

fn drop_pages(file: impl AsFd) {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}
