//! Pushing to a registry (distribution-spec, "Pushing blobs" and "Pushing manifests").

use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use reqwest::{Certificate, Client, Method, RequestBuilder, Response, StatusCode};
use serde_json::Value;
use tokio::io::AsyncReadExt as _;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use weightfs_store::Digest;

use crate::digest;

/// Media type of OCI image manifests, and of every artifact's.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of OCI image indexes.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

const UPLOAD_BUFFER_BYTES: usize = 1 << 20;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    rustls::crypto::ring::default_provider().install_default().ok();
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
});

/// Runs a future to its end on the harness's runtime.
pub fn block_on<F: Future>(future: F) -> F::Output {
    RUNTIME.block_on(future)
}

/// Lets a future run beside the caller.
pub fn spawn(future: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    RUNTIME.spawn(future)
}

/// A user's name and password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The name.
    pub user: String,
    /// The password.
    pub password: String,
}

/// A blob to be pushed.
#[derive(Debug, Clone)]
pub struct Blob {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    data: Data,
}

#[derive(Debug, Clone)]
enum Data {
    Memory(Bytes),
    File(PathBuf),
}

impl Blob {
    /// A blob in memory.
    pub fn from_bytes(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self { digest: Digest::of(&bytes), size: bytes.len() as u64, data: Data::Memory(bytes) }
    }

    /// A blob that is a file's content.
    pub fn from_file(path: &Path) -> Self {
        let digest = digest::of_file(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let size = fs::metadata(path).unwrap().len();
        Self { digest, size, data: Data::File(path.to_owned()) }
    }
}

/// A manifest with the blobs it names, before it is pushed: a test may still spoil it.
#[derive(Debug, Clone)]
pub struct Artifact {
    /// Config first, then the layers.
    pub blobs: Vec<Blob>,
    /// The manifest.
    pub manifest: Value,
}

impl Artifact {
    /// Pushes blobs and manifest and gives the manifest's digest.
    pub fn push(&self, remote: &Remote, repository: &str, tag: &str) -> Digest {
        block_on(async {
            for blob in &self.blobs {
                remote.push_blob(repository, blob).await;
            }
            let text = serde_json::to_vec(&self.manifest).unwrap();
            let media_type = self.manifest["mediaType"].as_str().unwrap_or(OCI_MANIFEST);
            remote.push_manifest(repository, tag, media_type, text).await
        })
    }

    /// The descriptors of its layers.
    pub fn layers(&self) -> &[Value] {
        self.manifest["layers"].as_array().unwrap()
    }

    /// The digest of the layer with that number.
    pub fn layer_digest(&self, number: usize) -> Digest {
        self.layers()[number]["digest"].as_str().unwrap().parse().unwrap()
    }

    /// The bytes of all layers, as the descriptors have them.
    pub fn layer_bytes(&self) -> u64 {
        self.layers().iter().map(|layer| layer["size"].as_u64().unwrap()).sum()
    }
}

/// A registry to push to.
#[derive(Debug, Clone)]
pub struct Remote {
    address: String,
    scheme: &'static str,
    credentials: Option<Credentials>,
    client: Arc<Client>,
}

impl Remote {
    /// The registry at `host:port`, over plain HTTP.
    pub fn new(address: &str) -> Self {
        let client = Arc::new(client(None));
        Self { address: address.to_owned(), scheme: "http", credentials: None, client }
    }

    /// With credentials.
    #[must_use]
    pub fn with_credentials(self, credentials: Option<Credentials>) -> Self {
        Self { credentials, ..self }
    }

    /// Over TLS, if there is a certificate authority.
    #[must_use]
    pub fn with_ca(self, ca_file: Option<&Path>) -> Self {
        match ca_file {
            None => self,
            Some(path) => Self { scheme: "https", client: Arc::new(client(Some(path))), ..self },
        }
    }

    /// `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// `host:port/repository:tag`.
    pub fn reference(&self, repository: &str, tag: &str) -> String {
        format!("{}/{repository}:{tag}", self.address)
    }

    async fn push_blob(&self, repository: &str, blob: &Blob) {
        let path = format!("/v2/{repository}/blobs/{}", blob.digest);
        if self.request(Method::HEAD, &self.url(&path)).send().await.unwrap().status().is_success()
        {
            return;
        }
        let start = self.url(&format!("/v2/{repository}/blobs/uploads/"));
        let started = self.request(Method::POST, &start).send().await.unwrap();
        let started = expect(started, StatusCode::ACCEPTED).await;
        let location = started.headers()["location"].to_str().unwrap();
        let joint = if location.contains('?') { '&' } else { '?' };
        let to = self.url(&format!("{location}{joint}digest={}", blob.digest));
        let put = self.request(Method::PUT, &to).header("content-length", blob.size);
        let put = put.header("content-type", "application/octet-stream").body(body_of(blob).await);
        expect(put.send().await.unwrap(), StatusCode::CREATED).await;
    }

    /// Pushes a manifest or index and gives its digest.
    pub async fn push_manifest(
        &self,
        repository: &str,
        tag: &str,
        media_type: &str,
        text: Vec<u8>,
    ) -> Digest {
        let digest = Digest::of(&text);
        let to = self.url(&format!("/v2/{repository}/manifests/{tag}"));
        let put = self.request(Method::PUT, &to).header("content-type", media_type).body(text);
        expect(put.send().await.unwrap(), StatusCode::CREATED).await;
        digest
    }

    /// An absolute URL, whether the registry gave one or a path.
    fn url(&self, location: &str) -> String {
        match location.strip_prefix('/') {
            Some(path) => format!("{}://{}/{path}", self.scheme, self.address),
            None => location.to_owned(),
        }
    }

    fn request(&self, method: Method, url: &str) -> RequestBuilder {
        let request = self.client.request(method, url);
        match &self.credentials {
            Some(credentials) => request.basic_auth(&credentials.user, Some(&credentials.password)),
            None => request,
        }
    }
}

fn client(ca_file: Option<&Path>) -> Client {
    LazyLock::force(&RUNTIME);
    let mut builder = Client::builder().no_proxy();
    if let Some(path) = ca_file {
        let certificate = Certificate::from_pem(&fs::read(path).unwrap()).unwrap();
        builder = builder.tls_certs_only([certificate]);
    }
    builder.build().unwrap()
}

async fn expect(response: Response, status: StatusCode) -> Response {
    if response.status() == status {
        return response;
    }
    let url = response.url().clone();
    let found = response.status();
    panic!("{url}: {found}, not {status}: {}", response.text().await.unwrap_or_default());
}

async fn body_of(blob: &Blob) -> reqwest::Body {
    match &blob.data {
        Data::Memory(bytes) => bytes.clone().into(),
        Data::File(path) => {
            let file = tokio::fs::File::open(path).await.unwrap();
            reqwest::Body::wrap_stream(stream::unfold(file, next_piece).boxed())
        }
    }
}

async fn next_piece(
    mut file: tokio::fs::File,
) -> Option<(std::io::Result<Bytes>, tokio::fs::File)> {
    let mut piece = vec![0; UPLOAD_BUFFER_BYTES];
    match file.read(&mut piece).await {
        Ok(0) => None,
        Ok(count) => {
            piece.truncate(count);
            Some((Ok(piece.into()), file))
        }
        Err(error) => Some((Err(error), file)),
    }
}
