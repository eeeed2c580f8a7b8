//! The public keys by which processes trust each other: root-owned files, written once by the
//! supervisor from what each process's `init` printed.

use crate::files::read_bounded;
use crate::limits::TRUST_MAX_BYTES;
use crate::paths::Paths;
use anyhow::Context as _;
use model::HostId;
use seal::sign::VerifyingKey;
use std::collections::BTreeMap;

/// Mint's key: assertions, policies, token states.
pub const MINT: &str = "mint.pub";
/// The key of gateway tokens.
pub const GATEWAY: &str = "gateway.pub";
/// The log's checkpoint key.
pub const AUDIT: &str = "audit.pub";
/// The KMS's key: identity statements, erasure receipts.
pub const KMS: &str = "kms.pub";
/// The edge's identity, the anchor of its client certificates.
pub const EDGE: &str = "edge.pub";
/// Attestation keys of machines.
pub const HOSTS: &str = "hosts.json";
/// Executables that may hold keys.
pub const MEASUREMENTS: &str = "measurements.json";

/// One public key.
///
/// # Errors
/// The file, and that `casemate up` writes it.
pub fn key(paths: &Paths, name: &str) -> anyhow::Result<VerifyingKey> {
    let path = paths.trust().join(name);
    let bytes = read_bounded(&path, TRUST_MAX_BYTES)
        .with_context(|| format!("read {} (`casemate up` writes it)", path.display()))?;
    let text = String::from_utf8(bytes).context("not text")?;
    VerifyingKey::from_hex(text.trim())
        .with_context(|| format!("{} is no Ed25519 public key in hex", path.display()))
}

/// Attestation keys of machines.
///
/// # Errors
/// The file and what is wrong with it.
pub fn hosts(paths: &Paths) -> anyhow::Result<BTreeMap<HostId, VerifyingKey>> {
    let path = paths.trust().join(HOSTS);
    let bytes = read_bounded(&path, TRUST_MAX_BYTES)
        .with_context(|| format!("read {} (`casemate up` writes it)", path.display()))?;
    let map: BTreeMap<HostId, String> =
        serde_json::from_slice(&bytes).with_context(|| path.display().to_string())?;
    map.into_iter()
        .map(|(host, hex)| {
            let key = VerifyingKey::from_hex(&hex)
                .with_context(|| format!("{}: key of {host}", path.display()))?;
            Ok((host, key))
        })
        .collect()
}

/// SHA-256 (hex) of the executables that may be released a key, by process name.
///
/// # Errors
/// The file and what is wrong with it.
pub fn measurements(paths: &Paths) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
    let path = paths.trust().join(MEASUREMENTS);
    let bytes = read_bounded(&path, TRUST_MAX_BYTES)
        .with_context(|| format!("read {} (`casemate up` writes it)", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| path.display().to_string())
}
