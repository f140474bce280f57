//! What the daemon needs of the machine: the host's mount namespace, FUSE, the kernel, and a disk
//! that can hold the cache.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use nix::sys::statvfs::statvfs;
use nix::sys::utsname::uname;
use procfs::process::Process;
use weightfs_fusefs::session::SOURCE_NAME;
use weightfs_proto::control::StatusReply;
use weightfs_store::{Amount, Store};

use super::{At, Finding};
use crate::config::Config;

/// FUSE passthrough, and requests that are sent again after a take-over.
const LEAST_KERNEL: (u32, u32) = (6, 9);

/// Files that a file system has room for, at least, in hundredths of all.
const LEAST_FREE_INODES: u64 = 1;

/// Looks at all of it. `daemon` is what a running one says of itself.
pub(super) fn examine(config: &Config, daemon: Option<&StatusReply>) -> Vec<Finding> {
    let pid = daemon.map_or(std::process::id(), |daemon| daemon.pid);
    let mut findings = vec![namespace(pid), fuse(), kernel(daemon)];
    findings.extend(cache(config));
    findings
}

/// In a mount namespace of its own, whatever is mounted is an empty directory elsewhere.
fn namespace(pid: u32) -> Finding {
    let at = At::new("mount namespace", format!("/proc/{pid}/ns/mnt"));
    let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    match (namespace(pid), namespace(1)) {
        (Some(own), Some(init)) if own == init => at.fine("the host's"),
        (Some(_), Some(_)) if is_mounted_for(1) => {
            at.fine("another than the host's; its mount is seen there")
        }
        (Some(_), Some(_)) => at.mend(
            "another than that of process 1: containers see an empty directory",
            "no PrivateMounts, PrivateTmp, ProtectSystem or MountFlags in the unit; in a pod, \
             mountPropagation: Bidirectional",
        ),
        _ => at.note("can't be compared with that of process 1", "run it as root"),
    }
}

/// Whether a process sees a mount of ours.
fn is_mounted_for(pid: i32) -> bool {
    let mounts = Process::new(pid).and_then(|process| process.mountinfo());
    mounts.is_ok_and(|mounts| {
        mounts.into_iter().any(|mount| {
            mount.fs_type == "fuse" && mount.mount_source.as_deref() == Some(SOURCE_NAME)
        })
    })
}

fn fuse() -> Finding {
    let path = Path::new("/dev/fuse");
    let at = At::new("FUSE", path.display());
    match File::options().read(true).write(true).open(path) {
        Ok(_) => at.fine("can be opened"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            at.mend("is not there", "modprobe fuse; in a container, pass the device on")
        }
        Err(error) => at.mend(format!("can't be opened: {error}"), "run it as root"),
    }
}

fn kernel(daemon: Option<&StatusReply>) -> Finding {
    let release = uname().map(|name| name.release().to_string_lossy().into_owned());
    let release = release.unwrap_or_default();
    let at = At::new("kernel", format!("Linux {release}"));
    let without = "complete files are read through the daemon, at a quarter of the speed";
    if version(&release).is_none_or(|version| version < LEAST_KERNEL) {
        let (major, minor) = LEAST_KERNEL;
        return at.mend(
            format!("is older than {major}.{minor}: no passthrough ({without}), no take-over"),
            format!("boot Linux {major}.{minor} or later"),
        );
    }
    let built_with = match daemon {
        Some(daemon) => daemon.passthrough,
        // Without a file that says so it is unknown, and taken for the default.
        None => std::fs::read_to_string(format!("/boot/config-{release}"))
            .map_or(true, |config| config.contains("\nCONFIG_FUSE_PASSTHROUGH=y")),
    };
    match built_with {
        true => at.fine("passes complete files through"),
        false => at.mend(
            format!("has no FUSE passthrough: {without}"),
            "boot a kernel with CONFIG_FUSE_PASSTHROUGH=y",
        ),
    }
}

/// `6.18.44-generic` is 6.18.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(['.', '-', '+']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn cache(config: &Config) -> Vec<Finding> {
    let root = &config.root;
    let at = At::new("cache", root.display());
    if let Err(error) = Store::check_file_system(root) {
        return vec![at.mend(error, "put `root` on a local disk (ext4, xfs)")];
    }
    // Where it would be made, if it is not there yet.
    let existing: PathBuf = root.ancestors().find(|path| path.exists()).unwrap_or(root).into();
    let Ok(found) = statvfs(&existing) else {
        return vec![at.mend("its file system can't be examined", "run it as root")];
    };
    let block = found.fragment_size();
    let room = Room { whole: found.blocks() * block, free: found.blocks_available() * block };
    let limit = config.cache.limit.map(|limit| Amount::from(limit).of(room.whole));
    let min_free = Amount::from(config.cache.min_free).of(room.whole);
    let mut findings = vec![room.judge(&at, limit, min_free)];
    if found.files() > 0 && found.files_available() < found.files() / 100 * LEAST_FREE_INODES {
        let what = format!("{} of {} inodes are free", found.files_available(), found.files());
        findings.push(at.mend(what, "remove files, or use a file system with more inodes"));
    }
    findings
}

/// Bytes of a file system.
#[derive(Debug, Clone, Copy)]
struct Room {
    whole: u64,
    free: u64,
}

impl Room {
    fn judge(self, at: &At, limit: Option<u64>, min_free: u64) -> Finding {
        let size = |bytes| ByteSize::b(bytes).display().iec();
        let Self { whole, free } = self;
        match limit {
            _ if free < min_free => at.mend(
                format!("{} are free, less than cache.min_free ({})", size(free), size(min_free)),
                "make room, or lower cache.min_free: until then little is cached",
            ),
            Some(limit) if limit > whole => at.note(
                format!("cache.limit ({}) is more than the disk has", size(limit)),
                "lower it, if the disk has other users",
            ),
            _ => at.fine(format!("{} of {} are free", size(free), size(whole))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn kernels_are_told_apart_by_number() {
        assert_eq!(version("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(version("6.9-rc1"), Some((6, 9)));
        assert!(version("6.10.0").unwrap() > version("6.9.9").unwrap());
        assert_eq!(version("linux"), None);
    }

    #[test]
    fn room_is_judged_by_the_limits() {
        let at = At::new("cache", "/x");
        let room = Room { whole: 100, free: 10 };
        let level = |limit, min_free| room.judge(&at, limit, min_free).level;
        assert_eq!(level(None, 11), Level::Mend);
        assert_eq!(level(Some(101), 10), Level::Note);
        assert_eq!(level(Some(100), 10), Level::Fine);
    }

    #[test]
    fn a_cache_in_memory_is_to_be_mended() {
        let config = Config { root: "/dev/shm/weightfs".into(), ..Config::default() };
        let findings = cache(&config);
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].level, Level::Mend);
        assert!(findings[0].found.contains("tmpfs"), "{findings:?}");
    }
}
