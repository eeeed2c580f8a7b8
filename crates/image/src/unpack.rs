//! From an image's index to its erofs file, in one process that has nothing but descriptors.
//!
//! Each blob is checked against its digest before it is parsed, each layer's unpacked stream
//! against the configuration's `diff_id`; the file is complete only when all of them agree.

use crate::error::{Code, Error, Refusal, os};
use crate::limits::{JSON_MAX_BYTES, Limits};
use crate::oci::{self, Config, Descriptor, Digest, Document, Packing};
use crate::tar::{self, Kind};
use crate::tree::{Body, Tree};
use crate::{erofs, policy};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;

type Result<T> = std::result::Result<T, Error>;

/// What is to be unpacked, and within which bounds.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// The manifest or index by its digest; none: by the tag in the layout's index.
    pub digest: Option<Digest>,
    /// The layout's name for it; none: its only one.
    pub tag: Option<String>,
    /// Bounds.
    pub limits: Limits,
    /// Paths that may have setuid or setgid bits.
    pub allow_setuid: Vec<String>,
    /// Paths that may have file capabilities.
    pub allow_capabilities: Vec<String>,
}

/// What came out.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Done {
    /// The image's manifest (of an index, the one for this machine).
    pub manifest: Digest,
    /// What is kept of its configuration.
    pub config: Config,
    /// How many layers it has.
    pub layers: usize,
    /// How many entries they have.
    pub entries: u64,
    /// The file's length, bytes.
    pub bytes: u64,
}

/// Where blobs come from.
pub trait Blobs {
    /// The layout's `index.json`.
    ///
    /// # Errors
    /// If there is none.
    fn index(&mut self) -> Result<File>;
    /// A blob; its contents are not to be trusted.
    ///
    /// # Errors
    /// [`Code::BlobMissing`].
    fn blob(&mut self, digest: &Digest) -> Result<File>;
    /// How far it is.
    ///
    /// # Errors
    /// If nobody listens any more.
    fn progress(&mut self, what: &str) -> Result<()>;
}

/// Unpacks an image.
///
/// # Errors
/// A [`Refusal`], or the system's.
pub fn unpack(job: &Job, blobs: &mut impl Blobs, spool: &File, out: &File) -> Result<Done> {
    let (digest, manifest) = resolve(job, blobs)?;
    let (config_of, layers) = manifest.parts().map_err(|r| r.of(&digest))?;
    let bytes = document(blobs, config_of)?;
    let (config, diff_ids) = oci::config(&bytes).map_err(|r| named(r, config_of))?;
    if diff_ids.len() != layers.len() {
        let what = format!(
            "the manifest has {} layers, the configuration {}",
            layers.len(),
            diff_ids.len()
        );
        return Err(Refusal::new(Code::JsonMalformed, what).of(&digest).into());
    }
    let mut state = State {
        tree: Tree::default(),
        limits: job.limits,
        spooled: 0,
        entries: 0,
        unpacked: 0,
    };
    for (n, ((layer, packing), diff_id)) in (1..).zip(layers.iter().zip(&diff_ids)) {
        let mib = layer.size >> 20;
        blobs.progress(&format!("layer {n} of {}, {mib} MiB", layers.len()))?;
        let digest = layer.digest()?;
        state
            .layer(n, layer, *packing, diff_id, blobs, spool)
            .map_err(|e| match e {
                Error::Refused(r) => r.of(&digest).into(),
                other => other,
            })?;
    }
    let of_layer = |n: usize| layers.get(n.wrapping_sub(1)).map(|(l, _)| l.digest());
    check_privileges(&state.tree, job, |n| of_layer(n)?.ok())?;
    state.tree.complete()?;
    blobs.progress("writing the base")?;
    let mut writer = BufWriter::with_capacity(1 << 20, out);
    let bytes = erofs::write(&state.tree, spool, &mut writer)
        .and_then(|n| writer.flush().map(|()| n))
        .map_err(os("write the base image"))?;
    Ok(Done {
        manifest: digest,
        config,
        layers: layers.len(),
        entries: state.entries,
        bytes,
    })
}

/// Finds the manifest, through an index if there is one.
fn resolve(job: &Job, blobs: &mut impl Blobs) -> Result<(Digest, oci::Manifest)> {
    let (mut digest, mut document) = match &job.digest {
        Some(digest) => {
            let bytes = read_checked(blobs.blob(digest)?, digest, None)?;
            (
                *digest,
                oci::document(&bytes, None).map_err(|r| r.of(digest))?,
            )
        }
        None => {
            let bytes = read_bounded(blobs.index()?, "index.json")?;
            let index = oci::index(&bytes)?;
            follow(index.named(job.tag.as_deref())?, blobs)?
        }
    };
    // An index may list an index; no tool nests them deeper.
    for _ in 0..2 {
        match document {
            Document::Manifest(manifest) => return Ok((digest, manifest)),
            Document::Index(index) => {
                let chosen = index.for_this_machine().map_err(|r| r.of(&digest))?;
                (digest, document) = follow(chosen, blobs)?;
            }
        }
    }
    match document {
        Document::Manifest(manifest) => Ok((digest, manifest)),
        Document::Index(_) => {
            let what = "an index within an index within an index";
            Err(Refusal::new(Code::JsonMalformed, what).of(&digest).into())
        }
    }
}

fn follow(to: &Descriptor, blobs: &mut impl Blobs) -> Result<(Digest, Document)> {
    let digest = to.digest()?;
    let media = to.media().map_err(|r| r.of(&digest))?;
    let bytes = document(blobs, to)?;
    let document = oci::document(&bytes, Some(media)).map_err(|r| r.of(&digest))?;
    Ok((digest, document))
}

/// Reads what a descriptor of a JSON document points to.
fn document(blobs: &mut impl Blobs, of: &Descriptor) -> Result<Vec<u8>> {
    let digest = of.digest()?;
    read_checked(blobs.blob(&digest)?, &digest, Some(of.size))
}

fn read_checked(file: File, digest: &Digest, size: Option<u64>) -> Result<Vec<u8>> {
    let bytes = read_bounded(file, &digest.to_string())?;
    if size.is_some_and(|s| s != bytes.len() as u64) {
        let what = format!("{} bytes, not those of its descriptor", bytes.len());
        return Err(Refusal::new(Code::SizeMismatch, what).of(digest).into());
    }
    if Digest::of(&bytes) != *digest {
        let what = "its contents have another digest";
        return Err(Refusal::new(Code::DigestMismatch, what).of(digest).into());
    }
    Ok(bytes)
}

fn read_bounded(file: File, what: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = file.take(JSON_MAX_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(os(format!("read {what}")))?;
    if bytes.len() as u64 > JSON_MAX_BYTES {
        let why = format!("{what} is larger than {JSON_MAX_BYTES} bytes");
        return Err(Refusal::new(Code::TooLarge, why).into());
    }
    Ok(bytes)
}

struct State {
    tree: Tree,
    limits: Limits,
    /// The spool's length, bytes.
    spooled: u64,
    entries: u64,
    unpacked: u64,
}

impl State {
    fn layer(
        &mut self,
        n: usize,
        layer: &Descriptor,
        packing: Packing,
        diff_id: &Digest,
        blobs: &mut impl Blobs,
        spool: &File,
    ) -> Result<()> {
        if layer.size > self.limits.layer_stored_max_bytes {
            let max = self.limits.layer_stored_max_bytes;
            let what = format!("a layer of {} bytes; at most {max}", layer.size);
            return Err(Refusal::new(Code::TooLarge, what).into());
        }
        let mut file = blobs.blob(&layer.digest()?)?;
        check_blob(&mut file, layer)?;
        let stream = Unpacked {
            inner: unpacked(packing, BufReader::with_capacity(256 << 10, file))?,
            hash: seal::hash::Sha256::new(),
            bytes: 0,
            max: self.limits.layer_unpacked_max_bytes,
            image_left: self
                .limits
                .image_unpacked_max_bytes
                .saturating_sub(self.unpacked),
            ratio: layer.size.saturating_mul(self.limits.ratio_max),
        };
        self.tree.layer_begin(n);
        let mut archive = tar::Reader::new(stream);
        while let Some(entry) = archive.next_entry()? {
            self.entries += 1;
            if self.entries > self.limits.entries_max {
                let what = format!("more than {} entries", self.limits.entries_max);
                return Err(Refusal::new(Code::TooLarge, what).at(&entry.path).into());
            }
            self.tree.apply(&entry, self.spooled)?;
            if entry.kind == Kind::File {
                self.spool(&mut archive, spool).map_err(|e| match e {
                    Error::Refused(r) => r.at(&entry.path).into(),
                    other => other,
                })?;
            }
        }
        let stream = archive.finish()?;
        self.unpacked += stream.bytes;
        if Digest(stream.hash.finish()) != *diff_id {
            let what = format!("the unpacked layer is not {diff_id}");
            return Err(Refusal::new(Code::DiffIdMismatch, what).into());
        }
        Ok(())
    }

    /// Keeps an entry's contents.
    fn spool(&mut self, archive: &mut tar::Reader<impl Read>, spool: &File) -> Result<()> {
        let mut buf = [0; 64 << 10];
        loop {
            let n = archive.read(&mut buf).map_err(tar::stream)?;
            if n == 0 {
                return Ok(());
            }
            spool
                .write_all_at(&buf[..n], self.spooled)
                .map_err(os("keep a file of the image"))?;
            self.spooled += n as u64;
        }
    }
}

/// Length and digest of a stored layer; leaves the file at its start.
fn check_blob(file: &mut File, of: &Descriptor) -> Result<()> {
    let mut hash = seal::hash::Sha256::new();
    let mut buf = vec![0; 256 << 10];
    let mut bytes = 0;
    // One byte more than there should be is enough to know.
    while bytes <= of.size {
        let n = file.read(&mut buf).map_err(os("read a layer"))?;
        if n == 0 {
            break;
        }
        hash.update(&buf[..n]);
        bytes += n as u64;
    }
    if bytes != of.size {
        let what = format!("its descriptor says {} bytes", of.size);
        return Err(Refusal::new(Code::SizeMismatch, what).into());
    }
    if Digest(hash.finish()) != of.digest()? {
        let what = "its contents have another digest";
        return Err(Refusal::new(Code::DigestMismatch, what).into());
    }
    io::Seek::rewind(file).map_err(os("read a layer again"))
}

/// What a packed stream unpacks to.
fn unpacked(packing: Packing, file: BufReader<File>) -> Result<Box<dyn Read>> {
    Ok(match packing {
        Packing::Plain => Box::new(file),
        Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        Packing::Zstd => {
            let frames = crate::zstd::Frames::new(file);
            Box::new(frames.map_err(os("make a zstd decoder"))?)
        }
    })
}

/// Counts and hashes what a layer unpacks to, and stops at its bounds.
struct Unpacked {
    inner: Box<dyn Read>,
    hash: seal::hash::Sha256,
    bytes: u64,
    max: u64,
    image_left: u64,
    /// Stored size times the allowed ratio, bytes.
    ratio: u64,
}

impl Read for Unpacked {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf).map_err(|e| {
            let what = format!("it does not unpack: {e}");
            io::Error::other(Refusal::new(Code::Compression, what))
        })?;
        self.hash.update(&buf[..n]);
        self.bytes += n as u64;
        let over = |code, what: String| Err(io::Error::other(Refusal::new(code, what)));
        if self.bytes > self.max.min(self.image_left) {
            let max = self.max.min(self.image_left);
            return over(Code::TooLarge, format!("unpacks to more than {max} bytes"));
        }
        if self.bytes > self.ratio.max(Limits::RATIO_FREE_BYTES) {
            let what = format!("unpacks to more than {} bytes", self.ratio);
            return over(Code::Ratio, what);
        }
        Ok(n)
    }
}

/// Bits and capabilities that give a program more than its caller has, on every path that leads
/// to it: a hard link to an allowed program is not allowed by that.
fn check_privileges(
    tree: &Tree,
    job: &Job,
    layer: impl Fn(usize) -> Option<Digest>,
) -> std::result::Result<(), Refusal> {
    tree.walk(|path, id| {
        let node = tree.node(id);
        let is_dir = matches!(node.body, Body::Dir(_));
        let refuse = |code, what: &str| {
            let mut refusal = Refusal::new(code, what).at(path);
            refusal.part = layer(node.layer);
            Err(refusal)
        };
        // A directory's setgid bit only says which group new files get.
        if !is_dir && node.meta.mode & 0o6000 != 0 && !policy::lists(&job.allow_setuid, path) {
            return refuse(Code::Setuid, "a setuid or setgid file outside the policy");
        }
        let capability = node
            .meta
            .xattrs
            .iter()
            .any(|(n, _)| n == b"security.capability");
        if capability && (is_dir || !policy::lists(&job.allow_capabilities, path)) {
            return refuse(Code::FileCapability, "a file capability outside the policy");
        }
        Ok(())
    })
}

fn named(refusal: Refusal, of: &Descriptor) -> Refusal {
    match of.digest() {
        Ok(digest) => refusal.of(&digest),
        Err(_) => refusal,
    }
}
