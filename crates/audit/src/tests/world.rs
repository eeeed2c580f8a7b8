//! The processes over their sockets.

use crate::testing::{World, append, entry, wait_for};
use api::ErrorCode;
use api::audit::{Class as ApiClass, Stamped};
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
