//! Whether a request may have what it asks for: receipt, authority, lease and attestation, checked
//! against each other. No IO and no state but the caller's clock.
//!
//! Nothing of a request is believed but what one of four keys signed: the log's (receipt), mint's
//! (assertion, policy), a machine's (attestation); and the log's word for which process wrote the
//! entry. A refusal is one word, for the log.

use crate::limits::{DESTROY_AUTHORITY_MAX_MS, NONCE_HEX_CHARS, SKEW_MS};
use api::audit::{Entry, LEASE_ALSO_MAX, Lease, Object, Phase, Stamped};
use api::context;
use api::kms::{Attestation, CREATE_EVENT, backing_of};
use api::limits::{ASSERTION_MAX_MS, LEASE_MAX_MS};
use api::mint::{Assertion, Policy, PolicyAct};
use model::{AccountId, HostId, KeyId, Purpose, WorkspaceId};
use seal::hpke;
use seal::sign::{Signed, VerifyingKey};
use std::collections::BTreeMap;
use tlog::receipt::Receipt;

/// Whose word counts.
#[derive(Debug, Clone)]
pub struct Trust {
    /// The log's checkpoint key.
    pub audit: VerifyingKey,
    /// Origin of the log of class `host`, where intents stand.
    pub origin: String,
    /// Mint's key.
    pub mint: VerifyingKey,
    /// The gateway tokens' key; the KMS only passes it on.
    pub gateway: VerifyingKey,
    /// The edge's identity; the KMS only passes it on.
    pub edge: VerifyingKey,
    /// Machines and their attestation keys.
    pub hosts: BTreeMap<HostId, VerifyingKey>,
    /// SHA-256 (hex) of executables that may hold a disk's key.
    pub disk_measurements: Vec<String>,
}

macro_rules! refusals {
    ($($name:ident = $text:literal, $says:literal;)+) => {
        /// Why a request was refused.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Refusal { $(#[doc = $says] $name,)+ }

        impl Refusal {
            /// All of them.
            pub const ALL: &'static [Refusal] = &[$(Refusal::$name),+];

            /// The word in the log and in metrics.
            #[must_use]
            pub fn code(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }

            /// The sentence for the caller.
            #[must_use]
            pub fn sentence(self) -> &'static str {
                match self { $(Self::$name => $says,)+ }
            }
        }
    };
}

refusals! {
    Receipt = "receipt", "the receipt does not prove an entry of this installation's log";
    Writer = "writer", "the intent was not written by control";
    Intent = "intent", "the entry is no intent to do this";
    Lease = "lease", "the intent holds no well-formed lease for this workspace";
    LeaseTime = "lease_time", "the lease is over, too long, or not of now; ask again";
    LeaseRestart = "lease_restart", "the lease is older than this run of the KMS; ask again";
    LeaseUsed = "lease_used", "the lease was used already";
    Busy = "busy", "too many leases at once; ask again";
    Authority = "authority", "neither mint's assertion nor its policy stands behind the intent";
    AuthorityTime = "authority_time", "the authority is not of the time of the intent";
    AuthorityAct = "authority_act", "the authority does not allow this act on this workspace";
    AuthorityUsed = "authority_used", "the assertion opened another workspace already";
    Attestation = "attestation", "the attestation is malformed or not by the lease's machine";
    AttestationLease = "attestation_lease", "attestation and lease do not match";
    AttestationTime = "attestation_time", "the attestation is not of now";
    Measurement = "measurement", "the executable is not one that may hold keys";
    Account = "account", "the key belongs to another account";
    Unknown = "unknown", "there is no such key";
    Destroyed = "destroyed", "the key is destroyed";
    Peer = "peer", "this process may not ask for this";
    Bounds = "bounds", "a field is out of bounds";
    Anchor = "anchor", "the statement is not by the workspace's disk, or of another history of it";
    Image = "image", "it is not the last image of its kind, or memory that was woken already; start the workspace from its disk";
    Passphrase = "passphrase", "the passphrase is wrong";
}

/// Who stands behind an act.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authority {
    /// A client, for one request.
    Assertion(Assertion),
    /// The owner, ahead of time.
    Policy(Policy),
}

impl Authority {
    /// The account.
    #[must_use]
    pub fn account(&self) -> &AccountId {
        match self {
            Self::Assertion(a) => &a.account,
            Self::Policy(p) => &p.account,
        }
    }

    /// The API key behind it.
    #[must_use]
    pub fn key(&self) -> &KeyId {
        match self {
            Self::Assertion(a) => &a.key,
            Self::Policy(p) => &p.key,
        }
    }
}

/// A verified intent.
#[derive(Debug, Clone)]
pub struct Intent {
    /// The entry.
    pub entry: Entry,
    /// Its index in the log.
    pub index: u64,
    /// When the log took it, ms.
    pub time_ms: u64,
    /// SHA-256 of its leaf's bytes.
    pub leaf_digest: [u8; 32],
}

/// A release that passed every check but single use and the key's own account.
#[derive(Debug, Clone)]
pub struct Cleared {
    /// The intent.
    pub intent: Intent,
    /// Its lease.
    pub lease: Lease,
    /// What of it is released.
    pub object: Object,
    /// Who stands behind it.
    pub authority: Authority,
    /// What the machine says.
    pub attestation: Attestation,
    /// The attested process' key.
    pub hpke_pub: hpke::PublicKey,
}

impl Cleared {
    /// The number of the act: its intent's place in the log and 1, so that a later act has a higher
    /// one.
    pub(crate) fn run(&self) -> u64 {
        self.intent.index.saturating_add(1)
    }
}

/// Checks a release: everything that does not need the store.
///
/// `floor` is the log index of this run's own first entry: an intent before it is refused, so
/// that forgetting used nonces at a restart opens nothing, whatever the clock did meanwhile.
///
/// # Errors
/// The first [`Refusal`].
pub fn release(
    trust: &Trust,
    receipt: &serde_json::Value,
    attestation: &str,
    floor: u64,
    now_ms: u64,
) -> Result<Cleared, Refusal> {
    let intent = intent(trust, receipt)?;
    if intent.index <= floor {
        return Err(Refusal::LeaseRestart);
    }
    let lease = intent.entry.lease.clone().ok_or(Refusal::Lease)?;
    let subject_differs = intent
        .entry
        .subject
        .as_deref()
        .is_some_and(|s| s != lease.workspace.as_str());
    if !is_hex(&lease.nonce, NONCE_HEX_CHARS)
        || !is_hex(&lease.config_digest, 64)
        || subject_differs
        || !is_well_formed(&lease)
    {
        return Err(Refusal::Lease);
    }
    if lease.exp_ms <= now_ms
        || lease.exp_ms > intent.time_ms.saturating_add(LEASE_MAX_MS)
        || intent.time_ms > now_ms.saturating_add(SKEW_MS)
    {
        return Err(Refusal::LeaseTime);
    }
    let authority = authority_at(trust, &intent)?;
    if !backs(&intent, &lease, &authority) {
        return Err(Refusal::AuthorityAct);
    }
    let (attestation, hpke_pub) = attested(trust, &lease, attestation, &intent, now_ms)?;
    let object = lease
        .objects()
        .find(|o| o.workspace == attestation.workspace && o.purpose == attestation.purpose)
        .ok_or(Refusal::AttestationLease)?;
    Ok(Cleared {
        intent,
        lease,
        object,
        authority,
        attestation,
        hpke_pub,
    })
}

/// Checks the making of a key; answers the workspace, its account, and the intent.
///
/// # Errors
/// The first [`Refusal`].
pub fn create(
    trust: &Trust,
    receipt: &serde_json::Value,
    now_ms: u64,
) -> Result<(WorkspaceId, Authority, Intent), Refusal> {
    let intent = intent(trust, receipt)?;
    if intent.entry.event != CREATE_EVENT {
        return Err(Refusal::Intent);
    }
    let named = intent
        .entry
        .subject
        .as_deref()
        .and_then(|s| s.parse::<WorkspaceId>().ok());
    let leased = intent.entry.lease.as_ref().map(|l| l.workspace.clone());
    let workspace = match (named, leased) {
        (Some(a), Some(b)) if a != b => return Err(Refusal::Lease),
        (Some(w), _) | (None, Some(w)) => w,
        (None, None) => return Err(Refusal::Intent),
    };
    if intent.time_ms > now_ms.saturating_add(SKEW_MS)
        || now_ms > intent.time_ms.saturating_add(LEASE_MAX_MS + SKEW_MS)
    {
        return Err(Refusal::LeaseTime);
    }
    match authority_at(trust, &intent)? {
        Authority::Policy(_) => Err(Refusal::AuthorityAct),
        authority => Ok((workspace, authority, intent)),
    }
}

/// Checks what allows the destruction of a key.
///
/// # Errors
/// The first [`Refusal`].
pub fn destroy(
    trust: &Trust,
    workspace: &WorkspaceId,
    authority: &str,
    now_ms: u64,
) -> Result<Authority, Refusal> {
    let authority = self::authority(trust, authority)?;
    match &authority {
        Authority::Assertion(a) => {
            let fresh = a.iat_ms <= now_ms.saturating_add(SKEW_MS)
                && now_ms <= a.iat_ms.saturating_add(DESTROY_AUTHORITY_MAX_MS);
            if !fresh {
                return Err(Refusal::AuthorityTime);
            }
        }
        Authority::Policy(p) => {
            if p.workspace != *workspace || !p.acts.contains(&PolicyAct::Expire) {
                return Err(Refusal::AuthorityAct);
            }
        }
    }
    Ok(authority)
}

/// Opens a receipt: an intent that control wrote into this installation's log.
fn intent(trust: &Trust, receipt: &serde_json::Value) -> Result<Intent, Refusal> {
    let receipt: Receipt = serde_json::from_value(receipt.clone()).map_err(|_| Refusal::Receipt)?;
    let verified = receipt
        .verify(&trust.audit, &trust.origin)
        .map_err(|_| Refusal::Receipt)?;
    let stamped: Stamped =
        serde_json::from_slice(&verified.payload).map_err(|_| Refusal::Receipt)?;
    if stamped.process != "control" {
        return Err(Refusal::Writer);
    }
    if stamped.entry.phase != Phase::Intent {
        return Err(Refusal::Intent);
    }
    Ok(Intent {
        entry: stamped.entry,
        index: verified.index,
        time_ms: verified.time_ms,
        leaf_digest: verified.leaf_sha256,
    })
}

/// The authority of an intent, in force when the log took it.
fn authority_at(trust: &Trust, intent: &Intent) -> Result<Authority, Refusal> {
    let text = intent
        .entry
        .authority
        .as_deref()
        .ok_or(Refusal::Authority)?;
    let authority = authority(trust, text)?;
    let (from, until) = match &authority {
        Authority::Assertion(a) => (a.iat_ms, a.exp_ms),
        Authority::Policy(p) => (p.iat_ms, u64::MAX),
    };
    let in_force = intent.time_ms.saturating_add(SKEW_MS) >= from
        && intent.time_ms <= until.saturating_add(SKEW_MS);
    if !in_force {
        return Err(Refusal::AuthorityTime);
    }
    if intent
        .entry
        .account
        .as_ref()
        .is_some_and(|a| a != authority.account())
    {
        return Err(Refusal::Account);
    }
    Ok(authority)
}

fn authority(trust: &Trust, text: &str) -> Result<Authority, Refusal> {
    let signed = Signed::parse(text).map_err(|_| Refusal::Authority)?;
    if let Ok(a) = signed.verify::<Assertion>(&trust.mint, context::ASSERTION) {
        let life_ms = a.exp_ms.checked_sub(a.iat_ms);
        if life_ms.is_none_or(|ms| ms > ASSERTION_MAX_MS) || !is_hex(&a.binding, 64) {
            return Err(Refusal::Authority);
        }
        return Ok(Authority::Assertion(a));
    }
    signed
        .verify::<Policy>(&trust.mint, context::POLICY)
        .map(Authority::Policy)
        .map_err(|_| Refusal::Authority)
}

/// Whether a lease names each object once: a disk without an id, everything else with one.
fn is_well_formed(lease: &Lease) -> bool {
    let all: Vec<Object> = lease.objects().take(LEASE_ALSO_MAX + 2).collect();
    let ids = all
        .iter()
        .all(|o| o.id.is_none() == (o.purpose == Purpose::Disk));
    let distinct = all.iter().enumerate().all(|(n, o)| {
        all[..n]
            .iter()
            .all(|p| (&p.workspace, p.purpose) != (&o.workspace, o.purpose))
    });
    all.len() <= LEASE_ALSO_MAX + 1 && ids && distinct
}

/// Whether the intent's event, and who stands behind it, may open all that its lease names. One
/// object too many spoils the whole lease.
fn backs(intent: &Intent, lease: &Lease, authority: &Authority) -> bool {
    let Some(backing) = backing_of(&intent.entry.event) else {
        return false;
    };
    let by = match authority {
        Authority::Assertion(_) => true,
        Authority::Policy(p) => {
            p.workspace == lease.workspace
                && backing.policy.is_some_and(|act| p.acts.contains(&act))
        }
    };
    by && lease.objects().all(|o| {
        let may = if o.workspace == lease.workspace {
            backing.own
        } else {
            backing.source
        };
        may.contains(&o.purpose)
    })
}

fn attested(
    trust: &Trust,
    lease: &Lease,
    text: &str,
    intent: &Intent,
    now_ms: u64,
) -> Result<(Attestation, hpke::PublicKey), Refusal> {
    // The machine that the lease names, not one that the attestation names.
    let key = trust.hosts.get(&lease.host).ok_or(Refusal::Attestation)?;
    let a: Attestation = Signed::parse(text)
        .and_then(|signed| signed.verify(key, context::ATTESTATION))
        .map_err(|_| Refusal::Attestation)?;
    let same = a.host == lease.host && a.start_id == lease.start_id && a.nonce == lease.nonce;
    if !same {
        return Err(Refusal::AttestationLease);
    }
    if a.time_ms.saturating_add(SKEW_MS) < intent.time_ms
        || a.time_ms > now_ms.saturating_add(SKEW_MS)
    {
        return Err(Refusal::AttestationTime);
    }
    if !trust.disk_measurements.contains(&a.measurement) {
        return Err(Refusal::Measurement);
    }
    let hpke_pub = hpke::PublicKey::from_hex(&a.hpke_pub).map_err(|_| Refusal::Attestation)?;
    Ok((a, hpke_pub))
}

fn is_hex(text: &str, chars: usize) -> bool {
    text.len() == chars && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}
