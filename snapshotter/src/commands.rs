//! What the program does for each subcommand.

pub mod cache;
pub mod ls;
pub mod mount;
pub mod progress;
pub mod reach;
pub mod rpull;
pub mod serve;
pub mod status;
pub mod umount;
pub mod verify;

use std::sync::Arc;

use anyhow::Context as _;
use bytesize::ByteSize;
use weightfs::config::Config;
use weightfs::references::References;
use weightfs::trees::Opener;
use weightfs_store::{Registries, Store};

/// The registries that the configuration speaks of.
pub fn registries(config: &Config) -> anyhow::Result<Arc<Registries>> {
    let docker_config = config.credentials.docker_config.clone();
    Registries::new(config.registry_options(), docker_config, config.fetch.deadline)
        .context("the registries' configuration")
}

/// What opens artifacts into that store.
pub fn opener(config: &Config, store: Arc<Store>) -> anyhow::Result<Opener> {
    let registries = registries(config)?;
    let references = References::new(&config.root);
    Ok(Opener { registries, store, references, deadline: config.fetch.deadline })
}

/// A size for people.
pub fn size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}
