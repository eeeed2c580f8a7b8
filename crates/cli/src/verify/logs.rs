//! SEE, OPS and LOG: what is recorded, and what is not.

use super::Finding;
use super::dsk::{search, write_canary};
use super::world::{World, canary};
use crate::supervise::processes;
use anyhow::{Context as _, ensure};
use api::audit::{Class, LogHead, ReadEntries, ReadOp, Stamped};
use api::rpc::blocking::call;
use serde_json::json;
use std::process::Command;
use std::time::Duration;

/// Entries read at a time.
const PAGE: u32 = 256;
/// Entries looked at in one log: the newest.
const ENTRIES_MAX: u64 = 4_096;

pub(super) async fn see_1(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.shared().await?;
    w.public(&id, true).await?;
    let (out, err) = (canary(), canary());
    let script = format!("echo {out}; echo {err} >&2");
    let said = w.inside(&id, &["sh", "-c", &script]).await?;
    ensure!(said.trim() == out, "the caller got {said:?}");
    w.public(&id, false).await?;
    for mark in [&out, &err] {
        let hits = search(w, mark)?;
        ensure!(hits.is_empty(), "output of a command stands in {hits:?}");
    }
    let log = all_entries(w)?;
    ensure!(
        !log.contains(&out) && !log.contains(&err),
        "output of a command is in the audit log"
    );
    Finding::pass(
        "two canaries printed on stdout and stderr: the caller got them; 0 occurrences in state, logs, run-time files and the opened audit entries",
    )
}

pub(super) async fn see_3(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.make(json!({})).await?;
    let mark = write_canary(w, &id).await?;
    w.inside(&id, &["sh", "-c", &format!(": {mark}")]).await?;
    w.power(&id, "stop").await?;
    w.power(&id, "start").await?;
    w.delete(&id).await?;
    let log = entries(w, Class::Host)?;
    let of: Vec<&str> = log
        .iter()
        .filter(|e| e.process == "control" && e.entry.subject.as_deref() == Some(&id))
        .map(|e| e.entry.event.as_str())
        .collect();
    for event in [
        "workspace.create",
        "workspace.stop",
        "workspace.start",
        "workspace.delete",
    ] {
        ensure!(
            of.contains(&event),
            "the log holds no {event} for it, only {of:?}"
        );
    }
    ensure!(
        !all_entries(w)?.contains(&mark),
        "what ran inside stands in the audit log"
    );
    Finding::pass(
        "create, stop, start and delete are in the log; a command's canary and a file's are in no opened entry",
    )
}

pub(super) async fn ops_4(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.make(json!({})).await?;
    w.public(&id, true).await?;
    w.owner.runtime_token(&id).await?;
    w.delete(&id).await?;
    let log = entries(w, Class::Host)?;
    let has = |process: &str, event: &str| {
        log.iter().any(|e| {
            e.process == process
                && e.entry.event == event
                && e.entry.subject.as_deref() == Some(&id)
        })
    };
    let wanted = [
        ("control", "workspace.create"),
        ("control", "workspace.network"),
        ("control", "workspace.delete"),
        ("kms", "kms.key_create"),
        ("kms", "kms.release"),
        ("kms", "kms.destroy"),
    ];
    for (process, event) in wanted {
        ensure!(has(process, event), "no {event} by {process} in the log");
    }
    let report = offline(w)?;
    Finding::pass(format!(
        "{} acts of one workspace's life are in the log, by the process that did them; {report}",
        wanted.len()
    ))
}

pub(super) async fn log_3(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let dir = w.probe.paths.state("audit-integrate").join("host");
    let checkpoint = dir.join("checkpoint");
    ensure!(checkpoint.exists(), "{} is missing", checkpoint.display());
    let segments = w.probe.paths.state("audit-append");
    let mut tried = 0;
    for process in processes::ALL.iter().filter(|p| !p.root && !p.log_group) {
        // In subshells: a redirection that fails ends the shell.
        let script = format!(
            "cat {c} >/dev/null 2>&1 && echo read; (: >> {c}) 2>/dev/null && echo write; rm -f {c} 2>/dev/null && echo unlink; ls {s} >/dev/null 2>&1 && echo list; mv {c} {c}.x 2>/dev/null && echo rename",
            c = checkpoint.display(),
            s = segments.display()
        );
        let out = Command::new("setpriv")
            .args([
                "--reuid",
                &process.user(),
                "--regid",
                &process.user(),
                "--clear-groups",
                "--",
            ])
            .args(["sh", "-c", &script])
            .output()
            .context("run setpriv")?;
        let did = String::from_utf8_lossy(&out.stdout)
            .trim()
            .replace('\n', ", ");
        ensure!(did.is_empty(), "{} can {did} the log", process.name);
        tried += 5;
    }
    // The append process itself can't touch what is integrated.
    let out = Command::new("setpriv")
        .args([
            "--reuid",
            "casemate-audit-append",
            "--regid",
            "casemate-audit-append",
        ])
        .args(["--groups", processes::LOG_GROUP, "--", "sh", "-c"])
        .arg(format!(
            "rm -f {c} 2>/dev/null; (: >> {c}) 2>/dev/null && echo write",
            c = checkpoint.display()
        ))
        .output()?;
    ensure!(
        checkpoint.exists() && out.stdout.is_empty(),
        "the append process can change an integrated log"
    );
    let refused = call::<_, serde_json::Value>(
        &w.probe.paths.socket("audit-append", "append"),
        "verify",
        &json!({ "op": "read", "from": 0 }),
        Duration::from_secs(5),
    );
    ensure!(refused.is_err(), "the append socket answered a read");
    let report = offline(w)?;
    Finding::pass(format!(
        "{tried} attempts by the platform's users to read, write, remove, list and rename: all denied; the append side can't change what is integrated, its socket has no read; {report}"
    ))
}

/// Verifies the logs offline; a line about it.
fn offline(w: &World<'_>) -> anyhow::Result<String> {
    let out = Command::new(std::env::current_exe()?)
        .arg("--root")
        .arg(w.probe.paths.root())
        .args(["audit", "verify", "--json"])
        .output()?;
    ensure!(
        out.status.success(),
        "`casemate audit verify` fails: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    Ok("`casemate audit verify` recomputes all five logs".into())
}

/// The newest opened entries of a log.
pub(super) fn entries(w: &World<'_>, class: Class) -> anyhow::Result<Vec<Stamped>> {
    let socket = w.probe.paths.socket("audit-read", "read");
    let wait = Duration::from_secs(20);
    let head: LogHead = call(&socket, "verify", &ReadOp::Head { class }, wait)?;
    let mut from = head.size.saturating_sub(ENTRIES_MAX);
    let mut out = Vec::new();
    while from < head.size {
        let op = ReadOp::Entries {
            class,
            from,
            count: PAGE,
            reason: "casemate verify".into(),
        };
        let page: ReadEntries = call(&socket, "verify", &op, wait)?;
        ensure!(
            !page.entries.is_empty(),
            "the reader gave nothing from {from} on"
        );
        from += page.entries.len() as u64;
        out.extend(page.entries.into_iter().filter_map(|e| e.stamped));
    }
    Ok(out)
}

/// Every opened entry of all logs, as text.
fn all_entries(w: &World<'_>) -> anyhow::Result<String> {
    let mut text = String::new();
    for class in Class::ALL {
        text.push_str(&serde_json::to_string(&entries(w, class)?)?);
    }
    Ok(text)
}
