//! Volumes and their LUKS1 exports against other readers: `cryptsetup`, `nbdkit`'s LUKS filter and
//! QEMU.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use disk::DiskError;
use disk::backing::Backing;
use disk::limits::{DATA_OFFSET_BYTES, LUKS1_DATA_OFFSET_BYTES, SECTOR_BYTES};
use disk::luks1;
use disk::luks2::{self, DiskKey, VolumeKey};
use disk::volume::Volume;
use proptest::prelude::*;

const SIZE_BYTES: u64 = 4 << 20;

struct Sample {
    dir: tempfile::TempDir,
    file: File,
    key: VolumeKey,
    disk_key: DiskKey,
}

impl Sample {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = open(&dir.path().join("volume"));
        let (key, disk_key) = (VolumeKey::random(), DiskKey::random());
        Backing::set_len(&file, DATA_OFFSET_BYTES + SIZE_BYTES).unwrap();
        luks2::create(&file, &key, &disk_key, &workspace()).unwrap();
        Self {
            dir,
            file,
            key,
            disk_key,
        }
    }

    fn path(&self) -> String {
        self.at("volume")
    }

    fn at(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn passphrase(&self) -> String {
        hex::encode(self.disk_key.expose())
    }

    fn volume(&self) -> Volume<File> {
        Volume::new(self.file.try_clone().unwrap(), &self.key, SIZE_BYTES).unwrap()
    }

    /// Fills the volume through the cipher and answers what is in it.
    fn write_pattern(&self) -> Vec<u8> {
        let volume = self.volume();
        let plain: Vec<u8> = (0..SIZE_BYTES).map(|at| (at / 97 + at) as u8).collect();
        volume.write(0, &mut plain.clone()).unwrap();
        plain
    }

    fn open(&self) -> Result<VolumeKey, DiskError> {
        luks2::open(&self.file, &self.disk_key, &workspace())
    }
}

fn workspace() -> model::WorkspaceId {
    "ws_0123456789abcdef".parse().unwrap()
}

fn open(path: &Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

/// Runs a tool with `input` on its stdin; its output if it succeeds.
fn tool(program: &str, args: &[&str], input: &str) -> Output {
    use std::io::Write;
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {stderr}");
    output
}

#[test]
fn cryptsetup_reads_the_header_and_finds_the_same_volume_key() {
    let sample = Sample::new();
    let dump = tool("cryptsetup", &["luksDump", &sample.path()], "");
    let text = String::from_utf8(dump.stdout).unwrap();
    for line in [
        "Version:       \t2",
        "cipher: aes-xts-plain64",
        "sector: 4096 [bytes]",
    ] {
        assert!(text.contains(line), "{line} in\n{text}");
    }

    let key_file = sample.at("dumped");
    let args = [
        "luksDump",
        "--batch-mode",
        "--dump-volume-key",
        "--volume-key-file",
        &key_file,
        "--key-file",
        "-",
        &sample.path(),
    ];
    tool("cryptsetup", &args, &sample.passphrase());
    let dumped = std::fs::read(key_file).unwrap();
    assert!(
        seal::hash::ct_eq(&dumped, sample.key.expose()),
        "cryptsetup found another key"
    );
}

/// The other way round: what `cryptsetup` makes of our header when it rewrites it.
#[test]
fn a_header_that_cryptsetup_rewrote_still_opens() {
    let sample = Sample::new();
    tool(
        "cryptsetup",
        &["config", "--label", "relabelled", &sample.path()],
        "",
    );
    assert!(sample.open().unwrap() == sample.key);
}

#[test]
fn each_copy_alone_is_enough_and_neither_is_an_error() {
    for lost in [0, 16 << 10] {
        let sample = Sample::new();
        sample.file.write_all_at(&[0xff; 4096], lost).unwrap();
        assert!(sample.open().unwrap() == sample.key);
        tool("cryptsetup", &["luksDump", &sample.path()], "");
    }
    let sample = Sample::new();
    sample.file.write_all_at(&[0; 32 << 10], 0).unwrap();
    assert!(matches!(sample.open(), Err(DiskError::NoHeader)));
    sample
        .file
        .write_all_at(b"LUKS\xba\xbe\x00\x02", 0)
        .unwrap();
    assert!(matches!(
        sample.open(),
        Err(DiskError::Header {
            copy: "primary",
            ..
        })
    ));
}

#[test]
fn errors_tell_what_is_wrong() {
    let sample = Sample::new();
    let wrong_key = luks2::open(&sample.file, &DiskKey::random(), &workspace());
    assert!(matches!(wrong_key, Err(DiskError::WrongKey)));
    let stranger = "ws_fedcba9876543210".parse().unwrap();
    let other = luks2::open(&sample.file, &sample.disk_key, &stranger);
    assert!(matches!(other, Err(DiskError::WrongWorkspace)));

    for copy in [0, 16 << 10] {
        sample.file.write_all_at(&[0, 3], copy + 6).unwrap();
    }
    assert!(matches!(
        sample.open(),
        Err(DiskError::Version { found: 3 })
    ));
    sample.file.set_len(1000).unwrap();
    assert!(sample.open().is_err());
    sample.file.set_len(0).unwrap();
    assert!(matches!(sample.open(), Err(DiskError::NoHeader)));
    assert!(!luks2::exists(&sample.file).unwrap());
}

/// `cryptsetup` decrypts our volume, in user space, to the byte: our sectors are LUKS2's.
#[test]
fn cryptsetup_decrypts_the_whole_volume() {
    let sample = Sample::new();
    let plain = sample.write_pattern();
    let header = sample.at("exported-header");
    let args = [
        "reencrypt",
        "--decrypt",
        "--force-offline-reencrypt",
        "--batch-mode",
        "--header",
        &header,
        "--key-file=-",
        &sample.path(),
    ];
    tool("cryptsetup", &args, &sample.passphrase());
    let mut decrypted = vec![0; plain.len()];
    sample.file.read_exact_at(&mut decrypted, 0).unwrap();
    assert!(decrypted == plain, "cryptsetup decrypts something else");
}

/// The header of an export is `cryptsetup`'s LUKS1, with the volume's own key and passphrase.
#[test]
fn cryptsetup_finds_the_same_volume_key_in_a_luks1_export() {
    let sample = Sample::new();
    let (volume, luks1) = (sample.volume(), sample.at("luks1"));
    let out = open(Path::new(&luks1));
    luks1::export(&volume, &sample.key, &sample.disk_key, &out).unwrap();
    tool("cryptsetup", &["isLuks", "--type=luks1", &luks1], "");
    let key_file = sample.at("dumped");
    let args = [
        "luksDump",
        "--batch-mode",
        "--dump-volume-key",
        "--volume-key-file",
        &key_file,
        "--key-file",
        "-",
        &luks1,
    ];
    tool("cryptsetup", &args, &sample.passphrase());
    let dumped = std::fs::read(key_file).unwrap();
    assert!(seal::hash::ct_eq(&dumped, sample.key.expose()));

    let data = disk::backing::next_data(&out, LUKS1_DATA_OFFSET_BYTES).unwrap();
    assert_eq!(data, None, "a hole became data");
    let before = std::fs::read(&luks1).unwrap();
    let again = luks1::export(&volume, &sample.key, &sample.disk_key, &out);
    assert!(matches!(again, Err(DiskError::Occupied { .. })));
    assert!(std::fs::read(&luks1).unwrap() == before);
}

/// What the guest wrote, and in which sectors.
struct Written {
    plain: Vec<u8>,
    allocated: Vec<bool>,
}

impl Written {
    /// Random bytes, or a discard, at each place.
    fn run(volume: &Volume<File>, changes: &[(bool, u64, u64)]) -> Self {
        let sectors = SIZE_BYTES as usize / SECTOR_BYTES;
        let (mut plain, mut allocated) = (vec![0; SIZE_BYTES as usize], vec![false; sectors]);
        for &(discard, at, len) in changes {
            let len = len.min(SIZE_BYTES - at);
            let range = at as usize..(at + len) as usize;
            let touched = range.start / SECTOR_BYTES..range.end.div_ceil(SECTOR_BYTES);
            allocated[touched].fill(true);
            if discard {
                volume.zero(at, len).unwrap();
                plain[range.clone()].fill(0);
                let whole = range.start.div_ceil(SECTOR_BYTES)..range.end / SECTOR_BYTES;
                if !whole.is_empty() {
                    allocated[whole].fill(false);
                }
            } else {
                let data = &mut plain[range];
                seal::random::fill(data);
                volume.write(at, &mut data.to_vec()).unwrap();
            }
        }
        Self { plain, allocated }
    }

    fn sectors<'a>(&'a self, other: &'a [u8]) -> impl Iterator<Item = (bool, &'a [u8], &'a [u8])> {
        assert_eq!(other.len(), self.plain.len());
        let pairs = self
            .plain
            .chunks(SECTOR_BYTES)
            .zip(other.chunks(SECTOR_BYTES));
        let with = self.allocated.iter().zip(pairs);
        with.map(|(allocated, (ours, theirs))| (*allocated, ours, theirs))
    }

    /// What a reader decrypts from each allocated sector is what the guest wrote.
    fn check_read(&self, reader: &str, path: &str) {
        let read = std::fs::read(path).unwrap();
        for (sector, (allocated, ours, theirs)) in self.sectors(&read).enumerate() {
            assert!(!allocated || ours == theirs, "{reader}: sector {sector}");
        }
    }

    /// Holes are zeros; no block of an allocated sector is there in the clear.
    fn check_at_rest(&self, path: &str) {
        let file = std::fs::read(path).unwrap();
        let data = &file[LUKS1_DATA_OFFSET_BYTES as usize..];
        for (sector, (allocated, plain, at_rest)) in self.sectors(data).enumerate() {
            if allocated {
                let mut blocks = plain.chunks(16).zip(at_rest.chunks(16));
                assert!(blocks.all(|(a, b)| a != b), "plaintext in sector {sector}");
            } else {
                assert!(at_rest.iter().all(|&byte| byte == 0), "hole {sector}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]
    /// Two independent readers of LUKS1 see in each allocated sector what the guest wrote.
    #[test]
    fn nbdkit_and_qemu_read_the_same_plaintext_from_a_luks1_export(
        changes in proptest::collection::vec(
            (proptest::bool::weighted(0.25), 0..SIZE_BYTES, 1u64..100_000),
            1..40,
        ),
    ) {
        let sample = Sample::new();
        let volume = sample.volume();
        let written = Written::run(&volume, &changes);
        let (luks1, passphrase) = (sample.at("luks1"), sample.at("passphrase"));
        let out = open(Path::new(&luks1));
        luks1::export(&volume, &sample.key, &sample.disk_key, &out).unwrap();
        written.check_at_rest(&luks1);

        std::fs::write(&passphrase, sample.passphrase()).unwrap();
        let plain = sample.at("by-nbdkit");
        let args = [
            "-U",
            "-",
            "--filter=luks",
            "file",
            &luks1,
            &format!("passphrase=+{passphrase}"),
            "--run",
            &format!("qemu-img convert -f raw -O raw \"$uri\" {plain}"),
        ];
        tool("nbdkit", &args, "");
        written.check_read("nbdkit", &plain);

        let plain = sample.at("by-qemu");
        let args = [
            "convert",
            "--object",
            &format!("secret,id=passphrase,file={passphrase}"),
            "--image-opts",
            &format!("driver=luks,key-secret=passphrase,file.filename={luks1}"),
            "-O",
            "raw",
            &plain,
        ];
        tool("qemu-img", &args, "");
        written.check_read("qemu-img", &plain);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    /// Changed bytes anywhere in both copies and the keyslot: the key, or an error; never a panic
    /// and never another key.
    #[test]
    fn a_hostile_header_gives_the_key_or_an_error(
        changes in proptest::collection::vec((0u64..290_000, any::<u8>()), 1..40),
    ) {
        let sample = Sample::new();
        for (at, with) in changes {
            sample.file.write_all_at(&[with], at).unwrap();
        }
        if let Ok(key) = sample.open() {
            prop_assert!(key == sample.key);
        }
    }
}
