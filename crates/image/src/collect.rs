//! An archive of a layout into a layout: `index.json` and blobs, nothing else, by names that are
//! made here from digests and not taken from the archive.

use crate::error::{Code, Error, Refusal, os};
use crate::limits::{JSON_MAX_BYTES, Limits};
use crate::oci::Digest;
use crate::tar::{self, Kind, Reader};
use std::fs::File;
use std::io::{BufReader, Write};
use std::path::Path;

/// Unpacks the archive below `scratch`.
///
/// # Errors
/// A [`Refusal`], or the system's.
pub(crate) fn collect(archive: File, scratch: &Path, limits: &Limits) -> Result<(), Error> {
    let blobs = scratch.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).map_err(os("make the layout"))?;
    let mut reader = Reader::new(BufReader::with_capacity(256 << 10, archive));
    let (mut entries, mut bytes) = (0, 0);
    while let Some(entry) = reader.next_entry()? {
        entries += 1;
        bytes += entry.size;
        if entries > limits.entries_max || bytes > limits.image_unpacked_max_bytes {
            let what = "the archive has more entries or bytes than the limits allow";
            return Err(Refusal::new(Code::TooLarge, what).at(&entry.path).into());
        }
        if entry.kind != Kind::File {
            continue; // Directories; links are followed by nobody.
        }
        let path = entry.path.strip_prefix(b"./").unwrap_or(&entry.path);
        let (to, max) = if path == b"index.json" {
            (scratch.join("index.json"), JSON_MAX_BYTES)
        } else if let Some(digest) = blob(path) {
            (blobs.join(digest.hex()), limits.layer_stored_max_bytes)
        } else {
            continue; // `oci-layout`, and what `docker save` adds for older readers.
        };
        if entry.size > max {
            let what = format!("{} bytes; at most {max}", entry.size);
            return Err(Refusal::new(Code::TooLarge, what).at(path).into());
        }
        let mut file = File::create_new(&to).map_err(|e| {
            if e.kind() == std::io::ErrorKind::AlreadyExists {
                let what = "the archive has it twice";
                return Refusal::new(Code::Duplicate, what).at(path).into();
            }
            os("keep a part of the archive")(e)
        })?;
        let mut buf = [0; 64 << 10];
        loop {
            let n = reader.read(&mut buf).map_err(tar::stream)?;
            if n == 0 {
                break;
            }
            let written = file.write_all(&buf[..n]);
            written.map_err(os("keep a part of the archive"))?;
        }
    }
    reader.finish()?;
    Ok(())
}

fn blob(path: &[u8]) -> Option<Digest> {
    let hex = path.strip_prefix(b"blobs/sha256/")?;
    format!("sha256:{}", std::str::from_utf8(hex).ok()?)
        .parse()
        .ok()
}
