//! How long a server asks to be left alone: Retry-After, in seconds or as a date (RFC 9110, section
//! 10.2.3).

use std::time::{Duration, SystemTime};

use reqwest::header::{DATE, HeaderMap, RETRY_AFTER};

/// What an answer with these headers asks for.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let date = text(DATE).and_then(|date| httpdate::parse_http_date(date.trim()).ok());
    // By the server's clock, where it shows it: ours may be another.
    parse(text(RETRY_AFTER)?, date.unwrap_or_else(SystemTime::now))
}

fn parse(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // More seconds than can be told are many.
        return Some(Duration::from_secs(text.parse().unwrap_or(u64::MAX)));
    }
    let end = httpdate::parse_http_date(text).ok()?;
    Some(end.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    fn asked(pairs: &[(reqwest::header::HeaderName, &str)]) -> Option<u64> {
        let pair = |(name, value): &(_, &str)| {
            (reqwest::header::HeaderName::clone(name), HeaderValue::from_str(value).unwrap())
        };
        retry_after(&pairs.iter().map(pair).collect()).map(|rest| rest.as_secs())
    }

    #[test]
    fn seconds_and_dates_of_each_form_are_understood() {
        assert_eq!(asked(&[(RETRY_AFTER, " 120 ")]), Some(120));
        assert_eq!(asked(&[(RETRY_AFTER, "99999999999999999999")]), Some(u64::MAX));
        for date in [
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun Nov  6 08:49:37 1994",
        ] {
            let now = "Sun, 06 Nov 1994 08:49:07 GMT";
            assert_eq!(asked(&[(RETRY_AFTER, date), (DATE, now)]), Some(30), "{date}");
            assert_eq!(asked(&[(RETRY_AFTER, date)]), Some(0), "it is over");
        }
        for nonsense in ["", "-1", "1.5", "soon"] {
            assert_eq!(asked(&[(RETRY_AFTER, nonsense)]), None, "{nonsense}");
        }
        assert_eq!(asked(&[]), None);
    }

    #[test]
    fn fuzz_what_a_server_asks_for_is_understood_or_passed_over() {
        let samples: [&[u8]; 2] = [b"120", b"Sun, 06 Nov 1994 08:49:37 GMT"];
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&samples, input);
            let Ok(value) = HeaderValue::from_bytes(&bytes) else { return };
            let both = [(RETRY_AFTER, value.clone()), (DATE, value)];
            // By its own clock, the time of its own answer is over.
            let rest = retry_after(&HeaderMap::from_iter(both));
            let seconds = bytes.trim_ascii().iter().all(u8::is_ascii_digit);
            assert!(rest.is_none_or(|rest| rest.is_zero() || seconds));
        });
    }
}
