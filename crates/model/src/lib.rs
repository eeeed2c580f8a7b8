//! Domain types and identifiers of Casemate.
//!
//! Must never do IO, read a clock, draw randomness or depend on a runtime: what is decided here
//! can be replayed from its inputs alone.
#![forbid(unsafe_code)]

pub mod id;
pub mod lifecycle;
pub mod limits;
pub mod spec;

pub use id::{AccountId, HostId, IdError, KeyId, ObjectId, RequestId, StartId, WorkspaceId};
pub use spec::{Idle, Mode, Power, Purpose, Resources, RestartPolicy, TtlAction};
