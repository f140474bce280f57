//! Tars made by the `tar` crate and tars broken by hand.

use tar::{Builder, EntryType, Header};

use super::*;
use crate::tree::DeviceNumber;

/// Walks a tar that lies in memory, as the drivers do it.
pub(crate) fn walk(archive: &[u8]) -> Result<Vec<Entry>, TarError> {
    let size = archive.len() as u64;
    let mut walker = Walker::new(Some(size));
    let mut entries = Vec::new();
    while let Some(need) = walker.needs() {
        if need.end > size {
            walker.end(size)?;
            break;
        }
        entries.extend(walker.feed(&archive[need.start as usize..need.end as usize])?);
    }
    Ok(entries)
}

pub(crate) fn header(kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o4755);
    header.set_uid(1000);
    header.set_gid(100);
    header.set_mtime(1_700_000_000);
    header
}

pub(crate) fn add_file(tar: &mut Builder<Vec<u8>>, path: &str, content: &[u8]) {
    let mut header = header(EntryType::Regular, content.len() as u64);
    tar.append_data(&mut header, path, content).unwrap();
}

fn names(entries: &[Entry]) -> Vec<String> {
    entries.iter().map(|entry| String::from_utf8_lossy(&entry.path).into_owned()).collect()
}

#[test]
fn every_kind_of_member_is_read() {
    let mut tar = Builder::new(Vec::new());
    tar.append_data(&mut header(EntryType::Directory, 0), "d/", &[][..]).unwrap();
    add_file(&mut tar, "d/f", b"hello");
    tar.append_link(&mut header(EntryType::Symlink, 0), "d/s", "../x").unwrap();
    tar.append_link(&mut header(EntryType::Link, 0), "d/h", "d/f").unwrap();
    let mut device = header(EntryType::Char, 0);
    device.set_device_major(1).unwrap();
    device.set_device_minor(3).unwrap();
    tar.append_data(&mut device, "null", &[][..]).unwrap();
    device.set_entry_type(EntryType::Block);
    tar.append_data(&mut device, "disk", &[][..]).unwrap();
    tar.append_data(&mut header(EntryType::Fifo, 0), "pipe", &[][..]).unwrap();
    let archive = tar.into_inner().unwrap();

    let entries = walk(&archive).unwrap();
    assert_eq!(names(&entries), ["d/", "d/f", "d/s", "d/h", "null", "disk", "pipe"]);
    let device = DeviceNumber { major: 1, minor: 3 };
    let EntryKind::File(range) = entries[1].kind.clone() else { panic!("{:?}", entries[1]) };
    assert_eq!(&archive[range.start as usize..range.end as usize], b"hello");
    assert_eq!(entries[0].kind, EntryKind::Directory);
    assert_eq!(entries[2].kind, EntryKind::Symlink(b"../x".to_vec()));
    assert_eq!(entries[3].kind, EntryKind::HardLink(b"d/f".to_vec()));
    assert_eq!(entries[4].kind, EntryKind::CharDevice(device));
    assert_eq!(entries[5].kind, EntryKind::BlockDevice(device));
    assert_eq!(entries[6].kind, EntryKind::Fifo);
    let Entry { permissions, uid, gid, mtime, .. } = entries[1];
    assert_eq!((permissions, uid, gid), (0o4755, 1000, 100));
    assert_eq!(mtime, Timestamp { seconds: 1_700_000_000, nanos: 0 });
}

#[test]
fn long_names_come_from_gnu_headers_and_ustar_prefixes() {
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(200));
    let prefixed = format!("{}/{}", "p".repeat(90), "n".repeat(90));
    let mut tar = Builder::new(Vec::new());
    let mut gnu = Header::new_gnu();
    gnu.set_size(1);
    gnu.set_mode(0o600);
    tar.append_data(&mut gnu.clone(), &long, &b"x"[..]).unwrap();
    gnu.set_entry_type(EntryType::Symlink);
    gnu.set_size(0);
    tar.append_link(&mut gnu, "link", &long).unwrap();
    add_file(&mut tar, &prefixed, b"y");
    let entries = walk(&tar.into_inner().unwrap()).unwrap();
    assert_eq!(names(&entries), [long.as_str(), "link", &prefixed]);
    assert_eq!(entries[1].kind, EntryKind::Symlink(long.into_bytes()));
}

#[test]
fn pax_records_override_the_header() {
    let mut tar = Builder::new(Vec::new());
    let capability = b"\x01\0\0\x02\n\n\0\0".as_slice();
    tar.append_pax_extensions([
        ("path", "päth/ü".as_bytes()),
        ("size", b"3"),
        ("uid", b"70000"),
        ("mtime", b"5.25"),
        ("SCHILY.xattr.security.capability", capability),
    ])
    .unwrap();
    let mut plain = header(EntryType::Regular, 0);
    plain.set_path("short").unwrap();
    plain.set_cksum();
    tar.append(&plain, &b"abc"[..]).unwrap();
    add_file(&mut tar, "next", b"");
    let entries = walk(&tar.into_inner().unwrap()).unwrap();
    assert_eq!(names(&entries), ["päth/ü", "next"]);
    let first = &entries[0];
    assert_eq!(first.kind, EntryKind::File(1536..1539));
    assert_eq!((first.uid, first.gid), (70000, 100));
    assert_eq!(first.mtime, Timestamp { seconds: 5, nanos: 250_000_000 });
    assert_eq!(first.xattrs, [(b"security.capability".to_vec(), capability.to_vec())]);
    assert!(entries[1].xattrs.is_empty(), "they hold for one member only");
}

#[test]
fn old_tars_and_global_headers_are_read() {
    let mut old = Header::new_old();
    old.set_path("dir/").unwrap();
    old.as_old_mut().linkflag = [0];
    old.set_size(0);
    old.set_cksum();
    let mut tar = Builder::new(Vec::new());
    let comment = b"16 comment=none\n";
    let mut global = header(EntryType::XGlobalHeader, comment.len() as u64);
    global.set_path("pax_global_header").unwrap();
    global.set_cksum();
    tar.append(&global, &comment[..]).unwrap();
    tar.append(&old, &[][..]).unwrap();
    let entries = walk(&tar.into_inner().unwrap()).unwrap();
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].kind, EntryKind::Directory);
}

#[test]
fn missing_end_blocks_and_padding_are_accepted() {
    let mut tar = Builder::new(Vec::new());
    add_file(&mut tar, "a", b"hello");
    let archive = tar.into_inner().unwrap();
    assert_eq!(archive.len(), 2048);
    for size in [512 + 5, 1000, 1024, 1536, 2048] {
        assert_eq!(walk(&archive[..size]).unwrap().len(), 1, "{size} bytes");
    }
    assert!(walk(&[]).unwrap().is_empty());
}

#[test]
fn a_cut_tar_names_the_offset() {
    let mut tar = Builder::new(Vec::new());
    add_file(&mut tar, "a", b"hello");
    add_file(&mut tar, "b", &[7; 600]);
    let archive = tar.into_inner().unwrap();
    for size in [1, 511, 512, 516, 1025, 1535, 1536, 2135] {
        match walk(&archive[..size]) {
            Err(TarError::Truncated { offset, .. }) => assert_eq!(offset, size as u64),
            other => panic!("{size} bytes: {other:?}"),
        }
    }
    let mut unknown = Walker::new(None);
    assert!(unknown.feed(&archive[..512]).unwrap().is_some());
    assert!(unknown.end(514).is_err(), "the content is cut");
    assert!(unknown.feed(&archive[..100]).is_err());
}

#[test]
fn damaged_headers_are_refused() {
    let mut tar = Builder::new(Vec::new());
    add_file(&mut tar, "a", b"hello");
    add_file(&mut tar, "b", b"world");
    let mut archive = tar.into_inner().unwrap();
    archive[1024 + 10] ^= 0xff;
    assert_eq!(walk(&archive).unwrap_err(), TarError::Checksum { offset: 1024 });
    assert!(matches!(walk(&[1; 4096]), Err(TarError::Checksum { offset: 0 })));
    let lone = [vec![0; 512], archive[..1024].to_vec()].concat();
    assert!(matches!(walk(&lone), Err(TarError::Malformed { offset: 512, .. })));
}

#[test]
fn sparse_and_unknown_members_are_refused_by_name() {
    let mut sparse = Header::new_gnu();
    sparse.set_entry_type(EntryType::GNUSparse);
    sparse.set_path("holes").unwrap();
    sparse.set_size(0);
    sparse.set_cksum();
    let gnu = walk(sparse.as_bytes()).unwrap_err();
    assert_eq!(gnu, TarError::Sparse { path: "holes".into() });
    assert!(gnu.to_string().contains("--sparse"));

    let mut tar = Builder::new(Vec::new());
    tar.append_pax_extensions([("GNU.sparse.major", b"1".as_slice())]).unwrap();
    add_file(&mut tar, "holes2", b"");
    let pax = walk(&tar.into_inner().unwrap()).unwrap_err();
    assert_eq!(pax, TarError::Sparse { path: "holes2".into() });

    let mut odd = header(EntryType::new(b'V'), 0);
    odd.set_path("label").unwrap();
    odd.set_cksum();
    let unknown = walk(odd.as_bytes()).unwrap_err();
    assert_eq!(unknown, TarError::Unsupported { path: "label".into(), typeflag: 'V' });
}

#[test]
fn sizes_beyond_the_bounds_are_refused() {
    let mut pax = header(EntryType::XHeader, MAX_METADATA_BYTES + 1);
    pax.set_path("x").unwrap();
    pax.set_cksum();
    assert!(matches!(walk(pax.as_bytes()), Err(TarError::TooMuch { .. })));

    let mut huge = header(EntryType::Regular, i64::MAX as u64);
    huge.set_path("huge").unwrap();
    huge.set_cksum();
    let mut walker = Walker::new(None);
    assert!(matches!(walker.feed(huge.as_bytes()), Err(TarError::Malformed { .. })));
    assert!(matches!(walk(huge.as_bytes()), Err(TarError::Truncated { .. })));
}

#[test]
fn a_dangling_extended_header_is_refused() {
    let mut tar = Builder::new(Vec::new());
    tar.append_pax_extensions([("path", b"a".as_slice())]).unwrap();
    let archive = tar.into_inner().unwrap();
    assert!(matches!(walk(&archive), Err(TarError::Malformed { .. })));
    assert!(matches!(walk(&archive[..1024]), Err(TarError::Truncated { .. })));
}

#[test]
fn only_files_have_content() {
    let mut directory = header(EntryType::Directory, 4096);
    directory.set_path("d").unwrap();
    directory.set_cksum();
    let mut tar = Builder::new(directory.as_bytes().to_vec());
    // The builder writes behind what the vector holds.
    add_file(&mut tar, "d/f", b"x");
    let entries = walk(&tar.into_inner().unwrap()).unwrap();
    assert_eq!(names(&entries), ["d", "d/f"]);
}
