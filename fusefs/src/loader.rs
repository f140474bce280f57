//! What model loaders read first, and next. A loader opens every shard and reads its header
//! before it reads a tensor of any; then it reads shard after shard, in natural order.
//!
//! Nothing is fetched because a model is mounted, listed or looked at: it takes two reads at the
//! start of weight files, as a loader makes them. What is expected then is bounded, and is
//! fetched after all that readers wait for.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

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

/// Bytes read of a shard before the next one is thought of: more than a header.
const REAL_BYTES: u64 = 8 << 20;

/// How near its end a shard is when the next one is begun, and how much of that: as much as the
/// largest read-ahead window takes to be refilled.
const NEXT_SHARD_BYTES: u64 = 128 << 20;

/// What a loader will do with the files of one tree.
#[derive(Debug, Default)]
pub(crate) struct Loader {
    /// In natural order of their paths.
    shards: Vec<Shard>,
    by_node: HashMap<NodeId, usize>,
    companions: Vec<Content>,
    first_reads: AtomicU32,
}

#[derive(Debug)]
struct Shard {
    directory: PathBuf,
    content: Content,
    /// Whether its last bytes are read first, too.
    has_tail: bool,
    read: AtomicU64,
    next_begun: AtomicBool,
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
            next_begun: AtomicBool::new(false),
        });
        Self { shards: shards.collect(), by_node, companions, first_reads: AtomicU32::new(0) }
    }

    /// `size` bytes of a file were read at `offset`. What will be read next, said once.
    pub(crate) fn on_read(&self, node: NodeId, offset: u64, size: u64) -> Vec<Content> {
        let Some(at) = self.by_node.get(&node) else { return vec![] };
        let Some(shard) = self.shards.get(*at) else { return vec![] };
        let read = shard.read.fetch_add(size, Ordering::Relaxed).saturating_add(size);
        if offset < HEADER_BYTES
            && self.first_reads.load(Ordering::Relaxed) < LOADER_READS
            && self.first_reads.fetch_add(1, Ordering::Relaxed) + 1 == LOADER_READS
        {
            return self.first();
        }
        let left = shard.len().saturating_sub(offset);
        let ends = left <= NEXT_SHARD_BYTES.min(shard.len() / 2);
        if ends && read >= REAL_BYTES.min(shard.len() / 4) {
            return self.next(*at, shard);
        }
        vec![]
    }

    /// What lies beside the shards, and their headers.
    fn first(&self) -> Vec<Content> {
        let heads = self.shards.iter().map(|shard| shard.part(0, HEADER_BYTES));
        let tails = self.shards.iter().filter(|shard| shard.has_tail).map(Shard::tail);
        self.companions.iter().cloned().chain(heads).chain(tails).collect()
    }

    fn next(&self, at: usize, shard: &Shard) -> Vec<Content> {
        let next = self.shards.get(at + 1).filter(|next| next.directory == shard.directory);
        match next {
            Some(next) if !shard.next_begun.swap(true, Ordering::Relaxed) => {
                vec![next.part(0, NEXT_SHARD_BYTES)]
            }
            _ => vec![],
        }
    }
}

impl Shard {
    fn len(&self) -> u64 {
        self.content.range.end - self.content.range.start
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
            next_begun: AtomicBool::new(false),
        }
    }

    fn loader(has_tail: bool) -> Loader {
        let blob = testing::blob();
        let shards = (0..3).map(|at| shard(&blob, at, has_tail)).collect();
        let by_node = (0..3).map(|at| (NodeId(at), at as usize)).collect();
        let companions = vec![Content { blob, range: 5..10 }];
        Loader { shards, by_node, companions, first_reads: AtomicU32::new(0) }
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

    #[test]
    fn the_next_shard_begins_before_one_that_is_read_ends() {
        let loader = loader(false);
        assert!(loader.on_read(NodeId(0), 500 * MIB, 4096).is_empty(), "only a look");
        let mut asked = vec![];
        for at in 0..512 {
            let next = ranges(loader.on_read(NodeId(0), at * MIB, MIB));
            if at > 2 && !next.is_empty() {
                asked.push((at, next[0].clone()));
            }
        }
        assert_eq!(asked, [(384, 512 * MIB..640 * MIB)]);
        for at in 1..512 {
            assert!(ranges(loader.on_read(NodeId(2), at * MIB, MIB)).is_empty(), "the last one");
        }
    }

    #[test]
    fn numbers_in_names_sort_by_value() {
        let mut names = ["m-10.safetensors", "m-9.safetensors", "a/m-2", "m-00001-of-12"];
        names.sort_by_key(|name| natural(Path::new(name)));
        assert_eq!(names, ["a/m-2", "m-00001-of-12", "m-9.safetensors", "m-10.safetensors"]);
    }
}
