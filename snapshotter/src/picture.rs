//! A map of blobs as SVG: one square for each part, coloured by what most of it is.
//!
//! Names come from registries: they are escaped by the template engine, as all text is.

use maud::{Markup, PreEscaped, html};
use weightfs_proto::control::{BlobMap, MapReply};
use weightfs_store::ChunkState;

use crate::activity::text::{percent, size};

/// Squares in a row, and the distance from one to the next.
const COLUMNS: usize = 64;
const PITCH: usize = 12;
const SQUARE: usize = 10;

/// Space around, the height of a line of text, and that between two blobs.
const MARGIN: usize = 16;
const LINE: usize = 20;
const GAP: usize = 14;

/// The colours of the states, for light and for dark surroundings, told apart by lightness too.
const STYLE: &str = "\
svg.map{background:#ffffff;font-family:system-ui,sans-serif;font-size:13px}\
.map text{fill:#1f2937}.map .faint{fill:#6b7280}\
.map .s0{fill:#e5e7eb}.map .s1{fill:#f59e0b}.map .s2{fill:#93c5fd}.map .s3{fill:#2563eb}.map .s4{fill:#dc2626}\
@media (prefers-color-scheme:dark){svg.map{background:#0f172a}\
.map text{fill:#e5e7eb}.map .faint{fill:#9ca3af}\
.map .s0{fill:#273449}.map .s1{fill:#fbbf24}.map .s2{fill:#60a5fa}.map .s3{fill:#3b82f6}.map .s4{fill:#f87171}\
.map .s2{fill:#a5c8ff}}";

/// The state that a part is shown as: what most of its chunks are. What is on its way shows however
/// little it is, and what is hot where it is a quarter.
pub fn shown_as(cell: &[u32]) -> ChunkState {
    let total: u32 = cell.iter().sum();
    let count = |state: ChunkState| cell.get(state as usize).copied().unwrap_or(0);
    if count(ChunkState::InFlight) > 0 {
        return ChunkState::InFlight;
    }
    if count(ChunkState::Hot) * 4 >= total && total > 0 {
        return ChunkState::Hot;
    }
    let most = ChunkState::ALL.into_iter().max_by_key(|state| count(*state));
    most.filter(|_| total > 0).unwrap_or(ChunkState::Absent)
}

/// The states of a blob's parts.
pub fn states(blob: &BlobMap) -> impl Iterator<Item = ChunkState> {
    blob.cells.chunks(ChunkState::ALL.len()).map(shown_as)
}

/// What a blob is called: its file, or the beginning of its digest.
pub fn name(blob: &BlobMap) -> String {
    match blob.name.as_str() {
        "" => blob.digest.chars().take(19).collect(),
        name => name.to_owned(),
    }
}

/// The map as a document of its own.
pub fn document(map: &MapReply) -> String {
    format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{}\n", svg(map).into_string())
}

/// The map as a part of a page.
pub fn svg(map: &MapReply) -> Markup {
    let width = 2 * MARGIN + COLUMNS * PITCH;
    let mut y = MARGIN + 2 * LINE + GAP;
    let mut blobs = vec![];
    for blob in &map.blobs {
        blobs.push(self::blob(blob, y));
        y += LINE + rows(blob) * PITCH + GAP;
    }
    html! {
        svg.map xmlns="http://www.w3.org/2000/svg" role="img"
            viewBox={ "0 0 " (width) " " (y) } width=(width) height=(y) {
            title { "Chunks of " (map.name) }
            style { (PreEscaped(STYLE)) }
            text x=(MARGIN) y=(MARGIN + 8) font-weight="600" { (map.name) }
            (legend(MARGIN + LINE))
            @for blob in &blobs { (blob) }
        }
    }
}

fn rows(blob: &BlobMap) -> usize {
    blob.cells.len().div_ceil(ChunkState::ALL.len()).div_ceil(COLUMNS)
}

fn legend(y: usize) -> Markup {
    html! {
        @for (number, state) in ChunkState::ALL.into_iter().enumerate() {
            rect class={ "s" (number) } x=(MARGIN + number * 100) y=(y) width=(SQUARE)
                height=(SQUARE) rx="2" {}
            text.faint x=(MARGIN + number * 100 + PITCH + 4) y=(y + 10) { (state.as_str()) }
        }
    }
}

fn blob(blob: &BlobMap, y: usize) -> Markup {
    let here = percent(blob.cached, blob.size);
    html! {
        text x=(MARGIN) y=(y + 10) { (name(blob)) }
        text.faint x=(MARGIN + COLUMNS * PITCH) y=(y + 10) text-anchor="end" {
            (size(blob.size)) ", " (here) " % here, " (blob.trust)
        }
        @for (number, state) in states(blob).enumerate() {
            rect class={ "s" (state as usize) } x=(MARGIN + number % COLUMNS * PITCH)
                y=(y + LINE + number / COLUMNS * PITCH) width=(SQUARE) height=(SQUARE) rx="2" {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(name: &str) -> MapReply {
        let blob = BlobMap {
            digest: "sha256:0123456789abcdef".to_owned(),
            name: name.to_owned(),
            size: 5 << 20,
            cached: 3 << 20,
            trust: "verified".to_owned(),
            chunks: 5,
            cells: ChunkState::ALL
                .iter()
                .flat_map(|state| ChunkState::ALL.map(|other| u32::from(other == *state)))
                .collect(),
        };
        MapReply { name: name.to_owned(), blobs: vec![blob] }
    }

    #[test]
    fn a_part_is_shown_as_what_it_is() {
        let shown: Vec<_> = states(&map("").blobs[0]).collect();
        assert_eq!(shown, ChunkState::ALL);
        assert_eq!(shown_as(&[90, 1, 9, 0, 0]), ChunkState::InFlight);
        assert_eq!(shown_as(&[0, 0, 60, 15, 25]), ChunkState::Hot);
        assert_eq!(shown_as(&[60, 0, 20, 20, 0]), ChunkState::Absent);
    }

    #[test]
    fn a_map_has_a_square_for_each_part_and_escapes_foreign_names() {
        let text = document(&map("a<script>&\"b"));
        assert_eq!(text.matches("<rect").count(), 2 * ChunkState::ALL.len(), "and the legend's");
        assert!(!text.contains("<script>") && text.contains("a&lt;script&gt;&amp;"), "{text}");
        assert!(text.contains("5.0 MiB, 60 % here, verified"), "{text}");
    }
}
