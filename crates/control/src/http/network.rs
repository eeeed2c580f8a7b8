//! The firewall layer.

use super::fields::Fields;
use super::{Answer, Call, view};
use crate::app::App;
use crate::app::network::{Patch, network_get, network_update};
use crate::op::Op;
use std::sync::Arc;

/// `GET /workspace/{ws}/network`
pub async fn get(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let seen = network_get(&app, &op, call.ws()).await?;
    Ok(Answer::ok(view::network(&seen)))
}

/// `PATCH /workspace/{ws}/network`
pub async fn update(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    refuse(&call.body)?;
    let patch = Patch {
        public_access: call.body.flag("public_access")?,
        ingress_ports: call.body.ports("ingress_ports")?,
    };
    let seen = network_update(&app, &op, call.ws(), patch).await?;
    Ok(Answer::ok(view::network(&seen)))
}

/// Refuses what this version's network does not do: outbound is closed, and there are no links.
///
/// # Errors
/// The field.
pub fn refuse(body: &Fields) -> api::Result<()> {
    if body.flag("allow_internet")? == Some(true) {
        return Err(body.wrong(
            "allow_internet",
            "this version has no way out of a workspace; leave it out, or send false",
        ));
    }
    if body.get("outbound_mode").is_some_and(|m| m != "managed") {
        return Err(super::fields::not_supported("outbound_mode"));
    }
    body.refuse(&[
        "ingress",
        "egress",
        "egress_ports",
        "private_link_ids",
        "custom_proxy",
    ])
}
