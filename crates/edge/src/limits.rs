//! Bounds of the edge, with units in the names.

use std::time::Duration;

/// Client connections at once, all sources together; less when the system allows fewer files.
pub const CONNECTIONS_MAX: usize = 8_192;
/// Client connections at once of one source (an IPv4 address, an IPv6 /64).
pub const CONNECTIONS_PER_SOURCE_MAX: u32 = 1_024;
/// Open files kept back for the edge's own needs (sockets of peers, guests' connections use the
/// other half of the allowance).
pub const FILES_RESERVED: usize = 256;
/// Open files the edge asks the system for.
pub const FILES_WANTED: u64 = 65_536;

/// How long a TLS handshake may take.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// How long a request's head may take, idle time before it included (HTTP/1.1).
pub const HEAD_READ_MAX: Duration = Duration::from_secs(30);
/// After how long without a request a connection is closed.
pub const IDLE_MAX: Duration = Duration::from_secs(60);
/// After how long a client that takes no bytes is cut off.
pub const WRITE_STALL_MAX: Duration = Duration::from_secs(60);
/// How often HTTP/2 and TCP ask whether a silent client is still there.
pub const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(30);
/// How long a client may take to answer that question.
pub const KEEP_ALIVE_ANSWER_MAX: Duration = Duration::from_secs(20);
/// How long requests in flight may go on after SIGTERM.
pub const DRAIN_MAX: Duration = Duration::from_secs(8);

/// Largest request head, bytes.
pub const HEAD_MAX_BYTES: usize = 32 << 10;
/// Most header lines of a message.
pub const HEADERS_MAX: usize = 100;
/// Longest path with query, bytes.
pub const PATH_MAX_BYTES: usize = 8 << 10;
/// Read buffer of one HTTP/1.1 connection, bytes.
pub const CONNECTION_BUFFER_BYTES: usize = 64 << 10;
/// Largest head that the HTTP/2 library decodes before it refuses it by itself, bytes.
pub const H2_HEAD_MAX_BYTES: u32 = 64 << 10;
/// Requests at once on one HTTP/2 connection.
pub const H2_STREAMS_MAX: u32 = 128;
/// Bytes of request bodies in flight, per stream.
pub const H2_STREAM_WINDOW_BYTES: u32 = 256 << 10;
/// Bytes of request bodies in flight, per connection.
pub const H2_CONNECTION_WINDOW_BYTES: u32 = 1 << 20;
/// Bytes of answers waiting to be sent, per stream.
pub const H2_SEND_BUFFER_BYTES: usize = 256 << 10;

/// Control-plane bodies in memory at once, all sources together, KiB: a credential is judged
/// only after its request's body is there.
pub const CONTROL_BODIES_MAX_KIB: usize = 64 << 10;
/// The same, of one source, KiB.
pub const CONTROL_BODIES_PER_SOURCE_MAX_KIB: u32 = 16 << 10;
/// How long the body of a control-plane request may take.
pub const CONTROL_BODY_READ_MAX: Duration = Duration::from_secs(30);
/// How long control may take until its answer begins: longer than any wait of its own.
pub const CONTROL_ANSWER_MAX: Duration = Duration::from_secs(180);
/// Longest `X-Client-ID`, bytes.
pub const CLIENT_ID_MAX_BYTES: usize = 256;
/// Longest `X-Client-Secret`, bytes.
pub const CLIENT_SECRET_MAX_BYTES: usize = 512;

/// How long a guest may take to accept and prove itself.
pub const GUEST_DIAL_MAX: Duration = Duration::from_secs(10);
/// How long a guest may take until its answer begins: a command may run that long before.
pub const GUEST_ANSWER_MAX: Duration = Duration::from_secs(3_600);
/// Requests in flight to one workspace; the guest takes 256 connections.
pub const GUEST_IN_FLIGHT_MAX: usize = 128;
/// Idle connections kept to one start of a workspace.
pub const GUEST_IDLE_MAX: usize = 8;
/// How long an idle connection is kept: the guest closes it after 10 s.
pub const UPSTREAM_IDLE_MAX: Duration = Duration::from_secs(5);
/// Idle connections kept to control.
pub const CONTROL_IDLE_MAX: usize = 32;
/// Largest head of an upstream's answer, bytes.
pub const ANSWER_HEAD_MAX_BYTES: usize = 32 << 10;
/// How long it may take once its first byte is there, informational answers included: neither the
/// agent nor control sends any.
pub const ANSWER_BEGUN_MAX: Duration = Duration::from_secs(10);
/// Most that may come until it is handed on, bytes: informational answers, the head, and what hyper
/// reads of the body meanwhile, which is a buffer of its connection and two frames as large.
pub const ANSWER_BEGUN_MAX_BYTES: usize = 8 * UPSTREAM_BUFFER_BYTES;
/// Read buffer of one connection to what is behind the edge, bytes.
pub const UPSTREAM_BUFFER_BYTES: usize = 2 * ANSWER_HEAD_MAX_BYTES;
/// Life of the edge's client certificate towards guests.
pub const CLIENT_CERT_TTL: Duration = Duration::from_secs(24 * 3_600);

/// How long mint and host may hold a question for news.
pub const FEED_WAIT_MS: u64 = 250;
/// After how long without an answer a feed counts as lost.
pub const FEED_STALE_MAX: Duration = Duration::from_millis(1_250);
/// Pause before a lost feed is asked again.
pub const FEED_RETRY: Duration = Duration::from_millis(50);
/// After how long without a feed live requests are cut: what was opened can't be closed then.
pub const FEED_LOST_CUT: Duration = Duration::from_secs(5);
/// States in one full page of a feed.
pub const FEED_PAGE: usize = 1_000;
/// Pages of one full read of a feed.
pub const FEED_PAGES_MAX: usize = 1_000;
/// How long one page of a full read may take.
pub const FULL_READ_MAX: Duration = Duration::from_secs(10);
/// Refused requests that may ask the feeds once more at the same time.
pub const REFRESHES_MAX: usize = 32;
/// Token states being handed to guests at once.
pub const PUSHES_MAX: usize = 256;
/// Pause before a token state is offered again to a guest that did not take it.
pub const PUSH_RETRY: Duration = Duration::from_secs(1);
/// What a guest may answer to one, bytes.
pub const TOLD_MAX_BYTES: usize = 4 << 10;
/// How long one such offer may take.
pub const PUSH_MAX: Duration = Duration::from_secs(5);

/// How long a request waits for a workspace that wakes.
pub const WAKE_MAX: Duration = Duration::from_secs(15);
/// Requests that wait so at once.
pub const WAKES_WAITING_MAX: usize = 512;
/// How often host is told that a workspace is wanted, while requests wait for it.
pub const WAKE_ASK_EVERY: Duration = Duration::from_secs(1);
/// How long one such word may take.
pub const WAKE_ASK_MAX: Duration = Duration::from_secs(2);
/// `Retry-After` of a request that waited too long, seconds (contract §5).
pub const WAKE_RETRY_AFTER_S: u32 = 1;
/// How often host is told which workspaces were used.
pub const ACTIVITY_EVERY: Duration = Duration::from_secs(5);
/// How long one such report may take.
pub const ACTIVITY_MAX: Duration = Duration::from_secs(5);

/// Life of the server certificate that the local CA issues.
pub const SERVER_CERT_TTL: Duration = Duration::from_secs(90 * 86_400);
/// How often the server certificate's age is looked at.
pub const SERVER_CERT_CHECK_EVERY: Duration = Duration::from_secs(3_600);
/// How long the listeners may take to arrive on standard input.
pub const LISTENERS_MAX_WAIT: Duration = Duration::from_secs(10);
/// Listeners handed over.
pub const LISTENERS_MAX: usize = 16;
/// How long readiness waits for the feeds; the control API answers without them.
pub const READY_MAX_WAIT: Duration = Duration::from_secs(10);

const _: () = assert!(HEAD_MAX_BYTES < H2_HEAD_MAX_BYTES as usize);
const _: () = assert!(HEAD_MAX_BYTES <= CONNECTION_BUFFER_BYTES);
const _: () = assert!(FEED_WAIT_MS < 1_000 && FEED_STALE_MAX.as_millis() > FEED_WAIT_MS as u128);
