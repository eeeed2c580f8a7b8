//! Exec (contract §3.4, R17-R24).
#![allow(clippy::unwrap_used)]

mod world;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use world::{DEADLINE, RAW, World, events, printed, request};

async fn run(world: &World, body: Value) -> Value {
    let answer = world.call("POST", "/exec", &body.to_string()).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

/// Waits until a task satisfies `done`.
async fn until(world: &World, id: &str, done: impl Fn(&Value) -> bool) -> Value {
    let deadline = std::time::Instant::now() + DEADLINE;
    loop {
        let task = world.call("GET", &format!("/exec/{id}"), "").await.json();
        if done(&task) {
            return task;
        }
        assert!(std::time::Instant::now() < deadline, "{task}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn r17_run_waits_and_returns_the_bare_task() {
    let world = World::new().await;
    let task = run(&world, json!({"cmd": ["echo", "hello"]})).await;
    assert_eq!(task["stdout"], "hello\n");
    assert_eq!(
        (&task["stderr"], &task["exit_code"], &task["status"]),
        (&"".into(), &0.into(), &"exited".into())
    );
    assert_eq!(task["command"], json!(["echo", "hello"]));
    assert_eq!(
        (&task["id"], &task["ttl_seconds"]),
        (&"1".into(), &300.into())
    );
    for time in ["created_at", "started_at", "exited_at"] {
        assert!(task[time].as_str().unwrap().ends_with('Z'), "{time}");
    }
    assert!(task["guest_pid"].is_number() && task.get("success").is_none());
    // A failing command is a result, not a failure.
    let task = run(&world, json!({"cmd": ["echo no >&2; exit 7"]})).await;
    assert_eq!(
        (&task["exit_code"], &task["stderr"]),
        (&7.into(), &"no\n".into())
    );
    assert!(task.get("success").is_none());
    let task = run(&world, json!({"cmd": ["kill -9 $$"]})).await;
    assert_eq!(
        (&task["exit_code"], &task["status"]),
        (&137.into(), &"exited".into())
    );
    let task = run(&world, json!({"cmd": ["env"], "exec_mode": "direct"})).await;
    let env = task["stdout"].as_str().unwrap().to_owned();
    assert!(
        env.contains("HOME=/root\n") && env.contains("GIVEN=value\n"),
        "{env}"
    );
    assert!(!env.contains("CARGO"), "{env}");
    // Standard input is at its end; a session of its own.
    let task = run(
        &world,
        json!({"cmd": ["cat; ps -o sid= -p $$ | tr -d ' '; echo $$"]}),
    )
    .await;
    let lines: Vec<_> = task["stdout"].as_str().unwrap().lines().collect();
    assert_eq!(lines[0], lines[1]);
}

#[tokio::test]
async fn r17_bad_requests() {
    let world = World::new().await;
    let call = async |body: &str| world.call("POST", "/exec", body).await;
    for body in [
        "",
        "{",
        "null",
        "[]",
        "{}",
        "{\"cmd\":[]}",
        "{\"cmd\":\"ls\"}",
        "{\"cmd\":[1]}",
    ] {
        call(body).await.failed(400, "bad_request");
    }
    for body in [
        json!({"cmd": ["a\u{0}b"]}),
        json!({"cmd": ["a"], "exec_mode": "weird"}),
        json!({"cmd": ["a"], "ttl_seconds": -7}),
        json!({"cmd": ["a"], "timeout_seconds": 99_999_999}),
        json!({"cmd": vec!["a"; 5000]}),
    ] {
        call(&body.to_string())
            .await
            .failed(422, "validation_error");
    }
    call(&json!({"cmd": ["/no/such/program"]}).to_string())
        .await
        .failed(500, "spawn_failed");
    call(&json!({"cmd": ["x".repeat(2 << 20)]}).to_string())
        .await
        .failed(413, "too_large");
    world
        .call("PATCH", "/exec", "")
        .await
        .failed(405, "method_not_allowed");
    assert_eq!(
        world.call("GET", "/exec", "").await.json()["tasks"],
        json!([])
    );
}

#[tokio::test]
async fn r20_stream_is_framed_as_the_sdk_parses() {
    let world = World::new().await;
    let cmd = json!({"cmd": ["printf out; printf err >&2; exit 3"]}).to_string();
    for (path, body) in [
        ("/exec/stream", cmd.clone()),
        ("/exec", cmd.replace('}', ",\"stream\":true}")),
        ("/runtimes/default/exec/stream", cmd),
    ] {
        let answer = world.call("POST", path, &body).await;
        assert!(
            answer.head.contains("content-type: text/event-stream"),
            "{}",
            answer.head
        );
        assert!(answer.complete);
        let text = answer.text();
        assert!(text.ends_with("\n\n"));
        let events = events(&text);
        assert_eq!(events[0].0, "task_id");
        assert_eq!(printed(&events, "stdout"), b"out");
        assert_eq!(printed(&events, "stderr"), b"err");
        let (name, exit) = events.last().unwrap();
        assert_eq!((name.as_str(), &exit["exit_code"]), ("exit", &3.into()));
        assert_eq!(exit["status"], "exited");
        assert!(exit["pid"].is_number());
    }
}

#[tokio::test]
async fn large_and_binary_output_streams_whole_and_is_kept_bounded() {
    let world = World::new().await;
    let size = 5 << 20;
    let cmd = json!({"cmd": [format!("head -c {size} /dev/urandom | tee /dev/stderr")]});
    let answer = world.call("POST", "/exec/stream", &cmd.to_string()).await;
    let events = events(&answer.text());
    let (out, err) = (printed(&events, "stdout"), printed(&events, "stderr"));
    assert_eq!((out.len(), out == err), (size, true));
    let id = events[0].1["task_id"].as_str().unwrap().to_owned();
    let task = world.call("GET", &format!("/exec/{id}"), "").await.json();
    assert_eq!(task["truncated"], true);
    let task = run(&world, json!({"cmd": ["yes | head -c 3000000"]})).await;
    assert_eq!(
        (task["stdout"].as_str().unwrap().len(), &task["truncated"]),
        (1 << 20, &true.into())
    );
}

#[tokio::test]
async fn r21_subscribe_joins_a_running_task_and_replays_a_finished_one() {
    let world = World::new().await;
    let body = json!({"cmd": ["echo one; read x; echo two $x"], "exec_mode": "background"});
    let body = json!({"cmd": ["sh", "-c", body["cmd"][0]], "exec_mode": "background"});
    let task = run(&world, body).await;
    assert_eq!(task["status"], "running");
    let id = task["id"].as_str().unwrap().to_owned();
    until(&world, &id, |task| task["stdout"] == "one\n").await;
    let path = format!("/exec/stream?task_id={id}");
    let head = format!("authorization: Bearer {RAW}\r\n");
    let mut stream = TcpStream::connect(world.direct).await.unwrap();
    stream
        .write_all(&request("GET", &path, &head, ""))
        .await
        .unwrap();
    let mut seen = [0; 1];
    stream.read_exact(&mut seen).await.unwrap();
    let answer = world
        .call("POST", &format!("/exec/{id}/input"), "in\n")
        .await;
    assert_eq!(answer.json(), json!({"success": true, "bytes_written": 3}));
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    let rest = String::from_utf8_lossy(&rest).into_owned();
    assert!(
        rest.contains("b25lCg==") && rest.contains("dHdvIGluCg=="),
        "{rest}"
    );
    assert!(
        rest.contains("event: exit") && rest.ends_with("0\r\n\r\n"),
        "{rest}"
    );
    let events = events(&world.call("GET", &path, "").await.text());
    assert_eq!(
        events[0],
        (
            "output".into(),
            json!({"stdout": "one\ntwo in\n", "stderr": ""})
        )
    );
    assert_eq!(
        (events[1].0.as_str(), &events[1].1["exit_code"]),
        ("exit", &0.into())
    );
    world
        .call("POST", &format!("/exec/{id}/input"), "x")
        .await
        .failed(409, "conflict");
    world
        .call("GET", "/exec/stream", "")
        .await
        .failed(400, "bad_request");
    world
        .call("GET", "/exec/stream?task_id=99", "")
        .await
        .failed(404, "not_found");
}

#[tokio::test]
async fn r18_r19_r22_r23_tasks_are_listed_and_deleted() {
    let world = World::new().await;
    for n in 0..3 {
        run(
            &world,
            json!({"cmd": ["echo", n.to_string()], "ttl_seconds": -1}),
        )
        .await;
    }
    let list = world.call("GET", "/exec", "").await.json();
    let ids: Vec<_> = list["tasks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["id"].clone())
        .collect();
    assert_eq!(
        (ids, &list["success"]),
        (vec!["1".into(), "2".into(), "3".into()], &true.into())
    );
    assert_eq!(
        world.call("GET", "/exec/2", "").await.json()["stdout"],
        "1\n"
    );
    assert_eq!(
        world.call("DELETE", "/exec/2", "").await.json(),
        json!({"success": true})
    );
    for (method, path) in [
        ("GET", "/exec/2"),
        ("DELETE", "/exec/2"),
        ("GET", "/exec/02"),
        ("GET", "/exec/+1"),
        ("GET", "/exec/x"),
        ("POST", "/exec/9/input"),
    ] {
        world.call(method, path, "").await.failed(404, "not_found");
    }
    let deleted = world.call("DELETE", "/exec", "").await.json();
    assert_eq!(deleted, json!({"success": true, "deleted": 2}));
}

#[tokio::test]
async fn timeout_and_delete_kill_the_whole_group() {
    let world = World::new().await;
    let task = run(
        &world,
        json!({"cmd": ["sleep 1000 & sleep 1000"], "timeout_seconds": 1}),
    )
    .await;
    assert_eq!(
        (&task["status"], &task["exit_code"], &task["error"]),
        (&"failed".into(), &137.into(), &"timeout".into())
    );
    let body = json!({"cmd": ["echo $$; sleep 1000 & wait"], "exec_mode": "background"});
    let id = run(&world, body).await["id"].as_str().unwrap().to_owned();
    let task = until(&world, &id, |task| task["stdout"] != "").await;
    let group = task["stdout"].as_str().unwrap().trim().to_owned();
    let path = format!("/exec/stream?task_id={id}");
    let (stream, deleted) = tokio::join!(world.call("GET", &path, ""), async {
        tokio::task::yield_now().await;
        world.call("DELETE", &format!("/exec/{id}"), "").await
    });
    assert_eq!(deleted.json(), json!({"success": true}));
    if stream.status == 200 {
        let events = events(&stream.text());
        let (name, exit) = events.last().unwrap();
        assert_eq!((name.as_str(), &exit["status"]), ("exit", &"failed".into()));
    }
    // Nobody of the group is left: pgrep finds nothing, in time.
    let deadline = std::time::Instant::now() + DEADLINE;
    let left = json!({"cmd": ["pgrep", "-g", group], "exec_mode": "direct"});
    while run(&world, left.clone()).await["exit_code"] == 0 {
        assert!(std::time::Instant::now() < deadline);
    }
}

#[tokio::test]
async fn a_daemon_left_behind_does_not_hold_the_answer() {
    let world = World::new().await;
    let cmd = "echo first; (trap '' HUP; sleep 1000; echo never) & echo $!";
    let task = run(&world, json!({"cmd": [cmd]})).await;
    let stdout = task["stdout"].as_str().unwrap();
    assert!(stdout.starts_with("first\n"), "{stdout}");
    let pid = stdout.lines().nth(1).unwrap().to_owned();
    let alive = run(&world, json!({"cmd": ["kill", "-0", pid]})).await;
    assert_eq!(alive["exit_code"], 0);
    run(
        &world,
        json!({"cmd": [format!("pkill -P {pid}; kill -9 {pid}")]}),
    )
    .await;
}

#[tokio::test]
async fn at_most_fifty_run() {
    let world = World::new().await;
    let body = json!({"cmd": ["sleep", "1000"], "exec_mode": "background"});
    for _ in 0..50 {
        run(&world, body.clone()).await;
    }
    let answer = world.call("POST", "/exec", &body.to_string()).await;
    answer.failed(429, "rate_limited");
    assert_eq!(
        world.call("DELETE", "/exec", "").await.json()["deleted"],
        50
    );
    // Killed tasks are forgotten at once, and leave room as they die.
    run(&world, json!({"cmd": ["true"]})).await;
}

#[tokio::test]
async fn a_reader_that_goes_away_disturbs_nobody() {
    let world = World::new().await;
    let head = format!("authorization: Bearer {RAW}\r\n");
    let body = json!({"cmd": ["yes | head -c 20000000; echo done >&2"]}).to_string();
    let mut stream = TcpStream::connect(world.direct).await.unwrap();
    stream
        .write_all(&request("POST", "/exec/stream", &head, &body))
        .await
        .unwrap();
    let mut seen = [0; 1000];
    stream.read_exact(&mut seen).await.unwrap();
    drop(stream);
    let task = until(&world, "1", |task| task["status"] != "running").await;
    assert_eq!(
        (&task["stderr"], &task["exit_code"]),
        (&"done\n".into(), &0.into())
    );
}
