//! `weightfs ls`: a model's files, without a mount.

use std::sync::Arc;

use anyhow::Context as _;
use serde::Serialize;
use weightfs::config::Config;
use weightfs_fusefs::{NodeKind, Tree};
use weightfs_store::Reference;

use super::Scratch;
use super::progress::Downloads;

/// A line of the listing.
#[derive(Debug, Serialize)]
struct Line {
    mode: String,
    size: u64,
    /// Absent for directories that no layer lists.
    layer: Option<String>,
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
}

/// Prints the tree that `reference` names.
pub async fn run(config: &Config, reference: &Reference, json: bool) -> anyhow::Result<()> {
    // Declared first: it must outlive what is open in it.
    let scratch = Scratch::open(config)?;
    let store = &scratch.store;
    let opener = super::opener(config, Arc::clone(store))?;
    let artifact = opener.resolve(reference).await?;
    let downloads = Downloads::new();
    let tree = opener.open(&artifact, &downloads).await?.merge()?;
    downloads.finish();
    let lines = lines(&tree);
    if json {
        println!("{}", serde_json::to_string_pretty(&lines).context("JSON")?);
        return Ok(());
    }
    let width = lines.iter().map(|line| line.size.to_string().len()).max().unwrap_or(0);
    for line in lines {
        let Line { mode, size, layer, path, target } = line;
        // The start of a digest tells layers apart; --json has all of it.
        let layer = layer.unwrap_or_default();
        let layer = layer.strip_prefix("sha256:").unwrap_or("-");
        let arrow = target.map(|target| format!(" -> {target}")).unwrap_or_default();
        println!("{mode} {size:>width$} {layer:.12} {path}{arrow}");
    }
    Ok(())
}

fn lines(tree: &Tree) -> Vec<Line> {
    let lines = tree.walk().filter_map(|(path, id)| {
        let node = tree.node(id)?;
        let (letter, size, target) = match &node.kind {
            NodeKind::Directory(_) => ('d', 0, None),
            NodeKind::File(content) => ('-', content.range.end - content.range.start, None),
            NodeKind::Symlink(target) => {
                ('l', target.len() as u64, Some(target.to_string_lossy().into_owned()))
            }
            NodeKind::CharDevice(_) => ('c', 0, None),
            NodeKind::BlockDevice(_) => ('b', 0, None),
            NodeKind::Fifo => ('p', 0, None),
        };
        Some(Line {
            mode: mode(letter, node.permissions),
            size,
            layer: tree.layer_of(id).map(|digest| digest.to_string()),
            path: path.to_string_lossy().into_owned(),
            target,
        })
    });
    lines.collect()
}

/// As ls(1) shows it.
fn mode(letter: char, permissions: u16) -> String {
    let mut text = String::from(letter);
    for (shift, special, with_x, without_x) in
        [(6, 0o4000, 's', 'S'), (3, 0o2000, 's', 'S'), (0, 0o1000, 't', 'T')]
    {
        let bits = permissions >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, permissions & special != 0) {
            (true, true) => with_x,
            (false, true) => without_x,
            (true, false) => 'x',
            (false, false) => '-',
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_look_as_in_ls() {
        assert_eq!(mode('-', 0o644), "-rw-r--r--");
        assert_eq!(mode('d', 0o1777), "drwxrwxrwt");
        assert_eq!(mode('-', 0o4755), "-rwsr-xr-x");
        assert_eq!(mode('-', 0o2644), "-rw-r-Sr--");
    }
}
