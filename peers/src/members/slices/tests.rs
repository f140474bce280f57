use std::convert::Infallible;
use std::fs;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};
use futures::{StreamExt as _, stream};
use http_body_util::StreamBody;
use hyper::body::{Frame, Incoming};
use hyper::header::AUTHORIZATION;
use hyper::service::service_fn;
use hyper::{Request, Response as HyperResponse};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tonic::body::Body;

use super::*;
use crate::{Members, Options, Transport, Trust};

/// A stand-in for Kubernetes' API server, which can't be had here: it gives lists and watches in the
/// form of the API's reference, to whoever has the token.
struct StandIn {
    server: ApiServer,
    /// Lines of the watch.
    events: UnboundedSender<String>,
    /// What was asked for.
    asked: Arc<Mutex<Vec<String>>>,
    _dir: tempfile::TempDir,
}

impl StandIn {
    async fn start(token: &str) -> Self {
        rustls::crypto::ring::default_provider().install_default().ok();
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name)
        };
        let (authority, token) = (file("ca.crt", ""), file("token", token));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (events, lines) = unbounded();
        let (lines, asked) = (Arc::new(Mutex::new(Some(lines))), Arc::default());
        let own = Arc::clone(&asked);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (lines, asked) = (Arc::clone(&lines), Arc::clone(&own));
                let service = service_fn(move |request: Request<Incoming>| {
                    let answer = answer(&request, &lines, &asked);
                    async move { Ok::<_, Infallible>(answer) }
                });
                tokio::spawn(async move {
                    let builder = auto::Builder::new(TokioExecutor::new());
                    // A client that goes away ends it.
                    let _ = builder.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        let server = ApiServer::new(url, &authority, token).unwrap();
        Self { server, events, asked, _dir: dir }
    }

    fn say(&self, kind: &str, object: Value) {
        self.events.unbounded_send(json!({ "type": kind, "object": object }).to_string()).unwrap();
    }
}

fn answer(
    request: &Request<Incoming>,
    lines: &Mutex<Option<UnboundedReceiver<String>>>,
    asked: &Mutex<Vec<String>>,
) -> HyperResponse<Body> {
    let query = request.uri().query().unwrap_or_default().to_owned();
    asked.lock().unwrap().push(format!("{}?{query}", request.uri().path()));
    let known = request.headers().get(AUTHORIZATION).is_some_and(|it| it == "Bearer good");
    if !known {
        return HyperResponse::builder().status(403).body(Body::empty()).unwrap();
    }
    let page = |items: Value, next: &str| {
        let metadata = json!({ "resourceVersion": "7", "continue": next });
        json!({
            "kind": "EndpointSliceList", "apiVersion": "discovery.k8s.io/v1",
            "metadata": metadata, "items": items,
        })
    };
    let text = match () {
        () if query.contains("watch=1") => {
            let lines = lines.lock().unwrap().take();
            let lines = lines.map_or_else(|| stream::empty().boxed(), |lines| lines.boxed());
            let frames = lines.map(|line| Ok::<_, Infallible>(Frame::data(line + "\n")));
            let frames = frames.map(|frame| frame.map(|frame| frame.map_data(Bytes::from)));
            return HyperResponse::new(Body::new(StreamBody::new(frames)));
        }
        () if query.contains("continue=next%2F%3D") => {
            page(json!([slice("b", &[("::1", true)])]), "")
        }
        () => page(json!([slice("a", &[("10.0.0.1", true), ("10.0.0.2", false)])]), "next/="),
    };
    HyperResponse::new(Body::new(text.to_string()))
}

/// A slice with these endpoints, and whether they are ready.
fn slice(name: &str, endpoints: &[(&str, bool)]) -> Value {
    let endpoints = endpoints.iter().map(
        |(address, ready)| json!({ "addresses": [address], "conditions": { "ready": ready } }),
    );
    json!({
        "metadata": { "name": name, "resourceVersion": "8" },
        "addressType": "IPv4",
        "endpoints": endpoints.collect::<Vec<_>>(),
    })
}

fn service() -> Service {
    "weightfs/weightfs-peers:9480".parse().unwrap()
}

fn names(peers: &Peers) -> Vec<String> {
    peers.status().peers.into_iter().map(|peer| peer.name).collect()
}

async fn wait_for(peers: &Peers, expected: &[&str]) {
    for _ in 0..2000 {
        let mut names = names(peers);
        names.sort();
        if names == expected {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{:?} are not {expected:?}", names(peers));
}

#[tokio::test(flavor = "multi_thread")]
async fn members_are_the_ready_endpoints_and_change_with_them() {
    let stand_in = StandIn::start("good\n").await;
    let listen = "127.0.0.1:0".parse().unwrap();
    let options = Options {
        listen,
        name: Some("10.0.0.9:9480".into()),
        members: Members::Listed(vec![]),
        transport: Transport::Plaintext,
        trust: Trust::Digest,
        uploads: 1,
    };
    let peers = Peers::start(options).unwrap();
    let weak = std::sync::Arc::downgrade(&peers);
    let (server, asked) = (stand_in.server.clone(), Arc::clone(&stand_in.asked));
    let followed =
        tokio::spawn(async move { list_and_watch(&server, &weak, &service(), listen).await });
    wait_for(&peers, &["10.0.0.1:9480", "[::1]:9480"]).await;
    stand_in.say("MODIFIED", slice("a", &[("10.0.0.1", true), ("10.0.0.2", true)]));
    wait_for(&peers, &["10.0.0.1:9480", "10.0.0.2:9480", "[::1]:9480"]).await;
    let bookmark = json!({
        "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
        "metadata": { "resourceVersion": "12", "annotations": {} },
    });
    stand_in.say("BOOKMARK", bookmark);
    stand_in.say("DELETED", slice("b", &[]));
    wait_for(&peers, &["10.0.0.1:9480", "10.0.0.2:9480"]).await;
    stand_in.say("ERROR", json!({ "kind": "Status", "apiVersion": "v1", "message": "too old" }));
    let ended = followed.await.unwrap().unwrap_err();
    assert!(ended.to_string().contains("too old"), "{ended}");
    assert_eq!(names(&peers).len(), 2, "whoever was known stays");
    let asked = asked.lock().unwrap().clone();
    let path = "/apis/discovery.k8s.io/v1/namespaces/weightfs/endpointslices";
    let selector = "labelSelector=kubernetes.io%2Fservice-name%3Dweightfs-peers";
    assert!(asked.iter().all(|it| it.starts_with(path) && it.contains(selector)), "{asked:?}");
    assert!(asked.last().unwrap().contains("resourceVersion=7"), "{asked:?}");
}

#[tokio::test]
async fn a_refusal_and_a_line_without_end_are_errors() {
    let refused = StandIn::start("bad").await.server.list(&service()).await.unwrap_err();
    assert!(refused.to_string().contains("403"), "{refused}");
    let stand_in = StandIn::start("good").await;
    let mut events = stand_in.server.watch(&service(), "7").await.unwrap();
    events.most = 1000;
    stand_in.events.unbounded_send("x".repeat(2000)).unwrap();
    assert!(matches!(events.next().await, Err(ApiError::TooLong(1000))));
}

#[test]
fn fuzz_events_are_refused_or_bounded() {
    let sample = json!({ "type": "ADDED", "object": slice("a", &[("10.0.0.1", true)]) });
    let sample = sample.to_string();
    bolero::check!().for_each(|input: &[u8]| {
        let bytes = weightfs_fuzz::foreign(&[sample.as_bytes()], input);
        let mut known = Known::default();
        if let Ok(event) = serde_json::from_slice(&bytes)
            && known.take(event).is_ok()
        {
            assert!(known.slices.len() <= 1 && known.members(1).len() <= MAX_MEMBERS);
        }
    });
}
