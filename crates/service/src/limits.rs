//! Bounds of what daemons share.

/// Connections that one RPC socket serves at once.
pub const RPC_CONNECTIONS_MAX: usize = 256;
/// Largest configuration file, bytes.
pub const CONFIG_MAX_BYTES: u64 = 64 << 10;
/// Largest trust file, bytes.
pub const TRUST_MAX_BYTES: u64 = 256 << 10;
/// How long a drain waits for requests in flight.
pub const DRAIN_MAX: std::time::Duration = std::time::Duration::from_secs(10);
