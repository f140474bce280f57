//! A session as an animated SVG: each line appears when it appeared, and stays. Where nothing moves
//! (print, reduced motion) all of it is there at once.

use std::fmt::Write as _;
use std::time::Duration;

use super::Step;

/// Columns of the terminal.
const COLUMNS: usize = 80;

/// Width of a column and height of a line, in pixels, at a font of 14.
const COLUMN: f64 = 8.4;
const LINE: usize = 19;

/// Space around the text, and the height of the window's bar.
const MARGIN: usize = 18;
const BAR: usize = 30;

/// How long a hand takes for a command, and a reader for what it printed.
const TYPING: Duration = Duration::from_millis(900);
const READING: Duration = Duration::from_millis(1600);

const STYLE: &str = "\
text{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;\
font-size:14px;fill:#d6deeb;white-space:pre}\
.typed{fill:#ffffff;font-weight:bold}.prompt{fill:#7fdbca}.took{fill:#8792a8}\
@keyframes show{from{opacity:0}to{opacity:1}}\
@media (prefers-reduced-motion:no-preference){.line{animation:show .01s both}}";

/// The picture.
pub(super) fn document(session: &[Step]) -> String {
    let mut lines = String::new();
    let mut row = 0;
    let mut at = Duration::ZERO;
    for step in session {
        at += TYPING;
        let prompt = format!(
            "<tspan class=\"prompt\"># </tspan><tspan class=\"typed\">{}</tspan>",
            escaped(step.command)
        );
        line(&mut lines, row, at, &prompt, 2 + step.command.chars().count());
        row += 1;
        at += step.time;
        for text in step.output.lines().flat_map(wrapped) {
            line(&mut lines, row, at, &escaped(&text), text.chars().count());
            row += 1;
        }
        let took = format!("{:.2} s", step.time.as_secs_f64());
        let width = took.chars().count();
        let _ = writeln!(
            lines,
            "<text class=\"line took\" style=\"animation-delay:{:.2}s\" x=\"{:.1}\" y=\"{}\" \
             text-anchor=\"end\" textLength=\"{:.1}\">{took}</text>",
            at.as_secs_f64(),
            MARGIN as f64 + COLUMNS as f64 * COLUMN,
            y(row),
            width as f64 * COLUMN,
        );
        row += 1;
        at += READING;
    }
    let (width, height) = (2.0 * MARGIN as f64 + COLUMNS as f64 * COLUMN, y(row) - LINE + MARGIN);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height}\" \
         width=\"{width:.0}\" height=\"{height}\" role=\"img\">\n\
         <title>A terminal session: a model is mounted, read and looked at</title>\n\
         <style>{STYLE}</style>\n\
         <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"#011627\"/>\n\
         <g fill=\"#5f7e97\"><circle cx=\"20\" cy=\"16\" r=\"5\"/><circle cx=\"38\" cy=\"16\" r=\"5\"/>\
         <circle cx=\"56\" cy=\"16\" r=\"5\"/></g>\n{lines}</svg>\n"
    )
}

fn y(row: usize) -> usize {
    BAR + MARGIN + row * LINE
}

/// A line, as wide as its columns are, whatever font there is.
fn line(lines: &mut String, row: usize, at: Duration, markup: &str, columns: usize) {
    if columns == 0 {
        return;
    }
    let _ = writeln!(
        lines,
        "<text class=\"line\" style=\"animation-delay:{:.2}s\" x=\"{MARGIN}\" y=\"{}\" \
         textLength=\"{:.1}\" lengthAdjust=\"spacingAndGlyphs\">{markup}</text>",
        at.as_secs_f64(),
        y(row),
        columns as f64 * COLUMN,
    );
}

/// A line as a terminal breaks it.
fn wrapped(line: &str) -> Vec<String> {
    let characters: Vec<_> = line.trim_end().chars().collect();
    if characters.is_empty() {
        return vec![String::new()];
    }
    characters.chunks(COLUMNS).map(|part| part.iter().collect()).collect()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_was_printed_is_there_in_its_time() {
        let step = |output: &str| Step {
            command: "cat <file>",
            output: output.to_owned(),
            time: Duration::from_millis(1234),
        };
        let text = document(&[step("a & b\n\nlast\n"), step(&"x".repeat(90))]);
        assert!(text.contains("cat &lt;file&gt;") && text.contains("a &amp; b"), "{text}");
        assert!(text.contains("1.23 s") && text.contains(&format!(">{}<", "x".repeat(80))));
        assert!(text.contains("animation-delay:2.13s"), "{text}");
        assert_eq!(text.matches("<text").count(), 4 + 4, "{text}");
    }
}
