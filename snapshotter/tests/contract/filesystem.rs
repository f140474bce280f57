//! What a mounted snapshot looks like: real overlay and bind mounts.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};

use tonic::Code;

use crate::harness::{Answer, Harness, assert_code, option, writable_directory};
use crate::mounting::Mounted;

fn mode(path: &std::path::Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[tokio::test]
async fn a_fresh_root_directory_is_0755() {
    let harness = Harness::start().await;
    let mounted = Mounted::new(&harness.prepare("key", "", &[]).await.unwrap());
    assert_eq!(mode(mounted.path()), 0o755);
    let view = Mounted::new(&harness.view("view", "").await.unwrap());
    assert_eq!(mode(view.path()), 0o755);
}

#[tokio::test]
async fn a_new_upper_directory_inherits_its_parents_mode_and_owner() {
    let harness = Harness::start().await;
    let mounts = harness.prepare("1", "", &[]).await.unwrap();
    let root = writable_directory(&mounts);
    chown(&root, Some(1001), Some(1002)).unwrap();
    fs::set_permissions(&root, Permissions::from_mode(0o3711)).unwrap();
    harness.commit("base", "1", &[]).await.unwrap();
    let mounts = harness.prepare("2", "base", &[]).await.unwrap();
    let mounted = Mounted::new(&mounts);
    let metadata = fs::metadata(mounted.path()).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1001, 1002));
    assert_eq!(mode(mounted.path()), 0o3711);
    assert_eq!(mode(&writable_directory(&mounts)), 0o3711);
}

#[tokio::test]
async fn changes_become_layers() {
    let harness = Harness::start().await;
    harness.committed("base", "", &[("kept", "base"), ("changed", "base"), ("gone", "base")]).await;
    {
        let mounted = Mounted::new(&harness.prepare("key", "base", &[]).await.unwrap());
        fs::write(mounted.path().join("changed"), "upper").unwrap();
        fs::write(mounted.path().join("new"), "upper").unwrap();
        fs::remove_file(mounted.path().join("gone")).unwrap();
    }
    harness.commit("top", "key", &[]).await.unwrap();
    let mounted = Mounted::new(&harness.prepare("container", "top", &[]).await.unwrap());
    assert_eq!(mounted.read("kept"), "base");
    assert_eq!(mounted.read("changed"), "upper");
    assert_eq!(mounted.read("new"), "upper");
    assert!(!mounted.has("gone"));
    let below = Mounted::new(&harness.view("view", "base").await.unwrap());
    assert_eq!(below.read("changed"), "base");
    assert!(below.has("gone"));
}

#[tokio::test]
async fn whiteouts_and_opaque_directories_are_overlays_own() {
    let harness = Harness::start().await;
    let mounts = harness.prepare("1", "", &[]).await.unwrap();
    let root = writable_directory(&mounts);
    fs::create_dir(root.join("directory")).unwrap();
    fs::write(root.join("directory/old"), "old").unwrap();
    fs::write(root.join("file"), "old").unwrap();
    harness.commit("base", "1", &[]).await.unwrap();

    let mounts = harness.prepare("2", "base", &[]).await.unwrap();
    {
        let mounted = Mounted::new(&mounts);
        fs::remove_file(mounted.path().join("file")).unwrap();
        fs::remove_dir_all(mounted.path().join("directory")).unwrap();
        fs::create_dir(mounted.path().join("directory")).unwrap();
        fs::write(mounted.path().join("directory/new"), "new").unwrap();
    }
    let whiteout = fs::symlink_metadata(writable_directory(&mounts).join("file")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    harness.commit("top", "2", &[]).await.unwrap();

    let mounted = Mounted::new(&harness.view("view", "top").await.unwrap());
    assert!(!mounted.has("file"));
    assert!(!mounted.has("directory/old"));
    assert_eq!(mounted.read("directory/new"), "new");
}

#[tokio::test]
async fn a_chown_of_a_lower_file_stays_in_the_upper_layer() {
    let harness = Harness::start().await;
    harness.committed("base", "", &[("file", "content")]).await;
    {
        let mounted = Mounted::new(&harness.prepare("key", "base", &[]).await.unwrap());
        chown(mounted.path().join("file"), Some(1234), Some(4321)).unwrap();
    }
    harness.commit("top", "key", &[]).await.unwrap();
    let top = Mounted::new(&harness.view("top view", "top").await.unwrap());
    let metadata = fs::metadata(top.path().join("file")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 4321));
    assert_eq!(top.read("file"), "content");
    let base = Mounted::new(&harness.view("base view", "base").await.unwrap());
    assert_eq!(fs::metadata(base.path().join("file")).unwrap().uid(), 0);
}

#[tokio::test]
async fn files_and_directories_move_out_of_lower_layers() {
    let harness = Harness::start().await;
    let mounts = harness.prepare("1", "", &[]).await.unwrap();
    let root = writable_directory(&mounts);
    fs::create_dir(root.join("directory")).unwrap();
    fs::write(root.join("directory/file"), "moved").unwrap();
    harness.commit("base", "1", &[]).await.unwrap();
    {
        let mounted = Mounted::new(&harness.prepare("2", "base", &[]).await.unwrap());
        let path = |name: &str| mounted.path().join(name);
        fs::rename(path("directory/file"), path("file")).unwrap();
        // Without redirect_dir overlay refuses to rename a lower directory, and mv(1) copies.
        match fs::rename(path("directory"), path("other")) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
                fs::create_dir(path("other")).unwrap();
                fs::remove_dir(path("directory")).unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
    harness.commit("top", "2", &[]).await.unwrap();
    let mounted = Mounted::new(&harness.view("view", "top").await.unwrap());
    assert_eq!(mounted.read("file"), "moved");
    assert!(!mounted.has("directory"));
    assert!(mounted.has("other"));
}

#[tokio::test]
async fn a_view_cannot_be_written() {
    let harness = Harness::start().await;
    harness.committed("1", "", &[("file", "1")]).await;
    harness.committed("2", "1", &[("other", "2")]).await;
    for (key, parent) in [("of nothing", ""), ("of one", "1"), ("of two", "2")] {
        let mounted = Mounted::new(&harness.view(key, parent).await.unwrap());
        let error = fs::write(mounted.path().join("new"), "x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem, "{key}");
    }
}

#[tokio::test]
async fn mounts_have_the_form_of_containerds_overlay_snapshotter() {
    let harness = Harness::start().await;
    let fresh = harness.prepare("fresh", "", &[]).await.unwrap();
    assert_eq!(
        (fresh[0].r#type.as_str(), &fresh[0].options[..]),
        ("bind", &["rw", "rbind"].map(str::to_owned)[..])
    );
    harness.committed("1", "", &[]).await;
    harness.committed("2", "1", &[]).await;

    let active = harness.prepare("active", "2", &[]).await.unwrap();
    assert_eq!((active[0].r#type.as_str(), active[0].source.as_str()), ("overlay", "overlay"));
    let lower: Vec<_> = option(&active[0], "lowerdir").unwrap().split(':').collect();
    assert_eq!(lower.len(), 2);
    assert!(option(&active[0], "workdir").is_some() && option(&active[0], "upperdir").is_some());

    let one = harness.view("view 1", "1").await.unwrap();
    assert_eq!((one[0].r#type.as_str(), one[0].source.as_str()), ("bind", lower[1]));
    assert_eq!(one[0].options, ["ro", "rbind"]);
    let two = harness.view("view 2", "2").await.unwrap();
    assert_eq!(option(&two[0], "lowerdir").unwrap(), lower.join(":"));
    assert_eq!(option(&two[0], "upperdir"), None);

    for (key, mounts) in [("fresh", fresh), ("active", active), ("view 1", one), ("view 2", two)] {
        assert_eq!(harness.mounts(key).await.unwrap(), mounts, "{key}");
    }
}

#[tokio::test]
async fn a_hundred_and_twenty_eight_layers_mount() {
    let harness = Harness::start().await;
    let mut parent = String::new();
    for number in 0..128 {
        let name = format!("layer {number}");
        let file = format!("file-{number}");
        harness.committed(&name, &parent, &[(&file, &name), ("last", &name)]).await;
        parent = name;
    }
    let mounted = Mounted::new(&harness.prepare("container", &parent, &[]).await.unwrap());
    for number in 0..128 {
        assert_eq!(mounted.read(&format!("file-{number}")), format!("layer {number}"));
    }
    assert_eq!(mounted.read("last"), "layer 127");
    fs::write(mounted.path().join("new"), "x").unwrap();
    let view = Mounted::new(&harness.view("view", &parent).await.unwrap());
    assert_eq!(view.read("last"), "layer 127");
}

#[tokio::test]
async fn a_chain_of_lazy_layers_is_one_lower_directory() {
    let harness = Harness::start().await;
    for (chain, files) in [
        ("sha256:b", vec![("b", "lazy b")]),
        ("sha256:c", vec![("c", "lazy c"), ("b", "lazy b changed")]),
        ("sha256:e", vec![("e", "lazy e")]),
    ] {
        harness.mounter.answer(chain, Answer::Lazy(files));
    }
    harness.committed("a", "", &[("a", "ordinary a")]).await;
    assert_code(harness.prepare_layer("b", "a", "sha256:b").await, Code::AlreadyExists);
    assert_code(harness.prepare_layer("c", "b", "sha256:c").await, Code::AlreadyExists);
    harness.committed("d", "c", &[("d", "ordinary d")]).await;
    assert_code(harness.prepare_layer("e", "d", "sha256:e").await, Code::AlreadyExists);

    let mounts = harness.prepare("container", "e", &[]).await.unwrap();
    let lower: Vec<_> = option(&mounts[0], "lowerdir").unwrap().split(':').collect();
    let is_tree: Vec<bool> = lower.iter().map(|path| path.contains("/mnt/")).collect();
    assert_eq!(is_tree, [true, false, true, false]);
    let mounted = Mounted::new(&mounts);
    for (file, content) in [
        ("a", "ordinary a"),
        ("b", "lazy b changed"),
        ("c", "lazy c"),
        ("d", "ordinary d"),
        ("e", "lazy e"),
    ] {
        assert_eq!(mounted.read(file), content);
    }
    fs::write(mounted.path().join("b"), "container").unwrap();
    assert_eq!(mounted.read("b"), "container");
}

#[tokio::test]
async fn a_view_of_a_lazy_chain_is_a_read_only_bind_of_its_tree() {
    let harness = Harness::start().await;
    harness.mounter.answer("sha256:1", Answer::Lazy(vec![("weights", "1")]));
    harness.mounter.answer("sha256:2", Answer::Lazy(vec![("config", "2")]));
    assert_code(harness.prepare_layer("1", "", "sha256:1").await, Code::AlreadyExists);
    assert_code(harness.prepare_layer("2", "1", "sha256:2").await, Code::AlreadyExists);
    let mounts = harness.view("view", "2").await.unwrap();
    assert_eq!(mounts[0].r#type, "bind");
    assert_eq!(mounts[0].options, ["ro", "rbind"]);
    let mounted = Mounted::new(&mounts);
    assert_eq!((mounted.read("weights"), mounted.read("config")), ("1".into(), "2".into()));
}

#[tokio::test]
async fn an_upper_directory_inherits_from_a_lazy_parent_too() {
    let harness = Harness::start().await;
    harness.mounter.answer("sha256:1", Answer::Lazy(vec![]));
    assert_code(harness.prepare_layer("1", "", "sha256:1").await, Code::AlreadyExists);
    let tree = harness.root.join("mnt").join(harness.mounter.trees()[0].to_string());
    chown(&tree, Some(77), Some(78)).unwrap();
    fs::set_permissions(&tree, Permissions::from_mode(0o1770)).unwrap();
    let upper = writable_directory(&harness.prepare("container", "1", &[]).await.unwrap());
    let metadata = fs::metadata(&upper).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), mode(&upper)), (77, 78, 0o1770));
}
