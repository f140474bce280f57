//! Notices reads that wait for longer than any may: each ends by the fetch deadline, so one that
//! does not is a fault of ours, and somebody should know.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tracing::error;

use crate::counters::MountCounters;

/// What a read may take beyond its deadline: a busy machine wakes tasks late.
const MARGIN: Duration = Duration::from_secs(10);

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(5);

/// A read that waits for its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WaitingRead {
    /// The file.
    pub(crate) inode: u64,
    /// The first byte.
    pub(crate) offset: u64,
    /// Bytes asked for.
    pub(crate) size: u32,
}

#[derive(Debug)]
struct Waiting {
    read: WaitingRead,
    since: Instant,
    told: bool,
}

/// The reads that wait. The kernel bounds them: each is a request of its.
#[derive(Debug)]
pub(crate) struct Watchdog {
    limit: Duration,
    counters: Arc<MountCounters>,
    waiting: Mutex<Table>,
}

/// By the order in which they came.
#[derive(Debug, Default)]
struct Table {
    next: u64,
    reads: BTreeMap<u64, Waiting>,
}

/// Dropped when the read has ended.
#[derive(Debug)]
pub(crate) struct Watched {
    watchdog: Arc<Watchdog>,
    number: u64,
}

impl Watchdog {
    /// Watches over reads that end by `deadline`, and says on the log which don't, each once.
    pub(crate) fn start(
        deadline: Duration,
        runtime: &Handle,
        counters: Arc<MountCounters>,
    ) -> Arc<Self> {
        let (limit, waiting) = (deadline + MARGIN, Mutex::default());
        let watchdog = Arc::new(Self { limit, counters, waiting });
        runtime.spawn(look_after(Arc::downgrade(&watchdog)));
        watchdog
    }

    /// A read begins to wait.
    pub(crate) fn watch(self: &Arc<Self>, read: WaitingRead) -> Watched {
        self.counters.waits_begun.increment();
        let mut table = self.lock();
        let number = table.next;
        table.next += 1;
        table.reads.insert(number, Waiting { read, since: Instant::now(), told: false });
        Watched { watchdog: Arc::clone(self), number }
    }

    /// Reads that wait for too long and were not told of yet, and how long they wait.
    fn overdue(&self, now: Instant) -> Vec<(WaitingRead, Duration)> {
        let mut table = self.lock();
        let waits = |waiting: &Waiting| now.saturating_duration_since(waiting.since);
        let late = table.reads.values_mut().take_while(|waiting| waits(waiting) > self.limit);
        let untold = late.filter(|waiting| !waiting.told);
        untold
            .map(|waiting| {
                waiting.told = true;
                self.counters.hung.increment();
                (waiting.read.clone(), waits(waiting))
            })
            .collect()
    }

    /// Says which reads are overdue.
    fn tell(&self, now: Instant) {
        for (WaitingRead { inode, offset, size }, waits) in self.overdue(now) {
            let inode = format_args!("{inode:#x}");
            error!(inode, offset, size, ?waits, "a read waits beyond its deadline");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.watchdog.lock().reads.remove(&self.number);
        self.watchdog.counters.waits_ended.increment();
    }
}

async fn look_after(watchdog: Weak<Watchdog>) {
    loop {
        tokio::time::sleep(INTERVAL).await;
        let Some(watchdog) = watchdog.upgrade() else { return };
        watchdog.tell(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use tracing::subscriber::with_default;

    use super::*;

    /// What is logged meanwhile.
    fn logged(work: impl FnOnce()) -> String {
        let log = tempfile::NamedTempFile::new().unwrap();
        let file = Arc::new(log.reopen().unwrap());
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(file).finish();
        with_default(subscriber, work);
        std::fs::read_to_string(log.path()).unwrap()
    }

    #[tokio::test]
    async fn the_log_says_which_read_waits_too_long() {
        let (deadline, counters) = (Duration::from_secs(30), Arc::<MountCounters>::default());
        let watchdog = Watchdog::start(deadline, &Handle::current(), Arc::clone(&counters));
        let _waits = watchdog.watch(WaitingRead { inode: 0x2a_0007, offset: 4096, size: 131_072 });
        let late = Instant::now() + deadline + MARGIN;
        let log = logged(|| watchdog.tell(late + Duration::from_secs(1)));
        assert_eq!(log.lines().count(), 1, "{log}");
        for part in ["ERROR", "beyond its deadline", "0x2a0007", "offset=4096", "size=131072"] {
            assert!(log.contains(part), "{part}: {log}");
        }
        assert_eq!(counters.hung.get(), 1);
    }

    #[tokio::test]
    async fn each_read_that_waits_too_long_is_told_of_once() {
        let counters = Arc::<MountCounters>::default();
        let watchdog =
            Watchdog::start(Duration::from_secs(30), &Handle::current(), Arc::clone(&counters));
        let read = |inode| WaitingRead { inode, offset: 0, size: 1 };
        let begin = Instant::now();
        let first = watchdog.watch(read(1));
        let second = watchdog.watch(read(2));
        let third = watchdog.watch(read(3));
        drop(second);
        let told = |seconds| {
            let overdue = watchdog.overdue(begin + Duration::from_secs(seconds));
            overdue.into_iter().map(|(read, _)| read.inode).collect::<Vec<_>>()
        };
        assert!(told(35).is_empty(), "the machine may be busy");
        assert_eq!(told(60), [1, 3]);
        assert!(told(90).is_empty());
        assert_eq!((counters.hung.get(), counters.waiting()), (2, 2));
        drop((first, third));
        assert_eq!(counters.waiting(), 0);
        assert!(watchdog.lock().reads.is_empty());
    }
}
