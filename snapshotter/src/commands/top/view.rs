//! What `weightfs top` draws. It knows no terminal and no daemon.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Sparkline};
use weightfs::activity::text::{self, percent, rate, size};
use weightfs::picture;
use weightfs_proto::control::{ActivityReply, MapReply, MountActivity};
use weightfs_store::ChunkState;

use crate::commands::map::sign;

const FAINT: Style = Style::new().fg(Color::DarkGray);
const STRONG: Style = Style::new().add_modifier(Modifier::BOLD);

/// Lines of a mount in the table, and the share of the screen that mounts have at the most: the rest
/// is for the map.
const MOUNT_LINES: u16 = 2;
const SHARE_OF_MOUNTS: u16 = 3;

/// What is shown.
#[derive(Debug, Default)]
pub(super) struct View {
    pub(super) activity: ActivityReply,
    /// Of the chosen mount.
    pub(super) map: Option<MapReply>,
    /// Why what is shown is old.
    pub(super) trouble: Option<String>,
    chosen: usize,
}

impl View {
    /// The mount whose map is shown.
    pub(super) fn chosen(&self) -> Option<&MountActivity> {
        self.activity.mounts.get(self.chosen.min(self.activity.mounts.len().saturating_sub(1)))
    }

    /// Chooses one further down.
    pub(super) fn choose(&mut self, further: isize) {
        let last = self.activity.mounts.len().saturating_sub(1);
        self.chosen = self.chosen.min(last).saturating_add_signed(further).min(last);
    }

    /// Draws all of it.
    pub(super) fn draw(&self, frame: &mut Frame<'_>) {
        let mounts = u16::try_from(self.activity.mounts.len()).unwrap_or(u16::MAX);
        let room = frame.area().height / SHARE_OF_MOUNTS / MOUNT_LINES;
        let table = 1 + MOUNT_LINES * mounts.min(room).max(1);
        let areas = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(4),
            Constraint::Length(table),
            Constraint::Length(1),
            Constraint::Min(1),
            Constraint::Length(1),
        ]);
        let [head, charts, table, _, map, foot] = areas.areas(frame.area());
        frame.render_widget(self.head(), head);
        self.draw_charts(frame, charts);
        frame.render_widget(Paragraph::new(self.table_lines(table.height)), table);
        frame.render_widget(Paragraph::new(self.map_lines(map)), map);
        frame.render_widget(self.foot(), foot);
    }

    fn head(&self) -> Line<'_> {
        let ActivityReply { version, root, requests, request_limit, reads_waiting, .. } =
            &self.activity;
        let mut numbers = format!(
            "  requests {requests}/{request_limit}  waiting {reads_waiting}  mounts {}",
            self.activity.mounts_total
        );
        if let Some(peers) = &self.activity.peers {
            numbers += &format!("  peers {}", text::peers(peers));
        }
        Line::from(vec![
            Span::styled(format!("weightfs {version}"), STRONG),
            Span::raw(numbers),
            Span::styled(format!("  {root}"), FAINT),
        ])
    }

    fn draw_charts(&self, frame: &mut Frame<'_>, area: Rect) {
        let [left, _, right] =
            Layout::horizontal([Constraint::Fill(1), Constraint::Length(2), Constraint::Fill(1)])
                .areas(area);
        let ActivityReply { read_history, fetch_history, .. } = &self.activity;
        draw_chart(frame, left, "read", read_history, Color::Blue);
        draw_chart(frame, right, "fetched", fetch_history, Color::Yellow);
    }

    /// As many mounts as there is room for, the chosen one among them. Names have a line of their
    /// own, above their numbers: they are longer than any column.
    fn table_lines(&self, height: u16) -> Vec<Line<'_>> {
        let mounts = &self.activity.mounts;
        let head = ["FILES", "HERE", "%", "READ", "FETCHED", "HITS", "IN FLIGHT", "STATE"];
        let mut lines = vec![Line::styled(row(head), FAINT)];
        if mounts.is_empty() {
            lines.push(Line::from("  nothing is mounted"));
        }
        let room = usize::from(height.saturating_sub(1) / MOUNT_LINES).max(1);
        let chosen = self.chosen.min(mounts.len().saturating_sub(1));
        let first = (chosen + 1).saturating_sub(room);
        for (number, mount) in mounts.iter().enumerate().skip(first).take(room) {
            let (mark, style, faint) = match number == chosen {
                true => ("▸", STRONG, Style::new()),
                false => (" ", Style::new(), FAINT),
            };
            lines.push(Line::from(vec![
                Span::styled(format!("{mark} {}", text::name(mount)), style),
                Span::styled(format!("  {}", mount.target), FAINT),
            ]));
            lines.push(Line::styled(numbers(mount), faint));
        }
        lines
    }

    /// The map of the chosen mount, cut to the room that there is.
    fn map_lines(&self, area: Rect) -> Vec<Line<'_>> {
        let (width, height) = (usize::from(area.width), usize::from(area.height));
        let Some(map) = &self.map else { return vec![] };
        let mut lines = vec![];
        for (number, blob) in map.blobs.iter().enumerate() {
            let here = percent(blob.cached, blob.size);
            let numbers = format!("  {}, {here} %, {}", size(blob.size), blob.trust);
            lines.push(Line::from(vec![
                Span::raw(picture::name(blob)),
                Span::styled(numbers, FAINT),
            ]));
            // One that is alone has all the room; others share it.
            let room = if map.blobs.len() == 1 { height.saturating_sub(1).max(1) } else { 2 };
            let states = fitted(&picture::states(blob).collect::<Vec<_>>(), room * width);
            lines.extend(states.chunks(width.max(1)).map(map_line));
            let more = map.blobs.len() - number - 1;
            if lines.len() + 1 >= height && more > 0 {
                lines.truncate(height.saturating_sub(1));
                lines.push(Line::styled(
                    format!("and {more} more layers: see `weightfs map`"),
                    FAINT,
                ));
                break;
            }
        }
        lines
    }

    fn foot(&self) -> Line<'_> {
        if let Some(trouble) = &self.trouble {
            return Line::styled(format!("no news: {trouble}"), Style::new().fg(Color::Red));
        }
        let state = |state: ChunkState| {
            [
                Span::styled(sign(state).to_string(), colour(state)),
                Span::styled(format!(" {}  ", state.as_str()), FAINT),
            ]
        };
        let mut spans: Vec<_> = ChunkState::ALL.into_iter().flat_map(state).collect();
        spans.push(Span::raw(" ↑↓ mount  q quit"));
        Line::from(spans)
    }
}

fn draw_chart(frame: &mut Frame<'_>, area: Rect, name: &str, history: &[u64], colour: Color) {
    let [title, chart] = Layout::vertical([Constraint::Length(1), Constraint::Min(1)]).areas(area);
    let now = history.last().copied().unwrap_or(0);
    let most = history.iter().max().copied().unwrap_or(0);
    frame.render_widget(
        Line::from(vec![
            Span::raw(format!("{name} ")),
            Span::styled(rate(now), Style::new().fg(colour).add_modifier(Modifier::BOLD)),
            Span::styled(format!("  at most {}", rate(most)), FAINT),
        ]),
        title,
    );
    let first = history.len().saturating_sub(usize::from(chart.width));
    let data = history.get(first..).unwrap_or_default();
    frame.render_widget(Sparkline::default().data(data).style(Style::new().fg(colour)), chart);
}

fn numbers(mount: &MountActivity) -> String {
    let [here, in_flight] = [mount.cached, mount.in_flight].map(size);
    let share = percent(mount.cached, mount.size).to_string();
    let [read, fetched] = [mount.read_rate, mount.fetch_rate].map(rate);
    let (files, hits) = (text::files(mount), text::hits(mount));
    row([&files, &here, &share, &read, &fetched, &hits, &in_flight, &mount.state])
}

/// A line of the table.
fn row([files, here, share, read, fetched, hits, in_flight, state]: [&str; 8]) -> String {
    format!(
        "  {files:<9} {here:>10} {share:>4} {read:>12} {fetched:>12} {hits:>5} {in_flight:>10} {state}"
    )
}

/// The states in as many cells as there is room for, each the most telling of its own.
fn fitted(states: &[ChunkState], room: usize) -> Vec<ChunkState> {
    let cells = states.len().min(room).max(1);
    let edge = |cell: usize| cell * states.len() / cells;
    let cell = |cell| {
        let mut counts = [0; ChunkState::ALL.len()];
        for state in states.get(edge(cell)..edge(cell + 1)).unwrap_or_default() {
            if let Some(count) = counts.get_mut(*state as usize) {
                *count += 1;
            }
        }
        picture::shown_as(&counts)
    };
    (0..cells).map(cell).collect()
}

fn map_line(states: &[ChunkState]) -> Line<'static> {
    let runs = states.chunk_by(|a, b| a == b);
    let span = |run: &[ChunkState]| {
        let state = run.first().copied().unwrap_or(ChunkState::Absent);
        Span::styled(sign(state).to_string().repeat(run.len()), colour(state))
    };
    Line::from(runs.map(span).collect::<Vec<_>>())
}

const fn colour(state: ChunkState) -> Style {
    Style::new().fg(match state {
        ChunkState::Absent => Color::DarkGray,
        ChunkState::InFlight => Color::Yellow,
        ChunkState::Published => Color::Cyan,
        ChunkState::Verified => Color::Blue,
        ChunkState::Hot => Color::Red,
    })
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use weightfs_proto::control::BlobMap;

    use super::*;

    fn view(mounts: usize, blobs: usize) -> View {
        let mount = |number| MountActivity {
            name: format!("registry.example.com/models/llama-3.1-instruct-{number}:8b-q4_k_m"),
            target: "/mnt/model".to_owned(),
            files: 14,
            files_complete: Some(12),
            size: 1023 << 30,
            cached: 1022 << 30,
            read_rate: 1023 << 20,
            fetch_rate: 1023 << 20,
            hits: 1,
            in_flight: 256 << 20,
            state: "fetching".to_owned(),
            ..MountActivity::default()
        };
        let cells =
            (0..4000).flat_map(|at| if at < 2000 { [0, 0, 0, 1, 0] } else { [1, 0, 0, 0, 0] });
        let cells: Vec<_> = cells.collect();
        let blob = |number| BlobMap {
            name: format!("model-{number:05}-of-00004.safetensors"),
            size: 4 << 30,
            cached: 2 << 30,
            trust: "transport".to_owned(),
            cells: cells.clone(),
            ..BlobMap::default()
        };
        let blobs: Vec<_> = (0..blobs).map(blob).collect();
        let activity = ActivityReply {
            mounts: (0..mounts).map(mount).collect(),
            mounts_total: mounts as u64,
            read_history: (0..120).map(|second| second << 20).collect(),
            fetch_history: vec![1 << 20; 120],
            ..ActivityReply::default()
        };
        View { activity, map: Some(MapReply { name: String::new(), blobs }), ..View::default() }
    }

    fn drawn(view: &View, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let lines = buffer.content().chunks(usize::from(width));
        lines.map(|line| line.iter().map(ratatui::buffer::Cell::symbol).collect()).collect()
    }

    #[test]
    fn all_of_it_fits_an_ordinary_terminal() {
        let lines = drawn(&view(2, 1), 80, 24);
        let text = lines.join("\n");
        for expected in ["12/14", "1022.0 GiB", "1023.0 MiB/s", "100 %", "256.0 MiB", "fetching"] {
            assert!(text.contains(expected), "{expected} in\n{text}");
        }
        assert!(lines[6].starts_with("▸ registry.example.com/"), "{text}");
        assert!(text.contains("model-00000-of-00004.safetensors") && text.contains("q quit"));
        let signs = |sign| text.matches(sign).count();
        assert!(signs('▓') > 300 && signs('▓').abs_diff(signs('·')) < 80, "half is here\n{text}");
    }

    #[test]
    fn the_chosen_mount_is_on_the_screen_and_more_layers_are_told_of() {
        let mut view = view(30, 40);
        (0..20).for_each(|_| view.choose(1));
        let text = drawn(&view, 80, 24).join("\n");
        assert!(text.contains("▸ registry.example.com/models/llama-3.1-instruct-20:"), "{text}");
        assert!(text.contains("more layers: see `weightfs map`"), "{text}");
        (0..50).for_each(|_| view.choose(1));
        assert!(view.chosen().unwrap().name.contains("-29:"));
        (0..50).for_each(|_| view.choose(-1));
        assert!(view.chosen().unwrap().name.contains("-0:"));
    }

    #[test]
    fn no_size_and_no_daemon_makes_it_fail() {
        for (width, height) in [(1, 1), (20, 5), (300, 100), (80, 3)] {
            drawn(&view(3, 3), width, height);
            drawn(&View::default(), width, height);
        }
        let gone = View { trouble: Some("the daemon went away".to_owned()), ..view(0, 0) };
        let text = drawn(&gone, 80, 24).join("\n");
        assert!(text.contains("no news: the daemon went away"), "{text}");
        assert!(text.contains("nothing is mounted"), "{text}");
    }
}
