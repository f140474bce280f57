//! What is logged, and how; it can be changed while the process runs.
//!
//! `WEIGHTFS_LOG` has the directives to begin with, in the syntax of tracing's `EnvFilter`, and
//! `WEIGHTFS_LOG_FORMAT=json` makes each line a JSON object for machines.

use std::io::IsTerminal as _;
use std::sync::OnceLock;

use tracing_subscriber::filter::{EnvFilter, ParseError};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, Registry, fmt, reload};

use crate::traces;

/// Variable that sets the filter to begin with.
const DIRECTIVES: &str = "WEIGHTFS_LOG";

/// Variable that sets the format: `json`, or text.
const FORMAT: &str = "WEIGHTFS_LOG_FORMAT";

/// Directives at the most, in bytes.
const MAX_DIRECTIVES_BYTES: usize = 4096;

/// What `default` means is what a process began with.
const DEFAULT: &str = "default";

/// The levels that have a name.
const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];

/// Why directives can't be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// They are not directives.
    #[error("{0:?} is neither a level (error, warn, info, debug, trace) nor a filter: {1}")]
    Syntax(String, ParseError),
    /// They are too long.
    #[error("a filter has {MAX_DIRECTIVES_BYTES} bytes at the most")]
    Long,
    /// The log of this process can't be changed.
    #[error("the log of this process can't be changed")]
    Fixed,
}

/// The log of this process.
struct Log {
    began_with: String,
    filter: reload::Handle<EnvFilter, Registry>,
}

static LOG: OnceLock<Log> = OnceLock::new();

/// What a process tells of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// What went wrong.
    Trouble,
    /// Its life.
    Life,
    /// Its life, and the traces of its reads where somebody wants them.
    Traces,
}

impl Detail {
    const fn level(self) -> &'static str {
        match self {
            Self::Trouble => "warn",
            Self::Life | Self::Traces => "info",
        }
    }
}

/// Logs to stderr from now on, of others warnings only, unless the environment says otherwise.
pub fn start(detail: Detail) {
    let filter = match std::env::var_os(DIRECTIVES) {
        Some(_) => {
            let filter = EnvFilter::builder().with_env_var(DIRECTIVES);
            filter.with_default_directive(tracing::Level::WARN.into()).from_env_lossy()
        }
        None => EnvFilter::new(of_level(detail.level())),
    };
    let began_with = filter.to_string();
    let (filter, handle) = reload::Layer::new(filter);
    let _ = LOG.set(Log { began_with, filter: handle });
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = match std::env::var(FORMAT).as_deref() {
        Ok("json") => lines.json().boxed(),
        _ => lines.with_ansi(std::io::stderr().is_terminal()).with_target(false).boxed(),
    };
    let log = tracing_subscriber::registry().with(lines.with_filter(filter));
    if detail == Detail::Traces && traces::are_wanted() {
        trace(log);
    } else {
        log.init();
    }
}

/// Begins the log, and traces.
#[cfg(feature = "otlp")]
fn trace<S>(log: S)
where
    S: tracing::Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
{
    match traces::layer() {
        Ok(layer) => log.with(layer).init(),
        Err(error) => {
            log.init();
            tracing::warn!(%error, "no traces");
        }
    }
}

/// Begins the log; this program has no traces.
#[cfg(not(feature = "otlp"))]
fn trace<S>(log: S)
where
    S: tracing::Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
{
    log.init();
    tracing::warn!("no traces: this program was built without the feature `otlp`");
}

/// What is logged of ourselves from a level on.
fn of_level(level: &str) -> String {
    format!("warn,weightfs={level}")
}

/// What is logged now.
///
/// # Errors
/// When the log of this process was not begun here.
pub fn current() -> Result<String, LogError> {
    let log = LOG.get().ok_or(LogError::Fixed)?;
    log.filter.with_current(ToString::to_string).map_err(|_| LogError::Fixed)
}

/// Logs this from now on: a level, directives, or what the process began with (`default`).
///
/// # Errors
/// What are no directives.
pub fn change(text: &str) -> Result<(), LogError> {
    let log = LOG.get().ok_or(LogError::Fixed)?;
    let filter = parse(text, &log.began_with)?;
    log.filter.reload(filter).map_err(|_| LogError::Fixed)
}

fn parse(text: &str, began_with: &str) -> Result<EnvFilter, LogError> {
    if text.len() > MAX_DIRECTIVES_BYTES {
        return Err(LogError::Long);
    }
    let directives = match text {
        DEFAULT => began_with.to_owned(),
        level if LEVELS.contains(&level) => of_level(level),
        other => other.to_owned(),
    };
    let syntax = |error| LogError::Syntax(text.to_owned(), error);
    EnvFilter::builder().parse(directives).map_err(syntax)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_directives_are_filters_and_nothing_else_is() {
        let text = |of: &str| parse(of, "error").map(|filter| filter.to_string());
        assert!(text("debug").unwrap().contains("weightfs=debug"));
        assert_eq!(text("default").unwrap(), "error");
        assert_eq!(text("weightfs_store=trace").unwrap(), "weightfs_store=trace");
        let error = text("weightfs=louder").unwrap_err().to_string();
        assert!(error.contains("neither a level"), "{error}");
        assert!(matches!(text(&"a,".repeat(4096)), Err(LogError::Long)));
    }
}
