//! The hash that binds a credential's assertion to one request.

use seal::hash::Sha256;

/// SHA-256 over the length-prefixed method, path with query, and body.
///
/// The edge computes it over what the client sent, control over what it received: an assertion
/// for one request is no use for another.
#[must_use]
pub fn request_hash(method: &str, path_and_query: &str, body: &[u8]) -> [u8; 32] {
    let mut h = Sha256::new();
    h.update(b"casemate/request/v1\0");
    for part in [method.as_bytes(), path_and_query.as_bytes(), body] {
        h.update(&(part.len() as u64).to_be_bytes());
        h.update(part);
    }
    h.finish()
}

#[cfg(test)]
mod tests {
    use super::request_hash;

    #[test]
    fn parts_do_not_run_together() {
        assert_ne!(
            request_hash("GET", "/a", b"b"),
            request_hash("GET", "/ab", b"")
        );
        assert_ne!(
            request_hash("GET", "/a", b""),
            request_hash("GE", "T/a", b"")
        );
    }
}
