//! The processes over their sockets.

use crate::testing::{World, append, entry, wait_for};
use api::ErrorCode;
use api::audit::{Class as ApiClass, DayKey, LogHead, Op, ReadEntries, ReadOp, Stamped};
use api::rpc::Client;
use service::rpc::Uids;
use tlog::class::Class;
use tlog::receipt::Receipt;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_becomes_durable_public_and_provable() {
    let mut w = World::new();
    w.start().await;
    let client = w.client();
    let first = append(&client, ApiClass::Host, entry("a.b", None), false)
        .await
        .unwrap();
    assert_eq!((first.index, first.receipt.is_none()), (0, true));
    let second = append(&client, ApiClass::Host, entry("a.c", Some(1)), true)
        .await
        .unwrap();
    assert_eq!(second.index, 1);
    let receipt: Receipt = serde_json::from_value(second.receipt.unwrap()).unwrap();
    let verified = receipt
        .verify(&w.log_key, "casemate.local/local/host")
        .unwrap();
    let stamped: Stamped = serde_json::from_slice(&verified.payload).unwrap();
    assert_eq!(stamped.process, "control");
    assert_eq!(stamped.entry, entry("a.c", Some(1)));
    assert_eq!(
        (verified.time_ms, verified.account_seq),
        (w.clock.now_ms(), 0)
    );

    let report = w.verify(Class::Host);
    assert!(report.is_clean(), "{:?}", report.faults);
    assert_eq!((report.entries, report.accounts), (2, 2));
    // What nobody waits for is integrated soon as well.
    append(&client, ApiClass::Api, entry("x", None), false)
        .await
        .unwrap();
    wait_for(|| w.verify(Class::Api).entries == 1).await;
    for class in Class::ALL {
        assert!(w.verify(class).is_clean(), "{class}");
    }
    for ended in w.stop().await {
        ended.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_numbers_on() {
    let mut w = World::new();
    for round in 0..3u64 {
        w.start().await;
        let client = w.client();
        for i in 0..5u64 {
            let done = append(&client, ApiClass::Flow, entry("e", Some(2)), i == 4)
                .await
                .unwrap();
            assert_eq!(done.index, round * 5 + i);
        }
        w.stop().await;
    }
    let report = w.verify(Class::Flow);
    assert!(report.is_clean(), "{:?}", report.faults);
    assert_eq!((report.entries, report.accounts), (15, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_days_key_nothing_is_appended() {
    let mut w = World::new();
    w.start().await;
    let client = w.client();
    w.clock
        .set_ms(crate::testing::TIME_MS + 11 * crate::testing::DAY_MS);
    let e = append(&client, ApiClass::Host, entry("a", None), false)
        .await
        .unwrap_err();
    assert_eq!(e.code, ErrorCode::AuditUnavailable);
    w.clock.set_ms(crate::testing::TIME_MS);
    assert_eq!(
        append(&client, ApiClass::Host, entry("a", None), false)
            .await
            .unwrap()
            .index,
        0
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_kms_publishes_keys() {
    let public = seal::hpke::SecretKey::generate().public().to_hex();
    let day = |day, public: &str| DayKey {
        class: ApiClass::Host,
        day,
        public: public.into(),
    };
    let account = model::AccountId::from_bytes([1; 8]);
    let ops = || {
        let account = account.clone();
        [
            Op::DayKeys {
                keys: vec![day(20_020, &public)],
            },
            Op::AccountKey {
                account,
                public: public.clone(),
            },
        ]
    };
    let mut w = World::new();
    w.start().await;
    for op in ops() {
        let e = w.client().call::<_, bool>("r", &op).await.unwrap_err();
        assert_eq!(e.code, ErrorCode::Forbidden);
    }
    w.stop().await;
    w.me = "kms";
    w.start().await;
    let client = w.client();
    for op in ops() {
        assert!(client.call::<_, bool>("r", &op).await.unwrap());
        assert!(
            client.call::<_, bool>("r", &op).await.unwrap(),
            "idempotent"
        );
    }
    for op in [
        Op::DayKeys {
            keys: vec![day(1, "00")],
        },
        Op::DayKeys {
            keys: vec![day(1, &"00".repeat(32))],
        },
        Op::DayKeys {
            keys: (0..2_001).map(|d| day(d, &public)).collect(),
        },
    ] {
        let e = client.call::<_, bool>("r", &op).await.unwrap_err();
        assert_eq!(e.code, ErrorCode::ValidationError);
    }
    // The keys are kept, and used at once.
    w.stop().await;
    w.start().await;
    w.clock.set_ms(20_020 * crate::testing::DAY_MS);
    let done = append(&w.client(), ApiClass::Host, entry("a", Some(1)), true)
        .await
        .unwrap();
    let receipt: Receipt = serde_json::from_value(done.receipt.unwrap()).unwrap();
    use base64::Engine as _;
    let leaf = base64::engine::general_purpose::STANDARD
        .decode(receipt.leaf)
        .unwrap();
    let leaf = tlog::leaf::Leaf::decode(&leaf).unwrap();
    assert_eq!((leaf.day, leaf.wrap_account.len()), (20_020, 80));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_entries_are_refused_by_the_name_of_their_field() {
    let mut w = World::new();
    w.start().await;
    let client = w.client();
    let long = "x".repeat(300);
    type Change = fn(&mut api::audit::Entry, &str);
    let changes: [(&str, Change); 8] = [
        ("event", |e, long| e.event = long.into()),
        ("event", |e, _| e.event.clear()),
        ("event", |e, _| e.event = "a\nb".into()),
        ("actor", |e, long| e.actor = long.into()),
        ("actor", |e, _| e.actor.clear()),
        ("request_id", |e, long| e.request_id = long.into()),
        ("subject", |e, long| e.subject = Some(long.into())),
        ("result", |e, long| e.result = Some(long.into())),
    ];
    for (field, change) in changes {
        let mut bad = entry("a", None);
        change(&mut bad, &long);
        let e = append(&client, ApiClass::Api, bad, false)
            .await
            .unwrap_err();
        assert_eq!(e.code, ErrorCode::ValidationError, "{field}");
        assert!(e.message.contains(field), "{field}: {}", e.message);
    }
    let mut large = entry("a", None);
    large.authority = Some("x".repeat(33 << 10));
    let e = append(&client, ApiClass::Api, large, false)
        .await
        .unwrap_err();
    assert_eq!(e.code, ErrorCode::TooLarge);
    // The protocol has no read, no class of one's own, and no name of one's own.
    let good = serde_json::to_value(entry("a", None)).unwrap();
    for op in [
        serde_json::json!({ "op": "read", "class": "host", "from": 0 }),
        serde_json::json!({ "op": "append", "class": "other", "entry": good, "want_receipt": false }),
        serde_json::json!({ "op": "append", "class": "host", "entry": good, "want_receipt": false, "process": "kms" }),
        serde_json::json!({ "op": "append", "class": "host", "entry": { "process": "kms", "entry": good }, "want_receipt": false }),
    ] {
        let e = client
            .call::<_, serde_json::Value>("r", &op)
            .await
            .unwrap_err();
        assert_eq!(e.code, ErrorCode::BadRequest, "{op}");
    }
    assert_eq!(
        append(&client, ApiClass::Api, entry("a", None), false)
            .await
            .unwrap()
            .index,
        0
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_that_go_away_or_are_nobody_harm_no_one() {
    use std::io::Write as _;
    let mut w = World::new();
    w.start().await;
    let socket = w.paths.socket(crate::append::PROCESS, "append");
    for junk in [
        &b""[..],
        b"\0",
        b"\0\0\0\x02{}",
        b"\xff\xff\xff\xff",
        b"GET / HTTP/1.1\r\n\r\n",
    ] {
        let mut s = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        s.write_all(junk).unwrap();
    }
    // Whole requests, and gone before the answer.
    for _ in 0..20 {
        let mut s = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        let body = Op::Append {
            class: ApiClass::Host,
            entry: Box::new(entry("a", None)),
            want_receipt: true,
        };
        let request = api::rpc::Request {
            v: 1,
            id: 1,
            request_id: "r".into(),
            body,
        };
        s.write_all(&api::rpc::encode(&request).unwrap()).unwrap();
    }
    let done = append(&w.client(), ApiClass::Host, entry("b", None), true)
        .await
        .unwrap();
    assert!(done.receipt.is_some());
    w.stop().await;
    assert!(w.verify(Class::Host).is_clean());
    w.me = "watch";
    w.start().await;
    let e = append(&w.client(), ApiClass::Host, entry("a", None), false)
        .await
        .unwrap_err();
    assert_eq!(e.code, ErrorCode::Unavailable, "a uid that is nobody's");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_back_of_the_clock_is_recorded_and_no_time_used_twice() {
    let mut w = World::new();
    w.start().await;
    let client = w.client();
    let first = append(&client, ApiClass::Host, entry("a", None), false)
        .await
        .unwrap();
    w.clock.set_ms(crate::testing::TIME_MS - 600);
    append(&client, ApiClass::Host, entry("a", None), false)
        .await
        .unwrap();
    w.clock.set_ms(crate::testing::TIME_MS - 600_000);
    let later = append(&client, ApiClass::Host, entry("a", None), true)
        .await
        .unwrap();
    assert_eq!(
        (first.time_ms, later.time_ms),
        (crate::testing::TIME_MS, crate::testing::TIME_MS)
    );
    assert_eq!(later.index, 2);
    let after = append(&client, ApiClass::Host, entry("a", None), true)
        .await
        .unwrap();
    assert_eq!(
        after.index, 4,
        "one entry of the log's own says that the clock stepped back"
    );
    assert!(w.verify(Class::Host).is_clean());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reading_is_logged_first_and_opens_by_the_kms() {
    let mut w = World::new();
    w.start().await;
    w.start_read().await;
    let reader = Client::new(w.paths.socket(crate::read::PROCESS, "read"));
    let client = w.client();
    for i in 0..10 {
        append(&client, ApiClass::Host, entry("a.b", Some(i % 3)), i == 9)
            .await
            .unwrap();
    }
    let read = |from, count, reason: &str| ReadOp::Entries {
        class: ApiClass::Host,
        from,
        count,
        reason: reason.into(),
    };
    let head: LogHead = reader
        .call(
            "r",
            &ReadOp::Head {
                class: ApiClass::Host,
            },
        )
        .await
        .unwrap();
    assert_eq!(head.size, 10);
    let page: ReadEntries = reader.call("r", &read(2, 256, "look")).await.unwrap();
    assert_eq!(page.entries.len(), 8);
    assert!(
        page.sealed.is_some()
            && page
                .entries
                .iter()
                .all(|e| e.stamped.is_none() && e.leaf.is_some())
    );
    w.start_kms();
    let page: ReadEntries = reader.call("r", &read(2, 3, "look again")).await.unwrap();
    let whats: Vec<_> = page
        .entries
        .iter()
        .map(|e| (e.index, e.stamped.clone().unwrap().entry))
        .collect();
    assert_eq!(whats[0], (2, entry("a.b", Some(2))));
    assert_eq!((whats.len(), page.sealed), (3, None));
    let page: ReadEntries = reader.call("r", &read(10, 1, "beyond")).await.unwrap();
    assert!(page.entries.is_empty());
    for (from, count, reason) in [
        (0, 0, "x"),
        (0, 257, "x"),
        (0, 1, " "),
        (0, 1, &*"x".repeat(257)),
    ] {
        let e = reader
            .call::<_, ReadEntries>("r", &read(from, count, reason))
            .await
            .unwrap_err();
        assert_eq!(e.code, ErrorCode::ValidationError);
    }
    // Three reads, three entries, before what was read was given.
    wait_for(|| w.verify(Class::Security).entries == 3).await;
    let op = ReadOp::Entries {
        class: ApiClass::Security,
        from: 0,
        count: 9,
        reason: "who read?".into(),
    };
    let page: ReadEntries = reader.call("r", &op).await.unwrap();
    let stamped = page.entries[0].stamped.clone().unwrap();
    assert_eq!(stamped.entry.event, "audit.read");
    assert_eq!(stamped.entry.subject.as_deref(), Some("host"));
    assert_eq!(stamped.entry.data["reason"], "look");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_log_nothing_is_read_and_strangers_read_nothing() {
    let mut w = World::new();
    w.start_read().await;
    let reader = Client::new(w.paths.socket(crate::read::PROCESS, "read"));
    let op = ReadOp::Entries {
        class: ApiClass::Host,
        from: 0,
        count: 1,
        reason: "x".into(),
    };
    let e = reader.call::<_, ReadEntries>("r", &op).await.unwrap_err();
    assert_eq!(e.code, ErrorCode::AuditUnavailable);
    w.stop().await;
    w.reader = "control";
    w.start_read().await;
    let e = reader.call::<_, ReadEntries>("r", &op).await.unwrap_err();
    assert_eq!(e.code, ErrorCode::Unavailable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_integrate_entries_are_durable_but_have_no_receipt() {
    let mut w = World::new();
    w.start_integrate().await;
    w.start_append().await;
    let client = w.client();
    append(&client, ApiClass::Host, entry("a", None), true)
        .await
        .unwrap();
    w.stop_first().await;
    append(&client, ApiClass::Host, entry("b", None), false)
        .await
        .unwrap();
    let e = append(&client, ApiClass::Host, entry("c", None), true)
        .await
        .unwrap_err();
    assert_eq!(e.code, ErrorCode::AuditUnavailable);
    w.start_integrate().await;
    append(&client, ApiClass::Host, entry("d", None), true)
        .await
        .unwrap();
    let report = w.verify(Class::Host);
    assert!(report.is_clean(), "{:?}", report.faults);
    assert_eq!(report.entries, 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn append_does_not_start_behind_what_is_published() {
    let mut w = World::new();
    w.start().await;
    append(&w.client(), ApiClass::Host, entry("a", None), true)
        .await
        .unwrap();
    w.stop().await;
    std::fs::remove_dir_all(crate::append::segments_dir(&w.paths, Class::Host)).unwrap();
    w.start().await;
    let ended = w.stop().await.remove(0);
    let e = format!("{:#}", ended.unwrap_err());
    assert!(
        e.contains("the segments end at entry 0, the published log at 1"),
        "{e}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_process_on_the_same_log_is_refused() {
    let mut w = World::new();
    w.start().await;
    for ended in [
        crate::append::run(
            &w.paths,
            Uids::from_map([].into()),
            w.clock.clone(),
            stopped(),
        )
        .await,
        crate::integrate::run(&w.paths, &w.config, Uids::from_map([].into()), stopped()).await,
    ] {
        assert!(format!("{:#}", ended.unwrap_err()).contains("held by another process"));
    }
    append(&w.client(), ApiClass::Host, entry("a", None), true)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_callers_get_their_own_receipts() {
    let mut w = World::new();
    w.start().await;
    let client = w.client();
    let calls: Vec<_> = (0..600u64)
        .map(|i| {
            let client = client.clone();
            tokio::spawn(async move {
                let mut e = entry("a", Some((i % 5) as u8));
                e.subject = Some(format!("n{i}"));
                (
                    i,
                    append(&client, ApiClass::Host, e, i % 2 == 0)
                        .await
                        .unwrap(),
                )
            })
        })
        .collect();
    let mut indexes = std::collections::BTreeSet::new();
    for call in calls {
        let (i, done) = call.await.unwrap();
        assert!(indexes.insert(done.index));
        assert_eq!(done.receipt.is_some(), i % 2 == 0);
        let Some(receipt) = done.receipt else {
            continue;
        };
        let receipt: Receipt = serde_json::from_value(receipt).unwrap();
        let verified = receipt
            .verify(&w.log_key, "casemate.local/local/host")
            .unwrap();
        let stamped: Stamped = serde_json::from_slice(&verified.payload).unwrap();
        assert_eq!(stamped.entry.subject.unwrap(), format!("n{i}"));
    }
    assert_eq!((indexes.len(), indexes.last()), (600, Some(&599)));
    wait_for(|| w.verify(Class::Host).entries == 600).await;
    assert!(w.verify(Class::Host).is_clean());
    let metrics = w.paths.socket(crate::append::PROCESS, "metrics");
    let text = metrics_read(&metrics);
    assert!(
        text.contains("casemate_audit_entries_total{class=\"host\"} 600"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_growing_log_verifies_at_any_time() {
    let mut w = World::new();
    w.start().await;
    let client = w.client();
    let grow = tokio::spawn(async move {
        for i in 0..700u64 {
            append(
                &client,
                ApiClass::Host,
                entry("a", Some((i % 3) as u8)),
                i % 7 == 0,
            )
            .await
            .unwrap();
        }
    });
    while !grow.is_finished() {
        let report = w.verify(Class::Host);
        assert!(report.is_clean(), "{:?}", report.faults);
        tokio::task::yield_now().await;
    }
    grow.await.unwrap();
}

fn stopped() -> tokio::sync::watch::Receiver<bool> {
    tokio::sync::watch::channel(true).1
}

fn metrics_read(socket: &std::path::Path) -> String {
    use std::io::{Read as _, Write as _};
    let mut s = std::os::unix::net::UnixStream::connect(socket).unwrap();
    s.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .unwrap();
    let mut text = String::new();
    s.read_to_string(&mut text).unwrap();
    text
}
