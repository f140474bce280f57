//! `weightfs status`: what the daemon serves.

use anyhow::Context as _;
use serde_json::json;
use weightfs::config::Config;
use weightfs::{control, owner};
use weightfs_proto::control::{Layer, Model, StatusReply, StatusRequest};

use super::size;

/// Columns that a line takes at the most.
const WIDTH: usize = 80;

/// Asks the daemon that owns the state directory.
pub async fn run(config: &Config, subject: Option<String>, as_json: bool) -> anyhow::Result<()> {
    let root = config.root.display();
    let address = owner::control_address(&config.root)
        .with_context(|| format!("no daemon owns {root}; start one with `weightfs serve`"))?;
    let mut daemon = control::connect(&address)
        .await
        .with_context(|| format!("the daemon's control socket {}", address.display()))?;
    let request = StatusRequest { subject: subject.unwrap_or_default() };
    let status = daemon.status(request).await;
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
    json!({
        "peers": status.peers.as_ref().map(super::peers::to_json),
        "version": status.version,
        "root": status.root,
        "snapshotter_address": status.snapshotter_address,
        "keeper": status.keeper,
        "metrics_address": status.metrics_address,
        "models": status.models.iter().map(model).collect::<Vec<_>>(),
        "layers": status.layers.iter().map(layer).collect::<Vec<_>>(),
        "decisions": status.decisions,
    })
}

fn print(status: &StatusReply) {
    let StatusReply { version, root, snapshotter_address, models, layers, keeper, .. } = status;
    println!("weightfs {version} on {root}, snapshotter at {snapshotter_address}");
    if let Some(peers) = &status.peers {
        println!("{}", super::peers::summary(peers));
    }
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
        print!("{}", indented(&rejected(model.rejected)));
    }
    print!("{}", table(layers));
}

/// The layers, image by image.
fn table(layers: &[Layer]) -> String {
    let mut text = String::new();
    let mut image = None;
    for layer in layers {
        if image != Some(&layer.image) {
            image = Some(&layer.image);
            text += &heading(&layer.image);
        }
        text += &row(layer);
    }
    text
}

fn heading(image: &str) -> String {
    let image = if image.is_empty() { "(layers that came without a name)" } else { image };
    let [digest, size, here, trust] = ["LAYER", "SIZE", "HERE", "TRUST"];
    format!("\n{image}\n  {digest:<12}  {size:>10}  {here:>5}  {trust:<9}  MODE\n")
}

fn row(layer: &Layer) -> String {
    // Of a layer that came without its digest, the snapshot's name ends with it or its chain's.
    let digest = if layer.digest.is_empty() { &layer.snapshot } else { &layer.digest };
    let digest = digest.rsplit([':', '/', ' ']).next().unwrap_or_default();
    let here = match layer.trust.as_str() {
        "" => "-".to_owned(),
        _ => format!("{} %", percent(layer.cached, layer.size)),
    };
    let trust = if layer.trust.is_empty() { "-" } else { &layer.trust };
    let (bytes, mode) = (size(layer.size), &layer.mode);
    let line = format!("  {digest:<12.12}  {bytes:>10}  {here:>5}  {trust:<9}  {mode}\n");
    let rejected = indented(&rejected(layer.rejected));
    line + &indented(&layer.reason) + &rejected + &indented(advice(trust))
}

/// What is said of chunks that were not what they should be.
fn rejected(count: u64) -> String {
    match count {
        0 => String::new(),
        1 => "1 wrong chunk was refused; see the daemon's log for where it came from".to_owned(),
        _ => format!(
            "{count} wrong chunks were refused; see the daemon's log for where they came from"
        ),
    }
}

/// A text below a row, in lines that fit.
fn indented(text: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= WIDTH => *line += &format!(" {word}"),
            _ => lines.push(format!("    {word}")),
        }
    }
    lines.into_iter().map(|line| line + "\n").collect()
}

fn cached(cached: u64, total: u64, trust: &str) -> String {
    let percent = percent(cached, total);
    let advice = match advice(trust) {
        "" => String::new(),
        advice => format!(": {advice}"),
    };
    format!("{} of {} here ({percent} %), {trust}{advice}", size(cached), size(total))
}

fn percent(cached: u64, total: u64) -> u64 {
    cached.saturating_mul(100).checked_div(total).unwrap_or(100)
}

fn advice(trust: &str) -> &'static str {
    match trust {
        "poisoned" => "it does not hash to its digest and is not served; see `weightfs verify`",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers() -> Vec<Layer> {
        let lazy = Layer {
            image: "registry.example.com/models/llama:8b".to_owned(),
            digest: format!("sha256:{}", "5d13da7718a9".repeat(5)),
            mode: "lazy".to_owned(),
            size: u64::MAX,
            cached: u64::MAX / 2,
            trust: "transport".to_owned(),
            ..Layer::default()
        };
        let reason = "containerd did not say which image it is of; set \
                      disable_snapshot_annotations = false, see `weightfs doctor`";
        let declined = Layer {
            mode: "no-annotations".to_owned(),
            reason: reason.to_owned(),
            size: 34 << 10,
            cached: 34 << 10,
            trust: String::new(),
            ..lazy.clone()
        };
        let unnamed = Layer {
            snapshot: "k8s.io/7/sha256:aabbccddeeff00112233".to_owned(),
            image: String::new(),
            digest: String::new(),
            ..declined.clone()
        };
        let poisoned = Layer { trust: "poisoned".to_owned(), rejected: 7, ..lazy.clone() };
        vec![lazy, declined, poisoned, unnamed]
    }

    #[test]
    fn the_table_fits_eighty_columns_and_says_why() {
        let table = table(&layers());
        assert!(table.lines().all(|line| line.chars().count() <= WIDTH), "{table}");
        assert_eq!(table.matches("LAYER").count(), 2, "an image's layers stand together");
        for text in
            ["lazy", "no-annotations", "disable_snapshot_annotations", "aabbccddeeff", "7 wrong"]
        {
            assert!(table.contains(text), "{text} in {table}");
        }
    }

    #[test]
    fn a_share_of_nothing_is_all_of_it() {
        assert_eq!((percent(0, 0), percent(1, 3), percent(3, 3)), (100, 33, 100));
    }
}
