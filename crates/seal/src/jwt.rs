//! Gateway tokens: JWTs (RFC 7519) of one kind only, by RFC 8725's advice.
//!
//! A token is `{"alg":"EdDSA","typ":"JWT","kid":…}` and claims with at least `exp`, `aud` and
//! `jti`, signed with Ed25519. The verifier's key decides the algorithm, never the token.
//!
//! Must never accept: another `alg`, an unknown header field (`crit`, `b64`, `jwk`, …), a key
//! that stands twice, a time that is no integer (CVE-2026-25537), a life over an hour, or more
//! than 4 KiB.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::json;
use crate::limits::{JWT_LEEWAY_S, JWT_MAX_BYTES, JWT_TTL_MAX_S};
use crate::sign::{SigningKey, VerifyingKey};

/// Why a token was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JwtError {
    /// It was a good token until its `exp` passed; the client should get a new one.
    #[error("the token has expired")]
    Expired,
    /// It is no token of ours, for the reason inside (for the operator's log; says no claim).
    #[error("the token is invalid: {0}")]
    Invalid(&'static str),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    alg: String,
    typ: String,
    kid: String,
}

/// Signs `claims`. Unless they hold `exp`, `aud` and `jti` and stay well below 4 KiB, no verifier
/// takes the token.
///
/// # Panics
/// If the claims can't be a JSON object: a bug in their type.
#[must_use]
pub fn sign(key: &SigningKey, claims: &impl Serialize) -> String {
    let header = Header {
        alg: "EdDSA".into(),
        typ: "JWT".into(),
        kid: key.public().key_id(),
    };
    let header = json::to_vec(&header).expect("three strings are JSON");
    let claims = json::to_vec(claims).expect("the claims are a struct that JSON can hold");
    let mut token = URL_SAFE_NO_PAD.encode(header);
    token.push('.');
    URL_SAFE_NO_PAD.encode_string(claims, &mut token);
    let signature = key.sign_raw(token.as_bytes());
    token.push('.');
    URL_SAFE_NO_PAD.encode_string(signature, &mut token);
    token
}

/// The claims of `token`, if one of `keys` signed it for `aud` and it is in force at `now_s`
/// (Unix time, seconds).
///
/// # Errors
/// [`JwtError::Expired`] only when nothing else is wrong with it.
pub fn verify<T: DeserializeOwned>(
    token: &str,
    keys: &[VerifyingKey],
    aud: &str,
    now_s: i64,
) -> Result<T, JwtError> {
    let payload = verify_signature(token, keys)?;
    let claims = json::parse_strict(&payload).map_err(JwtError::Invalid)?;
    let expired = check_claims(&claims, aud, now_s)?;
    let typed = json::parse_as(&payload).map_err(JwtError::Invalid)?;
    if expired {
        Err(JwtError::Expired)
    } else {
        Ok(typed)
    }
}

/// The audience a token *claims*, **unverified**: for finding the keys and the route to verify it
/// with, and for nothing else.
#[must_use]
pub fn peek_aud(token: &str) -> Option<String> {
    let (_, payload, _) = split(token).ok()?;
    let claims = json::parse_strict(&decode(payload).ok()?).ok()?;
    claims.get("aud")?.as_str().map(str::to_owned)
}

fn verify_signature(token: &str, keys: &[VerifyingKey]) -> Result<Vec<u8>, JwtError> {
    let (header, payload, signature) = split(token)?;
    let decoded = json::parse_strict(&decode(header)?)
        .ok()
        .filter(Value::is_object) // serde would take an array for a struct.
        .and_then(|header| serde_json::from_value::<Header>(header).ok())
        .ok_or(JwtError::Invalid(
            "the header must be exactly alg, typ and kid",
        ))?;
    if decoded.alg != "EdDSA" {
        return Err(JwtError::Invalid("alg must be EdDSA"));
    }
    if decoded.typ != "JWT" {
        return Err(JwtError::Invalid("typ must be JWT"));
    }
    let signature = decode(signature)?;
    let signed = &token.as_bytes()[..header.len() + 1 + payload.len()];
    // A key id is 32 bits, so two keys may share one.
    let mut named = keys
        .iter()
        .filter(|key| key.key_id() == decoded.kid)
        .peekable();
    if named.peek().is_none() {
        return Err(JwtError::Invalid("kid names no key in use"));
    }
    if !named.any(|key| key.verify_raw(signed, &signature).is_ok()) {
        return Err(JwtError::Invalid("the signature does not hold"));
    }
    decode(payload)
}

/// Checks the registered claims; `Ok(true)` means its time is over.
fn check_claims(claims: &Value, aud: &str, now_s: i64) -> Result<bool, JwtError> {
    let Some(claims) = claims.as_object() else {
        return Err(JwtError::Invalid("the claims must be an object"));
    };
    let time = |name: &str| match claims.get(name) {
        None => Ok(None),
        // A time must be a whole number that is not negative; a string or null is not "absent".
        Some(value) => match value.as_i64().filter(|time_s| *time_s >= 0) {
            Some(time_s) => Ok(Some(time_s)),
            None => Err(JwtError::Invalid("exp, nbf and iat must be whole seconds")),
        },
    };
    let (exp, nbf, iat) = (time("exp")?, time("nbf")?, time("iat")?);
    let exp_s = exp.ok_or(JwtError::Invalid("exp is missing"))?;
    match claims.get("aud") {
        Some(Value::String(for_whom)) if for_whom == aud => {}
        Some(Value::String(_)) => return Err(JwtError::Invalid("aud is another audience")),
        _ => return Err(JwtError::Invalid("aud must be one string")),
    }
    if !matches!(claims.get("jti"), Some(Value::String(id)) if !id.is_empty()) {
        return Err(JwtError::Invalid("jti must be a string that is not empty"));
    }
    let latest_start_s = now_s.saturating_add(JWT_LEEWAY_S);
    if iat.is_some_and(|iat_s| iat_s > latest_start_s) {
        return Err(JwtError::Invalid("iat lies in the future"));
    }
    if nbf.is_some_and(|nbf_s| nbf_s > latest_start_s) {
        return Err(JwtError::Invalid("nbf lies in the future"));
    }
    // Without iat the life is counted from now on.
    let start_s = iat.unwrap_or(now_s.min(exp_s));
    let ttl_s = exp_s.saturating_sub(start_s);
    if !(0..=JWT_TTL_MAX_S).contains(&ttl_s) {
        return Err(JwtError::Invalid(
            "it lives longer than an hour, or ends before it starts",
        ));
    }
    Ok(exp_s.saturating_add(JWT_LEEWAY_S) <= now_s)
}

fn split(token: &str) -> Result<(&str, &str, &str), JwtError> {
    if token.len() > JWT_MAX_BYTES {
        return Err(JwtError::Invalid("longer than 4 KiB"));
    }
    let mut words = token.split('.');
    match (words.next(), words.next(), words.next(), words.next()) {
        (Some(header), Some(payload), Some(signature), None) => Ok((header, payload, signature)),
        _ => Err(JwtError::Invalid("must have three parts")),
    }
}

fn decode(word: &str) -> Result<Vec<u8>, JwtError> {
    URL_SAFE_NO_PAD
        .decode(word)
        .map_err(|_| JwtError::Invalid("must be canonical base64url"))
}
