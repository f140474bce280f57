//! What was measured: samples by name, and their medians.
//!
//! Invariant: every figure is in [`CATALOGUE`]; one that is neither measured nor left out with a
//! reason makes the run fail.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Seconds.
    Seconds,
    /// Milliseconds.
    Milliseconds,
    /// 10⁶ bytes per second.
    Rate,
    /// Bytes.
    Bytes,
    /// 2²⁰ bytes.
    Mebibytes,
    /// Of the native file system's speed; 1 is as fast.
    OfNative,
    /// CPU seconds per 10⁹ bytes.
    SecondsPerGigabyte,
    /// Hundredths of one CPU.
    PercentOfCpu,
}

impl Unit {
    /// As it is printed.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Seconds => "s",
            Self::Milliseconds => "ms",
            Self::Rate => "MB/s",
            Self::Bytes => "B",
            Self::Mebibytes => "MiB",
            Self::OfNative => "of native",
            Self::SecondsPerGigabyte => "s/GB",
            Self::PercentOfCpu => "% CPU",
        }
    }
}

/// A figure: its name in the JSON file, what it counts, and what it is.
#[derive(Debug)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    pub(crate) unit: Unit,
    pub(crate) title: &'static str,
}

const fn kind(name: &'static str, unit: Unit, title: &'static str) -> Kind {
    Kind { name, unit, title }
}

/// Every figure, in the order of the table.
pub(crate) const CATALOGUE: &[Kind] = &[
    kind("ceiling_direct_mbps", Unit::Rate, "raw parallel download, direct"),
    kind("ceiling_throttled_mbps", Unit::Rate, "raw parallel download, throttled"),
    kind("cold_seq_direct_mbps", Unit::Rate, "cold sequential, direct"),
    kind("cold_seq_throttled_mbps", Unit::Rate, "cold sequential, throttled"),
    kind("cold_mmap_direct_mbps", Unit::Rate, "cold mmap, direct"),
    kind("four_readers_direct_mbps", Unit::Rate, "cold, 4 readers at once, direct"),
    kind("random_2000_s", Unit::Seconds, "cold, 2,000 random reads of 4 KiB"),
    kind("touch_4k_ms", Unit::Milliseconds, "cold, one read of 4 KiB"),
    kind("touch_4k_bytes", Unit::Bytes, "  bytes that the registry sent for it"),
    kind("first_byte_mount_s", Unit::Seconds, "first byte of last shard, mount"),
    kind("container_start_s", Unit::Seconds, "start of a container, image there"),
    kind("small_pull_s", Unit::Seconds, "containerd 1.6, pull of the image without weights"),
    kind("rpull_s", Unit::Seconds, "rpull of the image with weights"),
    kind("first_byte_container_s", Unit::Seconds, "first byte of last shard, rpull + container"),
    kind(
        "containerd16_first_byte_container_s",
        Unit::Seconds,
        "  containerd 1.6, pull + container",
    ),
    kind(
        "containerd21_first_byte_container_s",
        Unit::Seconds,
        "  containerd 2.1, pull + container",
    ),
    kind("all_read_direct_s", Unit::Seconds, "all read, rpull + read, direct"),
    kind("containerd16_all_read_direct_s", Unit::Seconds, "  containerd 1.6, pull + read"),
    kind("containerd21_all_read_direct_s", Unit::Seconds, "  containerd 2.1, pull + read"),
    kind("all_read_throttled_s", Unit::Seconds, "all read, rpull + read, throttled"),
    kind("containerd16_all_read_throttled_s", Unit::Seconds, "  containerd 1.6, pull + read"),
    kind("containerd21_all_read_throttled_s", Unit::Seconds, "  containerd 2.1, pull + read"),
    kind("native_warm_seq_mbps", Unit::Rate, "warm sequential, ext4"),
    kind("native_warm_mmap_mbps", Unit::Rate, "warm mmap, ext4"),
    kind("native_warm_random_mbps", Unit::Rate, "warm random 4 KiB by mmap, ext4"),
    kind("native_warm_pread_random_mbps", Unit::Rate, "warm random 4 KiB by pread, ext4"),
    kind("warm_seq_of_native", Unit::OfNative, "warm sequential, mount"),
    kind("warm_mmap_of_native", Unit::OfNative, "warm mmap, mount"),
    kind("warm_random_of_native", Unit::OfNative, "warm random 4 KiB by mmap, mount"),
    kind("warm_pread_random_of_native", Unit::OfNative, "warm random 4 KiB by pread, mount"),
    kind("warm_seq_overlay_of_native", Unit::OfNative, "warm sequential, containerd's overlay"),
    kind("warm_mmap_overlay_of_native", Unit::OfNative, "warm mmap, containerd's overlay"),
    kind(
        "warm_random_overlay_of_native",
        Unit::OfNative,
        "warm random by mmap, containerd's overlay",
    ),
    kind(
        "warm_pread_random_overlay_of_native",
        Unit::OfNative,
        "warm random by pread, containerd's overlay",
    ),
    kind("native_warm_seq_overlay_of_native", Unit::OfNative, "  sequential, overlayfs over ext4"),
    kind("native_warm_mmap_overlay_of_native", Unit::OfNative, "  mmap, overlayfs over ext4"),
    kind(
        "native_warm_random_overlay_of_native",
        Unit::OfNative,
        "  random 4 KiB by mmap, overlayfs over ext4",
    ),
    kind(
        "native_warm_pread_random_overlay_of_native",
        Unit::OfNative,
        "  random 4 KiB by pread, overlayfs over ext4",
    ),
    kind("fetched_seq_of_pulled", Unit::OfNative, "just fetched / just pulled, sequential"),
    kind("fetched_mmap_of_pulled", Unit::OfNative, "just fetched / just pulled, mmap"),
    kind("fetched_random_of_pulled", Unit::OfNative, "just fetched / just pulled, random mmap"),
    kind(
        "fetched_pread_random_of_pulled",
        Unit::OfNative,
        "just fetched / just pulled, random pread",
    ),
    kind(
        "fetched_seq_overlay_of_pulled",
        Unit::OfNative,
        "  through containerd's overlay, sequential",
    ),
    kind("fetched_mmap_overlay_of_pulled", Unit::OfNative, "  through containerd's overlay, mmap"),
    kind(
        "fetched_random_overlay_of_pulled",
        Unit::OfNative,
        "  through containerd's overlay, random mmap",
    ),
    kind(
        "fetched_pread_random_overlay_of_pulled",
        Unit::OfNative,
        "  through containerd's overlay, random pread",
    ),
    kind("fetched_seq_of_native", Unit::OfNative, "just fetched / from disk, sequential"),
    kind("fetched_mmap_of_native", Unit::OfNative, "just fetched / from disk, mmap"),
    kind(
        "fetched_random_of_native",
        Unit::OfNative,
        "just fetched / from disk, random 4 KiB by mmap",
    ),
    kind(
        "fetched_pread_random_of_native",
        Unit::OfNative,
        "just fetched / from disk, random 4 KiB by pread",
    ),
    kind("native_dropped_seq_mbps", Unit::Rate, "caches dropped, sequential, ext4"),
    kind("dropped_seq_of_native", Unit::OfNative, "caches dropped, sequential, mount"),
    kind("safetensors_mount_s", Unit::Seconds, "safetensors (numpy), cold mount + load"),
    kind("safetensors_pull_s", Unit::Seconds, "  pull + local load"),
    kind("safetensors_mount_throttled_s", Unit::Seconds, "  throttled, cold mount + load"),
    kind("safetensors_pull_throttled_s", Unit::Seconds, "  throttled, pull + local load"),
    kind("gguf_mount_s", Unit::Seconds, "gguf, cold mount + load"),
    kind("gguf_pull_s", Unit::Seconds, "  pull + local load"),
    kind("gguf_mount_throttled_s", Unit::Seconds, "  throttled, cold mount + load"),
    kind("gguf_pull_throttled_s", Unit::Seconds, "  throttled, pull + local load"),
    kind("transformers_mount_s", Unit::Seconds, "transformers, cold mount + load"),
    kind("transformers_pull_s", Unit::Seconds, "  pull + local load"),
    kind("transformers_mount_throttled_s", Unit::Seconds, "  throttled, cold mount + load"),
    kind("transformers_pull_throttled_s", Unit::Seconds, "  throttled, pull + local load"),
    kind("runai_mount_s", Unit::Seconds, "runai-model-streamer, cold mount + load"),
    kind("runai_pull_s", Unit::Seconds, "  pull + local load"),
    kind("runai_mount_throttled_s", Unit::Seconds, "  throttled, cold mount + load"),
    kind("runai_pull_throttled_s", Unit::Seconds, "  throttled, pull + local load"),
    kind("fastsafetensors_mount_s", Unit::Seconds, "fastsafetensors, cold mount + load"),
    kind("fastsafetensors_pull_s", Unit::Seconds, "  pull + local load"),
    kind("fastsafetensors_mount_throttled_s", Unit::Seconds, "  throttled, cold mount + load"),
    kind("fastsafetensors_pull_throttled_s", Unit::Seconds, "  throttled, pull + local load"),
    kind("tensorizer_mount_s", Unit::Seconds, "tensorizer, cold mount + load"),
    kind("tensorizer_pull_s", Unit::Seconds, "  pull + local load"),
    kind("tensorizer_mount_throttled_s", Unit::Seconds, "  throttled, cold mount + load"),
    kind("tensorizer_pull_throttled_s", Unit::Seconds, "  throttled, pull + local load"),
    kind("daemon_cpu_s_per_gb", Unit::SecondsPerGigabyte, "daemon's CPU, cold sequential"),
    kind("polling_cpu_percent", Unit::PercentOfCpu, "daemon's CPU, CRI polls 10,000 snapshots"),
    kind("restart_ms", Unit::Milliseconds, "restart, 1,000 snapshots and 200 models: the pause"),
    kind("daemon_rss_mib", Unit::Mebibytes, "daemon's peak memory, mapped files not counted"),
    kind("store_start_ms", Unit::Milliseconds, "start-up with 100 blobs of 100 GB"),
    kind("index_ceiling_mbps", Unit::Rate, "raw parallel download, beside the next"),
    kind("index_build_mbps", Unit::Rate, "index of the model, direct"),
    kind("index_zeros_ceiling_mbps", Unit::Rate, "10 GB of zeros, raw parallel download"),
    kind("index_zeros_mbps", Unit::Rate, "  their index"),
    kind("index_build_rss_mib", Unit::Mebibytes, "  its memory"),
    kind("index_mount_10000_s", Unit::Seconds, "mount of 10,000 files by their index"),
    kind("index_open_100gb_ms", Unit::Milliseconds, "an index of 100 GB is opened"),
    kind("index_open_100gb_mib", Unit::Mebibytes, "  its memory"),
];

/// Median, least and greatest of a figure's samples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) count: usize,
}

/// All samples of a run.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    samples: BTreeMap<&'static str, Vec<f64>>,
    left_out: Vec<(&'static str, String)>,
}

impl Figures {
    /// Adds a sample.
    ///
    /// # Panics
    /// When the figure is not in the catalogue, or the sample is no number.
    pub(crate) fn add(&mut self, name: &str, value: f64) {
        let kind = CATALOGUE.iter().find(|kind| kind.name == name);
        let kind = kind.unwrap_or_else(|| panic!("figure {name} is not in the catalogue"));
        assert!(value.is_finite(), "{name} is {value}");
        self.samples.entry(kind.name).or_default().push(value);
    }

    /// Says that figures whose names begin so are not measured in this run, and why.
    pub(crate) fn leave_out(&mut self, prefix: &'static str, reason: impl Into<String>) {
        self.left_out.push((prefix, reason.into()));
    }

    /// What is left out, and why.
    pub(crate) fn left_out(&self) -> &[(&'static str, String)] {
        &self.left_out
    }

    /// A figure's summary, if it was measured.
    pub(crate) fn get(&self, name: &str) -> Option<Summary> {
        let mut sorted = self.samples.get(name)?.clone();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        let median = f64::midpoint(sorted[(count - 1) / 2], sorted[count / 2]);
        Some(Summary { median, min: sorted[0], max: sorted[count - 1], count })
    }

    /// Names of figures that should have been measured and were not.
    pub(crate) fn missing(&self) -> Vec<&'static str> {
        let wanted =
            |name: &&str| !self.left_out.iter().any(|(prefix, _)| name.starts_with(prefix));
        let names = CATALOGUE.iter().map(|kind| kind.name);
        names.filter(|name| !self.samples.contains_key(name)).filter(wanted).collect()
    }

    /// Name -> {median, min, max, n, unit}.
    pub(crate) fn to_json(&self) -> Value {
        let mut all = Map::new();
        for kind in CATALOGUE {
            let Some(summary) = self.get(kind.name) else { continue };
            let figure = json!({
                "median": summary.median,
                "min": summary.min,
                "max": summary.max,
                "n": summary.count,
                "unit": kind.unit.name(),
            });
            all.insert(kind.name.to_owned(), figure);
        }
        all.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_is_between_the_middle_two() {
        let mut figures = Figures::default();
        for value in [4.0, 1.0, 2.0, 10.0] {
            figures.add("random_2000_s", value);
        }
        let summary = Summary { median: 3.0, min: 1.0, max: 10.0, count: 4 };
        assert_eq!(figures.get("random_2000_s"), Some(summary));
    }

    #[test]
    fn what_is_neither_measured_nor_left_out_is_missing() {
        let mut figures = Figures::default();
        assert_eq!(figures.missing().len(), CATALOGUE.len());
        figures.add("touch_4k_ms", 1.0);
        figures.leave_out("containerd21_", "no network");
        let missing = figures.missing();
        assert!(!missing.contains(&"touch_4k_ms"));
        assert!(missing.iter().all(|name| !name.starts_with("containerd21_")));
        assert!(missing.contains(&"touch_4k_bytes"));
    }
}
