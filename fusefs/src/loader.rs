//! What model loaders read first, and next. A loader opens every shard and reads its header
//! before it reads a tensor of any; then it reads shard after shard, in natural order.
//!
//! Nothing is fetched because a model is mounted, listed or looked at: it takes two reads at the
//! start of weight files, as a loader makes them. What is expected then is bounded, and is
//! fetched after all that readers wait for.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use weightfs_store::CHUNK_BYTES;

use crate::listing::LARGE_FILE_BYTES;
use crate::tree::{Content, NodeId, NodeKind, Tree};

/// Where a header lies. Those of very large shards are longer; the rest is then read as a stream.
const HEADER_BYTES: u64 = CHUNK_BYTES;

/// Reads at the start of weight files that make a loader: a look at one file is one read.
const LOADER_READS: u32 = 2;

/// Weight files of a model that are known; the largest models have a few hundred.
const MAX_SHARDS: usize = 1024;

/// Other files beside the shards that every loader reads, and the bytes of all of them together
/// (tokenizers have some 20 MiB).
const MAX_COMPANIONS: usize = 64;
const MAX_COMPANION_BYTES: u64 = 64 << 20;

/// Bytes read of a shard before the next one is thought of, and between two thoughts: more than
/// a header.
const STEP_BYTES: u64 = 8 << 20;

/// How little of a shard is still to be fetched when the next one is begun, and how much of that
/// while it is not known that shard after shard is read: the largest read-ahead window, so that
/// the line is never idle.
const NEXT_SHARD_BYTES: u64 = 256 << 20;

/// What a loader will do with the files of one tree.
#[derive(Debug, Default)]
pub(crate) struct Loader {
    /// In natural order of their paths.
    shards: Vec<Shard>,
    by_node: HashMap<NodeId, usize>,
    companions: Vec<Content>,
    first_reads: AtomicU32,
    /// Shards of which something was read.
    touched: AtomicUsize,
}

#[derive(Debug)]
struct Shard {
    directory: PathBuf,
    content: Content,
    /// Whether its last bytes are read first, too.
    has_tail: bool,
    read: AtomicU64,
    /// Bytes of the next shard that were said to be expected.
    next_expected: AtomicU64,
}

impl Loader {
    /// For the files of a tree.
    pub(crate) fn of(tree: &Tree) -> Self {
        let mut shards = vec![];
        let mut companions = vec![];
        for (path, id) in tree.walk() {
            let Some(NodeKind::File(content)) = tree.node(id).map(|node| &node.kind) else {
                continue;
            };
            let bytes = content.range.end - content.range.start;
            if is_weights(&path) && bytes >= LARGE_FILE_BYTES && shards.len() < MAX_SHARDS {
                shards.push((natural(&path), id, path, content.clone()));
            } else if is_companion(&path) && bytes <= MAX_COMPANION_BYTES {
                companions.push((path, content.clone()));
            }
        }
        let beside: HashSet<_> = shards.iter().filter_map(|shard| shard.2.parent()).collect();
        let beside = companions
            .into_iter()
            .filter(|(path, _)| path.parent().is_some_and(|directory| beside.contains(directory)));
        let companions = within_bounds(beside.map(|(_, content)| content));
        shards.sort_by(|a, b| a.0.cmp(&b.0));
        let by_node = shards.iter().enumerate().map(|(at, shard)| (shard.1, at)).collect();
        let shards = shards.into_iter().map(|(_, _, path, content)| Shard {
            directory: path.parent().unwrap_or(Path::new("")).to_owned(),
            has_tail: is_read_from_its_end(&path),
            content,
            read: AtomicU64::new(0),
            next_expected: AtomicU64::new(0),
        });
        let (first_reads, touched) = (AtomicU32::new(0), AtomicUsize::new(0));
        Self { shards: shards.collect(), by_node, companions, first_reads, touched }
    }

    /// `size` bytes of a file were read at `offset`. What will be read next, said once.
    pub(crate) fn on_read(&self, node: NodeId, offset: u64, size: u64) -> Vec<Content> {
        let Some((at, shard)) = self.shard(node) else { return vec![] };
        let before = self.note_read(shard, size);
        if offset < HEADER_BYTES
            && self.first_reads.load(Ordering::Relaxed) < LOADER_READS
            && self.first_reads.fetch_add(1, Ordering::Relaxed) + 1 == LOADER_READS
        {
            return self.first();
        }
        let step = STEP_BYTES.min(shard.len() / 4).max(1);
        if before / step == before.saturating_add(size) / step {
            return vec![];
        }
        self.next(at, shard, shard.missing())
    }

    /// A file was opened whose bytes are all here: its reads will not be seen, if the kernel
    /// serves them. What will be read after it, if shard after shard is read.
    pub(crate) fn on_open_complete(&self, node: NodeId) -> Vec<Content> {
        let Some((at, shard)) = self.shard(node) else { return vec![] };
        self.note_read(shard, shard.len());
        if self.walks() { self.next(at, shard, 0) } else { vec![] }
    }

    fn shard(&self, node: NodeId) -> Option<(usize, &Shard)> {
        let at = *self.by_node.get(&node)?;
        Some((at, self.shards.get(at)?))
    }

    /// Bytes of it that were read before.
    fn note_read(&self, shard: &Shard, size: u64) -> u64 {
        let before = shard.read.fetch_add(size, Ordering::Relaxed);
        if before == 0 {
            self.touched.fetch_add(1, Ordering::Relaxed);
        }
        before
    }

    /// Whether more than one shard is read.
    fn walks(&self) -> bool {
        self.touched.load(Ordering::Relaxed) > 1
    }

    /// What lies beside the shards, and their headers.
    fn first(&self) -> Vec<Content> {
        let heads = self.shards.iter().map(|shard| shard.part(0, HEADER_BYTES));
        let tails = self.shards.iter().filter(|shard| shard.has_tail).map(Shard::tail);
        self.companions.iter().cloned().chain(heads).chain(tails).collect()
    }

    /// The next shard, when only `missing` bytes of this one are still to be fetched.
    fn next(&self, at: usize, shard: &Shard, missing: u64) -> Vec<Content> {
        let next = self.shards.get(at + 1).filter(|next| next.directory == shard.directory);
        let Some(next) = next else { return vec![] };
        if missing > NEXT_SHARD_BYTES.min(shard.len() / 2) {
            return vec![];
        }
        let wanted = if self.walks() { next.len() } else { NEXT_SHARD_BYTES.min(next.len()) };
        if shard.next_expected.fetch_max(wanted, Ordering::Relaxed) >= wanted {
            return vec![];
        }
        vec![next.part(0, wanted)]
    }
}

impl Shard {
    fn len(&self) -> u64 {
        self.content.range.end - self.content.range.start
    }

    fn missing(&self) -> u64 {
        self.content.blob.missing(&self.content.range)
    }

    /// At most `len` bytes of the file from `from` on.
    fn part(&self, from: u64, len: u64) -> Content {
        let range = &self.content.range;
        let start = range.start.saturating_add(from).min(range.end);
        let end = start.saturating_add(len).min(range.end);
        Content { blob: self.content.blob.clone(), range: start..end }
    }

    fn tail(&self) -> Content {
        self.part(self.len().saturating_sub(1), 1)
    }
}

fn within_bounds(companions: impl Iterator<Item = Content>) -> Vec<Content> {
    let mut bytes = 0;
    let fits = |content: &Content| {
        bytes += content.range.end - content.range.start;
        bytes <= MAX_COMPANION_BYTES
    };
    companions.take(MAX_COMPANIONS).take_while(fits).collect()
}

fn extension(path: &Path) -> &str {
    path.extension().and_then(|extension| extension.to_str()).unwrap_or("")
}

fn is_weights(path: &Path) -> bool {
    matches!(extension(path), "safetensors" | "gguf" | "bin" | "pt" | "pth")
}

/// Whether the last bytes of such a file are read first: llama.cpp probes them, and the directory
/// of torch's zip files is there.
fn is_read_from_its_end(path: &Path) -> bool {
    matches!(extension(path), "gguf" | "bin" | "pt" | "pth")
}

fn is_companion(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("");
    extension(path) == "json" || name.starts_with("tokenizer") || name == "merges.txt"
}

/// A key that sorts numbers in names by their value.
fn natural(path: &Path) -> Vec<(u64, String)> {
    let text = path.to_string_lossy();
    let mut key = vec![];
    let mut rest = &*text;
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, after) = rest.split_at(digits);
        let words = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (word, after) = after.split_at(words);
        // What is too long for a number is a name all the same.
        key.push((number.parse().unwrap_or(0), word.to_owned()));
        rest = after;
    }
    key
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use weightfs_store::Blob;

    use super::*;
    use crate::testing;

    const MIB: u64 = 1 << 20;

    fn shard(blob: &Arc<Blob>, at: u64, has_tail: bool) -> Shard {
        let range = at * 512 * MIB..(at + 1) * 512 * MIB;
        Shard {
            directory: PathBuf::new(),
            content: Content { blob: blob.clone(), range },
            has_tail,
            read: AtomicU64::new(0),
            next_expected: AtomicU64::new(0),
        }
    }

    fn loader(has_tail: bool) -> Loader {
        let blob = testing::blob();
        let shards = (0..3).map(|at| shard(&blob, at, has_tail)).collect();
        let by_node = (0..3).map(|at| (NodeId(at), at as usize)).collect();
        let companions = vec![Content { blob, range: 5..10 }];
        let (first_reads, touched) = (AtomicU32::new(0), AtomicUsize::new(0));
        Loader { shards, by_node, companions, first_reads, touched }
    }

    fn ranges(contents: Vec<Content>) -> Vec<std::ops::Range<u64>> {
        contents.into_iter().map(|content| content.range).collect()
    }

    #[test]
    fn a_look_expects_nothing_and_a_loader_the_headers_once() {
        let loader = loader(false);
        assert!(loader.on_read(NodeId(1), 300 * MIB, 4096).is_empty(), "in the middle");
        assert!(loader.on_read(NodeId(7), 0, 4096).is_empty(), "no weights");
        assert!(loader.on_read(NodeId(0), 0, 8).is_empty(), "one look");
        let first = ranges(loader.on_read(NodeId(0), 8, 5000));
        let head = |at| at * MIB..(at + 1) * MIB;
        assert_eq!(first, [5..10, head(0), head(512), head(1024)]);
        assert!(loader.on_read(NodeId(1), 0, 8).is_empty(), "said once");
    }

    #[test]
    fn the_end_is_expected_of_files_that_are_read_from_there() {
        let loader = loader(true);
        loader.on_read(NodeId(0), 0, 8);
        let first = ranges(loader.on_read(NodeId(0), 8, 5000));
        assert_eq!(first.last(), Some(&(1536 * MIB - 1..1536 * MIB)));
    }

    /// What is expected of the second shard when so much of the first is missing.
    fn second(loader: &Loader, missing: u64) -> Option<std::ops::Range<u64>> {
        ranges(loader.next(0, &loader.shards[0], missing)).pop()
    }

    #[test]
    fn the_next_shard_is_begun_when_little_of_one_is_missing() {
        let loader = loader(false);
        assert_eq!(second(&loader, 257 * MIB), None);
        assert_eq!(second(&loader, 256 * MIB), Some(512 * MIB..768 * MIB));
        assert_eq!(second(&loader, 0), None, "said once");
        assert!(loader.next(2, &loader.shards[2], 0).is_empty(), "the last one");
    }

    #[test]
    fn all_of_the_next_shard_is_expected_once_a_second_one_is_read() {
        let loader = loader(false);
        loader.on_read(NodeId(0), 300 * MIB, 4096);
        assert_eq!(second(&loader, MIB), Some(512 * MIB..768 * MIB));
        loader.on_read(NodeId(1), 0, 8);
        assert_eq!(second(&loader, MIB), Some(512 * MIB..1024 * MIB));
        assert_eq!(second(&loader, MIB), None, "said once");
    }

    #[test]
    fn a_complete_shard_that_is_opened_counts_as_read() {
        let loader = loader(false);
        assert!(loader.on_open_complete(NodeId(0)).is_empty(), "one file is a look");
        let expected = ranges(loader.on_open_complete(NodeId(1))).pop();
        assert_eq!(expected, Some(1024 * MIB..1536 * MIB));
        assert!(loader.on_open_complete(NodeId(1)).is_empty(), "said once");
    }

    #[test]
    fn numbers_in_names_sort_by_value() {
        let mut names = ["m-10.safetensors", "m-9.safetensors", "a/m-2", "m-00001-of-12"];
        names.sort_by_key(|name| natural(Path::new(name)));
        assert_eq!(names, ["a/m-2", "m-00001-of-12", "m-9.safetensors", "m-10.safetensors"]);
    }
}
