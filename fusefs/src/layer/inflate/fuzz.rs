//! Compressed layers that nobody packed.

use std::io::Write as _;
use std::panic::AssertUnwindSafe;

use flate2::write::GzEncoder;
use weightfs_fuzz::foreign;

use super::*;
use crate::archive::tests::walk;
use crate::artifact::{Compression, LayerContent};
use crate::testing;

fn descriptor(bytes: &[u8], compression: Compression) -> LayerDescriptor {
    LayerDescriptor {
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
        media_type: "test".into(),
        compression,
        content: LayerContent::ImageTar,
    }
}

fn unpack_bytes(
    store: &Arc<Store>,
    bytes: &[u8],
    compression: Compression,
) -> Result<Listing, LayerError> {
    let (ranges, waiting) = mpsc::channel(WAITING_RANGES);
    let pieces = bytes.chunks(1000).map(Bytes::copy_from_slice).collect();
    ranges.try_send(pieces).unwrap();
    drop(ranges);
    unpack(store, &descriptor(bytes, compression), waiting).map(|(_, listing)| listing)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A store is as it was after a panic in it: what it changes is changed whole.
type Unharmed<'a> = AssertUnwindSafe<&'a Arc<Store>>;

fn in_runtime(check: impl FnOnce(Unharmed<'_>)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _entered = runtime.enter();
    let (_root, store) = testing::store();
    check(AssertUnwindSafe(&store));
}

#[test]
fn compressed_bytes_are_refused_or_give_a_tar() {
    let [tar, ..] = crate::archive::fuzz::samples();
    let samples = [gzip(&tar), zstd::encode_all(&tar[..], 1).unwrap()];
    let samples = samples.each_ref().map(Vec::as_slice);
    in_runtime(|store| {
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = foreign(&samples, input);
            for compression in [Compression::Gzip, Compression::Zstd] {
                let unpacked = unpack_bytes(*store, &bytes, compression);
                store.discard(id_of(&bytes)).unwrap();
                if let Ok(listing) = unpacked {
                    assert_eq!(Listing::from_bytes(&listing.to_bytes()), Some(listing));
                }
            }
        });
    });
}

fn id_of(bytes: &[u8]) -> BlobId {
    BlobId { digest: Digest::of(bytes), form: Form::Decompressed }
}

#[test]
fn an_inflated_tar_lists_what_the_plain_one_does() {
    let samples = crate::archive::fuzz::samples();
    in_runtime(|store| {
        bolero::check!().for_each(|input: &[u8]| {
            let tar = crate::archive::fuzz::foreign_tar(&samples, input);
            let unpacked = unpack_bytes(*store, &tar, Compression::None);
            store.discard(id_of(&tar)).unwrap();
            match (walk(&tar), unpacked) {
                (Ok(entries), Ok(listing)) => assert_eq!(entries, listing.entries()),
                (Err(_), Err(LayerError::Tar { .. })) => {}
                (plain, inflated) => panic!("plain: {plain:?}, inflated: {inflated:?}"),
            }
        });
    });
}
