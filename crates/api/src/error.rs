//! The registry of error codes: one word, one HTTP status, one meaning.

use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $status:literal;)+) => {
        /// Every code that an answer of the platform may carry.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum ErrorCode { $($(#[$doc])* #[serde(rename = $text)] $name,)+ }

        impl ErrorCode {
            /// All codes, in the order of the registry.
            pub const ALL: &'static [ErrorCode] = &[$(ErrorCode::$name),+];

            /// The code as clients read it.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }

            /// The HTTP status it travels with.
            #[must_use]
            pub fn http_status(self) -> u16 {
                match self { $(Self::$name => $status,)+ }
            }
        }
    };
}

codes! {
    /// Malformed request.
    BadRequest = "bad_request", 400;
    /// Missing or wrong credential.
    Unauthorized = "unauthorized", 401;
    /// The token's time is over.
    TokenExpired = "token_expired", 401;
    /// A valid credential that may not do this.
    Forbidden = "forbidden", 403;
    /// The workspace's firewall layer is closed (never 401: clients wipe credentials on it).
    NetworkBlocked = "network_blocked", 403;
    /// A per-account limit.
    QuotaExceeded = "quota_exceeded", 403;
    /// As many workspaces as the account may have.
    SandboxLimitReached = "SANDBOX_LIMIT_REACHED", 409;
    /// Unknown, or another account's.
    NotFound = "not_found", 404;
    /// That method is not served here.
    MethodNotAllowed = "method_not_allowed", 405;
    /// The state does not allow it.
    Conflict = "conflict", 409;
    /// The workspace is not running.
    VmNotRunning = "vm_not_running", 409;
    /// Larger than the bound.
    TooLarge = "payload_too_large", 413;
    /// This server does not answer for that host name.
    Misdirected = "misdirected_request", 421;
    /// A field is wrong; the message names it.
    ValidationError = "validation_error", 422;
    /// Too many at once.
    RateLimited = "rate_limited", 429;
    /// Our fault; the operator's log has the same request id.
    Internal = "server_error", 500;
    /// Part of the contract that this version does not do.
    NotSupported = "not_supported", 501;
    /// The guest did not answer, or answered something that is no answer.
    BadGateway = "bad_gateway", 502;
    /// No host can run it now.
    VmUnavailable = "VM_UNAVAILABLE", 503;
    /// The KMS is sealed: workspaces wait.
    KmsSealed = "kms_sealed", 503;
    /// The audit log can't take the intent, so the act did not happen.
    AuditUnavailable = "audit_unavailable", 503;
    /// A part of the platform does not answer.
    Unavailable = "unavailable", 503;
    /// The host's disk is full.
    StorageFull = "storage_full", 507;
    /// The workspace did not come up in time.
    Timeout = "timeout", 504;
    /// A lease, attestation or assertion was refused by the KMS.
    KeyRefused = "key_refused", 403;
    /// A disk that was changed, cut off or rolled back while it was at rest.
    DiskTampered = "disk_tampered", 409;
    /// Saved memory that can't be woken on this disk or by this VMM any more; a plain start can.
    MemoryStale = "memory_stale", 409;
    /// A disk that is not what it should be.
    DiskCorrupt = "disk_corrupt", 409;
}

/// An error as it travels between processes: what the client reads, and what only the operator
/// reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{}: {message}", code.as_str())]
pub struct Error {
    /// The code.
    pub code: ErrorCode,
    /// For the client: what happened and what to do.
    pub message: String,
    /// For the operator's log only; never sent to a client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

impl Error {
    /// An error for the client.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            detail: None,
        }
    }

    /// The same, with what the operator needs to know.
    #[must_use]
    pub fn detail(mut self, detail: impl std::fmt::Display) -> Self {
        self.detail = Some(detail.to_string());
        self
    }

    /// An internal error: the client learns the request id only.
    pub fn internal(detail: impl std::fmt::Display) -> Self {
        Self::new(
            ErrorCode::Internal,
            "something failed on our side; the operator finds it under this request id",
        )
        .detail(detail)
    }
}

/// The result of every internal call.
pub type Result<T, E = Error> = std::result::Result<T, E>;
