//! The client of the append-only log.

use crate::paths::Paths;
use api::audit::{Appended, Class, Entry, Op};
use api::rpc::Client;
use api::{Error, ErrorCode};

/// The log, as a process that may only append sees it.
#[derive(Clone)]
pub struct Log {
    client: Client,
}

impl Log {
    /// The log of this installation.
    #[must_use]
    pub fn new(paths: &Paths) -> Self {
        Self {
            client: Client::new(paths.socket("audit-append", "append")),
        }
    }

    /// Appends an entry; returns when it is durable.
    ///
    /// # Errors
    /// [`ErrorCode::AuditUnavailable`]: whatever the entry announces must not happen.
    pub async fn append(&self, class: Class, entry: Entry) -> api::Result<Appended> {
        self.send(class, entry, false).await
    }

    /// Appends an entry; returns when it is integrated, with the proof.
    ///
    /// # Errors
    /// [`ErrorCode::AuditUnavailable`]: whatever the entry announces must not happen.
    pub async fn append_with_receipt(
        &self,
        class: Class,
        entry: Entry,
    ) -> api::Result<serde_json::Value> {
        self.send(class, entry, true)
            .await?
            .receipt
            .ok_or_else(|| unavailable(&Error::internal("the log answered without the receipt")))
    }

    /// The socket's client, for the KMS's own operations.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    async fn send(&self, class: Class, entry: Entry, want_receipt: bool) -> api::Result<Appended> {
        let request_id = entry.request_id.clone();
        let op = Op::Append {
            class,
            entry: Box::new(entry),
            want_receipt,
        };
        self.client
            .call(&request_id, &op)
            .await
            .map_err(|e| unavailable(&e))
    }
}

fn unavailable(e: &Error) -> Error {
    Error::new(
        ErrorCode::AuditUnavailable,
        "the audit log can't take the entry, so nothing was done; try again",
    )
    .detail(format!("{e}; {}", e.detail.as_deref().unwrap_or("")))
}
