//! What monitoring systems see of a daemon, in Prometheus's text format.
//!
//! The parts of the daemon count for themselves, in relaxed atomics ([`weightfs_store::counters`],
//! [`weightfs_fusefs::counters`]); here they are looked at when somebody asks, and one table
//! ([`TABLE`]) says what each is called and what it means. `docs/metrics.md` is made from it.
//!
//! Invariant: labels have few values, which are known when this is compiled: none is named after
//! a blob, a host, an image, a path or a peer.

mod calls;
mod page;
mod process;
mod table;

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::EncodeMetric as _;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, prometheus_text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use weightfs_fusefs::Filesystem;
use weightfs_store::{Histogram, OpenError, Store, Traffic, Trust, Usage};

pub use calls::{CallCode, Method, SnapshotCalls};
pub use page::markdown;
pub use prometheus_text::CONTENT_TYPE;
pub use table::TABLE;

use crate::metadata::Metadata;
use crate::models::Models;
use crate::snapshots::Decisions;
use process::Process;

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It only grows.
    Counter,
    /// It is what it is now.
    Gauge,
    /// How many values there were up to each of some bounds.
    Histogram,
}

/// A row of the table.
#[derive(Clone, Copy)]
pub struct Metric {
    /// As it is exported.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// The name of its label and the values that it has, if there is one; or of several.
    pub labels: &'static [(&'static str, Values)],
    /// What it means, in a sentence.
    pub help: &'static str,
    /// Its samples now.
    read: fn(&Seen<'_>, &mut Samples),
}

impl fmt::Debug for Metric {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Metric").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The values that a label has.
pub type Values = fn() -> Vec<&'static str>;

/// The value of a sample.
#[derive(Debug)]
enum Value {
    Whole(u64),
    Fraction(f64),
    Histogram { sum: f64, count: u64, buckets: Vec<(f64, u64)> },
}

type Labels = Vec<(&'static str, &'static str)>;

/// What a metric is now: one sample for each value of its labels.
#[derive(Debug, Default)]
struct Samples(Vec<(Labels, Value)>);

impl Samples {
    fn whole(&mut self, labels: &[(&'static str, &'static str)], value: u64) {
        self.0.push((labels.to_vec(), Value::Whole(value)));
    }

    fn fraction(&mut self, value: f64) {
        self.0.push((vec![], Value::Fraction(value)));
    }

    /// `unit` of what is counted make one of what is shown.
    fn histogram(&mut self, labels: &[(&'static str, &'static str)], of: &Histogram, unit: f64) {
        let values = of.values();
        let bounds = of.bounds().iter().map(|bound| *bound as f64 / unit);
        let bounds = bounds.chain([f64::INFINITY]);
        let buckets: Vec<_> = bounds.zip(values.buckets).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let value = Value::Histogram { sum: values.sum as f64 / unit, count, buckets };
        self.0.push((labels.to_vec(), value));
    }
}

/// What is counted where.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Blobs.
    pub store: Arc<Store>,
    /// Reads.
    pub filesystem: Arc<Filesystem>,
    /// Calls of containerd.
    pub calls: Arc<SnapshotCalls>,
    /// Layers that were lazy or not.
    pub decisions: Arc<Decisions>,
    /// Snapshots.
    pub metadata: Arc<Metadata>,
    /// Models.
    pub models: Arc<Models>,
}

/// One look at all of it.
struct Seen<'a> {
    metrics: &'a Metrics,
    cache: Cache,
    traffic: Traffic,
    process: Option<Process>,
}

/// What the cache holds, summed up.
#[derive(Debug, Clone, Copy)]
struct Cache {
    used: u64,
    limit: Option<u64>,
    free: u64,
    min_free: u64,
    open: u64,
    closed: u64,
    poisoned: u64,
}

impl From<&Usage> for Cache {
    fn from(usage: &Usage) -> Self {
        let count = |wanted: &dyn Fn(&weightfs_store::BlobUsage) -> bool| {
            usage.blobs.iter().filter(|blob| wanted(blob)).count() as u64
        };
        Self {
            used: usage.used,
            limit: usage.limit,
            free: usage.free,
            min_free: usage.min_free,
            open: count(&|blob| blob.in_use),
            closed: count(&|blob| !blob.in_use),
            poisoned: count(&|blob| blob.trust == Trust::Poisoned),
        }
    }
}

impl Metrics {
    /// All metrics as they are now, in Prometheus's text format. Looks at each blob on disk.
    ///
    /// # Errors
    /// When the cache can't be looked at.
    pub fn render(&self) -> Result<String, OpenError> {
        let seen = Seen {
            metrics: self,
            cache: Cache::from(&self.store.usage()?),
            traffic: self.store.traffic(),
            process: Process::read(),
        };
        let samples = TABLE.iter().map(|metric| {
            let mut samples = Samples::default();
            (metric.read)(&seen, &mut samples);
            (*metric, samples)
        });
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Looked(samples.collect())));
        let mut text = String::new();
        // A string takes everything.
        let _ = prometheus_text::encode(&mut text, &registry);
        Ok(text)
    }
}

/// The samples of one look, for the library that writes them.
#[derive(Debug)]
struct Looked(Vec<(Metric, Samples)>);

impl Collector for Looked {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        for (metric, Samples(samples)) in &self.0 {
            let (name, kind) = match metric.kind {
                // It is added by the encoder.
                Kind::Counter => {
                    (metric.name.strip_suffix("_total").unwrap_or(metric.name), MetricType::Counter)
                }
                Kind::Gauge => (metric.name, MetricType::Gauge),
                Kind::Histogram => (metric.name, MetricType::Histogram),
            };
            let mut family = encoder.encode_descriptor(name, metric.help, None, kind)?;
            for (labels, value) in samples {
                let mut sample = family.encode_family(labels)?;
                match (metric.kind, value) {
                    (Kind::Counter, Value::Whole(value)) => {
                        ConstCounter::new(*value).encode(sample)?;
                    }
                    (Kind::Counter, Value::Fraction(value)) => {
                        ConstCounter::new(*value).encode(sample)?;
                    }
                    (_, Value::Whole(value)) => ConstGauge::new(*value as f64).encode(sample)?,
                    (_, Value::Fraction(value)) => ConstGauge::new(*value).encode(sample)?,
                    (_, Value::Histogram { sum, count, buckets }) => {
                        sample.encode_histogram::<NoLabelSet>(*sum, *count, buckets, None)?;
                    }
                }
            }
        }
        Ok(())
    }
}
