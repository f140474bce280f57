//! The control socket: the daemon's side and the command line's.

mod volumes;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::stream::BoxStream;
use futures::{Stream, StreamExt as _};
use glob::Pattern;
use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};
use tracing::info;
use weightfs_fusefs::{LayerDescriptor, Profile, Progress, Session, TreeNumber};
use weightfs_peers::{PeerStatus, Peers, PeersStatus};
use weightfs_proto::control::control_client::ControlClient;
use weightfs_proto::control::control_server::{Control, ControlServer};
use weightfs_proto::control::{
    ActivityReply, ActivityRequest, CacheReply, CacheRequest, Download, EvictReply, EvictRequest,
    Layer, LogReply, LogRequest, MapReply, MapRequest, Model, MountEvent, MountRequest, Mounted,
    PeerState, PeersReply, PeersRequest, PinReply, PinRequest, PruneReply, PruneRequest,
    PublishReply, PublishRequest, PullEvent, PullRequest, ReleaseReply, ReleaseRequest,
    StatusReply, StatusRequest, UnpublishReply, VerifyEvent, VerifyRequest, VolumeRequest,
    mount_event,
};
use weightfs_store::{Reference, parse_reference};

use crate::activity::Observer;
use crate::cache::{Cache, CacheError, Repair, Selection, Subject};
use crate::handover::Keeper;
use crate::indexes;
use crate::layers;
use crate::logging;
use crate::metadata::Metadata;
use crate::models::{Asked, Models, ShownModel};
use crate::snapshots::Decisions;
use crate::trees::{Trees, trust_name};
use crate::volumes::Volumes;

/// Events of a mount that wait for a slow caller; more are dropped, since each is a total.
const EVENTS: usize = 64;

/// Bytes of an answer at the most: what a cache of a hundred thousand blobs says of itself.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Answers the command line.
#[derive(Debug)]
pub struct ControlService {
    /// Models mounted by the command line.
    pub models: Arc<Models>,
    /// Models that an orchestrator has somewhere.
    pub volumes: Arc<Volumes>,
    /// All trees.
    pub trees: Arc<Trees>,
    /// Snapshots.
    pub metadata: Arc<Metadata>,
    /// What is here of all blobs.
    pub cache: Cache,
    /// The state directory, for status.
    pub root: PathBuf,
    /// The snapshotter's socket, for status.
    pub snapshotter_address: PathBuf,
    /// Who keeps the mount, for status.
    pub keeper: Keeper,
    /// The other nodes.
    pub peers: Option<Arc<Peers>>,
    /// Layers that were lazy or not.
    pub decisions: Arc<Decisions>,
    /// Where metrics can be had, for status.
    pub metrics_address: Option<SocketAddr>,
    /// What goes on.
    pub observer: Arc<Observer>,
}

/// Serves the control socket until `shutdown`.
///
/// # Errors
/// When the socket breaks.
pub async fn serve(
    service: ControlService,
    listener: UnixListener,
    shutdown: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    Server::builder()
        .add_service(ControlServer::new(service))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown)
        .await
}

/// Connects to a daemon's control socket.
///
/// # Errors
/// When nobody answers there.
pub async fn connect(address: &Path) -> Result<ControlClient<Channel>, tonic::transport::Error> {
    let address = address.to_owned();
    let connect = move |_| {
        let address = address.clone();
        async move { UnixStream::connect(address).await.map(TokioIo::new) }
    };
    // The URI is only for the Host header; the connector ignores it.
    let channel = Endpoint::from_static("http://weightfs")
        .connect_with_connector(tower::service_fn(connect))
        .await?;
    Ok(ControlClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
}

/// Sends how downloads go to the caller of Mount.
struct SendProgress(mpsc::Sender<Result<MountEvent, Status>>);

impl Progress for SendProgress {
    fn downloaded(&self, layer: &LayerDescriptor, bytes: u64) {
        let download =
            Download { layer_digest: layer.digest.to_string(), bytes, total: layer.size };
        // A full channel drops it: a later event says more.
        let _ = self.0.try_send(Ok(event(mount_event::Event::Download(download))));
    }
}

fn event(event: mount_event::Event) -> MountEvent {
    MountEvent { event: Some(event) }
}

#[tonic::async_trait]
impl Control for ControlService {
    type MountStream = BoxStream<'static, Result<MountEvent, Status>>;
    type PullStream = BoxStream<'static, Result<PullEvent, Status>>;
    type VerifyStream = BoxStream<'static, Result<VerifyEvent, Status>>;

    async fn mount(
        &self,
        request: Request<MountRequest>,
    ) -> Result<Response<Self::MountStream>, Status> {
        let MountRequest { reference, target, profile, index } = request.into_inner();
        let reference = self::reference(&reference)?;
        let profile = self::profile(&profile)?;
        let index =
            match index.as_str() {
                "" => None,
                path => Some(indexes::read(path.into()).await.map_err(|error| {
                    Status::invalid_argument(format!("the index {path}: {error}"))
                })?),
            };
        let (sender, events) = mpsc::channel(EVENTS);
        let target = target.into();
        let (volume, exclude) = Default::default();
        let asked = Asked { reference, target, volume, exclude, profile, index };
        tokio::spawn(mount(Arc::clone(&self.models), asked, sender));
        let events: BoxStream<'static, _> = ReceiverStream::new(events).boxed();
        Ok(Response::new(events))
    }

    async fn release(
        &self,
        request: Request<ReleaseRequest>,
    ) -> Result<Response<ReleaseReply>, Status> {
        let number = TreeNumber(request.into_inner().tree);
        let models = Arc::clone(&self.models);
        let released = tokio::task::spawn_blocking(move || models.release(number)).await;
        match released {
            Ok(Ok(())) => Ok(Response::new(ReleaseReply {})),
            Ok(Err(error)) => Err(Status::internal(error.to_string())),
            Err(error) => Err(Status::internal(error.to_string())),
        }
    }

    async fn publish(
        &self,
        request: Request<PublishRequest>,
    ) -> Result<Response<PublishReply>, Status> {
        volumes::publish(&self.volumes, request.into_inner()).await.map(Response::new)
    }

    async fn unpublish(
        &self,
        request: Request<VolumeRequest>,
    ) -> Result<Response<UnpublishReply>, Status> {
        volumes::unpublish(&self.volumes, request.into_inner()).await.map(Response::new)
    }

    async fn volume(&self, request: Request<VolumeRequest>) -> Result<Response<Model>, Status> {
        volumes::find(&self.volumes, request.into_inner()).await.map(Response::new)
    }

    async fn status(
        &self,
        request: Request<StatusRequest>,
    ) -> Result<Response<StatusReply>, Status> {
        let subject = request.into_inner().subject;
        let (models, layers) = self.shown(&subject)?;
        Ok(Response::new(StatusReply {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            root: self.root.display().to_string(),
            snapshotter_address: self.snapshotter_address.display().to_string(),
            models: models.into_iter().map(model_message).collect(),
            layers,
            pid: std::process::id(),
            peers: self.peers.as_deref().map(|peers| peers_message(peers.status())),
            passthrough: self.trees.session().is_some_and(Session::passes_through),
            decisions: self.decisions.counts().into_iter().map(counted).collect(),
            metrics_address: self.metrics_address.map(|it| it.to_string()).unwrap_or_default(),
            keeper: match self.keeper {
                Keeper::Nobody => String::new(),
                keeper => keeper.to_string(),
            },
        }))
    }

    async fn peers(&self, _request: Request<PeersRequest>) -> Result<Response<PeersReply>, Status> {
        let off = || Status::failed_precondition("there are no peers: peers.listen is not set");
        let peers = self.peers.as_deref().ok_or_else(off)?;
        Ok(Response::new(peers_message(peers.status())))
    }

    async fn activity(
        &self,
        _request: Request<ActivityRequest>,
    ) -> Result<Response<ActivityReply>, Status> {
        let activity = self.observer.activity().await;
        activity.map(Response::new).map_err(|error| Status::internal(error.to_string()))
    }

    async fn map(&self, request: Request<MapRequest>) -> Result<Response<MapReply>, Status> {
        let MapRequest { subject, cells } = request.into_inner();
        let observer = Arc::clone(&self.observer);
        // It looks at each chunk.
        let map = tokio::task::spawn_blocking(move || {
            let unknown = || format!("no model or image {subject} is mounted here");
            observer.map(&subject, cells).ok_or_else(|| Status::not_found(unknown()))
        });
        map.await.map_err(|error| Status::internal(error.to_string()))?.map(Response::new)
    }

    async fn log(&self, request: Request<LogRequest>) -> Result<Response<LogReply>, Status> {
        let LogRequest { directives } = request.into_inner();
        if !directives.is_empty() {
            let changed = logging::change(&directives);
            changed.map_err(|error| Status::invalid_argument(error.to_string()))?;
            info!(directives, "the log is changed");
        }
        let directives = logging::current();
        let directives = directives.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(LogReply { directives }))
    }

    async fn cache(&self, _request: Request<CacheRequest>) -> Result<Response<CacheReply>, Status> {
        self.blocking(Cache::list).await
    }

    async fn evict(&self, request: Request<EvictRequest>) -> Result<Response<EvictReply>, Status> {
        let subject = subject(&request.into_inner().subject)?;
        self.blocking(move |cache| cache.evict(&subject)).await
    }

    async fn prune(&self, _request: Request<PruneRequest>) -> Result<Response<PruneReply>, Status> {
        self.blocking(Cache::prune).await
    }

    async fn pin(&self, request: Request<PinRequest>) -> Result<Response<PinReply>, Status> {
        let reference = reference(&request.into_inner().reference)?;
        self.cache.pin(&reference).await.map(Response::new).map_err(refusal)
    }

    async fn unpin(&self, request: Request<PinRequest>) -> Result<Response<PinReply>, Status> {
        let reference = reference(&request.into_inner().reference)?;
        self.cache.unpin(&reference).await.map(Response::new).map_err(refusal)
    }

    async fn verify(
        &self,
        request: Request<VerifyRequest>,
    ) -> Result<Response<Self::VerifyStream>, Status> {
        let VerifyRequest { subject: text, repair } = request.into_inner();
        let subject = if text.is_empty() { None } else { Some(subject(&text)?) };
        let repair = if repair { Repair::Yes } else { Repair::No };
        let events = self.cache.verify(subject, repair);
        Ok(Response::new(events.map(|event| event.map_err(refusal)).boxed()))
    }

    async fn pull(
        &self,
        request: Request<PullRequest>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let PullRequest { reference: text, files, profile: load } = request.into_inner();
        let reference = reference(&text)?;
        let selection = match load {
            Some(bytes) => Selection::Profile(profile(&bytes)?),
            None => {
                let patterns = files.iter().map(|file| pattern(file));
                Selection::Files(patterns.collect::<Result<_, _>>()?)
            }
        };
        let events = self.cache.pull(reference, selection);
        Ok(Response::new(events.map(|event| event.map_err(refusal)).boxed()))
    }
}

fn subject(text: &str) -> Result<Subject, Status> {
    text.parse().map_err(Status::invalid_argument)
}

fn reference(text: &str) -> Result<Reference, Status> {
    parse_reference(text).map_err(|error| Status::invalid_argument(format!("{text}: {error}")))
}

fn pattern(text: &str) -> Result<Pattern, Status> {
    text.parse().map_err(|error| Status::invalid_argument(format!("{text}: {error}")))
}

/// None in no bytes.
fn profile(bytes: &[u8]) -> Result<Option<Profile>, Status> {
    let profile = (!bytes.is_empty()).then(|| Profile::parse(bytes)).transpose();
    profile.map_err(|error| Status::invalid_argument(error.to_string()))
}

fn refusal(error: CacheError) -> Status {
    match error {
        CacheError::Unknown(_) => Status::not_found(error.to_string()),
        CacheError::Stopped(_) => Status::internal(error.to_string()),
        _ => Status::failed_precondition(error.to_string()),
    }
}

fn peers_message(status: PeersStatus) -> PeersReply {
    let peer = |peer: PeerStatus| PeerState {
        name: peer.name,
        state: peer.state.to_owned(),
        from: peer.from.bytes,
        to: peer.to.bytes,
        from_rate: peer.from.rate,
        to_rate: peer.to.rate,
    };
    PeersReply {
        name: status.name,
        from_registry: status.from_registry.bytes,
        from_peers: status.from_peers.bytes,
        to_peers: status.to_peers.bytes,
        from_registry_rate: status.from_registry.rate,
        from_peers_rate: status.from_peers.rate,
        to_peers_rate: status.to_peers.rate,
        lies: status.lies,
        fallbacks: status.fallbacks,
        peers: status.peers.into_iter().map(peer).collect(),
    }
}

fn counted((kind, count): (&str, u64)) -> (String, u64) {
    (kind.to_owned(), count)
}

impl ControlService {
    /// The models and layers of what is asked for.
    fn shown(&self, subject: &str) -> Result<(Vec<ShownModel>, Vec<Layer>), Status> {
        let mut models = self.models.list();
        if subject.is_empty() {
            return Ok((models, layers::all(&self.metadata, &self.trees)));
        }
        models.retain(|model| model.is_named(subject));
        let layers = layers::of(&self.metadata, &self.trees, subject);
        if models.is_empty() && layers.is_empty() {
            let text = format!("there is no snapshot, image or mounted model {subject} here");
            return Err(Status::not_found(text));
        }
        Ok((models, layers))
    }

    /// Does something with the cache that blocks on the disk.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Cache) -> Result<T, CacheError> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let cache = self.cache.clone();
        let done = tokio::task::spawn_blocking(move || work(&cache)).await;
        let done = done.map_err(|error| Status::internal(error.to_string()))?;
        done.map(Response::new).map_err(refusal)
    }
}

/// Mounts a model for a caller, and takes it away again if the caller is gone by then.
async fn mount(
    models: Arc<Models>,
    asked: Asked,
    sender: mpsc::Sender<Result<MountEvent, Status>>,
) {
    let progress = SendProgress(sender.clone());
    let opened = tokio::select! {
        opened = models.open(asked, &progress) => opened,
        () = sender.closed() => return,
    };
    // A task of its own: once begun, it is shown and remembered, or neither.
    let shown = tokio::task::spawn_blocking({
        let models = Arc::clone(&models);
        move || models.show(opened?)
    });
    let refuse = |text: String| Err(Status::failed_precondition(text));
    let (tree, result) = match shown.await {
        Ok(Ok(model)) => {
            let tree = model.number;
            let directory = models.directory(tree).display().to_string();
            let mounted = Mounted { tree: tree.0, directory, model: Some(model_message(model)) };
            (Some(tree), Ok(event(mount_event::Event::Mounted(mounted))))
        }
        Ok(Err(error)) => (None, refuse(error.to_string())),
        Err(error) => (None, refuse(error.to_string())),
    };
    if sender.send(result).await.is_err()
        && let Some(tree) = tree
    {
        // What can't be forgotten stays mounted and is shown by status.
        let _ = tokio::task::spawn_blocking(move || models.release(tree)).await;
    }
}

fn model_message(model: ShownModel) -> Model {
    Model {
        tree: model.number.0,
        reference: model.reference,
        manifest_digest: model.manifest_digest.to_string(),
        target: model.target.display().to_string(),
        files: model.files,
        size: model.stats.size,
        cached: model.stats.cached,
        fetched: model.stats.fetched,
        rejected: model.stats.rejected,
        trust: trust_name(model.stats.trust).to_owned(),
        volume: model.volume,
        exclude: model.exclude,
    }
}

/// What the stream of a Mount ends with.
///
/// # Errors
/// What the daemon refused, or that it went away.
pub async fn mounted(
    mut events: impl Stream<Item = Result<MountEvent, Status>> + Unpin,
    mut progress: impl FnMut(Download),
) -> Result<Mounted, Status> {
    while let Some(message) = events.next().await {
        match message?.event {
            Some(mount_event::Event::Mounted(mounted)) => return Ok(mounted),
            Some(mount_event::Event::Download(download)) => progress(download),
            None => {}
        }
    }
    Err(Status::unavailable("the daemon went away before the model was mounted"))
}
