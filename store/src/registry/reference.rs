//! Reading references. The library does it with a regular expression that takes some 20 ms of a
//! core to build, in every process: too long for a command that does nothing else for so long.
//! So references of the usual form are read here, and all others by the library.
//!
//! The library knows no addresses of IPv6 (`[::1]:5000/repository`), which are read here, too.
//!
//! Invariant: what is read here is what the library would read (see the tests), of an address what it
//! would read of a name.

use std::net::Ipv6Addr;

use oci_spec::distribution::{ParseError, Reference};

/// Bytes of a tag at the most (distribution-spec, "Pulling manifests").
const MAX_TAG_BYTES: usize = 128;

/// Bytes of a repository's name at the most, which the library allows.
const MAX_NAME_BYTES: usize = 255;

/// Hexadecimal digits of a sha256.
const SHA256_DIGITS: usize = 64;

/// Reads a reference: `host/repository`, with `:tag`, `@digest` or both behind it.
///
/// # Errors
/// What the library says of texts that are no reference.
pub fn parse_reference(text: &str) -> Result<Reference, ParseError> {
    usual(text).map_or_else(|| text.parse(), Ok)
}

/// A reference that names its registry, and a sha256 if it has a digest.
fn usual(text: &str) -> Option<Reference> {
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (text, None),
    };
    let (registry, rest) = rest.split_once('/')?;
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) => (name, Some(tag)),
        None => (rest, None),
    };
    let sound = (is_registry(registry) || is_ipv6(registry))
        && name.len() <= MAX_NAME_BYTES
        && name.split('/').all(is_component)
        && tag.is_none_or(is_tag)
        && digest.is_none_or(is_sha256);
    if !sound {
        return None;
    }
    let (registry, name) = (registry.to_owned(), name.to_owned());
    Some(match (tag.map(str::to_owned), digest.map(str::to_owned)) {
        (None, None) => Reference::with_tag(registry, name, "latest".to_owned()),
        (Some(tag), None) => Reference::with_tag(registry, name, tag),
        (None, Some(digest)) => Reference::with_digest(registry, name, digest),
        (Some(tag), Some(digest)) => Reference::with_tag_and_digest(registry, name, tag, digest),
    })
}

/// A host with a dot or a port, and not Docker Hub, whose names have short forms.
fn is_registry(text: &str) -> bool {
    let (host, port) = match text.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    let label = |label: &str| {
        let inside = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        inside && !label.is_empty() && !label.starts_with('-') && !label.ends_with('-')
    };
    let number = |port: &str| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    host.split('.').all(label)
        && port.is_none_or(number)
        && (host.contains('.') || port.is_some())
        && !host.ends_with("docker.io")
}

/// An address of IPv6 in brackets, maybe with a port.
fn is_ipv6(text: &str) -> bool {
    let inside = text.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    inside.is_some_and(|(address, rest)| {
        let port = rest.strip_prefix(':');
        let number = |port: &str| port.parse::<u16>().is_ok_and(|port| port > 0);
        address.parse::<Ipv6Addr>().is_ok() && port.map_or(rest.is_empty(), number)
    })
}

/// Lower-case letters and digits, with single separators between them.
fn is_component(text: &str) -> bool {
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let separator = |byte: &u8| matches!(byte, b'.' | b'_' | b'-');
    let bytes = text.as_bytes();
    bytes.iter().all(|byte| alphanumeric(byte) || separator(byte))
        && bytes.first().is_some_and(alphanumeric)
        && bytes.last().is_some_and(alphanumeric)
        && !bytes.windows(2).any(|pair| pair.iter().all(separator))
}

fn is_tag(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= MAX_TAG_BYTES
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|byte| word(byte) || matches!(byte, b'.' | b'-'))
}

fn is_sha256(text: &str) -> bool {
    text.strip_prefix("sha256:").is_some_and(|hex| {
        hex.len() == SHA256_DIGITS && hex.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:f338e13524cf74c04cefcbd19e8f625e65aa35831bbd8b9ae24aa7d1a6e8bd19";

    #[test]
    fn the_usual_is_read_here_and_as_the_library_reads_it() {
        for name in ["localhost:5000/models/a.b", "127.0.0.1:1/m", "ghcr.io/org/llama-3_8b/x"] {
            for rest in ["", ":v1", ":_X.y-z", &format!("@{DIGEST}"), &format!(":v1@{DIGEST}")] {
                let text = format!("{name}{rest}");
                assert_eq!(usual(&text), Some(text.parse().unwrap()), "{text}");
            }
        }
    }

    #[test]
    fn the_unusual_is_the_librarys() {
        for text in ["busybox", "org/model:v1", "docker.io/model", "localhost/m", "a.b/c__d"] {
            assert_eq!(usual(text), None, "{text}");
            assert!(parse_reference(text).is_ok(), "{text}");
        }
        for text in ["", "a.b/", "a.b/C", "a.b:x/c", "a.b/c:", "a.b/c@sha256:00", "-a.b/c"] {
            assert!(parse_reference(text).is_err(), "{text}");
        }
    }

    #[test]
    fn addresses_of_ipv6_are_registries() {
        for text in ["[::1]:5000/models/a:v1", "[2001:db8::7]/m", "[fe80::1]:443/a/b"] {
            let reference = parse_reference(text).unwrap();
            assert_eq!(reference.registry(), text.split_once('/').unwrap().0);
            assert!(reference.whole().starts_with(text), "{}", reference.whole());
        }
        for text in
            ["[::1]:/m", "[::1]:0/m", "[::1]5000/m", "[::g]/m", "::1/m", "[1.2.3.4]/m", "[]/m"]
        {
            assert!(parse_reference(text).is_err(), "{text}");
        }
    }

    #[test]
    fn fuzz_references_are_read_as_the_library_reads_them() {
        let digest = format!("a.b:1/c-d/e:f@{DIGEST}");
        let samples = [b"localhost:5000/models/a.b:v1", &b"[::1]:5000/a/b"[..], digest.as_bytes()];
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&samples, input);
            let Ok(text) = std::str::from_utf8(&bytes) else { return };
            if let Some(reference) = usual(text) {
                assert!(!reference.repository().is_empty());
                let named = text.replacen(reference.registry(), "a.b:1", 1);
                let text = if text.starts_with('[') { named.as_str() } else { text };
                let read: Reference = text.parse().unwrap();
                assert_eq!(read.repository(), reference.repository(), "{text}");
                assert_eq!(read.tag(), reference.tag(), "{text}");
                assert_eq!(read.digest(), reference.digest(), "{text}");
                assert!(text == named || read.registry() == reference.registry(), "{text}");
            }
        });
    }
}
