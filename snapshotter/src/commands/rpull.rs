//! `weightfs rpull`.

use weightfs::cli::{ContainerdArgs, RpullArgs};
use weightfs::config::Config;
use weightfs::rpull::{LayerResult, Pull, PulledLayer, pull};

use super::{registries, size};

/// Pulls an image lazily into containerd.
pub async fn run(config: &Config, arguments: RpullArgs) -> anyhow::Result<()> {
    let RpullArgs { image, containerd, json } = arguments;
    let ContainerdArgs { address, namespace, snapshotter } = containerd;
    let registries = registries(config)?;
    let pull_image = Pull { image, address, namespace, snapshotter };
    let report = |layer: &PulledLayer| {
        if !json {
            let result = match layer.result {
                LayerResult::Lazy => "lazy",
                LayerResult::Unpacked => "pulled",
                LayerResult::Present => "present",
            };
            println!("{:.19} {:>10} {result}", layer.digest, size(layer.size));
        }
    };
    let layers = pull(&registries, &pull_image, report).await?;
    if json {
        println!("{}", serde_json::to_string_pretty(&layers)?);
        return Ok(());
    }
    let lazy = layers.iter().filter(|layer| layer.result == LayerResult::Lazy);
    let bytes = size(lazy.clone().map(|layer| layer.size).sum());
    let (lazy, all) = (lazy.count(), layers.len());
    println!("{}: {lazy} of {all} layers lazy, {bytes} left where they are", pull_image.image);
    Ok(())
}
