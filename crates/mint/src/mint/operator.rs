//! What an operator asks of mint: accounts and API keys.
//!
//! Must never show a key's secret a second time: only its HMAC is kept.

use super::{Call, Inner, entry};
use crate::limits::*;
use crate::store::ApiKey;
use api::audit::Class;
use api::mint::{AccountMade, KeyMade};
use api::{Error, ErrorCode};
use model::{AccountId, KeyId};

impl Inner {
    pub(super) async fn account_create(&self, call: &Call, name: &str) -> api::Result<AccountMade> {
        name_check(name)?;
        let id = AccountId::from_bytes(seal::random::bytes());
        let e = entry(call, "mint.account_create", "operator", &id, None);
        self.log.append(Class::Host, e).await?;
        let _writer = self.writer.lock().await;
        if self.book().accounts() >= ACCOUNTS_MAX {
            return Err(Error::new(ErrorCode::QuotaExceeded, "too many accounts"));
        }
        self.store
            .account_insert(&id, name, self.clock.now_ms())
            .await?;
        self.book_mut().account_put(id.clone());
        Ok(AccountMade { account: id })
    }

    pub(super) async fn key_create(
        &self,
        call: &Call,
        account: &AccountId,
        name: &str,
    ) -> api::Result<KeyMade> {
        name_check(name)?;
        if !self.book().has_account(account) {
            return Err(Error::new(ErrorCode::NotFound, "there is no such account"));
        }
        let (made, mac) = self.keys.api_key_make();
        let mut e = entry(call, "mint.key_create", "operator", account, None);
        e.subject = Some(made.client_id.to_string());
        self.log.append(Class::Host, e).await?;
        let _writer = self.writer.lock().await;
        if self.book().keys() >= ACCOUNTS_MAX {
            return Err(Error::new(ErrorCode::QuotaExceeded, "too many API keys"));
        }
        let row = ApiKey {
            id: made.client_id.clone(),
            account: account.clone(),
            mac,
            revoked: false,
        };
        self.store
            .api_key_insert(&row, name, self.clock.now_ms())
            .await?;
        self.book_mut().key_put(row);
        Ok(made)
    }

    pub(super) async fn key_revoke(&self, call: &Call, id: &KeyId) -> api::Result<bool> {
        let known = self.book().key(id).cloned();
        let Some(mut row) = known else {
            return Err(Error::new(ErrorCode::NotFound, "there is no such API key"));
        };
        if row.revoked {
            return Ok(true);
        }
        let mut e = entry(call, "mint.key_revoke", "operator", &row.account, None);
        e.subject = Some(id.to_string());
        let waiting = self.log_closing(&e).await?;
        let _writer = self.writer.lock().await;
        self.store
            .api_key_revoke(id, self.clock.now_ms(), waiting.as_deref())
            .await?;
        row.revoked = true;
        self.book_mut().key_put(row);
        Ok(true)
    }
}

fn name_check(name: &str) -> api::Result<()> {
    let chars = name.chars().count();
    if chars == 0 || chars > NAME_MAX_CHARS || name.chars().any(char::is_control) {
        return Err(Error::new(
            ErrorCode::ValidationError,
            "name must have 1 to 255 characters, and no control characters",
        ));
    }
    Ok(())
}
