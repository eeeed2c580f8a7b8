//! `casemate audit`: verifies the logs offline, and shows entries through the reader.
//!
//! Verification trusts the log's public key and nothing else: it needs no process of the platform,
//! and works on a copy on another machine. Must never report a log clean that it could not read.

use crate::progress;
use anyhow::{Context as _, bail, ensure};
use api::audit::{Class as ApiClass, ReadEntries, ReadEntry, ReadOp};
use api::rpc::blocking::call;
use seal::sign::VerifyingKey;
use serde_json::json;
use service::config::Config;
use service::files::read_bounded;
use service::paths::Paths;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tlog::checkpoint::Checkpoint;
use tlog::class::Class;
use tlog::limits::{BUNDLE_BYTES_MAX, HASH_BYTES, NOTE_BYTES_MAX};
use tlog::tile::{Kind, Tile};
use tlog::verify::{CHECKPOINT_PATH, Expected, Fault, LogReader, Report, verify};

/// Deepest nesting below a log's `tile/`: a level, seven groups of a number, `.p`.
const DEPTH_MAX: usize = 12;
/// Faults printed per log for people; `--json` has them all.
const FAULTS_SHOWN: usize = 20;
/// How long the reader may take: it asks the KMS.
const READ_TIMEOUT: Duration = Duration::from_secs(20);

/// What to do with the logs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Verify all five logs offline, on this machine's or on a copy of the directory.
    ///
    /// Exits with 1 if anything is wrong. To copy a log that grows, copy the checkpoints first.
    Verify {
        /// Directory that holds the five logs; the installation's own unless given.
        #[arg(long)]
        dir: Option<PathBuf>,
        /// File with the logs' public key in hex; the installation's own unless given.
        #[arg(long)]
        key: Option<PathBuf>,
        /// A checkpoint of one of the logs seen earlier, which the log must still contain;
        /// several may be given.
        #[arg(long, value_name = "CHECKPOINT")]
        seen: Vec<PathBuf>,
    },
    /// Show entries (root). That you read them is logged first.
    Show {
        /// The log: api, host, flow, metering or security.
        class: Class,
        /// Index of the first entry; the last ones unless given.
        #[arg(long)]
        from: Option<u64>,
        /// How many, at most 256.
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=256))]
        count: u32,
        /// Why, for the log.
        #[arg(long, default_value = "casemate audit show")]
        reason: String,
    },
}

/// Runs a command; the process's exit code.
///
/// # Errors
/// When the directory, the key or the reader's answer can't be read.
pub fn run(paths: &Paths, config: &Config, command: &Command, as_json: bool) -> anyhow::Result<u8> {
    match command {
        Command::Verify { dir, key, seen } => {
            let own = paths.state("audit-integrate");
            let logs = Logs {
                dir: dir.clone().unwrap_or(own),
                key: key_read(paths, key.as_deref())?,
                installation: config.installation.name.clone(),
                is_copy: dir.is_some(),
                seen: seen
                    .iter()
                    .map(|path| seen_read(path))
                    .collect::<Result<_, _>>()?,
            };
            verify_all(&logs, as_json)
        }
        Command::Show {
            class,
            from,
            count,
            reason,
        } => show(paths, *class, *from, *count, reason, as_json),
    }
}

/// Five logs to verify.
struct Logs {
    dir: PathBuf,
    key: VerifyingKey,
    installation: String,
    is_copy: bool,
    seen: Vec<(Vec<u8>, String)>,
}

fn key_read(paths: &Paths, file: Option<&Path>) -> anyhow::Result<VerifyingKey> {
    let Some(path) = file else {
        return service::trust::key(paths, service::trust::AUDIT);
    };
    let bytes = read_bounded(path, service::limits::TRUST_MAX_BYTES)
        .with_context(|| format!("read {}", path.display()))?;
    let text = String::from_utf8_lossy(&bytes);
    VerifyingKey::from_hex(text.trim())
        .with_context(|| format!("{} is no Ed25519 public key in hex", path.display()))
}

/// A checkpoint seen earlier, and its origin.
fn seen_read(path: &Path) -> anyhow::Result<(Vec<u8>, String)> {
    let bytes = read_bounded(path, NOTE_BYTES_MAX as u64)
        .with_context(|| format!("read {}", path.display()))?;
    let origin =
        origin_of(&bytes).with_context(|| format!("{} is no checkpoint", path.display()))?;
    Ok((bytes, origin))
}

fn origin_of(note: &[u8]) -> Option<String> {
    let line = note.split(|b| *b == b'\n').next()?;
    Some(std::str::from_utf8(line).ok()?.to_owned())
}

fn verify_all(logs: &Logs, as_json: bool) -> anyhow::Result<u8> {
    ensure!(
        logs.dir.is_dir(),
        "{} is no directory; `--dir` names the one that holds the five logs",
        logs.dir.display()
    );
    let installation = logs.installation()?;
    let bar = progress::spinner();
    let mut reports = Vec::new();
    for (n, class) in Class::ALL.into_iter().enumerate() {
        bar.set_message(format!(
            "verifying log {class}, {} of {}",
            n + 1,
            Class::ALL.len()
        ));
        reports.push((class, logs.verify(class, &installation)?));
    }
    bar.finish_and_clear();
    let clean = reports.iter().all(|(_, report)| report.is_clean());
    if as_json {
        let all: Vec<_> = reports
            .iter()
            .map(|(class, r)| to_json(*class, r))
            .collect();
        let dir = logs.dir.display().to_string();
        println!(
            "{}",
            json!({ "clean": clean, "directory": dir, "logs": all })
        );
    } else {
        print(&reports);
    }
    Ok(u8::from(!clean))
}

impl Logs {
    /// The installation whose logs these are. A copy may be another installation's: it says whose,
    /// and the key vouches for it.
    fn installation(&self) -> anyhow::Result<String> {
        if !self.is_copy {
            return Ok(self.installation.clone());
        }
        let mut names = std::collections::BTreeSet::new();
        for class in Class::ALL {
            let bytes = Directory::of(&self.dir, class).read(CHECKPOINT_PATH);
            let origin = bytes.as_deref().and_then(origin_of).unwrap_or_default();
            let name = origin
                .strip_prefix("casemate.local/")
                .and_then(|rest| rest.strip_suffix(class.name())?.strip_suffix('/'));
            names.extend(name.map(str::to_owned));
        }
        match names.len() {
            0 => Ok(self.installation.clone()),
            1 => Ok(names.pop_first().unwrap_or_default()),
            _ => bail!("the checkpoints name several installations: {names:?}"),
        }
    }

    fn verify(&self, class: Class, installation: &str) -> anyhow::Result<Report> {
        let origin = class.origin(installation)?;
        let known = self
            .seen
            .iter()
            .filter(|(_, of)| *of == origin)
            .map(|(note, _)| Ok(Checkpoint::open(note, &origin, &self.key, &[])?.checkpoint))
            .collect::<anyhow::Result<Vec<_>>>()
            .context("a checkpoint given by --seen was not signed by this log")?;
        let expected = Expected {
            origin: &origin,
            class,
            log_key: &self.key,
            witnesses: &[],
            witnesses_min: 0,
            known: &known,
        };
        Ok(verify(&Directory::of(&self.dir, class), &expected))
    }
}

fn to_json(class: Class, r: &Report) -> serde_json::Value {
    let faults = |faults: &[Fault]| -> Vec<_> {
        faults
            .iter()
            .map(|f| {
                let kind = format!("{:?}", f.kind);
                json!({ "kind": kind, "path": f.path, "entry": f.entry, "detail": f.detail })
            })
            .collect()
    };
    json!({
        "log": class.name(),
        "clean": r.is_clean(),
        "size": r.checkpoint.as_ref().map(|c| c.size),
        "root": r.checkpoint.as_ref().map(|c| hex::encode(c.root)),
        "min_index": r.checkpoint.as_ref().map(|c| c.min_index),
        "entries": r.entries,
        "tiles": r.tiles,
        "accounts": r.accounts,
        "first_time_ms": r.first_time_ms,
        "last_time_ms": r.last_time_ms,
        "witnesses": r.cosignatures.len(),
        "faults_total": r.faults_total,
        "faults": faults(&r.faults),
        "notices": faults(&r.notices),
    })
}

fn print(reports: &[(Class, Report)]) {
    println!(
        "{:<10} {:>10} {:>10} {:>9}  {:<24} verdict",
        "log", "size", "entries", "accounts", "last entry"
    );
    for (class, r) in reports {
        let size = r
            .checkpoint
            .as_ref()
            .map_or("?".to_owned(), |c| c.size.to_string());
        let last = r.last_time_ms.map_or("-".to_owned(), time);
        let verdict = match r.faults_total {
            0 if r.is_clean() => "verified".to_owned(),
            1 => "1 fault".to_owned(),
            n => format!("{n} faults"),
        };
        println!(
            "{:<10} {size:>10} {:>10} {:>9}  {last:<24} {verdict}",
            class.name(),
            r.entries,
            r.accounts
        );
    }
    for (class, r) in reports {
        for fault in r.faults.iter().take(FAULTS_SHOWN) {
            println!("{class}: {fault}");
        }
        if r.faults_total > FAULTS_SHOWN {
            println!(
                "{class}: and {} more; --json lists them",
                r.faults_total - FAULTS_SHOWN
            );
        }
        for notice in r.notices.iter().take(FAULTS_SHOWN) {
            println!("{class}: notice: {notice}");
        }
    }
}

fn show(
    paths: &Paths,
    class: Class,
    from: Option<u64>,
    count: u32,
    reason: &str,
    as_json: bool,
) -> anyhow::Result<u8> {
    let socket = paths.socket("audit-read", "read");
    let class = api_class(class);
    let from = match from {
        Some(from) => from,
        None => {
            let head: api::audit::LogHead =
                call(&socket, "cli", &ReadOp::Head { class }, READ_TIMEOUT)?;
            head.size.saturating_sub(u64::from(count))
        }
    };
    let reason = reason.to_owned();
    let op = ReadOp::Entries {
        class,
        from,
        count,
        reason,
    };
    let page: ReadEntries = call(&socket, "cli", &op, READ_TIMEOUT)?;
    if as_json {
        println!("{}", serde_json::to_string(&page)?);
        return Ok(0);
    }
    for entry in &page.entries {
        println!("{}", line(entry));
    }
    if let Some(why) = &page.sealed {
        eprintln!("some entries stay sealed: {why}");
    }
    Ok(0)
}

fn line(e: &ReadEntry) -> String {
    let head = format!("{:>8} {}", e.index, time(e.time_ms));
    let Some(stamped) = &e.stamped else {
        return format!("{head} sealed");
    };
    let entry = &stamped.entry;
    let phase = format!("{:?}", entry.phase).to_lowercase();
    let mut out = format!(
        "{head} {:<10} {:<8} {:<24} {}",
        stamped.process, phase, entry.event, entry.actor
    );
    for part in [&entry.subject, &entry.result].into_iter().flatten() {
        out.push(' ');
        out.push_str(part);
    }
    // The writers are the platform's, but what they write may stem from elsewhere.
    out.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// A time as RFC 3339 in UTC, to the second.
fn time(ms: u64) -> String {
    let s = ms / 1000;
    let (days, s) = (s / 86_400, s % 86_400);
    // Days to a civil date: Howard Hinnant's algorithm, for dates from 1970 on.
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        s / 3600,
        s / 60 % 60,
        s % 60
    )
}

fn api_class(class: Class) -> ApiClass {
    match class {
        Class::Api => ApiClass::Api,
        Class::Host => ApiClass::Host,
        Class::Flow => ApiClass::Flow,
        Class::Metering => ApiClass::Metering,
        Class::Security => ApiClass::Security,
    }
}

/// A log's directory. A partial tile that has made way for the full one is read from that, as
/// tlog-tiles asks of readers: the log may be growing meanwhile.
struct Directory(PathBuf);

impl Directory {
    fn of(dir: &Path, class: Class) -> Directory {
        Directory(dir.join(class.name()))
    }

    fn file(&self, path: &str, max: usize) -> Option<Vec<u8>> {
        read_bounded(&self.0.join(path), max as u64).ok()
    }

    /// All files below `at`, as paths relative to the log's directory.
    fn walk(&self, at: &Path, depth: usize, out: &mut Vec<String>) {
        let Ok(entries) = std::fs::read_dir(self.0.join(at)) else {
            return;
        };
        for entry in entries.flatten() {
            let path = at.join(entry.file_name());
            if depth > 0 && entry.file_type().is_ok_and(|t| t.is_dir()) {
                self.walk(&path, depth - 1, out);
            } else {
                out.push(path.to_string_lossy().into_owned());
            }
        }
    }
}

impl LogReader for Directory {
    fn read(&self, path: &str) -> Option<Vec<u8>> {
        if path == CHECKPOINT_PATH {
            return self.file(path, NOTE_BYTES_MAX);
        }
        if let Some(bytes) = self.file(path, BUNDLE_BYTES_MAX) {
            return Some(bytes);
        }
        let tile = Tile::parse(path).ok().filter(Tile::is_partial)?;
        let full = self.file(&tile.full().path(), BUNDLE_BYTES_MAX)?;
        beginning(&tile, full)
    }

    fn list(&self) -> Vec<String> {
        let mut out = Vec::new();
        self.walk(Path::new("tile"), DEPTH_MAX, &mut out);
        out.sort();
        out
    }
}

/// The bytes of the partial `tile` from those of the full one.
fn beginning(tile: &Tile, mut full: Vec<u8>) -> Option<Vec<u8>> {
    let width = usize::from(tile.width());
    let len = match tile.kind() {
        Kind::Hashes(_) => width * HASH_BYTES,
        Kind::Entries => {
            let entries = tile.full().bundle_decode(&full).ok()?;
            entries
                .iter()
                .take(width)
                .map(|entry| 2 + entry.len())
                .sum()
        }
    };
    full.truncate(len);
    Some(full)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use seal::sign::SigningKey;
    use tlog::grow::Grower;
    use tlog::leaf::{Leaf, Opening, account_tag, day_of};

    /// Five logs of `size` entries in `dir`, as integrate lays them out.
    fn logs(dir: &Path, size: u64, key: &SigningKey) {
        for class in Class::ALL {
            let mut grower = Grower::empty();
            for seq in 0..size {
                grower.append(&leaf(class, seq)).unwrap();
            }
            for file in grower.take() {
                let path = dir.join(class.name()).join(file.tile.path());
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, file.bytes).unwrap();
            }
            let origin = class.origin("elsewhere").unwrap();
            let checkpoint = Checkpoint::new(&origin, grower.size(), grower.root());
            let note = checkpoint.sign(key).unwrap().encode();
            std::fs::create_dir_all(dir.join(class.name())).unwrap();
            std::fs::write(dir.join(class.name()).join("checkpoint"), note).unwrap();
        }
    }

    fn leaf(class: Class, account_seq: u64) -> Vec<u8> {
        let opening = Opening {
            salt: [1; 32],
            payload: b"said".to_vec(),
        };
        let time_ms = 1_790_000_000_000;
        Leaf {
            class,
            time_ms,
            account_tag: account_tag(&[3; 32], class, ""),
            account_seq,
            commitment: opening.commitment(),
            day: day_of(time_ms),
            wrap_class: vec![1; 80],
            wrap_account: vec![],
            sealed: vec![9; 64],
        }
        .encode()
        .unwrap()
    }

    fn verify_copy(dir: &Path, key: VerifyingKey, seen: &[PathBuf]) -> anyhow::Result<u8> {
        let key_file = dir.join("audit.pub");
        std::fs::write(&key_file, key.to_hex()).unwrap();
        let command = Command::Verify {
            dir: Some(dir.to_owned()),
            key: Some(key_file),
            seen: seen.to_vec(),
        };
        run(
            &Paths::new("/nonexistent"),
            &Config::default(),
            &command,
            true,
        )
    }

    #[test]
    fn a_copy_of_another_installation_verifies_and_any_change_shows() {
        let dir = tempfile::tempdir().unwrap();
        let key = SigningKey::generate();
        logs(dir.path(), 300, &key);
        assert_eq!(verify_copy(dir.path(), key.public(), &[]).unwrap(), 0);
        let other = SigningKey::generate().public();
        assert_eq!(verify_copy(dir.path(), other, &[]).unwrap(), 1);
        for file in [
            "host/tile/0/000",
            "flow/tile/entries/001.p/44",
            "api/checkpoint",
        ] {
            let path = dir.path().join(file);
            let good = std::fs::read(&path).unwrap();
            let mut bad = good.clone();
            bad[good.len() / 2] ^= 1;
            std::fs::write(&path, bad).unwrap();
            assert_eq!(
                verify_copy(dir.path(), key.public(), &[]).unwrap(),
                1,
                "{file}"
            );
            std::fs::remove_file(&path).unwrap();
            assert_eq!(
                verify_copy(dir.path(), key.public(), &[]).unwrap(),
                1,
                "{file}"
            );
            std::fs::write(&path, good).unwrap();
        }
        assert_eq!(verify_copy(dir.path(), key.public(), &[]).unwrap(), 0);
    }

    #[test]
    fn a_log_that_went_back_shows_against_an_earlier_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let key = SigningKey::generate();
        logs(dir.path(), 300, &key);
        let seen = dir.path().join("seen");
        std::fs::copy(dir.path().join("host/checkpoint"), &seen).unwrap();
        let seen = [seen];
        assert_eq!(verify_copy(dir.path(), key.public(), &seen).unwrap(), 0);
        let older = tempfile::tempdir().unwrap();
        logs(older.path(), 200, &key);
        assert_eq!(verify_copy(older.path(), key.public(), &[]).unwrap(), 0);
        assert_eq!(verify_copy(older.path(), key.public(), &seen).unwrap(), 1);
    }

    #[test]
    fn a_partial_tile_is_read_from_the_full_one() {
        let dir = tempfile::tempdir().unwrap();
        logs(dir.path(), 300, &SigningKey::generate());
        let log = Directory::of(dir.path(), Class::Host);
        let full = log.read("tile/entries/000").unwrap();
        let part = log.read("tile/entries/000.p/7").unwrap();
        assert!(full.starts_with(&part) && part.len() * 256 == full.len() * 7);
        assert_eq!(log.read("tile/0/000.p/7").unwrap().len(), 7 * 32);
        assert_eq!(log.read("tile/0/009.p/7"), None);
    }

    #[test]
    fn times_are_civil() {
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(951_782_400_000), "2000-02-29T00:00:00Z");
        assert_eq!(time(1_790_000_000_999), "2026-09-21T14:13:20Z");
    }

    #[test]
    fn what_is_shown_has_no_control_characters() {
        let stamped = serde_json::from_value(json!({
            "process": "edge",
            "entry": { "event": "a\u{1b}[2J", "phase": "fact", "request_id": "r", "actor": "x\ny" }
        }));
        let entry = ReadEntry {
            index: 1,
            time_ms: 0,
            stamped: Some(stamped.unwrap()),
            leaf: None,
        };
        assert!(!line(&entry).chars().any(char::is_control));
    }
}
