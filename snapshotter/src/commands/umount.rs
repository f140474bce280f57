//! `weightfs umount`: takes a model's mount away, whoever serves it, or all that a daemon left.

use std::path::Path;

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::stat;
use weightfs::config::Config;
use weightfs::daemon::MOUNT_DIRECTORY;
use weightfs::{control, owner};
use weightfs_fusefs::session::detach;
use weightfs_proto::control::ReleaseRequest;
use weightfs_store::Store;

/// Takes away the mount that a stopped daemon left to its successor, and what is bound from it.
/// Containers that use it get errors from now on.
pub async fn all(config: &Config) -> anyhow::Result<()> {
    // The directory's lock: no daemon serves, and none starts meanwhile.
    let _store = Store::open(&config.root, config.store_options())
        .context("only what no daemon serves can be taken away")?;
    let mount = config.root.canonicalize()?.join(MOUNT_DIRECTORY);
    for mount in owner::mounts_of(&mount)? {
        detach(&mount).with_context(|| format!("can't unmount {}", mount.display()))?;
    }
    Ok(())
}

/// Unmounts `dir`, and tells the daemon if it served it.
pub async fn run(config: &Config, dir: &Path) -> anyhow::Result<()> {
    let name = dir.display();
    let status = match stat(dir) {
        Ok(status) => status,
        // Nobody serves it any more.
        Err(Errno::ENOTCONN) => {
            return detach(dir).with_context(|| format!("can't unmount {name}"));
        }
        Err(error) => return Err(error).with_context(|| name.to_string()),
    };
    let target = dir.canonicalize().with_context(|| name.to_string())?;
    if !owner::is_mountpoint(&target)? || !owner::is_weightfs(&status)? {
        bail!("{name} is not a mount of weightfs");
    }
    match umount2(&target, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => {}
        Err(Errno::EBUSY) => bail!("{name} is in use; close its files and leave its directories"),
        Err(error) => return Err(error).with_context(|| format!("can't unmount {name}")),
    }
    let tree = owner::tree_of(&status);
    let (Some(tree), Some(address)) = (tree, owner::control_address(&config.root)) else {
        return Ok(());
    };
    // A daemon that does not run forgets the model when it starts and finds it unmounted.
    let Ok(mut daemon) = control::connect(&address).await else { return Ok(()) };
    daemon
        .release(ReleaseRequest { tree: tree.0 })
        .await
        .map_err(|status| anyhow::anyhow!("{}", status.message()))?;
    Ok(())
}
