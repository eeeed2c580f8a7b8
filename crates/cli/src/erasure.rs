//! Offline verification of erasure receipts (DSK-4, KMS-4): only the KMS's public key is needed.

use anyhow::Context as _;
use api::kms::Erasure;
use seal::sign::{Signed, VerifyingKey};
use service::paths::Paths;
use std::io::Read as _;
use std::path::Path;

/// Largest receipt file, bytes.
const RECEIPT_MAX_BYTES: u64 = 16 << 10;

/// What a valid receipt says.
///
/// # Errors
/// When it is not signed by `key`, or says something that can't be.
pub fn verify(receipt: &str, key: &VerifyingKey) -> anyhow::Result<Erasure> {
    let signed = Signed::parse(receipt.trim()).context("no signed document")?;
    let erasure: Erasure = signed
        .verify(key, api::context::ERASURE)
        .context("not an erasure receipt of this installation's KMS")?;
    erasure.check().map_err(anyhow::Error::msg)?;
    Ok(erasure)
}

/// `casemate erasure`.
///
/// # Errors
/// When the receipt is not valid.
pub fn run(paths: &Paths, file: &Path, key: Option<&Path>, as_json: bool) -> anyhow::Result<u8> {
    let mut text = String::new();
    if file == Path::new("-") {
        std::io::stdin()
            .take(RECEIPT_MAX_BYTES)
            .read_to_string(&mut text)?;
    } else {
        let bytes = service::files::read_bounded(file, RECEIPT_MAX_BYTES)
            .with_context(|| format!("read {}", file.display()))?;
        text = String::from_utf8(bytes).context("the receipt is no text")?;
    }
    let key = match key {
        Some(path) => {
            let hex = std::fs::read_to_string(path)
                .with_context(|| format!("read {}", path.display()))?;
            VerifyingKey::from_hex(hex.trim()).context("the key is no Ed25519 key in hex")?
        }
        None => service::trust::key(paths, service::trust::KMS)?,
    };
    let erasure = verify(&text, &key)?;
    if as_json {
        println!("{}", serde_json::to_string(&erasure)?);
    } else {
        println!(
            "valid: the key of {} was destroyed; epoch {} is gone, {} is current",
            erasure.workspace, erasure.epoch_destroyed, erasure.epoch_now
        );
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use seal::sign::SigningKey;

    fn erasure(destroyed: u64) -> Erasure {
        Erasure {
            workspace: model::WorkspaceId::from_bytes([1; 8]),
            key_versions: 1,
            record_digest: "00".repeat(32),
            epoch_destroyed: destroyed,
            epoch_now: 3,
            time_ms: 1,
        }
    }

    #[test]
    fn only_the_kms_can_say_it() {
        let (kms, other) = (SigningKey::generate(), SigningKey::generate());
        let good = Signed::new(&kms, api::context::ERASURE, &erasure(2));
        assert_eq!(verify(good.as_str(), &kms.public()).unwrap(), erasure(2));
        assert!(verify(good.as_str(), &other.public()).is_err());
        let kind = Signed::new(&kms, api::context::IDENTITY, &erasure(2));
        assert!(verify(kind.as_str(), &kms.public()).is_err());
        let revivable = Signed::new(&kms, api::context::ERASURE, &erasure(3));
        assert!(verify(revivable.as_str(), &kms.public()).is_err());
        let mut flipped = good.as_str().to_owned().into_bytes();
        flipped[20] ^= 1;
        assert!(verify(&String::from_utf8_lossy(&flipped), &kms.public()).is_err());
    }
}
