//! Entries that the log could not take, kept until it can.
//!
//! One file of JSON lines, its space set aside beforehand so that a full disk does not lose the
//! record of what was closed. Each line is synced before the act goes on. An entry may reach the
//! log twice (a crash between sending and forgetting), never zero times, as long as the space
//! lasts; what does not fit is said in the operator's log.

use crate::limits::SPOOL_MAX_BYTES;
use anyhow::Context as _;
use api::audit::{Class, Entry};
use serde::{Deserialize, Serialize};
use service::audit::Log;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// The spool.
pub struct Spool {
    inner: Arc<Mutex<Inner>>,
    /// One flush at a time.
    flushing: tokio::sync::Mutex<()>,
}

struct Inner {
    file: File,
    /// Bytes written.
    len: u64,
    /// Bytes of them that the log has.
    sent: u64,
}

#[derive(Serialize, Deserialize)]
struct Line {
    class: Class,
    entry: Entry,
}

impl Spool {
    /// Opens the spool, setting its space aside.
    ///
    /// # Errors
    /// The file's.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .with_context(|| format!("open {}", path.display()))?;
        reserve(&file);
        let len = file.metadata()?.len();
        let inner = Arc::new(Mutex::new(Inner { file, len, sent: 0 }));
        Ok(Self {
            inner,
            flushing: tokio::sync::Mutex::default(),
        })
    }

    /// Keeps an entry; durable when it returns.
    pub async fn put(&self, class: Class, entry: Entry) {
        let (event, request_id) = (entry.event.clone(), entry.request_id.clone());
        let kept = self
            .with(move |inner| {
                let mut line = serde_json::to_vec(&Line { class, entry })?;
                line.push(b'\n');
                if inner.len + line.len() as u64 > SPOOL_MAX_BYTES {
                    return Err(std::io::Error::other("the spool is full"));
                }
                inner.file.write_all_at(&line, inner.len)?;
                inner.file.sync_data()?;
                inner.len += line.len() as u64;
                Ok(())
            })
            .await;
        if let Err(e) = kept {
            tracing::error!(event, request_id, error = %e, "an audit entry is lost");
        }
    }

    /// Sends what is kept to the log, in order; returns how many entries are left.
    pub async fn flush(&self, log: &Log) -> u64 {
        let _one = self.flushing.lock().await;
        let lines = match self.with(|inner| inner.lines()).await {
            Ok(lines) => lines,
            Err(e) => {
                tracing::error!(error = %e, "read the spool");
                return 0;
            }
        };
        let mut sent = 0;
        let mut left = lines.len() as u64;
        for (line, end) in lines {
            // A line that a crash cut off announces nothing that happened.
            if let Some(Line { class, entry }) = line
                && log.append(class, entry).await.is_err()
            {
                break;
            }
            (sent, left) = (end, left - 1);
        }
        if sent > 0
            && let Err(e) = self.with(move |inner| inner.forget(sent)).await
        {
            tracing::error!(error = %e, "shorten the spool");
        }
        left
    }

    async fn with<T: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Inner) -> std::io::Result<T> + Send + 'static,
    ) -> std::io::Result<T> {
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || {
            f(&mut inner.lock().unwrap_or_else(PoisonError::into_inner))
        })
        .await
        .map_err(std::io::Error::other)?
    }
}

impl Inner {
    /// The lines that were not sent yet, each with the offset of its end.
    fn lines(&mut self) -> std::io::Result<Vec<(Option<Line>, u64)>> {
        let len = (self.len - self.sent).min(SPOOL_MAX_BYTES);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        self.file.read_exact_at(&mut bytes, self.sent)?;
        let mut reader = BufReader::new(&bytes[..]);
        let (mut lines, mut end, mut text) = (Vec::new(), self.sent, Vec::new());
        loop {
            text.clear();
            let n = reader.read_until(b'\n', &mut text)?;
            if n == 0 {
                return Ok(lines);
            }
            end += n as u64;
            lines.push((serde_json::from_slice(&text).ok(), end));
        }
    }

    /// What ends at `sent` need not be sent again; the file is emptied when all of it was.
    fn forget(&mut self, sent: u64) -> std::io::Result<()> {
        self.sent = sent;
        if self.sent == self.len {
            self.file.set_len(0)?;
            (self.len, self.sent) = (0, 0);
            reserve(&self.file);
            self.file.sync_all()?;
        }
        Ok(())
    }
}

/// Sets the space aside. Not every file system can; then it is found when it is needed.
fn reserve(file: &File) {
    let keep = rustix::fs::FallocateFlags::KEEP_SIZE;
    if let Err(e) = rustix::fs::fallocate(file, keep, 0, SPOOL_MAX_BYTES) {
        tracing::warn!(error = %e, "no space is set aside for the spool");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn entry(event: &str) -> Entry {
        let json = serde_json::json!({
            "event": event, "phase": "fact", "request_id": "req_0", "actor": "internal:test",
        });
        serde_json::from_value(json).unwrap()
    }

    #[tokio::test]
    async fn entries_survive_and_are_forgotten_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spool");
        let spool = Spool::open(&path).unwrap();
        for event in ["a.b", "c.d", "e.f"] {
            spool.put(Class::Host, entry(event)).await;
        }
        drop(spool);
        let spool = Spool::open(&path).unwrap();
        let mut inner = spool.inner.lock().unwrap();
        let lines = inner.lines().unwrap();
        let events: Vec<_> = lines
            .iter()
            .map(|l| l.0.as_ref().unwrap().entry.event.clone())
            .collect();
        assert_eq!(events, ["a.b", "c.d", "e.f"]);
        inner.forget(lines[1].1).unwrap();
        assert_eq!(
            inner.lines().unwrap()[0].0.as_ref().unwrap().entry.event,
            "e.f"
        );
        let len = inner.len;
        inner.forget(len).unwrap();
        assert_eq!(inner.file.metadata().unwrap().len(), 0);
        assert!(inner.lines().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_log_that_is_away_takes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(&dir.path().join("spool")).unwrap();
        spool.put(Class::Host, entry("a.b")).await;
        let log = Log::new(&service::paths::Paths::new(dir.path()));
        assert_eq!(spool.flush(&log).await, 1);
        assert_eq!(spool.flush(&log).await, 1);
    }
}
