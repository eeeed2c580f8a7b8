//! The JSON of the OCI image specification 1.1 and of Docker's schema 2, as far as an import needs.
//!
//! Unknown fields are ignored, as the specification asks. What is used is bounded, and what could
//! be read in two ways is refused.

use crate::error::{Code, Refusal};
use crate::limits::{CONFIG_ITEMS_MAX, CONFIG_MAX_BYTES, INDEX_MAX, JSON_MAX_BYTES, LAYERS_MAX};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

type Result<T> = std::result::Result<T, Refusal>;

/// A SHA-256 digest; in text `sha256:` and 64 lowercase hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(seal::hash::sha256(bytes))
    }

    /// The 64 hex digits alone: a blob's file name.
    #[must_use]
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong = || "a digest is sha256: and 64 lowercase hex digits".to_owned();
        let hex = text.strip_prefix("sha256:").ok_or_else(wrong)?;
        if hex.len() != 64 || hex.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(wrong());
        }
        let mut out = [0; 32];
        hex::decode_to_slice(hex, &mut out).map_err(|_| wrong())?;
        Ok(Self(out))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// What a descriptor points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Media {
    /// A list of manifests.
    Index,
    /// A manifest.
    Manifest,
    /// An image's configuration.
    Config,
    /// A layer.
    Layer(Packing),
    /// A layer that is to be fetched from elsewhere.
    Foreign,
}

/// How a layer is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// As it is.
    Plain,
    /// gzip.
    Gzip,
    /// Zstandard.
    Zstd,
}

impl Media {
    fn of(text: &str) -> Option<Self> {
        Some(match text {
            "application/vnd.oci.image.index.v1+json"
            | "application/vnd.docker.distribution.manifest.list.v2+json" => Self::Index,
            "application/vnd.oci.image.manifest.v1+json"
            | "application/vnd.docker.distribution.manifest.v2+json" => Self::Manifest,
            "application/vnd.oci.image.config.v1+json"
            | "application/vnd.docker.container.image.v1+json" => Self::Config,
            "application/vnd.oci.image.layer.v1.tar" => Self::Layer(Packing::Plain),
            "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Self::Layer(Packing::Gzip),
            "application/vnd.oci.image.layer.v1.tar+zstd" => Self::Layer(Packing::Zstd),
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd" => Self::Foreign,
            _ => return None,
        })
    }
}

/// A pointer to contents.
#[derive(Debug, Clone, Deserialize)]
pub struct Descriptor {
    /// Their media type.
    #[serde(rename = "mediaType", default)]
    media_type: String,
    digest: String,
    /// Their length, bytes.
    pub size: u64,
    #[serde(default)]
    urls: Vec<String>,
    #[serde(default)]
    platform: Option<Platform>,
    /// Free texts by name.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
}

impl Descriptor {
    /// What it points to.
    ///
    /// # Errors
    /// Of a type that is not known.
    pub fn media(&self) -> Result<Media> {
        Media::of(&self.media_type).ok_or_else(|| {
            let what = format!("media type {:?} is not known", short(&self.media_type));
            Refusal::new(Code::MediaTypeUnknown, what)
        })
    }

    /// The media type as it is written.
    #[must_use]
    pub fn media_text(&self) -> &str {
        &self.media_type
    }

    /// The digest.
    ///
    /// # Errors
    /// Of another algorithm, or malformed.
    pub fn digest(&self) -> Result<Digest> {
        self.digest.parse().map_err(|why: String| {
            let what = format!("digest {:?}: {why}", short(&self.digest));
            Refusal::new(Code::MediaTypeUnknown, what)
        })
    }
}

/// A list of manifests.
#[derive(Debug, Deserialize)]
pub struct Index {
    #[serde(rename = "mediaType", default)]
    media_type: String,
    /// Its entries.
    pub manifests: Vec<Descriptor>,
}

/// Configuration and layers of one image.
#[derive(Debug, Deserialize)]
pub struct Manifest {
    #[serde(rename = "schemaVersion")]
    schema_version: u32,
    #[serde(rename = "mediaType", default)]
    media_type: String,
    config: Descriptor,
    /// Lowest first.
    pub layers: Vec<Descriptor>,
}

impl Manifest {
    /// The configuration's descriptor and each layer's, with its packing.
    ///
    /// # Errors
    /// Types that are not known, foreign layers, too many layers.
    pub fn parts(&self) -> Result<(&Descriptor, Vec<(&Descriptor, Packing)>)> {
        if self.config.media()? != Media::Config {
            let what = format!("configuration of type {:?}", short(&self.config.media_type));
            return Err(Refusal::new(Code::MediaTypeUnknown, what));
        }
        if self.layers.len() > LAYERS_MAX {
            return Err(Refusal::new(
                Code::TooLarge,
                format!("{} layers; at most {LAYERS_MAX}", self.layers.len()),
            ));
        }
        let layers = self.layers.iter().map(|layer| {
            let digest = layer.digest()?;
            let foreign = |why: &str| Err(Refusal::new(Code::ForeignLayer, why).of(&digest));
            if !layer.urls.is_empty() {
                return foreign("the layer is to be fetched from other addresses");
            }
            match layer.media().map_err(|r| r.of(&digest))? {
                Media::Layer(packing) => Ok((layer, packing)),
                Media::Foreign => foreign("the layer is not part of the image"),
                _ => Err(Refusal::new(
                    Code::MediaTypeUnknown,
                    format!("a layer of type {:?}", short(&layer.media_type)),
                )
                .of(&digest)),
            }
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        Ok((&self.config, layers))
    }
}

/// A document that a descriptor points to.
#[derive(Debug)]
pub enum Document {
    /// A list to choose from.
    Index(Index),
    /// One image.
    Manifest(Manifest),
}

/// Reads an index or a manifest; which one, its own `mediaType` or its fields say. If `media`
/// is what its descriptor says, it must agree.
///
/// # Errors
/// Malformed, too large, of a type that is not known, or two types at once.
pub fn document(bytes: &[u8], media: Option<Media>) -> Result<Document> {
    #[derive(Deserialize)]
    struct Kind {
        #[serde(rename = "mediaType", default)]
        media_type: String,
        #[serde(default)]
        manifests: Option<serde::de::IgnoredAny>,
        #[serde(default)]
        layers: Option<serde::de::IgnoredAny>,
    }
    let kind: Kind = json("manifest", bytes)?;
    let malformed = |why: &str| Err(Refusal::new(Code::JsonMalformed, why));
    // An index that is also a manifest is CVE-2021-41190: readers disagree on what it is.
    let by_fields = match (kind.manifests.is_some(), kind.layers.is_some()) {
        (true, false) => Media::Index,
        (false, true) => Media::Manifest,
        (true, true) => return malformed("a manifest has both `manifests` and `layers`"),
        (false, false) => return malformed("a manifest has neither `manifests` nor `layers`"),
    };
    let said = if kind.media_type.is_empty() {
        None
    } else {
        let what = || format!("media type {:?} is not known", short(&kind.media_type));
        let said = Media::of(&kind.media_type);
        Some(said.ok_or_else(|| Refusal::new(Code::MediaTypeUnknown, what()))?)
    };
    for other in [said, media].into_iter().flatten() {
        if other != by_fields {
            return malformed("a manifest's fields are not those of its media type");
        }
    }
    if by_fields == Media::Index {
        return index(bytes).map(Document::Index);
    }
    let manifest: Manifest = json("manifest", bytes)?;
    if manifest.schema_version != 2 || !manifest.media_type.is_ascii() {
        return malformed("a manifest's schemaVersion must be 2");
    }
    Ok(Document::Manifest(manifest))
}

/// Reads an index, or a layout's `index.json`.
///
/// # Errors
/// Malformed, or too many entries.
pub fn index(bytes: &[u8]) -> Result<Index> {
    let index: Index = json("index", bytes)?;
    if index.manifests.len() > INDEX_MAX || !index.media_type.is_ascii() {
        let what = format!("{} manifests; at most {INDEX_MAX}", index.manifests.len());
        return Err(Refusal::new(Code::TooLarge, what));
    }
    Ok(index)
}

impl Index {
    /// The entry for linux/amd64.
    ///
    /// # Errors
    /// None, or more than one.
    pub fn for_this_machine(&self) -> Result<&Descriptor> {
        let fits = |d: &&Descriptor| {
            let p = d.platform.as_ref();
            p.is_some_and(|p| p.os == "linux" && p.architecture == "amd64")
        };
        one(
            self.manifests.iter().filter(fits),
            Code::PlatformMissing,
            "for linux/amd64",
        )
    }

    /// A layout's image of this name, or its only one.
    ///
    /// # Errors
    /// None, or more than one.
    pub fn named(&self, tag: Option<&str>) -> Result<&Descriptor> {
        let name = |d: &&Descriptor| {
            let name = d.annotations.get("org.opencontainers.image.ref.name");
            tag.is_none() || name.map(String::as_str) == tag
        };
        let what = tag.map_or_else(String::new, |t| format!("named {:?}", short(t)));
        one(
            self.manifests.iter().filter(name),
            Code::ImageNotFound,
            &what,
        )
    }
}

fn one<'a>(
    mut all: impl Iterator<Item = &'a Descriptor>,
    code: Code,
    what: &str,
) -> Result<&'a Descriptor> {
    match (all.next(), all.next()) {
        (Some(one), None) => Ok(one),
        (None, _) => Err(Refusal::new(code, format!("no image {what}"))),
        (Some(_), Some(_)) => Err(Refusal::new(code, format!("more than one image {what}"))),
    }
}

/// What is kept of an image's configuration, for the workloads that will run it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// `NAME=value`.
    pub env: Vec<String>,
    /// User and group, by name or number.
    pub user: String,
    /// Working directory.
    pub working_dir: String,
    /// The program.
    pub entrypoint: Vec<String>,
    /// Its arguments.
    pub cmd: Vec<String>,
}

/// Reads a configuration: what is kept, and the layers' `diff_ids`.
///
/// # Errors
/// Malformed, for another platform, or beyond a bound.
pub fn config(bytes: &[u8]) -> Result<(Config, Vec<Digest>)> {
    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        architecture: String,
        #[serde(default)]
        os: String,
        #[serde(default)]
        config: Option<Inner>,
        rootfs: RootFs,
    }
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "PascalCase", default)]
    struct Inner {
        env: Option<Vec<String>>,
        user: Option<String>,
        working_dir: Option<String>,
        entrypoint: Option<Vec<String>>,
        cmd: Option<Vec<String>>,
    }
    #[derive(Deserialize)]
    struct RootFs {
        #[serde(rename = "type")]
        kind: String,
        diff_ids: Vec<Digest>,
    }
    let file: File = json("configuration", bytes)?;
    if (file.os.as_str(), file.architecture.as_str()) != ("linux", "amd64") {
        let (os, arch) = (short(&file.os), short(&file.architecture));
        let what = format!("the image is for {os}/{arch}");
        return Err(Refusal::new(Code::PlatformMissing, what));
    }
    if file.rootfs.kind != "layers" || file.rootfs.diff_ids.len() > LAYERS_MAX {
        return Err(Refusal::new(
            Code::JsonMalformed,
            format!("rootfs must be of type `layers`, at most {LAYERS_MAX} of them"),
        ));
    }
    let inner = file.config.unwrap_or_default();
    let config = Config {
        env: inner.env.unwrap_or_default(),
        user: inner.user.unwrap_or_default(),
        working_dir: inner.working_dir.unwrap_or_default(),
        entrypoint: inner.entrypoint.unwrap_or_default(),
        cmd: inner.cmd.unwrap_or_default(),
    };
    config.check()?;
    Ok((config, file.rootfs.diff_ids))
}

impl Config {
    fn check(&self) -> Result<()> {
        let lists = [&self.env, &self.entrypoint, &self.cmd];
        let texts = || {
            let single = [&self.user, &self.working_dir];
            lists.iter().flat_map(|l| l.iter()).chain(single)
        };
        let bytes: usize = texts().map(String::len).sum();
        if bytes > CONFIG_MAX_BYTES || lists.iter().any(|l| l.len() > CONFIG_ITEMS_MAX) {
            return Err(Refusal::new(
                Code::TooLarge,
                format!(
                    "Env, Cmd, Entrypoint, User and WorkingDir may have {CONFIG_MAX_BYTES} bytes \
                     and {CONFIG_ITEMS_MAX} items each"
                ),
            ));
        }
        if texts().any(|t| t.contains('\0')) {
            let what = "a text of the configuration has a NUL";
            return Err(Refusal::new(Code::JsonMalformed, what));
        }
        Ok(())
    }
}

/// Reads bounded JSON.
pub(crate) fn json<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T> {
    if bytes.len() as u64 > JSON_MAX_BYTES {
        return Err(Refusal::new(
            Code::TooLarge,
            format!("the {what} is larger than {JSON_MAX_BYTES} bytes"),
        ));
    }
    serde_json::from_slice(bytes)
        .map_err(|e| Refusal::new(Code::JsonMalformed, format!("the {what}: {e}")))
}

fn short(text: &str) -> String {
    crate::error::show(&text.as_bytes()[..text.len().min(80)])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_digest_has_one_spelling() {
        let text = format!("sha256:{}", "0f".repeat(32));
        assert_eq!(text.parse::<Digest>().unwrap().to_string(), text);
        for bad in [
            text.replace("0f", "0F"),
            text.replace("sha256", "sha512"),
            text[..70].to_owned(),
            format!("{text}0"),
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_document_is_one_thing() {
        let both = br#"{"schemaVersion":2,"manifests":[],"layers":[]}"#;
        assert_eq!(document(both, None).unwrap_err().code, Code::JsonMalformed);
        let index = br#"{"schemaVersion":2,"manifests":[]}"#;
        assert!(matches!(document(index, None), Ok(Document::Index(_))));
        assert!(document(index, Some(Media::Manifest)).is_err());
    }

    proptest! {
        #[test]
        fn no_json_panics(text in r#"[\[\]{}":,a-z0-9 ]{0,200}"#) {
            let _ = document(text.as_bytes(), None);
            let _ = config(text.as_bytes());
            let _ = index(text.as_bytes());
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = document(&bytes, Some(Media::Index));
            let _ = config(&bytes);
        }
    }
}
