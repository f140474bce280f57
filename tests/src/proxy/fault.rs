//! What a registry does wrong, or in its own way.

use std::time::Duration;

use bytes::Bytes;
use weightfs_store::Digest;

use super::signed::Signatures;

/// What a fault applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Every request.
    All,
    /// Requests for manifests.
    Manifests,
    /// Requests for blobs.
    Blobs,
    /// Requests for that blob.
    Blob(Digest),
    /// Requests that begin to push a blob.
    Uploads,
}

impl Target {
    pub(super) fn matches(self, path: &str) -> bool {
        match self {
            Self::All => true,
            Self::Manifests => path.contains("/manifests/"),
            Self::Blobs => path.contains("/blobs/"),
            Self::Uploads => path.ends_with("/blobs/uploads/"),
            Self::Blob(digest) => path.ends_with(&format!("/blobs/{digest}")),
        }
    }
}

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Takes the request and never answers, until healed.
    Hang,
    /// Sends that many bytes of the body, then nothing more until healed.
    Stall {
        /// Bytes of the body that still get through.
        after: u64,
    },
    /// Sends that many bytes of the body, then closes the connection.
    Cut {
        /// Bytes of the body that still get through.
        after: u64,
    },
    /// Answers with this status and no body.
    Status(u16),
    /// Answers with this status and asks to come again after so many seconds.
    Busy {
        /// 429 or 503.
        status: u16,
        /// What Retry-After says.
        retry_after: u64,
    },
    /// Sends a byte each second.
    Trickle,
    /// Answers a ranged request with another range, so many bytes further, and says so.
    Elsewhere {
        /// How many bytes further.
        by: u64,
    },
    /// Sends the bytes of another blob of the repository.
    Other(Digest),
    /// Flips the bits of the byte at that offset of the blob.
    Corrupt {
        /// The byte's offset in the whole blob.
        at: u64,
    },
    /// Answers a ranged request with 200 and the whole blob.
    IgnoreRange,
    /// Answers with this manifest instead of the registry's.
    Replace {
        /// Its media type.
        media_type: String,
        /// Its bytes.
        body: Bytes,
    },
    /// Redirects (307) to the same path at another host.
    Redirect {
        /// `host:port`; of one that speaks TLS, with `https://` before it.
        to: String,
    },
    /// Answers with this status, no body, and Dragonfly's word for who failed (`backend`, `proxy`,
    /// `dfdaemon`).
    Dragonfly {
        /// The status; dfdaemon says 200 where its registry is away.
        status: u16,
        /// What X-Dragonfly-Error-Type says.
        failed: &'static str,
    },
    /// Answers only after this time, as a registry that is far away does.
    Delay(Duration),
    /// Redirects to the same path at another host, signed; that host wants [`Fault::Unsigned`].
    Sign {
        /// `host:port`.
        to: String,
        /// What signs.
        signatures: Signatures,
    },
    /// Refuses (403) what is not signed, or was asked for too often, as storage does.
    Unsigned(Signatures),
    /// Of so many requests, refuses the first ones (429), and asks to come again in a second.
    Bursts {
        /// How many.
        of: usize,
        /// How many of these are refused; every other one is told a date.
        refused: usize,
    },
    /// Answers a ranged request with 416.
    Unsatisfiable,
    /// Answers a ranged request with 206 and something else in Content-Range.
    ContentRange(Total),
    /// Tells no length: the body comes in chunks.
    NoLength,
    /// Answers a ranged request with so many bytes more, and tells no length.
    TooMuch(usize),
    /// Says that the body is compressed.
    Compressed {
        /// On this way only, not as what it is (Transfer-Encoding).
        transfer: bool,
    },
}

/// What Content-Range has instead of the total.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Total {
    /// `*`.
    Unknown,
    /// Another number.
    Wrong,
    /// There is no Content-Range at all.
    Missing,
}
