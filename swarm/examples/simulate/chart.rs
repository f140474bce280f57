//! The plot: of each number of nodes the share that has everything, over time. SVG.

use std::fmt::Write as _;

use crate::Run;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
const COLORS: [&str; 5] = ["#1b7f5c", "#2f6db5", "#b5542f", "#7d4fa3", "#9aa3ab"];

/// Points of a curve: nobody sees more.
const POINTS: usize = 200;

pub fn draw(runs: &[Run]) -> String {
    let end =
        runs.iter().map(|run| run.at(1.0)).filter(|time| time.is_finite()).fold(1.5, f64::max);
    let x = |time: f64| LEFT + time / end * (WIDTH - LEFT - RIGHT);
    let y = |share: f64| HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM);
    let mut body = String::new();
    text(&mut body, LEFT, 22.0, "Nodes that have all of the blob, over time");
    text(&mut body, LEFT, HEIGHT - 12.0, "time, in loads over a node's own line");
    for step in 0..=4 {
        let share = f64::from(step) / 4.0;
        line(&mut body, (LEFT, y(share)), (x(end), y(share)), "#e3e6e8");
        text(&mut body, 12.0, y(share) + 4.0, &format!("{:.0} %", share * 100.0));
    }
    for mark in [0.0, 0.5, 1.0, 1.35] {
        line(&mut body, (x(mark), y(0.0)), (x(mark), y(1.0)), "#c9ced2");
        text(&mut body, x(mark) - 10.0, y(0.0) + 18.0, &mark.to_string());
    }
    for (at, run) in runs.iter().enumerate() {
        let color = COLORS[at % COLORS.len()];
        let points: String = (0..=POINTS)
            .map(|point| point as f64 / POINTS as f64)
            .map(|share| format!("{:.1},{:.1} ", x(run.at(share).min(end)), y(share)))
            .collect();
        let _ = writeln!(
            body,
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"2\"/>"
        );
        let (left, row) = (WIDTH - RIGHT + 12.0, TOP + 12.0 + 34.0 * at as f64);
        let _ = writeln!(
            body,
            "<text x=\"{left}\" y=\"{row}\" fill=\"{color}\">{} nodes: {:.2}</text>\n\
             <text x=\"{left}\" y=\"{}\" fill=\"{color}\">{:.3} blobs</text>",
            run.nodes,
            run.at(1.0),
            row + 15.0,
            run.outcome.egress,
        );
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

fn text(body: &mut String, x: f64, y: f64, text: &str) {
    let _ = writeln!(body, "<text x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>");
}

fn line(body: &mut String, from: (f64, f64), to: (f64, f64), color: &str) {
    let _ = writeln!(
        body,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{color}\"/>",
        from.0, from.1, to.0, to.1
    );
}
