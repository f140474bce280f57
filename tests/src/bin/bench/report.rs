//! The run as text and as JSON.

use std::time::Duration;

use serde_json::{Value, json};
use weightfs_tests::figures::{
    Bound, Figures, Judgement, Reach, machine, median, print_reaches, print_table, ratio,
    reaches_json, value,
};

use crate::Options;

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

fn warm(figures: &Figures, name: &str) -> Option<Judgement> {
    value(figures, name, Bound::AtLeast(0.95))
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
    print_table(figures);
    if options.quick {
        println!(
            "\nQUICK: this run shows that everything can be measured; its times mean nothing."
        );
    } else {
        print_reaches(REACHES, figures);
    }
}

/// The run as a JSON document.
pub(crate) fn to_json(options: &Options, figures: &Figures) -> Value {
    let left_out = figures.left_out().iter().map(|(prefix, reason)| json!([prefix, reason]));
    json!({
        "quick": options.quick,
        "machine": machine(),
        "shard_bytes": options.shard_bytes,
        "figures": figures.to_json(),
        "reach": reaches_json(REACHES, figures),
        "left_out": left_out.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::CATALOGUE;

    #[test]
    fn every_reach_is_of_figures_that_are_in_the_catalogue() {
        let mut figures = Figures::new(CATALOGUE);
        assert!(REACHES.iter().all(|reach| (reach.judge)(&figures).is_none()));
        CATALOGUE.iter().for_each(|kind| figures.add(kind.name, 1.0));
        assert!(REACHES.iter().all(|reach| (reach.judge)(&figures).is_some()));
    }
}
