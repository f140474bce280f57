//! Listings that nobody wrote.

use weightfs_fuzz::foreign;

use super::*;

fn sample() -> Vec<u8> {
    let kinds = [
        EntryKind::File(512..512 + LARGE_FILE_BYTES),
        EntryKind::HardLink(b"a".to_vec()),
        EntryKind::Symlink(b"\xfe".to_vec()),
        EntryKind::CharDevice(DeviceNumber { major: 1, minor: 3 }),
        EntryKind::Directory,
    ];
    let entry = |kind| Entry {
        path: b"a/b".to_vec(),
        kind,
        permissions: 0o644,
        uid: 1,
        gid: 2,
        mtime: Timestamp { seconds: -3, nanos: 4 },
        xattrs: vec![(b"user.a".to_vec(), vec![0, 0xff])],
    };
    Listing::new(kinds.map(entry).to_vec(), 4 << 20).unwrap().to_bytes()
}

#[test]
fn listings_are_refused_or_stay_inside_their_segments() {
    let sample = sample();
    bolero::check!().for_each(|input: &[u8]| {
        let Some(listing) = Listing::from_bytes(&foreign(&[&sample], input)) else { return };
        for entry in listing.entries() {
            if let EntryKind::File(range) = &entry.kind {
                assert!(range.start <= range.end, "{range:?}");
                assert!(range.is_empty() || range.end <= listing.layout().size());
            }
        }
        assert_eq!(Listing::from_bytes(&listing.to_bytes()), Some(listing));
    });
}
