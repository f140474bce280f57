//! The status page: what `weightfs top` shows, for a browser. Made here, as a whole; the script in it
//! only asks for it again. It needs nothing from elsewhere.

use maud::{DOCTYPE, Markup, PreEscaped, html};
use weightfs_proto::control::{ActivityReply, MapReply, MountActivity};

use crate::activity::text::{files, hits, name, peers, percent, rate, size, sources};
use crate::picture;

/// Mounts whose maps are shown; the others have their line.
pub(super) const MAPS: usize = 4;

/// Parts of a map.
pub(super) const MAP_CELLS: u32 = 512;

/// Width and height of the drawing of the last seconds.
const CHART: (f64, f64) = (600.0, 90.0);

const STYLE: &str = include_str!("page.css");
pub(super) const SCRIPT: &str = include_str!("page.js");

/// The whole page.
pub(super) fn page(activity: &ActivityReply, maps: &[MapReply]) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width,initial-scale=1";
                meta name="color-scheme" content="light dark";
                link rel="icon" href="data:,";
                title { "WeightFS" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                main #live { (content(activity, maps)) }
                script src="/page.js" {}
            }
        }
    }
}

/// What of it changes.
pub(super) fn content(activity: &ActivityReply, maps: &[MapReply]) -> Markup {
    let now = |history: &[u64]| rate(history.last().copied().unwrap_or(0));
    html! {
        header {
            h1 { "WeightFS" }
            p.faint { (activity.version) " on " code { (activity.root) } ", for " (time(activity.uptime_seconds)) }
        }
        section.figures {
            (figure("read", &now(&activity.read_history)))
            (figure("fetched", &now(&activity.fetch_history)))
            (figure("requests", &format!("{} of {}", activity.requests, activity.request_limit)))
            (figure("reads that wait", &activity.reads_waiting.to_string()))
            (figure("mounts", &activity.mounts_total.to_string()))
            @if let Some(nodes) = &activity.peers {
                (figure("peers that answer", &peers(nodes)))
                (figure("from peers", &size(nodes.from_peers)))
                (figure("to peers", &size(nodes.to_peers)))
            }
        }
        (chart(activity))
        (table(activity))
        @for map in maps { section.card { (picture::svg(map)) } }
        footer.faint {
            "Reads of files that the kernel passes through are not seen here. "
            a href="/metrics" { "Metrics" }
        }
    }
}

fn figure(name: &str, value: &str) -> Markup {
    html! { div { span.value { (value) } span.faint { (name) } } }
}

fn table(activity: &ActivityReply) -> Markup {
    html! {
        section.card {
            table {
                thead { tr {
                    th { "Mount" } th.number { "Files" } th.number { "Here" } th { "" }
                    th.number { "Read" } th.number { "Fetched" } th.number { "Hits" }
                    th.number { "In flight" } th { "State" }
                } }
                tbody {
                    @for mount in &activity.mounts { (row(mount)) }
                    @if activity.mounts.is_empty() {
                        tr { td colspan="9" { "Nothing is mounted." } }
                    }
                }
            }
            @let more = activity.mounts_total.saturating_sub(activity.mounts.len() as u64);
            @if more > 0 { p.faint { "and " (more) " more" } }
        }
    }
}

fn row(mount: &MountActivity) -> Markup {
    let here = percent(mount.cached, mount.size);
    html! {
        tr {
            td.name {
                (short(name(mount)))
                @if !mount.target.is_empty() { div.faint { (mount.target) } }
                @for reason in &mount.reasons { div.faint { (reason) } }
            }
            td.number { (files(mount)) }
            td.number { (size(mount.cached)) div.faint { "of " (size(mount.size)) } }
            td { progress max="100" value=(here) {} " " (here) " %" }
            td.number { (rate(mount.read_rate)) }
            td.number { (rate(mount.fetch_rate)) div.faint { (sources(mount)) } }
            td.number { (hits(mount)) }
            td.number { (size(mount.in_flight)) }
            td { span class={ "state " (mount.state) } { (mount.state) } div.faint { (mount.trust) } }
        }
    }
}

/// The last seconds: an area of what was read, and a line of what was fetched.
fn chart(activity: &ActivityReply) -> Markup {
    let (width, height) = CHART;
    let histories = [&activity.read_history, &activity.fetch_history];
    let most = histories.iter().flat_map(|history| history.iter()).max().copied().unwrap_or(0);
    let points = |history: &[u64]| -> String {
        let step = width / 119.0;
        let first = width - step * (history.len().saturating_sub(1)) as f64;
        let y = |value: u64| height - value as f64 / most.max(1) as f64 * (height - 6.0);
        let point = |(number, value): (usize, &u64)| {
            format!("{:.1},{:.1} ", first + step * number as f64, y(*value))
        };
        history.iter().enumerate().map(point).collect()
    };
    let read = points(&activity.read_history);
    let first = read.split(',').next().unwrap_or("0");
    html! {
        section.card.chart {
            p { b.read { "read" } " and " b.fetched { "fetched" } ", the last two minutes; at most " (rate(most)) }
            svg viewBox={ "0 0 " (width) " " (height) } preserveAspectRatio="none" role="img" {
                title { "Bytes a second over the last two minutes" }
                line.axis x1="0" x2=(width) y1=(height) y2=(height) {}
                @if activity.read_history.len() > 1 {
                    polygon.read points={ (first) "," (height) " " (read) (width) "," (height) } {}
                    polyline.fetched points=(points(&activity.fetch_history)) {}
                }
            }
        }
    }
}

/// A reference without its registry's name being in the way: that is what people know least by.
fn short(name: &str) -> Markup {
    match name.split_once('/') {
        Some((registry, rest)) => html! { span.faint { (registry) "/" } wbr; (rest) },
        None => html! { (name) },
    }
}

fn time(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount() -> MountActivity {
        MountActivity {
            name: "r.example/<b>models</b>/llama:8b".to_owned(),
            kind: "model".to_owned(),
            target: "/mnt/\"model\"".to_owned(),
            files: 7,
            files_complete: Some(3),
            size: 10 << 30,
            cached: 4 << 30,
            fetched: [("registry".to_owned(), 3), ("mirror".to_owned(), 1)].into(),
            hits: 3,
            misses: 1,
            state: "fetching".to_owned(),
            ..MountActivity::default()
        }
    }

    #[test]
    fn a_page_says_what_goes_on_and_needs_nothing_from_elsewhere() {
        let activity = ActivityReply {
            mounts: vec![mount()],
            mounts_total: 501,
            read_history: vec![0, 5, 10],
            fetch_history: vec![0, 0, 1],
            ..ActivityReply::default()
        };
        let text = page(&activity, &[]).into_string();
        for expected in ["3/7", "40 %", "75 %", "registry 75 %, mirror 25 %", "and 500 more"] {
            assert!(text.contains(expected), "{expected} in {text}");
        }
        assert!(!text.contains("<b>models") && text.contains("&lt;b&gt;models"), "{text}");
        let elsewhere = ["//", "@import", "url("];
        let text = text.replace("http://www.w3.org/2000/svg", "");
        assert!(elsewhere.iter().all(|link| !text.contains(link)), "{text}");
    }
}
