//! Reads that wait for their bytes.

use std::ops::Range;
use std::sync::Arc;

use tokio::time::Instant;

use super::slice::{Hold, Slice};
use super::{Blob, Notice};
use crate::chunk::Place;
use crate::fetch::Failure;
use crate::{ReadError, Verify};

/// A read that waits for its bytes. Nothing is asked for before [`Miss::wait`] is polled.
#[derive(Debug)]
pub struct Miss {
    pub(super) blob: Arc<Blob>,
    pub(super) range: Range<u64>,
    pub(super) place: Place,
    /// `None` if one of its extents was just being evicted.
    pub(super) hold: Option<Hold>,
    pub(super) notice: Notice,
    pub(super) until: Instant,
}

impl Miss {
    /// Fetches what is missing, or waits for whoever does. Ends within the deadline, which began
    /// with the read. If it is dropped, what was asked for is still fetched.
    ///
    /// # Errors
    /// When no source gave the bytes in time, or one refused for good; when the cache files can't
    /// be written; when the blob turned out to be poisoned.
    pub async fn wait(self) -> Result<Slice, ReadError> {
        let Self { blob, range, place, hold, notice, until } = self;
        // From here on nothing of it is evicted before the slice is dropped.
        let hold = match hold {
            Some(hold) => hold,
            None => blob.hold(&place.extents, until).await.ok_or_else(|| blob.too_late())?,
        };
        if blob.shared.verify == Verify::Strict && !blob.compares_all() {
            blob.complete().await?;
            return blob.slice(&range, &place, hold);
        }
        let access = notice.advice.access;
        let (mut loose, tickets) = blob.demand(&place, access, until);
        // After the demand, so that it comes after it in the queue, too.
        blob.follow(&notice);
        let mut waited = blob.fetcher.wait(tickets, until).await;
        // It had joined a request that nobody else waited for.
        while let Err(Failure::NoRoom) = waited {
            let (known, tickets) = blob.demand(&place, access, until);
            loose = known;
            waited = blob.fetcher.wait(tickets, until).await;
        }
        loose.extend(waited.map_err(|failure| failure.into_read_error(&blob))?);
        blob.check_trust()?;
        if loose.is_empty() {
            blob.slice(&range, &place, hold)
        } else {
            blob.assembled(&range, &place, hold, &loose)
        }
    }
}
