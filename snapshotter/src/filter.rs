//! containerd's filter language, as List speaks it.
//!
//! A filter is a comma-separated list of selectors, all of which must hold; of several filters
//! one must. A selector is a field (`kind`, `name`, `parent`, `labels.<name>`), alone (the field
//! is there) or with `==`, `!=` or `~=` (a regular expression) and a value. Values and parts of
//! label names may be quoted as Go quotes strings. The grammar and its corners are those of
//! containerd's package `filters`; what it logs and takes for "no match" (a bad regular
//! expression) is an error here.
//!
//! Invariant: no input makes this panic or takes more than linear time and space.

mod parser;

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::Arc;

use regex::Regex;

use crate::metadata::{Index, Record, SNAPSHOT_REF, SnapshotInfo};

/// All filters of a call together, in bytes. containerd's own are one `snapshot.ref` and one name,
/// and names are bounded by 32 KiB.
pub const FILTERS_BYTES_MAX: usize = 128 << 10;

/// A filter that can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("filter {filter:?} is wrong at byte {position}: {problem}")]
pub struct FilterError {
    /// The filter, its beginning if it is long.
    pub filter: String,
    /// Where in the filter, in bytes from 0.
    pub position: usize,
    /// What is wrong there.
    pub problem: String,
}

/// The filters of one List: any of them must match.
#[derive(Debug)]
pub struct Filters(Vec<Filter>);

/// Selectors that must all hold. None of them: everything matches.
#[derive(Debug, Default)]
struct Filter(Vec<Selector>);

#[derive(Debug)]
struct Selector {
    field: Field,
    test: Test,
}

#[derive(Debug, PartialEq, Eq)]
enum Field {
    Kind,
    Name,
    Parent,
    Label(String),
    /// Any other field: containerd takes it for one that is never there.
    Unknown,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filters {
    /// Reads the filters of a call. No filter at all matches everything, as does an empty one.
    pub fn parse(filters: &[String]) -> Result<Filters, FilterError> {
        let mut left = FILTERS_BYTES_MAX;
        let mut parsed = Vec::new();
        for filter in filters {
            let problem = || format!("all filters of a call may have {FILTERS_BYTES_MAX} bytes");
            left = left
                .checked_sub(filter.len())
                .ok_or_else(|| parser::error(filter, filter.len(), problem()))?;
            parsed.push(parser::parse(filter)?);
        }
        if parsed.is_empty() {
            parsed.push(Filter::default());
        }
        Ok(Filters(parsed))
    }

    /// Whether any of the filters matches.
    pub fn matches(&self, info: &SnapshotInfo) -> bool {
        self.0.iter().any(|filter| filter.matches(info))
    }

    /// The snapshots that match, in the order of their names. Those that name a snapshot, or a
    /// `snapshot.ref` with its parent, are found without looking at the others.
    pub(crate) fn select(&self, index: impl Deref<Target = Index>) -> Vec<Arc<Record>> {
        let named: Option<Vec<Vec<Arc<Record>>>> =
            self.0.iter().map(|filter| filter.candidates(&index)).collect();
        let mut candidates: Vec<Arc<Record>> = match named {
            Some(named) => {
                let unique: BTreeMap<String, Arc<Record>> = named
                    .into_iter()
                    .flatten()
                    .map(|record| (record.info.name.clone(), record))
                    .collect();
                unique.into_values().collect()
            }
            None => index.records().cloned().collect(),
        };
        // Matching takes the longer time; changes needn't wait for it.
        drop(index);
        candidates.retain(|record| self.matches(&record.info));
        candidates
    }
}

impl Filter {
    fn matches(&self, info: &SnapshotInfo) -> bool {
        self.0.iter().all(|selector| selector.matches(info))
    }

    /// A superset of what matches, if the filter names it exactly enough for the index.
    fn candidates(&self, index: &Index) -> Option<Vec<Arc<Record>>> {
        if let Some(name) = self.equal(&Field::Name) {
            return Some(index.get(name).into_iter().cloned().collect());
        }
        let reference = self.equal(&Field::Label(SNAPSHOT_REF.to_owned()))?;
        let parent = self.equal(&Field::Parent)?;
        let parent = (!parent.is_empty()).then_some(parent);
        Some(index.targets(reference, parent).cloned().collect())
    }

    fn equal(&self, field: &Field) -> Option<&str> {
        self.0.iter().find_map(|selector| match &selector.test {
            Test::Equal(value) if selector.field == *field => Some(value.as_str()),
            _ => None,
        })
    }
}

impl Selector {
    fn matches(&self, info: &SnapshotInfo) -> bool {
        let value = self.field.of(info);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            // An absent value differs from every value but the empty one, and is matched as empty.
            Test::NotEqual(unwanted) => value.unwrap_or_default() != unwanted,
            Test::Matches(regex) => regex.is_match(value.unwrap_or_default()),
        }
    }
}

impl Field {
    fn from_path(path: &[String]) -> Field {
        match path {
            [field, ..] if field == "kind" => Field::Kind,
            [field, ..] if field == "name" => Field::Name,
            [field, ..] if field == "parent" => Field::Parent,
            [field, label @ ..] if field == "labels" => Field::Label(label.join(".")),
            _ => Field::Unknown,
        }
    }

    fn of<'a>(&self, info: &'a SnapshotInfo) -> Option<&'a str> {
        match self {
            Field::Kind => Some(info.kind.as_str()),
            Field::Name => Some(&info.name),
            Field::Parent => Some(info.parent.as_deref().unwrap_or_default()),
            Field::Label(name) => info.labels.get(name).map(String::as_str),
            Field::Unknown => None,
        }
    }
}

#[cfg(test)]
mod tests;
