//! What can go wrong inside mint, and what of it a caller learns.

/// A failure that is no refusal.
#[derive(Debug, thiserror::Error)]
pub enum MintError {
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
    #[error("read state.db: {0} is damaged; restore mint/state.db")]
    Damaged(&'static str),
    /// The file system refused.
    #[error("{operation} {path}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To what.
        path: String,
        /// Its answer.
        #[source]
        source: std::io::Error,
    },
    /// Not initialised.
    #[error("no state in {0}; run `casemate-mint init`")]
    NoState(String),
    /// A bound of the installation is reached.
    #[error("{0}")]
    Full(&'static str),
}

impl MintError {
    /// For `map_err` on a query.
    pub(crate) fn store(operation: &'static str) -> impl FnOnce(sqlx::Error) -> Self {
        move |source| Self::Store { operation, source }
    }
}

impl From<MintError> for api::Error {
    fn from(e: MintError) -> Self {
        if let MintError::Full(why) = e {
            return Self::new(api::ErrorCode::Unavailable, why);
        }
        let mut text = e.to_string();
        let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(&e);
        while let Some(c) = cause {
            text = format!("{text}: {c}");
            cause = c.source();
        }
        Self::internal(text)
    }
}
