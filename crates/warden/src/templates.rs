//! Templates: the memory and device state of a booted, rehearsed guest that no tenant has touched.
//!
//! A build VM writes two files in a directory of its own; sealing measures them, makes them
//! root's and read-only, signs the manifest and renames the directory into place. What is not
//! under such a manifest, to the byte, is never restored.

use crate::fault::{At, Result, conflict, missing};
use crate::layout::{Digests, open_beneath, read_small, remove, sync_dir_of, write_small};
use api::warden::ImageId;
use api::{Error, context};
use jail::limits::STATE_MAX_BYTES;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Gid, Mode, OFlags, Uid};
use seal::sign::{Signed, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What a template is a template of. Every part changes what may be restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parts {
    /// Digest of the VMM's executable.
    pub vmm: String,
    /// Digest of its arguments.
    pub machine: String,
    /// Digest of the kernel.
    pub kernel: String,
    /// Digest of the initramfs.
    pub initramfs: String,
    /// The image.
    pub image: ImageId,
    /// Memory, MiB.
    pub memory_mb: u32,
    /// Virtual CPUs.
    pub cpus: u32,
}

impl Parts {
    fn name(&self) -> Result<String> {
        let bytes = serde_json::to_vec(self).at("name", "a template")?;
        Ok(hex::encode(seal::hash::sha256(&bytes)))
    }
}

/// The signed manifest.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    parts: Parts,
    memory: Measured,
    state: Measured,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Measured {
    bytes: u64,
    sha256: String,
}

/// The two files of a template, or of a build.
#[derive(Debug)]
pub struct Files {
    /// Guest RAM.
    pub memory: OwnedFd,
    /// Device state: to read, or, of a build, to write (the VMM wants it so).
    pub state: OwnedFd,
}

/// The store of templates and builds.
#[derive(Debug)]
pub struct Templates {
    dir: PathBuf,
    builds: PathBuf,
    key: SigningKey,
    digests: Digests,
}

impl Templates {
    /// The store below warden's state directory.
    #[must_use]
    pub fn new(state: &std::path::Path, key: SigningKey) -> Self {
        Self {
            dir: state.join("templates"),
            builds: state.join("build"),
            key,
            digests: Digests::default(),
        }
    }

    /// The build directory of `slot`, with both files, owned by `uid` while the build lasts.
    ///
    /// # Errors
    /// The file's.
    pub fn build(&self, slot: u16, uid: u32, memory_mb: u32) -> Result<Files> {
        let dir = self.builds.join(slot.to_string());
        remove(&dir)?;
        crate::layout::make_dir(&dir, 0o700)?;
        let make = |name: &str, access: OFlags, bytes: u64| -> Result<OwnedFd> {
            let flags = access | OFlags::CREATE | OFlags::EXCL;
            let fd = open_beneath(&dir, name, flags, 0o600).at("make", name)?;
            rustix::fs::ftruncate(&fd, bytes).at("size", name)?;
            rustix::fs::fchown(&fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))
                .at("own", name)?;
            Ok(fd)
        };
        Ok(Files {
            memory: make("memory", OFlags::RDWR, u64::from(memory_mb) << 20)?,
            state: make("state", OFlags::WRONLY, 0)?,
        })
    }

    /// Measures, seals and moves the build of `slot` into place; no process may hold it any more.
    ///
    /// # Errors
    /// [`api::ErrorCode::Conflict`] when nothing was saved.
    pub fn seal(&self, slot: u16, parts: Parts) -> Result {
        let dir = self.builds.join(slot.to_string());
        let measure = |name: &str| -> Result<Measured> {
            let fd = open_beneath(&dir, name, OFlags::RDWR, 0).at("open build file", name)?;
            rustix::fs::fchown(&fd, Some(Uid::ROOT), Some(Gid::ROOT)).at("own", name)?;
            rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o444)).at("make read-only", name)?;
            rustix::fs::fsync(&fd).at("sync", name)?;
            self.measured(fd.as_fd(), name)
        };
        let manifest = Manifest {
            memory: measure("memory")?,
            state: measure("state")?,
            parts,
        };
        let whole = u64::from(manifest.parts.memory_mb) << 20;
        if manifest.state.bytes == 0
            || manifest.state.bytes > STATE_MAX_BYTES
            || manifest.memory.bytes != whole
        {
            let why = "the build VM has not saved itself; ask vmctl to `save` first";
            return Err(conflict(why));
        }
        let signed = Signed::new(&self.key, context::TEMPLATE, &manifest);
        write_small(&dir.join("manifest"), signed.as_str(), 0o444, true)?;
        let to = self.dir.join(manifest.parts.name()?);
        remove(&to)?;
        std::fs::rename(&dir, &to)
            .and_then(|()| sync_dir_of(&to))
            .at("move into place", to.display())
    }

    /// The files of a template, checked against its manifest.
    ///
    /// # Errors
    /// [`api::ErrorCode::NotFound`] if there is none; an internal error if it is not what was
    /// sealed.
    pub fn open(&self, parts: &Parts) -> Result<Files> {
        let dir = self.dir.join(parts.name()?);
        let text = read_small(&dir.join("manifest"))?.ok_or_else(|| {
            missing("there is no template of that image, memory and CPUs; build one")
        })?;
        let manifest = self.manifest(&text)?;
        if manifest.parts != *parts {
            let why = format!("{}: the manifest is of another template", dir.display());
            return Err(Error::internal(why));
        }
        let check = |name: &str, want: &Measured| -> Result<OwnedFd> {
            let fd = open_beneath(&dir, name, OFlags::RDONLY, 0).at("open template file", name)?;
            if self.measured(fd.as_fd(), name)? == *want {
                return Ok(fd);
            }
            Err(Error::internal(format!(
                "{}/{name} is not what was sealed; remove the directory and build the template anew",
                dir.display()
            )))
        };
        Ok(Files {
            memory: check("memory", &manifest.memory)?,
            state: check("state", &manifest.state)?,
        })
    }

    /// All templates that are signed, whatever they are of.
    #[must_use]
    pub fn list(&self) -> Vec<Parts> {
        let entries = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let of = |path: PathBuf| {
            self.manifest(&read_small(&path.join("manifest")).ok()??)
                .ok()
        };
        entries
            .filter_map(|e| of(e.path()))
            .map(|m| m.parts)
            .collect()
    }

    /// Removes the build of `slot`.
    ///
    /// # Errors
    /// The directory's.
    pub fn build_remove(&self, slot: u16) -> Result {
        remove(&self.builds.join(slot.to_string()))
    }

    fn manifest(&self, text: &str) -> Result<Manifest> {
        let key: VerifyingKey = self.key.public();
        Signed::parse(text.trim())
            .and_then(|s| s.verify(&key, context::TEMPLATE))
            .at("verify", "a template's manifest")
    }

    fn measured(&self, fd: rustix::fd::BorrowedFd<'_>, name: &str) -> Result<Measured> {
        let bytes = rustix::fs::fstat(fd)
            .at("measure", name)?
            .st_size
            .cast_unsigned();
        Ok(Measured {
            bytes,
            sha256: self.digests.of(fd, name)?,
        })
    }
}
