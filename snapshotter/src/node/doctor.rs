//! What can be wrong with a node, each with where it is and how to mend it: `weightfs doctor`, and
//! the warnings of a daemon that starts.

mod containerd;
mod daemon;
mod host;

use serde::Serialize;
use tracing::warn;

use self::daemon::Running;
use super::containerd::Place;
use crate::config::Config;

/// How it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// As it should be.
    Fine,
    /// Worth knowing; it works.
    Note,
    /// To be mended.
    Mend,
}

impl Level {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fine => "fine",
            Self::Note => "note",
            Self::Mend => "mend",
        }
    }
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// How it is.
    pub level: Level,
    /// Where: a file, a socket, a directory.
    pub place: String,
    /// What is there.
    pub found: String,
    /// What to do about it; empty if nothing has to be done.
    pub mend: String,
}

/// Where a check looked.
#[derive(Debug, Clone)]
struct At {
    check: &'static str,
    place: String,
}

impl At {
    fn new(check: &'static str, place: impl ToString) -> Self {
        Self { check, place: place.to_string() }
    }

    fn fine(&self, found: impl ToString) -> Finding {
        self.finding(Level::Fine, found, "")
    }

    fn note(&self, found: impl ToString, mend: impl ToString) -> Finding {
        self.finding(Level::Note, found, mend)
    }

    fn mend(&self, found: impl ToString, mend: impl ToString) -> Finding {
        self.finding(Level::Mend, found, mend)
    }

    fn finding(&self, level: Level, found: impl ToString, mend: impl ToString) -> Finding {
        let (check, place) = (self.check, self.place.clone());
        Finding { check, level, place, found: found.to_string(), mend: mend.to_string() }
    }
}

/// Looks at everything. Asks the daemon and containerd, where they run, and changes nothing.
pub async fn examine(config: &Config) -> Vec<Finding> {
    let daemon = Running::find(config).await;
    let mut findings = host::examine(config, daemon.status());
    findings.extend(daemon.examine(config));
    findings.extend(containerd::examine(config, &place(config)).await);
    findings
}

/// What a daemon has to say when it starts: all that is to be mended on the node itself. containerd
/// may not run yet, and is not asked.
pub async fn warn_at_start(config: Config) {
    let mut findings = host::examine(&config, None);
    if config.containerd.config.exists() {
        findings.extend(containerd::configured(&config, &place(&config)).await.1);
    }
    for Finding { check, place, found, mend, level } in findings {
        if level == Level::Mend {
            warn!(check, place, mend, "{found}; see `weightfs doctor`");
        }
    }
}

/// What is to be mended of containerd's configuration, in words.
pub async fn containerd_to_mend(config: &Config, place: &Place) -> Vec<String> {
    let (_, findings) = containerd::configured(config, place).await;
    let to_mend = findings.into_iter().filter(|finding| finding.level == Level::Mend);
    to_mend.map(|finding| finding.found).collect()
}

fn place(config: &Config) -> Place {
    let config = &config.containerd;
    Place { program: config.program.clone(), config: config.config.clone() }
}
