//! What can go wrong inside the KMS, and what of it a caller learns.

use crate::fault::Step;
use api::ErrorCode;
use std::path::PathBuf;

/// A failure that is no refusal: the store, the disk, or state that does not fit together.
#[derive(Debug, thiserror::Error)]
pub enum KmsError {
    /// The store refused.
    #[error("{operation}: the store refused")]
    Store {
        /// What was asked of it.
        operation: &'static str,
        /// Its answer.
        #[source]
        source: sqlx::Error,
    },
    /// A stored row is not what this program writes.
    #[error("{operation}: {subject} is damaged; restore kms/state.db and its slot")]
    Damaged {
        /// What was being read.
        operation: &'static str,
        /// Which row.
        subject: String,
    },
    /// The file system refused.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// Its answer.
        #[source]
        source: std::io::Error,
    },
    /// A wrapped key does not open under the key above it, at its place.
    #[error(
        "unwrap {subject}: it does not open; the row was moved, changed, or is of another epoch"
    )]
    Wrapped {
        /// Which row.
        subject: String,
    },
    /// The store is older than the epoch's secret.
    #[error(
        "the state is of epoch {epoch}, whose secret is destroyed: it is an old copy, and what it \
         holds can't be opened again; put the newest kms/state.db back"
    )]
    Rollback {
        /// The epoch that the state names.
        epoch: u64,
    },
    /// Not initialised.
    #[error("no state in {}; run `casemate-kms init`", .0.display())]
    NoState(PathBuf),
    /// Something about unsealing is not as it must be.
    #[error("unseal: {0}")]
    Unseal(&'static str),
    /// A test stopped here.
    #[error("stopped at {0:?}")]
    Stopped(Step),
}

impl KmsError {
    /// For `map_err` on a query.
    pub(crate) fn store(operation: &'static str) -> impl FnOnce(sqlx::Error) -> Self {
        move |source| Self::Store { operation, source }
    }

    /// For `map_err` on a file operation.
    pub(crate) fn io(
        operation: &'static str,
        path: &std::path::Path,
    ) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io {
            operation,
            path: path.to_owned(),
            source,
        }
    }
}

impl From<KmsError> for api::Error {
    fn from(e: KmsError) -> Self {
        let mut text = e.to_string();
        let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(&e);
        while let Some(c) = cause {
            text.push_str(": ");
            text.push_str(&c.to_string());
            cause = c.source();
        }
        match e {
            KmsError::Unseal(why) => Self::new(ErrorCode::Forbidden, why).detail(text),
            _ => Self::internal(text),
        }
    }
}
