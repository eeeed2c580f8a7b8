//! Who acts: the first argument wherever state is touched.

use api::{Error, ErrorCode};
use model::{AccountId, KeyId};

/// One operation in progress.
#[derive(Debug, Clone)]
pub struct Op {
    /// On whose behalf.
    pub actor: Actor,
    /// The request id, the same in every log.
    pub request_id: String,
}

/// Who acts.
#[derive(Clone)]
pub enum Actor {
    /// A client, by mint's assertion for this very request.
    Key {
        /// The account.
        account: AccountId,
        /// The API key.
        key: KeyId,
        /// The signed assertion.
        assertion: String,
    },
    /// The platform itself, under a standing policy or to close something.
    Internal(&'static str),
    /// Somebody without a credential.
    Nobody,
}

impl std::fmt::Debug for Actor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

impl Actor {
    /// The name that goes into the log.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Key { key, .. } => key.to_string(),
            Self::Internal(what) => format!("internal:{what}"),
            Self::Nobody => "nobody".into(),
        }
    }
}

impl Op {
    /// Work of the platform itself.
    #[must_use]
    pub fn internal(what: &'static str) -> Self {
        Self {
            actor: Actor::Internal(what),
            request_id: request_id_new(),
        }
    }

    /// The client's account and assertion.
    ///
    /// # Errors
    /// [`ErrorCode::Unauthorized`] if no client is behind it.
    pub fn client(&self) -> api::Result<(&AccountId, &str)> {
        match &self.actor {
            Actor::Key {
                account, assertion, ..
            } => Ok((account, assertion)),
            _ => Err(Error::new(
                ErrorCode::Unauthorized,
                "this needs a client's credential",
            )),
        }
    }

    /// The client's account.
    ///
    /// # Errors
    /// [`ErrorCode::Unauthorized`] if no client is behind it.
    pub fn account(&self) -> api::Result<&AccountId> {
        self.client().map(|(account, _)| account)
    }
}

/// A fresh request id.
#[must_use]
pub fn request_id_new() -> String {
    model::RequestId::from_bytes(seal::random::bytes()).to_string()
}
