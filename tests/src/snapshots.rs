//! A client of the snapshots service, of containerd's own snapshotters and of ours alike, and
//! mounting what it answers.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    CleanupRequest, CommitSnapshotRequest, ListSnapshotsRequest, MountsRequest,
    PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest,
    UsageRequest, ViewSnapshotRequest,
};
pub use containerd_client::services::v1::snapshots::{Info, Kind, UsageResponse};
pub use containerd_client::types::Mount;
use nix::mount::{MntFlags, umount2};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::process::run;
use crate::remote::block_on;

/// Labels of a snapshot.
pub type Labels = HashMap<String, String>;

/// Labels from pairs.
pub fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// A snapshots service.
#[derive(Debug)]
pub struct Snapshots {
    client: SnapshotsClient<Channel>,
    snapshotter: String,
    namespace: &'static str,
}

impl Snapshots {
    /// The service at that socket; containerd's own needs to know which snapshotter is meant.
    pub fn connect(socket: &Path, snapshotter: &str) -> Self {
        let channel = block_on(containerd_client::connect(socket)).unwrap();
        let (client, snapshotter) = (SnapshotsClient::new(channel), snapshotter.to_owned());
        Self { client, snapshotter, namespace: "default" }
    }

    /// The same in another namespace of containerd's.
    #[must_use]
    pub fn in_namespace(self, namespace: &'static str) -> Self {
        Self { namespace, ..self }
    }

    /// Prepares an active snapshot.
    ///
    /// # Errors
    /// What the service answers.
    pub fn prepare(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Status> {
        self.prepare_with(key, parent, Labels::new())
    }

    /// Prepares an active snapshot with labels.
    ///
    /// # Errors
    /// What the service answers.
    pub fn prepare_with(
        &self,
        key: &str,
        parent: &str,
        labels: Labels,
    ) -> Result<Vec<Mount>, Status> {
        let (snapshotter, key, parent) = self.names(key, parent);
        let request = PrepareSnapshotRequest { snapshotter, key, parent, labels };
        Ok(block_on(self.client().prepare(self.named(request)))?.into_inner().mounts)
    }

    /// Prepares a view.
    ///
    /// # Errors
    /// What the service answers.
    pub fn view(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Status> {
        let (snapshotter, key, parent) = self.names(key, parent);
        let request = ViewSnapshotRequest { snapshotter, key, parent, labels: Labels::new() };
        Ok(block_on(self.client().view(self.named(request)))?.into_inner().mounts)
    }

    /// The mounts of an active snapshot or a view.
    ///
    /// # Errors
    /// What the service answers.
    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>, Status> {
        let (snapshotter, key, _) = self.names(key, "");
        let request = MountsRequest { snapshotter, key };
        Ok(block_on(self.client().mounts(self.named(request)))?.into_inner().mounts)
    }

    /// Commits an active snapshot under a name.
    ///
    /// # Errors
    /// What the service answers.
    pub fn commit(&self, name: &str, key: &str) -> Result<(), Status> {
        self.commit_with(name, key, Labels::new())
    }

    /// Commits an active snapshot under a name, with labels.
    ///
    /// # Errors
    /// What the service answers.
    pub fn commit_with(&self, name: &str, key: &str, labels: Labels) -> Result<(), Status> {
        let (snapshotter, key, _) = self.names(key, "");
        let name = name.to_owned();
        let request = CommitSnapshotRequest { snapshotter, name, key, labels };
        block_on(self.client().commit(self.named(request))).map(drop)
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// What the service answers.
    pub fn remove(&self, key: &str) -> Result<(), Status> {
        let (snapshotter, key, _) = self.names(key, "");
        let request = RemoveSnapshotRequest { snapshotter, key };
        block_on(self.client().remove(self.named(request))).map(drop)
    }

    /// What is known of a snapshot.
    ///
    /// # Errors
    /// What the service answers.
    pub fn stat(&self, key: &str) -> Result<Info, Status> {
        let (snapshotter, key, _) = self.names(key, "");
        let request = StatSnapshotRequest { snapshotter, key };
        Ok(block_on(self.client().stat(self.named(request)))?.into_inner().info.unwrap_or_default())
    }

    /// Changes a snapshot's labels; `paths` is the update mask.
    ///
    /// # Errors
    /// What the service answers.
    pub fn update(&self, info: Info, paths: &[&str]) -> Result<Info, Status> {
        let paths: Vec<_> = paths.iter().map(|path| (*path).to_owned()).collect();
        let update_mask = (!paths.is_empty()).then_some(prost_types::FieldMask { paths });
        let snapshotter = self.snapshotter.clone();
        let request = UpdateSnapshotRequest { snapshotter, info: Some(info), update_mask };
        Ok(block_on(self.client().update(self.named(request)))?
            .into_inner()
            .info
            .unwrap_or_default())
    }

    /// Snapshots that match any of the filters, sorted by name.
    ///
    /// # Errors
    /// What the service answers.
    pub fn list(&self, filters: &[&str]) -> Result<Vec<Info>, Status> {
        let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
        let request = ListSnapshotsRequest { snapshotter: self.snapshotter.clone(), filters };
        block_on(async {
            let mut stream = self.client().list(self.named(request)).await?.into_inner();
            let mut found = Vec::new();
            while let Some(part) = stream.message().await? {
                found.extend(part.info);
            }
            found.sort_by(|a: &Info, b| a.name.cmp(&b.name));
            Ok(found)
        })
    }

    /// What a snapshot takes.
    ///
    /// # Errors
    /// What the service answers.
    pub fn usage(&self, key: &str) -> Result<UsageResponse, Status> {
        let (snapshotter, key, _) = self.names(key, "");
        let request = UsageRequest { snapshotter, key };
        block_on(self.client().usage(self.named(request))).map(tonic::Response::into_inner)
    }

    /// Removes what no snapshot needs.
    ///
    /// # Errors
    /// What the service answers.
    pub fn cleanup(&self) -> Result<(), Status> {
        let request = CleanupRequest { snapshotter: self.snapshotter.clone() };
        block_on(self.client().cleanup(self.named(request))).map(drop)
    }

    fn client(&self) -> SnapshotsClient<Channel> {
        self.client.clone()
    }

    /// Adds the namespace that containerd asks for.
    fn named<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.namespace.parse().unwrap());
        request
    }

    fn names(&self, key: &str, parent: &str) -> (String, String, String) {
        (self.snapshotter.clone(), key.to_owned(), parent.to_owned())
    }
}

/// Asserts that a call was refused with that code, and gives the message.
pub fn assert_refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code) -> String {
    let status = result.expect_err("this should be refused");
    assert_eq!(status.code(), code, "{status:?}");
    status.message().to_owned()
}

/// A snapshot mounted somewhere, until this guard goes.
#[derive(Debug)]
pub struct MountedAt(PathBuf);

impl MountedAt {
    /// Mounts what the service answered at `dir`, as containerd would.
    pub fn new(mounts: &[Mount], dir: PathBuf) -> Self {
        for mount in mounts {
            run(&mut mount_command(mount, &dir)).ok();
        }
        Self(dir)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for MountedAt {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// Options of many layers do not fit in mount(2)'s page: paths go relative to what they share.
fn mount_command(mount: &Mount, dir: &Path) -> Command {
    let shared = shared_directory(mount);
    let options: Vec<_> = mount
        .options
        .iter()
        .map(|option| match option.strip_prefix("lowerdir=") {
            Some(layers) => format!("lowerdir={}", relative(layers, &shared)),
            None => option.clone(),
        })
        .collect();
    let mut command = Command::new("mount");
    command.current_dir(&shared).args(["-t", &mount.r#type]);
    if !options.is_empty() {
        command.args(["-o", &options.join(",")]);
    }
    command.arg(&mount.source).arg(dir);
    command
}

fn shared_directory(mount: &Mount) -> PathBuf {
    let layers = mount.options.iter().find_map(|option| option.strip_prefix("lowerdir="));
    let Some((first, _)) = layers.and_then(|layers| layers.split_once(':')) else {
        return "/".into();
    };
    let all = layers.unwrap_or_default();
    let holds = |dir: &&Path| all.split(':').all(|layer| Path::new(layer).starts_with(dir));
    Path::new(first).ancestors().find(holds).unwrap_or(Path::new("/")).to_owned()
}

fn relative(layers: &str, shared: &Path) -> String {
    let cut = |layer| Path::new(layer).strip_prefix(shared).unwrap_or(Path::new(layer));
    let parts: Vec<_> = layers.split(':').map(|layer| cut(layer).to_str().unwrap()).collect();
    parts.join(":")
}
