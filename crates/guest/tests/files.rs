//! Files (contract §3.2, R4-R10), and what is not in this version.
#![allow(clippy::unwrap_used)]

mod world;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use world::{RAW, World};

/// A tree: /a/{x.rs,y.txt,deep/z.rs} /a/.gitignore(*.txt) /b.md, and symlinks that try to leave.
async fn world() -> World {
    let world = World::new().await;
    let root = world.root();
    fs::create_dir_all(root.join("a/deep")).unwrap();
    for (path, content) in [
        ("a/x.rs", "fn x() {}\n"),
        ("a/y.txt", "ignored"),
        ("a/deep/z.rs", "z"),
        ("a/.gitignore", "*.txt\n"),
        ("b.md", "one\ntwo\nthree"),
    ] {
        fs::write(root.join(path), content).unwrap();
    }
    fs::write(world.dir.path().join("outside"), "secret of the agent").unwrap();
    symlink("../outside", root.join("up")).unwrap();
    symlink(world.dir.path().join("outside"), root.join("absolute")).unwrap();
    symlink("..", root.join("dir")).unwrap();
    symlink("/", root.join("self")).unwrap();
    world
}

async fn get(world: &World, path: &str) -> Value {
    let answer = world.call("GET", path, "").await;
    assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    answer.json()
}

fn paths(entries: &Value) -> Vec<&str> {
    entries
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["path"].as_str().unwrap())
        .collect()
}

#[tokio::test]
async fn r4_listings() {
    let world = world().await;
    let list = get(&world, "/files").await;
    assert_eq!(
        (&list["success"], &list["path"], &list["count"]),
        (&true.into(), &"/".into(), &6.into())
    );
    assert_eq!(
        paths(&list["entries"]),
        ["/a", "/absolute", "/b.md", "/dir", "/self", "/up"]
    );
    let kinds: Vec<_> = list["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| &e["type"])
        .collect();
    assert_eq!(
        kinds,
        [
            "directory",
            "symlink",
            "file",
            "symlink",
            "symlink",
            "symlink"
        ]
    );
    let file = &list["entries"][2];
    assert_eq!((&file["name"], &file["size"]), (&"b.md".into(), &13.into()));
    assert!(file["modified"].as_str().unwrap().ends_with('Z'));
    for absent in ["extension", "content", "hash", "children"] {
        assert!(file.get(absent).is_none(), "{absent}");
    }
    // A tree, then flat.
    let list = get(&world, "/files?path=/a&nested=true").await;
    assert_eq!(
        paths(&list["entries"]),
        ["/a/.gitignore", "/a/deep", "/a/x.rs"]
    );
    assert_eq!(paths(&list["entries"][1]["children"]), ["/a/deep/z.rs"]);
    assert_eq!(list["count"], 4);
    let flat = get(
        &world,
        "/files?path=/a/&nested=true&flatten=true&use_gitignore=false",
    )
    .await;
    let want = [
        "/a/.gitignore",
        "/a/deep",
        "/a/deep/z.rs",
        "/a/x.rs",
        "/a/y.txt",
    ];
    assert_eq!(paths(&flat["entries"]), want);
    for (query, want) in [
        ("max_depth=1", vec!["/a/.gitignore", "/a/deep", "/a/x.rs"]),
        ("include_ext=rs", vec!["/a/deep/z.rs", "/a/x.rs"]),
        ("include_ext=.RS,md", vec!["/a/deep/z.rs", "/a/x.rs"]),
        ("path_filter=DEEP", vec!["/a/deep", "/a/deep/z.rs"]),
        ("ignore_patterns=deep,*.rs", vec!["/a/.gitignore"]),
        ("code_files_only=true", vec!["/a/deep/z.rs", "/a/x.rs"]),
    ] {
        let path = format!("/files?path=/a&nested=true&flatten=true&{query}");
        assert_eq!(paths(&get(&world, &path).await["entries"]), want, "{query}");
    }
    let full = "/files?path=/a&include_hash=true&include_content=true&include_extensions=true";
    let entry = &get(&world, full).await["entries"][2];
    assert_eq!(
        (&entry["content"], &entry["extension"]),
        (&"fn x() {}\n".into(), &".rs".into())
    );
    assert_eq!(
        entry["hash"],
        hex::encode(seal::hash::sha256(b"fn x() {}\n"))
    );
    let entry = get(&world, "/files?path=/a&light=true").await["entries"][2].clone();
    assert_eq!(
        entry,
        json!({"name": "x.rs", "path": "/a/x.rs", "type": "file"})
    );
    let small = "/files?path=/a&include_content=true&max_content_budget=3";
    assert!(
        get(&world, small).await["entries"][2]
            .get("content")
            .is_none()
    );
    for (path, status, code) in [
        ("/files?path=/none", 404, "not_found"),
        ("/files?path=/b.md", 400, "bad_request"),
        ("/files?path=b.md", 400, "bad_request"),
        ("/files?nested=maybe", 422, "validation_error"),
        ("/files?max_depth=-1", 422, "validation_error"),
    ] {
        world.call("GET", path, "").await.failed(status, code);
    }
}

#[tokio::test]
async fn r4_a_listing_is_capped() {
    let world = World::new().await;
    let big = world.root().join("big");
    fs::create_dir(&big).unwrap();
    for n in 0..50_010 {
        fs::File::create(big.join(n.to_string())).unwrap();
    }
    let list = get(&world, "/files?path=/big&light=true").await;
    assert_eq!(
        (&list["count"], &list["truncated"]),
        (&50_000.into(), &true.into())
    );
    assert_eq!(list["entries"].as_array().unwrap().len(), 50_000);
}

#[tokio::test]
async fn r5_stream_is_ndjson() {
    let world = world().await;
    let answer = world.call("GET", "/files/stream?path=/a", "").await;
    assert!(answer.head.contains("content-type: application/x-ndjson"));
    let text = answer.text();
    assert!(text.ends_with('\n') && answer.complete);
    let lines: Vec<Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(lines[0], json!({"event": "start", "path": "/a"}));
    assert_eq!(lines.last().unwrap(), &json!({"event": "done", "count": 4}));
    assert_eq!(
        lines[1..5]
            .iter()
            .filter(|l| l.get("event").is_none())
            .count(),
        4
    );
    world
        .call("GET", "/files/stream?path=/none", "")
        .await
        .failed(404, "not_found");
}

#[tokio::test]
async fn r6_read() {
    let world = world().await;
    let read = get(&world, "/files/read?path=/b.md").await;
    let want = json!({"success": true, "path": "/b.md", "content": "one\ntwo\nthree", "size": 13,
        "lines": 3, "extension": ".md"});
    assert_eq!(read, want);
    let range = get(&world, "/files/read?path=/b.md&start_line=2&end_line=2").await;
    assert_eq!(
        (&range["content"], &range["lines"]),
        (&"two\n".into(), &3.into())
    );
    assert_eq!(
        (&range["start_line"], &range["end_line"]),
        (&2.into(), &2.into())
    );
    let tail = get(
        &world,
        "/files/read?path=/b.md&start_line=3&with_line_numbers=true",
    )
    .await;
    assert_eq!(
        (&tail["content"], &tail["end_line"]),
        (&"     3\tthree".into(), &3.into())
    );
    fs::write(world.root().join("binary"), [0xff, b'a', b'\n', 0]).unwrap();
    assert_eq!(
        get(&world, "/files/read?path=/binary").await["content"],
        "\u{fffd}a\n\0"
    );
    fs::File::create(world.root().join("huge"))
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, world.root().join("fifo"), 0o644.into()).unwrap();
    for (path, status, code) in [
        ("/files/read", 400, "bad_request"),
        ("/files/read?path=", 400, "bad_request"),
        ("/files/read?path=/a", 400, "bad_request"),
        ("/files/read?path=/fifo", 400, "bad_request"),
        ("/files/read?path=/b.md/x", 400, "bad_request"),
        ("/files/read?path=/none", 404, "not_found"),
        (
            "/files/read?path=/b.md&start_line=0",
            422,
            "validation_error",
        ),
        (
            "/files/read?path=/b.md&start_line=3&end_line=2",
            422,
            "validation_error",
        ),
        (
            "/files/read?path=/b.md&start_line=x",
            422,
            "validation_error",
        ),
        ("/files/read?path=/huge", 413, "too_large"),
        ("/files/read?path=/huge&start_line=1", 413, "too_large"),
        ("/files/read?path=/%00", 400, "bad_request"),
    ] {
        world.call("GET", path, "").await.failed(status, code);
    }
}

#[tokio::test]
async fn nothing_leads_out_of_the_root() {
    let world = world().await;
    for path in [
        "/../outside",
        "/a/../../outside",
        "/up",
        "/absolute",
        "/dir/outside",
        "/self/../outside",
        "/%2e%2e/outside",
        "/..%2foutside",
    ] {
        let answer = world
            .call("GET", &format!("/files/read?path={path}"), "")
            .await;
        assert_ne!(answer.status, 200, "{path}: {}", answer.text());
        assert!(!answer.text().contains("secret"), "{path}");
    }
    // Inside, the same links lead where they would for a process of the workspace.
    assert_eq!(get(&world, "/files/read?path=/dir/b.md").await["size"], 13);
    assert_eq!(
        get(&world, "/files/read?path=/self/self/b.md").await["size"],
        13
    );
    for body in [
        json!({"path": "/../evil", "content": "x"}),
        json!({"path": "/dir/evil", "content": "x"}),
        json!({"path": "/up", "content": "x", "append": true}),
        json!({"path": "/up", "content": "x"}),
        json!({"path": "/dir/made/evil", "content": "x", "create_dirs": true}),
    ] {
        world.call("POST", "/files/write", &body.to_string()).await;
    }
    world
        .call("POST", "/files/mkdir", r#"{"path":"/../made-too"}"#)
        .await;
    world
        .call("DELETE", "/files/delete?path=/../outside", "")
        .await;
    world
        .call("DELETE", "/files/delete?path=/dir/outside", "")
        .await;
    let mut outside: Vec<_> = fs::read_dir(world.dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    outside.sort();
    assert_eq!(outside, ["outside", "root"]);
    let content = fs::read_to_string(world.dir.path().join("outside")).unwrap();
    assert_eq!(content, "secret of the agent");
}

#[tokio::test]
async fn r7_write() {
    let world = world().await;
    let write = async |method: &str, body: Value| {
        world.call(method, "/files/write", &body.to_string()).await
    };
    let answer = write("POST", json!({"path": "/new", "content": "héllo\n"})).await;
    assert_eq!(answer.status, 201);
    assert_eq!(
        answer.json(),
        json!({"success": true, "path": "/new", "size": 7})
    );
    let mode = |path: &str| {
        fs::metadata(world.root().join(path))
            .unwrap()
            .permissions()
            .mode()
            & 0o7777
    };
    assert_eq!(mode("new"), 0o644);
    let body = json!({"path": "/new", "content": "x", "mode": "0755"});
    assert_eq!(write("PUT", body).await.status, 201);
    assert_eq!(
        (
            mode("new"),
            fs::read_to_string(world.root().join("new")).unwrap()
        ),
        (0o755, "x".into())
    );
    write(
        "POST",
        json!({"path": "/new", "content": "y", "append": true}),
    )
    .await;
    assert_eq!(fs::read_to_string(world.root().join("new")).unwrap(), "xy");
    let deep = json!({"path": "/p/q/r", "content": ""});
    write("POST", deep.clone()).await.failed(404, "not_found");
    let mut made = deep;
    made["create_dirs"] = true.into();
    assert_eq!(write("POST", made).await.status, 201);
    // A symlink is replaced itself, not followed out of its place.
    write("POST", json!({"path": "/self", "content": "file now"})).await;
    assert!(
        fs::symlink_metadata(world.root().join("self"))
            .unwrap()
            .is_file()
    );
    for (body, status, code) in [
        (json!({}), 400, "bad_request"),
        (json!({"path": "/x"}), 400, "bad_request"),
        (json!({"content": "x"}), 400, "bad_request"),
        (json!({"path": "x", "content": "x"}), 400, "bad_request"),
        (json!({"path": "/", "content": "x"}), 400, "bad_request"),
        (json!({"path": "/a", "content": "x"}), 400, "bad_request"),
        (
            json!({"path": "/a", "content": "x", "append": true}),
            400,
            "bad_request",
        ),
        (json!({"path": "/x", "content": 1}), 400, "bad_request"),
        (
            json!({"path": "/x", "content": "x", "mode": "rwx"}),
            422,
            "validation_error",
        ),
        (
            json!({"path": "/x", "content": "x", "mode": "99999"}),
            422,
            "validation_error",
        ),
        (
            json!({"path": "/x\u{0}", "content": "x"}),
            400,
            "bad_request",
        ),
        (
            json!({"path": format!("/{}", "n".repeat(300)), "content": "x"}),
            400,
            "bad_request",
        ),
    ] {
        write("POST", body).await.failed(status, code);
    }
    world
        .call("POST", "/files/write", "{\"path\":")
        .await
        .failed(400, "bad_request");
    let left: Vec<_> = fs::read_dir(world.root())
        .unwrap()
        .filter(|e| {
            e.as_ref()
                .unwrap()
                .file_name()
                .to_string_lossy()
                .contains("casemate")
        })
        .collect();
    assert!(left.is_empty(), "temporary files are left: {left:?}");
}

#[tokio::test]
async fn r7_large_and_oversize_writes() {
    let world = World::new().await;
    let body = json!({"path": "/large", "content": "line\n".repeat(4 << 20)}).to_string();
    assert_eq!(world.call("POST", "/files/write", &body).await.status, 201);
    assert_eq!(
        fs::metadata(world.root().join("large")).unwrap().len(),
        20 << 20
    );
    // Refused by what it declares, before it is sent.
    let head = format!(
        "POST /files/write HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {RAW}\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n",
        (64 << 20) + 1
    );
    let mut stream = TcpStream::connect(world.direct).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    world::answer(stream).await.failed(413, "too_large");
    // And by what comes, if it declares nothing.
    let mut stream = TcpStream::connect(world.direct).await.unwrap();
    let head = format!(
        "POST /files/mkdir HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {RAW}\r\n\
         transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let chunk = [b"10000\r\n".as_slice(), &[b' '; 0x10000], b"\r\n"].concat();
    for _ in 0..17 {
        if stream.write_all(&chunk).await.is_err() {
            break;
        }
    }
    world::answer(stream).await.failed(413, "too_large");
}

#[tokio::test]
async fn r8_r9_mkdir_and_stat() {
    let world = world().await;
    let answer = world
        .call("POST", "/files/mkdir", r#"{"path":"/m/n","mode":"0700"}"#)
        .await;
    assert_eq!(
        (answer.status, answer.json()),
        (201, json!({"success": true, "path": "/m/n"}))
    );
    let again = world
        .call("POST", "/files/mkdir", r#"{"path":"/m/n"}"#)
        .await;
    assert_eq!(again.status, 201);
    let stat = get(&world, "/files/stat?path=/m/n").await;
    assert_eq!(
        (&stat["type"], &stat["permissions"]),
        (&"directory".into(), &"0700".into())
    );
    let stat = get(&world, "/files/stat?path=/a/x.rs").await;
    assert!(stat["modified"].is_string());
    assert_eq!(
        (
            &stat["name"],
            &stat["type"],
            &stat["size"],
            &stat["is_code"],
            &stat["extension"]
        ),
        (
            &"x.rs".into(),
            &"file".into(),
            &10.into(),
            &true.into(),
            &".rs".into()
        )
    );
    let stat = get(&world, "/files/stat?path=/up").await;
    assert_eq!(
        (&stat["type"], &stat["symlink_target"]),
        (&"symlink".into(), &"../outside".into())
    );
    assert_eq!(get(&world, "/files/stat?path=/").await["name"], "/");
    for (path, body, status, code) in [
        ("/files/mkdir", json!({}), 400, "bad_request"),
        ("/files/mkdir", json!({"path": "m"}), 400, "bad_request"),
        ("/files/mkdir", json!({"path": "/b.md"}), 400, "bad_request"),
        (
            "/files/mkdir",
            json!({"path": "/b.md/x"}),
            400,
            "bad_request",
        ),
        (
            "/files/mkdir",
            json!({"path": "/x", "mode": "8"}),
            422,
            "validation_error",
        ),
    ] {
        world
            .call("POST", path, &body.to_string())
            .await
            .failed(status, code);
    }
    world
        .call("GET", "/files/stat?path=/none", "")
        .await
        .failed(404, "not_found");
}

#[tokio::test]
async fn r10_delete() {
    let world = world().await;
    for name in ["etc", "usr", "proc"] {
        fs::create_dir(world.root().join(name)).unwrap();
    }
    let delete = async |path: &str| {
        let body = json!({"path": path}).to_string();
        world.call("POST", "/files/delete", &body).await
    };
    for path in [
        "/",
        "/etc",
        "/etc/",
        "//etc",
        "/usr",
        "/proc",
        "/a/../etc",
        "/self/etc",
        "/dir/usr",
        "/.",
        "/a/..",
        "/..",
    ] {
        delete(path).await.failed(403, "forbidden");
    }
    assert_eq!(
        delete("/a").await.json(),
        json!({"success": true, "path": "/a"})
    );
    assert!(!world.root().join("a").exists());
    // The link goes, what it points to stays.
    assert_eq!(delete("/up").await.status, 200);
    assert_eq!(delete("/self").await.status, 200);
    assert!(world.dir.path().join("outside").exists() && world.root().join("b.md").exists());
    let answer = world.call("DELETE", "/files/delete?path=/b.md", "").await;
    assert_eq!(answer.status, 200);
    delete("/b.md").await.failed(404, "not_found");
    delete("relative").await.failed(400, "bad_request");
    world
        .call("POST", "/files/delete", "")
        .await
        .failed(400, "bad_request");
    let mut deep = world.root().join("deep");
    for _ in 0..600 {
        deep.push("d");
    }
    fs::create_dir_all(&deep).unwrap();
    delete("/deep").await.failed(400, "bad_request");
}

#[tokio::test]
async fn what_is_not_in_this_version_says_so() {
    let world = World::new().await;
    for (method, path) in [
        ("POST", "/files/transfer/download"),
        ("POST", "/files/transfer/upload"),
        ("GET", "/files/search?q=x"),
        ("GET", "/files/search/files"),
        ("POST", "/files/search/init"),
        ("POST", "/terminals"),
        ("GET", "/terminals/1/scrollback"),
        ("GET", "/watchers"),
        ("GET", "/ws"),
        ("GET", "/proxy/3000/x"),
        ("GET", "/desktop/status"),
    ] {
        world
            .call(method, path, "")
            .await
            .failed(501, "not_supported");
    }
    for path in [
        "/",
        "/none",
        "/files/none",
        "/exec/1/none",
        "/runtimes/other/health",
        "//exec",
    ] {
        world.call("GET", path, "").await.failed(404, "not_found");
    }
    for (method, path) in [
        ("POST", "/health"),
        ("PUT", "/exec"),
        ("GET", "/files/write"),
    ] {
        world
            .call(method, path, "")
            .await
            .failed(405, "method_not_allowed");
    }
    let info = get(&world, "/runtime").await;
    assert_eq!(
        (&info["os"], &info["home"]),
        (&"linux".into(), &"/root".into())
    );
    assert_eq!(
        get(&world, "/runtimes/default/health").await["status"],
        "ok"
    );
    let targets = get(&world, "/runtimes").await;
    assert_eq!(targets["default_target"], "default");
    assert_eq!(targets["targets"][0]["id"], "default");
    world
        .call("GET", "/runtimes/default/runtimes", "")
        .await
        .failed(404, "not_found");
}

#[tokio::test]
async fn a_request_id_is_repeated_and_garbage_is_not() {
    let world = World::new().await;
    let call = async |id: &str| {
        let headers = format!("casemate-request-id: {id}\r\n");
        world.call_with("GET", "/health", &headers, "").await.json()["requestId"].clone()
    };
    assert_eq!(call("req_0123456789abcdef").await, "req_0123456789abcdef");
    assert_eq!(call("a\"b").await, Value::Null);
    // What is no HTTP gets no answer of ours, and the service lives on.
    for garbage in [
        "\r\n\r\n",
        "GET\r\n\r\n",
        "\0\0\0\0",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        let mut stream = TcpStream::connect(world.direct).await.unwrap();
        stream.write_all(garbage.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let _ = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut answer).await;
        assert!(!answer.starts_with(b"HTTP/1.1 200"));
    }
    assert_eq!(world.call("GET", "/health", "").await.status, 200);
}
