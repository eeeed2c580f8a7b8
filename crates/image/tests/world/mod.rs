//! Layouts, honest and hostile, and imports of them by the real executables.
#![allow(dead_code, unreachable_pub)] // Each test uses its part.

use image::import::{Import, Imported};
use image::oci::Digest;
use image::policy::Policy;
use image::store::Store;
use image::{Error, Refusal};
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// A tar archive, byte by byte.
#[derive(Default, Clone)]
pub struct Tar(pub Vec<u8>);

/// One header's fields.
#[derive(Clone)]
pub struct Head {
    pub path: Vec<u8>,
    pub kind: u8,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub link: Vec<u8>,
}

impl Head {
    pub fn new(path: &str, kind: u8) -> Self {
        Self {
            path: path.into(),
            kind,
            mode: if kind == b'5' { 0o755 } else { 0o644 },
            uid: 0,
            gid: 0,
            size: 0,
            link: Vec::new(),
        }
    }
}

impl Tar {
    pub fn head(mut self, h: &Head) -> Self {
        self.0.extend(block(h));
        self
    }

    pub fn data(mut self, data: &[u8]) -> Self {
        self.0.extend(data);
        let len = self.0.len().next_multiple_of(512);
        self.0.resize(len, 0);
        self
    }

    pub fn file(self, path: &str, data: &[u8]) -> Self {
        self.file_mode(path, 0o644, data)
    }

    pub fn file_mode(self, path: &str, mode: u32, data: &[u8]) -> Self {
        let head = Head {
            mode,
            size: data.len() as u64,
            ..Head::new(path, b'0')
        };
        self.head(&head).data(data)
    }

    pub fn dir(self, path: &str) -> Self {
        self.head(&Head::new(path, b'5'))
    }

    pub fn link(self, kind: u8, path: &str, to: &str) -> Self {
        let head = Head {
            link: to.into(),
            ..Head::new(path, kind)
        };
        self.head(&head)
    }

    pub fn symlink(self, path: &str, to: &str) -> Self {
        self.link(b'2', path, to)
    }

    pub fn hard(self, path: &str, to: &str) -> Self {
        self.link(b'1', path, to)
    }

    /// An extended header with these records.
    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut bytes = Vec::new();
        for (key, value) in records {
            let body = key.len() + value.len() + 3;
            let mut len = body + 1;
            while len.to_string().len() + body != len {
                len += 1;
            }
            bytes.extend(format!("{len} {key}=").bytes());
            bytes.extend(*value);
            bytes.push(b'\n');
        }
        self.special(b'x', &bytes)
    }

    pub fn special(self, kind: u8, bytes: &[u8]) -> Self {
        let head = Head {
            size: bytes.len() as u64,
            ..Head::new("header", kind)
        };
        self.head(&head).data(bytes)
    }

    pub fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1_024]);
        self.0
    }
}

pub fn block(h: &Head) -> [u8; 512] {
    let mut b = [0; 512];
    b[..h.path.len().min(100)].copy_from_slice(&h.path[..h.path.len().min(100)]);
    let octal = |b: &mut [u8; 512], at: usize, width: usize, value: u64| {
        let text = format!("{value:0width$o}");
        b[at..at + width].copy_from_slice(text.as_bytes());
    };
    octal(&mut b, 100, 7, h.mode.into());
    octal(&mut b, 108, 7, h.uid.into());
    octal(&mut b, 116, 7, h.gid.into());
    octal(&mut b, 124, 11, h.size);
    octal(&mut b, 136, 11, 1_700_000_000);
    b[156] = h.kind;
    b[157..157 + h.link.len()].copy_from_slice(&h.link);
    b[257..265].copy_from_slice(b"ustar\x0000");
    sum(&mut b);
    b
}

/// Sets a header's checksum.
pub fn sum(b: &mut [u8; 512]) {
    b[148..156].fill(b' ');
    let sum: u32 = b.iter().map(|v| u32::from(*v)).sum();
    b[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut e = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    e.write_all(bytes).unwrap();
    e.finish().unwrap()
}

/// A layout to be written.
pub struct Layout {
    /// Stored bytes, media type, unpacked digest.
    pub layers: Vec<(Vec<u8>, String, Digest)>,
    pub config: Value,
    pub edit_manifest: Box<dyn Fn(&mut Value)>,
    pub edit_config: Box<dyn Fn(&mut Value)>,
    pub edit_index: Box<dyn Fn(&mut Value)>,
    /// After all is written.
    pub edit_files: Box<dyn Fn(&Path)>,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            layers: Vec::new(),
            config: json!({"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"], "User": "app",
                           "WorkingDir": "/srv", "Entrypoint": null}),
            edit_manifest: Box::new(|_| ()),
            edit_config: Box::new(|_| ()),
            edit_index: Box::new(|_| ()),
            edit_files: Box::new(|_| ()),
        }
    }
}

impl Layout {
    /// One plain layer.
    pub fn of(tar: Tar) -> Self {
        Self::default().plain(tar.end())
    }

    pub fn plain(self, bytes: Vec<u8>) -> Self {
        let digest = Digest::of(&bytes);
        self.stored(bytes, LAYER, digest)
    }

    pub fn gzip(self, bytes: &[u8]) -> Self {
        let digest = Digest::of(bytes);
        self.stored(gzip(bytes), &format!("{LAYER}+gzip"), digest)
    }

    pub fn stored(mut self, bytes: Vec<u8>, media: &str, diff_id: Digest) -> Self {
        self.layers.push((bytes, media.into(), diff_id));
        self
    }

    pub fn manifest(mut self, edit: impl Fn(&mut Value) + 'static) -> Self {
        self.edit_manifest = Box::new(edit);
        self
    }

    pub fn config(mut self, edit: impl Fn(&mut Value) + 'static) -> Self {
        self.edit_config = Box::new(edit);
        self
    }

    pub fn index(mut self, edit: impl Fn(&mut Value) + 'static) -> Self {
        self.edit_index = Box::new(edit);
        self
    }

    pub fn files(mut self, edit: impl Fn(&Path) + 'static) -> Self {
        self.edit_files = Box::new(edit);
        self
    }

    /// Writes the layout; the manifest's digest.
    pub fn write(&self, dir: &Path) -> Digest {
        fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let diff_ids: Vec<_> = self.layers.iter().map(|l| l.2).collect();
        let mut config = json!({"os": "linux", "architecture": "amd64", "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        (self.edit_config)(&mut config);
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|(bytes, media, _)| blob(dir, media, bytes))
            .collect();
        let mut manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST,
            "config": blob(dir, CONFIG, &serde_json::to_vec(&config).unwrap()),
            "layers": layers});
        (self.edit_manifest)(&mut manifest);
        let bytes = serde_json::to_vec(&manifest).unwrap();
        let mut index = json!({"schemaVersion": 2, "manifests": [blob(dir, MANIFEST, &bytes)]});
        (self.edit_index)(&mut index);
        fs::write(dir.join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
        (self.edit_files)(dir);
        Digest::of(&bytes)
    }
}

/// Writes a blob; its descriptor.
pub fn blob(dir: &Path, media: &str, bytes: &[u8]) -> Value {
    let digest = Digest::of(bytes);
    fs::write(dir.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
    json!({"mediaType": media, "digest": digest, "size": bytes.len()})
}

/// A machine's artifacts, and a directory beside them that nothing may touch.
pub struct World {
    pub dir: tempfile::TempDir,
    pub store: Store,
    pub policy: Policy,
    pub insecure_http: bool,
    pub ca: Option<PathBuf>,
}

/// A user that owns nothing, if this is root.
pub fn user() -> Option<(u32, u32)> {
    rustix::process::geteuid()
        .is_root()
        .then_some((64_900, 64_900))
}

pub fn worker() -> PathBuf {
    env!("CARGO_BIN_EXE_casemate-image").into()
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        fs::create_dir_all(dir.path().join("artifacts/images")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/canary"), "alive").unwrap();
        Self {
            store: Store::new(&dir.path().join("artifacts")),
            dir,
            policy: Policy::default(),
            insecure_http: false,
            ca: None,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn import(&self, source: &str, name: &str) -> Result<Imported, Error> {
        Import {
            store: &self.store,
            worker: worker(),
            user: user(),
            source: source.parse()?,
            source_text: source.into(),
            name: name.into(),
            digest: None,
            policy: self.policy.clone(),
            insecure_http: self.insecure_http,
            ca: self.ca.clone(),
            progress: &mut |_| (),
        }
        .run()
    }

    /// Writes the layout and imports it.
    pub fn import_layout(&self, layout: &Layout, name: &str) -> Result<Imported, Error> {
        let dir = self.path(&format!("layout-{name}"));
        let _ = fs::remove_dir_all(&dir);
        layout.write(&dir);
        self.import(&format!("oci:{}", dir.display()), name)
    }

    pub fn refusal(&self, layout: &Layout, name: &str) -> Refusal {
        match self.import_layout(layout, name) {
            Err(Error::Refused(refusal)) => refusal,
            other => panic!("{name}: not refused: {other:?}"),
        }
    }

    /// Every file but the layouts: path, length, mode.
    pub fn everything(&self) -> Vec<String> {
        let mut all = Vec::new();
        for top in ["artifacts", "outside"] {
            visit(&self.path(top), &mut all);
        }
        all.retain(|p| !p.contains("/.lock ") && !p.contains("/.manifest.lock "));
        all.sort();
        all
    }
}

fn visit(dir: &Path, all: &mut Vec<String>) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let meta = entry.path().symlink_metadata().unwrap();
        let (path, mode) = (entry.path(), meta.permissions().mode());
        let len = if meta.is_dir() { 0 } else { meta.len() };
        all.push(format!("{} {len} {mode:o}", path.display()));
        if meta.is_dir() {
            visit(&path, all);
        }
    }
}

/// What `fsck.erofs` takes out of an image, after it checked it.
pub fn extract(erofs: &Path, to: &Path) {
    let out = std::process::Command::new("fsck.erofs")
        .arg(format!("--extract={}", to.display()))
        .arg(erofs)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        out.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&out.stdout)
    );
}
