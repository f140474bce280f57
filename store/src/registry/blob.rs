//! A blob of a repository as a source: single ranges by GET (distribution-spec, "Pulling blobs";
//! RFC 9110, section 14).

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt};
use reqwest::header::{CONTENT_ENCODING, CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Response, StatusCode};
use tokio::time::Instant;

use super::host::{Host, failed_status, unreachable};
use super::target::{Target, is_stale};
use super::{Failures, Registries, Repository, dragonfly, health};
use crate::shared::lock;
use crate::source::{ByteStream, Source};
use crate::{Digest, SourceError, Urgency};

/// How long a registry that gave the whole blob for a range is not asked for another one. Not for
/// good: a proxy that caches has ranges as soon as it has the blob.
const ASK_AGAIN: Duration = Duration::from_secs(60);

/// A blob of a repository.
#[derive(Debug)]
pub(super) struct BlobSource {
    registries: Arc<Registries>,
    from: Repository,
    name: String,
    what: String,
    path: String,
    size: u64,
    target: Target,
    whole: Whole,
}

/// When the registry last gave the whole blob for a range.
#[derive(Debug, Default)]
struct Whole(Mutex<Option<Instant>>);

impl Whole {
    fn note(&self) {
        *lock(&self.0) = Some(Instant::now());
    }

    fn is_recent(&self) -> bool {
        lock(&self.0).is_some_and(|noted| noted.elapsed() < ASK_AGAIN)
    }
}

impl BlobSource {
    pub(super) fn new(
        registries: Arc<Registries>,
        from: Repository,
        digest: Digest,
        size: u64,
    ) -> Self {
        let (name, what, path) =
            (from.to_string(), format!("blob {digest}"), format!("blobs/{digest}"));
        Self {
            registries,
            from,
            name,
            what,
            path,
            size,
            target: Target::default(),
            whole: Whole::default(),
        }
    }

    /// From the first host that gives it. One that fails is asked last for a while.
    async fn get(&self, range: Range<u64>) -> Result<ByteStream, SourceError> {
        if range.is_empty() {
            return Ok(stream::empty().boxed());
        }
        if range.start > 0 && self.whole.is_recent() {
            return Err(self.no_ranges());
        }
        let hosts = self.registries.hosts(&self.from.registry)?;
        let mut failures = Failures::default();
        for host in health::by_health(hosts.iter().filter(|host| host.can().ranges)) {
            match self.get_from(host, &range).await {
                Ok(body) => return Ok(body),
                // Others would be asked for what it wants to be spared.
                Err(error) if host.is_dragonfly() && error.is_complaint() => return Err(error),
                Err(error) => failures.add(host, error),
            }
        }
        let error = failures.into_error(&self.from.registry);
        if matches!(error, SourceError::NoRanges { .. }) {
            self.whole.note();
        }
        Err(error)
    }

    async fn get_from(
        &self,
        host: &Arc<Host>,
        range: &Range<u64>,
    ) -> Result<ByteStream, SourceError> {
        let wanted = format!("bytes={}-{}", range.start, range.end - 1);
        let wanted = HeaderValue::try_from(wanted).map_err(|error| self.bad(error.to_string()))?;
        let mut headers = HeaderMap::from_iter([(RANGE, wanted)]);
        if host.is_dragonfly() {
            let (name, value) = dragonfly::expectation(range);
            headers.insert(name, value);
        }
        let answer = self.ask(host, &headers).await?;
        if host.is_dragonfly() {
            dragonfly::check(&self.from, &self.what, &answer)?;
        }
        self.check(&answer, range)?;
        Ok(self.body(host, answer, range.end - range.start))
    }

    /// Asks where the host sent us last, else the host.
    async fn ask(&self, host: &Arc<Host>, headers: &HeaderMap) -> Result<Response, SourceError> {
        let asked = host.url(&self.from, &self.path)?;
        if let Some(url) = self.target.current(&asked) {
            let answer = host.get_elsewhere(&self.from, &self.what, url.clone(), headers).await;
            let status = answer.as_ref().map(Response::status);
            if !status.is_ok_and(|status| status.is_success()) {
                self.target.forget(&url);
            }
            if !status.is_ok_and(is_stale) {
                return answer;
            }
        }
        let answer = host.get(&self.from, &self.what, &self.path, headers).await?;
        if answer.status().is_success() {
            self.target.note(&asked, answer.url());
        }
        Ok(answer)
    }

    /// Whether the answer's body begins with what was asked for.
    fn check(&self, answer: &Response, range: &Range<u64>) -> Result<(), SourceError> {
        if let Some(encoding) = answer.headers().get(CONTENT_ENCODING)
            && encoding != "identity"
        {
            return Err(self.bad(format!("it comes with Content-Encoding {encoding:?}")));
        }
        match answer.status() {
            StatusCode::PARTIAL_CONTENT => self.check_partial(answer, range),
            StatusCode::OK => self.check_whole(answer, range),
            StatusCode::RANGE_NOT_SATISFIABLE => Err(self.bad(format!(
                "it is shorter than the {} bytes of its descriptor: range {}-{} is not there",
                self.size,
                range.start,
                range.end - 1
            ))),
            _ => Err(failed_status(&self.from, &self.what, answer)),
        }
    }

    fn check_partial(&self, answer: &Response, range: &Range<u64>) -> Result<(), SourceError> {
        let header = answer.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
        let given = header.and_then(ContentRange::parse);
        let Some(given) = given else {
            return Err(self.bad(format!("status 206 with Content-Range {header:?}")));
        };
        self.check_size(given.total)?;
        if given.first != range.start || given.last != range.end - 1 {
            return Err(self.bad(format!(
                "asked for bytes {}-{}, got {}-{}",
                range.start,
                range.end - 1,
                given.first,
                given.last
            )));
        }
        Ok(())
    }

    /// A server may ignore a range. Its answer is of use where the range begins with the blob:
    /// what follows it is not read.
    fn check_whole(&self, answer: &Response, range: &Range<u64>) -> Result<(), SourceError> {
        self.check_size(answer.content_length())?;
        if range.start == 0 {
            return Ok(());
        }
        Err(self.no_ranges())
    }

    fn check_size(&self, actual: Option<u64>) -> Result<(), SourceError> {
        match actual {
            Some(actual) if actual != self.size => {
                Err(self
                    .bad(format!("it has {actual} bytes, but its descriptor says {}", self.size)))
            }
            _ => Ok(()),
        }
    }

    fn body(&self, host: &Arc<Host>, answer: Response, wanted: u64) -> ByteStream {
        let from = self.from.clone();
        let pieces = answer
            .bytes_stream()
            .map(move |piece| piece.map_err(|error| unreachable(&from, error)));
        let name = self.name.clone();
        let pieces = exactly(pieces.boxed(), wanted, move |missing| SourceError::Unreachable {
            source_name: name.clone(),
            message: format!("the body ended {missing} bytes early"),
        });
        let host = Arc::clone(host);
        let noted = pieces.inspect(move |piece| match piece {
            Ok(_) => host.health().well(),
            Err(_) => host.health().failed(),
        });
        noted.boxed()
    }

    fn no_ranges(&self) -> SourceError {
        let (source_name, what) = (self.name.clone(), self.what.clone());
        SourceError::NoRanges { source_name, what }
    }

    fn bad(&self, message: String) -> SourceError {
        SourceError::BadAnswer { source_name: self.name.clone(), what: self.what.clone(), message }
    }
}

impl Source for BlobSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn host(&self) -> &str {
        &self.from.registry
    }

    fn fetch(
        &self,
        range: Range<u64>,
        _urgency: Urgency,
    ) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        Box::pin(self.get(range))
    }
}

/// The first `wanted` bytes of `pieces`, or what came of them and an error.
fn exactly(
    pieces: BoxStream<'static, Result<Bytes, SourceError>>,
    wanted: u64,
    cut: impl Fn(u64) -> SourceError + Send + 'static,
) -> ByteStream {
    /// What is still to come; `None` after an error.
    type Rest = Option<(BoxStream<'static, Result<Bytes, SourceError>>, u64)>;
    let start: Rest = Some((pieces, wanted));
    stream::unfold((start, cut), async |(rest, cut)| {
        let (mut pieces, left) = rest?;
        match pieces.next().await {
            Some(Ok(mut piece)) if left > 0 => {
                piece.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                let left = left - piece.len() as u64;
                Some((Ok(piece), (Some((pieces, left)), cut)))
            }
            Some(Err(error)) if left > 0 => Some((Err(error), (None, cut))),
            None if left > 0 => Some((Err(cut(left)), (None, cut))),
            _ => None,
        }
    })
    .boxed()
}

/// A Content-Range (RFC 9110, section 14.4), with the total that it may leave out.
#[derive(Debug, PartialEq, Eq)]
struct ContentRange {
    first: u64,
    last: u64,
    total: Option<u64>,
}

impl ContentRange {
    fn parse(text: &str) -> Option<Self> {
        let (unit, rest) = text.trim().split_once(' ')?;
        let (range, total) = rest.trim().split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            if digits { text.parse::<u64>().ok() } else { None }
        };
        let total = if total == "*" { None } else { Some(number(total)?) };
        let (first, last) = (number(first)?, number(last)?);
        let sound = unit.eq_ignore_ascii_case("bytes") && first <= last;
        sound.then_some(Self { first, last, total })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_strictly() {
        let parsed = |text| ContentRange::parse(text).map(|c| (c.first, c.last, c.total));
        assert_eq!(parsed("bytes 0-9/100"), Some((0, 9, Some(100))));
        assert_eq!(parsed("bytes 5-5/*"), Some((5, 5, None)));
        for bad in ["", "bytes", "bytes */100", "bytes 9-0/100", "bytes 0-9", "items 0-9/100"] {
            assert_eq!(parsed(bad), None, "{bad}");
        }
        for bad in ["bytes +0-9/100", "bytes 0-9/", "bytes 0-99999999999999999999/1"] {
            assert_eq!(parsed(bad), None, "{bad}");
        }
    }

    async fn collect(pieces: &[&'static [u8]], wanted: u64) -> (Vec<u8>, bool) {
        let pieces: Vec<_> = pieces.iter().map(|piece| Ok(Bytes::from_static(piece))).collect();
        let cut = |_| SourceError::NotFound { source_name: "".into(), what: "".into() };
        let mut got = exactly(stream::iter(pieces).boxed(), wanted, cut);
        let (mut bytes, mut failed) = (vec![], false);
        while let Some(piece) = got.next().await {
            match piece {
                Ok(piece) => bytes.extend_from_slice(&piece),
                Err(_) => failed = true,
            }
        }
        (bytes, failed)
    }

    #[tokio::test]
    async fn a_stream_gives_what_was_asked_for_or_an_error() {
        assert_eq!(collect(&[b"abc", b"def"], 6).await, (b"abcdef".to_vec(), false));
        assert_eq!(collect(&[b"abc", b"def"], 4).await, (b"abcd".to_vec(), false));
        assert_eq!(collect(&[b"abc"], 4).await, (b"abc".to_vec(), true));
        assert_eq!(collect(&[], 0).await, (vec![], false));
    }

    #[test]
    fn fuzz_content_ranges_are_refused_or_sound() {
        let samples: [&[u8]; 2] = [b"bytes 0-9/100", b"bytes 5-5/*"];
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&samples, input);
            let Ok(text) = std::str::from_utf8(&bytes) else { return };
            if let Some(range) = ContentRange::parse(text) {
                assert!(range.first <= range.last);
            }
        });
    }
}
