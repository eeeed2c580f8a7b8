//! Damage that no crash explains: it is refused at the start, and found by the verifier.

use crate::append::keys::Keys;
use crate::append::log::{Draft, Log as Appender};
use crate::integrate::log::{Log as Integrator, Source, create};
use crate::segment;
use crate::testing::{TIME_MS, days_publish, disk, temp_dir, verify_known};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use seal::hpke::SecretKey;
use seal::secret::SecretBytes;
use seal::sign::SigningKey;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tlog::checkpoint::Checkpoint;
use tlog::class::Class;
use tlog::tile::Tile;
use tlog::verify::LogReader as _;

const CLASS: Class = Class::Flow;

struct Rig {
    dir: tempfile::TempDir,
    key: SigningKey,
}

impl Rig {
    /// A log of these batches, integrated after each.
    fn new(batches: &[u64]) -> Rig {
        let rig = Rig {
            dir: temp_dir(),
            key: SigningKey::from_seed(&[1; 32]),
        };
        days_publish(rig.dir.path(), &SecretKey::generate(), 20_000..20_002);
        create(&disk(), &rig.tree(), CLASS, "local", &rig.key).unwrap();
        let mut append = rig.append().unwrap();
        let mut integrate = rig.integrate().unwrap();
        for batch in batches {
            rig.commit(&mut append, *batch);
            integrate.integrate(append.size(), &[]).unwrap();
        }
        rig
    }

    fn commit(&self, append: &mut Appender, count: u64) {
        let keys = Keys::open(self.dir.path()).unwrap();
        let draft = Draft {
            account: None,
            payload: b"said".to_vec(),
        };
        let drafts = vec![draft; usize::try_from(count).unwrap()];
        append
            .commit(drafts, &keys, TIME_MS, Instant::now())
            .unwrap();
    }

    fn tree(&self) -> PathBuf {
        self.dir.path().join("tree")
    }

    fn segments(&self) -> PathBuf {
        self.dir.path().join("segments")
    }

    fn append(&self) -> Result<Appender, String> {
        let blinding = SecretBytes::from_slice(&[2; 32]).unwrap();
        Appender::open(disk(), &self.segments(), CLASS, blinding).map_err(|e| e.to_string())
    }

    fn integrate(&self) -> Result<Integrator, String> {
        Integrator::open(Source {
            disk: disk(),
            dir: self.tree(),
            segments: self.segments(),
            class: CLASS,
            installation: "local".into(),
            key: self.key.clone(),
        })
        .map_err(|e| e.to_string())
    }

    fn checkpoint(&self) -> Checkpoint {
        let bytes = std::fs::read(self.tree().join("checkpoint")).unwrap();
        let origin = CLASS.origin("local").unwrap();
        Checkpoint::open(&bytes, &origin, &self.key.public(), &[])
            .unwrap()
            .checkpoint
    }

    fn is_clean(&self, known: &[Checkpoint]) -> bool {
        verify_known(&self.tree(), CLASS, &self.key.public(), known).is_clean()
    }
}

#[derive(Debug, Clone)]
enum Mutation {
    Flip(prop::sample::Index, u8),
    Truncate(prop::sample::Index),
    Extend(Vec<u8>),
    Remove,
    /// Another file's content.
    Replace(prop::sample::Index),
    /// A path that no log has.
    Stranger,
}

fn mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        4 => (any::<prop::sample::Index>(), 0u8..8).prop_map(|(at, bit)| Mutation::Flip(at, bit)),
        2 => any::<prop::sample::Index>().prop_map(Mutation::Truncate),
        1 => proptest::collection::vec(any::<u8>(), 1..80).prop_map(Mutation::Extend),
        1 => Just(Mutation::Remove),
        2 => any::<prop::sample::Index>().prop_map(Mutation::Replace),
        1 => Just(Mutation::Stranger),
    ]
}

#[test]
fn each_of_1000_mutations_of_the_log_on_disk_is_found() {
    let rig = Rig::new(&[3, 200, 60, 300, 7]);
    let known = [rig.checkpoint()];
    assert!(rig.is_clean(&known));
    let size = known[0].size;
    let mut paths = crate::testing::Directory::new(rig.tree()).list();
    paths.push("checkpoint".into());
    // Older partial tiles may go at any time; all else is needed.
    let needed = |path: &str| match Tile::parse(path) {
        Ok(tile) => Tile::at(tile.kind(), tile.index(), size) == Some(tile),
        Err(_) => true,
    };
    let mut runner = TestRunner::new(Config {
        cases: 1_000,
        ..Config::default()
    });
    let strategy = (any::<prop::sample::Index>(), mutation());
    runner
        .run(&strategy, |(which, mutation)| {
            let name = which.get(&paths).clone();
            let path = rig.tree().join(&name);
            let good = std::fs::read(&path).unwrap();
            let mut bad = good.clone();
            match &mutation {
                Mutation::Flip(at, bit) => bad[at.index(good.len())] ^= 1 << bit,
                Mutation::Truncate(at) => bad.truncate(at.index(good.len())),
                Mutation::Extend(more) => bad.extend_from_slice(more),
                Mutation::Replace(other) => {
                    bad = std::fs::read(rig.tree().join(other.get(&paths))).unwrap()
                }
                Mutation::Remove | Mutation::Stranger => {}
            }
            let stranger = rig.tree().join("tile/0/x");
            match mutation {
                Mutation::Remove => std::fs::remove_file(&path).unwrap(),
                Mutation::Stranger => std::fs::write(&stranger, &good).unwrap(),
                _ => std::fs::write(&path, &bad).unwrap(),
            }
            let clean = rig.is_clean(&known);
            let harmless = match mutation {
                Mutation::Remove => !needed(&name),
                Mutation::Stranger => false,
                _ => bad == good,
            };
            let _ = std::fs::remove_file(&stranger);
            std::fs::write(&path, &good).unwrap();
            prop_assert_eq!(clean, harmless, "{} {:?}", name, mutation);
            Ok(())
        })
        .unwrap();
    assert!(rig.is_clean(&known));
}

#[test]
fn i7_a_log_set_back_with_all_its_files_is_found_and_not_grown() {
    let mut rig = Rig::new(&[10, 10]);
    let older = Rig::new(&[10]);
    let known = [rig.checkpoint()];
    assert!(older.is_clean(&[]) && !older.is_clean(&known));
    // Append has forgotten what was integrated: the older tree can't be brought up to date.
    let mut append = rig.append().unwrap();
    append.rotate().unwrap();
    append.forget(20).unwrap();
    rig.commit(&mut append, 1);
    std::fs::remove_dir_all(rig.tree()).unwrap();
    copy(&older.tree(), &rig.tree());
    rig.key = older.key.clone();
    let e = rig
        .integrate()
        .unwrap()
        .integrate(21, &[])
        .unwrap_err()
        .to_string();
    assert!(e.contains("older than it was"), "{e}");
}

#[test]
fn a_tree_that_is_not_its_checkpoints_is_not_grown() {
    for (file, word) in [
        ("tile/0/000.p/20", "root"),
        ("tile/entries/000.p/20", "entries"),
        ("checkpoint", "checkpoint"),
    ] {
        let rig = Rig::new(&[10, 10]);
        let path = rig.tree().join(file);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.len() - 5;
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let e = rig.integrate().err().unwrap();
        assert!(e.contains("casemate audit verify"), "{file}: {e}");
        assert!(e.contains(word) || e.contains("entries"), "{file}: {e}");
        std::fs::remove_file(&path).unwrap();
        assert!(rig.integrate().is_err(), "{file} is gone");
    }
}

#[test]
fn damaged_segments_are_refused_and_say_what_to_do() {
    let rig = Rig::new(&[]);
    let mut append = rig.append().unwrap();
    for _ in 0..3 {
        rig.commit(&mut append, 2);
    }
    append.rotate().unwrap();
    rig.commit(&mut append, 2);
    drop(append);
    let first = rig.segments().join(segment::name(0));
    let second = rig.segments().join(segment::name(6));
    for path in [&first, &second] {
        let good = std::fs::read(path).unwrap();
        // The start and the first batch; the last batch may be torn by a crash, these can't.
        let end = if path == &first { good.len() } else { 60 };
        for at in (0..end).step_by(7) {
            let mut bad = good.clone();
            bad[at] ^= 4;
            std::fs::write(path, &bad).unwrap();
            let e = rig
                .append()
                .err()
                .unwrap_or_else(|| panic!("{} byte {at}", path.display()));
            assert!(e.contains("restore"), "{e}");
            std::fs::write(path, &good).unwrap();
        }
        std::fs::write(path, &good[..good.len() - 1]).unwrap();
        assert_eq!(
            rig.append().is_err(),
            path == &first,
            "a torn end is cut, a torn middle not"
        );
        std::fs::write(path, &good).unwrap();
    }
    std::fs::rename(&first, rig.dir.path().join("away")).unwrap();
    let size = rig.append().unwrap().size();
    assert_eq!(size, 8, "forgotten segments are not missed by append");
    // But by integrate, which has none of their entries.
    let e = rig
        .integrate()
        .unwrap()
        .integrate(8, &[])
        .unwrap_err()
        .to_string();
    assert!(e.contains("older than it was"), "{e}");
}

#[test]
fn a_batch_of_forged_entries_is_not_integrated() {
    let rig = Rig::new(&[4]);
    drop(rig.append().unwrap());
    let path = rig.segments().join(segment::name(0));
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.extend(segment::batch_encode(CLASS, 4, &[b"no leaf".to_vec()]));
    std::fs::write(&path, bytes).unwrap();
    assert!(rig.append().is_err());
    let mut integrate = rig.integrate().unwrap();
    assert!(integrate.integrate(5, &[]).is_err());
    assert!(
        integrate.integrate(9, &[]).is_err(),
        "nor what is not there"
    );
    assert_eq!(integrate.size(), 4);
    assert!(rig.is_clean(&[]));
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}
