//! `weightfs verify`: hashes again what is in the cache.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use futures::StreamExt as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use weightfs::cache::Repair;
use weightfs::cli::VerifyArgs;
use weightfs::config::Config;
use weightfs_proto::control::{VerifiedBlob, VerifyProgress, verify_event};

use super::cache::print_json;
use super::reach::Reach;
use super::size;

/// Something bad is left.
const BAD: u8 = 3;

/// Hashes, and repairs if that is asked for.
pub async fn run(config: &Config, arguments: VerifyArgs) -> anyhow::Result<ExitCode> {
    let VerifyArgs { subject, repair, json } = arguments;
    let repair = if repair { Repair::Yes } else { Repair::No };
    let mut cache = Reach::new(config).await?;
    let mut events = cache.verify(subject, repair).await?;
    let bar = bar();
    let mut blobs = Vec::new();
    while let Some(event) = events.next().await {
        match event?.event {
            Some(verify_event::Event::Progress(progress)) => show(&bar, progress),
            Some(verify_event::Event::Blob(blob)) => {
                if !json {
                    bar.suspend(|| print(&blob));
                }
                blobs.push(blob);
            }
            None => {}
        }
    }
    bar.finish_and_clear();
    if json {
        print_json(&json!({ "blobs": blobs.iter().map(to_json).collect::<Vec<_>>() }))?;
    } else {
        println!("{}", summary(&blobs));
    }
    Ok(if blobs.iter().any(is_bad) { ExitCode::from(BAD) } else { ExitCode::SUCCESS })
}

/// A bar if stderr is a terminal.
fn bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = "hashing {bar:24} {bytes} of {total_bytes}, {bytes_per_sec} ({eta})";
    let style = ProgressStyle::with_template(style).unwrap_or(ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style)
}

fn show(bar: &ProgressBar, progress: VerifyProgress) {
    bar.set_length(progress.total);
    bar.set_position(progress.bytes);
}

fn is_bad(blob: &VerifiedBlob) -> bool {
    matches!(blob.result.as_str(), "bad" | "failed")
}

fn print(blob: &VerifiedBlob) {
    if matches!(blob.result.as_str(), "good" | "partial" | "no-digest") {
        return;
    }
    println!("{} {}: {}", blob.digest, blob.result, blob.message);
    for reference in &blob.references {
        println!("  of {reference}");
    }
}

fn summary(blobs: &[VerifiedBlob]) -> String {
    let count = |result: &str| blobs.iter().filter(|blob| blob.result == result).count();
    let good = blobs.iter().filter(|blob| blob.result == "good");
    let bytes = size(good.map(|blob| blob.size).sum());
    let mut text = format!("{} good ({bytes})", count("good"));
    for (result, words) in [
        ("repaired", "repaired"),
        ("discarded", "discarded"),
        ("bad", "bad"),
        ("failed", "could not be checked"),
        ("partial", "not all here"),
        ("no-digest", "inflated here, without a digest"),
    ] {
        match count(result) {
            0 => {}
            some => text.push_str(&format!(", {some} {words}")),
        }
    }
    text
}

fn to_json(blob: &VerifiedBlob) -> serde_json::Value {
    json!({
        "digest": blob.digest, "result": blob.result, "message": blob.message, "size": blob.size,
        "references": blob.references,
    })
}
