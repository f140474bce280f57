//! A blob of a repository as a source: single ranges by GET (distribution-spec, "Pulling blobs";
//! RFC 9110, section 14).

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use reqwest::header::{CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Response, StatusCode, Url};
use tokio::time::Instant;

use super::body::{Slow, body};
use super::host::{Host, failed_status};
use super::target::{Target, is_stale};
use super::{Failures, Registries, Repository, dragonfly};
use crate::shared::lock;
use crate::source::{ByteStream, Piece, Source};
use crate::{Digest, SourceError, Urgency};

/// How long what a host can't do is believed. Not for good: a proxy that caches has ranges as soon
/// as it has the blob.
const ASK_AGAIN: Duration = Duration::from_secs(60);

/// A body that is cut after this much goes on where it was cut; one that is cut earlier is no
/// progress, and its request is made again after a pause.
const GO_ON_AFTER: u64 = 64 << 10;

/// A blob of a repository.
#[derive(Debug)]
pub(super) struct BlobSource(Arc<RemoteBlob>);

/// What a body that goes on needs of it.
#[derive(Debug)]
struct RemoteBlob {
    registries: Arc<Registries>,
    from: Repository,
    name: String,
    what: String,
    path: String,
    size: u64,
    target: Target,
    limits: Limits,
}

/// What a host can't do for a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Limit {
    /// It gives the whole blob, whatever the range.
    NoRanges,
    /// It doesn't have the blob, but another host may.
    Absent,
}

/// What hosts, by the URL that they were asked at, could not do lately.
#[derive(Debug, Default)]
struct Limits(Mutex<HashMap<Url, (Limit, Instant)>>);

impl Limits {
    fn note(&self, asked: &Url, error: &SourceError) {
        let limit = match error {
            SourceError::NoRanges { .. } => Limit::NoRanges,
            SourceError::NotFound { .. } => Limit::Absent,
            _ => return,
        };
        lock(&self.0).insert(asked.clone(), (limit, Instant::now()));
    }

    fn recent(&self, asked: &Url) -> Option<Limit> {
        let (limit, noted) = *lock(&self.0).get(asked)?;
        (noted.elapsed() < ASK_AGAIN).then_some(limit)
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
        Self(Arc::new(RemoteBlob {
            registries,
            from,
            name,
            what,
            path,
            size,
            target: Target::default(),
            limits: Limits::default(),
        }))
    }
}

/// A range that is being read.
struct Reading {
    blob: Arc<RemoteBlob>,
    body: ByteStream,
    rest: Range<u64>,
    /// What came of this body.
    came: u64,
}

/// The next bytes of a range. Where its body is cut, the next one begins.
async fn next(reading: Option<Reading>) -> Option<(Result<Piece, SourceError>, Option<Reading>)> {
    let mut reading = reading?;
    loop {
        match reading.body.next().await? {
            Ok(piece) => {
                let len = piece.bytes.len() as u64;
                reading.rest.start += len;
                reading.came += len;
                return Some((Ok(piece), Some(reading)));
            }
            Err(error) if error.may_pass() && reading.came >= GO_ON_AFTER => {
                tracing::debug!(%error, "goes on at byte {}", reading.rest.start);
                let Ok(body) = reading.blob.answer(&reading.rest).await else {
                    return Some((Err(error), None));
                };
                (reading.body, reading.came) = (body, 0);
            }
            Err(error) => return Some((Err(error), None)),
        }
    }
}

impl RemoteBlob {
    async fn get(self: Arc<Self>, range: Range<u64>) -> Result<ByteStream, SourceError> {
        if range.is_empty() {
            return Ok(stream::empty().boxed());
        }
        let body = self.answer(&range).await?;
        let reading = Reading { blob: self, body, rest: range, came: 0 };
        Ok(stream::unfold(Some(reading), next).boxed())
    }

    /// From the first host that gives it. One that fails is asked last for a while.
    async fn answer(&self, range: &Range<u64>) -> Result<ByteStream, SourceError> {
        let hosts = self.registries.hosts(&self.from.registry)?;
        let mut able = hosts.in_order().iter().rev().filter(|host| host.can().ranges);
        let last = able.next();
        let slow = if able.next().is_some() { Slow::GiveUp } else { Slow::Bear };
        let mut failures = Failures::default();
        for host in hosts.by_health(|host| host.can().ranges) {
            if let Some(error) = host.rests(&self.from, &self.what) {
                failures.keep(error);
                continue;
            }
            let asked = host.url(&self.from, &self.path)?;
            if let Some(limit) = self.limits.recent(&asked).filter(|limit| match limit {
                Limit::NoRanges => range.start > 0,
                // What nobody has may yet come: the last one is asked each time.
                Limit::Absent => !last.is_some_and(|last| Arc::ptr_eq(last, host)),
            }) {
                failures.keep(self.limited(limit));
                continue;
            }
            match self.answer_from(host, &asked, range, slow).await {
                Ok(body) => return Ok(body),
                // Others would be asked for what it wants to be spared.
                Err(error) if host.is_dragonfly() && error.is_complaint() => return Err(error),
                Err(error) => {
                    self.limits.note(&asked, &error);
                    failures.add(host, error);
                }
            }
        }
        Err(failures.into_error(&self.from.registry))
    }

    async fn answer_from(
        &self,
        host: &Arc<Host>,
        asked: &Url,
        range: &Range<u64>,
        slow: Slow,
    ) -> Result<ByteStream, SourceError> {
        let mut headers = HeaderMap::new();
        // Everybody can give the whole, also who is confused by ranges.
        if *range != (0..self.size) || host.is_dragonfly() {
            let wanted = format!("bytes={}-{}", range.start, range.end - 1);
            let wanted = HeaderValue::try_from(wanted);
            headers.insert(RANGE, wanted.map_err(|error| self.bad(error.to_string()))?);
        }
        if host.is_dragonfly() {
            let (name, value) = dragonfly::expectation(range);
            headers.insert(name, value);
        }
        let answer = self.ask(host, asked, &headers).await?;
        if host.is_dragonfly() {
            dragonfly::check(&self.from, &self.what, &answer)?;
        }
        self.check(&answer, range)?;
        Ok(body(host, &self.from, answer, range.end - range.start, slow))
    }

    /// Asks where the host sent us last, else the host. A URL that its storage honours no more is
    /// asked for again, once.
    async fn ask(
        &self,
        host: &Arc<Host>,
        asked: &Url,
        headers: &HeaderMap,
    ) -> Result<Response, SourceError> {
        let mut again = true;
        if let Some(url) = self.target.current(asked) {
            let answer = host.get_elsewhere(&self.from, &self.what, url.clone(), headers).await;
            let status = answer.as_ref().map(Response::status);
            if !status.is_ok_and(|status| status.is_success()) {
                self.target.forget(&url);
            }
            if !status.is_ok_and(is_stale) {
                return answer;
            }
            again = false;
        }
        let mut answer = host.get(&self.from, &self.what, &self.path, headers).await?;
        // A registry that remembers what it signed may hand out a URL that has ended meanwhile.
        if again && is_stale(answer.status()) && answer.url().origin() != asked.origin() {
            answer = host.get(&self.from, &self.what, &self.path, headers).await?;
        }
        if answer.status().is_success() {
            self.target.note(asked, answer.url());
        }
        Ok(answer)
    }

    /// Whether the answer's body begins with what was asked for.
    fn check(&self, answer: &Response, range: &Range<u64>) -> Result<(), SourceError> {
        match answer.status() {
            StatusCode::PARTIAL_CONTENT => self.check_partial(answer, range),
            StatusCode::OK => self.check_whole(answer, range),
            StatusCode::RANGE_NOT_SATISFIABLE => Err(self.unsatisfiable(answer, range)),
            _ => Err(failed_status(&self.from, &self.what, answer)),
        }
    }

    /// Either the blob is shorter than its descriptor says, and the host says so, or the host can't
    /// do ranges.
    fn unsatisfiable(&self, answer: &Response, range: &Range<u64>) -> SourceError {
        let header = answer.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
        let total = header.and_then(|text| text.trim().strip_prefix("bytes */")?.parse().ok());
        if let Err(wrong) = self.check_size(total) {
            return wrong;
        }
        if *range == (0..self.size) {
            return self.bad("status 416 for a request without a range".into());
        }
        self.limited(Limit::NoRanges)
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
        Err(self.limited(Limit::NoRanges))
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

    fn limited(&self, limit: Limit) -> SourceError {
        let (source_name, what) = (self.name.clone(), self.what.clone());
        match limit {
            Limit::NoRanges => SourceError::NoRanges { source_name, what },
            Limit::Absent => SourceError::NotFound { source_name, what },
        }
    }

    fn bad(&self, message: String) -> SourceError {
        SourceError::BadAnswer { source_name: self.name.clone(), what: self.what.clone(), message }
    }
}

impl Source for BlobSource {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn host(&self) -> &str {
        &self.0.from.registry
    }

    fn fetch(
        &self,
        range: Range<u64>,
        _urgency: Urgency,
    ) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        Box::pin(Arc::clone(&self.0).get(range))
    }
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
