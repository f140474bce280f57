//! `weightfs index`.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use weightfs::cli::IndexArgs;
use weightfs::config::Config;
use weightfs::index::{Summary, make, present};

use super::progress::Downloads;
use super::{Scratch, opener, size};

/// Makes the index of an artifact, and pushes it or writes it to a file.
pub async fn run(config: &Config, arguments: IndexArgs) -> anyhow::Result<()> {
    let IndexArgs { reference, output, json } = arguments;
    // Declared first: it must outlive what is open in it.
    let scratch = Scratch::open(config)?;
    let opener = opener(config, Arc::clone(&scratch.store))?;
    if output.is_none()
        && let Some(summary) = present(&opener, &reference).await?
    {
        return print(&summary, json, "indexed already");
    }
    let downloads = Downloads::new("reading layers");
    let made = make(&opener, &reference, &downloads).await;
    downloads.finish();
    let made = made?;
    match &output {
        Some(path) => {
            write(path, &made.bytes).with_context(|| path.display().to_string())?;
            print(&made.summary, json, &format!("written to {}", path.display()))
        }
        None => {
            made.push(&opener).await?;
            print(&made.summary, json, "pushed")
        }
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
    let Summary { index, bytes, layers, chunks, files, .. } = summary;
    println!("{index} {what}");
    println!("{layers} layers, {files} files, {chunks} chunks, {}", size(*bytes as u64));
    Ok(())
}
