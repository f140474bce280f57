//! Certificates of a registry as docker keeps them: `*.crt` of authorities, `*.cert` of ours with its
//! `*.key` beside it (containerd, docs/hosts.md, "Support for Docker's Certificate File Pattern").

use std::io;
use std::path::{Path, PathBuf};

use super::Endpoint;

/// Files of a directory that are looked at, at the most.
const MAX_FILES: usize = 1000;

/// Adds what a directory has to the registry.
pub(super) fn add(dir: &Path, own: Endpoint) -> io::Result<Endpoint> {
    let entries = std::fs::read_dir(dir)?.take(MAX_FILES);
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    files.sort();
    let with = |extension: &str| {
        let has = |file: &&PathBuf| file.extension().is_some_and(|found| found == extension);
        files.iter().filter(has).cloned().collect::<Vec<_>>()
    };
    let identity = with("cert").into_iter().next().map_or_else(Vec::new, |certificate| {
        let key = certificate.with_extension("key");
        // Or the key is in the same file.
        let key = key.exists().then_some(key);
        [certificate].into_iter().chain(key).collect()
    });
    let authorities = [own.authorities, with("crt")].concat();
    Ok(Endpoint { authorities, identity, ..own })
}
