//! Which images a pattern of the kubelet's means (kubelet credential providers, "matchImages"): globs
//! within the parts of the host's name, an equal port, and a path that begins so.

use glob::Pattern;

use crate::registry::Repository;

/// Longest pattern that is read, in bytes; host names have 253 at the most.
const MAX_BYTES: usize = 1024;

/// A pattern of images.
#[derive(Debug, Clone)]
pub(super) struct Images {
    labels: Vec<Pattern>,
    port: Option<String>,
    path: String,
    /// As it was written: of two that match, the greater one is said to be more specific.
    pub(super) text: String,
}

impl Images {
    /// # Errors
    /// In words: it is no such pattern.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is no pattern of images (host, host:port or host/path)");
        if text.is_empty() || text.len() > MAX_BYTES || text.contains("://") {
            return Err(bad());
        }
        let (authority, path) = text.split_once('/').unwrap_or((text, ""));
        let (host, port) = split(authority);
        let labels = host.split('.').map(Pattern::new).collect::<Result<_, _>>();
        Ok(Self {
            labels: labels.map_err(|_| bad())?,
            port: port.map(str::to_owned),
            path: path.to_owned(),
            text: text.to_owned(),
        })
    }

    pub(super) fn matches(&self, image: &Repository) -> bool {
        let (host, port) = split(&image.registry);
        let labels: Vec<_> = host.split('.').collect();
        self.port.as_deref() == port
            && self.labels.len() == labels.len()
            && self.labels.iter().zip(labels).all(|(pattern, label)| pattern.matches(label))
            && image.name.starts_with(&self.path)
    }
}

/// Host and port. An address of IPv6 is in brackets, which no pattern of labels can match.
fn split(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (authority, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, image: &str) -> bool {
        let (registry, name) = image.split_once('/').unwrap();
        let image = Repository { registry: registry.into(), name: name.into() };
        Images::parse(pattern).unwrap().matches(&image)
    }

    #[test]
    fn patterns_match_as_the_kubelet_says() {
        for (pattern, image) in [
            ("*.dkr.ecr.*.amazonaws.com", "123.dkr.ecr.eu-west-1.amazonaws.com/model"),
            ("registry.io:8080/path", "registry.io:8080/path/model"),
            ("sub*.registry.io", "sub1.registry.io/a"),
            ("*.*.registry.io", "a.b.registry.io/a"),
            ("*-docker.pkg.dev", "europe-docker.pkg.dev/project/a"),
            ("127.0.0.1:5000", "127.0.0.1:5000/a"),
            ("gcr.io/team", "gcr.io/teams"),
        ] {
            assert!(matches(pattern, image), "{pattern} {image}");
        }
        for (pattern, image) in [
            ("*.io", "a.registry.io/a"),
            ("*.registry.io", "registry.io/a"),
            ("registry.io", "registry.io:8080/a"),
            ("registry.io:8080", "registry.io/a"),
            ("registry.io/path", "registry.io/other"),
            ("*", "registry.io/a"),
        ] {
            assert!(!matches(pattern, image), "{pattern} {image}");
        }
        for bad in ["", "https://registry.io", "a**b.io", "[", &"a".repeat(2000)] {
            assert!(Images::parse(bad).is_err(), "{bad}");
        }
    }
}
