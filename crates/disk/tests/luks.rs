//! The header against the tools that define it: `cryptsetup` 2.6 and `nbdkit`'s LUKS filter.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use disk::DiskError;
use disk::backing::Backing;
use disk::limits::{DATA_OFFSET_BYTES, SECTOR_BYTES};
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

    /// Fills the volume through the cipher and answers what is in it.
    fn write_pattern(&self) -> Vec<u8> {
        let volume = Volume::new(self.file.try_clone().unwrap(), &self.key, SIZE_BYTES).unwrap();
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

/// A LUKS1 header by `cryptsetup` for the same volume key, in front of the same ciphertext.
/// LUKS1 counts sectors of 512 bytes, so it agrees on the first 512 bytes of each of ours: with
/// that, on the key, its halves, the offset and the unit of the tweak.
#[test]
fn nbdkit_reads_the_same_plaintext_through_a_luks1_header() {
    let sample = Sample::new();
    let plain = sample.write_pattern();

    let (key, luks1, out) = (sample.at("key"), sample.at("luks1"), sample.at("out"));
    std::fs::write(&key, sample.key.expose()).unwrap();
    let file = open(Path::new(&luks1));
    file.set_len(2 * SIZE_BYTES).unwrap();
    let args = [
        "luksFormat",
        "--batch-mode",
        "--type=luks1",
        "--cipher=aes-xts-plain64",
        "--key-size=512",
        "--hash=sha256",
        "--pbkdf-force-iterations=1000",
        "--align-payload=8192",
        "--volume-key-file",
        &key,
        "--key-file=-",
        &luks1,
    ];
    tool("cryptsetup", &args, &sample.passphrase());
    let mut ciphertext = vec![0; SIZE_BYTES as usize];
    FileExt::read_exact_at(&sample.file, &mut ciphertext, DATA_OFFSET_BYTES).unwrap();
    file.write_all_at(&ciphertext, 8192 * 512).unwrap();

    let passphrase = sample.at("passphrase");
    std::fs::write(&passphrase, sample.passphrase()).unwrap();
    let convert = format!("qemu-img convert -f raw -O raw \"$uri\" {out}");
    let args = [
        "-U",
        "-",
        "--filter=luks",
        "file",
        &luks1,
        &format!("passphrase=+{passphrase}"),
        "--run",
        &convert,
    ];
    tool("nbdkit", &args, "");
    let read = std::fs::read(out).unwrap();
    assert_eq!(read.len(), plain.len());
    for (theirs, ours) in read.chunks(SECTOR_BYTES).zip(plain.chunks(SECTOR_BYTES)) {
        assert!(
            theirs[..512] == ours[..512],
            "nbdkit decrypts something else"
        );
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
