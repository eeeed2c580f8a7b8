//! The channel between warden and casemate-volumes: one JSON message a packet, each with one
//! answer. Ids and numbers only.

use api::Error;
use model::{Purpose, WorkspaceId};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Longest message, bytes.
pub const MESSAGE_MAX_BYTES: usize = 4 << 10;

/// One object of one workspace. As text: its directory's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Name {
    /// The workspace.
    pub workspace: WorkspaceId,
    /// The object.
    pub object: Purpose,
}

impl Name {
    /// The workspace's disk.
    #[must_use]
    pub fn disk(workspace: &WorkspaceId) -> Self {
        Self {
            workspace: workspace.clone(),
            object: Purpose::Disk,
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.workspace, self.object.label())
    }
}

/// What an object is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// To be written; one that is not there is begun.
    Write,
    /// To be written from the beginning, beside the one that is there, if any.
    New,
    /// To be read.
    Read,
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Ask {
    /// Opens both files and locks the volume. They come with the answer: volume, sidecar.
    Open {
        /// Which.
        of: Name,
        /// What for.
        how: How,
    },
    /// Makes the one that was begun the object, durably, in the place of the one before. Idempotent.
    Keep {
        /// Which.
        of: Name,
        /// Inode of the volume that was begun.
        inode: u64,
    },
    /// Removes the one that was begun. Idempotent.
    ForgetNew {
        /// Which.
        of: Name,
    },
    /// Removes the object, durably, also while a process reads it: from then on only that process
    /// has it. Idempotent.
    Spend {
        /// Which.
        of: Name,
    },
    /// Removes all that was begun and that no process holds. Idempotent.
    SweepNew,
    /// Removes one object or all of the workspace, durably. Idempotent.
    Erase {
        /// Whose.
        workspace: WorkspaceId,
        /// Which; none: all.
        object: Option<Purpose>,
    },
    /// What the object takes up.
    Bytes {
        /// Which.
        of: Name,
    },
    /// What there is of the workspace.
    List {
        /// Whose.
        workspace: WorkspaceId,
    },
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Said {
    /// It is so.
    Done,
    /// The files come with this.
    Opened {
        /// They are empty: it was begun.
        fresh: bool,
    },
    /// Bytes allocated.
    Bytes(u64),
    /// The objects that there are.
    Objects(Vec<Purpose>),
    /// It could not.
    Failed(Error),
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn no_text_of_a_request_is_a_path() {
        for id in [
            "../../etc",
            "ws_00000000000000AA",
            "ws_/etc/passwd00000",
            "",
        ] {
            let text = format!(r#"{{"list":{{"workspace":"{id}"}}}}"#);
            assert!(serde_json::from_str::<Ask>(&text).is_err(), "{text}");
        }
        let object = r#"{"erase":{"workspace":"ws_00000000000000aa","object":"../disk"}}"#;
        assert!(serde_json::from_str::<Ask>(object).is_err());
    }

    proptest! {
        #[test]
        fn survives_any_message(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = serde_json::from_slice::<Ask>(&bytes);
            let _ = serde_json::from_slice::<Said>(&bytes);
        }

        #[test]
        fn a_name_is_one_plain_component(raw: [u8; 8], object in 0..Purpose::ALL.len()) {
            let name = Name {
                workspace: WorkspaceId::from_bytes(raw),
                object: Purpose::ALL[object],
            };
            let plain = |b: u8| {
                b.is_ascii_lowercase() || b.is_ascii_digit() || b"_.-".contains(&b)
            };
            prop_assert!(name.to_string().bytes().all(plain));
        }
    }
}
