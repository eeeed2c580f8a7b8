//! The channel between warden and casemate-volumes: one JSON message a packet, each with one
//! answer. Ids and numbers only.

use api::Error;
use api::warden::Object;
use model::{ObjectId, Purpose, WorkspaceId};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Longest message, bytes.
pub const MESSAGE_MAX_BYTES: usize = 8 << 10;

/// One object of one workspace. As text: its directory's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Name {
    /// The workspace.
    pub workspace: WorkspaceId,
    /// The object.
    pub object: Purpose,
    /// Which archive, or of which snapshot: of everything else there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<ObjectId>,
}

impl Name {
    /// An object of which there is one.
    #[must_use]
    pub fn new(workspace: &WorkspaceId, object: Purpose) -> Self {
        Self {
            workspace: workspace.clone(),
            object,
            id: None,
        }
    }

    /// The workspace's disk.
    #[must_use]
    pub fn disk(workspace: &WorkspaceId) -> Self {
        Self::new(workspace, Purpose::Disk)
    }

    /// What of the workspace has this text.
    #[must_use]
    pub fn read(workspace: &WorkspaceId, text: &str) -> Option<Self> {
        let rest = text.strip_prefix(workspace.as_str())?.strip_prefix('.')?;
        let (label, id) = match rest.split_once("-obj_") {
            Some((label, hex)) => (label, Some(format!("obj_{hex}").parse().ok()?)),
            None => (rest, None),
        };
        let object = Purpose::ALL.into_iter().find(|o| o.label() == label)?;
        let name = Self {
            id,
            ..Self::new(workspace, object)
        };
        name.is_object().then_some(name)
    }

    /// Whether there can be such an object: archives and parts of snapshots have an id, and nothing
    /// else has.
    #[must_use]
    pub fn is_object(&self) -> bool {
        self.object.is_by_id() == self.id.is_some()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.workspace, self.object.label())?;
        match &self.id {
            Some(id) => write!(f, "-{id}"),
            None => Ok(()),
        }
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
    /// Removes one object or all of the workspace, durably; a part of a snapshot also while a process
    /// reads it. Idempotent.
    Erase {
        /// Whose.
        workspace: WorkspaceId,
        /// Which; none: all.
        of: Option<Name>,
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
    Objects(Vec<Object>),
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
        for of in [
            r#"{"workspace":"ws_00000000000000aa","object":"../disk"}"#,
            r#"{"workspace":"ws_00000000000000aa","object":"archive","id":"../disk"}"#,
        ] {
            let object = format!(r#"{{"bytes":{{"of":{of}}}}}"#);
            assert!(serde_json::from_str::<Ask>(&object).is_err(), "{object}");
        }
    }

    proptest! {
        #[test]
        fn survives_any_message(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = serde_json::from_slice::<Ask>(&bytes);
            let _ = serde_json::from_slice::<Said>(&bytes);
        }

        #[test]
        fn a_name_is_one_plain_component(raw: [u8; 8], id: [u8; 8], object in 0..Purpose::ALL.len()) {
            let object = Purpose::ALL[object];
            let workspace = WorkspaceId::from_bytes(raw);
            let name = Name {
                id: object.is_by_id().then(|| ObjectId::from_bytes(id)),
                ..Name::new(&workspace, object)
            };
            prop_assert_eq!(Name::read(&workspace, &name.to_string()), Some(name.clone()));
            let plain = |b: u8| {
                b.is_ascii_lowercase() || b.is_ascii_digit() || b"_.-".contains(&b)
            };
            prop_assert!(name.to_string().bytes().all(plain));
        }

        #[test]
        fn a_text_that_is_read_as_a_name_is_its_text(text in "ws_0707070707070707[.][a-z-]{0,12}(obj_[0-9a-f]{15,17})?[.a-z]{0,4}") {
            let workspace = WorkspaceId::from_bytes([7; 8]);
            if let Some(name) = Name::read(&workspace, &text) {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }
}
