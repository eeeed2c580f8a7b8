//! Bounds of warden, with their units. Those of jails are `jail::limits`.

/// Connections at once.
pub const CONNECTIONS_MAX: usize = 16;
/// Requests at once, over all connections.
pub const IN_FLIGHT_MAX: usize = 64;
/// Open ports of one slot.
pub const OPEN_MAX: usize = 64;
/// Longest sealed grant, bytes of base64.
pub const SEALED_MAX_BYTES: usize = 16 << 10;
