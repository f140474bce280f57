//! Who we are to a registry: credentials, and the tokens they are exchanged for.
//!
//! Access belongs to a repository of a host. It begins without saying anything; what the host wants
//! is known from its first refusal. Then the sources are asked, and what they have is tried in order.
//! A token is renewed when 70 % of its life is over, by one task, while others use it on; one that
//! is refused is renewed once, while others who met the same refusal wait for the outcome.
//!
//! Invariants: one renewal at a time for each host, repository and right. Each request tries each
//! credentials once at the most. What was refused is not tried again for a while, unless the sources
//! have something else meanwhile.

mod challenge;
mod token;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::{Response, StatusCode, Url};
use tokio::time::Instant;

use self::challenge::{Challenge, Realm, challenge};
use self::token::TokenError;
use super::Repository;
use super::clients::Clients;
use super::credentials::{Candidate, Credentials, Found, IDENTITY_TOKEN_USER, Sources};
use crate::SourceError;
use crate::shared::lock;

/// Hundredths of a token's life after which it is renewed.
const RENEW_AT_PERCENT: u32 = 70;

/// The least time between two renewals that nobody waits for.
const RENEWAL_PAUSE: Duration = Duration::from_secs(1);

/// How long the same credentials are not tried again after a refusal; each more doubles it. Accounts
/// are locked for less.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// What is to be done in a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Right {
    Pull,
    Push,
}

impl Right {
    /// What a token for it is asked for (distribution, "Token Scope Documentation"). A host that
    /// stands for others may have a name of its own for the repository, which its challenge tells.
    fn scope(self, repository: &str, challenged: Option<&str>) -> String {
        match (self, challenged) {
            (Self::Pull, Some(scope)) => scope.to_owned(),
            (Self::Pull, None) => format!("repository:{repository}:pull"),
            (Self::Push, challenged) => {
                // The challenge is of the first request only, which may be a look.
                let named = challenged.and_then(|scope| {
                    let name = scope.strip_prefix("repository:")?.split(' ').next()?;
                    Some(name.rsplit_once(':')?.0)
                });
                format!("repository:{}:pull,push", named.unwrap_or(repository))
            }
        }
    }
}

/// What a request says of us.
#[derive(Clone)]
pub(super) enum Authorization {
    /// Nothing.
    None,
    Bearer(String),
    Basic {
        user: String,
        password: String,
    },
}

impl std::fmt::Debug for Authorization {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Bearer(_) => "Bearer(..)",
            Self::Basic { .. } => "Basic(..)",
        })
    }
}

/// What authenticates with one host.
#[derive(Debug)]
pub(super) struct Authority {
    /// By which name its credentials are known.
    name: String,
    api: Url,
    clients: Arc<Clients>,
    sources: Arc<Sources>,
    timeout: Duration,
}

impl Authority {
    /// `timeout` bounds a request for a token.
    pub(super) fn new(
        name: &str,
        api: &Url,
        clients: Arc<Clients>,
        sources: Arc<Sources>,
        timeout: Duration,
    ) -> Self {
        Self { name: name.to_owned(), api: api.clone(), clients, sources, timeout }
    }

    /// What a host gives for credentials, or for none; `None` if these are of no use with it.
    async fn exchange(
        &self,
        challenge: Option<&Challenge>,
        scope: &str,
        credentials: Option<&Credentials>,
    ) -> Result<Option<(Authorization, Option<Duration>)>, TokenError> {
        let bearer = |token: &str| Authorization::Bearer(token.to_owned());
        let basic = |user: &str, password: &str| {
            let (user, password) = (user.to_owned(), password.to_owned());
            Ok(Some((Authorization::Basic { user, password }, None)))
        };
        match (credentials, challenge) {
            (Some(Credentials::RegistryToken(token)), _) => {
                Ok(Some((bearer(token.reveal()), None)))
            }
            (_, Some(Challenge::Bearer(realm))) => {
                let issued = self.token(realm, scope, credentials).await?;
                Ok(Some((bearer(issued.token.reveal()), Some(issued.lifetime))))
            }
            // A host that says nothing of what it wants takes passwords.
            (Some(Credentials::Password { user, password }), _) => basic(user, password.reveal()),
            (Some(Credentials::IdentityToken(token)), _) => {
                basic(IDENTITY_TOKEN_USER, token.reveal())
            }
            (None, _) => Ok(None),
        }
    }

    async fn token(
        &self,
        realm: &Realm,
        scope: &str,
        credentials: Option<&Credentials>,
    ) -> Result<token::Issued, TokenError> {
        let client = self.clients.for_url(&realm.url).map_err(TokenError::Bad)?;
        let asked = token::ask(client, realm, scope, credentials);
        tokio::time::timeout(self.timeout, asked).await.unwrap_or_else(|_| {
            Err(TokenError::Unreachable(format!("no token within {:?}", self.timeout)))
        })
    }

    /// What the host wants, where a refusal did not say it.
    async fn ask_challenge(&self) -> Result<Option<Challenge>, String> {
        let asked = async {
            let client = self.clients.for_url(&self.api)?;
            let answer = client.get(self.api.clone()).send().await;
            let answer = answer.map_err(|error| super::host::words(&error.without_url()))?;
            challenge(answer.headers(), &self.api)
        };
        let late = |_| Err(format!("no answer within {:?}", self.timeout));
        tokio::time::timeout(self.timeout, asked).await.unwrap_or_else(late)
    }
}

/// What a registry gave us for our credentials.
#[derive(Debug)]
pub(super) struct Grant {
    /// Counts renewals.
    number: u64,
    authorization: Authorization,
    /// Nothing: without any.
    by: Option<Candidate>,
    made: Instant,
    lifetime: Option<Duration>,
}

/// Where a grant is in its life.
#[derive(Debug, PartialEq, Eq)]
enum Age {
    Young,
    /// Good, and to be renewed.
    Due,
    Over,
}

impl Grant {
    pub(super) fn authorization(&self) -> &Authorization {
        &self.authorization
    }

    fn age(&self) -> Age {
        let Some(lifetime) = self.lifetime else { return Age::Young };
        let age = self.made.elapsed();
        if age >= lifetime {
            Age::Over
        } else if age >= lifetime * RENEW_AT_PERCENT / 100 {
            Age::Due
        } else {
            Age::Young
        }
    }
}

/// Access to one repository, with one right.
#[derive(Debug)]
pub(super) struct Access {
    authority: Arc<Authority>,
    from: Repository,
    /// By which names credentials are looked for: a mirror's are its own.
    known_as: Repository,
    right: Right,
    held: Mutex<Held>,
    /// Of whoever renews.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Held {
    grant: Arc<Grant>,
    challenge: Option<Challenge>,
    refusal: Option<Refusal>,
    /// When somebody last began a renewal that nobody waits for.
    renewed: Option<Instant>,
}

/// That nothing of what the sources had was good enough.
#[derive(Debug, Clone)]
struct Refusal {
    candidates: Vec<Candidate>,
    until: Instant,
    pause: Duration,
}

/// What one request has tried.
#[derive(Debug, Default)]
pub(super) struct Tried {
    /// The number of the grant that it began with.
    first: Option<u64>,
    by: Vec<Option<Candidate>>,
}

impl Access {
    pub(super) fn new(authority: Arc<Authority>, from: &Repository, right: Right) -> Self {
        let grant = Grant {
            number: 0,
            authorization: Authorization::None,
            by: None,
            made: Instant::now(),
            lifetime: None,
        };
        let held = Held { grant: Arc::new(grant), challenge: None, refusal: None, renewed: None };
        let known_as = Repository { registry: authority.name.clone(), name: from.name.clone() };
        let (from, held, turn) = (from.clone(), Mutex::new(held), tokio::sync::Mutex::default());
        Self { authority, from, known_as, right, held, turn }
    }

    /// The grant to begin with. One that is over is renewed before.
    pub(super) async fn current(
        self: &Arc<Self>,
        tried: &mut Tried,
        what: &str,
    ) -> Result<Arc<Grant>, SourceError> {
        let mut grant = Arc::clone(&lock(&self.held).grant);
        match grant.age() {
            Age::Young => {}
            Age::Due => self.renew_aside(&grant),
            Age::Over => grant = self.renew_after(grant.number, tried, what).await?,
        }
        tried.first.get_or_insert(grant.number);
        Ok(grant)
    }

    /// An answer to a request with the grant: whether it is to be asked again with another one.
    pub(super) fn is_refused(&self, grant: &Grant, tried: &Tried, answer: &Response) -> bool {
        let again = match answer.status() {
            StatusCode::UNAUTHORIZED => true,
            // Some registries say so of a token that has expired.
            StatusCode::FORBIDDEN => true,
            StatusCode::BAD_REQUEST => {
                !matches!(grant.authorization, Authorization::None)
                    && tried.first == Some(grant.number)
            }
            _ => false,
        };
        if !again && answer.status().as_u16() < 400 {
            lock(&self.held).refusal = None;
        }
        again
    }

    /// A grant that is newer than `refused` and not of credentials that this request has tried.
    pub(super) async fn renew(
        self: &Arc<Self>,
        refused: &Grant,
        answer: &Response,
        tried: &mut Tried,
        what: &str,
    ) -> Result<Arc<Grant>, SourceError> {
        // What it began with may just be old: its credentials are tried again.
        if tried.first != Some(refused.number) {
            tried.by.push(refused.by.clone());
            if let Some(by) = &refused.by {
                self.authority.sources.refused(&by.credentials);
            }
        }
        let found = challenge(answer.headers(), &self.authority.api);
        if let Some(found) = found.map_err(|why| self.bad(what, why))? {
            lock(&self.held).challenge = Some(found);
        }
        self.renew_after(refused.number, tried, what).await
    }

    /// Lets a task renew what is about to end.
    fn renew_aside(self: &Arc<Self>, grant: &Arc<Grant>) {
        let mut held = lock(&self.held);
        if held.renewed.is_some_and(|begun| begun.elapsed() < RENEWAL_PAUSE) {
            return;
        }
        held.renewed = Some(Instant::now());
        let (own, number) = (Arc::clone(self), grant.number);
        tokio::spawn(async move {
            let what = "a token";
            if let Err(error) = own.renew_after(number, &mut Tried::default(), what).await {
                tracing::debug!(%error, "a token can't be renewed yet");
            }
        });
    }

    /// A grant with another number, found or made.
    async fn renew_after(
        self: &Arc<Self>,
        number: u64,
        tried: &mut Tried,
        what: &str,
    ) -> Result<Arc<Grant>, SourceError> {
        let _turn = self.turn.lock().await;
        let (current, refusal) = {
            let held = lock(&self.held);
            (Arc::clone(&held.grant), held.refusal.clone())
        };
        if current.number != number && !tried.by.contains(&current.by) {
            return Ok(current);
        }
        let mut found = self.authority.sources.find(&self.known_as).await;
        let rests = |refusal: &Refusal| {
            refusal.candidates == found.candidates && Instant::now() < refusal.until
        };
        if refusal.as_ref().is_some_and(rests) {
            return Err(self.refused(what, &found));
        }
        // Who was let in last is asked first.
        found.candidates.sort_by_key(|candidate| {
            let by = current.by.as_ref().map(|by| &by.source);
            by != Some(&candidate.source)
        });
        let challenge = self.challenge(what).await?;
        let all = found.candidates.iter().map(Some).chain([None]);
        for by in all.filter(|by| !tried.by.iter().any(|tried| tried.as_ref() == *by)) {
            if let Some((authorization, lifetime)) = self.try_one(by, &challenge, what).await? {
                let (number, made) = (current.number + 1, Instant::now());
                let by = by.cloned();
                let grant = Arc::new(Grant { number, authorization, by, made, lifetime });
                lock(&self.held).grant = Arc::clone(&grant);
                return Ok(grant);
            }
        }
        let pause = refusal.map_or(FIRST_PAUSE, |refusal| (refusal.pause * 2).min(LONGEST_PAUSE));
        let error = self.refused(what, &found);
        let (candidates, until) = (found.candidates, Instant::now() + pause);
        lock(&self.held).refusal = Some(Refusal { candidates, until, pause });
        Err(error)
    }

    async fn challenge(&self, what: &str) -> Result<Option<Challenge>, SourceError> {
        if let Some(known) = lock(&self.held).challenge.clone() {
            return Ok(Some(known));
        }
        let asked = self.authority.ask_challenge().await;
        let asked = asked.map_err(|why| self.bad(what, why))?;
        lock(&self.held).challenge = asked.clone();
        Ok(asked)
    }

    /// What these credentials give; nothing if they are refused.
    async fn try_one(
        &self,
        by: Option<&Candidate>,
        challenge: &Option<Challenge>,
        what: &str,
    ) -> Result<Option<(Authorization, Option<Duration>)>, SourceError> {
        let challenged = match challenge {
            Some(Challenge::Bearer(realm)) => realm.scope.as_deref(),
            _ => None,
        };
        let scope = self.right.scope(&self.from.name, challenged);
        let credentials = by.map(|by| &by.credentials);
        match self.authority.exchange(challenge.as_ref(), &scope, credentials).await {
            Ok(exchanged) => Ok(exchanged),
            Err(TokenError::Refused) => {
                if let Some(by) = by {
                    self.authority.sources.refused(&by.credentials);
                }
                Ok(None)
            }
            Err(TokenError::Unreachable(message)) => {
                Err(SourceError::Unreachable { source_name: self.from.to_string(), message })
            }
            Err(TokenError::Bad(message)) => Err(self.bad(what, message)),
        }
    }

    /// That nothing of what the sources had is good enough.
    fn refused(&self, what: &str, found: &Found) -> SourceError {
        let mut credentials: Vec<_> = found.candidates.iter().map(ToString::to_string).collect();
        if credentials.is_empty() {
            credentials.push("no credentials".into());
        }
        let mut text = credentials.join(" and ");
        if !found.empty.is_empty() {
            text += &format!(" (nothing in {})", found.empty.join(", "));
        }
        for why in &found.failed {
            text += &format!(" ({why})");
        }
        SourceError::Unauthorized {
            source_name: self.from.to_string(),
            what: what.to_owned(),
            credentials: text,
        }
    }

    fn bad(&self, what: &str, message: String) -> SourceError {
        let source_name = self.from.to_string();
        SourceError::BadAnswer { source_name, what: what.to_owned(), message }
    }
}
