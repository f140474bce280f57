//! WeightFS, the daemon and its command line: containerd's snapshots service and models, over
//! one mount of lazily fetched layers.

pub mod activity;
pub mod bind;
pub mod cache;
pub mod cli;
pub mod client;
pub mod config;
pub mod containerd;
pub mod control;
pub mod cri;
pub mod csi;
pub mod daemon;
#[cfg(test)]
mod documents;
pub mod filter;
pub mod fluid;
pub mod handover;
pub mod images;
pub mod index;
pub mod indexes;
pub mod keeper;
pub mod layers;
pub mod logging;
pub mod metadata;
pub mod metrics;
pub mod model_image;
pub mod models;
pub mod node;
pub mod owner;
pub mod picture;
pub mod prepare;
pub mod profiles;
pub mod publish;
pub mod reason;
pub mod references;
pub mod rpull;
pub mod snapshots;
pub mod socket;
mod traces;
pub mod trees;
pub mod volumes;
pub mod web;
