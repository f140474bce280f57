//! What others wrote: files of the state directory, texts and headers of registries.

use weightfs_fuzz::foreign;

use crate::chunk::{ChunkNo, ChunkTable, VerifiedChunk};
use crate::layout::{CHUNK_BYTES, Layout};
use crate::presence::{Presence, ones};
use crate::state::Record;
use crate::{Digest, parse_reference};

fn table() -> ChunkTable {
    let layout = Layout::new(100 * CHUNK_BYTES, [CHUNK_BYTES, 70 * CHUNK_BYTES + 1]).unwrap();
    ChunkTable::new(layout).unwrap()
}

#[test]
fn records_are_refused_or_speak_of_chunks_that_there_are() {
    let table = table();
    let sample = Record::complete(&table, 7).encode(table.layout());
    bolero::check!().for_each(|input: &[u8]| {
        let Some(record) = Record::decode(&foreign(&[&sample], input), &table) else { return };
        let presence = Presence::new(table.all().end.0);
        for chunk in ones(record.present.iter().copied()).map(ChunkNo) {
            let Some(verified) = VerifiedChunk::recorded(&table, chunk) else { continue };
            presence.publish(&verified);
        }
        assert!(presence.bytes() <= table.layout().size());
        assert_eq!(Record::decode(&record.encode(table.layout()), &table), Some(record));
    });
}

#[test]
fn layouts_are_refused_or_cover_their_blob() {
    let samples: [&[u8]; 2] =
        [br#"{"size":9000000,"cuts":[512,5000000]}"#, br#"{"size":0,"cuts":[]}"#];
    bolero::check!().for_each(|input: &[u8]| {
        let bytes = foreign(&samples, input);
        let Ok(layout) = serde_json::from_slice::<Layout>(&bytes) else { return };
        let mut end = 0;
        for index in 0..layout.segments() {
            let segment = layout.segment(index).unwrap();
            assert!(segment.start == end && segment.start < segment.end);
            assert_eq!(layout.segment_at(segment.start), Some(index));
            end = segment.end;
        }
        assert_eq!(end, layout.size());
        let Some(table) = ChunkTable::new(layout.clone()) else { return };
        let last = table.all().end.0.checked_sub(1).and_then(|last| table.bytes_of(ChunkNo(last)));
        assert_eq!(last.map_or(0, |(_, bytes)| bytes.end), layout.size());
    });
}

#[test]
fn digests_are_read_as_they_are_written() {
    let sample = Digest::of(b"").to_string();
    bolero::check!().for_each(|input: &[u8]| {
        let bytes = foreign(&[sample.as_bytes()], input);
        let Ok(text) = std::str::from_utf8(&bytes) else { return };
        if let Ok(digest) = text.parse::<Digest>() {
            assert_eq!(digest.to_string(), text);
        }
    });
}

#[test]
fn references_never_panic() {
    let samples: [&[u8]; 2] = [b"localhost:5000/models/a.b:v1", b"x/y@sha256:00"];
    bolero::check!().for_each(|input: &[u8]| {
        let bytes = foreign(&samples, input);
        let Ok(text) = std::str::from_utf8(&bytes) else { return };
        if let Ok(reference) = parse_reference(text) {
            assert!(!reference.repository().is_empty());
        }
    });
}
