//! `weightfs status`: what the daemon serves.

use anyhow::Context as _;
use serde_json::json;
use weightfs::config::Config;
use weightfs::{control, owner};
use weightfs_proto::control::{Layer, Model, StatusReply, StatusRequest};

use super::size;

/// Asks the daemon that owns the state directory.
pub async fn run(config: &Config, as_json: bool) -> anyhow::Result<()> {
    let root = config.root.display();
    let address = owner::control_address(&config.root)
        .with_context(|| format!("no daemon owns {root}; start one with `weightfs serve`"))?;
    let mut daemon = control::connect(&address)
        .await
        .with_context(|| format!("the daemon's control socket {}", address.display()))?;
    let status = daemon.status(StatusRequest {}).await;
    let status = status.map_err(|status| anyhow::anyhow!("{}", status.message()))?.into_inner();
    if as_json {
        println!("{}", serde_json::to_string_pretty(&to_json(&status))?);
    } else {
        print(&status);
    }
    Ok(())
}

fn to_json(status: &StatusReply) -> serde_json::Value {
    let model = |model: &Model| {
        json!({
            "reference": model.reference,
            "manifest_digest": model.manifest_digest,
            "target": model.target,
            "files": model.files,
            "size": model.size,
            "cached": model.cached,
            "fetched": model.fetched,
            "trust": model.trust,
        })
    };
    let layer = |layer: &Layer| {
        json!({
            "snapshot": layer.snapshot,
            "image": layer.image,
            "digest": layer.digest,
            "lazy": layer.reason.is_empty(),
            "reason": layer.reason,
            "size": layer.size,
            "cached": layer.cached,
            "fetched": layer.fetched,
            "trust": layer.trust,
        })
    };
    json!({
        "version": status.version,
        "root": status.root,
        "snapshotter_address": status.snapshotter_address,
        "keeper": status.keeper,
        "models": status.models.iter().map(model).collect::<Vec<_>>(),
        "layers": status.layers.iter().map(layer).collect::<Vec<_>>(),
    })
}

fn print(status: &StatusReply) {
    let StatusReply { version, root, snapshotter_address, models, layers, keeper } = status;
    println!("weightfs {version} on {root}, snapshotter at {snapshotter_address}");
    match keeper.as_str() {
        "" => println!("nobody keeps the mount: a restart breaks running containers"),
        keeper => println!("{keeper} keeps the mount over a restart"),
    }
    if !models.is_empty() {
        println!("\nMODELS");
    }
    for model in models {
        println!("{} on {}", model.reference, model.target);
        println!("  {} files, {}", model.files, cached(model.cached, model.size, &model.trust));
    }
    if !layers.is_empty() {
        println!("\nIMAGE LAYERS");
    }
    for layer in layers {
        println!("{:.19} {}", layer.digest, layer.image);
        match layer.reason.as_str() {
            "" => println!("  lazy, {}", cached(layer.cached, layer.size, &layer.trust)),
            reason => println!("  pulled: {reason}"),
        }
    }
}

fn cached(cached: u64, total: u64, trust: &str) -> String {
    let percent = (cached * 100).checked_div(total).unwrap_or(100);
    let advice = match trust {
        "poisoned" => ": it does not hash to its digest and is not served; see `weightfs verify`",
        _ => "",
    };
    format!("{} of {} here ({percent} %), {trust}{advice}", size(cached), size(total))
}
