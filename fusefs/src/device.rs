//! The /dev/fuse descriptor of a mount, for what fuser does not do with it.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use fuser::BackingId;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::debug;

use crate::open_files::BackingNumber;

/// Ids that a killed server opened and did not come to record: one for each of its threads. More
/// are never looked for.
const UNRECORDED_MAX: u32 = 64;

/// A descriptor of the connection to the kernel.
#[derive(Debug)]
pub(crate) struct Device(OwnedFd);

impl Device {
    pub(crate) fn new(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    /// Lets go of a cache file.
    pub(crate) fn close_backing(&self, BackingNumber(id): BackingNumber) {
        // SAFETY: the ioctl reads one u32, which outlives the call.
        #[expect(unsafe_code, reason = "fuser closes only the ids that it has itself")]
        let closed = unsafe { ioctl::backing_close(self.0.as_raw_fd(), &id) };
        if let Err(error) = closed {
            debug!(id, %error, "a backing id can't be closed");
        }
    }

    /// Closes ids above `recorded`, the highest that is recorded: nobody knows them. `any` is
    /// a file that can be passed through.
    pub(crate) fn close_unrecorded(&self, recorded: BackingNumber, any: &File) {
        // Ids grow (`idr_alloc_cyclic`): a new one shows how far they have come.
        let Ok(next) = BackingId::create_raw(self, any) else { return };
        let first = recorded.0.saturating_add(1);
        let unrecorded = first..=next.min(first.saturating_add(UNRECORDED_MAX));
        unrecorded.map(BackingNumber).for_each(|id| self.close_backing(id));
        if next > first.saturating_add(UNRECORDED_MAX) || next < first {
            self.close_backing(BackingNumber(next));
        }
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether the kernel still has the mount that a /dev/fuse descriptor is of.
pub fn is_connected(device: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(device, PollFlags::empty())];
    let dead = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
    poll(&mut polled, PollTimeout::ZERO).is_ok()
        && polled[0].revents().is_none_or(|events| !events.intersects(dead))
}

mod ioctl {
    // FUSE_DEV_IOC_BACKING_CLOSE (linux/fuse.h)
    nix::ioctl_write_ptr!(backing_close, 229, 2, u32);
}
