//! The life of a VM with a double of the VMM and of the guest.
#![allow(clippy::unwrap_used)]

use super::*;
use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;

#[derive(Default)]
struct Seen {
    acts: Vec<&'static str>,
    events: Vec<Event>,
    refuse: Option<&'static str>,
}

struct Double {
    seen: Rc<RefCell<Seen>>,
    socket: UnixStream,
}

impl Double {
    fn act(&mut self, command: &'static str) -> Result<(), crate::Error> {
        let mut seen = self.seen.borrow_mut();
        seen.acts.push(command);
        if seen.refuse == Some(command) {
            return Err(crate::Error::Refused {
                command,
                why: "because".into(),
            });
        }
        Ok(())
    }
}

impl Vmm for Double {
    fn restore(&mut self) -> Result<(), crate::Error> {
        self.act("restore")
    }
    fn save(&mut self) -> Result<(), crate::Error> {
        self.act("save")
    }
    fn cont(&mut self) -> Result<(), crate::Error> {
        self.act("cont")
    }
    fn stop(&mut self) -> Result<(), crate::Error> {
        self.act("stop")
    }
    fn disk_attach(&mut self, _: &DiskFile, _: u64) -> Result<(), crate::Error> {
        self.act("disk_attach")
    }
    fn memory_save(&mut self, _: BorrowedFd<'_>) -> Result<(), crate::Error> {
        self.act("memory_save")
    }
    fn wake(&mut self) -> Result<(), crate::Error> {
        self.act("wake")
    }
    fn quit(&mut self) -> Result<(), crate::Error> {
        self.act("quit")
    }
    fn event(&mut self) -> Option<Event> {
        self.seen.borrow_mut().events.pop()
    }
    fn control_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

struct World {
    vm: Vm<Double, u32>,
    seen: Rc<RefCell<Seen>>,
    guest: BufReader<UnixStream>,
    now: Instant,
    next: u32,
}

impl World {
    fn new(how: How) -> Self {
        let (ours, guest) = UnixStream::pair().unwrap();
        guest
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let seen = Rc::new(RefCell::new(Seen::default()));
        let vmm = Double {
            seen: Rc::clone(&seen),
            socket: UnixStream::pair().unwrap().0,
        };
        Self {
            vm: Vm::new(1, how, vmm, Channel::new(ours).unwrap()),
            seen,
            guest: BufReader::new(guest),
            now: Instant::now(),
            next: 0,
        }
    }

    /// A VM that is prepared.
    fn pooled(how: How) -> Self {
        let mut w = Self::new(how);
        assert!(w.ask(Op::Prepare).is_none());
        if how != How::Template {
            w.say(r#"{"type":"booted","version":"1"}"#);
        }
        assert_eq!(w.hear(), ToGuest::Rehearse);
        let answer = w.say(r#"{"type":"rehearsed"}"#).unwrap().unwrap();
        assert_eq!(answer, json!({"vm": "pooled"}));
        w
    }

    fn running() -> Self {
        let mut w = Self::pooled(How::Template);
        w.disk();
        assert!(w.ask(attach(1000)).is_none());
        assert!(matches!(w.hear(), ToGuest::Attach(_)));
        let up = w.say(r#"{"type":"up","kernel":"6.1"}"#).unwrap().unwrap();
        assert_eq!(up, json!({"kernel": "6.1"}));
        w
    }

    fn disk(&mut self) {
        let file = tempfile::tempfile().unwrap();
        self.vm
            .disk_keep(DiskFile::Descriptor(file.into()))
            .unwrap();
        self.vm.disk_ready(1 << 21).unwrap();
    }

    fn ask(&mut self, op: Op) -> Option<Result<Value, Error>> {
        self.next += 1;
        self.vm.request(self.next, op, self.now);
        self.answer()
    }

    fn answer(&mut self) -> Option<Result<Value, Error>> {
        self.vm.take_answers().pop().map(|(_, a)| a)
    }

    fn say(&mut self, line: &str) -> Option<Result<Value, Error>> {
        self.say_bytes(line.as_bytes())
    }

    fn say_bytes(&mut self, line: &[u8]) -> Option<Result<Value, Error>> {
        self.guest.get_mut().write_all(line).unwrap();
        self.guest.get_mut().write_all(b"\n").unwrap();
        for _ in 0..=(line.len() / (16 << 10)) + 1 {
            self.vm.on_agent();
        }
        self.answer()
    }

    fn hear(&mut self) -> ToGuest {
        let mut line = String::new();
        self.guest.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn event(&mut self, e: Event) -> Option<Result<Value, Error>> {
        self.seen.borrow_mut().events.push(e);
        self.vm.on_vmm();
        self.answer()
    }

    fn acts(&self) -> Vec<&'static str> {
        self.seen.borrow().acts.clone()
    }

    fn reason(&self) -> Option<String> {
        let s = self.vm.status();
        assert_eq!(s.vm == VmState::Exited, s.reason.is_some());
        s.reason
    }
}

fn attach(wait_ms: u64) -> Op {
    Op::Attach {
        attach: Box::new(api::agent::Attach {
            time_unix_ns: 1,
            config: "{}".into(),
            token_state: "x".into(),
            ip: "10.117.0.2".into(),
            prefix: 16,
            gateway: "10.117.0.1".into(),
        }),
        wait_ms,
    }
}

fn code(answer: Option<Result<Value, Error>>) -> ErrorCode {
    answer.unwrap().unwrap_err().code
}

#[test]
fn a_whole_life() {
    let mut w = World::running();
    let paused = w.ask(Op::Pause).unwrap().unwrap();
    assert_eq!(paused, json!({"vm": "paused"}));
    w.ask(Op::Resume).unwrap().unwrap();
    assert!(matches!(w.hear(), ToGuest::Clock { time_unix_ns } if time_unix_ns > 0));
    assert!(w.ask(Op::Shutdown { grace_ms: 500 }).is_none());
    assert_eq!(w.hear(), ToGuest::Shutdown);
    let done = w.say(r#"{"type":"down"}"#).unwrap().unwrap();
    assert_eq!(done, json!({"vm": "exited", "reason": "shutdown"}));
    assert_eq!(
        w.acts(),
        [
            "restore",
            "cont",
            "stop",
            "disk_attach",
            "cont",
            "stop",
            "cont",
            "quit"
        ]
    );
}

#[test]
fn restore_and_cold_give_the_same_answers() {
    let answers = |how| {
        let mut w = World::pooled(how);
        w.disk();
        w.ask(attach(10));
        w.hear();
        (w.say(r#"{"type":"up","kernel":"6"}"#), w.vm.status())
    };
    assert_eq!(answers(How::Template), answers(How::Cold));
}

#[test]
fn a_vm_that_is_attached_at_once_rehearses_nothing() {
    let pooled = json!({"vm": "pooled"});
    let mut w = World::new(How::Template);
    assert_eq!(w.ask(Op::PrepareNow).unwrap().unwrap(), pooled);
    assert_eq!(w.acts(), ["restore", "cont", "stop"]);
    let mut w = World::new(How::Cold);
    assert!(w.ask(Op::PrepareNow).is_none());
    let booted = w.say(r#"{"type":"booted","version":"1"}"#);
    assert_eq!(booted.unwrap().unwrap(), pooled);
    assert_eq!(w.acts(), ["cont", "stop"]);
    w.disk();
    assert!(w.ask(attach(10)).is_none());
    assert!(matches!(w.hear(), ToGuest::Attach(_)));
    // What becomes a template is rehearsed, whoever asks.
    let mut w = World::new(How::Build);
    assert!(w.ask(Op::PrepareNow).is_none());
    assert!(w.say(r#"{"type":"booted","version":"1"}"#).is_none());
    assert_eq!(w.hear(), ToGuest::Rehearse);
}

#[test]
fn a_template_is_saved_once_and_sees_no_workspace() {
    let mut w = World::pooled(How::Build);
    w.disk();
    assert_eq!(code(w.ask(attach(10))), ErrorCode::Conflict);
    assert_eq!(w.ask(Op::Save).unwrap().unwrap(), json!(true));
    assert_eq!(w.reason().as_deref(), Some("saved"));
    assert_eq!(code(w.ask(Op::Save)), ErrorCode::Conflict);
    let mut w = World::pooled(How::Cold);
    assert_eq!(code(w.ask(Op::Save)), ErrorCode::Conflict);
}

#[test]
fn a_guest_that_speaks_garbage_is_ended() {
    for bad in [
        &b"\xff\xfe\x00"[..],
        b"",
        b"{}",
        b"null",
        br#"{"type":"up","kernel":"6"}"#,
        br#"{"type":"down"}"#,
        br#"{"type":"booted","version":"1","more":1}"#,
        &[b'x'; 100_000],
    ] {
        let mut w = World::new(How::Cold);
        w.ask(Op::Prepare);
        assert_eq!(code(w.say_bytes(bad)), ErrorCode::BadGateway, "{bad:?}");
        assert_eq!(w.reason().as_deref(), Some("failed"));
        assert_eq!(w.acts().last(), Some(&"quit"));
    }
}

#[test]
fn a_guest_that_fails_is_quoted_with_care() {
    let mut w = World::pooled(How::Template);
    w.disk();
    w.ask(attach(1000));
    let long = "\\u001b[31m".to_owned() + &"y".repeat(5000);
    let e = w
        .say(&format!(
            r#"{{"type":"failed","code":"no <b>disk","message":"{long}"}}"#
        ))
        .unwrap()
        .unwrap_err();
    assert!(e.message.contains("(nobdisk)"), "{e}");
    let detail = e.detail.unwrap();
    assert!(detail.len() <= 256 && !detail.contains('\u{1b}'));
    // A VM serves one workspace, once.
    assert_eq!(code(w.ask(attach(1000))), ErrorCode::Conflict);
}

#[test]
fn a_silent_guest_times_out_and_the_answer_says_what_to_do() {
    let mut w = World::pooled(How::Template);
    w.disk();
    assert!(w.ask(attach(250)).is_none());
    w.vm.on_time(w.now + Duration::from_millis(249));
    assert!(w.answer().is_none());
    w.vm.on_time(w.now + Duration::from_millis(250));
    let e = w.answer().unwrap().unwrap_err();
    assert_eq!(e.code, ErrorCode::Timeout);
    assert!(
        e.message.contains("250 ms") && e.message.contains("start it again"),
        "{e}"
    );
    assert_eq!(w.reason().as_deref(), Some("failed"));
}

#[test]
fn an_end_has_its_reason() {
    for (event, reason) in [
        (Event::Shutdown, "shutdown"),
        (Event::Reset, "reset"),
        (Event::Panic, "panic"),
        (Event::Gone, "lost"),
    ] {
        let mut w = World::running();
        w.event(Event::DiskError);
        assert_eq!(w.reason(), None);
        w.event(event);
        assert_eq!(w.reason().as_deref(), Some(reason));
        assert!(w.vm.vmm().is_none() && w.vm.agent().is_none());
        w.ask(Op::Shutdown { grace_ms: 1 }).unwrap().unwrap();
        assert_eq!(w.reason().as_deref(), Some(reason));
    }
    let mut w = World::new(How::Cold);
    w.ask(Op::Prepare);
    assert_eq!(code(w.event(Event::Reset)), ErrorCode::BadGateway);
}

#[test]
fn shutdown_ends_whatever_waits() {
    let mut w = World::pooled(How::Template);
    w.disk();
    w.ask(attach(1000));
    assert_eq!(code(w.ask(Op::Pause)), ErrorCode::Conflict);
    assert!(w.ask(Op::Status).unwrap().is_ok());
    w.next += 1;
    w.vm.request(w.next, Op::Shutdown { grace_ms: 0 }, w.now);
    let answers = w.vm.take_answers();
    assert_eq!(answers.len(), 2);
    assert!(answers[0].1.is_err() && answers[1].1.is_ok());
    // The grace is bounded, whatever is asked for, and over for a guest that says nothing.
    let mut w = World::running();
    assert!(w.ask(Op::Shutdown { grace_ms: u64::MAX }).is_none());
    let limit = Duration::from_millis(SHUTDOWN_GRACE_MAX_MS);
    assert_eq!(w.vm.deadline(), Some(w.now + limit));
    w.vm.on_time(w.now + limit);
    assert!(w.answer().unwrap().is_ok());
    assert_eq!(w.reason().as_deref(), Some("shutdown"));
}

#[test]
fn a_workspace_may_say_what_it_likes_on_its_own_channel() {
    let mut w = World::running();
    for line in [
        &b"\xff"[..],
        br#"{"type":"down"}"#,
        br#"{"type":"up","kernel":"x"}"#,
    ] {
        assert!(w.say_bytes(line).is_none());
        assert_eq!(w.vm.status().vm, VmState::Running);
    }
}

#[test]
fn a_vmm_that_refuses_is_ended() {
    for act in ["restore", "cont", "disk_attach", "stop"] {
        let mut w = World::new(How::Template);
        w.seen.borrow_mut().refuse = Some(act);
        let mut answer = w.ask(Op::Prepare);
        if answer.is_none() {
            w.hear();
            answer = w.say(r#"{"type":"rehearsed"}"#);
        }
        if act == "disk_attach" {
            w.disk();
            answer = w.ask(attach(1000));
        }
        assert_eq!(code(answer), ErrorCode::VmUnavailable, "{act}");
        assert_eq!(w.reason().as_deref(), Some("failed"), "{act}");
    }
}

#[test]
fn an_attach_needs_a_disk_and_a_bounded_wait() {
    let mut w = World::pooled(How::Template);
    let file = || tempfile::tempfile().unwrap().into();
    assert_eq!(code(w.ask(attach(1000))), ErrorCode::Conflict);
    assert!(w.vm.disk_ready(1 << 21).is_err());
    w.vm.disk_keep(DiskFile::Descriptor(file())).unwrap();
    assert!(w.vm.disk_keep(DiskFile::Mounted).is_err());
    assert_eq!(code(w.ask(attach(1000))), ErrorCode::Conflict, "no volume");
    w.vm.disk_ready(1 << 21).unwrap();
    assert!(w.vm.disk_ready(1 << 21).is_err());
    for wait_ms in [0, ATTACH_WAIT_MAX_MS + 1] {
        assert_eq!(code(w.ask(attach(wait_ms))), ErrorCode::ValidationError);
    }
    assert!(w.ask(attach(1000)).is_none());
}

proptest::proptest! {
    /// Whatever comes, in whatever order: no panic, and the state stays one of the drawn ones.
    #[test]
    fn no_order_of_things_panics(steps in proptest::collection::vec(0u8..18, 0..40)) {
        let mut w = World::new(How::Template);
        for s in steps {
            match s {
                0 => drop(w.ask(Op::Prepare)),
                1 => drop(w.say(r#"{"type":"rehearsed"}"#)),
                2 => drop(w.say(r#"{"type":"up","kernel":"6"}"#)),
                3 => drop(w.vm.disk_keep(DiskFile::Mounted)),
                13 => drop(w.vm.disk_ready(1 << 21)),
                4 => drop(w.ask(attach(100))),
                5 => drop(w.ask(Op::Pause)),
                6 => drop(w.ask(Op::Resume)),
                7 => drop(w.ask(Op::Shutdown { grace_ms: 50 })),
                8 => drop(w.ask(Op::Save)),
                9 => drop(w.event(Event::Reset)),
                10 => drop(w.say_bytes(b"\0")),
                11 => { w.now += Duration::from_millis(60); w.vm.on_time(w.now); }
                12 => drop(w.say(r#"{"type":"down"}"#)),
                14 => drop(w.vm.memory_keep(tempfile::tempfile().unwrap().into())),
                15 => drop(w.ask(archive(100))),
                16 => drop(w.piece(w.vm.archives, "x")),
                _ => drop(w.ask(Op::Status)),
            }
            let waits = w.vm.deadline().is_some();
            let s = w.vm.status();
            proptest::prop_assert!(!(waits && s.vm == VmState::Exited));
        }
    }
}

fn wake() -> Op {
    Op::Wake {
        wake: Box::new(api::agent::Wake {
            time_unix_ns: 1,
            token_state: String::new(),
            ip: "10.117.0.3".into(),
            prefix: 16,
            gateway: "10.117.0.1".into(),
        }),
        wait_ms: 1000,
    }
}

#[test]
fn memory_is_saved_to_one_file_and_the_workspace_goes_on_whatever_comes_of_it() {
    let mut w = World::running();
    assert_eq!(code(w.ask(Op::MemorySave)), ErrorCode::Conflict, "no file");
    for refused in [None, Some("memory_save"), None] {
        w.vm.memory_keep(tempfile::tempfile().unwrap().into())
            .unwrap();
        assert!(
            w.vm.memory_keep(tempfile::tempfile().unwrap().into())
                .is_err()
        );
        w.seen.borrow_mut().refuse = refused;
        let saved = w.ask(Op::MemorySave).unwrap();
        assert_eq!(saved.is_err(), refused.is_some());
        assert_eq!(w.vm.status().vm, VmState::Paused);
        assert_eq!(
            code(w.ask(Op::MemorySave)),
            ErrorCode::Conflict,
            "one file, once"
        );
        w.vm.memory_drop();
        w.ask(Op::Resume).unwrap().unwrap();
        assert!(matches!(w.hear(), ToGuest::Clock { .. }));
    }
    w.vm.memory_keep(tempfile::tempfile().unwrap().into())
        .unwrap();
    w.vm.memory_drop();
    assert_eq!(
        code(w.ask(Op::MemorySave)),
        ErrorCode::Conflict,
        "let go of"
    );
}

#[test]
fn a_woken_vm_runs_once_its_agent_says_so_and_is_woken_once() {
    let mut w = World::new(How::Wake);
    assert!(
        w.vm.memory_keep(tempfile::tempfile().unwrap().into())
            .is_err()
    );
    assert_eq!(code(w.ask(Op::Prepare)), ErrorCode::Conflict);
    assert_eq!(code(w.ask(wake())), ErrorCode::Conflict, "no disk");
    w.disk();
    assert!(w.ask(wake()).is_none());
    assert_eq!(w.seen.borrow().acts, ["wake", "disk_attach", "cont"]);
    assert!(matches!(w.hear(), ToGuest::Wake(_)));
    // What it was saying when it fell asleep.
    assert!(w.say("half a line").is_none());
    assert!(w.say(r#"{"type":"rehearsed"}"#).is_none());
    let up = w.say(r#"{"type":"up","kernel":"6.1"}"#).unwrap().unwrap();
    assert_eq!(up, json!({"kernel": "6.1"}));
    assert_eq!(w.vm.status().vm, VmState::Running);
    assert_eq!(code(w.ask(wake())), ErrorCode::Conflict);
    // No other VM is woken.
    let mut w = World::new(How::Template);
    w.disk();
    assert_eq!(code(w.ask(wake())), ErrorCode::Conflict);
}

#[test]
fn a_wake_that_fails_ends_the_vm() {
    for refused in ["wake", "disk_attach", "cont"] {
        let mut w = World::new(How::Wake);
        w.disk();
        w.seen.borrow_mut().refuse = Some(refused);
        assert_eq!(code(w.ask(wake())), ErrorCode::VmUnavailable);
        assert_eq!(w.vm.status().reason.as_deref(), Some("failed"));
    }
    let mut w = World::new(How::Wake);
    w.disk();
    assert!(w.ask(wake()).is_none());
    let failed = w.say(r#"{"type":"failed","code":"identity","message":"m"}"#);
    assert_eq!(code(failed), ErrorCode::BadGateway);
}

fn archive(wait_ms: u64) -> Op {
    Op::Archive {
        paths: vec!["/root".into()],
        exclude: vec!["/root/not".into()],
        max_bytes: 1 << 20,
        wait_ms,
    }
}

impl World {
    /// A workspace that was asked for an archive, which goes to the file that comes back.
    fn archiving(&mut self) -> (u64, tempfile::NamedTempFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let write = std::fs::File::options().write(true).open(file.path());
        self.vm.memory_keep(write.unwrap().into()).unwrap();
        assert!(self.ask(archive(1000)).is_none());
        let told = self.hear();
        let ToGuest::Archive {
            number,
            paths,
            exclude,
        } = told
        else {
            panic!("{told:?}")
        };
        assert_eq!(
            (&paths[..], &exclude[..]),
            (&["/root".into()][..], &["/root/not".into()][..])
        );
        (number, file)
    }

    fn piece(&mut self, number: u64, text: &str) -> Option<Result<Value, Error>> {
        use base64::Engine as _;
        let data = base64::engine::general_purpose::STANDARD.encode(text);
        let said = FromGuest::ArchiveData { number, data };
        self.say(&serde_json::to_string(&said).unwrap())
    }
}

#[test]
fn an_archive_is_what_the_guest_says_of_it_in_one_file_while_it_runs_on() {
    let mut w = World::running();
    assert_eq!(code(w.ask(archive(1000))), ErrorCode::Conflict, "no file");
    let (n, file) = w.archiving();
    assert_eq!(code(w.ask(Op::Pause)), ErrorCode::Conflict);
    assert!(
        w.vm.memory_keep(tempfile::tempfile().unwrap().into())
            .is_err()
    );
    assert!(w.piece(n, "one").is_none());
    assert!(w.piece(n - 1, "of another archive").is_none());
    assert!(w.say(r#"{"type":"up","kernel":"6"}"#).is_none());
    assert!(w.piece(n, "two").is_none());
    let done = format!(r#"{{"type":"archive_done","number":{n},"entries":3,"skipped":1}}"#);
    let said = w.say(&done).unwrap().unwrap();
    assert_eq!(said, json!({"bytes": 6, "entries": 3, "skipped": 1}));
    assert!(w.say(&done).is_none() && w.piece(n, "more").is_none());
    assert_eq!(std::fs::read(file.path()).unwrap(), b"onetwo");
    assert_eq!(w.vm.status().vm, VmState::Running);
    // One file, once: until warden has it back there is no other.
    assert_eq!(code(w.ask(archive(1000))), ErrorCode::Conflict);
    assert!(
        w.vm.memory_keep(tempfile::tempfile().unwrap().into())
            .is_err()
    );
    w.vm.memory_drop();
    assert!(w.archiving().0 > n);
}

#[test]
fn more_than_a_guest_may_say_unasked_is_an_archive() {
    let mut w = World::running();
    w.vm.memory_keep(tempfile::tempfile().unwrap().into())
        .unwrap();
    let all = 3 * crate::limits::AGENT_BUDGET_BYTES;
    let (paths, exclude, wait_ms) = (vec![], vec![], 1000);
    let max_bytes = all as u64;
    assert!(
        w.ask(Op::Archive {
            paths,
            exclude,
            max_bytes,
            wait_ms
        })
        .is_none()
    );
    let ToGuest::Archive { number, .. } = w.hear() else {
        panic!("not asked")
    };
    let piece = "x".repeat(api::agent::ARCHIVE_CHUNK_BYTES);
    for _ in 0..all / piece.len() {
        assert!(w.piece(number, &piece).is_none());
    }
    assert_eq!(code(w.piece(number, &piece)), ErrorCode::StorageFull);
}

#[test]
fn an_archive_that_fails_ends_and_the_workspace_runs_on() {
    let mut w = World::running();
    type Ended = Option<Result<Value, Error>>;
    let mut fails = |end: &mut dyn FnMut(&mut World, u64) -> Ended| {
        let (number, _file) = w.archiving();
        let ended = code(end(&mut w, number));
        assert_eq!(w.hear(), ToGuest::ArchiveStop);
        assert_eq!(w.vm.status().vm, VmState::Running);
        assert!(w.vm.deadline().is_none());
        w.vm.memory_drop();
        ended
    };
    let said = |w: &mut World, message: String| w.say(&message);
    let failed = fails(&mut |w, n| {
        said(
            w,
            format!(r#"{{"type":"archive_failed","number":{n},"message":"no"}}"#),
        )
    });
    assert_eq!(failed, ErrorCode::BadGateway);
    let missing = fails(&mut |w, n| {
        said(
            w,
            format!(r#"{{"type":"archive_failed","number":{n},"path":1,"message":"no"}}"#),
        )
    });
    assert_eq!(missing, ErrorCode::ValidationError);
    let odd = fails(&mut |w, n| {
        said(
            w,
            format!(r#"{{"type":"archive_data","number":{n},"data":"%"}}"#),
        )
    });
    assert_eq!(odd, ErrorCode::BadGateway);
    let late = fails(&mut |w, _| {
        w.now += Duration::from_millis(1001);
        w.vm.on_time(w.now);
        w.answer()
    });
    assert_eq!(late, ErrorCode::Timeout);
    let dropped = fails(&mut |w, _| {
        w.vm.memory_drop();
        w.answer()
    });
    assert_eq!(dropped, ErrorCode::Conflict);

    // A shutdown ends it, and an end of the VM.
    w.archiving();
    assert!(w.ask(Op::Shutdown { grace_ms: 1000 }).unwrap().is_err());
    let mut w = World::running();
    w.archiving();
    let gone = code(w.event(Event::Gone));
    assert_eq!(gone, ErrorCode::VmUnavailable);
}

#[test]
fn an_archive_is_put_back_piece_by_piece_as_the_guest_asks() {
    use base64::Engine as _;
    let mut w = World::running();
    let all: Vec<u8> = (0..api::agent::ARCHIVE_CHUNK_BYTES + 5)
        .map(|n| n as u8)
        .collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &all).unwrap();
    w.vm.memory_keep(std::fs::File::open(file.path()).unwrap().into())
        .unwrap();
    assert!(w.ask(Op::Unarchive { wait_ms: 1000 }).is_none());
    let told = w.hear();
    let ToGuest::Unarchive { number } = told else {
        panic!("{told:?}")
    };
    let next = format!(r#"{{"type":"archive_next","number":{number}}}"#);
    let mut got = Vec::new();
    loop {
        assert!(w.say(&next).is_none());
        let told = w.hear();
        let ToGuest::ArchiveData { number: of, data } = told else {
            panic!("{told:?}")
        };
        assert_eq!(of, number);
        if data.is_empty() {
            break;
        }
        got.extend(
            base64::engine::general_purpose::STANDARD
                .decode(data)
                .unwrap(),
        );
    }
    assert_eq!(got, all);
    let done = format!(r#"{{"type":"archive_done","number":{number},"entries":2,"skipped":0}}"#);
    let said = w.say(&done).unwrap().unwrap();
    assert_eq!(
        said,
        json!({"bytes": all.len(), "entries": 2, "skipped": 0})
    );
    w.vm.memory_drop();
    // A guest that has no room for it says so.
    w.vm.memory_keep(std::fs::File::open(file.path()).unwrap().into())
        .unwrap();
    assert!(w.ask(Op::Unarchive { wait_ms: 1000 }).is_none());
    let ToGuest::Unarchive { number } = w.hear() else {
        panic!("not asked")
    };
    let full = format!(r#"{{"type":"archive_failed","number":{number},"full":true,"message":""}}"#);
    assert_eq!(code(w.say(&full)), ErrorCode::StorageFull);
}
