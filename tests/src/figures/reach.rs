//! What is to be reached, and whether it is.

use serde_json::{Value, json};

use super::{Figures, short};

/// A figure that is to be reached, and how it is judged.
#[derive(Debug)]
pub struct Reach {
    /// What it is.
    pub title: &'static str,
    /// What is reached, and what is to be, from the medians of one run; `None` if it was not
    /// measured.
    pub judge: fn(&Figures) -> Option<Judgement>,
}

/// How a figure stands.
#[derive(Debug)]
pub struct Judgement {
    /// What it is.
    pub found: f64,
    /// What it is to be.
    pub bound: Bound,
}

/// What a value must keep to.
#[derive(Debug, Clone, Copy)]
pub enum Bound {
    /// This or less.
    AtMost(f64),
    /// This or more.
    AtLeast(f64),
}

impl Judgement {
    /// Whether it is as it is to be.
    pub fn reached(&self) -> bool {
        match self.bound {
            Bound::AtMost(limit) => self.found <= limit,
            Bound::AtLeast(limit) => self.found >= limit,
        }
    }

    fn bound(&self) -> String {
        match self.bound {
            Bound::AtMost(limit) => format!("<= {}", short(limit)),
            Bound::AtLeast(limit) => format!(">= {}", short(limit)),
        }
    }
}

/// A figure's median, if it was measured.
pub fn median(figures: &Figures, name: &str) -> Option<f64> {
    figures.get(name).map(|summary| summary.median)
}

/// A figure's median and its bound.
pub fn value(figures: &Figures, name: &str, bound: Bound) -> Option<Judgement> {
    Some(Judgement { found: median(figures, name)?, bound })
}

/// The ratio of two medians and its bound.
pub fn ratio(figures: &Figures, of: &str, to: &str, bound: Bound) -> Option<Judgement> {
    Some(Judgement { found: median(figures, of)? / median(figures, to)?, bound })
}

/// Prints those that were measured.
pub fn print_reaches(reaches: &[Reach], figures: &Figures) {
    println!("\n{:<50} {:>9}  {:>12}", "reach (medians of this run)", "found", "wanted");
    for reach in reaches {
        let Some(judgement) = (reach.judge)(figures) else { continue };
        let word = if judgement.reached() { "reached" } else { "NOT reached" };
        let (found, bound) = (short(judgement.found), judgement.bound());
        println!("{:<50} {found:>9}  {bound:>12}  {word}", reach.title);
    }
}

/// Those that were measured, as a JSON list.
pub fn reaches_json(reaches: &[Reach], figures: &Figures) -> Value {
    let measured = reaches.iter().filter_map(|reach| {
        let judgement = (reach.judge)(figures)?;
        Some(json!({
            "title": reach.title,
            "found": judgement.found,
            "wanted": judgement.bound(),
            "reached": judgement.reached(),
        }))
    });
    measured.collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Kind, Unit, kind};
    use super::*;

    const TIMES: &[Kind] =
        &[kind("ours_s", Unit::Seconds, "ours"), kind("theirs_s", Unit::Seconds, "theirs")];

    #[test]
    fn a_reach_is_judged_from_the_medians_of_the_run() {
        let reach = Reach {
            title: "ours / theirs",
            judge: |f| ratio(f, "ours_s", "theirs_s", Bound::AtMost(0.4)),
        };
        let mut figures = Figures::new(TIMES);
        assert!((reach.judge)(&figures).is_none());
        figures.add("ours_s", 2.0);
        figures.add("theirs_s", 4.0);
        assert!(!(reach.judge)(&figures).unwrap().reached());
        figures.add("theirs_s", 8.0);
        assert!((reach.judge)(&figures).unwrap().reached());
    }
}
