//! `weightfs status`: what the daemon serves.

mod table;

use serde_json::json;
use weightfs::config::Config;
use weightfs_proto::control::{
    ActivityReply, ActivityRequest, Layer, Model, MountActivity, StatusReply, StatusRequest,
};

/// Asks the daemon that owns the state directory.
pub async fn run(config: &Config, subject: Option<String>, as_json: bool) -> anyhow::Result<()> {
    let mut daemon = super::daemon(config).await?;
    let request = StatusRequest { subject: subject.as_ref().cloned().unwrap_or_default() };
    let status = daemon.status(request).await;
    let status = status.map_err(|status| super::refused(&status))?.into_inner();
    let activity = daemon.activity(ActivityRequest {}).await;
    let mut activity = activity.map_err(|status| super::refused(&status))?.into_inner();
    if subject.is_some() {
        activity.mounts.retain(|mount| is_of(mount, &status));
        activity.mounts_total = activity.mounts.len() as u64;
    }
    if as_json {
        println!("{}", serde_json::to_string_pretty(&to_json(&status, &activity))?);
    } else {
        print!("{}{}", heading(&status), table::of(&activity, &status.layers));
    }
    Ok(())
}

/// Whether a mount has something of what is shown.
fn is_of(mount: &MountActivity, shown: &StatusReply) -> bool {
    let model = |model: &Model| model.reference == mount.name && model.target == mount.target;
    match mount.kind.as_str() {
        "image" => shown.layers.iter().any(|layer| layer.image == mount.name),
        _ => shown.models.iter().any(model),
    }
}

fn to_json(status: &StatusReply, activity: &ActivityReply) -> serde_json::Value {
    let model = |model: &Model| {
        json!({
            "reference": model.reference,
            "manifest_digest": model.manifest_digest,
            "target": model.target,
            "files": model.files,
            "size": model.size,
            "cached": model.cached,
            "fetched": model.fetched,
            "rejected": model.rejected,
            "trust": model.trust,
        })
    };
    let layer = |layer: &Layer| {
        json!({
            "snapshot": layer.snapshot,
            "parent": layer.parent,
            "image": layer.image,
            "digest": layer.digest,
            "mode": layer.mode,
            "reason": layer.reason,
            "size": layer.size,
            "cached": layer.cached,
            "fetched": layer.fetched,
            "rejected": layer.rejected,
            "trust": layer.trust,
        })
    };
    let mount = |mount: &MountActivity| {
        json!({
            "name": mount.name,
            "kind": mount.kind,
            "target": mount.target,
            "files": mount.files,
            "files_complete": mount.files_complete,
            "size": mount.size,
            "cached": mount.cached,
            "fetched": mount.fetched,
            "hits": mount.hits,
            "hit_bytes": mount.hit_bytes,
            "misses": mount.misses,
            "missed_bytes": mount.missed_bytes,
            "read_rate": mount.read_rate,
            "fetch_rate": mount.fetch_rate,
            "requests": mount.requests,
            "in_flight": mount.in_flight,
            "trust": mount.trust,
            "state": mount.state,
            "reasons": mount.reasons,
            "rejected": mount.rejected,
        })
    };
    json!({
        "peers": status.peers.as_ref().map(super::peers::to_json),
        "version": status.version,
        "root": status.root,
        "snapshotter_address": status.snapshotter_address,
        "keeper": status.keeper,
        "metrics_address": status.metrics_address,
        "uptime": activity.uptime_seconds,
        "mounts": activity.mounts.iter().map(mount).collect::<Vec<_>>(),
        "models": status.models.iter().map(model).collect::<Vec<_>>(),
        "layers": status.layers.iter().map(layer).collect::<Vec<_>>(),
        "decisions": status.decisions,
    })
}

fn heading(status: &StatusReply) -> String {
    let StatusReply { version, root, snapshotter_address, keeper, metrics_address, .. } = status;
    let kept = match keeper.as_str() {
        "" => "nobody keeps the mount: a restart breaks running containers".to_owned(),
        keeper => format!("{keeper} keeps the mount over a restart"),
    };
    let mut lines = vec![
        format!("weightfs {version} on {root}"),
        format!("snapshotter at {snapshotter_address}"),
        kept,
    ];
    lines.extend(status.peers.as_ref().map(super::peers::summary));
    if !metrics_address.is_empty() {
        lines.push(format!("status page and metrics at http://{metrics_address}/"));
    }
    lines.join("\n") + "\n"
}
