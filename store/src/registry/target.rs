//! Where a registry sends us for a blob: a URL of its storage, mostly a signed one that holds for a
//! while. Asking there at once saves a round trip for each range.
//!
//! Invariants: nothing of ours but the range goes to another host; the URL appears in no log and no
//! error, for who has it has access.

use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::{StatusCode, Url};
use tokio::time::Instant;

use crate::shared::lock;

/// The longest that a URL is kept, whatever it says of itself.
const MAX_AGE: Duration = Duration::from_secs(600);

/// A URL is given up so long before its end: for a request's way, and clocks that differ.
const MARGIN: Duration = Duration::from_secs(15);

/// The last place that the registry named.
#[derive(Debug, Default)]
pub(super) struct Target(Mutex<Option<Known>>);

#[derive(Clone)]
struct Known {
    /// The question that it answers.
    by: Url,
    url: Url,
    until: Instant,
}

impl fmt::Debug for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Known(..)")
    }
}

impl Target {
    /// Where to ask instead of `asked`, if it is known.
    pub(super) fn current(&self, asked: &Url) -> Option<Url> {
        let known = lock(&self.0).clone()?;
        (known.by == *asked && Instant::now() < known.until).then_some(known.url)
    }

    /// A request for `asked` was answered at `answered`. Only another host is remembered: what the
    /// registry serves itself wants its authentication.
    pub(super) fn note(&self, asked: &Url, answered: &Url) {
        if asked.origin() == answered.origin() {
            return;
        }
        let lifetime = lifetime(answered, SystemTime::now()).saturating_sub(MARGIN);
        if !lifetime.is_zero() {
            let until = Instant::now() + lifetime;
            *lock(&self.0) = Some(Known { by: asked.clone(), url: answered.clone(), until });
        }
    }

    /// `url` is good no more. What another request has found meanwhile stays.
    pub(super) fn forget(&self, url: &Url) {
        let mut known = lock(&self.0);
        if known.as_ref().is_some_and(|known| known.url == *url) {
            *known = None;
        }
    }
}

/// What storage says of a URL that it does not honour any more. The registry has to be asked.
pub(super) fn is_stale(status: StatusCode) -> bool {
    use StatusCode as S;
    matches!(status, S::BAD_REQUEST | S::UNAUTHORIZED | S::FORBIDDEN | S::NOT_FOUND | S::GONE)
}

/// How long a URL holds, by what its signature says.
fn lifetime(url: &Url, now: SystemTime) -> Duration {
    let of = |(name, value): (std::borrow::Cow<'_, str>, std::borrow::Cow<'_, str>)| {
        let name = name.to_ascii_lowercase();
        match &*name {
            // AWS Signature Version 4, Google Cloud Storage V4, Alibaba Cloud OSS V4: seconds.
            "x-amz-expires" | "x-goog-expires" | "x-oss-expires" => {
                value.parse().ok().map(Duration::from_secs)
            }
            // AWS Signature Version 2, CloudFront and others: seconds since 1970.
            "expires" => {
                let end = UNIX_EPOCH.checked_add(Duration::from_secs(value.parse().ok()?))?;
                Some(end.duration_since(now).unwrap_or_default())
            }
            _ => None,
        }
    };
    url.query_pairs().filter_map(of).chain([MAX_AGE]).min().unwrap_or(MAX_AGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        text.parse().unwrap()
    }

    #[test]
    fn a_signature_says_how_long_a_url_holds() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let seconds = |query: &str| lifetime(&url(&format!("https://s/x?{query}")), now).as_secs();
        assert_eq!(seconds("X-Amz-Expires=90&X-Amz-Signature=f"), 90);
        assert_eq!(seconds("X-Goog-Expires=120"), 120);
        assert_eq!(seconds("Expires=1000030&Signature=f"), 30);
        assert_eq!(seconds("Expires=999999"), 0);
        assert_eq!(seconds("X-Amz-Expires=604800"), 600);
        assert_eq!(seconds(""), 600);
        assert_eq!(seconds("Expires=99999999999999999999&X-Amz-Expires=-1"), 600);
    }

    #[tokio::test(start_paused = true)]
    async fn only_another_host_is_remembered_and_not_for_long() {
        let (target, registry) = (Target::default(), url("https://registry/v2/a/blobs/b"));
        target.note(&registry, &url("https://registry/storage/b"));
        assert_eq!(target.current(&registry), None);
        let storage = url("https://storage/b?X-Amz-Expires=60");
        target.note(&registry, &storage);
        assert_eq!(target.current(&registry).as_ref(), Some(&storage));
        assert_eq!(target.current(&url("https://mirror/v2/a/blobs/b")), None);
        target.forget(&url("https://storage/b?older"));
        assert_eq!(target.current(&registry), Some(storage));
        tokio::time::advance(Duration::from_secs(46)).await;
        assert_eq!(target.current(&registry), None);
        target.note(&registry, &url("https://storage/b?X-Amz-Expires=10"));
        assert_eq!(target.current(&registry), None, "it would end too soon to be of use");
    }

    #[test]
    fn a_url_is_never_shown() {
        let target = Target::default();
        target.note(&url("https://registry/b"), &url("https://storage/b?Signature=secret"));
        assert!(!format!("{target:?}").contains("secret"));
    }

    #[test]
    fn fuzz_lifetimes_are_bounded() {
        let samples: [&[u8]; 2] = [b"X-Amz-Expires=90", b"Expires=1000030&se=2"];
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&samples, input);
            let text = format!("https://s/x?{}", String::from_utf8_lossy(&bytes));
            let Ok(url) = text.parse() else { return };
            assert!(lifetime(&url, SystemTime::now()) <= MAX_AGE);
        });
    }
}
