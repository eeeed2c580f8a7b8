//! Debian's cloud kernel: downloaded, never installed.

use super::steps::{Cache, run};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// Its meta package.
const META: &str = "linux-image-cloud-amd64";

/// Modules that the agent loads, in this order; what a kernel has built in is left out.
const MODULES: &[&str] = &[
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_mmio",
    "drivers/char/virtio_console",
    "drivers/block/virtio_blk",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
    "drivers/block/loop",
    "fs/overlayfs/overlay",
    "lib/libcrc32c",
    "fs/netfs/netfs",
    "fs/erofs/erofs",
];

/// Those that it loads where the machine has a vsock: under Firecracker.
const VSOCK_MODULES: &[&str] = &[
    "net/vmw_vsock/vsock",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common",
    "net/vmw_vsock/vmw_vsock_virtio_transport",
];

/// Modules that some kernels need and others do not know.
const OPTIONAL: &[&str] = &["lib/libcrc32c", "fs/netfs/netfs"];

pub(crate) struct Kernel {
    /// `name=version`.
    pub(crate) package: String,
    /// What `uname -r` says.
    pub(crate) release: String,
    pub(crate) vmlinux: PathBuf,
    /// In the order of loading.
    pub(crate) modules: Vec<PathBuf>,
    /// Those for a vsock, the same.
    pub(crate) vsock_modules: Vec<PathBuf>,
}

pub(crate) fn fetch(cache: &Cache) -> Result<Kernel> {
    let dir = cache.dir("kernel")?;
    let kept = cache.key("kernel").filter(|_| !cache.refresh);
    let package = match kept {
        Some(package) => package,
        None => newest()?,
    };
    let release = package
        .strip_prefix("linux-image-")
        .and_then(|p| p.split_once('='))
        .map(|(release, _)| release.to_owned())
        .with_context(|| format!("{package} is no kernel image"))?;
    let vmlinux = dir.join(format!("vmlinux-{release}"));
    let tree = dir.join("tree");
    let fresh = !cache.is("kernel", &package) || !vmlinux.exists();
    if fresh {
        unpack(&dir, &tree, &package)?;
        let packed = tree.join(format!("boot/vmlinuz-{release}"));
        let image = std::fs::read(&packed).with_context(|| format!("read {}", packed.display()))?;
        // Firmware that inflates the kernel under TCG costs half a second of each cold boot.
        let elf = vmlinux_of(&image).unwrap_or(image);
        std::fs::write(&vmlinux, elf).with_context(|| format!("write {}", vmlinux.display()))?;
        cache.made("kernel", &package)?;
    }
    let base = tree.join("lib/modules").join(&release).join("kernel");
    cache.say("kernel", &package, !fresh);
    Ok(Kernel {
        package,
        release,
        vmlinux,
        modules: modules(&base, MODULES)?,
        vsock_modules: modules(&base, VSOCK_MODULES)?,
    })
}

/// `name=version` of the package behind the meta package.
fn newest() -> Result<String> {
    let none = || {
        format!(
            "apt does not know {META}: run `sudo apt-get update`, with Debian among its sources"
        )
    };
    let text =
        run("apt-cache", "apt", ["depends", "--important", META], None).with_context(none)?;
    let name = text
        .lines()
        .filter_map(|l| l.trim().strip_prefix("Depends: "))
        .find(|p| p.starts_with("linux-image-"))
        .with_context(none)?;
    let policy = run("apt-cache", "apt", ["policy", name], None)?;
    let version = policy
        .lines()
        .find_map(|l| l.trim().strip_prefix("Candidate: "))
        .filter(|v| *v != "(none)")
        .with_context(none)?;
    Ok(format!("{name}={version}"))
}

fn unpack(dir: &Path, tree: &Path, package: &str) -> Result<()> {
    for old in std::fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let old = old?.path();
        let removed = if old.is_dir() {
            std::fs::remove_dir_all(&old)
        } else {
            std::fs::remove_file(&old)
        };
        removed.with_context(|| format!("remove {}", old.display()))?;
    }
    // Apt's own user can't write here, and need not: the archive's signatures are checked first.
    let args = ["-q", "-o", "APT::Sandbox::User=root", "download", package];
    run("apt-get", "apt", args, Some(dir))
        .with_context(|| format!("download {package}; `sudo apt-get update` may help"))?;
    let deb = std::fs::read_dir(dir)?
        .filter_map(|e| Some(e.ok()?.path()))
        .find(|p| p.extension().is_some_and(|e| e == "deb"))
        .context("apt-get download left no package")?;
    std::fs::create_dir_all(tree)?;
    run(
        "dpkg-deb",
        "dpkg",
        ["-x".as_ref(), deb.as_os_str(), tree.as_os_str()],
        None,
    )?;
    std::fs::remove_file(&deb).with_context(|| format!("remove {}", deb.display()))
}

/// The modules' files, unpacked where Debian packs them.
fn modules(base: &Path, names: &[&str]) -> Result<Vec<PathBuf>> {
    let builtin = base.with_file_name("modules.builtin");
    let builtin =
        std::fs::read_to_string(&builtin).with_context(|| format!("read {}", builtin.display()))?;
    let mut found = Vec::new();
    for name in names {
        let plain = base.join(format!("{name}.ko"));
        let packed = base.join(format!("{name}.ko.xz"));
        if !plain.exists() && packed.exists() {
            run("xz", "xz-utils", ["-dk".as_ref(), packed.as_os_str()], None)?;
        }
        if plain.exists() {
            found.push(plain);
        } else if !builtin.contains(&format!("kernel/{name}.ko")) && !OPTIONAL.contains(name) {
            bail!("the kernel has no module {name}: it is not one of Debian's cloud kernels");
        }
    }
    Ok(found)
}

/// The ELF inside a bzImage that is packed with LZ4, as Debian's are; `None` for others, which
/// boot as they are.
fn vmlinux_of(image: &[u8]) -> Option<Vec<u8>> {
    const LEGACY_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
    const BLOCK_MAX_BYTES: usize = 8 << 20;
    let u32_at = |at: usize| -> Option<usize> {
        let b = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(b)).ok()
    };
    // Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length.
    let sectors = usize::from(*image.get(0x1f1)?);
    let start = (sectors + 1) * 512 + u32_at(0x248)?;
    let end = start + u32_at(0x24c)?;
    let payload = image.get(start..end)?;
    let mut rest = payload.strip_prefix(&LEGACY_MAGIC)?;
    let mut elf = Vec::new();
    // Blocks, then four bytes with the unpacked size.
    while rest.len() > 4 {
        let (len, after) = rest.split_first_chunk::<4>()?;
        let len = usize::try_from(u32::from_le_bytes(*len)).ok()?;
        let block = after.get(..len)?;
        elf.extend(lz4_flex::block::decompress(block, BLOCK_MAX_BYTES).ok()?);
        rest = &after[len..];
    }
    elf.starts_with(b"\x7fELF").then_some(elf)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_packed_kernel_is_unpacked_and_others_are_left() {
        let mut elf = b"\x7fELF".to_vec();
        elf.resize(10_000, 7);
        let block = lz4_flex::block::compress(&elf);
        let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
        payload.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
        payload.extend(block);
        payload.extend(10_000u32.to_le_bytes());
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x248..0x24c].copy_from_slice(&0u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend(payload);
        assert_eq!(vmlinux_of(&image), Some(elf));
        image[1024] ^= 1;
        assert_eq!(vmlinux_of(&image), None);
        for cut in [0, 0x1f1, 0x248, 0x250, 1030] {
            assert_eq!(vmlinux_of(&image[..cut]), None);
        }
    }
}
