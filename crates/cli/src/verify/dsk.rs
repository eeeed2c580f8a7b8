//! DSK: disks.

use super::at_rest::{self, Kept, code_of};
use super::world::{World, canary};
use super::{Finding, Status};
use crate::client::json;
use crate::probe::{occurrences, occurrences_below};
use anyhow::{Context as _, ensure};
use reqwest::Method;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Where a LUKS2 header's JSON begins, bytes.
const LUKS2_JSON_OFFSET: usize = 4096;
/// The sector of a memory's note, bytes.
const BEHIND_THE_NOTE: u64 = 4096;
/// Bytes of the header that are looked at.
const LUKS2_HEADER_BYTES: usize = 64 << 10;

pub(super) async fn dsk_1(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.shared().await?;
    let slot = w.slot(&id)?;
    let disk = slot.disk_pid.context("the workspace has no disk process")?;
    let file = w.probe.disk_file(&id);
    let meta = fs::metadata(&file)?;
    let holders = holders(meta.dev(), meta.ino());
    let others: Vec<_> = holders.iter().filter(|(pid, _)| *pid != disk).collect();
    let allowed = |exe: &str| exe.contains("warden");
    ensure!(
        holders.iter().any(|(pid, _)| *pid == disk) && others.iter().all(|(_, e)| allowed(e)),
        "the disk file is open in {holders:?}; only its disk process {disk} may"
    );
    let mounts = fs::read_to_string("/proc/1/mountinfo")?;
    ensure!(
        !mounts.contains("fuse.casemate"),
        "the plaintext is mounted on the host"
    );
    let mode = meta.mode() & 0o777;
    ensure!(mode & 0o077 == 0, "the disk file's mode is {mode:o}");
    Finding::pass(format!(
        "{} (mode {mode:o}) is open in its disk process {disk} and no other; no mount shows its plaintext",
        file.file_name().unwrap_or_default().to_string_lossy()
    ))
}

pub(super) async fn dsk_2(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let a = w.shared().await?;
    let b = w.make(json!({})).await?;
    let (ha, hb) = (
        header(&w.probe.disk_file(&a))?,
        header(&w.probe.disk_file(&b))?,
    );
    for h in [&ha, &hb] {
        let segment = &h["segments"]["0"];
        ensure!(
            segment["encryption"] == "aes-xts-plain64" && segment["sector_size"] == 4096,
            "segment: {segment}"
        );
        let size = &h["keyslots"]["0"]["key_size"];
        ensure!(
            *size == 64,
            "the volume key has {size} bytes, AES-256-XTS has 64"
        );
    }
    ensure!(
        ha["digests"]["0"]["digest"] != hb["digests"]["0"]["digest"],
        "two workspaces have the same key digest"
    );
    // The same file system is at the front of both volumes: only the key makes them differ.
    let (ca, cb) = (
        sample(&w.probe.disk_file(&a))?,
        sample(&w.probe.disk_file(&b))?,
    );
    let equal = ca
        .chunks(4096)
        .zip(cb.chunks(4096))
        .filter(|(x, y)| x == y && !is_zero(x))
        .count();
    w.delete(&b).await?;
    ensure!(
        equal == 0,
        "{equal} allocated sectors of two workspaces are equal"
    );
    Finding::pass(
        "LUKS2 headers of two workspaces: aes-xts-plain64, 512-bit key, 4 KiB sectors, different keys; no allocated sector in common",
    )
}

pub(super) async fn dsk_3(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.make(json!({})).await?;
    let mark = write_canary(w, &id).await?;
    w.power(&id, "stop").await?;
    let hits = search(w, &mark)?;
    ensure!(hits.is_empty(), "the canary stands in {hits:?}");
    let size = fs::metadata(w.probe.disk_file(&id))?.blocks() * 512 / 1024;
    w.delete(&id).await?;
    let seen = format!(
        "a canary written and synced inside, workspace stopped: 0 occurrences in its disk file ({size} KiB) and in all of the platform's files"
    );
    Ok(under_file_unseal(w, seen))
}

pub(super) async fn dsk_4(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.make(json!({})).await?;
    let mark = write_canary(w, &id).await?;
    w.power(&id, "stop").await?;
    let file = w.probe.disk_file(&id);
    let header_before = header(&file)?;
    let answer = w.delete(&id).await?;
    let receipt = answer["erasure_receipt"]
        .as_str()
        .context("no erasure receipt")?;
    let key = service::trust::key(w.probe.paths, service::trust::KMS)?;
    let erased = crate::erasure::verify(receipt, &key)?;
    ensure!(
        erased.workspace.as_str() == id,
        "the receipt is for {}",
        erased.workspace
    );
    ensure!(!file.exists(), "{} is still there", file.display());
    let hits = search(w, &mark)?;
    ensure!(hits.is_empty(), "the canary stands in {hits:?}");
    let slots = epoch_slots(w)?;
    ensure!(
        slots == vec![erased.epoch_now],
        "epoch secrets on disk: {slots:?}; only {} may be",
        erased.epoch_now
    );
    ensure!(!header_before.is_null(), "there was no header to lose");
    Finding::pass(format!(
        "receipt valid; disk file gone; the only epoch secret left is {}, the one that could unwrap the key ({}) is destroyed",
        erased.epoch_now, erased.epoch_destroyed
    ))
}

pub(super) async fn dsk_5(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.shared().await?;
    w.public(&id, true).await?;
    let limit = w.probe.config.limits.disk_bytes_per_s;
    // Three seconds' worth of the limit: one second may come from the bucket's burst.
    let mib = (limit * 3 / (1 << 20)).clamp(64, 6 << 10);
    let command = format!(
        "dd if=/dev/zero of=/root/dsk5 bs=1M count=64 oflag=direct 2>/dev/null; n=$(({mib}/64)); for i in $(seq $n); do dd if=/root/dsk5 of=/dev/null bs=1M iflag=direct 2>/dev/null; done; rm /root/dsk5"
    );
    let began = Instant::now();
    w.inside(&id, &["sh", "-c", &command]).await?;
    let seconds = began.elapsed().as_secs_f64();
    w.public(&id, false).await?;
    // The file was written once, too.
    let bytes = (mib / 64 * 64 + 64) << 20;
    #[allow(clippy::cast_precision_loss)]
    let (rate, limit) = (bytes as f64 / seconds, limit as f64);
    // One second's worth of burst is allowed on top.
    let bound = limit * (1.0 + 1.0 / seconds);
    ensure!(
        rate <= bound * 1.05,
        "read and written {:.0} MiB/s against a limit of {:.0} MiB/s",
        rate / 1048576.0,
        limit / 1048576.0
    );
    let evidence = format!(
        "64 MiB written to and {mib} MiB read from the disk inside in {seconds:.1} s: {:.0} MiB/s; the limit is {:.0} MiB/s",
        rate / 1048576.0,
        limit / 1048576.0
    );
    if rate < limit * 0.5 {
        return Finding::not_yet(format!(
            "{evidence}; this guest is too slow to reach the limit, so it was not put to the test (lower limits.disk_bytes_per_s)"
        ));
    }
    Finding::pass(evidence)
}

pub(super) async fn dsk_6(w: &mut World<'_>) -> anyhow::Result<Finding> {
    // A policy that starts nothing anew: what is refused must be seen to be.
    let body = json!({ "config": { "restart_policy": "no" } });
    let id = w.make(body).await?;
    let mark = write_canary(w, &id).await?;
    w.power(&id, "stop").await?;
    let file = w.probe.disk_file(&id);
    let older = Kept::of(file.parent().context("a disk has a directory")?)?;
    w.power(&id, "start").await?;
    let back = w.inside(&id, &["cat", "/root/canary"]).await?;
    ensure!(
        back.trim() == mark,
        "after stop and start the file holds {back:?}"
    );
    let newer = write_canary(w, &id).await?;
    w.power(&id, "stop").await?;
    let refused = at_rest::changes_are_refused(w, &id, &older).await?;
    let back = w.inside(&id, &["cat", "/root/canary"]).await?;
    w.delete(&id).await?;
    ensure!(
        back.trim() == newer,
        "put back as it was, the file holds {back:?}"
    );
    Finding::pass(format!(
        "a file written before stop was there after start, with the same content; {refused}"
    ))
}

pub(super) async fn dsk_7(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w
        .make(json!({ "mode": "temporary", "config": { "ttl": "10m", "ttl_action": "remove" } }))
        .await?;
    let mark = write_canary(w, &id).await?;
    let file = w.probe.disk_file(&id);
    w.delete(&id).await?;
    ensure!(!file.exists(), "{} is still there", file.display());
    let hits = search(w, &mark)?;
    ensure!(hits.is_empty(), "the canary stands in {hits:?}");
    Finding::pass(
        "a temporary workspace with a canary deleted: disk file gone, 0 occurrences in all state, logs and run-time files",
    )
}

pub(super) async fn dsk_8(w: &mut World<'_>) -> anyhow::Result<Finding> {
    // A policy that starts nothing anew: memory that does not wake must be seen not to.
    let body = json!({ "config": { "restart_policy": "no" } });
    let id = w.make(body.clone()).await?;
    let other = w.make(body).await?;
    let on_disk = write_canary(w, &id).await?;
    let in_memory = canary();
    let hold = format!("echo {in_memory} > /dev/shm/canary");
    w.inside(&id, &["sh", "-c", &hold]).await?;
    w.power(&id, "snapshot").await?;
    w.power(&id, "sleep").await?;
    w.power(&other, "sleep").await?;
    let memory = |id: &str| w.probe.paths.state("volumes").join(format!("{id}.memory"));
    ensure!(
        memory(&id).exists(),
        "{} is not there: where is its memory?",
        memory(&id).display()
    );
    for mark in [&on_disk, &in_memory] {
        let hits = search(w, mark)?;
        ensure!(hits.is_empty(), "the canary stands in {hits:?}");
    }
    // Memory of another workspace, of an older sleep, and with bits changed: in its note, which is
    // read before anything runs, and in what the VMM reads.
    let kept = Kept::of(&memory(&id))?;
    let mut refused = Vec::new();
    Kept::of(&memory(&other))?.put(&memory(&id))?;
    refused.push(("another workspace's", wake_refused(w, &id).await?));
    kept.flipped(0).put(&memory(&id))?;
    refused.push(("one with bits flipped", wake_refused(w, &id).await?));
    kept.put(&memory(&id))?;
    w.power(&id, "start").await?;
    w.public(&id, true).await?;
    let back = w.inside(&id, &["cat", "/dev/shm/canary"]).await?;
    ensure!(back.trim() == in_memory, "woken, its memory holds {back:?}");
    w.power(&id, "sleep").await?;
    let last = Kept::of(&memory(&id))?;
    kept.put(&memory(&id))?;
    refused.push(("one of an earlier sleep", wake_refused(w, &id).await?));
    last.flipped(BEHIND_THE_NOTE).put(&memory(&id))?;
    refused.push(("one with its pages changed", wake_refused(w, &id).await?));
    for (what, code) in &refused {
        ensure!(code == "disk_tampered", "{what} was refused with {code}");
    }
    w.delete(&id).await?;
    w.delete(&other).await?;
    let refused: Vec<_> = refused
        .iter()
        .map(|(what, code)| format!("{what}: {code}"))
        .collect();
    let seen = format!(
        "canaries in the memory and on the disk of a workspace that was kept as a snapshot and then slept: 0 occurrences in all of the platform's files; it woke with its memory; offered as its memory, {}",
        refused.join(", ")
    );
    Ok(under_file_unseal(w, seen))
}

/// Why a workspace that sleeps does not wake.
async fn wake_refused(w: &World<'_>, id: &str) -> anyhow::Result<String> {
    let woken = w.power(id, "start").await;
    let Err(why) = woken else {
        anyhow::bail!("it woke with memory that is not its own");
    };
    Ok(code_of(&why))
}

/// Writes and syncs a canary inside; the workspace is open afterwards.
pub(super) async fn write_canary(w: &World<'_>, id: &str) -> anyhow::Result<String> {
    w.public(id, true).await?;
    let mark = canary();
    let token = w.owner.runtime_token(id).await?;
    let body = json!({ "path": "/root/canary", "content": mark });
    json(
        w.owner
            .runtime(&token, Method::POST, "/files/write", Some(&body))
            .await?,
    )
    .await?;
    w.inside(id, &["sync"]).await?;
    Ok(mark)
}

/// Files of the platform that hold `mark`.
pub(super) fn search(w: &World<'_>, mark: &str) -> anyhow::Result<Vec<(PathBuf, u64)>> {
    let mut hits = Vec::new();
    for dir in [
        w.probe.paths.state_dir(),
        w.probe.paths.run(),
        w.probe.paths.etc(),
    ] {
        hits.extend(occurrences_below(&dir, mark.as_bytes())?);
    }
    Ok(hits)
}

/// A file unseal keeps the root beside the ciphertext: then the claim is not met yet.
pub(super) fn under_file_unseal(w: &World<'_>, seen: String) -> Finding {
    match w.probe.config.kms.unseal {
        api::kms::Unseal::Passphrase => Finding {
            status: Status::Pass,
            evidence: seen,
        },
        api::kms::Unseal::File => Finding {
            status: Status::NotYet,
            evidence: format!(
                "file seal: the root key lies beside the ciphertext. Otherwise: {seen}"
            ),
        },
    }
}

/// Numbers of the epoch secrets on disk.
pub(super) fn epoch_slots(w: &World<'_>) -> anyhow::Result<Vec<u64>> {
    let dir = w.probe.paths.state("kms").join("slots");
    let mut slots: Vec<u64> = fs::read_dir(&dir)
        .with_context(|| format!("read {}", dir.display()))?
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect();
    slots.sort_unstable();
    Ok(slots)
}

/// The JSON of a LUKS2 header.
fn header(path: &Path) -> anyhow::Result<Value> {
    use std::io::Read as _;
    let mut bytes = vec![0; LUKS2_HEADER_BYTES];
    let n = fs::File::open(path)?.read(&mut bytes)?;
    bytes.truncate(n);
    ensure!(
        bytes.starts_with(b"LUKS\xba\xbe\x00\x02"),
        "{} is no LUKS2 volume",
        path.display()
    );
    let json = bytes.get(LUKS2_JSON_OFFSET..).context("a short header")?;
    let end = json
        .iter()
        .position(|b| *b == 0)
        .context("the header's JSON does not end")?;
    Ok(serde_json::from_slice(&json[..end])?)
}

/// The first MiB of ciphertext.
fn sample(path: &Path) -> anyhow::Result<Vec<u8>> {
    use std::os::unix::fs::FileExt as _;
    let mut bytes = vec![0; 1 << 20];
    fs::File::open(path)?.read_exact_at(&mut bytes, 16 << 20)?;
    Ok(bytes)
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| *b == 0)
}

/// (pid, executable) of every process that has the file open.
fn holders(dev: u64, ino: u64) -> Vec<(u32, String)> {
    let mut out = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|n| n.parse::<u32>().ok())
        else {
            continue;
        };
        let fds = fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        let open = fds
            .filter_map(|fd| fs::metadata(fd.path()).ok())
            .any(|m| (m.dev(), m.ino()) == (dev, ino));
        if open {
            let exe = fs::read_link(process.path().join("exe")).unwrap_or_default();
            out.push((pid, exe.to_string_lossy().into_owned()));
        }
    }
    out
}

/// Whether a file holds `needle`; for the other checks.
pub(super) fn holds(path: &Path, needle: &str) -> bool {
    occurrences(path, needle.as_bytes()).is_ok_and(|n| n > 0)
}
