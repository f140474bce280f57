//! Requests that are short: manifests, configs, and whether a repository gives a blob at all. Each is
//! tried again where that may help, at each host of the registry, within one timeout.
//!
//! Invariant: what is read is bounded by what was asked for, and compared with its digest where that
//! is known.

use backon::Retryable as _;
use bytes::{Bytes, BytesMut};
use reqwest::header::HeaderMap;
use reqwest::{Method, Response, StatusCode};
use tokio::time::{Duration, Instant};

use super::host::{failed_status, unreachable};
use super::{Failures, Host, MAX_TIMEOUTS_IN_LINE, MAX_TRIES, Registries, Repository, Right};
use crate::shared::{jittered, lock};
use crate::{Digest, SourceError};

/// Something small that is asked for: what errors call it, and how large it may be.
pub(super) struct Asked<'a> {
    pub(super) from: &'a Repository,
    pub(super) what: String,
    pub(super) limit: u64,
    /// Whether the answer can be checked against a digest.
    pub(super) checked: bool,
}

/// What of it is wanted.
#[derive(Clone, Copy)]
enum How<'a> {
    /// All, asked for with these headers.
    Whole(&'a HeaderMap),
    /// Whether it is there.
    Presence,
}

impl Registries {
    /// Learns whether that repository gives a blob to us, without its bytes: those may come from the
    /// cache or from another node, which know nothing of rights. Once for each blob of a repository:
    /// whoever may not read the repository any more is not given its manifest.
    ///
    /// # Errors
    /// When it does not give it, or the registry can't be reached.
    pub async fn confirm(&self, from: &Repository, digest: Digest) -> Result<(), SourceError> {
        let key = (from.clone(), digest);
        if lock(&self.confirmed).get(&key).is_some() {
            return Ok(());
        }
        let asked = Asked { from, what: format!("blob {digest}"), limit: 0, checked: true };
        let path = format!("blobs/{digest}");
        self.at_each_host(&asked, &path, How::Presence).await?;
        lock(&self.confirmed).put(key, ());
        Ok(())
    }

    /// Takes for granted what [`Registries::confirm`] learned before a restart.
    pub fn assume_confirmed(&self, from: &Repository, digest: Digest) {
        lock(&self.confirmed).put((from.clone(), digest), ());
    }

    /// A whole body.
    pub(super) async fn get_small(
        &self,
        asked: &Asked<'_>,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<(HeaderMap, Bytes), SourceError> {
        self.at_each_host(asked, path, How::Whole(headers)).await
    }

    /// Asks until an answer is there, again where that may help, all within the timeout.
    async fn at_each_host(
        &self,
        asked: &Asked<'_>,
        path: &str,
        how: How<'_>,
    ) -> Result<(HeaderMap, Bytes), SourceError> {
        let unreachable = |message: String| {
            Err(SourceError::Unreachable { source_name: asked.from.to_string(), message })
        };
        let hosts = self.hosts(&asked.from.registry)?;
        let Some(_turn) = hosts.turn(self.options.timeout * MAX_TIMEOUTS_IN_LINE).await else {
            return unreachable(format!(
                "too many requests wait before the one for {}",
                asked.what
            ));
        };
        let once = || self.at_each_host_once(asked, path, how);
        let pauses = backon::ExponentialBuilder::new()
            .with_min_delay(Duration::from_millis(100))
            .with_max_times(MAX_TRIES - 1)
            .with_jitter();
        let end = Instant::now() + self.options.timeout;
        // As often as the host asks for time, while there is some.
        let after = |error: &SourceError, pause: Option<Duration>| match error.asks_for_rest() {
            None => pause,
            Some(rest) => {
                let pause = jittered(rest).saturating_add(pause.unwrap_or_default());
                (pause < end.saturating_duration_since(Instant::now())).then_some(pause)
            }
        };
        let tries = once.retry(pauses).when(SourceError::may_pass).adjust(after);
        tokio::time::timeout_at(end, tries).await.unwrap_or_else(|_| {
            unreachable(format!("no answer for {} within {:?}", asked.what, self.options.timeout))
        })
    }

    /// One try at each host, until one gives it.
    async fn at_each_host_once(
        &self,
        asked: &Asked<'_>,
        path: &str,
        how: How<'_>,
    ) -> Result<(HeaderMap, Bytes), SourceError> {
        let hosts = self.hosts(&asked.from.registry)?;
        let mut failure = Failures::default();
        for host in hosts.by_health(|host| asked.may_come_from(host)) {
            if let Some(error) = host.rests(asked.from, &asked.what) {
                failure.keep(error);
                continue;
            }
            match asked.of(host, path, how).await {
                Ok(got) => {
                    host.health().well();
                    return Ok(got);
                }
                Err(error) => failure.add(host, error),
            }
        }
        Err(failure.into_error(&asked.from.registry))
    }
}

impl Asked<'_> {
    fn may_come_from(&self, host: &Host) -> bool {
        if self.checked { host.can().pull } else { host.can().resolve }
    }

    pub(super) fn bad(&self, message: String) -> SourceError {
        let source_name = self.from.to_string();
        SourceError::BadAnswer { source_name, what: self.what.clone(), message }
    }

    async fn of(
        &self,
        host: &Host,
        path: &str,
        how: How<'_>,
    ) -> Result<(HeaderMap, Bytes), SourceError> {
        let How::Whole(headers) = how else {
            return self.check_presence(host, path).await.map(|()| Default::default());
        };
        let answer = self.check_status(host.get(self.from, &self.what, path, headers).await?)?;
        let headers = answer.headers().clone();
        self.read(answer).await.map(|bytes| (headers, bytes))
    }

    fn check_status(&self, answer: Response) -> Result<Response, SourceError> {
        match answer.status() {
            StatusCode::OK => Ok(answer),
            _ => Err(failed_status(self.from, &self.what, &answer)),
        }
    }

    /// Asks for the headers of what lies at `path` (OCI distribution-spec, "Checking if content
    /// exists in the registry"). A redirect is a yes: it says where to get it.
    async fn check_presence(&self, host: &Host, path: &str) -> Result<(), SourceError> {
        let url = host.url(self.from, path)?;
        let head = || host.request(self.from, Method::HEAD, url.clone());
        let answer = host.ask(self.from, &self.what, Right::Pull, head).await?;
        if answer.status().is_redirection() {
            return Ok(());
        }
        self.check_status(answer).map(drop)
    }

    async fn read(&self, mut answer: Response) -> Result<Bytes, SourceError> {
        let too_large = || self.bad(format!("it is over the limit of {} bytes", self.limit));
        if answer.content_length().is_some_and(|len| len > self.limit) {
            return Err(too_large());
        }
        let mut bytes = BytesMut::new();
        loop {
            let piece = answer.chunk().await.map_err(|error| unreachable(self.from, error))?;
            let Some(piece) = piece else { return Ok(bytes.freeze()) };
            if bytes.len() as u64 + piece.len() as u64 > self.limit {
                return Err(too_large());
            }
            bytes.extend_from_slice(&piece);
        }
    }

    pub(super) fn check_digest(
        &self,
        bytes: &[u8],
        promised: Digest,
    ) -> Result<Digest, SourceError> {
        let actual = Digest::of(bytes);
        if actual == promised {
            return Ok(actual);
        }
        Err(self.bad(format!("it hashes to {actual}, not to {promised}")))
    }
}
