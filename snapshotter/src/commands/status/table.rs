//! The tables of `weightfs status`, for terminals of 80 columns.

use weightfs::activity::text;
use weightfs_proto::control::{ActivityReply, Layer, MountActivity};

/// Columns that a line takes at the most, names and paths excepted.
const WIDTH: usize = 80;

/// What is mounted, and the layers of images.
pub(super) fn of(activity: &ActivityReply, of_images: &[Layer]) -> String {
    mounts(activity) + &layers(of_images)
}

/// What is mounted. A name has a line of its own: most would not fit beside the numbers.
fn mounts(activity: &ActivityReply) -> String {
    if activity.mounts.is_empty() {
        return String::new();
    }
    let head = row(["FILES", "HERE", "OF", "%", "READ", "FETCHED", "HITS", "STATE"]);
    let mut text = format!("\nMOUNTS\n{head}");
    for mount in &activity.mounts {
        text += &mount_rows(mount);
    }
    let more = activity.mounts_total.saturating_sub(activity.mounts.len() as u64);
    if more > 0 {
        text += &format!("and {more} more\n");
    }
    text
}

fn mount_rows(mount: &MountActivity) -> String {
    let (here, of) = (text::size(mount.cached), text::size(mount.size));
    let share = text::percent(mount.cached, mount.size);
    let [read, fetched] = [mount.read_rate, mount.fetch_rate].map(text::rate);
    let (files, hits, state) = (text::files(mount), text::hits(mount), &mount.state);
    let numbers = row([&files, &here, &of, &share.to_string(), &read, &fetched, &hits, state]);
    let from = match text::sources(mount).as_str() {
        "" => mount.trust.clone(),
        sources => format!("{}; from: {sources}", mount.trust),
    };
    let mut rows = format!("{}\n", text::name(mount));
    if !mount.target.is_empty() {
        rows += &format!("  on {}\n", mount.target);
    }
    rows += &numbers;
    let more = [from, rejected(mount.rejected), advice(&mount.trust).to_owned()];
    rows + &more.iter().chain(&mount.reasons).map(|line| indented(line)).collect::<String>()
}

/// A line of the table of mounts.
fn row([files, here, of, share, read, fetched, hits, state]: [&str; 8]) -> String {
    format!(
        "  {files:<9} {here:>10} {of:>10} {share:>3} {read:>12} {fetched:>12} {hits:>5}  {state}\n"
    )
}

/// The layers, image by image.
fn layers(layers: &[Layer]) -> String {
    let mut text = String::new();
    let mut image = None;
    for layer in layers {
        if image != Some(&layer.image) {
            image = Some(&layer.image);
            text += &heading(&layer.image);
        }
        text += &layer_row(layer);
    }
    text
}

fn heading(image: &str) -> String {
    let image = if image.is_empty() { text::NAMELESS } else { image };
    let [digest, size, here, trust] = ["LAYER", "SIZE", "HERE", "TRUST"];
    format!("\n{image}\n  {digest:<12}  {size:>10}  {here:>5}  {trust:<9}  MODE\n")
}

fn layer_row(layer: &Layer) -> String {
    // Of a layer that came without its digest, the snapshot's name ends with it or its chain's.
    let digest = if layer.digest.is_empty() { &layer.snapshot } else { &layer.digest };
    let digest = digest.rsplit([':', '/', ' ']).next().unwrap_or_default();
    let here = match layer.trust.as_str() {
        "" => "-".to_owned(),
        _ => format!("{} %", text::percent(layer.cached, layer.size)),
    };
    let trust = if layer.trust.is_empty() { "-" } else { &layer.trust };
    let (bytes, mode) = (text::size(layer.size), &layer.mode);
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

fn advice(trust: &str) -> &'static str {
    match trust {
        "poisoned" => "it does not hash to its digest and is not served; see `weightfs verify`",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some_layers() -> Vec<Layer> {
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
        let table = of(&ActivityReply::default(), &some_layers());
        assert!(table.lines().all(|line| line.chars().count() <= WIDTH), "{table}");
        assert_eq!(table.matches("LAYER").count(), 2, "an image's layers stand together");
        for text in
            ["lazy", "no-annotations", "disable_snapshot_annotations", "aabbccddeeff", "7 wrong"]
        {
            assert!(table.contains(text), "{text} in {table}");
        }
    }

    #[test]
    fn mounts_fit_too_whatever_their_numbers_are() {
        let mount = MountActivity {
            name: "registry.example.com/models/llama:8b".to_owned(),
            target: "/mnt/model".to_owned(),
            files: 4096,
            files_complete: Some(4095),
            size: 1023 << 30,
            cached: 1022 << 30,
            fetched: [("registry".to_owned(), 1), ("peer".to_owned(), 3)].into(),
            read_rate: 1023 << 20,
            fetch_rate: 1023 << 30,
            hits: 1,
            trust: "poisoned".to_owned(),
            state: "poisoned".to_owned(),
            reasons: vec!["2 layers are pulled: no-annotations".to_owned()],
            rejected: 1,
            ..MountActivity::default()
        };
        let activity = ActivityReply {
            mounts: vec![mount, MountActivity::default()],
            mounts_total: 5,
            ..ActivityReply::default()
        };
        let table = mounts(&activity);
        assert!(table.lines().all(|line| line.chars().count() <= WIDTH), "{table}");
        for text in [
            "4095/4096",
            "99",
            "1023.0 MiB/s",
            "100 %",
            "peer 75 %, registry 25 %",
            "on /mnt/model",
            "1 wrong chunk",
            "verify",
            "2 layers are pulled",
            "and 3 more",
            text::NAMELESS,
        ] {
            assert!(table.contains(text), "{text} in {table}");
        }
    }
}
