//! ACC: two independent layers.

use super::Finding;
use super::world::World;
use anyhow::ensure;
use model::limits::{PORT_AGENT_RAW, PORT_AGENT_TLS};
use serde_json::json;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Within this a revoked token must be refused.
const REVOKED_WITHIN: Duration = Duration::from_secs(1);

pub(super) async fn acc_1(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.make(json!({})).await?;
    let slot = w.slot(&id)?;
    let before = w.probe.counters(slot.slot)?;
    let mut met = Vec::new();
    for port in [PORT_AGENT_TLS, PORT_AGENT_RAW, 22, 80] {
        let answer = w
            .probe
            .dial(SocketAddr::new(slot.net.ip.parse()?, port), None)?;
        ensure!(
            is_silence(&answer),
            "port {port} of a new workspace: {answer}"
        );
        met.push(answer);
    }
    let (nobody, _) = w.gateway("", "/health").await?;
    let (forged, _) = w.gateway("e30.e30.e30", "/health").await?;
    ensure!(
        (nobody, forged) == (401, 401),
        "without a token {nobody}, with a forged one {forged}"
    );
    let after = w.probe.counters(slot.slot)?;
    let dropped = after.in_dropped_packets - before.in_dropped_packets;
    ensure!(
        dropped >= 4,
        "only {dropped} packets were counted as dropped"
    );
    ensure!(
        after.in_packets == before.in_packets,
        "{} packets reached the VM",
        after.in_packets - before.in_packets
    );
    w.delete(&id).await?;
    Finding::pass(format!(
        "4 ports dialled past the edge: {}; nftables dropped {dropped} packets, 0 reached the VM; gateway without and with a forged token: 401",
        met.join(", ")
    ))
}

pub(super) async fn acc_2(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.shared().await?;
    let slot = w.slot(&id)?;
    let agent = SocketAddr::new(slot.net.ip.parse()?, PORT_AGENT_TLS);
    let closed = w.as_edge(&["dial", &agent.to_string()], "")?;
    ensure!(
        is_silence(&closed),
        "closed, the edge's own dial met {closed}"
    );
    w.public(&id, true).await?;
    let open = w.as_edge(&["dial", &agent.to_string()], "")?;
    let other = w.probe.dial(agent, None)?;
    let port = SocketAddr::new(agent.ip(), 22);
    let other_port = w.as_edge(&["dial", &port.to_string()], "")?;
    w.public(&id, false).await?;
    let again = w.as_edge(&["dial", &agent.to_string()], "")?;
    ensure!(
        open == "open",
        "public_access on, the edge's dial met {open}"
    );
    ensure!(is_silence(&other), "another process's dial met {other}");
    ensure!(
        is_silence(&other_port),
        "port 22 from the edge met {other_port}"
    );
    ensure!(
        is_silence(&again),
        "closed again, the edge's dial met {again}"
    );
    Finding::pass(format!(
        "edge→9991: {closed} while closed, {open} while open, {again} after; another process→9991: {other}; edge→22: {other_port}"
    ))
}

pub(super) async fn acc_3(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.shared().await?;
    w.public(&id, true).await?;
    let token = w.owner.runtime_token(&id).await?;
    // Through the edge first: it tells the agent the newest token state before anything else.
    let (through, _) = w.gateway(&token, "/runtime").await?;
    ensure!(through == 200, "through the gateway: {through}");
    let slot = w.slot(&id)?;
    let call = |token: &str| w.as_edge(&["agent", &id, &slot.net.ip, "/runtime"], token);
    let none = call("")?;
    let forged = call("e30.e30.e30")?;
    let mut flipped = token.clone().into_bytes();
    if let Some(last) = flipped.last_mut() {
        *last = if *last == b'A' { b'B' } else { b'A' };
    }
    let flipped = call(&String::from_utf8_lossy(&flipped))?;
    let valid = call(&token)?;
    w.public(&id, false).await?;
    ensure!(
        [&none, &forged, &flipped].iter().all(|s| *s == "401"),
        "the agent itself, called with the edge's certificate: no token {none}, forged {forged}, flipped {flipped}"
    );
    ensure!(valid == "200", "with the valid token: {valid}");
    Finding::pass(
        "the agent called past the edge's checks, with the edge's own certificate: no token 401, forged 401, one bit off 401, valid 200",
    )
}

pub(super) async fn acc_5(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.shared().await?;
    let slot = w.slot(&id)?;
    let ip = slot.net.ip.parse()?;
    let dial = |port: u16| w.as_edge(&["dial", &SocketAddr::new(ip, port).to_string()], "");
    w.network(&id, &json!({ "public_access": true, "ingress_ports": [] }))
        .await?;
    let (agent, three) = (dial(PORT_AGENT_TLS)?, dial(3000)?);
    w.network(&id, &json!({ "ingress_ports": [3000] })).await?;
    let (three_open, four) = (dial(3000)?, dial(4000)?);
    let other = w.probe.dial(SocketAddr::new(ip, 3000), None)?;
    w.network(&id, &json!({ "public_access": false })).await?;
    let (agent_shut, three_shut) = (dial(PORT_AGENT_TLS)?, dial(3000)?);
    ensure!(
        agent == "open" && is_silence(&three),
        "public_access alone: 9991 {agent}, 3000 {three}"
    );
    // Nothing listens on 3000 inside: the guest itself refuses, which proves that the packet came.
    ensure!(
        matches!(three_open.as_str(), "open" | "refused")
            && is_silence(&four)
            && is_silence(&other),
        "port 3000 opened: edge→3000 {three_open}, edge→4000 {four}, another process→3000 {other}"
    );
    ensure!(
        is_silence(&agent_shut) && is_silence(&three_shut),
        "closed: 9991 {agent_shut}, 3000 {three_shut}"
    );
    Finding::pass(format!(
        "public_access alone: 9991 {agent}, 3000 {three}; with ingress_ports [3000]: 3000 {three_open} (by the guest), 4000 {four}, 3000 from another process {other}; closed again: {agent_shut}, {three_shut}"
    ))
}

pub(super) async fn acc_7(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.shared().await?;
    w.public(&id, true).await?;
    let old = w.owner.runtime_token(&id).await?;
    let lifetime = lifetime_s(&old)?;
    ensure!(lifetime <= 3600, "the gateway token lives {lifetime} s");
    let (before, _) = w.gateway(&old, "/runtime").await?;
    let raw = raw_token(w, &id).await?;
    let path = format!("/workspace/{id}/runtime-api-access/token");
    w.owner.post(&path, &json!({})).await?;
    let rotated = Instant::now();
    let refused = loop {
        let (status, _) = w.gateway(&old, "/runtime").await?;
        if status == 401 || rotated.elapsed() > REVOKED_WITHIN {
            break status;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let after_ms = rotated.elapsed().as_millis();
    let new = w.owner.runtime_token(&id).await?;
    let (fresh, _) = w.gateway(&new, "/runtime").await?;
    let slot = w.slot(&id)?;
    let at_guest = w.as_edge(&["agent", &id, &slot.net.ip, "/runtime"], &old)?;
    // The raw token goes to the agent's own port, without the edge.
    w.network(&id, &json!({ "ingress_ports": [PORT_AGENT_RAW] }))
        .await?;
    let direct = |t: &str| w.as_edge(&["agent-raw", &slot.net.ip, "/runtime"], t);
    let now = raw_token(w, &id).await?;
    let (raw_now, raw_old, raw_wrong) = (direct(&now)?, direct(&raw)?, direct(&"0".repeat(64))?);
    w.public(&id, false).await?;
    ensure!(before == 200, "a fresh token: {before}");
    ensure!(
        refused == 401,
        "a revoked token still answers {refused} after {after_ms} ms"
    );
    ensure!(
        at_guest == "401",
        "the guest itself still takes it: {at_guest}"
    );
    ensure!(fresh == 200, "the token after rotation: {fresh}");
    ensure!(raw != now, "the raw token is the same after rotation");
    ensure!(
        (raw_now.as_str(), raw_old.as_str(), raw_wrong.as_str()) == ("200", "401", "401"),
        "raw token: current {raw_now}, rotated away {raw_old}, wrong {raw_wrong}"
    );
    Finding::pass(format!(
        "gateway token of {lifetime} s: 200; rotated: refused by the edge after {after_ms} ms and by the guest; raw token: current 200, rotated away 401, wrong 401"
    ))
}

async fn raw_token(w: &World<'_>, id: &str) -> anyhow::Result<String> {
    let answer = w
        .owner
        .get(&format!("/workspace/{id}/runtime-api-access/token/raw"))
        .await?;
    let token = answer["token"].as_str().unwrap_or_default().to_owned();
    ensure!(token.len() == 64, "the raw token is not 256 bits of hex");
    Ok(token)
}

/// `exp - iat` of a JWT, which is not verified here.
fn lifetime_s(token: &str) -> anyhow::Result<i64> {
    use anyhow::Context as _;
    use base64::Engine as _;
    let claims = token.split('.').nth(1).context("no JWT")?;
    let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(claims)?;
    let claims: serde_json::Value = serde_json::from_slice(&claims)?;
    let time = |name: &str| claims[name].as_i64().with_context(|| format!("no {name}"));
    Ok(time("exp")? - time("iat")?)
}

/// Dropped: no answer of any kind came back.
pub(super) fn is_silence(answer: &str) -> bool {
    matches!(answer, "silence" | "dropped")
}
