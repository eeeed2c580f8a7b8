//! Pulls from a real registry (Debian's docker-registry) on loopback, over TLS and plain HTTP, and
//! signatures as cosign publishes them, made by openssl.
#![allow(clippy::unwrap_used)]

mod world;

use image::import;
use image::oci::Digest;
use image::policy::Policy;
use image::registry::Fetch;
use image::{Code, Error, reference::Source};
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use world::{Layout, MANIFEST, Tar, World};

const SIMPLE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";

struct Registry {
    child: Child,
    host: String,
    dir: PathBuf,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Registry {
    /// Starts one; with a certificate and key, over TLS.
    fn start(world: &World, tls: Option<(&Path, &Path)>) -> Self {
        let dir = world.path("registry");
        fs::create_dir_all(&dir).unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = format!("127.0.0.1:{}", free.local_addr().unwrap().port());
        drop(free);
        let tls = tls.map_or_else(String::new, |(cert, key)| {
            format!(
                "  tls:\n    certificate: {}\n    key: {}\n",
                cert.display(),
                key.display()
            )
        });
        let config = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\n\
             http:\n  addr: {host}\n{tls}",
            dir.display()
        );
        let path = world.path("registry.yml");
        fs::write(&path, config).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry: apt-get install docker-registry");
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(&host).is_err() {
            assert!(Instant::now() < deadline, "the registry does not listen");
            std::thread::yield_now();
        }
        Self { child, host, dir }
    }

    /// One request over plain HTTP; status and body.
    fn http(&self, method: &str, path: &str, media: &str, body: &[u8]) -> (u16, String) {
        let mut s = TcpStream::connect(&self.host).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: {media}\r\ncontent-length: {}\r\n\
             connection: close\r\n\r\n",
            self.host,
            body.len()
        );
        s.write_all(head.as_bytes()).unwrap();
        s.write_all(body).unwrap();
        let mut answer = String::new();
        s.read_to_string(&mut answer).unwrap();
        (answer[9..12].parse().unwrap(), answer)
    }

    fn push_blob(&self, repository: &str, bytes: &[u8]) {
        let (_, answer) = self.http("POST", &format!("/v2/{repository}/blobs/uploads/"), "", b"");
        let location = answer
            .lines()
            .find_map(|l| l.strip_prefix("Location: "))
            .unwrap();
        let path = location.trim().splitn(4, '/').nth(3).unwrap();
        let path = format!("/{path}&digest={}", Digest::of(bytes));
        let (status, answer) = self.http("PUT", &path, "application/octet-stream", bytes);
        assert_eq!(status, 201, "{answer}");
    }

    fn push_manifest(&self, repository: &str, tag: &str, manifest: &[u8]) -> Digest {
        let path = format!("/v2/{repository}/manifests/{tag}");
        let (status, answer) = self.http("PUT", &path, MANIFEST, manifest);
        assert_eq!(status, 201, "{answer}");
        Digest::of(manifest)
    }

    fn push(&self, world: &World, repository: &str, tag: &str, layout: &Layout) -> Digest {
        let dir = world.path("pushed");
        let _ = fs::remove_dir_all(&dir);
        let digest = layout.write(&dir);
        let manifest = fs::read(dir.join("blobs/sha256").join(digest.hex())).unwrap();
        let read: Value = serde_json::from_slice(&manifest).unwrap();
        let layers = read["layers"].as_array().unwrap().iter();
        for part in layers.chain([&read["config"]]) {
            let hex = &part["digest"].as_str().unwrap()[7..];
            self.push_blob(
                repository,
                &fs::read(dir.join("blobs/sha256").join(hex)).unwrap(),
            );
        }
        self.push_manifest(repository, tag, &manifest)
    }

    /// Publishes a signature of this payload, as cosign does.
    fn sign(&self, repository: &str, of: &Digest, payload: &[u8], signature: &[u8]) {
        use base64::Engine as _;
        self.push_blob(repository, payload);
        self.push_blob(repository, b"{}");
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST,
            "config": {"mediaType": world::CONFIG, "digest": Digest::of(b"{}"), "size": 2},
            "layers": [{"mediaType": SIMPLE, "digest": Digest::of(payload), "size": payload.len(),
                "annotations": {"dev.cosignproject.cosign/signature":
                    base64::engine::general_purpose::STANDARD.encode(signature)}}]});
        let tag = format!("sha256-{}.sig", of.hex());
        self.push_manifest(repository, &tag, &serde_json::to_vec(&manifest).unwrap());
    }
}

fn small() -> Layout {
    Layout::default().gzip(&Tar::default().file("hello", b"from a registry").end())
}

fn payload(name: &str, digest: &Digest, kind: &str) -> Vec<u8> {
    json!({"critical": {"identity": {"docker-reference": name},
        "image": {"docker-manifest-digest": digest}, "type": kind}, "optional": null})
    .to_string()
    .into_bytes()
}

/// Keys and signatures by openssl: another implementation.
struct Signer(PathBuf);

impl Signer {
    fn new(world: &World, name: &str, algorithm: &[&str]) -> Self {
        let path = world.path(name);
        openssl(
            &[
                &["genpkey", "-out", path.to_str().unwrap(), "-algorithm"],
                algorithm,
            ]
            .concat(),
        );
        Self(path)
    }

    fn pem(&self) -> String {
        let path = self.0.to_str().unwrap();
        String::from_utf8(openssl(&["pkey", "-in", path, "-pubout"])).unwrap()
    }

    fn sign(&self, message: &[u8], ed25519: bool) -> Vec<u8> {
        let (path, file) = (self.0.to_str().unwrap(), self.0.with_extension("message"));
        fs::write(&file, message).unwrap();
        let file = file.to_str().unwrap();
        if ed25519 {
            openssl(&["pkeyutl", "-sign", "-rawin", "-inkey", path, "-in", file])
        } else {
            openssl(&["dgst", "-sha256", "-sign", path, file])
        }
    }
}

fn openssl(args: &[&str]) -> Vec<u8> {
    let out = Command::new("openssl").args(args).output().unwrap();
    assert!(
        out.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    out.stdout
}

#[test]
fn an_image_is_pulled_by_its_digest() {
    let mut world = World::new();
    world.insecure_http = true;
    let registry = Registry::start(&world, None);
    let digest = registry.push(&world, "team/app", "v1", &small());
    let source = format!("docker://{}/team/app", registry.host);

    // A tag alone is refused, and says how to get the digest.
    let refused = world.import(&format!("{source}:v1"), "app").unwrap_err();
    assert!(
        matches!(&refused, Error::Usage(why) if why.contains("--resolve")),
        "{refused}"
    );
    let Source::Registry(reference) = format!("{source}:v1").parse().unwrap() else {
        panic!()
    };
    let mut fetch = Fetch::new(&reference, None, Path::new("/nonexistent"));
    fetch.insecure_http = true;
    assert_eq!(
        import::resolve(&world::worker(), world::user(), &fetch).unwrap(),
        digest
    );

    let imported = world
        .import(&format!("{source}:v1@{digest}"), "app")
        .unwrap();
    let from = imported.image.source.unwrap();
    assert_eq!((from.digest, from.signed_by), (digest, None));
    // The same as from a layout.
    let local = world.import_layout(&small(), "local").unwrap();
    assert_eq!(imported.image.id, local.image.id);

    // Plain HTTP is said, or not spoken.
    world.insecure_http = false;
    let refused = world
        .import(&format!("{source}@{digest}"), "app")
        .unwrap_err();
    assert!(matches!(refused, Error::Worker(_)), "{refused}");
    world.insecure_http = true;
    let elsewhere = format!("docker://localhost:1/team/app@{digest}");
    let refused = world.import(&elsewhere, "app").unwrap_err().to_string();
    assert!(refused.contains("127.0.0.1 only"), "{refused}");
    // What is not there.
    let other = Digest::of(b"other");
    let refused = world
        .import(&format!("{source}@{other}"), "app")
        .unwrap_err();
    assert!(
        matches!(&refused, Error::Refused(r) if r.code == Code::BlobMissing),
        "{refused}"
    );
}

/// The registry's own storage is changed: what it serves is not what it was asked for.
#[test]
fn a_registry_that_serves_other_bytes_is_noticed() {
    let mut world = World::new();
    world.insecure_http = true;
    let registry = Registry::start(&world, None);
    let layout = small();
    let digest = registry.push(&world, "app", "v1", &layout);
    let before = world.everything();
    let hex = Digest::of(&layout.layers[0].0).hex();
    let data = registry
        .dir
        .join("docker/registry/v2/blobs/sha256")
        .join(&hex[..2])
        .join(&hex);
    let path = data.join("data");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let source = format!("docker://{}/app@{digest}", registry.host);
    let refused = world.import(&source, "app").unwrap_err();
    assert!(
        matches!(&refused, Error::Refused(r) if r.code == Code::DigestMismatch),
        "{refused}"
    );
    assert_eq!(world.everything(), before);
}

#[test]
fn tls_is_checked() {
    let mut world = World::new();
    let (cert, key, root) = (
        world.path("cert.pem"),
        world.path("key.pem"),
        world.path("ca.pem"),
    );
    let ca = seal::tls::local_ca::make().unwrap();
    let ip = "127.0.0.1".parse().unwrap();
    let hour = Duration::from_secs(3_600);
    let leaf = seal::tls::local_ca::issue(&ca.key_pem, &[], &[ip], hour).unwrap();
    fs::write(&root, &ca.cert_pem).unwrap();
    fs::write(&cert, &leaf.cert_pem).unwrap();
    fs::write(&key, leaf.key_pem.as_bytes()).unwrap();
    let registry = Registry::start(&world, Some((&cert, &key)));
    let digest = Digest::of(b"nothing");
    let source = format!("docker://{}/app@{digest}", registry.host);
    // Its certificate is by nobody that the system trusts.
    let refused = world.import(&source, "app").unwrap_err().to_string();
    assert!(refused.contains("certificate"), "{refused}");
    // By this one it is: the registry is reached, and has no such image.
    world.ca = Some(root);
    let refused = world.import(&source, "app").unwrap_err();
    assert!(
        matches!(&refused, Error::Refused(r) if r.code == Code::BlobMissing),
        "{refused}"
    );
}

#[test]
fn a_signature_by_a_key_of_the_policy_is_required() {
    let mut world = World::new();
    world.insecure_http = true;
    let registry = Registry::start(&world, None);
    let name = format!("{}/team/app", registry.host);
    let p256 = Signer::new(
        &world,
        "p256",
        &["EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
    );
    let ed25519 = Signer::new(&world, "ed25519", &["ED25519"]);
    let stranger = Signer::new(&world, "stranger", &["ED25519"]);
    let policy = |keys: &[&Signer], more: &str| {
        let keys: Vec<_> = keys.iter().map(|k| format!("'''{}'''", k.pem())).collect();
        let text = format!(
            "default = \"refuse\"\n[[rule]]\nprefix = \"{}/team\"\nrequire = \"signature\"\n\
             keys = [{}]\n{more}",
            registry.host,
            keys.join(", ")
        );
        Policy::parse(&text).unwrap()
    };
    let digest = registry.push(&world, "team/app", "v1", &small());
    let source = format!("docker://{name}@{digest}");
    world.policy = policy(&[&p256, &ed25519], "");
    let why = |world: &World| match world.import(&source, "app") {
        Err(Error::Policy(why)) => why,
        other => panic!("{other:?}"),
    };
    assert!(
        why(&world).contains("no signature is published"),
        "{}",
        why(&world)
    );

    let kind = "cosign container image signature";
    let good = payload(&name, &digest, kind);
    registry.sign("team/app", &digest, &good, &stranger.sign(&good, true));
    assert!(why(&world).contains("none of the keys"), "{}", why(&world));
    let other = payload(&name, &Digest::of(b"other"), kind);
    registry.sign("team/app", &digest, &other, &ed25519.sign(&other, true));
    assert!(why(&world).contains("another image"), "{}", why(&world));
    let elsewhere = payload("registry.example/evil", &digest, kind);
    registry.sign(
        "team/app",
        &digest,
        &elsewhere,
        &ed25519.sign(&elsewhere, true),
    );
    assert!(why(&world).contains("of the name"), "{}", why(&world));
    let odd = payload(&name, &digest, "something else");
    registry.sign("team/app", &digest, &odd, &ed25519.sign(&odd, true));
    assert!(why(&world).contains("another kind"), "{}", why(&world));
    assert!(world.store.list().unwrap().is_empty());

    for (signer, is_ed25519) in [(&ed25519, true), (&p256, false)] {
        registry.sign("team/app", &digest, &good, &signer.sign(&good, is_ed25519));
        let imported = world.import(&source, "app").unwrap();
        let by = imported.image.source.unwrap().signed_by.unwrap();
        let key = seal::verify::PublicKey::from_pem(&signer.pem()).unwrap();
        assert_eq!(by, key.key_id());
    }
    // Signed under another name, which the policy says.
    registry.sign(
        "team/app",
        &digest,
        &elsewhere,
        &ed25519.sign(&elsewhere, true),
    );
    world.policy = policy(&[&ed25519], "identity = \"registry.example/evil\"");
    world.import(&source, "app").unwrap();
    // Sources that no rule names.
    let refused = world.import_layout(&small(), "local").unwrap_err();
    assert!(matches!(refused, Error::Policy(_)), "{refused}");
}

/// What Debian's skopeo pushes is what we pull.
#[test]
fn skopeo_pushes_what_is_pulled() {
    let mut world = World::new();
    world.insecure_http = true;
    let registry = Registry::start(&world, None);
    let dir = world.path("skopeo");
    small()
        .index(|i| {
            i["manifests"][0]["annotations"] = json!({"org.opencontainers.image.ref.name": "v1"});
        })
        .write(&dir);
    let out = Command::new("skopeo")
        .args([
            "copy",
            "--insecure-policy",
            "--dest-tls-verify=false",
            "--format",
            "v2s2",
        ])
        .arg(format!("oci:{}:v1", dir.display()))
        .arg(format!("docker://{}/app:v1", registry.host))
        .output()
        .expect("skopeo: apt-get install skopeo");
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let Source::Registry(reference) = format!("docker://{}/app:v1", registry.host)
        .parse()
        .unwrap()
    else {
        panic!()
    };
    let mut fetch = Fetch::new(&reference, None, Path::new("/nonexistent"));
    fetch.insecure_http = true;
    let digest = import::resolve(&world::worker(), world::user(), &fetch).unwrap();
    let imported = world
        .import(&format!("docker://{}/app@{digest}", registry.host), "app")
        .unwrap();
    // Docker's manifest, the same contents.
    let local = world.import_layout(&small(), "local").unwrap();
    assert_eq!(imported.image.id, local.image.id);
}
