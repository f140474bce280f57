//! The snapshots contract, line by line. Every test runs on containerd's own overlay snapshotter
//! too, which shows that the test asks for what containerd expects.

use std::fs::{self, File, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown};
use std::path::PathBuf;

use tonic::Code;
use weightfs_tests::snapshots::{Info, Kind, Labels, MountedAt, Snapshots, assert_refused, labels};
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::{Area, Containerd, ContainerdOptions, Daemon, Weightfs};

/// A snapshotter under test.
struct Subject {
    snapshots: Snapshots,
    _containerd: Option<Containerd>,
    _daemon: Option<Daemon>,
    area: Area,
}

impl Subject {
    fn overlayfs() -> Self {
        let area = Area::new();
        let containerd = Containerd::start(
            &area,
            &ContainerdOptions { no_garbage_collection: true, ..ContainerdOptions::default() },
        );
        let snapshots = Snapshots::connect(&containerd.socket(), "overlayfs");
        Self { snapshots, _containerd: Some(containerd), _daemon: None, area }
    }

    fn weightfs() -> Self {
        let area = Area::new();
        let weightfs = Weightfs::new(&area);
        let daemon = weightfs.serve(&area);
        let snapshots = Snapshots::connect(&weightfs.snapshotter_socket(), "weightfs");
        Self { snapshots, _containerd: None, _daemon: Some(daemon), area }
    }

    fn dir(&self) -> PathBuf {
        tempfile::tempdir_in(self.area.path()).unwrap().keep()
    }

    /// Mounts an active snapshot or a view.
    fn mounted(&self, key: &str) -> MountedAt {
        MountedAt::new(&self.snapshots.mounts(key).unwrap(), self.dir())
    }

    /// Commits a snapshot on `parent` with what `change` does in it.
    fn commit(&self, name: &str, parent: &str, change: impl FnOnce(&std::path::Path)) {
        let key = format!("key of {name}");
        let mounts = self.snapshots.prepare(&key, parent).unwrap();
        let mounted = MountedAt::new(&mounts, self.dir());
        change(mounted.path());
        drop(mounted);
        self.snapshots.commit(name, &key).unwrap();
    }

    /// A view of a committed snapshot.
    fn view(&self, name: &str) -> MountedAt {
        let key = format!("view of {name}");
        MountedAt::new(&self.snapshots.view(&key, name).unwrap(), self.dir())
    }
}

/// Makes of each function a test on either snapshotter.
macro_rules! contract {
    ($($name:ident),* $(,)?) => {
        mod overlayfs {
            $(#[test] fn $name() { super::$name(&super::Subject::overlayfs()); })*
        }
        mod weightfs {
            $(#[test] fn $name() { super::$name(&super::Subject::weightfs()); })*
        }
    };
}

contract![
    keys_may_look_like_anything,
    a_key_or_name_in_use_is_refused,
    what_is_not_there_is_not_found,
    the_wrong_kind_is_refused,
    a_parent_with_children_stays,
    times_and_kinds_follow_the_life_of_a_snapshot,
    a_list_has_what_stat_has,
    an_update_without_a_mask_replaces_the_labels,
    an_update_with_a_mask_changes_what_it_names,
    filters_choose,
    a_fresh_root_is_open_to_readers,
    an_upper_directory_inherits_the_owner,
    files_of_lower_layers_are_hidden_changed_and_moved,
    a_view_is_read_only,
    many_layers_mount,
    usage_counts_what_a_snapshot_holds,
    what_is_removed_is_gone,
];

fn keys_may_look_like_anything(subject: &Subject) {
    let keys = [
        "default/1/extract-7152-Y3O6 sha256:6c0c",
        "../../../etc/passwd",
        "/var/lib/kubelet/pods/x/volumes",
        "a:b c\u{1f600}%00",
    ];
    for key in keys {
        subject.snapshots.prepare(key, "").unwrap();
        assert_eq!(subject.snapshots.stat(key).unwrap().name, key);
    }
    assert_eq!(subject.snapshots.list(&[]).unwrap().len(), keys.len());
    for key in keys {
        subject.snapshots.remove(key).unwrap();
    }
}

fn a_key_or_name_in_use_is_refused(subject: &Subject) {
    let snapshots = &subject.snapshots;
    snapshots.prepare("active", "").unwrap();
    subject.commit("name", "", |_| {});
    for taken in ["active", "name"] {
        assert_refused(snapshots.prepare(taken, ""), Code::AlreadyExists);
        assert_refused(snapshots.view(taken, "name"), Code::AlreadyExists);
    }
    assert_refused(snapshots.commit("name", "active"), Code::AlreadyExists);
    assert_eq!(snapshots.stat("active").unwrap().kind(), Kind::Active);
}

fn what_is_not_there_is_not_found(subject: &Subject) {
    let snapshots = &subject.snapshots;
    assert_refused(snapshots.stat("none"), Code::NotFound);
    assert_refused(snapshots.mounts("none"), Code::NotFound);
    assert_refused(snapshots.remove("none"), Code::NotFound);
    assert_refused(snapshots.usage("none"), Code::NotFound);
    assert_refused(snapshots.commit("name", "none"), Code::NotFound);
    assert_refused(snapshots.prepare("key", "none"), Code::NotFound);
    assert_refused(snapshots.view("key", "none"), Code::NotFound);
    let info = Info { name: "none".into(), ..Info::default() };
    assert_refused(snapshots.update(info, &[]), Code::NotFound);
    assert!(snapshots.list(&[]).unwrap().is_empty(), "a failed call left something");
}

fn the_wrong_kind_is_refused(subject: &Subject) {
    let snapshots = &subject.snapshots;
    subject.commit("base", "", |_| {});
    snapshots.view("view", "base").unwrap();
    snapshots.prepare("active", "base").unwrap();
    assert_refused(snapshots.commit("other", "view"), Code::FailedPrecondition);
    assert_refused(snapshots.mounts("base"), Code::FailedPrecondition);
    assert_refused(snapshots.prepare("child", "active"), Code::InvalidArgument);
    assert_refused(snapshots.view("child", "view"), Code::InvalidArgument);
    assert_eq!(snapshots.list(&[]).unwrap().len(), 3);
}

fn a_parent_with_children_stays(subject: &Subject) {
    let snapshots = &subject.snapshots;
    subject.commit("base", "", |_| {});
    snapshots.prepare("child", "base").unwrap();
    let message = assert_refused(snapshots.remove("base"), Code::FailedPrecondition);
    assert!(message.contains("remove"), "{message}");
    snapshots.remove("child").unwrap();
    snapshots.remove("base").unwrap();
}

fn times_and_kinds_follow_the_life_of_a_snapshot(subject: &Subject) {
    let snapshots = &subject.snapshots;
    snapshots.prepare("active", "").unwrap();
    let active = snapshots.stat("active").unwrap();
    assert_eq!((active.kind(), active.parent.as_str()), (Kind::Active, ""));
    assert!(active.created_at.is_some());
    assert_eq!(active.created_at, active.updated_at);
    snapshots.commit("base", "active").unwrap();
    let base = snapshots.stat("base").unwrap();
    assert_eq!(base.kind(), Kind::Committed);
    assert_eq!(base.created_at, base.updated_at);
    assert_refused(snapshots.stat("active"), Code::NotFound);
    snapshots.view("view", "base").unwrap();
    let view = snapshots.stat("view").unwrap();
    assert_eq!((view.kind(), view.parent.as_str()), (Kind::View, "base"));
}

fn a_list_has_what_stat_has(subject: &Subject) {
    let snapshots = &subject.snapshots;
    subject.commit("base", "", |_| {});
    snapshots.prepare_with("active", "base", labels(&[("a", "b")])).unwrap();
    snapshots.view("view", "base").unwrap();
    let listed = snapshots.list(&[]).unwrap();
    let names: Vec<_> = listed.iter().map(|info| info.name.as_str()).collect();
    assert_eq!(names, ["active", "base", "view"]);
    for info in &listed {
        assert_eq!(*info, snapshots.stat(&info.name).unwrap());
    }
}

fn an_update_without_a_mask_replaces_the_labels(subject: &Subject) {
    let snapshots = &subject.snapshots;
    subject.commit("base", "", |_| {});
    snapshots.prepare_with("key", "base", labels(&[("old", "1")])).unwrap();
    let before = snapshots.stat("key").unwrap();
    let parent = "ignored".to_owned();
    let info =
        Info { name: "key".into(), parent, labels: labels(&[("new", "2")]), ..Info::default() };
    let after = snapshots.update(info, &[]).unwrap();
    assert_eq!(after, snapshots.stat("key").unwrap());
    assert_eq!((after.labels.clone(), after.parent.as_str()), (labels(&[("new", "2")]), "base"));
    assert_eq!(after.created_at, before.created_at);
    assert_ne!(after.updated_at, before.updated_at);
}

fn an_update_with_a_mask_changes_what_it_names(subject: &Subject) {
    let snapshots = &subject.snapshots;
    snapshots.prepare_with("key", "", labels(&[("a", "1"), ("b.c/d", "2")])).unwrap();
    let update = |given: Labels, paths: &[&str]| {
        let info = Info { name: "key".into(), labels: given, ..Info::default() };
        snapshots.update(info, paths).map(|info| info.labels)
    };
    let one = update(labels(&[("a", "9"), ("ignored", "x")]), &["labels.a"]).unwrap();
    assert_eq!(one, labels(&[("a", "9"), ("b.c/d", "2")]));
    let without = update(Labels::new(), &["labels.b.c/d"]).unwrap();
    assert_eq!(without, labels(&[("a", "9")]));
    let all = update(labels(&[("z", "0")]), &["labels"]).unwrap();
    assert_eq!(all, labels(&[("z", "0")]));
    assert_refused(update(Labels::new(), &["parent"]), Code::InvalidArgument);
    assert_eq!(snapshots.stat("key").unwrap().labels, labels(&[("z", "0")]));
}

fn filters_choose(subject: &Subject) {
    let snapshots = &subject.snapshots;
    subject.commit("base", "", |_| {});
    snapshots.prepare_with("one", "base", labels(&[("a.b/c", "x"), ("kind", "first")])).unwrap();
    snapshots.prepare_with("two", "", labels(&[("a.b/c", "y")])).unwrap();
    let names = |filters: &[&str]| -> Vec<String> {
        snapshots.list(filters).unwrap().into_iter().map(|info| info.name).collect()
    };
    assert_eq!(names(&["kind==committed"]), ["base"]);
    assert_eq!(names(&["name==two"]), ["two"]);
    assert_eq!(names(&["parent==base"]), ["one"]);
    assert_eq!(names(&["parent==\"base\""]), ["one"]);
    assert_eq!(names(&["labels.\"a.b/c\"==x"]), ["one"]);
    assert_eq!(names(&["labels.\"a.b/c\"!=x"]), ["base", "two"]);
    assert_eq!(names(&["labels.\"a.b/c\"~=[xy]"]), ["one", "two"]);
    assert_eq!(names(&["labels.\"a.b/c\""]), ["one", "two"]);
    assert_eq!(names(&["labels.\"a.b/c\",parent==base"]), ["one"]);
    assert_eq!(names(&["name==two", "name==base"]), ["base", "two"]);
    assert_eq!(names(&["labels.kind==first,parent==\"base\""]), ["one"]);
    assert!(names(&["name==none"]).is_empty());
    assert!(snapshots.list(&["name===two"]).is_err());
}

fn a_fresh_root_is_open_to_readers(subject: &Subject) {
    subject.snapshots.prepare("key", "").unwrap();
    let root = fs::metadata(subject.mounted("key").path()).unwrap();
    assert_eq!((root.mode() & 0o7777, root.uid(), root.gid()), (0o755, 0, 0));
}

fn an_upper_directory_inherits_the_owner(subject: &Subject) {
    subject.commit("base", "", |root| chown(root, Some(5), Some(6)).unwrap());
    subject.snapshots.prepare("key", "base").unwrap();
    let root = fs::metadata(subject.mounted("key").path()).unwrap();
    assert_eq!((root.uid(), root.gid()), (5, 6));
}

fn files_of_lower_layers_are_hidden_changed_and_moved(subject: &Subject) {
    subject.commit("base", "", |root| {
        for dir in ["dir", "opaque", "moved"] {
            fs::create_dir(root.join(dir)).unwrap();
            fs::write(root.join(dir).join("file"), dir).unwrap();
        }
        fs::write(root.join("owned"), "owned").unwrap();
    });
    subject.commit("top", "base", |root| {
        fs::remove_file(root.join("dir/file")).unwrap();
        fs::remove_dir_all(root.join("opaque")).unwrap();
        fs::create_dir(root.join("opaque")).unwrap();
        fs::write(root.join("opaque/new"), "new").unwrap();
        chown(root.join("owned"), Some(1), Some(2)).unwrap();
        fs::rename(root.join("moved/file"), root.join("here")).unwrap();
    });
    let seen = subject.view("top");
    let read = |path: &str| fs::read_to_string(seen.path().join(path)).map_err(|e| e.kind());
    assert_eq!(read("dir/file"), Err(ErrorKind::NotFound));
    assert_eq!(read("opaque/file"), Err(ErrorKind::NotFound));
    assert_eq!(read("moved/file"), Err(ErrorKind::NotFound));
    assert_eq!(read("opaque/new").as_deref(), Ok("new"));
    assert_eq!(read("here").as_deref(), Ok("moved"));
    let owned = fs::metadata(seen.path().join("owned")).unwrap();
    assert_eq!((owned.uid(), owned.gid()), (1, 2));
    let names = tree::read(seen.path());
    assert!(names.values().all(|entry| entry.xattrs.is_empty()), "{names:?}");
    let devices = fs::read_dir(seen.path().join("dir")).unwrap();
    assert_eq!(
        devices.filter(|e| e.as_ref().unwrap().file_type().unwrap().is_char_device()).count(),
        0
    );
}

fn a_view_is_read_only(subject: &Subject) {
    subject.commit("base", "", |root| fs::write(root.join("file"), "x").unwrap());
    subject.commit("top", "base", |root| fs::write(root.join("other"), "y").unwrap());
    for name in ["base", "top"] {
        let view = subject.view(name);
        assert_eq!(fs::read_to_string(view.path().join("file")).unwrap(), "x");
        let error = File::create(view.path().join("new")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem, "{name}");
    }
}

fn many_layers_mount(subject: &Subject) {
    let mut parent = String::new();
    for number in 0..128 {
        let name = format!("layer {number}");
        let key = format!("key {number}");
        let mounts = subject.snapshots.prepare(&key, &parent).unwrap();
        // Only some layers get a file: 128 mounts would take long.
        if number % 32 == 0 {
            let mounted = MountedAt::new(&mounts, subject.dir());
            fs::write(mounted.path().join(number.to_string()), "x").unwrap();
        }
        subject.snapshots.commit(&name, &key).unwrap();
        parent = name;
    }
    let seen = subject.view(&parent);
    assert_eq!(fs::read_dir(seen.path()).unwrap().count(), 4);
}

fn usage_counts_what_a_snapshot_holds(subject: &Subject) {
    subject.snapshots.prepare("key", "").unwrap();
    let empty = subject.snapshots.usage("key").unwrap();
    fs::write(subject.mounted("key").path().join("file"), vec![1; 1 << 20]).unwrap();
    let full = subject.snapshots.usage("key").unwrap();
    assert!(full.size - empty.size >= 1 << 20, "{empty:?} {full:?}");
    assert_eq!(full.inodes - empty.inodes, 1);
    subject.snapshots.commit("base", "key").unwrap();
    assert_eq!(subject.snapshots.usage("base").unwrap(), full);
}

fn what_is_removed_is_gone(subject: &Subject) {
    let snapshots = &subject.snapshots;
    subject.commit("base", "", |root| fs::write(root.join("file"), "x").unwrap());
    subject.snapshots.prepare("child", "base").unwrap();
    snapshots.remove("child").unwrap();
    snapshots.remove("base").unwrap();
    assert!(snapshots.list(&[]).unwrap().is_empty());
    subject.commit("base", "", |root| fs::write(root.join("file"), "new").unwrap());
    assert_eq!(fs::read_to_string(subject.view("base").path().join("file")).unwrap(), "new");
}

/// containerd 1.6 keeps the owner only.
#[test]
fn an_upper_directory_inherits_the_mode_too() {
    let subject = Subject::weightfs();
    subject.commit("base", "", |root| {
        fs::set_permissions(root, Permissions::from_mode(0o711)).unwrap();
    });
    subject.snapshots.prepare("key", "base").unwrap();
    let root = fs::metadata(subject.mounted("key").path()).unwrap();
    assert_eq!(root.mode() & 0o7777, 0o711);
}

/// containerd's overlay snapshotter has no Cleanup in 1.6.
#[test]
fn cleanup_is_answered() {
    let subject = Subject::weightfs();
    subject.commit("base", "", |_| {});
    subject.snapshots.cleanup().unwrap();
    assert_eq!(subject.snapshots.list(&[]).unwrap().len(), 1);
}

#[test]
fn snapshots_survive_a_restart_of_the_daemon() {
    let area = Area::new();
    let weightfs = Weightfs::new(&area);
    let daemon = weightfs.serve(&area);
    let first = Snapshots::connect(&weightfs.snapshotter_socket(), "weightfs");
    let mounts = first.prepare("key", "").unwrap();
    let mounted = MountedAt::new(&mounts, area.dir("first"));
    fs::write(mounted.path().join("file"), "kept").unwrap();
    let written = tree::read(mounted.path());
    drop(mounted);
    first.commit("base", "key").unwrap();
    first.prepare_with("active", "base", labels(&[("a", "b")])).unwrap();
    let before = first.list(&[]).unwrap();
    daemon.stop();
    let _daemon = weightfs.serve(&area);
    let second = Snapshots::connect(&weightfs.snapshotter_socket(), "weightfs");
    assert_eq!(second.list(&[]).unwrap(), before);
    let mounted = MountedAt::new(&second.mounts("active").unwrap(), area.dir("second"));
    tree::assert_same_trees(&written, &tree::read(mounted.path()), Scope::Image);
}
