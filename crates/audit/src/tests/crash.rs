//! `kill -9` and power cuts at every step of append and integrate.

use crate::append::keys::Keys;
use crate::append::log::{Draft, Log as Appender, LogError};
use crate::disk::Disk;
use crate::disk::double::Double;
use crate::integrate::log::{IntegrateError, Integrated, Log as Integrator, Source, create};
use crate::testing::{TIME_MS, bundle_entries, days_publish, temp_dir, verify_known};
use model::AccountId;
use seal::hpke::SecretKey;
use seal::secret::SecretBytes;
use seal::sign::SigningKey;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tlog::checkpoint::Checkpoint;
use tlog::class::Class;
use tlog::receipt::Receipt;

const CLASS: Class = Class::Host;
const ORIGIN: &str = "casemate.local/local/host";

/// What is done when the process is gone.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cut {
    /// The kernel lives: all that was written is there.
    Kill,
    /// Nothing that was not synced is there.
    Power,
    /// Some of what was not synced is there.
    PowerSome(u64),
}

/// One class's log, its disk, and what callers were told.
struct Rig {
    dir: tempfile::TempDir,
    disk: Disk,
    double: Arc<Mutex<Double>>,
    keys: Keys,
    key: SigningKey,
    /// (index, leaf) of each entry that was answered.
    told: Vec<(u64, Vec<u8>)>,
    /// Checkpoints that left the process.
    seen: Vec<Checkpoint>,
}

enum Died {
    Append(LogError),
    Integrate(IntegrateError),
}

impl From<LogError> for Died {
    fn from(e: LogError) -> Died {
        Died::Append(e)
    }
}

impl From<IntegrateError> for Died {
    fn from(e: IntegrateError) -> Died {
        Died::Integrate(e)
    }
}

impl std::fmt::Debug for Died {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Died::Append(e) => write!(f, "{e}"),
            Died::Integrate(e) => write!(f, "{e}"),
        }
    }
}

impl Rig {
    fn new(seed: u64) -> Rig {
        let dir = temp_dir();
        let (disk, double) = Disk::doubled(None, seed);
        let key = SigningKey::from_seed(&[1; 32]);
        days_publish(dir.path(), &SecretKey::generate(), 20_000..20_002);
        create(&disk, &dir.path().join("tree"), CLASS, "local", &key).unwrap();
        Rig {
            keys: Keys::open(dir.path()).unwrap(),
            dir,
            disk,
            double,
            key,
            told: Vec::new(),
            seen: Vec::new(),
        }
    }

    fn tree(&self) -> PathBuf {
        self.dir.path().join("tree")
    }

    fn segments(&self) -> PathBuf {
        self.dir.path().join("segments")
    }

    fn open(&self) -> Result<(Appender, Integrator), Died> {
        let blinding = SecretBytes::from_slice(&[2; 32]).unwrap();
        let append = Appender::open(self.disk.clone(), &self.segments(), CLASS, blinding)?;
        let integrate = Integrator::open(Source {
            disk: self.disk.clone(),
            dir: self.tree(),
            segments: self.segments(),
            class: CLASS,
            installation: "local".into(),
            key: self.key.clone(),
        })?;
        assert!(
            integrate.size() <= append.size(),
            "published beyond what is durable"
        );
        Ok((append, integrate))
    }

    fn commit(&mut self, log: &mut Appender, count: u64) -> Result<Vec<Receipted>, Died> {
        let drafts = (0..count).map(|i| Draft {
            account: (i % 3 > 0).then(|| AccountId::from_bytes([(i % 3) as u8; 8])),
            payload: format!("said {i}").into_bytes(),
        });
        let now = TIME_MS + log.size();
        let done = log.commit(drafts.collect(), &self.keys, now, Instant::now())?;
        let placed: Vec<_> = done.placed.into_iter().map(Result::unwrap).collect();
        self.told
            .extend(placed.iter().map(|p| (p.index, p.leaf.clone())));
        Ok(placed)
    }

    fn integrate(
        &mut self,
        log: &mut Integrator,
        size: u64,
        wanted: &[Receipted],
    ) -> Result<Integrated, Died> {
        let indexes: Vec<u64> = wanted.iter().map(|p| p.index).collect();
        let done = log.integrate(size, &indexes)?;
        let opened =
            Checkpoint::open(done.checkpoint.as_bytes(), ORIGIN, &self.key.public(), &[]).unwrap();
        assert_eq!(opened.checkpoint.size, done.size);
        self.seen.push(opened.checkpoint);
        for (placed, proof) in wanted.iter().zip(&done.proofs) {
            let path: Vec<_> = proof.iter().map(|h| crate::testing::hash(h)).collect();
            let receipt = Receipt::new(
                CLASS,
                placed.index,
                &placed.leaf,
                &placed.opening,
                &path,
                &done.checkpoint,
            );
            receipt.verify(&self.key.public(), ORIGIN).unwrap();
        }
        Ok(done)
    }

    /// A life of a log: commits, integrations, new segments, old ones forgotten.
    fn live(&mut self) -> Result<(), Died> {
        let (mut append, mut integrate) = self.open()?;
        self.commit(&mut append, 1)?;
        let placed = self.commit(&mut append, 3)?;
        self.integrate(&mut integrate, append.size(), &placed)?;
        append.rotate()?;
        append.forget(integrate.size())?;
        self.commit(&mut append, 2)?;
        append.rotate()?;
        let placed = self.commit(&mut append, 255)?;
        let done = self.integrate(&mut integrate, append.size(), &placed[250..])?;
        append.forget(done.size)?;
        self.commit(&mut append, 2)?;
        drop((append, integrate));
        // Started anew, without a fault in between.
        let (mut append, mut integrate) = self.open()?;
        self.commit(&mut append, 2)?;
        self.integrate(&mut integrate, append.size(), &[])?;
        Ok(())
    }

    fn cut(&mut self, cut: Cut) {
        let mut double = self.double.lock().unwrap();
        let (tree, segments) = (self.tree(), self.segments());
        let dirs: [&Path; 2] = [&tree, &segments];
        match cut {
            Cut::Kill => {}
            Cut::Power => double.power_cut(&dirs, false),
            Cut::PowerSome(_) => double.power_cut(&dirs, true),
        }
        double.restart(None);
    }

    /// Goes on after a fault, and checks that nothing that anybody was told is lost or changed.
    fn check(&mut self, what: &str) {
        let (mut append, mut integrate) = self.open().unwrap_or_else(|e| panic!("{what}: {e:?}"));
        let told = self.told.last().map_or(0, |(index, _)| index + 1);
        assert!(
            append.size() >= told,
            "{what}: {told} were told, {} are there",
            append.size()
        );
        let seen = self.seen.last().map_or(0, |c| c.size);
        assert!(integrate.size() >= seen, "{what}: the checkpoint went back");
        let size = append.size();
        let placed = self.commit(&mut append, 4).unwrap();
        assert_eq!(placed[0].index, size, "{what}");
        self.integrate(&mut integrate, append.size(), &placed)
            .unwrap_or_else(|e| panic!("{what}: {e:?}"));
        let report = verify_known(&self.tree(), CLASS, &self.key.public(), &self.seen);
        assert!(report.is_clean(), "{what}: {:?}", report.faults);
        let entries = bundle_entries(&self.tree(), append.size());
        for (index, leaf) in &self.told {
            let at = usize::try_from(*index).unwrap();
            assert!(entries[at] == *leaf, "{what}: entry {index} is another one");
        }
    }
}

type Receipted = crate::append::log::Placed;

fn each_step(cuts: &[Cut]) {
    let mut rig = Rig::new(1);
    rig.double.lock().unwrap().restart(None);
    rig.live().unwrap();
    let steps = rig.double.lock().unwrap().steps;
    assert!(steps > 50, "{steps}");
    rig.check("no fault");
    for cut in cuts {
        for step in 0..steps {
            let seed = if let Cut::PowerSome(seed) = cut {
                *seed
            } else {
                7
            };
            let mut rig = Rig::new(seed * 1_000 + step);
            rig.double.lock().unwrap().restart(Some(step));
            assert!(rig.live().is_err(), "it stops at step {step}");
            rig.cut(*cut);
            rig.check(&format!("{cut:?} at step {step}"));
            // And once more, with everything that the recovery left.
            rig.cut(*cut);
            rig.check(&format!("{cut:?} again after step {step}"));
        }
    }
}

#[test]
fn killed_at_each_step_nothing_told_is_lost() {
    each_step(&[Cut::Kill]);
}

#[test]
fn a_power_cut_at_each_step_loses_nothing_told() {
    each_step(&[Cut::Power]);
}

#[test]
fn a_power_cut_that_keeps_some_of_the_unsynced_loses_nothing_told() {
    each_step(&[Cut::PowerSome(1), Cut::PowerSome(2), Cut::PowerSome(3)]);
}

#[test]
fn after_a_failed_write_a_log_takes_nothing_more() {
    let mut rig = Rig::new(5);
    let (mut append, _) = rig.open().unwrap();
    rig.commit(&mut append, 1).unwrap();
    rig.double.lock().unwrap().restart(Some(0));
    assert!(rig.commit(&mut append, 1).is_err());
    rig.double.lock().unwrap().restart(None);
    let e = format!("{:?}", rig.commit(&mut append, 1).err().unwrap());
    assert!(e.contains("must start anew"), "{e}");
    assert!(append.rotate().is_err());
    drop(append);
    rig.check("anew");
}

#[test]
fn the_double_forgets_what_was_not_synced() {
    // A test of the test: without the fdatasync, a power cut must lose the batch.
    let mut rig = Rig::new(3);
    let (mut append, _) = rig.open().unwrap();
    rig.commit(&mut append, 2).unwrap();
    let path = rig.segments().join(crate::segment::name(0));
    let file = std::fs::OpenOptions::new()
        .append(true)
        .open(&path)
        .unwrap();
    rig.disk.append(&file, b"not synced").unwrap();
    rig.disk
        .file_write(&rig.tree().join("stray"), b"not named")
        .unwrap();
    rig.cut(Cut::Power);
    assert!(!rig.tree().join("stray").exists());
    let bytes = std::fs::read(&path).unwrap();
    assert!(!bytes.ends_with(b"not synced"));
    rig.check("the double");
}
