//! The one error of this crate: what warden and the operator read. Never a secret.

use std::io;

use api::ErrorCode;

/// Why a disk can't be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The kernel refused an operation.
    #[error("{operation}: {source}")]
    Io {
        /// What was being done, to what.
        operation: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// Neither copy of the header is there.
    #[error(
        "volume: no LUKS2 header: the file was overwritten or is no volume; restore it from a backup"
    )]
    NoHeader,
    /// The header is of a version that this program does not know.
    #[error("volume: LUKS version {found}, this program reads 2: use the newer program")]
    Version {
        /// What the header says.
        found: u16,
    },
    /// A header that breaks a rule; both copies do, or the other one is missing.
    #[error("volume: {copy} header: {why}; restore the file from a backup")]
    Header {
        /// `primary` or `secondary`.
        copy: &'static str,
        /// Which rule.
        why: &'static str,
    },
    /// The header's JSON names something that this program does not do.
    #[error("volume: header: {field}: {why}")]
    Metadata {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The key that was granted opens no keyslot.
    #[error(
        "volume: the granted key does not open it: another workspace's key, or another version of it"
    )]
    WrongKey,
    /// The header names another workspace than the grant.
    #[error("volume: it belongs to another workspace: warden passed the wrong file")]
    WrongWorkspace,
    /// The file and the size that was asked for don't fit.
    #[error("volume: {why}")]
    Size {
        /// How they don't.
        why: &'static str,
    },
    /// It is not the state that this disk had: changed, exchanged, cut off or rolled back.
    #[error(
        "volume: {what}; nothing was changed. If an operator restored the file, the newest copy of \
         disk and sidecar is needed; else look for who can write to this machine's disk"
    )]
    Tampered {
        /// How it shows.
        what: &'static str,
    },
    /// Formatting was asked for, but there is something.
    #[error("volume: asked to format a file that holds {what}: nothing was changed")]
    Occupied {
        /// What there is.
        what: &'static str,
    },
    /// An image that was never finished.
    #[error("image: it has no note, which comes last: it was never finished")]
    Unfinished,
    /// The grant can't be used.
    #[error("grant: {why}")]
    Grant {
        /// Why.
        why: &'static str,
    },
    /// A message or argument of warden breaks the protocol.
    #[error("{subject}: {why}")]
    Protocol {
        /// Which.
        subject: &'static str,
        /// What is wrong.
        why: &'static str,
    },
    /// The sandbox can't be put up; nothing is served outside it.
    #[error("sandbox: {operation}: {why}")]
    Sandbox {
        /// Which part.
        operation: &'static str,
        /// The kernel's or the library's reason.
        why: String,
    },
    /// The cryptographic door refused.
    #[error(transparent)]
    Seal(#[from] seal::SealError),
}

impl DiskError {
    /// For `map_err`: an I/O error of `operation`. What the sidecar refuses to read is no error of
    /// the kernel's, which has no such kind: it is [`DiskError::Tampered`].
    pub fn io<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Self {
        move |source| {
            let source = source.into();
            if source.kind() == io::ErrorKind::InvalidData {
                let what = "a part of it does not fit its tag";
                return Self::Tampered { what };
            }
            Self::Io { operation, source }
        }
    }

    /// The code for the client.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Io { source, .. } if is_full(source) => ErrorCode::StorageFull,
            Self::Tampered { .. } => ErrorCode::DiskTampered,
            Self::Unfinished => ErrorCode::MemoryStale,
            Self::NoHeader
            | Self::Version { .. }
            | Self::Header { .. }
            | Self::Metadata { .. }
            | Self::WrongWorkspace
            | Self::Size { .. }
            | Self::Occupied { .. } => ErrorCode::DiskCorrupt,
            Self::WrongKey | Self::Grant { .. } => ErrorCode::KeyRefused,
            Self::Io { .. } | Self::Protocol { .. } | Self::Sandbox { .. } | Self::Seal(_) => {
                ErrorCode::Internal
            }
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_storage_has_its_own_code() {
        let full = DiskError::io("writing")(io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(full.code(), ErrorCode::StorageFull);
        let broken = DiskError::io("writing")(io::Error::from_raw_os_error(libc::EIO));
        assert_eq!(broken.code(), ErrorCode::Internal);
        assert_eq!(DiskError::WrongKey.code(), ErrorCode::KeyRefused);
        assert_eq!(DiskError::NoHeader.code(), ErrorCode::DiskCorrupt);
        // As the sidecar says it.
        let refused = DiskError::io("reading")(io::Error::from(io::ErrorKind::InvalidData));
        assert_eq!(refused.code(), ErrorCode::DiskTampered);
    }
}
