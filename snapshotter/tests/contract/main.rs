//! The snapshots contract of containerd, line by line, over a real socket and with real mounts.
//! Runs as root, on a file system that overlayfs takes as its upper one.

mod faults;
mod filesystem;
mod filters;
mod handshake;
mod harness;
mod lifecycle;
mod model;
mod mounting;
mod random;
mod restart;
mod subject;
mod updates;
