//! The firewall layer of a workspace.

use super::App;
use super::workspace::{Seen, ready, workspace_for_act, workspace_get};
use crate::audit::Act;
use crate::limits::NETWORK_WAIT_MS;
use crate::op::Op;
use api::{Error, ErrorCode};
use std::sync::Arc;

/// A change of rules; nothing means unchanged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Patch {
    /// The edge may reach the agent.
    pub public_access: Option<bool>,
    /// Ports.
    pub ingress_ports: Option<Vec<u16>>,
}

/// The rules.
///
/// # Errors
/// [`ErrorCode::NotFound`], for another account's too.
pub async fn network_get(app: &App, op: &Op, name: &str) -> api::Result<Seen> {
    workspace_get(app, op, name).await
}

/// Changes the rules. A change that opens nothing is a closing act.
///
/// # Errors
/// [`ErrorCode::VmUnavailable`] if host does not confirm; it goes on by itself.
pub async fn network_update(
    app: &Arc<App>,
    op: &Op,
    name: &str,
    patch: Patch,
) -> api::Result<Seen> {
    let w = workspace_for_act(app, op, name).await?;
    let _busy = app.busy(&w.id);
    let mut act = Act::new("workspace.network", &w.account, w.id.as_str());
    if let Some(public) = patch.public_access {
        act.data.insert("public_access".into(), public.into());
    }
    if let Some(ports) = &patch.ingress_ports {
        act.data
            .insert("ingress_ports".into(), ports.clone().into());
    }
    let opens_edge = patch.public_access == Some(true) && !w.doc.public_access;
    let opens_port = patch
        .ingress_ports
        .as_ref()
        .is_some_and(|new| new.iter().any(|p| !w.doc.ingress_ports.contains(p)));
    let opening = opens_edge || opens_port;
    if opening {
        app.audit.intent(op, &act).await?;
    } else {
        app.audit.intent_closing(op, &act).await;
    }
    let seen = w.clone();
    let done = async {
        let w = app
            .store
            .workspace_update(&w, app.now_ms(), |w| {
                ready(w)?;
                // What was announced as closing must not open what another request closed.
                let moved = w.doc.public_access != seen.doc.public_access
                    || w.doc.ingress_ports != seen.doc.ingress_ports;
                if moved && !opening {
                    return Err(Error::new(
                        ErrorCode::Conflict,
                        "the rules were changed by another request; ask again",
                    ));
                }
                if let Some(public) = patch.public_access {
                    w.doc.public_access = public;
                }
                if let Some(ports) = &patch.ingress_ports {
                    w.doc.ingress_ports.clone_from(ports);
                }
                Ok(())
            })
            .await?;
        let actual = app.host_apply(op, &w, None, NETWORK_WAIT_MS).await?;
        if actual.generation < w.generation {
            return Err(Error::new(
                ErrorCode::VmUnavailable,
                "the machine has not confirmed the rules yet; it goes on, ask again",
            ));
        }
        Ok((w, Some(actual)))
    };
    let done = done.await;
    app.audit.outcome(op, &act, &done).await;
    done
}
