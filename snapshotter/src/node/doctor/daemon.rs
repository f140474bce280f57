//! The daemon, if one runs: whether it answers, who keeps its mount, and who may talk to it.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::time::Duration;

use weightfs_proto::control::{StatusReply, StatusRequest};

use super::{At, Finding};
use crate::config::Config;
use crate::{control, owner};

/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bits of a mode that let in others than the owner.
const OTHERS: u32 = 0o077;

/// What a daemon says of itself, or why it says nothing.
#[derive(Debug)]
pub(super) struct Running(Result<Box<StatusReply>, String>);

impl Running {
    /// Asks the daemon of the state directory.
    pub(super) async fn find(config: &Config) -> Self {
        let address = owner::control_address(&config.root);
        let address = address.unwrap_or_else(|| config.control.address.clone());
        let ask = async {
            let connected = control::connect(&address).await;
            let mut daemon = connected.map_err(|_| "no daemon answers".to_owned())?;
            let status = daemon.status(StatusRequest::default()).await;
            status.map(tonic::Response::into_inner).map_err(|status| status.message().to_owned())
        };
        let asked = tokio::time::timeout(PATIENCE, ask).await;
        Self(asked.unwrap_or_else(|_| Err(format!("no answer within {PATIENCE:?}"))).map(Box::new))
    }

    pub(super) fn status(&self) -> Option<&StatusReply> {
        self.0.as_deref().ok()
    }

    pub(super) fn examine(&self, config: &Config) -> Vec<Finding> {
        let at = At::new("daemon", config.control.address.display());
        let status = match &self.0 {
            Ok(status) => status,
            Err(reason) => {
                let mend = "systemctl start weightfs, or `weightfs keeper -- weightfs serve`";
                return vec![at.mend(reason, mend)];
            }
        };
        let addresses = [&config.snapshotter.address, &config.control.address];
        let mut findings = vec![version(&at, &status.version), keeper(&status.keeper)];
        findings.extend(addresses.into_iter().map(|address| socket(address)));
        findings
    }
}

fn version(at: &At, running: &str) -> Finding {
    match env!("CARGO_PKG_VERSION") {
        own if own == running => at.fine(format!("version {running} serves")),
        own => at.note(
            format!("version {running} serves; this program is {own}"),
            "systemctl restart weightfs: containers read on",
        ),
    }
}

fn keeper(keeper: &str) -> Finding {
    match keeper {
        "" => At::new("keeper", "NOTIFY_SOCKET").mend(
            "nobody keeps the mount: when the daemon ends, running containers lose it",
            "`weightfs node install` (systemd keeps it), or `weightfs keeper -- weightfs serve`",
        ),
        keeper => At::new("keeper", keeper).fine("keeps the mount while no daemon runs"),
    }
}

/// Who may open the socket may mount and remove snapshots.
fn socket(path: &Path) -> Finding {
    let at = At::new("socket", path.display());
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return at.mend("is not there", "systemctl restart weightfs.socket weightfs");
        }
        Err(error) => return at.mend(error, "run it as root"),
    };
    let (mode, owner) = (found.mode() & 0o7777, found.uid());
    match found.file_type().is_socket() {
        false => at.mend("is no socket", "remove it, then systemctl restart weightfs"),
        true if mode & OTHERS != 0 || owner != 0 => at.mend(
            format!("has mode {mode:04o} and owner {owner}: others than root may use it"),
            format!("chown root {0} && chmod 0600 {0}", path.display()),
        ),
        true => at.fine("only root may use it"),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixListener;

    use super::super::Level;
    use super::*;

    #[test]
    fn a_socket_that_others_may_use_is_to_be_mended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        assert_eq!(socket(&path).level, Level::Mend);
        let _listener = UnixListener::bind(&path).unwrap();
        for (mode, level) in [(0o600, Level::Fine), (0o660, Level::Mend), (0o602, Level::Mend)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(socket(&path).level, level, "{mode:o}");
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        assert_eq!(socket(&path).level, Level::Mend);
    }

    #[tokio::test]
    async fn without_a_daemon_it_says_how_to_start_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config { root: dir.path().to_owned(), ..Config::default() };
        config.control.address = dir.path().join("c.sock");
        let running = Running::find(&config).await;
        assert!(running.status().is_none());
        let findings = running.examine(&config);
        assert_eq!((findings.len(), findings[0].level), (1, Level::Mend));
        assert!(findings[0].mend.contains("systemctl start"), "{findings:?}");
    }
}
