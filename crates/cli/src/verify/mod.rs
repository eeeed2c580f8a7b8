//! `casemate verify [ID…]`: each claim's check does the thing, looks, and says pass, fail or
//! not yet, with what it saw.
//!
//! A check must never pass on the word of the process that it judges: it acts as a client, as a
//! stranger, or looks from the host's kernel. It leaves nothing behind.

mod world;

mod acc;
mod at_rest;
mod dsk;
mod edge;
mod iso;
mod keys;
mod logs;
mod neighbour;

use crate::probe::Probe;
use service::config::Config;
use service::paths::Paths;
use std::future::Future;
use std::pin::Pin;
use std::time::Instant;
pub use world::World;

/// Which claims to check.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Claims' ids (`ACC-1`); all that have a check unless given.
    ids: Vec<String>,
}

/// How a claim stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It is so.
    Pass,
    /// It is not.
    Fail,
    /// Part of it is not built or not set up; the evidence says which.
    NotYet,
}

/// What a check found.
#[derive(Debug, Clone)]
pub struct Finding {
    /// How the claim stands.
    pub status: Status,
    /// What was done and seen.
    pub evidence: String,
}

impl Finding {
    /// It is so.
    pub fn pass(evidence: impl Into<String>) -> anyhow::Result<Self> {
        Ok(Self {
            status: Status::Pass,
            evidence: evidence.into(),
        })
    }

    /// Part of it is not there yet.
    pub fn not_yet(evidence: impl Into<String>) -> anyhow::Result<Self> {
        Ok(Self {
            status: Status::NotYet,
            evidence: evidence.into(),
        })
    }
}

type Running<'a> = Pin<Box<dyn Future<Output = anyhow::Result<Finding>> + 'a>>;

/// A claim and what checks it. An error is a fail.
pub struct Check {
    /// The claim's id.
    pub id: &'static str,
    /// The claim in a line.
    pub claim: &'static str,
    run: for<'a> fn(&'a mut World<'_>) -> Running<'a>,
}

/// A row of the table of checks.
macro_rules! check {
    ($id:literal, $claim:literal, $f:path) => {
        Check {
            id: $id,
            claim: $claim,
            run: |w| Box::pin($f(w)),
        }
    };
}

/// Every check, in the order of the claims.
pub const CHECKS: &[Check] = &[
    check!(
        "ACC-1",
        "A new workspace, no rules and no tokens, is unreachable",
        acc::acc_1
    ),
    check!(
        "ACC-2",
        "The firewall decides which sources and ports reach it; all closed by default",
        acc::acc_2
    ),
    check!(
        "ACC-3",
        "Every request to the in-VM API needs a valid token",
        acc::acc_3
    ),
    check!(
        "ACC-5",
        "public_access opens the gateway's route to the API and nothing more",
        acc::acc_5
    ),
    check!(
        "ACC-7",
        "Short-lived signed gateway tokens, raw tokens; rotated and revoked at once",
        acc::acc_7
    ),
    check!("ISO-1", "One microVM with its own kernel each", iso::iso_1),
    check!(
        "ISO-2",
        "The VMM runs under a seccomp allow-list that kills",
        iso::iso_2
    ),
    check!(
        "ISO-3",
        "The VMM has its own uid, namespaces, cgroup and an empty root",
        iso::iso_3
    ),
    check!(
        "ISO-4",
        "No path to any other workspace until a rule opens it",
        iso::iso_4
    ),
    check!(
        "ISO-5",
        "The platform's services are on a network no workspace can reach",
        iso::iso_5
    ),
    check!(
        "ISO-6",
        "No call of the host side reads a guest's memory, processes or files",
        iso::iso_6
    ),
    check!(
        "ISO-7",
        "Spoofed source addresses from a workspace are dropped",
        iso::iso_7
    ),
    check!(
        "ISO-8",
        "One workspace's CPU, memory, disk and network use starve no other",
        neighbour::iso_8
    ),
    check!(
        "DSK-1",
        "A dedicated encrypted block device, which nobody else has",
        dsk::dsk_1
    ),
    check!(
        "DSK-2",
        "AES-256-XTS, a unique key per workspace",
        dsk::dsk_2
    ),
    check!("DSK-3", "Stopped means ciphertext", dsk::dsk_3),
    check!("DSK-4", "Delete destroys the key", dsk::dsk_4),
    check!(
        "DSK-5",
        "Disk I/O is limited per workspace on the host",
        dsk::dsk_5
    ),
    check!(
        "DSK-6",
        "Permanent: data survives stop and start, and no other disk is taken for it",
        dsk::dsk_6
    ),
    check!(
        "DSK-7",
        "A temporary workspace leaves no content",
        dsk::dsk_7
    ),
    check!(
        "DSK-8",
        "Snapshots and suspended memory are encrypted with the workspace's key too",
        dsk::dsk_8
    ),
    check!(
        "KMS-1",
        "A unique key per workspace, made at creation",
        keys::kms_1
    ),
    check!(
        "KMS-2",
        "Never stored in plaintext: wrapped in layers",
        keys::kms_2
    ),
    check!("KMS-4", "Destroyed on delete, provably", keys::kms_4),
    check!(
        "KMS-5",
        "Released only to the host that runs it, for that start",
        keys::kms_5
    ),
    check!(
        "KMS-7",
        "Every key request is logged; an unexpected one is refused and flagged",
        keys::kms_7
    ),
    check!(
        "SEE-1",
        "stdout and stderr are kept nowhere unless asked for",
        logs::see_1
    ),
    check!("SEE-3", "Events never say what ran inside", logs::see_3),
    check!(
        "EDGE-1",
        "TLS 1.3 or nothing; HSTS on every answer",
        edge::edge_1
    ),
    check!(
        "EDGE-5",
        "Encrypted end to end from edge to workspace",
        edge::edge_5
    ),
    check!("OPS-4", "Acts reach an append-only store", logs::ops_4),
    check!(
        "LOG-3",
        "Production can write, and neither read nor change",
        logs::log_3
    ),
];

/// A row of the result.
#[derive(Debug, serde::Serialize)]
pub struct Row {
    id: &'static str,
    status: Status,
    evidence: String,
    seconds: f64,
}

/// Runs the checks; 1 if one fails.
///
/// # Errors
/// When an id is unknown or the platform is not up.
pub async fn run(
    paths: &Paths,
    config: &Config,
    options: &Options,
    as_json: bool,
) -> anyhow::Result<u8> {
    let wanted: Vec<String> = options.ids.iter().map(|i| i.to_ascii_uppercase()).collect();
    if let Some(unknown) = wanted.iter().find(|i| !CHECKS.iter().any(|c| c.id == *i)) {
        anyhow::bail!(
            "{unknown} has no check; there are: {}",
            CHECKS.iter().map(|c| c.id).collect::<Vec<_>>().join(" ")
        );
    }
    let mut world = World::new(Probe { paths, config })?;
    let mut rows = Vec::new();
    for check in CHECKS
        .iter()
        .filter(|c| wanted.is_empty() || wanted.iter().any(|i| i == c.id))
    {
        let began = Instant::now();
        let bar = crate::progress::spinner();
        bar.set_message(format!("{} {}", check.id, check.claim));
        let finding = (check.run)(&mut world).await.unwrap_or_else(|e| Finding {
            status: Status::Fail,
            evidence: format!("{e:#}"),
        });
        bar.finish_and_clear();
        let row = Row {
            id: check.id,
            status: finding.status,
            evidence: finding.evidence,
            seconds: began.elapsed().as_secs_f64(),
        };
        if !as_json {
            let word = match row.status {
                Status::Pass => "pass",
                Status::Fail => "FAIL",
                Status::NotYet => "not yet",
            };
            println!(
                "{:<7} {word:<8} {}\n{:>16} {}",
                row.id, check.claim, "", row.evidence
            );
        }
        rows.push(row);
    }
    world.clean().await;
    if as_json {
        println!("{}", serde_json::to_string(&rows)?);
    } else {
        let count = |s: Status| rows.iter().filter(|r| r.status == s).count();
        println!(
            "\n{} pass, {} fail, {} not yet",
            count(Status::Pass),
            count(Status::Fail),
            count(Status::NotYet)
        );
    }
    Ok(u8::from(rows.iter().any(|r| r.status == Status::Fail)))
}
