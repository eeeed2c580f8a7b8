//! Which image of a workspace may be opened: of each kind the last, and memory once.
//!
//! ```text
//! sleep: key of (object, this run) ─▶ noted, in the place of the one before
//! snapshot: the same ─▶ noted beside the one that stands, in the place of one that was only begun
//! wake, restore, fork: is it noted? ─▶ key of (object, the run that it was noted with)
//! host says that a snapshot stands, or one is opened ─▶ what stood before it is noted no more
//! any release of the disk: memory is noted no more; a wake's only if it was until now
//! ```
//!
//! Until a snapshot is whole the one before it is the last: whoever dies on the way loses neither. The
//! run is the KMS's own count, the intent's place in the log, so an older image stays closed
//! whatever number control gives to a newer one. Must never release the key of an image that is not
//! noted, or a wake's disk twice for one memory.

use crate::check::{Cleared, Refusal};
use crate::kms::{Call, Inner, entry, entry_text};
use api::audit::{Object, Phase};
use api::kms::backing_of;
use model::{ObjectId, Purpose, WorkspaceId};

impl Inner {
    /// What the object is called in its key's derivation; of an image, if it may be opened.
    pub(crate) async fn object_named(&self, c: &Cleared) -> api::Result<Result<String, Refusal>> {
        let Object {
            workspace,
            purpose,
            id,
        } = &c.object;
        let name = id.as_ref().map_or(workspace.as_str(), |id| id.as_str());
        if !purpose.is_image() {
            return Ok(Ok(name.to_owned()));
        }
        if begins(c) {
            return Ok(Ok(image_named(name, c.run())));
        }
        let noted = self.store.image(workspace, *purpose, name).await?;
        Ok(noted
            .map(|run| image_named(name, run))
            .ok_or(Refusal::Image))
    }

    /// A snapshot stands, by host's word: what stood before is opened no more, which leaves an entry.
    pub(crate) async fn snapshot_keep(
        &self,
        call: &Call,
        workspace: &WorkspaceId,
        object: &ObjectId,
    ) -> api::Result<bool> {
        let Some((row, _)) = self.store.workspace(workspace).await? else {
            return Ok(true);
        };
        let by = "internal:host";
        let mut e = entry("kms.snapshot_keep", Phase::Fact, &call.request_id, by);
        e.account = Some(row.account);
        e.subject = Some(workspace.to_string());
        e.data.insert("object".into(), object.as_str().into());
        let (object, told) = (object.as_str(), entry_text(&e)?);
        self.store
            .snapshot_keep(workspace, object, Some(&told))
            .await?;
        Ok(true)
    }

    /// Notes what the release begins or uses up; durable before the key leaves.
    pub(crate) async fn images_note(&self, c: &Cleared) -> api::Result<Result<(), Refusal>> {
        let Object {
            workspace,
            purpose,
            id,
        } = &c.object;
        match id {
            Some(id) if purpose.is_image() && begins(c) => {
                let run = c.run();
                self.store.image_put(workspace, *purpose, id, run).await?;
            }
            // Whoever opens it has seen it whole.
            Some(id) if purpose.is_image() && purpose.is_by_id() => {
                let object = id.as_str();
                // The release's own entry names it.
                self.store.snapshot_keep(workspace, object, None).await?;
            }
            _ => {}
        }
        if *purpose == Purpose::Disk {
            let woken = |o: &Object| o.purpose == Purpose::Memory && o.workspace == *workspace;
            let woken = c.lease.objects().find(woken).and_then(|o| o.id);
            let used = self.store.memory_use(workspace, woken.as_ref()).await?;
            if woken.is_some() && !used {
                return Ok(Err(Refusal::Image));
            }
        }
        Ok(Ok(()))
    }
}

/// Whether the act makes the image that the key is for.
fn begins(c: &Cleared) -> bool {
    backing_of(&c.intent.entry.event).is_some_and(|b| b.begins)
}

fn image_named(object: &str, run: u64) -> String {
    format!("{object}/{run}")
}
