//! Hostile images: each refused, by name, with nothing left and nothing touched outside.
#![allow(clippy::unwrap_used)]

mod world;

use image::Code;
use image::limits::Limits;
use image::oci::Digest;
use serde_json::json;
use std::fs;
use world::{Head, INDEX, LAYER, Layout, Tar, World, block, gzip, sum};

struct Case {
    name: &'static str,
    code: Code,
    layout: Layout,
    /// Part of the refusal's path.
    path: &'static str,
}

fn case(name: &'static str, code: Code, layout: Layout) -> Case {
    Case {
        name,
        code,
        layout,
        path: "",
    }
}

fn at(path: &'static str, name: &'static str, code: Code, tar: Tar) -> Case {
    Case {
        name,
        code,
        layout: Layout::of(tar),
        path,
    }
}

fn tar() -> Tar {
    Tar::default()
}

fn paths() -> Vec<Case> {
    let long = "d/".repeat(120) + "f";
    let name = "n".repeat(256);
    vec![
        at(
            "../evil",
            "climbs",
            Code::PathTraversal,
            tar().file("../evil", b"x"),
        ),
        at(
            "a/../../evil",
            "climbs later",
            Code::PathTraversal,
            tar().file("a/../../evil", b"x"),
        ),
        at(
            "/tmp/evil",
            "absolute",
            Code::PathAbsolute,
            tar().file("/tmp/evil", b"x"),
        ),
        at("", "empty name", Code::PathInvalid, tar().file("", b"x")),
        at(
            "",
            "name with NUL by pax",
            Code::PathInvalid,
            tar().pax(&[("path", b"a\0b")]).file("a", b"x"),
        ),
        at(
            "d/d",
            "too deep",
            Code::PathTooLong,
            tar().pax(&[("path", long.as_bytes())]).file("f", b"x"),
        ),
        at(
            "nnn",
            "long name",
            Code::PathTooLong,
            tar().pax(&[("path", name.as_bytes())]).file("f", b"x"),
        ),
        at(
            "",
            "long path by GNU header",
            Code::PathTooLong,
            tar().special(b'L', &[b'a'; 5_000]).file("f", b"x"),
        ),
        at(
            "out/evil",
            "through its own symlink",
            Code::ThroughSymlink,
            tar().symlink("out", "/tmp").file("out/evil", b"x"),
        ),
        at(
            "out/evil",
            "through a relative symlink",
            Code::ThroughSymlink,
            tar().symlink("out", "../../../tmp").file("out/evil", b"x"),
        ),
        case(
            "a lower layer's symlink above the root",
            Code::PathTraversal,
            Layout::default()
                .plain(tar().symlink("out", "../../../tmp").end())
                .plain(tar().file("out/evil", b"x").end()),
        ),
        case(
            "a lower layer's symlink below a whiteout",
            Code::Whiteout,
            Layout::default()
                .plain(tar().symlink("out", ".wh.a").end())
                .plain(tar().file("out/evil", b"x").end()),
        ),
        case(
            "a symlink to itself",
            Code::ThroughSymlink,
            Layout::default()
                .plain(tar().symlink("loop", "loop").end())
                .plain(tar().file("loop/evil", b"x").end()),
        ),
        at(
            "f/evil",
            "below a file",
            Code::ThroughSymlink,
            tar().file("f", b"x").file("f/evil", b"x"),
        ),
        at(
            "f",
            "the same file twice",
            Code::Duplicate,
            tar().file("f", b"1").file("f", b"2"),
        ),
        at(
            "f",
            "a symlink over a file",
            Code::Duplicate,
            tar().file("f", b"1").symlink("./f", "/x"),
        ),
        at(
            "d",
            "a file over a directory",
            Code::Duplicate,
            tar().file("d/in", b"1").file("d", b"2"),
        ),
        at(
            "",
            "the root as a symlink",
            Code::PathInvalid,
            tar().symlink("./", "/tmp"),
        ),
    ]
}

fn kinds() -> Vec<Case> {
    let suid = |path: &str, mode| tar().file_mode(path, mode, b"x");
    let device = |kind| tar().head(&Head::new("dev/evil", kind));
    vec![
        at("dev/evil", "character device", Code::Device, device(b'3')),
        at("dev/evil", "block device", Code::Device, device(b'4')),
        at(
            "f",
            "sparse file",
            Code::TarUnsupported,
            tar().head(&Head::new("f", b'S')),
        ),
        at(
            "f",
            "unknown kind",
            Code::TarUnsupported,
            tar().head(&Head::new("f", b'Z')),
        ),
        at(
            "/opt/evil",
            "setuid",
            Code::Setuid,
            suid("opt/evil", 0o4755),
        ),
        at(
            "/opt/evil",
            "setgid",
            Code::Setuid,
            suid("opt/evil", 0o2755),
        ),
        at(
            "/zz",
            "a hard link to an allowed setuid program",
            Code::Setuid,
            suid("usr/bin/su", 0o4755).hard("zz", "usr/bin/su"),
        ),
        at(
            "/f",
            "file capability",
            Code::FileCapability,
            tar()
                .pax(&[(
                    "SCHILY.xattr.security.capability",
                    &[1, 0, 0, 2, 0, 4, 0, 0],
                )])
                .file("f", b"x"),
        ),
        at(
            "f",
            "an instruction to overlayfs",
            Code::Xattr,
            tar()
                .pax(&[("SCHILY.xattr.trusted.overlay.redirect", b"/x")])
                .file("f", b"x"),
        ),
        at(
            "f",
            "an instruction to user overlayfs",
            Code::Xattr,
            tar()
                .pax(&[("SCHILY.xattr.user.overlay.opaque", b"y")])
                .file("f", b"x"),
        ),
        at(
            "",
            "large extended attribute",
            Code::Xattr,
            tar()
                .pax(&[("SCHILY.xattr.user.big", &[b'x'; 9_000])])
                .file("f", b"x"),
        ),
        at(
            "evil",
            "a hard link to the host",
            Code::PathAbsolute,
            tar().hard("evil", "/etc/shadow"),
        ),
        at(
            "evil",
            "a hard link above the root",
            Code::PathTraversal,
            tar().hard("evil", "../../etc/shadow"),
        ),
        at(
            "evil",
            "a hard link to nothing",
            Code::LinkMissing,
            tar().hard("evil", "none"),
        ),
        at(
            "evil",
            "a hard link to a directory",
            Code::LinkMissing,
            tar().dir("d").hard("evil", "d"),
        ),
        at(
            "evil",
            "a hard link through its own symlink",
            Code::ThroughSymlink,
            tar().symlink("s", "/etc").hard("evil", "s/shadow"),
        ),
        at(
            "proc",
            "/proc as a symlink",
            Code::MountPoint,
            tar().symlink("proc", "/"),
        ),
        at(
            "dev/pts",
            "/dev/pts as a file",
            Code::MountPoint,
            tar().file("dev/pts", b""),
        ),
        at(
            ".wh..",
            "a whiteout of the directory above",
            Code::Whiteout,
            tar().file("d/.wh...", b""),
        ),
        at(
            ".wh.",
            "a whiteout of nothing",
            Code::Whiteout,
            tar().file("d/.wh.", b""),
        ),
        at(
            ".wh.",
            "a whiteout that is a symlink",
            Code::Whiteout,
            tar().symlink(".wh.a", "/etc"),
        ),
        at(
            ".wh.",
            "a file below a whiteout",
            Code::Whiteout,
            tar().file(".wh.a/b", b""),
        ),
        at(
            ".wh..wh.plnk",
            "metadata of aufs",
            Code::Whiteout,
            tar().file(".wh..wh.plnk", b""),
        ),
    ]
}

fn archives() -> Vec<Case> {
    let plain = |bytes: Vec<u8>| Layout::default().plain(bytes);
    let mut bad_sum = tar().file("f", b"x").end();
    bad_sum[0] ^= 1;
    let mut no_magic = block(&Head::new("f", b'0'));
    no_magic[257..265].fill(0);
    sum(&mut no_magic);
    let mut negative = block(&Head::new("f", b'0'));
    negative[124..136].copy_from_slice(&[0xff; 12]);
    sum(&mut negative);
    let huge = Head {
        size: 0o77_777_777_777,
        ..Head::new("f", b'0')
    };
    let sized = Head {
        size: 512,
        ..Head::new("d", b'5')
    };
    let mut after = tar().file("f", b"x").end();
    after.extend(tar().file("evil", b"hidden").end());
    let cut = tar().file("f", &[1; 2_000]).0[..1_024].to_vec();
    let broken = |bytes: &[u8], media: &str| {
        let digest = Digest::of(bytes);
        Layout::default().stored(bytes.to_vec(), &format!("{LAYER}{media}"), digest)
    };
    let mut flipped = gzip(&tar().file("f", &[5; 9_000]).end());
    let checksum = flipped.len() - 8;
    flipped[checksum] ^= 0xff;
    vec![
        case(
            "pax size larger than the header's",
            Code::TarMalformed,
            Layout::of(tar().pax(&[("size", b"1024")]).file("f", b"x")),
        ),
        case(
            "pax size smaller than the header's",
            Code::TarMalformed,
            Layout::of(tar().pax(&[("size", b"0")]).file("f", &[0; 512])),
        ),
        case(
            "a pax record's length is wrong",
            Code::TarMalformed,
            Layout::of(tar().special(b'x', b"99 path=evil\n").file("f", b"x")),
        ),
        case(
            "two pax headers",
            Code::TarMalformed,
            Layout::of(
                tar()
                    .pax(&[("path", b"a")])
                    .pax(&[("path", b"b")])
                    .file("f", b"x"),
            ),
        ),
        case(
            "a pax path and a GNU name",
            Code::TarMalformed,
            Layout::of(
                tar()
                    .pax(&[("path", b"a")])
                    .special(b'L', b"b\0")
                    .file("f", b"x"),
            ),
        ),
        case(
            "GNU sparse by pax",
            Code::TarUnsupported,
            Layout::of(tar().pax(&[("GNU.sparse.major", b"1")]).file("f", b"x")),
        ),
        case(
            "a global pax header",
            Code::TarUnsupported,
            Layout::of(tar().special(b'g', b"13 path=evil\n").file("f", b"x")),
        ),
        case(
            "an endless header",
            Code::TooLarge,
            Layout::of(tar().head(&Head {
                size: 1 << 30,
                ..Head::new("x", b'x')
            })),
        ),
        case("a checksum is wrong", Code::TarMalformed, plain(bad_sum)),
        case("no magic", Code::TarMalformed, plain(no_magic.to_vec())),
        case(
            "a negative size",
            Code::TarMalformed,
            plain(negative.to_vec()),
        ),
        case(
            "a size beyond the archive",
            Code::TarMalformed,
            plain(tar().head(&huge).data(&[1; 512]).end()),
        ),
        case(
            "a directory with contents",
            Code::TarMalformed,
            Layout::of(tar().head(&sized).data(&[1; 512])),
        ),
        case(
            "a second archive behind the end",
            Code::TarMalformed,
            plain(after),
        ),
        case("cut off", Code::TarMalformed, plain(cut)),
        case(
            "not an archive",
            Code::TarMalformed,
            plain(vec![b'A'; 4_096]),
        ),
        case(
            "gzip that is none",
            Code::Compression,
            broken(b"no gzip at all", "+gzip"),
        ),
        case(
            "gzip with a flipped byte",
            Code::Compression,
            broken(&flipped, "+gzip"),
        ),
        case(
            "zstd that is none",
            Code::Compression,
            broken(b"no zstd at all", "+zstd"),
        ),
        case(
            "zstd with a window of terabytes",
            Code::Compression,
            broken(&[0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xff, 0, 0, 0], "+zstd"),
        ),
    ]
}

fn documents() -> Vec<Case> {
    let good = || Layout::of(tar().file("f", b"x"));
    let blob = |dir: &std::path::Path, n: usize| {
        let bytes = fs::read(dir.join("index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        let hex = index["manifests"][0]["digest"].as_str().unwrap()[7..].to_owned();
        let manifest = fs::read(dir.join("blobs/sha256").join(hex)).unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        let hex = manifest["layers"][n]["digest"].as_str().unwrap()[7..].to_owned();
        dir.join("blobs/sha256").join(hex)
    };
    vec![
        case(
            "a layer was changed",
            Code::DigestMismatch,
            good().files(move |dir| {
                let path = blob(dir, 0);
                let mut bytes = fs::read(&path).unwrap();
                bytes[0] ^= 1;
                fs::write(path, bytes).unwrap();
            }),
        ),
        case(
            "a layer is longer",
            Code::SizeMismatch,
            good().files(move |dir| {
                let path = blob(dir, 0);
                let mut bytes = fs::read(&path).unwrap();
                bytes.push(0);
                fs::write(path, bytes).unwrap();
            }),
        ),
        case(
            "a layer is missing",
            Code::BlobMissing,
            good().files(move |dir| fs::remove_file(blob(dir, 0)).unwrap()),
        ),
        case(
            "a layer is a symlink to the host",
            Code::BlobMissing,
            good().files(move |dir| {
                let path = blob(dir, 0);
                fs::remove_file(&path).unwrap();
                std::os::unix::fs::symlink("/etc/passwd", path).unwrap();
            }),
        ),
        case(
            "a layer is a fifo",
            Code::BlobMissing,
            good().files(move |dir| {
                let path = blob(dir, 0);
                fs::remove_file(&path).unwrap();
                let mode = rustix::fs::Mode::from_raw_mode(0o644);
                rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0)
                    .unwrap();
            }),
        ),
        case(
            "a wrong diff_id",
            Code::DiffIdMismatch,
            good().config(|c| {
                c["rootfs"]["diff_ids"] = json!([Digest::of(b"other")]);
            }),
        ),
        case(
            "fewer diff_ids than layers",
            Code::JsonMalformed,
            good().config(|c| c["rootfs"]["diff_ids"] = json!([])),
        ),
        case(
            "another machine's image",
            Code::PlatformMissing,
            good().config(|c| c["architecture"] = "arm64".into()),
        ),
        case(
            "a layer from elsewhere",
            Code::ForeignLayer,
            good().manifest(|m| m["layers"][0]["urls"] = json!(["https://example.org/x"])),
        ),
        case(
            "a nondistributable layer",
            Code::ForeignLayer,
            good().manifest(|m| {
                m["layers"][0]["mediaType"] =
                    "application/vnd.oci.image.layer.nondistributable.v1.tar".into();
            }),
        ),
        case(
            "an unknown media type",
            Code::MediaTypeUnknown,
            good().manifest(|m| m["layers"][0]["mediaType"] = "application/x-evil".into()),
        ),
        case(
            "a digest of another algorithm",
            Code::MediaTypeUnknown,
            good().manifest(|m| m["layers"][0]["digest"] = "sha512:00".into()),
        ),
        case(
            "a digest that is a path",
            Code::MediaTypeUnknown,
            good().manifest(|m| {
                m["layers"][0]["digest"] = "sha256:../../../../../../etc/passwd".into();
            }),
        ),
        case(
            "too many layers",
            Code::TooLarge,
            good().manifest(|m| {
                m["layers"] = json!(vec![m["layers"][0].clone(); 129]);
            }),
        ),
        case(
            "index and manifest at once",
            Code::JsonMalformed,
            good().manifest(|m| m["manifests"] = json!([])),
        ),
        case(
            "a manifest that says it is an index",
            Code::JsonMalformed,
            good().manifest(|m| m["mediaType"] = INDEX.into()),
        ),
        case(
            "a descriptor that says it is an index",
            Code::JsonMalformed,
            good().index(|i| i["manifests"][0]["mediaType"] = INDEX.into()),
        ),
        case(
            "two images without a tag",
            Code::ImageNotFound,
            good().index(|i| {
                i["manifests"] = json!([i["manifests"][0].clone(), i["manifests"][0].clone()]);
            }),
        ),
        case(
            "no index",
            Code::ImageNotFound,
            good().files(|dir| fs::remove_file(dir.join("index.json")).unwrap()),
        ),
        case(
            "an index that is no JSON",
            Code::JsonMalformed,
            good().files(|dir| fs::write(dir.join("index.json"), "{").unwrap()),
        ),
        case(
            "an oversized configuration",
            Code::TooLarge,
            good().config(|c| c["x"] = json!("x".repeat(5 << 20))),
        ),
        case(
            "an oversized environment",
            Code::TooLarge,
            good().config(|c| c["config"]["Env"] = json!(vec!["A=b"; 300])),
        ),
        case(
            "deeply nested JSON",
            Code::JsonMalformed,
            good().files(|dir| {
                let deep = "[".repeat(100_000);
                fs::write(dir.join("index.json"), format!("{{\"manifests\":{deep}")).unwrap();
            }),
        ),
    ]
}

#[test]
fn each_hostile_image_is_refused_by_its_name() {
    let world = World::new();
    let before = world.everything();
    let all = [paths(), kinds(), archives(), documents()];
    let mut count = 0;
    for case in all.into_iter().flatten() {
        let refusal = world.refusal(&case.layout, "hostile");
        assert_eq!(refusal.code, case.code, "{}: {refusal}", case.name);
        let path = refusal.path.clone().unwrap_or_default();
        assert!(path.contains(case.path), "{}: {refusal}", case.name);
        // The layer is named wherever a path is.
        assert!(
            path.is_empty() || path == "proc" || path == "dev/pts" || refusal.part.is_some(),
            "{}: {refusal}",
            case.name
        );
        assert_eq!(
            world.everything(),
            before,
            "{}: something stayed",
            case.name
        );
        println!("{:<46} {refusal}", case.name);
        count += 1;
    }
    println!("{count} hostile images, {count} refused, effects outside: 0");
    assert!(count >= 30);
}

/// Bounds, made small.
#[test]
fn bombs_are_refused_at_their_bound() {
    let zeros = |mib: usize| tar().file("zeros", &vec![0; mib << 20]).end();
    let many = || {
        let mut t = tar();
        for n in 0..50 {
            t = t.file(&format!("f{n}"), b"");
        }
        t.end()
    };
    let small = Limits {
        layer_stored_max_bytes: 1 << 20,
        layer_unpacked_max_bytes: 4 << 20,
        image_unpacked_max_bytes: 6 << 20,
        ratio_max: 100,
        entries_max: 20,
    };
    let zstd = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        let packed =
            ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest);
        Layout::default().stored(packed, &format!("{LAYER}+zstd"), digest)
    };
    let cases = [
        (
            "a gzip bomb",
            Code::Ratio,
            Limits::default(),
            Layout::default().gzip(&zeros(80)),
        ),
        (
            "a layer too large unpacked",
            Code::TooLarge,
            small,
            Layout::default().gzip(&zeros(5)),
        ),
        (
            "zstd too large unpacked",
            Code::TooLarge,
            small,
            zstd(&zeros(5)),
        ),
        (
            "a layer too large as stored",
            Code::TooLarge,
            small,
            Layout::default().plain(zeros(2)),
        ),
        (
            "all layers together",
            Code::TooLarge,
            small,
            Layout::default()
                .gzip(&zeros(3))
                .gzip(&zeros(3))
                .gzip(&zeros(3)),
        ),
        (
            "too many entries",
            Code::TooLarge,
            small,
            Layout::default().plain(many()),
        ),
    ];
    let mut world = World::new();
    let before = world.everything();
    for (name, code, limits, layout) in cases {
        world.policy.limits = limits;
        let refusal = world.refusal(&layout, "bomb");
        assert_eq!(refusal.code, code, "{name}: {refusal}");
        assert_eq!(world.everything(), before, "{name}: something stayed");
        println!("{name:<32} {refusal}");
    }
}

/// What the policy allows is taken, and only there.
#[test]
fn a_policy_allows_by_path() {
    let mut world = World::new();
    let layout = Layout::of(
        tar()
            .file_mode("opt/own", 0o4755, b"x")
            .pax(&[(
                "SCHILY.xattr.security.capability",
                &[1, 0, 0, 2, 0, 4, 0, 0],
            )])
            .file("opt/cap", b"x"),
    );
    assert_eq!(world.refusal(&layout, "p").code, Code::FileCapability);
    world.policy = image::policy::Policy::parse(
        "allow_setuid = [\"/opt/own\"]\nallow_capabilities = [\"/opt/cap\"]",
    )
    .unwrap();
    world.import_layout(&layout, "p").unwrap();
    let other = Layout::of(tar().file_mode("usr/bin/su", 0o4755, b"x"));
    assert_eq!(world.refusal(&other, "q").code, Code::Setuid);
}
