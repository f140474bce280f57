//! What a kubelet asks of containerd, as far as tests need it: pull, run, log, remove.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    AuthConfig, ContainerConfig, ContainerMetadata, ContainerState, ContainerStatusRequest,
    CreateContainerRequest, IdMapping, ImageFsInfoRequest, ImageSpec, ImageStatusRequest,
    ImageStatusResponse, LinuxContainerConfig, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, ListImagesRequest, Mount, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PullImageRequest, RemoveImageRequest,
    RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StopPodSandboxRequest,
    UserNamespace, VersionRequest,
};
use tokio::net::UnixStream;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};
use tonic_prost::ProstCodec;
use tower::service_fn;

use crate::containerd::Containerd;
use crate::remote::{Credentials, block_on};
use crate::wait::wait_until;

/// A CRI client of one containerd.
#[derive(Debug)]
pub struct Cri {
    channel: Channel,
    logs: PathBuf,
}

/// How a container ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Its exit code.
    pub code: i32,
    /// What it wrote, without CRI's own columns.
    pub output: String,
}

impl Cri {
    /// Connects; containers' logs go to `logs`.
    pub fn connect(containerd: &Containerd, logs: &Path) -> Self {
        Self::connect_at(&containerd.socket(), logs)
    }

    /// Connects to whoever speaks CRI at `socket`.
    pub fn connect_at(socket: &Path, logs: &Path) -> Self {
        let socket = socket.to_owned();
        let connector = service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        // The address is a formality: the connector knows the socket.
        let endpoint = Endpoint::from_static("http://containerd");
        let channel = block_on(endpoint.connect_with_connector(connector)).unwrap();
        let cri = Self { channel, logs: logs.to_owned() };
        wait_until("CRI answers", || {
            block_on(cri.images().list_images(ListImagesRequest { filter: None })).is_ok()
        });
        cri
    }

    /// Pulls an image.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn pull(&self, reference: &str) -> Result<String, Status> {
        let request =
            PullImageRequest { image: Some(spec(reference)), ..PullImageRequest::default() };
        Ok(block_on(self.images().pull_image(request))?.into_inner().image_ref)
    }

    /// Pulls an image with the credentials of a pull secret.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn pull_as(&self, reference: &str, who: &Credentials) -> Result<String, Status> {
        let auth = AuthConfig {
            username: who.user.clone(),
            password: who.password.clone(),
            ..AuthConfig::default()
        };
        let image = Some(spec(reference));
        let request = PullImageRequest { image, auth: Some(auth), ..PullImageRequest::default() };
        Ok(block_on(self.images().pull_image(request))?.into_inner().image_ref)
    }

    /// What every call of the image service that changes nothing says of an image, and calls that fail
    /// say why; and a call of the runtime service. What changes by itself is left out.
    pub fn account(&self, reference: &str) -> Vec<String> {
        let (mut images, mut runtime) = (self.images(), self.runtime());
        let image = Some(spec(reference));
        let list = block_on(images.list_images(ListImagesRequest { filter: None }));
        let list = list.map(|list| {
            let mut images = list.into_inner().images;
            images.sort_by(|a, b| a.id.cmp(&b.id));
            images
        });
        let status = ImageStatusRequest { image, verbose: true };
        let status = block_on(images.image_status(status)).map(|status| {
            let ImageStatusResponse { image, info } = status.into_inner();
            (image, info.into_iter().collect::<BTreeMap<_, _>>())
        });
        let disk = block_on(images.image_fs_info(ImageFsInfoRequest {})).map(|info| {
            let disks = info.into_inner().image_filesystems.into_iter();
            disks.map(|disk| disk.fs_id.map(|id| id.mountpoint)).collect::<Vec<_>>()
        });
        let nothing = PullImageRequest { image: Some(spec("!")), ..PullImageRequest::default() };
        let failed = block_on(images.pull_image(nothing));
        let failed = failed.map_err(|status| (status.code(), status.message().to_owned()));
        let missing = RemoveImageRequest { image: Some(spec("nothing:1")) };
        let missing = block_on(images.remove_image(missing)).map(tonic::Response::into_inner);
        let version = VersionRequest { version: "v1".into() };
        let version = block_on(runtime.version(version)).map(tonic::Response::into_inner);
        vec![
            format!("{list:?}"),
            format!("{status:?}"),
            format!("{disk:?}"),
            format!("{failed:?}"),
            format!("{missing:?}"),
            format!("{version:?}"),
        ]
    }

    /// What a method that nobody has says.
    pub fn call_unknown(&self) -> (Code, String) {
        let path = PathAndQuery::from_static("/runtime.v9.ImageService/Unknown");
        let status = block_on(async {
            let mut grpc = Grpc::new(self.channel.clone());
            grpc.ready().await.unwrap();
            let codec = ProstCodec::<ImageFsInfoRequest, ImageFsInfoRequest>::default();
            grpc.unary(tonic::Request::new(ImageFsInfoRequest {}), path, codec).await.unwrap_err()
        });
        (status.code(), status.message().to_owned())
    }

    /// Removes an image.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn remove(&self, reference: &str) -> Result<(), Status> {
        let request = RemoveImageRequest { image: Some(spec(reference)) };
        block_on(self.images().remove_image(request)).map(|_| ())
    }

    /// Tags of the images that CRI knows.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn tags(&self) -> Result<Vec<String>, Status> {
        let list = block_on(self.images().list_images(ListImagesRequest { filter: None }))?;
        Ok(list.into_inner().images.into_iter().flat_map(|image| image.repo_tags).collect())
    }

    /// Bytes that containerd says its images' snapshots take.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn image_bytes(&self) -> Result<u64, Status> {
        let info = block_on(self.images().image_fs_info(ImageFsInfoRequest {}))?.into_inner();
        Ok(info.image_filesystems.iter().filter_map(|fs| fs.used_bytes).map(|v| v.value).sum())
    }

    /// Runs a command in a pod of its own to its end, and removes the pod.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn run(&self, reference: &str, name: &str, words: &[&str]) -> Result<Ended, Status> {
        self.run_with(container(reference, name, words), pod(name, &self.logs, host_network()))
    }

    /// As [`Cri::run`], with an image that was pulled as a volume at `/models` (KEP-4639).
    ///
    /// # Errors
    /// What containerd answers.
    pub fn run_with_volume(
        &self,
        reference: &str,
        volume: &str,
        name: &str,
        words: &[&str],
    ) -> Result<Ended, Status> {
        let mut container = container(reference, name, words);
        container.mounts = vec![volume_at_models(volume)];
        self.run_with(container, pod(name, &self.logs, host_network()))
    }

    /// As [`Cri::run`], in a user namespace: user n in the pod is user `first + n` on the host. With a
    /// volume, if one is given.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn run_in_user_namespace(
        &self,
        first: u32,
        reference: &str,
        volume: Option<&str>,
        name: &str,
        words: &[&str],
    ) -> Result<Ended, Status> {
        let mut container = container(reference, name, words);
        container.mounts = volume.map(volume_at_models).into_iter().collect();
        let namespaces = NamespaceOption {
            userns_options: Some(user_namespace(first)),
            ..NamespaceOption::default()
        };
        container.linux = Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(namespaces.clone()),
                ..LinuxContainerSecurityContext::default()
            }),
            ..LinuxContainerConfig::default()
        });
        self.run_with(container, pod(name, &self.logs, namespaces))
    }

    fn run_with(&self, container: ContainerConfig, pod: PodSandboxConfig) -> Result<Ended, Status> {
        let request =
            RunPodSandboxRequest { config: Some(pod.clone()), runtime_handler: String::new() };
        let sandbox =
            block_on(self.runtime().run_pod_sandbox(request))?.into_inner().pod_sandbox_id;
        let ended = self.run_in(&sandbox, pod, container);
        let pod_sandbox_id = sandbox.clone();
        block_on(self.runtime().stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id }))?;
        let remove = RemovePodSandboxRequest { pod_sandbox_id: sandbox };
        block_on(self.runtime().remove_pod_sandbox(remove))?;
        ended
    }

    fn run_in(
        &self,
        sandbox: &str,
        pod: PodSandboxConfig,
        container: ContainerConfig,
    ) -> Result<Ended, Status> {
        let log = self.logs.join(&container.log_path);
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(container),
            sandbox_config: Some(pod),
        };
        let id = block_on(self.runtime().create_container(request))?.into_inner().container_id;
        let start = StartContainerRequest { container_id: id.clone() };
        block_on(self.runtime().start_container(start))?;
        let mut code = None;
        wait_until("the container ends", || {
            code = self.exit_code(&id);
            code.is_some()
        });
        let log = fs::read_to_string(log).unwrap_or_default();
        Ok(Ended { code: code.unwrap_or_default(), output: without_columns(&log) })
    }

    fn exit_code(&self, id: &str) -> Option<i32> {
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let status = block_on(self.runtime().container_status(request)).ok()?;
        let status = status.into_inner().status?;
        (status.state() == ContainerState::ContainerExited).then_some(status.exit_code)
    }

    fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }

    fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
    }
}

fn spec(reference: &str) -> ImageSpec {
    ImageSpec { image: reference.to_owned(), ..ImageSpec::default() }
}

fn volume_at_models(volume: &str) -> Mount {
    Mount {
        container_path: "/models".to_owned(),
        image: Some(spec(volume)),
        readonly: true,
        ..Mount::default()
    }
}

/// The host's network, so that a pod needs no CNI plugin.
fn host_network() -> NamespaceOption {
    NamespaceOption { network: NamespaceMode::Node.into(), ..NamespaceOption::default() }
}

fn user_namespace(first: u32) -> UserNamespace {
    let ids = vec![IdMapping { host_id: first, container_id: 0, length: 65536 }];
    UserNamespace { mode: NamespaceMode::Pod.into(), uids: ids.clone(), gids: ids }
}

fn pod(name: &str, logs: &Path, namespaces: NamespaceOption) -> PodSandboxConfig {
    let security = LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces),
        ..LinuxSandboxSecurityContext::default()
    };
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: name.to_owned(),
            namespace: "default".to_owned(),
            attempt: 0,
        }),
        log_directory: logs.to_str().unwrap().to_owned(),
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(security),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    }
}

fn container(reference: &str, name: &str, words: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(spec(reference)),
        command: words.iter().map(|word| (*word).to_owned()).collect(),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig::default()),
        ..ContainerConfig::default()
    }
}

/// Takes time, stream and tag off each line.
fn without_columns(log: &str) -> String {
    log.lines()
        .filter_map(|line| line.splitn(4, ' ').nth(3))
        .map(|text| format!("{text}\n"))
        .collect()
}
