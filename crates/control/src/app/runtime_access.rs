//! Tokens of a workspace's runtime API. Mint makes and checks them; control announces, asks, and
//! passes on. Each one that is handed out leaves an entry.

use super::workspace::{token_state_check, workspace_for_act, workspace_get};
use super::{App, timed};
use crate::audit::Act;
use crate::op::Op;
use crate::store::Workspace;
use api::host::{Actual, ActualState};
use api::mint::{Gateway, Raw, Signed, TokenState};
use api::{Error, ErrorCode, mint};

/// Whether the runtime API is on, and answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// It is on.
    pub enabled: bool,
    /// The workspace runs.
    pub running: bool,
}

/// A raw token and where it is used.
pub struct RawAccess {
    /// The token.
    pub token: String,
    /// The guest's address, while it runs.
    pub ip: Option<String>,
}

/// Whether the runtime API is on.
///
/// # Errors
/// [`ErrorCode::NotFound`], for another account's too.
pub async fn access_get(app: &App, op: &Op, name: &str) -> api::Result<Access> {
    let (w, actual) = workspace_get(app, op, name).await?;
    let enabled = token_state(app, op, &w).await?.enabled;
    let running = actual.is_some_and(|a| a.state == ActualState::Running);
    Ok(Access {
        enabled,
        running: enabled && running,
    })
}

/// Turns the runtime API on; returns a gateway token.
///
/// # Errors
/// [`ErrorCode::VmNotRunning`] if the workspace does not run, sleep, or wake on a request.
pub async fn access_enable(app: &App, op: &Op, name: &str) -> api::Result<Gateway> {
    let w = workspace_for_act(app, op, name).await?;
    let serves =
        |a: &Actual| a.wakes || matches!(a.state, ActualState::Running | ActualState::Asleep);
    let runs = |a: Option<Actual>| a.as_ref().is_some_and(serves);
    // What is known may be old, but only ask when it says no: a token alone opens nothing.
    if !runs(app.actual_known(&w.id)) && !runs(app.actual(op, &w.id).await) {
        return Err(Error::new(
            ErrorCode::VmNotRunning,
            "the workspace does not run; start it first",
        ));
    }
    let act = Act::new("runtime_access.enable", &w.account, w.id.as_str());
    timed(op, "intent", app.audit.intent(op, &act)).await?;
    // Neither needs the other: enabling ends no token.
    let asked = async {
        tokio::try_join!(
            enable_ask(app, op, &w, true),
            gateway_ask(app, op, &w, false)
        )
    };
    let done = timed(op, "mint", asked).await;
    let noted = async {
        match &done {
            Ok((state, gateway)) => {
                state_note(app, &w, state.clone()).await?;
                state_note(app, &w, gateway.state.clone()).await
            }
            Err(_) => Ok(()),
        }
    };
    let (noted, ()) = timed(op, "note", async {
        tokio::join!(noted, app.audit.outcome(op, &act, &done))
    })
    .await;
    noted?;
    done.map(|(_, gateway)| gateway)
}

/// Turns the runtime API off: every token and stream ends. A closing act.
///
/// # Errors
/// Mint's.
pub async fn access_disable(app: &App, op: &Op, name: &str) -> api::Result<()> {
    let w = workspace_for_act(app, op, name).await?;
    let act = Act::new("runtime_access.disable", &w.account, w.id.as_str());
    app.audit.intent_closing(op, &act).await;
    let done = enabled_set(app, op, &w, false).await;
    app.audit.outcome(op, &act, &done).await;
    done
}

/// A gateway token, and whether the runtime API is on; with `rotate`, every earlier token ends
/// first, the raw connection token too: the contract has one call to rotate by.
///
/// # Errors
/// Mint's.
pub async fn token_get(
    app: &App,
    op: &Op,
    name: &str,
    rotate: bool,
) -> api::Result<(Gateway, bool)> {
    let w = workspace_for_act(app, op, name).await?;
    let event = if rotate {
        "runtime_access.token_rotate"
    } else {
        "runtime_access.token"
    };
    let act = Act::new(event, &w.account, w.id.as_str());
    app.audit.intent(op, &act).await?;
    let done = async {
        if rotate {
            raw_token(app, op, &w, true).await?;
        }
        gateway_token(app, op, &w, rotate).await
    }
    .await;
    app.audit.outcome(op, &act, &done).await;
    let gateway = done?;
    let enabled = token_state_check(app, &w, &gateway.state)?.enabled;
    Ok((gateway, enabled))
}

/// The raw connection token.
///
/// # Errors
/// Mint's.
pub async fn token_raw(app: &App, op: &Op, name: &str) -> api::Result<RawAccess> {
    let w = workspace_for_act(app, op, name).await?;
    let act = Act::new("runtime_access.token_raw", &w.account, w.id.as_str());
    app.audit.intent(op, &act).await?;
    let done = raw_token(app, op, &w, false).await;
    app.audit.outcome(op, &act, &done).await;
    let raw = done?;
    let ip = app.actual(op, &w.id).await.and_then(|a| a.ip);
    Ok(RawAccess {
        token: raw.token,
        ip,
    })
}

async fn token_state(app: &App, op: &Op, w: &Workspace) -> api::Result<TokenState> {
    let ask = mint::Op::TokenState {
        workspace: w.id.clone(),
    };
    let state: Signed = app.peers.mint.call(&op.request_id, &ask).await?;
    token_state_check(app, w, &state.signed)
}

async fn enabled_set(app: &App, op: &Op, w: &Workspace, enabled: bool) -> api::Result<()> {
    let state = enable_ask(app, op, w, enabled).await?;
    state_note(app, w, state).await
}

/// Has mint turn it on or off; answers the token state.
async fn enable_ask(app: &App, op: &Op, w: &Workspace, enabled: bool) -> api::Result<String> {
    let (_, assertion) = op.client()?;
    let ask = mint::Op::RuntimeEnable {
        assertion: assertion.to_owned(),
        workspace: w.id.clone(),
        enabled,
    };
    let state: Signed = app.peers.mint.call(&op.request_id, &ask).await?;
    Ok(state.signed)
}

async fn gateway_token(app: &App, op: &Op, w: &Workspace, rotate: bool) -> api::Result<Gateway> {
    let gateway = gateway_ask(app, op, w, rotate).await?;
    state_note(app, w, gateway.state.clone()).await?;
    Ok(gateway)
}

async fn gateway_ask(app: &App, op: &Op, w: &Workspace, rotate: bool) -> api::Result<Gateway> {
    let (_, assertion) = op.client()?;
    let ask = mint::Op::GatewayToken {
        assertion: assertion.to_owned(),
        workspace: w.id.clone(),
        rotate,
    };
    app.peers.mint.call(&op.request_id, &ask).await
}

async fn raw_token(app: &App, op: &Op, w: &Workspace, rotate: bool) -> api::Result<Raw> {
    let (_, assertion) = op.client()?;
    let ask = mint::Op::RawToken {
        assertion: assertion.to_owned(),
        workspace: w.id.clone(),
        rotate,
    };
    let raw: Raw = app.peers.mint.call(&op.request_id, &ask).await?;
    state_note(app, w, raw.state.clone()).await?;
    Ok(raw)
}

/// Keeps the newest token state for the next start; the running guest hears it from the edge.
async fn state_note(app: &App, w: &Workspace, text: String) -> api::Result<()> {
    let new = token_state_check(app, w, &text)?;
    app.store
        .workspace_update(w, app.now_ms(), |row| {
            let newer = token_state_check(app, row, &row.doc.token_state)
                .map_or(true, |old| new.seq > old.seq);
            if newer {
                row.doc.token_state.clone_from(&text);
            }
            Ok(())
        })
        .await
        .map(|_| app.wake.notify_one())
}
