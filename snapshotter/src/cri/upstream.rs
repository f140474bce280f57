//! The connection to containerd: made when it is wanted, and again after containerd was restarted.

use std::path::PathBuf;

use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use super::{Asked, WINDOW_BYTES};

/// See the module.
#[derive(Debug)]
pub(super) struct Upstream {
    path: PathBuf,
    sender: Mutex<Option<SendRequest<Asked>>>,
}

impl Upstream {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, sender: Mutex::default() }
    }

    /// Sends a call as it is.
    ///
    /// # Errors
    /// In words: nobody answers.
    pub(super) async fn send(&self, call: Request<Asked>) -> Result<Response<Incoming>, String> {
        let mut sender = self.sender().await?;
        sender.send_request(call).await.map_err(|error| self.words(&error))
    }

    async fn sender(&self) -> Result<SendRequest<Asked>, String> {
        let mut known = self.sender.lock().await;
        if let Some(sender) = known.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let stream = UnixStream::connect(&self.path).await.map_err(|error| self.words(&error))?;
        let (sender, connection) = Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.words(&error))?;
        // Ends when the last sender is gone, or containerd is.
        tokio::spawn(connection);
        *known = Some(sender.clone());
        Ok(sender)
    }

    fn words(&self, error: &dyn std::error::Error) -> String {
        format!("weightfs: containerd at {}: {error}", self.path.display())
    }
}
