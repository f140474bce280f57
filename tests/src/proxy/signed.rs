//! Signed URLs of storage, each good for a few requests.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use hyper::Uri;
use jiff::Timestamp;

/// Seconds for which a URL says that it is good.
const SECONDS: u64 = 120;

/// What a registry signs and its storage honours: the same in both.
#[derive(Debug, Clone)]
pub struct Signatures {
    uses: u32,
    /// How often each that was given may still be used.
    left: Arc<Mutex<HashMap<usize, u32>>>,
}

impl PartialEq for Signatures {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.left, &other.left)
    }
}

impl Eq for Signatures {}

impl Signatures {
    /// Each is good for so many requests.
    pub fn good_for(uses: u32) -> Self {
        Self { uses, left: Arc::default() }
    }

    /// How many were given.
    pub fn given(&self) -> usize {
        self.left.lock().unwrap().len()
    }

    /// The query of a new signed URL, as AWS has it.
    pub(super) fn sign(&self) -> String {
        let mut left = self.left.lock().unwrap();
        let number = left.len();
        left.insert(number, self.uses);
        let date = Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
        format!("X-Amz-Date={date}&X-Amz-Expires={SECONDS}&X-Amz-Signature={number}")
    }

    /// Whether a request is signed well, for the next time.
    pub(super) fn honour(&self, uri: &Uri) -> bool {
        let number = uri.query().and_then(|query| query.rsplit_once("X-Amz-Signature="));
        let number = number.and_then(|(_, number)| number.parse().ok());
        let mut left = self.left.lock().unwrap();
        let left = number.and_then(|number: usize| left.get_mut(&number));
        left.is_some_and(|left| left.checked_sub(1).map(|rest| *left = rest).is_some())
    }
}
