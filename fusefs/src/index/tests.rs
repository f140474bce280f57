//! Indexes as they are written and read, and what must be refused.

use proptest::prelude::*;

use super::*;
use crate::listing::Entry;
use crate::tree::Timestamp;

const MIB: u64 = 1 << 20;

fn manifest() -> Digest {
    Digest::of(b"manifest")
}

fn file(path: &str, range: std::ops::Range<u64>) -> Entry {
    Entry {
        path: path.into(),
        kind: EntryKind::File(range),
        permissions: 0o644,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        xattrs: vec![],
    }
}

fn layer(name: &str, listing: Listing) -> LayerIndex {
    let chunks = chunks_of(listing.layout());
    let digests = (0..chunks).flat_map(|at| *Digest::of(&at.to_le_bytes()).as_raw());
    let digest = Digest::of(name.as_bytes());
    LayerIndex {
        digest,
        size: listing.layout().size(),
        compression: Compression::None,
        content_digest: digest,
        points: Bytes::new(),
        chunk_digests: digests.collect(),
        listing,
    }
}

/// A raw layer and a tar with a large file between small ones.
fn sample() -> Index {
    let entries = vec![
        file("a", 512..600),
        file("b", 2048..2048 + 3 * MIB + 5),
        file("c", 4 * MIB..4 * MIB + 9),
    ];
    let tar = Listing::new(entries, 5 * MIB).unwrap();
    Index::new(manifest(), vec![layer("raw", Listing::raw(2 * MIB + 1)), layer("tar", tar)])
}

#[test]
fn what_is_written_is_read() {
    let index = sample();
    let bytes = index.to_bytes().unwrap();
    let read = Index::parse(&bytes, manifest()).unwrap();
    assert_eq!(read.layers(), index.layers());
    assert_eq!(read.to_bytes().unwrap(), bytes);
    let raw = read.layer(Digest::of(b"raw")).unwrap();
    assert_eq!(raw.chunk_digests.len(), 3 * 32);
    // One for what lies before the large file, four for it, two for what lies behind it.
    assert_eq!(read.layer(Digest::of(b"tar")).unwrap().chunk_digests.len(), 7 * 32);
}

/// What `of` has, with a profile of a load that read its first layer.
fn with_profile(index: Index, of: &[Digest]) -> Index {
    let mut profile = [&b"WFPROF01"[..], manifest().as_raw()].concat();
    for number in [0, 1, 1, 1, 0, 2] {
        profile.extend_from_slice(&u32::to_le_bytes(number));
    }
    index.with_profile(&Profile::parse(&profile).unwrap(), of)
}

#[test]
fn a_profile_is_found_by_the_digests_of_its_layers() {
    let (raw, tar) = (Digest::of(b"raw"), Digest::of(b"tar"));
    // The manifest has a layer twice; the index has it once.
    let index = with_profile(sample(), &[tar, raw, tar]);
    let bytes = index.to_bytes().unwrap();
    let read = Index::parse(&bytes, manifest()).unwrap();
    assert_eq!(read.to_bytes().unwrap(), bytes);
    let other = Digest::of(b"model image");
    let found = read.profile_of(other, &[raw, tar]).unwrap();
    assert_eq!((found.manifest(), found.bytes()), (other, 3 * MIB));
    assert_eq!(found, index.profile_of(other, &[raw, tar]).unwrap());
    assert_eq!(read.profile_of(other, &[raw]).unwrap().bytes(), 2 * MIB);
    assert_eq!(sample().profile_of(other, &[raw, tar]), None);
}

#[test]
fn a_bad_profile_is_refused() {
    let good = with_profile(sample(), &[Digest::of(b"raw"), Digest::of(b"tar")]);
    let bytes = good.to_bytes().unwrap();
    let at = bytes.len() - (8 + 32 + 2 * 12);
    for (place, why) in [(at, "no profile of this version"), (at + 8, "it is of sha256:")] {
        let mut bytes = bytes.to_vec();
        bytes[place] ^= 1;
        let error = Index::parse(&bytes.into(), manifest()).unwrap_err().to_string();
        assert!(error.contains("its profile") && error.contains(why), "{error}");
    }
    for length in at..bytes.len() {
        assert!(Index::parse(&bytes.slice(..length), manifest()).is_err(), "cut at {length}");
    }
}

#[test]
fn a_chunk_takes_at_most_40_bytes() {
    let large = Index::new(manifest(), vec![layer("raw", Listing::raw(4096 * MIB))]);
    let bytes = large.to_bytes().unwrap().len();
    assert!(bytes <= 4096 * 40, "{bytes} bytes");
}

#[test]
fn an_index_of_another_artifact_is_refused() {
    let bytes = sample().to_bytes().unwrap();
    let error = Index::parse(&bytes, Digest::of(b"other")).unwrap_err();
    assert!(matches!(error, IndexError::OtherManifest { .. }), "{error}");
}

#[test]
fn another_version_is_refused_by_its_number() {
    let mut bytes = sample().to_bytes().unwrap().to_vec();
    bytes[8] = 2;
    let error = Index::parse(&bytes.into(), manifest()).unwrap_err();
    assert_eq!(error, IndexError::Version { found: 2 });
}

#[test]
fn every_cut_and_every_surplus_is_noticed() {
    let bytes = sample().to_bytes().unwrap();
    for length in 0..bytes.len() {
        assert!(Index::parse(&bytes.slice(..length), manifest()).is_err(), "cut at {length}");
    }
    let longer = [&bytes[..], b"x"].concat();
    assert!(Index::parse(&longer.into(), manifest()).is_err());
}

/// The sample with a text of its directory or listings replaced by one of the same length.
fn parse_with(from: &str, to: &str) -> Result<Index, IndexError> {
    assert_eq!(from.len(), to.len());
    let mut bytes = sample().to_bytes().unwrap().to_vec();
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes());
    let at = at.unwrap_or_else(|| panic!("{from} is not there"));
    bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
    Index::parse(&bytes.into(), manifest())
}

#[test]
fn contradictions_are_refused() {
    let size = format!("\"size\":{}", 2 * MIB + 1);
    let other = format!("\"size\":{}", 2 * MIB + 2);
    for (from, to, why) in [
        ("[512,600]", "[612,600]", "malformed"),
        (&size, &other, "its cuts are of"),
        ("\"chunkBytes\":1048576", "\"chunkBytes\":2097152", "not understood"),
    ] {
        let error = parse_with(from, to).map(drop).unwrap_err();
        assert!(error.to_string().contains(why), "{from} -> {to}: {error}");
    }
}

#[test]
fn files_that_overlap_are_refused() {
    let entries = vec![file("a", 512..1000), file("b", 900..1100)];
    let listing = Listing::new(entries, 2048).unwrap();
    let index = Index::new(manifest(), vec![layer("tar", listing)]);
    let error = Index::parse(&index.to_bytes().unwrap(), manifest()).map(drop).unwrap_err();
    assert!(error.to_string().contains("overlap"), "{error}");
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(mut changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = sample().to_bytes().unwrap().to_vec();
        for (at, value) in changes.drain(..) {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(index) = Index::parse(&bytes.into(), manifest()) {
            for layer in index.layers() {
                prop_assert_eq!(layer.chunk_digests.len() as u64, 32 * chunks_of(layer.listing.layout()));
            }
        }
    }
}

#[test]
fn fuzz_indexes_are_refused_or_consistent() {
    let layers = [Digest::of(b"raw"), Digest::of(b"tar")];
    let [sample, profiled] =
        [sample(), with_profile(sample(), &layers)].map(|index| index.to_bytes().unwrap());
    bolero::check!().for_each(|input: &[u8]| {
        let bytes = Bytes::from(weightfs_fuzz::foreign(&[&sample, &profiled], input));
        let Ok(index) = Index::parse_bound(&bytes) else { return };
        for layer in index.layers() {
            let chunks = chunks_of(layer.listing.layout());
            assert_eq!(layer.chunk_digests.len() as u64, 32 * chunks);
            assert!(!overlap(&layer.listing));
        }
        let again = index.to_bytes().unwrap();
        assert_eq!(Index::parse_bound(&again).unwrap().layers(), index.layers());
    });
}
