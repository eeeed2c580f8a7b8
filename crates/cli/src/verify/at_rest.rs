//! What somebody does who can write to the machine's disk: files at rest are kept, put back, changed.

use super::logs;
use super::world::World;
use anyhow::{Context as _, bail, ensure};
use api::audit::Class;
use rustix::fs::{SeekFrom, seek};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

/// Where ciphertext begins in a volume's file, bytes.
const DATA_BYTES: u64 = 16 << 20;
/// An alarm is in the log of security within this.
const ALARM_WITHIN: Duration = Duration::from_secs(10);
/// A volume and its sidecar.
const FILES: [&str; 2] = ["volume", "tags"];

/// Both files of an object at rest, without their holes.
pub(super) struct Kept([Sparse; 2]);

#[derive(Clone)]
struct Sparse {
    len: u64,
    extents: Vec<(u64, Vec<u8>)>,
}

impl Kept {
    pub(super) fn of(dir: &Path) -> anyhow::Result<Self> {
        let [volume, tags] = FILES.map(|name| Sparse::of(&dir.join(name)));
        Ok(Self([volume?, tags?]))
    }

    /// Writes them in the place of those that are there.
    pub(super) fn put(&self, dir: &Path) -> anyhow::Result<()> {
        let both = self.0.iter().zip(FILES);
        both.into_iter()
            .try_for_each(|(file, name)| file.put(&dir.join(name)))
    }

    /// The same with a bit changed in each 16 KiB of ciphertext from `from` on.
    pub(super) fn flipped(&self, from: u64) -> Self {
        let [volume, tags] = &self.0;
        let mut volume = volume.clone();
        for (at, bytes) in &mut volume.extents {
            let begin = (DATA_BYTES + from).next_multiple_of(16 << 10);
            let first = begin.max(at.next_multiple_of(16 << 10)) - *at;
            let first = usize::try_from(first).unwrap_or(usize::MAX);
            for byte in bytes.iter_mut().skip(first).step_by(16 << 10) {
                *byte ^= 1;
            }
        }
        Self([volume, tags.clone()])
    }
}

impl Sparse {
    fn of(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        let len = file.metadata()?.len();
        let (mut extents, mut from) = (Vec::new(), 0);
        // ENXIO: no data behind `from`.
        while let Ok(start) = seek(&file, SeekFrom::Data(from)) {
            let end = seek(&file, SeekFrom::Hole(start)).unwrap_or(len);
            let mut bytes = vec![0; usize::try_from(end - start)?];
            file.read_exact_at(&mut bytes, start)?;
            extents.push((start, bytes));
            from = end;
        }
        Ok(Self { len, extents })
    }

    fn put(&self, path: &Path) -> anyhow::Result<()> {
        let file = File::options().write(true).open(path);
        let file = file.with_context(|| format!("open {}", path.display()))?;
        file.set_len(0)?;
        file.set_len(self.len)?;
        for (at, bytes) in &self.extents {
            file.write_all_at(bytes, *at)?;
        }
        Ok(())
    }
}

/// On a workspace that was stopped and whose disk was `older` before its last start: the older files
/// and one bit of the newest are each refused and an alarm; the newest are what starts.
pub(super) async fn changes_are_refused(
    w: &World<'_>,
    id: &str,
    older: &Kept,
) -> anyhow::Result<String> {
    let file = w.probe.disk_file(id);
    let dir = file.parent().context("a disk has a directory")?;
    let newest = Kept::of(dir)?;
    older.put(dir)?;
    start_refused(w, id, "rolled back to before its last start").await?;
    let entries = alarms(w, id)?;
    ensure!(entries == 1, "a rollback left {entries} alarms in the log");
    newest.put(dir)?;
    // In the sector that a file system's superblock is in, which every start reads, beside it.
    let flip = |byte: u8| -> anyhow::Result<()> {
        let file = File::options().read(true).write(true).open(&file)?;
        let mut now = [0];
        file.read_exact_at(&mut now, DATA_BYTES + 100)?;
        Ok(file.write_all_at(&[now[0] ^ byte], DATA_BYTES + 100)?)
    };
    flip(1)?;
    start_refused(w, id, "with one bit changed").await?;
    newest.put(dir)?;
    w.power(id, "start").await?;
    Ok("rolled back to before its last start, and with one bit of its disk changed, it was refused (disk_tampered, disk.tampered in the security log); with its newest files it started".into())
}

async fn start_refused(w: &World<'_>, id: &str, how: &str) -> anyhow::Result<()> {
    let Err(why) = w.power(id, "start").await else {
        bail!("it started on a disk {how}");
    };
    let why = why.to_string();
    ensure!(why.contains("(disk_tampered"), "on a disk {how}: {why}");
    Ok(())
}

/// Alarms of the workspace in the log of security; waits for the first.
fn alarms(w: &World<'_>, id: &str) -> anyhow::Result<usize> {
    let deadline = Instant::now() + ALARM_WITHIN;
    loop {
        let log = logs::entries(w, Class::Security)?;
        let of =
            |e: &api::audit::Entry| e.event == "disk.tampered" && e.subject.as_deref() == Some(id);
        let count = log.iter().filter(|e| of(&e.entry)).count();
        if count > 0 || Instant::now() > deadline {
            return Ok(count);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The code that an object was refused with.
pub(super) fn code_of(why: &anyhow::Error) -> String {
    let text = why.to_string();
    let code = text.rsplit_once(" (").map(|(_, rest)| rest);
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    code.and_then(|rest| rest.split(word).next())
        .unwrap_or(&text)
        .to_owned()
}
