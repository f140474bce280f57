//! A forward proxy, as companies have one: the only way out, and the only one who knows names. It
//! takes requests with whole URLs (RFC 9112, "absolute-form") and tunnels (RFC 9110, "CONNECT").

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use crate::remote::{block_on, spawn};

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// What it did.
#[derive(Debug, Default)]
struct State {
    /// Where names lead to.
    names: HashMap<String, String>,
    tunnels: Mutex<Vec<String>>,
    requests: Mutex<Vec<String>>,
}

/// A running forward proxy.
#[derive(Debug)]
pub struct Forward {
    address: String,
    state: Arc<State>,
    task: JoinHandle<()>,
}

impl Forward {
    /// Starts one that knows these names (`host:port`) and where they lead to (`host:port`).
    pub fn start(names: &[(&str, &str)]) -> Self {
        let listener = block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let names = names.iter().map(|(name, to)| ((*name).to_owned(), (*to).to_owned()));
        let state = Arc::new(State { names: names.collect(), ..State::default() });
        let own = Arc::clone(&state);
        let task = spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, Arc::clone(&own)));
                while connections.try_join_next().is_some() {}
            }
        });
        Self { address, state, task }
    }

    /// `http://127.0.0.1:port`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The hosts that were tunnelled to.
    pub fn tunnels(&self) -> Vec<String> {
        self.state.tunnels.lock().unwrap().clone()
    }

    /// The hosts that were asked.
    pub fn requests(&self) -> Vec<String> {
        self.state.requests.lock().unwrap().clone()
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(stream: TcpStream, state: Arc<State>) {
    let service = service_fn(|request| answer(request, Arc::clone(&state)));
    let http = hyper::server::conn::http1::Builder::new();
    // An error here is a client that went away.
    let _ = http.serve_connection(TokioIo::new(stream), service).with_upgrades().await;
}

async fn answer(request: Request<Incoming>, state: Arc<State>) -> io::Result<Response<Body>> {
    let Some(host) = request.uri().authority().map(ToString::to_string) else {
        return status(400);
    };
    let (list, tunnel) = match *request.method() == Method::CONNECT {
        true => (&state.tunnels, true),
        false => (&state.requests, false),
    };
    list.lock().unwrap().push(host.clone());
    let Some(to) = state.names.get(&host) else { return status(502) };
    let mut onward = TcpStream::connect(to).await?;
    if tunnel {
        tokio::spawn(async move {
            if let Ok(stream) = hyper::upgrade::on(request).await {
                let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(stream), &mut onward).await;
            }
        });
        return status(200);
    }
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(onward))
        .await
        .map_err(io::Error::other)?;
    tokio::spawn(connection);
    let answer = sender.send_request(request).await.map_err(io::Error::other)?;
    Ok(answer.map(|body| body.map_err(io::Error::other).boxed_unsync()))
}

fn status(status: u16) -> io::Result<Response<Body>> {
    let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
    Response::builder().status(status).body(body).map_err(io::Error::other)
}
