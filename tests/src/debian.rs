//! A root file system of Debian's Python, as two ordinary layers of an image: what this machine's
//! packages have installed, packed by tar and gzip.
//!
//! It takes seconds to pack, so it is kept in the target directory, under a name that says which
//! versions it is of.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use weightfs_store::Digest;

use crate::digest;
use crate::layer::{Compression, Layer};
use crate::process::run;
use crate::remote::Blob;

/// Links of a merged `/usr`, which no package owns.
const MERGED: &[&str] = &["bin", "lib", "lib32", "lib64", "libx32", "sbin"];

/// What Debian calls essential or required, and Python with all that it needs above it.
///
/// # Panics
/// When this is no Debian, or its Python is not installed.
pub fn python_layers() -> Vec<Layer> {
    let installed = query(&["-W", "-f", "${Package} ${Version} ${Essential}/${Priority}\n"]);
    let base =
        installed.lines().filter(|line| line.contains("yes/") || line.ends_with("/required"));
    let base: BTreeSet<_> = base.map(first_word).collect();
    let needed = run(Command::new("apt-cache").args([
        "depends",
        "--recurse",
        "--installed",
        "--no-recommends",
        "--no-suggests",
        "--no-conflicts",
        "--no-breaks",
        "--no-replaces",
        "--no-enhances",
        "python3",
    ]));
    let needed = needed.ok();
    let needed = needed.lines().filter(|line| !line.starts_with([' ', '<'])).map(first_word);
    let known: BTreeSet<_> = installed.lines().map(first_word).collect();
    let python: BTreeSet<_> =
        needed.filter(|name| known.contains(name) && !base.contains(name)).collect();
    assert!(python.contains("python3"), "Debian's python3 is not installed: {python:?}");

    let dir = cache(&installed);
    if !dir.is_dir() {
        let parent = dir.parent().unwrap();
        fs::create_dir_all(parent).unwrap();
        let work = tempfile::tempdir_in(parent).unwrap();
        let lower = files_of(&base);
        let mut upper = files_of(&python);
        upper.retain(|path| path.is_dir() || !lower.contains(path));
        pack(&work.path().join("0"), &lower);
        pack(&work.path().join("1"), &upper);
        fs::rename(work.keep(), &dir).unwrap();
    }
    ["0", "1"].map(|name| layer(&dir.join(name))).into()
}

fn query(arguments: &[&str]) -> String {
    run(Command::new("dpkg-query").args(arguments)).ok()
}

fn first_word(line: &str) -> &str {
    line.split([' ', ':']).next().unwrap_or_default()
}

/// Where layers of these packages are kept: beside what is built.
fn cache(installed: &str) -> PathBuf {
    let me = std::env::current_exe().unwrap();
    let target = me.ancestors().nth(3).unwrap();
    target.join("debian-python").join(&Digest::of(installed.as_bytes()).hex()[..16])
}

/// The files of packages as they lie on this machine, directories before what is in them.
fn files_of(packages: &BTreeSet<&str>) -> BTreeSet<PathBuf> {
    let names: Vec<_> = packages.iter().copied().collect();
    let listed = query(&[&["-L"], &names[..]].concat());
    let listed =
        listed.lines().filter(|line| line.starts_with('/') && *line != "/.").map(Path::new);
    // Packages name files in `/bin` that lie in `/usr/bin`.
    let real = listed
        .filter_map(|path| Some(fs::canonicalize(path.parent()?).ok()?.join(path.file_name()?)));
    let merged = MERGED.iter().map(|name| Path::new("/").join(name));
    let there = real.chain(merged).filter(|path| path.symlink_metadata().is_ok());
    let below_root = |path: &&Path| path.parent().is_some();
    let all = there.collect::<Vec<_>>();
    let with_parents = all.iter().flat_map(|path| path.ancestors().take_while(below_root));
    with_parents.map(Path::to_owned).collect()
}

/// Packs files: the list for tar's sake, the tar's digest, and the tar, compressed.
fn pack(stem: &Path, files: &BTreeSet<PathBuf>) {
    let (list, tar) = (stem.with_extension("list"), stem.with_extension("tar"));
    let lines = files.iter().map(|path| path.strip_prefix("/").unwrap().as_os_str().as_bytes());
    fs::write(&list, lines.collect::<Vec<_>>().join(&b'\n')).unwrap();
    let arguments = ["-C", "/", "--no-recursion", "--numeric-owner", "-c"];
    run(Command::new("tar").args(arguments).arg("-T").arg(&list).arg("-f").arg(&tar)).ok();
    fs::write(stem.with_extension("id"), digest::of_file(&tar).unwrap().to_string()).unwrap();
    run(Command::new("gzip").arg("-n").arg(&tar)).ok();
}

fn layer(stem: &Path) -> Layer {
    let id = fs::read_to_string(stem.with_extension("id")).unwrap();
    Layer {
        blob: Blob::from_file(&stem.with_extension("tar.gz")),
        compression: Compression::Gzip,
        diff_id: id.parse().unwrap(),
    }
}
