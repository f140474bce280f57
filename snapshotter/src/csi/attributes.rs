//! A volume's attributes: what the author of a pod has written, foreign text.
//!
//! They are those of ModelPack's CSI driver, with that driver's meaning: `reference`,
//! `exclude-model-weights`, `exclude-file-patterns`, each maybe with the driver's name and a slash
//! before it.

use std::collections::{BTreeMap, HashMap};

use weightfs_store::{Reference, parse_reference};

use super::DriverName;

/// The model.
const REFERENCE: &str = "reference";

/// `true`: files with weights are left out.
const EXCLUDE_WEIGHTS: &str = "exclude-model-weights";

/// A JSON list of patterns of files that are left out.
const EXCLUDE_PATTERNS: &str = "exclude-file-patterns";

const KNOWN: [&str; 3] = [REFERENCE, EXCLUDE_WEIGHTS, EXCLUDE_PATTERNS];

/// Domains of attributes that Kubernetes adds by itself (`podInfoOnMount`, provisioners).
const KUBERNETES: [&str; 2] = ["k8s.io", "kubernetes.io"];

/// Bytes of one value at the most: Kubernetes takes more of a whole pod.
const MAX_VALUE_BYTES: usize = 64 << 10;

/// Files with weights, as patterns.
const WEIGHTS: [&str; 7] =
    ["*.safetensors", "model.safetensors.index.json", "*.gguf", "*.bin", "*.pt", "*.pth", "*.onnx"];

/// Attributes that say nothing that can be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AttributeError {
    /// There is no reference.
    #[error(
        "the volume attribute `{REFERENCE}` is missing: it names the model, host/repository:tag"
    )]
    NoReference,
    /// The reference is none.
    #[error("the volume attribute `{REFERENCE}`: {0}")]
    Reference(String),
    /// Nobody knows it.
    #[error("there is no volume attribute `{name}`; did you mean `{nearest}`?")]
    Unknown {
        /// What was written.
        name: String,
        /// The nearest known one.
        nearest: &'static str,
    },
    /// It is there with the driver's name and without.
    #[error("the volume attribute `{0}` is given twice")]
    Twice(&'static str),
    /// Neither true nor false.
    #[error("the volume attribute `{EXCLUDE_WEIGHTS}` must be \"true\" or \"false\", not {0:?}")]
    NoBool(String),
    /// No list of texts.
    #[error("the volume attribute `{EXCLUDE_PATTERNS}` must be a JSON list of texts: {0}")]
    NoList(String),
    /// Too long.
    #[error("the volume attribute `{0}` is too long")]
    TooLong(&'static str),
}

/// What a volume is.
#[derive(Debug, Clone, PartialEq)]
pub struct Attributes {
    /// The model.
    pub reference: Reference,
    /// Files that are left out, as patterns.
    pub exclude: Vec<String>,
}

impl Attributes {
    /// Parses a volume's context.
    ///
    /// # Errors
    /// Something that is missing, unknown or malformed.
    pub fn parse(
        driver: &DriverName,
        context: &HashMap<String, String>,
    ) -> Result<Self, AttributeError> {
        let mut given: BTreeMap<&'static str, &str> = BTreeMap::new();
        for (name, value) in context {
            let Some(known) = known(driver, name)? else { continue };
            if value.len() > MAX_VALUE_BYTES {
                return Err(AttributeError::TooLong(known));
            }
            if given.insert(known, value.trim()).is_some() {
                return Err(AttributeError::Twice(known));
            }
        }
        let reference = given.get(REFERENCE).filter(|text| !text.is_empty());
        let reference = reference.ok_or(AttributeError::NoReference)?;
        let reference = parse_reference(reference)
            .map_err(|error| AttributeError::Reference(format!("{reference}: {error}")))?;
        let mut exclude = Vec::new();
        match given.get(EXCLUDE_WEIGHTS).copied() {
            None | Some("" | "false") => {}
            Some("true") => exclude.extend(WEIGHTS.map(str::to_owned)),
            Some(other) => return Err(AttributeError::NoBool(other.to_owned())),
        }
        // Last, since the last one that matches counts: a pattern can take a weight back in.
        match given.get(EXCLUDE_PATTERNS).copied() {
            None | Some("") => {}
            Some(list) => exclude.extend(patterns(list)?),
        }
        Ok(Self { reference, exclude })
    }
}

fn patterns(list: &str) -> Result<Vec<String>, AttributeError> {
    serde_json::from_str(list).map_err(|error| AttributeError::NoList(error.to_string()))
}

/// The known name of an attribute; `None` for Kubernetes's own.
fn known(driver: &DriverName, name: &str) -> Result<Option<&'static str>, AttributeError> {
    let (domain, own) = name.rsplit_once('/').unwrap_or(("", name));
    let is_kubernetes = KUBERNETES.iter().any(|kubernetes| {
        domain.strip_suffix(kubernetes).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    });
    if is_kubernetes {
        return Ok(None);
    }
    let found = KNOWN.into_iter().find(|known| *known == own);
    if let Some(known) = found.filter(|_| domain.is_empty() || domain == driver.0) {
        return Ok(Some(known));
    }
    let distance = |known: &&str| strsim::damerau_levenshtein(known, own);
    let nearest = KNOWN.into_iter().min_by_key(distance).unwrap_or(REFERENCE);
    Err(AttributeError::Unknown { name: name.chars().take(200).collect(), nearest })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Attributes, AttributeError> {
        let pairs = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Attributes::parse(&"model.csi.modelpack.org".parse().unwrap(), &pairs.collect())
    }

    const MODEL: (&str, &str) = ("reference", "registry.example.com/models/llama:8b");

    #[test]
    fn the_attributes_of_modelpacks_driver_are_understood() {
        let attributes = parse(&[
            ("model.csi.modelpack.org/reference", MODEL.1),
            ("model.csi.modelpack.org/exclude-model-weights", "true"),
            ("model.csi.modelpack.org/exclude-file-patterns", r#"["*.md", "!small.bin"]"#),
            ("csi.storage.k8s.io/ephemeral", "true"),
            ("storage.kubernetes.io/csiProvisionerIdentity", "x"),
        ]);
        let attributes = attributes.unwrap();
        assert_eq!(attributes.reference.whole(), MODEL.1);
        assert!(attributes.exclude.contains(&"*.safetensors".to_owned()));
        assert_eq!(attributes.exclude[WEIGHTS.len()..], ["*.md", "!small.bin"]);
    }

    #[test]
    fn names_without_the_driver_are_enough() {
        let attributes = parse(&[MODEL, ("exclude-model-weights", "false")]).unwrap();
        assert!(attributes.exclude.is_empty());
    }

    #[test]
    fn what_says_nothing_is_refused_with_what_to_write() {
        let error = |pairs: &[(&str, &str)]| parse(pairs).unwrap_err().to_string();
        assert!(error(&[]).contains("`reference` is missing"));
        assert!(error(&[("reference", "")]).contains("`reference` is missing"));
        assert!(error(&[("reference", "UPPER/CASE:x")]).contains("UPPER/CASE:x"));
        let unknown = error(&[MODEL, ("exclude-files-pattern", "[]")]);
        assert!(unknown.contains("did you mean `exclude-file-patterns`"), "{unknown}");
        assert!(error(&[MODEL, ("other.driver/reference", "x")]).contains("other.driver"));
        assert!(error(&[MODEL, ("notk8s.io/reference", "x")]).contains("notk8s.io"));
        let twice = error(&[MODEL, ("model.csi.modelpack.org/reference", "x/y:z")]);
        assert!(twice.contains("twice"), "{twice}");
        assert!(error(&[MODEL, ("exclude-model-weights", "yes")]).contains("\"yes\""));
        assert!(error(&[MODEL, ("exclude-file-patterns", "*.md")]).contains("JSON list"));
        let long = "x".repeat(MAX_VALUE_BYTES + 1);
        assert!(error(&[MODEL, ("exclude-file-patterns", &long)]).contains("too long"));
    }

    #[test]
    fn fuzz_attributes_are_refused_or_name_a_model() {
        let sample = br#"exclude-file-patterns=["*.md"]"#;
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&[sample, b"exclude-model-weights=true"], input);
            let text = String::from_utf8_lossy(&bytes);
            let pairs = text.lines().filter_map(|line| line.split_once('='));
            let pairs: Vec<_> = pairs.chain([MODEL]).collect();
            if let Ok(attributes) = parse(&pairs) {
                assert_eq!(attributes.reference.whole(), MODEL.1);
            }
        });
    }
}
