//! Pulling one image from a registry, by the OCI distribution specification 1.1.
//!
//! Everything that arrives is bounded and named by its digest; nothing is unpacked here. Runs as
//! its own process: the network and one directory are all it has.
//!
//! Must never send a token anywhere but where it was asked for, or follow a redirect to plain
//! HTTP.

use crate::error::{Code, Error, Refusal, os};
use crate::limits::{JSON_MAX_BYTES, Limits, PAYLOAD_MAX_BYTES, REDIRECTS_MAX, SIGNATURES_MAX};
use crate::oci::{self, Digest, Document, Media};
use crate::reference::Reference;
use base64::Engine as _;
use reqwest::{Client, Response, StatusCode, Url, header};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

type Result<T> = std::result::Result<T, Error>;

const CONNECT_WAIT: Duration = Duration::from_secs(10);
/// How long a registry may send nothing.
const READ_WAIT: Duration = Duration::from_secs(30);
/// Longest token, bytes.
const TOKEN_MAX_BYTES: usize = 16 << 10;
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, \
                         application/vnd.oci.image.manifest.v1+json, \
                         application/vnd.docker.distribution.manifest.list.v2+json, \
                         application/vnd.docker.distribution.manifest.v2+json";
const SIMPLE_SIGNING: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";

/// What to fetch.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fetch {
    /// Host, and port.
    pub host: String,
    /// The repository.
    pub repository: String,
    /// The image; none: only say which one the tag names now.
    pub digest: Option<Digest>,
    /// The tag, where there is no digest.
    pub tag: Option<String>,
    /// Fetch its signatures too.
    pub signatures: bool,
    /// Plain HTTP; to 127.0.0.1 only.
    pub insecure_http: bool,
    /// Bounds.
    pub limits: Limits,
    /// An OCI layout's directory, to be filled.
    pub scratch: PathBuf,
    /// PEM of the only CA to trust; none: the system's.
    pub ca: Option<PathBuf>,
}

impl Fetch {
    /// The work for this reference.
    #[must_use]
    pub fn new(from: &Reference, digest: Option<Digest>, scratch: &Path) -> Self {
        Self {
            host: from.host.clone(),
            repository: from.repository.clone(),
            digest,
            tag: from.tag.clone(),
            signatures: false,
            insecure_http: false,
            limits: Limits::default(),
            scratch: scratch.to_owned(),
            ca: None,
        }
    }
}

/// A signature as it is published; nothing of it is checked yet.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    /// What is signed, base64.
    pub payload: String,
    /// The signature, base64.
    pub signature: String,
}

/// What a fetcher says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FromFetcher {
    /// How far it is.
    Progress(String),
    /// One signature.
    Signature(Published),
    /// All is there. The digest is the one asked for, or the one that the tag names.
    Done(Digest),
    /// The image is not taken.
    Refused(Refusal),
    /// The system or the registry failed it.
    Failed(String),
}

/// Fetches; `say` hears of progress and signatures.
///
/// # Errors
/// A [`Refusal`], the registry's answer, or the system's.
pub async fn fetch(work: &Fetch, say: &dyn Fn(&FromFetcher) -> Result<()>) -> Result<Digest> {
    let mut registry = Registry::new(work)?;
    let reference = match (&work.digest, &work.tag) {
        (Some(digest), _) => digest.to_string(),
        (None, tag) => tag.clone().unwrap_or_else(|| "latest".into()),
    };
    let bytes = registry.manifest(&reference).await?;
    let digest = Digest::of(&bytes);
    let Some(wanted) = work.digest else {
        return Ok(digest);
    };
    let dir = work.scratch.join("blobs/sha256");
    std::fs::create_dir_all(&dir).map_err(os("make the fetched layout"))?;
    if digest != wanted {
        let what = "the registry's manifest has another digest";
        return Err(Refusal::new(Code::DigestMismatch, what).of(&wanted).into());
    }
    registry.keep(&digest, &bytes)?;
    let mut document = oci::document(&bytes, None).map_err(|r| r.of(&digest))?;
    for _ in 0..2 {
        let Document::Index(index) = &document else {
            break;
        };
        let chosen = index.for_this_machine().map_err(|r| r.of(&digest))?;
        let below = chosen.digest()?;
        let bytes = registry.manifest(&below.to_string()).await?;
        if Digest::of(&bytes) != below {
            let what = "the registry's manifest has another digest";
            return Err(Refusal::new(Code::DigestMismatch, what).of(&below).into());
        }
        registry.keep(&below, &bytes)?;
        document = oci::document(&bytes, None).map_err(|r| r.of(&below))?;
    }
    let Document::Manifest(manifest) = document else {
        let what = "an index within an index within an index";
        return Err(Refusal::new(Code::JsonMalformed, what).of(&digest).into());
    };
    let (config, layers) = manifest.parts().map_err(|r| r.of(&digest))?;
    registry
        .blob(&config.digest()?, config.size, JSON_MAX_BYTES)
        .await?;
    let mut have = BTreeSet::new();
    for (n, (layer, _)) in (1..).zip(&layers) {
        let what = format!(
            "fetching layer {n} of {}, {} MiB",
            layers.len(),
            layer.size >> 20
        );
        say(&FromFetcher::Progress(what))?;
        let digest = layer.digest()?;
        if have.insert(digest) {
            let max = work.limits.layer_stored_max_bytes;
            registry.blob(&digest, layer.size, max).await?;
        }
    }
    if work.signatures {
        for signature in registry.signatures(&wanted).await? {
            say(&FromFetcher::Signature(signature))?;
        }
    }
    Ok(digest)
}

struct Registry<'a> {
    work: &'a Fetch,
    client: Client,
    base: String,
    token: Option<String>,
}

impl<'a> Registry<'a> {
    fn new(work: &'a Fetch) -> Result<Self> {
        let host = work.host.split(':').next().unwrap_or_default();
        if work.insecure_http && host != "127.0.0.1" {
            let what = "plain HTTP is taken from 127.0.0.1 only";
            return Err(Error::Usage(what.into()));
        }
        let insecure = work.insecure_http;
        let redirect = reqwest::redirect::Policy::custom(move |attempt| {
            if attempt.previous().len() > REDIRECTS_MAX {
                return attempt.error("too many redirects");
            }
            if trusted(attempt.url(), insecure) {
                attempt.follow()
            } else {
                attempt.error("a redirect to plain HTTP")
            }
        });
        // Its first call makes the provider the process's.
        let _provider = seal::tls::provider();
        let mut builder = Client::builder()
            .redirect(redirect)
            .connect_timeout(CONNECT_WAIT)
            .read_timeout(READ_WAIT)
            .user_agent("casemate-image");
        if let Some(ca) = &work.ca {
            let pem = service::files::read_bounded(ca, 1 << 20)
                .map_err(os(format!("read {}", ca.display())))?;
            let certs = reqwest::Certificate::from_pem_bundle(&pem).map_err(registry)?;
            builder = builder.tls_certs_only(certs);
        }
        Ok(Self {
            work,
            client: builder.build().map_err(registry)?,
            base: format!(
                "{}://{}/v2/{}",
                if insecure { "http" } else { "https" },
                work.host,
                work.repository
            ),
            token: None,
        })
    }

    async fn manifest(&mut self, reference: &str) -> Result<Vec<u8>> {
        let response = self
            .get(&format!("manifests/{reference}"), MANIFESTS)
            .await?;
        let response = found(response, "manifest", reference)?;
        body(response, JSON_MAX_BYTES).await
    }

    /// Fetches a blob into the layout and checks it.
    async fn blob(&mut self, digest: &Digest, size: u64, max: u64) -> Result<()> {
        if size > max {
            let what = format!("{size} bytes; at most {max}");
            return Err(Refusal::new(Code::TooLarge, what).of(digest).into());
        }
        let response = self.get(&format!("blobs/{digest}"), "*/*").await?;
        let mut response = found(response, "blob", &digest.to_string())?;
        let path = self.path(digest);
        let mut file = File::create(&path).map_err(os("keep a blob"))?;
        let mut hash = seal::hash::Sha256::new();
        let mut bytes = 0;
        let wrong = |code, what: &str| Err(Refusal::new(code, what).of(digest).into());
        while let Some(chunk) = response.chunk().await.map_err(registry)? {
            bytes += chunk.len() as u64;
            if bytes > size {
                return wrong(Code::SizeMismatch, "more bytes than its descriptor says");
            }
            hash.update(&chunk);
            file.write_all(&chunk).map_err(os("keep a blob"))?;
        }
        if bytes != size {
            return wrong(Code::SizeMismatch, "fewer bytes than its descriptor says");
        }
        if Digest(hash.finish()) != *digest {
            return wrong(Code::DigestMismatch, "its contents have another digest");
        }
        Ok(())
    }

    /// The image's signatures, where cosign keeps them.
    async fn signatures(&mut self, digest: &Digest) -> Result<Vec<Published>> {
        let tag = format!("sha256-{}.sig", digest.hex());
        let response = self.get(&format!("manifests/{tag}"), MANIFESTS).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(Vec::new());
        }
        let bytes = body(found(response, "signature", &tag)?, JSON_MAX_BYTES).await?;
        let Document::Manifest(manifest) = oci::document(&bytes, Some(Media::Manifest))? else {
            return Ok(Vec::new());
        };
        let mut all = Vec::new();
        for layer in manifest.layers.iter().take(SIGNATURES_MAX) {
            let signature = layer.annotations.get(SIGNATURE);
            let Some(signature) = signature.filter(|_| layer.media_text() == SIMPLE_SIGNING) else {
                continue;
            };
            let digest = layer.digest()?;
            self.blob(&digest, layer.size, PAYLOAD_MAX_BYTES).await?;
            let payload = std::fs::read(self.path(&digest)).map_err(os("read a payload"))?;
            all.push(Published {
                payload: base64::engine::general_purpose::STANDARD.encode(payload),
                signature: signature.chars().take(1_024).collect(),
            });
        }
        Ok(all)
    }

    /// Asks once, and once more with the token that the registry's answer says how to get.
    async fn get(&mut self, path: &str, accept: &str) -> Result<Response> {
        let response = self.ask(path, accept).await?;
        if response.status() != StatusCode::UNAUTHORIZED || self.token.is_some() {
            return Ok(response);
        }
        let how = response.headers().get(header::WWW_AUTHENTICATE);
        let how = how.and_then(|h| h.to_str().ok()).unwrap_or_default();
        let url = self.token_url(how)?;
        let response = self.client.get(url).send().await.map_err(registry)?;
        let bytes = body(found(response, "token", "pull")?, TOKEN_MAX_BYTES as u64).await?;
        #[derive(Deserialize)]
        struct Answer {
            #[serde(default)]
            token: String,
            #[serde(default)]
            access_token: String,
        }
        let answer: Answer = oci::json("token", &bytes)?;
        let token = if answer.token.is_empty() {
            answer.access_token
        } else {
            answer.token
        };
        self.token = Some(token);
        self.ask(path, accept).await
    }

    async fn ask(&self, path: &str, accept: &str) -> Result<Response> {
        let mut request = self.client.get(format!("{}/{path}", self.base));
        request = request.header(header::ACCEPT, accept);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        request.send().await.map_err(registry)
    }

    /// The address of `Bearer realm="…",service="…"`, for pulling this repository.
    fn token_url(&self, how: &str) -> Result<Url> {
        let wrong = |why: &str| Error::Registry(format!("{}: {why}", self.work.host));
        let bearer = how.strip_prefix("Bearer ").ok_or_else(|| {
            wrong("it wants credentials; only anonymous pulls are supported: mirror the image")
        })?;
        let field = |name: &str| {
            let start = bearer.find(&format!("{name}=\""))? + name.len() + 2;
            bearer[start..].split('"').next()
        };
        let realm = field("realm").ok_or_else(|| wrong("its 401 names no realm"))?;
        let mut url = Url::parse(realm).map_err(|_| wrong("its realm is no address"))?;
        if !trusted(&url, self.work.insecure_http) {
            return Err(wrong("its realm is plain HTTP"));
        }
        if let Some(service) = field("service") {
            url.query_pairs_mut().append_pair("service", service);
        }
        let scope = format!("repository:{}:pull", self.work.repository);
        url.query_pairs_mut().append_pair("scope", &scope);
        Ok(url)
    }

    fn keep(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        std::fs::write(self.path(digest), bytes).map_err(os("keep a manifest"))
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.work.scratch.join("blobs/sha256").join(digest.hex())
    }
}

fn trusted(url: &Url, insecure: bool) -> bool {
    url.scheme() == "https" || (insecure && url.host_str() == Some("127.0.0.1"))
}

fn found(response: Response, what: &str, name: &str) -> Result<Response> {
    match response.status() {
        StatusCode::OK => Ok(response),
        StatusCode::NOT_FOUND => {
            let what = format!("the registry has no {what} {name}");
            Err(Refusal::new(Code::BlobMissing, what).into())
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(Error::Registry(format!(
            "it does not let {what} {name} be pulled anonymously: mirror the image"
        ))),
        status => Err(Error::Registry(format!(
            "{what} {name}: it answers {status}"
        ))),
    }
}

async fn body(mut response: Response, max: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(registry)? {
        if (bytes.len() + chunk.len()) as u64 > max {
            let what = format!("the registry's answer is larger than {max} bytes");
            return Err(Refusal::new(Code::TooLarge, what).into());
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// The whole chain: the last cause is what helps.
#[allow(clippy::needless_pass_by_value)] // For `map_err`.
fn registry(e: reqwest::Error) -> Error {
    let mut text = e.to_string();
    let mut cause = std::error::Error::source(&e);
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    Error::Registry(text)
}
