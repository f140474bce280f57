//! Tars that nobody packed, as far as into the tree that they make.

use std::path::Component;
use std::sync::{Arc, LazyLock};

use tar::{Builder, EntryType, Header};
use weightfs_fuzz::foreign;
use weightfs_store::{Blob, Digest};

use super::tests::{add_file, header, walk};
use super::*;
use crate::artifact::LayerContent;
use crate::listing::Listing;
use crate::testing;
use crate::tree::{Base, NodeKind, Tree};

/// One blob for all: nothing reads it, and a store is slow to open.
static BLOB: LazyLock<Arc<Blob>> = LazyLock::new(testing::blob);

/// Tars with members of every kind, in every dialect.
pub(crate) fn samples() -> [Vec<u8>; 3] {
    let empty = &[][..];
    let mut plain = Builder::new(Vec::new());
    plain.append_data(&mut header(EntryType::Directory, 0), "d/", empty).unwrap();
    add_file(&mut plain, "d/f", b"hello");
    plain.append_link(&mut header(EntryType::Symlink, 0), "s", "../d").unwrap();
    plain.append_link(&mut header(EntryType::Link, 0), "s/h", "d/f").unwrap();
    add_file(&mut plain, "d/.wh.f", b"");

    let mut pax = Builder::new(Vec::new());
    let records: [(&str, &[u8]); 5] = [
        ("path", b"b/c"),
        ("mtime", b"-1.5"),
        ("size", b"700"),
        ("uid", b"4294967295"),
        ("SCHILY.xattr.user.a", b"x\n\0"),
    ];
    pax.append_pax_extensions(records).unwrap();
    add_file(&mut pax, "b", &[1; 700]);
    pax.append_data(&mut header(EntryType::Char, 0), "null", empty).unwrap();
    add_file(&mut pax, "b/.wh..wh..opq", b"");

    let mut gnu = Builder::new(Vec::new());
    gnu.append_data(&mut Header::new_gnu(), "n/".repeat(90), empty).unwrap();
    gnu.append_link(&mut header(EntryType::Link, 0), "h", "n/".repeat(80)).unwrap();
    [plain, pax, gnu].map(|tar| tar.into_inner().unwrap())
}

/// A tar made of the input. With an odd first byte its headers' checksums are right, so that what
/// is wrong with them gets further.
pub(crate) fn foreign_tar(samples: &[Vec<u8>; 3], input: &[u8]) -> Vec<u8> {
    let (mended, rest) = input.split_first().map_or((false, input), |(b, rest)| (b % 2 == 1, rest));
    let mut archive = foreign(&samples.each_ref().map(Vec::as_slice), rest);
    if mended {
        mend(&mut archive);
    }
    archive
}

/// Puts the right checksum into every block that has a type where headers have it.
fn mend(archive: &mut [u8]) {
    for block in archive.chunks_exact_mut(BLOCK_BYTES) {
        if block[0] != 0 {
            let mut header = Header::from_byte_slice(block).clone();
            header.set_cksum();
            block.copy_from_slice(header.as_bytes());
        }
    }
}

/// As `walk`, but the size is not known before the end.
fn walk_stream(archive: &[u8]) -> Result<Vec<Entry>, TarError> {
    let mut walker = Walker::new(None);
    let mut entries = Vec::new();
    while let Some(need) = walker.needs() {
        let bytes = usize::try_from(need.start).ok().zip(usize::try_from(need.end).ok());
        match bytes.and_then(|(start, end)| archive.get(start..end)) {
            Some(bytes) => entries.extend(walker.feed(bytes)?),
            None => walker.end(archive.len() as u64)?,
        }
    }
    Ok(entries)
}

/// The trees that the entries make: as an image, over a foreign one, as a model.
fn merge(entries: &[Entry]) {
    let model = LayerContent::ModelTar { created: Timestamp::default() };
    let uses = [
        (LayerContent::ImageTar, Base::Nothing),
        (LayerContent::ImageTar, Base::Foreign),
        (model, Base::Nothing),
    ];
    for (content, base) in uses {
        let layer = testing::listed(&BLOB, Digest::of(b""), content, entries.to_vec());
        let Ok(tree) = Tree::merge(&[Arc::clone(&layer), layer], base) else { continue };
        for (path, id) in tree.walk() {
            let inside = path.components().all(|part| matches!(part, Component::Normal(_)));
            assert!(inside, "{path:?}");
            let node = tree.node(id).unwrap();
            assert!(node.permissions <= 0o7777 && node.links > 0);
            assert_eq!(matches!(node.kind, NodeKind::Directory(_)), tree.entries(id).is_some());
        }
    }
}

#[test]
fn tars_are_refused_or_listed_inside_their_bounds() {
    let samples = samples();
    bolero::check!().for_each(|input: &[u8]| {
        let archive = foreign_tar(&samples, input);
        let (size, walked) = (archive.len() as u64, walk(&archive));
        let streamed = walk_stream(&archive);
        assert_eq!(walked.is_ok(), streamed.is_ok(), "{walked:?} {streamed:?}");
        let Ok(entries) = walked else { return };
        assert_eq!(Ok(&entries), streamed.as_ref());
        assert!(entries.len() <= archive.len() / BLOCK_BYTES);
        for entry in &entries {
            if let EntryKind::File(range) = &entry.kind {
                assert!(range.start <= range.end && range.end <= size, "{range:?} of {size}");
            }
        }
        let listing = Listing::new(entries.clone(), size).expect("files of a tar are in order");
        assert_eq!(Listing::from_bytes(&listing.to_bytes()), Some(listing));
        merge(&entries);
    });
}
