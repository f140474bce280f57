//! In which order what nobody waits for is fetched: every other request in the order of the file,
//! as readers will want it; the others at random from what comes next, each node elsewhere. Nodes
//! that load the same thing at the same time then have something for each other.

/// How far ahead. Simulated with 16 to 128 and without end: when nodes ask for few groups at once,
/// they have too little for each other; when they ask for all at once, the registry gives a little
/// of each at a time, and all wait.
const REACH: usize = 32;

/// See the module.
#[derive(Debug, Clone)]
pub struct Scatter {
    random: fastrand::Rng,
    in_order: bool,
}

impl Scatter {
    /// Of a node; each needs a seed of its own.
    pub fn new(seed: u64) -> Self {
        Self { random: fastrand::Rng::with_seed(seed), in_order: false }
    }

    /// Which of `count` things is next.
    pub fn next(&mut self, count: usize) -> usize {
        self.in_order = !self.in_order;
        if self.in_order || count == 0 { 0 } else { self.random.usize(..count.min(REACH)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_other_is_the_first_and_nodes_differ_in_the_rest() {
        let picks = |seed| {
            let mut scatter = Scatter::new(seed);
            (0..100).map(|_| scatter.next(1000)).collect::<Vec<_>>()
        };
        let (one, other) = (picks(1), picks(2));
        assert!(one.iter().step_by(2).all(|pick| *pick == 0));
        assert_eq!(one, picks(1));
        let same = one.iter().zip(&other).filter(|(a, b)| a == b).count();
        assert!((50..60).contains(&same), "{same}");
        assert!(one.iter().all(|pick| *pick < REACH));
        assert_eq!(Scatter::new(0).next(0), 0);
    }
}
