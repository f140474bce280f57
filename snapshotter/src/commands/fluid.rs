//! `weightfs fluid`: the program of a ThinRuntime's FUSE pod.

use std::path::Path;

use anyhow::Context as _;
use weightfs::cli::MountArgs;
use weightfs::config::Config;
use weightfs::fluid::Runtime;

/// Mounts what Fluid's runtime configuration names, and stays until a signal or an unmount.
pub async fn run(config: &Config, runtime_config: Option<&Path>) -> anyhow::Result<()> {
    let Runtime { reference, target } = Runtime::read(runtime_config)?;
    std::fs::create_dir_all(&target).with_context(|| target.display().to_string())?;
    super::mount::run(config, &MountArgs::in_foreground(reference, target)).await
}
