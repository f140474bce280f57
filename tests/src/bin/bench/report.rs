//! The run as text and as JSON.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};

use crate::Options;
use crate::figures::{CATALOGUE, Figures, Summary};

/// A figure that is to be reached, and how it is judged.
struct Reach {
    title: &'static str,
    /// What is reached, and what is to be, from the medians of one run.
    judge: fn(&Figures) -> Option<Judgement>,
}

struct Judgement {
    found: f64,
    bound: Bound,
}

/// What a value must keep to.
#[derive(Debug, Clone, Copy)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Judgement {
    fn reached(&self) -> bool {
        match self.bound {
            Bound::AtMost(limit) => self.found <= limit,
            Bound::AtLeast(limit) => self.found >= limit,
        }
    }

    fn bound(&self) -> String {
        match self.bound {
            Bound::AtMost(limit) => format!("<= {}", short(limit)),
            Bound::AtLeast(limit) => format!(">= {}", short(limit)),
        }
    }
}

const REACHES: &[Reach] = &[
    Reach {
        title: "all read, direct / containerd 2.1's",
        judge: |f| {
            ratio(f, "all_read_direct_s", "containerd21_all_read_direct_s", Bound::AtMost(0.4))
        },
    },
    Reach {
        title: "cold sequential, direct, MB/s",
        judge: |f| {
            let ceiling = median(f, "ceiling_direct_mbps")?;
            value(f, "cold_seq_direct_mbps", Bound::AtLeast(f64::min(800.0, 0.45 * ceiling)))
        },
    },
    Reach {
        title: "cold sequential, throttled / raw ceiling",
        judge: |f| {
            ratio(f, "cold_seq_throttled_mbps", "ceiling_throttled_mbps", Bound::AtLeast(0.95))
        },
    },
    Reach {
        title: "cold mmap / cold sequential",
        judge: |f| ratio(f, "cold_mmap_direct_mbps", "cold_seq_direct_mbps", Bound::AtLeast(0.85)),
    },
    Reach {
        title: "4 readers / cold sequential",
        judge: |f| {
            ratio(f, "four_readers_direct_mbps", "cold_seq_direct_mbps", Bound::AtLeast(1.0))
        },
    },
    Reach {
        title: "2,000 random reads of 4 KiB, s",
        judge: |f| value(f, "random_2000_s", Bound::AtMost(1.5)),
    },
    Reach { title: "one 4 KiB read, ms", judge: |f| value(f, "touch_4k_ms", Bound::AtMost(6.0)) },
    Reach {
        title: "one 4 KiB read, bytes",
        judge: |f| value(f, "touch_4k_bytes", Bound::AtMost(1.1e6)),
    },
    Reach { title: "warm sequential, of native", judge: |f| warm(f, "warm_seq_of_native") },
    Reach { title: "warm mmap, of native", judge: |f| warm(f, "warm_mmap_of_native") },
    Reach { title: "warm random by mmap, of native", judge: |f| warm(f, "warm_random_of_native") },
    Reach {
        title: "warm random by pread, of native",
        judge: |f| warm(f, "warm_pread_random_of_native"),
    },
    Reach {
        title: "warm sequential, overlay, of native",
        judge: |f| warm(f, "warm_seq_overlay_of_native"),
    },
    Reach {
        title: "warm mmap, overlay, of native",
        judge: |f| warm(f, "warm_mmap_overlay_of_native"),
    },
    Reach {
        title: "warm random by mmap, overlay, of native",
        judge: |f| warm(f, "warm_random_overlay_of_native"),
    },
    Reach {
        title: "warm random by pread, overlay, of native",
        judge: |f| warm(f, "warm_pread_random_overlay_of_native"),
    },
    Reach {
        title: "just fetched / just pulled, sequential",
        judge: |f| warm(f, "fetched_seq_of_pulled"),
    },
    Reach {
        title: "just fetched / just pulled, overlay, sequential",
        judge: |f| warm(f, "fetched_seq_overlay_of_pulled"),
    },
    Reach {
        title: "just fetched / just pulled, mmap",
        judge: |f| warm(f, "fetched_mmap_of_pulled"),
    },
    Reach {
        title: "just fetched / just pulled, overlay, mmap",
        judge: |f| warm(f, "fetched_mmap_overlay_of_pulled"),
    },
    Reach {
        title: "just fetched / just pulled, random mmap",
        judge: |f| warm(f, "fetched_random_of_pulled"),
    },
    Reach {
        title: "just fetched / just pulled, overlay, random mmap",
        judge: |f| warm(f, "fetched_random_overlay_of_pulled"),
    },
    Reach {
        title: "just fetched / just pulled, random pread",
        judge: |f| warm(f, "fetched_pread_random_of_pulled"),
    },
    Reach {
        title: "just fetched / just pulled, overlay, random pread",
        judge: |f| warm(f, "fetched_pread_random_overlay_of_pulled"),
    },
    Reach {
        title: "first byte of last shard - container start, s",
        judge: |f| {
            let found = median(f, "first_byte_container_s")? - median(f, "container_start_s")?;
            Some(Judgement { found, bound: Bound::AtMost(0.1) })
        },
    },
    Reach {
        title: "daemon's CPU, s/GB",
        judge: |f| value(f, "daemon_cpu_s_per_gb", Bound::AtMost(1.3)),
    },
    Reach {
        title: "daemon's memory, MiB (worst)",
        judge: |f| {
            let found = f.get("daemon_rss_mib")?.max;
            Some(Judgement { found, bound: Bound::AtMost(64.0) })
        },
    },
    Reach {
        title: "CRI polls 10,000 snapshots, % of a CPU",
        judge: |f| value(f, "polling_cpu_percent", Bound::AtMost(2.0)),
    },
    Reach {
        title: "restart with 1,000 snapshots, 200 models, ms",
        judge: |f| value(f, "restart_ms", Bound::AtMost(1000.0)),
    },
    Reach {
        title: "index build / raw ceiling",
        judge: |f| ratio(f, "index_build_mbps", "index_ceiling_mbps", Bound::AtLeast(0.6)),
    },
    Reach {
        title: "index build, memory, MiB",
        judge: |f| value(f, "index_build_rss_mib", Bound::AtMost(64.0)),
    },
    Reach {
        title: "mount of 10,000 files by their index, s",
        judge: |f| value(f, "index_mount_10000_s", Bound::AtMost(0.3)),
    },
    Reach {
        title: "an index of 100 GB is opened, ms",
        judge: |f| value(f, "index_open_100gb_ms", Bound::AtMost(50.0)),
    },
    Reach {
        title: "an index of 100 GB is opened, MiB",
        judge: |f| value(f, "index_open_100gb_mib", Bound::AtMost(8.0)),
    },
    Reach {
        title: "safetensors, mount / pull",
        judge: |f| ratio(f, "safetensors_mount_s", "safetensors_pull_s", Bound::AtMost(1.0)),
    },
    Reach {
        title: "gguf, mount / pull",
        judge: |f| ratio(f, "gguf_mount_s", "gguf_pull_s", Bound::AtMost(1.0)),
    },
    Reach {
        title: "transformers, mount / pull",
        judge: |f| ratio(f, "transformers_mount_s", "transformers_pull_s", Bound::AtMost(1.0)),
    },
    Reach {
        title: "runai-model-streamer, mount / pull",
        judge: |f| ratio(f, "runai_mount_s", "runai_pull_s", Bound::AtMost(1.0)),
    },
    Reach {
        title: "fastsafetensors, mount / pull",
        judge: |f| {
            ratio(f, "fastsafetensors_mount_s", "fastsafetensors_pull_s", Bound::AtMost(1.0))
        },
    },
    Reach {
        title: "tensorizer, mount / pull",
        judge: |f| ratio(f, "tensorizer_mount_s", "tensorizer_pull_s", Bound::AtMost(1.0)),
    },
    Reach {
        title: "safetensors, throttled, mount / pull",
        judge: |f| {
            ratio(
                f,
                "safetensors_mount_throttled_s",
                "safetensors_pull_throttled_s",
                Bound::AtMost(1.0),
            )
        },
    },
    Reach {
        title: "gguf, throttled, mount / pull",
        judge: |f| ratio(f, "gguf_mount_throttled_s", "gguf_pull_throttled_s", Bound::AtMost(1.0)),
    },
    Reach {
        title: "transformers, throttled, mount / pull",
        judge: |f| {
            ratio(
                f,
                "transformers_mount_throttled_s",
                "transformers_pull_throttled_s",
                Bound::AtMost(1.0),
            )
        },
    },
    Reach {
        title: "runai-model-streamer, throttled, mount / pull",
        judge: |f| {
            ratio(f, "runai_mount_throttled_s", "runai_pull_throttled_s", Bound::AtMost(1.0))
        },
    },
    Reach {
        title: "fastsafetensors, throttled, mount / pull",
        judge: |f| {
            ratio(
                f,
                "fastsafetensors_mount_throttled_s",
                "fastsafetensors_pull_throttled_s",
                Bound::AtMost(1.0),
            )
        },
    },
    Reach {
        title: "tensorizer, throttled, mount / pull",
        judge: |f| {
            ratio(
                f,
                "tensorizer_mount_throttled_s",
                "tensorizer_pull_throttled_s",
                Bound::AtMost(1.0),
            )
        },
    },
];

fn median(figures: &Figures, name: &str) -> Option<f64> {
    figures.get(name).map(|summary| summary.median)
}

fn value(figures: &Figures, name: &str, bound: Bound) -> Option<Judgement> {
    Some(Judgement { found: median(figures, name)?, bound })
}

fn warm(figures: &Figures, name: &str) -> Option<Judgement> {
    value(figures, name, Bound::AtLeast(0.95))
}

fn ratio(figures: &Figures, of: &str, to: &str, bound: Bound) -> Option<Judgement> {
    Some(Judgement { found: median(figures, of)? / median(figures, to)?, bound })
}

/// Prints the tables.
pub(crate) fn print(options: &Options, figures: &Figures, took: Duration) {
    let rounds = options.rounds;
    let mib = options.shard_bytes >> 20;
    println!(
        "\n{rounds} round(s) of 4 x {mib} MiB in {:.0} s; {}\n",
        took.as_secs_f64(),
        machine()
    );
    println!("{:<50} {:>9} {:>9} {:>9}", "", "median", "min", "max");
    for kind in CATALOGUE {
        if let Some(Summary { median, min, max, .. }) = figures.get(kind.name) {
            let [median, min, max] = [median, min, max].map(short);
            println!("{:<50} {median:>9} {min:>9} {max:>9}  {}", kind.title, kind.unit.name());
        }
    }
    for (prefix, reason) in figures.left_out() {
        println!("left out: {prefix}*: {reason}");
    }
    if options.quick {
        println!(
            "\nQUICK: this run shows that everything can be measured; its times mean nothing."
        );
    } else {
        print_reaches(figures);
    }
}

fn print_reaches(figures: &Figures) {
    println!("\n{:<50} {:>9}  {:>12}", "reach (medians of this run)", "found", "wanted");
    for reach in REACHES {
        let Some(judgement) = (reach.judge)(figures) else { continue };
        let word = if judgement.reached() { "reached" } else { "NOT reached" };
        let (found, bound) = (short(judgement.found), judgement.bound());
        println!("{:<50} {found:>9}  {bound:>12}  {word}", reach.title);
    }
}

/// The run as a JSON document.
pub(crate) fn to_json(options: &Options, figures: &Figures) -> Value {
    let left_out = figures.left_out().iter().map(|(prefix, reason)| json!([prefix, reason]));
    let reaches = REACHES.iter().filter_map(|reach| {
        let judgement = (reach.judge)(figures)?;
        Some(json!({
            "title": reach.title,
            "found": judgement.found,
            "wanted": judgement.bound(),
            "reached": judgement.reached(),
        }))
    });
    json!({
        "quick": options.quick,
        "machine": machine(),
        "shard_bytes": options.shard_bytes,
        "figures": figures.to_json(),
        "reach": reaches.collect::<Vec<_>>(),
        "left_out": left_out.collect::<Vec<_>>(),
    })
}

/// What the figures depend on: processors, kernel, and how busy others keep the machine.
fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or_default();
    format!("{cpus} CPUs, Linux {}, load {load}", read("/proc/sys/kernel/osrelease"))
}

/// Three significant digits; whole numbers from 1,000 on, with a comma for each thousand.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 999.5 => thousands(value.round()),
        size if size >= 99.95 => format!("{value:.0}"),
        size if size >= 9.995 => format!("{value:.1}"),
        size if size >= 0.9995 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn thousands(whole: f64) -> String {
    let digits = format!("{:.0}", whole.abs());
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    if whole < 0.0 { format!("-{text}") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_commas() {
        let cases = [
            (0.0123, "0.012"),
            (1.0, "1.00"),
            (12.34, "12.3"),
            (99.97, "100"),
            (999.9, "1,000"),
            (1_052_672.0, "1,052,672"),
            (-0.5, "-0.500"),
        ];
        for (value, text) in cases {
            assert_eq!(short(value), text);
        }
    }

    #[test]
    fn a_reach_is_judged_from_the_medians_of_the_run() {
        let mut figures = Figures::default();
        assert!(REACHES.iter().all(|reach| (reach.judge)(&figures).is_none()));
        figures.add("all_read_direct_s", 2.0);
        figures.add("containerd21_all_read_direct_s", 4.0);
        let judgement = (REACHES[0].judge)(&figures).unwrap();
        assert!(!judgement.reached());
        figures.add("containerd21_all_read_direct_s", 8.0);
        assert!((REACHES[0].judge)(&figures).unwrap().reached());
    }
}
