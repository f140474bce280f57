//! Recorded profiles where the program meets them: in files of people, and in the store, one for
//! each manifest.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use tracing::warn;
use weightfs_fusefs::{MAX_PROFILE_BYTES, Profile, ProfileError};
use weightfs_store::{BlobId, Digest, Form, OpenError, Store};

/// Name of a profile beside a manifest.
const PROFILE: &str = "profile";

/// Why a profile can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileUseError {
    /// The file can't be read.
    #[error("profile {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// It is none.
    #[error("profile {}: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ProfileError,
    },
    /// It was recorded of something else.
    #[error("the profile was recorded of manifest {recorded}, but {wanted} is mounted")]
    OtherArtifact {
        /// The manifest that it is of.
        recorded: Digest,
        /// The manifest that is mounted.
        wanted: Digest,
    },
    /// It can't be kept.
    #[error(transparent)]
    Keep(#[from] OpenError),
}

/// Reads a file.
///
/// # Errors
/// When it is not there or no profile.
pub fn read(path: &Path) -> Result<Profile, ProfileUseError> {
    let mut bytes = vec![];
    // A byte more than a profile can have, so that it is found too long.
    let limit = MAX_PROFILE_BYTES as u64 + 1;
    std::fs::File::open(path)
        .and_then(|file| file.take(limit).read_to_end(&mut bytes))
        .map_err(|source| ProfileUseError::Read { path: path.into(), source })?;
    Profile::parse(&bytes).map_err(|source| ProfileUseError::Parse { path: path.into(), source })
}

/// Keeps a profile for later mounts of its artifact.
///
/// # Errors
/// When the store's directory can't be used.
pub fn keep(store: &Store, profile: &Profile) -> Result<(), ProfileUseError> {
    Ok(store.attach(beside(profile.manifest()), PROFILE, &profile.encode())?)
}

/// Keeps a profile, unless there is one of its artifact.
///
/// # Errors
/// As [`keep`].
pub fn keep_unless_known(store: &Store, profile: &Profile) -> Result<(), ProfileUseError> {
    if kept(store, profile.manifest()).is_some() { Ok(()) } else { keep(store, profile) }
}

/// The profile that goes into the index of that manifest: the one that is `given`, or the one that
/// is kept in the store at `root`, whoever owns that.
///
/// # Errors
/// When the one that is given can't be read or is of another artifact.
pub fn for_index(
    root: &Path,
    manifest: Digest,
    given: Option<&Path>,
) -> Result<Option<Profile>, ProfileUseError> {
    match given {
        Some(path) => of_manifest(read(path)?, manifest).map(Some),
        None => {
            let bytes = Store::foreign_attachment(root, beside(manifest), PROFILE);
            Ok(bytes.and_then(|bytes| usable(&bytes, manifest)))
        }
    }
}

/// The profile to go by in a mount of that manifest: the one that is `given`, which is kept, or
/// the one that was kept.
///
/// # Errors
/// When the one that is given is of another artifact or can't be kept.
pub fn choose(
    store: &Store,
    manifest: Digest,
    given: Option<Profile>,
) -> Result<Option<Profile>, ProfileUseError> {
    let Some(profile) = given else { return Ok(kept(store, manifest)) };
    let profile = of_manifest(profile, manifest)?;
    keep(store, &profile)?;
    Ok(Some(profile))
}

fn of_manifest(profile: Profile, wanted: Digest) -> Result<Profile, ProfileUseError> {
    let recorded = profile.manifest();
    if recorded == wanted {
        Ok(profile)
    } else {
        Err(ProfileUseError::OtherArtifact { recorded, wanted })
    }
}

fn kept(store: &Store, manifest: Digest) -> Option<Profile> {
    usable(&store.attachment(beside(manifest), PROFILE)?, manifest)
}

fn usable(bytes: &[u8], manifest: Digest) -> Option<Profile> {
    match Profile::parse(bytes) {
        Ok(profile) => Some(profile).filter(|profile| profile.manifest() == manifest),
        Err(error) => {
            warn!(%manifest, %error, "kept profile ignored");
            None
        }
    }
}

/// What a manifest's documents are kept beside.
fn beside(manifest: Digest) -> BlobId {
    BlobId { digest: manifest, form: Form::AsStored }
}
