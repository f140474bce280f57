//! Lists that come in pages: the Link header that names the next one (RFC 8288; distribution-spec,
//! "Listing Referrers").
//!
//! Invariant: of a link only its query counts. Where the next page is asked for is ours to say, so a
//! link leads to no other host, repository or path.

use reqwest::Url;
use reqwest::header::{HeaderMap, LINK};

/// The query of the next page.
pub(super) fn next_page(headers: &HeaderMap) -> Option<String> {
    let values = headers.get_all(LINK).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(links).find(|link| link.is_next()).and_then(|link| query(link.target))
}

/// A link with its parameters.
struct Link<'a> {
    target: &'a str,
    parameters: &'a str,
}

impl Link<'_> {
    fn is_next(&self) -> bool {
        outside_quotes(self.parameters, ';').any(|parameter| {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let relations = value.trim().trim_matches('"').split_ascii_whitespace();
            name.trim().eq_ignore_ascii_case("rel")
                && relations.into_iter().any(|relation| relation.eq_ignore_ascii_case("next"))
        })
    }
}

/// The links of a header: `<target>; parameters`, with commas between them.
fn links(text: &str) -> impl Iterator<Item = Link<'_>> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (_, behind) = rest.split_once('<')?;
        let (target, behind) = behind.split_once('>')?;
        let parameters = outside_quotes(behind, ',').next().unwrap_or("");
        rest = behind.get(parameters.len()..).unwrap_or("");
        Some(Link { target, parameters })
    })
}

/// What is between separators that are not inside quotes.
fn outside_quotes(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    text.split(move |character| {
        quoted ^= character == '"';
        character == separator && !quoted
    })
}

/// The query of a link's target, without what every request gets anyway.
fn query(target: &str) -> Option<String> {
    let mut url = Url::parse("http://registry/").ok()?.join(target).ok()?;
    let pairs: Vec<_> = url.query_pairs().filter(|(name, _)| name != "ns").collect();
    let pairs: Vec<_> = pairs.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect();
    url.query_pairs_mut().clear().extend_pairs(pairs);
    url.query().filter(|query| !query.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    fn next(values: &[&str]) -> Option<String> {
        let values = values.iter().map(|value| (LINK, HeaderValue::from_str(value).unwrap()));
        let mut headers = HeaderMap::new();
        for (name, value) in values {
            headers.append(name, value);
        }
        next_page(&headers)
    }

    #[test]
    fn the_next_page_is_found_among_other_links() {
        assert_eq!(
            next(&["</v2/a/referrers/d?n=2&last=x>; rel=\"next\""]),
            Some("n=2&last=x".into())
        );
        assert_eq!(next(&["<https://other/else?last=x>;rel=next"]), Some("last=x".into()));
        assert_eq!(
            next(&[
                "<?a=1>; rel=\"prev\"; title=\"x, <?b=2>; rel=next\", <?c=3,4>; REL=\"last Next\""
            ]),
            Some("c=3%2C4".into())
        );
        assert_eq!(
            next(&["<?a=1>; rel=prev", "<?a=2&ns=docker.io>; rel=next"]),
            Some("a=2".into())
        );
        for none in
            ["", "<", "<>", "?a=1; rel=next", "<?a=1>", "<?a=1>; rel=nextone", "<x>; rel=next"]
        {
            assert_eq!(next(&[none]), None, "{none}");
        }
    }

    #[test]
    fn fuzz_links_lead_nowhere_else() {
        let samples: [&[u8]; 2] = [
            b"</v2/a/referrers/d?n=2&last=x>; rel=\"next\"",
            b"<?a=1>; rel=\"prev\"; title=\"x, <?b=2>\", <https://u:p@other?c=3#f>; REL=\"last Next\"",
        ];
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&samples, input);
            let Ok(value) = HeaderValue::from_bytes(&bytes) else { return };
            let Some(query) = next_page(&HeaderMap::from_iter([(LINK, value)])) else { return };
            let base = Url::parse("https://registry/v2/a/").unwrap();
            let next = base.join(&format!("referrers/d?{query}")).unwrap();
            assert_eq!(next.path(), "/v2/a/referrers/d");
            assert_eq!((next.origin(), next.fragment()), (base.origin(), None));
        });
    }
}
