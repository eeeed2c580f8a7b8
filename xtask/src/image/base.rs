//! Base images: a Debian tree as erofs. Public, read-only, named by their hash.

use super::steps::{Cache, run};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// One image.
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    pub(crate) description: &'static str,
    packages: &'static str,
}

/// What is made.
pub(crate) const IMAGES: &[Spec] = &[Spec {
    name: "python-3",
    description: "Debian with Python 3, venv and curl",
    packages: "python3,python3-venv,ca-certificates,curl,procps",
}];

/// Files that no workspace needs; licences stay.
const LEFT_OUT: &[&str] = &[
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
];

/// What a machine makes for itself, and what would tell of the machine that made the image.
const FORGOTTEN: &str = "rm -rf \"$1/etc/machine-id\" \"$1/etc/hostname\" \"$1/etc/resolv.conf\" \
                         \"$1/var/log\"/* \"$1/var/cache/ldconfig\"; \
                         : > \"$1/etc/resolv.conf\"; : > \"$1/etc/hostname\"";

/// Makes, or finds, the image.
pub(crate) fn build(cache: &Cache, spec: &Spec) -> Result<PathBuf> {
    let suite = suite()?;
    let step = format!("base-{}", spec.name);
    let erofs = cache.dir("base")?.join(format!("{}.erofs", spec.name));
    let key = format!(
        "{suite} {} {} {FORGOTTEN}",
        spec.packages,
        LEFT_OUT.join(" ")
    );
    let fresh = cache.refresh || !cache.is(&step, &key) || !erofs.exists();
    if fresh {
        cache.say("base", &format!("{} from Debian {suite}", spec.name), false);
        let tree = cache.dir("base")?.join(format!("{}.tree", spec.name));
        remove(&tree)?;
        debian(&tree, &suite, spec.packages)?;
        pack(&tree, &erofs)?;
        remove(&tree)?;
        cache.made(&step, &key)?;
    }
    let mib = std::fs::metadata(&erofs)?.len() >> 20;
    cache.say("base", &format!("{}, {mib} MiB", spec.name), !fresh);
    Ok(erofs)
}

fn debian(tree: &Path, suite: &str, packages: &str) -> Result<()> {
    let mut args: Vec<String> = vec![
        "--quiet".into(),
        "--mode=root".into(),
        "--variant=minbase".into(),
        "--format=directory".into(),
        format!("--include={packages}"),
        format!("--customize-hook={FORGOTTEN}"),
    ];
    args.extend(LEFT_OUT.iter().map(|o| format!("--dpkgopt={o}")));
    args.extend([suite.to_owned(), tree.display().to_string()]);
    run("mmdebstrap", "mmdebstrap", args, None)
        .context("bootstrap Debian; the machine's apt must reach a Debian mirror")
        .map(drop)
}

/// Fixed times and id: the same tree is the same image.
fn pack(tree: &Path, erofs: &Path) -> Result<()> {
    let new = erofs.with_extension("new");
    let args: Vec<&std::ffi::OsStr> = vec![
        "--quiet".as_ref(),
        "-zlz4".as_ref(),
        "-T0".as_ref(),
        "-U00000000-0000-0000-0000-000000000000".as_ref(),
        new.as_os_str(),
        tree.as_os_str(),
    ];
    run("mkfs.erofs", "erofs-utils", args, None)?;
    std::fs::rename(&new, erofs).with_context(|| format!("rename to {}", erofs.display()))
}

/// The Debian release of this machine, whose archive keys it has; bookworm elsewhere.
fn suite() -> Result<String> {
    let text = std::fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let field = |name: &str| {
        text.lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix('='))
            .map(|v| v.trim_matches('"'))
    };
    Ok(match (field("ID"), field("VERSION_CODENAME")) {
        (Some("debian"), Some(codename)) => codename.to_owned(),
        _ => "bookworm".to_owned(),
    })
}

fn remove(tree: &Path) -> Result<()> {
    match std::fs::remove_dir_all(tree) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", tree.display()))
        }
        _ => Ok(()),
    }
}
