//! WeightFS: the daemon and its command line.

pub mod cli;
pub mod config;
pub mod rpull;
pub mod trees;
