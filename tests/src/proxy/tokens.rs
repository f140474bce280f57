//! Bearer tokens, asked for and given as registries do (distribution, "Token Authentication").

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use hyper::http::response::Builder;
use hyper::{Request, Response, StatusCode};
use weightfs_store::Digest;

use super::State;
use super::answers::simple;
use super::body::Body;
use crate::remote::Credentials;

/// Lets nobody through who has no valid token.
#[derive(Debug)]
pub(super) struct Gate {
    basic: String,
    generation: u64,
    life: Duration,
    begun: Instant,
}

/// How long tokens live where nobody says otherwise.
const LIFE: Duration = Duration::from_secs(300);

impl Gate {
    pub(super) fn new(credentials: Credentials) -> Self {
        let pair = format!("{}:{}", credentials.user, credentials.password);
        let basic = format!("Basic {}", STANDARD.encode(pair));
        Self { basic, generation: 1, life: LIFE, begun: Instant::now() }
    }

    pub(super) fn with_life(self, life: Duration) -> Self {
        Self { life, ..self }
    }

    pub(super) fn expire(&mut self) {
        self.generation += 1;
    }

    /// The answer to a request for a token or to one that may not pass; nothing if it may.
    pub(super) fn check(
        &self,
        request: &Request<Incoming>,
        state: &State,
    ) -> Option<Response<Body>> {
        let given = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        if request.uri().path() == "/token" {
            return Some(self.token(given));
        }
        if given
            .and_then(|given| given.strip_prefix("Bearer "))
            .is_some_and(|token| self.knows(token))
        {
            return None;
        }
        let repository =
            request.uri().path().trim_start_matches("/v2/").split("/manifests/").next();
        let repository = repository?.split("/blobs/").next()?;
        let challenge = format!(
            "Bearer realm=\"http://{}/token\",service=\"test\",scope=\"repository:{repository}:pull\"",
            state.address
        );
        let builder = Response::builder().header(WWW_AUTHENTICATE, challenge);
        Some(refused(builder))
    }

    fn token(&self, given: Option<&str>) -> Response<Body> {
        if given != Some(&self.basic) {
            return refused(Response::builder());
        }
        let token = format!("{}.{}", self.secret(), self.begun.elapsed().as_millis());
        let life = self.life.as_secs();
        let text = serde_json::json!({ "token": token, "expires_in": life }).to_string();
        let builder = Response::builder().header("content-type", "application/json");
        simple(builder, Bytes::from(text)).unwrap()
    }

    /// Whether it was given here, and lives.
    fn knows(&self, token: &str) -> bool {
        let Some((secret, given)) = token.split_once('.') else { return false };
        let given = given.parse().ok().map(Duration::from_millis);
        secret == self.secret() && given.is_some_and(|at| self.begun.elapsed() < at + self.life)
    }

    fn secret(&self) -> String {
        Digest::of(&self.generation.to_be_bytes()).hex()
    }
}

fn refused(builder: Builder) -> Response<Body> {
    let text = r#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#;
    let builder =
        builder.status(StatusCode::UNAUTHORIZED).header("content-type", "application/json");
    simple(builder, Bytes::from_static(text.as_bytes())).unwrap()
}
