//! The store, on each database there is.
#![allow(clippy::unwrap_used, unreachable_pub)]

mod common;

use api::ErrorCode;
use common::account_id;
use common::pg::Postgres;
use control::store::{Doc, Inserted, Life, Stage, Store, Workspace};
use model::{HostId, Mode, Power, Resources, RestartPolicy, TtlAction, WorkspaceId};

struct Stores {
    all: Vec<Store>,
    _dir: tempfile::TempDir,
    _pg: Option<Postgres>,
}

async fn stores() -> Stores {
    let dir = tempfile::tempdir().unwrap();
    let mut all = vec![Store::open("sqlite", dir.path()).await.unwrap()];
    let pg = Postgres::start();
    if let Some(pg) = &pg {
        all.push(Store::open(&pg.url(), dir.path()).await.unwrap());
    }
    Stores {
        all,
        _dir: dir,
        _pg: pg,
    }
}

fn workspace(n: u8) -> Workspace {
    Workspace {
        id: WorkspaceId::from_bytes([n; 8]),
        account: account_id(1),
        slug: None,
        idempotency_key: None,
        generation: 1,
        created_ms: 1_000 + u64::from(n),
        doc: Doc {
            name: format!("é \"{n}\"'; DROP TABLE workspaces; --"),
            logo: None,
            mode: Mode::Permanent,
            image: "python-3".into(),
            image_id: "00".repeat(32),
            resources: Resources::default(),
            config: "{}".into(),
            host: HostId::from_bytes([1; 8]),
            stage: Stage::Ready,
            power: Power::Running,
            public_access: false,
            ingress_ports: vec![80],
            restart_policy: RestartPolicy::Always,
            max_restarts: None,
            ttl_s: None,
            ttl_action: TtlAction::Stop,
            ttl_expires_ms: None,
            remove_on_exit: false,
            policy: None,
            token_state: "t".into(),
            creating_under: None,
            outcome_owed: None,
            deletion: None,
            completed_ms: None,
            restarts: 0,
            last_error: None,
            life: Life::default(),
            updated_ms: 0,
        },
    }
}

#[tokio::test]
async fn i24_rows_come_back_as_they_were_and_only_to_their_account() {
    let s = stores().await;
    for store in &s.all {
        let w = Workspace {
            slug: Some("a-slug".into()),
            ..workspace(1)
        };
        assert_eq!(store.workspace_insert(&w, 9).await.unwrap(), Inserted::New);
        for name in [w.id.as_str(), "a-slug"] {
            assert_eq!(store.workspace_get(&w.account, name).await.unwrap(), w);
            let e = store.workspace_get(&account_id(2), name).await.unwrap_err();
            assert_eq!(e.code, ErrorCode::NotFound);
        }
        let list = store.workspace_list(&w.account).await.unwrap();
        assert_eq!(list, std::slice::from_ref(&w));
        assert!(
            store
                .workspace_list(&account_id(2))
                .await
                .unwrap()
                .is_empty()
        );
        assert_eq!(store.workspace_list_all().await.unwrap(), [w]);
    }
}

#[tokio::test]
async fn slugs_and_idempotency_keys_are_an_accounts_own() {
    let s = stores().await;
    for store in &s.all {
        let with = |n: u8, account: u8, slug: &str, key: &str| Workspace {
            account: account_id(account),
            slug: Some(slug.into()),
            idempotency_key: Some(key.into()),
            ..workspace(n)
        };
        let first = with(1, 1, "one", "k");
        store.workspace_insert(&first, 9).await.unwrap();
        let again = store
            .workspace_insert(&with(2, 1, "two", "k"), 9)
            .await
            .unwrap();
        assert_eq!(again, Inserted::Existing(Box::new(first)));
        let e = store
            .workspace_insert(&with(3, 1, "one", "k3"), 9)
            .await
            .unwrap_err();
        assert_eq!(e.code, ErrorCode::Conflict);
        store
            .workspace_insert(&with(4, 2, "one", "k"), 9)
            .await
            .unwrap();
        // Those without a slug or key do not collide.
        store.workspace_insert(&workspace(5), 9).await.unwrap();
        store.workspace_insert(&workspace(6), 9).await.unwrap();
    }
}

#[tokio::test]
async fn the_limit_holds_against_concurrent_inserts() {
    let s = stores().await;
    for store in &s.all {
        let tries = (0..12u8).map(|n| {
            let store = store.clone();
            tokio::spawn(async move { store.workspace_insert(&workspace(n), 5).await })
        });
        let mut made = 0;
        for one in tries.collect::<Vec<_>>() {
            match one.await.unwrap() {
                Ok(_) => made += 1,
                Err(e) => assert_eq!(e.code, ErrorCode::SandboxLimitReached),
            }
        }
        assert_eq!(made, 5);
    }
}

#[tokio::test]
async fn concurrent_changes_are_all_made_and_grow_the_generation() {
    let s = stores().await;
    for store in &s.all {
        let w = workspace(1);
        store.workspace_insert(&w, 9).await.unwrap();
        let changes = (0..10u16).map(|n| {
            let (store, w) = (store.clone(), w.clone());
            tokio::spawn(async move {
                let add = |w: &mut Workspace| {
                    w.doc.ingress_ports.push(1_000 + n);
                    Ok(())
                };
                store.workspace_update(&w, 7, add).await
            })
        });
        let mut done = 0;
        for change in changes.collect::<Vec<_>>() {
            match change.await.unwrap() {
                Ok(_) => done += 1,
                Err(e) => assert_eq!(e.code, ErrorCode::Conflict),
            }
        }
        let now = store
            .workspace_get(&w.account, w.id.as_str())
            .await
            .unwrap();
        assert_eq!(now.doc.ingress_ports.len(), 1 + done);
        assert_eq!(now.generation, 1 + done as u64);
        assert_eq!(now.doc.updated_ms, 7);
        // A change that changes nothing is none.
        let same = store.workspace_update(&now, 9, |_| Ok(())).await.unwrap();
        assert_eq!(same, now);
    }
}

#[tokio::test]
async fn of_what_is_erased_only_the_receipt_stays() {
    let s = stores().await;
    for store in &s.all {
        let w = workspace(1);
        store.workspace_insert(&w, 9).await.unwrap();
        for _ in 0..2 {
            store.workspace_erase(&w, Some("receipt"), 5).await.unwrap();
        }
        let e = store
            .workspace_get(&w.account, w.id.as_str())
            .await
            .unwrap_err();
        assert_eq!(e.code, ErrorCode::NotFound);
        let kept = store.erasure_get(&w.account, w.id.as_str()).await.unwrap();
        assert_eq!((kept.receipt.as_str(), kept.time_ms), ("receipt", 5));
        assert!(
            store
                .erasure_get(&account_id(2), w.id.as_str())
                .await
                .is_err()
        );
        // A change that comes too late finds nothing.
        let e = store.workspace_update(&w, 9, |w| {
            w.slug = Some("x".into());
            Ok(())
        });
        assert_eq!(e.await.unwrap_err().code, ErrorCode::NotFound);
    }
}

/// SEE-5: what was deleted is not in the file either.
#[tokio::test]
async fn sqlite_overwrites_what_is_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open("sqlite", dir.path()).await.unwrap();
    let mut w = workspace(1);
    w.doc.config = "marker-of-a-secret-variable".repeat(3);
    store.workspace_insert(&w, 9).await.unwrap();
    store.workspace_erase(&w, None, 1).await.unwrap();
    store.close().await;
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        assert!(!bytes.windows(16).any(|w| w == b"marker-of-a-secr"));
    }
}
