//! The hosts that answer for a registry, as its files name them at the moment.
//!
//! Invariant: files that change are read again without a restart, as containerd does it. Whatever
//! else is asked for, a bounded number of small things is asked of a registry at once.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

use super::AccessOptions;
use super::credentials::Sources;
use super::endpoints::Found;
use super::files::Stamp;
use super::health;
use super::host::Host;
use crate::SourceError;
use crate::shared::lock;

/// Manifests, configs and the like that are asked for at once: a node that starts mounts much at the
/// same time, and so do its neighbours.
const MAX_SMALL_REQUESTS: usize = 8;

/// How often the files are looked at.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// A connection that gives no byte for this long is dead, whatever the timeout allows.
const MAX_SILENCE: Duration = Duration::from_secs(10);

/// The same where another host can be asked: a few fail-overs fit into a read's deadline.
const FAIL_OVER_AFTER: Duration = Duration::from_secs(3);

/// See the module.
#[derive(Debug)]
pub(super) struct Hosts {
    in_order: Vec<Arc<Host>>,
    small: Semaphore,
    stamp: Stamp,
    looked: Mutex<Instant>,
}

impl Hosts {
    /// Does not talk to them yet.
    pub(super) fn open(
        registry: &str,
        found: Found,
        options: &AccessOptions,
        sources: &Arc<Sources>,
    ) -> Result<Self, SourceError> {
        let AccessOptions { dragonfly, timeout, .. } = options;
        let last = found.endpoints.len().saturating_sub(1);
        let open = |(at, endpoint)| {
            let silence = if at == last { MAX_SILENCE } else { FAIL_OVER_AFTER };
            let silence = silence.min(*timeout);
            Host::new(registry, endpoint, Arc::clone(sources), *timeout, silence).map(Arc::new)
        };
        let hosts = found.endpoints.into_iter().enumerate().map(open);
        let hosts = hosts.collect::<Result<Vec<_>, _>>()?;
        let unusable =
            |message| SourceError::Unreachable { source_name: registry.to_owned(), message };
        let through = dragonfly.iter().flat_map(|dragonfly| {
            let silence = FAIL_OVER_AFTER.min(*timeout);
            let hosts = hosts.iter().filter(|host| host.can().ranges);
            hosts.map(move |host| host.through(dragonfly, silence).map(Arc::new).map_err(unusable))
        });
        let through = through.collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            in_order: through.into_iter().chain(hosts).collect(),
            small: Semaphore::new(MAX_SMALL_REQUESTS),
            stamp: found.stamp,
            looked: Mutex::new(Instant::now()),
        })
    }

    /// Whether the files are as they were, as far as was looked lately.
    pub(super) fn are_current(&self) -> bool {
        {
            let mut looked = lock(&self.looked);
            if looked.elapsed() < LOOK_AGAIN {
                return true;
            }
            *looked = Instant::now();
        }
        self.stamp.is_current()
    }

    /// In the order of the files; before them, the ways through Dragonfly.
    pub(super) fn in_order(&self) -> &[Arc<Host>] {
        &self.in_order
    }

    /// Those that can do it, in the order in which to ask them.
    pub(super) fn by_health(
        &self,
        can: impl Fn(&Host) -> bool,
    ) -> impl Iterator<Item = &Arc<Host>> {
        health::by_health(self.in_order.iter().filter(move |host| can(host)))
    }

    /// The right to ask for something small; `None` if there is none for so long.
    pub(super) async fn turn(&self, patience: Duration) -> Option<SemaphorePermit<'_>> {
        tokio::time::timeout(patience, self.small.acquire()).await.ok()?.ok()
    }
}
