use std::io::Write as _;

use super::*;
use crate::artifact::Compression;
use crate::layer::spans::Collector;
use crate::testing::{Fault, MemorySource};

/// Text that compresses, and is nowhere the same.
fn text(len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 40);
    let mut state = 7u64;
    while bytes.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
        writeln!(bytes, "line {} says {:x}", state % 1000, state >> 40).unwrap();
    }
    bytes.truncate(len);
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::GzBuilder::new()
        .filename("a name")
        .comment("and a comment")
        .extra(vec![1, 2, 3])
        .write(vec![], flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// What a stream inflates to, and its points. The input comes in pieces.
fn inflate(blob: &[u8], compression: Compression, piece: usize) -> io::Result<(Vec<u8>, Bytes)> {
    let mut decoder = Decoder::new(compression)?;
    let (mut collector, mut content, mut taken) = (Collector::default(), vec![], 0);
    loop {
        collector.note(&decoder, content.len() as u64, taken as u64);
        let input = &blob[taken..blob.len().min(taken + piece)];
        let step = decoder.step(input)?;
        taken += step.consumed;
        content.extend_from_slice(decoder.bytes(&step.produced));
        if input.is_empty() && step.produced.is_empty() {
            assert!(decoder.may_end());
            let points = collector.finish(content.len() as u64);
            return Ok((content, points));
        }
    }
}

async fn read(source: &InflatedSource, range: Range<u64>) -> Result<Vec<u8>, SourceError> {
    let mut stream = source.fetch(range, Urgency::Demand).await?;
    let mut bytes = vec![];
    while let Some(piece) = stream.next().await {
        bytes.extend_from_slice(&piece?.bytes);
    }
    Ok(bytes)
}

async fn assert_spans_are_right(blob: Vec<u8>, compression: Compression, content: &[u8]) {
    let mut stored = Bytes::new();
    for piece in [1 << 20, 4096, 777] {
        let (inflated, points) = inflate(&blob, compression, piece).unwrap();
        assert!(inflated == content);
        stored = points;
    }
    let sizes = (blob.len() as u64, content.len() as u64);
    let points = Points::parse(&stored, compression, sizes.0, sizes.1).unwrap();
    let memory = MemorySource::new(blob);
    let source = InflatedSource::new(Arc::clone(&memory) as _, Arc::new(points));
    let end = sizes.1;
    for range in [0..10, 0..end, end - 1..end, end / 2..end / 2 + 3_000_000, 5_000_000..5_000_001] {
        let expected = &content[range.start as usize..range.end as usize];
        assert!(read(&source, range.clone()).await.unwrap() == expected, "{range:?}");
    }
    let asked = memory.requests();
    assert!(asked[0].end - asked[0].start < sizes.0 / 3, "{asked:?} of {}", sizes.0);
    assert!(source.fetch(0..end + 1, Urgency::Demand).await.is_err());
}

#[tokio::test]
async fn any_part_of_a_gzip_stream_is_read_from_the_point_before_it() {
    let content = text(11 << 20);
    assert_spans_are_right(gzip(&content), Compression::Gzip, &content).await;
}

/// Of small layers: of large ones points are further apart.
#[tokio::test]
async fn a_chunk_costs_little_more_than_itself() {
    let content = text(8 << 20);
    let blob = gzip(&content);
    let (_, stored) = inflate(&blob, Compression::Gzip, 1 << 20).unwrap();
    let sizes = (blob.len() as u64, content.len() as u64);
    let points = Points::parse(&stored, Compression::Gzip, sizes.0, sizes.1).unwrap();
    let memory = MemorySource::new(blob);
    let source = InflatedSource::new(Arc::clone(&memory) as _, Arc::new(points));
    let chunks = 8;
    for chunk in 0..chunks {
        let range = chunk * (1 << 20)..(chunk + 1) * (1 << 20);
        let expected = &content[range.start as usize..range.end as usize];
        assert!(read(&source, range).await.unwrap() == expected);
    }
    let asked: u64 = memory.requests().iter().map(|range| range.end - range.start).sum();
    assert!(asked * 2 < sizes.0 * 3, "{asked} of {} bytes, chunk by chunk", sizes.0);
}

#[tokio::test]
async fn spans_go_across_members() {
    let content = text(11 << 20);
    let members = content.chunks(1_500_000).flat_map(gzip).collect();
    assert_spans_are_right(members, Compression::Gzip, &content).await;
}

#[tokio::test]
async fn any_part_of_zstd_frames_is_read_from_the_frame_that_has_it() {
    let content = text(11 << 20);
    let frames = content.chunks(700_000).flat_map(|part| zstd::encode_all(part, 1).unwrap());
    assert_spans_are_right(frames.collect(), Compression::Zstd, &content).await;
}

#[tokio::test]
async fn a_host_without_ranges_is_read_from_the_start_to_the_end() {
    let content = text(5 << 20);
    let blob = gzip(&content);
    let (_, points) = inflate(&blob, Compression::Gzip, 100_000).unwrap();
    let sizes = (blob.len() as u64, content.len() as u64);
    let points = Points::parse(&points, Compression::Gzip, sizes.0, sizes.1).unwrap();
    let memory = MemorySource::new(blob);
    memory.fail_always(Fault::NoRanges);
    let source = InflatedSource::new(memory, Arc::new(points));
    assert!(read(&source, 0..sizes.1).await.unwrap() == content);
    let error = read(&source, 4_000_000..4_000_001).await.unwrap_err();
    assert!(matches!(error, SourceError::NoRanges { .. }), "so that all is fetched: {error}");
}

#[test]
fn one_frame_has_no_points() {
    let content = text(5 << 20);
    let frame = zstd::encode_all(&content[..], 1).unwrap();
    let (inflated, points) = inflate(&frame, Compression::Zstd, 1000).unwrap();
    assert!(inflated == content && points.is_empty());
}

#[test]
fn fuzz_points_are_refused_or_give_spans_inside_the_blob() {
    let content = text(5 << 20);
    let blob = gzip(&content);
    let (_, sample) = inflate(&blob, Compression::Gzip, 100_000).unwrap();
    let sizes = (blob.len() as u64, content.len() as u64);
    bolero::check!().for_each(|input: &[u8]| {
        let bytes = Bytes::from(weightfs_fuzz::foreign(&[&sample[..200]], input));
        for stored in [bytes, sample.clone()] {
            let Ok(points) = Points::parse(&stored, Compression::Gzip, sizes.0, sizes.1) else {
                continue;
            };
            for range in [0..1, 3_000_000..3_000_005, sizes.1 - 1..sizes.1] {
                let span = points.span(&range).unwrap();
                assert!(span.content() <= range.start && span.blob.end <= sizes.0);
                assert!(span.blob.start < span.blob.end);
                if let Ok(mut decoder) = span.decoder() {
                    let _ = decoder.step(&blob[span.blob.start as usize..span.blob.end as usize]);
                }
            }
        }
    });
}
