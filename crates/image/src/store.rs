//! The artifacts' `manifest.json` and `images/`: what this machine has.
//!
//! ```text
//! images/<sha256>.erofs     bases; the name is the id
//! images/.import-<pid>/     an import under way; swept by the next one
//! images/.lock              one import or removal at a time
//! manifest.json             replaced under .manifest.lock, which `xtask image` takes too
//! ```
//!
//! Fields that are not known here (kernel, closure) are passed on as they are.

use crate::error::{Error, os};
use crate::limits::{IMAGES_MAX, MANIFEST_MAX_BYTES};
use crate::oci::{Config, Digest};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fs::File;
use std::path::{Path, PathBuf};

type Result<T> = std::result::Result<T, Error>;

/// An image of this machine, as the manifest has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// SHA-256 of its file, 64 hex digits.
    pub id: String,
    /// A line for people.
    #[serde(default)]
    pub description: String,
    /// Where it comes from; none: it was made on this machine by `xtask image`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
}

/// Where an image comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// As it was named.
    pub reference: String,
    /// The image's manifest.
    pub digest: Digest,
    /// When it was imported, RFC 3339.
    pub imported_at: String,
    /// The id of the key that signed it, where the policy asks for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signed_by: Option<String>,
    /// What the image says of how it is run.
    pub config: Config,
}

/// The images of one artifacts directory.
#[derive(Debug, Clone)]
pub struct Store {
    artifacts: PathBuf,
}

/// Held while images are imported or removed.
#[must_use]
#[derive(Debug)]
pub struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Said, not left to the close: a child of another thread may hold a copy of the
        // descriptor until it has executed its program.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

impl Store {
    /// The images below this directory.
    #[must_use]
    pub fn new(artifacts: &Path) -> Self {
        Self {
            artifacts: artifacts.to_owned(),
        }
    }

    /// Where the files are.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.artifacts.join("images")
    }

    /// An image's file.
    #[must_use]
    pub fn file(&self, id: &str) -> PathBuf {
        self.images().join(format!("{id}.erofs"))
    }

    /// Makes sure that nobody else imports or removes.
    ///
    /// # Errors
    /// [`Error::Busy`] if somebody does.
    pub fn lock(&self) -> Result<Lock> {
        let dir = self.images();
        std::fs::create_dir_all(&dir).map_err(os(format!("make {}", dir.display())))?;
        let file = lock_file(&dir.join(".lock"))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Lock(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Busy(
                "another import or removal of an image is under way: try again when it is done"
                    .into(),
            )),
            Err(e) => Err(os("lock the images")(e)),
        }
    }

    /// All images.
    ///
    /// # Errors
    /// A manifest that can't be read.
    pub fn list(&self) -> Result<Vec<Image>> {
        images(&self.read()?)
    }

    /// Puts an image into the manifest, in place of one of the same name.
    ///
    /// # Errors
    /// A manifest that can't be read or written, or is full.
    pub fn put(&self, image: &Image) -> Result<()> {
        let value = serde_json::to_value(image).map_err(os("encode the manifest"))?;
        self.change(|all| {
            all.retain(|i| name_of(i) != Some(&image.name));
            if all.len() >= IMAGES_MAX {
                let what = format!("this machine has {IMAGES_MAX} images: remove one first");
                return Err(Error::Usage(what));
            }
            all.push(value);
            Ok(())
        })
    }

    /// Takes an image out of the manifest.
    ///
    /// # Errors
    /// A manifest that can't be read or written.
    pub fn take(&self, name: &str) -> Result<()> {
        self.change(|all| {
            all.retain(|i| name_of(i) != Some(name));
            Ok(())
        })
    }

    /// Replaces the manifest's other fields by `new`'s, and those of its images whose names `new`
    /// has; for `xtask image`, which makes a manifest of its own. Images that it does not know stay
    /// as long as their files are there.
    ///
    /// # Errors
    /// A manifest that can't be read or written.
    pub fn merge(&self, mut new: Map<String, Value>) -> Result<()> {
        let _lock = self.manifest_lock()?;
        let old = self.read()?;
        let mut all = array(&mut new)?.clone();
        for image in images(&old)? {
            let known = all.iter().any(|i| name_of(i) == Some(&image.name));
            if !known && self.file(&image.id).exists() {
                all.push(serde_json::to_value(&image).map_err(os("encode the manifest"))?);
            }
        }
        new.insert("images".into(), Value::Array(all));
        self.write(&new)
    }

    fn change(&self, act: impl FnOnce(&mut Vec<Value>) -> Result<()>) -> Result<()> {
        let _lock = self.manifest_lock()?;
        let mut manifest = self.read()?;
        act(array(&mut manifest)?)?;
        self.write(&manifest)
    }

    /// Waits: it is held for a file's writing only.
    fn manifest_lock(&self) -> Result<Lock> {
        let file = lock_file(&self.artifacts.join(".manifest.lock"))?;
        flock(&file, FlockOperation::LockExclusive).map_err(os("lock the manifest"))?;
        Ok(Lock(file))
    }

    fn read(&self) -> Result<Map<String, Value>> {
        let path = self.artifacts.join("manifest.json");
        match service::files::read_bounded(&path, MANIFEST_MAX_BYTES) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(os(format!("read {}", path.display())))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let mut new = Map::new();
                new.insert("version".into(), 1.into());
                new.insert("images".into(), Value::Array(Vec::new()));
                Ok(new)
            }
            Err(e) => Err(os(format!("read {}", path.display()))(e)),
        }
    }

    fn write(&self, manifest: &Map<String, Value>) -> Result<()> {
        let path = self.artifacts.join("manifest.json");
        let mut bytes = serde_json::to_vec_pretty(manifest).map_err(os("encode the manifest"))?;
        bytes.push(b'\n');
        if bytes.len() as u64 > MANIFEST_MAX_BYTES {
            let what = "the manifest would be larger than 1 MiB: remove images first";
            return Err(Error::Usage(what.into()));
        }
        service::files::write_atomic(&path, &bytes, 0o644)
            .map_err(os(format!("write {}", path.display())))
    }
}

/// Removes an image; its file too, unless another name has it. `in_use` are the ids that workspaces
/// of this machine are of.
///
/// # Errors
/// [`Error::Usage`] for a name that is not there, [`Error::Busy`] for an image in use.
pub fn remove(
    store: &Store,
    name: &str,
    in_use: &[(String, String)],
    force: bool,
) -> Result<Image> {
    let _lock = store.lock()?;
    let all = store.list()?;
    let image = all.iter().find(|i| i.name == name).ok_or_else(|| {
        let what = format!("no image is named {name:?}; `casemate image ls` shows them");
        Error::Usage(what)
    })?;
    let shared = all.iter().any(|i| i.id == image.id && i.name != name);
    let users: Vec<&str> = in_use
        .iter()
        .filter(|(_, id)| *id == image.id)
        .map(|(workspace, _)| workspace.as_str())
        .collect();
    if !users.is_empty() && !force && !shared {
        let some = users[..users.len().min(5)].join(", ");
        return Err(Error::Busy(format!(
            "{} workspaces are of image {name} ({some}): delete them first, or say --force; with \
             --force they can't be started again",
            users.len()
        )));
    }
    store.take(name)?;
    if !shared {
        let path = store.file(&image.id);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(os(format!("remove {}", path.display()))(e));
            }
            _ => {}
        }
    }
    Ok(image.clone())
}

fn lock_file(path: &Path) -> Result<File> {
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(os(format!("open {}", path.display())))
}

fn images(manifest: &Map<String, Value>) -> Result<Vec<Image>> {
    let all = manifest.get("images").cloned();
    serde_json::from_value(all.unwrap_or_else(|| Value::Array(Vec::new())))
        .map_err(os("read the manifest's images"))
}

fn array(manifest: &mut Map<String, Value>) -> Result<&mut Vec<Value>> {
    let all = manifest
        .entry("images")
        .or_insert_with(|| Value::Array(Vec::new()));
    all.as_array_mut()
        .ok_or_else(|| Error::Usage("the manifest's images are no list".into()))
}

fn name_of(image: &Value) -> Option<&str> {
    image.get("name").and_then(Value::as_str)
}
