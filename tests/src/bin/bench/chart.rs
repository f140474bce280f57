//! The bar chart: seconds from nothing to everything read, and megabytes per second, in SVG.

use std::fmt::Write as _;

use weightfs_tests::figures::Figures;

const WIDTH: u32 = 720;
const LABEL_WIDTH: u32 = 250;
const VALUE_WIDTH: u32 = 90;
const BAR_HEIGHT: u32 = 20;
const GAP: u32 = 8;
const TITLE_HEIGHT: u32 = 34;
const OURS: &str = "#1b7f5c";
const OTHERS: &str = "#9aa3ab";

struct Bar {
    figure: &'static str,
    label: &'static str,
    color: &'static str,
}

const fn ours(figure: &'static str, label: &'static str) -> Bar {
    Bar { figure, label, color: OURS }
}

const fn other(figure: &'static str, label: &'static str) -> Bar {
    Bar { figure, label, color: OTHERS }
}

/// Groups of bars with one scale each: title, unit, bars.
const GROUPS: &[(&str, &str, &[Bar])] = &[
    (
        "From nothing to everything read (less is better)",
        "s",
        &[
            ours("all_read_direct_s", "WeightFS"),
            other("containerd21_all_read_direct_s", "containerd 2.1 pull + read"),
            other("containerd16_all_read_direct_s", "containerd 1.6 pull + read"),
        ],
    ),
    (
        "From nothing to everything read at 200 MB/s, 20 ms (less is better)",
        "s",
        &[
            ours("all_read_throttled_s", "WeightFS"),
            other("containerd21_all_read_throttled_s", "containerd 2.1 pull + read"),
            other("containerd16_all_read_throttled_s", "containerd 1.6 pull + read"),
        ],
    ),
    (
        "From nothing to the last shard's first byte in a container (less is better)",
        "s",
        &[
            ours("first_byte_container_s", "WeightFS"),
            other("containerd21_first_byte_container_s", "containerd 2.1"),
            other("containerd16_first_byte_container_s", "containerd 1.6"),
            other("container_start_s", "start of a container alone"),
        ],
    ),
    (
        "Cold reads (more is better)",
        "MB/s",
        &[
            ours("cold_seq_direct_mbps", "sequential"),
            ours("cold_mmap_direct_mbps", "mmap"),
            ours("four_readers_direct_mbps", "4 readers"),
            other("ceiling_direct_mbps", "raw parallel download"),
            ours("cold_seq_throttled_mbps", "sequential, throttled"),
            other("ceiling_throttled_mbps", "raw parallel download, throttled"),
        ],
    ),
    (
        "Cold mount + load, and pull + local load (less is better)",
        "s",
        &[
            ours("safetensors_mount_s", "safetensors, mount"),
            other("safetensors_pull_s", "safetensors, pull"),
            ours("gguf_mount_s", "gguf, mount"),
            other("gguf_pull_s", "gguf, pull"),
        ],
    ),
];

/// Draws the medians; figures that were not measured have no bar.
pub(crate) fn draw(figures: &Figures) -> String {
    let mut body = String::new();
    let mut y = GAP;
    for (title, unit, bars) in GROUPS {
        y = draw_group(&mut body, y, title, unit, &measured(figures, bars));
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

fn measured<'a>(figures: &Figures, bars: &'a [Bar]) -> Vec<(&'a Bar, f64)> {
    bars.iter().filter_map(|bar| Some((bar, figures.get(bar.figure)?.median))).collect()
}

/// Draws below `y` and gives where the next group begins.
fn draw_group(to: &mut String, mut y: u32, title: &str, unit: &str, bars: &[(&Bar, f64)]) -> u32 {
    let longest = bars.iter().map(|(_, value)| *value).fold(0.0, f64::max);
    if longest <= 0.0 {
        return y;
    }
    let room = f64::from(WIDTH - LABEL_WIDTH - VALUE_WIDTH);
    y += TITLE_HEIGHT;
    let _ = writeln!(to, "<text x=\"8\" y=\"{}\" font-weight=\"bold\">{title}</text>", y - 12);
    for (bar, value) in bars {
        let length = value / longest * room;
        let (text_y, value_x) = (y + 15, f64::from(LABEL_WIDTH) + length + 6.0);
        let digits = if *value < 100.0 { 2 } else { 0 };
        let _ = writeln!(
            to,
            "<text x=\"{}\" y=\"{text_y}\" text-anchor=\"end\">{}</text>\n\
             <rect x=\"{LABEL_WIDTH}\" y=\"{y}\" width=\"{length:.1}\" height=\"{BAR_HEIGHT}\" \
             fill=\"{}\"/>\n\
             <text x=\"{value_x:.1}\" y=\"{text_y}\">{value:.digits$} {unit}</text>",
            LABEL_WIDTH - 8,
            bar.label,
            bar.color,
        );
        y += BAR_HEIGHT + GAP;
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::CATALOGUE;

    #[test]
    fn what_was_measured_has_a_bar_and_nothing_else() {
        let mut figures = Figures::new(CATALOGUE);
        assert_eq!(draw(&figures).matches("<rect").count(), 1);
        figures.add("all_read_direct_s", 1.5);
        figures.add("containerd21_all_read_direct_s", 3.0);
        let chart = draw(&figures);
        assert_eq!(chart.matches("<rect").count(), 3);
        assert!(chart.contains("width=\"380.0\"") && chart.contains("width=\"190.0\""));
        assert!(chart.contains("1.50 s") && !chart.contains("Cold reads"));
    }
}
