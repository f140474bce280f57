//! What a registry wants before it answers: WWW-Authenticate (RFC 9110, section 11.6.1; distribution,
//! "Token Authentication").

use http_auth::parser::ChallengeParser;
use reqwest::Url;
use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// Headers that are looked at, and the bytes of each, at the most.
const MAX_HEADERS: usize = 8;
const MAX_HEADER_BYTES: usize = 8 << 10;

/// Longest scope that is asked for on a registry's word.
const MAX_SCOPE_BYTES: usize = 2048;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// A name and a password with each request.
    Basic,
    /// A token of that server.
    Bearer(Realm),
}

/// Who gives tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Realm {
    pub(super) url: Url,
    pub(super) service: Option<String>,
    pub(super) scope: Option<String>,
}

/// The challenge in an answer, a bearer's before others; `None` if there is none that is understood.
///
/// # Errors
/// In words: a token server that must not be told a secret.
pub(super) fn challenge(headers: &HeaderMap, asked: &Url) -> Result<Option<Challenge>, String> {
    let values = headers.get_all(WWW_AUTHENTICATE).iter().take(MAX_HEADERS);
    let mut found = None;
    for value in values.filter_map(|value| value.to_str().ok()) {
        for challenge in parse(value, asked)? {
            match challenge {
                Challenge::Bearer(_) => return Ok(Some(challenge)),
                Challenge::Basic => found = Some(challenge),
            }
        }
    }
    Ok(found)
}

/// The challenges of one header, as far as they are understood.
fn parse(text: &str, asked: &Url) -> Result<Vec<Challenge>, String> {
    if text.len() > MAX_HEADER_BYTES {
        return Ok(vec![]);
    }
    let mut found = vec![];
    for challenge in ChallengeParser::new(text).map_while(Result::ok) {
        if challenge.scheme.eq_ignore_ascii_case("basic") {
            found.push(Challenge::Basic);
        } else if challenge.scheme.eq_ignore_ascii_case("bearer") {
            let named = |name: &str| {
                let mut params = challenge.params.iter();
                let value = params.find(|(known, _)| known.eq_ignore_ascii_case(name));
                value.map(|(_, value)| value.to_unescaped()).filter(|value| !value.is_empty())
            };
            let Some(url) = named("realm").and_then(|realm| asked.join(&realm).ok()) else {
                continue;
            };
            check(&url, asked)?;
            let scope = named("scope").filter(|scope| scope.len() <= MAX_SCOPE_BYTES);
            found.push(Challenge::Bearer(Realm { url, service: named("service"), scope }));
        }
    }
    Ok(found)
}

/// A secret that a registry may hear over TLS only is not sent to its token server without.
fn check(realm: &Url, asked: &Url) -> Result<(), String> {
    match (asked.scheme(), realm.scheme()) {
        (_, "https") | ("http", "http") => Ok(()),
        _ => Err(format!(
            "its token server is {}://{}, without TLS",
            realm.scheme(),
            realm.authority()
        )),
    }
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    const SCOPED: &str = r#"Bearer realm="https://auth.example.com/token",service="registry",scope="repository:a/b:pull",error="invalid_token""#;

    fn of(values: &[&str]) -> Result<Option<Challenge>, String> {
        let values = values.iter().map(|value| HeaderValue::from_str(value).unwrap());
        let headers = values.map(|value| (WWW_AUTHENTICATE, value)).collect();
        challenge(&headers, &"https://r.example.com/v2/".parse().unwrap())
    }

    fn bearer(url: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        let url = url.parse().unwrap();
        Challenge::Bearer(Realm { url, service: owned(service), scope: owned(scope) })
    }

    #[test]
    fn challenges_are_read_as_registries_write_them() {
        let scoped =
            bearer("https://auth.example.com/token", Some("registry"), Some("repository:a/b:pull"));
        assert_eq!(of(&[SCOPED]), Ok(Some(scoped.clone())));
        assert_eq!(of(&[r#"Basic realm="x""#, SCOPED]), Ok(Some(scoped)));
        assert_eq!(of(&[r#"basic realm="Registry Realm""#]), Ok(Some(Challenge::Basic)));
        let relative = bearer("https://r.example.com/token", None, None);
        assert_eq!(of(&["BEARER REALM=\"/token\""]), Ok(Some(relative)));
        for none in ["", "Digest realm=\"x\"", "Bearer", "Bearer service=\"x\"", "{}", "Bearer ="] {
            assert_eq!(of(&[none]), Ok(None), "{none}");
        }
        assert_eq!(of(&[&"x".repeat(10_000)]), Ok(None));
    }

    #[test]
    fn a_token_server_without_tls_hears_nothing_of_a_registry_with_it() {
        let error = of(&["Bearer realm=\"http://auth.example.com/token\""]).unwrap_err();
        assert!(error.contains("http://auth.example.com"), "{error}");
        assert!(of(&["Bearer realm=\"file:///etc/passwd\""]).is_err());
    }

    #[test]
    fn fuzz_challenges_are_bounded_and_safe() {
        let samples: [&[u8]; 2] =
            [SCOPED.as_bytes(), b"Basic realm=\"a\\\"b\", Bearer realm=\"/t\""];
        let asked = "https://r.example.com/v2/".parse().unwrap();
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&samples, input);
            let Ok(value) = HeaderValue::from_bytes(&bytes) else { return };
            let headers = HeaderMap::from_iter([(WWW_AUTHENTICATE, value)]);
            if let Ok(Some(Challenge::Bearer(realm))) = challenge(&headers, &asked) {
                assert_eq!(realm.url.scheme(), "https");
                assert!(realm.scope.is_none_or(|scope| scope.len() <= MAX_SCOPE_BYTES));
            }
        });
    }
}
