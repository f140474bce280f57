//! Credentials that somebody told this process when an image was pulled, by repository. In memory
//! only: after a restart nothing is known before somebody speaks again.
//!
//! Bounded: so many repositories, a few credentials for each, the newest first. What nobody has said
//! or used for a week is forgotten.

use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lru::LruCache;
use tokio::time::Instant;

use super::{Credentials, docker};
use crate::registry::Repository;
use crate::shared::lock;

/// Repositories whose credentials are remembered.
const MAX_REPOSITORIES: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// Credentials of one repository: pods may have secrets of their own.
const MAX_OF_A_REPOSITORY: usize = 4;

/// How long they are kept after they were said or used.
const KEPT_FOR: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// See the module.
#[derive(Debug)]
pub struct PullSecrets {
    /// Whether somebody will tell any.
    fed: AtomicBool,
    known: Mutex<LruCache<Repository, Vec<Known>>>,
}

#[derive(Debug)]
struct Known {
    credentials: Credentials,
    until: Instant,
}

/// That credentials were told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Noted {
    /// They were not known before.
    New,
    /// They were known.
    Again,
}

impl Default for PullSecrets {
    fn default() -> Self {
        Self { fed: AtomicBool::default(), known: Mutex::new(LruCache::new(MAX_REPOSITORIES)) }
    }
}

impl PullSecrets {
    /// Somebody will tell secrets: from now on this is a source.
    pub fn feed(&self) {
        self.fed.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_fed(&self) -> bool {
        self.fed.load(Ordering::Relaxed)
    }

    /// Remembers credentials for a repository, before those that it has.
    pub fn note(&self, of: &Repository, credentials: Credentials) -> Noted {
        let mut known = lock(&self.known);
        let mut all = known.pop(of).unwrap_or_default();
        let before = all.len();
        all.retain(|one| one.credentials != credentials);
        let noted = if all.len() < before { Noted::Again } else { Noted::New };
        all.insert(0, Known { credentials, until: Instant::now() + KEPT_FOR });
        all.truncate(MAX_OF_A_REPOSITORY);
        known.put(of.clone(), all);
        noted
    }

    /// Forgets credentials that turned out to be wrong.
    pub fn withdraw(&self, of: &Repository, credentials: &Credentials) {
        if let Some(known) = lock(&self.known).get_mut(of) {
            known.retain(|one| one.credentials != *credentials);
        }
    }

    /// What is known for a repository, the newest first.
    pub(super) fn of(&self, repository: &Repository) -> Vec<Credentials> {
        let now = Instant::now();
        let mut known = lock(&self.known);
        let Some(all) = known.get_mut(repository) else { return vec![] };
        all.retain(|one| now < one.until);
        all.iter_mut().for_each(|one| one.until = now + KEPT_FOR);
        all.iter().map(|one| one.credentials.clone()).collect()
    }
}

impl Credentials {
    /// The name and password in docker's `auth` field, base64 of `name:password`.
    ///
    /// # Errors
    /// In words: it is something else.
    pub fn from_auth(auth: &str) -> Result<Self, String> {
        docker::decoded(auth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::credentials::Secret;

    fn token(text: &str) -> Credentials {
        Credentials::IdentityToken(Secret::new(text.to_owned()))
    }

    fn repository(name: &str) -> Repository {
        Repository { registry: "r".into(), name: name.into() }
    }

    #[tokio::test(start_paused = true)]
    async fn the_newest_are_tried_first_and_the_oldest_forgotten() {
        let secrets = PullSecrets::default();
        let [a, b] = ["a", "b"].map(repository);
        assert_eq!(secrets.of(&a), []);
        for text in ["1", "2", "3", "4", "5"] {
            assert_eq!(secrets.note(&a, token(text)), Noted::New);
        }
        assert_eq!(secrets.of(&a), ["5", "4", "3", "2"].map(token));
        assert_eq!(secrets.note(&a, token("3")), Noted::Again);
        secrets.withdraw(&a, &token("5"));
        assert_eq!(secrets.of(&a), ["3", "4", "2"].map(token));
        assert_eq!(secrets.of(&b), []);
        tokio::time::advance(KEPT_FOR / 2).await;
        assert_eq!(secrets.of(&a).len(), 3, "use keeps them");
        tokio::time::advance(KEPT_FOR / 2).await;
        assert_eq!(secrets.of(&a).len(), 3);
        tokio::time::advance(KEPT_FOR).await;
        assert_eq!(secrets.of(&a), []);
    }

    #[test]
    fn repositories_are_bounded_and_secrets_not_shown() {
        let secrets = PullSecrets::default();
        for number in 0..2 * MAX_REPOSITORIES.get() {
            secrets.note(&repository(&number.to_string()), token("hidden"));
        }
        assert_eq!(lock(&secrets.known).len(), MAX_REPOSITORIES.get());
        assert!(!format!("{secrets:?}").contains("hidden"));
    }
}
