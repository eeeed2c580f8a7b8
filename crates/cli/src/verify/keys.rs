//! KMS: keys.

use super::Finding;
use super::dsk::{epoch_slots, holds, under_file_unseal};
use super::logs::entries;
use super::world::World;
use crate::operate::kms_status;
use anyhow::{Context as _, ensure};
use api::audit::Class;
use api::rpc::blocking::call;
use serde_json::json;
use std::time::{Duration, Instant};

const WAIT: Duration = Duration::from_secs(10);
/// Within this a refusal must be in the security log.
const FLAGGED_WITHIN: Duration = Duration::from_secs(1);

pub(super) async fn kms_1(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let before = kms_status(w.probe.paths)?.workspace_keys;
    let a = w.make(json!({})).await?;
    let b = w.make(json!({})).await?;
    let now = kms_status(w.probe.paths)?.workspace_keys;
    ensure!(
        now == before + 2,
        "two workspaces made {} keys",
        now - before
    );
    for id in [&a, &b] {
        w.public(id, true).await?;
    }
    let (ia, ib) = (identity(w, &a)?, identity(w, &b)?);
    ensure!(ia != ib, "two workspaces have the same identity key");
    w.delete(&a).await?;
    w.delete(&b).await?;
    let after = kms_status(w.probe.paths)?.workspace_keys;
    ensure!(
        after == before,
        "after both were deleted {} keys are left of them",
        after - before
    );
    Finding::pass(format!(
        "two creations made two keys ({before} → {now}), the identities derived from them differ; two deletions left {after}"
    ))
}

pub(super) async fn kms_2(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.shared().await?;
    let slot = w.slot(&id)?;
    let disk = slot.disk_pid.context("the workspace has no disk process")?;
    // The disk's passphrase and every layer above it exist in clear only in secret memory, which
    // not even root reads through /proc.
    let maps = std::fs::read_to_string(format!("/proc/{disk}/maps"))?;
    ensure!(
        maps.contains("secretmem"),
        "the disk process holds no secret memory"
    );
    let kms = w.probe.paths.state("kms");
    let pid = crate::supervise::status_of(w.probe.paths)
        .into_iter()
        .find_map(|s| (s.name == "kms").then_some(s.pid)?)
        .context("the KMS has no process")?;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    ensure!(maps.contains("secretmem"), "the KMS holds no secret memory");
    // SQLite keeps what is new in its log.
    ensure!(
        ["state.db", "state.db-wal"]
            .iter()
            .any(|f| holds(&kms.join(f), &id)),
        "the KMS's store does not know {id}"
    );
    let status = kms_status(w.probe.paths)?;
    let seen = format!(
        "workspace key < account key < epoch {} root < unseal; KMS and disk process keep keys in secret memory",
        status.epoch
    );
    if w.probe.config.kms.unseal == api::kms::Unseal::Passphrase {
        ensure!(
            !kms.join("unseal.key").exists(),
            "there is an unseal.key beside the ciphertext"
        );
    }
    Ok(under_file_unseal(w, seen))
}

pub(super) async fn kms_4(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.make(json!({})).await?;
    let before = kms_status(w.probe.paths)?;
    let answer = w.delete(&id).await?;
    let after = kms_status(w.probe.paths)?;
    let receipt = answer["erasure_receipt"]
        .as_str()
        .context("no erasure receipt")?;
    let key = service::trust::key(w.probe.paths, service::trust::KMS)?;
    let erased = crate::erasure::verify(receipt, &key)?;
    ensure!(
        after.epoch > before.epoch,
        "the epoch did not change: {}",
        after.epoch
    );
    ensure!(
        after.workspace_keys + 1 == before.workspace_keys,
        "{} keys before, {} after",
        before.workspace_keys,
        after.workspace_keys
    );
    let slots = epoch_slots(w)?;
    ensure!(
        slots == vec![after.epoch],
        "epoch secrets on disk: {slots:?}"
    );
    let entry = entries(w, Class::Host)?
        .into_iter()
        .find(|e| e.entry.event == "kms.destroy" && e.entry.subject.as_deref() == Some(&id))
        .context("the log holds no kms.destroy for it")?;
    ensure!(
        entry.process == "kms",
        "the entry was written by {}",
        entry.process
    );
    Finding::pass(format!(
        "epoch {} → {}, one key less, the old epoch's secret is gone, kms.destroy is in the log, receipt for record {}… valid offline",
        before.epoch,
        after.epoch,
        &erased.record_digest[..16]
    ))
}

pub(super) async fn kms_5(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.shared().await?;
    let before = kms_status(w.probe.paths)?;
    let mut answers = Vec::new();
    // What a host could try that has no fresh lease: its own word, for a workspace that exists.
    let attestation = attestation(w, &id)?;
    for receipt in [
        json!({}),
        json!({ "log": "host" }),
        json!(null),
        json!([1, 2, 3]),
    ] {
        let op = serde_json::to_string(&api::kms::Op::Release {
            receipt,
            attestation: attestation.clone(),
        })?;
        let answer = w.as_user("casemate-host", &["kms-ask"], &op)?;
        ensure!(
            answer == "key_refused",
            "asked by the host with a made-up lease, the KMS answers: {answer}"
        );
        answers.push(answer);
    }
    let after = kms_status(w.probe.paths)?;
    ensure!(
        after.releases == before.releases,
        "the count of releases went up"
    );
    // And the real flow: one start, one release.
    w.power(&id, "stop").await?;
    w.power(&id, "start").await?;
    let started = kms_status(w.probe.paths)?;
    ensure!(
        started.releases == before.releases + 1,
        "one start took {} releases",
        started.releases - before.releases
    );
    Finding::pass(format!(
        "made-up leases, sent as the host: {}; 0 released; a real start: exactly 1 release, against a lease in the log and the disk process's attestation",
        answers.join(", ")
    ))
}

pub(super) async fn kms_7(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.make(json!({})).await?;
    w.power(&id, "stop").await?;
    w.power(&id, "start").await?;
    let log = entries(w, Class::Host)?;
    let releases = log
        .iter()
        .filter(|e| e.process == "kms" && e.entry.event == "kms.release")
        .filter(|e| e.entry.subject.as_deref() == Some(&id))
        .count();
    ensure!(
        releases == 2,
        "two starts left {releases} kms.release entries"
    );
    let before = kms_status(w.probe.paths)?.refusals;
    let refusals = |w: &World<'_>| -> anyhow::Result<usize> {
        let log = entries(w, Class::Security)?;
        Ok(log
            .iter()
            .filter(|e| e.entry.event == "kms.refused")
            .count())
    };
    let logged = refusals(w)?;
    let op = api::kms::Op::Release {
        receipt: json!({}),
        attestation: "v1.00000000.e30.AAAA".into(),
    };
    let answer =
        call::<_, serde_json::Value>(&w.probe.paths.socket("kms", "kms"), "verify", &op, WAIT);
    ensure!(answer.is_err(), "a made-up request was answered");
    let flagged = kms_status(w.probe.paths)?.refusals;
    let deadline = Instant::now() + FLAGGED_WITHIN;
    let written = loop {
        let written = refusals(w)?;
        if written > logged || Instant::now() > deadline {
            break written;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    w.delete(&id).await?;
    ensure!(flagged == before + 1, "the refusal was not flagged");
    ensure!(
        written == logged + 1,
        "the refusal is not in the security log"
    );
    Finding::pass(
        "two starts: two kms.release entries; a request outside the flow: refused, flagged, kms.refused in the security log",
    )
}

/// A well-formed attestation of a process of our own, by a key that is no host's.
fn attestation(w: &World<'_>, id: &str) -> anyhow::Result<String> {
    let hosts = service::trust::hosts(w.probe.paths)?;
    let measurements = service::trust::measurements(w.probe.paths)?;
    let body = api::kms::Attestation {
        host: hosts.into_keys().next().context("no host is trusted")?,
        workspace: id.parse()?,
        start_id: w.slot(id)?.start_id.context("the slot has no start")?,
        purpose: model::Purpose::Disk,
        nonce: hex::encode(seal::random::bytes::<16>()),
        hpke_pub: seal::hpke::SecretKey::generate().public().to_hex(),
        measurement: measurements["disk"].concat(),
        time_ms: service::clock::Clock::system().now_ms(),
    };
    let key = seal::sign::SigningKey::generate();
    Ok(seal::sign::Signed::new(&key, api::context::ATTESTATION, &body).to_string())
}

/// The identity key that mint vouches for.
fn identity(w: &World<'_>, id: &str) -> anyhow::Result<String> {
    let op = api::mint::Op::TokenState {
        workspace: id.parse()?,
    };
    let signed: api::mint::Signed =
        call(&w.probe.paths.socket("mint", "mint"), "verify", &op, WAIT)?;
    let key = service::trust::key(w.probe.paths, service::trust::MINT)?;
    let state: api::mint::TokenState =
        seal::sign::Signed::parse(signed.signed)?.verify(&key, api::context::TOKEN_STATE)?;
    Ok(state.identity_pub)
}
