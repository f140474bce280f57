//! How long work goes: a line on a terminal, log lines elsewhere.

use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use tracing::info;
use weightfs_fusefs::{LayerDescriptor, Progress};

use super::size;

/// How often the line on a terminal is drawn anew.
pub const REFRESH: Duration = Duration::from_millis(500);

/// How often a log line is written while something happens.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// What a mounted model has fetched so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetched {
    /// Its files.
    pub files: u64,
    /// Bytes of its blobs that are here.
    pub cached: u64,
    /// Bytes of its blobs.
    pub size: u64,
    /// Bytes fetched since it was mounted.
    pub fetched: u64,
}

/// Shows the life of a mount.
#[derive(Debug)]
pub struct MountLine {
    line: Option<ProgressBar>,
    shown: Option<(Instant, Fetched)>,
}

impl MountLine {
    /// A line if stderr is a terminal.
    pub fn new() -> Self {
        let line = std::io::stderr().is_terminal().then(|| {
            let line = ProgressBar::new_spinner();
            line.set_style(
                ProgressStyle::with_template("{msg}").unwrap_or(ProgressStyle::default_spinner()),
            );
            line
        });
        Self { line, shown: None }
    }

    /// Shows the present state.
    pub fn show(&mut self, now: Fetched) {
        let (since, before) = self.shown.unwrap_or((Instant::now(), now));
        let elapsed = since.elapsed();
        let bytes = now.fetched.saturating_sub(before.fetched);
        let rate = size((bytes as f64 / elapsed.as_secs_f64().max(0.001)) as u64);
        let Fetched { files, cached, size: total, fetched } = now;
        match &self.line {
            Some(line) => {
                let (fetched, cached, total) = (size(fetched), size(cached), size(total));
                line.set_message(format!(
                    "{files} files, {fetched} fetched, {cached} of {total} here, {rate}/s"
                ));
            }
            None if self.shown.is_some() && (elapsed < LOG_INTERVAL || bytes == 0) => return,
            None if self.shown.is_some() => info!(fetched, cached, total, "{rate}/s"),
            None => {}
        }
        self.shown = Some((Instant::now(), now));
    }

    /// Takes the line away.
    pub fn finish(&self) {
        if let Some(line) = &self.line {
            line.finish_and_clear();
        }
    }
}

/// Shows downloads that must end before a command can go on.
#[derive(Debug)]
pub struct Downloads {
    what: &'static str,
    bar: Option<ProgressBar>,
    layers: Mutex<HashMap<String, (u64, u64)>>,
    logged: Mutex<Instant>,
}

impl Downloads {
    /// A bar if stderr is a terminal; it appears with the first download. `what` says why there
    /// are downloads.
    pub fn new(what: &'static str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{msg} {bar:24} {bytes} of {total_bytes} ({eta})";
            let bar = ProgressBar::hidden().with_message(what);
            bar.set_style(
                ProgressStyle::with_template(style).unwrap_or(ProgressStyle::default_bar()),
            );
            bar
        });
        Self { what, bar, layers: Mutex::default(), logged: Mutex::new(Instant::now()) }
    }

    /// `bytes` of the `total` bytes of a layer are here.
    pub fn show(&self, layer: &str, bytes: u64, total: u64) {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        layers.insert(layer.to_owned(), (bytes, total));
        let (bytes, total) =
            layers.values().fold((0, 0), |(a, b), (bytes, total)| (a + bytes, b + total));
        match &self.bar {
            Some(bar) => {
                if bar.is_hidden() {
                    bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
                }
                bar.set_length(total);
                bar.set_position(bytes);
            }
            None => {
                let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
                if logged.elapsed() >= LOG_INTERVAL {
                    *logged = Instant::now();
                    info!(bytes, total, "{}", self.what);
                }
            }
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Downloads {
    fn downloaded(&self, layer: &LayerDescriptor, bytes: u64) {
        self.show(&layer.digest.to_string(), bytes, layer.size);
    }
}
