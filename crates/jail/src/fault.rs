//! Errors of the operating system as the platform's: the operator reads the operation, the
//! subject and the cause; the client reads the request id.

use api::Error;
use std::fmt::Display;

/// The result of warden's side.
pub type Result<T = ()> = std::result::Result<T, Error>;

/// Names the operation and its subject.
pub trait At<T> {
    /// `OP SUBJECT: CAUSE`, for the operator.
    ///
    /// # Errors
    /// The error that there was.
    fn at(self, op: &str, subject: impl Display) -> Result<T>;
}

impl<T, E: Display> At<T> for std::result::Result<T, E> {
    fn at(self, op: &str, subject: impl Display) -> Result<T> {
        self.map_err(|e| Error::internal(format!("{op} {subject}: {e}")))
    }
}

/// One line for the operator's log; whoever calls it knows no secret but warden's own key.
pub fn log(event: &str, fields: serde_json::Value) {
    eprintln!(
        "{}",
        serde_json::json!({"proc": "warden", "event": event, "fields": fields})
    );
}
