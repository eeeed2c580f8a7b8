#![allow(clippy::unwrap_used)]
use super::*;
use seal::sign::SigningKey;

const NET: GuestNet = GuestNet {
    base: Ipv4Addr::new(10, 117, 0, 0),
    port: 9991,
};

struct World {
    key: SigningKey,
    table: Arc<Table>,
    ws: WorkspaceId,
}

fn world() -> World {
    let key = SigningKey::from_seed(&[1; 32]);
    let table = Table::new(key.public(), NET);
    table.heard(Source::Mint, 1);
    table.heard(Source::Host, 1);
    World {
        key,
        table,
        ws: WorkspaceId::from_bytes([1; 8]),
    }
}

impl World {
    fn state(&self, seq: u64, epoch: u64) -> TokenState {
        TokenState {
            workspace: self.ws.clone(),
            account: AccountId::from_bytes([2; 8]),
            epoch,
            raw_hash: String::new(),
            enabled: true,
            gone: false,
            identity_pub: SigningKey::from_seed(&[3; 32]).public().to_hex(),
            seq,
        }
    }

    fn give(&self, state: &TokenState) {
        let signed = Signed::new(&self.key, context::TOKEN_STATE, state);
        self.table.token_state(signed.as_str());
    }

    fn place(&self, state: ActualState, start: u8, public_access: bool, ip: &str) {
        let actual = Actual {
            workspace: self.ws.clone(),
            generation: 1,
            state,
            start_id: Some(StartId::from_bytes([start; 8])),
            ip: Some(ip.into()),
            public_access,
            since_ms: None,
            started_from: None,
            memory: false,
            wakes: false,
            wanted: false,
            snapshot: None,
            archived: None,
            error: None,
        };
        self.table.actual(actual, 1, false);
    }

    fn run(&self) {
        self.place(ActualState::Running, 1, true, "10.117.0.2");
    }

    fn admit(&self, epoch: u64) -> Result<(Route, Live), ErrorCode> {
        let claims = GatewayClaims {
            iss: "casemate".into(),
            sub: AccountId::from_bytes([2; 8]).to_string(),
            aud: self.ws.to_string(),
            iat: 0,
            exp: 0,
            jti: String::new(),
            epoch,
        };
        self.table.admit(&self.ws, &claims).map_err(|e| e.code)
    }

    fn check(&self, epoch: u64, want: ErrorCode) {
        assert_eq!(self.admit(epoch).map(|_| ()), Err(want));
    }
}

#[tokio::test]
async fn each_layer_refuses_by_itself() {
    let w = world();
    w.check(1, ErrorCode::NotFound);
    w.give(&w.state(1, 1));
    w.check(1, ErrorCode::NetworkBlocked);
    w.check(0, ErrorCode::Unauthorized);
    w.place(ActualState::Running, 1, false, "10.117.0.2");
    w.check(1, ErrorCode::NetworkBlocked);
    w.place(ActualState::Paused, 1, true, "10.117.0.2");
    w.check(1, ErrorCode::VmNotRunning);
    w.place(ActualState::Running, 1, true, "10.118.0.2");
    w.check(1, ErrorCode::Unavailable);
    w.place(ActualState::Running, 1, true, "127.0.0.1");
    w.check(1, ErrorCode::Unavailable);
    w.run();
    assert!(w.admit(1).is_ok() && w.admit(2).is_ok());
    w.give(&TokenState {
        enabled: false,
        ..w.state(2, 2)
    });
    w.check(2, ErrorCode::Forbidden);
    w.give(&TokenState {
        gone: true,
        ..w.state(3, 2)
    });
    w.check(2, ErrorCode::NotFound);
    w.table.lost(Source::Host);
    w.check(2, ErrorCode::Unavailable);
}

#[tokio::test]
async fn token_states_never_go_back() {
    let w = world();
    w.run();
    w.give(&w.state(5, 5));
    w.give(&w.state(4, 1));
    w.give(&w.state(6, 4));
    w.check(4, ErrorCode::Unauthorized);
    let forged = Signed::new(
        &SigningKey::generate(),
        context::TOKEN_STATE,
        &w.state(9, 9),
    );
    w.table.token_state(forged.as_str());
    let other_kind = Signed::new(&w.key, context::POLICY, &w.state(9, 9));
    w.table.token_state(other_kind.as_str());
    w.table.token_state("nonsense");
    assert!(w.admit(5).is_ok());
}

#[tokio::test]
async fn changes_cut_what_they_close_and_nothing_else() {
    let w = world();
    w.run();
    w.give(&w.state(1, 1));
    let (_, old) = w.admit(1).unwrap();
    let (_, new) = w.admit(2).unwrap();
    let connection = CancellationToken::new();
    old.on(connection.clone());
    w.give(&w.state(2, 2));
    assert!(old.cut().is_cancelled() && connection.is_cancelled());
    assert!(!new.cut().is_cancelled());
    new.answered();
    w.place(ActualState::Paused, 1, true, "10.117.0.2");
    assert!(!new.cut().is_cancelled(), "a pause keeps answers under way");
    w.place(ActualState::Running, 2, true, "10.117.0.2");
    assert!(new.cut().is_cancelled(), "another start");
    let (_, third) = w.admit(2).unwrap();
    w.place(ActualState::Running, 2, false, "10.117.0.2");
    assert!(third.cut().is_cancelled(), "dark");
    let late = CancellationToken::new();
    drop(old);
    assert_eq!(w.table.counts(), (2, 3));
    third.on(late.clone());
    drop((new, third));
    assert_eq!(w.table.counts().0, 0);
}

#[tokio::test]
async fn a_workspace_has_bounded_room() {
    let w = world();
    w.run();
    w.give(&w.state(1, 1));
    let held: Vec<_> = (0..GUEST_IN_FLIGHT_MAX)
        .map(|_| w.admit(1).unwrap())
        .collect();
    w.check(1, ErrorCode::RateLimited);
    drop(held);
    assert!(w.admit(1).is_ok());
}

#[tokio::test]
async fn what_a_full_read_does_not_name_is_gone() {
    let w = world();
    w.run();
    w.give(&w.state(1, 1));
    let (_, live) = w.admit(1).unwrap();
    w.table.only(Source::Mint, &HashSet::new());
    assert!(live.cut().is_cancelled());
    w.check(1, ErrorCode::NotFound);
    w.table.only(Source::Host, &HashSet::new());
    drop(live);
    assert!(w.table.lock().entries.is_empty());
}

#[tokio::test]
async fn guests_are_told_once_per_start_and_state() {
    let w = world();
    w.run();
    w.give(&w.state(1, 1));
    let push = w.table.to_tell(8);
    assert_eq!(push.len(), 1);
    assert!(w.table.to_tell(8).is_empty(), "one at a time");
    w.table.told(&push[0], false);
    let push = w.table.to_tell(8);
    w.table.told(&push[0], true);
    assert!(w.table.to_tell(8).is_empty());
    w.give(&w.state(2, 2));
    let push = w.table.to_tell(8);
    assert_eq!(push[0].seq, 2);
    w.table.told(&push[0], true);
    w.place(ActualState::Running, 9, true, "10.117.0.2");
    assert_eq!(w.table.to_tell(8).len(), 1, "a new start");
}

/// As if a feed had last been heard so long ago.
fn age(table: &Table, source: Source, by: std::time::Duration) {
    let mut inner = table.lock();
    let feed = inner.feeds.get_mut(&source).unwrap();
    feed.heard = feed.heard.map(|t| t.checked_sub(by).unwrap());
    feed.lost_since = feed.lost_since.map(|t| t.checked_sub(by).unwrap());
}

#[tokio::test]
async fn a_silent_feed_is_stale_and_a_lost_one_cuts() {
    let w = world();
    w.run();
    w.give(&w.state(1, 1));
    let (_, live) = w.admit(1).unwrap();
    age(&w.table, Source::Mint, FEED_STALE_MAX * 2);
    w.check(1, ErrorCode::Unavailable);
    w.table.heard(Source::Mint, 1);
    w.table.heard(Source::Host, 1);
    assert!(w.admit(1).is_ok());
    w.table.lost(Source::Mint);
    assert!(
        !live.cut().is_cancelled(),
        "a restart of mint breaks nothing"
    );
    age(&w.table, Source::Mint, FEED_LOST_CUT * 2);
    w.table.lost(Source::Mint);
    assert!(live.cut().is_cancelled());
}

#[tokio::test]
async fn an_older_answer_of_host_changes_nothing() {
    let w = world();
    w.give(&w.state(1, 1));
    w.run();
    let dark = || Actual {
        workspace: w.ws.clone(),
        generation: 1,
        state: ActualState::Running,
        start_id: Some(StartId::from_bytes([1; 8])),
        ip: Some("10.117.0.2".into()),
        public_access: false,
        since_ms: None,
        started_from: None,
        memory: false,
        wakes: false,
        wanted: false,
        snapshot: None,
        archived: None,
        error: None,
    };
    w.table.actual(dark(), 7, false);
    w.run();
    w.check(1, ErrorCode::NetworkBlocked);
    // A host that counts anew is believed.
    let open = Actual {
        public_access: true,
        ..dark()
    };
    w.table.actual(open, 2, true);
    assert!(w.admit(1).is_ok());
}

#[tokio::test]
async fn a_paused_workspace_refuses_and_cuts_what_was_not_answered() {
    let w = world();
    w.give(&w.state(1, 1));
    w.run();
    let (_, waiting) = w.admit(1).unwrap();
    let (_, streaming) = w.admit(1).unwrap();
    streaming.answered();
    w.place(ActualState::Paused, 1, true, "10.117.0.2");
    assert!(waiting.cut().is_cancelled() && !streaming.cut().is_cancelled());
    let claims_refused = w.admit(1).map(|_| ());
    assert_eq!(claims_refused, Err(ErrorCode::VmNotRunning));
    w.run();
    assert!(w.admit(1).is_ok() && !streaming.cut().is_cancelled());
}

#[tokio::test]
async fn what_was_used_is_told_once_and_what_is_used_again_and_again() {
    let w = world();
    w.give(&w.state(1, 1));
    w.run();
    assert!(w.table.used_take(10).is_empty());
    let (_, live) = w.admit(1).unwrap();
    assert_eq!(w.table.used_take(10), std::slice::from_ref(&w.ws));
    assert!(w.table.used_take(10).is_empty());
    // It goes on; and what nobody heard is told again.
    w.table.used_note_live();
    let told = w.table.used_take(10);
    drop(live);
    w.table.used_return(told);
    assert_eq!(w.table.used_take(10), std::slice::from_ref(&w.ws));
    w.table.used_note_live();
    assert!(w.table.used_take(10).is_empty());
    w.table.used_return(vec![WorkspaceId::from_bytes([9; 8])]);
    assert!(w.table.used_take(10).is_empty(), "unknown");
}
