//! The harness of WeightFS's end-to-end tests: real parts, started and stopped by guards.
//!
//! Owns nothing that runs in production. Everything it starts listens on a free port of 127.0.0.1
//! or in a private directory below one [`Area`], and ends with its guard, also when a test panics.
//!
//! Invariant: the harness waits for conditions with a deadline, never for a span of time.

pub mod area;
pub mod bed;
pub mod certificates;
pub mod collector;
pub mod containerd;
pub mod cri;
pub mod csi;
pub mod debian;
pub mod digest;
pub mod figures;
pub mod forward;
pub mod host;
pub mod id_mapped;
pub mod image;
pub mod interrupt;
pub mod json;
pub mod layer;
pub mod many;
pub mod metrics;
pub mod model;
pub mod modelpack;
pub mod network;
pub mod process;
pub mod proxy;
pub mod python;
pub mod readers;
pub mod registry;
pub mod remote;
pub mod sign;
pub mod snapshots;
pub mod tokens;
pub mod tree;
pub mod wait;
pub mod weightfs;

pub use area::Area;
pub use bed::Bed;
pub use certificates::Certificates;
pub use containerd::{Containerd, ContainerdOptions};
pub use forward::Forward;
pub use host::Host;
pub use many::Many;
pub use network::{Megabits, NetHost, Network};
pub use proxy::{Fault, Filters, Proxy, Signatures, Target, Total};
pub use registry::{Registry, RegistryOptions};
pub use remote::{Artifact, Blob, Remote};
pub use sign::Signer;
pub use wait::wait_until;
pub use weightfs::{Daemon, Mounted, Weightfs};
