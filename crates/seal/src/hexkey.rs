//! Public keys as 64 lowercase hex digits, the only text form.

use crate::SealError;

/// Decodes exactly 64 lowercase hex digits.
pub(crate) fn decode_32(text: &str, what: &'static str) -> Result<[u8; 32], SealError> {
    let wrong = SealError::Malformed {
        what,
        why: "must be 64 lowercase hex digits",
    };
    if text.len() != 64 || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(wrong);
    }
    let mut out = [0; 32];
    hex::decode_to_slice(text, &mut out).map_err(|_| wrong)?;
    Ok(out)
}

/// Gives a `struct Key([u8; 32])` with `from_bytes` its text forms and serde.
macro_rules! hex_key {
    ($key:ident, $what:literal) => {
        impl $key {
            /// Reads 64 lowercase hex digits.
            ///
            /// # Errors
            /// If it is anything else.
            pub fn from_hex(text: &str) -> Result<Self, crate::SealError> {
                Self::from_bytes(&crate::hexkey::decode_32(text, $what)?)
            }

            /// 64 lowercase hex digits.
            #[must_use]
            pub fn to_hex(&self) -> String {
                hex::encode(self.0)
            }

            /// The 32 bytes.
            #[must_use]
            pub fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// The 32 bytes.
            #[must_use]
            pub fn to_bytes(&self) -> [u8; 32] {
                self.0
            }
        }

        impl std::fmt::Display for $key {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.to_hex())
            }
        }

        impl std::fmt::Debug for $key {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!(stringify!($key), "({})"), self.to_hex())
            }
        }

        impl std::str::FromStr for $key {
            type Err = crate::SealError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Self::from_hex(text)
            }
        }

        impl serde::Serialize for $key {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.to_hex())
            }
        }

        impl<'de> serde::Deserialize<'de> for $key {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                Self::from_hex(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}
pub(crate) use hex_key;
