//! containerd's calls, counted by method and by how they ended.

use std::time::Duration;

use weightfs_store::{Counter, Histogram, TIME_BOUNDS};

/// A method of the snapshots service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as the service names them")]
pub enum Method {
    Prepare,
    View,
    Mounts,
    Commit,
    Remove,
    Stat,
    Update,
    List,
    Usage,
    Cleanup,
}

impl Method {
    /// All of them, in the order in which they are declared.
    pub const ALL: [Self; 10] = [
        Self::Prepare,
        Self::View,
        Self::Mounts,
        Self::Commit,
        Self::Remove,
        Self::Stat,
        Self::Update,
        Self::List,
        Self::Usage,
        Self::Cleanup,
    ];

    /// The name in the service's definition.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Prepare => "Prepare",
            Self::View => "View",
            Self::Mounts => "Mounts",
            Self::Commit => "Commit",
            Self::Remove => "Remove",
            Self::Stat => "Stat",
            Self::Update => "Update",
            Self::List => "List",
            Self::Usage => "Usage",
            Self::Cleanup => "Cleanup",
        }
    }
}

/// How a call ended: the gRPC codes that we answer with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as gRPC names them")]
pub enum CallCode {
    Ok,
    NotFound,
    /// Of Prepare the answer that says that a layer is mounted lazily.
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    Internal,
}

impl CallCode {
    /// All of them, in the order in which they are declared.
    pub const ALL: [Self; 6] = [
        Self::Ok,
        Self::NotFound,
        Self::AlreadyExists,
        Self::FailedPrecondition,
        Self::InvalidArgument,
        Self::Internal,
    ];

    /// The name that gRPC's own metrics have for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::NotFound => "NotFound",
            Self::AlreadyExists => "AlreadyExists",
            Self::FailedPrecondition => "FailedPrecondition",
            Self::InvalidArgument => "InvalidArgument",
            Self::Internal => "Internal",
        }
    }
}

#[derive(Debug)]
struct Calls {
    ended: [Counter; CallCode::ALL.len()],
    time: Histogram,
}

/// Calls since the daemon began.
#[derive(Debug)]
pub struct SnapshotCalls(Box<[Calls]>);

impl Default for SnapshotCalls {
    fn default() -> Self {
        let calls = |_| Calls { ended: Default::default(), time: Histogram::new(TIME_BOUNDS) };
        Self(Method::ALL.iter().map(calls).collect())
    }
}

impl SnapshotCalls {
    /// A call is over.
    pub fn count(&self, method: Method, code: CallCode, time: Duration) {
        if let Some(calls) = self.0.get(method as usize) {
            if let Some(ended) = calls.ended.get(code as usize) {
                ended.increment();
            }
            calls.time.observe_time(time);
        }
    }

    /// Calls that ended so.
    pub fn ended(&self, method: Method, code: CallCode) -> u64 {
        let calls = self.0.get(method as usize);
        calls.and_then(|calls| calls.ended.get(code as usize)).map_or(0, Counter::get)
    }

    /// How long calls took.
    pub fn time(&self, method: Method) -> Option<&Histogram> {
        self.0.get(method as usize).map(|calls| &calls.time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_method_and_code() {
        let calls = SnapshotCalls::default();
        for method in Method::ALL {
            for code in CallCode::ALL {
                calls.count(method, code, Duration::from_millis(1));
                assert_eq!(calls.ended(method, code), 1, "{method:?} {code:?}");
            }
            let times = calls.time(method).unwrap().values();
            assert_eq!(times.buckets.iter().sum::<u64>(), 6, "{method:?}");
        }
    }
}
