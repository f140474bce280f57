//! `weightfs prepare` and `weightfs release`.

use serde_json::json;
use weightfs::cli::{ContainerdArgs, PrepareArgs, ReleaseArgs};
use weightfs::config::Config;
use weightfs::prepare::{Place, prepare, release};
use weightfs_store::Reference;

use super::registries;

/// Makes containerd show an artifact, and says how a container gets it.
pub async fn run(config: &Config, arguments: PrepareArgs) -> anyhow::Result<()> {
    let PrepareArgs { reference, containerd, target, json } = arguments;
    let prepared = prepare(&*registries(config)?, &place(reference, containerd)).await?;
    let mount = prepared.mount(&target);
    if json {
        let mut value = serde_json::to_value(&prepared)?;
        value["mount"] = mount.into();
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    println!("{}", prepared.source);
    println!("--mount {mount}");
    Ok(())
}

/// Takes it away again.
pub async fn run_release(arguments: ReleaseArgs) -> anyhow::Result<()> {
    let ReleaseArgs { reference, containerd, json } = arguments;
    let place = place(reference, containerd);
    let released = release(&place).await?;
    if json {
        println!("{}", serde_json::to_string_pretty(&json!({ "released": released }))?);
        return Ok(());
    }
    let (reference, namespace) = (place.reference.whole(), &place.namespace);
    match released.len() {
        0 => println!("nothing of {reference} is prepared in namespace {namespace}"),
        _ => println!("{reference} is released in namespace {namespace}"),
    }
    Ok(())
}

fn place(reference: Reference, containerd: ContainerdArgs) -> Place {
    let ContainerdArgs { address, namespace, snapshotter } = containerd;
    Place { reference, address, namespace, snapshotter }
}
