//! WeightFS: the daemon and its command line.

pub mod config;
