//! An Ed25519 identity as a certificate authority, and trust in exactly that key.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SerialNumber, SignatureAlgorithm,
};
use rustls_pki_types::{Der, PrivatePkcs8KeyDer, TrustAnchor};
use tokio_rustls::rustls::RootCertStore;

use super::{Leaf, tls};
use crate::limits::{CA_TTL_MAX_S, CERT_BACKDATE_S, CERT_TTL_MAX_S};
use crate::sign::{SigningKey, VerifyingKey};
use crate::{SealError, random};

/// The issuer name of every certificate that an identity signs.
const ISSUER: &str = "casemate identity";
/// That name as webpki compares it: an X.501 Name without its outer SEQUENCE, i.e.
/// SET { SEQUENCE { OID commonName, UTF8String } }.
const ISSUER_DER: &[u8] = b"\x31\x1a\x30\x18\x06\x03\x55\x04\x03\x0c\x11casemate identity";
const _: () = assert!(ISSUER.len() == 0x11 && ISSUER_DER.len() == 2 + 0x1a);
/// What stands before the key in an Ed25519 SubjectPublicKeyInfo without its outer SEQUENCE
/// (RFC 8410): AlgorithmIdentifier, BIT STRING of 33 bytes, no unused bits.
const SPKI_PREFIX: &[u8] = b"\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00";

/// An Ed25519 key that signs TLS certificates for its holder.
#[derive(Clone, Debug)]
pub struct Identity {
    key: CaKey,
}

impl Identity {
    /// The identity of this key.
    #[must_use]
    pub fn new(key: SigningKey) -> Self {
        let public = key.public();
        Self {
            key: CaKey { key, public },
        }
    }

    /// The identity of this seed.
    #[must_use]
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self::new(SigningKey::from_seed(seed))
    }

    /// What the other side pins.
    #[must_use]
    pub fn public(&self) -> VerifyingKey {
        self.key.public
    }

    /// Makes a TLS key (P-256) and its certificate for the name `dns`, good for servers and
    /// clients from 5 minutes ago until `ttl` from now. Set the clock first.
    ///
    /// # Errors
    /// If `dns` can't stand in a certificate or `ttl` is over 398 days.
    pub fn leaf(&self, dns: &str, ttl: Duration) -> Result<Leaf, SealError> {
        let mut params = leaf_params(vec![dns.to_owned()], ttl)?;
        params
            .extended_key_usages
            .push(ExtendedKeyUsagePurpose::ClientAuth);
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(tls("a key"))?;
        let issuer = Issuer::new(ca_params(ISSUER, Duration::ZERO)?, &self.key);
        let cert = params
            .signed_by(&key, &issuer)
            .map_err(tls("a TLS certificate"))?;
        let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        Ok((vec![cert.into()], key))
    }
}

/// Trust in certificates signed by `anchor`, and in no others.
pub(super) fn roots(anchor: &VerifyingKey) -> RootCertStore {
    let spki = [SPKI_PREFIX, anchor.as_bytes()].concat();
    RootCertStore {
        roots: vec![TrustAnchor {
            subject: Der::from_slice(ISSUER_DER),
            subject_public_key_info: Der::from(spki),
            name_constraints: None,
        }],
    }
}

/// What all leaf certificates have in common: `names` may be DNS names and IP addresses.
pub(super) fn leaf_params(
    names: Vec<String>,
    ttl: Duration,
) -> Result<CertificateParams, SealError> {
    let mut params =
        CertificateParams::new(names).map_err(tls("the names of a TLS certificate"))?;
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, "casemate");
    set_validity(&mut params, ttl, CERT_TTL_MAX_S)?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// A CA named `name` that signs leaves only.
pub(super) fn ca_params(name: &str, ttl: Duration) -> Result<CertificateParams, SealError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    set_validity(&mut params, ttl, CA_TTL_MAX_S)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn set_validity(
    params: &mut CertificateParams,
    ttl: Duration,
    ttl_max_s: u64,
) -> Result<(), SealError> {
    let wrong = |why| SealError::Malformed {
        what: "a certificate's validity",
        why,
    };
    if ttl.as_secs() > ttl_max_s {
        return Err(wrong("is longer than allowed"));
    }
    // TLS libraries check certificates against the system's clock, so they are made by it too.
    let now_s = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(|_| wrong("can't be set: the clock stands before 1970"))?
        .as_secs();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_secs(now_s.saturating_sub(CERT_BACKDATE_S));
    params.not_after = epoch + Duration::from_secs(now_s) + ttl;
    // Positive and 16 bytes long in DER whatever is drawn.
    let mut serial = random::bytes::<16>();
    serial[0] = (serial[0] & 0x7f) | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(())
}

/// The identity's key as rcgen sees it: it signs, but can't be read.
#[derive(Clone, Debug)]
struct CaKey {
    key: SigningKey,
    public: VerifyingKey,
}

impl PublicKeyData for CaKey {
    fn der_bytes(&self) -> &[u8] {
        self.public.as_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ED25519
    }
}

impl rcgen::SigningKey for CaKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        Ok(self.key.sign_raw(message).to_vec())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::tls::{CertChain, provider};
    use rustls_pki_types::{ServerName, UnixTime};
    use std::sync::Arc;
    use tokio_rustls::rustls::client::WebPkiServerVerifier;
    use tokio_rustls::rustls::client::danger::ServerCertVerifier;

    const NAME: &str = "a.test";
    const HOUR: Duration = Duration::from_secs(3600);

    fn accepts(anchor: &Identity, chain: &CertChain, after: Duration) -> bool {
        let roots = Arc::new(roots(&anchor.public()));
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider())
            .build()
            .unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() + after;
        let name = ServerName::try_from(NAME).unwrap();
        let now = UnixTime::since_unix_epoch(now);
        verifier
            .verify_server_cert(&chain[0], &chain[1..], &name, &[], now)
            .is_ok()
    }

    #[test]
    fn a_leaf_ends_with_its_ttl() {
        let identity = Identity::from_seed(&[1; 32]);
        let (chain, _) = identity.leaf(NAME, HOUR).unwrap();
        assert!(accepts(&identity, &chain, Duration::ZERO));
        assert!(accepts(&identity, &chain, HOUR - Duration::from_secs(60)));
        assert!(!accepts(&identity, &chain, HOUR + Duration::from_secs(60)));
        assert!(!accepts(
            &Identity::from_seed(&[2; 32]),
            &chain,
            Duration::ZERO
        ));
    }

    #[test]
    fn a_leaf_is_no_ca() {
        let identity = Identity::from_seed(&[1; 32]);
        let (chain, key) = identity.leaf("other.test", HOUR).unwrap();
        // The holder of a leaf for another name issues itself one for this name, in every guise.
        let forge = |issuer_name: &str| {
            let mut params = ca_params(issuer_name, Duration::ZERO).unwrap();
            params.is_ca = IsCa::ExplicitNoCa;
            let issuer = Issuer::new(params, KeyPair::try_from(&key).unwrap());
            let own = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
            leaf_params(vec![NAME.into()], HOUR)
                .unwrap()
                .signed_by(&own, &issuer)
                .unwrap()
        };
        for issuer_name in ["casemate", ISSUER] {
            let forged = vec![forge(issuer_name).into(), chain[0].clone()];
            assert!(
                !accepts(&identity, &forged, Duration::ZERO),
                "{issuer_name}"
            );
            assert!(
                !accepts(&identity, &forged[..1].to_vec(), Duration::ZERO),
                "{issuer_name}"
            );
        }
    }

    #[test]
    fn names_of_workspaces_fit() {
        let identity = Identity::from_seed(&[1; 32]);
        for name in [
            "ws_0123456789abcdef",
            "ws-0123456789abcdef.guest.casemate",
            "localhost",
        ] {
            identity.leaf(name, HOUR).unwrap();
            ServerName::try_from(name).unwrap();
        }
    }
}
