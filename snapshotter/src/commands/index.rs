//! `weightfs index`.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use weightfs::cli::IndexArgs;
use weightfs::config::Config;
use weightfs::index::{Summary, make, present};
use weightfs::profiles;

use super::progress::Downloads;
use super::{Scratch, opener, size};

/// Makes the index of an artifact, and pushes it or writes it to a file.
pub async fn run(config: &Config, arguments: IndexArgs) -> anyhow::Result<()> {
    let IndexArgs { reference, output, profile, json } = arguments;
    // Declared first: it must outlive what is open in it.
    let scratch = Scratch::open(config)?;
    let opener = opener(config, Arc::clone(&scratch.store))?;
    let artifact = opener.resolve(&reference).await?;
    let manifest = artifact.manifest_digest;
    let profile = profiles::for_index(&config.root, manifest, profile.as_deref())?;
    if output.is_none()
        && let Some(summary) = present(&opener, &artifact, profile.as_ref()).await?
    {
        return print(&summary, json, "indexed already");
    }
    let downloads = Downloads::new("reading layers");
    let made = make(&opener, artifact, profile, &downloads).await;
    downloads.finish();
    let made = made?;
    match &output {
        Some(path) => {
            write(path, &made.bytes).with_context(|| path.display().to_string())?;
            print(&made.summary, json, &format!("written to {}", path.display()))
        }
        None => print(&made.push(&opener).await?, json, "pushed"),
    }
}

/// Replaces the file in one step.
fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    let mut file = tempfile::NamedTempFile::new_in(dir.unwrap_or(Path::new(".")))?;
    std::io::Write::write_all(&mut file, bytes)?;
    file.persist(path)?;
    Ok(())
}

fn print(summary: &Summary, json: bool, what: &str) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(summary).context("JSON")?);
        return Ok(());
    }
    let Summary { index, referrer, bytes, layers, chunks, files, profiled, .. } = summary;
    println!("{index} {what}");
    if let Some(referrer) = referrer {
        println!("carried by {referrer}, which is what `cosign sign` takes");
    }
    println!("{layers} layers, {files} files, {chunks} chunks, {}", size(*bytes as u64));
    if *profiled > 0 {
        println!("with a recorded load of {}", size(*profiled));
    }
    Ok(())
}
