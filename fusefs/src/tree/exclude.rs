//! Files that a tree is shown without, by patterns in the syntax of .gitignore.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use ignore::gitignore::{Gitignore, GitignoreBuilder};

use super::merge::{DraftKind, Folder, Merger, ROOT};

/// Patterns of one tree at the most.
pub const MAX_PATTERNS: usize = 256;

/// Bytes of one pattern at the most.
pub const MAX_PATTERN_BYTES: usize = 1024;

/// Patterns that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExcludeError {
    /// Too many of them.
    #[error("{0} patterns; {MAX_PATTERNS} are accepted at the most")]
    TooMany(usize),
    /// One that is too long.
    #[error("a pattern of {0} bytes; {MAX_PATTERN_BYTES} are accepted at the most")]
    TooLong(usize),
    /// One that means nothing.
    #[error("the pattern {pattern:?}: {problem}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// Which files are left out. A pattern without a slash is about names anywhere, one with a slash
/// about paths from the root; `!` takes a file back in. The last one that matches a path counts,
/// and what says something of the path itself counts more than what says something of a directory
/// above it.
#[derive(Debug, Clone)]
pub struct Exclude(Gitignore);

impl Exclude {
    /// Leaves nothing out.
    pub fn nothing() -> Self {
        Self(Gitignore::empty())
    }

    /// By these patterns.
    ///
    /// # Errors
    /// Too many of them, or one that means nothing.
    pub fn new(patterns: &[String]) -> Result<Self, ExcludeError> {
        if patterns.len() > MAX_PATTERNS {
            return Err(ExcludeError::TooMany(patterns.len()));
        }
        let mut builder = GitignoreBuilder::new("");
        builder.allow_unclosed_class(false);
        for pattern in patterns {
            if pattern.len() > MAX_PATTERN_BYTES {
                return Err(ExcludeError::TooLong(pattern.len()));
            }
            let bad = |problem| ExcludeError::Pattern { pattern: pattern.clone(), problem };
            if pattern.trim().is_empty() || pattern.contains('\n') {
                return Err(bad("it must be one line with something in it".to_owned()));
            }
            builder.add_line(None, pattern).map_err(|error| bad(error.to_string()))?;
        }
        let built = builder.build();
        built.map(Self).map_err(|error| ExcludeError::Pattern {
            pattern: patterns.join(" "),
            problem: error.to_string(),
        })
    }

    /// Whether a file of that path, relative to the root, is left out.
    pub fn hides(&self, path: &Path) -> bool {
        self.0.matched_path_or_any_parents(path, false).is_ignore()
    }
}

impl Merger<'_> {
    /// Takes out what is to be left out, and the directories in which nothing is left by that.
    pub(super) fn leave_out(&mut self, exclude: &Exclude) {
        if exclude.0.is_empty() {
            return;
        }
        let directories = self.directories();
        let mut emptied = HashSet::new();
        // Those below others first.
        for (position, path) in directories.into_iter().rev() {
            let Some(folder) = self.folder_mut(position) else { continue };
            let mut names = std::mem::take(&mut folder.names);
            let before = names.len();
            names.retain(|name, slot| match self.folder(slot.node) {
                Some(_) => !emptied.contains(&slot.node),
                None => !exclude.hides(&path.join(OsStr::from_bytes(name))),
            });
            if names.is_empty() && before > 0 && position != ROOT {
                emptied.insert(position);
            }
            if let Some(folder) = self.folder_mut(position) {
                folder.names = names;
            }
        }
    }

    /// All directories with their paths, each before those below it.
    fn directories(&self) -> Vec<(usize, PathBuf)> {
        let mut found = Vec::new();
        let mut open = vec![(ROOT, PathBuf::new())];
        while let Some((position, path)) = open.pop() {
            let Some(DraftKind::Directory(Folder { names, .. })) =
                self.drafts.get(position).map(|draft| &draft.kind)
            else {
                continue;
            };
            let below = names.iter().map(|(name, slot)| (slot.node, OsStr::from_bytes(name)));
            open.extend(below.map(|(node, name)| (node, path.join(name))));
            found.push((position, path));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hidden(patterns: &[&str], path: &str) -> bool {
        let patterns: Vec<_> = patterns.iter().map(ToString::to_string).collect();
        Exclude::new(&patterns).unwrap().hides(Path::new(path))
    }

    #[test]
    fn patterns_are_those_of_gitignore() {
        assert!(hidden(&["*.safetensors"], "weights/a.safetensors"));
        assert!(!hidden(&["*.safetensors"], "weights/a.json"));
        assert!(hidden(&["weights/"], "weights/deep/a.json"));
        assert!(hidden(&["/README.md"], "README.md"));
        assert!(!hidden(&["/README.md"], "docs/README.md"));
        assert!(!hidden(&["*.json", "!config.json"], "config.json"));
        assert!(hidden(&["!config.json", "*.json"], "config.json"), "the last one counts");
        assert!(!hidden(&["weights/", "!weights/a.json"], "weights/a.json"));
        assert!(!hidden(&[], "a"));
    }

    #[test]
    fn patterns_that_mean_nothing_are_refused() {
        let refused = |pattern: &str| Exclude::new(&[pattern.to_owned()]).unwrap_err();
        assert!(matches!(refused("a[b"), ExcludeError::Pattern { .. }));
        assert!(matches!(refused(" "), ExcludeError::Pattern { .. }));
        assert!(matches!(refused("a\nb"), ExcludeError::Pattern { .. }));
        assert_eq!(refused(&"a".repeat(1025)), ExcludeError::TooLong(1025));
        let many = vec!["a".to_owned(); MAX_PATTERNS + 1];
        assert_eq!(Exclude::new(&many).unwrap_err(), ExcludeError::TooMany(MAX_PATTERNS + 1));
    }

    #[test]
    fn fuzz_patterns_are_refused_or_say_something_of_every_path() {
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&[b"weights/**/*.bin\0!config.json\0a/b"], input);
            let text = String::from_utf8_lossy(&bytes);
            let mut parts = text.split('\0').map(str::to_owned);
            let path = parts.next_back().unwrap_or_default();
            let patterns: Vec<_> = parts.collect();
            let path = path.trim_start_matches('/');
            if let Ok(exclude) = Exclude::new(&patterns) {
                let _ = exclude.hides(Path::new(path));
            }
        });
    }
}
