//! Where bytes of a blob come from.

mod in_order;

use std::fmt::Debug;
use std::ops::Range;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;

pub use self::in_order::in_order;
use crate::{SourceError, Urgency};

/// Bytes in order, as they arrive.
pub type ByteStream = BoxStream<'static, Result<Piece, SourceError>>;

/// Bytes, and who gave them: of one request some may come from a peer and some from the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The bytes.
    pub bytes: Bytes,
    /// Who gave them.
    pub from: SourceKind,
}

impl Piece {
    /// Bytes of the registry itself.
    pub const fn of_registry(bytes: Bytes) -> Self {
        Self { bytes, from: SourceKind::Registry }
    }
}

/// What a source is, for those who count what came from where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceKind {
    /// The registry that the reference names.
    Registry,
    /// A mirror of it.
    Mirror,
    /// Dragonfly's daemon on this node, wherever it has them from.
    Dragonfly,
    /// Another node.
    Peer,
}

impl SourceKind {
    /// All of them, in the order in which they are declared.
    pub const ALL: [Self; 4] = [Self::Registry, Self::Mirror, Self::Dragonfly, Self::Peer];

    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Registry => "registry",
            Self::Mirror => "mirror",
            Self::Dragonfly => "dragonfly",
            Self::Peer => "peer",
        }
    }
}

/// Something that has a blob: a registry's repository, or that and peers.
pub trait Source: Debug + Send + Sync {
    /// What people know it by (`host:port/repository`); never a secret. Two sources of one name
    /// are one source.
    fn name(&self) -> &str;

    /// The host that answers (`host:port`): what it bears is shared by all of its blobs.
    fn host(&self) -> &str;

    /// Bytes `range` of the blob, in order. The stream ends with an error or after exactly
    /// `range.end - range.start` bytes; it never gives more. A piece may be empty, as a sign of life.
    /// How urgent it is matters to sources that have to choose.
    fn fetch(
        &self,
        range: Range<u64>,
        urgency: Urgency,
    ) -> BoxFuture<'_, Result<ByteStream, SourceError>>;

    /// Bytes that it gave are not what their digest promises. They are asked for again.
    fn gave_wrong(&self, _bytes: &Range<u64>) {}
}
