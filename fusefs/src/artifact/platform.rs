//! Operating systems and processors as image indexes name them (image-spec, "Image Index").

use std::fmt;
use std::str::FromStr;

/// An operating system and a processor, as image indexes name them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// `linux`, …
    pub os: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// `v8`, …
    pub variant: Option<String>,
}

/// A text that names no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no platform; write os/architecture or os/architecture/variant, as linux/arm64"
)]
pub struct PlatformError {
    /// The text.
    pub text: String,
}

impl Platform {
    /// The platform that this program was built for.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "x86" => "386",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            "loongarch64" => "loong64",
            same => same,
        };
        let variant = (architecture == "arm").then(|| "v7".to_owned());
        Self { os: "linux".to_owned(), architecture: architecture.to_owned(), variant }
    }

    /// The one that suits best of what an index offers (`None`: no platform given), by position.
    pub(super) fn choose(&self, offered: &[Option<Self>]) -> Option<usize> {
        let suits = |offer: &Self| offer.os == self.os && offer.architecture == self.architecture;
        let rank = |offer: &Self| match (offer.normal_variant(), self.normal_variant()) {
            (offer, own) if offer == own => 0,
            (None, _) => 1,
            (Some(_), None) => 2,
            (Some(_), Some(_)) => 3,
        };
        let named = offered.iter().enumerate();
        let named = named.filter_map(|(at, offer)| Some((at, offer.as_ref()?)));
        let suited = named.filter(|(_, offer)| suits(offer) && rank(offer) < 3);
        match suited.min_by_key(|(_, offer)| rank(offer)) {
            Some((at, _)) => Some(at),
            None => matches!(offered, [None]).then_some(0),
        }
    }

    /// arm64 is v8 and amd64 is v1 where nothing else is said.
    fn normal_variant(&self) -> Option<&str> {
        match (self.architecture.as_str(), self.variant.as_deref()) {
            ("arm64", Some("v8")) | ("amd64", Some("v1")) | (_, Some("")) => None,
            (_, variant) => variant,
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let parts: Vec<_> = text.split('/').map(str::to_owned).collect();
        let (os, architecture, variant) = match <[String; 2]>::try_from(parts) {
            Ok([os, architecture]) => (os, architecture, None),
            Err(parts) => match <[String; 3]>::try_from(parts) {
                Ok([os, architecture, variant]) => (os, architecture, Some(variant)),
                Err(_) => return Err(PlatformError { text: text.to_owned() }),
            },
        };
        if os.is_empty() || architecture.is_empty() || variant.as_deref() == Some("") {
            return Err(PlatformError { text: text.to_owned() });
        }
        Ok(Self { os, architecture, variant })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().unwrap()
    }

    fn choose(own: &str, offered: &[&str]) -> Option<usize> {
        let offered: Vec<_> = offered.iter().map(|text| text.parse().ok()).collect();
        platform(own).choose(&offered)
    }

    #[test]
    fn the_closest_variant_is_chosen() {
        let offered = ["linux/amd64", "linux/arm64/v8", "linux/arm/v6", "linux/arm/v7"];
        assert_eq!(choose("linux/arm64", &offered), Some(1));
        assert_eq!(choose("linux/arm/v7", &offered), Some(3));
        assert_eq!(choose("linux/arm/v5", &offered), None);
        assert_eq!(choose("linux/amd64", &["linux/amd64/v3", "linux/amd64"]), Some(1));
        assert_eq!(choose("linux/amd64/v3", &["linux/amd64"]), Some(0));
        assert_eq!(choose("linux/amd64", &["windows/amd64", "unknown/unknown"]), None);
    }

    #[test]
    fn a_single_manifest_without_a_platform_suits() {
        assert_eq!(choose("linux/amd64", &[""]), Some(0));
        assert_eq!(choose("linux/amd64", &["", ""]), None, "which one is meant?");
        assert_eq!(choose("linux/amd64", &["", "linux/amd64"]), Some(1));
    }

    #[test]
    fn texts_are_read_and_written() {
        for text in ["linux/amd64", "linux/arm/v7"] {
            assert_eq!(platform(text).to_string(), text);
        }
        for text in ["", "linux", "linux/", "/amd64", "a/b/c/d", "linux/arm/"] {
            assert!(text.parse::<Platform>().is_err(), "{text}");
        }
        assert_eq!(Platform::host().os, "linux");
    }
}
