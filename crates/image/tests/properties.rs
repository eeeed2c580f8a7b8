//! Whatever the bytes, the readers end with a refusal or with a tree; never otherwise.
#![allow(clippy::unwrap_used)]

mod world;

use image::tar::{Kind, Reader};
use image::tree::{Body, Tree};
use proptest::prelude::*;
use world::{Head, Tar};

/// Reads an archive into a tree, as the unpacker does.
fn read(bytes: &[u8]) -> Result<Tree, image::Refusal> {
    let mut tree = Tree::default();
    let mut reader = Reader::new(bytes);
    tree.layer_begin(1);
    while let Some(entry) = reader.next_entry()? {
        tree.apply(&entry, 0)?;
    }
    reader.finish()?;
    tree.complete()?;
    Ok(tree)
}

fn kind() -> impl Strategy<Value = u8> {
    prop_oneof![
        Just(b'0'),
        Just(b'1'),
        Just(b'2'),
        Just(b'5'),
        Just(b'6'),
        Just(b'3'),
        Just(b'x')
    ]
}

fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec(
        prop_oneof![
            Just("a"),
            Just("b"),
            Just(".."),
            Just("."),
            Just(""),
            Just(".wh.a"),
            Just(".wh..wh..opq")
        ],
        1..5,
    )
    .prop_map(|parts| parts.join("/"))
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2_048)) {
        let _ = read(&bytes);
    }

    /// One changed byte in a sound archive: the checksum of headers is mended, so that the change
    /// is seen by what is behind it.
    #[test]
    fn no_changed_header_panics(at in 0usize..512, value: u8, mend: bool) {
        let mut bytes = Tar::default().pax(&[("path", b"x"), ("mtime", b"1.5")]).file("f", b"abc").end();
        let start = 1_024;
        bytes[start + at] = value;
        if mend {
            let mut header: [u8; 512] = bytes[start..start + 512].try_into().unwrap();
            world::sum(&mut header);
            bytes[start..start + 512].copy_from_slice(&header);
        }
        let _ = read(&bytes);
    }

    /// Any order of any entries: no name of the tree is `.`, `..`, empty or has a slash, and no
    /// whiteout is left.
    #[test]
    fn a_tree_has_only_names(entries in proptest::collection::vec((path(), kind(), path()), 0..12)) {
        let mut tree = Tree::default();
        for (layer, part) in (1..).zip(entries.chunks(3)) {
            tree.layer_begin(layer);
            for (path, kind, link) in part {
                let head = Head { link: link.clone().into(), ..Head::new(path, *kind) };
                let bytes = Tar::default().head(&head).end();
                if let Ok(Some(entry)) = Reader::new(bytes.as_slice()).next_entry() {
                    let _ = tree.apply(&entry, 0);
                }
            }
        }
        let mut paths = 0;
        tree.walk(|path, id| {
            paths += 1;
            if let Body::Dir(children) = &tree.node(id).body {
                for name in children.keys() {
                    assert!(!matches!(&name[..], b"" | b"." | b".."), "{path:?}");
                    assert!(!name.contains(&b'/') && !name.starts_with(b".wh."), "{path:?}");
                }
            }
            Ok(())
        }).unwrap();
        prop_assert!(paths >= 1);
    }

    /// Contents come out as they went in, at any length.
    #[test]
    fn contents_are_kept(data in proptest::collection::vec(any::<u8>(), 0..3_000)) {
        let bytes = Tar::default().file("a", &data).file("b", b"next").end();
        let mut reader = Reader::new(bytes.as_slice());
        let first = reader.next_entry().unwrap().unwrap();
        prop_assert_eq!((first.kind, first.size), (Kind::File, data.len() as u64));
        let mut got = Vec::new();
        let mut buf = [0; 100];
        loop {
            let n = reader.read(&mut buf).unwrap();
            if n == 0 { break; }
            got.extend_from_slice(&buf[..n]);
        }
        prop_assert_eq!(got, data);
        prop_assert_eq!(reader.next_entry().unwrap().unwrap().path, b"b");
    }

    #[test]
    fn no_policy_panics(text in "[a-z_= \\[\\]\"\n/-]{0,200}") {
        let _ = image::policy::Policy::parse(&text);
    }
}
