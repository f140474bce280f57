//! The table of all metrics.

use weightfs_fusefs::{ReadFrom, ReadResult};
use weightfs_store::SourceKind;

use super::{CallCode, Kind, Method, Metric, Seen};
use crate::reason;

/// Nanoseconds of a second.
const NANOS: f64 = 1e9;

fn froms() -> Vec<&'static str> {
    ReadFrom::ALL.map(ReadFrom::as_str).to_vec()
}

fn results() -> Vec<&'static str> {
    ReadResult::ALL.map(ReadResult::as_str).to_vec()
}

fn sources() -> Vec<&'static str> {
    SourceKind::ALL.map(SourceKind::as_str).to_vec()
}

fn methods() -> Vec<&'static str> {
    Method::ALL.map(Method::as_str).to_vec()
}

fn codes() -> Vec<&'static str> {
    CallCode::ALL.map(CallCode::as_str).to_vec()
}

fn decisions() -> Vec<&'static str> {
    reason::DECISIONS.to_vec()
}

const SERVED: &str = "served";
const PASSTHROUGH: &str = "passthrough";
const DONE: &str = "done";
const FAILED: &str = "failed";
const BLOB: &str = "blob";
const EXTENT: &str = "extent";
const CHUNK: &str = "chunk";
const OPEN: &str = "open";
const CLOSED: &str = "closed";

/// All metrics, in the order in which they are shown.
pub const TABLE: &[Metric] = &[
    Metric {
        name: "weightfs_reads_total",
        kind: Kind::Counter,
        labels: &[("from", froms), ("result", results)],
        help: "Reads that the kernel asked for, by where their bytes were and how they ended",
        read: |seen, samples| {
            for from in ReadFrom::ALL {
                for result in ReadResult::ALL {
                    let labels = [("from", from.as_str()), ("result", result.as_str())];
                    samples.whole(&labels, seen.reads().reads(from, result));
                }
            }
        },
    },
    Metric {
        name: "weightfs_read_bytes_total",
        kind: Kind::Counter,
        labels: &[("from", froms)],
        help: "Bytes that reads were answered with",
        read: |seen, samples| {
            for from in ReadFrom::ALL {
                samples.whole(&[("from", from.as_str())], seen.reads().bytes(from));
            }
        },
    },
    Metric {
        name: "weightfs_read_duration_seconds",
        kind: Kind::Histogram,
        labels: &[("from", froms)],
        help: "Time from a read's request to its answer",
        read: |seen, samples| {
            for from in ReadFrom::ALL {
                samples.histogram(&[("from", from.as_str())], seen.reads().time(from), NANOS);
            }
        },
    },
    Metric {
        name: "weightfs_reads_waiting",
        kind: Kind::Gauge,
        labels: &[],
        help: "Reads that wait for their bytes now",
        read: |seen, samples| samples.whole(&[], seen.reads().waiting()),
    },
    Metric {
        name: "weightfs_reads_hung_total",
        kind: Kind::Counter,
        labels: &[],
        help: "Reads that waited beyond their deadline, which none should",
        read: |seen, samples| samples.whole(&[], seen.reads().hung.get()),
    },
    Metric {
        name: "weightfs_opens_total",
        kind: Kind::Counter,
        labels: &[("mode", || vec![SERVED, PASSTHROUGH])],
        help: "Files opened: served by the daemon, or passed through to the kernel",
        read: |seen, samples| {
            samples.whole(&[("mode", SERVED)], seen.reads().opens_served.get());
            samples.whole(&[("mode", PASSTHROUGH)], seen.reads().opens_passed.get());
        },
    },
    Metric {
        name: "weightfs_fetched_bytes_total",
        kind: Kind::Counter,
        labels: &[("source", sources)],
        help: "Bytes of blobs that came from sources",
        read: |seen, samples| {
            for kind in SourceKind::ALL {
                samples.whole(&[("source", kind.as_str())], seen.store().fetched.get(kind));
            }
        },
    },
    Metric {
        name: "weightfs_fetch_requests_total",
        kind: Kind::Counter,
        labels: &[("result", || vec![DONE, FAILED])],
        help: "Requests for ranges of blobs that are over",
        read: |seen, samples| {
            samples.whole(&[("result", DONE)], seen.store().requests_done.get());
            samples.whole(&[("result", FAILED)], seen.store().requests_failed.get());
        },
    },
    Metric {
        name: "weightfs_fetch_requests_in_flight",
        kind: Kind::Gauge,
        labels: &[],
        help: "Requests that run now",
        read: |seen, samples| samples.whole(&[], seen.traffic.requests as u64),
    },
    Metric {
        name: "weightfs_fetch_requests_limit",
        kind: Kind::Gauge,
        labels: &[],
        help: "Requests that all known hosts together are sent at once, as was found out",
        read: |seen, samples| samples.whole(&[], seen.traffic.limit as u64),
    },
    Metric {
        name: "weightfs_fetch_first_byte_seconds",
        kind: Kind::Histogram,
        labels: &[],
        help: "Time from a request to the first byte of its answer",
        read: |seen, samples| samples.histogram(&[], &seen.store().first_byte, NANOS),
    },
    Metric {
        name: "weightfs_fetch_retries_total",
        kind: Kind::Counter,
        labels: &[],
        help: "Times that a source was asked again, or the next one, after a failure",
        read: |seen, samples| samples.whole(&[], seen.store().retries.get()),
    },
    Metric {
        name: "weightfs_fetch_throttled_total",
        kind: Kind::Counter,
        labels: &[],
        help: "Answers 429 and 503: a host is asked too much",
        read: |seen, samples| samples.whole(&[], seen.store().complaints.get()),
    },
    Metric {
        name: "weightfs_hedges_total",
        kind: Kind::Counter,
        labels: &[],
        help: "Slow requests that were sent a second time",
        read: |seen, samples| samples.whole(&[], seen.store().hedges.get()),
    },
    Metric {
        name: "weightfs_hedges_won_total",
        kind: Kind::Counter,
        labels: &[],
        help: "Second requests that overtook the first",
        read: |seen, samples| samples.whole(&[], seen.store().hedges_won.get()),
    },
    Metric {
        name: "weightfs_read_ahead_window_bytes",
        kind: Kind::Histogram,
        labels: &[],
        help: "Windows of sequential readers, each time that one is extended",
        read: |seen, samples| samples.histogram(&[], &seen.store().windows, 1.0),
    },
    Metric {
        name: "weightfs_cache_bytes",
        kind: Kind::Gauge,
        labels: &[],
        help: "Bytes that the cache takes on disk",
        read: |seen, samples| samples.whole(&[], seen.cache.used),
    },
    Metric {
        name: "weightfs_cache_limit_bytes",
        kind: Kind::Gauge,
        labels: &[],
        help: "Bytes that it may take (cache.limit); absent without a limit",
        read: |seen, samples| seen.cache.limit.iter().for_each(|limit| samples.whole(&[], *limit)),
    },
    Metric {
        name: "weightfs_cache_filesystem_free_bytes",
        kind: Kind::Gauge,
        labels: &[],
        help: "Bytes that are free in its file system",
        read: |seen, samples| samples.whole(&[], seen.cache.free),
    },
    Metric {
        name: "weightfs_cache_min_free_bytes",
        kind: Kind::Gauge,
        labels: &[],
        help: "Bytes of its file system that it leaves free (cache.min_free)",
        read: |seen, samples| samples.whole(&[], seen.cache.min_free),
    },
    Metric {
        name: "weightfs_cache_blobs",
        kind: Kind::Gauge,
        labels: &[("state", || vec![OPEN, CLOSED])],
        help: "Blobs of which something is cached, in use or not",
        read: |seen, samples| {
            samples.whole(&[("state", OPEN)], seen.cache.open);
            samples.whole(&[("state", CLOSED)], seen.cache.closed);
        },
    },
    Metric {
        name: "weightfs_evictions_total",
        kind: Kind::Counter,
        labels: &[("what", || vec![BLOB, EXTENT])],
        help: "Blobs that nobody used, and extents (16 MiB) of those in use, that were evicted",
        read: |seen, samples| {
            samples.whole(&[("what", BLOB)], seen.store().evicted_blobs.get());
            samples.whole(&[("what", EXTENT)], seen.store().evicted_extents.get());
        },
    },
    Metric {
        name: "weightfs_evicted_bytes_total",
        kind: Kind::Counter,
        labels: &[("what", || vec![BLOB, EXTENT])],
        help: "Bytes of these",
        read: |seen, samples| {
            samples.whole(&[("what", BLOB)], seen.store().evicted_blob_bytes.get());
            samples.whole(&[("what", EXTENT)], seen.store().evicted_extent_bytes.get());
        },
    },
    Metric {
        name: "weightfs_uncached_chunks_total",
        kind: Kind::Counter,
        labels: &[],
        help: "Chunks that were served from memory, because there was no room on disk",
        read: |seen, samples| samples.whole(&[], seen.store().loose_chunks.get()),
    },
    Metric {
        name: "weightfs_verified_blobs_total",
        kind: Kind::Counter,
        labels: &[],
        help: "Blobs that were hashed and are what their digest says",
        read: |seen, samples| samples.whole(&[], seen.store().verified_blobs.get()),
    },
    Metric {
        name: "weightfs_verification_failures_total",
        kind: Kind::Counter,
        labels: &[("what", || vec![BLOB, CHUNK])],
        help: "Blobs that hash to something else, and chunks that a source gave and that do",
        read: |seen, samples| {
            samples.whole(&[("what", BLOB)], seen.store().poisoned_blobs.get());
            samples.whole(&[("what", CHUNK)], seen.store().wrong_chunks.get());
        },
    },
    Metric {
        name: "weightfs_poisoned_blobs",
        kind: Kind::Gauge,
        labels: &[],
        help: "Blobs in the cache that hash to something else and are not served",
        read: |seen, samples| samples.whole(&[], seen.cache.poisoned),
    },
    Metric {
        name: "weightfs_snapshot_calls_total",
        kind: Kind::Counter,
        labels: &[("method", methods), ("code", codes)],
        help: "Calls of containerd (AlreadyExists of Prepare: the layer is mounted lazily)",
        read: |seen, samples| {
            for method in Method::ALL {
                for code in CallCode::ALL {
                    let labels = [("method", method.as_str()), ("code", code.as_str())];
                    samples.whole(&labels, seen.metrics.calls.ended(method, code));
                }
            }
        },
    },
    Metric {
        name: "weightfs_snapshot_call_duration_seconds",
        kind: Kind::Histogram,
        labels: &[("method", methods)],
        help: "Time that calls of containerd took",
        read: |seen, samples| {
            for method in Method::ALL {
                if let Some(time) = seen.metrics.calls.time(method) {
                    samples.histogram(&[("method", method.as_str())], time, NANOS);
                }
            }
        },
    },
    Metric {
        name: "weightfs_layer_decisions_total",
        kind: Kind::Counter,
        labels: &[("decision", decisions)],
        help: "Layers that were mounted lazily, or why not",
        read: |seen, samples| {
            let counts = seen.metrics.decisions.counts();
            for decision in reason::DECISIONS {
                let count = counts.get(decision).copied().unwrap_or(0);
                samples.whole(&[("decision", decision)], count);
            }
        },
    },
    Metric {
        name: "weightfs_snapshots",
        kind: Kind::Gauge,
        labels: &[],
        help: "Snapshots that containerd has here",
        read: |seen, samples| samples.whole(&[], seen.metrics.metadata.index().len() as u64),
    },
    Metric {
        name: "weightfs_models",
        kind: Kind::Gauge,
        labels: &[],
        help: "Models that are mounted through the daemon",
        read: |seen, samples| samples.whole(&[], seen.metrics.models.count() as u64),
    },
    Metric {
        name: "weightfs_build_info",
        kind: Kind::Gauge,
        labels: &[("version", || vec![env!("CARGO_PKG_VERSION")])],
        help: "1, with the version as a label",
        read: |_, samples| samples.whole(&[("version", env!("CARGO_PKG_VERSION"))], 1),
    },
    Metric {
        name: "process_cpu_seconds_total",
        kind: Kind::Counter,
        labels: &[],
        help: "CPU time that the daemon has used",
        read: |seen, samples| seen.process.iter().for_each(|it| samples.fraction(it.cpu_seconds)),
    },
    Metric {
        name: "process_resident_memory_bytes",
        kind: Kind::Gauge,
        labels: &[],
        help: "Memory that it has, mapped cache files included",
        read: |seen, samples| {
            seen.process.iter().for_each(|it| samples.whole(&[], it.resident_bytes));
        },
    },
    Metric {
        name: "process_open_fds",
        kind: Kind::Gauge,
        labels: &[],
        help: "File descriptors that it has open",
        read: |seen, samples| seen.process.iter().for_each(|it| samples.whole(&[], it.open_files)),
    },
    Metric {
        name: "process_max_fds",
        kind: Kind::Gauge,
        labels: &[],
        help: "File descriptors that it may have open",
        read: |seen, samples| {
            let limit = seen.process.and_then(|process| process.max_files);
            limit.iter().for_each(|limit| samples.whole(&[], *limit));
        },
    },
    Metric {
        name: "process_start_time_seconds",
        kind: Kind::Gauge,
        labels: &[],
        help: "When it was started, in seconds since the epoch",
        read: |seen, samples| seen.process.iter().for_each(|it| samples.fraction(it.start_seconds)),
    },
];

impl Seen<'_> {
    fn reads(&self) -> &weightfs_fusefs::MountCounters {
        self.metrics.filesystem.counters()
    }

    fn store(&self) -> &weightfs_store::Counters {
        self.metrics.store.counters()
    }
}
