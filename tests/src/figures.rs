//! What a benchmark measures: samples by name, their medians, and how they are shown.
//!
//! Invariant: every figure is in the benchmark's catalogue; one that is neither measured nor left
//! out with a reason makes the run fail.

mod reach;
mod text;

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

pub use self::reach::{Bound, Judgement, Reach, median, print_reaches, ratio, reaches_json, value};
pub use self::text::{machine, print_table, short};

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Seconds.
    Seconds,
    /// Milliseconds.
    Milliseconds,
    /// 10⁶ bytes per second.
    Rate,
    /// Bytes.
    Bytes,
    /// 2²⁰ bytes.
    Mebibytes,
    /// Of the native file system's speed; 1 is as fast.
    OfNative,
    /// CPU seconds per 10⁹ bytes.
    SecondsPerGigabyte,
    /// Hundredths of one CPU.
    PercentOfCpu,
    /// Of all bytes of the model.
    Blobs,
    /// Of another figure of the same kind.
    Times,
}

impl Unit {
    /// As it is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Seconds => "s",
            Self::Milliseconds => "ms",
            Self::Rate => "MB/s",
            Self::Bytes => "B",
            Self::Mebibytes => "MiB",
            Self::OfNative => "of native",
            Self::SecondsPerGigabyte => "s/GB",
            Self::PercentOfCpu => "% CPU",
            Self::Blobs => "blobs",
            Self::Times => "times",
        }
    }
}

/// A kind of figure.
#[derive(Debug)]
pub struct Kind {
    /// Its name in the JSON file.
    pub name: &'static str,
    /// What it counts.
    pub unit: Unit,
    /// What it is, for people.
    pub title: &'static str,
}

/// A figure.
pub const fn kind(name: &'static str, unit: Unit, title: &'static str) -> Kind {
    Kind { name, unit, title }
}

/// Median, least and greatest of a figure's samples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// The one in the middle.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
    /// How many there are.
    pub count: usize,
}

/// All samples of a run.
#[derive(Debug)]
pub struct Figures {
    catalogue: &'static [Kind],
    samples: BTreeMap<&'static str, Vec<f64>>,
    left_out: Vec<(&'static str, String)>,
}

impl Figures {
    /// No samples yet of these.
    pub fn new(catalogue: &'static [Kind]) -> Self {
        Self { catalogue, samples: BTreeMap::new(), left_out: Vec::new() }
    }

    /// Every figure, in the order of the table.
    pub fn catalogue(&self) -> &'static [Kind] {
        self.catalogue
    }

    /// Adds a sample.
    ///
    /// # Panics
    /// When the figure is not in the catalogue, or the sample is no number.
    pub fn add(&mut self, name: &str, value: f64) {
        let kind = self.catalogue.iter().find(|kind| kind.name == name);
        let kind = kind.unwrap_or_else(|| panic!("figure {name} is not in the catalogue"));
        assert!(value.is_finite(), "{name} is {value}");
        self.samples.entry(kind.name).or_default().push(value);
    }

    /// How many samples there are of each figure.
    pub fn counts(&self) -> BTreeMap<&'static str, usize> {
        self.samples.iter().map(|(name, samples)| (*name, samples.len())).collect()
    }

    /// The samples that came since there were so many.
    pub fn since(
        &self,
        before: &BTreeMap<&'static str, usize>,
    ) -> impl Iterator<Item = (&'static str, f64)> {
        let known = |name| before.get(name).copied().unwrap_or(0);
        let new = |(name, samples): (&&'static str, &Vec<f64>)| {
            let (name, samples) = (*name, samples.clone());
            samples.into_iter().skip(known(name)).map(move |value| (name, value))
        };
        self.samples.iter().flat_map(new).collect::<Vec<_>>().into_iter()
    }

    /// Says that figures whose names begin so are not measured in this run, and why.
    pub fn leave_out(&mut self, prefix: &'static str, reason: impl Into<String>) {
        self.left_out.push((prefix, reason.into()));
    }

    /// What is left out, and why.
    pub fn left_out(&self) -> &[(&'static str, String)] {
        &self.left_out
    }

    /// A figure's summary, if it was measured.
    pub fn get(&self, name: &str) -> Option<Summary> {
        let mut sorted = self.samples.get(name)?.clone();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        let median = f64::midpoint(sorted[(count - 1) / 2], sorted[count / 2]);
        Some(Summary { median, min: sorted[0], max: sorted[count - 1], count })
    }

    /// Names of figures that should have been measured and were not.
    pub fn missing(&self) -> Vec<&'static str> {
        let wanted =
            |name: &&str| !self.left_out.iter().any(|(prefix, _)| name.starts_with(prefix));
        let names = self.catalogue.iter().map(|kind| kind.name);
        names.filter(|name| !self.samples.contains_key(name)).filter(wanted).collect()
    }

    /// Name -> {median, min, max, n, unit}.
    pub fn to_json(&self) -> Value {
        let mut all = Map::new();
        for kind in self.catalogue {
            let Some(summary) = self.get(kind.name) else { continue };
            let figure = json!({
                "median": summary.median,
                "min": summary.min,
                "max": summary.max,
                "n": summary.count,
                "unit": kind.unit.name(),
            });
            all.insert(kind.name.to_owned(), figure);
        }
        all.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOME: &[Kind] = &[
        kind("touch_ms", Unit::Milliseconds, "one read"),
        kind("touch_bytes", Unit::Bytes, "  bytes that were sent for it"),
        kind("other_s", Unit::Seconds, "what can't be had"),
    ];

    #[test]
    fn the_median_of_an_even_number_is_between_the_middle_two() {
        let mut figures = Figures::new(SOME);
        for value in [4.0, 1.0, 2.0, 10.0] {
            figures.add("other_s", value);
        }
        let summary = Summary { median: 3.0, min: 1.0, max: 10.0, count: 4 };
        assert_eq!(figures.get("other_s"), Some(summary));
    }

    #[test]
    fn what_is_neither_measured_nor_left_out_is_missing() {
        let mut figures = Figures::new(SOME);
        assert_eq!(figures.missing().len(), SOME.len());
        figures.add("touch_ms", 1.0);
        figures.leave_out("other_", "no network");
        assert_eq!(figures.missing(), ["touch_bytes"]);
    }
}
