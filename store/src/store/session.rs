//! How earlier owners of the directory stopped.
//!
//! A process that is killed loses nothing that it has written: the kernel has it. After a power
//! loss or a crash of the kernel only what was synced is there, and only if the disk has told the
//! truth. So what was recorded before such a stop is in doubt until it was hashed again.
//!
//! Each owner has an *epoch*, a number higher than those before. Records carry it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::at;
use crate::OpenError;
use crate::disk::{Disk, Durability};
use crate::document::{self, Found, Kind};

/// The file that tells it.
const FILE: &str = "session";

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Note {
    epoch: u64,
    /// Epochs before this one are in doubt.
    doubt_before: u64,
    /// The boot of the machine that the owner ran in.
    boot: String,
    stopped: Stopped,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
enum Stopped {
    /// Everything was synced and recorded.
    Cleanly,
    /// It runs, or was killed, or the machine went down.
    NotYet,
}

/// One owner's time.
#[derive(Debug)]
pub(super) struct Session {
    root: PathBuf,
    disk: Arc<dyn Disk>,
    note: Note,
}

impl Session {
    /// Begins a new epoch. `boot` names the boot of the machine.
    pub(super) fn begin(root: &Path, disk: Arc<dyn Disk>, boot: &str) -> Result<Self, OpenError> {
        let note = match Self::earlier(root) {
            Some(Note { epoch, doubt_before, boot: old, stopped }) => {
                let lost_nothing = stopped == Stopped::Cleanly || old == boot;
                let epoch = epoch.saturating_add(1);
                let doubt_before = if lost_nothing { doubt_before } else { epoch };
                Note { epoch, doubt_before, boot: boot.into(), stopped: Stopped::NotYet }
            }
            // A directory without this note: whatever is there is in doubt.
            None => Note { epoch: 1, doubt_before: 1, boot: boot.into(), stopped: Stopped::NotYet },
        };
        let session = Self { root: root.to_owned(), disk, note };
        session.write(&session.note)?;
        Ok(session)
    }

    /// The boot that this is.
    pub(super) fn current_boot() -> String {
        // Nothing to read it from: each start counts as another boot.
        let unknown = || format!("unknown {}", std::process::id());
        fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map_or_else(|_| unknown(), |id| id.trim().to_owned())
    }

    pub(super) fn epoch(&self) -> u64 {
        self.note.epoch
    }

    /// Records of epochs before this one are in doubt.
    pub(super) fn doubt_before(&self) -> u64 {
        self.note.doubt_before
    }

    /// Notes that all is synced and recorded.
    pub(super) fn end(&self) -> Result<(), OpenError> {
        self.write(&Note { stopped: Stopped::Cleanly, ..self.note.clone() })
    }

    fn earlier(root: &Path) -> Option<Note> {
        match document::read(&root.join(FILE), Kind::Session) {
            Found::Nothing => None,
            Found::Payload(payload) => serde_json::from_slice(&payload).ok(),
            Found::Damaged(damage) => {
                tracing::warn!(root = %root.display(), damage, "how the cache was left is not known: it is checked again");
                None
            }
        }
    }

    fn write(&self, note: &Note) -> Result<(), OpenError> {
        let payload = serde_json::to_vec(note).unwrap_or_default();
        document::write(&*self.disk, &self.root, FILE, Kind::Session, &payload, Durability::Synced)
            .map_err(at(&self.root))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::LocalDisk;

    #[test]
    fn only_a_crash_of_the_machine_casts_doubt() {
        let dir = tempfile::tempdir().unwrap();
        let begin = |boot| Session::begin(dir.path(), Arc::new(LocalDisk), boot).unwrap();
        begin("a").end().unwrap();
        let after_clean_stop = begin("b");
        assert_eq!((after_clean_stop.epoch(), after_clean_stop.doubt_before()), (2, 1));
        let after_kill = begin("b");
        assert_eq!((after_kill.epoch(), after_kill.doubt_before()), (3, 1));
        let after_crash = begin("c");
        assert_eq!((after_crash.epoch(), after_crash.doubt_before()), (4, 4));
        after_crash.end().unwrap();
        assert_eq!(begin("d").doubt_before(), 4, "what was not checked since stays in doubt");
        fs::write(dir.path().join(FILE), b"noise").unwrap();
        let after_damage = begin("d");
        assert_eq!((after_damage.epoch(), after_damage.doubt_before()), (1, 1));
    }
}
