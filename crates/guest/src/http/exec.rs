//! Exec (contract §3.4).

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hyper::Request;
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::Service;
use super::reply::{self, Failure, Reply};
use super::request::{self, Query};
use crate::exec::{Event, SpawnError, Spec, Task, Ttl};
use crate::limits::{BODY_MAX_BYTES, STREAM_QUEUE_CHUNKS, TASK_ARGS_MAX, TASK_SECONDS_MAX};

const SSE: &str = "text/event-stream";

/// The body of `POST /exec`. Unknown fields are left out, as clients of other versions send some.
#[derive(Debug, Deserialize)]
struct Run {
    cmd: Option<Vec<String>>,
    exec_mode: Option<String>,
    timeout_seconds: Option<u64>,
    ttl_seconds: Option<i64>,
    #[serde(default)]
    stream: bool,
}

pub(super) async fn create(
    service: &Arc<Service>,
    request: Request<Incoming>,
    stream: bool,
) -> Reply {
    let run: Run = request::body_json(request).await?;
    let stream = stream || run.stream;
    let background = run.exec_mode.as_deref() == Some("background");
    let spec = spec(run)?;
    let (task, events) = service
        .tasks
        .create(spec, stream)
        .map_err(|error| match error {
            SpawnError::TooMany => Failure::new(429, "rate_limited", error),
            SpawnError::Spawn { .. } => Failure::new(500, "spawn_failed", error),
        })?;
    if let Some(events) = events {
        let (sender, response) = reply::stream(SSE, STREAM_QUEUE_CHUNKS);
        tokio::spawn(async move {
            let first = sse("task_id", &json!({"task_id": task.id()}));
            if sender.send(first).await.is_ok() {
                forward(events, &sender).await;
            }
        });
        return Ok(response);
    }
    if !background {
        // Nobody can write to it before the answer is there: what reads it sees its end.
        task.input_close().await;
        task.wait().await;
    }
    reply::json(200, &task.view(true))
}

pub(super) fn list(service: &Service) -> Reply {
    let tasks: Vec<_> = service
        .tasks
        .list()
        .iter()
        .map(|task| task.view(false))
        .collect();
    reply::json(200, &json!({"success": true, "tasks": tasks}))
}

pub(super) fn delete_all(service: &Service) -> Reply {
    let deleted = service.tasks.delete_all();
    reply::json(200, &json!({"success": true, "deleted": deleted}))
}

pub(super) fn subscribe(service: &Service, request: &Request<Incoming>) -> Reply {
    let query = Query::of(request);
    let id = query
        .text("task_id")
        .ok_or_else(|| Failure::bad_request("task_id is missing"))?;
    let task = find(service, id)?;
    let (out, err, events) = task
        .subscribe()
        .map_err(|why| Failure::new(429, "rate_limited", why))?;
    let (sender, response) = reply::stream(SSE, STREAM_QUEUE_CHUNKS);
    tokio::spawn(async move {
        match events {
            Some(events) => {
                for (name, so_far) in [("stdout", out), ("stderr", err)] {
                    if !so_far.is_empty() && sender.send(data(name, &so_far)).await.is_err() {
                        return;
                    }
                }
                forward(events, &sender).await;
            }
            None => {
                let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
                let output = json!({"stdout": text(&out), "stderr": text(&err)});
                if sender.send(sse("output", &output)).await.is_ok()
                    && let Some(exit) = task.exit_event()
                {
                    // The client may be gone; then nobody misses it.
                    let _ = sender.send(frame(&exit)).await;
                }
            }
        }
    });
    Ok(response)
}

pub(super) fn get(service: &Service, id: &str) -> Reply {
    reply::json(200, &find(service, id)?.view(true))
}

pub(super) fn delete(service: &Service, id: &str) -> Reply {
    if service.tasks.delete(id) {
        reply::json(200, &json!({"success": true}))
    } else {
        Err(Failure::not_found("no such task"))
    }
}

pub(super) async fn input(service: &Service, id: &str, request: Request<Incoming>) -> Reply {
    let task = find(service, id)?;
    let bytes = request::body(request.into_body(), BODY_MAX_BYTES).await?;
    task.input(&bytes).await.map_err(|_| {
        Failure::new(
            409,
            "conflict",
            "the task does not read its input: it ended or closed it",
        )
    })?;
    reply::json(200, &json!({"success": true, "bytes_written": bytes.len()}))
}

fn find(service: &Service, id: &str) -> Result<Arc<Task>, Failure> {
    service
        .tasks
        .get(id)
        .ok_or_else(|| Failure::not_found("no such task"))
}

async fn forward(mut events: mpsc::Receiver<Event>, sender: &mpsc::Sender<Bytes>) {
    while let Some(event) = events.recv().await {
        let last = matches!(event, Event::Exit { .. });
        if sender.send(frame(&event)).await.is_err() || last {
            return;
        }
    }
}

fn frame(event: &Event) -> Bytes {
    match event {
        Event::Stdout(bytes) => data("stdout", bytes),
        Event::Stderr(bytes) => data("stderr", bytes),
        Event::Exit { code, pid, status } => sse(
            "exit",
            &json!({"exit_code": code, "pid": pid, "status": status}),
        ),
    }
}

fn data(name: &str, bytes: &[u8]) -> Bytes {
    let mut text = String::with_capacity(bytes.len() / 3 * 4 + 64);
    text.push_str("event: ");
    text.push_str(name);
    text.push_str("\ndata: {\"data\":\"");
    STANDARD.encode_string(bytes, &mut text);
    text.push_str("\"}\n\n");
    text.into()
}

fn sse(name: &str, data: &Value) -> Bytes {
    format!("event: {name}\ndata: {data}\n\n").into()
}

fn spec(run: Run) -> Result<Spec, Failure> {
    let command = run.cmd.unwrap_or_default();
    if command.is_empty() || command[0].is_empty() {
        return Err(Failure::bad_request(
            "cmd must be an array of at least one word",
        ));
    }
    if command.len() > TASK_ARGS_MAX {
        return Err(Failure::invalid(format!(
            "cmd may have {TASK_ARGS_MAX} words"
        )));
    }
    if command.iter().any(|word| word.contains('\0')) {
        return Err(Failure::invalid("cmd must not contain NUL"));
    }
    let shell = match run.exec_mode.as_deref() {
        None | Some("auto" | "foreground" | "background") => needs_shell(&command),
        Some("shell") => true,
        Some("direct") => false,
        Some(_) => return Err(Failure::invalid("exec_mode must be auto, shell or direct")),
    };
    let argv = if shell {
        vec!["/bin/sh".into(), "-c".into(), command.join(" ")]
    } else {
        command.clone()
    };
    let timeout = match run.timeout_seconds {
        None | Some(0) => None,
        Some(s @ 1..=TASK_SECONDS_MAX) => Some(Duration::from_secs(s)),
        Some(_) => return Err(Failure::invalid("timeout_seconds may be 2592000")),
    };
    Ok(Spec {
        command,
        argv,
        timeout,
        ttl: Ttl::from_wire(run.ttl_seconds).map_err(Failure::invalid)?,
    })
}

/// Whether `auto` takes a shell. One word with white space or a shell's characters is a command
/// line. Of several words only a bare operator makes one: an argument such as `print("a;b")` is
/// an argument, and a shell would take it apart.
fn needs_shell(command: &[String]) -> bool {
    const CHARACTERS: &[char] = &[
        ' ', '\t', '\n', '|', '&', ';', '<', '>', '(', ')', '$', '`', '\\', '"', '\'', '*', '?',
        '[', ']', '{', '}', '~', '#', '!',
    ];
    const OPERATORS: &[&str] = &[
        "|", "||", "&", "&&", ";", "<", ">", ">>", "2>", "2>>", "2>&1",
    ];
    match command {
        [line] => line.contains(CHARACTERS),
        words => words.iter().any(|word| OPERATORS.contains(&word.as_str())),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn argv(body: Value) -> Vec<String> {
        spec(serde_json::from_value(body).unwrap()).unwrap().argv
    }

    #[test]
    fn auto_takes_a_shell_when_it_must() {
        for (cmd, shell) in [
            (json!(["ls"]), false),
            (json!(["ls", "-la", "/tmp"]), false),
            (json!(["echo hello"]), true),
            (json!(["ls|wc"]), true),
            (json!(["echo", "a", "|", "wc"]), true),
            (json!(["python3", "-c", "print('a;b')"]), false),
            (json!(["sh", "-c", "a && b"]), false),
        ] {
            assert_eq!(argv(json!({"cmd": cmd}))[0] == "/bin/sh", shell, "{cmd}");
        }
        assert_eq!(
            argv(json!({"cmd": ["a b"], "exec_mode": "direct"})),
            ["a b"]
        );
        assert_eq!(
            argv(json!({"cmd": ["a", "b"], "exec_mode": "shell"}))[2],
            "a b"
        );
    }

    #[test]
    fn bad_specs_are_refused() {
        for body in [
            json!({}),
            json!({"cmd": []}),
            json!({"cmd": [""]}),
            json!({"cmd": ["a\u{0}"]}),
            json!({"cmd": ["a"], "exec_mode": "x"}),
            json!({"cmd": ["a"], "timeout_seconds": u64::MAX}),
            json!({"cmd": ["a"], "ttl_seconds": -2}),
        ] {
            assert!(
                spec(serde_json::from_value(body.clone()).unwrap()).is_err(),
                "{body}"
            );
        }
    }

    #[test]
    fn frames_are_what_the_client_splits() {
        assert_eq!(
            data("stdout", b"hi\n"),
            "event: stdout\ndata: {\"data\":\"aGkK\"}\n\n"
        );
        let exit = Event::Exit {
            code: 0,
            pid: 7,
            status: crate::exec::Status::Exited,
        };
        let text = frame(&exit);
        assert_eq!(
            text,
            "event: exit\ndata: {\"exit_code\":0,\"pid\":7,\"status\":\"exited\"}\n\n"
        );
    }
}
