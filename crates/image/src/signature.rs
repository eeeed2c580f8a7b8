//! Whether an image is signed by a key of the policy: cosign's "simple signing" payload.
//!
//! The signature is checked over the payload's bytes before they are parsed; what is parsed is a
//! key holder's text.
//!
//! Must never take a payload for another image, or for another name than the rule's.

use crate::error::Error;
use crate::limits::PAYLOAD_MAX_BYTES;
use crate::oci::Digest;
use crate::policy::Rule;
use crate::registry::Published;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

const KINDS: &[&str] = &[
    "cosign container image signature",
    "atomic container signature",
];

#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    identity: Identity,
    image: Image,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Identity {
    #[serde(rename = "docker-reference")]
    docker_reference: String,
}

#[derive(Deserialize)]
struct Image {
    #[serde(rename = "docker-manifest-digest")]
    docker_manifest_digest: Digest,
}

/// The id of the key whose signature holds for this image under this name.
///
/// # Errors
/// Why none does.
pub fn check(
    rule: &Rule,
    name: &str,
    digest: &Digest,
    published: &[Published],
) -> Result<String, Error> {
    let identity = rule.identity.as_deref().unwrap_or(name);
    let mut why = "no signature is published for it".to_owned();
    for one in published {
        match holds(rule, identity, digest, one) {
            Ok(key) => return Ok(key),
            Err(reason) => why = reason,
        }
    }
    Err(Error::Policy(format!(
        "{name}@{digest} must be signed by one of {} keys: {why}; sign it, or change the policy",
        rule.keys.len()
    )))
}

fn holds(rule: &Rule, identity: &str, digest: &Digest, one: &Published) -> Result<String, String> {
    let decode = |text: &str| STANDARD.decode(text).map_err(|_| "its base64 is malformed");
    let (payload, signature) = (decode(&one.payload)?, decode(&one.signature)?);
    if payload.len() as u64 > PAYLOAD_MAX_BYTES {
        return Err("its payload is too large".into());
    }
    let key = rule
        .keys
        .iter()
        .find(|k| k.verify(&payload, &signature).is_ok())
        .ok_or("its signature is by none of the keys")?;
    let payload: Payload =
        serde_json::from_slice(&payload).map_err(|e| format!("its payload is malformed: {e}"))?;
    let critical = payload.critical;
    if !KINDS.contains(&critical.kind.as_str()) {
        return Err("its payload is of another kind".into());
    }
    if critical.image.docker_manifest_digest != *digest {
        return Err("it is of another image".into());
    }
    // A tag may follow the signed name: it is not what is pulled.
    let signed = critical.identity.docker_reference;
    let rest = signed.strip_prefix(identity);
    if !rest.is_some_and(|r| r.is_empty() || r.starts_with(':') || r.starts_with('@')) {
        let signed = crate::error::show(signed.as_bytes());
        return Err(format!("it is of the name {signed}, not {identity}"));
    }
    Ok(key.key_id())
}
