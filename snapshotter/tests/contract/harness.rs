//! A snapshots service on a socket of its own, containerd's client for it, and a mounter whose
//! trees are plain directories.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest,
    PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest,
    UsageRequest, UsageResponse, ViewSnapshotRequest,
};
use containerd_client::types::Mount;
use prost_types::FieldMask;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Status};
use weightfs::containerd;
use weightfs::metadata::{LazySnapshot, Metadata, SNAPSHOT_REF, TreeNumber, Usage};
use weightfs::reason::Reason;
use weightfs::snapshots::{LayerMounter, LayerRequest, LazyLayer, Snapshots, Subject, Verdict};
use weightfs::socket::bind_socket;

/// Labels as a test writes them.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// A root directory on the disk that the build is on: overlay has no upper directory on tmpfs.
pub fn new_root() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// What the mounter says to a layer.
#[derive(Clone)]
pub enum Answer {
    /// Lazy, with these files and contents on top of the lazy parent's.
    Lazy(Vec<(&'static str, &'static str)>),
    /// Ordinary, for this reason.
    Ordinary(Reason),
    /// A defect.
    Panic,
}

/// A mounter whose trees are directories below `<root>/mnt`.
pub struct FakeMounter {
    metadata: Arc<Metadata>,
    directory: PathBuf,
    /// By chain ID; a layer that is not here is ordinary.
    answers: Mutex<HashMap<String, Answer>>,
    /// The requests that came.
    pub requests: Mutex<Vec<LayerRequest>>,
    /// A mount takes one of these and gives it back: none of them stalls it.
    pub gate: Semaphore,
}

impl FakeMounter {
    pub fn new(root: &Path, metadata: Arc<Metadata>) -> Arc<FakeMounter> {
        let directory = root.join("mnt");
        fs::create_dir_all(&directory).unwrap();
        let (answers, requests) = (Mutex::default(), Mutex::default());
        Arc::new(FakeMounter { metadata, directory, answers, requests, gate: Semaphore::new(1) })
    }

    pub fn answer(&self, chain_id: &str, answer: Answer) {
        self.answers.lock().unwrap().insert(chain_id.to_owned(), answer);
    }

    /// Takes away what an earlier process had not stored: a mount that is made anew shows nothing else.
    pub fn show_only_what_is_recorded(&self) {
        let lazy = self.metadata.lazy_snapshots();
        for tree in self.trees() {
            if lazy.iter().all(|lazy| lazy.tree != tree) {
                fs::remove_dir_all(self.directory(tree)).unwrap();
            }
        }
    }

    /// The trees that are mounted.
    pub fn trees(&self) -> Vec<TreeNumber> {
        let mut trees: Vec<_> = fs::read_dir(&self.directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
            .map(TreeNumber)
            .collect();
        trees.sort();
        trees
    }

    fn show(&self, request: &LayerRequest, files: &[(&str, &str)]) -> LazyLayer {
        let tree = self.metadata.allocate_tree().unwrap();
        let directory = self.directory(tree);
        fs::create_dir(&directory).unwrap();
        if let Some(parent) = &request.parent {
            for entry in fs::read_dir(self.directory(parent.tree)).unwrap() {
                let entry = entry.unwrap();
                fs::copy(entry.path(), directory.join(entry.file_name())).unwrap();
            }
        }
        for (name, content) in files {
            fs::write(directory.join(name), content).unwrap();
        }
        LazyLayer { tree, record: serde_json::json!({ "chain": request.chain_id }) }
    }
}

#[tonic::async_trait]
impl LayerMounter for FakeMounter {
    async fn mount(&self, request: LayerRequest) -> Verdict {
        self.requests.lock().unwrap().push(request.clone());
        let _open = self.gate.acquire().await.unwrap();
        let answer = self.answers.lock().unwrap().get(&request.chain_id).cloned();
        match answer.unwrap_or(Answer::Ordinary(Reason::failed("unknown to the test"))) {
            Answer::Lazy(files) => Verdict::Lazy(self.show(&request, &files)),
            Answer::Ordinary(reason) => match request.subject {
                Subject::Layer => Verdict::Ordinary { reason },
                Subject::Artifact => Verdict::Refused { reason },
            },
            Answer::Panic => panic!("the mounter has a defect"),
        }
    }

    fn directory(&self, tree: TreeNumber) -> PathBuf {
        self.directory.join(tree.to_string())
    }

    async fn unmount(&self, tree: TreeNumber) {
        fs::remove_dir_all(self.directory(tree)).unwrap();
    }

    fn clean_up(&self) {}

    fn usage(&self, tree: TreeNumber) -> Usage {
        Usage { bytes: 1000 + u64::from(tree.0), inodes: 3 }
    }
}

/// A running service and its client.
pub struct Harness {
    pub root: PathBuf,
    pub metadata: Arc<Metadata>,
    pub mounter: Arc<FakeMounter>,
    pub client: SnapshotsClient<Channel>,
    /// What the mounter was handed at the start.
    pub restored: Vec<LazySnapshot>,
    stop: oneshot::Sender<()>,
    service: JoinHandle<()>,
    /// Removed last.
    directory: tempfile::TempDir,
}

impl Harness {
    pub async fn start() -> Harness {
        Harness::start_in(new_root()).await
    }

    pub async fn start_in(directory: tempfile::TempDir) -> Harness {
        let root = directory.path().to_owned();
        let metadata = Arc::new(Metadata::open(&root).unwrap());
        let restored = metadata.lazy_snapshots();
        let mounter = FakeMounter::new(&root, metadata.clone());
        let snapshots = Snapshots::open(&root, metadata.clone(), mounter.clone()).unwrap();
        let socket = root.join("s.sock");
        let listener = bind_socket(&socket).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let service = tokio::spawn(async move {
            let shutdown = async { stopped.await.unwrap_or_default() };
            containerd::serve(snapshots, listener, shutdown).await;
        });
        let client = SnapshotsClient::new(containerd_client::connect(&socket).await.unwrap());
        Harness { root, metadata, mounter, client, restored, stop, service, directory }
    }

    /// Stops the service, and starts it again on the same directory.
    pub async fn restart(self) -> Harness {
        let Harness { client, metadata, mounter, stop, service, directory, .. } = self;
        drop((client, mounter));
        stop.send(()).unwrap();
        service.await.unwrap();
        assert_eq!(Arc::strong_count(&metadata), 1, "the service has ended");
        drop(metadata);
        Harness::start_in(directory).await
    }

    pub async fn prepare(
        &self,
        key: &str,
        parent: &str,
        labels: Labels<'_>,
    ) -> Result<Vec<Mount>, Status> {
        let request = PrepareSnapshotRequest {
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: map(labels),
            ..Default::default()
        };
        Ok(self.client.clone().prepare(request).await?.into_inner().mounts)
    }

    /// Prepare of a layer, as containerd's unpacker sends it.
    pub async fn prepare_layer(
        &self,
        key: &str,
        parent: &str,
        chain_id: &str,
    ) -> Result<Vec<Mount>, Status> {
        self.prepare(key, parent, &[(SNAPSHOT_REF, chain_id)]).await
    }

    pub async fn view(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Status> {
        let request = ViewSnapshotRequest {
            key: key.to_owned(),
            parent: parent.to_owned(),
            ..Default::default()
        };
        Ok(self.client.clone().view(request).await?.into_inner().mounts)
    }

    pub async fn mounts(&self, key: &str) -> Result<Vec<Mount>, Status> {
        let request = MountsRequest { key: key.to_owned(), ..Default::default() };
        Ok(self.client.clone().mounts(request).await?.into_inner().mounts)
    }

    pub async fn commit(&self, name: &str, key: &str, labels: Labels<'_>) -> Result<(), Status> {
        let request = CommitSnapshotRequest {
            name: name.to_owned(),
            key: key.to_owned(),
            labels: map(labels),
            ..Default::default()
        };
        self.client.clone().commit(request).await.map(|_| ())
    }

    pub async fn remove(&self, key: &str) -> Result<(), Status> {
        let request = RemoveSnapshotRequest { key: key.to_owned(), ..Default::default() };
        self.client.clone().remove(request).await.map(|_| ())
    }

    pub async fn stat(&self, key: &str) -> Result<Info, Status> {
        let request = StatSnapshotRequest { key: key.to_owned(), ..Default::default() };
        Ok(self.client.clone().stat(request).await?.into_inner().info.unwrap())
    }

    pub async fn update(
        &self,
        name: &str,
        labels: Labels<'_>,
        mask: Option<&[&str]>,
    ) -> Result<Info, Status> {
        let info = Info { name: name.to_owned(), labels: map(labels), ..Default::default() };
        self.update_info(info, mask).await
    }

    pub async fn update_info(&self, info: Info, mask: Option<&[&str]>) -> Result<Info, Status> {
        let paths = |mask: &[&str]| mask.iter().map(|&path| path.to_owned()).collect();
        let request = UpdateSnapshotRequest {
            info: Some(info),
            update_mask: mask.map(|mask| FieldMask { paths: paths(mask) }),
            ..Default::default()
        };
        Ok(self.client.clone().update(request).await?.into_inner().info.unwrap())
    }

    pub async fn usage(&self, key: &str) -> Result<UsageResponse, Status> {
        let request = UsageRequest { key: key.to_owned(), ..Default::default() };
        Ok(self.client.clone().usage(request).await?.into_inner())
    }

    pub async fn cleanup(&self) -> Result<(), Status> {
        self.client.clone().cleanup(CleanupRequest::default()).await.map(|_| ())
    }

    pub async fn list(&self, filters: &[&str]) -> Result<Vec<Info>, Status> {
        let filters = filters.iter().map(|&filter| filter.to_owned()).collect();
        let request = ListSnapshotsRequest { filters, ..Default::default() };
        let mut stream = self.client.clone().list(request).await?.into_inner();
        let mut infos = Vec::new();
        while let Some(message) = stream.message().await? {
            infos.extend(message.info);
        }
        Ok(infos)
    }

    pub async fn names(&self, filters: &[&str]) -> Vec<String> {
        self.list(filters).await.unwrap().into_iter().map(|info| info.name).collect()
    }

    /// Makes a committed ordinary snapshot with these files in it.
    pub async fn committed(&self, name: &str, parent: &str, files: &[(&str, &str)]) {
        let key = format!("prepare {name}");
        let mounts = self.prepare(&key, parent, &[]).await.unwrap();
        for (file, content) in files {
            fs::write(writable_directory(&mounts).join(file), content).unwrap();
        }
        self.commit(name, &key, &[]).await.unwrap();
    }

    /// The numbers of the directories of ordinary snapshots on the disk.
    pub fn directories(&self) -> Vec<u64> {
        let mut ids: Vec<u64> = fs::read_dir(self.root.join("snapshots"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
            .collect();
        ids.sort_unstable();
        ids
    }
}

/// The directory into which a snapshot's changes go.
pub fn writable_directory(mounts: &[Mount]) -> PathBuf {
    let [mount] = mounts else { panic!("one mount expected: {mounts:?}") };
    match mount.r#type.as_str() {
        "bind" => PathBuf::from(&mount.source),
        _ => PathBuf::from(option(mount, "upperdir").unwrap()),
    }
}

/// The value of a mount option.
pub fn option<'a>(mount: &'a Mount, name: &str) -> Option<&'a str> {
    mount.options.iter().find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
}

pub fn map(labels: Labels<'_>) -> HashMap<String, String> {
    labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

pub fn sorted(labels: &HashMap<String, String>) -> BTreeMap<&str, &str> {
    labels.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
}

/// Asserts that a call failed in one way.
#[track_caller]
pub fn assert_code<T: std::fmt::Debug>(result: Result<T, Status>, code: Code) -> Status {
    let status = result.expect_err("the call should fail");
    assert_eq!(status.code(), code, "{status}");
    status
}
