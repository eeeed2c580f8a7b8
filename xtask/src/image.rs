//! `cargo xtask image`: what a VM is made of, from Debian packages and our own agent.
//!
//! ```text
//! DIR/kernel/vmlinux          Debian's cloud kernel (or the small one), an ELF with a PVH entry
//! DIR/kernel/initramfs.cpio   the agent as /init, the modules it loads, nothing else
//! DIR/images/<sha256>.erofs   base images; the name is the image's id
//! DIR/closure/                QEMU, its libraries and firmware: the root of a VMM's jail
//! DIR/manifest.json           names and SHA-256 of all of it; written last
//! ```
//!
//! Each step has a key made of its inputs; a step whose key and files are there is left alone.
//! Files appear by rename. Old images stay: workspaces may still run on them.
//!
//! Must never install a package, write where packages come from, or leave a half-made file under
//! its name.

mod base;
mod closure;
mod cpio;
pub(crate) mod kernel;
pub(crate) mod steps;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::path::{Path, PathBuf};
pub(crate) use steps::workspace;
use steps::{Cache, cargo, file_sha256, install, write_if_changed};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where the artifacts go.
    #[arg(long, default_value = "/var/lib/casemate/artifacts")]
    out: PathBuf,
    /// Make the base images and look for a newer kernel again, for security updates.
    #[arg(long)]
    refresh: bool,
    /// A base image to make; python-3 unless given. Images that were made before stay.
    #[arg(long = "image", value_name = "NAME")]
    images: Vec<String>,
    /// Make all base images.
    #[arg(long, conflicts_with = "images")]
    all: bool,
    /// The guest's kernel: Debian's, or the small one, which is compiled.
    #[arg(long, value_enum, default_value_t = Which::Debian)]
    kernel: Which,
    /// A static agent that is built already, instead of building one.
    #[arg(long)]
    agent: Option<PathBuf>,
}

/// Which kernel.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Which {
    Debian,
    Small,
}

/// What `manifest.json` says. Readers ignore fields that they do not know.
#[derive(Serialize)]
struct Manifest {
    version: u32,
    kernel: Kernel,
    initramfs: Digest,
    images: Vec<Image>,
    closure: closure::Closure,
}

#[derive(Serialize)]
struct Kernel {
    package: String,
    release: String,
    sha256: String,
}

#[derive(Serialize)]
struct Digest {
    sha256: String,
}

#[derive(Serialize)]
struct Image {
    name: String,
    id: String,
    description: String,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("making images needs root (file owners, device nodes): run it again with sudo");
    }
    let cache = Cache::new(args.refresh)?;
    let out = &args.out;
    for dir in ["kernel", "images"] {
        let dir = out.join(dir);
        std::fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    }

    let kernel = match args.kernel {
        Which::Debian => kernel::fetch(&cache)?,
        Which::Small => crate::kernel::build(&cache)?,
    };
    install(&kernel.vmlinux, &out.join("kernel/vmlinux"))?;

    let agent = match &args.agent {
        Some(path) => path.clone(),
        None => cargo::guest_agent(&cache)?,
    };
    let initramfs = initramfs(&cache, &kernel, &agent)?;
    install(&initramfs, &out.join("kernel/initramfs.cpio"))?;

    let mut images = Vec::new();
    for spec in base::chosen(&args.images, args.all)? {
        let erofs = base::build(&cache, spec)?;
        let id = file_sha256(&erofs)?;
        install(&erofs, &out.join(format!("images/{id}.erofs")))?;
        images.push(Image {
            name: spec.name.into(),
            id,
            description: spec.description.into(),
        });
    }

    let closure = closure::install(&cache, &out.join("closure"))?;
    let manifest = Manifest {
        version: 1,
        kernel: Kernel {
            package: kernel.package,
            release: kernel.release,
            sha256: file_sha256(&out.join("kernel/vmlinux"))?,
        },
        initramfs: Digest {
            sha256: file_sha256(&out.join("kernel/initramfs.cpio"))?,
        },
        images,
        closure,
    };
    // Images that were imported, or made before, stay in it.
    let serde_json::Value::Object(manifest) = serde_json::to_value(&manifest)? else {
        bail!("the manifest is no object");
    };
    ::image::store::Store::new(out).merge(manifest)?;
    cache.done(&out.display().to_string());
    Ok(())
}

/// An archive to be unpacked after another, with one program.
pub(crate) fn one_file_archive(name: &str, contents: &[u8]) -> Result<Vec<u8>> {
    let mut archive = cpio::Archive::new();
    archive.file(name, 0o755, contents)?;
    Ok(archive.finish())
}

/// The agent and its modules as the kernel's first file system.
fn initramfs(cache: &Cache, kernel: &kernel::Kernel, agent: &Path) -> Result<PathBuf> {
    let agent = std::fs::read(agent).with_context(|| format!("read {}", agent.display()))?;
    let mut archive = cpio::Archive::new();
    for dir in [
        "dev",
        "proc",
        "sys",
        "lib",
        "lib/modules",
        "lib/modules/casemate",
    ] {
        archive.dir(dir, 0o755);
    }
    // The runtime of a Rust program wants /dev/null before it can mount anything.
    archive.device("dev/null", 0o666, 1, 3);
    archive.device("dev/console", 0o600, 5, 1);
    let lists = [
        ("order", &kernel.modules),
        ("order.vsock", &kernel.vsock_modules),
    ];
    for (list, modules) in lists {
        let mut order = String::new();
        for module in modules {
            let name = module
                .file_name()
                .and_then(|n| n.to_str())
                .context("a module's file name is not UTF-8")?;
            let bytes =
                std::fs::read(module).with_context(|| format!("read {}", module.display()))?;
            archive.file(&format!("lib/modules/casemate/{name}"), 0o644, &bytes)?;
            order.push_str(name);
            order.push('\n');
        }
        archive.file(
            &format!("lib/modules/casemate/{list}"),
            0o644,
            order.as_bytes(),
        )?;
    }
    archive.file("init", 0o755, &agent)?;
    let path = cache.dir("initramfs")?.join("initramfs.cpio");
    let bytes = archive.finish();
    let made = write_if_changed(&path, &bytes)?;
    cache.say(
        "initramfs",
        &format!(
            "{} modules, {} KiB",
            kernel.modules.len() + kernel.vsock_modules.len(),
            bytes.len() >> 10
        ),
        !made,
    );
    Ok(path)
}
