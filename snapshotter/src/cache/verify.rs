//! Hashing again what the cache holds, and fetching anew what is bad.

use futures::stream::{self, BoxStream, StreamExt as _};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use weightfs_fusefs::{Quiet, blob_id};
use weightfs_proto::control::{VerifiedBlob, VerifyEvent, VerifyProgress, verify_event};
use weightfs_store::{BlobId, Checked, Form, Others, VerifyError};

use super::{Cache, CacheError, Subject, names};
use crate::trees::LayerRecord;

/// Bytes that are hashed between two events of progress.
const PROGRESS_BYTES: u64 = 64 << 20;

/// Events that wait to be taken; of progress, more are dropped.
const EVENTS: usize = 64;

/// What becomes of a blob that does not match its digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// It stays where it is, and is not served.
    No,
    /// It is discarded, and fetched again if it is known from where.
    Yes,
}

/// A blob that is to be hashed.
#[derive(Debug, Clone, Copy)]
struct Task {
    id: BlobId,
    size: u64,
    /// Bytes of it that will be hashed.
    hashed: u64,
}

impl Cache {
    /// Hashes again what is here of `subject`, or everything, one blob after the other: events of
    /// how far it is and of each blob. What is wrong with a blob is told of it; the stream ends
    /// with an error when nothing is known of the subject, or the state directory can't be read.
    ///
    /// To be called in a runtime. A repair that was begun ends, even if nobody listens any more.
    pub fn verify(
        &self,
        subject: Option<Subject>,
        repair: Repair,
    ) -> BoxStream<'static, Result<VerifyEvent, CacheError>> {
        let (sender, events) = mpsc::channel(EVENTS);
        let own = self.clone();
        let work = tokio::spawn(async move { own.verify_all(subject, repair, sender).await });
        let end = stream::once(work).filter_map(async |ended| match ended {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(Err(error)),
            Err(error) => Some(Err(error.into())),
        });
        ReceiverStream::new(events).map(Ok).chain(end).boxed()
    }

    /// Ends early when nobody listens.
    async fn verify_all(
        &self,
        subject: Option<Subject>,
        repair: Repair,
        events: mpsc::Sender<VerifyEvent>,
    ) -> Result<(), CacheError> {
        let own = self.clone();
        let tasks = tokio::task::spawn_blocking(move || own.tasks(subject.as_ref())).await??;
        let names = names(&self.references().all());
        let total = tasks.iter().map(|task| task.hashed).sum();
        let mut before = 0;
        for task in tasks {
            let progress = Progress { before, total, hashed: 0, told: 0, events: events.clone() };
            let mut verified = self.verify_one(task, repair, progress).await?;
            verified.references = names.get(&task.id).cloned().unwrap_or_default();
            before += task.hashed;
            if events.send(event(verify_event::Event::Blob(verified))).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// What there is to hash.
    fn tasks(&self, subject: Option<&Subject>) -> Result<Vec<Task>, CacheError> {
        let usage = self.store().usage()?;
        let wanted = subject.map(|subject| self.blobs_of(subject)).transpose()?;
        let is_wanted = |id| wanted.as_ref().is_none_or(|wanted| wanted.contains(&id));
        let chosen = usage.blobs.iter().filter(|blob| is_wanted(blob.id) && blob.disk > 0);
        let task = |blob: &weightfs_store::BlobUsage| {
            let whole = blob.cached == blob.size && blob.id.form == Form::AsStored;
            Task { id: blob.id, size: blob.size, hashed: if whole { blob.size } else { 0 } }
        };
        Ok(chosen.map(task).collect())
    }

    async fn verify_one(
        &self,
        task: Task,
        repair: Repair,
        mut progress: Progress,
    ) -> Result<VerifiedBlob, CacheError> {
        let store = self.store().clone();
        let hash = move || store.verify(task.id, |bytes| progress.add(bytes));
        let checked = tokio::task::spawn_blocking(hash).await?;
        let (result, message) = match checked {
            Ok(Checked::Good) => ("good", String::new()),
            Ok(Checked::Partial) => ("partial", "not all of it is here".to_owned()),
            Ok(Checked::NoDigest) => ("no-digest", "it was inflated here".to_owned()),
            Ok(Checked::Absent) => ("partial", "nothing of it is here".to_owned()),
            Ok(Checked::Bad { actual }) => {
                let bad = format!("its bytes hash to {actual}");
                match repair {
                    Repair::No => ("bad", bad),
                    Repair::Yes => self.repair(task.id, bad).await,
                }
            }
            Ok(Checked::BadChunks { count, others }) => {
                let bad = format!("{count} of its chunks were wrong and are gone from the cache");
                match repair {
                    Repair::No => ("bad", bad),
                    Repair::Yes => self.repair_chunks(task.id, bad, others).await,
                }
            }
            Err(VerifyError::Open(error)) => ("failed", error.to_string()),
            Err(VerifyError::Read(error)) => ("failed", error.to_string()),
        };
        Ok(VerifiedBlob {
            digest: task.id.digest.to_string(),
            result: result.to_owned(),
            message,
            size: task.size,
            references: vec![],
        })
    }

    /// Fetches the chunks that are gone, if all others are here.
    async fn repair_chunks(
        &self,
        id: BlobId,
        bad: String,
        others: Others,
    ) -> (&'static str, String) {
        let known = self.layer_of(id).filter(|_| others == Others::Here);
        let Some(layer) = known else {
            return ("discarded", format!("{bad}; they are fetched when they are read again"));
        };
        match self.fetch(&layer).await {
            Ok(()) => ("repaired", bad),
            Err(error) => ("failed", format!("{bad}; {error}")),
        }
    }

    /// Discards a blob and fetches it again.
    async fn repair(&self, id: BlobId, bad: String) -> (&'static str, String) {
        let store = self.store().clone();
        let discarded = tokio::task::spawn_blocking(move || store.discard(id)).await;
        match discarded {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => {
                let advice = "it is in use: unmount what has it, then repair it again";
                return ("bad", format!("{bad}; {advice}"));
            }
            Ok(Err(error)) => return ("failed", format!("{bad}; {error}")),
            Err(error) => return ("failed", format!("{bad}; {error}")),
        }
        let Some(layer) = self.layer_of(id) else {
            return ("discarded", format!("{bad}; it is fetched when it is read again"));
        };
        match self.fetch(&layer).await {
            Ok(()) => ("repaired", bad),
            Err(error) => ("failed", format!("{bad}; it is discarded, but: {error}")),
        }
    }

    /// A layer that is kept as that blob.
    fn layer_of(&self, id: BlobId) -> Option<LayerRecord> {
        let all = self.references().all().into_iter().flat_map(|known| known.layers);
        all.into_iter().find(|layer| blob_id(&layer.descriptor) == id)
    }

    async fn fetch(&self, layer: &LayerRecord) -> Result<(), String> {
        let open = self.opener.open_layer(layer, None, &Quiet).await;
        let open = open.map_err(|error| error.to_string())?;
        open.blob.complete().await.map_err(|error| error.to_string())
    }
}

/// Where the work is. Told now and then, not for every chunk.
#[derive(Debug)]
struct Progress {
    /// Bytes of earlier blobs, and of all.
    before: u64,
    total: u64,
    /// Bytes of this blob that were hashed, and how many of them were told.
    hashed: u64,
    told: u64,
    events: mpsc::Sender<VerifyEvent>,
}

impl Progress {
    fn add(&mut self, bytes: u64) {
        self.hashed += bytes;
        if self.hashed - self.told < PROGRESS_BYTES {
            return;
        }
        self.told = self.hashed;
        let progress = VerifyProgress { bytes: self.before + self.hashed, total: self.total };
        // A full channel drops it: a later one says more.
        let _ = self.events.try_send(event(verify_event::Event::Progress(progress)));
    }
}

fn event(event: verify_event::Event) -> VerifyEvent {
    VerifyEvent { event: Some(event) }
}
