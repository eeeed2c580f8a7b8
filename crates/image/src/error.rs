//! Why an image is not imported: by name, with the layer, the path and what to do.

use crate::oci::Digest;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What an image was refused for. The texts are part of the interface: scripts match them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// Contents do not have the digest they are named by.
    DigestMismatch,
    /// Contents do not have the size that their descriptor says.
    SizeMismatch,
    /// A layer's contents do not have the `diff_id` of the configuration.
    DiffIdMismatch,
    /// A media type, or a digest's algorithm, that is not known here.
    MediaTypeUnknown,
    /// A layer that is to be fetched from elsewhere.
    ForeignLayer,
    /// Not for linux/amd64.
    PlatformMissing,
    /// A tag or image that is not there, or one of several was not chosen.
    ImageNotFound,
    /// Contents that a descriptor names are not there.
    BlobMissing,
    /// JSON that is not what the specification says.
    JsonMalformed,
    /// Beyond a bound.
    TooLarge,
    /// Grows too much when it is unpacked.
    Ratio,
    /// gzip or zstd that does not unpack.
    Compression,
    /// A tar archive that is not one, or that readers could read in two ways.
    TarMalformed,
    /// A kind of tar entry that no image needs.
    TarUnsupported,
    /// A name that starts with `/`.
    PathAbsolute,
    /// A name or link that leads out of the image's root.
    PathTraversal,
    /// An empty name, or one with a NUL.
    PathInvalid,
    /// A name, path or depth beyond its bound.
    PathTooLong,
    /// An entry below a file, or below a symbolic link of the same layer.
    ThroughSymlink,
    /// A path that one layer has twice.
    Duplicate,
    /// A hard link to nothing, or to a directory.
    LinkMissing,
    /// A device node or socket.
    Device,
    /// A setuid or setgid program outside the policy.
    Setuid,
    /// A file capability outside the policy.
    FileCapability,
    /// An extended attribute that is not taken.
    Xattr,
    /// A whiteout that is none.
    Whiteout,
    /// `/proc` and the like, where the workspace mounts its own, are no directories.
    MountPoint,
}

impl Code {
    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::DigestMismatch => "digest_mismatch",
            Self::SizeMismatch => "size_mismatch",
            Self::DiffIdMismatch => "diff_id_mismatch",
            Self::MediaTypeUnknown => "media_type_unknown",
            Self::ForeignLayer => "foreign_layer",
            Self::PlatformMissing => "platform_missing",
            Self::ImageNotFound => "image_not_found",
            Self::BlobMissing => "blob_missing",
            Self::JsonMalformed => "json_malformed",
            Self::TooLarge => "too_large",
            Self::Ratio => "ratio",
            Self::Compression => "compression",
            Self::TarMalformed => "tar_malformed",
            Self::TarUnsupported => "tar_unsupported",
            Self::PathAbsolute => "path_absolute",
            Self::PathTraversal => "path_traversal",
            Self::PathInvalid => "path_invalid",
            Self::PathTooLong => "path_too_long",
            Self::ThroughSymlink => "through_symlink",
            Self::Duplicate => "duplicate",
            Self::LinkMissing => "link_missing",
            Self::Device => "device",
            Self::Setuid => "setuid",
            Self::FileCapability => "file_capability",
            Self::Xattr => "xattr",
            Self::Whiteout => "whiteout",
            Self::MountPoint => "mount_point",
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn advice(self) -> &'static str {
        match self {
            Self::DigestMismatch | Self::SizeMismatch | Self::DiffIdMismatch => {
                "the source is damaged or was changed: fetch it again, or ask who publishes it"
            }
            Self::MediaTypeUnknown => {
                "build the image with OCI or Docker v2 layers, gzip, zstd or plain, SHA-256"
            }
            Self::ForeignLayer => "rebuild the image with its layers included",
            Self::PlatformMissing => "build the image for linux/amd64",
            Self::ImageNotFound => "name one of the source's images, by tag or by --digest",
            Self::BlobMissing => "copy the image again, with all of its parts",
            Self::TooLarge | Self::Ratio => {
                "make the image smaller, or raise the bound in the policy's [limits]"
            }
            Self::Setuid => {
                "remove the bit in the image, or add the path to allow_setuid of the policy"
            }
            Self::FileCapability => {
                "remove it in the image, or add the path to allow_capabilities of the policy"
            }
            Self::Device => "remove it from the image: a workspace has its own /dev",
            Self::MountPoint => "make it a directory in the image",
            Self::JsonMalformed
            | Self::Compression
            | Self::TarMalformed
            | Self::TarUnsupported
            | Self::PathAbsolute
            | Self::PathTraversal
            | Self::PathInvalid
            | Self::PathTooLong
            | Self::ThroughSymlink
            | Self::Duplicate
            | Self::LinkMissing
            | Self::Xattr
            | Self::Whiteout => "no common tool makes this: rebuild the image, and do not trust it",
        }
    }
}

/// A refused image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// For what.
    pub code: Code,
    /// In which layer or other part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<Digest>,
    /// At which path, escaped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// What was found.
    pub why: String,
}

impl Refusal {
    /// A refusal that knows neither part nor path yet.
    pub fn new(code: Code, why: impl Into<String>) -> Self {
        Self {
            code,
            part: None,
            path: None,
            why: why.into(),
        }
    }

    /// Names the part, if none is named.
    #[must_use]
    pub fn of(mut self, part: &Digest) -> Self {
        self.part.get_or_insert(*part);
        self
    }

    /// Names the path, if none is named.
    #[must_use]
    pub fn at(mut self, path: &[u8]) -> Self {
        self.path.get_or_insert_with(|| show(path));
        self
    }
}

/// A path for people: control characters and foreign bytes escaped, at most 300 characters.
#[must_use]
pub fn show(path: &[u8]) -> String {
    let text: String = path.escape_ascii().to_string();
    if text.len() <= 300 {
        return text;
    }
    format!("{}...", &text[..300])
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "image refused ({})", self.code.as_str())?;
        if let Some(part) = &self.part {
            write!(f, ", {part}")?;
        }
        if let Some(path) = &self.path {
            write!(f, ", path {path}")?;
        }
        write!(f, ": {}; {}", self.why, self.code.advice())
    }
}

/// Why an import, or another act on images, failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image is not taken.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The policy does not allow it.
    #[error("policy: {0}")]
    Policy(String),
    /// An argument can't be used.
    #[error("{0}")]
    Usage(String),
    /// Something is in use, or under way.
    #[error("{0}")]
    Busy(String),
    /// The registry.
    #[error("registry: {0}")]
    Registry(String),
    /// A worker ended without an answer.
    #[error("{0}")]
    Worker(String),
    /// The system.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: String,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
}

/// Names what was tried.
pub(crate) fn os<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Error {
    let what = what.into();
    move |source| Error::Os {
        what,
        source: source.into(),
    }
}
