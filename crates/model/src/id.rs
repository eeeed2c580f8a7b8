//! Identifiers: a prefix and 16 lowercase hexadecimal digits, opaque to clients.
//!
//! An id is the only thing that crosses a privilege boundary by name, so its parser is strict:
//! an id can never hold a path separator, a NUL, white space or an upper-case twin.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Why a string is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a valid id: expected `{prefix}` followed by 16 lowercase hexadecimal digits")]
pub struct IdError {
    /// The prefix that was expected.
    pub prefix: &'static str,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The prefix of every id of this kind.
            pub const PREFIX: &'static str = $prefix;

            /// The id whose 8 bytes are `raw`.
            #[must_use]
            pub fn from_bytes(raw: [u8; 8]) -> Self {
                Self(format!("{}{:016x}", $prefix, u64::from_be_bytes(raw)))
            }

            /// The id as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(s: &str) -> Result<Self, IdError> {
                let ok = s.strip_prefix($prefix).is_some_and(|hex| {
                    hex.len() == 16 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
                });
                if ok { Ok(Self(s.to_owned())) } else { Err(IdError { prefix: $prefix }) }
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(s: String) -> Result<Self, IdError> {
                s.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// One image of a workspace's memory or disk at rest; a new image is a new object, with a key
    /// of its own.
    ObjectId,
    "obj_"
);
id!(
    /// A workspace.
    WorkspaceId,
    "ws_"
);
id!(
    /// One start of a workspace: a new one for every boot, so that a key released for one start
    /// is of no use to another.
    StartId,
    "st_"
);
id!(
    /// An account: the tenant boundary.
    AccountId,
    "acct_"
);
id!(
    /// An API key's public half (`X-Client-ID`).
    KeyId,
    "key_"
);
id!(
    /// One request through the platform, the same in every log.
    RequestId,
    "req_"
);
id!(
    /// A machine that runs workspaces.
    HostId,
    "host_"
);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refuses_what_is_not_an_id() {
        for bad in [
            "",
            "ws_",
            "ws_0123456789abcde",
            "ws_0123456789abcdef0",
            "ws_0123456789ABCDEF",
            "st_0123456789abcdef",
            "ws_../../etc/passwd",
            "ws_0123456789abcde\0",
            " ws_0123456789abcdef",
        ] {
            assert!(bad.parse::<WorkspaceId>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn round_trips(raw: [u8; 8]) {
            let id = WorkspaceId::from_bytes(raw);
            prop_assert_eq!(id.as_str().parse::<WorkspaceId>().unwrap(), id);
        }

        #[test]
        fn never_accepts_a_path(s in ".*") {
            if let Ok(id) = s.parse::<WorkspaceId>() {
                prop_assert!(id.as_str().bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'));
            }
        }
    }
}
