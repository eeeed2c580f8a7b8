//! The edge's keys: its identity towards guests, the local CA, and the server certificate.
//!
//! | file (0600, in the edge's state) | what |
//! |---|---|
//! | `identity.seed` | Ed25519 seed; the public half is guests' anchor for the edge |
//! | `ca.json` | the local CA, `{v, cert_pem, key_pem}` |
//! | `server.json` | the server certificate, `{v, names, issued_s, expires_s, cert_pem, key_pem}` |
//!
//! All are written beside, synced and renamed; a missing one is made by `init`. The server
//! certificate is issued again when a third of its life is left, or its names changed.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use seal::Zeroizing;
use seal::tls::rustls::ServerConfig;
use seal::tls::{HTTP2_AND_1, Identity, local_ca, server_config_pem};
use serde::{Deserialize, Serialize};
use service::files::{read_bounded, seed_or_create, write_atomic};

use crate::limits::SERVER_CERT_TTL;

const FILE_MAX_BYTES: u64 = 64 << 10;
/// Version of both JSON files; docs/formats/edge-keys.md.
const VERSION: u32 = 1;

/// Where the keys are, and for which names the server certificate is.
pub struct Keys {
    dir: PathBuf,
    names: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ca {
    v: u32,
    cert_pem: String,
    #[serde(with = "key_text")]
    key_pem: Zeroizing<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerCert {
    v: u32,
    names: Vec<String>,
    issued_s: i64,
    expires_s: i64,
    cert_pem: String,
    #[serde(with = "key_text")]
    key_pem: Zeroizing<String>,
}

/// A key as JSON text, wiped from memory after use.
mod key_text {
    use seal::Zeroizing;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(
        key: &Zeroizing<String>,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        s.serialize_str(key)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<Zeroizing<String>, D::Error> {
        String::deserialize(d).map(Zeroizing::new)
    }
}

impl ServerCert {
    fn is_good(&self, names: &[String], now_s: i64) -> bool {
        let life = self.expires_s - self.issued_s;
        self.names == names && self.issued_s <= now_s && self.expires_s - now_s >= life / 3
    }
}

impl Keys {
    /// The keys in `dir`, for these hosts, `localhost` and the loopback address.
    #[must_use]
    pub fn new<'a>(dir: PathBuf, hosts: impl IntoIterator<Item = &'a String>) -> Self {
        let mut names: Vec<String> = hosts
            .into_iter()
            .map(String::as_str)
            .chain(["localhost", "127.0.0.1"])
            .map(|h| h.trim_matches(['[', ']']).to_ascii_lowercase())
            .collect();
        names.sort();
        names.dedup();
        Self { dir, names }
    }

    /// The identity towards guests, made if missing.
    ///
    /// # Errors
    /// The file and what is wrong with it.
    pub fn identity(&self) -> anyhow::Result<Identity> {
        let path = self.dir.join("identity.seed");
        let seed =
            seed_or_create(&path).with_context(|| format!("the edge's {}", path.display()))?;
        Ok(Identity::from_seed(seed.expose()))
    }

    /// The local CA's certificate, PEM; made with its key if missing.
    ///
    /// # Errors
    /// The file and what is wrong with it.
    pub fn ca_pem(&self) -> anyhow::Result<String> {
        Ok(self.ca()?.cert_pem)
    }

    /// The TLS of the public face, with a certificate that is good at `now_s`.
    ///
    /// # Errors
    /// What can't be read, made or kept.
    pub fn server(&self, now_s: i64) -> anyhow::Result<Arc<ServerConfig>> {
        let cert = self.server_cert(now_s)?;
        server_config_pem(&cert.cert_pem, &cert.key_pem, HTTP2_AND_1)
            .context("the edge's server certificate")
    }

    fn server_cert(&self, now_s: i64) -> anyhow::Result<ServerCert> {
        let path = self.dir.join("server.json");
        if let Some(held) = read::<ServerCert>(&path)?
            && held.is_good(&self.names, now_s)
        {
            return Ok(held);
        }
        let ca = self.ca()?;
        let ips: Vec<IpAddr> = self.names.iter().filter_map(|n| n.parse().ok()).collect();
        let dns: Vec<String> = self
            .names
            .iter()
            .filter(|n| n.parse::<IpAddr>().is_err())
            .cloned()
            .collect();
        let made = local_ca::issue(&ca.key_pem, &dns, &ips, SERVER_CERT_TTL)
            .context("issue a certificate for edge.control_hosts and edge.gateway_hosts")?;
        let life_s = i64::try_from(SERVER_CERT_TTL.as_secs()).unwrap_or(i64::MAX);
        let cert = ServerCert {
            v: VERSION,
            names: self.names.clone(),
            issued_s: now_s,
            expires_s: now_s.saturating_add(life_s),
            cert_pem: made.cert_pem,
            key_pem: made.key_pem,
        };
        write(&path, &cert)?;
        Ok(cert)
    }

    fn ca(&self) -> anyhow::Result<Ca> {
        let path = self.dir.join("ca.json");
        if let Some(ca) = read(&path)? {
            return Ok(ca);
        }
        let made = local_ca::make().context("make the local CA")?;
        let ca = Ca {
            v: VERSION,
            cert_pem: made.cert_pem,
            key_pem: made.key_pem,
        };
        write(&path, &ca)?;
        Ok(ca)
    }
}

fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> anyhow::Result<Option<T>> {
    let bytes = match read_bounded(path, FILE_MAX_BYTES) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        r => Zeroizing::new(r.with_context(|| format!("read {}", path.display()))?),
    };
    // serde's message may quote the file: it holds a key.
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|_| damaged(path))?;
    if value.get("v").and_then(serde_json::Value::as_u64) != Some(u64::from(VERSION)) {
        anyhow::bail!(
            "{} is not of version {VERSION}, the one this program knows",
            path.display()
        );
    }
    let parsed = T::deserialize(value).map_err(|_| damaged(path))?;
    Ok(Some(parsed))
}

fn damaged(path: &Path) -> anyhow::Error {
    anyhow::anyhow!(
        "{} is damaged; remove it and start again to make a new one",
        path.display()
    )
}

fn write(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    let bytes = Zeroizing::new(serde_json::to_vec(value)?);
    write_atomic(path, &bytes, 0o600).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const NOW: i64 = 1_800_000_000;

    #[test]
    fn keys_are_made_once_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::new(
            dir.path().into(),
            &["a.test".to_owned(), "[::1]".to_owned()],
        );
        let (id, ca) = (keys.identity().unwrap().public(), keys.ca_pem().unwrap());
        keys.server(NOW).unwrap();
        assert_eq!(keys.identity().unwrap().public(), id);
        assert_eq!(keys.ca_pem().unwrap(), ca);
        for file in std::fs::read_dir(dir.path()).unwrap() {
            let mode = file.unwrap().metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }

    #[test]
    fn a_certificate_is_issued_again_in_time_and_for_new_names() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::new(dir.path().into(), &["a.test".to_owned()]);
        let life = SERVER_CERT_TTL.as_secs() as i64;
        let first = keys.server_cert(NOW).unwrap();
        assert_eq!(first.names, ["127.0.0.1", "a.test", "localhost"]);
        let same = keys.server_cert(NOW + life / 2).unwrap();
        assert_eq!(same.cert_pem, first.cert_pem);
        let second = keys.server_cert(NOW + life * 3 / 4).unwrap();
        assert_ne!(second.cert_pem, first.cert_pem);
        let other = Keys::new(dir.path().into(), &["b.test".to_owned()]);
        assert_ne!(
            other.server_cert(NOW + life).unwrap().cert_pem,
            second.cert_pem
        );
    }

    #[test]
    fn a_damaged_file_is_named_and_not_quoted() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.json"), b"{\"key_pem\": SECRET").unwrap();
        let e = format!(
            "{:#}",
            Keys::new(dir.path().into(), &[]).ca_pem().unwrap_err()
        );
        assert!(e.contains("ca.json") && !e.contains("SECRET"), "{e}");
        std::fs::write(dir.path().join("ca.json"), b"{\"v\": 2}").unwrap();
        let e = format!(
            "{:#}",
            Keys::new(dir.path().into(), &[]).ca_pem().unwrap_err()
        );
        assert!(e.contains("version 1"), "{e}");
    }
}
