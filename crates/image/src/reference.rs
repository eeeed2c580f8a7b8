//! Where an image comes from, as people write it.

use crate::error::Error;
use crate::oci::Digest;
use std::path::PathBuf;
use std::str::FromStr;

/// A source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// `oci:DIR[:TAG]`.
    Layout {
        /// The layout's directory.
        dir: PathBuf,
        /// Which of its images.
        tag: Option<String>,
    },
    /// `oci-archive:FILE[:TAG]`: a tar of a layout.
    Archive {
        /// The file.
        file: PathBuf,
        /// Which of its images.
        tag: Option<String>,
    },
    /// `docker://HOST/REPOSITORY[:TAG][@DIGEST]`.
    Registry(Reference),
}

/// An image in a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// Host, and port if it is not 443.
    pub host: String,
    /// The repository.
    pub repository: String,
    /// A name that may be moved.
    pub tag: Option<String>,
    /// The image itself.
    pub digest: Option<Digest>,
}

impl Reference {
    /// `HOST/REPOSITORY`: what policies name.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.host, self.repository)
    }
}

impl FromStr for Source {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = |why: &str| Error::Usage(format!("source {text:?}: {why}"));
        if let Some(rest) = text.strip_prefix("docker://") {
            return reference(rest)
                .map(Self::Registry)
                .map_err(|why| wrong(&why));
        }
        let local = |rest: &str| {
            let (path, tag) = match rest.rsplit_once(':') {
                Some((path, tag)) if !tag.contains('/') && !tag.is_empty() => (path, Some(tag)),
                _ => (rest, None),
            };
            if path.is_empty() {
                return Err(wrong("no path after the colon"));
            }
            Ok((PathBuf::from(path), tag.map(str::to_owned)))
        };
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let (file, tag) = local(rest)?;
            return Ok(Self::Archive { file, tag });
        }
        if let Some(rest) = text.strip_prefix("oci:") {
            let (dir, tag) = local(rest)?;
            return Ok(Self::Layout { dir, tag });
        }
        Err(wrong(
            "write oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker://HOST/REPOSITORY@sha256:…",
        ))
    }
}

/// `HOST/REPOSITORY[:TAG][@DIGEST]`, with the distribution specification's alphabet: nothing in it
/// needs escaping in an address.
fn reference(text: &str) -> Result<Reference, String> {
    let (text, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest.parse()?)),
        None => (text, None),
    };
    let (host, path) = text
        .split_once('/')
        .ok_or("write HOST/REPOSITORY: no registry is the default one")?;
    let (repository, tag) = match path.split_once(':') {
        Some((repository, tag)) => (repository, Some(tag)),
        None => (path, None),
    };
    let (name, port) = host.split_once(':').unwrap_or((host, "443"));
    let label = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-');
    if name.is_empty()
        || host.len() > 255
        || !name.bytes().all(label)
        || port.parse::<u16>().is_err()
    {
        return Err("the host is no name or address with an optional port".into());
    }
    let part = |p: &str| {
        let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
        p.bytes().all(ok)
            && p.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
            && p.bytes().last().is_some_and(|b| b.is_ascii_alphanumeric())
    };
    if repository.len() > 255 || !repository.split('/').all(part) {
        return Err("the repository is lowercase letters, digits, . _ - and /".into());
    }
    let tag_ok = |t: &str| {
        let ok = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        (1..=128).contains(&t.len()) && t.bytes().all(ok) && !t.starts_with(['.', '-'])
    };
    if tag.is_some_and(|t| !tag_ok(t)) {
        return Err("the tag is letters, digits, . _ and -".into());
    }
    Ok(Reference {
        host: host.into(),
        repository: repository.into(),
        tag: tag.map(str::to_owned),
        digest,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sources_are_read() {
        let digest = format!("sha256:{}", "0f".repeat(32));
        let text = format!("docker://h.example:5000/a/b:1.0@{digest}");
        let Source::Registry(r) = text.parse().unwrap() else {
            panic!("{text}")
        };
        assert_eq!(
            (r.name().as_str(), r.tag.as_deref()),
            ("h.example:5000/a/b", Some("1.0"))
        );
        assert_eq!(r.digest.unwrap().to_string(), digest);
        let layout = |dir: &str, tag: Option<&str>| Source::Layout {
            dir: dir.into(),
            tag: tag.map(str::to_owned),
        };
        assert_eq!(
            "oci:/a:b".parse::<Source>().unwrap(),
            layout("/a", Some("b"))
        );
        assert_eq!(
            "oci:/a:b/c".parse::<Source>().unwrap(),
            layout("/a:b/c", None)
        );
        for bad in [
            "python",
            "oci:",
            "docker://python",
            "docker://h/",
            "docker://h/A",
            "docker://h/../a",
            "docker://h/a?b",
            "docker://h/a@sha256:00",
            "docker://u@h/a",
            "docker://h:x/a",
            "docker://h/a:",
            "docker://h/a//b",
        ] {
            assert!(bad.parse::<Source>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(docker://|oci:|oci-archive:)?[a-z0-9:/@.%?#-]{0,60}") {
            let _ = text.parse::<Source>();
        }
    }
}
