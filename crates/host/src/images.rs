//! The images of this machine, from the artifacts' manifest.
//!
//! The manifest is root's and read again at each question: images may be added while host runs.

use crate::limits::{IMAGES_MAX, MANIFEST_MAX_BYTES};
use api::host::Image;
use api::{Error, ErrorCode};
use serde::Deserialize;
use std::path::Path;

#[derive(Deserialize)]
struct Manifest {
    images: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    name: String,
    #[serde(alias = "sha256")]
    id: String,
    #[serde(default)]
    description: String,
}

/// Reads `manifest.json` of the artifacts directory.
///
/// # Errors
/// [`ErrorCode::Unavailable`], with the file and the reason for the operator.
pub fn load(artifacts: &Path) -> api::Result<Vec<Image>> {
    let path = artifacts.join("manifest.json");
    let wrong = |why: String| {
        Error::new(
            ErrorCode::Unavailable,
            "this host has no usable images; see `casemate doctor`",
        )
        .detail(format!("{}: {why}", path.display()))
    };
    let bytes = service::files::read_bounded(&path, MANIFEST_MAX_BYTES)
        .map_err(|e| wrong(e.to_string()))?;
    parse(&bytes).map_err(wrong)
}

fn parse(bytes: &[u8]) -> Result<Vec<Image>, String> {
    let manifest: Manifest = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    if manifest.images.len() > IMAGES_MAX {
        return Err(format!("more than {IMAGES_MAX} images"));
    }
    let images = manifest.images.into_iter().map(|i| {
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        let name_ok = |b: u8| b.is_ascii_alphanumeric() || b"-_./:".contains(&b);
        if i.id.len() != 64 || !i.id.bytes().all(hex) {
            return Err(format!("image {:?}: id must be 64 hex digits", i.name));
        }
        if i.name.is_empty() || i.name.len() > 128 || !i.name.bytes().all(name_ok) {
            return Err(format!("image {:?}: not a name", i.name));
        }
        Ok(Image {
            name: i.name,
            id: i.id,
            description: i.description,
        })
    });
    images.collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::parse;
    use proptest::prelude::*;

    #[test]
    fn images_are_read_by_name_and_digest() {
        let id = "0f".repeat(32);
        let text = format!(r#"{{"kernel":{{}},"images":[{{"name":"python-3","id":"{id}"}}]}}"#);
        let images = parse(text.as_bytes()).unwrap();
        assert_eq!(
            (images[0].name.as_str(), images[0].id.as_str()),
            ("python-3", id.as_str())
        );
        for bad in [
            r#"{}"#.to_owned(),
            text.replace("python-3", ""),
            text.replace("python-3", "a b"),
            text.replace("0f0f", "0F0F"),
            text.replace("0f0f", "../."),
        ] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
