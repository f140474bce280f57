//! Asking a token server (distribution, "Token Authentication Specification" and "Token
//! Authentication Implementation"; Docker Registry OAuth2).
//!
//! This is ours because tokens have lifetimes: libraries that ask for one give the bare token.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::BytesMut;
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use serde::Deserialize;

use super::challenge::Realm;
use crate::registry::credentials::{Credentials, IDENTITY_TOKEN_USER, Secret};
use crate::registry::host::words;

/// Largest answer that is read, in bytes.
const MAX_ANSWER_BYTES: usize = 256 << 10;

/// How long a token holds that does not say it (distribution, "expires_in").
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);

/// The longest that a token is used, whatever it says.
const MAX_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// What token servers call us.
const CLIENT_ID: &str = "weightfs";

/// A token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Issued {
    pub(super) token: Secret,
    /// How long it holds from now on.
    pub(super) lifetime: Duration,
}

/// Why there is none.
#[derive(Debug)]
pub(super) enum TokenError {
    /// These credentials get none.
    Refused,
    /// The server can't be reached, or is busy: in words.
    Unreachable(String),
    /// Its answer is none: in words.
    Bad(String),
}

#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<f64>,
    issued_at: Option<String>,
}

/// Asks for a token for `scope`; anonymously, if there are no credentials.
pub(super) async fn ask(
    client: &Client,
    realm: &Realm,
    scope: &str,
    credentials: Option<&Credentials>,
) -> Result<Issued, TokenError> {
    let by_name = |user: &str, password: Option<&Secret>| {
        let mut url = realm.url.clone();
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = &realm.service {
                query.append_pair("service", service);
            }
            for scope in scope.split(' ').filter(|scope| !scope.is_empty()) {
                query.append_pair("scope", scope);
            }
            if password.is_some() {
                query.append_pair("account", user);
            }
        }
        let request = client.get(url);
        match password {
            Some(password) => request.basic_auth(user, Some(password.reveal())),
            None => request,
        }
    };
    match credentials {
        None => read(by_name("", None)).await,
        Some(Credentials::Password { user, password }) => read(by_name(user, Some(password))).await,
        Some(Credentials::RegistryToken(token)) => {
            Ok(Issued { token: token.clone(), lifetime: MAX_LIFETIME })
        }
        Some(Credentials::IdentityToken(token)) => {
            let answer = send(refresh(client, realm, scope, token)).await?;
            // Servers without OAuth 2 may take it for a password.
            match answer.status() {
                StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => {
                    read(by_name(IDENTITY_TOKEN_USER, Some(token))).await
                }
                _ => issued(answer).await,
            }
        }
    }
}

fn refresh(client: &Client, realm: &Realm, scope: &str, token: &Secret) -> RequestBuilder {
    // A form is written as a query is.
    let mut form = realm.url.clone();
    form.query_pairs_mut()
        .clear()
        .append_pair("grant_type", "refresh_token")
        .append_pair("service", realm.service.as_deref().unwrap_or_default())
        .append_pair("scope", scope)
        .append_pair("client_id", CLIENT_ID)
        .append_pair("refresh_token", token.reveal());
    let body = form.query().unwrap_or_default().to_owned();
    let request = client.post(realm.url.clone());
    request.header("content-type", "application/x-www-form-urlencoded").body(body)
}

async fn read(request: RequestBuilder) -> Result<Issued, TokenError> {
    issued(send(request).await?).await
}

async fn send(request: RequestBuilder) -> Result<Response, TokenError> {
    request.send().await.map_err(unreachable)
}

async fn issued(mut answer: Response) -> Result<Issued, TokenError> {
    match answer.status() {
        StatusCode::OK => {}
        StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            return Err(TokenError::Refused);
        }
        status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
            return Err(TokenError::Unreachable(format!("the token server answers {status}")));
        }
        status => return Err(TokenError::Bad(format!("the token server answers {status}"))),
    }
    let mut bytes = BytesMut::new();
    while let Some(piece) = answer.chunk().await.map_err(unreachable)? {
        if bytes.len() + piece.len() > MAX_ANSWER_BYTES {
            return Err(TokenError::Bad("the token server's answer is over 256 KiB".into()));
        }
        bytes.extend_from_slice(&piece);
    }
    parse(&bytes, SystemTime::now())
        .ok_or_else(|| TokenError::Bad("the token server's answer holds no token".into()))
}

fn unreachable(error: reqwest::Error) -> TokenError {
    TokenError::Unreachable(format!("the token server: {}", words(&error.without_url())))
}

fn parse(bytes: &[u8], now: SystemTime) -> Option<Issued> {
    let answer: Answer = serde_json::from_slice(bytes).ok()?;
    let some = |text: Option<String>| text.filter(|text| !text.is_empty());
    let token = some(answer.token).or(some(answer.access_token))?;
    let stated = answer.expires_in.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let whole = stated.filter(|stated| !stated.is_zero()).unwrap_or(DEFAULT_LIFETIME);
    let age = answer.issued_at.and_then(|text| age(&text, now)).unwrap_or_default();
    // An age beyond the lifetime says that clocks differ, and nothing of the token.
    let left = whole.checked_sub(age).filter(|left| !left.is_zero()).unwrap_or(whole);
    Some(Issued { token: Secret::new(token), lifetime: left.min(MAX_LIFETIME) })
}

/// How long ago that was; nothing if it is to come.
fn age(issued_at: &str, now: SystemTime) -> Option<Duration> {
    let at: jiff::Timestamp = issued_at.parse().ok()?;
    let at = UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(at.as_second()).ok()?))?;
    now.duration_since(at).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lifetime(text: &str) -> Option<u64> {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        parse(text.as_bytes(), now).map(|issued| issued.lifetime.as_secs())
    }

    #[test]
    fn lifetimes_are_what_is_left_of_them() {
        assert_eq!(lifetime(r#"{"token":"t","expires_in":300}"#), Some(300));
        assert_eq!(lifetime(r#"{"access_token":"t","expires_in":3}"#), Some(3));
        assert_eq!(lifetime(r#"{"token":"t"}"#), Some(60));
        assert_eq!(lifetime(r#"{"token":"t","expires_in":0}"#), Some(60));
        assert_eq!(lifetime(r#"{"token":"t","expires_in":1e30}"#), Some(60));
        assert_eq!(lifetime(r#"{"token":"t","expires_in":999999999}"#), Some(86_400));
        for (at, left) in [
            // 1,000,000 s after 1970 is 1970-01-12T13:46:40Z.
            ("1970-01-12T13:45:00Z", 200),
            ("1970-01-12T14:45:00+01:00", 200),
            ("1970-01-12T13:00:00Z", 300),
            ("1970-01-12T14:00:00Z", 300),
            ("yesterday", 300),
        ] {
            let text = format!(r#"{{"token":"t","expires_in":300,"issued_at":"{at}"}}"#);
            assert_eq!(lifetime(&text), Some(left), "{at}");
        }
        for none in ["", "{}", r#"{"token":""}"#, r#"{"token":3}"#, "[]"] {
            assert_eq!(lifetime(none), None, "{none}");
        }
    }

    #[test]
    fn fuzz_answers_hold_a_token_with_a_bounded_life_or_none() {
        let samples: [&[u8]; 2] = [
            br#"{"token":"hidden","expires_in":300,"issued_at":"2026-01-02T03:04:05Z"}"#,
            br#"{"access_token":"hidden","refresh_token":"x","expires_in":60}"#,
        ];
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&samples, input);
            let Some(issued) = parse(&bytes, SystemTime::now()) else { return };
            assert!(!issued.lifetime.is_zero() && issued.lifetime <= MAX_LIFETIME);
            assert!(!issued.token.reveal().is_empty());
            assert!(!format!("{issued:?}").contains("hidden"));
        });
    }
}
