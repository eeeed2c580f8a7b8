//! A writer of `newc` archives: no times, no owners, entries in the order they are given, so that
//! the same contents are the same bytes.

use anyhow::{Result, bail};

/// Largest file, bytes: the format's lengths are 32 bits.
const FILE_MAX_BYTES: usize = 1 << 30;

pub(crate) struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    pub(crate) fn new() -> Self {
        Self {
            bytes: Vec::new(),
            inode: 1,
        }
    }

    pub(crate) fn dir(&mut self, name: &str, mode: u32) {
        self.entry(name, 0o040_000 | mode, (0, 0), &[]);
    }

    pub(crate) fn device(&mut self, name: &str, mode: u32, major: u32, minor: u32) {
        self.entry(name, 0o020_000 | mode, (major, minor), &[]);
    }

    pub(crate) fn file(&mut self, name: &str, mode: u32, contents: &[u8]) -> Result<()> {
        if contents.len() > FILE_MAX_BYTES {
            bail!("{name} is too large for an initramfs");
        }
        self.entry(name, 0o100_000 | mode, (0, 0), contents);
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.pad(512);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        let fields = [
            self.inode,
            mode,
            0, // uid
            0, // gid
            1, // links
            0, // time
            u32::try_from(contents.len()).unwrap_or(u32::MAX),
            0, // device of the file
            0,
            device.0,
            device.1,
            u32::try_from(name.len() + 1).unwrap_or(u32::MAX),
            0, // checksum: none
        ];
        self.inode += 1;
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(contents);
        self.pad(4);
    }

    fn pad(&mut self, to: usize) {
        let len = self.bytes.len().next_multiple_of(to);
        self.bytes.resize(len, 0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// `cpio` itself is the oracle.
    #[test]
    fn cpio_reads_it() {
        let mut a = Archive::new();
        a.dir("d", 0o755);
        a.file("d/f", 0o640, b"hello").unwrap();
        a.device("null", 0o666, 1, 3);
        let mut child = std::process::Command::new("cpio")
            .args(["-itv", "--quiet", "--numeric-uid-gid"])
            .env("TZ", "UTC")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), &a.finish()).unwrap();
        let out = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let lines: Vec<Vec<&str>> = out
            .lines()
            .map(|l| l.split_whitespace().collect())
            .collect();
        assert_eq!(lines.len(), 3, "{out}");
        assert_eq!(
            (lines[0][0], *lines[0].last().unwrap()),
            ("drwxr-xr-x", "d")
        );
        assert_eq!((lines[1][0], lines[1][4]), ("-rw-r-----", "5"));
        assert_eq!(
            (lines[2][0], lines[2][4], lines[2][5]),
            ("crw-rw-rw-", "1,", "3")
        );
    }

    #[test]
    fn the_same_contents_are_the_same_bytes() {
        let make = || {
            let mut a = Archive::new();
            a.file("init", 0o755, b"x").unwrap();
            a.finish()
        };
        assert_eq!(make(), make());
        assert_eq!(make().len() % 512, 0);
    }
}
