//! Where a registry sends us for a blob: a URL of its storage, mostly a signed one that holds for a
//! while. Asking there at once saves a round trip for each range.
//!
//! Invariants: nothing of ours but the range goes to another host; the URL appears in no log and no
//! error, for who has it has access.

use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
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
    let (mut spans, mut ends, mut signed_at) = (vec![], vec![], None);
    for (name, value) in url.query_pairs() {
        match &*name.to_ascii_lowercase() {
            // AWS Signature Version 4, Google Cloud Storage V4, Alibaba Cloud OSS V4: for so many
            // seconds since so and so.
            "x-amz-expires" | "x-goog-expires" | "x-oss-expires" => spans.extend(seconds(&value)),
            "x-amz-date" | "x-goog-date" | "x-oss-date" => signed_at = date(&value),
            // AWS Signature Version 2, CloudFront, Google Cloud Storage V2 and others: seconds
            // since 1970.
            "expires" => ends.extend(seconds(&value).and_then(|end| UNIX_EPOCH.checked_add(end))),
            // Azure Storage (shared access signatures, "signedExpiry").
            "se" => ends.extend(date(&value)),
            _ => {}
        }
    }
    // A registry may hand out what it signed a while ago. Where our clock is behind, that tells
    // nothing, and what is left is no more than the whole.
    let signed = |span: &Duration| signed_at?.checked_add(*span);
    ends.extend(spans.iter().filter_map(signed));
    let left = ends.into_iter().map(|end| end.duration_since(now).unwrap_or_default());
    left.chain(spans).fold(MAX_AGE, Duration::min)
}

fn seconds(text: &str) -> Option<Duration> {
    text.parse().ok().map(Duration::from_secs)
}

/// A time of ISO 8601, in its long or its short form; a day alone is its beginning.
fn date(text: &str) -> Option<SystemTime> {
    let time = text.parse::<Timestamp>().ok();
    let day = || text.parse::<Date>().ok()?.to_zoned_datetime(TimeZone::UTC).ok();
    time.or_else(|| Some(day()?.timestamp()))?.try_into().ok()
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
        // 1,000,000 s after 1970 is 1970-01-12T13:46:40Z.
        assert_eq!(seconds("X-Amz-Date=19700112T134610Z&X-Amz-Expires=90"), 60);
        assert_eq!(seconds("X-Goog-Expires=90&X-Goog-Date=19700112T134510Z"), 0);
        assert_eq!(
            seconds("X-Amz-Date=19700112T150000Z&X-Amz-Expires=90"),
            90,
            "our clock is behind"
        );
        assert_eq!(seconds("X-Amz-Date=yesterday&X-Amz-Expires=90"), 90);
        assert_eq!(seconds("sv=2024&se=1970-01-12T13%3A48%3A00Z&sig=f"), 80);
        assert_eq!(seconds("se=1970-01-12T13%3A48Z"), 80);
        assert_eq!(seconds("se=1970-01-12"), 0);
        assert_eq!(seconds("se=1970-01-13"), 600);
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
        let samples: [&[u8]; 3] = [
            b"X-Amz-Date=19700112T134610Z&X-Amz-Expires=90",
            b"Expires=1000030&se=1970-01-12T13:48:00Z",
            b"https://user:pw@[::1]:1/x?se=1970-01-13",
        ];
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&samples, input);
            let text = String::from_utf8_lossy(&bytes);
            let base = url("https://registry/v2/a/blobs/b");
            // As it comes: the text of a Location.
            for text in [&*text, &format!("?{text}")] {
                let Ok(place) = base.join(text) else { continue };
                assert!(lifetime(&place, SystemTime::now()) <= MAX_AGE);
                let target = Target::default();
                target.note(&base, &place);
                let kept = target.current(&base);
                assert!(kept.is_none_or(|kept| kept == place && kept.origin() != base.origin()));
            }
        });
    }
}
