//! Bad input from outside: a typed error that says what to do, nothing leaked, nothing left.

use crate::world::{Account, Platform};
use cli::client::Client;
use reqwest::Method;
use serde_json::{Value, json};

#[test]
fn bad_input_meets_typed_errors() {
    let p = Platform::start("[host]\npool_size = 0\n", None);
    let (owner, other) = (p.account("owner"), p.account("other"));
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let owner_client = client(&p, &owner);
        let made = cli::ws::create(&owner_client, &json!({ "image": "python-3" }))
            .await
            .unwrap();
        let id = made["id"].as_str().unwrap().to_owned();

        // Credentials.
        let wrong = Account {
            id: owner.id.clone(),
            secret: "sk_wrong".into(),
        };
        let unknown = Account {
            id: "key_0000000000000000".into(),
            secret: owner.secret.clone(),
        };
        for account in [&wrong, &unknown] {
            let e = client(&p, account).get("/workspace").await.unwrap_err();
            expect(&e, 401, "unauthorized");
        }

        // Another account's workspace does not exist, whatever is asked of it.
        let stranger = client(&p, &other);
        for (method, path) in [
            (Method::GET, format!("/workspace/{id}")),
            (Method::DELETE, format!("/workspace/{id}")),
            (Method::POST, format!("/workspace/{id}/stop")),
            (Method::GET, format!("/workspace/{id}/network")),
            (
                Method::GET,
                format!("/workspace/{id}/runtime-api-access/token/raw"),
            ),
            (Method::GET, "/workspace/ws_0000000000000000".into()),
            (Method::GET, "/workspace/ws_..%2f..%2fetc".into()),
        ] {
            let e = stranger.control(method, &path, None).await.unwrap_err();
            expect(&e, 404, "not_found");
        }

        // Bodies.
        for (body, status, word) in [
            (json!({ "image": 7 }), 422, "image"),
            (json!({ "image": "no-such-image" }), 422, "image"),
            (
                json!({ "image": "python-3", "config": { "cpus": 0 } }),
                422,
                "cpus",
            ),
            (
                json!({ "image": "python-3", "config": { "memory_mb": 1u64 << 40 } }),
                422,
                "memory_mb",
            ),
            (
                json!({ "image": "python-3", "mode": "temporary" }),
                422,
                "ttl",
            ),
            (
                json!({ "image": "python-3", "name": "x".repeat(300) }),
                422,
                "name",
            ),
        ] {
            let e = owner_client.post("/workspace", &body).await.unwrap_err();
            let e = e.downcast_ref::<cli::client::ApiError>().unwrap();
            assert_eq!(e.status, status, "{body}: {e}");
            assert!(e.message.contains(word), "{body}: {e}");
        }
        for (raw, status) in [
            ("{".to_owned(), 400),
            ("[]".to_owned(), 400),
            ("\u{0}".to_owned(), 400),
            (
                format!("{{\"name\":{}1{}}}", "[".repeat(5_000), "]".repeat(5_000)),
                400,
            ),
            (format!("{{\"name\":\"{}\"}}", "x".repeat(300 << 10)), 413),
        ] {
            let answer = owner_client
                .http()
                .post(format!("{}/workspace", p.control_url()))
                .header("x-client-id", &owner.id)
                .header("x-client-secret", &owner.secret)
                .header("content-type", "application/json")
                .body(raw.clone())
                .send()
                .await
                .unwrap();
            let got = answer.status().as_u16();
            let body: Value = answer.json().await.unwrap();
            let start: String = raw.chars().take(30).collect();
            assert!(
                got == status || (status == 400 && got == 422),
                "{start:?}: {got} {body}"
            );
            assert_eq!(body["success"], false);
            assert!(!body["message"].as_str().unwrap().is_empty());
        }

        // Tokens.
        owner_client
            .control(
                Method::PATCH,
                &format!("/workspace/{id}/network"),
                Some(&json!({ "public_access": true })),
            )
            .await
            .unwrap();
        let token = owner_client.runtime_token(&id).await.unwrap();
        let claims = token.split('.').nth(1).unwrap();
        let none = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0";
        for bad in [
            format!("{none}.{claims}."),
            format!("{none}.{claims}.AAAA"),
            format!("{token}A"),
            token.replacen('.', "..", 1),
            "x".repeat(20_000),
            String::new(),
        ] {
            let answer = owner_client
                .runtime(&bad, Method::GET, "/health", None)
                .await
                .unwrap();
            let status = answer.status().as_u16();
            assert!(
                matches!(status, 401 | 431),
                "{}…: {status}",
                &bad[..bad.len().min(20)]
            );
        }
        let good = owner_client
            .runtime(&token, Method::GET, "/health", None)
            .await
            .unwrap();
        assert_eq!(good.status().as_u16(), 200);

        owner_client
            .control(Method::DELETE, &format!("/workspace/{id}"), None)
            .await
            .unwrap();
    });
    // No secret in any log.
    for entry in std::fs::read_dir(p.state("log")).unwrap().flatten() {
        let text = std::fs::read_to_string(entry.path()).unwrap();
        for secret in [&owner.secret, &other.secret] {
            assert!(
                !text.contains(secret.as_str()),
                "{} holds a secret",
                entry.path().display()
            );
        }
    }
}

pub(crate) fn client(p: &Platform, account: &Account) -> Client {
    Client::new(
        p.control_url(),
        p.gateway_url(),
        Some(p.ca()),
        account.id.clone(),
        account.secret.clone(),
    )
    .unwrap()
}

fn expect(e: &anyhow::Error, status: u16, code: &str) {
    let e = e
        .downcast_ref::<cli::client::ApiError>()
        .unwrap_or_else(|| panic!("{e:#}"));
    assert_eq!((e.status, e.code.as_str()), (status, code), "{e}");
}

#[test]
fn a_start_that_cannot_be_is_a_typed_error_and_leaves_nothing() {
    let p = Platform::start("[host]\npool_size = 0\n", None);
    let account = p.account("owner");
    let ws = |args: &[&str]| p.as_user(&account, args);
    let made = ws(&["--json", "ws", "create"]);
    p.expect_ok("create", &made);
    let made: Value = serde_json::from_slice(&made.stdout).unwrap();
    let id = made["id"].as_str().unwrap();
    p.expect_ok("stop", &ws(&["ws", "stop", id]));
    let file = p.state("volumes").join(format!("{id}.disk/volume"));

    // A header that is none.
    let whole = read_at_start(&file, 64 << 10);
    write_at_start(&file, &vec![0x5a; 64 << 10]);
    let said = refused_start(&p, &account, id);
    assert!(said.contains("disk_tampered"), "{said}");
    assert_eq!(p.workspaces_on_host(), Vec::<String>::new());
    write_at_start(&file, &whole);

    // Another workspace's disk under this one's name.
    let other = ws(&["--json", "ws", "create"]);
    let other: Value = serde_json::from_slice(&other.stdout).unwrap();
    let other_id = other["id"].as_str().unwrap();
    p.expect_ok("stop", &ws(&["ws", "stop", other_id]));
    let others = p.state("volumes").join(format!("{other_id}.disk/volume"));
    write_at_start(&file, &read_at_start(&others, 16 << 20));
    let said = refused_start(&p, &account, id);
    assert!(said.contains("disk_tampered"), "{said}");
    assert_eq!(p.workspaces_on_host(), Vec::<String>::new());
    write_at_start(&file, &whole);

    // No VMM.
    let closure = p.state("artifacts").join("closure");
    let away = p.state("artifacts").join("closure.away");
    std::fs::rename(&closure, &away).unwrap();
    let said = refused_start(&p, &account, id);
    assert!(
        said.contains("VM_UNAVAILABLE") || said.contains("unavailable"),
        "{said}"
    );
    std::fs::rename(&away, &closure).unwrap();

    // What was no fault of the workspace's is over: it starts, and its data is there.
    p.expect_ok("rm", &ws(&["ws", "rm", other_id]));
    assert_eq!(p.workspaces_on_host(), Vec::<String>::new());
    p.expect_ok("rm", &ws(&["ws", "rm", id]));
    assert_eq!(p.disk_files(), Vec::<String>::new());
}

/// What a refused start says. The workspace is stopped then, or its restart policy would try on.
#[track_caller]
fn refused_start(p: &Platform, account: &Account, id: &str) -> String {
    let said = refused(&p.as_user(account, &["ws", "start", id]));
    p.expect_ok("stop", &p.as_user(account, &["ws", "stop", id]));
    said
}

/// What a refused command says; it must have failed with a code and say something.
#[track_caller]
fn refused(out: &std::process::Output) -> String {
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success(), "it went well: {said}");
    assert!(out.status.code().is_some_and(|c| c != 101), "{said}");
    said
}

fn read_at_start(path: &std::path::Path, bytes: usize) -> Vec<u8> {
    use std::os::unix::fs::FileExt as _;
    let mut out = vec![0; bytes];
    std::fs::File::open(path)
        .unwrap()
        .read_exact_at(&mut out, 0)
        .unwrap();
    out
}

fn write_at_start(path: &std::path::Path, bytes: &[u8]) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, 0).unwrap();
}
