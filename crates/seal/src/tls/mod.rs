//! TLS 1.3 between the platform's parts, pinned to Ed25519 identities, and for the edge's public
//! face.
//!
//! An [`Identity`] is a signing key acting as a tiny CA: it signs short-lived certificates for TLS
//! keys made on the spot. The other side trusts **that public key and nothing else**: no system
//! roots, no certificate to distribute. Verification is webpki's own, against a trust anchor made
//! of the key and a fixed name; the DNS name is checked as ever.
//!
//! Must never speak TLS 1.2, skip a check, or resume a session past a changed pin.

pub mod local_ca;
mod pin;

use std::sync::{Arc, OnceLock};

pub use rustls_pki_types;
pub use tokio_rustls;
pub use tokio_rustls::rustls;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self as lc, cipher_suite, kx_group};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

pub use pin::Identity;

use crate::SealError;
use crate::sign::VerifyingKey;

/// Certificates in the order TLS sends them, the leaf first.
pub type CertChain = Vec<CertificateDer<'static>>;
/// A TLS private key. Its `Debug` says nothing.
pub type PrivateKey = PrivateKeyDer<'static>;
/// What a party shows: its certificates and the key of the first.
pub type Leaf = (CertChain, PrivateKey);

/// ALPN for HTTP/1.1 only.
pub const HTTP1: &[&str] = &["http/1.1"];
/// ALPN for HTTP/2, else HTTP/1.1.
pub const HTTP2_AND_1: &[&str] = &["h2", "http/1.1"];

/// The one set of algorithms: TLS 1.3's three suites; X25519MLKEM768 first, then X25519 and
/// P-256. The first call also makes it the process's default (for reqwest and the like).
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let make = || {
        let provider = CryptoProvider {
            cipher_suites: vec![
                cipher_suite::TLS13_AES_256_GCM_SHA384,
                cipher_suite::TLS13_AES_128_GCM_SHA256,
                cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            ],
            kx_groups: vec![
                kx_group::X25519MLKEM768,
                kx_group::X25519,
                kx_group::SECP256R1,
            ],
            ..lc::default_provider()
        };
        // If another default is set already, it is only not ours for others: configurations made
        // here name their provider.
        let _already_set = provider.clone().install_default();
        Arc::new(provider)
    };
    PROVIDER.get_or_init(make).clone()
}

/// A server that shows `leaf`. With `client_anchor`, only clients whose certificate that identity
/// signed get through the handshake. Sessions are not resumed, so each connection is checked.
///
/// # Errors
/// If the leaf's key does not fit its certificate.
pub fn server_config(
    leaf: Leaf,
    client_anchor: Option<VerifyingKey>,
    alpn: &[&str],
) -> Result<Arc<ServerConfig>, SealError> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(tls("a TLS server"))?;
    let builder = match client_anchor {
        Some(anchor) => {
            let roots = Arc::new(pin::roots(&anchor));
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
                .build()
                .map_err(tls("the check of TLS clients"))?;
            builder.with_client_cert_verifier(verifier)
        }
        None => builder.with_no_client_auth(),
    };
    let mut config = builder
        .with_single_cert(leaf.0, leaf.1)
        .map_err(tls("a TLS server"))?;
    config.alpn_protocols = alpn_list(alpn);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// A client that takes only servers whose certificate `server_anchor` signed for the name it
/// dials, and that shows `leaf` if asked.
///
/// # Errors
/// If the leaf's key does not fit its certificate.
pub fn client_config(
    server_anchor: &VerifyingKey,
    leaf: Option<Leaf>,
    alpn: &[&str],
) -> Result<Arc<ClientConfig>, SealError> {
    client_config_of(pin::roots(server_anchor), leaf, alpn)
}

/// A client of the public face: it takes servers whose certificate one of the CAs in `ca_pem`
/// signed (the local CA's, say).
///
/// # Errors
/// If `ca_pem` holds no certificate that can be a CA.
pub fn client_config_ca(ca_pem: &str, alpn: &[&str]) -> Result<Arc<ClientConfig>, SealError> {
    let mut roots = RootCertStore::empty();
    for cert in certs(ca_pem)? {
        roots.add(cert).map_err(tls("a TLS client's CA list"))?;
    }
    client_config_of(roots, None, alpn)
}

/// A server of the public face, with a certificate chain and key in PEM.
///
/// # Errors
/// If either is unreadable or they don't fit each other.
pub fn server_config_pem(
    cert_pem: &str,
    key_pem: &str,
    alpn: &[&str],
) -> Result<Arc<ServerConfig>, SealError> {
    let wrong = |why| SealError::Malformed {
        what: "TLS key file",
        why,
    };
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
        .map_err(|_| wrong("holds no private key in PEM"))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(tls("a TLS server"))?
        .with_no_client_auth()
        .with_single_cert(certs(cert_pem)?, key)
        .map_err(tls("a TLS server"))?;
    config.alpn_protocols = alpn_list(alpn);
    Ok(Arc::new(config))
}

fn client_config_of(
    roots: RootCertStore,
    leaf: Option<Leaf>,
    alpn: &[&str],
) -> Result<Arc<ClientConfig>, SealError> {
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(tls("the check of TLS servers"))?;
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(tls("a TLS client"))?
        .with_webpki_verifier(verifier);
    let mut config = match leaf {
        Some((chain, key)) => builder
            .with_client_auth_cert(chain, key)
            .map_err(tls("a TLS client"))?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn_list(alpn);
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

fn certs(pem: &str) -> Result<CertChain, SealError> {
    let wrong = |why| SealError::Malformed {
        what: "TLS certificate file",
        why,
    };
    let chain = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<CertChain, _>>()
        .map_err(|_| wrong("is not PEM"))?;
    if chain.is_empty() {
        Err(wrong("holds no certificate in PEM"))
    } else {
        Ok(chain)
    }
}

fn alpn_list(alpn: &[&str]) -> Vec<Vec<u8>> {
    alpn.iter()
        .map(|protocol| protocol.as_bytes().to_vec())
        .collect()
}

/// Wraps an error of the TLS libraries, which speak of certificates and settings only.
fn tls<E: std::fmt::Display>(operation: &'static str) -> impl Fn(E) -> SealError {
    move |error| SealError::Tls {
        operation,
        detail: error.to_string(),
    }
}
