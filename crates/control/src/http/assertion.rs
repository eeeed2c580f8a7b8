//! Whether mint stands behind a request: the assertion is verified, of now, for this very
//! request, and used for the first time.

use crate::limits::{ASSERTIONS_REMEMBERED_MAX, CLOCK_SKEW_MAX_MS};
use crate::op::Actor;
use api::limits::ASSERTION_MAX_MS;
use api::mint::Assertion;
use api::{Error, ErrorCode, context};
use seal::sign::{Signed, VerifyingKey};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// The header that carries it, from the edge.
pub const HEADER: &str = "casemate-assertion";

/// What remembers assertions until they are over.
pub struct Assertions {
    key: VerifyingKey,
    /// Assertions from before it are refused: those used then are not remembered any more.
    since_ms: u64,
    used: Mutex<HashMap<String, u64>>,
}

impl Assertions {
    /// Trusts mint's key, from `now_ms` on.
    #[must_use]
    pub fn new(key: VerifyingKey, now_ms: u64) -> Self {
        Self {
            key,
            since_ms: now_ms,
            used: Mutex::default(),
        }
    }

    /// The client behind a request whose hash is `binding`.
    ///
    /// # Errors
    /// [`ErrorCode::Unauthorized`]; [`ErrorCode::Unavailable`] in the moment after a restart.
    pub fn actor(
        &self,
        header: Option<&str>,
        binding: &[u8; 32],
        now_ms: u64,
    ) -> api::Result<Actor> {
        let text = header.ok_or_else(|| refused("no assertion"))?;
        let a: Assertion = Signed::parse(text)
            .and_then(|s| s.verify(&self.key, context::ASSERTION))
            .map_err(|e| refused(&e.to_string()))?;
        let life = a.exp_ms.checked_sub(a.iat_ms);
        if life.is_none_or(|l| l > ASSERTION_MAX_MS)
            || a.iat_ms > now_ms.saturating_add(CLOCK_SKEW_MAX_MS)
            || a.exp_ms <= now_ms
        {
            return Err(refused("not of now"));
        }
        if a.binding != hex::encode(binding) {
            return Err(refused("of another request"));
        }
        if a.iat_ms < self.since_ms {
            return Err(Error::new(
                ErrorCode::Unavailable,
                "the control plane restarted a moment ago; try again",
            ));
        }
        self.use_up(a.jti, a.exp_ms, now_ms)?;
        Ok(Actor::Key {
            account: a.account,
            key: a.key,
            assertion: text.to_owned(),
        })
    }

    fn use_up(&self, jti: String, exp_ms: u64, now_ms: u64) -> api::Result<()> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if used.len() >= ASSERTIONS_REMEMBERED_MAX / 2 {
            used.retain(|_, exp| *exp > now_ms);
        }
        if used.len() >= ASSERTIONS_REMEMBERED_MAX {
            return Err(Error::new(
                ErrorCode::RateLimited,
                "too many requests; try again",
            ));
        }
        match used.insert(jti, exp_ms) {
            None => Ok(()),
            Some(_) => Err(refused("used before")),
        }
    }
}

/// The client learns nothing of why.
fn refused(why: &str) -> Error {
    Error::new(
        ErrorCode::Unauthorized,
        "a valid credential is needed: X-Client-ID with X-Client-Secret, or a bearer token",
    )
    .detail(why)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use model::{AccountId, KeyId};
    use proptest::prelude::*;
    use seal::sign::SigningKey;

    const NOW: u64 = 1_000_000;

    fn assertion(binding: [u8; 32], iat_ms: u64, exp_ms: u64) -> Assertion {
        Assertion {
            account: AccountId::from_bytes([1; 8]),
            key: KeyId::from_bytes([2; 8]),
            binding: hex::encode(binding),
            iat_ms,
            exp_ms,
            jti: "00".repeat(16),
        }
    }

    #[test]
    fn one_assertion_serves_one_request_once() {
        let key = SigningKey::generate();
        let mint = Assertions::new(key.public(), NOW - 10);
        let text = Signed::new(
            &key,
            context::ASSERTION,
            &assertion([7; 32], NOW, NOW + 30_000),
        );
        let ask = |binding| mint.actor(Some(text.as_str()), binding, NOW + 1).map(drop);
        assert_eq!(ask(&[8; 32]).unwrap_err().code, ErrorCode::Unauthorized);
        ask(&[7; 32]).unwrap();
        assert_eq!(ask(&[7; 32]).unwrap_err().code, ErrorCode::Unauthorized);
    }

    #[test]
    fn what_is_not_of_now_or_not_mints_is_refused() {
        let key = SigningKey::generate();
        let b = [7; 32];
        for (iat, exp, signer, kind, code) in [
            (
                NOW,
                NOW + 30_001,
                &key,
                context::ASSERTION,
                ErrorCode::Unauthorized,
            ),
            (
                NOW - 20_000,
                NOW,
                &key,
                context::ASSERTION,
                ErrorCode::Unauthorized,
            ),
            (
                NOW + 6_000,
                NOW + 9_000,
                &key,
                context::ASSERTION,
                ErrorCode::Unauthorized,
            ),
            (
                NOW + 9,
                NOW + 3,
                &key,
                context::ASSERTION,
                ErrorCode::Unauthorized,
            ),
            (NOW, NOW + 9, &key, context::POLICY, ErrorCode::Unauthorized),
            (
                NOW,
                NOW + 9,
                &SigningKey::generate(),
                context::ASSERTION,
                ErrorCode::Unauthorized,
            ),
            (
                NOW - 20,
                NOW + 9,
                &key,
                context::ASSERTION,
                ErrorCode::Unavailable,
            ),
        ] {
            let mint = Assertions::new(key.public(), NOW - 10);
            let text = Signed::new(signer, kind, &assertion(b, iat, exp));
            let e = mint.actor(Some(text.as_str()), &b, NOW).unwrap_err();
            assert_eq!(e.code, code, "{iat} {exp} {kind}");
        }
        let mint = Assertions::new(key.public(), NOW);
        assert!(mint.actor(None, &b, NOW).is_err());
    }

    proptest! {
        #[test]
        fn no_text_is_an_assertion(text in ".{0,200}") {
            let mint = Assertions::new(SigningKey::generate().public(), 0);
            prop_assert!(mint.actor(Some(&text), &[0; 32], NOW).is_err());
        }
    }
}
