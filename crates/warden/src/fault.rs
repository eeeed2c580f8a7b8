//! What a request is answered when it can't be done.

use api::{Error, ErrorCode};

pub(crate) use jail::fault::{At, log};

/// The result of everything in warden.
pub type Result<T = ()> = jail::fault::Result<T>;

/// Says what failed on a slot while it was being ended.
pub(crate) fn failed(event: &str, slot: u16, why: impl serde::Serialize) {
    log(event, serde_json::json!({"slot": slot, "error": why}));
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
