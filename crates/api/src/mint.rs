//! Mint's socket: who may. Mint checks each credential itself and takes nobody's word for it.

use model::{AccountId, KeyId, WorkspaceId};
use serde::{Deserialize, Serialize};

/// A client's credential, as the edge received it.
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Credential {
    /// `X-Client-ID` and `X-Client-Secret`.
    ApiKey {
        /// The key's id.
        client_id: String,
        /// Its secret.
        client_secret: String,
    },
    /// `Authorization: Bearer`.
    Bearer {
        /// The token.
        token: String,
    },
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::ApiKey { .. } => "ApiKey(..)",
            Self::Bearer { .. } => "Bearer(..)",
        })
    }
}

/// A request to mint.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Op {
    /// Checks a credential and asserts who it is, for one request; the edge only.
    /// Answer: [`Signed`] assertion.
    Assert {
        /// The credential.
        credential: Credential,
        /// Hash of the request it came with, hex.
        binding: String,
    },
    /// Registers a workspace under the assertion's account; control only. `identity` is the
    /// KMS's signed statement. Answer: [`Signed`] [`TokenState`]. Idempotent.
    WorkspaceRegister {
        /// The client's assertion.
        assertion: String,
        /// Signed `kms::Identity`.
        identity: String,
    },
    /// Forgets a workspace and revokes its tokens: a closing act. Answer: `true`. Idempotent.
    WorkspaceForget {
        /// The client's assertion or a standing policy.
        authority: String,
        /// The workspace.
        workspace: WorkspaceId,
    },
    /// A gateway token for one workspace. Answer: [`Gateway`].
    GatewayToken {
        /// The client's assertion.
        assertion: String,
        /// The workspace.
        workspace: WorkspaceId,
        /// Raise the epoch first: every earlier token and live stream ends.
        rotate: bool,
    },
    /// Enables or disables the runtime API of a workspace; disabling raises the epoch.
    /// Answer: [`Signed`] [`TokenState`].
    RuntimeEnable {
        /// The client's assertion.
        assertion: String,
        /// The workspace.
        workspace: WorkspaceId,
        /// On or off.
        enabled: bool,
    },
    /// The raw connection token. Answer: [`Raw`].
    RawToken {
        /// The client's assertion.
        assertion: String,
        /// The workspace.
        workspace: WorkspaceId,
        /// Make a new one first: the old one is refused from then on.
        rotate: bool,
    },
    /// The token state now; control, host and edge. Answer: [`Signed`] [`TokenState`].
    TokenState {
        /// The workspace.
        workspace: WorkspaceId,
    },
    /// Token states that changed after `since`, waiting up to `wait_ms` for one; the edge.
    /// Answer: [`Changes`].
    Changes {
        /// The last `seq` the caller has; 0 for all.
        since: u64,
        /// At most 30,000 ms.
        wait_ms: u64,
    },
    /// A policy that lets the platform do a closed set of acts while no client is at hand.
    /// Answer: [`Signed`] [`Policy`].
    PolicySign {
        /// The client's assertion.
        assertion: String,
        /// The workspace.
        workspace: WorkspaceId,
        /// What it allows.
        acts: Vec<PolicyAct>,
    },
    /// Makes an account; root only. Answer: [`AccountMade`].
    AccountCreate {
        /// A name for people, ≤ 255 characters.
        name: String,
    },
    /// Makes an API key; root only. Answer: [`KeyMade`].
    KeyCreate {
        /// The account.
        account: AccountId,
        /// A name for people.
        name: String,
    },
    /// Revokes an API key at once; root only. Answer: `true`.
    KeyRevoke {
        /// The key.
        key: KeyId,
    },
}

/// A signed document, as text.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Signed {
    /// `seal::sign::Signed`.
    pub signed: String,
}

/// An actor assertion: this credential was checked for this very request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Assertion {
    /// The account.
    pub account: AccountId,
    /// The API key.
    pub key: KeyId,
    /// Hash of the request, hex.
    pub binding: String,
    /// Issued, ms since the epoch.
    pub iat_ms: u64,
    /// Ends, at most 30 s later.
    pub exp_ms: u64,
    /// 16 random bytes, hex; used once by control.
    pub jti: String,
}

/// An act that a standing policy allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyAct {
    /// Start again after a stop that nobody asked for.
    Restart,
    /// Delete at the end of its time-to-live.
    Expire,
    /// Stop or pause at the end of its time-to-live, or when nobody uses it.
    Stop,
    /// Put to sleep when nobody uses it, or at the end of its time-to-live.
    Sleep,
    /// Wake when its gateway is asked for.
    Wake,
}

/// A standing policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// The account.
    pub account: AccountId,
    /// The API key that asked for it.
    pub key: KeyId,
    /// The workspace.
    pub workspace: WorkspaceId,
    /// What it allows.
    pub acts: Vec<PolicyAct>,
    /// Issued, ms since the epoch.
    pub iat_ms: u64,
}

/// What edge and guest need to judge tokens of a workspace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenState {
    /// The workspace.
    pub workspace: WorkspaceId,
    /// Its account.
    pub account: AccountId,
    /// Gateway tokens below this epoch are revoked; only grows.
    pub epoch: u64,
    /// SHA-256 of the raw connection token, hex.
    pub raw_hash: String,
    /// The runtime API answers.
    pub enabled: bool,
    /// The workspace is gone: nothing of it is valid.
    pub gone: bool,
    /// Ed25519 public key of the guest's identity, hex.
    pub identity_pub: String,
    /// Grows with every change of any workspace.
    pub seq: u64,
}

/// Claims of a gateway token (EdDSA JWT).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatewayClaims {
    /// Always `casemate`.
    pub iss: String,
    /// The account.
    pub sub: String,
    /// The workspace.
    pub aud: String,
    /// Issued, s since the epoch.
    pub iat: i64,
    /// Ends, at most 3,600 s later.
    pub exp: i64,
    /// 16 random bytes, hex.
    pub jti: String,
    /// The workspace's epoch when it was issued.
    pub epoch: u64,
}

/// Answer to [`Op::GatewayToken`].
#[derive(Serialize, Deserialize)]
pub struct Gateway {
    /// The token.
    pub token: String,
    /// When it ends, s since the epoch.
    pub exp: i64,
    /// Signed [`TokenState`] that it is valid under.
    pub state: String,
}

/// Answer to [`Op::RawToken`].
#[derive(Serialize, Deserialize)]
pub struct Raw {
    /// 256 bits, hex.
    pub token: String,
    /// Signed [`TokenState`] that it is valid under.
    pub state: String,
}

/// Answer to [`Op::Changes`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Changes {
    /// Ask with this next.
    pub seq: u64,
    /// Signed [`TokenState`]s; at most 1,000 an answer.
    pub states: Vec<String>,
}

/// Answer to [`Op::AccountCreate`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AccountMade {
    /// The account.
    pub account: AccountId,
}

/// Answer to [`Op::KeyCreate`]; the secret is shown once.
#[derive(Serialize, Deserialize)]
pub struct KeyMade {
    /// `X-Client-ID`.
    pub client_id: KeyId,
    /// `X-Client-Secret`.
    pub client_secret: String,
}
