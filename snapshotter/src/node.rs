//! The node around the daemon: containerd's configuration, what of the host it needs, and putting
//! it in place.

pub mod containerd;
pub mod doctor;
pub mod install;
