//! The one error of this crate. It names the operation and the subject, never a secret.

/// Why an operation of this crate failed.
///
/// Texts are fixed strings or lengths: no key, plaintext, token or parser message (which would
/// quote its input) is ever inside.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// A ciphertext is not what was sealed under this key, info and associated data.
    #[error("{what}: can't open it: wrong key, wrong context, or it was changed")]
    Open {
        /// What was being opened.
        what: &'static str,
    },
    /// A signature does not hold for this key, context and content.
    #[error("{what}: the signature does not hold: wrong key, wrong context, or it was changed")]
    Signature {
        /// What was being verified.
        what: &'static str,
    },
    /// The input is not in the one form that is accepted.
    #[error("{what}: {why}")]
    Malformed {
        /// What was being parsed.
        what: &'static str,
        /// Which rule it breaks.
        why: &'static str,
    },
    /// The input is beyond its bound.
    #[error("{what}: longer than {max_bytes} bytes")]
    TooLarge {
        /// What was too long.
        what: &'static str,
        /// The bound.
        max_bytes: usize,
    },
    /// The cryptographic library refused; for sound inputs this means it is out of memory.
    #[error("{operation}: the cryptographic library refused")]
    Crypto {
        /// What was asked of it.
        operation: &'static str,
    },
    /// The operating system refused.
    #[error("{operation}: {hint}")]
    Os {
        /// What was asked of it.
        operation: &'static str,
        /// What the operator can do about it.
        hint: &'static str,
        /// Its answer.
        #[source]
        source: std::io::Error,
    },
    /// A certificate or TLS configuration can't be made.
    #[cfg(feature = "tls")]
    #[error("{operation}: {detail}")]
    Tls {
        /// What was being made.
        operation: &'static str,
        /// The TLS library's reason (it speaks of public certificates only).
        detail: String,
    },
}
