//! Fetching files into the cache before anybody reads them.
//!
//! What is here already is not fetched again, so a pull that was interrupted goes on where it was.

use std::sync::Arc;

use futures::stream::{self, BoxStream, StreamExt as _};
use glob::{MatchOptions, Pattern};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use weightfs_fusefs::{Content, NodeKind, Quiet, Tree};
use weightfs_proto::control::{PullEvent, PullProgress, Pulled, pull_event};
use weightfs_store::blob::Read;
use weightfs_store::{ReadError, Reference};

use super::{Cache, CacheError};
use crate::trees::OpenTree;

/// Bytes that are asked for at a time. The read-ahead of the store makes larger requests of them.
const PIECE_BYTES: u64 = 8 << 20;

/// Events that wait to be taken; of progress, more are dropped.
const EVENTS: usize = 64;

/// `*` stays inside a directory, as in a shell; `**` goes on below it.
const MATCH: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// A file that is wanted.
struct Wanted {
    path: String,
    content: Content,
}

impl Wanted {
    fn size(&self) -> u64 {
        self.content.range.end - self.content.range.start
    }
}

impl Cache {
    /// Fetches the files of `reference` that match a pattern, or all: events of how far it is,
    /// and the result. It stops when nobody listens any more.
    ///
    /// To be called in a runtime.
    pub fn pull(
        &self,
        reference: Reference,
        patterns: Vec<Pattern>,
    ) -> BoxStream<'static, Result<PullEvent, CacheError>> {
        let (sender, events) = mpsc::channel(EVENTS);
        let own = self.clone();
        let work = tokio::spawn(async move {
            tokio::select! {
                pulled = own.pull_all(&reference, &patterns, &sender) => pulled.map(Some),
                () = sender.closed() => Ok(None),
            }
        });
        let end = stream::once(work).filter_map(async |ended| match ended {
            Ok(Ok(pulled)) => pulled.map(|pulled| Ok(event(pull_event::Event::Pulled(pulled)))),
            Ok(Err(error)) => Some(Err(error)),
            Err(error) => Some(Err(error.into())),
        });
        ReceiverStream::new(events).map(Ok).chain(end).boxed()
    }

    async fn pull_all(
        &self,
        reference: &Reference,
        patterns: &[Pattern],
        events: &mpsc::Sender<PullEvent>,
    ) -> Result<Pulled, CacheError> {
        let artifact = self.opener.resolve(reference).await?;
        let open = self.opener.open(&artifact, &Quiet).await?;
        let tree = open.merge()?;
        let wanted = wanted(&tree, patterns);
        if wanted.is_empty() && !patterns.is_empty() {
            let patterns: Vec<_> = patterns.iter().map(Pattern::as_str).collect();
            let (reference, patterns) = (reference.to_string(), patterns.join(", "));
            return Err(CacheError::NoFile { reference, patterns });
        }
        let before = fetched(&open);
        let all_size = wanted.iter().map(Wanted::size).sum();
        let mut all_bytes = 0;
        for file in &wanted {
            fetch(file, |bytes| {
                let progress = PullProgress {
                    path: file.path.clone(),
                    bytes,
                    size: file.size(),
                    all_bytes: all_bytes + bytes,
                    all_size,
                };
                // A full channel drops it: a later event says more.
                let _ = events.try_send(event(pull_event::Event::Progress(progress)));
            })
            .await
            .map_err(|source| CacheError::Read {
                path: file.path.clone(),
                source: source.into(),
            })?;
            all_bytes += file.size();
        }
        let files = wanted.len() as u64;
        Ok(Pulled { files, size: all_size, fetched: fetched(&open) - before })
    }
}

/// The files that match a pattern, or all if there is none; a file with several names once for
/// each.
fn wanted(tree: &Tree, patterns: &[Pattern]) -> Vec<Wanted> {
    let files = tree.walk().filter_map(|(path, id)| match &tree.node(id)?.kind {
        NodeKind::File(content) => {
            let path = path.to_string_lossy().into_owned();
            Some(Wanted { path, content: content.clone() })
        }
        _ => None,
    });
    let matches = |file: &Wanted| {
        patterns.is_empty() || patterns.iter().any(|one| one.matches_with(&file.path, MATCH))
    };
    files.filter(matches).collect()
}

/// Fetches what is missing of a file.
async fn fetch(file: &Wanted, mut progress: impl FnMut(u64)) -> Result<(), ReadError> {
    let Content { blob, range } = &file.content;
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min(at.saturating_add(PIECE_BYTES));
        if let Read::Missing(miss) = Arc::clone(blob).read(at..end)? {
            miss.wait().await?;
        }
        at = end;
        progress(at - range.start);
    }
    Ok(())
}

fn fetched(open: &OpenTree) -> u64 {
    open.stats().fetched
}

fn event(event: pull_event::Event) -> PullEvent {
    PullEvent { event: Some(event) }
}
