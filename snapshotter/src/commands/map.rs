//! `weightfs map`: where the chunks of something are.

use anyhow::Context as _;
use serde_json::json;
use weightfs::activity::MAX_CELLS;
use weightfs::activity::text::{percent, size};
use weightfs::cli::MapArgs;
use weightfs::config::Config;
use weightfs::picture;
use weightfs_proto::control::{BlobMap, MapReply, MapRequest};
use weightfs_store::ChunkState;

/// Parts of a picture.
const PICTURE_CELLS: u32 = 4096;

/// Parts of a drawing on the terminal, and those in a line.
const DRAWN_CELLS: u32 = 1024;
const COLUMNS: usize = 76;

/// Asks the daemon and draws.
pub async fn run(config: &Config, arguments: &MapArgs) -> anyhow::Result<()> {
    let MapArgs { subject, output, json } = arguments;
    let cells = match output {
        Some(_) => PICTURE_CELLS,
        None if *json => MAX_CELLS,
        None => DRAWN_CELLS,
    };
    let mut daemon = super::daemon(config).await?;
    let request = MapRequest { subject: named(subject), cells };
    let map = daemon.map(request).await.map_err(|status| super::refused(&status))?.into_inner();
    match output {
        Some(file) => std::fs::write(file, picture::document(&map))
            .with_context(|| format!("{}", file.display())),
        None if *json => super::cache::print_json(&to_json(&map)),
        None => {
            print!("{}", drawn(&map));
            Ok(())
        }
    }
}

/// What the daemon knows it by: of a directory, its whole path.
fn named(subject: &str) -> String {
    let whole = std::fs::canonicalize(subject).ok().filter(|path| path.is_dir());
    whole.map_or_else(|| subject.to_owned(), |path| path.display().to_string())
}

fn to_json(map: &MapReply) -> serde_json::Value {
    let blob = |blob: &BlobMap| {
        let cells = blob.cells.chunks(ChunkState::ALL.len());
        json!({
            "digest": blob.digest, "name": blob.name, "size": blob.size, "cached": blob.cached,
            "trust": blob.trust, "chunks": blob.chunks, "cells": cells.collect::<Vec<_>>(),
        })
    };
    json!({
        "name": map.name,
        "states": ChunkState::ALL.map(ChunkState::as_str),
        "blobs": map.blobs.iter().map(blob).collect::<Vec<_>>(),
    })
}

/// The sign of a state, readable without colours.
pub(super) const fn sign(state: ChunkState) -> char {
    match state {
        ChunkState::Absent => '·',
        ChunkState::InFlight => '↓',
        ChunkState::Published => '░',
        ChunkState::Verified => '▓',
        ChunkState::Hot => '█',
    }
}

/// The map for a terminal.
fn drawn(map: &MapReply) -> String {
    let legend = ChunkState::ALL.map(|state| format!("{} {}", sign(state), state.as_str()));
    let mut text = format!("{}\n{}\n", map.name, legend.join("   "));
    for blob in &map.blobs {
        let (name, bytes) = (picture::name(blob), size(blob.size));
        let here = percent(blob.cached, blob.size);
        text += &format!("\n{name}\n  {bytes}, {here} % here, {}\n", blob.trust);
        let signs: Vec<_> = picture::states(blob).map(sign).collect();
        for line in signs.chunks(COLUMNS) {
            text += &format!("  {}\n", line.iter().collect::<String>());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> MapReply {
        let cells =
            (0..200).flat_map(|at| if at < 100 { [0, 0, 0, 1, 0] } else { [1, 0, 0, 0, 0] });
        let blob = BlobMap {
            name: "model.safetensors".to_owned(),
            size: 200 << 20,
            cached: 100 << 20,
            trust: "transport".to_owned(),
            chunks: 200,
            cells: cells.collect(),
            ..BlobMap::default()
        };
        MapReply { name: "r.example/m:1".to_owned(), blobs: vec![blob] }
    }

    #[test]
    fn a_directory_is_known_by_its_whole_path() {
        let here = std::env::current_dir().unwrap().canonicalize().unwrap();
        assert_eq!(named("."), here.display().to_string());
        assert_eq!(named("registry.example.com/m:1"), "registry.example.com/m:1");
    }

    #[test]
    fn a_map_fits_a_terminal() {
        let text = drawn(&map());
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert_eq!(text.matches('▓').count(), 1 + 100, "and the legend's");
        assert!(text.contains("50 % here, transport"), "{text}");
    }

    #[test]
    fn json_has_five_numbers_for_each_part() {
        let json = to_json(&map());
        assert_eq!(json["states"].as_array().unwrap().len(), 5);
        let cells = json["blobs"][0]["cells"].as_array().unwrap();
        assert_eq!(cells.len(), 200);
        assert!(cells.iter().all(|cell| cell.as_array().unwrap().len() == 5));
    }
}
