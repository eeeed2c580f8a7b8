//! The Firecracker driver against a double of its API, and, where `CASEMATE_FIRECRACKER` names a
//! real one of the pinned version, against that: all that needs no guest, which is every request
//! up to and after `InstanceStart`. A real one needs root, `/dev/kvm` and the artifacts' kernel.
#![allow(clippy::unwrap_used)]

mod sim;

use proptest::prelude::*;
use serde_json::{Value, json};
use sim::firecracker::{Fault, State};
use sim::world::{Peer, WAIT, World, double, real, worlds};
use std::io::{Read, Write};
use std::num::NonZeroU64;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;
use vmm::firecracker::{Limits, api, http, pin};
use vmm::qemu::How;
use vmm::{DiskFile, Error, Event, Vmm};

fn per_s(n: u64) -> Option<NonZeroU64> {
    NonZeroU64::new(n)
}

#[test]
fn a_cold_vm_starts_takes_its_disk_and_stops() {
    let template = tempfile::tempdir().unwrap();
    for mut w in worlds(How::Cold, template.path()) {
        let mut vmm = w.greet().unwrap();
        vmm.cont().unwrap();
        assert_eq!(vmm.event(), None);
        vmm.stop().unwrap();
        let fd = std::os::fd::OwnedFd::from(tempfile::tempfile().unwrap());
        let given = vmm.disk_attach(&DiskFile::Descriptor(fd), 64 << 20);
        assert!(matches!(given, Err(Error::Refused { .. })), "{given:?}");
        w.disk_comes();
        vmm.disk_attach(&DiskFile::Mounted, 64 << 20).unwrap();
        let files = w.open_files();
        if !files.is_empty() {
            let disk = Path::new(&w.spec.paths.disk);
            assert!(files.iter().any(|f| f == disk), "{files:?}");
            let gone = |f: &PathBuf| f.to_string_lossy().ends_with("disk (deleted)");
            assert!(!files.iter().any(gone), "the placeholder is still open");
        }
        vmm.limit(&Limits {
            disk_bytes_per_s: per_s(10_000_000),
            disk_ops_per_s: per_s(500),
            net_bytes_per_s: per_s(1_000_000),
            net_packets_per_s: None,
        })
        .unwrap();
        vmm.limit(&Limits::default()).unwrap();
        vmm.cont().unwrap();
        vmm.quit().unwrap();
        assert_eq!(vmm.event(), Some(Event::Gone));
        assert!(matches!(vmm.cont(), Err(Error::Gone { .. })));
    }
}

/// One life saves, another goes on from it, and what it writes stays its own.
#[test]
fn a_template_is_saved_and_restored() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let dirs = [first.path(), second.path()];
    for (mut w, dir) in worlds(How::Build, dirs[0]).into_iter().zip(dirs) {
        for path in [&mut w.spec.paths.memory, &mut w.spec.paths.state] {
            let name = Path::new(path.as_str()).file_name().unwrap().to_owned();
            *path = dir.join(name).to_str().unwrap().into();
        }
        let mut vmm = w.greet().unwrap();
        vmm.cont().unwrap();
        assert!(matches!(vmm.save(), Err(Error::Refused { .. })));
        vmm.stop().unwrap();
        vmm.save().unwrap();
        vmm.quit().unwrap();
        drop(vmm);

        let (memory, state) = (dir.join("memory"), dir.join("state"));
        for file in [&memory, &state] {
            let read_only = std::os::unix::fs::PermissionsExt::from_mode(0o444);
            std::fs::set_permissions(file, read_only).unwrap();
        }
        let before = std::fs::metadata(&memory).unwrap().modified().unwrap();
        let mut again = match &w.peer {
            Peer::Double(_) => double(How::Template, dir, None),
            Peer::Real(_) => {
                // The devices are found where they were.
                let mut again = World::real(&real().unwrap(), How::Template, dir);
                for at in ["disk", "image"] {
                    std::fs::rename(again.dir.path().join(at), w.dir.path().join(at)).unwrap();
                }
                std::fs::remove_file(&w.spec.paths.vsock).unwrap();
                again.spec.paths.disk.clone_from(&w.spec.paths.disk);
                again
            }
        };
        let mut vmm = again.greet().unwrap();
        assert!(matches!(vmm.cont(), Err(Error::Refused { .. })));
        vmm.restore().unwrap();
        if let Peer::Real(child) = &again.peer {
            let maps = std::fs::read_to_string(format!("/proc/{}/maps", child.id())).unwrap();
            let memory = memory.to_str().unwrap();
            let mut mapped = maps.lines().filter(|l| l.ends_with(memory)).peekable();
            assert!(
                mapped.peek().is_some(),
                "memory is not mapped from its file"
            );
            assert!(mapped.all(|l| l.contains(" rw-p ")), "memory is shared");
        }
        w.disk_comes();
        if matches!(again.peer, Peer::Double(_)) {
            again.disk_comes();
        }
        vmm.disk_attach(&DiskFile::Mounted, 64 << 20).unwrap();
        vmm.cont().unwrap();
        vmm.stop().unwrap();
        vmm.quit().unwrap();
        let after = std::fs::metadata(&memory).unwrap().modified().unwrap();
        assert_eq!(before, after, "the template was written");
    }
}

/// One question, without the driver.
fn ask(stream: &mut UnixStream, method: &str, path: &str, body: Option<&Value>) -> http::Answer {
    let text = body.map(Value::to_string);
    let head = text.as_ref().map_or_else(String::new, |t| {
        format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n",
            t.len()
        )
    });
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n{}",
        text.unwrap_or_default()
    );
    stream.set_read_timeout(Some(WAIT)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut buf = Vec::new();
    loop {
        if let Some(answer) = http::parse(&buf).unwrap() {
            return answer;
        }
        let mut chunk = [0u8; 4096];
        let n = stream.read(&mut chunk).unwrap();
        assert_ne!(n, 0, "closed");
        buf.extend_from_slice(&chunk[..n]);
    }
}

/// The double is worth what it has in common with the real one: both give these answers.
#[test]
fn the_double_answers_as_the_real_one() {
    let template = tempfile::tempdir().unwrap();
    for mut w in worlds(How::Cold, template.path()) {
        let mut s = w.control.take().unwrap();
        let p = w.spec.paths.clone();
        let drive = |id: &str, more: Value| {
            let mut drive = json!({
                "drive_id": id,
                "path_on_host": p.image,
                "is_root_device": false,
                "is_read_only": true,
            });
            for (k, v) in more.as_object().unwrap() {
                drive[k] = v.clone();
            }
            drive
        };
        let boot = json!({
            "kernel_image_path": p.kernel, "initrd_path": p.initramfs, "boot_args": "quiet",
        });
        let machine = json!({"vcpu_count": 1, "mem_size_mib": 128});
        let start = json!({"action_type": "InstanceStart"});
        let limiter = json!({"bandwidth": {"size": 1000, "refill_time": 1000}});
        let load = json!({
            "snapshot_path": p.state,
            "mem_backend": {"backend_type": "File", "backend_path": p.memory},
        });
        let paused = json!({"state": "Paused"});
        let questions: Vec<(&str, &str, Option<Value>, u16)> = vec![
            ("GET", "/", None, 200),
            ("PUT", "/machine-config", None, 400),
            ("PUT", "/nothing", Some(json!({})), 400),
            ("PATCH", "/vm", Some(paused.clone()), 400),
            ("PATCH", "/vm", Some(json!({"state": "Asleep"})), 400),
            (
                "PUT",
                "/machine-config",
                Some(json!({"vcpu_count": 1})),
                400,
            ),
            (
                "PUT",
                "/machine-config",
                Some(json!({"vcpu_count": 33, "mem_size_mib": 128})),
                400,
            ),
            (
                "PUT",
                "/machine-config",
                Some(json!({"vcpu_count": 1, "mem_size_mib": 128, "x": 1})),
                400,
            ),
            (
                "PUT",
                "/machine-config",
                Some(json!({"vcpu_count": "1", "mem_size_mib": 128})),
                400,
            ),
            ("PUT", "/machine-config", Some(machine.clone()), 204),
            ("PUT", "/snapshot/load", Some(load.clone()), 400),
            ("PUT", "/actions", Some(start.clone()), 400),
            (
                "PUT",
                "/boot-source",
                Some(json!({"kernel_image_path": "/nonexistent"})),
                400,
            ),
            ("PUT", "/boot-source", Some(boot), 204),
            ("PUT", "/drives/a", Some(drive("b", json!({}))), 400),
            (
                "PUT",
                "/drives/a",
                Some(drive("a", json!({"cache_type": "Safe"}))),
                400,
            ),
            (
                "PUT",
                "/drives/a",
                Some(drive("a", json!({"path_on_host": "/nonexistent"}))),
                400,
            ),
            (
                "PUT",
                "/drives/a",
                Some(drive(
                    "a",
                    json!({"rate_limiter": {"bandwidth": {"size": 1}}}),
                )),
                400,
            ),
            (
                "PUT",
                "/drives/a",
                Some(drive("a", json!({"rate_limiter": limiter}))),
                204,
            ),
            (
                "PATCH",
                "/drives/a",
                Some(json!({"drive_id": "a", "path_on_host": p.image})),
                400,
            ),
            ("PUT", "/vsock", Some(json!({"uds_path": p.vsock})), 400),
            (
                "PUT",
                "/vsock",
                Some(json!({"guest_cid": 3, "uds_path": p.vsock})),
                204,
            ),
            (
                "PUT",
                "/entropy",
                Some(json!({"rate_limiter": limiter})),
                204,
            ),
            (
                "PUT",
                "/serial",
                Some(json!({"rate_limiter": limiter})),
                400,
            ),
            (
                "PUT",
                "/serial",
                Some(json!({"serial_out_path": "/dev/null"})),
                204,
            ),
            (
                "PUT",
                "/actions",
                Some(json!({"action_type": "InstanceStop"})),
                400,
            ),
            ("PUT", "/actions", Some(start.clone()), 204),
            ("PUT", "/actions", Some(start), 400),
            ("PUT", "/machine-config", Some(machine), 400),
            ("PUT", "/serial", Some(json!({})), 400),
            ("PUT", "/snapshot/load", Some(load), 400),
            (
                "PATCH",
                "/drives/b",
                Some(json!({"drive_id": "b", "path_on_host": p.image})),
                400,
            ),
            (
                "PATCH",
                "/drives/a",
                Some(json!({"drive_id": "a", "is_read_only": true})),
                400,
            ),
            (
                "PATCH",
                "/drives/a",
                Some(json!({"drive_id": "a", "path_on_host": "/nonexistent"})),
                400,
            ),
            (
                "PATCH",
                "/drives/a",
                Some(json!({"drive_id": "a", "path_on_host": p.image})),
                204,
            ),
            (
                "PATCH",
                "/network-interfaces/n",
                Some(json!({"iface_id": "n", "rx_rate_limiter": limiter})),
                400,
            ),
            ("PATCH", "/vm", Some(paused.clone()), 204),
            ("PATCH", "/vm", Some(paused), 204),
            (
                "PUT",
                "/snapshot/create",
                Some(json!({"snapshot_path": p.state})),
                400,
            ),
            ("PATCH", "/vm", Some(json!({"state": "Resumed"})), 204),
            (
                "PUT",
                "/snapshot/create",
                Some(json!({"snapshot_path": p.state, "mem_file_path": p.memory})),
                400,
            ),
            ("GET", "/", None, 200),
        ];
        for (method, path, body, status) in questions {
            let answer = ask(&mut s, method, path, body.as_ref());
            let said = String::from_utf8_lossy(&answer.body).into_owned();
            let which = match w.peer {
                Peer::Double(_) => "the double",
                Peer::Real(_) => "the real one",
            };
            assert_eq!(
                answer.status, status,
                "{which}: {method} {path} {body:?}: {said}"
            );
            assert_eq!(status == 400, said.contains("fault_message"), "{said}");
        }
    }
}

#[test]
fn all_that_is_ever_said() {
    let template = tempfile::tempdir().unwrap();
    let mut w = double(How::Cold, template.path(), None);
    w.spec.memory_mib = 0;
    w.spec.cpus = 1_000;
    w.spec.limits.disk_ops_per_s = per_s(77);
    let mut vmm = w.greet().unwrap();
    vmm.cont().unwrap();
    vmm.quit().unwrap();
    drop(vmm);
    let server = w.server();
    assert_eq!(
        server.paths(),
        [
            "GET /",
            "PUT /machine-config",
            "PUT /boot-source",
            "PUT /drives/base",
            "PUT /drives/disk",
            "PUT /network-interfaces/net",
            "PUT /vsock",
            "PUT /entropy",
            "PUT /serial",
            "PUT /actions",
            "PATCH /vm",
        ]
    );
    let machine = server.body("PUT", "/machine-config");
    assert_eq!(
        (&machine["vcpu_count"], &machine["mem_size_mib"]),
        (&json!(32), &json!(128))
    );
    let disk = server.body("PUT", "/drives/disk");
    assert_eq!(
        disk["cache_type"],
        json!("Writeback"),
        "a flush must reach the disk"
    );
    assert_eq!(
        disk["rate_limiter"]["ops"],
        json!({"size": 77, "refill_time": 1000})
    );
    assert_eq!(disk["rate_limiter"]["bandwidth"]["size"], json!(0));
    assert_eq!(
        server.body("PUT", "/drives/base")["is_read_only"],
        json!(true)
    );
    let net = server.body("PUT", "/network-interfaces/net");
    assert_eq!(net["host_dev_name"], json!(api::TAP));
}

/// The VMM dies at each of its requests in turn: typed, and the end is seen.
#[test]
fn death_at_every_request() {
    let template = tempfile::tempdir().unwrap();
    let mut at = 0;
    loop {
        let mut w = double(How::Cold, template.path(), Some((at, Fault::Die)));
        let done = life(&mut w);
        if done.is_ok() {
            break;
        }
        assert!(
            matches!(done, Err(Error::Gone { .. })),
            "request {at}: {done:?}"
        );
        at += 1;
    }
    assert_eq!(
        at, 14,
        "greeting, eight settings, start, pause, disk, resume, pause"
    );
}

fn life(w: &mut World) -> Result<(), Error> {
    let mut vmm = w.greet()?;
    let done = vmm
        .cont()
        .and_then(|()| vmm.stop())
        .and_then(|()| vmm.disk_attach(&DiskFile::Mounted, 1 << 21))
        .and_then(|()| vmm.cont())
        .and_then(|()| vmm.stop());
    if done.is_err() {
        assert_eq!(vmm.event(), Some(Event::Gone));
        assert!(
            matches!(vmm.stop(), Err(Error::Gone { .. })),
            "it was used again"
        );
    }
    vmm.quit()?;
    done
}

/// Whatever it says instead of an answer is an error of the right kind, and the last word.
#[test]
fn what_is_no_answer() {
    let template = tempfile::tempdir().unwrap();
    let head = |more: &str| format!("HTTP/1.1 200 \r\n{more}\r\n\r\n").into_bytes();
    let many = vec![b'x'; vmm::limits::API_BODY_MAX_BYTES * 4];
    let endless_head = [b"HTTP/1.1 204 \r\nx: ".to_vec(), many.clone()].concat();
    let large = [
        head(&format!("Content-Length: {}", many.len())),
        many.clone(),
    ]
    .concat();
    for said in [
        b"\x00\x01\x02\x03".to_vec(),
        b"{\"QMP\": {}}\n".to_vec(),
        many,
        endless_head,
        large,
        head("Transfer-Encoding: chunked"),
        head("X: y"),
        head("Content-Length: 3, 3"),
        [head("Content-Length: 2"), b"{}".to_vec()].concat(),
        b"HTTP/1.1 100 \r\n\r\nHTTP/1.1 204 \r\n\r\n".to_vec(),
    ] {
        // At the first setting: the greeting alone may have a body.
        let mut w = double(
            How::Cold,
            template.path(),
            Some((1, Fault::Say(said.clone()))),
        );
        let mut vmm = w.greet().unwrap();
        let e = vmm.cont().unwrap_err();
        let text = String::from_utf8_lossy(&said).into_owned();
        assert!(matches!(e, Error::Malformed { .. }), "{text:.60}: {e}");
        assert_eq!(vmm.event(), Some(Event::Gone));
        assert!(matches!(vmm.cont(), Err(Error::Gone { .. })));
        vmm.quit().unwrap();
    }
    for said in [
        "",
        "HTTP/1.1 20",
        "HTTP/1.1 200 \r\nContent-Length: 9\r\n\r\n{",
    ] {
        let fault = Fault::SayAndDie(said.into());
        let mut w = double(How::Cold, template.path(), Some((0, fault)));
        let e = w.greet().err().unwrap();
        assert!(matches!(e, Error::Gone { .. }), "{said:?}: {e}");
    }
}

/// Bytes that nobody asked for could be taken for the next answer: they end it instead.
#[test]
fn an_answer_in_advance_is_not_taken() {
    let template = tempfile::tempdir().unwrap();
    let early = Fault::Add(b"HTTP/1.1 204 \r\n\r\n".to_vec());
    let mut w = double(How::Cold, template.path(), Some((9, early)));
    let mut vmm = w.greet().unwrap();
    // With the start's answer, or just after it.
    let started = vmm.cont();
    let deadline = Instant::now() + WAIT;
    while started.is_ok() && vmm.event().is_none() {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert!(matches!(vmm.stop(), Err(Error::Gone { .. })));
    assert!(!w.server().paths().contains(&"PATCH /vm".to_owned()));
}

#[test]
fn a_fault_is_typed_and_clean() {
    let template = tempfile::tempdir().unwrap();
    let body = json!({"fault_message": format!("a\u{1b}[2J\n{}", "b".repeat(1000))}).to_string();
    let said = format!(
        "HTTP/1.1 400 \r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let fault = Fault::SayAndDie(said.into_bytes());
    let mut w = double(How::Cold, template.path(), Some((2, fault)));
    let mut vmm = w.greet().unwrap();
    match vmm.cont() {
        Err(Error::Refused { command, why }) => {
            assert_eq!(command, "boot-source");
            assert!(why.starts_with("a [2J b"), "{why}");
            assert_eq!(why.chars().count(), vmm::limits::GUEST_TEXT_MAX_CHARS);
        }
        other => panic!("{other:?}"),
    }
    // No fault text, or none that is one.
    let said = b"HTTP/1.1 500 \r\nContent-Length: 3\r\n\r\nxyz".to_vec();
    let mut w = double(
        How::Cold,
        template.path(),
        Some((1, Fault::SayAndDie(said))),
    );
    let e = w.greet().unwrap().cont().unwrap_err();
    assert!(
        matches!(&e, Error::Refused { why, .. } if why == "status 500"),
        "{e}"
    );
}

#[test]
fn another_version_or_a_used_one_is_not_driven() {
    let template = tempfile::tempdir().unwrap();
    let mut w = double(How::Cold, template.path(), None);
    w.server().seen.lock().unwrap().version = "1.16.1".into();
    let e = w.greet().err().unwrap().to_string();
    assert!(
        e.contains("version 1.16.1 is not") && e.contains(pin::VERSION),
        "{e}"
    );
    let mut w = double(How::Cold, template.path(), None);
    w.server().seen.lock().unwrap().state = State::Running;
    let e = w.greet().err().unwrap().to_string();
    assert!(e.contains("Running"), "{e}");
}

/// A load that failed leaves a Firecracker that ends; so does the driver.
#[test]
fn a_template_that_is_not_there() {
    let template = tempfile::tempdir().unwrap();
    for mut w in worlds(How::Template, template.path()) {
        let mut vmm = w.greet().unwrap();
        assert!(matches!(vmm.restore(), Err(Error::Refused { .. })));
        let deadline = Instant::now() + WAIT;
        while vmm.event().is_none() {
            assert!(Instant::now() < deadline, "it did not end");
            std::thread::yield_now();
        }
        vmm.quit().unwrap();
    }
}

#[derive(Debug, Clone, Copy)]
enum Act {
    Restore,
    Save,
    Cont,
    Stop,
    Disk,
    Limit,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let one = prop_oneof![
        Just(Act::Restore),
        Just(Act::Save),
        Just(Act::Cont),
        Just(Act::Stop),
        Just(Act::Disk),
        Just(Act::Limit),
    ];
    proptest::collection::vec(one, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// In whatever order acts come, the driver and the VMM agree on where the VM is, and no request
    /// has a field that the API lacks.
    #[test]
    fn driver_and_vmm_agree(acts in acts(), template in any::<bool>()) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("memory"), "").unwrap();
        std::fs::write(dir.path().join("state"), r#"{"drives":["disk"],"nets":["net"]}"#).unwrap();
        let how = if template { How::Template } else { How::Cold };
        let mut w = double(how, dir.path(), None);
        let mut vmm = w.greet().unwrap();
        for act in acts {
            let done = match act {
                Act::Restore => vmm.restore(),
                Act::Save => vmm.save(),
                Act::Cont => vmm.cont(),
                Act::Stop => vmm.stop(),
                Act::Disk => vmm.disk_attach(&DiskFile::Mounted, 1 << 21),
                Act::Limit => vmm.limit(&Limits::default()),
            };
            let state = w.server().state();
            match (act, done) {
                (Act::Cont, Ok(())) => prop_assert_eq!(state, State::Running),
                (Act::Restore | Act::Stop | Act::Save | Act::Disk, Ok(())) => {
                    prop_assert_eq!(state, State::Paused);
                }
                (Act::Limit, Ok(())) => prop_assert_ne!(state, State::NotStarted),
                (_, Err(Error::Refused { .. })) => {}
                (_, Err(e)) => prop_assert!(false, "{}: {:?}", e, act),
            }
            prop_assert_eq!(vmm.event(), None);
        }
        vmm.quit().unwrap();
        drop(vmm);
        prop_assert_ne!(w.server().state(), State::Running);
        let refused = w.server().seen.lock().unwrap().refused.clone();
        prop_assert!(!refused.iter().any(|r| r.contains("field")), "{:?}", refused);
    }
}
