//! `casemate-kms init`: unseal material, the first slot and the state, if they are missing.
//!
//! The state is written last and in one transaction, so an init that was interrupted starts over.

use crate::error::KmsError;
use crate::keyring::{Place, epoch_root};
use crate::slots::Slots;
use crate::store::{self, Store};
use crate::unseal::Means;
use seal::sign::SigningKey;
use std::path::Path;

/// Makes what is missing in `dir`; answers the KMS's public key, hex.
///
/// # Errors
/// The store's and the file system's, or a passphrase out of bounds.
pub async fn init(dir: &Path, passphrase: Option<&[u8]>, now_ms: u64) -> Result<String, KmsError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(KmsError::io("make", dir))?;
    let store = Store::open(&dir.join("state.db"), true).await?;
    let public = match store.state().await? {
        Some(state) => state.sign_pub,
        None => first_state(&store, dir, passphrase, now_ms).await?,
    };
    store.close().await;
    Ok(public)
}

async fn first_state(
    store: &Store,
    dir: &Path,
    passphrase: Option<&[u8]>,
    now_ms: u64,
) -> Result<String, KmsError> {
    const EPOCH: u64 = 1;
    let secret = Means::create(dir, passphrase)?;
    let slot = Slots::open(dir.join("slots"))?.create(EPOCH)?;
    let root = epoch_root(&secret, &slot, EPOCH);
    let sign = SigningKey::generate();
    let state = store::State {
        epoch: EPOCH,
        rotated_ms: now_ms,
        sign_pub: sign.public().to_hex(),
        sign_wrapped: Place::Sign { epoch: EPOCH }.wrap(&root, sign.seed().as_slice()),
    };
    let mut tx = store.begin().await?;
    store::state_put(&mut tx, &state).await?;
    tx.commit()
        .await
        .map_err(KmsError::store("write first state"))?;
    Ok(state.sign_pub)
}
