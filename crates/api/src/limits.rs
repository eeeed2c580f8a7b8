//! Bounds of the internal protocols.

use std::time::Duration;

/// Largest RPC frame, bytes.
pub const FRAME_MAX_BYTES: usize = 1 << 20;
/// Largest message on the agent and disk channels, bytes.
pub const CHANNEL_MESSAGE_MAX_BYTES: usize = 64 << 10;
/// Largest payload of an audit entry, bytes.
pub const AUDIT_PAYLOAD_MAX_BYTES: usize = 32 << 10;
/// Requests in flight on one RPC connection.
pub const RPC_IN_FLIGHT_MAX: usize = 256;
/// How long an RPC client waits where the caller names no other time.
pub const RPC_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest life of an actor assertion, ms.
pub const ASSERTION_MAX_MS: u64 = 30_000;
/// Longest life of a lease, ms.
pub const LEASE_MAX_MS: u64 = 60_000;
/// Longest life of a gateway token, seconds.
pub const GATEWAY_TOKEN_MAX_S: i64 = 3_600;
/// Largest body of a control-plane request, bytes: held in memory to bind the credential to it.
pub const CONTROL_BODY_MAX_BYTES: usize = 256 << 10;

const _: () = assert!(
    AUDIT_PAYLOAD_MAX_BYTES < 60_000,
    "an entry must fit a tlog-tiles bundle"
);
const _: () = assert!(CONTROL_BODY_MAX_BYTES * 2 < FRAME_MAX_BYTES);
