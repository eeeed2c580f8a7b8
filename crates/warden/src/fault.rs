//! Errors of the operating system as the platform's: the operator reads the operation, the
//! subject and the cause; the client reads the request id.

use api::{Error, ErrorCode};
use std::fmt::Display;

/// The result of everything in warden.
pub type Result<T = ()> = std::result::Result<T, Error>;

/// Names the operation and its subject.
pub(crate) trait At<T> {
    fn at(self, op: &str, subject: impl Display) -> Result<T>;
}

impl<T, E: Display> At<T> for std::result::Result<T, E> {
    fn at(self, op: &str, subject: impl Display) -> Result<T> {
        self.map_err(|e| Error::internal(format!("{op} {subject}: {e}")))
    }
}

/// A request that is wrong in itself.
pub(crate) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorCode::ValidationError, message)
}

/// A request that the slot's state does not allow.
pub(crate) fn conflict(message: impl Into<String>) -> Error {
    Error::new(ErrorCode::Conflict, message)
}

/// Something that should have been there.
pub(crate) fn missing(message: impl Into<String>) -> Error {
    Error::new(ErrorCode::NotFound, message)
}

/// A part of the VMM or of the guest that should be among the artifacts.
pub(crate) fn artifact_missing(name: &str, why: &Error) -> Error {
    Error::new(
        ErrorCode::VmUnavailable,
        "this machine can't run workspaces now; its operator finds the reason with `casemate doctor`",
    )
    .detail(format!("artifact {name}: {why}: run `cargo xtask image`"))
}

/// One line for the operator's log; never holds a secret, for warden knows none but its own key.
pub(crate) fn log(event: &str, fields: serde_json::Value) {
    eprintln!(
        "{}",
        serde_json::json!({"proc": "warden", "event": event, "fields": fields})
    );
}
