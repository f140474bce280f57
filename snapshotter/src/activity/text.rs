//! How the numbers of a mount are written: the same in `weightfs status`, `top` and the status page.

use std::cmp::Reverse;

use bytesize::ByteSize;
use weightfs_proto::control::{MountActivity, PeersActivity};

/// What stands where there is nothing to say.
const NOTHING: &str = "–";

/// The name of what has none.
pub const NAMELESS: &str = "(layers that came without a name)";

/// A size.
pub fn size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

/// Bytes a second.
pub fn rate(bytes: u64) -> String {
    if bytes == 0 { NOTHING.to_owned() } else { format!("{}/s", size(bytes)) }
}

/// Per cent of it that are there, whole only if all is.
pub fn percent(part: u64, whole: u64) -> u64 {
    let percent = (u128::from(part) * 100).checked_div(u128::from(whole)).unwrap_or(100);
    u64::try_from(percent).unwrap_or(u64::MAX)
}

/// What it is called.
pub fn name(mount: &MountActivity) -> &str {
    if mount.name.is_empty() { NAMELESS } else { &mount.name }
}

/// What its map is asked for by: several models may have one reference.
pub fn subject(mount: &MountActivity) -> &str {
    if mount.target.is_empty() { &mount.name } else { &mount.target }
}

/// How many files are here, of how many.
pub fn files(mount: &MountActivity) -> String {
    match mount.files_complete {
        Some(complete) => format!("{complete}/{}", mount.files),
        None => mount.files.to_string(),
    }
}

/// Per cent of the reads that found their bytes here.
pub fn hits(mount: &MountActivity) -> String {
    match mount.hits.saturating_add(mount.misses) {
        0 => NOTHING.to_owned(),
        reads => format!("{} %", percent(mount.hits, reads)),
    }
}

/// The shares of the sources, the largest first; empty if nothing came.
pub fn sources(mount: &MountActivity) -> String {
    let all = mount.fetched.values().fold(0, |sum: u64, bytes| sum.saturating_add(*bytes));
    let mut sources: Vec<_> = mount.fetched.iter().filter(|(_, bytes)| **bytes > 0).collect();
    sources.sort_by_key(|(name, bytes)| (Reverse(**bytes), *name));
    let share = |(name, bytes): (&String, &u64)| format!("{name} {} %", percent(*bytes, all));
    sources.into_iter().map(share).collect::<Vec<_>>().join(", ")
}

/// The other nodes.
pub fn peers(peers: &PeersActivity) -> String {
    format!("{} of {}", peers.answering, peers.members)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_nothing_is_all_of_it_and_only_all_is_a_hundred() {
        assert_eq!((percent(0, 0), percent(1, 3), percent(3, 3)), (100, 33, 100));
        assert_eq!(percent(u64::MAX - 1, u64::MAX), 99);
    }

    #[test]
    fn shares_are_of_all_and_nothing_is_said_of_what_was_not_read() {
        let fetched = [("registry".to_owned(), 3), ("mirror".to_owned(), 1)].into();
        let mount = MountActivity { files: 9, fetched, ..MountActivity::default() };
        assert_eq!(sources(&mount), "registry 75 %, mirror 25 %");
        assert_eq!((files(&mount).as_str(), hits(&mount).as_str()), ("9", "–"));
        let mount = MountActivity { hits: 3, misses: 1, ..MountActivity::default() };
        assert_eq!((hits(&mount).as_str(), sources(&mount).as_str()), ("75 %", ""));
    }
}
