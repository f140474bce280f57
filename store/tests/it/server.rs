//! An HTTP server that answers as a test tells it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What was asked.
#[derive(Debug, Clone)]
pub struct Request {
    /// Path and query.
    pub path: String,
    /// By lower-case name.
    pub headers: BTreeMap<String, String>,
}

impl Request {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// What is answered.
#[derive(Debug, Clone, Default)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    pub ending: Ending,
}

/// How an answer ends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Ending {
    /// With its Content-Length.
    #[default]
    Whole,
    /// With the connection: no length is told.
    Unannounced,
    /// With the connection, so many bytes before its Content-Length.
    Cut(usize),
    /// Never: nothing is answered at all.
    Silence,
    /// With its Content-Length, when the gate opens.
    Held(Gate),
    /// So many bytes a tenth of a second.
    Trickle(usize),
}

/// Keeps answers back until it is opened.
#[derive(Debug, Clone, Default)]
pub struct Gate(Arc<watch::Sender<bool>>);

impl Gate {
    pub fn open(&self) {
        self.0.send_replace(true);
    }

    async fn wait(&self) {
        let _ = self.0.subscribe().wait_for(|open| *open).await;
    }
}

impl PartialEq for Gate {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Gate {}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, body: body.into(), ..Self::default() }
    }

    pub fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        self.headers.push((name, value.to_string()));
        self
    }

    pub fn ending(self, ending: Ending) -> Self {
        Self { ending, ..self }
    }

    fn encode(&self) -> Vec<u8> {
        let mut head = format!("HTTP/1.1 {} Test\r\nConnection: close\r\n", self.status);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let mut body = &self.body[..];
        match self.ending {
            Ending::Unannounced => {}
            Ending::Cut(bytes) => {
                head.push_str(&format!("Content-Length: {}\r\n", body.len()));
                body = &body[..body.len() - bytes];
            }
            Ending::Whole | Ending::Silence | Ending::Held(_) | Ending::Trickle(_) => {
                head.push_str(&format!("Content-Length: {}\r\n", body.len()));
            }
        }
        [head.as_bytes(), b"\r\n", body].concat()
    }
}

type Handler = dyn Fn(&Request) -> Reply + Send + Sync;

/// A server on a free port; it ends when this is dropped.
pub struct Server {
    /// `127.0.0.1:port`.
    pub address: String,
    requests: Arc<Mutex<Vec<Request>>>,
    held: Arc<Held>,
    task: JoinHandle<()>,
}

/// Requests that wait at a gate.
#[derive(Debug, Default)]
struct Held {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Server {
    pub async fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (requests, held) = (Arc::new(Mutex::new(vec![])), Arc::<Held>::default());
        let count = Arc::clone(&held);
        let (handler, log): (Arc<Handler>, _) = (Arc::new(handler), requests.clone());
        let task = tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                tokio::spawn(answer(connection, handler.clone(), log.clone(), count.clone()));
            }
        });
        Self { address, requests, held, task }
    }

    /// Requests that wait at a gate now.
    pub fn held(&self) -> usize {
        self.held.now.load(Ordering::SeqCst)
    }

    /// The most that ever waited at the same time.
    pub fn most_held(&self) -> usize {
        self.held.most.load(Ordering::SeqCst)
    }

    /// What was asked since the last call.
    pub fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut *self.requests.lock().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(
    mut connection: TcpStream,
    handler: Arc<Handler>,
    log: Arc<Mutex<Vec<Request>>>,
    held: Arc<Held>,
) {
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        let Ok(byte) = connection.read_u8().await else { return };
        head.push(byte);
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let path = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
    let pairs = lines.filter_map(|line| line.split_once(": "));
    let headers = pairs.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
    let request = Request { path, headers };
    log.lock().unwrap().push(request.clone());
    let reply = handler(&request);
    if reply.ending == Ending::Silence {
        // Until the client has had enough.
        let _ = connection.read_u8().await;
        return;
    }
    if let Ending::Held(gate) = &reply.ending {
        let now = held.now.fetch_add(1, Ordering::SeqCst) + 1;
        held.most.fetch_max(now, Ordering::SeqCst);
        gate.wait().await;
        held.now.fetch_sub(1, Ordering::SeqCst);
    }
    let bytes = reply.encode();
    let piece = match reply.ending {
        Ending::Trickle(piece) => piece,
        _ => bytes.len(),
    };
    for piece in bytes.chunks(piece) {
        // A client that goes away in the middle is a test's business.
        if connection.write_all(piece).await.is_err() {
            return;
        }
        if matches!(reply.ending, Ending::Trickle(_)) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    let _ = connection.shutdown().await;
}
