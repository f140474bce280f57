//! A registry that has one model of one file, which is zeros. A stand-in: what docker-registry would
//! have to read from a disk that has no room for it.

use std::convert::Infallible;
use std::net::SocketAddr;

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use weightfs_store::Digest;
use weightfs_tests::remote::{OCI_MANIFEST, block_on, spawn};

use crate::download::Blobs;

const PIECE: &[u8] = &[0; 256 << 10];

const CONFIG: &[u8] =
    b"{\"descriptor\":{},\"config\":{},\"modelfs\":{\"type\":\"layers\",\"diffIds\":[]}}";

type Body = http_body_util::combinators::UnsyncBoxBody<Bytes, Infallible>;

/// A running registry.
#[derive(Debug)]
pub(crate) struct Zeros {
    address: SocketAddr,
    digest: Digest,
    size: u64,
    acceptor: JoinHandle<()>,
}

impl Zeros {
    /// Starts one whose file has so many bytes.
    pub(crate) fn start(size: u64) -> Self {
        let digest = digest(size);
        let manifest = Bytes::from(manifest(digest, size));
        let listener = block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let address = listener.local_addr().expect("the address of a socket that listens");
        let acceptor = spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let manifest = manifest.clone();
                let service = service_fn(move |request| {
                    std::future::ready(Ok::<_, Infallible>(answer(&request, &manifest, size)))
                });
                let http = hyper::server::conn::http1::Builder::new();
                let connection = http.serve_connection(TokioIo::new(stream), service);
                // It ends with an error where a client goes away.
                connections.spawn(async move { drop(connection.await) });
            }
        });
        Self { address, digest, size, acceptor }
    }

    /// The model's reference.
    pub(crate) fn reference(&self) -> String {
        format!("{}/zeros:v1", self.address)
    }

    /// Its file.
    pub(crate) fn blobs(&self) -> Blobs {
        Blobs::of_sizes(&self.address.to_string(), "zeros", vec![(self.digest, self.size)])
    }
}

impl Drop for Zeros {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

fn digest(size: u64) -> Digest {
    let mut hash = Sha256::new();
    let mut left = size;
    while left > 0 {
        let piece = left.min(PIECE.len() as u64);
        hash.update(&PIECE[..usize::try_from(piece).unwrap_or_default()]);
        left -= piece;
    }
    Digest::from_raw(hash.finalize().into())
}

fn manifest(digest: Digest, size: u64) -> String {
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": "application/vnd.cncf.model.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.cncf.model.config.v1+json",
            "digest": Digest::of(CONFIG).to_string(),
            "size": CONFIG.len(),
        },
        "layers": [{
            "mediaType": "application/vnd.cncf.model.weight.v1.raw",
            "digest": digest.to_string(),
            "size": size,
            "annotations": {"org.cncf.model.filepath": "zeros.bin"},
        }],
    });
    manifest.to_string()
}

fn answer(request: &Request<Incoming>, manifest: &Bytes, size: u64) -> Response<Body> {
    let path = request.uri().path();
    if path.contains("/manifests/") {
        let builder = Response::builder().header(CONTENT_TYPE, OCI_MANIFEST);
        return builder.body(whole(manifest.clone())).expect("an answer");
    }
    if path.ends_with(&Digest::of(CONFIG).to_string()) {
        return Response::new(whole(Bytes::from_static(CONFIG)));
    }
    let range = request.headers().get(RANGE).and_then(|range| range.to_str().ok());
    let range = range.and_then(|range| {
        let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse::<u64>().ok()?, last.parse::<u64>().ok()?))
    });
    let Some((first, last)) = range.filter(|(_, last)| *last < size) else {
        let builder = Response::builder().status(StatusCode::NOT_FOUND);
        return builder.body(whole(Bytes::new())).expect("an answer");
    };
    let length = last - first + 1;
    let pieces = stream::unfold(length, |left| async move {
        let piece = left.min(PIECE.len() as u64);
        let bytes = Bytes::from_static(PIECE).slice(..usize::try_from(piece).unwrap_or_default());
        (piece > 0).then(|| (Ok(Frame::data(bytes)), left - piece))
    });
    Response::builder()
        .status(StatusCode::PARTIAL_CONTENT)
        .header(CONTENT_RANGE, format!("bytes {first}-{last}/{size}"))
        .header(CONTENT_LENGTH, length)
        .body(StreamBody::new(pieces.boxed()).boxed_unsync())
        .expect("an answer")
}

fn whole(bytes: Bytes) -> Body {
    Full::new(bytes).boxed_unsync()
}
