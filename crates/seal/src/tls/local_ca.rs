//! A CA of this installation's own, for the edge's first run: before there is a public
//! certificate, users trust this CA's PEM once.
//!
//! Its keys are P-256, which browsers take. It may sign leaves only, and only the edge's host
//! keeps its key.

use std::net::IpAddr;
use std::time::Duration;

use rcgen::{Issuer, KeyPair, PKCS_ECDSA_P256_SHA256};
use zeroize::Zeroizing;

use super::pin::{ca_params, leaf_params};
use super::tls;
use crate::SealError;
use crate::limits::{CA_TTL_MAX_S, CERT_NAMES_MAX};

const NAME: &str = "Casemate local CA";

/// A certificate and its private key, both PEM.
pub struct CertAndKey {
    /// The certificate: public.
    pub cert_pem: String,
    /// The private key (PKCS #8): for a file of mode 0600.
    pub key_pem: Zeroizing<String>,
}

impl std::fmt::Debug for CertAndKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertAndKey")
            .field("cert_pem", &self.cert_pem)
            .finish_non_exhaustive()
    }
}

/// Makes a CA, good for 10 years.
///
/// # Errors
/// If the certificate can't be made.
pub fn make() -> Result<CertAndKey, SealError> {
    let key = new_key()?;
    let cert = ca_params(NAME, Duration::from_secs(CA_TTL_MAX_S))?
        .self_signed(&key)
        .map_err(tls("the local CA's certificate"))?;
    Ok(CertAndKey {
        cert_pem: cert.pem(),
        key_pem: Zeroizing::new(key.serialize_pem()),
    })
}

/// Issues a server certificate for `dns` and `ips` by the CA with the key `ca_key_pem` that
/// [`make`] made.
///
/// # Errors
/// If the key is unreadable, there is no name or more than 100, a name can't stand in a
/// certificate, or `ttl` is over 398 days.
pub fn issue(
    ca_key_pem: &str,
    dns: &[String],
    ips: &[IpAddr],
    ttl: Duration,
) -> Result<CertAndKey, SealError> {
    let names: Vec<String> = dns
        .iter()
        .cloned()
        .chain(ips.iter().map(IpAddr::to_string))
        .collect();
    if names.is_empty() || names.len() > CERT_NAMES_MAX {
        let why = "must be from 1 to 100";
        return Err(SealError::Malformed {
            what: "the names of a TLS certificate",
            why,
        });
    }
    let why = "holds no private key in PEM";
    let ca_key = KeyPair::from_pem(ca_key_pem).map_err(|_| SealError::Malformed {
        what: "the local CA's key file",
        why,
    })?;
    let issuer = Issuer::new(ca_params(NAME, Duration::ZERO)?, ca_key);
    let key = new_key()?;
    let cert = leaf_params(names, ttl)?
        .signed_by(&key, &issuer)
        .map_err(tls("a TLS certificate"))?;
    Ok(CertAndKey {
        cert_pem: cert.pem(),
        key_pem: Zeroizing::new(key.serialize_pem()),
    })
}

fn new_key() -> Result<KeyPair, SealError> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(tls("a key"))
}
