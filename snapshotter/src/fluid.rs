//! What Fluid tells a FUSE pod of a ThinRuntime: a JSON file with the dataset's mounts and the
//! directory that they are wanted in.

use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use weightfs_store::{Reference, parse_reference};

/// Where Fluid puts the file: today, and up to 0.8.
pub const PLACES: [&str; 2] = ["/etc/fluid/config/config.json", "/etc/fluid/config.json"];

/// Bytes of the file at the most.
const MAX_BYTES: u64 = 1 << 20;

/// Schemes that a dataset's mount point may have; it must have one for Fluid.
const SCHEMES: [&str; 2] = ["oci://", "weightfs://"];

/// The file says nothing that can be done.
#[derive(Debug, thiserror::Error)]
pub enum FluidError {
    /// There is no file.
    #[error("Fluid's runtime configuration is not at {}", PLACES.join(" or "))]
    Missing,
    /// It can't be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// It is something else.
    #[error("Fluid's runtime configuration: {0}")]
    Syntax(#[from] serde_json::Error),
    /// Not one model.
    #[error("the dataset has {0} mounts; give each model a dataset of its own")]
    Mounts(usize),
    /// The mount names no model.
    #[error(
        "the dataset's mountPoint {mount_point:?} is no model: {problem}; write oci://host/repository:tag"
    )]
    MountPoint {
        /// What it is.
        mount_point: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The directory can't be one.
    #[error("the targetPath {0:?} is no absolute path")]
    Target(PathBuf),
}

/// The parts of Fluid's file that are needed; it has others.
#[derive(Debug, Deserialize)]
struct Document {
    mounts: Vec<DocumentMount>,
    #[serde(rename = "targetPath")]
    target_path: PathBuf,
}

#[derive(Debug, Deserialize)]
struct DocumentMount {
    #[serde(rename = "mountPoint")]
    mount_point: String,
}

/// What is wanted where.
#[derive(Debug, Clone, PartialEq)]
pub struct Runtime {
    /// The model.
    pub reference: Reference,
    /// The directory.
    pub target: PathBuf,
}

impl Runtime {
    /// Reads the named file, or the one that Fluid has put in its place.
    ///
    /// # Errors
    /// No file, or one that names not exactly one model.
    pub fn read(named: Option<&Path>) -> Result<Self, FluidError> {
        let found = || PLACES.map(PathBuf::from).into_iter().find(|path| path.exists());
        let path = named.map(Path::to_owned).or_else(found).ok_or(FluidError::Missing)?;
        let mut text = Vec::new();
        std::fs::File::open(&path)
            .and_then(|file| file.take(MAX_BYTES).read_to_end(&mut text))
            .map_err(|source| FluidError::Read { path, source })?;
        Self::parse(&text)
    }

    /// Parses the file.
    ///
    /// # Errors
    /// See [`Runtime::read`].
    pub fn parse(text: &[u8]) -> Result<Self, FluidError> {
        let Document { mounts, target_path } = serde_json::from_slice(text)?;
        let [DocumentMount { mount_point }] = mounts.as_slice() else {
            return Err(FluidError::Mounts(mounts.len()));
        };
        let bad =
            |problem: String| FluidError::MountPoint { mount_point: mount_point.clone(), problem };
        let model = SCHEMES.into_iter().find_map(|scheme| mount_point.strip_prefix(scheme));
        let model = model.ok_or_else(|| bad("it has another scheme".to_owned()))?;
        let reference = parse_reference(model).map_err(|error| bad(error.to_string()))?;
        if !target_path.is_absolute() {
            return Err(FluidError::Target(target_path));
        }
        Ok(Self { reference, target: target_path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Fluid's documentation shows it.
    const SAMPLE: &str = r#"{"mounts":[{"mountPoint":"oci://registry.example.com/models/llama:8b",
        "options":{"a":"b"},"name":"llama"}],"targetPath":"/runtime-mnt/thin/default/llama/thin-fuse",
        "accessModes":["ReadOnlyMany"]}"#;

    #[test]
    fn the_documented_shape_is_understood() {
        let runtime = Runtime::parse(SAMPLE.as_bytes()).unwrap();
        assert_eq!(runtime.reference.whole(), "registry.example.com/models/llama:8b");
        assert_eq!(runtime.target, Path::new("/runtime-mnt/thin/default/llama/thin-fuse"));
    }

    #[test]
    fn what_names_no_model_is_refused() {
        let error = |text: &str| Runtime::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(error("{").contains("runtime configuration"));
        assert!(error(r#"{"mounts":[],"targetPath":"/t"}"#).contains("0 mounts"));
        let mount = |point: &str, target: &str| {
            error(&format!(r#"{{"mounts":[{{"mountPoint":"{point}"}}],"targetPath":"{target}"}}"#))
        };
        assert!(mount("s3://bucket", "/t").contains("another scheme"));
        assert!(mount("oci://host/UPPER:y", "/t").contains("oci://host/repository:tag"));
        assert!(mount("oci://host/x:y", "t").contains("targetPath"));
    }

    #[test]
    fn fuzz_runtime_configurations_are_refused_or_name_a_model() {
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&[SAMPLE.as_bytes()], input);
            if let Ok(runtime) = Runtime::parse(&bytes) {
                assert!(runtime.target.is_absolute());
            }
        });
    }
}
