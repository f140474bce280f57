//! Fetching files into the cache before anybody reads them.
//!
//! What is here already is not fetched again, so a pull that was interrupted goes on where it was.

use std::collections::HashMap;
use std::ops::Range;

use futures::stream::{self, BoxStream, StreamExt as _};
use glob::{MatchOptions, Pattern};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use weightfs_fusefs::{Content, NodeKind, Profile, Quiet, Tree};
use weightfs_proto::control::{PullEvent, PullProgress, Pulled, pull_event};
use weightfs_store::{BlobId, Reference};

use super::{Cache, CacheError};
use crate::profiles;
use crate::trees::OpenTree;

/// Bytes that are asked for, and waited for, at a time.
const STEP_BYTES: u64 = 16 << 20;

/// Steps that are asked for before they are waited for. A pull that is given up leaves no more than
/// these to be fetched.
const STEPS_AHEAD: usize = 16;

/// Events that wait to be taken; of progress, more are dropped.
const EVENTS: usize = 64;

/// `*` stays inside a directory, as in a shell; `**` goes on below it.
const MATCH: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// What of an artifact is fetched.
#[derive(Debug, Clone)]
pub enum Selection {
    /// The files that match a pattern, or all if there is none.
    Files(Vec<Pattern>),
    /// What a recorded load has read, in its order: of this profile, or of the one that was kept.
    Profile(Option<Profile>),
}

/// A file that is wanted.
#[derive(Debug)]
struct Wanted {
    path: String,
    content: Content,
    /// Bytes of it that are wanted.
    size: u64,
}

/// Bytes of a file to be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    /// Number of the file.
    file: usize,
    /// In the file's blob.
    range: Range<u64>,
}

impl Piece {
    fn steps(&self) -> impl Iterator<Item = Self> {
        let Self { file, range } = self.clone();
        let starts = range.clone().step_by(usize::try_from(STEP_BYTES).unwrap_or(usize::MAX));
        starts.map(move |start| Self {
            file,
            range: start..range.end.min(start.saturating_add(STEP_BYTES)),
        })
    }
}

impl Cache {
    /// Fetches what is selected of `reference`: events of how far it is, and the result. It stops
    /// when nobody listens any more.
    ///
    /// To be called in a runtime.
    pub fn pull(
        &self,
        reference: Reference,
        selection: Selection,
    ) -> BoxStream<'static, Result<PullEvent, CacheError>> {
        let (sender, events) = mpsc::channel(EVENTS);
        let own = self.clone();
        let work = tokio::spawn(async move {
            tokio::select! {
                pulled = own.pull_all(&reference, selection, &sender) => pulled.map(Some),
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
        selection: Selection,
        events: &mpsc::Sender<PullEvent>,
    ) -> Result<Pulled, CacheError> {
        let artifact = self.opener.resolve(reference).await?;
        let open = self.opener.open(&artifact, &Quiet).await?;
        let tree = open.merge()?;
        let (files, pieces) = match selection {
            Selection::Files(patterns) => matching(&tree, &patterns, reference)?,
            Selection::Profile(given) => {
                let manifest = artifact.manifest_digest;
                let profile = profiles::choose(self.store(), manifest, given)?;
                let profile =
                    profile.ok_or_else(|| CacheError::NoProfile(reference.to_string()))?;
                recorded(&tree, profile.ranges(&open.layers).map(|(blob, part)| (blob.id(), part)))
            }
        };
        let before = fetched(&open);
        let (all_size, mut all_bytes) = (files.iter().map(|file| file.size).sum(), 0);
        let steps: Vec<_> = pieces.iter().flat_map(Piece::steps).collect();
        let mut asked = steps.iter();
        let ask = |step: &Piece| {
            if let Some(file) = files.get(step.file) {
                file.content.blob.ask(&step.range);
            }
        };
        asked.by_ref().take(STEPS_AHEAD).for_each(ask);
        let mut here = vec![0; files.len()];
        for step in &steps {
            asked.by_ref().take(1).for_each(ask);
            let (Some(file), Some(here)) = (files.get(step.file), here.get_mut(step.file)) else {
                continue;
            };
            let path = || file.path.clone();
            let fetched = file.content.blob.fetch(&step.range).await;
            fetched.map_err(|source| CacheError::Read { path: path(), source: source.into() })?;
            let bytes = step.range.end - step.range.start;
            *here += bytes;
            all_bytes += bytes;
            let (bytes, size) = (*here, file.size);
            let progress = PullProgress { path: path(), bytes, size, all_bytes, all_size };
            // A full channel drops it: a later event says more.
            let _ = events.try_send(event(pull_event::Event::Progress(progress)));
        }
        let files = files.len() as u64;
        Ok(Pulled { files, size: all_size, fetched: fetched(&open) - before })
    }
}

/// The files of a tree; one with several names once for each.
fn files_of(tree: &Tree) -> impl Iterator<Item = Wanted> {
    tree.walk().filter_map(|(path, id)| match &tree.node(id)?.kind {
        NodeKind::File(content) => {
            let path = path.to_string_lossy().into_owned();
            let size = content.range.end - content.range.start;
            Some(Wanted { path, content: content.clone(), size })
        }
        _ => None,
    })
}

/// The files that match a pattern, or all if there is none, each as one piece.
fn matching(
    tree: &Tree,
    patterns: &[Pattern],
    reference: &Reference,
) -> Result<(Vec<Wanted>, Vec<Piece>), CacheError> {
    let matches = |file: &Wanted| {
        patterns.is_empty() || patterns.iter().any(|one| one.matches_with(&file.path, MATCH))
    };
    let files: Vec<_> = files_of(tree).filter(matches).collect();
    if files.is_empty() && !patterns.is_empty() {
        let patterns: Vec<_> = patterns.iter().map(Pattern::as_str).collect();
        let (reference, patterns) = (reference.to_string(), patterns.join(", "));
        return Err(CacheError::NoFile { reference, patterns });
    }
    let pieces = files.iter().enumerate();
    let pieces = pieces.map(|(file, wanted)| Piece { file, range: wanted.content.range.clone() });
    let pieces = pieces.collect();
    Ok((files, pieces))
}

/// The files that recorded ranges touch, and what of them, in the order of the ranges. What lies
/// between files, in a tar, is nobody's.
fn recorded(
    tree: &Tree,
    ranges: impl Iterator<Item = (BlobId, Range<u64>)>,
) -> (Vec<Wanted>, Vec<Piece>) {
    let all: Vec<_> = files_of(tree).collect();
    let mut by_blob: HashMap<BlobId, Vec<(Range<u64>, usize)>> = HashMap::new();
    for (number, file) in all.iter().enumerate() {
        let content = &file.content;
        by_blob.entry(content.blob.id()).or_default().push((content.range.clone(), number));
    }
    by_blob.values_mut().for_each(|files| files.sort_by_key(|(range, _)| (range.start, range.end)));
    let mut numbers: HashMap<usize, usize> = HashMap::new();
    let mut pieces: Vec<Piece> = Vec::new();
    for (blob, range) in ranges {
        let files = by_blob.get(&blob).map_or(&[][..], Vec::as_slice);
        let first = files.partition_point(|(file, _)| file.end <= range.start);
        let touched = files.iter().skip(first).take_while(|(file, _)| file.start < range.end);
        for (file, number) in touched.filter(|(file, _)| !file.is_empty()) {
            let next = numbers.len();
            let file_number = *numbers.entry(*number).or_insert(next);
            let range = file.start.max(range.start)..file.end.min(range.end);
            pieces.push(Piece { file: file_number, range });
        }
    }
    let mut files: Vec<_> = all
        .into_iter()
        .enumerate()
        .filter_map(|(number, file)| Some((*numbers.get(&number)?, Wanted { size: 0, ..file })))
        .collect();
    files.sort_by_key(|(number, _)| *number);
    let mut files: Vec<_> = files.into_iter().map(|(_, file)| file).collect();
    for piece in &pieces {
        if let Some(file) = files.get_mut(piece.file) {
            file.size += piece.range.end - piece.range.start;
        }
    }
    (files, pieces)
}

fn fetched(open: &OpenTree) -> u64 {
    open.stats().fetched
}

fn event(event: pull_event::Event) -> PullEvent {
    PullEvent { event: Some(event) }
}
