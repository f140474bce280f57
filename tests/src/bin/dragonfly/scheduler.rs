//! A stand-in for Dragonfly's scheduler, which dfdaemon does not start without: of its protocol, what
//! dfdaemon needs (`proto/scheduler.proto`).
//!
//! The first host that asks for a task is sent to the registry, and is the parent of all others. Whoever
//! gets nothing from that parent is sent to the registry, too.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use tokio::task::JoinHandle;
use tonic::transport::server::{Server, TcpIncoming};
use tonic::{Request, Response, Status, Streaming};
use weightfs_tests::remote::{block_on, spawn};

use protocol::announce_peer_request::Request as Event;
use protocol::announce_peer_response::Response as Answer;
use protocol::scheduler_server::{Scheduler as Calls, SchedulerServer};
use protocol::{
    AnnounceHostRequest, AnnouncePeerRequest, AnnouncePeerResponse, Anything, DeleteHostRequest,
    Host, NormalTaskResponse, Peer,
};

mod protocol {
    tonic::include_proto!("scheduler.v2");
}

/// A running scheduler, which ends with this guard.
pub struct Scheduler {
    address: SocketAddr,
    known: Known,
    server: JoinHandle<()>,
}

/// What it knows of its hosts and what it told them; clones share it.
#[derive(Clone, Default)]
struct Known(Arc<State>);

#[derive(Default)]
struct State {
    hosts: Mutex<HashMap<String, Host>>,
    /// The first of each task.
    parents: Mutex<HashMap<String, Peer>>,
    to_registry: AtomicUsize,
    to_parent: AtomicUsize,
}

/// How often hosts were sent where.
#[derive(Debug, Clone, Copy)]
pub struct Sent {
    /// To the registry.
    pub to_registry: usize,
    /// To the host that came first.
    pub to_parent: usize,
}

/// What an event is answered with.
enum Reply {
    None,
    Answer(Answer),
    /// dfdaemon waits until its stream is closed.
    Close,
}

impl Scheduler {
    /// Starts one on a free port.
    pub fn start() -> Self {
        let known = Known::default();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        // Answers are small: held back for more to come, each would cost 40 ms.
        let incoming = block_on(async { TcpIncoming::bind(any).unwrap().with_nodelay(Some(true)) });
        let address = incoming.local_addr().unwrap();
        let (reporter, health) = tonic_health::server::health_reporter();
        let calls = SchedulerServer::new(known.clone());
        let server = spawn(async move {
            reporter.set_serving::<SchedulerServer<Known>>().await;
            let server = Server::builder().add_service(health).add_service(calls);
            server.serve_with_incoming(incoming).await.expect("the scheduler serves");
        });
        Self { address, known, server }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How often hosts were sent where so far.
    pub fn sent(&self) -> Sent {
        let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        Sent {
            to_registry: count(&self.known.0.to_registry),
            to_parent: count(&self.known.0.to_parent),
        }
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Known {
    fn reply(&self, message: AnnouncePeerRequest) -> Reply {
        match message.request {
            None => Reply::None,
            Some(Event::RegisterPeerRequest(_)) => Reply::Answer(self.place(message)),
            Some(Event::ReschedulePeerRequest(_)) => Reply::Answer(self.registry()),
            Some(
                Event::DownloadPeerFinishedRequest(_)
                | Event::DownloadPeerBackToSourceFinishedRequest(_)
                | Event::DownloadPeerFailedRequest(_)
                | Event::DownloadPeerBackToSourceFailedRequest(_),
            ) => Reply::Close,
        }
    }

    /// Where a host gets what it asks for.
    fn place(
        &self,
        AnnouncePeerRequest { host_id, task_id, peer_id, .. }: AnnouncePeerRequest,
    ) -> Answer {
        let host = self.0.hosts.lock().unwrap().get(&host_id).cloned();
        let mut parents = self.0.parents.lock().unwrap();
        let parent = parents.entry(task_id).or_insert(Peer { id: peer_id, host });
        if parent.host.as_ref().is_none_or(|host| host.id == host_id) {
            return self.registry();
        }
        self.0.to_parent.fetch_add(1, Ordering::Relaxed);
        Answer::NormalTaskResponse(NormalTaskResponse { candidate_parents: vec![parent.clone()] })
    }

    fn registry(&self) -> Answer {
        self.0.to_registry.fetch_add(1, Ordering::Relaxed);
        Answer::NeedBackToSourceResponse(Anything {})
    }
}

#[tonic::async_trait]
impl Calls for Known {
    type AnnouncePeerStream = BoxStream<'static, Result<AnnouncePeerResponse, Status>>;

    async fn announce_host(
        &self,
        request: Request<AnnounceHostRequest>,
    ) -> Result<Response<Anything>, Status> {
        let host = request.into_inner().host;
        let host = host.ok_or_else(|| Status::invalid_argument("no host"))?;
        self.0.hosts.lock().unwrap().insert(host.id.clone(), host);
        Ok(Response::new(Anything {}))
    }

    async fn delete_host(
        &self,
        request: Request<DeleteHostRequest>,
    ) -> Result<Response<Anything>, Status> {
        let id = request.into_inner().host_id;
        self.0.hosts.lock().unwrap().remove(&id);
        let of_it = |peer: &Peer| peer.host.as_ref().is_some_and(|host| host.id == id);
        self.0.parents.lock().unwrap().retain(|_, parent| !of_it(parent));
        Ok(Response::new(Anything {}))
    }

    async fn announce_peer(
        &self,
        request: Request<Streaming<AnnouncePeerRequest>>,
    ) -> Result<Response<Self::AnnouncePeerStream>, Status> {
        let answers =
            stream::try_unfold((self.clone(), request.into_inner()), |(known, mut events)| async {
                while let Some(message) = events.message().await? {
                    match known.reply(message) {
                        Reply::None => {}
                        Reply::Close => return Ok(None),
                        Reply::Answer(answer) => {
                            let answer = AnnouncePeerResponse { response: Some(answer) };
                            return Ok(Some((answer, (known, events))));
                        }
                    }
                }
                Ok(None)
            });
        Ok(Response::new(answers.boxed()))
    }
}
