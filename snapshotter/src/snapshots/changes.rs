//! Changing snapshots that are there: Commit, Remove, Update.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::{
    KEY_BYTES_MAX, Labels, SnapshotError, Snapshots, check_free, check_size, existing,
    stored_labels, usage,
};
use crate::metadata::{Backing, Change, DirectoryId, Index, Kind, Record, SnapshotInfo, Usage};
use crate::reason::Reason;

/// The prefix of a field mask's path that names one label.
const LABEL_PATH: &str = "labels.";

/// How much of a bad path in a field mask an error repeats, in characters.
const ERROR_PATH_CHARS_MAX: usize = 256;

impl Snapshots {
    /// Makes an active snapshot a committed one under another name, with these labels and no
    /// others. The key is free again.
    pub async fn commit(
        self: &Arc<Self>,
        name: &str,
        key: &str,
        labels: Labels,
    ) -> Result<(), SnapshotError> {
        check_size("the name", name.len(), 1, KEY_BYTES_MAX)?;
        let (name, key, labels) = (name.to_owned(), key.to_owned(), stored_labels(labels)?);
        let this = self.clone();
        self.blocking(move || this.commit_blocking(&name, &key, labels)).await
    }

    fn commit_blocking(&self, name: &str, key: &str, labels: Labels) -> Result<(), SnapshotError> {
        let (id, ..) = committable(&self.metadata.index(), name, key)?;
        let measured = usage::measure(&self.directories.files(id))?;
        let unnamed = self.metadata.change(|index| {
            let (_, active) = committable(index, name, key)?;
            let unnamed = matches!(active.backing, Backing::Directory { reason: None, .. });
            let record = committed(&active, name, labels.clone(), measured);
            Ok::<_, SnapshotError>((Change::Replace { key: key.to_owned(), record }, unnamed))
        })?;
        if unnamed {
            self.decisions.ordinary(name, &labels, &Reason::NoLabels);
        }
        Ok(())
    }

    /// Removes a snapshot that no other has as its parent.
    pub async fn remove(self: &Arc<Self>, name: &str) -> Result<(), SnapshotError> {
        let (this, name) = (self.clone(), name.to_owned());
        self.finish(async move {
            let forgetting = this.clone();
            let removed = this.blocking(move || forgetting.forget(&name)).await?;
            match removed.backing {
                Backing::Lazy { tree, .. } => this.mounter.unmount(tree).await,
                Backing::Directory { id, .. } => {
                    let removing = this.clone();
                    this.blocking(move || {
                        removing.remove_directory(id);
                        Ok(())
                    })
                    .await?;
                }
            }
            Ok(())
        })
        .await
    }

    /// Takes the record away: from here on the snapshot does not exist.
    fn forget(&self, name: &str) -> Result<Arc<Record>, SnapshotError> {
        self.metadata.change(|index| {
            let record = existing(index, name)?.clone();
            match index.children(name) {
                0 => Ok((Change::Remove(name.to_owned()), record)),
                children => Err(SnapshotError::HasChildren { name: name.to_owned(), children }),
            }
        })
    }

    /// Changes labels. Without a mask `labels` replaces all of them. Of a mask's paths, `labels`
    /// replaces all, `labels.<name>` sets or deletes one; any other is refused.
    pub async fn update(
        self: &Arc<Self>,
        name: &str,
        labels: Labels,
        mask: &[String],
    ) -> Result<SnapshotInfo, SnapshotError> {
        let (this, name, mask) = (self.clone(), name.to_owned(), mask.to_vec());
        self.blocking(move || {
            this.metadata.change(|index| {
                let mut record = Record::clone(existing(index, &name)?);
                let info = &mut record.info;
                let changed = masked(std::mem::take(&mut info.labels), labels, &mask, &name)?;
                info.labels = stored_labels(changed)?;
                info.updated = later(info.updated);
                let info = info.clone();
                Ok((Change::Put(record), info))
            })
        })
        .await
    }
}

/// The directory and the record of an active snapshot that can be committed as `name`.
fn committable(
    index: &Index,
    name: &str,
    key: &str,
) -> Result<(DirectoryId, Arc<Record>), SnapshotError> {
    check_free(index, name)?;
    let record = existing(index, key)?;
    match (record.info.kind, &record.backing) {
        (Kind::Active, Backing::Directory { id, .. }) => Ok((*id, record.clone())),
        (kind, _) => Err(SnapshotError::WrongKind { name: key.to_owned(), kind, action: "commit" }),
    }
}

fn committed(active: &Record, name: &str, labels: Labels, measured: Usage) -> Record {
    let created = SystemTime::now();
    let info = SnapshotInfo {
        name: name.to_owned(),
        parent: active.info.parent.clone(),
        kind: Kind::Committed,
        labels,
        created,
        updated: created,
    };
    let mut backing = active.backing.clone();
    if let Backing::Directory { usage, reason, .. } = &mut backing {
        *usage = measured;
        // It was prepared without a name of the layer, so nobody was asked for a lazy one.
        reason.get_or_insert(Reason::NoLabels);
    }
    Record { info, backing }
}

fn masked(
    mut labels: Labels,
    given: Labels,
    mask: &[String],
    name: &str,
) -> Result<Labels, SnapshotError> {
    if mask.is_empty() {
        return Ok(given);
    }
    for path in mask {
        if let Some(label) = path.strip_prefix(LABEL_PATH) {
            match given.get(label) {
                Some(value) => labels.insert(label.to_owned(), value.clone()),
                None => labels.remove(label),
            };
        } else if path == "labels" {
            labels = given.clone();
        } else {
            let field = path.chars().take(ERROR_PATH_CHARS_MAX).collect();
            return Err(SnapshotError::Immutable { name: name.to_owned(), field });
        }
    }
    Ok(labels)
}

/// Now, or a moment after `before` if the clock went back: a change always shows.
fn later(before: SystemTime) -> SystemTime {
    let next = before.checked_add(Duration::from_nanos(1)).unwrap_or(before);
    SystemTime::now().max(next)
}
