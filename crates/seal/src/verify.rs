//! Signatures by keys that others made: Ed25519 (RFC 8032) and ECDSA P-256 with SHA-256
//! (FIPS 186-5), from PEM.
//!
//! Must never let the signed thing choose the algorithm: the key's own is the only one.

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::sign::VerifyingKey;
use crate::{SealError, hash};

/// A SubjectPublicKeyInfo of Ed25519 (RFC 8410) up to its 32 bytes.
const ED25519: &[u8] = &[
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];
/// One of P-256 (RFC 5480) up to its uncompressed point of 65 bytes.
const P256: &[u8] = &[
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
/// Longest PEM text, bytes.
const PEM_MAX_BYTES: usize = 1_024;

/// A public key of one of the two kinds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PublicKey {
    /// Ed25519.
    Ed25519(VerifyingKey),
    /// ECDSA on P-256 with SHA-256; the uncompressed point.
    P256([u8; 65]),
}

impl PublicKey {
    /// Reads `-----BEGIN PUBLIC KEY-----`.
    ///
    /// # Errors
    /// If it is no such PEM, or of another kind of key.
    pub fn from_pem(text: &str) -> Result<Self, SealError> {
        let wrong = |why| SealError::Malformed {
            what: "public key",
            why,
        };
        let body = text
            .trim()
            .strip_prefix("-----BEGIN PUBLIC KEY-----")
            .and_then(|t| t.strip_suffix("-----END PUBLIC KEY-----"))
            .filter(|t| t.len() <= PEM_MAX_BYTES)
            .ok_or_else(|| wrong("must be PEM of type PUBLIC KEY"))?;
        let packed: String = body.split_ascii_whitespace().collect();
        let der = STANDARD
            .decode(packed)
            .map_err(|_| wrong("its base64 is malformed"))?;
        if let Some(key) = der.strip_prefix(ED25519) {
            return VerifyingKey::from_bytes(key).map(Self::Ed25519);
        }
        let point: Option<[u8; 65]> = der.strip_prefix(P256).and_then(|p| p.try_into().ok());
        match point {
            Some(point @ [0x04, ..]) => Ok(Self::P256(point)),
            _ => Err(wrong("must be of Ed25519 or P-256")),
        }
    }

    /// Names the key: the first 8 hex digits of its SHA-256. A hint for finding the key, no proof.
    #[must_use]
    pub fn key_id(&self) -> String {
        match self {
            Self::Ed25519(key) => key.key_id(),
            Self::P256(point) => hex::encode(&hash::sha256(point)[..4]),
        }
    }

    /// Checks a signature over `message`: 64 bytes for Ed25519, ASN.1 for P-256.
    ///
    /// # Errors
    /// [`SealError::Signature`] if it does not hold.
    pub fn verify(&self, message: &[u8], signature: &[u8]) -> Result<(), SealError> {
        match self {
            Self::Ed25519(key) => key.verify_raw(message, signature),
            Self::P256(point) => UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point)
                .verify(message, signature)
                .map_err(|_| SealError::Signature {
                    what: "P-256 signature",
                }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Made by `openssl ecparam -name prime256v1 -genkey` and `openssl dgst -sha256 -sign`.
    const PEM: &str = include_str!("../tests/p256/key.pem");
    const SIGNATURE: &[u8] = include_bytes!("../tests/p256/message.sig");

    #[test]
    fn openssls_p256_signature_holds_for_its_message_only() {
        let key = PublicKey::from_pem(PEM).expect("openssl's key");
        assert!(key.verify(b"message\n", SIGNATURE).is_ok());
        assert!(key.verify(b"messag3\n", SIGNATURE).is_err());
        assert!(key.verify(b"message\n", &SIGNATURE[1..]).is_err());
    }

    #[test]
    fn ed25519_is_read_from_its_pem() {
        let signer = crate::sign::SigningKey::from_seed(&[7; 32]);
        let mut der = ED25519.to_vec();
        der.extend(hex::decode(signer.public().to_hex()).expect("hex"));
        let pem = format!(
            "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n",
            STANDARD.encode(&der)
        );
        let key = PublicKey::from_pem(&pem).expect("own key");
        assert_eq!(key, PublicKey::Ed25519(signer.public()));
        assert!(key.verify(b"m", &signer.sign_raw(b"m")).is_ok());
        assert!(key.verify(b"n", &signer.sign_raw(b"m")).is_err());
    }

    #[test]
    fn other_keys_are_refused() {
        for bad in [
            "",
            "-----BEGIN PUBLIC KEY-----\n!\n-----END PUBLIC KEY-----",
            "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
            &PEM.replace("PUBLIC", "PRIVATE"),
            &PEM.replace("MFkw", "MFgw"),
        ] {
            assert!(PublicKey::from_pem(bad).is_err(), "{bad}");
        }
    }
}
