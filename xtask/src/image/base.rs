//! Base images: a Debian tree as erofs. Public, read-only, named by their hash.

use super::steps::{Cache, run};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// One image.
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    pub(crate) description: &'static str,
    packages: &'static str,
    /// The Debian release; none: this machine's.
    suite: Option<&'static str>,
}

/// What can be made. The first one is what a workspace is of unless it says otherwise.
pub(crate) const IMAGES: &[Spec] = &[
    Spec {
        name: "python-3",
        description: "Debian with Python 3, venv and curl",
        packages: "python3,python3-venv,ca-certificates,curl,procps",
        suite: None,
    },
    Spec {
        name: "debian-12",
        description: "Debian 12 with curl and the usual tools",
        packages: "ca-certificates,curl,procps,iproute2,less,xz-utils",
        suite: Some("bookworm"),
    },
    // Debian 12 has Node.js 18; Debian 13 has 20.
    Spec {
        name: "node-20",
        description: "Debian 13 with Node.js 20",
        packages: "nodejs,ca-certificates,curl,procps",
        suite: Some("trixie"),
    },
];

/// The images of these names; the first one without any.
pub(crate) fn chosen(names: &[String], all: bool) -> Result<Vec<&'static Spec>> {
    if all {
        return Ok(IMAGES.iter().collect());
    }
    if names.is_empty() {
        return Ok(IMAGES.iter().take(1).collect());
    }
    let find = |name: &String| {
        let known = || IMAGES.iter().map(|i| i.name).collect::<Vec<_>>().join(", ");
        IMAGES
            .iter()
            .find(|i| i.name == name)
            .with_context(|| format!("no image {name}; there are {}", known()))
    };
    names.iter().map(find).collect()
}

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
    let suite = match spec.suite {
        Some(suite) => suite.to_owned(),
        None => suite()?,
    };
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
    let suite_of_machine = self::suite()?;
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
    // A release that the machine's own apt does not follow comes from the same mirror.
    if suite_of_machine != suite {
        args.push(format!("deb {} {suite} main", mirror()?));
    }
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

/// The mirror that this machine's apt is set to.
fn mirror() -> Result<String> {
    let args = [
        "indextargets",
        "--format",
        "$(REPO_URI) $(ORIGIN) $(LABEL)",
        "Created-By: Packages",
    ];
    let text = run("apt-get", "apt", args, None)?;
    let debian = text.lines().find_map(|l| l.strip_suffix(" Debian Debian"));
    debian
        .map(str::to_owned)
        .context("apt has no Debian mirror among its sources")
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
