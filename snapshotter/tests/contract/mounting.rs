//! Mounts what the service answers, as containerd does, and takes it down again whatever happens.

use std::path::{Path, PathBuf};

use containerd_client::types::Mount;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// mount(2) takes a page of options; containerd shortens them from 512 bytes before its end.
const OPTIONS_BYTES_MAX: usize = 4096 - 512;

/// A mounted snapshot. Unmounted when dropped.
#[derive(Debug)]
pub struct Mounted {
    directory: tempfile::TempDir,
}

impl Mounted {
    pub fn new(mounts: &[Mount]) -> Mounted {
        let [mounted] = mounts else { panic!("one mount expected: {mounts:?}") };
        assert_eq!(mounted.target, "");
        let directory = crate::harness::new_root();
        match mounted.r#type.as_str() {
            "bind" => bind(mounted, directory.path()),
            "overlay" => overlay(mounted, directory.path()),
            other => panic!("unknown mount type {other}"),
        }
        Mounted { directory }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path().join(name)).unwrap()
    }

    pub fn has(&self, name: &str) -> bool {
        std::fs::symlink_metadata(self.path().join(name)).is_ok()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = umount2(self.directory.path(), MntFlags::MNT_DETACH) {
            eprintln!("{} is left mounted: {error}", self.directory.path().display());
        }
    }
}

fn bind(mounted: &Mount, target: &Path) {
    let source = Path::new(&mounted.source);
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .unwrap();
    match mounted.options.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["rw", "rbind"] => {}
        ["ro", "rbind"] => {
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
            mount(None::<&str>, target, None::<&str>, flags, None::<&str>).unwrap();
        }
        ref other => panic!("unexpected options of a bind mount: {other:?}"),
    }
}

/// Lower directories with a common beginning are named relative to it when the options are long:
/// containerd's `mount_linux.go` does the same in a child process.
fn overlay(mounted: &Mount, target: &Path) {
    let options = mounted.options.join(",");
    let target = target.to_owned();
    if options.len() <= OPTIONS_BYTES_MAX {
        return mount_overlay(&target, &options);
    }
    let lower: Vec<PathBuf> = mounted
        .options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))
        .unwrap()
        .split(':')
        .map(PathBuf::from)
        .collect();
    let common = common_beginning(&lower);
    let relative: Vec<&str> =
        lower.iter().map(|path| path.strip_prefix(&common).unwrap().to_str().unwrap()).collect();
    let mut short: Vec<String> =
        mounted.options.iter().filter(|option| !option.starts_with("lowerdir=")).cloned().collect();
    short.push(format!("lowerdir={}", relative.join(":")));
    // The working directory of a thread of its own, not of the process.
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_FS).unwrap();
        std::env::set_current_dir(&common).unwrap();
        mount_overlay(&target, &short.join(","));
    })
    .join()
    .unwrap();
}

fn mount_overlay(target: &Path, options: &str) {
    mount(Some("overlay"), target, Some("overlay"), MsFlags::empty(), Some(options)).unwrap();
}

fn common_beginning(paths: &[PathBuf]) -> PathBuf {
    let mut common = paths[0].clone();
    while !paths.iter().all(|path| path.starts_with(&common)) {
        assert!(common.pop());
    }
    common
}
