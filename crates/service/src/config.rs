//! `/etc/casemate/casemate.toml`. Unknown fields are errors; every bound is named in the message.

use crate::limits::{CONFIG_MAX_BYTES, DISK_BYTES_PER_S, DISK_OPS_PER_S};
use anyhow::{Context as _, bail};
use model::limits::{NET_BYTES_PER_S, NET_PACKETS_PER_S, PIDS};
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

/// The installation's configuration. All fields have defaults that make a first run work.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The installation as a whole.
    pub installation: Installation,
    /// The way in.
    pub edge: Edge,
    /// Keys.
    pub kms: Kms,
    /// This machine.
    pub host: Host,
    /// The control plane's store.
    pub control: Control,
    /// Guests' network.
    pub network: Network,
    /// Limits of each workspace.
    pub limits: Limits,
}

/// The installation as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Installation {
    /// Its name, part of every log's origin: `[a-z0-9-]`, at most 63.
    pub name: String,
}

/// The way in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Edge {
    /// Where TLS is accepted.
    pub listen: Vec<SocketAddr>,
    /// Host names (or addresses) of the control API.
    pub control_hosts: Vec<String>,
    /// Host names (or addresses) of the gateway to workspaces.
    pub gateway_hosts: Vec<String>,
}

/// Keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Kms {
    /// How the KMS is unsealed.
    pub unseal: api::kms::Unseal,
}

/// This machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Host {
    /// VMs kept restored and without identity; 0 turns the pool off. At most 256.
    pub pool_size: u32,
    /// The image that the pool holds.
    pub pool_image: String,
    /// Memory of pooled VMs, MiB.
    pub pool_memory_mb: u32,
    /// How many workspaces may run at once on this machine.
    pub max_running: u16,
}

/// The control plane's store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Control {
    /// `sqlite` (embedded), or a `postgres://` URL.
    pub database: String,
}

/// Guests' network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Network {
    /// First address of a private /16 of guests' addresses.
    pub base: Ipv4Addr,
    /// Name of the network namespace that holds the taps; chosen by the supervisor if empty.
    pub namespace: String,
}

/// Limits of each workspace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Disk bandwidth, bytes/s.
    pub disk_bytes_per_s: u64,
    /// Disk operations/s.
    pub disk_ops_per_s: u64,
    /// Network bandwidth each way, bytes/s.
    pub network_bytes_per_s: u64,
    /// Network packets/s each way.
    pub network_packets_per_s: u64,
    /// Processes and threads that a VMM may have.
    pub pids: u32,
    /// Workspaces of one account.
    pub workspaces_per_account: u32,
}

impl Default for Installation {
    fn default() -> Self {
        Self {
            name: "local".into(),
        }
    }
}

impl Default for Edge {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 7443))],
            control_hosts: vec!["localhost".into()],
            gateway_hosts: vec!["127.0.0.1".into()],
        }
    }
}

impl Default for Kms {
    fn default() -> Self {
        Self {
            unseal: api::kms::Unseal::File,
        }
    }
}

impl Default for Host {
    fn default() -> Self {
        Self {
            pool_size: 2,
            pool_image: "python-3".into(),
            pool_memory_mb: 256,
            max_running: 64,
        }
    }
}

impl Default for Control {
    fn default() -> Self {
        Self {
            database: "sqlite".into(),
        }
    }
}

impl Default for Network {
    fn default() -> Self {
        Self {
            base: Ipv4Addr::new(10, 117, 0, 0),
            namespace: String::new(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            disk_bytes_per_s: 128 << 20,
            disk_ops_per_s: 5_000,
            network_bytes_per_s: 125_000_000,
            network_packets_per_s: 100_000,
            pids: 256,
            workspaces_per_account: 50,
        }
    }
}

impl Config {
    /// Reads and checks the file; a missing one is the defaults.
    ///
    /// # Errors
    /// The file, the field and its bound.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let text = match std::fs::metadata(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(e).with_context(|| format!("read {}", path.display())),
            Ok(m) if m.len() > CONFIG_MAX_BYTES => {
                bail!("{} is larger than 64 KiB", path.display())
            }
            Ok(_) => {
                std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?
            }
        };
        Self::parse(&text).with_context(|| format!("in {}", path.display()))
    }

    /// Parses and checks a configuration.
    ///
    /// # Errors
    /// The field and its bound.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let config: Self = toml::from_str(text)?;
        let name = &config.installation.name;
        if name.is_empty()
            || name.len() > 63
            || !name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        {
            bail!("installation.name must be 1 to 63 of a-z, 0-9 and '-'");
        }
        if config.edge.listen.is_empty() || config.edge.listen.len() > 16 {
            bail!("edge.listen must name 1 to 16 addresses");
        }
        if config.host.pool_size > 256 {
            bail!("host.pool_size must be at most 256");
        }
        if !model::limits::MEMORY_MB.contains(&config.host.pool_memory_mb) {
            bail!("host.pool_memory_mb must be between 128 and 65536");
        }
        let [a, b, c, d] = config.network.base.octets();
        if !config.network.base.is_private() || (c, d) != (0, 0) {
            bail!("network.base must be the first address of a private /16, as {a}.{b}.0.0");
        }
        let ns = &config.network.namespace;
        if ns.len() > 32 || !ns.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            bail!("network.namespace must be at most 32 letters, digits and '-'");
        }
        if !DISK_BYTES_PER_S.contains(&config.limits.disk_bytes_per_s) {
            bail!("limits.disk_bytes_per_s must be between 1 MiB/s and 1 TiB/s");
        }
        if !DISK_OPS_PER_S.contains(&config.limits.disk_ops_per_s) {
            bail!("limits.disk_ops_per_s must be between 10 and 100000000");
        }
        if !NET_BYTES_PER_S.contains(&config.limits.network_bytes_per_s) {
            bail!("limits.network_bytes_per_s must be between 64 KiB/s and 8 GiB/s");
        }
        if !NET_PACKETS_PER_S.contains(&config.limits.network_packets_per_s) {
            bail!("limits.network_packets_per_s must be between 100 and 100000000");
        }
        if !PIDS.contains(&config.limits.pids) {
            bail!("limits.pids must be between 128 and 65536");
        }
        let db = &config.control.database;
        if db != "sqlite" && !db.starts_with("postgres://") {
            bail!("control.database must be `sqlite` or a postgres:// URL");
        }
        Ok(config)
    }
}

/// The configuration as the text of its file.
///
/// # Errors
/// Never for a configuration that [`Config::parse`] made.
pub fn to_toml(config: &Config) -> anyhow::Result<String> {
    toml::to_string_pretty(config).context("write the configuration as TOML")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn defaults_are_valid_and_round_trip() {
        let c = Config::parse("").unwrap();
        assert_eq!(Config::parse(&toml::to_string(&c).unwrap()).unwrap(), c);
    }

    #[test]
    fn errors_name_the_field() {
        for (text, word) in [
            ("[edge]\nlisten = []", "edge.listen"),
            ("[host]\npool_size = 1000", "host.pool_size"),
            ("[host]\npool_sise = 1", "pool_sise"),
            ("[network]\nbase = \"8.8.0.0\"", "network.base"),
            ("[network]\nbase = \"10.1.2.0\"", "network.base"),
            (
                "[limits]\ndisk_ops_per_s = 1000000000",
                "limits.disk_ops_per_s",
            ),
            ("[limits]\ndisk_bytes_per_s = 1", "limits.disk_bytes_per_s"),
            (
                "[limits]\nnetwork_bytes_per_s = 1",
                "limits.network_bytes_per_s",
            ),
            (
                "[limits]\nnetwork_packets_per_s = 1",
                "limits.network_packets_per_s",
            ),
            ("[limits]\npids = 1", "limits.pids"),
            ("[control]\ndatabase = \"mysql://\"", "control.database"),
            ("[installation]\nname = \"a b\"", "installation.name"),
        ] {
            let e = format!("{:#}", Config::parse(text).unwrap_err());
            assert!(e.contains(word), "{text:?}: {e}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(s in ".{0,400}") {
            let _ = Config::parse(&s);
        }
    }
}
