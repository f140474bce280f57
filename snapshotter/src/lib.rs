//! The daemon: containerd's snapshots service over lazily mounted layers.

pub mod containerd;
pub mod filter;
pub mod metadata;
pub mod snapshots;
pub mod socket;
