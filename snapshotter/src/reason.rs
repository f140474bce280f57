//! Why a layer is not mounted lazily: what is recorded with its snapshot, counted, logged, and
//! shown by `weightfs status`.
//!
//! Invariant: a reason is about this layer on this node, and says what would make it lazy where
//! the operator can do something about it.

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use weightfs_fusefs::{ArtifactError, LayerError};
use weightfs_store::SourceError;

use crate::trees::TreesError;

/// How much of a foreign error's text is kept, in characters.
const TEXT_CHARS_MAX: usize = 500;

/// How layers are mounted that are lazy: the word beside the reasons' own.
pub const LAZY: &str = "lazy";

/// Why a layer is an ordinary snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Reason {
    /// A download is quicker.
    #[error(
        "{} is less than snapshotter.min_layer_size ({})",
        ByteSize::b(*bytes).display().iec(), ByteSize::b(*least).display().iec()
    )]
    Small {
        /// Bytes of the layer.
        bytes: u64,
        /// The configured least, in bytes.
        least: u64,
    },
    /// It can't be read from the middle.
    #[error("compressed with {with}, without an index; push it uncompressed")]
    Compressed {
        /// The format.
        with: String,
    },
    /// Its client did not name it to the snapshotter.
    #[error(
        "pulled by a client that sends no labels; use CRI, containerd 2.1's `ctr`, or \
         `weightfs rpull`"
    )]
    NoLabels,
    /// containerd named it, but did not say where it is from.
    #[error(
        "containerd did not say {missing}; set disable_snapshot_annotations = false, see \
         `weightfs doctor`"
    )]
    NoAnnotations {
        /// What was missing.
        missing: String,
    },
    /// Labels that name nothing.
    #[error("containerd's labels can't be used: {text}")]
    BadLabels {
        /// What is wrong with them.
        text: String,
    },
    /// Its source gave no answer, or no good one.
    #[error("its source could not be reached: {text}")]
    Unreachable {
        /// What happened.
        text: String,
    },
    /// Its source does not let us in.
    #[error("its source refused access: {text}")]
    Refused {
        /// What it said.
        text: String,
    },
    /// It is of a kind that can't be shown lazily.
    #[error("it can't be shown lazily: {text}")]
    Unsuitable {
        /// What is wrong with it.
        text: String,
    },
    /// Something went wrong on this node.
    #[error("{text}")]
    Failed {
        /// What happened.
        text: String,
    },
}

impl Reason {
    /// The word for it: in JSON, in counts, in the table of `weightfs status`.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Small { .. } => "small",
            Self::Compressed { .. } => "compressed",
            Self::NoLabels => "no-labels",
            Self::NoAnnotations { .. } => "no-annotations",
            Self::BadLabels { .. } => "bad-labels",
            Self::Unreachable { .. } => "unreachable",
            Self::Refused { .. } => "refused",
            Self::Unsuitable { .. } => "unsuitable",
            Self::Failed { .. } => "failed",
        }
    }

    /// Something that went wrong on this node.
    pub fn failed(error: impl ToString) -> Self {
        Self::Failed { text: bounded(error) }
    }

    /// Labels that name nothing.
    pub fn bad_labels(error: impl ToString) -> Self {
        Self::BadLabels { text: bounded(error) }
    }

    /// It can't be shown lazily.
    pub fn unsuitable(error: impl ToString) -> Self {
        Self::Unsuitable { text: bounded(error) }
    }

    fn of_source(source: &SourceError, error: impl ToString) -> Self {
        match source {
            SourceError::Unauthorized { .. } | SourceError::Status { status: 403, .. } => {
                Self::Refused { text: bounded(error) }
            }
            SourceError::Unreachable { .. }
            | SourceError::Status { .. }
            | SourceError::NotFound { .. }
            | SourceError::NoRanges { .. }
            | SourceError::BadAnswer { .. } => Self::Unreachable { text: bounded(error) },
        }
    }
}

impl From<TreesError> for Reason {
    fn from(error: TreesError) -> Self {
        match &error {
            TreesError::Artifact(ArtifactError::Source { source, .. })
            | TreesError::Layer(LayerError::Source { source, .. }) => {
                Self::of_source(source, &error)
            }
            TreesError::Layer(LayerError::Deadline { .. }) => {
                Self::Unreachable { text: bounded(&error) }
            }
            TreesError::Layer(LayerError::Store(_) | LayerError::Stopped { .. })
            | TreesError::Index(_)
            | TreesError::Forgotten(_)
            | TreesError::OtherNumbers(_) => Self::failed(&error),
            TreesError::Artifact(_)
            | TreesError::Layer(_)
            | TreesError::Tree(_)
            | TreesError::Exclude(_) => Self::unsuitable(&error),
        }
    }
}

/// Foreign text does not make a record grow.
fn bounded(text: impl ToString) -> String {
    text.to_string().chars().take(TEXT_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_stored_under_the_word_that_is_shown() {
        let reasons = [
            Reason::Small { bytes: 1, least: 2 },
            Reason::Compressed { with: "gzip".to_owned() },
            Reason::NoLabels,
            Reason::NoAnnotations { missing: "its digest".to_owned() },
            Reason::bad_labels("x"),
            Reason::Unreachable { text: "x".to_owned() },
            Reason::Refused { text: "x".to_owned() },
            Reason::unsuitable("x"),
            Reason::failed("x"),
        ];
        for reason in reasons {
            let json = serde_json::to_value(&reason).unwrap();
            assert_eq!(json["kind"], reason.kind());
            assert_eq!(serde_json::from_value::<Reason>(json).unwrap(), reason);
        }
    }

    #[test]
    fn foreign_text_is_bounded() {
        let Reason::Failed { text } = Reason::failed("ß".repeat(10_000)) else { panic!() };
        assert_eq!(text.chars().count(), TEXT_CHARS_MAX);
    }

    #[test]
    fn a_source_that_is_silent_and_one_that_refuses_are_told_apart() {
        let source_name = || "host/repository".to_owned();
        let artifact = |source| {
            Reason::from(TreesError::from(ArtifactError::Source {
                reference: "host/repository:tag".to_owned(),
                source,
            }))
        };
        let silent = SourceError::Unreachable {
            source_name: source_name(),
            message: "connection refused".to_owned(),
        };
        assert_eq!(artifact(silent).kind(), "unreachable");
        let refused = SourceError::Unauthorized {
            source_name: source_name(),
            what: "the manifest".to_owned(),
            credentials: "no credentials".to_owned(),
        };
        let refused = artifact(refused);
        assert_eq!(refused.kind(), "refused");
        assert!(refused.to_string().contains("docker login"), "{refused}");
    }
}
