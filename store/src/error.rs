//! What can go wrong below the file system, as types. Texts say what, where and what to do.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::Digest;

/// A source did not give the bytes it was asked for.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SourceError {
    /// Connection refused, reset, name not found, TLS failure, timeout: worth another try.
    #[error("{source_name}: {message}")]
    Unreachable {
        /// The source, as people know it (`host:port/repository`).
        source_name: String,
        /// What the transport said.
        message: String,
    },
    /// An HTTP status that is no success.
    #[error("{source_name}: HTTP status {status} for {what}")]
    Status {
        /// The source, as people know it.
        source_name: String,
        /// What was asked for.
        what: String,
        /// The HTTP status code.
        status: u16,
        /// How long the server asks to be left alone (`Retry-After`), if it does.
        retry_after: Option<Duration>,
    },
    /// Credentials are missing or were refused.
    #[error(
        "{source_name}: access to {what} was refused with {credentials}; check `docker login` and the pull secret"
    )]
    Unauthorized {
        /// The source, as people know it.
        source_name: String,
        /// What was asked for.
        what: String,
        /// Which credentials were tried, without any secret ("no credentials", "user x from …").
        credentials: String,
    },
    /// The source does not have it.
    #[error("{source_name}: {what} is not there")]
    NotFound {
        /// The source, as people know it.
        source_name: String,
        /// What was asked for.
        what: String,
    },
    /// The source ignores ranges: it gives the whole blob, from its first byte on.
    #[error("{source_name}: {what} is given only as a whole (the host ignores Range)")]
    NoRanges {
        /// The source, as people know it.
        source_name: String,
        /// What was asked for.
        what: String,
    },
    /// An answer that the protocol does not allow, or one over its bound.
    #[error("{source_name}: bad answer for {what}: {message}")]
    BadAnswer {
        /// The source, as people know it.
        source_name: String,
        /// What was asked for.
        what: String,
        /// What is wrong with it.
        message: String,
    },
}

impl SourceError {
    /// Whether a reader who has time should wait: another try may do, or credentials that are new.
    pub(crate) fn may_be_mended(&self) -> bool {
        self.may_pass() || matches!(self, Self::Unauthorized { .. })
    }

    /// Whether the host says that it is asked too much.
    pub fn is_complaint(&self) -> bool {
        matches!(self, Self::Status { status: 429 | 503, .. })
    }

    /// Whether another try may mend it.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            // 408 request timeout, 425 too early, 429 too many requests (RFC 9110, 8470, 6585).
            Self::Status { status, .. } => matches!(status, 408 | 425 | 429 | 500..=599),
            Self::Unauthorized { .. }
            | Self::NotFound { .. }
            | Self::NoRanges { .. }
            | Self::BadAnswer { .. } => false,
        }
    }

    /// How long the source asks to be left alone.
    pub(crate) fn asks_for_rest(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } if self.may_pass() => *retry_after,
            _ => None,
        }
    }
}

/// A read of a blob failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// No source gave the bytes in time.
    #[error("blob {digest}: no source answered within {deadline:?}: {cause}")]
    Deadline {
        /// The blob.
        digest: Digest,
        /// The configured deadline (`fetch.deadline`).
        deadline: Duration,
        /// The last failure seen, or that there was no answer at all.
        cause: String,
    },
    /// A failure that another try would not mend.
    #[error("blob {digest}: {cause}")]
    Source {
        /// The blob.
        digest: Digest,
        /// The failure.
        cause: SourceError,
    },
    /// The whole blob did not hash to its digest: nothing of it is served any more.
    #[error("blob {digest} is poisoned: its bytes hash to {actual}")]
    Poisoned {
        /// The digest that was promised.
        digest: Digest,
        /// The digest that the bytes have.
        actual: Digest,
    },
    /// The caller asked for bytes outside the blob or across a cut.
    #[error("blob {digest}: bytes {start}..{end} are not inside one segment")]
    OutOfRange {
        /// The blob.
        digest: Digest,
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// The cache files could not be read or written.
    #[error("blob {digest}: cache: {cause}")]
    Cache {
        /// The blob.
        digest: Digest,
        /// What the operating system said.
        cause: Arc<io::Error>,
    },
}

/// The state directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process owns the directory.
    #[error("{} is in use by process {pid}", root.display())]
    Owned {
        /// The state directory.
        root: PathBuf,
        /// The owner's process id, 0 if it could not be told.
        pid: u32,
    },
    /// A file system on which sparse, mapped cache files are not safe.
    #[error("{} is on {kind}, which can't hold the cache: use a local disk (ext4, xfs, btrfs)", root.display())]
    FileSystem {
        /// The state directory.
        root: PathBuf,
        /// The file system's name.
        kind: String,
    },
    /// An operation on the directory failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// What was touched.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The blob is already open, or on disk, with other cuts.
    #[error("blob {digest} is in the cache with another layout")]
    OtherLayout {
        /// The blob.
        digest: Digest,
    },
}
