//! Merging, by hand and against a model that unpacks into a flat map of paths.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;
use crate::artifact::{LayerContent, RawFile, RawKind};
use crate::listing::{Entry, EntryKind};
use crate::testing;

/// One blob for all: no test reads it, and a store is slow to open.
static BLOB: LazyLock<Arc<Blob>> = LazyLock::new(testing::blob);

fn listed(digest: Digest, content: LayerContent, entries: Vec<Entry>) -> Arc<OpenLayer> {
    testing::listed(&BLOB, digest, content, entries)
}

const CREATED: Timestamp = Timestamp { seconds: 1000, nanos: 0 };

fn digest(layer: usize) -> Digest {
    Digest::of(&[u8::try_from(layer).unwrap()])
}

fn entry(path: &str, kind: EntryKind) -> Entry {
    let mtime = Timestamp { seconds: 7, nanos: 8 };
    let path = path.as_bytes().to_vec();
    Entry { path, kind, permissions: 0o4711, uid: 5, gid: 6, mtime, xattrs: vec![] }
}

fn file(path: &str) -> Entry {
    entry(path, EntryKind::File(512..520))
}

fn dir(path: &str) -> Entry {
    entry(path, EntryKind::Directory)
}

fn symlink(path: &str, target: &str) -> Entry {
    entry(path, EntryKind::Symlink(target.into()))
}

fn hard_link(path: &str, target: &str) -> Entry {
    entry(path, EntryKind::HardLink(target.into()))
}

fn merge_as(
    content: &LayerContent,
    layers: Vec<Vec<Entry>>,
    base: Base,
) -> Result<Tree, TreeError> {
    let open = |(at, entries)| listed(digest(at), content.clone(), entries);
    let layers: Vec<_> = layers.into_iter().enumerate().map(open).collect();
    Tree::merge(&layers, base)
}

fn image(layers: Vec<Vec<Entry>>) -> Result<Tree, TreeError> {
    merge_as(&LayerContent::ImageTar, layers, Base::Nothing)
}

fn over_foreign(layers: Vec<Vec<Entry>>) -> Result<Tree, TreeError> {
    merge_as(&LayerContent::ImageTar, layers, Base::Foreign)
}

fn model(layers: Vec<Vec<Entry>>) -> Result<Tree, TreeError> {
    merge_as(&LayerContent::ModelTar { created: CREATED }, layers, Base::Nothing)
}

fn raw(path: &str, kind: RawKind) -> LayerContent {
    let path = PathBuf::from(path);
    let mtime = Timestamp { seconds: 9, nanos: 0 };
    let (permissions, uid, gid, created) = (0o640, 0, 0, CREATED);
    LayerContent::Raw(RawFile { path, kind, permissions, uid, gid, mtime, created })
}

fn merge_raw(contents: Vec<LayerContent>) -> Result<Tree, TreeError> {
    let layers = contents.into_iter().enumerate();
    let layers: Vec<_> = layers.map(|(at, content)| listed(digest(at), content, vec![])).collect();
    Tree::merge(&layers, Base::Nothing)
}

/// One line for each name: the path and what is there; `@n` is the layer that brought it.
fn shape(tree: &Tree) -> Vec<String> {
    let layer_of = |id| (0..10).find(|at| tree.layer_of(id) == Some(digest(*at)));
    let line = |(path, id): (PathBuf, NodeId)| {
        let node = tree.node(id).unwrap();
        let opaque = node.xattrs.iter().any(|(name, _)| name == "trusted.overlay.opaque");
        let kind = match &node.kind {
            NodeKind::Directory(_) if opaque => "/ opaque".to_owned(),
            NodeKind::Directory(_) => "/".to_owned(),
            NodeKind::File(_) => String::new(),
            NodeKind::Symlink(target) => format!(" -> {}", target.to_string_lossy()),
            NodeKind::CharDevice(number) => format!(" c{}:{}", number.major, number.minor),
            NodeKind::BlockDevice(number) => format!(" b{}:{}", number.major, number.minor),
            NodeKind::Fifo => " fifo".to_owned(),
        };
        let layer = layer_of(id).map_or(" made".to_owned(), |at| format!(" @{at}"));
        format!("{}{kind}{layer}", path.display())
    };
    tree.walk().map(line).collect()
}

fn find(tree: &Tree, path: &str) -> NodeId {
    let step = |at, name: &OsStr| tree.child(at, name).unwrap();
    Path::new(path).iter().fold(NodeId::ROOT, step)
}

fn problem(result: Result<Tree, TreeError>) -> TreeProblem {
    result.map(|tree| shape(&tree)).unwrap_err().problem
}

#[test]
fn an_image_keeps_owners_modes_devices_and_attributes() {
    let capability = (b"security.capability".to_vec(), vec![1]);
    let redirect = (b"trusted.overlay.redirect".to_vec(), b"/etc".to_vec());
    let device = DeviceNumber { major: 1, minor: 3 };
    let mut f = file("./d/f");
    f.xattrs = vec![redirect, capability];
    let layer = vec![
        dir("./"),
        dir("./d/"),
        f,
        symlink("d/s", "f"),
        entry("d/c", EntryKind::CharDevice(device)),
        entry("d/b", EntryKind::BlockDevice(device)),
        entry("d/p", EntryKind::Fifo),
    ];
    let tree = image(vec![layer]).unwrap();
    let expected = ["d/ @0", "d/b b1:3 @0", "d/c c1:3 @0", "d/f @0", "d/p fifo @0", "d/s -> f @0"];
    assert_eq!(shape(&tree), expected);
    assert_eq!((tree.len(), tree.content_bytes()), (7, 8));
    let node = tree.node(find(&tree, "d/f")).unwrap();
    assert_eq!((node.permissions, node.uid, node.gid, node.links), (0o4711, 5, 6, 1));
    assert_eq!(node.mtime, Timestamp { seconds: 7, nanos: 8 });
    assert_eq!(node.xattrs, [("security.capability".into(), vec![1])]);
    let NodeKind::File(content) = &node.kind else { panic!("{node:?}") };
    assert_eq!(content.range, 512..520);
    let root = tree.node(NodeId::ROOT).unwrap();
    assert_eq!((root.permissions, root.uid, root.links), (0o755, 0, 3), "not from ./");
}

#[test]
fn a_model_belongs_to_root_and_has_no_privileges() {
    let mut f = file("../m/f");
    f.xattrs = vec![(b"security.capability".to_vec(), vec![1]), (b"user.a".to_vec(), vec![2])];
    let device = DeviceNumber::default();
    let layer = vec![
        f,
        file("m/.wh.f"),
        symlink("m/s", "../../etc"),
        entry("m/c", EntryKind::CharDevice(device)),
        entry("m/p", EntryKind::Fifo),
        hard_link("m/h", "../m/f"),
    ];
    let tree = model(vec![layer]).unwrap();
    let expected = ["m/ made", "m/.wh.f @0", "m/f @0", "m/h @0", "m/s -> ../../etc @0"];
    assert_eq!(shape(&tree), expected);
    let node = tree.node(find(&tree, "m/f")).unwrap();
    assert_eq!((node.permissions, node.uid, node.gid, node.links), (0o711, 0, 0, 2));
    assert_eq!(node.xattrs, [("user.a".into(), vec![2])]);
    let made = tree.node(find(&tree, "m")).unwrap();
    assert_eq!((made.permissions, made.mtime, made.links), (0o755, CREATED, 2));
}

#[test]
fn raw_layers_make_files_and_their_directories() {
    let tree = merge_raw(vec![
        raw("weights/a.bin", RawKind::File),
        raw("config.json", RawKind::File),
        raw("empty", RawKind::Directory),
    ]);
    let tree = tree.unwrap();
    let expected = ["config.json @1", "empty/ @2", "weights/ made", "weights/a.bin @0"];
    assert_eq!(shape(&tree), expected);
    let node = tree.node(find(&tree, "weights/a.bin")).unwrap();
    assert_eq!((node.permissions, node.mtime.seconds), (0o640, 9));
    assert_eq!(tree.node(node.parent).unwrap().mtime, CREATED);
}

#[test]
fn of_two_raw_layers_with_one_path_the_higher_counts() {
    let tree = merge_raw(vec![raw("a", RawKind::File), raw("a", RawKind::File)]).unwrap();
    assert_eq!(shape(&tree), ["a @1"]);
}

#[test]
fn files_and_directories_of_a_model_do_not_replace_each_other() {
    let conflict = |lower: &str, upper: &str| {
        merge_raw(vec![raw(lower, RawKind::File), raw(upper, RawKind::File)])
    };
    let error = conflict("a/b", "a").unwrap_err();
    assert_eq!((error.layer, error.path.as_str()), (digest(1), "a"));
    assert!(error.to_string().contains(&digest(0).to_string()), "{error}");
    let needs = TreeProblem::NeedsDirectory { lower: digest(0) };
    assert_eq!(problem(conflict("a", "a/b")), needs);
    let over = problem(model(vec![vec![file("a")], vec![dir("a")]]));
    assert_eq!(over, TreeProblem::DirectoryOverFile { lower: digest(0) });
}

#[test]
fn later_layers_replace_what_is_below() {
    let lower = vec![dir("d"), file("d/a"), file("d/b"), file("f"), symlink("l", "d")];
    let mut d = dir("d");
    (d.permissions, d.xattrs) = (0o700, vec![(b"user.b".to_vec(), vec![])]);
    let upper = vec![d, file("d/b"), dir("f"), file("f/x"), file("l")];
    let tree = image(vec![lower, upper]).unwrap();
    let expected = ["d/ @1", "d/a @0", "d/b @1", "f/ @1", "f/x @1", "l @1"];
    assert_eq!(shape(&tree), expected);
    assert_eq!(tree.node(find(&tree, "d")).unwrap().permissions, 0o700);

    let tree = image(vec![vec![dir("d"), file("d/a")], vec![file("d")]]).unwrap();
    assert_eq!(shape(&tree), ["d @1"], "with all that was in it");
}

#[test]
fn whiteouts_hide_lower_layers_only_in_any_order() {
    let lower = || vec![dir("d"), file("d/a"), file("d/b"), dir("d/e"), file("d/e/x"), file("f")];
    let tree = image(vec![lower(), vec![file("d/.wh.a"), file(".wh.f"), file(".wh.gone")]]);
    assert_eq!(shape(&tree.unwrap()), ["d/ @0", "d/b @0", "d/e/ @0", "d/e/x @0"]);

    for upper in [
        vec![file(".wh.d"), dir("d"), file("d/new")],
        vec![dir("d"), file("d/new"), file(".wh.d")],
        vec![dir("d"), file("d/.wh..wh..opq"), file("d/new")],
        vec![dir("d"), file("d/new"), file("d/.wh..wh..opq")],
    ] {
        let tree = image(vec![lower(), upper]).unwrap();
        assert_eq!(shape(&tree), ["d/ @1", "d/new @1", "f @0"]);
    }

    let upper = vec![file("d/e/y"), file("d/.wh..wh..opq")];
    let tree = image(vec![lower(), upper]).unwrap();
    assert_eq!(shape(&tree), ["d/ @0", "d/e/ @0", "d/e/y @1", "f @0"]);
}

#[test]
fn a_file_stays_that_its_own_layer_whites_out() {
    let tree = image(vec![vec![file("a")], vec![file("a"), file(".wh.a")]]).unwrap();
    assert_eq!(shape(&tree), ["a @1"]);
}

#[test]
fn aufs_files_are_left_out_and_bad_whiteouts_refused() {
    let layer =
        vec![dir(".wh..wh.plnk"), file(".wh..wh.plnk/1.2"), file(".wh..wh.aufs"), file("a")];
    assert_eq!(shape(&image(vec![layer]).unwrap()), ["a @0"]);
    for name in [".wh.", "d/.wh..", ".wh..."] {
        assert_eq!(problem(image(vec![vec![file(name)]])), TreeProblem::Whiteout, "{name}");
    }
}

#[test]
fn hard_links_share_a_node_across_layers() {
    let lower = vec![dir("d"), file("d/a"), hard_link("b", "./d/a")];
    let upper = vec![hard_link("c", "/d/a"), file("d/.wh.a")];
    let tree = image(vec![lower, upper]).unwrap();
    assert_eq!(shape(&tree), ["b @0", "c @0", "d/ @0"]);
    let (b, c) = (find(&tree, "b"), find(&tree, "c"));
    assert_eq!((b, tree.node(b).unwrap().links), (c, 2));
    assert_eq!(tree.content_bytes(), 8, "counted once");

    let tree = image(vec![vec![symlink("s", "x"), hard_link("h", "s"), hard_link("h", "h")]]);
    let tree = tree.unwrap();
    assert_eq!(find(&tree, "s"), find(&tree, "h"), "a link to a symbolic link");
}

#[test]
fn the_last_name_of_a_file_decides_its_metadata() {
    let link = Entry { permissions: 0o4711, uid: 7, ..hard_link("b", "a") };
    let tree = image(vec![vec![file("a"), link]]).unwrap();
    let node = tree.child(NodeId::ROOT, OsStr::new("a")).and_then(|id| tree.node(id)).unwrap();
    assert_eq!((node.permissions, node.uid, node.links), (0o4711, 7, 2));
}

#[test]
fn a_hard_link_to_nothing_names_both_ends() {
    for layer in [
        vec![hard_link("a", "gone")],
        vec![hard_link("a", "gone/b")],
        vec![dir("gone"), hard_link("a", "gone")],
        vec![file("x"), hard_link("a", "x/gone")],
        vec![hard_link("a", "/")],
    ] {
        let error = image(vec![layer]).unwrap_err();
        assert_eq!(error.path, "a");
        let TreeProblem::HardLink { target } = error.problem else { panic!("{error}") };
        assert!(target.contains("gone") || target == "/", "{target}");
    }
    let escaping = vec![file("x"), hard_link("a", "../x")];
    assert_eq!(problem(image(vec![escaping])), TreeProblem::Path(PathError::Escapes));
}

#[test]
fn parents_that_are_links_are_followed_inside_the_root() {
    let lower =
        vec![dir("usr"), dir("usr/lib"), symlink("lib", "usr/lib"), symlink("up", "../../usr")];
    let upper =
        vec![file("lib/a"), file("up/b"), symlink("usr/abs", "/lib/new"), file("usr/abs/c")];
    let tree = image(vec![lower, upper]).unwrap();
    let expected = [
        "lib -> usr/lib @0",
        "up -> ../../usr @0",
        "usr/ @0",
        "usr/abs -> /lib/new @1",
        "usr/b @1",
        "usr/lib/ @0",
        "usr/lib/a @1",
        "usr/lib/new/ made",
        "usr/lib/new/c @1",
    ];
    assert_eq!(shape(&tree), expected);
}

#[test]
fn circles_of_links_and_deep_paths_are_refused() {
    let circle = vec![symlink("a", "b"), symlink("b", "a"), file("a/x")];
    assert_eq!(problem(image(vec![circle])), TreeProblem::Links);
    let deep = "d/".repeat(1500);
    let nested = vec![dir(&deep), symlink("l", &deep), file(&format!("l/{deep}x"))];
    assert_eq!(problem(image(vec![nested])), TreeProblem::Depth);
    assert_eq!(image(vec![vec![dir(&deep)]]).unwrap().len(), 1501);
    let long = vec![symlink("l", &"n".repeat(300)), file("l/x")];
    assert_eq!(problem(image(vec![long])), TreeProblem::Path(PathError::ComponentTooLong));
}

#[test]
fn names_that_escape_are_refused() {
    for tree in [image(vec![vec![file("a/../../b")]]), model(vec![vec![file("../a/../../b")]])] {
        assert_eq!(problem(tree), TreeProblem::Path(PathError::Escapes));
    }
}

#[test]
fn over_a_foreign_base_whiteouts_and_opaque_directories_remain() {
    let lower = vec![dir("d"), file("d/a"), file("d/.wh.b"), file(".wh.gone")];
    let upper = vec![file("d/.wh.a"), dir("e"), file("e/.wh..wh..opq"), file("e/f")];
    let tree = over_foreign(vec![lower, upper]).unwrap();
    let expected =
        ["d/ @0", "d/a c0:0 @1", "d/b c0:0 @0", "e/ opaque @1", "e/f @1", "gone c0:0 @0"];
    assert_eq!(shape(&tree), expected);
}

#[test]
fn overlayfs_is_told_which_directories_may_have_whiteouts() {
    let upper = vec![file("a/.wh.x"), file("b/y"), file("c/.wh..wh..opq"), file("c/.wh.z")];
    let tree = over_foreign(vec![vec![dir("a"), dir("b"), dir("c")], upper]).unwrap();
    let marked = |name: &str| {
        let id = tree.child(NodeId::ROOT, OsStr::new(name)).unwrap();
        let xattrs = &tree.node(id).unwrap().xattrs;
        xattrs.iter().any(|(name, _)| name == "trusted.overlay.origin")
    };
    assert_eq!(["a", "b", "c"].map(marked), [true, false, false]);
}

#[test]
fn a_directory_has_the_attributes_of_the_last_layer_that_lists_it() {
    let with = |name: &[u8]| Entry { xattrs: vec![(name.to_vec(), vec![])], ..dir("d") };
    let tree = image(vec![vec![with(b"user.a")], vec![with(b"user.b")], vec![file("d/x")]]);
    let tree = tree.unwrap();
    let id = tree.child(NodeId::ROOT, OsStr::new("d")).unwrap();
    assert_eq!(tree.node(id).unwrap().xattrs, [("user.b".into(), vec![])]);
}

#[test]
fn over_a_foreign_base_a_new_directory_does_not_show_what_was_hidden() {
    let hidden =
        |lower: Entry, upper: Vec<Entry>| shape(&over_foreign(vec![vec![lower], upper]).unwrap());
    assert_eq!(hidden(file(".wh.d"), vec![dir("d")]), ["d/ opaque @1"]);
    assert_eq!(hidden(file(".wh.d"), vec![file("d/x")]), ["d/ opaque made", "d/x @1"]);
    assert_eq!(hidden(file("d"), vec![dir("d")]), ["d/ opaque @1"]);
    assert_eq!(hidden(file(".wh.d"), vec![file("d")]), ["d @1"]);
    assert_eq!(hidden(dir("d"), vec![file(".wh.d"), dir("d")]), ["d/ opaque @1"]);
    assert_eq!(hidden(dir("d"), vec![dir("d"), file(".wh.d")]), ["d/ opaque @1"]);
    assert_eq!(hidden(dir("d"), vec![dir("d")]), ["d/ @1"], "foreign entries show through");
}

#[test]
fn below_an_opaque_directory_there_are_no_whiteouts() {
    let layers =
        vec![vec![dir("d"), file("d/.wh.x"), dir("d/e")], vec![file("d/e/.wh.y"), dir("d")]];
    let mut opaque = layers.clone();
    opaque.push(vec![file("d/e/.wh.z"), file("d/.wh..wh..opq")]);
    let lines = shape(&over_foreign(layers).unwrap());
    assert_eq!(lines, ["d/ @1", "d/e/ @0", "d/e/y c0:0 @1", "d/x c0:0 @0"]);
    assert_eq!(shape(&over_foreign(opaque).unwrap()), ["d/ opaque @1", "d/e/ @0"]);
    let root = over_foreign(vec![vec![file(".wh..wh..opq")]]);
    assert_eq!(problem(root), TreeProblem::OpaqueRoot);
    assert!(shape(&image(vec![vec![file("a")], vec![file(".wh..wh..opq")]]).unwrap()).is_empty());
}

#[test]
fn directories_are_read_from_any_position() {
    let tree = image(vec![vec![file("c"), file("a"), file("b")]]).unwrap();
    let names = |first| -> Vec<_> {
        let entries = tree.entries_from(NodeId::ROOT, first).unwrap();
        entries.map(|(name, _)| name.to_str().unwrap()).collect()
    };
    assert_eq!(names(0), ["a", "b", "c"]);
    assert_eq!(names(2), ["c"]);
    assert!(names(4).is_empty());
    let a = find(&tree, "a");
    assert!(tree.entries(a).is_none() && tree.child(a, OsStr::new("x")).is_none());
    assert!(tree.child(NodeId::ROOT, OsStr::new("x")).is_none());
    assert!(tree.node(NodeId(99)).is_none() && tree.layer_of(NodeId(99)).is_none());
    assert_eq!(tree.node(NodeId::ROOT).unwrap().parent, NodeId::ROOT);
}

/// What an unpack would leave: by path, whether it is a directory and the last layer that had to
/// do with it.
#[derive(Default)]
struct Unpacked(BTreeMap<String, (bool, usize)>);

impl Unpacked {
    fn below(&self, path: &str) -> Vec<String> {
        let prefix = format!("{path}/");
        self.0.keys().filter(|known| known.starts_with(&prefix)).cloned().collect()
    }

    fn remove_lower(&mut self, path: &str, layer: usize) {
        for below in self.below(path) {
            // Removing a directory of a lower layer removes what is in it; this layer would have
            // touched it otherwise.
            if self.0[&below].1 != layer {
                self.0.remove(&below);
            }
        }
    }

    fn remove(&mut self, path: &str) {
        for below in self.below(path) {
            self.0.remove(&below);
        }
        self.0.remove(path);
    }

    fn parents(&mut self, path: &str, layer: usize) -> bool {
        let ancestors: Vec<_> = path.match_indices('/').map(|(at, _)| &path[..at]).collect();
        ancestors.into_iter().all(|parent| {
            let known = self.0.entry(parent.to_owned()).or_insert((true, layer));
            known.1 = if known.0 { layer } else { known.1 };
            known.0
        })
    }

    fn apply(&mut self, action: &Action, layer: usize) -> bool {
        let path = action.path();
        if !self.parents(&path, layer) {
            return false;
        }
        let known = self.0.get(&path).copied();
        match action {
            Action::File(_) => {
                self.remove(&path);
                self.0.insert(path, (false, layer));
            }
            Action::Directory(_) => {
                if known.is_some_and(|(directory, _)| !directory) {
                    self.remove(&path);
                }
                self.0.insert(path, (true, layer));
            }
            Action::Whiteout(_) if known.is_some_and(|(_, touched)| touched == layer) => {
                self.remove_lower(&path, layer);
            }
            Action::Whiteout(_) => self.remove(&path),
            Action::Opaque(_) => {
                if known.is_some_and(|(directory, _)| !directory) {
                    return false;
                }
                self.0.insert(path.clone(), (true, layer));
                self.remove_lower(&path, layer);
            }
        }
        true
    }
}

#[derive(Debug, Clone)]
enum Action {
    File(Vec<char>),
    Directory(Vec<char>),
    Whiteout(Vec<char>),
    Opaque(Vec<char>),
}

impl Action {
    fn path(&self) -> String {
        let (Self::File(parts)
        | Self::Directory(parts)
        | Self::Whiteout(parts)
        | Self::Opaque(parts)) = self;
        parts.iter().map(char::to_string).collect::<Vec<_>>().join("/")
    }

    fn entry(&self) -> Entry {
        let path = self.path();
        match self {
            Self::File(_) => file(&path),
            Self::Directory(_) => dir(&path),
            Self::Whiteout(_) => match path.rsplit_once('/') {
                Some((parent, name)) => file(&format!("{parent}/.wh.{name}")),
                None => file(&format!(".wh.{path}")),
            },
            Self::Opaque(_) => file(&format!("{path}/.wh..wh..opq")),
        }
    }
}

fn actions() -> impl Strategy<Value = Vec<Vec<Action>>> {
    let path = prop::collection::vec(prop::sample::select(vec!['a', 'b', 'c']), 1..4);
    let action = prop_oneof![
        4 => path.clone().prop_map(Action::File),
        4 => path.clone().prop_map(Action::Directory),
        2 => path.clone().prop_map(Action::Whiteout),
        1 => path.prop_map(Action::Opaque),
    ];
    prop::collection::vec(prop::collection::vec(action, 0..8), 1..5)
}

proptest! {
    #[test]
    fn merging_is_unpacking_in_order(layers in actions()) {
        let mut unpacked = Unpacked::default();
        let fits = layers.iter().enumerate().all(|(at, layer)| {
            layer.iter().all(|action| unpacked.apply(action, at))
        });
        let entries = layers.iter().map(|layer| layer.iter().map(Action::entry).collect());
        let merged = image(entries.collect());
        prop_assert_eq!(merged.is_ok(), fits);
        if let Ok(tree) = merged {
            let names: BTreeMap<_, _> = tree
                .walk()
                .map(|(path, id)| (path.to_str().unwrap().to_owned(), tree.entries(id).is_some()))
                .collect();
            let expected: BTreeMap<_, _> =
                unpacked.0.into_iter().map(|(path, (directory, _))| (path, directory)).collect();
            prop_assert_eq!(names, expected);
            let ids: Vec<_> = tree.walk().map(|(_, id)| id.0).collect();
            prop_assert!(ids.is_sorted(), "numbers follow the walk: {:?}", ids);
        }
    }

    #[test]
    fn merging_twice_gives_the_same_numbers(layers in actions()) {
        let entries = |layers: &[Vec<Action>]| {
            layers.iter().map(|layer| layer.iter().map(Action::entry).collect()).collect()
        };
        for base in [Base::Nothing, Base::Foreign] {
            let merge = || merge_as(&LayerContent::ImageTar, entries(&layers), base);
            if let (Ok(one), Ok(other)) = (merge(), merge()) {
                prop_assert!(one.walk().eq(other.walk()));
            }
        }
    }
}

#[test]
fn what_is_left_out_is_gone_with_the_directories_that_it_emptied() {
    let entries = vec![
        dir("empty"),
        file("weights/deep/a.safetensors"),
        file("weights/b.safetensors"),
        file("docs/README.md"),
        file("config.json"),
        hard_link("docs/b.safetensors", "weights/b.safetensors"),
    ];
    let content = LayerContent::ModelTar { created: CREATED };
    let layers = [listed(digest(0), content, entries)];
    let shown = |patterns: &[&str]| {
        let patterns: Vec<_> = patterns.iter().map(ToString::to_string).collect();
        let exclude = Exclude::new(&patterns).unwrap();
        let tree = Tree::merge_without(&layers, Base::Nothing, &exclude).unwrap();
        let paths: Vec<_> = tree.walk().map(|(path, _)| path.display().to_string()).collect();
        (paths.join(" "), tree.fingerprint())
    };
    let all = shown(&[]);
    let (few, fingerprint) = shown(&["*.safetensors"]);
    assert_eq!(few, "config.json docs docs/README.md empty");
    assert_ne!(fingerprint, all.1, "the same numbers mean other files");
    let (some, _) = shown(&["*.safetensors", "!weights/b.safetensors"]);
    assert_eq!(some, "config.json docs docs/README.md empty weights weights/b.safetensors");
    assert_eq!(shown(&["*"]).0, "empty");
}
