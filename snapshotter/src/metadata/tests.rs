use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::time::{Duration, SystemTime};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use proptest::prelude::*;

use super::*;
use crate::reason::Reason;

fn record(name: &str, parent: Option<&str>, backing: Backing) -> Record {
    let created = SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789);
    let info = SnapshotInfo {
        name: name.to_owned(),
        parent: parent.map(str::to_owned),
        kind: Kind::Committed,
        labels: BTreeMap::from([(SNAPSHOT_REF.to_owned(), format!("sha256:{name}"))]),
        created,
        updated: created,
    };
    Record { info, backing }
}

fn directory(id: u64) -> Backing {
    let usage = Usage { bytes: 4096, inodes: 1 };
    let reason = Some(Reason::NoLabels);
    Backing::Directory { id: DirectoryId(id), usage, reason, copies: Copies::Whole }
}

fn lazy(tree: u32) -> Backing {
    Backing::Lazy { tree: TreeNumber(tree), record: serde_json::json!({ "layer": tree }) }
}

fn put(metadata: &Metadata, record: Record) -> Result<(), MetadataError> {
    metadata.change(|_| Ok((Change::Put(record), ())))
}

fn remove(metadata: &Metadata, name: &str) -> Result<(), MetadataError> {
    metadata.change(|_| Ok((Change::Remove(name.to_owned()), ())))
}

#[test]
fn what_was_stored_is_there_after_a_restart() {
    let root = tempfile::tempdir().unwrap();
    let metadata = Metadata::open(root.path()).unwrap();
    put(&metadata, record("a", None, directory(1))).unwrap();
    put(&metadata, record("b", Some("a"), lazy(7))).unwrap();
    put(&metadata, record("gone", None, directory(2))).unwrap();
    remove(&metadata, "gone").unwrap();
    let before = metadata.snapshots();
    drop(metadata);

    let metadata = Metadata::open(root.path()).unwrap();
    assert_eq!(metadata.snapshots(), before);
    assert_eq!(before.len(), 2);
    assert_eq!(*metadata.snapshot("b").unwrap(), record("b", Some("a"), lazy(7)));
}

#[test]
fn a_decision_that_fails_stores_nothing() {
    let root = tempfile::tempdir().unwrap();
    let metadata = Metadata::open(root.path()).unwrap();
    let refused: Result<(), MetadataError> =
        metadata.change(|_| Err(MetadataError::NoTreeNumber { path: root.path().to_owned() }));
    assert!(refused.is_err());
    assert!(metadata.snapshots().is_empty());
}

#[test]
fn numbers_are_never_given_twice() {
    let root = tempfile::tempdir().unwrap();
    let metadata = Metadata::open(root.path()).unwrap();
    let first = metadata.allocate_tree().unwrap();
    let second = metadata.allocate_tree().unwrap();
    let id = metadata.next_directory();
    put(&metadata, record("a", None, directory(id.0))).unwrap();
    remove(&metadata, "a").unwrap();
    drop(metadata);

    let metadata = Metadata::open(root.path()).unwrap();
    let third = metadata.allocate_tree().unwrap();
    assert!(first < second && second < third);
    assert!(metadata.next_directory() > id);
}

#[test]
fn the_last_tree_number_is_followed_by_an_error() {
    let root = tempfile::tempdir().unwrap();
    let metadata = Metadata::open(root.path()).unwrap();
    let database = metadata.writer();
    write_counter(database.as_ref().unwrap(), COUNTER_TREE, u64::from(u32::MAX)).unwrap();
    drop(database);
    assert_eq!(metadata.allocate_tree().unwrap(), TreeNumber(u32::MAX));
    assert!(matches!(metadata.allocate_tree(), Err(MetadataError::NoTreeNumber { .. })));
}

#[test]
fn lazy_snapshots_come_parents_first() {
    let root = tempfile::tempdir().unwrap();
    let metadata = Metadata::open(root.path()).unwrap();
    put(&metadata, record("z-base", None, directory(1))).unwrap();
    put(&metadata, record("y", Some("z-base"), lazy(3))).unwrap();
    put(&metadata, record("x", Some("y"), lazy(4))).unwrap();
    put(&metadata, record("a", Some("x"), lazy(9))).unwrap();
    let lazy = metadata.lazy_snapshots();
    let names: Vec<_> = lazy.iter().map(|lazy| lazy.name.as_str()).collect();
    assert_eq!(names, ["y", "x", "a"]);
    let parents: Vec<_> = lazy.iter().map(|lazy| lazy.parent_tree).collect();
    assert_eq!(parents, [None, Some(TreeNumber(3)), Some(TreeNumber(4))]);
    assert_eq!(lazy[0].parent.as_deref(), Some("z-base"));
    assert_eq!(lazy[0].record, serde_json::json!({ "layer": 3 }));
}

#[test]
fn a_second_opener_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let _first = Metadata::open(root.path()).unwrap();
    assert!(matches!(Metadata::open(root.path()), Err(MetadataError::InUse { .. })));
}

#[test]
fn a_file_of_another_format_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let metadata = Metadata::open(root.path()).unwrap();
    write_counter(metadata.writer().as_ref().unwrap(), COUNTER_FORMAT, FORMAT + 1).unwrap();
    drop(metadata);
    let error = Metadata::open(root.path()).unwrap_err();
    assert!(matches!(error, MetadataError::Format { found, .. } if found == FORMAT + 1), "{error}");
}

#[test]
fn a_file_that_is_no_database_is_refused_by_name_and_kept() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join(FILE_NAME);
    fs::write(&path, vec![0xa5; 65536]).unwrap();
    let error = Metadata::open(root.path()).unwrap_err();
    assert!(matches!(error, MetadataError::Open { .. }), "{error}");
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    assert_eq!(fs::read(&path).unwrap(), vec![0xa5; 65536]);
}

#[test]
fn a_truncated_database_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let metadata = Metadata::open(root.path()).unwrap();
    for number in 0..50 {
        put(&metadata, record(&format!("snapshot-{number}"), None, directory(number))).unwrap();
    }
    drop(metadata);
    let path = root.path().join(FILE_NAME);
    let length = fs::metadata(&path).unwrap().len();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length / 2).unwrap();
    let error = Metadata::open(root.path()).unwrap_err();
    assert!(matches!(error, MetadataError::Open { .. }), "{error}");
}

#[test]
fn a_record_that_is_no_record_is_named() {
    let root = tempfile::tempdir().unwrap();
    let metadata = Metadata::open(root.path()).unwrap();
    {
        let writer = metadata.writer();
        let transaction = writer.as_ref().unwrap().begin_write().unwrap();
        let json: &[u8] = b"{\"info\":";
        transaction.open_table(SNAPSHOTS).unwrap().insert("broken", json).unwrap();
        transaction.commit().unwrap();
    }
    drop(metadata);
    let error = Metadata::open(root.path()).unwrap_err();
    assert!(matches!(&error, MetadataError::Record { name, .. } if name == "broken"), "{error}");
}

#[test]
fn records_without_their_parents_are_refused() {
    for (name, parent) in [("child", "missing"), ("circle", "circle")] {
        let root = tempfile::tempdir().unwrap();
        let metadata = Metadata::open(root.path()).unwrap();
        put(&metadata, record(name, Some(parent), directory(1))).unwrap();
        drop(metadata);
        let error = Metadata::open(root.path()).unwrap_err();
        assert!(matches!(&error, MetadataError::Orphan { name: found, .. } if found == name));
    }
}

/// Damages the database of a directory, in one of several ways.
fn damage(root: &std::path::Path, way: usize) {
    let path = root.join(FILE_NAME);
    match way {
        0 => fs::write(&path, [0x5a; 8192]).unwrap(),
        1 => fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap(),
        _ => {
            let metadata = Metadata::open(root).unwrap();
            let writer = metadata.writer();
            let transaction = writer.as_ref().unwrap().begin_write().unwrap();
            let json: &[u8] = b"{";
            transaction.open_table(SNAPSHOTS).unwrap().insert("a", json).unwrap();
            transaction.commit().unwrap();
        }
    }
    assert!(Metadata::open(root).is_err());
}

#[test]
fn a_damaged_database_is_set_aside_and_rebuilt() {
    for way in 0..3 {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("snapshots/9")).unwrap();
        let model = serde_json::json!({"reference": "localhost/m:1"});
        let tree = {
            let metadata = Metadata::open_or_rebuild(root.path()).unwrap();
            put(&metadata, record("a", None, directory(3))).unwrap();
            put(&metadata, record("gone", None, directory(4))).unwrap();
            remove(&metadata, "gone").unwrap();
            drop(metadata);
            // What was there at a start, and what came after it.
            let metadata = Metadata::open_or_rebuild(root.path()).unwrap();
            assert!(!metadata.is_unknown(DirectoryId(9)));
            put(&metadata, record("b", Some("a"), lazy(7))).unwrap();
            metadata.put_model(TreeNumber(8), &model).unwrap();
            metadata.put_model(TreeNumber(9), &model).unwrap();
            metadata.remove_model(TreeNumber(9)).unwrap();
            (0..20).map(|_| metadata.allocate_tree().unwrap()).max().unwrap()
        };
        damage(root.path(), way);
        let metadata = Metadata::open_or_rebuild(root.path()).unwrap();
        let names: Vec<_> =
            metadata.snapshots().iter().map(|record| record.info.name.clone()).collect();
        assert_eq!(names, ["a", "b"], "way {way}");
        assert_eq!(*metadata.snapshot("b").unwrap(), record("b", Some("a"), lazy(7)));
        assert_eq!(metadata.models().unwrap(), [(TreeNumber(8), model)]);
        assert!(metadata.allocate_tree().unwrap() > tree, "no number is given twice");
        assert!(metadata.next_directory().0 > 9);
        assert!(metadata.is_unknown(DirectoryId(9)), "nobody may remove it");
        assert!(!metadata.is_unknown(metadata.next_directory()));
        assert!(root.path().join("metadata.db.damaged").exists());
    }
}

#[test]
fn without_a_journal_nothing_is_known_and_nothing_is_taken_for_left_over() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("snapshots/9")).unwrap();
    let metadata = Metadata::open(root.path()).unwrap();
    put(&metadata, record("a", None, directory(9))).unwrap();
    let tree = metadata.allocate_tree().unwrap();
    drop(metadata);
    damage(root.path(), 0);
    fs::remove_file(root.path().join("metadata.journal")).unwrap();
    let metadata = Metadata::open_or_rebuild(root.path()).unwrap();
    assert!(metadata.snapshots().is_empty());
    assert!(metadata.is_unknown(DirectoryId(9)));
    assert!(metadata.allocate_tree().unwrap().0 > tree.0 + 1000);
}

#[test]
fn a_journal_that_is_cut_short_says_what_it_can() {
    let root = tempfile::tempdir().unwrap();
    let metadata = Metadata::open(root.path()).unwrap();
    put(&metadata, record("a", None, directory(1))).unwrap();
    put(&metadata, record("b", Some("a"), directory(2))).unwrap();
    drop(metadata);
    damage(root.path(), 0);
    let path = root.path().join("metadata.journal");
    let mut journal = fs::read(&path).unwrap();
    journal.truncate(journal.len() - 9);
    fs::write(&path, journal).unwrap();
    let metadata = Metadata::open_or_rebuild(root.path()).unwrap();
    assert!(metadata.snapshot("a").is_some() && metadata.snapshot("b").is_none());
}

/// A tmpfs of 2 MiB, detached when the guard goes.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> SmallDisk {
        let directory = tempfile::tempdir().unwrap();
        let flags = MsFlags::empty();
        mount(Some("tmpfs"), directory.path(), Some("tmpfs"), flags, Some("size=2m")).unwrap();
        SmallDisk(directory)
    }

    fn fill(&self) -> std::path::PathBuf {
        let path = self.0.path().join("filler");
        let mut file = fs::File::create(&path).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        umount2(self.0.path(), MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn a_full_disk_fails_changes_and_nothing_else_and_they_work_again_when_there_is_room() {
    let disk = SmallDisk::mount();
    let metadata = Metadata::open(disk.0.path()).unwrap();
    put(&metadata, record("before", None, directory(1))).unwrap();
    let filler = disk.fill();

    // The file has some room of its own, so not the first change has to fail.
    let failed = (0..1000).find_map(|number| {
        let mut big = record(&format!("during-{number}"), None, directory(2 + number));
        big.info.labels.insert("padding".to_owned(), "x".repeat(64 << 10));
        put(&metadata, big).err().map(|error| (number, error))
    });
    let (number, error) = failed.expect("the disk is full");
    assert!(
        matches!(error, MetadataError::Write { .. } | MetadataError::Unknown { .. }),
        "{error}"
    );
    assert!(metadata.snapshot("before").is_some());
    assert!(metadata.snapshot(&format!("during-{number}")).is_none());

    fs::remove_file(filler).unwrap();
    put(&metadata, record("after", None, directory(2000))).unwrap();
    let stored = metadata.snapshots();
    drop(metadata);
    let again = Metadata::open(disk.0.path()).unwrap();
    assert_eq!(again.snapshots(), stored);
    assert!(again.snapshot("after").is_some());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A damaged file is refused or was not damaged where it matters; it never takes us down.
    #[test]
    fn a_damaged_file_is_refused_or_read(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let root = tempfile::tempdir().unwrap();
        let metadata = Metadata::open(root.path()).unwrap();
        put(&metadata, record("a", None, directory(1))).unwrap();
        put(&metadata, record("b", Some("a"), lazy(7))).unwrap();
        drop(metadata);
        let path = root.path().join(FILE_NAME);
        let mut bytes = fs::read(&path).unwrap();
        // The pages in use are at the beginning.
        let length = bytes.len().min(64 << 10);
        for (at, value) in damage {
            bytes[at.index(length)] ^= value;
        }
        fs::write(&path, bytes).unwrap();
        if let Err(error) = Metadata::open(root.path()) {
            prop_assert!(error.to_string().contains(path.to_str().unwrap()));
        }
    }
}
